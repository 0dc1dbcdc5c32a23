"""Bytes and operations by hand and as papers print them; energies of BitNet's paper."""

import json

import jax
import pytest

from bipft_jax.cost import memory
from bipft_jax.cost.__main__ import main
from bipft_jax.cost.energy import PUBLISHED_SIZES, Energy, energy, published_products
from bipft_jax.cost.figures import figures_of, shapes_of
from bipft_jax.cost.products import Product
from bipft_jax.models.recipes import bert_config, recipe_named
from bipft_jax.objectives.classification import classification

# Wang et al. 2023 (BitNet), table 1 (13B) and the ratios of figure 3.
PRINTED_RATIOS = (8.8, 11.0, 15.0, 18.6, 21.7, 29.1, 32.9, 38.8)
PRINTED_13B = {  # (7 nm mul, add), (45 nm mul, add)
    "fp32": ((8.58, 2.49), (24.23, 5.89)),
    "fp16": ((2.23, 1.05), (7.20, 2.62)),
    "bitnet": ((0.04, 0.06), (0.12, 0.24)),
}


def base(recipe, rank=-1, length=128):
    config = bert_config(recipe_named(recipe, rank), "base", 30522)
    return figures_of(config, shapes_of(config), length)


def mib(parts):
    return sum(part.packed_bytes for part in parts) / 2**20


def test_bytes_of_base_are_those_that_papers_print():
    full = base("fp").parts
    assert sum(part.float_bytes for part in full) / 2**20 == pytest.approx(417.64, abs=0.005)
    for recipe in ("bipft_b", "bipft_a", "bibert"):
        parts = base(recipe).parts
        assert memory.bits_of_every_matrix(parts) / 2**20 == pytest.approx(13.4, abs=0.05)
        assert memory.bits_of_binary_matrices(parts) / 2**20 == pytest.approx(15.0, abs=0.05)


def test_the_packed_bytes_are_the_sum_of_bits_and_floats():
    vocab, h, inner, layers, positions, length = 30522, 768, 3072, 12, 512, 128
    bits = layers * (4 * h * h + 2 * h * inner) + h * h + vocab * h
    tables = (length + 2) * h + vocab  # and a scale for each word
    biases = layers * (5 * h + inner) + h
    norms, shifts = 2 * h * (2 * layers + 1) + 2 * h, biases  # one LayerNorm in the pooler
    scales = (6 * layers + 1) * 2 + 4 * layers  # of each linear's weights and input; q, k, v, probs
    for rank in (0, 1, 4):
        estimators = layers * (4 * rank + 1) * (h + 1) if rank else 0
        floats = biases + norms + shifts + scales + estimators
        parts = base("bipft_b", rank).parts
        assert mib(parts) * 2**20 == bits / 8 + 4 * (tables + floats)
        assert sum(part.parameters for part in parts) == (
            bits
            + (positions + 2) * h
            + floats
            - (6 * layers + 1)  # the weights' scales are computed
        )


def test_a_row_binarizer_has_a_scale_for_each_output():
    linears = next(part for part in base("bibert").parts if part.name == memory.LINEARS)
    assert linears.scales == 12 * (5 * 768 + 3072) + 768


def test_heads_are_a_part_of_their_own():
    config = bert_config(recipe_named("bipft_a"), "tiny", 100)
    params = classification(3).abstract_params(config)
    parts = {part.name: part for part in figures_of(config, params, 8).parts}
    assert parts.pop(memory.HEADS).parameters == 128 * 3 + 3
    assert list(parts.values()) == figures_of(config, shapes_of(config), 8).parts
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes_of(config))) == sum(
        part.parameters for part in parts.values()
    )


