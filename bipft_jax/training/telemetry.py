"""Telemetry of a run: JSON lines, TensorBoard, throughput and progress lines."""

import datetime
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tensorboardX
import tqdm

from bipft_jax.checkpoints.workdir import absolute
from bipft_jax.objectives.objective import Shown
from bipft_jax.paths import replacing

METRICS_NAME = "metrics.jsonl"


class Telemetry:
    """Writes scalars of a run to WORKDIR/metrics.jsonl and WORKDIR/tensorboard, and prints them.

    A line of metrics.jsonl is one JSON object: `step`, `time` (seconds since 1970) and the scalars
    by name; NaN and infinities are null. Every line is flushed. In a job of several processes all
    may call it, and only process 0 writes and prints.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        name: str,
        start_step: int = 0,
        total_steps: int | None = None,
        tokens_per_step: int | None = None,
        shown: Sequence[Shown] = (),
    ):
        """Opens the files, and drops what an earlier, killed process logged after `start_step`.

        Arguments:
          workdir: created if missing.
          name: of the program ("pretrain", "finetune"); the progress line begins with it.
          start_step: step of the restored state; 0 for a new run, which drops every line.
          total_steps: the last step, for the progress line.
          tokens_per_step: if given, every log point has `tokens`, the number seen in all.
          shown: as for `progress_line`.

        Raises:
          ValueError: a line of metrics.jsonl, other than an unfinished last one, is not a log
            point; or `workdir` is gs:// or the like.
        """
        self._name, self._total_steps, self._shown = name, total_steps, shown
        self._tokens_per_step = tokens_per_step
        self._file = self._board = None
        if jax.process_index() != 0:
            return
        directory = absolute(workdir)
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / METRICS_NAME
        if self._path.exists():
            _drop_lines_after(self._path, start_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(
            str(directory / "tensorboard"),
            # TensorBoard hides the events of earlier files from this step on.
            purge_step=start_step + 1 if start_step else 0,
            # Else the name differs by the second only, and a quick restart overwrites the file.
            filename_suffix=f".from-{start_step}",
            # A killed process loses so many seconds of events; metrics.jsonl loses none.
            flush_secs=10,
        )

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log(self, step: int, scalars: Mapping[str, Any], *, split: str | None = None) -> None:
        """Writes one log point and prints its progress line.

        Arguments:
          step: number of finished updates.
          scalars: numbers or arrays of one element, by name; fetching an array from a device waits
            for it. For the names with a format of their own see `progress_line`.
          split: such as "validation", which writes the scalars as "validation/NAME".

        Raises:
          ValueError: a value is not a number.
          OSError: metrics.jsonl cannot be written (disk full); the message has its path.
        """
        if self._file is None or self._board is None:
            return
        # An explicit transfer, which the transfer guard allows.
        fetched = jax.device_get(dict(scalars))
        values = {name: _number(name, value) for name, value in fetched.items()}
        prefix = f"{split}/" if split else ""
        record: dict[str, Any] = {"step": int(step), "time": round(time.time(), 3)}
        if self._tokens_per_step is not None:
            record["tokens"] = int(step) * self._tokens_per_step
        for name, value in values.items():
            finite = math.isfinite(value)
            record[prefix + name] = value if finite else None
            if finite:
                self._board.add_scalar(prefix + name, value, step)
        try:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error
        label = f"{self._name} {split}" if split else self._name
        line = progress_line(step, values, total_steps=self._total_steps, shown=self._shown)
        # One line per log point, above any tqdm bar; it needs no terminal.
        tqdm.tqdm.write(f"{label} {line}", file=sys.stderr)
        sys.stderr.flush()

    def close(self) -> None:
        """Closes the files."""
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()
            self._file = self._board = None


class ThroughputMeter:
    """Throughput between log points, without the first step, which compiles.

    Call `restart(step)` after the first step and `rates(step)` at each log point. Around anything
    that is not training (evaluation, a blocking save) call `rates(step)` before, to end the
    interval of training, and `restart(step)` after. JAX dispatches asynchronously, so make each
    call once a value of that step has arrived on the host.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        per_step: Mapping[str, float],
        clock: Callable[[], float] = time.perf_counter,
    ):
        """Arguments:
        total_steps: of the run, for `eta_seconds`.
        per_step: amounts per step, by the name of the rate: some of `sequences_per_second`,
          `tokens_per_second` (both of the global batch; tokens count padding) and
          `model_flops_per_second` (model FLOPs, forward and backward, whatever the hardware
          executes).
        clock: seconds.
        """
        self._total_steps = total_steps
        self._per_step = dict(per_step)
        self._clock = clock
        self._created = clock()
        self._stepping = 0.0
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None

    def restart(self, step: int) -> None:
        """Begins a new interval at `step`; the rates leave out the time since the last call."""
        self._last = (step, self._clock())
        self._first = self._first or self._last

    def rates(self, step: int) -> dict[str, float]:
        """Ends the interval since the last call of either method, and begins a new one.

        Returns:
          the rates of `per_step`; `eta_seconds`, by the mean time per step since the first
          `restart`, evaluation and saving included; and `goodput`, the fraction of the time since
          construction that was spent in steps, not in the first compilation, evaluating or saving.
          Empty if no interval has begun, or it has no step.
        """
        last = self._last
        self.restart(step)
        if last is None or self._first is None or step <= last[0]:
            return {}
        now = self._last[1]
        steps_per_second = (step - last[0]) / max(now - last[1], 1e-9)
        seconds_per_step = (now - self._first[1]) / (step - self._first[0])
        rates = {name: steps_per_second * count for name, count in self._per_step.items()}
        self._stepping += now - last[1]
        return rates | {
            "eta_seconds": max(self._total_steps - step, 0) * seconds_per_step,
            "goodput": self._stepping / max(now - self._created, 1e-9),
        }


