"""The compiled kernels: exact products, the layers of NumPy, and one result for all instruction
sets and numbers of threads."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bipft_runtime import Model, file, library
from bipft_runtime import model as runtime_model
from bipft_runtime.compiled_encoder import CompiledEncoder
from bipft_runtime.numpy_encoder import NumpyEncoder

from tests.runtime.random_models import (
    RECIPES,
    SIZES,
    VOCABULARY,
    random_model,
    with_zeros,
)

TASKS = Path("/proc/self/task")  # an entry for each thread of this process
SETS = library.instruction_sets()
pytestmark = pytest.mark.skipif(not SETS, reason="bipft_runtime was installed without a compiler")


def tokens(rng, count):
    return rng.integers(0, VOCABULARY, count, np.int32), rng.integers(0, 2, count, np.int32)


def assert_layers_agree(model, encoders, counts, seed=0):
    """Layer by layer, each from NumPy's hidden states."""
    reference, rng = NumpyEncoder(model), np.random.default_rng(seed)
    for count in counts:
        ids, segments = tokens(rng, count)
        x = reference.embedded(ids, segments)
        for encoder in encoders:
            np.testing.assert_allclose(encoder.embedded(ids, segments), x, atol=2e-6)
        for number in range(model.architecture.layers):
            after = reference.layer(number, x)
            for encoder in encoders:
                np.testing.assert_allclose(encoder.layer(number, x), after, atol=2e-5)
            x = after
        for encoder in encoders:
            np.testing.assert_allclose(encoder.pooled(x), reference.pooled(x), atol=2e-6)


def as_words(bits):
    """bool [rows, n] -> uint64 [rows, ceil(n / 64)]."""
    padded = np.pad(bits, ((0, 0), (0, -bits.shape[1] % 64)))
    return np.packbits(padded, axis=1, bitorder="little").view(np.uint64)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("rows", "inputs", "outputs"),
    [
        (4, 1, 1),
        (8, 24, 70),
        (4, 64, 64),
        (20, 129, 33),
        (4, 767, 130),
        (8, 1000, 65),
        (4, 9000, 3),
    ],
)
def test_products_are_exact(name, masked, rows, inputs, outputs):
    rng = np.random.default_rng(inputs)
    codes = rng.integers(-1, 2, (rows, inputs))
    if not masked:
        codes[codes == 0] = 1
    codes[0], codes[1] = 1, -1  # the largest sums
    weights = 2 * rng.integers(0, 2, (outputs, inputs)) - 1
    weights[0] = 1
    bits, mask, rights = as_words(codes > 0), as_words(codes != 0), as_words(weights > 0)
    dots = np.zeros((rows, -outputs % 64 + outputs), np.int16)
    pointers = [a.ctypes.data for a in (bits, mask, rights, dots)]
    seconds = library.loaded().bipft_products(
        name.encode(), pointers[0], pointers[1] if masked else None, rows, pointers[2], outputs,
        inputs, 2, pointers[3],
    )  # fmt: skip
    assert seconds >= 0
    np.testing.assert_array_equal(dots[:, :outputs], codes @ weights.T)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("recipe", "rank"), RECIPES)
def test_every_layer_is_that_of_numpy(recipe, rank, sizes):
    model = random_model(recipe, rank, sizes, seed=1)
    assert_layers_agree(model, [CompiledEncoder(model, 1, SETS[0])], (1, 7, 70))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("recipe", "rank"), RECIPES)
def test_instruction_sets_and_threads_give_the_same_bits(recipe, rank, zeros):
    model = random_model(recipe, rank, seed=2)
    model = with_zeros(model) if zeros else model
    first = CompiledEncoder(model, 1, SETS[0])
    rng = np.random.default_rng(0)
    # Longer, shorter and longer again, so that what an earlier call left behind would show.
    examples = [tokens(rng, count) for count in (70, 9, 130, 70)]
    expected = [first(*example) for example in examples]
    for name in SETS:
        encoder = CompiledEncoder(model, 1, name)
        assert encoder.instruction_set == name
        for threads in (1, 2, 1, 3):
            encoder._threads = threads
            for example, (hidden, pooled) in zip(examples, expected):
                ours, ours_pooled = encoder(*example)
                np.testing.assert_array_equal(ours, hidden)
                np.testing.assert_array_equal(ours_pooled, pooled)


