"""The encoder in compiled kernels: the answers of `NumpyEncoder`, many times faster."""

from __future__ import annotations

import os
import weakref

import numpy as np

from bipft_runtime import library
from bipft_runtime.architecture import Architecture
from bipft_runtime.file import PackedModel


class CompiledEncoder:
    """The forward pass of one sequence at a time, without padding.

    Rounding aside, results are those of `NumpyEncoder`; they are the same bits for all numbers of
    threads and all instruction sets. The tensors are copied: the packed model is not kept.
    """

    def __init__(
        self, model: PackedModel, threads: int = 1, instruction_set: str | None = None
    ) -> None:
        """threads: that share a sequence. instruction_set: one of `library.instruction_sets`;
        without it that of the environment variable BIPFT_RUNTIME_ISA, or else the fastest.

        Raises: ValueError for an instruction set that is unknown or that this processor lacks, or
          where there is no compiled library.
        """
        self._library = library.loaded()
        if self._library is None:
            raise ValueError(library.MISSING)
        name = instruction_set
        if name is None:
            name = os.environ.get(library.ISA_VARIABLE, "")
        if name and name not in library.instruction_sets():
            where = f"{library.ISA_VARIABLE}=" if instruction_set is None else "instruction set "
            raise ValueError(
                f"{where}{name}: this processor and library have "
                f"{', '.join(library.instruction_sets())}"
            )
        if threads < 1:
            raise ValueError(f"threads is {threads}: at least 1")
        tensors = [
            (tensor_name.encode(), np.ascontiguousarray(tensor))
            for tensor_name, tensor in model.tensors.items()
        ]
        rows = (library.Tensor * len(tensors))(
            *(library.Tensor(key, value.ctypes.data, value.nbytes) for key, value in tensors)
        )
        self._threads, self._hidden = threads, model.architecture.hidden
        self._handle = library.new_model(shape_of(model.architecture), rows, name)
        weakref.finalize(self, self._library.bipft_delete, self._handle)

    @property
    def instruction_set(self) -> str:
        """The one in use."""
        return self._library.bipft_instruction_set(self._handle).decode()

    def __call__(self, ids: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids, segments: int32 [tokens] -> (hidden [tokens, H], pooled [H]), float32.

        Raises: ValueError for an id, a segment or a number of tokens that the model has not.
        """
        ids, segments = _integers(ids), _integers(segments, like=ids)
        hidden, pooled = self._empty(len(ids)), np.empty(self._hidden, np.float32)
        self._call("encode", ids, segments, len(ids), self._threads, hidden, pooled)
        return hidden, pooled

    def embedded(self, ids: np.ndarray, segments: np.ndarray) -> np.ndarray:
        """The input of the first layer, float32 [tokens, H]."""
        ids, segments = _integers(ids), _integers(segments, like=ids)
        hidden = self._empty(len(ids))
        self._call("embed", ids, segments, len(ids), hidden)
        return hidden

    def layer(self, number: int, x: np.ndarray) -> np.ndarray:
        """One layer: [tokens, H] -> [tokens, H]."""
        x = self._floats(x)
        after = np.empty_like(x)
        self._call("layers", number, number + 1, x, len(x), self._threads, after)
        return after

    def pooled(self, x: np.ndarray) -> np.ndarray:
        """The pooled first token, [H]."""
        pooled = np.empty(self._hidden, np.float32)
        self._call("pool", self._floats(x), pooled)
        return pooled

    def _empty(self, tokens: int) -> np.ndarray:
        return np.empty((tokens, self._hidden), np.float32)

    def _floats(self, x: np.ndarray) -> np.ndarray:
        if x.ndim != 2 or x.shape[1] != self._hidden or not len(x):
            raise ValueError(f"hidden states of shape {x.shape}, not [tokens, {self._hidden}]")
        return np.ascontiguousarray(x, np.float32)

    def _call(self, name: str, *arguments: int | np.ndarray) -> None:
        function = getattr(self._library, f"bipft_{name}")
        plain = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
        library.checked(function, self._handle, *plain)


def _integers(values: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
    values = np.ascontiguousarray(values, np.int32)
    if values.ndim != 1 or (like is not None and values.shape != like.shape):
        raise ValueError(f"ids or segments of shape {values.shape}: one row of equal length")
    return values


def shape_of(a: Architecture) -> library.Architecture:
    """The architecture as the library takes it."""
    numbers = {
        name: getattr(a, name) for name, _ in library.Architecture._fields_ if hasattr(a, name)
    }
    return library.Architecture(
        **numbers,
        scales_per_output=a.weight_scales == "output",
        relu=a.ffn_activation == "relu",
        layernorm_residual=a.pooler == "layernorm_residual",
    )
