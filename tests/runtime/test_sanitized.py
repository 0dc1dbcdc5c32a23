"""The compiled kernels under the sanitizers of addresses, undefined behaviour and threads."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from bipft_runtime.compiled_encoder import shape_of

from tests.runtime.random_models import RECIPES, random_model, with_zeros

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "bipft_jax" / "runtime" / "src"
FLAGS = {
    "portable": ["-march=x86-64-v2"],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mavx512vpopcntdq"],
}


def dumped(model, path):
    """The model as sanitized.cc reads it."""
    shape = bytes(shape_of(model.architecture))
    with path.open("wb") as file:
        file.write(shape + struct.pack("<i", len(model.tensors)))
        for name, tensor in model.tensors.items():
            file.write(struct.pack("<i", len(name)) + name.encode())
            file.write(struct.pack("<q", tensor.nbytes) + tensor.tobytes())
    return path


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_models_run_and_damaged_ones_are_refused(tmp_path, sanitizers):
    common = ["g++", "-std=gnu++17", "-O1", "-g", "-ffp-contract=off", f"-fsanitize={sanitizers}"]
    common += ["-fno-sanitize-recover=all", f"-I{SOURCES}", "-w", "-pthread"]
    objects = []
    for source in [*SOURCES.glob("*.cc"), HERE / "sanitized.cc"]:
        name = source.stem.removeprefix("kernels_")
        if name == "neon":
            continue
        objects.append(tmp_path / f"{source.stem}.o")
        flags = FLAGS.get(name, FLAGS["portable"])
        subprocess.run([*common, *flags, "-c", source, "-o", objects[-1]], check=True)
    program = tmp_path / "sanitized"
    subprocess.run([*common, *objects, "-o", program], check=True)
    models = [random_model(recipe, rank, seed=4) for recipe, rank in RECIPES]
    models += [with_zeros(model) for model in models]
    files = [dumped(model, tmp_path / str(number)) for number, model in enumerate(models)]
    run = subprocess.run([program, *files], capture_output=True, text=True, timeout=1200)
    assert (run.returncode, run.stderr) == (0, ""), run.stdout + run.stderr
    assert run.stdout.count("fine") == len(files)
