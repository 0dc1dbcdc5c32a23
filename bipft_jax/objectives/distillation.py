"""Task-agnostic distillation from a full-precision teacher during pretraining (SPEC 2.5). The term
of the teacher's distribution of masked tokens is not in the reference."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bipft_jax.models.bert import SEQUENCE_INPUTS, Bert, BertForPreTraining, PretrainingOutput
from bipft_jax.models.layers import added_to_rows, logits_dtype
from bipft_jax.models.recipes import BertConfig
from bipft_jax.objectives.losses import Batch, Counts

_MLM_HEAD = ("mlm_dense", "mlm_norm", "mlm_bias")


class Targets(NamedTuple):
    """A teacher's outputs for a batch: hidden states [layers + 1, B, S, H]; NSP logits [B, 2] and
    MLM logits [B, P, vocab], None if the student does not imitate them."""

    hidden_states: jax.Array
    nsp_logits: jax.Array | None
    mlm_logits: jax.Array | None


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A frozen model whose hidden states and distributions the student imitates.

    config: its architecture. dropout: whether its dropout is active, as in the reference, whose
    teacher runs in train mode (SPEC quirk 8). has_nsp: False turns the NSP term off. mlm_weight:
    weight of the term of the masked tokens; 0 turns it off.
    """

    config: BertConfig
    dropout: bool
    has_nsp: bool
    mlm_weight: float = 0.0

    looks_at = ()

    def __call__(self, params: Any, batch: Batch, key: jax.Array) -> Targets:
        """The targets of a batch, without gradient."""
        inputs = [batch[name] for name in SEQUENCE_INPUTS]
        options = {"rngs": {"dropout": key}}
        if self.mlm_weight:
            output = BertForPreTraining(self.config).apply(
                {"params": params}, *inputs, batch["mlm_positions"], not self.dropout, **options
            )
            targets = Targets(output.hidden_states, output.nsp_logits, output.mlm_logits)
            return jax.lax.stop_gradient(targets)
        _, hidden_states, pooled = Bert(self.config).apply(
            {"params": params["bert"]}, *inputs, not self.dropout, **options
        )
        nsp_logits = None
        if self.has_nsp:
            nsp, pooled = params["nsp"], pooled.astype(logits_dtype(pooled.dtype))
            product = pooled @ nsp["kernel"].astype(pooled.dtype)
            nsp_logits = added_to_rows(product, nsp["bias"])
        return jax.lax.stop_gradient(Targets(hidden_states, nsp_logits, None))

    def loss(self, own, output: PretrainingOutput, variables, targets: Targets, batch, counts):
        """The objective's own loss and `distillation_loss`."""
        loss, metrics = own
        extra, terms = distillation_loss(output, targets, batch, counts, self.mlm_weight)
        return loss + extra, {**metrics, **terms}


def make_teacher(
    config: BertConfig,
    params: Any,
    student: BertConfig,
    *,
    dropout: bool,
    mlm_weight: float = 0.0,
) -> tuple[Teacher, Any]:
    """The teacher and the part of its parameters that it uses.

    Raises: ValueError if its depth, width or vocabulary differs from the student's, or it lacks a
      head that the student imitates.
    """
    for field in ("layers", "hidden", "vocab_size"):
        theirs, ours = getattr(config, field), getattr(student, field)
        if theirs != ours:
            raise ValueError(
                f"the teacher has {field} {theirs}, the student {ours}: hidden states are compared "
                "layer by layer, so a teacher must have the student's depth, width and vocabulary"
            )
    has_nsp = "nsp" in params
    if mlm_weight:
        missing = [name for name in (*_MLM_HEAD, "nsp") if name not in params]
        if missing:
            raise ValueError(
                f"the teacher has no {missing[0]}, so no distribution of masked tokens to imitate: "
                "pretrain it (recipe fp, with --config.init_from) or leave mlm_distillation at 0"
            )
        return Teacher(config, dropout, has_nsp, mlm_weight), params
    used = {name: params[name] for name in ("bert", "nsp") if name in params}
    if not has_nsp:  # the pooled vector is unused, and the pooler may be missing
        ids = [jax.ShapeDtypeStruct((1, 1), jnp.int32)] * len(SEQUENCE_INPUTS)
        init = functools.partial(Bert(config).init, deterministic=True)
        shapes = jax.eval_shape(init, jax.random.key(0), *ids)["params"]
        pooler = {name: leaf for name, leaf in shapes.items() if name.startswith("pooler")}
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), pooler)
        used["bert"] = {**zeros, **used["bert"]}
    return Teacher(config, dropout, has_nsp), used


def distillation_loss(
    output: PretrainingOutput,
    targets: Targets,
    batch: Batch,
    counts: Counts,
    mlm_weight: float = 0.0,
):
    """`cls` + `rep` of SPEC 2.5: NSP soft cross entropy, averaged over sequences *and* classes, and
    the mean over hidden states (embedding output included) of their mean squared error, padding
    included. Adds mlm_weight times the Kullback-Leibler divergence of the student's distribution of
    a masked token from the teacher's (Hinton et al. 2015, arXiv:1503.02531, temperature 1).

    Arguments:
      output: of the student.
      targets: of the teacher; a term whose target is None is left out.
      batch: mlm_weights float [B, P].
      counts: of the whole update.

    Returns: (loss, metrics), which add up over micro-batches. Metrics are unweighted, entropies in
      nats.
    """
    nsp_logits = targets.nsp_logits
    ours, theirs = (x.astype(jnp.float32) for x in (output.hidden_states, targets.hidden_states))
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
    loss = sum(metrics.values())
    if targets.mlm_logits is not None:
        divergence = optax.losses.kl_divergence_with_log_targets(
            jax.nn.log_softmax(output.mlm_logits), jax.nn.log_softmax(targets.mlm_logits)
        )
        weights = batch["mlm_weights"] / counts.masked_tokens
        metrics["mlm_soft_loss"] = jnp.sum(divergence * weights)
        loss = loss + mlm_weight * metrics["mlm_soft_loss"]
    return loss, metrics
