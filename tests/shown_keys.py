"""How a rehearsed run shows the keys that programs have in common.

A row gives what is seen of a run, and what its config says, which must be equal; None if this run
cannot show the key.
"""

from collections.abc import Callable
from typing import Any

import jax
import ml_collections

from bipft_jax.checkpoints.manager import restore_params
from bipft_jax.models.parameters import named_leaves
from tests.rehearsal import Rehearsal, Update

Row = Callable[[Rehearsal], tuple[Any, Any] | None]

LAYERS = "bert/encoder/layers"
KERNEL = f"{LAYERS}/ffn_input/kernel"  # [layers, hidden, 4 hidden]


def agree(row: Row, runs: dict[str, Rehearsal]) -> None:
    """Asserts that all runs do what they say, and say different things."""
    shown = {name: row(run) for name, run in runs.items()}
    shown = {name: pair for name, pair in shown.items() if pair is not None}
    for name, (seen, said) in shown.items():
        assert seen == said, f"the run {name!r} shows {seen} and says {said}"
    assert len({repr(said) for _, said in shown.values()}) > 1, "all runs have one value"


def _rank(update: Update, kernel: str) -> int:
    """Columns of a kernel; 0 if the model has none of that name."""
    name = f"{LAYERS}/attention/{kernel}/kernel"
    return update.params[name].shape[-1] if name in update.params else 0


def filled(params: dict[str, Any]) -> dict[str, float]:
    """The one value that a rehearsed run has in each of some kernels, by name."""
    names = (KERNEL, "nsp/kernel", "classifier/kernel")
    return {name: float(params[name].ravel()[0]) for name in names if name in params}


def filled_by(directory: str) -> dict[str, float]:
    """Those of a run's checkpoint."""
    return filled(named_leaves(restore_params(directory, "best").params))


def own_fill(seed: int) -> float:
    """The value of all that a rehearsed run draws for itself."""
    return 1.0 + seed


def is_binary(config: ml_collections.ConfigDict) -> bool:
    """Whether its linears have 1-bit weights."""
    return config.recipe != "fp" and not config.full_precision_weights


def _binarised(run: Rehearsal) -> bool:
    shape = run.first.params[KERNEL].shape[1:]
    # With several micro-batches, those of all layers at once.
    return any(e.invars[0].aval.shape[-2:] == shape for e in run.first.equations("sign"))


def _dropout_rates(update: Update) -> set[float]:
    """Of its masks: an element is kept if a random word reaches the rate times 2**32."""
    compared = [equation.invars[1] for equation in update.equations("ge")]
    words = {int(x.val) for x in compared if hasattr(x, "val") and x.aval.dtype == "uint32"}
    return {round(word / 2**32, 6) for word in words}


def _narrow_products(run: Rehearsal) -> tuple[Any, Any]:
    """Types other than float32 in products; "auto", which has a branch for every platform, shows
    them all, and is for recipes without codes only."""
    config = run.config
    seen = {str(x.aval.dtype) for e in run.first.equations("dot_general") for x in e.invars}
    said = {"int8"} if is_binary(config) and config.compute == "int8" else set()
    if "bfloat16" in (config.dtype, config.backward):
        said.add("bfloat16")
    return seen - {"float32"}, said


def _pooled_types(run: Rehearsal) -> set[str]:
    return {str(equation.outvars[0].aval.dtype) for equation in run.first.equations("tanh")}


def _teacher(run: Rehearsal) -> tuple[Any, Any]:
    said = filled_by(run.config.teacher) if run.config.teacher else {}
    return filled(run.first.teacher), said


def _skipping(run: Rehearsal) -> tuple[Any, Any]:
    """One more update may be made before the last that is skipped is looked at."""
    limit = run.config.max_skipped_updates
    return not run.whole and len(run.updates) in (limit, limit + 1), run.skipping


# What these recipes have: learned scales of activations, estimators, pooler with LayerNorm.
_PARTS = {
    "fp": (False, False, False),
    "bipft_a": (True, False, True),
    "bipft_b": (True, True, True),
    "bit_w1a1": (True, False, False),
}


def _parts(run: Rehearsal) -> tuple[bool, ...]:
    names = " ".join(run.first.params)
    return tuple(part in names for part in ("/input_scale", "_estimator/", "/pooler_norm/"))


def _kept_by_layers(run: Rehearsal) -> tuple[Any, Any]:
    """Of the values that have names for it, those that a layer keeps for its backward pass; None if
    it keeps everything."""
    said = {
        "none": None,
        "lean": {"codes", "linear_input", "norm_input", "norm_statistics", "projection"},
        "full": set(),
    }[run.config.remat]
    layers = [e for e in run.first.equations() if "policy" in e.params]
    if not layers:
        return None, said
    policy = layers[0].params["policy"] or jax.checkpoint_policies.nothing_saveable
    named = run.first.equations("name")
    seen = {e.params["name"] for e in named if policy(e.primitive, e.invars[0].aval, **e.params)}
    return seen, said


def _parts_of_kernel(run: Rehearsal) -> tuple[int, int]:
    """Into how many parts the devices split its two axes."""
    kernel = run.first.params[KERNEL]
    shape = kernel.sharding.shard_shape(kernel.shape)
    return kernel.shape[1] // shape[1], kernel.shape[2] // shape[2]


def _micro_batches(run: Rehearsal) -> tuple[Any, Any]:
    rows = {
        x.aval.shape[0]
        for e in run.first.equations("scan")
        for x in e.invars
        if str(x.aval.dtype) == "int32"
        and x.aval.shape[2:] == run.first.batch["input_ids"].shape[1:]
    }
    return rows, {run.config.accumulation} - {1}


SHARED: dict[str, Row] = {
    "recipe": lambda run: (_parts(run), _PARTS[run.config.recipe]),
    "estimator_rank": lambda run: (
        _rank(run.first, "query_residual_estimator"),
        {"bipft_b": 1}.get(run.config.recipe, 0)
        if run.config.estimator_rank < 0
        else run.config.estimator_rank,
    ),
    "lora_rank": lambda run: (_rank(run.first, "query_lora/down"), run.config.lora_rank),
    "full_precision_weights": lambda run: (_binarised(run), is_binary(run.config)),
    "teacher": _teacher,
    "dropout": lambda run: (_dropout_rates(run.first), {run.config.dropout} - {0.0}),
    "dtype": lambda run: (_pooled_types(run), {run.config.dtype}),
    "compute": _narrow_products,
    "backward": _narrow_products,
    "batch_size": lambda run: (
        {len(update.batch["input_ids"]) for update in run.updates},
        {run.config.batch_size},
    ),
    "max_skipped_updates": _skipping,
}

# What a device keeps and computes of an update, and when it is looked at.
DEVICES: dict[str, Row] = {
    "fused_attention": lambda run: (
        bool(run.first.equations("pallas_call")),
        run.config.fused_attention,
    ),
    "remat": _kept_by_layers,
    "scan_layers": lambda run: (
        max(e.params["unroll"] for e in run.first.equations("scan")) > 1,
        not run.config.scan_layers,
    ),
    "mesh.fsdp": lambda run: (_parts_of_kernel(run)[0], run.config.mesh.fsdp),
    "mesh.tensor": lambda run: (_parts_of_kernel(run)[1], run.config.mesh.tensor),
    "accumulation": _micro_batches,
    "profile_steps": lambda run: (":".join(map(str, run.traces)), run.config.profile_steps),
}
