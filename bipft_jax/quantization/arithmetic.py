"""Chooses the arithmetic of products of codes, forward, and of gradients, backward.

Codes are small integers, so int8 (accumulated in int32), bfloat16 (accumulated in float32) and
float32 give the same product; the choice is one of speed. In the backward pass one operand is a
cotangent, which bfloat16 rounds to 8 bits. The other is a code, exact in bfloat16, or a value,
which is rounded too: of weights with several scales (rows of BiBERT's, groups of BitNet's), of
activations with an offset (several unsigned bits). Gradients of arrays differ by less than 1 %,
those of scales, sums that nearly cancel, by a few percent; the mode "float32" is for comparisons.
On a TPU it also needs `jax_default_matmul_precision` "highest": by default a TPU multiplies float32
arrays in one bfloat16 pass.

"auto" selects by the platform that a program is compiled for, from measurements there:

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

Attention is a batched product of narrow, transposed heads, and TPUs transpose int8 arrays slowly.
"""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

# "simulated" multiplies quantised values instead of codes, as most implementations do.
COMPUTE_MODES = ("auto", "int8", "bfloat16", "float32", "simulated")
BACKWARD_MODES = ("auto", "bfloat16", "float32")
PLATFORMS = ("cpu", "cuda", "tpu")  # on which "auto" has a choice; elsewhere it is float32


def check_modes(compute: str, backward: str) -> None:
    """Raises: ValueError for an unknown mode."""
    for name, mode, modes in (
        ("compute", compute, COMPUTE_MODES),
        ("backward", backward, BACKWARD_MODES),
    ):
        if mode not in modes:
            raise ValueError(f"unknown {name} {mode!r}: one of {', '.join(modes)}")


def widened(dtype: Any) -> np.dtype:
    """The wider of the type and float32: the type of scales, statistics, sums and logits."""
    return np.promote_types(dtype, np.float32)  # JAX's own function raises under strict promotion


def forward_mode(platform: str, batched: bool) -> str:
    """The mode of compute="auto"; batched: whether the product has batch dimensions."""
    if platform in ("tpu", "cuda"):
        return "bfloat16" if batched else "int8"
    return _of_cpu()[0] if platform == "cpu" else "float32"


def backward_mode(platform: str) -> str:
    """The mode of backward="auto"."""
    if platform in ("tpu", "cuda"):
        return "bfloat16"
    return _of_cpu()[1] if platform == "cpu" else "float32"


@functools.cache
def _of_cpu() -> tuple[str, str]:
    """The modes of this machine's CPU, forward and backward; warns once if it has no fast one."""
    flags = _cpu_flags()
    if "amx_int8" in flags:
        return "int8", "bfloat16"
    if "avx512_bf16" in flags:
        return "bfloat16", "bfloat16"
    if flags & {"avx512_vnni", "avx_vnni"}:
        return "int8", "float32"
    if jax.default_backend() == "cpu":  # irrelevant on the host of an accelerator
        warnings.warn(
            "this CPU has no fast arithmetic for 1-bit products (AMX, AVX512-BF16 or VNNI): they "
            "are computed in float32, with the same results",
            stacklevel=2,
        )
    return "float32", "float32"


def _cpu_flags() -> frozenset[str]:
    """Instruction sets by their Linux names; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), []))
