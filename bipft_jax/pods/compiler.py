"""Compiles for TPU chips on a machine without one, and reads what the compiler writes of a program.

libtpu dumps its schedules only where LIBTPU_INIT_ARGS says when it is loaded, once in a process. So
`tpu`, which loads it, makes one directory for the process, and `compiled_for_tpu` empties that
after each program. Compile one program at a time in a process.
"""

from __future__ import annotations

import atexit
import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.experimental import topologies

from bipft_jax.pods import bundles, hlo
from bipft_jax.pods.chips import Chip, chip_of

# Without these, libtpu searches for the machine's TPU and its neighbours, which takes long.
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

_FLAGS = "LIBTPU_INIT_ARGS"
# Only the last of the dumps that there are of an instruction: all of them take 90 MB.
_DUMPED = "--xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=^final_bundles$"


@dataclasses.dataclass(frozen=True)
class Program:
    """A program compiled for a TPU.

    compiled: jax's object, for `memory_analysis`. module: its instructions as they are scheduled.
    schedules: of the instructions, by name; an instruction that issues nothing on the core (an
    asynchronous copy) has none.
    """

    compiled: jax.stages.Compiled
    module: hlo.Module
    schedules: Mapping[str, bundles.Schedule]


def tpu(topology: str, slices: int = 1) -> tuple[Chip, list[jax.Device]]:
    """The chip of a topology ("v5e:2x2"), and the devices of `slices` such slices, which compile
    but cannot run. Call it before anything else of jax, which then runs on the CPU.

    Raises: ValueError for an unknown topology, or if libtpu is not installed.
    """
    chip = chip_of(topology)
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            "the TPU compiler is missing: pip install 'bipft_jax[tpu-compiler]', in a checkout "
            "pip install -e '.[tpu-compiler]' (it needs no TPU)"
        )
    # Otherwise jax would find libtpu and use it as the machine's backend.
    jax.config.update("jax_platforms", "cpu")
    for name, value in NO_TPU_HERE.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if slices > 1:
        options["num_slices"] = slices
    if chip.chip_config:
        options["chip_config_name"] = chip.chip_config
    given = os.environ.get(_FLAGS, "")
    os.environ[_FLAGS] = f"{given} --xla_jf_dump_to={_schedules()} {_DUMPED}".lstrip()
    try:
        return chip, list(topologies.get_topology_desc(topology, "tpu", **options).devices)
    except Exception as error:  # whatever libtpu raises
        raise ValueError(f"libtpu does not know the topology {topology!r}: {error}") from error
    finally:
        os.environ[_FLAGS] = given  # not for processes that this one starts


@functools.cache
def _schedules() -> Path:
    """Where this process's libtpu dumps schedules, as long as the process lives."""
    directory = tempfile.mkdtemp(prefix="tpu_schedules_")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return Path(directory)


class CompilationError(ValueError):
    """libtpu refuses a program. memory: its largest buffers if it does not fit, else ""."""

    def __init__(self, message: str, memory: str):
        super().__init__(message)
        self.memory = memory


def compiled_for_tpu(lowered: jax.stages.Lowered) -> Program:
    """Compiles for the devices that `tpu` returned, and reads what libtpu dumps: jax's own
    `as_text` cannot read every v6e program.

    Raises: CompilationError if libtpu refuses the program; ValueError if it dumps no program or no
      schedule.
    """
    directory = _schedules()
    _empty(directory)  # of a compilation that failed
    try:
        with tempfile.TemporaryDirectory() as name:
            written = {"xla_dump_to": name, "xla_dump_hlo_as_text": True}
            try:
                compiled = lowered.compile(compiler_options=written)
            except jax.errors.JaxRuntimeError as error:
                message = re.split("\n\n|See https://", str(error))[0].strip().rstrip(".")
                memory = _largest_buffers(Path(name)) if "Oom" in message else ""
                raise CompilationError(message, memory) from error
            programs = list(Path(name).glob("*.after_codegen.txt"))
            if len(programs) != 1:
                raise ValueError("this libtpu does not write down the program that it compiled")
            module = hlo.parse(programs[0].read_text(encoding="utf-8"))
        schedules = bundles.read(directory.iterdir())
    finally:
        _empty(directory)
    if not schedules:
        raise ValueError(
            "libtpu did not write down its schedule: either this version does not, or something "
            "else loaded it before bipft_jax.pods.compiler.tpu was called"
        )
    return Program(compiled, module, schedules)


def _largest_buffers(directory: Path) -> str:
    """Size and shapes of the three largest of a program, from the dump of its memory."""
    for path in directory.glob("*-memory-usage-report.txt"):
        # cumulative_size; size; offset; used_by_n_values; shapes_list
        rows = [line.split(";") for line in path.read_text(encoding="utf-8").splitlines()]
        buffers = [(row[1].strip(), row[4].strip()) for row in rows if len(row) == 5][1:4]
        return ", ".join(f"{size} {shapes[:80]}" for size, shapes in buffers)
    return "unknown"


def _empty(directory: Path) -> None:
    for path in directory.iterdir():
        path.unlink()
