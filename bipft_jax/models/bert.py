"""The encoder and the models with heads: pretraining (MLM + NSP) and sequence classification."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from bipft_jax.models.activations import ACTIVATIONS
from bipft_jax.models.attention import ATTENTION_MAPS, STATISTICS, SelfAttention
from bipft_jax.models.axes import BATCH, constrained
from bipft_jax.models.dropout import Dropout
from bipft_jax.models.layers import (
    KEPT,
    BinaryEmbed,
    binary_dense,
    dense_initializer,
    layer_norm,
    logits_dtype,
    low_rank,
)
from bipft_jax.models.normalization import row_for
from bipft_jax.models.recipes import BertConfig
from bipft_jax.models.remat import saved

# Keys of a batch that every model takes, in this order.
SEQUENCE_INPUTS = ("input_ids", "token_type_ids", "attention_mask")

# Collections that a layer writes if they are mutable.
_REPORTED = ("calibration", "intermediates", STATISTICS, ATTENTION_MAPS)


class PretrainingOutput(NamedTuple):
    """The output of `BertForPreTraining`.

    mlm_logits: [B, P, vocab]; nsp_logits: [B, 2]; hidden_states: [layers + 1, B, S, H], the
    embedding output first.
    """

    mlm_logits: jax.Array
    nsp_logits: jax.Array
    hidden_states: jax.Array


class ClassificationOutput(NamedTuple):
    """The output of `BertForSequenceClassification`.

    logits: [B, classes]; hidden_states: [layers + 1, B, S, H], the embedding output first.
    """

    logits: jax.Array
    hidden_states: jax.Array


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool):
        """x: [B, S, H], mask: [B, S] -> (y, y), y [B, S, H]: carry and output of the scan."""
        config, recipe = self.config, self.config.recipe

        def dropout(y: jax.Array) -> jax.Array:
            return Dropout(config.dropout)(y, deterministic)

        context = SelfAttention(config, name="attention")(x, mask, deterministic)
        y = binary_dense(config, config.hidden, recipe.linear_input, "attention_output")(context)
        if recipe.lora_rank:
            y = y + low_rank(config, "attention_output_lora")(context)
        y = layer_norm(config, "attention_norm")(dropout(y) + x)

        inner = binary_dense(config, config.intermediate, recipe.linear_input, "ffn_input")(y)
        inner = ACTIVATIONS[recipe.ffn_activation](inner)
        inner = binary_dense(config, config.hidden, recipe.ffn_output_input, "ffn_output")(inner)
        y = layer_norm(config, "ffn_norm")(dropout(inner) + y)
        return y, y


class Encoder(nn.Module):
    """All layers; their parameters are stacked along a leading [layers] axis."""

    config: BertConfig

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, deterministic: bool):
        """x: [B, S, H] -> (after the last layer [B, S, H], after each layer [layers, B, S, H])."""
        config = self.config
        policy = saved(config.remat, config.recipe)
        layer = EncoderLayer
        if policy is not None:
            layer = nn.remat(
                layer,
                policy=policy,
                static_argnums=(3,),  # deterministic; 0 is the module itself
                prevent_cse=not config.scan_layers,
            )
        scanned = nn.scan(
            layer,
            variable_axes={"params": 0, KEPT: 0, **dict.fromkeys(_REPORTED, 0)},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=config.layers,
            unroll=1 if config.scan_layers else config.layers,
        )
        return scanned(config, name="layers")(x, mask, deterministic)


class Bert(nn.Module):
    """Embeddings, encoder and pooler."""

    config: BertConfig

    def setup(self):
        """Declares the submodules; `words` also decodes for the MLM head."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        table = functools.partial(
            nn.Embed,
            features=config.hidden,
            dtype=dtype,
            embedding_init=dense_initializer(config.initializer_range),
        )
        self.words = BinaryEmbed(
            config.vocab_size,
            config.hidden,
            config.recipe.embedding,
            config.initializer_range,
            dtype,
        )
        self.positions = table(config.max_positions)
        self.segments = table(config.segment_types)
        self.norm = layer_norm(config, None)
        self.dropout = Dropout(config.dropout)
        self.encoder = Encoder(config)
        self.pooler = binary_dense(config, config.hidden, config.recipe.linear_input, None)
        if config.recipe.pooler == "layernorm_residual":
            self.pooler_norm = layer_norm(config, None)

    def __call__(self, input_ids, token_type_ids, attention_mask, deterministic: bool):
        """int [B, S] each; attention_mask 1 at real tokens.

        Returns: (after the last layer [B, S, H], all hidden states [layers + 1, B, S, H] with the
          embedding output first, pooled [B, H]).

        Raises: ValueError if S exceeds the configuration's max_positions.
        """
        length = input_ids.shape[1]
        if length > self.config.max_positions:
            raise ValueError(
                f"a sequence of {length} tokens, but the model has positions for "
                f"{self.config.max_positions}"
            )
        x = self.words(input_ids) + self.positions(jnp.arange(length))[None]
        x = self.norm(x + self._segment_rows(token_type_ids))
        x = constrained(self.dropout(x, deterministic), BATCH, None, None)
        last, after_layers = self.encoder(x, attention_mask, deterministic)

        first = last[:, 0]
        pooled = self.pooler(first)
        if self.config.recipe.pooler == "layernorm_residual":
            pooled = self.pooler_norm(pooled) + first
        return last, jnp.concatenate([x[None], after_layers]), jnp.tanh(pooled)

    def _segment_rows(self, token_type_ids: jax.Array) -> jax.Array:
        """int [B, S] -> [B, S, H]. A product, because the gradient of a lookup adds all tokens to
        two rows sequentially: on a GPU that took a third of an update."""
        table = self.segments.embedding.astype(self.config.dtype)
        chosen = jax.nn.one_hot(token_type_ids, self.config.segment_types, dtype=table.dtype)
        return jnp.dot(chosen, table, precision=jax.lax.Precision.HIGHEST)

    def decode(self, x: jax.Array) -> jax.Array:
        """[..., H] -> [..., vocab]."""
        return self.words.attend(x)


