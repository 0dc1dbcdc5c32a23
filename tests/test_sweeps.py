"""Points and their names; runs that fail, stop and go on; table, plot and summary by hand."""

import csv
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bipft_jax import sweeps
from bipft_jax.points import named, point_name, product, zipped
from bipft_jax.reports import sweep
from configs import robustness

ROOT = Path(__file__).parents[1]


def write_result(directory, accuracy_by_seed, higher_is_better=True):
    """What a finished run leaves, as far as a sweep reads it."""
    seeds = [
        {"seed": seed, "best": {"accuracy": accuracy, "f1": accuracy / 2}}
        for seed, accuracy in accuracy_by_seed.items()
    ]
    result = {"selection_metric": "accuracy", "higher_is_better": higher_is_better, "seeds": seeds}
    (directory / "result.json").write_text(json.dumps(result))


def grid(workdir):
    """2 x 2 settings with two seeds each, one setting half finished and one failed. Means of the
    finished ones: 0.5, 0.25, 0.75."""
    points = product(size=("tiny", "mini"), learning_rate=(0.001, 0.1), seeds=((0,), (1,)))
    accuracies = iter([0.25, 0.75, 0.125, 0.375, 0.75, None, "failed", None])
    for point, accuracy in zip(points, accuracies, strict=True):
        directory = workdir / point_name(point)
        directory.mkdir(parents=True)
        if accuracy == "failed":
            (directory / "failed.txt").write_text("out of memory")
        elif accuracy is not None:
            write_result(directory, {point["seeds"][0]: accuracy})
    return points


def test_points_are_every_combination_or_taken_together():
    together = zipped(size=("tiny", "mini"), learning_rate=(2, 1))
    assert product(together, seed=(0, 1)) == [
        {"size": "tiny", "learning_rate": 2, "seed": 0},
        {"size": "tiny", "learning_rate": 2, "seed": 1},
        {"size": "mini", "learning_rate": 1, "seed": 0},
        {"size": "mini", "learning_rate": 1, "seed": 1},
    ]
    with pytest.raises(ValueError, match="size is named twice"):
        product(together, size=("base",))
    with pytest.raises(ValueError, match="size has 2, learning_rate has 3"):
        zipped(size=("tiny", "mini"), learning_rate=(1, 2, 3))
    with pytest.raises(ValueError, match="size is 'tiny': give a tuple"):
        product(size="tiny")


def test_names_are_file_names_and_differ_where_points_do():
    name = point_name({"seeds": (0,), "learning_rate": 3e-4})
    assert name == "learning_rate=0.0003,seeds=0"
    assert name == point_name({"learning_rate": 3e-4, "seeds": (0,)})
    hard = ["a/b", "a b", "a_b", "a\nb", "../a", "ä", "a,size=b", "a" * 300, "a" * 300 + "b", ""]
    names = [point_name({"init_from": value}) for value in hard]
    names.append(point_name({"init_from": "a", "size": "b"}))
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name) < 200 and name.isascii() and not set(name) & set("/\n\\ ")
    with pytest.raises(ValueError, match="names the point seed=0 twice"):
        named([{"seed": 0}, {"seed": 0}])


@pytest.mark.parametrize("parallel", [1, 3])
def test_a_sweep_goes_on_where_it_was_and_repeats_only_failed_points(tmp_path, capsys, parallel):
    points = product(seed=(0, 1, 2, 3))
    started = []

    def start(point, directory):
        started.append(point["seed"])
        if point["seed"] == 1 and broken:
            raise RuntimeError("the disk is full\n(second line)")
        if point["seed"] == 2 and broken:
            return  # leaves no result
        write_result(directory, {point["seed"]: 0.5 + point["seed"] / 8})

    broken = True
    failures = sweeps.run(points, start, tmp_path, parallel)
    assert sorted(started) == [0, 1, 2, 3]
    assert failures["seed=1"].startswith("RuntimeError: the disk is full")
    assert "ended without a result" in failures["seed=2"] and len(failures) == 2
    printed = capsys.readouterr().out
    assert "0 finished before" in printed and "(second line)" not in printed
    assert "2 of 4 failed after 0 s: seed=1, RuntimeError: the disk is full\n" in printed
    assert "the disk is full" in (tmp_path / "seed=1" / "failed.txt").read_text()
    assert states_in_table(tmp_path) == ["finished", "failed", "failed", "finished"]

    broken, started[:] = False, []
    assert sweeps.run(points, start, tmp_path, parallel) == {}
    assert sorted(started) == [1, 2]
    printed = capsys.readouterr().out
    assert "4 points" in printed and "2 finished before" in printed
    assert "2 of 4 starts: seed=1" in printed and "seed=1, accuracy 0.6250" in printed
    assert states_in_table(tmp_path) == ["finished"] * 4
    assert not list(tmp_path.glob("*/failed.txt"))
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*map(point_name, points), "sweep.csv", "sweep.png"]
    )


