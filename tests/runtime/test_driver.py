"""The compiled kernels under the sanitizers of addresses, undefined behaviour and threads, and on
an emulated ARM processor."""

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from bipft_runtime.compiled_encoder import shape_of

from tests.runtime.random_models import RECIPES, random_model, with_zeros

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "bipft_jax" / "runtime" / "src"
X86 = {
    "portable": ["-march=x86-64-v2"],
    "avx2": ["-march=x86-64-v3"],
    "avx512": ["-march=x86-64-v4", "-mavx512vpopcntdq"],
}
ARM = {"portable": [], "neon": []}
ARM_COMPILER, ARM_EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"

pytestmark = pytest.mark.long


def dumped(model, path):
    """The model as driver.cc reads it."""
    shape = bytes(shape_of(model.architecture))
    with path.open("wb") as file:
        file.write(shape + struct.pack("<i", len(model.tensors)))
        for name, tensor in model.tensors.items():
            file.write(struct.pack("<i", len(name)) + name.encode())
            file.write(struct.pack("<q", tensor.nbytes) + tensor.tobytes())
    return path


def compiled(directory, compiler, sets, *flags):
    """driver.cc with the library. sets: instruction set -> its flags."""
    command = [compiler, "-std=gnu++17", "-O1", "-g", "-ffp-contract=off", "-pthread", "-w"]
    command += [f"-I{SOURCES}", *flags]
    objects = []
    for source in [*SOURCES.glob("*.cc"), HERE / "driver.cc"]:
        own = source.stem.removeprefix("kernels_")
        if own != source.stem and own not in sets:
            continue
        objects.append(directory / f"{source.stem}.o")
        of_set = sets.get(own, sets["portable"])
        subprocess.run([*command, *of_set, "-c", source, "-o", objects[-1]], check=True)
    program = directory / "driver"
    subprocess.run([*command, *objects, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    directory = tmp_path_factory.mktemp("models")
    models = [random_model(recipe, rank, seed=4) for recipe, rank in RECIPES]
    models += [with_zeros(model) for model in models]
    return [dumped(model, directory / str(number)) for number, model in enumerate(models)]


def lines(*command):
    """What a command prints; it must succeed without a word of a sanitizer."""
    run = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert (run.returncode, run.stderr) == (0, ""), run.stdout + run.stderr
    return run.stdout.splitlines()


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_models_run_and_damaged_ones_are_refused(tmp_path, files, sanitizers):
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    program = compiled(tmp_path, "g++", X86, *flags)
    assert len(lines(program, *files)) == len(files)


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_of_100_000_damaged_models_each_runs_or_is_refused(tmp_path, files):
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    program = compiled(tmp_path, "g++", X86, *flags)
    reports = lines(program, "--mutants", str(100_000 // len(files)), *files)
    counts = [re.search(r": (\d+) of (\d+) accepted", report).groups() for report in reports]
    assert sum(int(count) for _, count in counts) == 100_000
    assert all(0 < int(accepted) < int(count) for accepted, count in counts)


@pytest.mark.skipif(
    not all(map(shutil.which, ("g++", ARM_COMPILER, ARM_EMULATOR))),
    reason=f"needs g++, {ARM_COMPILER} and {ARM_EMULATOR}",
)
def test_neon_gives_the_bits_of_the_other_sets(tmp_path, files):
    for name in ("x86", "arm"):
        (tmp_path / name).mkdir()
    expected = lines(compiled(tmp_path / "x86", "g++", X86), *files)
    program = compiled(tmp_path / "arm", ARM_COMPILER, ARM, "-static")
    assert lines(ARM_EMULATOR, program, *files) == expected
    assert len(expected) == len(files)