@pytest.mark.parametrize(("recipe", "rank"), [("bipft_a", -1), ("bipft_b", 1), *RECIPES[3:]])
def test_zero_codes_are_exact(recipe, rank):
    model = with_zeros(random_model(recipe, rank, (128, 2, 512), seed=3))
    encoders = [CompiledEncoder(model, threads, name) for threads in (1, 3) for name in SETS]
    assert_layers_agree(model, encoders, (5, 70))


_FORKING = """
import os, sys
from bipft_runtime import Model
model = Model(sys.argv[1], threads=3)
texts = ["a b c d e f g h i j k l m n o p q r s t u v w x y z"]
before = model.encode(texts)[0].hidden
child = os.fork()
same = (model.encode(texts)[0].hidden == before).all()
del model
if child:
    same = os.waitpid(child, 0)[1] == 0 and same
os._exit(0 if same else 1)
"""


def test_a_forked_process_makes_threads_of_its_own(tmp_path):
    file.write(tmp_path / "model.safetensors", random_model("bipft_a"))
    command = [sys.executable, "-c", _FORKING, str(tmp_path / "model.safetensors")]
    subprocess.run(command, check=True, timeout=60)


@pytest.mark.skipif(not TASKS.exists(), reason="counts threads as Linux shows them")
def test_threads_without_tokens_are_not_started():
    model = random_model("bipft_a")
    before = len(list(TASKS.iterdir()))
    encoder = CompiledEncoder(model, threads=64)
    started = []
    for count in (8, 9, 70):  # the last is 9 shares of at most 8 tokens
        encoder(*tokens(np.random.default_rng(0), count))
        started.append(len(list(TASKS.iterdir())) - before)
    assert started == [0, 1, 8]


def test_an_instruction_set_may_be_forced(monkeypatch):
    model = random_model("bipft_a")
    monkeypatch.setenv(library.ISA_VARIABLE, "portable")
    assert CompiledEncoder(model).instruction_set == "portable"
    monkeypatch.setenv(library.ISA_VARIABLE, "avx1024")
    with pytest.raises(ValueError, match="BIPFT_RUNTIME_ISA=avx1024: .* have .*portable"):
        CompiledEncoder(model)


def test_what_the_library_cannot_compute_is_named():
    model = random_model("bipft_a")
    encoder = CompiledEncoder(model)
    fine = np.zeros(3, np.int32)
    with pytest.raises(ValueError, match="token 1 has id 64, not from 0 to 63"):
        encoder(np.array([0, 64, 1], np.int32), fine)
    with pytest.raises(ValueError, match="token 2 has segment -1"):
        encoder(fine, np.array([0, 1, -1], np.int32))
    with pytest.raises(ValueError, match="161 tokens, not from 1 to 160"):
        encoder(np.zeros(161, np.int32), np.zeros(161, np.int32))
    with pytest.raises(ValueError, match="threads is 0"):
        CompiledEncoder(model, threads=0)
    del model.tensors["layers.key.bias"]
    with pytest.raises(ValueError, match="no tensor layers.key.bias"):
        CompiledEncoder(model)


def test_without_the_library_numpy_answers_and_says_so_once(tmp_path, monkeypatch):
    model = random_model("bipft_b", 1)
    file.write(tmp_path / "model.safetensors", model)
    compiled = Model(tmp_path / "model.safetensors", threads=2)
    assert compiled.instruction_set == SETS[0]
    monkeypatch.setattr(library, "loaded", lambda: None)
    runtime_model._say_once.cache_clear()
    with pytest.warns(
        RuntimeWarning, match="NumPy answers, .* without a C\\+\\+ compiler"
    ) as warned:
        plain = Model(tmp_path / "model.safetensors")
        Model(tmp_path / "model.safetensors")
    assert len(warned) == 1 and plain.instruction_set == "numpy"
    for ours, theirs in zip(compiled.encode(["a b", "c"]), plain.encode(["a b", "c"])):
        np.testing.assert_allclose(ours.hidden, theirs.hidden, atol=2e-5)
        np.testing.assert_allclose(ours.pooled, theirs.pooled, atol=2e-5)
    monkeypatch.setenv(library.ISA_VARIABLE, "avx2")
    with pytest.raises(ValueError, match="BIPFT_RUNTIME_ISA=avx2: .* without a C\\+\\+ compiler"):
        Model(tmp_path / "model.safetensors")


def test_a_library_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(library, "ABI_VERSION", 0)
    with pytest.raises(ImportError, match="version 2 of the interface, this package needs 0"):
        library.loaded.__wrapped__()
