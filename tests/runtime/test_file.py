"""A packed file comes back as it was; damaged and foreign ones are refused by name."""

import dataclasses
import json
import struct

import numpy as np
import pytest
import safetensors.numpy
from bipft_runtime import file as packed_file
from bipft_runtime.file import ModelFileError, read, write

from tests.runtime.packing import packed_source

TASK = json.dumps({"name": "sst2", "labels": ["0", "1"], "sentences": 1, "max_length": 32})


@pytest.fixture(scope="module")
def model():
    return packed_source("bipft_b")[1]


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "model.safetensors"
    write(path, model)
    return path


def test_a_file_comes_back_as_it_was(model, path):
    again = read(path)
    assert again.tensors.keys() == model.tensors.keys()
    for name, tensor in model.tensors.items():
        np.testing.assert_array_equal(again.tensors[name], tensor, strict=True)
    assert dataclasses.replace(again, tensors={}) == dataclasses.replace(model, tensors={})


def test_who_may_read_other_new_files_may_read_it(path):
    other = path.with_name("other")
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode


def written(model, path, change, **metadata):
    """A file with other tensors or metadata, and the digest that fits them."""
    tensors = dict(model.tensors)
    change(tensors)
    texts = safetensors.safe_open(path, framework="numpy").metadata() | metadata
    digested = {name: texts[name] for name in ("architecture", "tokenizer", "task", "source")}
    digest = metadata.get("digest", packed_file._digest(digested, tensors))
    other = path.with_name("other.safetensors")
    safetensors.numpy.save_file(tensors, other, texts | {"digest": digest})
    return other


def with_nan(tensors):
    tensors["layers.query_scale"] = np.full_like(tensors["layers.query_scale"], np.nan)


def negative(tensors):
    tensors["pooler.weight_scale"] = np.array(-1, np.float32)


def architecture(model, **changes):
    return json.dumps(model.architecture.as_json() | changes)


@pytest.mark.parametrize(
    ("change", "metadata", "message"),
    [
        (lambda t: t.pop("pooler.bits"), {}, "no tensor pooler.bits"),
        (lambda t: t.update(extra=t["positions"]), {}, "unexpected tensor extra"),
        (lambda t: t.update(positions=t["segments"]), {}, r"positions: .*expected float32 \[32,"),
        (with_nan, {}, "layers.query_scale: NaN or infinite"),
        (negative, {}, "pooler.weight_scale: a negative scale"),
        (
            lambda t: t.update({"words.zeros": np.array([5, 4], np.int32)}),
            {},
            "words.zeros: not an ascending",
        ),
        (
            lambda t: t.update({"words.zeros": np.array([2**30], np.int32)}),
            {},
            "words.zeros: an index outside",
        ),
        (lambda t: None, {"format": "other"}, "not a packed model"),
        (lambda t: None, {"version": "1"}, "format version 1, this runtime reads 2"),
        (lambda t: None, {"digest": "0" * 64}, "digest"),
        (lambda t: None, {"task": "{}"}, "task: 'labels'"),
        (lambda t: None, {"task": TASK.replace('["0", "1"]', "[]")}, "task does not fit"),
        (lambda t: None, {"task": TASK.replace('["0", "1"]', '["0", "0"]')}, "task does not fit"),
        (lambda t: None, {"architecture": "[1]"}, "architecture is not a JSON object"),
    ],
)
def test_what_does_not_fit_is_named(model, path, change, metadata, message):
    with pytest.raises(ModelFileError, match=message):
        read(written(model, path, change, **metadata))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": 100}, "hidden is 100, not a multiple of 8"),
        ({"heads": 3}, "not a multiple of 3 heads"),
        ({"layers": 2**40}, "layers is 1099511627776, not from 1"),
        ({"layers": True}, "layers is True, not of type int"),
        ({"pooler": "mean"}, "pooler is 'mean'"),
        ({"depth": 2}, "unexpected keyword argument 'depth'"),
        ({"layers": 3}, r"float32 \[2, 128\], expected float32 \[3, 128\]"),
    ],
)
def test_an_architecture_that_cannot_be_is_named(model, path, changes, message):
    text = architecture(model, **changes)
    with pytest.raises(ModelFileError, match=message):
        read(written(model, path, lambda tensors: None, architecture=text))


@pytest.mark.parametrize("mutants", [300, pytest.param(100_000, marks=pytest.mark.long)])
def test_damaged_bytes_are_refused_and_never_crash(path, tmp_path, mutants):
    """Cuts, flipped bits and overwritten numbers, half of them in the header."""
    whole = path.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    rng = np.random.default_rng(0)
    damaged = tmp_path / "damaged.safetensors"
    for number in range(mutants):
        data = bytearray(whole)
        end = header if number % 2 else len(data)
        match number % 3:
            case 0:
                del data[rng.integers(len(data)) if number % 2 else rng.integers(header) :]
            case 1:
                data[rng.integers(end)] ^= 1 << rng.integers(8)
            case 2:
                at = rng.integers(end - 8)
                data[at : at + 8] = struct.pack("<Q", int(rng.integers(2**63)) << 1)
        damaged.write_bytes(data)
        with pytest.raises(ModelFileError, match="damaged.safetensors: "):
            read(damaged)
