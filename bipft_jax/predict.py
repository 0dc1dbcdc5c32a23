"""Predictions of a finetuned model: GLUE submission files, or labels for your own sentences.

    python -m bipft_jax.predict --workdir DIR --input FILE --output FILE

DIR is a finetuning run (its best seed predicts) or one seed_N of it. FILE is tab-separated; its
header names the sentence columns as the task's own files do. A file with a column `index` or `id`
is a GLUE test set, and the output is the file to submit: index, prediction. For any other file the
output has its sentences, the prediction and the probability of every label.
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from bipft_jax.checkpoints.source import Source, load_source
from bipft_jax.data.glue import batches as glue_batches
from bipft_jax.data.glue import own_tasks
from bipft_jax.data.glue import tasks as glue
from bipft_jax.paths import require_local, require_writable
from bipft_jax.reports.results import RESULT_NAME, read_result
from bipft_jax.training import sharding
from bipft_jax.training.evaluation import outputs
from bipft_jax.training.step import prediction_step
from bipft_jax.training.task_outputs import class_outputs, require_number_of_outputs

_BATCH_SIZE = 32
MAX_LENGTH = 128  # tokens, for an imported model, whose run has no max_length


def best_seed(workdir: str | Path) -> Path:
    """The directory of a finetuning run's seed with the best dev score; for any other run the
    workdir itself.

    Raises: ValueError for a run on all tasks, or an invalid result.json.
    """
    path = Path(workdir) / RESULT_NAME
    summary = read_result(path) if path.exists() else {}
    if "tasks" in summary:
        raise ValueError(f"{workdir} has a run for each task: give {Path(workdir) / 'TASK'}")
    if "task" not in summary:
        return Path(workdir)
    try:
        metric = summary["selection_metric"]
        scores = {seed["seed"]: float(seed["best"][metric]) for seed in summary["seeds"]}
        if not scores or not all(map(math.isfinite, scores.values())):
            raise ValueError(f"scores of seeds are {scores}")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} does not say which seed is the best ({error!r}): give one seed_N of {workdir}"
        ) from error
    return Path(workdir) / f"seed_{max(scores, key=scores.get)}"


def task_of(source: Source, name: str | None) -> glue.GlueTask:
    """The task that a model was finetuned on; `name` is for models that do not store their task.

    Raises: ValueError if neither gives a task, `name` is unknown or differs from the model's task,
      or the task has another number of outputs.
    """
    trained = source.run.get("task")
    if name is None and trained is None:
        raise ValueError(f"{source.workdir} does not say its task: give --task")
    if None not in (name, trained) and name != trained:
        raise ValueError(f"{source.workdir} was finetuned on {trained}, not on {name}")
    task = own_tasks.task_of_run(source.run) or glue.glue_task(name or trained)
    require_number_of_outputs(source, task)
    return task


def answers(source: Source, task: glue.GlueTask, examples: glue.Unlabelled) -> np.ndarray:
    """The model's outputs, float32 [N, outputs]: the probabilities of the task's labels, or a
    score. Warns if examples are too long for the model and were truncated.

    Raises: ValueError, with the row's place in the file, if an output is not finite.
    """
    split = glue.GlueSplit(
        task=task,
        split="input",
        sentences1=examples.sentences1,
        sentences2=examples.sentences2,
        labels=np.zeros(len(examples.sentences1), np.int32),  # unknown and unused
    )
    config = source.config()
    max_length = source.run.get("max_length", min(MAX_LENGTH, config.max_positions))
    encoded = glue_batches.encode(split, source.tokenizer, max_length)
    if encoded.truncated:
        logging.warning(
            "%d of %d rows are longer than the %d tokens that the model reads: they were cut",
            encoded.truncated,
            len(encoded),
            max_length,
        )
    order = class_outputs(source, task)
    mesh = sharding.make_mesh()
    model = source.objective.model(config)
    logits = outputs(
        jax.jit(prediction_step(source.objective, model), out_shardings=sharding.replicated(mesh)),
        sharding.put(mesh, source.params),
        encoded,
        mesh.size * max(_BATCH_SIZE // mesh.size, 1),
        mesh,
        progress=True,
    )
    finite = np.isfinite(logits).all(axis=1)
    if not finite.all():
        raise ValueError(
            f"{source.workdir} (step {source.step}): outputs are NaN or infinite for "
            f"{np.count_nonzero(~finite)} of {len(finite)} rows, first for "
            f"{examples.places[finite.argmin()]}: its weights are damaged, or it has learned "
            "scales that were never initialised"
        )
    return logits if task.is_regression else np.asarray(jax.nn.softmax(logits[:, order]))


def rows(
    task: glue.GlueTask, examples: glue.Unlabelled, answers: np.ndarray
) -> Iterator[tuple[str, ...]]:
    """The rows of the output file, its header first. In a file to submit, scores outside the
    benchmark's range are clipped to it, with a warning."""
    names = task.label_names or ()
    if task.is_regression:
        scores = answers[:, 0]
        if examples.numbers is not None and task.score_range:
            scores = np.clip(scores, *task.score_range)
            if changed := np.count_nonzero(scores != answers[:, 0]):
                logging.warning(
                    "%d of %d scores were outside %g to %g, the task's range: they were clipped",
                    changed,
                    len(scores),
                    *task.score_range,
                )
        predictions = [f"{score:.3f}" for score in scores]
    else:
        predictions = [names[index] for index in answers.argmax(axis=1)]
    if examples.numbers is not None:
        yield ("index", "prediction")
        yield from zip(examples.numbers, predictions, strict=True)
        return
    sentences = [examples.sentences1, examples.sentences2][: len(examples.columns)]
    probabilities = [[f"{p:.4f}" for p in row] for row in answers] if names else [[]] * len(answers)
    yield (*examples.columns, "prediction", *(f"p({name})" for name in names))
    for *texts, prediction, of_labels in zip(*sentences, predictions, probabilities, strict=True):
        yield (*texts, prediction, *of_labels)


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    first, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.predict",
        description=first,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of a finetuning run")
    parser.add_argument("--task", help="only for a model that does not say its own")
    parser.add_argument("--input", required=True, metavar="FILE", help="tab-separated, with header")
    parser.add_argument("--output", required=True, metavar="FILE", help="tab-separated, replaced")
    arguments = parser.parse_args(argv)
    try:
        require_local(vars(arguments))
        require_writable(arguments.output)
        if Path(arguments.input).resolve() == Path(arguments.output).resolve():
            raise ValueError(f"{arguments.output} is the input: name another file as --output")
        source = load_source(best_seed(arguments.workdir))
        task = task_of(source, arguments.task)
        examples = glue.read_unlabelled(task, arguments.input)
        lines = ["\t".join(row) for row in rows(task, examples, answers(source, task, examples))]
        Path(arguments.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{source.workdir}, step {source.step}: {len(lines) - 1} rows in {arguments.output}")


if __name__ == "__main__":
    main()
