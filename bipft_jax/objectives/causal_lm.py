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
from bipft_jax.models.decoder_recipes import DecoderConfig
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
    each = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    weights = batch["target_weights"].astype(each.dtype) / counts.tokens.astype(each.dtype)
    right = jnp.argmax(logits, -1).astype(targets.dtype) == targets
    accuracy = jnp.sum(jnp.where(right, weights, jnp.zeros_like(weights)))
    return jnp.sum(each * weights), {"accuracy": accuracy}


def _examples(
    corpus: Corpus, split: str, seed: int, config: ml_collections.ConfigDict | None
) -> CausalExamples:
    return CausalExamples.from_corpus(corpus, split, seed=seed)


def measure(corpus: Corpus) -> Callable[[DecoderOutput, Batch, CausalCounts], dict[str, Any]]:
    """Loss and accuracy; `unigram_loss`, the loss of always predicting the frequencies of the
    training text; and `bytes_per_token`, if the corpus knows the bytes of its held-out text."""
    counts = corpus.unigram_counts.copy()
    counts[corpus.tokenizer.sep_id] += corpus.splits["train"].documents  # each has an end
    frequencies = np.log((counts + 1.0) / (counts.sum() + counts.size)).astype(np.float32)
    held_out = corpus.splits["validation"]
    constants = {}
    if not held_out.skipped_documents:  # the bytes of skipped ones were counted too
        per_token = held_out.raw_bytes / (held_out.tokens + held_out.documents)
        constants["bytes_per_token"] = jnp.float32(per_token)

    def of_batch(output: DecoderOutput, batch: Batch, counts: CausalCounts) -> dict[str, Any]:
        loss, metrics = causal_loss(output, batch, counts)
        of_targets = jnp.asarray(frequencies)[batch["target_ids"]]
        unigram_loss = -jnp.sum(of_targets * batch["target_weights"]) / counts.tokens
        return {"loss": loss, **metrics, "unigram_loss": unigram_loss, **constants}

    return of_batch


def summarise(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Loss (nats a token), accuracy, `bits_per_token`, and the same for the word frequencies
    (`unigram_`); if the corpus knows its bytes, `bits_per_byte`, which compares models of different
    tokenizers."""

    def of_tokens(name: str) -> float:
        return weighted_mean(results, name, "tokens")

    found = {"loss": of_tokens("loss"), "accuracy": of_tokens("accuracy")}
    for prefix in ("", "unigram_"):
        bits = of_tokens(f"{prefix}loss") / math.log(2)
        found[f"{prefix}bits_per_token"] = bits
        if "bytes_per_token" in results[0]:
            found[f"{prefix}bits_per_byte"] = bits / of_tokens("bytes_per_token")
    return found


def head_products(config: DecoderConfig, examples: CausalExamples) -> int:
    """Multiply-adds of the head per sequence."""
    return examples.sequence_length * config.hidden * config.vocab_size


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
        examples=_examples,
        measure=measure,
        summarise=summarise,
        prior=lambda corpus: {},
        head_products=head_products,
    ),
)
