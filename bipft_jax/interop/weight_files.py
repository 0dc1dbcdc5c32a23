"""Arrays by name from the weight files of PyTorch models."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import safetensors
import safetensors.flax

from bipft_jax.training.checkpoint_files import reason

SAFETENSORS_NAME, PICKLE_NAME = "model.safetensors", "pytorch_model.bin"


def read_weights(directory: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """The arrays of model.safetensors, or else of pytorch_model.bin, and the file's path.

    Returns: arrays of the file's own types, in host memory; those of a .bin are float32.

    Raises: ValueError: neither file exists, the one read is damaged, PyTorch is not installed and
      needed, or a .bin holds anything but tensors.
    """
    path = directory / SAFETENSORS_NAME
    if path.exists():
        try:  # its NumPy reader has no bfloat16 in older versions
            arrays = safetensors.flax.load_file(path)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} is damaged or no safetensors file ({error})") from error
        return path, {name: np.asarray(array) for name, array in arrays.items()}
    path = directory / PICKLE_NAME
    if path.exists():
        return path, _read_pickle(path)
    raise ValueError(f"{directory} has no weights: neither {SAFETENSORS_NAME} nor {PICKLE_NAME}")


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
    return {name: tensor.detach().float().numpy() for name, tensor in state.items()}