def progress_line(
    step: int,
    values: Mapping[str, float],
    *,
    total_steps: int | None = None,
    shown: Sequence[Shown] = (),
) -> str:
    """The progress line of a log point, without a line break.

        1200/10000  12.0%  loss 6.512  mlm 6.010 (acc 0.103)  nsp 0.500 (acc 0.751)  lr 1.2e-04
        flips 0.012%  412 seq/s  26.4k tok/s  85.1 GFLOP/s  eta 0:41:10

    (in one line). Names with a format of their own: `loss`, those in `shown` (of the objective;
    here "mlm" and "nsp"), `learning_rate`, `flip_ratio` and `zero_ratio` (fractions) and those of
    `ThroughputMeter`. Other scalars appear as NAME VALUE; names with "/" appear in the files only.
    """
    rest = dict(values)
    if not rest.get("skipped_updates"):
        rest.pop("skipped_updates", None)
    if total_steps:
        parts = [f"{step:>{len(str(total_steps))}}/{total_steps}", f"{step / total_steps:5.1%}"]
    else:
        parts = [f"{step}"]
    if "loss" in rest:
        parts.append(f"loss {rest.pop('loss'):.3f}")
    for label, *names in shown:
        loss, accuracy = (rest.pop(name, None) for name in names)
        numbers = [] if loss is None else [f"{loss:.3f}"]
        numbers += [] if accuracy is None else [f"(acc {accuracy:.3f})"]
        if numbers:
            parts.append(" ".join([label, *numbers]))
    if "learning_rate" in rest:
        parts.append(f"lr {rest.pop('learning_rate'):.1e}")
    if "flip_ratio" in rest:
        parts.append(f"flips {rest.pop('flip_ratio'):.3%}")
    if "zero_ratio" in rest:
        parts.append(f"zeros {rest.pop('zero_ratio'):.1%}")
    speed = []
    if "sequences_per_second" in rest:
        speed.append(f"{_with_prefix(rest.pop('sequences_per_second'))}seq/s")
    if "tokens_per_second" in rest:
        speed.append(f"{_with_prefix(rest.pop('tokens_per_second'))}tok/s")
    if "model_flops_per_second" in rest:
        speed.append(f"{_with_prefix(rest.pop('model_flops_per_second'), gap=True)}FLOP/s")
    if "goodput" in rest:
        speed.append(f"{rest.pop('goodput'):.0%} stepping")
    if "eta_seconds" in rest:
        seconds = rest.pop("eta_seconds")
        speed.append(f"eta {datetime.timedelta(seconds=round(seconds))}")
    parts += [f"{name} {value:.4g}" for name, value in rest.items() if "/" not in name]
    return "  ".join(parts + speed)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The log points of a metrics.jsonl, in file order.

    Ignores a last line that a killed process left unfinished.

    Raises:
      ValueError: another line is not a JSON object with a `step`; names the line.
    """
    with Path(path).open(encoding="utf-8", errors="replace") as file:
        lines = file.readlines()
    records = []
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
            record["step"] += 0
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path}:{number} is not a JSON object with a step: {line[:80].rstrip()!r}. Repair "
                "or delete the line."
            ) from error
        records.append(record)
    return records


def _drop_lines_after(path: Path, step: int) -> None:
    kept = [record for record in read_metrics(path) if record["step"] <= step and step > 0]
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in kept)
        file.flush()
        os.fsync(file.fileno())


def _number(name: str, value: Any) -> int | float:
    array = np.asarray(value)
    if array.size != 1 or array.dtype.kind in "OSUMmc":
        raise ValueError(f"The scalar {name!r} is {value!r}; it must be one number.")
    return array.astype(np.float64).item() if array.dtype.kind not in "iub" else int(array.item())


def _with_prefix(value: float, gap: bool = False) -> str:
    """Three significant digits with an SI prefix, to precede a unit: `412 `, `26.4k `, `85.1 G`."""
    for power, prefix in ((15, "P"), (12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if value >= 0.9995 * 10**power:
            text = f"{value / 10**power:.3g}"
            return f"{text} {prefix}" if gap else f"{text}{prefix} "
    return f"{value:.3g} "
