"""The C library's heap of a process that computes on the CPU."""

from __future__ import annotations

import ctypes
import glob
import os
import platform

# Parameters of mallopt (malloc.h of glibc) and their values.
_KEPT = (
    (-8, 1),  # M_ARENA_MAX: threads share the main heap; other heaps hold no large block
    (-4, 0),  # M_MMAP_MAX: no block gets pages of its own, which the kernel takes back when freed
    (-1, -1),  # M_TRIM_THRESHOLD: the end of the heap never goes back either
)
_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def keep_freed_memory() -> bool:
    """Makes the C library keep freed memory for the next allocation, if JAX will compute on the
    CPU.

    XLA allocates the temporary arrays of every update anew, and glibc gives blocks of that size
    back to the kernel, which then clears and maps each page again (README, "Speed").

    Call it before JAX's first computation: a thread that has allocated memory stays with its own
    heap. It is for programs of one shape, which ask for the same blocks again, as pretraining does
    (2.5 GB in place of 2.0 at the peak of a run of mini, batch 32, on a CPU). Blocks of many
    sizes leave gaps: a finetuning with batches of three lengths held 2.8 GB in place of 1.8, so
    finetuning does not call it.

    Returns: whether it did so. It does nothing without glibc, where the machine has an accelerator
    and JAX_PLATFORMS is not "cpu", and where GLIBC_TUNABLES or a MALLOC_ variable is set: that is
    the user's own choice.
    """
    own_choice = any(name.startswith(("GLIBC_TUNABLES", "MALLOC_")) for name in os.environ)
    if own_choice or platform.libc_ver()[0] != "glibc" or not _computes_on_cpu():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) for parameter, value in _KEPT)


def _computes_on_cpu() -> bool:
    if platforms := os.environ.get("JAX_PLATFORMS"):
        return platforms == "cpu"
    return not any(map(glob.glob, _ACCELERATORS))