def states_in_table(workdir):
    with (workdir / "sweep.csv").open(newline="") as file:
        return [row["state"] for row in csv.DictReader(file)]


@pytest.mark.parametrize("parallel", [1, 2])
def test_an_interruption_stops_the_sweep(tmp_path, parallel):
    started, stopped = [], threading.Event()

    def start(point, directory):
        started.append(point["seed"])
        if point["seed"] == 0:
            raise KeyboardInterrupt
        stopped.wait()

    before = threading.enumerate()
    with pytest.raises(KeyboardInterrupt):
        sweeps.run(product(seed=range(20)), start, tmp_path, parallel)
    stopped.set()
    for thread in set(threading.enumerate()) - set(before):
        thread.join()
    assert started == [0] if parallel == 1 else set(started) <= {0, 1, 2}
    assert set(states_in_table(tmp_path)) == {"waiting"}


def test_a_result_that_cannot_be_read_is_run_again(tmp_path):
    (tmp_path / "seed=0").mkdir()
    (tmp_path / "seed=0" / "result.json").write_text("{")
    assert [row["state"] for row in sweep.rows([{"seed": 0}], tmp_path)] == ["failed"]
    assert sweeps.run([{"seed": 0}], lambda _, d: write_result(d, {0: 1.0}), tmp_path) == {}
    assert [row["accuracy"] for row in sweep.rows([{"seed": 0}], tmp_path)] == [1.0]


