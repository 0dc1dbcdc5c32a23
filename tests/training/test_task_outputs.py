"""Whose classifier may answer, teach or be trained further: by the meaning of its outputs."""

import pytest

from bipft_jax.checkpoints.source import Source
from bipft_jax.data.glue import own_tasks
from bipft_jax.objectives.classification import classification
from bipft_jax.training.task_outputs import has_classifier_of, require_outputs
from tests.data.test_own_tasks import TOPICS


def finetuned(**changes) -> Source:
    """A checkpoint of a run on topics."""
    task = own_tasks.described_task("topics", {**TOPICS, **changes})
    run = {"task": task.name, **own_tasks.task_record(task)}
    return Source("run", 1, {}, {}, classification(task.num_outputs), None, run=run)


TASK = own_tasks.described_task("topics", TOPICS)


def test_what_does_not_change_the_answers_keeps_the_classifier():
    for same in (finetuned(), finetuned(epochs=3, metrics=["matthews"])):
        assert has_classifier_of(same, TASK)
        require_outputs(same, TASK)


@pytest.mark.parametrize("labels", [TOPICS["labels"][::-1], ["sport", "arts", "politics"]])
def test_labels_in_another_order_or_of_another_kind_are_other_answers(labels):
    other = finetuned(labels=labels)
    assert not has_classifier_of(other, TASK)
    with pytest.raises(ValueError, match=f"order {', '.join(labels)}, .*would mean other classes"):
        require_outputs(other, TASK)
