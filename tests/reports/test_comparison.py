"""Results in, a table out, by hand."""

import json

import pytest

from bipft_jax.reports import comparison


def result(recipe, task, mean, deviation=0.02, pretrained=True, **more):
    metric = {"sst2": "accuracy", "cola": "matthews"}[task]
    return {
        "task": task,
        "recipe": recipe,
        "pretrained": pretrained,
        "mean": {metric: mean},
        "standard_deviation": {metric: deviation},
        "majority_class": {metric: 0.5},
        "init_from": f"runs/{recipe}",
        "selection_metric": metric,
        "seeds": [
            {"seed": seed, "best": {metric: mean}} for seed in range(1 if deviation is None else 3)
        ],
        **more,
    }


def written(directory, **files):
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def test_models_are_rows_and_tasks_are_columns(tmp_path, capsys):
    here = written(tmp_path / "a", x=result("bipft_b", "sst2", 0.703, 0.019))
    written(here / "deeper", y=result("fp", "cola", 0.1, None))
    # What lies in a workdir beside a result.json.
    written(here / "other", config={"task": "sst2", "recipe": "fp"}, seed={"seed": 0, "best": {}})
    more = written(tmp_path / "b", z=result("bipft_b", "sst2", 0.6, 0.088, pretrained=False))
    (here / "notes.json").write_text("{")
    comparison.main([str(here), str(more / "z.json"), str(here / "deeper")])
    assert capsys.readouterr().out.splitlines()[:6] == [
        "|  | CoLA, matthews | SST-2, accuracy | average of these 2 |",
        "| --- | ---: | ---: | ---: |",
        "| `fp` | 10.0 |  |  |",
        "| `bipft_b`, not pretrained |  | 60.0 ± 8.8 |  |",
        "| `bipft_b` |  | 70.3 ± 1.9 |  |",
        "| majority class | 50.0 | 50.0 | 50.0 |",
    ]


def test_pretraining_has_a_table_of_its_own(tmp_path, capsys):
    scores = {"loss": 5.6, "mlm_loss": 5.0, "mlm_accuracy": 0.5}
    scores |= {"nsp_loss": 0.6, "nsp_accuracy": 0.7}
    pretraining = {
        "recipe": "fp",
        "size": "mini",
        "selection_metric": "loss",
        "higher_is_better": False,
        "seeds": [{"best": scores, "last": {**scores, "mlm_loss": 6.0}}],
        "config": {"seed": 0},
    }
    here = written(tmp_path / "a", x=result("fp", "sst2", 0.7), y=pretraining)
    comparison.main([str(here), str(here / "y.json")])
    printed = capsys.readouterr().out
    assert "| `fp` | 70.0 ± 2.0 |" in printed
    assert "| `fp`, mini | 5.600 | 5.000 | 50.0 | 0.600 | 70.0 | - | 1 |" in printed
    comparison.main([str(here / "y.json"), "--last"])
    last = capsys.readouterr().out
    assert last.startswith("| pretraining |") and "| `fp`, mini | 5.600 | 6.000 |" in last


def test_two_results_for_one_cell_are_refused(tmp_path):
    written(tmp_path / "a", x=result("fp", "cola", 0.1), y=result("fp", "cola", 0.2))
    with pytest.raises(SystemExit, match=r"x\.json and .*y\.json are both of `fp` on cola"):
        comparison.main([str(tmp_path)])


def test_models_of_one_recipe_from_two_checkpoints_are_two_rows(tmp_path, capsys):
    binarised = result("bipft_b", "sst2", 0.6, init_from="runs/fp")
    written(
        tmp_path / "a",
        x=result("bipft_b", "cola", 0.1),
        y=binarised,
        z=result("fp", "sst2", 0.8),
    )
    comparison.main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[2:5] == [
        "| `fp` |  | 80.0 ± 2.0 |  |",
        "| `bipft_b`, from `runs/bipft_b` | 10.0 ± 2.0 |  |  |",
        "| `bipft_b`, from `runs/fp` |  | 60.0 ± 2.0 |  |",
    ]


