"""A packed model, ready to answer."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from bipft_runtime import library
from bipft_runtime.compiled_encoder import CompiledEncoder
from bipft_runtime.file import PackedModel, read
from bipft_runtime.numpy_encoder import NumpyEncoder
from bipft_runtime.tokens import Tokenizer, Tokens

Text = str | tuple[str, str]  # a pair for a task on two sentences


class Prediction(NamedTuple):
    """An answer. label and probabilities: of a classifier; score: of a regression, else None."""

    label: str | None
    probabilities: dict[str, float]
    score: float | None


class Encoding(NamedTuple):
    """hidden: float32 [tokens, H], the last layer's; pooled: float32 [H], of the first token."""

    hidden: np.ndarray
    pooled: np.ndarray


class Model:
    """A packed encoder with its tokenizer and, if it has one, its classifier."""

    def __init__(self, path: str | os.PathLike[str], threads: int = 1) -> None:
        """threads: that share a text, where the kernels are compiled; of a short one at most one
        for every 8 tokens works. They change no bit of an answer.

        Raises: ModelFileError (a ValueError) for a file that is no packed model, or a damaged
          one; FileNotFoundError; ValueError for an instruction set in the environment variable
          BIPFT_RUNTIME_ISA that this machine lacks.
        """
        packed = read(path)
        self.architecture, self.task, self.source = (
            packed.architecture,
            packed.task,
            packed.source,
        )
        self._tokenizer = Tokenizer(packed.tokenizer)
        self._encoder = _encoder(packed, threads)
        if self.architecture.outputs:
            self._kernel = packed.tensors["classifier.kernel"]
            self._bias = packed.tensors["classifier.bias"]

    @property
    def instruction_set(self) -> str:
        """What computes: "avx512", "avx2", "neon", "portable", or "numpy" without a library."""
        return getattr(self._encoder, "instruction_set", "numpy")

    def predict(self, texts: Iterable[Text]) -> list[Prediction]:
        """The answer to each text (a pair of texts for a task on pairs), in order.

        Raises: ValueError for a bare encoder, or a text where the task takes a pair or vice versa.
        """
        return list(self.predictions(texts))

    def predictions(self, texts: Iterable[Text]) -> Iterator[Prediction]:
        """Yields the answers one by one."""
        if not self.architecture.outputs:
            raise ValueError("this file has no classifier: use encode")
        for tokens in self._tokens(texts):
            _, pooled = self._encoder(tokens.ids, tokens.segments)
            yield self._answer(self._kernel @ pooled + self._bias)

    def encode(self, texts: Iterable[Text]) -> list[Encoding]:
        """The hidden states and the pooled vector of each text, in order."""
        return [
            Encoding(*self._encoder(tokens.ids, tokens.segments)) for tokens in self._tokens(texts)
        ]

    def _answer(self, logits: np.ndarray) -> Prediction:
        if not self.task.labels:
            return Prediction(None, {}, float(logits[0]))
        exponentials = np.exp(logits - logits.max())
        probabilities = exponentials / exponentials.sum()
        by_label = dict(zip(self.task.labels, map(float, probabilities), strict=True))
        return Prediction(self.task.labels[int(logits.argmax())], by_label, None)

    def _tokens(self, texts: Iterable[Text]) -> Iterator[Tokens]:
        if isinstance(texts, str):
            raise ValueError("give a list of texts, not one text")
        for number, text in enumerate(texts):
            first, second = _sentences(number, text)
            if self.architecture.outputs and (second is None) != (self.task.sentences == 1):
                takes = "one text" if self.task.sentences == 1 else "a pair of texts"
                raise ValueError(f"text {number}: task {self.task.name} takes {takes}")
            tokens = self._tokenizer.example(first, second, self.task.max_length)
            if tokens.cut:
                warnings.warn(
                    f"text {number} has more than {self.task.max_length} tokens and was cut",
                    stacklevel=3,
                )
            yield tokens


def _sentences(number: int, text: Text) -> tuple[str, str | None]:
    """Raises ValueError for anything but a text or a pair of texts, in Unicode."""
    parts = [text] if isinstance(text, str) else text
    if not (
        isinstance(parts, (list, tuple))
        and len(parts) in (1, 2)
        and all(isinstance(part, str) for part in parts)
    ):
        raise ValueError(f"text {number} is {text!r}: it must be a text or a pair of texts")
    for part in parts:
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"text {number} is not valid Unicode ({error.reason})") from error
    return parts[0], parts[1] if len(parts) == 2 else None


def _encoder(packed: PackedModel, threads: int) -> CompiledEncoder | NumpyEncoder:
    if library.loaded() is not None:
        return CompiledEncoder(packed, threads)
    if name := os.environ.get(library.ISA_VARIABLE):
        raise ValueError(f"{library.ISA_VARIABLE}={name}: {library.MISSING}")
    _say_once()
    return NumpyEncoder(packed)


@functools.cache
def _say_once() -> None:
    warnings.warn(
        f"NumPy answers, many times slower: {library.MISSING}", RuntimeWarning, stacklevel=4
    )
