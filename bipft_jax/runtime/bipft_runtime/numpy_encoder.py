"""The encoder in NumPy: the reference of the compiled kernels, and what runs without a compiler.

A product of codes is a float32 matrix product of -1, 0 and 1, which is exact: sums stay below 2^24.
Everything else is float32, in the order of the JAX model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from bipft_runtime.architecture import Architecture
from bipft_runtime.file import BITS, ZEROS, PackedModel

_F32 = np.float32
_SMALLEST_SCALE = _F32(1e-5)  # a learned scale below acts as this


def unpacked(bits: np.ndarray, zeros: np.ndarray | None = None) -> np.ndarray:
    """uint8 [..., n / 8] -> int8 [..., n], codes -1, 0 and 1. zeros: flat indices of zero codes."""
    codes = np.unpackbits(bits, axis=-1, bitorder="little").view(np.int8)
    codes = 2 * codes - 1
    if zeros is not None:
        codes.reshape(-1)[zeros] = 0
    return codes


class NumpyEncoder:
    """The forward pass of one sequence at a time, without padding."""

    def __init__(self, model: PackedModel) -> None:
        self._architecture = model.architecture
        self._top = {n: t for n, t in model.tensors.items() if not n.startswith("layers.")}
        self._layers = [
            _layer(model.tensors, model.architecture, number)
            for number in range(model.architecture.layers)
        ]
        self._word_codes = self._top.get("words" + ZEROS)

    def __call__(self, ids: np.ndarray, segments: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """ids, segments: int32 [tokens] -> (hidden [tokens, H], pooled [H]), float32."""
        x = self.embedded(ids, segments)
        for number in range(self._architecture.layers):
            x = self.layer(number, x)
        return x, self.pooled(x)

    def embedded(self, ids: np.ndarray, segments: np.ndarray) -> np.ndarray:
        """The input of the first layer, float32 [tokens, H]."""
        top, epsilon = self._top, self._architecture.epsilon
        codes = unpacked(top["words.bits"][ids]).astype(_F32)
        if self._word_codes is not None:
            hidden = self._architecture.hidden
            for row, token in enumerate(ids):
                first, last = np.searchsorted(
                    self._word_codes, [token * hidden, (token + 1) * hidden]
                )
                codes[row, self._word_codes[first:last] - token * hidden] = 0
        x = codes * top["words.scale"][ids][:, None]
        x = x + top["positions"][: len(ids)]
        x = x + top["segments"][segments]
        return _norm(x, top["norm.scale"], top["norm.bias"], epsilon)

    def layer(self, number: int, x: np.ndarray) -> np.ndarray:
        """One layer: [tokens, H] -> [tokens, H]."""
        parts, a = self._layers[number], self._architecture
        context = self._attention(parts, x)
        y = _linear(parts, "attention_output", context)
        y = _norm(y + x, parts["attention_norm.scale"], parts["attention_norm.bias"], a.epsilon)
        inner = _ACTIVATIONS[a.ffn_activation](_linear(parts, "ffn_input", y))
        inner = _linear(parts, "ffn_output", inner, unsigned=a.unsigned_ffn)
        return _norm(inner + y, parts["ffn_norm.scale"], parts["ffn_norm.bias"], a.epsilon)

    def pooled(self, x: np.ndarray) -> np.ndarray:
        """The pooled first token, [H]."""
        first, top = x[:1], self._top
        y = _linear(top, "pooler", first)
        if self._architecture.pooler == "layernorm_residual":
            epsilon = self._architecture.epsilon
            y = _norm(y, top["pooler_norm.scale"], top["pooler_norm.bias"], epsilon) + first
        return np.tanh(y)[0]

    def _attention(self, parts: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        a = self._architecture
        tokens, width = len(x), a.hidden // a.heads
        q_scale, k_scale, v_scale, p_scale = (
            _scale(parts, name)
            for name in ("query_scale", "key_scale", "value_scale", "probs_scale")
        )

        def codes(name: str) -> np.ndarray:
            signs = np.sign(_linear(parts, name, x))
            return signs.reshape(tokens, a.heads, width).transpose(1, 0, 2)

        q, k, v = codes("query"), codes("key"), codes("value")
        scores = q @ k.transpose(0, 2, 1) * q_scale * k_scale
        residual = None
        if a.estimator_rank:
            estimates = x @ parts["estimators.kernel"].T + parts["estimators.bias"]
            eq, dq, ek, dk, residual = np.split(
                estimates, a.estimator_rank * np.arange(1, 5), axis=1
            )
            scores = scores + ((eq + dq) @ dk.T + dq @ ek.T)
        scores = scores / np.sqrt(_F32(width))
        if a.softmax:
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            scores = scores / scores.sum(axis=-1, keepdims=True)
        threshold = _F32(0.5) * p_scale if a.learned_scales else _F32(0)
        attended = (scores > threshold).astype(_F32)
        context = attended @ v * p_scale * v_scale
        if residual is not None:
            context = context + (attended * p_scale) @ residual
        return context.transpose(1, 0, 2).reshape(tokens, a.hidden)


def _layer(
    tensors: Mapping[str, np.ndarray], architecture: Architecture, number: int
) -> dict[str, np.ndarray]:
    """The tensors of one layer, by their names without "layers."; its own zero codes."""
    parts = {}
    for name, tensor in tensors.items():
        if not name.startswith("layers."):
            continue
        short = name.removeprefix("layers.")
        if not name.endswith(ZEROS):
            parts[short] = tensor[number]
            continue
        size = 8 * tensors[name.removesuffix(ZEROS) + BITS][number].size
        first, last = np.searchsorted(tensor, [number * size, (number + 1) * size])
        if first < last:
            parts[short] = tensor[first:last] - number * size
    return parts


def _linear(
    parts: Mapping[str, np.ndarray], name: str, x: np.ndarray, unsigned: bool = False
) -> np.ndarray:
    """Q(x + shift) @ codes * scales + bias: [tokens, in] -> [tokens, out]."""
    if f"{name}.input_shift" in parts:
        x = x + parts[f"{name}.input_shift"]
    scale = _scale(parts, f"{name}.input_scale")
    codes = (x > _F32(0.5) * scale).astype(_F32) if unsigned else np.sign(x)
    weights = unpacked(parts[name + BITS], parts.get(name + ZEROS)).astype(_F32)
    product = codes @ weights.T * scale * parts[f"{name}.weight_scale"]
    return product + parts[f"{name}.bias"]


def _scale(parts: Mapping[str, np.ndarray], name: str) -> np.float32:
    return np.maximum(parts[name], _SMALLEST_SCALE) if name in parts else _F32(1)


def _norm(x: np.ndarray, scale: np.ndarray, bias: np.ndarray, epsilon: float) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    variance = np.square(centred).mean(axis=-1, keepdims=True)
    return centred * (_F32(1) / np.sqrt(variance + _F32(epsilon))) * scale + bias


def erf(x: np.ndarray) -> np.ndarray:
    """The error function of float32, with an error below 4e-7: a quotient of polynomials, as in
    Eigen and XLA."""
    x = np.clip(x, _F32(-4), _F32(4))
    square = x * x
    return x * _polynomial(square, _NUMERATOR) / _polynomial(square, _DENOMINATOR)


_NUMERATOR = (
    *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
    *(-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
)
_DENOMINATOR = (
    *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03),
    *(-7.37332916720468e-03, -1.42647390514189e-02),
)


def _polynomial(x: np.ndarray, coefficients: tuple[float, ...]) -> np.ndarray:
    value = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + _F32(coefficient)
    return value


# Without an input shift the sign of GELU is a code, so its zeros count. Below this input XLA's
# float32 GELU is 0 (on CPUs; it rounds, and the border is blurred by 0.1); above it, negative.
_GELU_UNDERFLOW = _F32(-5.26)
_SMALLEST_SHARE = _F32(2**-25)  # of 0.5 + 0.5 erf, but for 0


def _gelu(x: np.ndarray) -> np.ndarray:
    share = _F32(0.5) + _F32(0.5) * erf(x * _F32(np.sqrt(0.5)))
    return x * np.where(x < _GELU_UNDERFLOW, _F32(0), np.maximum(share, _SMALLEST_SHARE))


def _relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, _F32(0))


_ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"gelu": _gelu, "relu": _relu}
