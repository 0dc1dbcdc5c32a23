"""Times one pretraining update for several recipes and kinds of arithmetic.

    python -m bipft_jax.benchmarks.train_step --size base --batch 8 --length 128 \
        --recipes fp,bipft_a,bipft_b --compute auto,simulated
    python -m bipft_jax.benchmarks.train_step --size 125m --recipes bitnet_fp,bitnet_b158,bitnet_b1

All variants take turns in one process, so that other load slows them alike; compare the ratios.
`simulated` is the usual implementation of the same model: operands are quantised and dequantised in
floating point and multiplied as floats.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from bipft_jax.benchmarks.workload import (
    Workload,
    add_compute_argument,
    add_workload_arguments,
    family_of,
    workload_of,
)
from bipft_jax.heap import keep_freed_memory
from bipft_jax.models.recipes import SIZES
from bipft_jax.paths import require_local
from bipft_jax.quantization.arithmetic import BACKWARD_MODES

Row = dict[str, Any]

PEER = "hf_bert"


@dataclasses.dataclass
class Variant:
    """recipe, compute: names. peak_bytes: arguments, results and temporaries of the compiled update
    (for the peer: growth of the process). run: runs one update and waits for it."""

    recipe: str
    compute: str
    peak_bytes: int | None
    run: Callable[[], Any]


def compile_variant(workload: Workload, recipe: str, compute: str) -> Variant:
    """Compiles the update of a recipe, with its own state."""
    config = workload.config(recipe, compute)
    batch = jax.device_put(workload.arrays(recipe))
    state = workload.state(config)
    update = jax.jit(workload.update(config), donate_argnums=0).lower(state, None, batch).compile()
    memory = update.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )

    def run():
        nonlocal state
        state, metrics = update(state, None, batch)
        return jax.block_until_ready((state, metrics))

    return Variant(recipe, compute, peak, run)


def hugging_face_variant(workload: Workload) -> Variant:
    """`transformers`' BertForPreTraining in float32 with torch's AdamW; same shapes and dropout.

    Raises: ValueError if torch or transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise ValueError(
            f"--peer needs {error.name}: pip install 'bipft_jax[peers]', in a checkout "
            "pip install -e '.[peers]'"
        ) from error
    if workload.size not in SIZES:
        raise ValueError(f"--peer is an encoder, which has no size {workload.size!r}")
    size, before = SIZES[workload.size], _reset_resident_peak()
    model = transformers.BertForPreTraining(
        transformers.BertConfig(
            vocab_size=workload.vocab_size,
            num_hidden_layers=size.layers,
            hidden_size=size.hidden,
            num_attention_heads=size.heads,
            intermediate_size=4 * size.hidden,
            hidden_dropout_prob=workload.dropout,
            attention_probs_dropout_prob=workload.dropout,
        )
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, eps=1e-6, weight_decay=0.01)
    batch = workload.arrays("fp")
    labels = torch.full(batch["input_ids"].shape, -100)  # not predicted
    positions = torch.tensor(batch["mlm_positions"], dtype=torch.int64)
    labels.scatter_(1, positions, torch.tensor(batch["mlm_ids"], dtype=torch.int64))
    inputs = {
        name: torch.tensor(batch[name], dtype=torch.int64)
        for name in ("input_ids", "token_type_ids", "attention_mask")
    }
    inputs |= {"labels": labels}
    inputs |= {"next_sentence_label": torch.tensor(batch["nsp_labels"], dtype=torch.int64)}

    def run():
        optimizer.zero_grad(set_to_none=True)
        model(**inputs).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    run()
    after = _resident_peak()
    peak = None if before is None or after is None else after - before
    return Variant(PEER, "float32", peak, run)


def _resident_peak(name: str = "VmHWM") -> int | None:
    """The peak resident memory of this process, in bytes; None if /proc does not have it."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    kib = next((line.split()[1] for line in lines if line.startswith(name)), None)
    return None if kib is None else 1024 * int(kib)


def _reset_resident_peak() -> int | None:
    """Resets the peak to the current resident memory; returns it in bytes, or None if it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    return _resident_peak("VmRSS")


