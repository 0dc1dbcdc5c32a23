"""What is drawn, read back from the drawing."""

import pytest

from bipft_jax.reports import comparison, scores_plot


def result(recipe, task, metric, best, last=None, majority=0.5):
    pairs = zip(best, last or best, strict=True)
    return {
        "task": task,
        "recipe": recipe,
        "pretrained": True,
        "init_from": "runs/start",
        "selection_metric": metric,
        "majority_class": {metric: majority, "f1": 0.9},
        "seeds": [{"best": {metric: b, "f1": 0.9}, "last": {metric: n}} for b, n in pairs],
    }


RESULTS = [
    result("bipft_b", "sst2", "accuracy", (0.6, 0.8), (0.5, 0.5)),
    result("fp", "sst2", "accuracy", (0.9,)),
    result("bipft_b", "cola", "matthews", (0.0, 0.2), majority=0.0),
]


def drawn(axes):
    """(heights of the bars, heights of the dots) of each model, by its label."""
    dots = [[round(y, 6) for _, y in line.get_xydata()] for line in axes.lines]
    bars = [[round(bar.get_height(), 6) for bar in bars] for bars in axes.containers]
    labels = [bars.get_label() for bars in axes.containers]
    return dict(zip(labels, zip(bars, dots, strict=True), strict=True))


def test_bars_are_means_and_dots_are_seeds():
    (axes,) = scores_plot.figure(RESULTS).axes
    texts = [text.get_text() for text in axes.get_xticklabels()]
    assert texts == ["CoLA\nmatthews", "SST-2\naccuracy", "average"]
    # The averages of the seeds: (0.0 + 0.6) / 2 and (0.2 + 0.8) / 2.
    assert drawn(axes) == {
        "fp": ([90.0], [90.0]),
        "bipft_b": ([10.0, 70.0, 40.0], [0.0, 20.0, 60.0, 80.0, 30.0, 50.0]),
    }
    (majority,) = axes.collections
    levels = [segment[0][1] for segment in majority.get_segments()]
    assert levels == pytest.approx([0, 50, 25])
    # fp has no score of CoLA: its bar is at SST-2, left of bipft_b's.
    (bar,), others = axes.containers
    assert 0.5 < bar.get_center()[0] < others[1].get_center()[0] < 1.5


def test_the_last_evaluation_of_one_task():
    (axes,) = scores_plot.figure(RESULTS[:1], last=True).axes
    assert drawn(axes) == {"bipft_b": ([50.0], [50.0, 50.0])}
    assert "last evaluation" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["SST-2\naccuracy"]


def test_the_file_is_checked_before_the_table(tmp_path, capsys):
    with pytest.raises(SystemExit, match=r"scores has no ending"):
        comparison.main([str(tmp_path), "--output", str(tmp_path / "scores")])
    assert not capsys.readouterr().out
    with pytest.raises(ValueError, match="no result of finetuning"):
        scores_plot.figure([])
