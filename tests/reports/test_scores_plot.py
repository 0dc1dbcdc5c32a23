"""What is drawn, read back from the drawing."""

import json

import pytest

from bipft_jax.reports import comparison, scores_plot


def result(recipe, task, metric, best, last=None, majority=0.5):
    pairs = enumerate(zip(best, last or best, strict=True))
    return {
        "task": task,
        "recipe": recipe,
        "pretrained": True,
        "init_from": "runs/start",
        "selection_metric": metric,
        "majority_class": {metric: majority, "f1": 0.9},
        "mean": {},
        "standard_deviation": {},
        "seeds": [
            {"seed": seed, "best": {metric: b, "f1": 0.9}, "last": {metric: n}}
            for seed, (b, n) in pairs
        ],
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
    drawing = scores_plot.figure(RESULTS)
    (axes,) = drawing.axes
    texts = [text.get_text() for text in axes.get_xticklabels()]
    assert texts == ["CoLA\nmatthews", "SST-2\naccuracy", "average of\nthese 2"]
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
    assert bar.get_facecolor() != others[1].get_facecolor()
    legend = [text.get_text() for text in drawing.legends[0].get_texts()]
    assert legend == ["fp", "bipft_b", "majority class"]


def test_the_last_evaluation():
    (axes,) = scores_plot.figure(RESULTS[:1], last=True).axes
    assert drawn(axes) == {"bipft_b": ([50.0], [50.0, 50.0])}
    assert "last evaluation" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_xticklabels()] == ["SST-2\naccuracy"]
    (axes,) = scores_plot.figure([RESULTS[0], RESULTS[2]], last=True).axes
    assert drawn(axes)["bipft_b"][0] == [10.0, 50.0, 30.0]


def test_many_models_fit_beside_their_names():
    many = [
        {**RESULTS[0], "init_from": f"runs/{'a-long-name-of-a-start' * 3}-{n}"} for n in range(24)
    ]
    drawing = scores_plot.figure(many)
    drawing.draw_without_rendering()
    (axes,), (legend,) = drawing.axes, drawing.legends
    width, height = drawing.bbox.width, drawing.bbox.height
    assert axes.bbox.height > 0.3 * height and legend.get_window_extent().width < width
    assert len({bars[0].get_facecolor() for bars in axes.containers}) == 24


def test_the_command_writes_the_plot_of_what_it_prints(tmp_path, capsys):
    (tmp_path / "x.json").write_text(
        json.dumps(
            {**RESULTS[0], "mean": {"accuracy": 0.7}, "standard_deviation": {"accuracy": 0.1}}
        )
    )
    output = tmp_path / "scores.svg"
    comparison.main([str(tmp_path / "x.json"), "--last", "--output", str(output)])
    assert "| `bipft_b` | 50.0 ± 0.0 |" in capsys.readouterr().out
    assert "last evaluation" in output.read_text()


@pytest.mark.parametrize(
    ("output", "message"),
    [("scores", "scores has no ending"), ("none/scores.png", "has no directory")],
)
def test_the_file_is_checked_before_the_table(tmp_path, capsys, output, message):
    with pytest.raises(SystemExit, match=message):
        comparison.main([str(tmp_path), "--output", str(tmp_path / output)])
    assert not capsys.readouterr().out


def test_without_finetuning_there_is_nothing_to_draw():
    with pytest.raises(ValueError, match="no result of finetuning"):
        scores_plot.figure([])
