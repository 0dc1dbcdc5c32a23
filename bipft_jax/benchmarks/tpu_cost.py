"""Cost of a pretraining update on a TPU by the compiler's schedule, on a machine without a TPU.

    python -m bipft_jax.benchmarks.tpu_cost --topology v5e:2x2 --size base --batch 64 --length 128 \
        --recipes fp,bipft_a,bipft_b

The update (forward, backward, AdamW) is compiled for one chip of the topology. The command prints,
for each recipe, cycles by kind (`bipft_jax.pods.cost` says what they count, and "transfers" and
"heuristic" mean), memory, the fraction of the chip's peak that the model's FLOPs reach, and the
costliest modules, source lines and instructions. A schedule is not a measurement: use it to compare
programs and to see where their time goes.
"""

import argparse
import importlib.metadata
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding

from bipft_jax.benchmarks.workload import (
    Workload,
    add_workload_arguments,
    family_of,
    workload_of,
)
from bipft_jax.paths import require_local
from bipft_jax.pods import cost
from bipft_jax.pods.chips import CHIPS
from bipft_jax.pods.compiler import compiled_for_tpu, tpu
from bipft_jax.quantization.arithmetic import COMPUTE_MODES
from bipft_jax.training.flops import update_flops

Row = dict[str, Any]


def row(workload: Workload, recipe: str, compute: str, topology: str, costliest: int) -> Row:
    """Compiles one recipe's update and reads its cost.

    Returns: `cycles`, `charged_cycles` (the part of them without a schedule) and `charged` (its
      number of instructions), `cycles_by_kind`, `cycles_by_source`, `cycles_by_module`,
      `estimated_cycles` (the compiler's heuristic), `fused_attention` (whether the update uses
      it), `temp_bytes`, `argument_bytes`, `peak_fraction` and the list `costliest`.
    """
    chip, devices = tpu(topology)
    config = workload.config(recipe, compute)
    sharding = SingleDeviceSharding(devices[0])

    def on_device(tree):
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
        )

    arguments = on_device(workload.abstract_state(config)), None, on_device(workload.arrays(recipe))
    lowered = jax.jit(workload.update(config), donate_argnums=0).lower(*arguments)
    program = compiled_for_tpu(lowered)
    spent = cost.of(program, chip)
    heads = workload.head_products(config)
    flops = update_flops(config, workload.batch, workload.length, heads)
    memory = program.compiled.memory_analysis()
    return {
        "recipe": recipe,
        "compute": compute,
        "topology": topology,
        "fused_attention": getattr(config, "fused_attention", False),
        "cycles": spent.cycles,
        "charged_cycles": sum(charge.cycles for charge in spent.unscheduled),
        "charged": len(spent.unscheduled),
        "cycles_by_kind": spent.by_kind,
        "cycles_by_source": spent.by_source,
        "cycles_by_module": spent.by_module,
        "estimated_cycles": spent.estimated_cycles,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "peak_fraction": flops / spent.seconds(chip) / chip.peak("bf16"),
        "costliest": [_described(charge) for charge in spent.charges[:costliest]],
    }


def _described(charge: cost.Charge) -> Row:
    instruction = charge.instruction
    return {
        "cycles": charge.cycles,
        "count": charge.count,
        "kind": charge.kind,
        "bundles": charge.bundles,
        "products": charge.products,
        "memory": charge.memory,
        "estimated_cycles": charge.estimated_cycles,
        "estimated": instruction.estimated_cycles is not None,
        "instruction": instruction.name,
        "shape": instruction.shape.partition("{")[0],
        "source": charge.source,
        "operation": instruction.op_name.rpartition("/")[2],
    }


def report(rows: Sequence[Row], costliest: int) -> str:
    """The rows as text: one table, then each recipe's costliest modules, source lines and
    instructions.

    costliest: number of modules and of lines.
    """
    kinds = cost.KINDS
    cycles_of = {row["recipe"]: row["cycles"] for row in rows}
    lines = [
        "million cycles",
        f"{'recipe':<11} {'compute':<10} {'total':>7} {'of fp':>6} "
        + " ".join(f"{kind:>13}" for kind in kinds)
        + f" {'not scheduled':>13} {'heuristic':>9} {'temp GB':>8} {'arguments GB':>12} "
        f"{'of peak':>7}",
    ]
    for row in rows:
        fp = cycles_of.get(family_of(row["recipe"]).twin)
        ratio = "" if fp is None else f"{row['cycles'] / fp:.2f}"
        by_kind = " ".join(f"{row['cycles_by_kind'][kind] / 1e6:>13.1f}" for kind in kinds)
        missing = f"{row['charged']}: {row['charged_cycles'] / row['cycles']:.2%}"
        lines.append(
            f"{row['recipe']:<11} {row['compute']:<10} {row['cycles'] / 1e6:>7.1f} {ratio:>6} "
            f"{by_kind} {missing:>13} {row['estimated_cycles'] / 1e6:>9.1f} "
            f"{row['temp_bytes'] / 1e9:>8.2f} {row['argument_bytes'] / 1e9:>12.2f} "
            f"{row['peak_fraction']:>7.0%}"
        )
    for row in rows:
        title = f"{row['recipe']}, {row['compute']}"
        for what in ("module", "source"):
            lines += ["", f"{title}: by {what} (million cycles)"]
            first = itertools.islice(row[f"cycles_by_{what}"].items(), costliest)
            lines += [f"{cycles / 1e6:>7.2f} {name}" for name, cycles in first]
        lines += ["", f"{title}: instructions (million cycles, bounds, times run)"]
        lines.append(f"{'cycles':>7} {'bundles':>7} {'product':>7} {'memory':>7}")
        for item in row["costliest"]:
            bundles = "-" if item["bundles"] is None else f"{item['bundles'] / 1e6:.2f}"
            lines.append(
                f"{item['cycles'] / 1e6:>7.2f} {bundles:>7} {item['products'] / 1e6:>7.2f} "
                f"{item['memory'] / 1e6:>7.2f} {item['count']:>4} {item['kind']:<13} "
                f"{item['instruction']:<40} {item['shape'][:32]:<32} {item['source']} "
                f"{item['operation']}"
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
        "machine, and prints what their schedules cost.",
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
        "--costliest",
        type=int,
        default=10,
        help="lines of each list (default %(default)s)",
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
    print(report(rows, parsed.costliest))


if __name__ == "__main__":
    main()
