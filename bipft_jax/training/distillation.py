"""Task-agnostic distillation from a full-precision teacher while pretraining (SPEC 2.5)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bipft_jax.models.bert import Bert, PretrainingOutput
from bipft_jax.models.recipes import BertConfig
from bipft_jax.training.losses import Batch, Counts
from bipft_jax.training.warm_start import abstract_params


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen model whose hidden states and NSP distribution the student imitates.

    config: its architecture. dropout: whether its dropout is active, as in the reference, where
    the teacher runs in train mode (SPEC quirk 8). has_nsp: False turns the NSP term off.
    """

    config: BertConfig
    dropout: bool
    has_nsp: bool

    def __call__(self, params: Any, batch: Batch, key: jax.Array):
        """Hidden states [layers + 1, B, S, H] and NSP logits [B, 2] (None without an NSP head)."""
        _, hidden_states, pooled = Bert(self.config).apply(
            {"params": params["bert"]},
            batch["input_ids"],
            batch["token_type_ids"],
            batch["attention_mask"],
            not self.dropout,
            rngs={"dropout": key},
        )
        nsp_logits = None
        if self.has_nsp:
            nsp_logits = pooled @ params["nsp"]["kernel"] + params["nsp"]["bias"]
        return jax.lax.stop_gradient((hidden_states, nsp_logits))


def make_teacher(config: BertConfig, params: Any, student: BertConfig, *, dropout: bool):
    """The teacher and the part of its parameters that it uses.

    Raises: ValueError if its hidden states cannot be compared with the student's.
    """
    for field in ("layers", "hidden", "vocab_size"):
        theirs, ours = getattr(config, field), getattr(student, field)
        if theirs != ours:
            raise ValueError(
                f"the teacher has {field} {theirs}, the student {ours}: hidden states are compared "
                "layer by layer, so a teacher must have the student's depth, width and vocabulary"
            )
    has_nsp = "nsp" in params
    used = {name: params[name] for name in ("bert", "nsp") if name in params}
    if not has_nsp:  # then nothing reads the pooled vector, and there may be no pooler
        shapes = abstract_params(config, 0)["bert"]
        pooler = {name: leaf for name, leaf in shapes.items() if name.startswith("pooler")}
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), pooler)
        used["bert"] = {**zeros, **used["bert"]}
    return Teacher(config, dropout, has_nsp), used


def distillation_loss(
    output: PretrainingOutput,
    hidden_states: jax.Array,
    nsp_logits: jax.Array | None,
    counts: Counts,
):
    """`cls` + `rep` of SPEC 2.5: NSP soft cross entropy, averaged over sequences *and* classes, and
    the mean over hidden states (embedding output included) of their mean squared error, padding
    included.

    Arguments:
      output: the student's.
      hidden_states, nsp_logits: the teacher's; None leaves the NSP term out.
      counts: of the whole update.

    Returns: (loss, metrics), adding up over micro-batches.
    """
    ours, theirs = (x.astype(jnp.float32) for x in (output.hidden_states, hidden_states))
    difference = ours - theirs
    states, _, length, width = difference.shape
    rep = jnp.sum(jnp.square(difference)) / (states * counts.sequences * length * width)
    metrics = {"hidden_loss": rep}
    if nsp_logits is not None:
        target = jax.nn.softmax(nsp_logits.astype(jnp.float32))
        predicted = jax.nn.log_softmax(output.nsp_logits.astype(jnp.float32))
        metrics["nsp_soft_loss"] = -jnp.sum(target * predicted) / (
            counts.sequences * predicted.shape[-1]
        )
    return sum(metrics.values()), metrics
