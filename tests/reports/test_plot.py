"""What is drawn, read back from the drawing; what cannot be drawn."""

import json

import pytest

from bipft_jax.reports import plot

PRETRAINING = [
    {"step": 10, "loss": 7.0, "flip_ratio": 0.1, "scales/attention/probs_scale/0": 0.5},
    {"step": 10, "zero_ratio": 0.3},
    {"step": 10, "validation/loss": 7.5, "validation/mlm_accuracy": 0.1},
    {"step": 20, "loss": 6.0, "flip_ratio": 0.2, "scales/attention/probs_scale/0": 0.25},
    {"step": 20, "scales/attention/probs_scale/1": 0.75, "scales/pooler/input_scale": 2.0},
    {"step": 20, "validation/mlm_accuracy": 0.2, "validation/unigram_accuracy": 0.05},
]
FINETUNING = [{"step": 5, "loss": 0.7}, {"step": 5, "dev/accuracy": 0.5}]


def written(directory, log):
    directory.mkdir(parents=True)
    (directory / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in log))
    return directory


def lines(drawing):
    """The points of every line that has any, by the title of its panel."""
    found = {}
    for panel in drawing.axes:
        drawn = [line.get_xydata() for line in panel.lines]
        found[panel.get_title()] = [list(map(tuple, line)) for line in drawn if len(line)]
    return found


def test_runs_are_drawn_over_each_other():
    drawing = plot.figure({"a": PRETRAINING, "b": FINETUNING})
    assert lines(drawing) == {
        "loss": [[(10, 7.0), (20, 6.0)], [(10, 7.5)], [(5, 0.7)]],
        "MLM accuracy": [[(10, 0.1), (20, 0.2)], [(20, 0.05)]],
        "weights whose code changed": [[(10, 0.1), (20, 0.2)]],
        "ternary weights that are 0": [[(10, 0.3)]],
        "dev accuracy": [[(5, 0.5)]],
        "attention/probs_scale, a line a layer": [[(10, 0.5), (20, 0.25)], [(20, 0.75)]],
        "pooler/input_scale, a line a layer": [[(20, 2.0)]],
    }
    first, second = drawing.axes[0].lines[0], drawing.axes[0].lines[-2]
    assert first.get_color() != second.get_color()
    assert [text.get_text() for text in drawing.legends[0].get_texts()] == ["a", "b"]


def test_runs_that_all_log_tokens_are_drawn_over_them():
    small, large = ([{"step": 10, "tokens": 10 * n, "loss": 7.0}] for n in (64, 512))
    drawing = plot.figure({"small": small, "large": large})
    assert lines(drawing)["loss"] == [[(640, 7.0)], [(5120, 7.0)]]
    assert drawing.axes[0].get_xlabel() == "tokens"
    drawing = plot.figure({"small": small, "finetuning": FINETUNING})
    assert lines(drawing)["loss"] == [[(10, 7.0)], [(5, 0.7)]]
    assert drawing.axes[0].get_xlabel() == "update"


def test_a_finetuning_run_stands_for_its_seeds_and_the_command_writes_a_picture(tmp_path, capsys):
    written(tmp_path / "sst2" / "seed_0", FINETUNING)
    written(tmp_path / "sst2" / "seed_1", FINETUNING)
    written(tmp_path / "sst2" / "stage_1_bit_w1a2" / "seed_0", FINETUNING)
    pretrained = written(tmp_path / "fp", PRETRAINING)
    runs = plot.runs_in([pretrained, tmp_path / "sst2"])
    names = ["fp", "sst2/seed_0", "sst2/seed_1", "sst2/stage_1_bit_w1a2/seed_0"]
    assert list(runs) == names and runs["fp"] == PRETRAINING
    output = tmp_path / "curves.png"
    plot.main([str(pretrained), "--output", str(output)])
    assert output.read_bytes().startswith(b"\x89PNG") and str(output) in capsys.readouterr().out


@pytest.mark.parametrize(
    "output, message",
    [
        ("curves", r"curves has no ending, .*: use .*curves\.png,"),
        ("curves.", "no ending"),
        (".png", "no ending"),
        ("curves.jpig", "has the ending .jpig"),
        ("no/curves.png", "has no directory .*no"),
    ],
)
def test_where_no_picture_can_be_written_is_known_before_a_run_is_read(tmp_path, output, message):
    with pytest.raises(SystemExit, match=message):
        plot.main([str(tmp_path / "no run"), "--output", str(tmp_path / output)])
    assert not list(tmp_path.iterdir())


def test_what_is_no_number_is_not_drawn(tmp_path):
    run = written(tmp_path / "run", [{"step": 1, "loss": None}, {"step": 2, "loss": "1.5"}])
    with pytest.raises(SystemExit, match=r"metrics\.jsonl: loss is '1.5' at a step, not a number"):
        plot.main([str(run), "--output", str(tmp_path / "a.png")])


def test_what_cannot_be_drawn_is_explained(tmp_path):
    with pytest.raises(SystemExit, match=r"has no metrics\.jsonl"):
        plot.main([str(tmp_path)])
    empty = written(tmp_path / "begun", [])
    with pytest.raises(SystemExit, match="nothing has been logged yet by begun"):
        plot.main([str(empty)])
