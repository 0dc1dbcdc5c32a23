"""Statistics of the quantizers for telemetry: flips of quantised weights, zeros among ternary ones,
learned scales, attended keys."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from bipft_jax.models.attention import ATTENDED_KEYS
from bipft_jax.models.parameters import Params, is_scale, is_stacked, named_leaves
from bipft_jax.models.weights_once import of_kernels
from bipft_jax.quantization.quantizers import Quantizer, TernaryMean


def binary_codes(
    params: Params, quantizer: Quantizer | None, groups: int = 1
) -> dict[str, jax.Array]:
    """The int8 codes of every quantised kernel.

    groups: of the recipe, in which kernels are quantised.

    Returns: codes by path, [layers, in, out] for stacked kernels, [1, in, out] for others; empty
      for full precision.
    """
    codes = of_kernels(params, quantizer, groups, lambda kernel, own: own.encode(kernel).codes)
    flat = named_leaves(params)
    return {
        path.rpartition("/")[0]: own.reshape(-1, *flat[path].shape[-2:])
        for path, own in codes.items()
    }


def flip_ratios(before: dict[str, jax.Array], after: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Fractions of weights whose code changed: `flip_ratio` of all, `flips/SITE/LAYER` of one."""
    changed = {
        site: jnp.mean((codes != after[site]).astype(jnp.float32), axis=(1, 2))
        for site, codes in before.items()
    }
    if not changed:
        return {}
    return {"flip_ratio": _of_all(changed, before), **_per_layer("flips", changed)}


def zero_ratios(codes: dict[str, jax.Array], quantizer: Quantizer | None) -> dict[str, jax.Array]:
    """Fractions of ternary weights whose code is 0: `zero_ratio` of all, `zeros/SITE/LAYER` of one.
    Empty for other weights, of which almost none has the code 0.

    codes: of `binary_codes`, by this quantizer.
    """
    if not isinstance(quantizer, TernaryMean):
        return {}
    zeros = {
        site: jnp.mean((own == 0).astype(jnp.float32), axis=(1, 2)) for site, own in codes.items()
    }
    return {"zero_ratio": _of_all(zeros, codes), **_per_layer("zeros", zeros)}


def _of_all(fractions: dict[str, jax.Array], codes: dict[str, jax.Array]) -> jax.Array:
    """The fraction of all weights, from those of the layers of each site."""
    total = sum(own.size for own in codes.values())
    return sum(jnp.mean(part) * (codes[site].size / total) for site, part in fractions.items())


def scales(params: Params) -> dict[str, jax.Array]:
    """Every learned scale, as `scales/SITE/LAYER`."""
    flat = named_leaves(params)
    scales = {path: jnp.atleast_1d(value) for path, value in flat.items() if is_scale(path)}
    return _per_layer("scales", scales)


def attended_keys(statistics: dict[str, Any]) -> dict[str, jax.Array]:
    """From a model's STATISTICS: `attended_keys`, the mean of all layers, and
    `attended_keys/LAYER`."""
    collected = [v for path, v in flatten_dict(statistics).items() if path[-1] == ATTENDED_KEYS]
    if not collected:  # full precision
        return {}
    (layers,) = collected
    by_layer = {f"{ATTENDED_KEYS}/{index}": layers[index] for index in range(layers.shape[0])}
    return {ATTENDED_KEYS: jnp.mean(layers), **by_layer}


def _per_layer(kind: str, values: dict[str, jax.Array]) -> dict[str, Any]:
    named = {}
    for site, layers in values.items():
        name = site.removeprefix("bert/").replace("encoder/layers/", "").removeprefix("layers/")
        for index in range(layers.shape[0]):
            named[f"{kind}/{name}" + (f"/{index}" if is_stacked(site) else "")] = layers[index]
    return named
