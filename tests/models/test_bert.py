"""The encoder against a float64 NumPy account of SPEC 2.2, published sizes, and itself."""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from bipft_jax.models.attention import ATTENTION_MAPS, SelfAttention
from bipft_jax.models.bert import BertForPreTraining, EncoderLayer
from bipft_jax.models.parameters import is_scale
from bipft_jax.models.recipes import RECIPES, BertConfig, bert_config, recipe_named
from bipft_jax.training.state import calibrate, initial_params
from bipft_jax.training.weight_statistics import attended_keys
from tests.objectives import abstract_params

IDS = jnp.asarray([[2, 7, 8, 9, 3, 5, 6, 3], [2, 5, 9, 3, 4, 3, 0, 0]])
SEGMENTS = jnp.asarray([[0, 0, 0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1, 0, 0]])
MASK = (IDS != 0).astype(jnp.int32)
POSITIONS = jnp.asarray([[1, 3], [2, 4]])
INPUTS = (IDS, SEGMENTS, MASK, POSITIONS)


def small(recipe="bipft_b", **overrides) -> BertConfig:
    sizes = dict(vocab_size=11, layers=3, hidden=8, heads=2, intermediate=16, max_positions=8)
    return BertConfig(recipe_named(recipe), **{**sizes, "dropout": 0.0, **overrides})


def calibrated(config, seed=0):
    model = BertForPreTraining(config)
    params = initial_params(model, jax.random.key(seed), *INPUTS)
    # A wider start than N(0, 0.02), so that layers and heads really differ.
    params = jax.tree.map(
        lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), params
    )
    return model, calibrate(model, params, *INPUTS)


def numpy_attention(p, x, mask, heads):
    """SPEC 2.2, steps 1 to 7, one head and one position after another, in float64."""

    def sign_quantised(v, scale):
        return max(scale, 1e-5) * np.sign(v)

    def binary_linear(site, v):
        kernel = p[f"{site}/kernel"]
        binary = np.sign(kernel - kernel.mean()) * np.abs(kernel).mean()
        shifted = v + p[f"{site}/input_shift"]
        return sign_quantised(shifted, p[f"{site}/input_scale"]) @ binary + p[f"{site}/bias"]

    def estimate(name, v):
        return v @ p[f"{name}_estimator/kernel"] + p[f"{name}_estimator/bias"]

    batch, length, hidden = x.shape
    width = hidden // heads
    out = np.zeros_like(x)
    for b in range(batch):
        q, k, v = (binary_linear(site, x[b]) for site in ("query", "key", "value"))
        a, dk = estimate("query_residual", x[b]), estimate("key_residual", x[b])
        c, e = estimate("query", x[b]), estimate("key", x[b])
        u = estimate("value_residual", x[b])
        bracket = c @ dk.T + a @ e.T + a @ dk.T
        for head in range(heads):
            part = slice(head * width, (head + 1) * width)
            qb = sign_quantised(q[:, part], p["query_scale"])
            kb = sign_quantised(k[:, part], p["key_scale"])
            vb = sign_quantised(v[:, part], p["value_scale"])
            scores = (qb @ kb.T + bracket) / np.sqrt(width)
            scores[:, mask[b] == 0] = -1e30
            weights = np.exp(scores - scores.max(1, keepdims=True))
            weights /= weights.sum(1, keepdims=True)
            pb = p["probs_scale"] * (weights > p["probs_scale"] / 2)
            out[b, :, part] = pb @ vb + pb @ u
    return out


