"""Encoders as Hugging Face directories: a BERT, or a binary model of this library or the
references."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bipft_jax.checkpoints.source import Source
from bipft_jax.data.glue.own_tasks import task_of_run
from bipft_jax.interop.config_file import (
    CONFIG_NAME,
    DIMENSION_KEYS,
    OWN_TYPE,
    nameless_labels,
    read_classes,
    read_config,
    read_labels,
)
from bipft_jax.interop.encoder_card import encoder_card, heads
from bipft_jax.interop.family import Family, Storage, Written
from bipft_jax.interop.tokenizer_files import read_tokenizer
from bipft_jax.interop.torch_weights import (
    WORDS,
    from_state_dict,
    known_unused,
    slots,
    to_state_dict,
    usual_names,
    with_uninitialised_scales,
    without_surplus_rows,
)
from bipft_jax.interop.weight_files import read_weights
from bipft_jax.models.parameters import is_scale, named_leaves
from bipft_jax.models.recipes import RECIPES, architecture
from bipft_jax.objectives.classification import classification
from bipft_jax.objectives.mlm_nsp import MLM_NSP

_POOLER, _MLM, _NSP = "bert.pooler.", "cls.predictions.", "cls.seq_relationship."


def _read(
    directory: Path, described: Mapping[str, Any], recipe: str | None
) -> tuple[Source, list[str]]:
    """`Family.read`.

    Absent heads, and an absent pooler that no head needs, are the source's `missing`. A learned
    scale of exactly 1, which the references treat as uninitialised, becomes NaN, which `calibrate`
    initialises (SPEC 1.4).
    """
    config_path = directory / CONFIG_NAME
    tokenizer, added = read_tokenizer(directory)
    path, state = read_weights(directory)
    try:
        state = usual_names(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    config = read_config(described, recipe, state, path, config_path)
    rows = len(np.atleast_1d(state.get(WORDS, np.zeros(config.vocab_size))))
    if config.vocab_size not in (rows, tokenizer.vocab_size) or rows < tokenizer.vocab_size:
        raise ValueError(
            f"{config_path}: vocab_size is {config.vocab_size}, but the vocabulary has "
            f"{tokenizer.vocab_size} pieces and the embedding {rows} rows: they belong to "
            "different models"
        )
    surplus = rows - tokenizer.vocab_size  # from rounding up or from added tokens
    state = without_surplus_rows(state, tokenizer.vocab_size)
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    classes = read_classes(described, state, config_path)
    objective = classification(classes) if classes else MLM_NSP
    absent = _absent(state, classes)
    params, _ = from_state_dict(
        state,
        config,
        objective,
        optional=lambda name: name.startswith(absent),
        source=str(path),
    )
    of_model = {slot.path for slot in slots(config, objective).values()}
    source = Source(
        workdir=str(directory),
        step=0,
        params=params if OWN_TYPE in described else with_uninitialised_scales(params),
        architecture=architecture(config),
        objective=objective,
        tokenizer=tokenizer,
        missing=tuple(sorted(of_model - set(named_leaves(params)))),
        run={
            "program": "import",
            "weights": str(path),
            "recipe": config.recipe.name,
            "labels": read_labels(described, classes, config_path),
            **({"surplus_rows": surplus, "added_tokens": added} if surplus else {}),
        },
    )
    return source, known_unused(state, config, objective)


def _written(source: Source, storage: Storage) -> Written:
    """`Family.written`."""
    if storage != Storage():
        raise ValueError(
            f"{source.workdir} holds an encoder, which is written with latent float32 weights only "
            "(python -m bipft_jax.interop.pack writes a file of bits)"
        )
    config = source.config()
    state = to_state_dict(source.params, config, source.objective, source.missing)
    return Written(_described(source), state, config.max_positions)


def _loader(source: Source) -> str | None:
    """The class of `transformers` with exactly this model's heads; None if it is no plain BERT."""
    if source.config().recipe != RECIPES["fp"]:
        return None
    if source.objective.outputs:
        return "BertForSequenceClassification"
    match heads(source):
        case ["MLM", "NSP"]:
            return "BertForPreTraining"
        case ["MLM"]:
            return "BertForMaskedLM"
        case ["NSP"]:
            return "BertForNextSentencePrediction"
    return "BertModel"


def _absent(state: Mapping[str, np.ndarray], classes: int) -> tuple[str, ...]:
    """Name prefixes of heads, and of the pooler, that are absent as a whole. A part with any array
    must have all of them."""
    optional = [_MLM, _NSP]
    if not classes and not any(name.startswith(_NSP) for name in state):
        optional.append(_POOLER)
    return tuple(part for part in optional if not any(name.startswith(part) for name in state))


def _described(source: Source) -> dict[str, Any]:
    """The content of config.json."""
    config, own_class = source.config(), _loader(source)
    described = {
        "model_type": "bert" if own_class else OWN_TYPE,
        **{theirs: getattr(config, ours) for ours, theirs in DIMENSION_KEYS.items()},
        "pad_token_id": source.tokenizer.pad_id,
        OWN_TYPE: source.architecture,
    }
    if own_class:
        described |= {
            "architectures": [own_class],
            "hidden_act": config.recipe.ffn_activation,
            "position_embedding_type": "absolute",
        }
    if source.objective.outputs:
        labels = _labels(source)
        regression = source.objective.outputs == 1
        described |= {
            "problem_type": "regression" if regression else "single_label_classification",
            "id2label": {str(number): label for number, label in enumerate(labels)},
            "label2id": {label: number for number, label in enumerate(labels)},
        }
    return described


def _labels(source: Source) -> list[str]:
    """The label names of the task in the run's record, else Hugging Face's default names."""
    task = task_of_run(source.run)
    if task is not None and task.label_names is not None:
        return list(task.label_names)
    return source.run.get("labels") or nameless_labels(source.objective.outputs)


def _summary(source: Source) -> list[str]:
    """`Family.summary`."""
    flat = named_leaves(source.params)
    described = source.architecture
    lines = [
        f"recipe      {described['recipe']}, estimator rank {described['estimator_rank']}, "
        f"lora rank {described['lora_rank']}",
        f"size        {described['layers']} layers x {described['hidden']}, "
        f"{described['heads']} heads, vocabulary of {described['vocab_size']:,}",
        f"parameters  {sum(leaf.size for leaf in flat.values()):,}",
        f"heads       {', '.join(heads(source)) or 'none'}",
    ]
    if source.objective.outputs:
        lines[-1] += f" with {source.objective.outputs} outputs"
        if source.run.get("labels"):
            lines[-1] += f": {', '.join(source.run['labels'])}"
    if source.missing:
        lines.append(f"missing     {', '.join(source.missing)}: new where a run needs them")
    uninitialised = sum(np.isnan(leaf).sum() for path, leaf in flat.items() if is_scale(path))
    if uninitialised:
        lines.append(
            f"scales      {uninitialised} were never initialised: a run's first batch does it"
        )
    return lines


ENCODERS = Family(
    model_types=("bert", OWN_TYPE),
    recipes=RECIPES,
    read=_read,
    written=_written,
    loader=_loader,
    card=encoder_card,
    summary=_summary,
)