def test_a_score_that_one_model_lacks_is_left_out(tmp_path, capsys):
    more = result("bipft_b", "sst2", 0.7)
    for scores in ("mean", "standard_deviation", "majority_class"):
        more[scores]["more"] = 0.25
    written(tmp_path / "a", x=result("fp", "sst2", 0.1), y=more)
    comparison.main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[2:5] == [
        "| `fp` | 10.0 ± 2.0 |  |",
        "| `bipft_b` | 70.0 ± 2.0 | 25.0 ± 25.0 |",
        "| majority class | 50.0 | 25.0 |",
    ]


def test_what_has_no_results_is_named(tmp_path):
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(SystemExit, match=r"x\.json is not JSON"):
        comparison.main([str(tmp_path / "x.json")])
    (tmp_path / "x.json").write_text('{"task": "all", "mean": {}}')
    with pytest.raises(SystemExit, match="no result.json of a run"):
        comparison.main([str(tmp_path)])


def test_with_the_tasks_data_the_table_has_a_model_of_word_counts(tmp_path, capsys):
    rows = [("a dull film", 0), ("a fine film", 1)] * 4
    more = [("fine", 0)] * 2
    for task, header, line in (
        ("SST-2", "sentence\tlabel\n", "{0}\t{1}\n"),
        ("CoLA", "", "x\t{1}\t*\t{0}\n"),
    ):
        directory = tmp_path / "glue" / task
        directory.mkdir(parents=True)
        for split, of_split in (("train", rows), ("dev", rows + more)):
            lines = [line.format(*row) for row in of_split]
            (directory / f"{split}.tsv").write_text(header + "".join(lines))
    written(tmp_path / "a", x=result("bipft_b", "sst2", 0.7))
    comparison.main([str(tmp_path / "a"), "--glue_dir", str(tmp_path / "glue")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "| linear model of bags of words | 80.0 |"  # two of ten are wrong
    assert lines[-1] == (
        "SST-2: 8 training and 10 dev rows; standard error of an accuracy: at most 15.8."
    )
    # With 4 true positives, 4 true negatives and 2 false positives: 16 / sqrt(6 * 4 * 6 * 4).
    written(tmp_path / "b", x=result("bipft_b", "cola", 0.7))
    comparison.main([*(str(tmp_path / n) for n in "ab"), "--glue_dir", str(tmp_path / "glue")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[3] == "| linear model of bags of words | 66.7 | 80.0 | 73.3 |"
    with pytest.raises(SystemExit, match="no GLUE directory"):
        comparison.main([str(tmp_path / "a"), "--glue_dir", str(tmp_path / "none")])


def distilled(recipe, task, mean, start, teacher, distillation="bit", **config):
    """A result whose config has the keys of distillation."""
    config |= {"teacher": teacher, "distillation": distillation}
    return result(recipe, task, mean, None, init_from=start, config=config)


def test_models_of_one_recipe_differ_in_rank_distillation_and_start(tmp_path, capsys):
    plain = {"estimator_rank": -1, "teacher": "", "distillation": ""}
    of_rank_4 = result("bipft_b", "sst2", 0.4, None, init_from="r4", config={"estimator_rank": 4})
    written(
        tmp_path / "a",
        # The rank of the recipe, in two spellings: one row.
        a=result("bipft_b", "sst2", 0.1, None, config=plain),
        b=result("bipft_b", "cola", 0.2, None, config={**plain, "estimator_rank": 1}),
        c=of_rank_4,
        d=distilled("bipft_b", "sst2", 0.5, "runs/bipft_b", "fp-sst2/seed_0"),
        e=distilled("bipft_b", "sst2", 0.6, "fp-sst2/seed_0", "fp-sst2/seed_0"),
        # Another teacher for every task: one row.
        f=distilled("bit_w1a1", "sst2", 0.7, "fp-sst2/seed_0", "fp-sst2/seed_0/"),
        g=distilled("bit_w1a1", "cola", 0.8, "fp-cola/seed_0", "fp-cola/seed_0"),
    )
    comparison.main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[2:-2] == [
        "| `bipft_b`, from `runs/bipft_b` | 20.0 | 10.0 | 15.0 |",
        "| `bipft_b`, distilled from a finetuned teacher, from that teacher's weights |  "
        "| 60.0 |  |",
        "| `bipft_b`, distilled from a finetuned teacher, from `runs/bipft_b` |  | 50.0 |  |",
        "| `bipft_b`, rank 4, from `r4` |  | 40.0 |  |",
        "| `bit_w1a1`, distilled from a finetuned teacher | 80.0 | 70.0 | 75.0 |",
        "| majority class | 50.0 | 50.0 | 50.0 |",
    ]


def test_two_distillations_of_one_recipe_are_named(tmp_path, capsys):
    matching = distilled("bibert", "sst2", 0.6, "t", "t", distillation="direction_matching")
    written(tmp_path / "a", x=distilled("bibert", "sst2", 0.5, "t", "t"), y=matching)
    comparison.main([str(tmp_path)])
    assert capsys.readouterr().out.splitlines()[2:4] == [
        "| `bibert`, distilled by `bit` from a finetuned teacher | 50.0 |",
        "| `bibert`, distilled by `direction_matching` from a finetuned teacher | 60.0 |",
    ]


def scored(recipe, task, best, last):
    """A result with the scores of each seed; of a second metric too, which selects nothing."""
    made = result(recipe, task, 0.0)
    metric = made["selection_metric"]
    made["seeds"] = [
        {"seed": seed, "best": {metric: best[seed], "f1": 0.9}, "last": {metric: last[seed]}}
        for seed in best
    ]
    made["majority_class"] = {metric: {"cola": 0.0, "sst2": 0.5}[task], "f1": 0.9}
    return made


def test_the_average_of_tasks_and_its_deviation_over_seeds(tmp_path, capsys):
    written(
        tmp_path / "a",
        a=scored("fp", "cola", {0: 0.1, 1: 0.3}, {0: 0.0, 1: 0.2}),
        b=scored("fp", "sst2", {1: 0.5, 0: 0.9}, {1: 0.4, 0: 0.4}),
        c=scored("bipft_b", "cola", {0: 0.1, 1: 0.3}, {0: 0.1, 1: 0.1}),
        d=scored("bipft_b", "sst2", {0: 0.7, 2: 0.9}, {0: 0.5, 2: 0.7}),
    )

    def printed(*flags):
        comparison.main([str(tmp_path), *flags])
        return [line.split(" | ")[-1] for line in capsys.readouterr().out.splitlines()[2:5]]

    # Of seeds: (0.1 + 0.9) / 2 = 0.5 and (0.3 + 0.5) / 2 = 0.4; 0.2 and 0.3. The second model has
    # other seeds of the second task: (0.2 + 0.8) / 2, (0.1 + 0.6) / 2.
    assert printed() == ["45.0 ± 7.1 |", "50.0 |", "25.0 |"]
    assert printed("--last") == ["25.0 ± 7.1 |", "35.0 |", "25.0 |"]


def test_results_that_cannot_be_compared_are_named(tmp_path):
    other = result("bipft_b", "sst2", 0.7)
    for scores in ("mean", "standard_deviation", "majority_class"):
        other[scores] = {"f1": 0.5}
    other["selection_metric"] = "f1"
    written(tmp_path / "a", x=result("fp", "sst2", 0.7), y=other)
    with pytest.raises(SystemExit, match="of sst2 select their best evaluation by accuracy and by"):
        comparison.main([str(tmp_path / "a")])
    del other["selection_metric"], other["seeds"]
    written(tmp_path / "b", y=other)
    with pytest.raises(
        SystemExit, match=r"y\.json is not a run's .* lacks selection_metric, seeds"
    ):
        comparison.main([str(tmp_path / "b")])


def test_the_scores_of_the_last_update(tmp_path, capsys):
    seeds = [
        {"seed": seed, "best": {"accuracy": 0.9}, "last": {"accuracy": last}}
        for seed, last in enumerate((0.6, 0.7, 0.8))
    ]
    written(tmp_path / "a", x=result("fp", "sst2", 0.9, 0.0, seeds=seeds))
    comparison.main([str(tmp_path), "--last"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| `fp` | 70.0 ± 10.0 |"
    assert lines[-1] == "Percent of the last evaluation on the dev sets; seeds: 3."
    comparison.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| `fp` | 90.0 ± 0.0 |"
    assert lines[-1] == "Percent of the best evaluation on the dev sets; seeds: 3."
