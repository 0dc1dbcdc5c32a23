"""Packs a 1-bit model into one file in which binary weights are bits, for `bipft_runtime`.

    python -m bipft_jax.interop.pack --workdir runs/sst2 --output sst2.safetensors

WORKDIR is that of a finetuning run (its best seed is packed), of one seed, or of a pretraining run
or import (the bare encoder; the MLM head is tied to the latent float table, which the file has
not). What is no bit stays float32: rounding the embedding's tables to float16 changed one label in
25 of a finetuned encoder. The position table ends with the longest text, `--max_length`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bipft_jax.checkpoints.source import Source, load_source
from bipft_jax.cost import memory
from bipft_jax.cost.report import parts_table
from bipft_jax.data.glue.tasks import GlueTask
from bipft_jax.errors import runtime_missing
from bipft_jax.interop.gelu_ties import settled_shifts
from bipft_jax.models.parameters import Params, is_scale, named_leaves
from bipft_jax.models.recipes import RECIPES, BertConfig, Recipe
from bipft_jax.paths import replacing, require_local, require_writable
from bipft_jax.predict import MAX_LENGTH, best_seed, task_of
from bipft_jax.quantization.elastic import SMALLEST_SCALE
from bipft_jax.quantization.quantizers import (
    ElasticSigned,
    ElasticUnsigned,
    MeanBinarizer,
    RowBinarizer,
    SignBinarizer,
    StepBinarizer,
)
from bipft_jax.reports.tables import aligned
from bipft_jax.training.task_outputs import class_outputs

try:
    from bipft_runtime import architecture as packed_architecture
    from bipft_runtime import file as packed_file
except ImportError as error:
    raise runtime_missing(error) from error

# The order of the rows of `layers.estimators`.
_ESTIMATORS = ("query", "query_residual", "key", "key_residual", "value_residual")


def packable(recipe: Recipe) -> bool:
    """Whether the runtime has the recipe: 1-bit weights and activations, no low-rank products."""
    return (
        isinstance(recipe.weight, (MeanBinarizer, RowBinarizer))
        and isinstance(recipe.embedding, (MeanBinarizer, RowBinarizer))
        and recipe.lora_rank == 0
        and recipe.linear_input in (ElasticSigned(), SignBinarizer(window_includes_ends=True))
        and recipe.ffn_output_input in (recipe.linear_input, ElasticUnsigned())
        and recipe.query_key_value in (ElasticSigned(), SignBinarizer(window_includes_ends=False))
        and recipe.attention_probs in (ElasticUnsigned(), StepBinarizer())
    )


def architecture_of(
    config: BertConfig, outputs: int, max_length: int
) -> packed_architecture.Architecture:
    """The architecture that the file names.

    max_length: tokens of the longest text.

    Raises: ValueError for a recipe that the runtime lacks, or an encoder's width that is no
      multiple of 8.
    """
    recipe = config.recipe
    if not packable(recipe):
        able = ", ".join(name for name, row in RECIPES.items() if packable(row))
        raise ValueError(
            f"recipe {recipe.name} with lora_rank {recipe.lora_rank} cannot be packed: the runtime "
            f"has 1-bit weights and activations without low-rank products ({able})"
        )
    return packed_architecture.Architecture(
        recipe=recipe.name,
        layers=config.layers,
        hidden=config.hidden,
        heads=config.heads,
        intermediate=config.intermediate,
        vocab_size=config.vocab_size,
        max_positions=max_length,
        segment_types=config.segment_types,
        epsilon=config.layer_norm_epsilon,
        weight_scales="output" if isinstance(recipe.weight, RowBinarizer) else "tensor",
        learned_scales=recipe.linear_input.learned_scale,
        shifted_input=recipe.shifted_input,
        softmax=recipe.softmax,
        ffn_activation=recipe.ffn_activation,
        unsigned_ffn=recipe.ffn_output_input == ElasticUnsigned(),
        pooler=recipe.pooler,
        estimator_rank=recipe.estimator_rank,
        outputs=outputs,
    )


def packed(
    source: Source, task_name: str | None = None, max_length: int | None = None
) -> packed_file.PackedModel:
    """The packed model of a checkpoint.

    task_name: for a classifier that does not store its task. max_length: tokens of the longest
      text; without it that of the finetuning run, or all positions of a bare encoder.

    Raises: ValueError for a recipe that the runtime lacks, parameters that are missing or not
      finite (scales that were never set), a task that does not fit, or a max_length that is too
      small for a text or larger than the model's.
    """
    unset = [
        path for path, leaf in named_leaves(source.params).items() if not np.isfinite(leaf).all()
    ]
    if unset:
        what = "scales that were never set" if is_scale(unset[0]) else "values that are not finite"
        raise ValueError(f"{source.workdir} has {what}, such as {unset[0]}: train it first")
    outputs = source.objective.outputs
    config = source.config()
    task = task_of(source, task_name) if outputs else None
    max_length = _max_length(source, task, max_length)
    architecture = architecture_of(config, outputs, max_length)
    if lost := [path for path in source.missing if path.startswith("bert/")]:
        raise ValueError(f"{source.workdir} has no {lost[0]}: train it first")
    tensors = dict(_encoder_tensors(source.params["bert"], config.recipe))
    tensors["positions"] = tensors["positions"][:max_length]
    if architecture.shifted_input and architecture.ffn_activation == "gelu":
        name = "layers.ffn_output.input_shift"
        tensors[name] = _settled(tensors, tensors[name], architecture)
    described = packed_file.Task("", (), 1, max_length)
    if task:
        order = class_outputs(source, task)
        head = source.params["classifier"]
        tensors["classifier.kernel"] = np.asarray(head["kernel"]).T[order]
        tensors["classifier.bias"] = np.asarray(head["bias"])[order]
        described = packed_file.Task(
            name=task.name,
            labels=task.label_names or (),
            sentences=len(task.sentences),
            max_length=max_length,
        )
    return packed_file.PackedModel(
        architecture=architecture,
        tensors={name: _as_stored(architecture, name, value) for name, value in tensors.items()},
        tokenizer=source.tokenizer.to_dict(),
        task=described,
        source={"step": source.step, "metrics": source.metrics},
    )


def _max_length(source: Source, task: GlueTask | None, max_length: int | None) -> int:
    """Raises ValueError for a length that does not fit model or task."""
    most = source.config().max_positions
    if max_length is None:
        max_length = min(source.run.get("max_length", MAX_LENGTH), most) if task else most
    least = 2 * len(task.sentences) + 1 if task else 3  # a token a text, [CLS] and [SEP]
    if not least <= max_length <= most:
        raise ValueError(f"max_length is {max_length}, not from {least} to {most}")
    return max_length


def _settled(
    tensors: Mapping[str, np.ndarray],
    shifts: np.ndarray,
    architecture: packed_architecture.Architecture,
) -> np.ndarray:
    inner = "layers.ffn_input"
    scales = np.maximum(tensors[f"{inner}.input_scale"], np.float32(SMALLEST_SCALE)).astype(float)
    weight_scales = tensors[f"{inner}.weight_scale"]
    return settled_shifts(
        scales.reshape(-1, 1) * weight_scales.reshape(len(scales), -1),
        tensors[f"{inner}.bias"],
        shifts,
        architecture.hidden,
    )


def _as_stored(
    architecture: packed_architecture.Architecture, name: str, value: np.ndarray
) -> np.ndarray:
    dtype, _ = architecture.tensors().get(name, (value.dtype, ()))  # lists of zeros are as they are
    return np.asarray(value, dtype, order="C")


def _encoder_tensors(params: Params, recipe: Recipe) -> Iterable[tuple[str, np.ndarray]]:
    """(name, tensor) of everything but the classifier. params: of `Bert`."""
    words = recipe.embedding.encode(jnp.asarray(params["words"]["embedding"]))
    yield from _bits("words", np.asarray(words.codes))
    yield "words.scale", np.asarray(words.scale).reshape(-1)
    yield "positions", params["positions"]["embedding"]
    yield "segments", params["segments"]["embedding"]
    yield from _norm("norm", params["norm"])
    layers = params["encoder"]["layers"]
    attention = layers["attention"]
    for name in packed_architecture.LINEARS:
        module = attention[name] if name in attention else layers[name]
        yield from _linear(f"layers.{name}", module, recipe)
    for name in packed_architecture.ATTENTION_SCALES:
        if name in attention:
            yield f"layers.{name}", attention[name]
    for name in ("attention_norm", "ffn_norm"):
        yield from _norm(f"layers.{name}", layers[name])
    if recipe.estimator_rank:
        modules = [attention[f"{name}_estimator"] for name in _ESTIMATORS]
        kernels = [np.asarray(module["kernel"]).swapaxes(1, 2) for module in modules]
        yield "layers.estimators.kernel", np.concatenate(kernels, axis=1)
        yield "layers.estimators.bias", np.concatenate([m["bias"] for m in modules], axis=1)
    yield from _linear("pooler", params["pooler"], recipe)
    if "pooler_norm" in params:
        yield from _norm("pooler_norm", params["pooler_norm"])


def _linear(name: str, module: Params, recipe: Recipe) -> Iterable[tuple[str, np.ndarray]]:
    """A linear [in, out], or the stack [layers, in, out] of one: bits are [out, in]."""
    kernel = jnp.asarray(module["kernel"])
    encode = recipe.weight.encode if kernel.ndim == 2 else jax.vmap(recipe.weight.encode)
    encoded = encode(kernel)
    yield from _bits(name, np.asarray(encoded.codes).swapaxes(-1, -2))
    scale = np.asarray(encoded.scale)
    yield f"{name}.weight_scale", scale.squeeze(-2) if scale.ndim > kernel.ndim - 2 else scale
    for parameter, array in module.items():
        if parameter != "kernel":
            yield f"{name}.{parameter}", array


def _bits(name: str, codes: np.ndarray) -> Iterable[tuple[str, np.ndarray]]:
    """Codes [..., n] as bits [..., n / 8], and the list of zero codes if there are any."""
    yield f"{name}.bits", np.packbits(codes > 0, axis=-1, bitorder="little")
    zeros = np.flatnonzero(codes == 0)
    if zeros.size:
        yield f"{name}.zeros", zeros.astype(np.int32)


def _norm(name: str, module: Params) -> Iterable[tuple[str, np.ndarray]]:
    yield f"{name}.scale", module["scale"]
    yield f"{name}.bias", module["bias"]


def summary(source: Source, path: Path, max_length: int) -> str:
    """A table of the file's parts, and its size beside that of the float32 model."""
    parts = memory.parts(source.config(), source.params, max_length)
    if not source.objective.outputs:
        parts = [part for part in parts if part.name != memory.HEADS]
    floats = sum(part.float_bytes for part in parts)
    weights = sum(part.packed_bytes for part in parts)
    size = path.stat().st_size
    sizes = aligned(
        [
            ["", "MiB", "float32 / it"],
            ["float32 weights", f"{floats / 2**20:.2f}", ""],
            ["packed weights", f"{weights / 2**20:.2f}", f"{floats / weights:.1f}"],
            ["file, with tokenizer", f"{size / 2**20:.2f}", f"{floats / size:.1f}"],
        ],
        right=(1, 2),
    )
    return f"{parts_table(parts)}\n\n{sizes}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exits with a message for wrong arguments."""
    first, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.interop.pack",
        description=first,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workdir", required=True, metavar="DIR", help="of a run or an import")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE.safetensors")
    parser.add_argument("--task", help="only for a classifier that does not say its own")
    parser.add_argument(
        "--max_length",
        type=int,
        metavar="TOKENS",
        help="of the longest text (default: the finetuning run's; all of a bare encoder's "
        "positions); longer ones are cut",
    )
    arguments = parser.parse_args(argv)
    try:
        require_local(vars(arguments))
        require_writable(arguments.output)
        source = load_source(best_seed(arguments.workdir))
        model = packed(source, arguments.task, arguments.max_length)
        with replacing(arguments.output) as temporary:
            packed_file.write(temporary, model)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"read {source.described()}")
    print(summary(source, arguments.output, model.task.max_length))
    zeros = sum(tensor.size for name, tensor in model.tensors.items() if name.endswith(".zeros"))
    if zeros:
        print(f"{zeros} weights have the code 0 and are listed")
    print(f"wrote {arguments.output}: python -m bipft_runtime {arguments.output} TEXT")


if __name__ == "__main__":
    main()
