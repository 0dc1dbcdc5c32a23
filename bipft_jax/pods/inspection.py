"""Looks at a pretraining run on a TPU slice before it is there: compiles every program of it,
checks them, and models the time of an update."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from bipft_jax.pods import checks, fitting, hosts, scaling
from bipft_jax.pods.compiler import CompilationError
from bipft_jax.pods.fitting import Fit
from bipft_jax.pods.programs import Compiled, bytes_on_a_device, compiled
from bipft_jax.pods.scaling import Rung
from bipft_jax.pods.setting import Setting, on_one_device, setting_of
from bipft_jax.pods.timeline import Step
from bipft_jax.training.learner import Program

_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Input:
    """Sequences a second. wanted: by the devices of the host with the most rows. made: by one
    process of this machine. measured: on which text."""

    wanted: float
    made: float
    measured: str


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was seen. step, input: None if the update does not compile. curve, fit: None if not
    asked for, or not possible. reasons: why the run cannot or should not start; empty if it can."""

    setting: Setting
    programs: tuple[Compiled, ...]
    step: Step | None
    input: Input | None
    curve: tuple[Rung, ...] | None
    fit: Fit | None
    reasons: tuple[str, ...]

    @property
    def update(self) -> Compiled | None:
        """The program of an update."""
        return next((one for one in self.programs if one.name == "update"), None)

    @property
    def tokens_per_second(self) -> float:
        """Of the whole run."""
        return self.setting.config.batch_size * self.setting.length / self.step.seconds

    @property
    def mfu(self) -> float:
        """Fraction of the peak, in bfloat16, that the model's FLOPs are of."""
        devices, peak = self.setting.layout.devices, self.setting.chip.peak("bf16")
        return self.setting.flops / self.step.seconds / devices / peak


def inspect(
    setting: Setting, say: Callable[[str], None], *, curve: bool = False, fit: bool = False
) -> Inspection:
    """Compiles and checks everything; takes minutes. say: gets a line before each program."""
    reasons = checks.rows(setting.mesh, setting.layout, setting.config.batch_size)
    programs, todo = [], setting.programs()
    for number, program in enumerate(todo, start=1):
        say(f"compiling {program.name} ({number} of {len(todo)})")
        try:
            one = compiled(program, setting.mesh, setting.chip, _resident(setting, program, todo))
        except CompilationError as error:
            reasons.append(_refused(setting, program.name, error))
            continue
        programs.append(one)
        reasons += _too_large(setting, one)
    update = next((one for one in programs if one.name == "update"), None)
    step = wanted = rungs = largest = None
    if update is not None:
        step = scaling.step_of(update, setting)
        tensor = setting.mesh.shape["tensor"]
        reasons += checks.gathers(step.collectives, setting.kernels, tensor)
        reasons += checks.loops(step.collectives)
        say("measuring how fast this machine makes examples")
        wanted = _input(setting, step)
    if curve and update is not None:
        rungs, refused = _curve(setting, update, say)
        reasons += refused
    if fit:
        largest = fitting.fit(setting, say)
        if largest.remat is None:
            reasons.append(f"{setting.rows} sequences on a device fit with no remat policy")
    return Inspection(
        setting, tuple(programs), step, wanted, rungs, largest, tuple(dict.fromkeys(reasons))
    )


def _resident(setting: Setting, program: Program, order: list[Program]) -> int:
    """Bytes on a device of what the run keeps while it runs a program: the teacher; the state, once
    it is made; then the codes of the last log point."""
    kept = bytes_on_a_device(setting.teacher_params)
    names = [one.name for one in order]
    if names.index(program.name) > names.index("state"):
        kept += bytes_on_a_device(setting.learner.abstract_state)
    if names.index(program.name) > names.index("codes"):
        kept += setting.code_bytes
    return kept


def _refused(setting: Setting, name: str, error: CompilationError) -> str:
    if not error.memory:
        return f"{name} does not compile: {error}"
    return f"{name} does not fit: {error}. Largest buffers: {error.memory}. {_remedy(setting)}"


def _too_large(setting: Setting, one: Compiled) -> list[str]:
    memory, hbm = one.memory, setting.chip.hbm
    if memory.total <= hbm:
        return []
    return [
        f"{one.name} does not fit: it needs {memory.total / _GIB:.2f} of {hbm / _GIB:.2f} GiB "
        f"(arguments {memory.arguments / _GIB:.2f}, temporaries {memory.temporaries / _GIB:.2f}, "
        f"held beside it {memory.beside / _GIB:.2f}). {_remedy(setting)}"
    ]


def _remedy(setting: Setting) -> str:
    config = setting.config
    remedies = []
    if config.remat != "full":
        remedies.append("a remat policy that stores less (lean, dots, full)")
    remedies.append(f"--config.accumulation above {config.accumulation}")
    if setting.layout.devices > config.mesh.fsdp * config.mesh.tensor:
        remedies.append(f"--config.mesh.fsdp above {config.mesh.fsdp}")
    return f"Try {', '.join(remedies)}, or fewer sequences; --fit searches"


def _input(setting: Setting, step: Step) -> Input:
    config, layout = setting.config, setting.layout
    rows = max(
        len(layout.rows_held(config.batch_size, host)) for host in set(layout.hosts.tolist())
    )
    objective = setting.learner.objective.from_corpus
    made = hosts.sequences_per_second(objective, config, setting.length)
    text = f"of {config.corpus_dir or 'a small corpus of random words'}"
    return Input(rows / step.seconds, made, text)


def _curve(
    setting: Setting, update: Compiled, say: Callable[[str], None]
) -> tuple[tuple[Rung, ...] | None, list[str]]:
    """Rungs, and why there are none. Of several slices, the program of one is moved."""
    try:
        own = setting
        if setting.slices > 1:
            config = setting.config.copy_and_resolve_references()
            config.batch_size //= setting.slices
            vocabulary = setting.learner.model.config.vocab_size
            own = setting_of(config, setting.topology, 1, vocabulary, setting.length)
            say(f"compiling update for one slice of {setting.topology}")
            update = compiled(own.update(), own.mesh, own.chip)
        one = on_one_device(own)
        say("compiling update for one device")
        alone = compiled(one.update(), one.mesh, one.chip)
    except CompilationError as error:
        return None, [f"there is no baseline for the curve: {_refused(setting, 'update', error)}"]
    return tuple(scaling.curve(update, own, alone)), []
