"""Feed-forward codes at the borders where float32 and exact GELU disagree: those of the model."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from bipft_runtime import library
from bipft_runtime.compiled_encoder import CompiledEncoder
from bipft_runtime.numpy_encoder import NumpyEncoder, _linear, _norm

from bipft_jax.interop.pack import packed
from bipft_jax.models.activations import gelu
from tests.runtime.packing import in_jax, inputs, random_source

NAME = "layers.ffn_output.input_shift"


def tied_source(ids, segments):
    """A source in whose first layer, for the first token, the sign of gelu(y) + shift differs
    between float32 and exact GELU in every feed-forward channel where these are not equal."""
    source = random_source("bipft_b", seed=7)
    layers = source.params["bert"]["encoder"]["layers"]
    layers["ffn_input"]["bias"] -= 3  # where 0.5 + 0.5 erf loses digits
    encoder = NumpyEncoder(packed(source))
    parts, x = encoder._layers[0], encoder.embedded(ids, segments)
    attended = _linear(parts, "attention_output", encoder._attention(parts, x))
    norm = (parts["attention_norm.scale"], parts["attention_norm.bias"], 1e-12)
    y = _linear(parts, "ffn_input", _norm(attended + x, *norm))[0]
    exact = [0.5 * value * math.erfc(-value / math.sqrt(2)) for value in y.astype(float).tolist()]
    shift = -(np.array(exact) + np.asarray(gelu(jnp.asarray(y)))) / 2
    layers["ffn_output"]["input_shift"][0] = shift
    return source


@pytest.mark.skipif(not library.instruction_sets(), reason="needs the compiled kernels")
def test_codes_follow_the_gelu_of_the_jax_model():
    ids, segments, _ = (x[0] for x in inputs(np.random.default_rng(3), 1, 12))
    source = tied_source(ids, segments)
    _, states, _, _ = in_jax(source, ids, segments)
    model = packed(source)

    def error():  # of the first token after the first layer, root of the mean square
        layer = CompiledEncoder(model).layer(0, states[0])
        return np.sqrt(np.square(layer[0] - states[1][0]).mean())

    settled = error()
    given = source.params["bert"]["encoder"]["layers"]["ffn_output"]["input_shift"]
    np.testing.assert_allclose(model.tensors[NAME], given, atol=3e-7, rtol=0)
    model.tensors[NAME] = np.array(given)
    # XLA fuses the model's operations, and rounds a few sums otherwise than alone.
    assert settled < 0.3 * error()
