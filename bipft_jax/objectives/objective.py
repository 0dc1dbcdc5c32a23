"""The dataclasses of an objective, a row of `objectives/table.py`.

The loop, the update, pretraining, sharding and telemetry take an `Objective` as argument and name
none; finetuning is always `classification`.
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

from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.models.parameters import Params
from bipft_jax.models.recipes import BertConfig
from bipft_jax.objectives.losses import Batch

if TYPE_CHECKING:
    from bipft_jax.data.corpus.corpus import Corpus

Metrics = dict[str, jax.Array]


class Shown(NamedTuple):
    """Names of a loss and an accuracy that the progress line shows under one label."""

    label: str
    loss: str
    accuracy: str


class Panel(NamedTuple):
    """A panel of a plot, as names of logged scalars: training means are drawn as thin lines,
    evaluations with dots, baselines dashed."""

    title: str
    training: str | None
    evaluations: str | None
    baseline: str | None


class Teacher(Protocol):
    """A frozen model that a student learns from, in addition to or instead of the objective's loss.

    looks_at: collections of the student's forward pass that `loss` reads.
    """

    looks_at: tuple[str, ...]

    def __call__(self, params: Params, batch: Batch, key: jax.Array) -> Any:
        """The targets of a batch, without gradient; key: of the teacher's dropout."""

    def loss(
        self,
        own: tuple[jax.Array, Metrics],
        output: Any,
        variables: Mapping[str, Any],
        targets: Any,
        batch: Batch,
        counts: Any,
    ) -> tuple[jax.Array, Metrics]:
        """(loss to minimise, metrics); both add up over micro-batches.

        own: (loss, metrics) of the objective. output, variables: of the student's forward pass.
        """


class Examples(Protocol):
    """An endless sequence of examples of one length, each a pure function of its position."""

    sequence_length: int

    def __len__(self) -> int:
        """Number of examples in an epoch."""

    def at(self, positions: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """The examples at ascending positions, stacked."""


@dataclasses.dataclass(frozen=True)
class FromCorpus:
    """The part of an objective that learns from a corpus (`bipft_jax/pretrain.py`).

    model_config: (run's config, size of the vocabulary) -> the model's configuration; raises
      ValueError for keys that no such model has.
    examples: (corpus, split, seed, config) -> the examples of "train" or "validation"; config None
      gives those of the held-out evaluation, which are the same for every run.
    example: (tokens per example, config) -> shape and dtype of each array of one example; config
      None as for `examples`.
    unigram_counts: corpus -> occurrences of each piece in the training text, int64 [vocab].
    measure: `unigram_counts` -> the function (output, batch, counts) -> float32 scalars of a
      held-out batch, baselines included, each a mean over one of the counts.
    summarise: (these scalars and counts of all held-out batches, corpus) -> held-out metrics by
      name, among them `best_metric`, which selects the best checkpoint.
    prior: corpus -> initial values of parameters, by path, that are known from the corpus.
    head_products: (model's config, an `example`) -> multiply-adds per sequence outside the encoder,
      for `training/flops.py`.
    make_teacher: (teacher's config, its parameters, student's config, run's config) -> (teacher,
      the parameters that it uses); raises ValueError for an unsuitable teacher. None: the objective
      has no teacher.
    """

    model_config: Callable[[ml_collections.ConfigDict, int], BertConfig | DecoderConfig]
    examples: Callable[[Corpus, str, int, ml_collections.ConfigDict | None], Examples]
    example: Callable[[int, ml_collections.ConfigDict | None], dict[str, jax.ShapeDtypeStruct]]
    unigram_counts: Callable[[Corpus], np.ndarray]
    measure: Callable[[np.ndarray], Callable[[Any, Batch, Any], Metrics]]
    summarise: Callable[[Sequence[Mapping[str, Any]], Corpus], dict[str, float]]
    prior: Callable[[Corpus], Params]
    head_products: Callable[[Any, Mapping[str, jax.ShapeDtypeStruct]], int]
    make_teacher: Callable[..., tuple[Any, Params]] | None = None
    best_metric: str = "loss"
    higher_is_better: bool = False


@dataclasses.dataclass(frozen=True)
class Objective:
    """An objective: a model with its head, a loss, and the metrics to show.

    name: the key in `OBJECTIVES` and in checkpoints.
    build: (config, outputs) -> the model, called as model(*inputs, deterministic).
    inputs: keys of the batch that the model takes, in order. For initialisation and for shapes each
      may be int32 [B, 1].
    counts: batch -> the denominators of an update, a NamedTuple of float32 scalars.
    loss: (output, batch, counts) -> (loss, metrics), float32 scalars that add up over micro-batches
      if counts are those of the whole update.
    outputs: width of a task's head, 1 for regression; 0 for a head of fixed width.
    shown, panels: how the progress line and plots show the metrics.
    always_splits_key: whether the dropout key is split for a teacher even without a teacher.
    from_corpus: None for an objective that learns from a task's files.
    """

    name: str
    build: Callable[[Any, int], nn.Module]
    inputs: tuple[str, ...]
    counts: Callable[[Batch], Any]
    loss: Callable[[Any, Batch, Any], tuple[jax.Array, Metrics]]
    outputs: int = 0
    shown: tuple[Shown, ...] = ()
    panels: tuple[Panel, ...] = ()
    always_splits_key: bool = True
    from_corpus: FromCorpus | None = None

    def model(self, config: BertConfig | DecoderConfig) -> nn.Module:
        """The model for a configuration."""
        return self.build(config, self.outputs)

    def abstract_params(self, config: BertConfig | DecoderConfig) -> Params:
        """Shapes and dtypes of the model's parameters."""
        ids = [jax.ShapeDtypeStruct((1, 1), jnp.int32)] * len(self.inputs)
        return jax.eval_shape(self.model(config).init, jax.random.key(0), *ids)["params"]

    def model_inputs(self, batch: Mapping[str, Any]) -> list[Any]:
        """The model's inputs from a batch, in order."""
        return [batch[name] for name in self.inputs]

    def dropout_keys(self, key: jax.Array, taught: bool) -> tuple[jax.Array, jax.Array | None]:
        """The dropout keys of the student and, if it has one, of its teacher."""
        if taught or self.always_splits_key:
            student, teacher = jax.random.split(key)
            return student, teacher
        return key, None

    def described(self) -> dict[str, Any]:
        """The objective as a checkpoint stores it, for `table.objective_of` to read."""
        return {"name": self.name, "outputs": self.outputs}


def weighted_mean(results: Iterable[Mapping[str, Any]], name: str, count: str) -> float:
    """The mean of a metric over batches, weighted by one of their counts, in float64."""
    values, weights = (np.array([r[key] for r in results], np.float64) for key in (name, count))
    return float(np.sum(values * weights) / np.sum(weights))
