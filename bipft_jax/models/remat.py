"""Rematerialisation policies: what an encoder layer keeps for its backward pass."""

from __future__ import annotations

from typing import Any

import jax

from bipft_jax.errors import unknown_name
from bipft_jax.models.activations import ACTIVATION_INPUT
from bipft_jax.models.attention import PROJECTION
from bipft_jax.models.layers import LINEAR_INPUT
from bipft_jax.models.normalization import NORM_INPUT, NORM_STATISTICS
from bipft_jax.models.recipes import Recipe
from bipft_jax.quantization.binary_dot import CODES

REMAT_POLICIES = ("none", "lean", "dots", "full")


def saved(policy: str, recipe: Recipe) -> Any:
    """A policy for `jax.checkpoint`; None keeps everything.

    policy:
      none: keeps all residuals of differentiation.
      lean: keeps the codes of binarised operands, one byte per element, and the inputs of
        unquantised linears and of LayerNorm. Recomputes attention's scores and probabilities
        (except BiBERT's, whose codes are kept), dropout and everything elementwise. Also recomputes
        the input of the activation function if it is a product of codes: on a TPU that takes no
        longer than writing and reading it.
      dots: keeps results of matrix products without batch dimensions.
      full: keeps only the layer's input.

    Raises: ValueError for an unknown policy.
    """
    if policy not in REMAT_POLICIES:
        raise unknown_name("remat policy", policy, REMAT_POLICIES)
    if policy == "lean":
        names = [CODES, LINEAR_INPUT, PROJECTION, NORM_INPUT, NORM_STATISTICS]
        if recipe.linear_input is None or recipe.weight is None:
            names.append(ACTIVATION_INPUT)
        return jax.checkpoint_policies.save_only_these_names(*names)
    return {
        "none": None,
        "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
        "full": jax.checkpoint_policies.nothing_saveable,
    }[policy]
