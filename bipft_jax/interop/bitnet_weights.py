"""Maps a decoder's parameters to the state dict of Hugging Face's `BitNetForCausalLM` and back.

PyTorch stores a linear's weight as [out, in] (ours: kernel [in, out]) and each layer's parameters
under separate names (ours: stacked along a leading [layers] axis). A norm inside a linear is called
as `AutoBitLinear` calls it: LINEAR.norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from bipft_jax.models.decoder import CAUSAL_INPUTS, Decoder
from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.models.parameters import Params, differences, is_stacked, named_leaves

# Our modules, without the stack's name, and theirs, without the layer's.
LINEARS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "attention_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_input": "mlp.up_proj",
    "ffn_output": "mlp.down_proj",
}
MODULES = {
    **LINEARS,
    **{f"{ours}_norm": f"{theirs}.norm" for ours, theirs in LINEARS.items()},
    "attention_norm": "input_layernorm",
    "attention_sub_norm": "self_attn.attn_sub_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "words": "model.embed_tokens",
    "final_norm": "model.norm",
    "head": "lm_head",
}


def shapes(config: DecoderConfig) -> dict[str, jax.ShapeDtypeStruct]:
    """The parameters' shapes and dtypes by path."""
    ids = [jax.ShapeDtypeStruct((1, 1), np.int32)] * len(CAUSAL_INPUTS)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), *ids)["params"]
    return named_leaves(params)


def _names(path: str, layers: int) -> list[str]:
    """Their names of a parameter, one for each layer if it is stacked."""
    module = path.split("/")[-2]
    name = f"{MODULES[module]}.weight"
    if not is_stacked(path):
        return [name]
    return [f"model.layers.{index}.{name}" for index in range(layers)]


def from_state(state: Mapping[str, np.ndarray], config: DecoderConfig) -> Params:
    """Our parameters, float32.

    Raises: ValueError naming arrays that are missing, unexpected or of another shape.
    """
    wanted = {}
    for path, leaf in shapes(config).items():
        for name in _names(path, config.layers):
            shape = leaf.shape[1:] if is_stacked(path) else leaf.shape
            shape = shape[::-1] if path.endswith("kernel") else shape
            wanted[name] = jax.ShapeDtypeStruct(shape, np.float32)
    given = {name: np.asarray(array, np.float32) for name, array in state.items()}
    if problems := differences(given, wanted):
        raise ValueError(f"the arrays do not fit the decoder: {'; '.join(problems)}")
    ours = {path: _ours(path, given, config.layers) for path in shapes(config)}
    return unflatten_dict(ours, sep="/")


def _ours(path: str, state: Mapping[str, np.ndarray], layers: int) -> np.ndarray:
    arrays = [state[name] for name in _names(path, layers)]
    if path.endswith("kernel"):
        arrays = [array.T for array in arrays]
    return np.stack(arrays) if is_stacked(path) else arrays[0]


def to_state(params: Params, config: DecoderConfig) -> Iterator[tuple[str, np.ndarray]]:
    """Their arrays by name, from parameters or gradients."""
    for path, leaf in named_leaves(params).items():
        stacked = np.asarray(leaf) if is_stacked(path) else np.asarray(leaf)[None]
        for name, array in zip(_names(path, config.layers), stacked, strict=True):
            yield name, array.T if path.endswith("kernel") else array
