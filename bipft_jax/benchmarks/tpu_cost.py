"""Cost of a pretraining update on a TPU by the compiler's estimate, on a machine without a TPU.

    python -m bipft_jax.benchmarks.tpu_cost --topology v5e:2x2 --size base --batch 64 --length 128 \
        --recipes fp,bipft_a,bipft_b

The update (forward, backward, AdamW) is compiled for one chip of the topology. The command prints,
for each recipe, estimated cycles by kind, memory, the fraction of the chip's peak that the model's
FLOPs reach, and the costliest instructions with their source lines. An estimate is not a
measurement: use it to compare programs and to see where their time goes.
"""

import argparse
import importlib.metadata
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from bipft_jax.benchmarks.workload import Workload, add_workload_arguments, workload_of
from bipft_jax.objectives.mlm_nsp import head_products
from bipft_jax.paths import require_local
from bipft_jax.pods import hlo
from bipft_jax.pods.chips import CHIPS
from bipft_jax.pods.compiler import compiled_for_tpu, tpu
from bipft_jax.quantization.arithmetic import COMPUTE_MODES
from bipft_jax.training.flops import update_flops

Row = dict[str, Any]


def row(workload: Workload, recipe: str, compute: str, topology: str, costliest: int) -> Row:
    """Compiles one recipe's update and reads its cost.

    Returns: `cycles` (estimated and charged), `charged_cycles` (the part without a compiler's
      estimate), `cycles_by_kind`, `fused_attention` (whether the update uses it), `temp_bytes`,
      `argument_bytes`, `peak_fraction` and the list `costliest`.
    """
    chip, devices = tpu(topology)
    config = workload.config(recipe, compute)
    sharding = SingleDeviceSharding(devices[0])

    def on_device(tree):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    arguments = on_device(workload.abstract_state(config)), None, on_device(workload.arrays())
    lowered = jax.jit(workload.update(config), donate_argnums=0).lower(*arguments)
    program = compiled_for_tpu(lowered)
    module = program.module
    charges = hlo.charges(module, chip)
    cycles = sum(charge.cycles for charge in charges)
    heads = head_products(config, workload.predictions)
    flops = update_flops(config, workload.batch, workload.length, heads)
    memory = program.compiled.memory_analysis()
    return {
        "recipe": recipe,
        "compute": compute,
        "topology": topology,
        "fused_attention": config.fused_attention,
        "cycles": cycles,
        "charged_cycles": sum(c.cycles for c in charges if not c.estimated),
        "cycles_by_kind": hlo.by_kind(charges),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "peak_fraction": flops / (cycles / chip.clock) / chip.peak("bf16"),
        "costliest": [_described(charge, module) for charge in charges[:costliest]],
    }


def _described(charge: hlo.Charge, module: hlo.Module) -> Row:
    instruction = charge.instruction
    stack = module.locations.get(instruction.frame, [])
    # Our calling line says more than the library's line.
    source = next((place for place in stack if "/bipft_jax/" in place), (stack or ["?"])[0])
    return {
        "cycles": charge.cycles,
        "count": charge.count,
        "kind": charge.kind,
        "estimated": charge.estimated,
        "instruction": instruction.name,
        "shape": instruction.shape.partition("{")[0],
        "source": re.sub(r".*/(bipft_jax|site-packages)/", "", source),
        "operation": instruction.op_name.rpartition("/")[2],
    }


def report(rows: Sequence[Row]) -> str:
    """The rows as text: one table, then each recipe's costliest instructions."""
    kinds = hlo.KINDS
    fp = next((row["cycles"] for row in rows if row["recipe"] == "fp"), None)
    lines = [
        "million cycles",
        f"{'recipe':<10} {'compute':<10} {'total':>7} {'of fp':>6} "
        + " ".join(f"{kind:>13}" for kind in kinds)
        + f" {'not estimated':>13} {'temp GB':>8} {'arguments GB':>12} {'of peak':>7}",
    ]
    for row in rows:
        ratio = "" if fp is None else f"{row['cycles'] / fp:.2f}"
        by_kind = " ".join(f"{row['cycles_by_kind'][kind] / 1e6:>13.1f}" for kind in kinds)
        lines.append(
            f"{row['recipe']:<10} {row['compute']:<10} {row['cycles'] / 1e6:>7.1f} {ratio:>6} "
            f"{by_kind} {row['charged_cycles'] / 1e6:>13.1f} {row['temp_bytes'] / 1e9:>8.2f} "
            f"{row['argument_bytes'] / 1e9:>12.2f} {row['peak_fraction']:>7.0%}"
        )
    for row in rows:
        lines += ["", f"{row['recipe']}, {row['compute']}: costliest (million cycles, times run)"]
        for item in row["costliest"]:
            lines.append(
                f"{item['cycles'] / 1e6:>7.2f} {item['count']:>4} {item['kind']:<13} "
                f"{item['instruction']:<40} {item['shape'][:32]:<32} {item['source']} "
                f"{item['operation']}{'' if item['estimated'] else ' (not estimated)'}"
            )
    return "\n".join(lines)


def add_topology_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the flag for the topology to compile for."""
    parser.add_argument(
        "--topology", default="v5e:2x2", help=f"of {', '.join(CHIPS)} (default %(default)s)"
    )


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.benchmarks.tpu_cost",
        description="Compiles the pretraining update of several recipes for one TPU chip, on any "
        "machine, and prints what its compiler expects them to cost.",
    )

    add_topology_argument(parser)
    add_workload_arguments(parser, batch=64, dtype="bfloat16", remat="lean")
    parser.add_argument(
        "--compute", default="auto", choices=COMPUTE_MODES, help="arithmetic of the products"
    )
    parser.add_argument(
        "--fused_attention", action="store_true", help="for the recipes that have it"
    )
    parser.add_argument(
        "--unroll", action="store_true", help="do not scan the layers: compiles for many minutes"
    )
    parser.add_argument(
        "--costliest", type=int, default=10, help="instructions to list (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parsed = parser.parse_args(arguments)
    for name in ("batch", "length"):
        if getattr(parsed, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(parsed, name)}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with a message for wrong arguments."""
    parsed = _parse_arguments(arguments)
    workload = workload_of(
        parsed, scan_layers=not parsed.unroll, fused_attention=parsed.fused_attention
    )
    rows = []
    try:
        require_local(vars(parsed))
        for recipe, compute in workload.variants(parsed.recipes, [parsed.compute]):
            print(f"compiling {recipe} for {parsed.topology}", flush=True)
            rows.append(row(workload, recipe, compute, parsed.topology, parsed.costliest))
        if parsed.json is not None:
            parsed.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(
        f"\none chip of {parsed.topology}, jax {jax.__version__}, libtpu "
        f"{importlib.metadata.version('libtpu')}; {parsed.size}, {parsed.batch} x {parsed.length}, "
        f"{parsed.dtype}, remat {parsed.remat}{', layers unrolled' if parsed.unroll else ''}"
        f"{', attention fused where it can be' if parsed.fused_attention else ''}"
    )
    print(report(rows))


if __name__ == "__main__":
    main()
