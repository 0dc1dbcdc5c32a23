"""What the configs of runs that are compared have in common, and in what they differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from bipft_jax.checkpoints.workdir import ADDED_SINCE

# Keys that change how a run is computed, not what.
COMPUTED = frozenset(
    "mesh data_workers log_every profile_steps keep_every compute backward remat "
    "scan_layers".split()
)


def setting(config: Mapping[str, Any]) -> dict[str, Any]:
    """A run's config without its seed and what only computes it, by dotted key; keys that the
    version of the run lacked have the value that it had."""
    kept = {key: value for key, value in config.items() if key not in COMPUTED | {"seed"}}
    flat = flatten_dict(kept, sep=".")
    return {**{k: v for k, v in ADDED_SINCE.items() if k not in COMPUTED}, **flat}


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose values are not the same in all settings, in alphabetical order."""
    keys = {key for each in settings for key in each}
    return sorted(
        key for key in keys if any(each.get(key) != settings[0].get(key) for each in settings)
    )
