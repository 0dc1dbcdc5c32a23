"""`launch/compile_for_tpu.py` and what it refuses, in processes of their own: libtpu must not be
loaded into the process of the tests."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Settings that cannot be, a program for each reason to refuse one, and the collectives of the
# update for twice the chips.
PROGRAM = """
import dataclasses
import importlib.util
import json
import sys
from unittest import mock

import jax
import jax.numpy as jnp

from bipft_jax.pods import scaling
from bipft_jax.pods.inspection import inspect
from bipft_jax.pods.programs import compiled
from bipft_jax.pods.setting import Setting, setting_of
from bipft_jax.training import sharding
from bipft_jax.training.learner import Program
from configs import pretrain

config = pretrain.get_config("fp,tiny")
config.batch_size = 32


def refused(topology="v5e:2x4", slices=1, length=8, **keys):
    other = config.copy_and_resolve_references()
    other.update(keys)
    try:
        setting_of(other, topology, slices, 32, length)
    except ValueError as error:
        return str(error)


with mock.patch.object(importlib.util, "find_spec", lambda name: None):
    messages = [refused()]
messages += [
    refused("v9:2x2"),
    refused("v5e:32x32"),
    refused(slices=0),
    refused(length=600),
    refused(batch_size=12),
    refused(mesh={"fsdp": 3}),
    refused(mesh={"tensor": 4}),
]

setting = setting_of(config, "v5e:2x4", 1, 32, 8)
update = compiled(setting.update(), setting.mesh, setting.chip)
step = scaling.step_of(update, setting)
sizes = sorted((c.collective.kind, c.collective.size, c.count) for c in step.collectives)

whole = sharding.replicated(setting.mesh)
small, large = (jax.ShapeDtypeStruct((n, 256), jnp.float32, sharding=whole) for n in (256, 65536))
toys = {
    "state": (lambda x: jnp.sin(x) @ x, small),
    "codes": (lambda x: jax.ffi.ffi_call("nobody", small)(x), small),
    "finite": (lambda x: jnp.sort(jnp.cumsum(x @ x.T, 0), 1).sum(), large),
}
programs = [Program(name, jax.jit(f), (x,)) for name, (f, x) in toys.items()]
little = dataclasses.replace(setting.chip, hbm=10_000)
with mock.patch.object(Setting, "programs", lambda self: programs):
    seen = inspect(dataclasses.replace(setting, chip=little), lambda line: None)
print(json.dumps([messages, sizes, seen.reasons]))
"""


def environment():
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",  # of the tests, for eight devices of the CPU
    }


@pytest.fixture(scope="module")
def seen():
    """Messages about settings, collectives of an update, reasons against programs."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_what_cannot_be_is_said_before_anything_is_compiled(seen):
    missing, chip, slices, none, length, batch, fsdp, tensor = seen[0]
    assert "the TPU compiler is missing: pip install" in missing
    assert "v4, v5e, v5p, v6e, tpu7x" in chip and "v9:2x2" in chip
    assert "no slice 'v5e:32x32'" in slices and "16x16" in slices
    assert "slices is 0" in none
    assert "length is 600: it must be 8 to 512" in length
    assert "batch_size 12 is not a multiple of accumulation 1 x 8" in batch
    assert "fsdp 3 x tensor 1 does not divide 8" in fsdp
    assert "tensor 4 does not divide the model's heads 2" in tensor


def test_a_program_that_does_not_compile_or_fit_is_named(seen):
    large, broken, oom = seen[2]
    assert "state does not fit: it needs 0.00 of 0.00 GiB" in large
    assert "codes does not compile" in broken and "nobody" in broken
    assert "finite does not fit" in oom and "available HBM (15.75G)" in oom
    assert re.search(r"Largest buffers: 16\.00GiB (2×)?f32\[65536,", oom)
    assert "remat policy" in oom and "fsdp above 1" in oom and "--fit" in oom


def test_a_run_is_inspected_and_its_collectives_do_not_grow_with_the_chips(seen, tmp_path):
    out = tmp_path / "out.json"
    command = [
        *(sys.executable, str(ROOT / "launch" / "compile_for_tpu.py")),
        *(f"--config={ROOT / 'configs' / 'pretrain.py'}:fp,tiny", "--topology=v5e:2x2"),
        *("--config.batch_size=16", "--vocab_size=32", "--length=8", "--curve"),
        *("--usd_per_chip_hour=1.8", f"--json={out}"),
    ]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    record = json.loads(out.read_text())

    programs = {one["name"]: one for one in record["programs"]}
    names = "parameters state codes update statistics finite evaluation".split()
    assert list(programs) == [*names[:4], "sum of metrics", *names[4:]]
    # Parameters and two moments, float32, whole on every device.
    assert programs["state"]["outputs"] == pytest.approx(3 * programs["finite"]["arguments"], 0.01)
    assert record["step_seconds"] == pytest.approx(
        record["compute_seconds"] + record["exposed_seconds"]
    )
    tokens = record["tokens_per_second"]
    assert tokens == pytest.approx(16 * 8 / record["step_seconds"])
    assert record["host_wants"] == pytest.approx(tokens / 8)  # one host
    assert record["usd_per_billion_tokens"] == pytest.approx(4 * 1.8 / 3600 * 1e9 / tokens)

    sizes = [[one["kind"], one["bytes"], one["count"]] for one in record["collectives"]]
    assert sorted(sizes) == seen[1]
    curve = {rung["chips"]: rung for rung in record["curve"]}
    assert list(curve) == [4, 16, 64, 256, 512, 1024, 4096]
    assert curve[4]["weak_seconds"] == curve[4]["strong_seconds"] == record["step_seconds"]
    assert curve[64]["strong_seconds"] is None  # of 16 sequences
    assert "update" in done.stdout and "M tokens/s" in done.stdout
