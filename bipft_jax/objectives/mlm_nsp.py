"""BERT's pretraining objective: masked language modelling and next sentence prediction (MLM + NSP;
Devlin et al. 2018, SPEC 2.5)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from bipft_jax.data.corpus.pretraining import (
    BERT_MASKING_RATE,
    PretrainingExamples,
    max_predictions,
)
from bipft_jax.models.attention import ATTENDED_KEYS
from bipft_jax.models.bert import SEQUENCE_INPUTS, BertForPreTraining, PretrainingOutput
from bipft_jax.models.decoder_recipes import DECODER_RECIPES
from bipft_jax.models.parameters import Params
from bipft_jax.models.recipes import BertConfig, bert_config, recipe_named
from bipft_jax.objectives.distillation import Teacher, make_teacher
from bipft_jax.objectives.families import OF_DECODERS, refuse_keys
from bipft_jax.objectives.frequencies import log_frequencies
from bipft_jax.objectives.losses import Batch, Counts, counts_of, pretraining_loss
from bipft_jax.objectives.objective import FromCorpus, Objective, Panel, Shown, weighted_mean
from bipft_jax.processes import say

if TYPE_CHECKING:
    from bipft_jax.data.corpus.corpus import Corpus


def model_config(config: ml_collections.ConfigDict, vocab_size: int) -> BertConfig:
    """The encoder of a run.

    Raises: ValueError for an unknown recipe or size, keys that do not go together, or keys that
      only decoders have.
    """
    if config.recipe in DECODER_RECIPES:
        raise ValueError(
            f"recipe {config.recipe} is a decoder's: it learns causal_lm, not mlm_nsp; begin with "
            f"--config=configs/pretrain.py:{config.recipe},SIZE"
        )
    refuse_keys(config, "an encoder", OF_DECODERS)
    return bert_config(
        recipe_named(
            config.recipe, config.estimator_rank, config.lora_rank, config.full_precision_weights
        ),
        config.size,
        vocab_size,
        dropout=config.dropout,
        dtype=config.dtype,
        compute=config.compute,
        backward=config.backward,
        fused_attention=config.fused_attention,
        scan_layers=config.scan_layers,
        remat=config.remat,
    )


def _examples(
    corpus: Corpus, split: str, seed: int, config: ml_collections.ConfigDict | None
) -> PretrainingExamples:
    rate = _masking_rate(config)
    return PretrainingExamples.from_corpus(corpus, split, seed=seed, masking_rate=rate)


def _masking_rate(config: ml_collections.ConfigDict | None) -> float:
    return BERT_MASKING_RATE if config is None else config.masking_rate


def example(
    tokens: int, config: ml_collections.ConfigDict | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array of an example of `PretrainingExamples`."""
    predictions = max_predictions(tokens, _masking_rate(config))
    shapes = dict.fromkeys(SEQUENCE_INPUTS, (tokens,))
    shapes |= dict.fromkeys(("mlm_positions", "mlm_ids", "mlm_weights"), (predictions,))
    return {
        name: jax.ShapeDtypeStruct(shape, jnp.float32 if name == "mlm_weights" else jnp.int32)
        for name, shape in {**shapes, "nsp_labels": ()}.items()
    }


def measure(
    unigram_counts: np.ndarray,
) -> Callable[[PretrainingOutput, Batch, Counts], dict[str, jax.Array]]:
    """The metrics of the loss, and `unigram_loss` and `unigram_accuracy`: the baseline that always
    predicts the word frequencies of the training text, on the masked tokens."""
    frequencies = log_frequencies(unigram_counts)
    commonest = int(np.argmax(frequencies))

    def of_batch(output: PretrainingOutput, batch: Batch, counts: Counts):
        _, metrics = pretraining_loss(output, batch, counts)
        ids, weights = batch["mlm_ids"], batch["mlm_weights"] / counts.masked_tokens
        return {
            **metrics,
            "unigram_loss": -jnp.sum(jnp.asarray(frequencies)[ids] * weights),
            "unigram_accuracy": jnp.sum(jnp.where(ids == commonest, weights, 0.0)),
        }

    return of_batch


def summarise(results: Sequence[Mapping[str, Any]], corpus: Corpus) -> dict[str, float]:
    """Losses (nats), MLM accuracy and perplexity over all masked tokens, NSP accuracy over all
    sequences, the metrics of `attended_keys`, and accuracy and perplexity of the word-frequency
    baseline (`unigram_`)."""

    def of_tokens(name: str) -> float:
        return weighted_mean(results, name, "masked_tokens")

    def of_sequences(name: str) -> float:
        return weighted_mean(results, name, "sequences")

    mlm_loss, nsp_loss = of_tokens("mlm_loss"), of_sequences("nsp_loss")
    return {
        "loss": mlm_loss + nsp_loss,
        "mlm_loss": mlm_loss,
        "mlm_accuracy": of_tokens("mlm_accuracy"),
        "mlm_perplexity": float(np.exp(mlm_loss)),
        "nsp_loss": nsp_loss,
        "nsp_accuracy": of_sequences("nsp_accuracy"),
        **{name: of_sequences(name) for name in results[0] if name.startswith(ATTENDED_KEYS)},
        "unigram_accuracy": of_tokens("unigram_accuracy"),
        "unigram_perplexity": float(np.exp(of_tokens("unigram_loss"))),
    }


def head_products(config: BertConfig, predictions: int) -> int:
    """Multiply-adds of pooler and heads per sequence, with so many decoded positions."""
    h = config.hidden
    return predictions * (h * h + h * config.vocab_size) + h * h + 2 * h


def _make_teacher(
    config: BertConfig, params: Params, student: BertConfig, run: ml_collections.ConfigDict
) -> tuple[Teacher, Params]:
    teacher, used = make_teacher(
        config, params, student, dropout=run.teacher_dropout, mlm_weight=run.mlm_distillation
    )
    if not teacher.has_nsp:
        say(f"the teacher {run.teacher} has no NSP head: the NSP soft loss is off")
    return teacher, used


MLM_NSP = Objective(
    name="mlm_nsp",
    build=lambda config, outputs: BertForPreTraining(config),
    inputs=(*SEQUENCE_INPUTS, "mlm_positions"),
    counts=counts_of,
    loss=pretraining_loss,
    shown=(
        Shown("mlm", "mlm_loss", "mlm_accuracy"),
        Shown("nsp", "nsp_loss", "nsp_accuracy"),
    ),
    panels=(
        Panel(
            "MLM accuracy",
            "mlm_accuracy",
            "validation/mlm_accuracy",
            "validation/unigram_accuracy",
        ),
        Panel("NSP accuracy", "nsp_accuracy", "validation/nsp_accuracy", None),
    ),
    from_corpus=FromCorpus(
        model_config=model_config,
        examples=_examples,
        example=example,
        unigram_counts=lambda corpus: corpus.unigram_counts,
        measure=measure,
        summarise=summarise,
        prior=lambda corpus: {"mlm_bias": log_frequencies(corpus.unigram_counts)},
        head_products=lambda config, one: head_products(config, one["mlm_positions"].shape[0]),
        make_teacher=_make_teacher,
    ),
)
