"""Which arithmetic multiplies codes, and which makes gradients: the one place that decides.

Codes are small integers, so int8 (accumulated in int32), bfloat16 (accumulated in float32) and
float32 give the same product; the choice is one of speed. In the backward pass one operand is a
cotangent, which bfloat16 rounds to 8 bits, and the other a code, exact in bfloat16, or, where the
scale is not one number (rows of BiBERT's weights, offsets of several bits), a value that is rounded
too. Gradients of arrays differ by less than 1 %, those of scales, sums that nearly cancel, by a
few; a float32 mode is there for those who compare. On a TPU it needs `jax_default_matmul_precision`
"highest" as well: without, float32 arrays are multiplied in one pass of bfloat16.

"auto" is decided for the platform that a program is compiled for, by what was measured there:

===========================  =========  =================  ========
platform                     linears    attention          gradient
===========================  =========  =================  ========
TPU (compiler's estimates)   int8       bfloat16           bfloat16
CUDA (H200)                  int8       bfloat16           bfloat16
CPU with amx_int8            int8       int8               bfloat16
CPU with avx512_bf16         bfloat16   bfloat16           bfloat16
CPU with AVX VNNI            int8       int8               float32
other CPUs, other platforms  float32    float32            float32
===========================  =========  =================  ========

Attention multiplies narrow heads in batches, transposed, and TPUs transpose int8 arrays slowly.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

# "simulated" multiplies quantised values instead of codes, as binarisation usually is written.
COMPUTE_MODES = ("auto", "int8", "bfloat16", "float32", "simulated")
BACKWARD_MODES = ("auto", "bfloat16", "float32")
PLATFORMS = ("cpu", "cuda", "tpu")  # those that "auto" knows


def check_modes(compute: str, backward: str) -> None:
    """Raises: ValueError for a mode that does not exist."""
    for name, mode, modes in (
        ("compute", compute, COMPUTE_MODES),
        ("backward", backward, BACKWARD_MODES),
    ):
        if mode not in modes:
            raise ValueError(f"unknown {name} {mode!r}: one of {', '.join(modes)}")


def widened(dtype: Any) -> np.dtype:
    """float32, or the type itself where it is wider: of scales, statistics, sums and logits."""
    return np.promote_types(dtype, np.float32)  # JAX's own would refuse under strict promotion


def forward_mode(platform: str, batched: bool) -> str:
    """What compute="auto" is there; batched: whether the product has batch dimensions."""
    if platform in ("tpu", "cuda"):
        return "bfloat16" if batched else "int8"
    return _of_cpu()[0] if platform == "cpu" else "float32"


def backward_mode(platform: str) -> str:
    """What backward="auto" is there."""
    if platform in ("tpu", "cuda"):
        return "bfloat16"
    return _of_cpu()[1] if platform == "cpu" else "float32"


@functools.cache
def _of_cpu() -> tuple[str, str]:
    """This machine's arithmetic, forward and backward; says once if there is no fast one."""
    flags = _cpu_flags()
    if "amx_int8" in flags:
        return "int8", "bfloat16"
    if "avx512_bf16" in flags:
        return "bfloat16", "bfloat16"
    if flags & {"avx512_vnni", "avx_vnni"}:
        return "int8", "float32"
    if jax.default_backend() == "cpu":  # on the host of an accelerator it does not matter
        warnings.warn(
            "this CPU has no fast arithmetic for 1-bit products (AMX, AVX512-BF16 or VNNI): they "
            "are made in float32, with the same results",
            stacklevel=2,
        )
    return "float32", "float32"


def _cpu_flags() -> frozenset[str]:
    """Instruction sets as Linux names them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))
