"""Times a packed model on this processor: latency, load time and memory, and other runtimes'.

    python -m bipft_jax.benchmarks.inference --model MODEL.safetensors --peers
    python -m bipft_jax.benchmarks.inference --random bipft_b,base --peers

The runtimes take turns in one process. CPU time, that of all threads together, is what to compare
on a machine that other programs use too; wall time on an idle one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bipft_jax.errors import runtime_missing
from bipft_jax.paths import require_local
from bipft_jax.reports.tables import aligned

try:
    from bipft_runtime import file as packed_file
    from bipft_runtime.compiled_encoder import CompiledEncoder
    from bipft_runtime.library import instruction_sets
    from bipft_runtime.numpy_encoder import NumpyEncoder

    from bipft_jax.benchmarks.random_packed import random_packed
except ImportError as error:
    raise runtime_missing(error) from error

Row = dict[str, Any]

SHAPES = ((1, 32), (1, 128), (8, 128))  # sequences, tokens


@dataclasses.dataclass(frozen=True)
class Engine:
    """A runtime with a model. run: ids, int32 [sequences, tokens], to completion."""

    name: str
    run: Callable[[np.ndarray], object]


_NUMPY = "numpy"  # in place of an instruction set


def packed_engine(model: packed_file.PackedModel, threads: int, name: str) -> Engine:
    """This library's runtime with the instruction set of that name, or in NumPy."""
    encoder = NumpyEncoder(model) if name == _NUMPY else CompiledEncoder(model, threads, name)

    def run(ids: np.ndarray) -> None:
        segments = np.zeros(ids.shape[1], np.int32)
        for row in ids:
            encoder(row, segments)

    return Engine(f"bipft_runtime {name}", run)


def peer_engines(model: packed_file.PackedModel, threads: int, scratch: Path) -> Iterator[Engine]:
    """Those of `inference_peers`. Raises: ValueError if one is not installed."""
    try:
        from bipft_jax.benchmarks import inference_peers
    except ImportError as error:
        raise ValueError(
            f"--peers needs {error.name}: pip install 'bipft_jax[inference-peers]', in a checkout "
            "pip install -e '.[inference-peers]'"
        ) from error
    for name, run in inference_peers.peers(model.architecture, threads, scratch):
        yield Engine(name, run)


def measure(
    engines: Sequence[Engine], shapes: Sequence[tuple[int, int]], vocab_size: int, repeats: int
) -> list[Row]:
    """Runs the engines in turn on each shape, once to warm up and `repeats` times to measure.

    Returns: rows with `engine`, `sequences`, `tokens`, medians `cpu_ms` and `wall_ms`,
      `fastest_cpu_ms`, and `ratio`, of CPU time to that of the first engine.
    """
    rng = np.random.default_rng(0)
    rows = []
    for sequences, tokens in shapes:
        ids = rng.integers(1, vocab_size, (sequences, tokens), np.int32)
        times: dict[str, list[tuple[float, float]]] = {engine.name: [] for engine in engines}
        for repeat in range(repeats + 1):
            for engine in engines:
                start, cpu_start = time.perf_counter(), time.process_time()
                engine.run(ids)
                spent = time.process_time() - cpu_start, time.perf_counter() - start
                if repeat:
                    times[engine.name].append(spent)
            print(f"\r{sequences} x {tokens}: round {repeat} of {repeats}", end="", file=sys.stderr)
        print(file=sys.stderr)
        medians = {
            name: [statistics.median(column) * 1e3 for column in zip(*spent)]
            for name, spent in times.items()
        }
        own = medians[engines[0].name][0]
        rows += [
            {
                "engine": name,
                "sequences": sequences,
                "tokens": tokens,
                "cpu_ms": cpu,
                "wall_ms": wall,
                "fastest_cpu_ms": min(times[name])[0] * 1e3,
                "ratio": cpu / own,
            }
            for name, (cpu, wall) in medians.items()
        ]
    return rows


_LOADING = """
import json, sys, time, warnings
import numpy, safetensors.numpy, sentencepiece, tokenizers, bipft_runtime

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

before, start, cpu_start = resident(), time.perf_counter(), time.process_time()
model = bipft_runtime.Model(sys.argv[1])
model.encode(["a b c d e f"])
cpu, wall = time.process_time() - cpu_start, time.perf_counter() - start
print(json.dumps({"cpu_ms": cpu * 1e3, "wall_ms": wall * 1e3, "bytes": resident() - before}))
"""


