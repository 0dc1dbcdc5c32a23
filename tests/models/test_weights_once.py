"""Weights that are quantised once: the same numbers, and no quantiser in the loop of an update."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bipft_jax.models.decoder_recipes import DecoderConfig, decoder_recipe_named
from bipft_jax.models.recipes import BertConfig, recipe_named
from bipft_jax.models.weights_once import kept_weights
from bipft_jax.objectives.causal_lm import CAUSAL_LM
from bipft_jax.objectives.classification import classification
from bipft_jax.training.state import initial_params, new_state
from bipft_jax.training.step import gradients

LAYERS, HIDDEN, INNER = 2, 16, 24
DECODER = DecoderConfig(
    decoder_recipe_named("bitnet_b158", groups=2),
    20,
    LAYERS,
    HIDDEN,
    INNER,
    4,
    2,
    compute="float32",
)
BERT = BertConfig(recipe_named("bibert"), 20, LAYERS, HIDDEN, 4, INNER, 8, compute="float32")


@pytest.mark.parametrize(("objective", "config"), [(CAUSAL_LM, DECODER), (classification(2), BERT)])
def test_a_model_gives_the_same_with_weights_quantised_before(objective, config):
    model = objective.model(config)
    ids = jax.random.randint(jax.random.key(1), (2, 8), 1, 20)
    inputs = [ids, *[jnp.ones_like(ids)] * (len(objective.inputs) - 1)]
    params = initial_params(model, jax.random.key(0), *inputs)
    kept = kept_weights(params, config.recipe.weight, config.recipe.groups)

    @jax.jit
    def logits_and_gradients(params, kept):
        def total(params):
            logits = model.apply({"params": params, **kept}, *inputs).logits
            return jnp.sum(jnp.sin(logits)), logits

        return jax.grad(total, has_aux=True)(params)

    # Up to the order of the sums of the weights' mean.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 * np.abs(b).max()),
        logits_and_gradients(params, {}),
        logits_and_gradients(params, kept),
    )
    # It is the collection that is multiplied.
    other = jax.tree.map(jnp.zeros_like, kept)
    assert not np.any(logits_and_gradients(params, other)[1] == logits_and_gradients(params, {})[1])


def rounded_kernels(jaxpr, loops=()):
    """(lengths of the loops around it, size) of every rounding of floats with the size of a
    kernel, or of a stack of them."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "round":
            size = equation.outvars[0].aval.size
            if size % (HIDDEN * INNER) == 0:
                yield loops, size
        inside = loops
        if equation.primitive.name == "scan":
            inside = (*loops, equation.params["length"])
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from rounded_kernels(inner, inside)


@pytest.mark.parametrize("accumulation", [1, 3])
def test_an_update_quantises_each_kernel_once(accumulation):
    model = CAUSAL_LM.model(DECODER)
    ids = jax.ShapeDtypeStruct((3, 5), jnp.int32)  # 5: no size of an activation is a kernel's
    batch = dict.fromkeys(("input_ids", "segment_ids", "target_ids"), ids)
    batch["target_weights"] = jax.ShapeDtypeStruct((3, 5), jnp.float32)
    params = CAUSAL_LM.abstract_params(DECODER)
    state = jax.eval_shape(lambda p: new_state(p, optax.identity()), params)
    step = gradients(CAUSAL_LM, model, accumulation=accumulation)
    traced = jax.make_jaxpr(lambda state, batch: step(state, None, 0, batch, True))(state, batch)
    rounded = list(rounded_kernels(traced.jaxpr))
    of_one, of_all = HIDDEN * INNER, LAYERS * HIDDEN * INNER
    # Gate, input and output of the feed-forward layer.
    assert rounded == ([((LAYERS,), of_one)] * 3 if accumulation == 1 else [((), of_all)] * 3)
