"""Validation of config keys by one table, before anything is loaded or claimed.

`KEYS` has the keys of configs/pretrain.py and configs/finetune.py, whose comments document them. A
key's rule refuses values that no run can use. Conditions that involve another key, a corpus, a
checkpoint or the devices are checked where these are known.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ml_collections
import numpy as np
from flax.traverse_util import flatten_dict

from bipft_jax.errors import unknown_name
from bipft_jax.models.decoder_recipes import (
    DECODER_RECIPES,
    DECODER_SIZES,
    GATES,
    NORM_PLACES,
)
from bipft_jax.models.recipes import RECIPES, SIZES
from bipft_jax.models.remat import REMAT_POLICIES
from bipft_jax.objectives.table import OBJECTIVES
from bipft_jax.objectives.task_distillation import DISTILLATIONS
from bipft_jax.quantization.arithmetic import BACKWARD_MODES, COMPUTE_MODES
from bipft_jax.training.profiling import profile_range

ALL_TASKS = "all"  # the task name that means all tasks of the benchmark

_INT32 = 2**31  # seeds and steps are int32 on the devices

# (key, value) -> None; raises ValueError, which names the key, for an invalid value.
Rule = Callable[[str, Any], None]


def whole(low: int) -> Rule:
    """An integer from `low` to 2**31 - 1."""

    def rule(name: str, value: Any) -> None:
        if type(value) is not int or not low <= value < _INT32:
            raise ValueError(
                f"{name} is {value!r}: it must be a whole number, {low} or more and below 2**31"
            )

    return rule


def number(
    low: float | None = None, *, above: float | None = None, below: float = math.inf
) -> Rule:
    """A number that is finite, at least `low` or more than `above`, and less than `below`, all as
    float32."""
    least = f"{low} or more" if above is None else f"more than {above}"
    wanted = f"a number, {least}" + (f" and less than {below}" if below < math.inf else "")

    def rule(name: str, value: Any) -> None:
        if type(value) in (int, float):
            with np.errstate(over="ignore"):
                value32 = np.float32(value)  # as a run uses it
            enough = value32 >= low if above is None else value32 > above
            if enough and value32 < below and np.isfinite(value32):
                return
        raise ValueError(f"{name} is {value!r}: it must be {wanted}")

    return rule


def one_of(kind: str, names: Iterable[str]) -> Rule:
    """One of `names` ("" means none); kind: what the names denote, for the message."""
    names = tuple(names)

    def rule(name: str, value: Any) -> None:
        if value not in names:
            raise unknown_name(kind, str(value), filter(None, names))

    return rule


def several(element: Rule, *, distinct: bool = False) -> Rule:
    """A tuple or list whose entries obey `element`; distinct: not empty and without duplicates."""

    def rule(name: str, value: Any) -> None:
        if not isinstance(value, (tuple, list)):
            raise ValueError(f"{name} is {value!r}: it must be a tuple")
        for entry in value:
            element(f"an entry of {name}", entry)
        if distinct and not value:
            raise ValueError(f"{name} is empty: give at least one, as --config.{name}='(0,)'")
        if distinct and len(set(value)) < len(value):
            raise ValueError(f"{name} is {value!r}: each may occur once")

    return rule


def truth(name: str, value: Any) -> None:
    """True or False."""
    if type(value) is not bool:
        raise ValueError(f"{name} is {value!r}: it must be True or False")


def text(name: str, value: Any) -> None:
    """Any string; whether a path exists is checked where it is read."""
    if type(value) is not str:
        raise ValueError(f"{name} is {value!r}: it must be text")


def directory_name(name: str, value: Any) -> None:
    """A name of a directory; that a task of the name exists is seen where it is read."""
    text(name, value)
    if not value or Path(value).name != value:
        raise ValueError(f"{name} is {value!r}: it must be the name of a task, not a path")


def updates(name: str, value: Any) -> None:
    """A string that `profile_range` accepts: "a:b" or ""."""
    text(name, value)
    profile_range(value)


_SHARED: dict[str, Rule] = {
    "recipe": one_of("recipe", RECIPES),
    "estimator_rank": whole(-1),
    "lora_rank": whole(0),
    "full_precision_weights": truth,
    "init_from": text,
    "teacher": text,
    "teacher_dropout": truth,
    "dropout": number(0, below=1),
    "dtype": one_of("dtype", ("float32", "bfloat16")),
    "compute": one_of("compute", COMPUTE_MODES),
    "backward": one_of("backward", BACKWARD_MODES),
    "batch_size": whole(1),
    "learning_rate": number(above=0),
    "weight_decay": number(0),
    "clip_norm": number(0),
    "max_skipped_updates": whole(1),
    "log_every": whole(1),
    "remat": one_of("remat policy", REMAT_POLICIES),
    "mesh.fsdp": whole(1),
    "mesh.tensor": whole(1),
    "accumulation": whole(1),
    "profile_steps": updates,
}

# Rules by program (the config key `program`), then by key; nested keys are dotted.
KEYS: dict[str, dict[str, Rule]] = {
    "pretrain": {
        **_SHARED,
        "objective": one_of("objective", [o.name for o in OBJECTIVES.values() if o.from_corpus]),
        "recipe": one_of("recipe", (*RECIPES, *DECODER_RECIPES)),
        "size": one_of("size", dict.fromkeys((*SIZES, *DECODER_SIZES))),
        "decoder.gate": one_of("gate", ("", *GATES)),
        "decoder.norm": one_of("place of norms", ("", *NORM_PLACES)),
        "decoder.groups": whole(1),
        "decoder.tied": truth,
        "decoder.rope_theta": number(0),
        "decoder.norm_epsilon": number(above=0, below=1),
        "decoder.separate_documents": truth,
        "fused_attention": truth,
        "scan_layers": truth,
        "corpus_dir": text,
        "seed": whole(0),
        "mlm_distillation": number(0),
        "masking_rate": number(above=0, below=1),
        "data_workers": whole(0),
        "unigram_bias": truth,
        "num_updates": whole(1),
        "warmup_updates": whole(0),
        "second_peak": number(0),
        "adam_b2": number(0, below=1),
        "adam_epsilon": number(above=0),
        "evaluate_every": whole(1),
        "evaluation_sequences": whole(0),
        "keep_every": whole(0),
    },
    "finetune": {
        **_SHARED,
        "pretrained": truth,
        "distillation": one_of("distillation", ("", *DISTILLATIONS)),
        "intermediate_recipes": several(one_of("recipe", RECIPES)),
        "score_mse": truth,
        "dropout_until_evaluation": truth,
        "task": directory_name,
        "glue_dir": text,
        "max_length": whole(3),
        "length_buckets": whole(1),
        "seeds": several(whole(0), distinct=True),
        "epochs": whole(0),
        "max_updates": whole(0),
        "optimizer": one_of("optimizer", ("adamw", "bert_adam")),
        "scale_learning_rate": number(0),
        "schedule": one_of("schedule", ("constant", "linear")),
        "evaluate_every": whole(0),
    },
}


def check_keys(config: ml_collections.ConfigDict, program: str | None = None) -> None:
    """Checks a config against `KEYS`, before anything is loaded or claimed.

    Arguments:
      program: the one that runs the config; None for the one that the config names.

    Raises: ValueError for a config of another program, an unknown or missing key, or the first
      invalid value; it names the key.
    """
    values = flatten_dict(config.to_dict(), sep=".")
    named = values.pop("program", None)
    one_of("program", [program] if program else KEYS)("program", named)
    rules = KEYS[named]
    for name in values:
        if name not in rules:
            near = difflib.get_close_matches(name, rules)
            hint = f": did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"unknown config key {name!r} (of configs/{named}.py){hint}")
    for name, rule in rules.items():
        if name not in values:
            raise ValueError(
                f"config key {name!r} is missing: begin with get_config() of configs/{named}.py"
            )
        rule(name, values[name])
