"""All of GLUE in one run, with scores made up: averages, what is missing, the table."""

import json
from types import SimpleNamespace

import pytest

from bipft_jax import finetune, finetune_all
from bipft_jax.data.glue import tasks as glue
from bipft_jax.reports.results import finished_scores, summarise
from configs import finetune as finetune_config

# Scores of seed 4; those of seed 7 are 0.1 higher.
SCORES = dict(
    cola=0.1, sst2=0.8, mrpc=0.7, stsb=0.2, rte=0.5, wnli=0.9, qnli=0.6, qqp=0.4, mnli=0.3
)
MISMATCHED = 0.6


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """run(tasks, mismatched) finetunes on tasks that the directory has; and what was begun."""
    begun = []

    def read_split(task, glue_dir, split):
        if not (tmp_path / "glue" / task.directory / f"{split}.tsv").exists():
            raise ValueError(f"no {split} of {task.name}")

    def run(tasks, mismatched=True, first=None, broken=(), **values):
        for name in tasks:
            directory = tmp_path / "glue" / glue.TASKS[name].directory
            directory.mkdir(parents=True, exist_ok=True)
            dev = directory / f"{glue.TASKS[name].dev_splits[0]}.tsv"
            if name in broken:
                dev.unlink(missing_ok=True)
            else:
                dev.touch()

        def fake(config, workdir, inputs=None):
            begun.append((config.task, workdir))
            task = glue.glue_task(config.task)
            results = []
            for seed, more in zip(config.seeds, (0.0, 0.1)):
                best = {name: SCORES[task.name] + more for name in task.metrics[:1]}
                best |= {name: 0.0 for name in task.metrics[1:]}  # which count nowhere
                if task.name == "mnli" and mismatched:
                    best["accuracy_dev_mismatched"] = MISMATCHED + more
                results.append({"seed": seed, "best": best})
            baseline = dict.fromkeys(results[0]["best"], 0.25)
            return summarise(config, task, baseline, results)

        def made(config, begun):
            return SimpleNamespace(inputs={"init_from": {"step": 3}})

        monkeypatch.setattr(finetune, "train", fake)
        monkeypatch.setattr(finetune, "make_run", first or made)
        monkeypatch.setattr(glue, "read_split", read_split)
        config = finetune_config.get_config("bipft_b,all")
        config.update({"glue_dir": str(tmp_path / "glue"), "seeds": (4, 7), **values})
        return finetune_all.train(config, str(tmp_path / "run"))

    return run, begun


def test_averages_are_those_that_papers_report(runs, tmp_path, capsys):
    run, begun = runs
    summary = run(glue.BENCHMARK)
    assert begun == [(name, str(tmp_path / "run" / name)) for name in SCORES]
    assert summary["mean"]["mnli-mm"] == pytest.approx(0.65)
    # (0.1 + 0.8 + 0.7 + 0.2 + 0.5 + 0.6 + 0.4 + 0.3) / 8 = 0.45, and 0.6 more over 9.
    assert summary["mean"]["average of 8"] == pytest.approx(0.45 + 0.05)
    assert summary["mean"]["average of 9"] == pytest.approx((3.6 + 0.6) / 9 + 0.05)
    assert summary["standard_deviation"]["average of 8"] == pytest.approx(0.1 / 2**0.5)
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["mnli-mm", "65.0", "7.1", "25.0", "accuracy"] in shown
    assert ["stsb", "25.0", "7.1", "25.0", "pearson"] in shown
    assert ["average", "of", "8", "50.0", "7.1", "-"] in [line[:6] for line in shown]
    # A sweep reads it as the result of one run.
    found = finished_scores(tmp_path / "run")
    assert found.metric == "average of 8" and found.by_seed[4][found.metric] == pytest.approx(0.45)
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["tasks"]["rte"]["selection_metric"] == "accuracy"


def test_an_average_without_all_its_entries_is_not_shown(runs):
    summary = runs[0](glue.BENCHMARK, mismatched=False)
    assert "average of 8" in summary["mean"] and "average of 9" not in summary["mean"]


def test_tasks_that_are_not_there_are_named(runs, capsys):
    run, begun = runs
    summary = run(("rte", "cola"))
    assert [name for name, _ in begun] == ["cola", "rte"]
    left_out, *_, last = capsys.readouterr().out.strip().splitlines()
    assert left_out.endswith("left out: sst2, mrpc, stsb, wnli, qnli, qqp, mnli")
    assert last.split() == ["average", "of", "these", "2", "35.0", "7.1", "-", "cola,", "rte"]
    assert summary["selection_metric"] == "average of these 2"


def test_a_directory_without_any_task_is_refused(runs):
    with pytest.raises(ValueError, match="has none of cola, sst2"):
        runs[0](())


def test_what_cannot_work_does_not_occupy_the_workdir(runs, tmp_path):
    def first(config, begun):  # make_run
        raise ValueError(f"no checkpoints for {config.task}")

    with pytest.raises(ValueError, match="no checkpoints for cola"):
        runs[0](glue.BENCHMARK, first=first)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="no dev of rte"):
        runs[0](glue.BENCHMARK, broken=("rte",))
    assert not (tmp_path / "run").exists() and not runs[1]
    with pytest.raises(ValueError, match="x/seed_0 was finetuned on a single task"):
        runs[0]((), teacher="x/seed_0", distillation="bit")


def test_a_single_task_is_an_ordinary_run(runs, tmp_path):
    run, begun = runs
    assert run(("rte",), task="rte")["task"] == "rte"
    assert begun == [("rte", str(tmp_path / "run"))]
