"""Whole models of three recipes against float64 accounts of SPEC 2.2, 3 and 4, written apart from
the table of recipes: what sits at each place of the encoder is pinned here."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import erf

from bipft_jax.models.layers import binary_dense
from bipft_jax.models.parameters import named_leaves
from bipft_jax.quantization.encoded import quantize
from tests.models.test_bert import INPUTS, calibrated, small

LAYERS, HEADS = 3, 2


def layer_norm(p, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-12) * p["scale"] + p["bias"]


def gelu(x):
    return x * (1 + erf(x / np.sqrt(2))) / 2


def relu(x):
    return np.maximum(x, 0)


class Bipft:
    """SPEC 1.1, 1.5 and 2.2, without estimators."""

    ffn_activation, mlm_activation = staticmethod(gelu), staticmethod(relu)

    def weight(self, kernel):
        return np.sign(kernel - kernel.mean()) * np.abs(kernel).mean()

    def embedding(self, table):
        return np.sign(table - table.mean()) * np.abs(table).mean(1, keepdims=True)

    def signed(self, x, scale):
        return scale * np.sign(x)

    def unsigned(self, x, scale):
        return scale * (x > scale / 2)

    ffn_output_input, probabilities = signed, unsigned

    def linear(self, p, x, quantized=None):
        quantized = quantized or self.signed
        x = quantized(x + p["input_shift"], p["input_scale"])
        return x @ self.weight(p["kernel"]) + p["bias"]

    def attention(self, p, q, k, v, mask):
        scores = self.signed(q, p["query_scale"]) @ self.signed(k, p["key_scale"]).T
        scores = scores / np.sqrt(q.shape[1]) + np.where(mask, 0, -1e30)
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights = weights / weights.sum(1, keepdims=True)
        return self.probabilities(weights, p["probs_scale"]) @ self.signed(v, p["value_scale"])

    def pooler(self, p, first):
        normed = layer_norm(p["bert"]["pooler_norm"], self.linear(p["bert"]["pooler"], first))
        return np.tanh(normed + first)


class Bit(Bipft):
    """SPEC 3: ReLU and an unsigned quantizer in the feed-forward layer, BERT's pooler."""

    ffn_activation = staticmethod(relu)
    ffn_output_input = Bipft.unsigned

    def pooler(self, p, first):
        return np.tanh(self.linear(p["bert"]["pooler"], first))


class Bit2(Bit):
    """The same with activations of 2 bits, SPEC 1.2 and 1.3; the minimum is that of the tensor."""

    def signed(self, x, scale):
        return scale * np.clip(np.round(x / scale), -2, 1)

    def unsigned(self, x, scale):
        return scale * np.clip(np.round((x - x.min()) / scale), 0, 3) + x.min()

    ffn_output_input = unsigned

    def probabilities(self, x, scale):
        return scale * np.clip(np.round(x / scale), 0, 3)  # the batch's minimum is padding's 0


class Bibert(Bipft):
    """SPEC 4.1 and 4.2. A kernel is [in, out]: its rows there are columns here."""

    mlm_activation = staticmethod(gelu)

    def weight(self, kernel):
        return np.sign(kernel - kernel.mean(0)) * np.abs(kernel).mean(0)

    def embedding(self, table):
        return np.sign(table - table.mean(1, keepdims=True)) * np.abs(table).mean(1, keepdims=True)

    def linear(self, p, x, quantized=None):
        return np.sign(x) @ self.weight(p["kernel"]) + p["bias"]

    def attention(self, p, q, k, v, mask):
        scores = np.sign(q) @ np.sign(k).T / np.sqrt(q.shape[1]) + np.where(mask, 0, -1e4)
        return (scores > 0) @ np.sign(v)

    def pooler(self, p, first):
        return np.tanh(self.linear(p["bert"]["pooler"], first))


def forward(model, p, ids, segments, mask, positions):
    """MLM and NSP logits; all sequences together, because 2-bit minima are the batch's."""
    bert = p["bert"]
    x = model.embedding(bert["words"]["embedding"])[ids] + bert["segments"]["embedding"][segments]
    x = layer_norm(bert["norm"], x + bert["positions"]["embedding"][: ids.shape[1]])
    for number in range(LAYERS):
        layer = jax.tree.map(lambda leaf: leaf[number], bert["encoder"]["layers"])
        attention = layer["attention"]
        q, k, v = (model.linear(attention[name], x) for name in ("query", "key", "value"))
        context = np.zeros_like(x)
        for b in range(len(x)):
            for part in np.split(np.arange(x.shape[-1]), HEADS):
                heads = (array[b][:, part] for array in (q, k, v))
                context[b][:, part] = model.attention(attention, *heads, mask[b])
        y = model.linear(layer["attention_output"], context)
        y = layer_norm(layer["attention_norm"], y + x)
        inner = model.ffn_activation(model.linear(layer["ffn_input"], y))
        out = model.linear(layer["ffn_output"], inner, model.ffn_output_input)
        x = layer_norm(layer["ffn_norm"], out + y)
    chosen = np.take_along_axis(x, positions[..., None], axis=1)
    chosen = model.mlm_activation(chosen @ p["mlm_dense"]["kernel"] + p["mlm_dense"]["bias"])
    mlm = layer_norm(p["mlm_norm"], chosen) @ bert["words"]["embedding"].T + p["mlm_bias"]
    return mlm, model.pooler(p, x[:, 0]) @ p["nsp"]["kernel"] + p["nsp"]["bias"]


@pytest.mark.parametrize(
    ("recipe", "account"),
    [("bipft_a", Bipft), ("bit_w1a1", Bit), ("bit_w1a2", Bit2), ("bibert", Bibert)],
)
def test_a_whole_model_is_what_its_paper_says(recipe, account):
    model, params = calibrated(small(recipe))
    got = model.apply({"params": params}, *INPUTS)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    mlm, nsp = forward(account(), wide, *map(np.asarray, INPUTS))
    np.testing.assert_allclose(got.mlm_logits, mlm, atol=1e-4)
    np.testing.assert_allclose(got.nsp_logits, nsp, atol=1e-4)


def test_bibert_has_its_ends_in_the_window_of_linears_and_not_of_attention():
    config = small("bibert")
    x = jnp.asarray([-1.5, -1.0, 0.5, 1.0, 1.5])
    linear = binary_dense(config, 4, config.recipe.linear_input, "query")
    params = linear.init(jax.random.key(0), x)
    of_linear = jax.grad(lambda x: linear.apply(params, x).sum())(x) != 0
    operand = config.recipe.query_key_value
    of_operand = jax.grad(lambda x: quantize(x, None, operand).sum())(x) != 0
    assert of_linear.tolist() == [False, True, True, True, False]
    assert of_operand.tolist() == [False, False, True, False, False]
    assert not any(name.endswith("_shift") for name in named_leaves(params))
