"""Compiles programs of a run one after another: time, memory and cycles of each."""

from __future__ import annotations

import dataclasses
import time

import jax

from bipft_jax.pods import compiler, cost, hlo
from bipft_jax.pods.chips import Chip
from bipft_jax.training.learner import Program


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of HBM of one device.

    arguments: of the program. outputs: that do not take the place of arguments. temporaries, code:
    of the program. beside: arrays that the run holds meanwhile and that are no arguments.
    """

    arguments: int
    outputs: int
    temporaries: int
    code: int
    beside: int

    @property
    def total(self) -> int:
        """What must fit."""
        return self.arguments + self.outputs + self.temporaries + self.code + self.beside


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program compiled for a slice. seconds: of wall time to lower and compile it; cpu_seconds:
    of all cores."""

    name: str
    module: hlo.Module
    cost: cost.Cost
    memory: Memory
    seconds: float
    cpu_seconds: float


def compiled(program: Program, mesh: jax.sharding.Mesh, chip: Chip, resident: int = 0) -> Compiled:
    """Compiles a program of a run.

    Arguments:
      resident: bytes on a device of the arrays that the run holds, arguments or not.

    Raises: CompilationError if libtpu refuses it, also because it does not fit.
    """
    began, cpu = time.perf_counter(), time.process_time()
    made = compiler.compiled_for_tpu(program.lowered(mesh))
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    sizes = made.compiled.memory_analysis()
    memory = Memory(
        arguments=sizes.argument_size_in_bytes,
        outputs=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
        beside=max(0, resident - sizes.argument_size_in_bytes),
    )
    return Compiled(program.name, made.module, cost.of(made, chip), memory, seconds, cpu)


def bytes_on_a_device(tree: object) -> int:
    """Bytes of the arrays of a tree on each device; without a sharding an array is whole."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        place = getattr(leaf, "sharding", None)
        shape = leaf.shape if place is None else place.shard_shape(leaf.shape)
        total += jax.ShapeDtypeStruct(shape, leaf.dtype).size * leaf.dtype.itemsize
    return total