@pytest.mark.parametrize("rank", [1, 3])
def test_attention_with_estimators_is_the_residual_polynomial(rank):
    recipe = recipe_named("bipft_b", estimator_rank=rank)
    config = dataclasses.replace(small(), recipe=recipe, hidden=12, heads=3)
    x = jax.random.normal(jax.random.key(1), (2, 8, 12))
    attention = SelfAttention(config)
    params = attention.init(jax.random.key(0), x, MASK, True)["params"]
    params = jax.tree.map(lambda p: jax.random.normal(jax.random.key(p.size), p.shape), params)
    flat = flatten_dict(params, sep="/")
    flat = {path: jnp.float32(0.3) if is_scale(path) else value for path, value in flat.items()}
    got = attention.apply({"params": unflatten_dict(flat, sep="/")}, x, MASK, True)
    wide = {path: np.asarray(value, np.float64) for path, value in flat.items()}
    expected = numpy_attention(wide, np.asarray(x, np.float64), np.asarray(MASK), heads=3)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_attended_keys_are_counted_for_tokens_alone_in_each_layer():
    model, params = calibrated(small())
    attention = params["bert"]["encoder"]["layers"]["attention"]
    attention["query_scale"] *= 0.1  # no probability is far from 1/8 (of 1/6, with two paddings)

    def attended(scale_of_layer):
        attention["probs_scale"] = jnp.asarray(scale_of_layer)
        _, variables = model.apply({"params": params}, *INPUTS, mutable=["statistics"])
        return attended_keys(variables["statistics"])

    # A threshold below every probability, above every one, and among them.
    got = attended([1e-5, 3.0, 2 / 8])
    assert got["attended_keys/1"] == 0 and 0 < got["attended_keys/2"] < 8
    # 8 tokens see 8 keys each, 6 tokens 6.
    assert got["attended_keys/0"] == pytest.approx((8 * 8 + 6 * 6) / 14)
    assert got["attended_keys"] == pytest.approx(
        sum(got[f"attended_keys/{i}"] for i in range(3)) / 3
    )
    fp, fp_params = calibrated(small("fp"))
    assert attended_keys(fp.apply({"params": fp_params}, *INPUTS, mutable=["statistics"])[1]) == {}


def test_parameter_counts_are_those_of_the_published_models():
    """Hugging Face's BertForPreTraining has 110,106,428 parameters; BiPFT-B for base has
    110,237,937 (SPEC 2.1)."""

    def count(recipe):
        config = bert_config(RECIPES[recipe], "base", 30_522)
        return sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config, 0)))

    assert count("fp") == 110_106_428
    assert count("bipft_b") == 110_237_937


def test_bipft_a_is_bipft_b_with_zero_estimators():
    model_b, params_b = calibrated(small("bipft_b"))
    flat = {
        path: jnp.zeros_like(v) if any(p.endswith("_estimator") for p in path) else v
        for path, v in flatten_dict(params_b).items()
    }
    shared = {p: v for p, v in flat.items() if not any(x.endswith("_estimator") for x in p)}
    with_zeros = model_b.apply({"params": unflatten_dict(flat)}, *INPUTS)
    without = BertForPreTraining(small("bipft_a")).apply(
        {"params": unflatten_dict(shared)}, *INPUTS
    )
    assert len(shared) < len(flat)
    jax.tree.map(np.testing.assert_array_equal, with_zeros, without)


def test_low_rank_products_are_added_to_the_linears_of_attention():
    """Against the same model with the product merged into full-precision kernels."""
    recipe = recipe_named("fp", lora_rank=2)
    model, params = calibrated(dataclasses.replace(small(), recipe=recipe))
    flat = flatten_dict(params, sep="/")
    merged = {path: value for path, value in flat.items() if "_lora/" not in path}
    layers = "bert/encoder/layers"
    for site in ("attention/query", "attention/key", "attention/value", "attention_output"):
        down, up = (flat[f"{layers}/{site}_lora/{side}/kernel"] for side in ("down", "up"))
        assert down.shape == (3, 8, 2) and up.shape == (3, 2, 8)
        merged[f"{layers}/{site}/kernel"] += down @ up
    assert len(merged) == len(flat) - 8
    plain = BertForPreTraining(small("fp"))
    expected = plain.apply({"params": unflatten_dict(merged, sep="/")}, *INPUTS)
    got = model.apply({"params": params}, *INPUTS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), got, expected)


