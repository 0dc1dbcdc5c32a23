"""Everything has the type that it is given by name, whatever JAX's default types are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipft_jax.models.bert import SEQUENCE_INPUTS
from bipft_jax.models.parameters import named_leaves
from bipft_jax.models.recipes import BertConfig, recipe_named
from bipft_jax.objectives.mlm_nsp import measure
from bipft_jax.training import step as steps
from bipft_jax.training.optimizer import adamw, bert_adam, linear_schedule
from bipft_jax.training.state import abstract_state
from tests.objectives import abstract_params, objective


def whole(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def real(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


SEQUENCES = {name: whole(4, 8) for name in SEQUENCE_INPUTS}
PRETRAINING = SEQUENCES | dict(
    mlm_positions=whole(4, 2), mlm_ids=whole(4, 2), mlm_weights=real(4, 2), nsp_labels=whole(4)
)
FINETUNING = SEQUENCES | dict(labels=whole(4), weights=real(4))


@pytest.mark.parametrize(
    ("dtype", "x64"),
    [("float32", False), ("float32", True), ("bfloat16", False), ("bfloat16", True),
     ("float64", True)],
)  # fmt: skip
@pytest.mark.parametrize("recipe", ["fp", "bipft_b", "bit_w1a2", "bibert"])
def test_parameters_moments_and_metrics_are_float32(recipe, dtype, x64):
    config = BertConfig(recipe_named(recipe, lora_rank=2), 11, 2, 8, 2, 16, 8, dtype=dtype)
    rate = linear_schedule(1e-3, 2, 10)
    with jax.enable_x64(x64):
        for classes, optimizer in (
            (0, adamw(rate, weight_decay=0.1, clip_norm=1.0)),
            (2, bert_adam(rate, scale_schedule=rate, weight_decay=0.1)),
        ):
            state = abstract_state(abstract_params(config, classes), optimizer)
            learned = objective(classes)
            model, batch = learned.model(config), FINETUNING if classes else PRETRAINING
            update = steps.update(learned, model, optimizer, accumulation=2)
            new, metrics = jax.eval_shape(
                lambda s, b, u=update: u(s, None, 0, b, True), state, batch
            )
            if not classes:
                evaluate = steps.evaluation_step(learned, model, measure(np.zeros(11, np.int64)))
                metrics |= jax.eval_shape(evaluate, new.params, batch)
            for name, leaf in named_leaves(new).items():
                assert leaf.dtype in (jnp.float32, jnp.int32), name
            before = [leaf.dtype for leaf in jax.tree.leaves(state)]
            assert [leaf.dtype for leaf in jax.tree.leaves(new)] == before
            if dtype != "float64":  # whose losses are as wide
                assert {name: str(leaf.dtype) for name, leaf in metrics.items()} == dict.fromkeys(
                    metrics, "float32"
                )
        assert rate(jnp.int32(3)).dtype == jnp.float32


def test_types_and_axes_must_be_named():
    """In tests: `conftest.py` asks for it by environment, which JAX reads once."""
    with pytest.raises(jax.dtypes.TypePromotionError):
        jnp.ones(3) + jnp.arange(3)
    with pytest.raises(ValueError, match="could not be broadcast together"):
        jnp.ones((2, 3)) + jnp.ones(3)