def loading(path: Path, repeats: int) -> Row:
    """From the file, which the system has in memory, to the first answer, in a fresh process:
    medians of `cpu_ms`, `wall_ms` and the resident `bytes` that this adds. Linux only."""
    rows = []
    for _ in range(repeats):
        command = [sys.executable, "-c", _LOADING, os.fspath(path)]
        rows.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


def machine() -> str:
    """Processor and cores, to record with the numbers."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def table(rows: Sequence[Row]) -> str:
    """The rows as aligned text."""
    titles = ["runtime", "sequences x tokens", "CPU ms", "(fastest)", "wall ms", "CPU / first"]
    cells = [
        [
            row["engine"],
            f"{row['sequences']} x {row['tokens']}",
            f"{row['cpu_ms']:.1f}",
            f"({row['fastest_cpu_ms']:.1f})",
            f"{row['wall_ms']:.1f}",
            f"{row['ratio']:.1f}",
        ]
        for row in rows
    ]
    return aligned([titles, *cells], right=range(1, len(titles)))


def _random_model(text: str) -> packed_file.PackedModel:
    from bipft_jax.benchmarks.workload import BERT_VOCABULARY
    from bipft_jax.interop.pack import architecture_of
    from bipft_jax.models.recipes import bert_config, recipe_named

    recipe, _, size = text.partition(",")
    config = bert_config(recipe_named(recipe), size or "base", BERT_VOCABULARY, dropout=0.0)
    return random_packed(architecture_of(config, 0, max(tokens for _, tokens in SHAPES)))


def _parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    first, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.benchmarks.inference",
        description=first,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, metavar="FILE", help="of bipft_jax.interop.pack")
    source.add_argument(
        "--random", metavar="RECIPE,SIZE", help="instead, random weights: times are the same"
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="also torch, ONNX Runtime and OpenVINO on a float BERT of the same dimensions: "
        "pip install -e '.[inference-peers]'",
    )
    parser.add_argument("--threads", type=int, default=1, help="of every runtime (default 1)")
    parser.add_argument(
        "--sets",
        default=(*instruction_sets(), _NUMPY)[0],
        help=f"instruction sets, or {_NUMPY}, separated by commas (default: the fastest, "
        "%(default)s)",
    )
    parser.add_argument(
        "--repeats", type=int, default=11, help="measured rounds (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows here")
    parsed = parser.parse_args(arguments)
    for name in ("threads", "repeats"):
        if getattr(parsed, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(parsed, name)}")
    return parsed


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; exits with a message for wrong arguments."""
    parsed = _parse_arguments(arguments)
    try:
        require_local(vars(parsed))
        with tempfile.TemporaryDirectory() as directory:
            _run(parsed, Path(directory))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


def _run(parsed: argparse.Namespace, scratch: Path) -> None:
    path = parsed.model
    if parsed.random:
        path = scratch / "random.safetensors"
        packed_file.write(path, _random_model(parsed.random))
    model = packed_file.read(path)
    shapes = [shape for shape in SHAPES if shape[1] <= model.architecture.max_positions]
    engines = [packed_engine(model, parsed.threads, name) for name in parsed.sets.split(",")]
    if parsed.peers:
        for engine in peer_engines(model, parsed.threads, scratch):
            print(f"prepared {engine.name}", file=sys.stderr, flush=True)
            engines.append(engine)
    loaded = loading(path, min(parsed.repeats, 5))
    rows = measure(engines, shapes, model.architecture.vocab_size, parsed.repeats)
    print(f"{machine()}; threads: {parsed.threads}; medians of {parsed.repeats} rounds")
    print(table(rows))
    print(
        f"from file to first answer: {loaded['cpu_ms']:.0f} ms of CPU time, "
        f"{loaded['wall_ms']:.0f} ms of wall time; resident memory {loaded['bytes'] / 2**20:.1f} "
        f"MiB; file {path.stat().st_size / 2**20:.2f} MiB"
    )
    if parsed.json:
        parsed.json.write_text(json.dumps({"rows": rows, "loading": loaded}, indent=2) + "\n")


if __name__ == "__main__":
    main()