@pytest.mark.parametrize(
    "overrides", [{"scan_layers": False}, {"remat": "full"}, {"remat": "dots"}, {"remat": "lean"}]
)
def test_scan_and_remat_change_nothing(overrides):
    model, params = calibrated(small())

    def gradients(model):
        def loss(params):
            out = model.apply({"params": params}, *INPUTS)
            return jnp.sum(jnp.sin(out.mlm_logits)) + jnp.sum(out.nsp_logits**2)

        return jax.jit(jax.value_and_grad(loss))(params)

    expected = gradients(model)
    got = gradients(BertForPreTraining(small(**overrides)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5), got, expected)


def test_layers_have_their_own_parameters_and_run_in_order():
    """A scan over stacked parameters is the layers one after another."""
    config = small("fp", layers=3)
    model, params = calibrated(config)
    states = model.apply({"params": params}, *INPUTS).hidden_states
    for number in range(config.layers):
        layer = jax.tree.map(operator.itemgetter(number), params["bert"]["encoder"]["layers"])
        want, _ = EncoderLayer(config).apply({"params": layer}, states[number], MASK, True)
        np.testing.assert_allclose(states[number + 1], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recipe", ["fp", "bipft_b"])
def test_padding_does_not_reach_real_tokens(recipe):
    model, params = calibrated(small(recipe))
    out = model.apply({"params": params}, *INPUTS)
    noise = jnp.where(IDS == 0, 9, IDS)  # other words under the padding, same mask
    changed = model.apply({"params": params}, noise, SEGMENTS, MASK, POSITIONS)
    np.testing.assert_array_equal(out.mlm_logits, changed.mlm_logits)
    np.testing.assert_array_equal(out.nsp_logits, changed.nsp_logits)


def test_padding_row_gets_no_gradient_from_lookups_but_from_the_decoder():
    model, params = calibrated(small())

    def embedding_gradient(pick):
        def loss(params):
            return jnp.sum(pick(model.apply({"params": params}, *INPUTS)))

        return jax.grad(loss)(params)["bert"]["words"]["embedding"]

    from_lookups = embedding_gradient(lambda out: out.hidden_states[0] ** 3)
    assert not from_lookups[0].any() and from_lookups[2].any()
    assert embedding_gradient(lambda out: out.mlm_logits)[0].any()


def test_dropout_follows_its_key_and_is_off_by_default():
    model, params = calibrated(small(dropout=0.3))

    def states(deterministic, seed):
        rngs = {"dropout": jax.random.key(seed)}
        out = model.apply({"params": params}, *INPUTS, deterministic=deterministic, rngs=rngs)
        return np.asarray(out.hidden_states)

    np.testing.assert_array_equal(states(False, 1), states(False, 1))
    assert not np.array_equal(states(False, 1), states(False, 2))
    np.testing.assert_array_equal(states(True, 1), states(True, 2))


@pytest.mark.parametrize("recipe", ["fp", "bipft_b"])
def test_bfloat16_activations_give_float32_logits_and_gradients(recipe):
    model, params = calibrated(small(recipe, dtype="bfloat16"))

    def loss(params):
        out = model.apply({"params": params}, *INPUTS)
        assert out.hidden_states.dtype == jnp.bfloat16
        assert out.mlm_logits.dtype == out.nsp_logits.dtype == jnp.float32
        return jnp.sum(jnp.sin(out.mlm_logits)) + jnp.sum(out.nsp_logits**2)

    gradients = jax.jit(jax.grad(loss))(params)
    assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.float32)}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))