def test_the_table_has_a_row_for_each_point_and_seed(tmp_path):
    points = [{"seeds": (0, 7), "note": "a,b"}, {"seeds": (1,), "note": "c"}, {"note": "d"}]
    (tmp_path / point_name(points[0])).mkdir()
    write_result(tmp_path / point_name(points[0]), {0: 0.5, 7: 0.25})
    table = sweep.rows(points, tmp_path)
    sweep.write_table(table, tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text().splitlines() == [
        "seeds,note,seed,state,accuracy,f1",
        '"(0, 7)","a,b",0,finished,0.5,0.25',
        '"(0, 7)","a,b",7,finished,0.25,0.125',
        '"(1,)",c,1,waiting,,',
        ",d,,waiting,,",
    ]


def test_the_plot_has_a_panel_for_each_key_and_a_line_for_the_others(tmp_path):
    sizes, rates = sweep.figure(grid(tmp_path), tmp_path).axes
    deviation = 0.5 / 2**0.5  # of 0.25 and 0.75; half of it of 0.125 and 0.375

    assert (sizes.get_xlabel(), sizes.get_ylabel()) == ("size", "accuracy")
    assert sizes.get_xscale() == "linear"
    assert [text.get_text() for text in sizes.get_xticklabels()] == ["tiny", "mini"]
    assert lines(sizes) == {
        "learning_rate=0.001": ([(0, 0.5), (1, 0.75)], [deviation, None]),
        "learning_rate=0.1": ([(0, 0.25)], [deviation / 2]),
    }
    assert dots(sizes) == [[(0, 0.25), (0, 0.75), (1, 0.75)], [(0, 0.125), (0, 0.375)]]

    assert (rates.get_xlabel(), rates.get_xscale()) == ("learning_rate", "log")
    assert [text.get_text() for text in rates.get_xticklabels()] == ["0.001", "0.1"]
    assert lines(rates) == {
        "size=tiny": ([(0.001, 0.5), (0.1, 0.25)], [deviation, deviation / 2]),
        "size=mini": ([(0.001, 0.75)], [None]),
    }
    names = [text.get_text() for text in rates.get_legend().get_texts()]
    assert names == ["size=tiny", "size=mini"]


def test_a_narrow_range_is_linear_and_seeds_alone_have_one_panel(tmp_path):
    points = product(learning_rate=(1e-4, 9e-4))
    assert sweep.figure(points, tmp_path).axes[0].get_xscale() == "linear"
    points = product(seed=(0, 1))
    sweeps.run(points, lambda p, d: write_result(d, {p["seed"]: 0.5 + p["seed"]}), tmp_path)
    (panel,) = sweep.figure(points, tmp_path).axes
    assert list(lines(panel).values()) == [([(0, 1.0)], [pytest.approx(0.5**0.5)])]
    assert [text.get_text() for text in panel.get_xticklabels()] == ["all"]
    assert panel.get_legend() is None


def scored(points, workdir, score):
    """Finishes every point with the seed 0 and score(point)."""
    for name, point in named(points).items():
        (workdir / name).mkdir(parents=True)
        write_result(workdir / name, {0: score(point)})
    return sweep.figure(points, workdir).axes


def test_checkpoints_of_one_run_have_an_axis_of_updates(tmp_path):
    run = str(tmp_path / "b")
    points = product(init_from=(f"{run}@500", f"{run}@1500", f"{run}@1000"))
    (panel,) = scored(
        points, tmp_path / "one", lambda point: int(point["init_from"][-4:-2].strip("@"))
    )
    title = panel.get_xlabel()
    assert title.replace("\n", "").replace(" ", "") == f"init_from:updatesof{run}"
    assert max(map(len, title.splitlines())) <= 70
    assert list(lines(panel).values()) == [([(500, 5), (1000, 10), (1500, 15)], [None] * 3)]

    points.append({"init_from": run})  # the best: of no known update
    (panel,) = scored(points, tmp_path / "two", lambda point: 1)
    assert panel.get_xlabel() == "init_from"
    texts = [text.get_text() for text in panel.get_xticklabels()]
    assert texts == [point["init_from"] for point in points]


ROBUSTNESS = f"{ROOT / 'configs' / 'robustness.py'}:bipft_a,rte,fp,b@90,t/seed_0,1e-3"


def test_points_around_one_setting_have_a_line_for_each_start_and_teacher(tmp_path):
    """As in the points of configs/robustness.py: neither the other batch sizes at the middle rate
    nor starts and teachers get lines or panels of their own."""
    points = robustness.get_hyper(ROBUSTNESS.partition(":")[2])

    def score(point):
        return (point["init_from"] == "fp") + 2 * ("teacher" in point) + point["learning_rate"]

    rates, sizes = scored(points, tmp_path, score)
    assert rates.get_xlabel() == "learning_rate, at batch_size=32"
    assert sizes.get_xlabel() == "batch_size, at learning_rate=0.001"
    swept = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
    starts = {
        "init_from=fp": 1,
        "init_from=fp, distillation=bit": 3,
        "init_from=b@90": 0,
        "init_from=b@90, distillation=bit": 2,
    }
    assert {name: line for name, (line, _) in lines(rates).items()} == {
        name: [(rate, base + rate) for rate in swept] for name, base in starts.items()
    }
    assert {name: line for name, (line, _) in lines(sizes).items()} == {
        name: [(size, base + 1e-3) for size in (8, 16, 32, 64)] for name, base in starts.items()
    }


def test_a_panel_without_a_line_or_with_more_than_colours_is_left_out_if_another_remains(tmp_path):
    def panels(rates, sizes):
        points = product(learning_rate=range(rates), batch_size=range(sizes))
        return [panel.get_xlabel() for panel in sweep.figure(points, tmp_path).axes]

    assert panels(10, 2) == ["learning_rate", "batch_size"]
    assert panels(11, 2) == ["learning_rate"]
    assert panels(11, 11) == ["learning_rate", "batch_size"]
    assert panels(2, 1) == ["learning_rate, at batch_size=0"]


def lines(panel):
    """The points and half the lengths of the error bars (None without) of every line, by label."""
    found = {}
    for container in panel.containers:
        line, _, (bars,) = container.lines
        ends = [[y for _, y in segment] for segment in bars.get_segments()]
        lengths = [pytest.approx((high - low) / 2) for low, high in filter(len, ends)]
        lengths += [None] * (len(ends) - len(lengths))
        found[container.get_label()] = (list(map(tuple, line.get_xydata())), lengths)
    return found


def dots(panel):
    single = [line for line in panel.lines if line.get_marker() == "."]
    return [list(map(tuple, line.get_xydata())) for line in single]


def test_points_that_stand_on_different_inputs_do_not_make_one_table(tmp_path):
    points = product(init_from=("a", "b"), seed=(0, 1))
    corpora = iter("ccccd")

    def start(point, directory):
        write_result(directory, {point["seed"]: 0.5})
        inputs = {"corpus_dir": {"input": next(corpora)}, "init_from": {"step": point["init_from"]}}
        (directory / "inputs.json").write_text(json.dumps(inputs))

    assert sweeps.run(points, start, tmp_path) == {}
    more = [*points, {"init_from": "c", "seed": 0}]
    (failed,) = sweeps.run(more, start, tmp_path).values()
    assert "init_from=c,seed=0 has other inputs than" in failed
    assert "(corpus_dir: input c before, d now)" in failed
    with pytest.raises(ValueError, match="corpus_dir: input c before, d now"):
        sweeps.run(more, start, tmp_path)


def test_the_summary_names_the_best_setting_and_its_best_run(tmp_path):
    points = grid(tmp_path)
    cells = [line.split() for line in sweep.summary(points, tmp_path).splitlines()]
    assert cells[:5] == [
        ["size", "learning_rate", "mean", "accuracy", "deviation", "seeds", "state"],
        ["tiny", "0.001", "0.5000", "0.3536", "2", "finished"],
        ["tiny", "0.1", "0.2500", "0.1768", "2", "finished"],
        ["mini", "0.001", "0.7500", "-", "1", "1", "finished,", "1", "waiting"],
        ["mini", "0.1", "-", "-", "0", "1", "failed,", "1", "waiting"],
    ]
    assert " ".join(cells[5]) == (
        "best mean accuracy: size=mini, learning_rate=0.001, 0.7500 over 1 seed; "
        f"its best run: {tmp_path / 'learning_rate=0.001,seeds=0,size=mini'}"
    )


def test_of_losses_the_lowest_is_best(tmp_path):
    points = product(learning_rate=(1.0, 2.0), seed=(0, 1))

    def start(point, directory):
        loss = point["learning_rate"] + point["seed"] / 4
        write_result(directory, {point["seed"]: loss}, higher_is_better=False)

    sweeps.run(points, start, tmp_path)
    best = sweep.summary(points, tmp_path).splitlines()[-1]
    assert "learning_rate=1.0, 1.1250 over 2 seeds" in best
    assert best.endswith("learning_rate=1.0,seed=0")


# Stands in for launch/train.py: the same flags; the score is 100 x learning rate + the seed. Waits
# for ever, with a child that does too, where the file `hold` names its workdir.
PROGRAM = """
import json, pathlib, subprocess, sys, time
from absl import app, flags
from ml_collections import config_flags
config = config_flags.DEFINE_config_file("config", None)
workdir = flags.DEFINE_string("workdir", None, "")
def main(argv):
    directory, c = pathlib.Path(workdir.value), config.value
    (directory / "config.json").write_text(json.dumps(c.to_dict()))
    hold = pathlib.Path(__file__).with_name("hold")
    if hold.exists() and hold.read_text() == directory.name:
        child = subprocess.Popen(["sleep", "600"])
        (directory / "child").write_text(str(child.pid))
        time.sleep(600)
    if c.learning_rate == 1e-3 and c.seeds == (1,) and c.batch_size == 7:
        sys.exit("error: the batch does not split")
    best = {"accuracy": 100 * c.learning_rate + c.seeds[0]}
    seeds = [{"seed": c.seeds[0], "best": best}]
    result = {"selection_metric": "accuracy", "higher_is_better": True, "seeds": seeds}
    (directory / "result.json").write_text(json.dumps(result))
app.run(main)
"""


@pytest.fixture
def command(tmp_path):
    """launch/sweep.py beside a program that stands in for train.py."""
    shutil.copy(ROOT / "launch" / "sweep.py", tmp_path)
    (tmp_path / "train.py").write_text(PROGRAM)
    return [
        *(sys.executable, str(tmp_path / "sweep.py"), f"--workdir={tmp_path / 'sweep'}"),
        f"--config={ROOT / 'configs' / 'finetune.py'}:bipft_b,rte",
    ]


def run_command(command, *options):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*command, *options], env=environment, capture_output=True, text=True, check=False
    )


