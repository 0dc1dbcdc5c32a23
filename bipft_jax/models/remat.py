"""What an encoder layer keeps for its backward pass, by the names that `remat` takes."""

from __future__ import annotations

from typing import Any

import jax

from bipft_jax.models.activations import ACTIVATION_INPUT
from bipft_jax.models.attention import PROJECTION
from bipft_jax.models.layers import LINEAR_INPUT
from bipft_jax.models.normalization import NORM_INPUT, NORM_STATISTICS
from bipft_jax.quantization.binary_dot import CODES

# "none": everything that the rules of differentiation ask for. "lean": one byte an element of what
# was binarised, the inputs of linears that were not, and of LayerNorm and the activation function;
# attention's scores and probabilities, dropout and everything elementwise are made again. "dots":
# results of matrix products without batch dimensions. "full": only the layer's input.
REMAT_POLICIES: dict[str, Any] = {
    "none": None,
    "lean": jax.checkpoint_policies.save_only_these_names(
        CODES, LINEAR_INPUT, PROJECTION, NORM_INPUT, NORM_STATISTICS, ACTIVATION_INPUT
    ),
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
    "full": jax.checkpoint_policies.nothing_saveable,
}
