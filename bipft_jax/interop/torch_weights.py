"""Maps parameters of our models to a PyTorch BERT's state dict and back.

The names are those of Hugging Face's BERT and, for what binary models add, of the BiPFT and BiT
references. PyTorch stores a linear's weight as [out, in] (ours: kernel [in, out]) and each layer's
parameters under separate names (ours: stacked along a leading [layers] axis).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from bipft_jax.models.parameters import Params, is_scale, named_leaves
from bipft_jax.models.recipes import BertConfig
from bipft_jax.objectives.objective import Objective

_STACK = "bert/encoder/layers/"
_LAYER = "bert.encoder.layer.{}."

# Our modules (those of a layer without _STACK before them) and theirs.
_MODULES = {
    "bert/words": "bert.embeddings.word_embeddings",
    "bert/positions": "bert.embeddings.position_embeddings",
    "bert/segments": "bert.embeddings.token_type_embeddings",
    "bert/norm": "bert.embeddings.LayerNorm",
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    # SPEC 2.2, step 2: scores get c b^T + a e^T + a b^T, a and b the residuals' estimators.
    "attention/query_residual_estimator": "attention.self.q_p",
    "attention/key_residual_estimator": "attention.self.k_p",
    "attention/query_estimator": "attention.self.q_m",
    "attention/key_estimator": "attention.self.k_m",
    "attention/value_residual_estimator": "attention.self.v_p",
    "attention/query_lora/down": "attention.self.lora_q.lora.0",
    "attention/query_lora/up": "attention.self.lora_q.lora.1",
    "attention/key_lora/down": "attention.self.lora_k.lora.0",
    "attention/key_lora/up": "attention.self.lora_k.lora.1",
    "attention/value_lora/down": "attention.self.lora_v.lora.0",
    "attention/value_lora/up": "attention.self.lora_v.lora.1",
    "attention_output": "attention.output.dense",
    "attention_output_lora/down": "attention.output.lora_o.lora.0",
    "attention_output_lora/up": "attention.output.lora_o.lora.1",
    "attention_norm": "attention.output.LayerNorm",
    "ffn_input": "intermediate.dense",
    "ffn_output": "output.dense",
    "ffn_norm": "output.LayerNorm",
    "bert/pooler": "bert.pooler.dense",
    "bert/pooler_norm": "bert.pooler.LayerNorm",
    "mlm_dense": "cls.predictions.transform.dense",
    "mlm_norm": "cls.predictions.transform.LayerNorm",
    "nsp": "cls.seq_relationship",
    "classifier": "classifier",
}
_LEAVES = {
    "kernel": "weight",
    "embedding": "weight",
    "scale": "weight",  # of a LayerNorm
    "bias": "bias",
    "input_shift": "move.bias",
    "input_scale": "input_clip_val",
}
# Parameters outside any module of the table: whole names, ours and theirs.
_WHOLE = {
    "attention/query_scale": "attention.self.clip_query",
    "attention/key_scale": "attention.self.clip_key",
    "attention/value_scale": "attention.self.clip_value",
    "attention/probs_scale": "attention.self.clip_attn",
    "mlm_bias": "cls.predictions.bias",
}

# Arrays that the references save but never use (SPEC quirks 13, 17 and 29), Hugging Face's
# position_ids buffer, and the decoder, whose weight and bias are tied to other parameters.
_UNUSED = re.compile(
    r"\.(sa\.weight|move_[qkv]\.bias|gate|scale|(weight|act)_clip_val|position_ids)$"
    r"|\.clip_(query|key|value|attn)$"  # used by BiPFT and BiT, but not by BiBERT
    r"|^cls\.predictions\.decoder\."
)
# Prefixes of wrapped models: DataParallel, torch.compile, FSDP and its activation checkpointing.
_WRAPPERS = re.compile(
    r"(?<![^.])(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
WORDS = "bert.embeddings.word_embeddings.weight"
# The decoder's arrays and the arrays they are tied to; a file has either or both.
_TIED = {
    "cls.predictions.decoder.weight": WORDS,
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
# Any of these, used or not, shows that a model is not full precision.
_OF_QUANTIZERS = re.compile(
    r"\.(move(_[qkv])?\.bias|sa\.weight|gate|scale|\w+_clip_val|clip_(query|key|value|attn))$"
)
FLOATS = ("float32", "float16", "bfloat16", "float64")
_SHOWN_PROBLEMS = 10  # of a state dict, in a message


class Slot(NamedTuple):
    """The place of a state dict's array in our parameters: path of the parameter, layer in its
    stack (None if it is not stacked), and whether it is transposed."""

    path: str
    layer: int | None
    transposed: bool


def slots(config: BertConfig, objective: Objective) -> dict[str, Slot]:
    """The arrays of a model's state dict by their PyTorch names."""
    return dict(_slots(_shapes(config, objective), config.layers))


