"""Other runtimes on a float BERT of the same dimensions: torch, ONNX Runtime, OpenVINO.

Needs `pip install -e '.[inference-peers]'`. All start from one torch module with random weights;
ONNX Runtime gets it through its own optimiser for BERT, and its dynamic int8 quantisation of that;
OpenVINO through NNCF's int8 quantisation for transformers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import nncf
import numpy as np
import onnxruntime
import openvino
import torch
from bipft_runtime.architecture import Architecture
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers import optimizer
from torch import nn

Run = Callable[[np.ndarray], object]  # of ids, int32 [sequences, tokens]

_NAMES = ("input_ids", "attention_mask", "token_type_ids")
_CALIBRATION_SEQUENCES = 8  # of OpenVINO's int8 scales: enough for times


class _Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, intermediate: int, epsilon: float):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.output = (
            nn.Linear(hidden, hidden) for _ in range(4)
        )
        self.inner, self.outer = nn.Linear(hidden, intermediate), nn.Linear(intermediate, hidden)
        self.first_norm, self.second_norm = (nn.LayerNorm(hidden, epsilon) for _ in range(2))

    def forward(self, x, mask):
        def by_head(y):
            return y.view(y.size(0), y.size(1), self.heads, -1).permute(0, 2, 1, 3)

        q, k, v = (by_head(linear(x)) for linear in (self.query, self.key, self.value))
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1)) + mask
        context = torch.matmul(scores.softmax(-1), v).permute(0, 2, 1, 3).contiguous()
        x = self.first_norm(self.output(context.view(x.size(0), x.size(1), x.size(2))) + x)
        return self.second_norm(self.outer(nn.functional.gelu(self.inner(x))) + x)


class _Bert(nn.Module):
    def __init__(self, a: Architecture):
        super().__init__()
        self.words = nn.Embedding(a.vocab_size, a.hidden)
        self.positions = nn.Embedding(a.max_positions, a.hidden)
        self.segments = nn.Embedding(a.segment_types, a.hidden)
        self.norm = nn.LayerNorm(a.hidden, a.epsilon)
        self.layers = nn.ModuleList(
            _Layer(a.hidden, a.heads, a.intermediate, a.epsilon) for _ in range(a.layers)
        )
        self.pooler = nn.Linear(a.hidden, a.hidden)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, input_ids, attention_mask, token_type_ids):
        places = torch.arange(input_ids.size(1))[None]
        x = self.words(input_ids) + self.positions(places) + self.segments(token_type_ids)
        x = self.norm(x)
        mask = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * -1e9
        for layer in self.layers:
            x = layer(x, mask)
        return x, torch.tanh(self.pooler(x[:, 0]))


def _inputs(ids: np.ndarray) -> dict[str, np.ndarray]:
    ids = ids.astype(np.int64)
    return dict(zip(_NAMES, (ids, np.ones_like(ids), np.zeros_like(ids))))


def peers(architecture: Architecture, threads: int, scratch: Path) -> Iterator[tuple[str, Run]]:
    """Yields (name with version, run) of each, after its preparation.

    scratch: a directory for model files, which has to stay.
    """
    torch.set_num_threads(threads)
    bert = _Bert(architecture).eval()
    yield f"torch {torch.__version__} float32", functools.partial(_run_torch, bert)

    exported, optimized, quantized = (
        str(scratch / f"{name}.onnx") for name in ("exported", "optimized", "quantized")
    )
    example = _inputs(np.ones((1, 8), np.int32))
    axes = {name: {0: "sequences", 1: "tokens"} for name in _NAMES}
    arguments = tuple(torch.from_numpy(example[name]) for name in _NAMES)
    torch.onnx.export(
        bert,
        arguments,
        exported,
        input_names=_NAMES,
        output_names=("hidden", "pooled"),
        dynamic_axes=axes,
        dynamo=False,
    )
    fused = optimizer.optimize_model(
        exported, "bert", num_heads=architecture.heads, hidden_size=architecture.hidden
    )
    fused.save_model_to_file(optimized)
    name = f"onnxruntime {onnxruntime.__version__}"
    yield f"{name} float32", _onnx_run(optimized, threads)
    quantize_dynamic(
        optimized,
        quantized,
        weight_type=QuantType.QInt8,
        extra_options={"DefaultTensorType": 1},  # float: of tensors whose type it cannot infer
    )
    yield f"{name} dynamic int8", _onnx_run(quantized, threads)

    rng = np.random.default_rng(0)
    samples = [
        _inputs(rng.integers(1, architecture.vocab_size, (1, 128)))
        for _ in range(_CALIBRATION_SEQUENCES)
    ]
    core = openvino.Core()
    int8 = nncf.quantize(
        core.read_model(exported),
        nncf.Dataset(samples),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(samples),
    )
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # of what is not int8
    }
    request = core.compile_model(int8, "CPU", settings).create_infer_request()
    version = openvino.__version__.partition("-")[0]
    yield f"openvino {version} int8", lambda ids: request.infer(_inputs(ids))


def _run_torch(bert: nn.Module, ids: np.ndarray) -> None:
    with torch.inference_mode():
        bert(**{name: torch.from_numpy(array) for name, array in _inputs(ids).items()})


def _onnx_run(path: str, threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda ids: session.run(None, _inputs(ids))
