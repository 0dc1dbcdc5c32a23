"""launch/minilm_on_glue.sh with a stand-in for its Python, which writes down what it is given."""

import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bipft_jax.config_keys import check_keys
from bipft_jax.data.glue.tasks import TASKS
from bipft_jax.finetune import check_together
from configs.finetune import get_config

ROOT = Path(__file__).parents[1]

# Leaves behind what the script looks for. A run named in FAIL ends after its first seed; one named
# in GO_ON goes on until SIGTERM, saves and ends with 0, as train.py does.
PYTHON = """#!{python} -S
import json, os, pathlib, signal, sys, time
def save(*_):
    time.sleep(0.3)
    (directory / "saved").touch()
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
with open("calls", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + chr(10))
given = dict(x.partition("=")[::2] for x in sys.argv[1:])
after = lambda flag: pathlib.Path(sys.argv[sys.argv.index(flag) + 1])
if given.get("--workdir"):
    directory = pathlib.Path(given["--workdir"])
    (directory / "seed_0").mkdir(parents=True, exist_ok=True)
    if directory.name in os.environ.get("FAIL", "").split():
        sys.exit(1)
    if directory.name in os.environ.get("GO_ON", "").split():
        (directory / "started").touch()
        time.sleep(50)
    (directory / "result.json").write_text("{{}}")
elif "import" in sys.argv:
    after("--workdir").mkdir(parents=True)
    (after("--workdir") / "config.json").touch()
elif "export" in sys.argv:
    after("--output").mkdir(parents=True)
elif "bipft_jax.interop.pack" in sys.argv:
    after("--output").touch()
"""


