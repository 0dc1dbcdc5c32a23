"""launch/colab.ipynb, run from top to bottom in a kernel of its own, without a network."""

import ast
import asyncio
import base64
import contextlib
import json
import os
from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpecManager

from bipft_jax.data.glue import documentation
from bipft_jax.training.telemetry import read_metrics

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "launch" / "colab.ipynb"
# As few updates and rates as show everything. The first rate of the sweep is that of the
# finetuning before it, whose compiled programs it finds in the cache.
SMALL = dict(
    VOCABULARY_SIZE=512,
    UPDATES=4,
    BATCH_SIZE=8,
    TRAINING_ROWS=4,
    DEV_ROWS=4,
    FINETUNE_UPDATES=2,
    LEARNING_RATE=1e-4,
    SWEEP_UPDATES=2,
    SWEEP_LEARNING_RATES=(1e-4, 1e-3),
)
NO_NETWORK = {f"{kind}_proxy": "http://127.0.0.1:9" for kind in ("http", "https", "ftp")}


def read():
    return nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)


def with_values(values):
    """The notebook with a cell after that of its parameters which sets some of them."""
    notebook = read()
    tagged = [
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", ())
    ]
    (at,) = tagged
    names = {statement.targets[0].id for statement in ast.parse(notebook.cells[at].source).body}
    assert values.keys() <= names
    source = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(source))
    return notebook


def execute(notebook, kernel, home):
    # Not all of the checkout is to be imported from: the notebook has to find configs/ itself.
    packages = home / "packages"
    if not packages.exists():
        packages.mkdir()
        (packages / "bipft_jax").symlink_to(ROOT / "bipft_jax")
    environment = {
        **os.environ,
        **NO_NETWORK,
        "PYTHONPATH": str(packages),
        "IPYTHONDIR": str(home / "ipython"),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        "JAX_COMPILATION_CACHE_DIR": str(home / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    client = nbclient.NotebookClient(notebook, km=kernel, timeout=300)
    client.execute(cwd=str(home), env=environment)


@contextlib.contextmanager
def new_kernel():
    """One of this interpreter, whatever kernels are installed; started by the first execution."""
    kernel = AsyncKernelManager(kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
    try:
        yield kernel
    finally:
        asyncio.run(kernel.shutdown_kernel(now=True))


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """What "Run all" gives, twice in one kernel: cells by id, `first` and `again`; the directory
    `runs`; and `logs`, what every metrics.jsonl there was after the first time."""
    home = tmp_path_factory.mktemp("colab")
    runs = home / "runs"

    def run_all(kernel):
        notebook = with_values({"RUNS": str(runs), **SMALL})
        execute(notebook, kernel, home)
        return {cell.id: cell for cell in notebook.cells}

    with new_kernel() as kernel:
        first, logs = run_all(kernel), logs_in(runs)
        return SimpleNamespace(first=first, again=run_all(kernel), runs=runs, logs=logs)


def logs_in(runs):
    return {path: path.read_text() for path in runs.rglob("metrics.jsonl")}


def printed(cell, stream="stdout"):
    outputs = [output for output in cell.outputs if output.output_type == "stream"]
    return "".join(output.text for output in outputs if output.name == stream)


def is_picture(cell):
    (value,) = [output for output in cell.outputs if output.output_type == "execute_result"]
    return base64.b64decode(value.data["image/png"]).startswith(b"\x89PNG")


def result(directory):
    return json.loads((directory / "result.json").read_text())


def test_the_file_is_a_notebook_without_outputs():
    notebook = read()
    nbformat.validate(notebook)  # of cells' ids too
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)


def test_pretraining_leaves_curves_and_the_binary_model_learns_from_the_other(colab):
    for name in ("fp", "bipft_b"):
        log = read_metrics(colab.runs / name / "metrics.jsonl")
        assert [point["step"] for point in log if "loss" in point] == [1, 2, 3, 4]
        assert [point["step"] for point in log if "validation/loss" in point] == [2, 4]
    config = json.loads((colab.runs / "bipft_b" / "config.json").read_text())
    assert config["recipe"] == "bipft_b"
    assert config["init_from"] == config["teacher"] == str(colab.runs / "fp")
    assert all("hidden_loss" in point for point in log if "loss" in point)
    assert is_picture(colab.first["curves"])


def test_five_words_and_two_sentences_are_answered(colab):
    words = [line.split(maxsplit=1) for line in printed(colab.first["fill-mask"]).splitlines()]
    probabilities = [float(word[0]) for word in words]
    assert len(words) == 5 and probabilities == sorted(probabilities, reverse=True)
    assert 0 < sum(probabilities) <= 1

    header, *rows = [line.split("\t") for line in printed(colab.first["predict"]).splitlines()]
    labels = documentation.TASK.label_names
    assert header == ["sentence", "prediction", *(f"p({label})" for label in labels)]
    assert len(rows) == 2
    for _, prediction, *of_labels in rows:
        assert sum(map(float, of_labels)) == pytest.approx(1, abs=6e-4)
        assert of_labels[labels.index(prediction)] == max(of_labels, key=float)


def test_the_table_has_the_scores_of_finetuning(colab):
    lines = printed(colab.first["finetune"]).splitlines()
    for name, label in (("finetune", "`bipft_b`"), ("not-pretrained", "`bipft_b`, not pretrained")):
        (seed,) = result(colab.runs / name)["seeds"]
        assert f"| {label} | {100 * seed['best']['accuracy']:.1f} |" in lines
    assert "| majority class | 16.7 |" in lines


def test_each_point_of_the_sweep_has_run_with_its_value(colab):
    found = {}
    for path in (colab.runs / "sweep").glob("*/result.json"):
        config = result(path.parent)["config"]
        found[config["learning_rate"]] = config["max_updates"]
    assert found == {1e-4: 2, 1e-3: 2}
    assert printed(colab.first["sweep"]).count(" finished in ") == 2
    assert is_picture(colab.first["sweep-figure"])


def test_run_again_it_repeats_nothing(colab):
    assert len(colab.logs) == 6
    assert logs_in(colab.runs) == colab.logs
    for name in ("fp", "bipft", "finetune", "sweep"):  # a progress line for each log point
        assert printed(colab.first[name], "stderr") and not printed(colab.again[name], "stderr")
    for name in ("fill-mask", "predict"):
        assert printed(colab.again[name]) == printed(colab.first[name])


def test_where_the_library_is_missing_it_asks_for_the_repository(tmp_path):
    notebook = read()
    hidden = "import importlib.util\nimportlib.util.find_spec = lambda name: None"
    notebook.cells.insert(0, nbformat.v4.new_code_cell(hidden))
    with new_kernel() as kernel, pytest.raises(nbclient.exceptions.CellExecutionError) as caught:
        execute(notebook, kernel, tmp_path)
    assert caught.value.ename == "ValueError" and "enter in REPOSITORY" in caught.value.evalue
