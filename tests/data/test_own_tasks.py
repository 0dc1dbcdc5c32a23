"""A task that a user describes beside its files is a row like GLUE's."""

import json
import math

import pytest

from bipft_jax.data.glue import metrics, own_tasks
from bipft_jax.data.glue.tasks import TASKS, read_split

TOPICS = {"sentences": ["text"], "label": "topic", "labels": ["sport", "arts", "science"]}
SCORES = {"sentences": ["a", "b"], "label": "score", "scores": [-1, 1]}


def written(directory, described, name="topics"):
    (directory / name).mkdir(exist_ok=True)
    (directory / name / own_tasks.TASK_FILE).write_text(json.dumps(described))
    return directory


def test_classes_are_in_the_order_of_their_description(tmp_path):
    written(tmp_path, TOPICS)
    (tmp_path / "topics" / "train.tsv").write_text(
        "topic\ttext\nscience\tA cell.\nsport\tA goal.\n"
    )
    task = own_tasks.task_named("topics", tmp_path)
    split = read_split(task, tmp_path, "train")
    assert (split.sentences1, split.labels.tolist()) == (["A cell.", "A goal."], [2, 0])
    assert (task.num_outputs, task.metrics, task.epochs) == (3, ("accuracy",), 10)
    assert metrics.evaluate(task, split.labels, split.labels) == {"accuracy": 1.0}


def test_scores_are_checked_against_their_range(tmp_path):
    written(tmp_path, {**SCORES, "metrics": ["spearman"], "epochs": 3}, "alike")
    path = tmp_path / "alike" / "train.tsv"
    path.write_text("a\tb\tscore\nOne.\tTwo.\t-0.5\n")
    task = own_tasks.task_named("alike", tmp_path)
    assert (task.is_regression, task.metrics, task.epochs) == (True, ("spearman",), 3)
    assert read_split(task, tmp_path, "train").labels.tolist() == [-0.5]
    path.write_text("a\tb\tscore\nOne.\tTwo.\t1.5\n")
    with pytest.raises(ValueError, match=r"train\.tsv:2: the score '1.5' is outside .*-1 to 1"):
        read_split(task, tmp_path, "train")


@pytest.mark.parametrize("described", [TOPICS, SCORES])
def test_a_run_remembers_its_task(described):
    task = own_tasks.described_task("topics", described)
    assert own_tasks.task_of_run({"task": "topics", **own_tasks.task_record(task)}) == task
    record = json.loads(json.dumps(own_tasks.task_record(task)))
    assert own_tasks.task_of_run({"task": "topics", **record}) == task
    assert (
        own_tasks.task_record(TASKS["rte"]) == {}
        and own_tasks.task_of_run({"task": "rte"}) is TASKS["rte"]
    )
    assert own_tasks.task_of_run({"recipe": "fp"}) is None


def test_a_run_knows_another_description_from_its_own():
    def of(described):
        return own_tasks.fingerprint(own_tasks.described_task("topics", described))

    assert of(TOPICS) == of(dict(reversed(TOPICS.items())))
    assert of(TOPICS) != of({**TOPICS, "labels": TOPICS["labels"][::-1]})
    assert of(TOPICS) != of({**TOPICS, "epochs": 3})
    assert own_tasks.fingerprint(TASKS["rte"]) == {}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": ["sport"]}, "labels is .*a list of 2 or more different names"),
        ({"labels": ["sport", "sport"]}, "labels is .*different"),
        ({"labels": ["a", 1]}, "labels is"),
        ({"sentences": []}, "sentences is .*1 or 2"),
        ({"sentences": "text"}, "sentences is 'text'"),
        ({"sentences": ["topic"]}, "label: 'topic' is a column of sentences"),
        ({"label": 1}, "label is 1"),
        ({"label": None}, "label is missing"),
        ({"labels": ["yes", "Yes"]}, "labels is .*differ in their case"),
        ({"metrics": ["acuracy"]}, "metrics: unknown metric 'acuracy': did you mean accuracy"),
        ({"scores": [0, 1]}, ".*one of labels and scores"),
        ({"metrics": ["f1"]}, "metrics: f1 is for two labels, not 3"),  # of two classes
        ({"metrics": ["pearson"]}, "metrics: pearson is not for labels"),
        ({"epochs": 0}, "epochs is 0"),
        ({"lables": []}, "unknown key 'lables': did you mean labels"),
    ],
)
def test_what_is_wrong_is_named_with_its_file_and_key(change, message, tmp_path):
    written(tmp_path, {**TOPICS, **change})
    with pytest.raises(ValueError, match=rf"topics/task\.json: {message}"):
        own_tasks.task_named("topics", tmp_path)


@pytest.mark.parametrize("scores", [[1, 0], [0], ["a", "b"], None, [0, 10**400], [0, math.inf]])
def test_a_range_has_a_least_and_a_greatest_score(scores, tmp_path):
    written(tmp_path, {**SCORES, "scores": scores})
    with pytest.raises(ValueError, match="scores is .*least, greatest"):
        own_tasks.task_named("topics", tmp_path)


def test_a_task_of_glue_is_not_described_anew(tmp_path):
    with pytest.raises(ValueError, match="rte/task.json describes rte, which is a task of GLUE"):
        own_tasks.task_named("rte", written(tmp_path, TOPICS, "rte"))


def test_an_unknown_task_names_those_that_are_described(tmp_path):
    written(tmp_path, TOPICS)
    with pytest.raises(ValueError, match="unknown GLUE task 'topic': did you mean topics"):
        own_tasks.task_named("topic", tmp_path)
