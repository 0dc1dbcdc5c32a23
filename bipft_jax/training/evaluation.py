"""Evaluation on held-out data: a corpus's validation split, a task's dev splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np
import tqdm

from bipft_jax.data.glue import batches as glue_batches
from bipft_jax.data.glue import metrics as glue_metrics
from bipft_jax.data.glue.tasks import GlueTask
from bipft_jax.models.parameters import Params
from bipft_jax.objectives.objective import Examples, FromCorpus
from bipft_jax.training import sharding

if TYPE_CHECKING:
    from bipft_jax.data.corpus.corpus import Corpus

EVALUATION_ROWS = 32  # most held-out sequences that a shard evaluates at a time


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The held-out batches of a run: the first examples of a corpus's validation split.

    A run uses `sequences` of them (0, or more than the split has: one epoch), rounded down to a
    multiple of the mesh's `data` x `fsdp` shards: 1,024 are the same 1,024 on every mesh of 1, 2,
    4, ... 1,024 shards. A shard gets at least one sequence in all, and at most `EVALUATION_ROWS`
    per batch.

    batches: of each, the rows that this process holds, and the number of rows of the global batch.
    """

    mesh: jax.sharding.Mesh
    batches: list[tuple[dict[str, np.ndarray], int]]

    @classmethod
    def of(cls, examples: Examples, sequences: int, mesh: jax.sharding.Mesh) -> HeldOut:
        """Makes this process's rows."""
        wanted = min(sequences or len(examples), len(examples))
        first, batches = 0, []
        for size in batch_sizes(wanted, mesh):
            batches.append((examples.at(first + sharding.process_rows(mesh, size)), size))
            first += size
        return cls(mesh, batches)

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        """Global batches, each put on the devices when it is requested."""
        for batch, size in self.batches:
            yield sharding.put_batch(self.mesh, batch, size)


def batch_sizes(sequences: int, mesh: jax.sharding.Mesh) -> list[int]:
    """The sizes of the global batches of so many held-out sequences, the largest first."""
    shards = sharding.batch_shards(mesh)
    used, largest = max(sequences // shards, 1) * shards, EVALUATION_ROWS * shards
    return [min(largest, used - first) for first in range(0, used, largest)]


def held_out_metrics(
    objective: FromCorpus,
    corpus: Corpus,
    step: Callable[[Params, dict[str, jax.Array]], dict[str, jax.Array]],
    params: Params,
    batches: Iterable[dict[str, jax.Array]],
) -> dict[str, float]:
    """The objective's metrics over some batches.

    Arguments:
      step: a jitted `evaluation_step`.
      batches: consumed lazily, so that the devices hold at most two.
    """
    results = []
    for batch in batches:
        results.append(step(params, batch))
        jax.block_until_ready(results[-2:-1])
    return objective.summarise(jax.device_get(results), corpus)


def outputs(
    predict: Callable[..., jax.Array],
    params: Params,
    split: glue_batches.EncodedSplit,
    batch_size: int,
    mesh: jax.sharding.Mesh,
    progress: bool = False,
) -> np.ndarray:
    """Logits of all examples, in the order of the split: float32 [N, outputs].

    Arguments:
      predict: a jitted `prediction_step`.
      batch_size: a multiple of `sharding.batch_shards(mesh)`.
      progress: show a progress bar.
    """
    numbers, logits = [], []
    batches = glue_batches.evaluation_batches(split, batch_size)
    total = -(-len(split) // batch_size)
    for examples, batch in tqdm.tqdm(batches, total=total, unit="batch", disable=not progress):
        numbers.append(examples)
        logits.append(predict(params, sharding.put_batch(mesh, batch)))
    rows = np.concatenate(jax.device_get(logits))[: len(split)]
    in_order = np.empty_like(rows)
    in_order[np.concatenate(numbers)] = rows
    return in_order


def task_scores(
    predict: Callable[..., jax.Array],
    params: Params,
    task: GlueTask,
    splits: dict[str, glue_batches.EncodedSplit],
    batch_size: int,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Scores on every split, named as by `named_by_split`. Arguments as for `outputs`."""
    return named_by_split(
        {
            name: glue_metrics.evaluate(
                task, outputs(predict, params, split, batch_size, mesh), split.labels
            )
            for name, split in splits.items()
        }
    )


def named_by_split(by_split: dict[str, dict[str, float]]) -> dict[str, float]:
    """Merges the scores of several splits: METRIC for the first split, METRIC_SPLIT for others."""
    first, *others = by_split
    further = {f"{key}_{name}": v for name in others for key, v in by_split[name].items()}
    return by_split[first] | further