class Checkout:
    """The script, and TEXT, GLUE and MINILM beside it."""

    def __init__(self, directory: Path) -> None:
        self.root = directory
        (directory / "launch").mkdir()
        for script in ("minilm_on_glue.sh", "experiment.sh"):
            shutil.copy(ROOT / "launch" / script, directory / "launch")
        (directory / "launch" / "environment.sh").write_text("prepare_environment() { :; }\n")
        python = directory / ".venv" / "bin" / "python"
        for path in (
            python,
            *(directory / "text" / f"x-{split}-0.jsonl.xz" for split in ("train", "validation")),
            *(directory / "glue" / task / "train.tsv" for task in ("SST-2", "STS-B")),
            *(directory / "minilm" / n for n in ("config.json", "vocab.txt", "model.safetensors")),
            directory / "binary" / "config.json",
            directory / "other" / "config.json",
        ):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        python.write_text(PYTHON.format(python=sys.executable))
        python.chmod(0o755)

    def start(self, text: str = "text", **variables: str) -> subprocess.Popen:
        return subprocess.Popen(
            ["bash", "launch/minilm_on_glue.sh", text, "glue", "minilm", "runs"],
            cwd=self.root,
            env=os.environ | {"TASKS": "sst2\n stsb"} | variables,  # on two lines
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, text: str = "text", **variables: str) -> subprocess.CompletedProcess:
        process = self.start(text, **variables)
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def calls(self) -> list[list[str]]:
        """What Python was given since the last time."""
        file = self.root / "calls"
        calls = (
            [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        )
        file.unlink(missing_ok=True)
        return calls


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def runs(calls: list[list[str]], program: str) -> dict[str, dict[str, str]]:
    """By the name of the workdir, in order: the keys of a run and `recipe`."""
    done = {}
    for call in calls:
        given = dict(argument.partition("=")[::2] for argument in call)
        config = given.get("--config", "")
        if config.startswith(f"configs/{program}.py:"):
            keys = {k.removeprefix("--config."): v for k, v in given.items() if "--config." in k}
            recipe, _, last = config.partition(":")[2].partition(",")
            name = Path(given["--workdir"]).name
            assert name not in done
            done[name] = {"recipe": recipe, "task or size": last, **keys}
    return done


def as_config(keys: dict[str, str]):
    """The config that these flags make."""
    config = get_config(f"{keys['recipe']},{keys['task or size']}")
    for key, text in keys.items():
        if key not in ("recipe", "task or size"):
            is_text = isinstance(config[key], str) or key == "intermediate_recipes"
            value = text if is_text else ast.literal_eval(text)
            config[key] = (text,) if key == "intermediate_recipes" else value
    return config


def test_the_whole_comparison(checkout):
    flags = "--config.dropout=0.0\n    --config.max_updates=7"  # on two lines
    ended = checkout.run(PARALLEL="3", FINETUNE_FLAGS=flags)
    assert ended.returncode == 0, ended.stderr
    calls = checkout.calls()

    pretrained = runs(calls, "pretrain")
    assert list(pretrained) == ["fp", "bipft_a", "bipft_b", "bipft_b-rank4"]
    assert {n: r["recipe"] for n, r in pretrained.items()} == {
        **{name: name for name in ("fp", "bipft_a", "bipft_b")},
        "bipft_b-rank4": "bipft_b",
    }
    assert [r.get("estimator_rank") for r in pretrained.values()] == [None, None, None, "4"]
    binary = [pretrained[name] for name in ("bipft_a", "bipft_b", "bipft_b-rank4")]
    kept = [{k: v for k, v in r.items() if k not in ("recipe", "estimator_rank")} for r in binary]
    assert kept[0] == kept[1] == kept[2] and kept[0]["teacher"] == "runs/fp"

    finetuned = runs(calls, "finetune")
    assert len(finetuned) == 18
    assert set(list(finetuned)[:2]) == {"fp-sst2", "fp-stsb"}  # teachers first
    models = {}
    for name, keys in finetuned.items():
        config = as_config(keys)
        check_keys(config, "finetune")
        check_together(config, TASKS[config.task])
        assert (config.dropout, config.max_updates) == (0.0, 7)
        model = name.removesuffix(f"-{config.task}")
        start = config.init_from.replace(config.task, "TASK")
        row = config.recipe, start, config.distillation, config.estimator_rank
        assert models.setdefault(model, row) == row  # on either task
        teacher = f"runs/fp-{config.task}/seed_0" if config.distillation else ""
        assert config.teacher == teacher
        assert config.score_mse == (config.distillation == "bit" and config.task == "stsb")
        assert config.intermediate_recipes == (("bit_w1a2",) if model == "bit" else ())
        assert (checkout.root / "runs" / "results" / f"{name}.json").exists()
    assert models == {
        "fp": ("fp", "runs/minilm", "", -1),
        "bipft_b-from-minilm": ("bipft_b", "runs/minilm", "", -1),
        "bit": ("bit_w1a1", "runs/fp-TASK/seed_0", "bit", -1),
        "bibert": ("bibert", "runs/fp-TASK/seed_0", "direction_matching", -1),
        "bipft_a": ("bipft_a", "runs/bipft_a", "", -1),
        "bipft_b": ("bipft_b", "runs/bipft_b", "", -1),
        "bipft_b-rank4": ("bipft_b", "runs/bipft_b-rank4", "", 4),
        "bipft_b-distilled": ("bipft_b", "runs/bipft_b", "bit", -1),
        "bipft_b-from-minilm-distilled": ("bipft_b", "runs/minilm", "bit", -1),
    }


def test_only_what_the_models_need_is_pretrained(checkout):
    checkout.run(MODELS="bipft_a")
    assert list(runs(checkout.calls(), "pretrain")) == ["fp", "bipft_a"]
    assert not (checkout.root / "runs" / "model").exists()
    checkout.run("-", MODELS="bit bibert fp bipft_b-from-minilm")
    calls = checkout.calls()
    assert not runs(calls, "pretrain") and "bipft_jax.data.corpus" not in str(calls)


def test_a_pretrained_directory_is_imported_once(checkout):
    def imported():
        calls = checkout.calls()
        assert not runs(calls, "pretrain") and "bipft_jax.data.corpus" not in str(calls)
        return [c for c in calls if "binary" in c], runs(calls, "finetune")

    chosen = {"MODELS": "bipft_b bipft_b-distilled\nfp", "BINARY": "binary"}
    ended = checkout.run("-", **chosen)
    assert ended.returncode == 0, ended.stderr
    once, finetuned = imported()
    (command,) = once
    assert command[command.index("--recipe") + 1] == "bipft_b"
    assert {finetuned[name]["init_from"] for name in finetuned if "bipft_b" in name} == {
        "runs/bipft_b"
    }
    assert not (checkout.root / "runs" / "model").exists()
    assert checkout.run("-", **chosen).returncode == 0
    again, finetuned = imported()
    assert not again and len(finetuned) == 6

    for other, text in (("other", "-"), ("", "text")):
        ended = checkout.run(text, **{**chosen, "BINARY": other})
        assert ended.returncode == 1
        assert f"runs/bipft_b was imported from binary, and BINARY is {other or 'empty'}" in (
            ended.stderr
        )
    assert not checkout.calls()


def test_a_model_waits_for_its_teacher_even_if_that_fails(checkout):
    chosen = {"MODELS": "bit fp", "PARALLEL": "4"}
    ended = checkout.run("-", **chosen, FAIL="fp-sst2")
    assert ended.returncode == 1
    assert "fp-sst2 failed: see runs/fp-sst2.log" in ended.stderr
    assert "bit-sst2 has no teacher: runs/fp-sst2 is not finished" in ended.stderr
    assert set(runs(checkout.calls(), "finetune")) == {"fp-sst2", "fp-stsb", "bit-stsb"}
    ended = checkout.run("-", **chosen)
    assert ended.returncode == 0, ended.stderr
    assert set(list(runs(checkout.calls(), "finetune"))[2:]) == {"bit-sst2", "bit-stsb"}
    # Now the teachers may be left out.
    ended = checkout.run("-", MODELS="bibert")
    assert ended.returncode == 0, ended.stderr
    assert len(runs(checkout.calls(), "finetune")) == 2


@pytest.mark.parametrize(
    ("text", "variables", "message"),
    [
        (
            "text",
            {"MODELS": "fp bipft"},
            "MODELS has bipft: choose from fp bipft_b-from-minilm bit ",
        ),
        (
            "text",
            {"MODELS": "bipft_b-distilled"},
            "runs/fp-sst2/result.json is missing: bipft_b-distilled needs its teacher: add fp",
        ),
        ("-", {"MODELS": "fp bipft_a", "BINARY": "binary"}, "needs the pretraining of bipft_a:"),
        ("text", {"BINARY": "nowhere"}, "nowhere/config.json is missing: BINARY is"),
        ("text", {"FINETUNE_FLAGS": "dropout=0.0"}, "FINETUNE_FLAGS has dropout=0.0: give flags"),
    ],
)
def test_variables_are_checked_before_anything_starts(checkout, text, variables, message):
    ended = checkout.run(text, **variables)
    assert ended.returncode == 1 and message in ended.stderr
    assert not checkout.calls()


@pytest.mark.parametrize(
    ("text", "models", "stopped"),
    [("text", "bipft_b", ["bipft_b"]), ("-", "fp", ["fp-sst2", "fp-stsb"])],
)
def test_runs_have_saved_when_the_script_was_stopped(checkout, text, models, stopped):
    process = checkout.start(text, MODELS=models, PARALLEL="2", GO_ON=" ".join(stopped))
    try:
        workdirs = [checkout.root / "runs" / name for name in stopped]
        deadline = time.monotonic() + 40
        while not all((workdir / "started").exists() for workdir in workdirs):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        process.terminate()
        process.wait(timeout=40)
        assert all((workdir / "saved").exists() for workdir in workdirs)
        assert process.returncode == 143
        assert not list((checkout.root / "runs" / "results").glob(f"{stopped[0]}*.json"))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    ended = checkout.run(text, MODELS=models)
    assert ended.returncode == 0, ended.stderr
