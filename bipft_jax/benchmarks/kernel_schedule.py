"""Length of the TPU compiler's own schedule of the fused attention kernels, without a TPU.

    python -m bipft_jax.benchmarks.kernel_schedule --topology v5e:2x2 --size base --batch 64

The compiler gives no cycle estimate for kernels, so `tpu_cost` charges them a lower bound: their
bytes, or their products. But the compiler can dump its schedule: the instruction words ("bundles")
of one program, one per cycle without stalls. Multiplied by the number of programs in an update, it
is an estimate like those for other instructions.
"""

import argparse
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from bipft_jax.benchmarks.tpu_cost import add_topology_argument, tpu
from bipft_jax.models.fused_attention import (
    CHANNELS,
    DropoutWords,
    Residuals,
    Scales,
    fused_attention,
)
from bipft_jax.models.recipes import RECIPES, SIZES, Size


def bundles(directory: Path) -> dict[str, int]:
    """Number of bundles of each attention kernel by name, from the compiler's dump.

    Raises: ValueError if the dump has none.
    """
    found = {}
    for path in directory.glob("*schedule-analysis_final_bundles.txt"):
        name = re.search(r"-(binary_attention\w*)\.\d+-\d+-", path.name)
        if name:
            found[name[1]] = int(
                re.search(r"total scheduled bundles:\s*(\d+)", path.read_text())[1]
            )
    if not found:
        raise ValueError("this libtpu does not write down its schedule of kernels")
    return found


def compile_kernels(size: Size, length: int, estimators: bool, device: jax.Device) -> None:
    """Compiles attention and its gradient, in bfloat16 with dropout, for one sequence."""
    sharding = SingleDeviceSharding(device)

    def array(shape: tuple[int, ...], dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    x = array((1, length, size.hidden))
    residuals = Residuals(array((1, length, length)), array((1, length))) if estimators else None
    words = (array((1, size.heads, length), jnp.uint32), array((length,), jnp.uint32))

    def both(query, key, value, mask, scales, residuals, words, cotangent):
        def context(query, key, value, scales, residuals):
            return fused_attention(
                query,
                key,
                value,
                mask,
                scales,
                residuals,
                DropoutWords(*words),
                heads=size.heads,
                dropout=0.1,
                backward="auto",
            )

        result, pullback = jax.vjp(context, query, key, value, scales, residuals)
        return result, pullback(cotangent)

    scales = Scales(*[array((), jnp.float32)] * 4)
    mask = array((1, length), jnp.int32)
    jax.jit(both).lower(x, x, x, mask, scales, residuals, words, x).compile()


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with a message for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.benchmarks.kernel_schedule",
        description="Compiles the fused attention kernels for one TPU chip, on any machine, and "
        "prints how many cycles an update of their schedule takes.",
    )
    add_topology_argument(parser)
    parser.add_argument("--size", default="base", help="of: %(choices)s", choices=SIZES)
    parser.add_argument("--batch", type=int, default=64, help="sequences (default %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens (default %(default)s)")
    given = parser.parse_args(arguments)
    size = SIZES[given.size]
    programs = given.batch * (size.hidden // CHANNELS) * size.layers
    print(f"{'recipe':<10} {'kernel':<26} {'bundles':>8} {'programs':>9} {'million cycles':>15}")
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        # libtpu reads this only when it is loaded.
        os.environ["LIBTPU_INIT_ARGS"] = (
            f"{os.environ.get('LIBTPU_INIT_ARGS', '')} --xla_jf_dump_to={name} "
            "--xla_jf_dump_llo_text=true"
        )
        try:
            _, devices = tpu(given.topology)
            for recipe in ("bipft_a", "bipft_b"):
                for path in directory.iterdir():
                    path.unlink()
                estimators = RECIPES[recipe].estimator_rank > 0
                compile_kernels(size, given.length, estimators, devices[0])
                for kernel, count in sorted(bundles(directory).items()):
                    cycles = count * programs / 1e6
                    print(f"{recipe:<10} {kernel:<26} {count:>8} {programs:>9} {cycles:>15.2f}")
        except ValueError as error:
            raise SystemExit(f"error: {error}") from error


if __name__ == "__main__":
    main()
