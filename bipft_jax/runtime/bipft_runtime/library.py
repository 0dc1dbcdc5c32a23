"""The compiled library, where the installation has one."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

import bipft_runtime

ABI_VERSION = 2  # BIPFT_ABI_VERSION of src/bipft_runtime.h
ISA_VARIABLE = "BIPFT_RUNTIME_ISA"  # forces an instruction set
MISSING = (
    "bipft_runtime was installed without a C++ compiler and has no compiled kernels: install it "
    "again where there is one"
)
_NAMES = ("libbipft.so", "libbipft.dylib")
_MESSAGE_BYTES = 512


class Architecture(ctypes.Structure):
    """`bipft_architecture`."""

    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in (
                *("layers", "hidden", "heads", "intermediate", "vocab_size", "max_positions"),
                *("segment_types", "estimator_rank"),
            )
        ),
        ("epsilon", ctypes.c_float),
        *(
            (name, ctypes.c_int32)
            for name in (
                *("scales_per_output", "softmax", "learned_scales", "relu", "unsigned_ffn"),
                "layernorm_residual",
            )
        ),
    ]


class Tensor(ctypes.Structure):
    """`bipft_tensor`."""

    _fields_ = [("name", ctypes.c_char_p), ("data", ctypes.c_void_p), ("bytes", ctypes.c_uint64)]


def path() -> Path | None:
    """The library's file, or None: installed where there was no compiler."""
    for directory in bipft_runtime.__path__:  # an editable install has two
        for name in _NAMES:
            if (file := Path(directory) / name).exists():
                return file
    return None


@functools.cache
def loaded() -> ctypes.CDLL | None:
    """The library with its functions declared; None where there is no file.

    Raises: ImportError for a library of another version, or one that cannot be loaded.
    """
    file = path()
    if file is None:
        return None
    try:
        library = ctypes.CDLL(os.fspath(file))
    except OSError as error:
        raise ImportError(f"{file}: {error}: install bipft_runtime again") from error
    version = library.bipft_abi_version()
    if version != ABI_VERSION:
        raise ImportError(
            f"{file} has version {version} of the interface, this package needs {ABI_VERSION}: "
            "install bipft_runtime again"
        )
    _declare(library)
    return library


def instruction_sets() -> tuple[str, ...]:
    """Those that the library has and this processor runs, the fastest first; () without library."""
    library = loaded()
    return () if library is None else tuple(library.bipft_instruction_sets().decode().split(","))


def checked(function, *arguments) -> None:
    """Calls a function that returns 0 or fills a message. Raises: ValueError with the message."""
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    if function(*arguments, message, _MESSAGE_BYTES):
        raise ValueError(message.value.decode(errors="replace"))


def new_model(architecture: Architecture, tensors: ctypes.Array, instruction_set: str) -> int:
    """A handle of a model. Raises: ValueError with the library's message."""
    message = ctypes.create_string_buffer(_MESSAGE_BYTES)
    handle = loaded().bipft_new(
        ctypes.byref(architecture),
        tensors,
        len(tensors),
        instruction_set.encode(),
        message,
        _MESSAGE_BYTES,
    )
    if not handle:
        raise ValueError(message.value.decode(errors="replace"))
    return handle


def _declare(library: ctypes.CDLL) -> None:
    handle = pointer = ctypes.c_void_p
    integer, text = ctypes.c_int32, ctypes.c_char_p
    error = (text, ctypes.c_size_t)
    for name, result, arguments in (
        ("instruction_sets", text, ()),
        ("new", handle, (pointer, pointer, integer, text, *error)),
        ("delete", None, (handle,)),
        ("instruction_set", text, (handle,)),
        (
            "encode",
            integer,
            (handle, pointer, pointer, integer, integer, pointer, pointer, *error),
        ),
        ("embed", integer, (handle, pointer, pointer, integer, pointer, *error)),
        (
            "layers",
            integer,
            (handle, integer, integer, pointer, integer, integer, pointer, *error),
        ),
        ("pool", integer, (handle, pointer, pointer, *error)),
        (
            "products",
            ctypes.c_double,
            (text, pointer, pointer, integer, pointer, integer, integer, integer, pointer),
        ),
    ):
        function = getattr(library, f"bipft_{name}")
        function.restype, function.argtypes = result, list(arguments)
