"""What an objective is: the form of a row of `objectives/table.py`.

Loops, steps, checkpoints, sharding and telemetry are given an `Objective` and ask it; none of them
knows one by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import linen as nn

from bipft_jax.models.parameters import Params
from bipft_jax.models.recipes import BertConfig
from bipft_jax.objectives.losses import Batch

if TYPE_CHECKING:
    from bipft_jax.data.corpus.corpus import Corpus

Metrics = dict[str, jax.Array]


class Shown(NamedTuple):
    """A loss and an accuracy, names of metrics, that the progress line shows as one."""

    label: str
    loss: str
    accuracy: str


class Panel(NamedTuple):
    """A panel of a plot, by names of logged scalars: means over training batches are drawn thin,
    evaluations with dots, baselines dashed."""

    title: str
    training: str | None
    evaluations: str | None
    baseline: str | None


class Teacher(Protocol):
    """A frozen model that a student learns from, beside or instead of the objective's own loss.

    looks_at: collections of the student's pass that `loss` reads, beside its output.
    """

    looks_at: tuple[str, ...]

    def __call__(self, params: Params, batch: Batch, key: jax.Array) -> Any:
        """Its targets for a batch, constants for the gradient; key: of its dropout."""

    def loss(
        self,
        own: tuple[jax.Array, Metrics],
        output: Any,
        variables: Mapping[str, Any],
        targets: Any,
        batch: Batch,
        counts: Any,
    ) -> tuple[jax.Array, Metrics]:
        """What is minimised, and its metrics; both add up over micro-batches.

        own: loss and metrics of the objective. output, variables: of the student's pass.
        """


class Examples(Protocol):
    """An endless sequence of examples of one length, each a pure function of its position."""

    sequence_length: int

    def __len__(self) -> int:
        """Examples of an epoch."""

    def at(self, positions: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The examples at ascending positions, stacked."""


@dataclasses.dataclass(frozen=True)
class FromCorpus:
    """What an objective needs in order to be learned from a corpus (`bipft_jax/pretrain.py`).

    examples: (corpus, split, seed, config) -> the examples of "train" or "validation"; config None
      asks for those of held-out text, which are the same for every run.
    measure: of a corpus the function (output, batch, counts) -> float32 scalars of a held-out
      batch, baselines included, each a mean over one of the counts.
    summarise: of these scalars and counts of all held-out batches, the held-out metrics by name;
      among them `best_metric`, by which a checkpoint is the best.
    prior: of a corpus, parameters by their path that begin with a value known from it.
    head_products: (model's config, examples) -> multiply-adds that a sequence needs outside of the
      encoder, for `training/flops.py`.
    make_teacher: (teacher's config, its parameters, student's config, run's config) -> (teacher,
      the parameters that it uses); raises ValueError for one that cannot teach. None: no teacher.
    """

    examples: Callable[[Corpus, str, int, ml_collections.ConfigDict | None], Examples]
    measure: Callable[[Corpus], Callable[[Any, Batch, Any], Metrics]]
    summarise: Callable[[Sequence[Mapping[str, Any]]], dict[str, float]]
    prior: Callable[[Corpus], Params]
    head_products: Callable[[BertConfig, Any], int]
    make_teacher: Callable[..., tuple[Any, Params]] | None = None
    best_metric: str = "loss"
    higher_is_better: bool = False


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is learned: a model with its head, a loss, and what is shown of it.

    name: the key in `OBJECTIVES`, and what a checkpoint says.
    build: (config, outputs) -> the model, called as model(*inputs, deterministic).
    inputs: names of what the model takes of a batch, in order. For shapes, and for random
      parameters, each may be int32 [B, 1].
    counts: of a batch, the denominators of an update as a NamedTuple of float32 scalars.
    loss: (output, batch, counts) -> (loss, metrics), float32 scalars that add up over micro-batches
      if counts are those of the whole update.
    outputs: width of the head where the task decides it, 1 for scores; else 0.
    shown, panels: what the progress line and a plot make of the metrics.
    always_splits: whether the key of dropout is split for a teacher also where there is none.
    from_corpus: None for an objective that is learned from a task's own files.
    """

    name: str
    build: Callable[[BertConfig, int], nn.Module]
    inputs: tuple[str, ...]
    counts: Callable[[Batch], Any]
    loss: Callable[[Any, Batch, Any], tuple[jax.Array, Metrics]]
    outputs: int = 0
    shown: tuple[Shown, ...] = ()
    panels: tuple[Panel, ...] = ()
    always_splits: bool = True
    from_corpus: FromCorpus | None = None

    def model(self, config: BertConfig) -> nn.Module:
        """The model of a configuration."""
        return self.build(config, self.outputs)

    def abstract_params(self, config: BertConfig) -> Params:
        """Shapes and dtypes of the model's parameters."""
        ids = [jax.ShapeDtypeStruct((1, 1), jnp.int32)] * len(self.inputs)
        return jax.eval_shape(self.model(config).init, jax.random.key(0), *ids)["params"]

    def of(self, batch: Mapping[str, Any]) -> list[Any]:
        """What the model takes of a batch."""
        return [batch[name] for name in self.inputs]

    def dropout_keys(self, key: jax.Array, taught: bool) -> tuple[jax.Array, jax.Array | None]:
        """The keys of the student and, if it is taught, of its teacher."""
        if taught or self.always_splits:
            student, teacher = jax.random.split(key)
            return student, teacher
        return key, None

    def described(self) -> dict[str, Any]:
        """What a checkpoint says of it, read back by `table.objective_of`."""
        return {"name": self.name, "outputs": self.outputs}


def weighted_mean(results: Iterable[Mapping[str, Any]], name: str, count: str) -> float:
    """The mean of a metric over batches, each weighted by one of its counts, in float64."""
    values, weights = (np.array([r[key] for r in results], np.float64) for key in (name, count))
    return float(np.sum(values * weights) / np.sum(weights))
