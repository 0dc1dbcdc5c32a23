"""The figures as text."""

from __future__ import annotations

from collections.abc import Sequence

from bipft_jax.cost import memory
from bipft_jax.cost.energy import (
    PICOJOULES,
    PUBLISHED_SIZES,
    PUBLISHED_TOKENS,
    energy,
    published_products,
)
from bipft_jax.cost.figures import PRECISIONS, Figures
from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.reports.tables import aligned

_MIB, _GIGA = 2**20, 1e9


def report(model: Figures, twin: Figures) -> str:
    """Parameters, bytes and operations of a model beside its full-precision twin."""
    config = model.config
    title = (
        f"{config.recipe.name}: {config.layers} layers x {config.hidden}, vocabulary "
        f"{config.vocab_size}; operations of one sequence of {model.length} tokens"
    )
    return "\n\n".join(
        [title, parts_table(model.parts), _bytes(model, twin), _operations(model, twin)]
    )


def parts_table(parts: Sequence[memory.Part]) -> str:
    """Parameters, bits and bytes by part, with their sum."""
    rows = [["part", "parameters", "bits", "scales", "float32 MiB", "packed MiB"]]
    for part in parts:
        rows.append(
            [
                part.name,
                f"{part.parameters:,}",
                str(part.bits),
                f"{part.scales:,}" if part.scales else "",
                f"{part.float_bytes / _MIB:.2f}",
                f"{part.packed_bytes / _MIB:.2f}",
            ]
        )
    rows.append(
        [
            "all",
            f"{sum(part.parameters for part in parts):,}",
            "",
            "",
            f"{sum(part.float_bytes for part in parts) / _MIB:.2f}",
            f"{sum(part.packed_bytes for part in parts) / _MIB:.2f}",
        ]
    )
    return aligned(rows, right=range(1, 6))


def _bytes(model: Figures, twin: Figures) -> str:
    whole = sum(part.float_bytes for part in twin.parts)
    if isinstance(model.config, DecoderConfig):
        head = "MiB"
        name = "quantised matrices at their bits, the rest float32"
        counts = {name: memory.bits_of_quantised_matrices(model.parts)}
    else:
        head, counts = "MiB, encoder and pooler", _bytes_of_encoder(model)
    rows = [[head, "full precision", config_name(model), "ratio"]]
    for name, count in counts.items():
        rows.append([name, f"{whole / _MIB:.1f}", f"{count / _MIB:.2f}", f"{whole / count:.1f}"])
    return aligned(rows, right=range(1, 4))


def _bytes_of_encoder(model: Figures) -> dict[str, float]:
    """Bytes by the convention that counts them."""
    packed = sum(part.packed_bytes for part in model.parts if part.name != memory.HEADS)
    return {
        "every matrix and table at its bits, biases float32 (papers)": (
            memory.bits_of_every_matrix(model.parts)
        ),
        "binarised matrices at their bits, the rest of BERT float32 (papers)": (
            memory.bits_of_binary_matrices(model.parts)
        ),
        f"packed file for {model.length} tokens: all parameters, scales too": packed,
    }


def _operations(model: Figures, twin: Figures) -> str:
    ours, theirs = model.operations, twin.operations
    rows = [["G operations", "full precision", config_name(model), "ratio"]]
    for name, mine, its in (
        ("products, full precision", ours.full_precision, theirs.full_precision),
        ("products of codes, one by one", ours.quantised, theirs.quantised),
        ("products, w-bit x a-bit as w a / 64 (papers)", ours.counted, theirs.counted),
        ("elementwise", ours.elementwise, theirs.elementwise),
        (
            "all, w-bit x a-bit as w a / 64",
            ours.counted + ours.elementwise,
            theirs.counted + theirs.elementwise,
        ),
    ):
        ratio = f"{its / mine:.1f}" if mine and its else "-"
        rows.append([name, f"{its / _GIGA:.2f}", f"{mine / _GIGA:.3f}", ratio])
    return aligned(rows, right=range(1, 4))


def config_name(model: Figures) -> str:
    """The recipe's name, for the head of a column."""
    return model.config.recipe.name


def energy_report(model: Figures, twin: Figures) -> str:
    """Millijoules of a model beside those of its full-precision twin."""
    rows = [["mJ, BitNet's model", "full precision", config_name(model), "ratio"]]
    for (precision, node), mine in model.joules.items():
        its = twin.joules[precision, node].total
        rows.append(
            [f"{precision}, {node}", f"{1e3 * its:.3f}", f"{1e3 * mine.total:.3f}"]
            + [f"{its / mine.total:.1f}"]
        )
    return aligned(rows, right=range(1, 4))


def published_energy_report() -> str:
    """The energy of BitNet's published sizes: joules by node and type, and the ratios of FP16 to
    BitNet at 7 nm."""
    kinds = (*((precision, False) for precision in PRECISIONS), ("fp16", True))
    columns = [
        f"{'BitNet' if quantised else precision} {node} {operation}"
        for precision, quantised in kinds
        for node in PICOJOULES
        for operation in ("mul", "add")
    ]
    rows = [["size", *columns, "fp16 / BitNet"]]
    for size in PUBLISHED_SIZES:
        cells, totals = [], {}
        for precision, quantised in kinds:
            products = published_products(size, quantised=quantised)
            for node in PICOJOULES:
                joules = energy(products, node, precision)
                totals[precision, quantised, node] = joules.total
                cells += [f"{joules.multiplications:.4f}", f"{joules.additions:.4f}"]
        ratio = totals["fp16", False, "7nm"] / totals["fp16", True, "7nm"]
        rows.append([size.name, *cells, f"{ratio:.2f}"])
    return (
        f"joules of one forward pass over {PUBLISHED_TOKENS} tokens, matrix products of the blocks "
        f"only; the last column at 7 nm\n{aligned(rows, right=range(1, len(columns) + 2))}"
    )
