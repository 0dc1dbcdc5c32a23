"""Causal language modelling: every token is predicted from those before it (BitNet SPEC 5)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from bipft_jax.data.corpus.causal import CausalExamples
from bipft_jax.models.decoder import CAUSAL_INPUTS, Decoder, DecoderOutput
from bipft_jax.models.decoder_recipes import (
    DecoderConfig,
    decoder_config,
    decoder_recipe_named,
)
from bipft_jax.models.recipes import RECIPES
from bipft_jax.objectives.families import OF_ENCODERS, refuse_keys
from bipft_jax.objectives.frequencies import log_frequencies
from bipft_jax.objectives.losses import Batch
from bipft_jax.objectives.objective import FromCorpus, Objective, Panel, Shown, weighted_mean

if TYPE_CHECKING:
    from bipft_jax.data.corpus.corpus import Corpus


class CausalCounts(NamedTuple):
    """Denominator of an update: predicted tokens (at least 1)."""

    tokens: jax.Array


def causal_counts(batch: Batch) -> CausalCounts:
    """Counts of a batch of causal examples."""
    return CausalCounts(jnp.maximum(jnp.sum(batch["target_weights"]), 1.0))


def causal_loss(output: DecoderOutput, batch: Batch, counts: CausalCounts):
    """Mean cross entropy of the predicted tokens.

    Arguments:
      output: of `Decoder` on the batch.
      batch: target_ids int [B, S], target_weights float [B, S], 0 where there is no target.
      counts: of the whole update, of which this batch may be a micro-batch.

    Returns: (loss in nats a token, {"accuracy"}); both add up over micro-batches.
    """
    logits, targets = output.logits, batch["target_ids"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    weights = batch["target_weights"].astype(losses.dtype) / counts.tokens.astype(losses.dtype)
    right = jnp.argmax(logits, -1).astype(targets.dtype) == targets
    accuracy = jnp.sum(jnp.where(right, weights, jnp.zeros_like(weights)))
    return jnp.sum(losses * weights), {"accuracy": accuracy}


def model_config(config: ml_collections.ConfigDict, vocab_size: int) -> DecoderConfig:
    """The decoder of a run.

    Raises: ValueError for an unknown recipe or size, keys that do not go together, or keys that
      only encoders have.
    """
    if config.recipe in RECIPES:
        raise ValueError(
            f"recipe {config.recipe} is an encoder's: it learns mlm_nsp, not causal_lm; begin with "
            f"--config=configs/pretrain.py:{config.recipe},SIZE"
        )
    refuse_keys(config, "a decoder", OF_ENCODERS)
    block = config.decoder
    return decoder_config(
        decoder_recipe_named(config.recipe, block.gate, block.norm, block.groups),
        config.size,
        vocab_size,
        tied=block.tied,
        **({"rope_theta": block.rope_theta} if block.rope_theta else {}),
        norm_epsilon=block.norm_epsilon,
        dtype=config.dtype,
        compute=config.compute,
        backward=config.backward,
        scan_layers=config.scan_layers,
        remat=config.remat,
    )


def _examples(
    corpus: Corpus, split: str, seed: int, config: ml_collections.ConfigDict | None
) -> CausalExamples:
    separate = config is not None and config.decoder.separate_documents
    return CausalExamples.from_corpus(corpus, split, seed=seed, separate_documents=separate)


def example(
    tokens: int, config: ml_collections.ConfigDict | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of each array of an example of `CausalExamples`."""
    of_type = {"target_weights": jnp.float32}
    return {
        name: jax.ShapeDtypeStruct((tokens,), of_type.get(name, jnp.int32))
        for name in (*CAUSAL_INPUTS, "target_ids", "target_weights")
    }


def unigram_counts(corpus: Corpus) -> np.ndarray:
    """Occurrences of each piece in the training text, with the [SEP] at the end of each
    document."""
    counts = corpus.unigram_counts.copy()
    counts[corpus.tokenizer.sep_id] += corpus.splits["train"].documents
    return counts


def measure(
    counts: np.ndarray,
) -> Callable[[DecoderOutput, Batch, CausalCounts], dict[str, jax.Array]]:
    """Loss and accuracy, and `unigram_loss`, the loss of always predicting the frequencies of the
    training text. counts: of `unigram_counts`."""
    frequencies = log_frequencies(counts)

    def of_batch(output: DecoderOutput, batch: Batch, counts: CausalCounts) -> dict[str, jax.Array]:
        loss, metrics = causal_loss(output, batch, counts)
        of_targets = jnp.asarray(frequencies)[batch["target_ids"]]
        unigram_loss = -jnp.sum(of_targets * batch["target_weights"]) / counts.tokens
        return {"loss": loss, **metrics, "unigram_loss": unigram_loss}

    return of_batch


def summarise(results: Sequence[Mapping[str, Any]], corpus: Corpus) -> dict[str, float]:
    """Loss (nats a token), accuracy, `bits_per_token`, and the same for the word frequencies
    (`unigram_`); if the corpus knows its bytes, `bits_per_byte`, which compares models of different
    tokenizers."""

    def of_tokens(name: str) -> float:
        return weighted_mean(results, name, "tokens")

    metrics = {"loss": of_tokens("loss"), "accuracy": of_tokens("accuracy")}
    for prefix in ("", "unigram_"):
        bits = in_bits(of_tokens(f"{prefix}loss"), corpus)
        metrics |= {f"{prefix}{name}": value for name, value in bits.items()}
    return metrics


def in_bits(loss: float, corpus: Corpus) -> dict[str, float]:
    """A held-out loss in nats a token as `bits_per_token` and, if the corpus knows its bytes,
    `bits_per_byte` of its held-out text."""
    held_out, bits = corpus.splits["validation"], {"bits_per_token": loss / math.log(2)}
    if held_out.text_bytes:
        tokens = held_out.tokens + held_out.documents  # each document has an end
        bits["bits_per_byte"] = bits["bits_per_token"] * tokens / held_out.text_bytes
    return bits


def head_products(config: DecoderConfig, one: Mapping[str, jax.ShapeDtypeStruct]) -> int:
    """Multiply-adds of the head per sequence. one: of `example`."""
    return one["input_ids"].shape[0] * config.hidden * config.vocab_size


CAUSAL_LM = Objective(
    name="causal_lm",
    build=lambda config, outputs: Decoder(config),
    inputs=CAUSAL_INPUTS,
    counts=causal_counts,
    loss=causal_loss,
    shown=(Shown("tokens", "loss", "accuracy"),),  # the loss itself is shown before
    panels=(
        Panel(
            "bits a token",
            None,
            "validation/bits_per_token",
            "validation/unigram_bits_per_token",
        ),
        Panel("accuracy", "accuracy", "validation/accuracy", None),
    ),
    from_corpus=FromCorpus(
        model_config=model_config,
        examples=_examples,
        example=example,
        unigram_counts=unigram_counts,
        measure=measure,
        summarise=summarise,
        prior=lambda corpus: {},
        head_products=head_products,
    ),
)