def test_operations_by_hand():
    """tiny, 8 tokens: 2 layers, width 128, 2 heads; a multiply-add is two operations."""
    linears = 2 * 2 * 8 * (4 * 128 * 128 + 2 * 128 * 512)
    attention = 2 * 2 * 2 * 8 * 8 * 128
    pooler = 2 * 128 * 128

    def of(recipe, rank=-1):
        config = bert_config(recipe_named(recipe, rank), "tiny", 100)
        return figures_of(config, shapes_of(config), 8).operations

    full, binary, ternary = of("fp"), of("bipft_b", 3), of("bit_w1a4")
    products = linears + attention + pooler
    assert (full.full_precision, full.quantised, full.counted) == (products, 0, products)
    estimators = 2 * 2 * (8 * 128 * 13 + 2 * 8 * 3 * 8 + 8 * 8 * 2)
    assert (binary.quantised, binary.full_precision) == (products, estimators)
    assert binary.counted == products / 64 + estimators
    # 1-bit weights and 4-bit activations; both operands of attention have 4 bits.
    assert ternary.counted == (linears + pooler) * 4 / 64 + attention * 16 / 64
    norms = 7 * 128 * (8 * (2 * 2 + 1))
    softmax, gelu = 2 * 8 * 2 * 8 * 4, 2 * 8 * 512 * 4
    biases, residuals = 2 * 8 * (5 * 128 + 512), 2 * 8 * 2 * 128
    embeddings, bias_and_tanh = 2 * 8 * 128, 2 * 128
    assert full.elementwise == (
        norms + softmax + gelu + biases + residuals + embeddings + bias_and_tanh
    )
    # Shifts, codes and scales of the linears; codes of q, k, v, probabilities, and two scales.
    binarised = 2 * 8 * (3 * (5 * 128 + 512) + 3 * 128 + 2 * 8 + 2 * 8 + 128)
    assert of("bipft_a").elementwise == full.elementwise + binarised + 7 * 128
    assert binary.elementwise == of("bipft_a").elementwise + 2 * 8 * (13 + 2 * 8 + 128)


def test_energies_of_the_bitnet_paper():
    for size, printed in zip(PUBLISHED_SIZES, PRINTED_RATIOS, strict=True):
        fp16, bitnet = (
            energy(published_products(size, quantised=quantised), "7nm", "fp16")
            for quantised in (False, True)
        )
        assert fp16.total / bitnet.total == pytest.approx(printed, abs=0.06)
        if size.name != "13B":
            continue
        for name, by_node in PRINTED_13B.items():
            products = published_products(size, quantised=name == "bitnet")
            precision = "fp16" if name == "bitnet" else name
            for node, values in zip(("7nm", "45nm"), by_node, strict=True):
                joules = energy(products, node, precision)
                assert (joules.multiplications, joules.additions) == pytest.approx(values, abs=5e-3)


def test_one_product_by_hand():
    """[2, 3] x [3, 5]: 30 multiplications and 20 additions."""
    full, codes = Product("full", 2, 3, 5), Product("codes", 2, 3, 5, 1, 8, 1)
    assert energy([full], "45nm", "fp32") == Energy(
        pytest.approx(30 * 3.7e-12), pytest.approx(20 * 0.9e-12)
    )
    assert energy([codes], "7nm", "fp32") == Energy(
        pytest.approx((10 + 6) * 0.34e-12), pytest.approx(20 * 0.007e-12)
    )


def test_the_command(tmp_path, capsys):
    output = tmp_path / "cost.json"
    main(["--recipe", "bipft_b", "--size", "tiny", "--energy", "--json", str(output)])
    text = capsys.readouterr().out
    assert "binarised matrices" in text and "fp16, 7nm" in text
    figures = json.loads(output.read_text())
    assert figures["model"]["recipe"] == "bipft_b" and figures["full precision"]["length"] == 128
    main(["--energy"])
    assert "38.86" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --recipe, --workdir, or --energy alone"),
        (["--recipe", "bipft_c"], "bipft_b"),
        (["--recipe", "bipft_b", "--size", "huge"], "unknown size 'huge'"),
        (["--recipe", "fp", "--length", "513"], "512 positions"),
        (["--recipe", "fp", "--length", "0"], "--length must be at least 1, got 0"),
        (["--workdir", "gs://bucket/run"], "workdir is gs://"),
    ],
)
def test_wrong_arguments_are_explained(capsys, arguments, message):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert message in f"{caught.value} {capsys.readouterr().err}"
