"""Runs packed 1-bit BERT models (`python -m bipft_jax.interop.pack` writes them), without JAX.

from bipft_runtime import Model

model = Model("model.safetensors")
model.predict(["a fine film"])                 # [Prediction(label="1", ...)]
model.encode(["a fine film"])[0].pooled        # float32 [hidden]
"""

from bipft_runtime.file import ModelFileError
from bipft_runtime.model import Encoding, Model, Prediction

__all__ = ["Encoding", "Model", "ModelFileError", "Prediction"]