def test_codes_of_probabilities_are_those_of_an_exact_softmax():
    """Activations are bfloat16; softmax and threshold are not."""
    config = small("bipft_a", dtype="bfloat16", hidden=32, heads=4)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, 64, 32)), jnp.bfloat16)
    mask = jnp.asarray(np.arange(64) < np.array([[64], [50], [20], [5]]), jnp.int32)
    module = SelfAttention(config)
    params = flatten_dict(module.init(jax.random.key(0), x, mask, True)["params"])
    params = {
        path: jnp.float32(1.0) if path[-1].endswith("_scale") else leaf * 10
        for path, leaf in params.items()
    }
    params[("probs_scale",)] = jnp.float32(0.04)
    variables = {"params": unflatten_dict(params)}
    _, reported = module.apply(variables, x, mask, True, mutable=[ATTENTION_MAPS])
    (scores,), (multiplied,) = (reported[ATTENTION_MAPS][name] for name in ("scores", "probs"))
    exact = np.exp(np.float64(scores)) * np.asarray(mask)[:, None, None]
    exact /= exact.sum(-1, keepdims=True)
    on = exact > 0.02
    assert 0.1 < on.mean() < 0.9
    clear = np.abs(exact - 0.02) > 1e-6
    np.testing.assert_array_equal((np.asarray(multiplied) > 0)[clear], on[clear])


def test_calibration_fills_missing_scales_and_touches_nothing_else():
    model = BertForPreTraining(small())
    fresh = initial_params(model, jax.random.key(0), *INPUTS)
    forgotten = model.apply({"params": fresh}, *INPUTS)
    assert np.isnan(forgotten.nsp_logits).all()
    flat = flatten_dict(fresh)
    scales = [path for path in flat if is_scale(path)]
    assert len(scales) == 11 and all(np.isnan(flat[path]).all() for path in scales)
    kept = ("bert", "encoder", "layers", "attention", "key_scale")
    flat[kept] = jnp.asarray([0.25, jnp.nan, 0.75])
    done = flatten_dict(calibrate(model, unflatten_dict(flat), *INPUTS))
    np.testing.assert_array_equal(done[kept][jnp.asarray([0, 2])], [0.25, 0.75])
    assert np.isfinite(done[kept]).all()
    for path, value in flat.items():
        if not is_scale(path):
            np.testing.assert_array_equal(done[path], value)
    # The first quantizer sees the embedding output: 2 mean|x| (SPEC 1.4), the shift still zero.
    embedded = model.apply({"params": unflatten_dict(done)}, *INPUTS).hidden_states[0]
    first = done[("bert", "encoder", "layers", "attention", "query", "input_scale")][0]
    np.testing.assert_allclose(first, 2 * jnp.mean(jnp.abs(embedded)), rtol=1e-5)
    # Softmax rows sum to 1, so probabilities start at 4 / S whatever the input.
    np.testing.assert_allclose(
        done[("bert", "encoder", "layers", "attention", "probs_scale")], 4 / 8, rtol=1e-5
    )


def test_calibration_uses_the_global_batch():
    devices = jax.devices()
    assert len(devices) == 8
    mesh = jax.sharding.Mesh(np.asarray(devices), ("data",))
    model = BertForPreTraining(small())
    inputs = [jnp.tile(x, (8, 1)).at[3:].set(jnp.tile(x, (8, 1))[:-3]) for x in INPUTS]
    fresh = initial_params(model, jax.random.key(0), *inputs)
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    one = calibrate(model, fresh, *inputs)
    eight = calibrate(model, fresh, *[jax.device_put(x, split) for x in inputs])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one, eight)


def test_a_sequence_longer_than_the_model_is_refused():
    with pytest.raises(ValueError, match="9 tokens, but the model has positions for 8"):
        long = jnp.ones((1, 9), jnp.int32)
        BertForPreTraining(small()).init(jax.random.key(0), long, long, long, POSITIONS[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recipe_named("bipft"), "unknown recipe 'bipft': did you mean bipft_"),
        (lambda: bert_config(RECIPES["fp"], "minni", 10), "did you mean mini"),
        (lambda: recipe_named("fp", estimator_rank=2), "has no residual estimators"),
        (lambda: recipe_named("bipft_a", lora_rank=-1), "lora_rank is -1"),
        (lambda: recipe_named("fp", full_precision_weights=True), "as they are"),
        (lambda: small(heads=3), "not a multiple of 3 heads"),
    ],
)
def test_unknown_names_are_answered_with_near_ones(call, message):
    with pytest.raises(ValueError, match=message):
        call()
