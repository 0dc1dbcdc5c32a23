"""Reads the weight files of PyTorch models as NumPy arrays by name."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.flax

from bipft_jax.checkpoints.files import reason
from bipft_jax.json_text import parse_json

SAFETENSORS_NAME, PICKLE_NAME = "model.safetensors", "pytorch_model.bin"


def read_weights(directory: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """Reads model.safetensors, or else pytorch_model.bin. Either may be sharded, with an index in
    NAME.index.json.

    Returns: (path of the file or index, arrays by name), in host memory and in the file's own
      dtypes, except that bfloat16 in a .bin becomes float32.

    Raises: ValueError naming the file: none exists, a listed shard is missing or has other arrays
      than listed, one is damaged, PyTorch is needed but not installed, or a .bin holds anything but
      tensors.
    """
    for name, read in ((SAFETENSORS_NAME, _read_safetensors), (PICKLE_NAME, _read_pickle)):
        path, index = directory / name, directory / f"{name}.index.json"
        if path.exists():
            return path, read(path)
        if index.exists():
            return index, _read_shards(index, read)
    raise ValueError(
        f"{directory} has no weights: neither {SAFETENSORS_NAME} nor {PICKLE_NAME}, nor one of "
        "them with .index.json"
    )


def _read_shards(
    index: Path, read: Callable[[Path], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays of all shards that an index lists."""
    try:
        content = parse_json(index.read_bytes())
        files = {str(name): Path(file) for name, file in content["weight_map"].items()}
        if not files:
            raise ValueError("weight_map is empty")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{index} is not an index, an object whose weight_map gives the file of each array "
            f"({error!r})"
        ) from error
    state = {}
    for file in sorted(set(files.values())):
        path = index.parent / file
        if file.name != str(file) or not path.is_file():
            raise ValueError(f"{index} lists {file}, which is not a file of {index.parent}")
        arrays, listed = read(path), {name for name in files if files[name] == file}
        if different := sorted(listed ^ set(arrays)):
            lacks = "lacks" if different[0] in listed else "has, and the index does not list,"
            raise ValueError(
                f"{path} is not the file that {index} lists: it {lacks} {different[0]}"
            )
        state |= arrays
    return state


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:  # its NumPy reader has no bfloat16 in older versions
        arrays = safetensors.flax.load_file(path)
    except (safetensors.SafetensorError, KeyError, TypeError) as error:  # also for unknown dtypes
        raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error
    return {name: np.asarray(array) for name, array in arrays.items()}


def _read_pickle(path: Path) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError:
        raise ValueError(
            f"{path} needs PyTorch to be read: pip install torch, or convert it to "
            f"{SAFETENSORS_NAME} where there is PyTorch"
        ) from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, or is no file of torch.save: it is not read, because "
            "a pickle can run any code. Save its state dict alone, best as safetensors"
        ) from error
    except (RuntimeError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({reason(error)})") from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str)
        and torch.is_tensor(value)
        and value.layout is torch.strided
        and not value.is_meta
        for name, value in state.items()
    ):
        raise ValueError(
            f"{path} is not a state dict: it must map names to dense tensors, nothing else"
        )
    arrays = {}
    for name, tensor in state.items():
        if tensor.dtype == torch.bfloat16:  # NumPy has none of its own
            tensor = tensor.float()
        try:
            arrays[name] = tensor.detach().numpy()
        except TypeError as error:
            raise ValueError(
                f"{path}: {name} has type {tensor.dtype}, which is not read"
            ) from error
    return arrays
