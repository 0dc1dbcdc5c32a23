"""The packed model: one safetensors file. Reads it, and refuses whatever does not fit.

The tensors are those of `Architecture.tensors`. Bits are little-endian: bit i of a row is 1 where
the code of input i is +1, 0 where it is -1. A tensor NAME.zeros, int32, ascending, lists the flat
indices of weights with code 0, whose bit is 0; it is absent if there are none. Metadata (all JSON):
`format`, `version`, `architecture`, `tokenizer`, `task`, `source`, and `digest`, a SHA-256 of
everything else.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from bipft_runtime.architecture import Architecture

FORMAT, VERSION = "bipft-packed", "2"
BITS, ZEROS = ".bits", ".zeros"


class ModelFileError(ValueError):
    """A file that is no packed model, or a damaged one; the message says what is wrong."""


@dataclasses.dataclass(frozen=True)
class Task:
    """What the classifier answers.

    name: of the task; empty for a bare encoder. labels: the meaning of each output; empty for a
    score. sentences: 1 or 2 per example. max_length: tokens, special ones included; longer texts
    are cut.
    """

    name: str
    labels: tuple[str, ...]
    sentences: int
    max_length: int


@dataclasses.dataclass(frozen=True)
class PackedModel:
    """The contents of a file. source: where the weights come from, for people."""

    architecture: Architecture
    tensors: dict[str, np.ndarray]
    tokenizer: dict[str, Any]
    task: Task
    source: dict[str, Any]


def write(path: str | os.PathLike[str], model: PackedModel) -> None:
    """Writes the file, replacing an existing one.

    Raises: ModelFileError if the tensors do not fit the architecture.
    """
    metadata = {
        "architecture": json.dumps(model.architecture.as_json(), sort_keys=True),
        "tokenizer": json.dumps(model.tokenizer, sort_keys=True),
        "task": json.dumps(dataclasses.asdict(model.task), sort_keys=True),
        "source": json.dumps(model.source, sort_keys=True),
    }
    _check_tensors(model.architecture, model.tensors)
    digest = _digest(metadata, model.tensors)
    metadata = {"format": FORMAT, "version": VERSION, "digest": digest, **metadata}
    # Not `save_file`, whose files only their owner may read.
    Path(path).write_bytes(safetensors.numpy.save(model.tensors, metadata))


def read(path: str | os.PathLike[str]) -> PackedModel:
    """Reads a packed model.

    Raises: ModelFileError for a file of another kind or version, or one that is truncated, changed,
      or has tensors that do not fit its architecture or are not finite; FileNotFoundError.
    """
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            _check_format(metadata)
            architecture = _architecture(metadata)
            _check_names(architecture, set(file.keys()))
            tensors = {name: _tensor(file, name) for name in file.keys()}
        _check_tensors(architecture, tensors)
        texts = {name: metadata.get(name, "") for name in _TEXTS}
        if _digest(texts, tensors) != metadata.get("digest"):
            raise ModelFileError("its contents are not those that were written (digest)")
        task = _task(texts["task"], architecture)
        return PackedModel(
            architecture,
            tensors,
            _object("tokenizer", texts["tokenizer"]),
            task,
            _object("source", texts["source"]),
        )
    except ModelFileError as error:
        raise ModelFileError(f"{os.fspath(path)}: {error}") from error
    except safetensors.SafetensorError as error:
        raise ModelFileError(f"{os.fspath(path)}: not a safetensors file ({error})") from error


_TEXTS = ("architecture", "tokenizer", "task", "source")


def _tensor(file: Any, name: str) -> np.ndarray:
    try:
        return file.get_tensor(name)
    except (TypeError, AttributeError) as error:  # of types that NumPy lacks
        raise ModelFileError(f"{name}: {file.get_slice(name).get_dtype()} is not read") from error


def _check_format(metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ModelFileError("not a packed model: python -m bipft_jax.interop.pack makes one")
    if metadata.get("version") != VERSION:
        raise ModelFileError(
            f"format version {metadata.get('version')}, this runtime reads {VERSION}: install the "
            "runtime of that version, or pack the model again"
        )


def _object(name: str, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(f"metadata {name} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelFileError(f"metadata {name} is not a JSON object")
    return value


def _architecture(metadata: Mapping[str, str]) -> Architecture:
    fields = _object("architecture", metadata.get("architecture", ""))
    try:
        return Architecture(**fields)
    except (TypeError, ValueError) as error:
        raise ModelFileError(f"architecture: {error}") from error


def _task(text: str, architecture: Architecture) -> Task:
    fields = _object("task", text)
    try:
        task = Task(**{**fields, "labels": tuple(fields["labels"])})
        valid = (
            isinstance(task.name, str)
            and isinstance(fields["labels"], list)
            and len(set(task.labels)) == len(task.labels)
            and task.sentences <= architecture.segment_types
            and all(isinstance(label, str) for label in task.labels)
            and task.sentences in (1, 2)
            and type(task.max_length) is int
            and 2 * task.sentences + 1 <= task.max_length <= architecture.max_positions
        )
    except (TypeError, KeyError) as error:
        raise ModelFileError(f"task: {error}") from error
    # A score is one output without a label.
    if not valid or (len(task.labels) or min(architecture.outputs, 1)) != architecture.outputs:
        raise ModelFileError(f"task does not fit the architecture: {fields}")
    return task


def _check_names(architecture: Architecture, names: set[str]) -> None:
    expected = architecture.tensors()
    zeros = {name.removesuffix(BITS) + ZEROS for name in expected if name.endswith(BITS)}
    if missing := sorted(expected.keys() - names):
        raise ModelFileError(f"no tensor {missing[0]}")
    if unexpected := sorted(names - expected.keys() - zeros):
        raise ModelFileError(f"unexpected tensor {unexpected[0]}")


def _check_tensors(architecture: Architecture, tensors: Mapping[str, np.ndarray]) -> None:
    _check_names(architecture, set(tensors))
    expected = architecture.tensors()
    for name, tensor in tensors.items():
        if name.endswith(ZEROS):
            bits = tensors[name.removesuffix(ZEROS) + BITS]
            ascending = tensor.ndim == 1 and bool((np.diff(tensor) > 0).all())
            if tensor.dtype != np.int32 or not ascending or tensor.size == 0:
                raise ModelFileError(f"{name}: not an ascending list of int32")
            if tensor[0] < 0 or tensor[-1] >= 8 * bits.size:
                raise ModelFileError(f"{name}: an index outside {name.removesuffix(ZEROS)}{BITS}")
            continue
        dtype, shape = expected[name]
        if (tensor.dtype, tensor.shape) != (np.dtype(dtype), shape):
            raise ModelFileError(
                f"{name}: {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)}"
            )
        if dtype != "uint8" and not np.isfinite(tensor).all():
            raise ModelFileError(f"{name}: NaN or infinite")
        if name.endswith("_scale") and (tensor < 0).any():
            raise ModelFileError(f"{name}: a negative scale")


def _digest(metadata: Mapping[str, str], tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 (hex) of metadata and tensors, in the order of their names."""
    digest = hashlib.sha256()
    for name in sorted(metadata):
        digest.update(f"{name} {len(metadata[name])} {metadata[name]}".encode())
    for name in sorted(tensors):
        tensor = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.data if math.prod(tensor.shape) else b"")
    return digest.hexdigest()
