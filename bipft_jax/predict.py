"""Answers of a finetuned model: GLUE submission files, or labels for one's own sentences.

    python -m bipft_jax.predict --workdir DIR --input FILE --output FILE

DIR is a finetuning run (its best seed answers) or one seed_N of it. FILE is tab-separated and has a
header that names the sentence columns as the task's own files do. A file with a column `index` or
`id` is one of GLUE's test sets and gives a file to submit: index, prediction. Any other gives its
sentences, the prediction and the probability of each label.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import tqdm

from bipft_jax.data import glue, glue_batches
from bipft_jax.models.bert import BertForSequenceClassification
from bipft_jax.paths import require_local
from bipft_jax.results import RESULT_NAME
from bipft_jax.training import sharding
from bipft_jax.training import step as steps
from bipft_jax.training.state import Params
from bipft_jax.training.warm_start import Source, load_source

_BATCH_SIZE = 32
_MAX_LENGTH = 128  # of a model that was imported, whose run says nothing


def outputs(
    predict: Callable[..., jax.Array],
    params: Params,
    split: glue_batches.EncodedSplit,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    progress: bool = False,
) -> np.ndarray:
    """Logits of all examples, in order: float32 [N, outputs].

    Arguments:
      predict: a jitted `prediction_step`.
      batch_size: a multiple of the mesh's devices.
      progress: show a bar.
    """
    numbers, logits = [], []
    batches = glue_batches.evaluation_batches(split, batch_size)
    total = -(-len(split) // batch_size)
    for examples, batch in tqdm.tqdm(batches, total=total, unit="batch", disable=not progress):
        numbers.append(examples)
        logits.append(predict(params, sharding.put_batch(mesh, batch)))
    found = np.concatenate(jax.device_get(logits))[: len(split)]
    in_order = np.empty_like(found)
    in_order[np.concatenate(numbers)] = found
    return in_order


def best_seed(workdir: str | Path) -> Path:
    """Of a finetuning run the directory of the seed with the best dev score; any other run is its
    own.

    Raises: ValueError for a run on all tasks.
    """
    path = Path(workdir) / RESULT_NAME
    summary = json.loads(path.read_text()) if path.exists() else {}
    if "tasks" in summary:
        raise ValueError(f"{workdir} has a run for each task: give {Path(workdir) / 'TASK'}")
    if "task" not in summary:
        return Path(workdir)
    metric = summary["selection_metric"]
    best = max(summary["seeds"], key=lambda seed: seed["best"][metric])
    return Path(workdir) / f"seed_{best['seed']}"


def task_of(source: Source, name: str | None) -> glue.GlueTask:
    """The task that a model was finetuned on, or the named one for a model that does not say.

    Raises: ValueError if it is not known, another than the model's, or has other outputs.
    """
    trained = source.run.get("task")
    if name is None and trained is None:
        raise ValueError(f"{source.workdir} does not say its task: give --task")
    if None not in (name, trained) and name != trained:
        raise ValueError(f"{source.workdir} was finetuned on {trained}, not on {name}")
    task = glue.glue_task(name or trained)
    require_outputs(source, task)
    return task


def require_outputs(source: Source, task: glue.GlueTask) -> None:
    """Raises ValueError if a model's classifier is not one for the task."""
    if source.classes != task.num_outputs:
        found = f"{source.classes} outputs" if source.classes else "pretraining heads"
        raise ValueError(
            f"{source.workdir} has {found}, task {task.name} needs {task.num_outputs} outputs: "
            "give a model that was finetuned on this task"
        )


def answers(source: Source, task: glue.GlueTask, examples: glue.Unlabelled) -> np.ndarray:
    """The model's outputs, float32 [N, outputs]: a probability for each label of the task, or a
    score."""
    split = glue.GlueSplit(
        task=task,
        split="input",
        sentences1=examples.sentences1,
        sentences2=examples.sentences2,
        labels=np.zeros(len(examples.sentences1), np.int32),  # none are known, none are used
    )
    max_length = source.run.get("max_length", _MAX_LENGTH)
    mesh = sharding.make_mesh()
    model = BertForSequenceClassification(source.config(), source.classes)
    logits = outputs(
        jax.jit(steps.prediction_step(model), out_shardings=sharding.replicated(mesh)),
        sharding.put(mesh, source.params),
        glue_batches.encode(split, source.tokenizer, max_length),
        mesh.size * max(_BATCH_SIZE // mesh.size, 1),
        mesh,
        progress=True,
    )
    return logits if task.is_regression else np.asarray(jax.nn.softmax(logits))


def rows(
    task: glue.GlueTask, examples: glue.Unlabelled, answers: np.ndarray
) -> Iterator[tuple[str, ...]]:
    """The rows of the output file, its header first."""
    names = task.label_names or ()
    if task.is_regression:
        predictions = [f"{score:.3f}" for score in answers[:, 0]]
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
