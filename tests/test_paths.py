"""gs:// and the like are refused wherever a path is given, before anything is read or written."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from bipft_jax import finetune, finetune_all, pretrain, sweeps
from bipft_jax.checkpoints.manager import Checkpointer
from bipft_jax.checkpoints.source import load_source
from bipft_jax.data.corpus.corpus import load_corpus
from bipft_jax.data.corpus.preparation import CorpusRequest, prepare_corpus
from bipft_jax.data.glue.documentation import write_task
from bipft_jax.interop.convert import import_directory
from bipft_jax.interop.hugging_face import write_directory
from bipft_jax.paths import require_local
from bipft_jax.training.telemetry import Telemetry
from configs import finetune as finetune_config
from configs import pretrain as pretrain_config
from tests import launching

ROOT = Path(__file__).parents[1]
REMOTE = "gs://bucket/there"
ADVICE = "mount the bucket"

PREDICT = ["--workdir=run", "--input=in.tsv", "--output=out.tsv"]
PREPARE = ["--input=*.txt", "--tokenizer=vocab.txt", "--output=corpus"]
COMMANDS = {
    "bipft_jax.data.corpus.__main__": [
        ["--validation_input=a.txt", f"--validation_input={REMOTE}/*.txt", *PREPARE],
        *([*PREPARE, f"--{name}={REMOTE}"] for name in ("input", "tokenizer", "output")),
        [*PREPARE, f"--input=tfds:{REMOTE}"],
    ],
    "bipft_jax.data.glue.documentation": [[f"--output={REMOTE}"]],
    "bipft_jax.predict": [
        [*PREDICT, f"--{name}={REMOTE}"] for name in ("workdir", "input", "output")
    ],
    "bipft_jax.fill_mask": [["--workdir", REMOTE, "https://x.org is a [MASK]."]],
    "bipft_jax.plot": [["run", REMOTE], ["run", f"--output={REMOTE}"]],
    "bipft_jax.comparison": [["run", REMOTE], ["run", f"--glue_dir={REMOTE}"]],
    "bipft_jax.interop.check_fixture": [["unit.npz", REMOTE]],
    "bipft_jax.interop.convert": [
        ["import", REMOTE, "--workdir=run"],
        ["import", "bert", f"--workdir={REMOTE}"],
        ["export", f"--workdir={REMOTE}", "--output=bert"],
        ["export", "--workdir=run", f"--output={REMOTE}"],
    ],
    "bipft_jax.benchmarks.input": [[f"--corpus={REMOTE}"], ["--json", f"{REMOTE}/rows.json"]],
    "bipft_jax.benchmarks.collectives": [["--json", f"{REMOTE}/rows.json"]],
    "bipft_jax.benchmarks.train_step": [["--json", f"{REMOTE}/rows.json"]],
    "bipft_jax.benchmarks.tpu_cost": [["--json", f"{REMOTE}/rows.json"]],
}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty directory to be in, which stays empty."""
    monkeypatch.chdir(tmp_path)
    yield
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "module, arguments", [(module, each) for module, cases in COMMANDS.items() for each in cases]
)
def test_a_command_ends_with_one_line(module, arguments):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(module).main(arguments)
    (line,) = str(ended.value.code).splitlines()  # printed, with exit status 1
    assert line.startswith("error: ") and "gs:/" in line and ADVICE in line


RUNS = [
    (pretrain.train, pretrain_config.get_config, ("corpus_dir", "init_from", "teacher")),
    (finetune.train, finetune_config.get_config, ("glue_dir", "init_from", "teacher")),
    (finetune_all.train, lambda: finetune_config.get_config("fp,all"), ("glue_dir", "init_from")),
]


@pytest.mark.parametrize(
    "train, get_config, keys, key",
    [(*run, key) for run in RUNS for key in (*run[-1], "workdir")],
)
@pytest.mark.parametrize("remote", [REMOTE, "s3://b/x", "hdfs://host:9000/x", "HTTPS://h/x"])
def test_a_run_does_not_begin(train, get_config, keys, key, remote):
    """None of the paths exists: were one looked at first, the message would be another."""
    paths = {**dict.fromkeys(keys, "not/there"), "workdir": "run", key: remote}
    workdir, config = paths.pop("workdir"), get_config()
    config.update(paths)
    with pytest.raises(ValueError, match=f"^{key} is {remote}, .*{ADVICE}"):
        train(config, workdir)


@pytest.mark.parametrize(
    "flags",
    [
        ["train.py", f"--workdir={REMOTE}"],
        ["train.py", "--workdir=run", f"--config.corpus_dir={REMOTE}"],
        ["sweep.py", f"--workdir={REMOTE}", "--list"],
        ["sweep.py", "--workdir=run", f"--config.corpus_dir={REMOTE}"],
        ["sweep.py", "--workdir=run", f"--values=teacher=a,{REMOTE}"],
    ],
)
def test_the_launched_programs_say_so_too(flags):
    program, *flags = flags
    config = f"--config={ROOT / 'configs' / 'pretrain.py'}:bipft_b,tiny"
    command = [sys.executable, ROOT / "launch" / program, config, *flags]
    done = subprocess.run(
        command, env=launching.environment(Path("/nowhere")), capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("error: ") and ADVICE in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "function, arguments",
    [
        (load_source, (REMOTE,)),
        (load_source, (Path(REMOTE),)),
        (load_corpus, (REMOTE,)),
        (prepare_corpus, (CorpusRequest(["python-docs"], "sentencepiece:9"), REMOTE, 1)),
        (import_directory, ("bert", REMOTE)),
        (write_directory, (None, REMOTE)),
        (write_task, (REMOTE, {})),
        (sweeps.run, ([{"seed": 0}], None, REMOTE)),
    ],
)
def test_functions_refuse_as_well(function, arguments):
    with pytest.raises(ValueError, match=f"gs:/.*{ADVICE}"):
        function(*arguments)


def test_what_is_written_to_refuses_as_well():
    with pytest.raises(ValueError, match=ADVICE):
        Checkpointer(REMOTE, keep_every=0, best_metric=None, best_mode="max")
    with pytest.raises(ValueError, match=ADVICE):
        Telemetry(REMOTE, name="pretrain")


@pytest.mark.parametrize(
    "path", ["a:b", "gs:", "gs:/x", "runs/gs://x", "/x:/y", "~/a:b/c", "./gs://x", Path("/gs:/x")]
)
def test_a_colon_makes_no_scheme(path):
    given = {"a": path, "b": [path], "c": 1, "d": None, "e": {"f": 2.0}}
    assert require_local(given) is None  # raises nothing