def measure(variants: Sequence[Variant], tokens: int, repeats: int) -> list[Row]:
    """Runs the variants in turn, once to warm up and `repeats` times to measure.

    Returns: rows with `recipe`, `compute`, the median `seconds`, `fastest` and `slowest`,
      `tokens_per_second`, `ratio_to_fp` (of seconds, to the full-precision recipe of the family;
      None without it) and `peak_bytes`.
    """
    times: list[list[float]] = [[] for _ in variants]
    for repeat in range(repeats + 1):
        for variant, seconds in zip(variants, times):
            start = time.perf_counter()
            variant.run()
            if repeat:
                seconds.append(time.perf_counter() - start)
    medians = [statistics.median(seconds) for seconds in times]
    of_recipe = {variant.recipe: median for variant, median in zip(variants, medians)}
    twins = [
        of_recipe.get("fp" if v.recipe == PEER else family_of(v.recipe).twin) for v in variants
    ]
    return [
        {
            "recipe": variant.recipe,
            "compute": variant.compute,
            "seconds": median,
            "tokens_per_second": tokens / median,
            "ratio_to_fp": None if twin is None else median / twin,
            "peak_bytes": variant.peak_bytes,
            "fastest": min(seconds),
            "slowest": max(seconds),
        }
        for variant, median, twin, seconds in zip(variants, medians, twins, times)
    ]


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    lines = [
        f"{'recipe':<11} {'compute':<10} {'seconds':>9} {'(range)':>17} {'tokens/s':>10} "
        f"{'of fp':>6} {'peak MB':>9}"
    ]
    for row in rows:
        spread = f"({row['fastest']:.3f} to {row['slowest']:.3f})"
        ratio = "" if row["ratio_to_fp"] is None else f"{row['ratio_to_fp']:.2f}"
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:,.0f}"
        lines.append(
            f"{row['recipe']:<11} {row['compute']:<10} {row['seconds']:>9.3f} {spread:>17} "
            f"{row['tokens_per_second']:>10,.0f} {ratio:>6} {peak:>9}"
        )
    return "\n".join(lines)


def machine() -> str:
    """Device, cores and jax version, to record with the numbers."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{device.device_kind} ({device.platform}), {cores} CPU cores, jax {jax.__version__}"


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.benchmarks.train_step",
        description="Times the pretraining update (forward, backward, AdamW) of several recipes, "
        "which take turns in one process; prints medians, their ratio to the full-precision recipe "
        "(fp, of decoders bitnet_fp), and memory.",
    )

    add_workload_arguments(parser, batch=8, dtype="float32", remat="none")
    add_compute_argument(parser)
    parser.add_argument(
        "--backward",
        default="auto",
        choices=BACKWARD_MODES,
        help="arithmetic of the gradients of products of codes (default %(default)s)",
    )
    parser.add_argument(
        "--accumulation", type=int, default=1, help="micro-batches per update (default %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="measured updates of each (default %(default)s)"
    )
    parser.add_argument(
        "--peer",
        action="store_true",
        help=f"also time Hugging Face's float32 BertForPreTraining ({PEER}); needs torch and "
        "transformers: pip install -e '.[peers]'. It decodes every position, not only masked ones",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parsed = parser.parse_args(arguments)
    for name in ("batch", "length", "accumulation", "repeats"):
        if getattr(parsed, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(parsed, name)}")
    if parsed.batch % parsed.accumulation:
        parser.error(f"--accumulation {parsed.accumulation} does not divide --batch {parsed.batch}")
    return parsed


def variants_of(parsed: argparse.Namespace) -> list[Variant]:
    """Compiles all requested variants and prints progress.

    Raises: ValueError for an unknown recipe or kind of arithmetic, or a peer that is not installed.
    """
    workload = workload_of(parsed, backward=parsed.backward, accumulation=parsed.accumulation)
    variants = [hugging_face_variant(workload)] if parsed.peer else []
    for recipe, compute in workload.variants(parsed.recipes, parsed.compute):
        print(f"compiling {recipe}, {compute}", flush=True)
        variants.append(compile_variant(workload, recipe, compute))
    return variants


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with a message for wrong arguments."""
    parsed = _parse_arguments(arguments)
    try:
        require_local(vars(parsed))
        keep_freed_memory()  # as pretraining does
        rows = measure(variants_of(parsed), parsed.batch * parsed.length, parsed.repeats)
        if parsed.json is not None:
            parsed.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    print(
        f"\n{machine()}; {parsed.size}, {parsed.batch} x {parsed.length}, {parsed.dtype}, "
        f"gradients of products of codes: {parsed.backward}"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