def test_a_terminated_sweep_of_the_configs_own_points_goes_on_to_one_table(command, tmp_path):
    workdir, held = tmp_path / "sweep", "learning_rate=0.0003,seeds=1"
    (tmp_path / "hold").write_text(held)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    child, deadline = workdir / held / "child", time.monotonic() + 120
    while not (child.exists() and child.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    state = Path(f"/proc/{child.read_text()}/stat")  # a zombie where nobody reaps orphans
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"

    listed = run_command(command, "--list").stdout.splitlines()
    assert [line.split()[0] for line in listed] == 3 * ["finished"] + 3 * ["waiting"]
    (tmp_path / "hold").unlink()
    done = run_command(command)
    assert done.returncode == 0, done.stderr
    assert "6 points" in done.stdout and "3 finished before" in done.stdout
    assert f"best run: {workdir / 'learning_rate=0.001,seeds=1'}" in done.stdout
    with (workdir / "sweep.csv").open(newline="") as file:
        table = [(row["learning_rate"], row["accuracy"]) for row in csv.DictReader(file)]
    assert [(float(rate), pytest.approx(float(score))) for rate, score in table] == [
        *((1e-4, 0.01), (1e-4, 1.01), (3e-4, 0.03), (3e-4, 1.03), (1e-3, 0.1), (1e-3, 1.1))
    ]

    changed = run_command(command, "--config.batch_size=7")  # would mix two settings in one table
    assert changed.returncode == 1 and "batch_size: 32 before, 7 now" in changed.stderr


def test_a_failed_run_is_shown_and_does_not_hold_up_the_others(command, tmp_path):
    values = ("--values=learning_rate=1e-3,1", "--values=seeds=(0,),(1,)", "--parallel=2")
    done = run_command(command, *values, "--config.batch_size=7")
    assert done.returncode == 1
    assert "failed: " in done.stdout and "error: the batch does not split" in done.stdout
    states = states_in_table(tmp_path / "sweep")
    assert states == ["finished", "failed", "finished", "finished"]
    assert "best mean accuracy: learning_rate=1.0, 100.5000 over 2 seeds" in done.stdout


def test_a_run_that_outlived_its_killed_sweep_is_waited_for(command, tmp_path):
    directory = tmp_path / "sweep" / "seeds=3"
    directory.mkdir(parents=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with (directory / "log.txt").open("a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)  # as a run holds its own
        process = subprocess.Popen(
            [*command, "--values=seeds=3"], env=environment, stdout=subprocess.PIPE, text=True
        )
        while "waiting" not in (line := process.stdout.readline()):
            assert line
        write_result(directory, {3: 0.5})
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "seeds=3, accuracy 0.5000" in printed
    assert (directory / "log.txt").read_text() == ""  # it was not run a second time


@pytest.mark.parametrize(
    "options, message",
    [
        (["--values=learning_rat=1,2"], 'Did you mean "learning_rate"'),
        (["--values=batch_size=8,1.5"], "config.batch_size=1.5"),
        (["--config.learning_rate=1"], "learning_rate is swept by get_hyper()"),
        (["--values=seeds=(a,),(b,)"], "words need quotes"),
    ],
)
def test_nothing_starts_where_a_point_is_wrong(command, tmp_path, options, message):
    done = run_command(command, *options)
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "sweep").exists()


def test_the_points_of_robustness_take_their_workdirs_from_the_argument(command, tmp_path):
    done = run_command([*command[:3], f"--config={ROBUSTNESS}"], "--print_arguments")
    runs = done.stdout.splitlines()
    assert len(runs) == 32, done.stderr
    assert sum("--config.init_from=b@90 " in run for run in runs) == 16
    taught = "--config.distillation=bit --config.teacher=t/seed_0 "
    assert sum(taught in run for run in runs) == 16
    with pytest.raises(ValueError, match="RECIPE,TASK,BASELINE,BINARY,TEACHER,RATE, of which"):
        robustness.get_hyper("bipft_a,rte,fp")
    with pytest.raises(ValueError, match="belongs to one task"):
        robustness.get_hyper("bipft_a,all,fp,b,t")
    with pytest.raises(ValueError, match="RATE is 'high'"):
        robustness.get_config("bipft_a,rte,fp,b,t,high")
    of_scores = robustness.get_hyper("bipft_a,stsb,fp,b,t")
    assert [point.get("score_mse", False) for point in of_scores] == 2 * (8 * [False] + 8 * [True])
    without = robustness.get_hyper("bipft_a,stsb,fp,b")
    rates = {(point["init_from"], point["learning_rate"]) for point in without}
    assert len(without) == 16 and ("fp", 4 * 2e-5) in rates