class BertForPreTraining(nn.Module):
    """BERT with the MLM head (on gathered positions) and the NSP head; both full precision."""

    config: BertConfig

    @nn.compact
    def __call__(
        self, input_ids, token_type_ids, attention_mask, mlm_positions, deterministic: bool = True
    ) -> PretrainingOutput:
        """input_ids, token_type_ids, attention_mask: int [B, S]; mlm_positions: int [B, P]."""
        config = self.config
        dtype = jnp.dtype(config.dtype)
        bert = Bert(config, name="bert")
        last, hidden_states, pooled = bert(input_ids, token_type_ids, attention_mask, deterministic)

        dense = functools.partial(
            nn.Dense, dtype=dtype, kernel_init=dense_initializer(config.initializer_range)
        )
        x = jnp.take_along_axis(last, mlm_positions[..., None], axis=1)
        x = dense(config.hidden, name="mlm_dense")(x)
        x = layer_norm(config, "mlm_norm")(ACTIVATIONS[config.recipe.mlm_activation](x))
        bias = self.param("mlm_bias", nn.initializers.zeros, (config.vocab_size,), jnp.float32)
        mlm_logits = bert.decode(x)
        mlm_logits = mlm_logits + row_for(mlm_logits, bias).astype(mlm_logits.dtype)
        nsp_logits = dense(2, dtype=logits_dtype(dtype), name="nsp")(pooled)
        return PretrainingOutput(mlm_logits, nsp_logits, hidden_states)


class BertForSequenceClassification(nn.Module):
    """BERT with a full-precision linear classifier on the pooled first token (SPEC 2.7).

    classes: number of logits; 1 for regression.
    """

    config: BertConfig
    classes: int

    @nn.compact
    def __call__(
        self, input_ids, token_type_ids, attention_mask, deterministic: bool = True
    ) -> ClassificationOutput:
        """input_ids, token_type_ids, attention_mask: int [B, S]."""
        config = self.config
        _, hidden_states, pooled = Bert(config, name="bert")(
            input_ids, token_type_ids, attention_mask, deterministic
        )
        pooled = Dropout(config.dropout)(pooled, deterministic)
        classifier = nn.Dense(
            self.classes,
            dtype=logits_dtype(config.dtype),
            kernel_init=dense_initializer(config.initializer_range),
            name="classifier",
        )
        return ClassificationOutput(classifier(pooled), hidden_states)
