"""Log points survive kills and resumes; rates and the progress line say what they should."""

import json
import math
import struct
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from bipft_jax.objectives.mlm_nsp import MLM_NSP
from bipft_jax.training.telemetry import Telemetry, ThroughputMeter, progress_line, read_metrics


def events(directory: Path) -> list[Event]:
    """The events of TensorBoard files, oldest file first; record framing as TFRecord defines it."""
    found = []
    for path in sorted(directory.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            found.append(Event.FromString(data[12 : 12 + length]))
            data = data[12 + length + 4 :]
    return found


def test_lines_are_flushed_json_with_null_for_nan(tmp_path):
    telemetry = Telemetry(tmp_path, name="pretrain")
    scalars = {"loss": jnp.float32(1.5), "scale": jnp.bfloat16(0.5)}
    with jax.transfer_guard("disallow"):
        telemetry.log(3, scalars | {"grad": math.nan, "count": np.int64(7)})
    telemetry.log(4, {"loss": math.inf}, split="validation")
    # Read before closing: a killed process closes nothing.
    first, second = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first.pop("time") > 1.6e9
    assert first == {"step": 3, "loss": 1.5, "scale": 0.5, "grad": None, "count": 7}
    assert second["validation/loss"] is None
    with pytest.raises(ValueError, match="'loss'"):
        telemetry.log(5, {"loss": np.zeros(2)})
    telemetry.close()
    values = {
        v.tag: (e.step, v.simple_value)
        for e in events(tmp_path / "tensorboard")
        for v in e.summary.value
    }
    assert values == {"loss": (3, 1.5), "scale": (3, 0.5), "count": (3, 7.0)}


def test_resume_drops_what_a_killed_process_logged_after_the_checkpoint(tmp_path):
    with Telemetry(tmp_path, name="pretrain") as telemetry:
        for step in (10, 20, 30):
            telemetry.log(step, {"loss": step})
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 40, "lo')
    assert [record["step"] for record in read_metrics(path)] == [10, 20, 30]
    with Telemetry(tmp_path, name="pretrain", start_step=20) as telemetry:
        telemetry.log(30, {"loss": 0.25})
    assert [(r["step"], r["loss"]) for r in read_metrics(path)] == [(10, 10), (20, 20), (30, 0.25)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]
    starts = [e.step for e in events(tmp_path / "tensorboard") if e.HasField("session_log")]
    assert starts[-1] == 21
    # A run without a checkpoint to resume from begins anew.
    Telemetry(tmp_path, name="pretrain").close()
    assert read_metrics(path) == []


def test_a_foreign_line_is_named_and_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\nhello\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2 .*hello"):
        Telemetry(tmp_path, name="pretrain", start_step=1)
    assert "hello" in path.read_text()


def test_rates_leave_out_the_first_step_and_evaluation():
    now = [0.0]
    meter = ThroughputMeter(
        total_steps=100,
        per_step={
            "sequences_per_second": 8,
            "tokens_per_second": 1024,
            "model_flops_per_second": 2e9,
        },
        clock=lambda: now[0],
    )
    now[0] = 60.0  # compiling
    meter.restart(1)
    now[0] = 65.0
    rates = meter.rates(11)
    assert rates["sequences_per_second"] == pytest.approx(16)
    assert rates["tokens_per_second"] == pytest.approx(2048)
    assert rates["model_flops_per_second"] == pytest.approx(4e9)
    assert rates["eta_seconds"] == pytest.approx(89 * 0.5)
    assert rates["goodput"] == pytest.approx(5 / 65)
    now[0] = 75.0  # evaluation
    meter.restart(11)
    now[0] = 80.0
    rates = meter.rates(21)
    assert rates["sequences_per_second"] == pytest.approx(16)
    assert rates["eta_seconds"] == pytest.approx(79 * 1.0)  # evaluation recurs, so it counts here
    assert rates["goodput"] == pytest.approx(10 / 80)
    assert meter.rates(21) == {}


def test_rates_are_empty_before_there_is_an_interval():
    meter = ThroughputMeter(total_steps=9, per_step={"sequences_per_second": 1})
    assert meter.rates(0) == {}


def test_progress_line_reads_well():
    values = {
        "loss": 6.512,
        "mlm_loss": 6.01,
        "mlm_accuracy": 0.103,
        "nsp_loss": 0.5,
        "learning_rate": 1.2e-4,
        "flip_ratio": 1.2e-4,
        "zero_ratio": 0.3114,
        "flips/layer_0": 0.5,
        "matthews": 0.51234,
        "sequences_per_second": 412.3,
        "tokens_per_second": 26387.0,
        "model_flops_per_second": 8.51e10,
        "eta_seconds": 2470.2,
    }
    assert progress_line(1200, values, total_steps=10000, shown=MLM_NSP.shown) == (
        " 1200/10000  12.0%  loss 6.512  mlm 6.010 (acc 0.103)  nsp 0.500  lr 1.2e-04"
        "  flips 0.012%  zeros 31.1%  matthews 0.5123  412 seq/s  26.4k tok/s  85.1 GFLOP/s"
        "  eta 0:41:10"
    )
    assert progress_line(3, {"tokens_per_second": 999.7}) == "3  1k tok/s"


def test_progress_is_one_line_a_log_point_on_stderr(tmp_path, capsys):
    with Telemetry(tmp_path, name="finetune", total_steps=50) as telemetry:
        telemetry.log(5, {"loss": 0.5})
        telemetry.log(5, {"accuracy": 0.75}, split="validation")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "finetune  5/50  10.0%  loss 0.500",
        "finetune validation  5/50  10.0%  accuracy 0.75",
    ]
    assert "\r" not in err


def test_full_disk_names_the_file(tmp_path):
    telemetry = Telemetry(tmp_path, name="pretrain")
    telemetry._file.close()
    telemetry._file = full = open("/dev/full", "a")  # every flush fails as on a full disk
    with pytest.raises(OSError, match=r"No space left.*metrics\.jsonl"):
        telemetry.log(1, {"loss": 1.0})
    with pytest.raises(OSError):  # what was not written is still in the buffer
        full.close()
    telemetry.close()
