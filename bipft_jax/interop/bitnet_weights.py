"""Maps a decoder's parameters to the state dict of Hugging Face's `BitNetForCausalLM` and back.

PyTorch stores a linear's weight as [out, in] (ours: kernel [in, out]) and each layer's parameters
under separate names (ours: stacked along a leading [layers] axis). A norm inside a linear, which
that class lacks, is called LINEAR.norm.

Quantised weights are latent or packed: 2-bit codes (`few_bits.pack_quarters`) beside a
`weight_scale` (BitNet SPEC 7.1).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from bipft_jax.interop.few_bits import pack_quarters, unpack_quarters
from bipft_jax.interop.torch_weights import FLOATS, listed
from bipft_jax.models.decoder import CAUSAL_INPUTS, Decoder
from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.models.parameters import Params, differences, is_stacked, named_leaves
from bipft_jax.quantization.encoded import Encoded
from bipft_jax.quantization.quantizers import TernaryMean

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


@functools.cache  # tracing a model takes most of a second
def shapes(config: DecoderConfig) -> Mapping[str, jax.ShapeDtypeStruct]:
    """The parameters' shapes and dtypes by path."""
    ids = [jax.ShapeDtypeStruct((1, 1), np.int32)] * len(CAUSAL_INPUTS)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), *ids)["params"]
    return MappingProxyType(named_leaves(params))


def _names(path: str, layers: int) -> list[str]:
    """Their names of a parameter, one for each layer if it is stacked."""
    module = path.split("/")[-2]
    name = f"{MODULES[module]}.weight"
    if not is_stacked(path):
        return [name]
    return [f"model.layers.{index}.{name}" for index in range(layers)]


def _wanted(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's latent weights by their names."""
    wanted = {}
    for path, leaf in shapes(config).items():
        shape = leaf.shape[1:] if is_stacked(path) else leaf.shape
        shape = shape[::-1] if path.endswith("kernel") else shape
        wanted |= dict.fromkeys(_names(path, config.layers), shape)
    return wanted


def from_state(state: Mapping[str, np.ndarray], config: DecoderConfig) -> Params:
    """Our parameters, float32.

    Raises: ValueError naming at most ten arrays that are missing, unexpected, of another shape or
      type, or not finite.
    """
    wanted = {
        name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in _wanted(config).items()
    }
    problems = [
        f"{name} has type {array.dtype}, not one of {', '.join(FLOATS)}"
        for name, array in state.items()
        if name in wanted and array.dtype.name not in FLOATS
    ]
    with np.errstate(over="ignore"):  # of a float64
        given = {name: np.asarray(array, np.float32) for name, array in state.items()}
    problems += differences(given, wanted)
    for name in wanted.keys() & given.keys():
        if bad := np.count_nonzero(~np.isfinite(given[name])):
            problems.append(
                f"{name} has {bad} values that are NaN or infinite, of {given[name].size}"
            )
    if problems:
        raise ValueError(f"the arrays do not fit the decoder: {listed(problems)}")
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


# The `weight_scale` of a class of `transformers`, from the mean magnitude that multiplies codes,
# and back: the one class multiplies by it, the other divides (BitNet SPEC 7.1).
WEIGHT_SCALES = {
    "autobitlinear": lambda magnitude: magnitude,
    "bitlinear": lambda magnitude: 1 / magnitude,
}
_SCALE = "_scale"  # after the weight's own name
_IN_LINEARS = re.compile("|".join(map(re.escape, LINEARS.values())))
# A mean magnitude of weights beyond this, as a geometric mean over the linears, is taken for its
# reciprocal. Initial weights have 0.016.
_LARGEST_MAGNITUDE = 10.0


def _linears(config: DecoderConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the weights that recipes quantise, by their names.

    Raises: ValueError if one has no multiple of 4 rows, as packing needs.
    """
    linears = {
        name: shape
        for name, shape in _wanted(config).items()
        if _IN_LINEARS.search(name) and not name.endswith(".norm.weight")
    }
    for name, (rows, _) in linears.items():
        if rows % 4:
            raise ValueError(
                f"{name} has {rows} rows: 2-bit codes are packed in fours, so rows must be a "
                "multiple of 4"
            )
    return linears


@functools.partial(jax.jit, static_argnums=1)
def _encoded(kernel: jax.Array, quantizer: TernaryMean) -> Encoded:
    return quantizer.encode(kernel)


def packed(params: Params, config: DecoderConfig, linear_class: str) -> dict[str, np.ndarray]:
    """Their arrays by name, with 2-bit codes of the quantised weights, uint8 [out / 4, in], and
    their scales, float32 [1].

    linear_class: a name in `WEIGHT_SCALES`.

    Raises: ValueError naming a weight whose rows are no multiple of 4.
    """
    linears, state = _linears(config), {}
    for name, array in to_state(params, config):
        if name not in linears:
            state[name] = array
            continue
        encoded = _encoded(jnp.asarray(array.T), config.recipe.weight)  # as the model has it
        scale = WEIGHT_SCALES[linear_class](np.asarray(encoded.scale, np.float32))
        state[name] = pack_quarters(np.asarray(encoded.codes).T)
        state[name + _SCALE] = scale.reshape(1)
    return state


def latent(
    state: Mapping[str, np.ndarray], config: DecoderConfig, linear_class: str
) -> dict[str, np.ndarray]:
    """The arrays with latent weights in the places of packed ones: float32 [out, in], 0 or one
    magnitude with a sign, whose codes and mean magnitude are those of the file.

    Raises: ValueError naming an array that is missing, no 2-bit codes or no scale, or if the scales
      are those of the other class.
    """
    given, magnitudes = dict(state), {}
    for name, shape in _linears(config).items():
        magnitudes[name] = WEIGHT_SCALES[linear_class](_scale(given, name + _SCALE))
        codes = _codes(given, name, shape)
        nonzero = max(np.count_nonzero(codes), 1) / codes.size
        given[name] = codes * np.float32(magnitudes[name] / nonzero)
    mean = float(np.exp(np.mean(np.log(np.asarray([*magnitudes.values()], np.float64)))))
    if mean > _LARGEST_MAGNITUDE:
        (other,) = WEIGHT_SCALES.keys() - {linear_class}
        name = next(iter(magnitudes)) + _SCALE
        raise ValueError(
            f"weight_scale has the meaning of linear_class {other!r}: as one of {linear_class!r}, "
            f"a scale such as {name}, {np.asarray(state[name]).item():.4g}, stands for weights of "
            f"a mean magnitude of {mean:.3g}. Correct linear_class in config.json"
        )
    return given


def _scale(state: dict[str, np.ndarray], name: str) -> np.float32:
    """A `weight_scale`, taken out of the arrays."""
    if name not in state:
        raise ValueError(f"{name} is missing")
    scale = np.asarray(state.pop(name)).astype(np.float32)
    if scale.size != 1 or not (0 < scale).all() or not np.isfinite(scale).all():
        raise ValueError(f"{name} is {scale.tolist()}: it must be one positive number")
    return scale.reshape(())


def _codes(state: Mapping[str, np.ndarray], name: str, shape: tuple[int, ...]) -> np.ndarray:
    """int8 [out, in] from packed codes; shape: of these."""
    if name not in state:
        raise ValueError(f"{name} is missing")
    packed, (rows, columns) = state[name], shape
    if packed.dtype != np.uint8 or packed.shape != (rows // 4, columns):
        raise ValueError(
            f"{name} is {packed.dtype} {packed.shape}: packed codes of {rows} x {columns} weights "
            f"are uint8 {(rows // 4, columns)}"
        )
    try:
        return unpack_quarters(packed)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
