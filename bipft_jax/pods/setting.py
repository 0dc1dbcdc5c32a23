"""A pretraining run on a TPU slice that need not be there: its mesh, its learner, its programs."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import ml_collections

from bipft_jax import pretrain
from bipft_jax.checkpoints.source import load_input
from bipft_jax.data.corpus.blocks import MINIMUM_SEQUENCE_LENGTH
from bipft_jax.models.parameters import Params, named_leaves
from bipft_jax.pods.chips import Chip
from bipft_jax.pods.compiler import tpu
from bipft_jax.pods.topology import Layout
from bipft_jax.training import sharding
from bipft_jax.training.flops import update_flops
from bipft_jax.training.learner import Learner, Program


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run consists of before it has a corpus.

    length: tokens of an example. teacher_params: shapes, dtypes and shardings, or None.
    """

    config: ml_collections.ConfigDict
    topology: str
    slices: int
    chip: Chip
    layout: Layout
    learner: Learner
    length: int
    teacher_params: Params | None

    @property
    def mesh(self) -> jax.sharding.Mesh:
        """Over all devices."""
        return self.learner.mesh

    @property
    def chips(self) -> int:
        """Number of chips in all slices."""
        return self.layout.devices // self.chip.devices

    @property
    def rows(self) -> int:
        """Sequences of a batch on one device."""
        return self.config.batch_size // sharding.batch_shards(self.mesh)

    @property
    def flops(self) -> float:
        """Model FLOPs of an update, on all devices."""
        config, objective = self.learner.model.config, self.learner.objective.from_corpus
        heads = objective.head_products(config, objective.example(self.length, self.config))
        return update_flops(config, self.config.batch_size, self.length, heads)

    @property
    def kernels(self) -> dict[str, tuple[int, ...]]:
        """Shape [layers, in, out] of each binarised kernel by its module's path."""
        codes = self.learner.codes.eval_shape(self.learner.abstract_state.params)
        return {path: leaf.shape for path, leaf in codes.items()}

    @property
    def code_bytes(self) -> int:
        """Bytes on a device of the int8 codes of the binarised kernels, split as these are."""
        leaves = named_leaves(self.learner.abstract_state.params)
        kernels = [leaves[f"{path}/kernel"] for path in self.kernels]
        return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in kernels)

    def programs(self) -> list[Program]:
        """Every program of the run."""
        return pretrain.programs(self.config, self.learner, self.length, self.teacher_params)

    def update(self) -> Program:
        """The program of an update."""
        return next(program for program in self.programs() if program.name == "update")


def setting_of(
    config: ml_collections.ConfigDict,
    topology: str,
    slices: int,
    vocab_size: int,
    length: int,
    devices: int | None = None,
) -> Setting:
    """A run on `slices` slices of a topology, or on the first `devices` of them.

    Raises: ValueError, before anything is compiled, for a topology that does not exist, keys that
      do not go together, or a mesh, model or batch that does not divide.
    """
    if slices < 1:
        raise ValueError(f"slices is {slices}: it must be 1 or more")
    pretrain.check_together(config)
    chip, all_devices = tpu(topology, slices)
    mesh = sharding.make_mesh(config.mesh.fsdp, config.mesh.tensor, all_devices[:devices])
    learner = pretrain.learner_of(config, vocab_size, mesh)
    positions = learner.model.config.max_positions
    if not MINIMUM_SEQUENCE_LENGTH <= length <= positions:
        raise ValueError(
            f"length is {length}: it must be {MINIMUM_SEQUENCE_LENGTH} to {positions}, the model's "
            "positions"
        )
    teacher_params = None
    if config.teacher:
        source = load_input(config.teacher, "teacher", {})
        learner, params = pretrain.taught(config, learner, source)
        teacher_params = sharding.placed(mesh, params)
    layout = Layout.of(mesh, chip)
    return Setting(config, topology, slices, chip, layout, learner, length, teacher_params)


def changed(setting: Setting, **keys: Any) -> ml_collections.ConfigDict:
    """A copy of the config with other values of some keys; `mesh` takes a dictionary."""
    config = setting.config.copy_and_resolve_references()
    config.update(keys)
    return config


def on_one_device(setting: Setting) -> Setting:
    """The run of one device with its rows, the baseline of scaling."""
    smallest = "x".join(map(str, setting.chip.small_slices[0]))
    config = changed(setting, batch_size=setting.rows, mesh={"fsdp": 1, "tensor": 1})
    vocabulary = setting.learner.model.config.vocab_size
    name = f"{setting.chip.name}:{smallest}"
    return setting_of(config, name, 1, vocabulary, setting.length, devices=1)
