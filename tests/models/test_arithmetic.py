"""The arithmetic of a whole model's update: the same forward, nearly the same backward."""

import dataclasses

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from bipft_jax.benchmarks.workload import Workload
from bipft_jax.models.bert import BertForPreTraining
from bipft_jax.objectives.losses import counts_of, pretraining_loss
from bipft_jax.objectives.mlm_nsp import MLM_NSP

WORKLOAD = Workload("tiny", 8, 64, "float32", vocab_size=500, backward="float32")


def test_changes_no_bit_forward_and_little_backward():
    batch = WORKLOAD.arrays("bipft_b")
    params = WORKLOAD.state(WORKLOAD.config("bipft_b", "float32")).params

    def run(compute, backward):
        workload = dataclasses.replace(WORKLOAD, backward=backward)
        model = BertForPreTraining(workload.config("bipft_b", compute))

        def loss(params):
            rngs = {"dropout": jax.random.key(0)}
            inputs = MLM_NSP.model_inputs(batch)
            out = model.apply({"params": params}, *inputs, deterministic=False, rngs=rngs)
            return pretraining_loss(out, batch, counts_of(batch))[0], out.hidden_states

        gradients, states = jax.jit(jax.grad(loss, has_aux=True))(params)
        return np.asarray(states), flatten_dict(gradients, sep="/")

    states, gradients = run("float32", "float32")
    largest = max(np.linalg.norm(gradient) for gradient in gradients.values())
    # Some are 0 but for rounding: softmax does not see what is added to all scores of a query.
    gradients = {n: g for n, g in gradients.items() if np.linalg.norm(g) > 1e-5 * largest}
    assert len(gradients) > 30

    for compute, backward, bound in (("int8", "float32", 1e-5), ("bfloat16", "bfloat16", 1e-2)):
        other_states, other = run(compute, backward)
        np.testing.assert_array_equal(other_states, states)
        errors = {
            name: np.linalg.norm(other[name] - gradient) / np.linalg.norm(gradient)
            for name, gradient in gradients.items()
        }
        worst = max(errors, key=errors.get)
        assert errors[worst] < bound, (compute, backward, worst, errors[worst])
        assert (errors[worst] > 1e-4) == (backward == "bfloat16")