@functools.cache  # tracing a model takes most of a second
def _shapes(config: BertConfig, objective: Objective) -> Mapping[str, tuple[int, ...]]:
    leaves = named_leaves(objective.abstract_params(config))
    return MappingProxyType({path: leaf.shape for path, leaf in leaves.items()})


def _slots(paths: Mapping[str, object], layers: int) -> Iterator[tuple[str, Slot]]:
    for path in paths:
        ours = path.removeprefix(_STACK)
        module, _, leaf = ours.rpartition("/")
        theirs = _WHOLE[ours] if ours in _WHOLE else f"{_MODULES[module]}.{_LEAVES[leaf]}"
        if path.startswith(_STACK):
            for layer in range(layers):
                yield _LAYER.format(layer) + theirs, Slot(path, layer, leaf == "kernel")
        else:
            yield theirs, Slot(path, None, leaf == "kernel")


def usual_names(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Renames the arrays as in `slots`: strips prefixes of wrappers, adds "bert." to the names of
    an encoder without heads, renames LayerNorms' gamma and beta (BERT's first checkpoints) to
    weight and bias, and adds the other array of a tied pair if only the decoder's exists.

    Raises: ValueError if two arrays get the same name.
    """
    usual: dict[str, np.ndarray] = {}
    for name, array in state.items():
        new = _WRAPPERS.sub("", name)
        new = new.replace("LayerNorm.gamma", "LayerNorm.weight")
        new = new.replace("LayerNorm.beta", "LayerNorm.bias")
        if new in usual:
            raise ValueError(f"{name} and another array are both the model's {new}")
        usual[new] = array
    if not any(name.startswith("bert.") for name in usual):
        usual = {f"bert.{name}": array for name, array in usual.items()}
    for tied, name in _TIED.items():
        if tied in usual and name not in usual:
            usual[name] = usual[tied]
    return usual


def without_surplus_rows(state: Mapping[str, np.ndarray], pieces: int) -> dict[str, np.ndarray]:
    """Returns the arrays, with vocabulary-sized ones cut to `pieces` rows."""
    per_piece = {*_TIED, *_TIED.values()}
    return {
        name: array[:pieces] if name in per_piece and np.ndim(array) else array
        for name, array in state.items()
    }


def known_unused(
    state: Mapping[str, np.ndarray], config: BertConfig, objective: Objective
) -> list[str]:
    """The usual names of arrays that this model does not need: arrays that the references never
    use, position_ids, the tied decoder."""
    wanted = slots(config, objective)
    return [name for name in state if name not in wanted and _UNUSED.search(name)]


def quantizer_names(state: Mapping[str, np.ndarray]) -> list[str]:
    """The names in a state dict that occur only in models with quantizers."""
    return [name for name in state if _OF_QUANTIZERS.search(name)]


def low_ranks(state: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """(estimator_rank, lora_rank) of a state dict with usual names; 0 if absent."""
    names = [
        f"{_LAYER.format(0)}{_MODULES[module]}.weight"
        for module in ("attention/query_residual_estimator", "attention/query_lora/down")
    ]
    estimator_rank, lora_rank = (len(state[name]) if name in state else 0 for name in names)
    return estimator_rank, lora_rank


def from_state_dict(
    state: Mapping[str, np.ndarray],
    config: BertConfig,
    objective: Objective,
    *,
    optional: Callable[[str], bool] = lambda name: False,
    source: str = "the state dict",
) -> tuple[Params, list[str]]:
    """Parameters of our model from a state dict.

    Arguments:
      state: arrays by PyTorch name; renamed by `usual_names`.
      optional: predicate on a PyTorch name; True if the array may be absent or unexpected. A
        parameter of ours with any absent array is then left out.
      source: name of what is read, for error messages.

    Returns: (parameters as float32 NumPy arrays, names of unexpected arrays that are not known to
      be unused).

    Raises: ValueError listing at most ten arrays that are missing, unexpected, of another shape
      (with both shapes) or type, different from the array they are tied to, or not finite (a
      learned scale may be NaN: not yet initialised).
    """
    state = {name: np.asarray(array) for name, array in usual_names(state).items()}
    wanted = slots(config, objective)
    shapes = _shapes(config, objective)
    problems, parts = [], {path: {} for path in shapes}
    for name, slot in wanted.items():
        if name not in state:
            if not optional(name):
                problems.append(f"{name} is missing")
            continue
        array = state[name].T if slot.transposed else state[name]
        expected = shapes[slot.path] if slot.layer is None else shapes[slot.path][1:]
        if array.shape != expected:
            ours = expected[::-1] if slot.transposed else expected
            problems.append(f"{name} has shape {state[name].shape}, this model's has {ours}")
        if array.dtype.name not in FLOATS:
            problems.append(f"{name} has type {array.dtype}, not one of {', '.join(FLOATS)}")
            continue
        with np.errstate(over="ignore"):  # of a float64
            array = array.astype(np.float32)
        if bad := _count_not_finite(array, slot):
            problems.append(f"{name} has {bad} values that are NaN or infinite, of {array.size}")
        parts[slot.path][slot.layer] = array
    for tied, name in _TIED.items():
        if {tied, name} <= set(state) and not np.array_equal(state[tied], state[name]):
            problems.append(f"{tied} is not {name}, and this library's MLM head has the two tied")
    left_over = [name for name in state if name not in wanted and not _UNUSED.search(name)]
    problems += [f"{name} is unexpected" for name in left_over if not optional(name)]
    if problems:
        raise ValueError(f"{source} does not fit this model: {listed(problems)}")

    complete = {}
    for path, layers in parts.items():
        if None in layers:
            complete[path] = layers[None]
        elif len(layers) == config.layers:
            complete[path] = np.stack([layers[layer] for layer in range(config.layers)])
    return unflatten_dict(complete, sep="/"), left_over


def listed(problems: Sequence[str]) -> str:
    """The first problems of a state dict, and the number of the others."""
    more = len(problems) - _SHOWN_PROBLEMS
    return "; ".join([*problems[:_SHOWN_PROBLEMS], *([f"and {more} more"] if more > 0 else [])])


def _count_not_finite(array: np.ndarray, slot: Slot) -> int:
    """Counts non-finite values, except NaN in a learned scale, which `calibrate` initialises."""
    allowed = np.isfinite(array)
    if is_scale(slot.path):
        allowed |= np.isnan(array)
    return np.count_nonzero(~allowed)


def with_uninitialised_scales(params: Params) -> Params:
    """Sets every learned scale of exactly 1 to NaN, which `calibrate` initialises: the references
    initialise such a scale from data (SPEC 1.4)."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: np.where(x == 1, np.float32(np.nan), x) if is_scale(path[-1].key) else x,
        params,
    )


def to_state_dict(
    params: Params, config: BertConfig, objective: Objective, missing: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The parameters under their PyTorch names, as Hugging Face saves them: without the tied
    decoder.

    missing: paths of the model's parameters that are not in `params`; they are left out.

    Returns: C-contiguous float32 arrays.

    Raises: ValueError for a non-finite array (a learned scale may be NaN).
    """
    flat = named_leaves(params)
    state = {}
    for name, slot in slots(config, objective).items():
        if slot.path in missing:
            continue
        array = np.asarray(flat[slot.path], np.float32)
        array = array if slot.layer is None else array[slot.layer]
        if bad := _count_not_finite(array, slot):
            raise ValueError(f"{slot.path} has {bad} values that are NaN or infinite")
        state[name] = np.array(array.T if slot.transposed else array, order="C")
    return state
