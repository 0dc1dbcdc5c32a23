"""What a packed file says of its model: dimensions, places of quantisers, and hence its tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

HIDDEN_LINEARS = ("query", "key", "value", "attention_output")  # [hidden, hidden]
LINEARS = (*HIDDEN_LINEARS, "ffn_input", "ffn_output")
ATTENTION_SCALES = ("query_scale", "key_scale", "value_scale", "probs_scale")
LARGEST = 2**24  # of any dimension: products of three stay far below 2**63 bytes


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A 1-bit BERT encoder. All weights of linears and word embeddings are 1-bit.

    recipe: its name, for people. weight_scales: "tensor", one scale for each matrix, or "output",
    one for each output channel. learned_scales: whether inputs, queries, keys, values and
    probabilities have learned scales (else 1, and probabilities are 1 where a score is positive).
    shifted_input: whether a shift is added to each linear's input. softmax: whether attention
    applies it. ffn_activation: "gelu" (erf) or "relu". unsigned_ffn: whether the second
    feed-forward linear's input has codes 0 and 1 instead of -1 and 1. pooler: "tanh" or
    "layernorm_residual". estimator_rank: of BiPFT-B's estimators, 0 for none. outputs: of the
    classifier, 0 for a bare encoder.
    """

    recipe: str
    layers: int
    hidden: int
    heads: int
    intermediate: int
    vocab_size: int
    max_positions: int
    segment_types: int
    epsilon: float
    weight_scales: str
    learned_scales: bool
    shifted_input: bool
    softmax: bool
    ffn_activation: str
    unsigned_ffn: bool
    pooler: str
    estimator_rank: int
    outputs: int

    def __post_init__(self):
        """Raises ValueError naming the field that is wrong."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value).__name__ != field.type:
                raise ValueError(f"{field.name} is {value!r}, not of type {field.type}")
        smallest = {"estimator_rank": 0, "outputs": 0}
        for name, value in self.dimensions().items():
            least = smallest.get(name, 1)
            if not least <= value <= LARGEST:
                raise ValueError(f"{name} is {value}, not from {least} to {LARGEST}")
        if self.hidden % self.heads:
            raise ValueError(f"hidden is {self.hidden}, not a multiple of {self.heads} heads")
        for name in ("hidden", "intermediate"):
            if getattr(self, name) % 8:
                raise ValueError(f"{name} is {getattr(self, name)}, not a multiple of 8")
        if not 0 < self.epsilon < 1:
            raise ValueError(f"epsilon is {self.epsilon}, not between 0 and 1")
        for name, known in (
            ("weight_scales", ("tensor", "output")),
            ("ffn_activation", ("gelu", "relu")),
            ("pooler", ("tanh", "layernorm_residual")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not {' or '.join(known)}")

    def dimensions(self) -> dict[str, int]:
        """The fields that are numbers of things."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.type == "int"}

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(outputs, inputs) of a linear of a layer, or of the pooler."""
        h, inner = self.hidden, self.intermediate
        return {"ffn_input": (inner, h), "ffn_output": (h, inner)}.get(name, (h, h))

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The file's tensors: name -> (NumPy dtype, shape). Lists of zero codes (`*.zeros`) may
        come in addition."""
        h, layers = self.hidden, self.layers
        table = {"words.bits": ("uint8", (self.vocab_size, h // 8))}

        def add(name: str, *shape: int) -> None:
            table[name] = ("float32", shape)

        def add_norm(name: str, *stack: int) -> None:
            add(f"{name}.scale", *stack, h)
            add(f"{name}.bias", *stack, h)

        def add_linear(name: str, *stack: int) -> None:
            outputs, inputs = self.linear_shape(name.rpartition(".")[2])
            table[f"{name}.bits"] = ("uint8", (*stack, outputs, inputs // 8))
            per_output = (outputs,) if self.weight_scales == "output" else ()
            add(f"{name}.weight_scale", *stack, *per_output)
            add(f"{name}.bias", *stack, outputs)
            if self.learned_scales:
                add(f"{name}.input_scale", *stack)
            if self.shifted_input:
                add(f"{name}.input_shift", *stack, inputs)

        add("words.scale", self.vocab_size)
        add("positions", self.max_positions, h)
        add("segments", self.segment_types, h)
        add_norm("norm")
        for name in LINEARS:
            add_linear(f"layers.{name}", layers)
        if self.learned_scales:
            for name in ATTENTION_SCALES:
                add(f"layers.{name}", layers)
        for name in ("attention_norm", "ffn_norm"):
            add_norm(f"layers.{name}", layers)
        if self.estimator_rank:
            add("layers.estimators.kernel", layers, 4 * self.estimator_rank + 1, h)
            add("layers.estimators.bias", layers, 4 * self.estimator_rank + 1)
        add_linear("pooler")
        if self.pooler == "layernorm_residual":
            add_norm("pooler_norm")
        if self.outputs:
            add("classifier.kernel", self.outputs, h)
            add("classifier.bias", self.outputs)
        return table

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values; `Architecture(**value)` is the inverse."""
        return dataclasses.asdict(self)
