"""Checkpoints: one directory per step with all that resuming, finetuning and inference need.

`files.py` documents the layout of the directory. Orbax writes a checkpoint into a temporary
directory in the background and renames it when it is complete, so a directory named by a step is
completely written; older checkpoints are deleted only after the rename. The digests of its files
are written just before the rename, and compared before any of them is used.
"""

import contextlib
import dataclasses
import json
import logging
import math
import os
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from bipft_jax.checkpoints.digests import write_digests
from bipft_jax.checkpoints.files import (
    JSON_FILES,
    CheckpointError,
    DamagedCheckpointError,
    RestoredParameters,
    read_arrays,
    read_json,
    read_parameters,
    reason,
    set_aside,
    steps_in,
    stored_arrays,
    verify,
)
from bipft_jax.checkpoints.workdir import absolute
from bipft_jax.data.tokenizers import Tokenizer, tokenizer_from_dict
from bipft_jax.models.parameters import differences, named_leaves

_log = logging.getLogger(__name__)


class SaveError(CheckpointError):
    """A checkpoint could not be written; earlier ones are untouched."""


class _Manager(ocp.CheckpointManager):
    """Orbax's manager without its own query of JAX's preemption sync point. The sync point expects
    the consecutive numbers of `processes.Interruption`; orbax would query it with old steps."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpointer:
    """Saves and restores the checkpoints of one run. Use it as a context manager, or `close()` it.

    It keeps the two latest checkpoints, the best one by a metric, and those whose step is a
    multiple of `keep_every`. Saving is asynchronous: `save` returns once the state is copied, so
    that the next step may donate its buffers. The next `save`, `wait` or `close` raises a failure.
    All processes of a job make the same calls.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        keep_every: int,
        best_metric: str | None,
        best_mode: Literal["min", "max"],
    ):
        """Removes incomplete checkpoints of a killed process, at the latest with the next save.

        Arguments:
          workdir: checkpoints go to its `checkpoints` directory, which is created.
          keep_every: keep the checkpoints of steps that are multiples of this; 0 disables the rule.
          best_metric: name in the `metrics` of `save` that selects the best checkpoint; None
            disables the rule.
          best_mode: "min" if lower is better, "max" if higher is. Of equal checkpoints the first is
            the best, as in the references (SPEC 2.7).

        Raises:
          ValueError: `best_mode` is unknown.
          DamagedCheckpointError: the metrics of all existing checkpoints are damaged.
        """
        if best_mode not in ("min", "max"):
            raise ValueError(f'best_mode is {best_mode!r}; it must be "min" or "max".')
        self._workdir = absolute(workdir)
        self._directory = self._workdir / "checkpoints"
        self._best_metric, self._best_mode = best_metric, best_mode
        self._saving: int | None = None
        self._set_aside_damaged_metrics()

        # Two, so that restoring can fall back to the older one if the newest is damaged.
        policies: list[Any] = [ocp.checkpoint_managers.LatestN(2)]
        if keep_every:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        if best_metric is not None:
            policies.append(_Best(metric=best_metric, mode=best_mode))
        self._manager = _Manager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                cleanup_tmp_directories=True,
                # Process 0 calls it in the background, after the last write to an item and before
                # the rename, so no checkpoint is ever without digests.
                async_options=ocp.AsyncOptions(post_finalization_callback=self._write_digests),
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
            ),
        )
        self._metrics = {
            step: read_json(self._directory, step, "metrics") for step in self._manager.all_steps()
        }

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def save(
        self,
        step: int,
        state: Any,
        *,
        config: Mapping[str, Any],
        tokenizer: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Waits for the previous checkpoint, begins to write this one, and returns.

        Arguments:
          step: greater than `latest_step()`.
          state: a flax.struct dataclass of jax arrays with a `params` field and a `replace` method.
          config, tokenizer: JSON values (`ConfigDict.to_dict()`, `Tokenizer.to_dict()`), which make
            the checkpoint self-contained.
          metrics: scores at this step, if it was evaluated; NaN and infinity become None.

        Raises:
          SaveError: writing this checkpoint, or the previous one, failed.
          CheckpointError: `step` is not after the latest checkpoint.
        """
        self.wait()
        latest = self.latest_step()
        if latest is not None and step <= latest:
            raise CheckpointError(
                f"{self._directory} already has a checkpoint of step {latest}; step {step} cannot "
                "be saved after it."
            )
        values = {name: float(value) for name, value in (metrics or {}).items()}
        values = {name: x if math.isfinite(x) else None for name, x in values.items()}
        selection = {"best_metric": self._best_metric, "best_mode": self._best_mode}
        items = ocp.args.Composite(
            params=ocp.args.PyTreeSave(state.params),
            training_state=ocp.args.PyTreeSave(state.replace(params=None)),
            # A copy: the caller may change its dictionary before orbax writes it.
            config=ocp.args.JsonSave(json.loads(json.dumps(config))),
            tokenizer=ocp.args.JsonSave(dict(tokenizer)),
            selection=ocp.args.JsonSave(selection),
            metrics=ocp.args.JsonSave(values),
        )
        self._saving, self._metrics[step] = step, values
        with self._naming_failure():
            self._manager.save(step, args=items, metrics=values, force=True)

    def wait(self) -> None:
        """Blocks until the last `save` is on disk. Raises SaveError if it failed."""
        with self._naming_failure():
            self._manager.wait_until_finished()
        self._saving = None

    def close(self) -> None:
        """Waits, then frees what the checkpointer holds. Raises SaveError if the save failed."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def keep_parameters(self, steps: Collection[int]) -> None:
        """Keeps the parameters and JSON items of some checkpoints of a finished run and deletes
        everything else: the optimiser's moments are two thirds of a checkpoint, and a finished run
        never resumes. All processes of a job call it."""
        self.wait()
        for step in self._manager.all_steps():
            if step not in steps:
                self._manager.delete(step)
        multihost_utils.sync_global_devices("other checkpoints are deleted")
        if jax.process_index() == 0:
            for step in steps:
                state = self._directory / str(step) / "training_state"
                shutil.rmtree(state, ignore_errors=True)  # a remainder costs only disk space
        multihost_utils.sync_global_devices("training states are deleted")

    def latest_step(self) -> int | None:
        """The step of the newest checkpoint, or of one being written; None if none exists."""
        return self._manager.latest_step()

    def best_step(self) -> int | None:
        """The step of the best checkpoint; None if no checkpoint has the metric."""
        metrics = {step: self._metrics[step] for step in self._manager.all_steps()}
        return _best_step(metrics, self._best_metric, self._best_mode)

    def config(self, step: int) -> dict[str, Any]:
        """The configuration stored in the checkpoint of a step."""
        self.wait()
        return read_json(self._directory, step, "config")

    def tokenizer(self, step: int) -> dict[str, Any]:
        """The stored tokenizer, for `tokenizer_from_dict` or `verify_tokenizer`."""
        self.wait()
        return read_json(self._directory, step, "tokenizer")

    def metrics(self, step: int) -> dict[str, float | None]:
        """The metrics stored in the checkpoint of a step; empty if it was not evaluated."""
        self.wait()
        return read_json(self._directory, step, "metrics")

    def restore(self, step: int, abstract_state: Any, *, tokenizer: Tokenizer | None = None) -> Any:
        """The train state of a step, bit for bit.

        Arguments:
          step: of an existing checkpoint.
          abstract_state: the state with `jax.ShapeDtypeStruct`s (or arrays) as leaves; each array
            is restored to its leaf's sharding, or to the first local device if a leaf has none.
          tokenizer: must equal that of the checkpoint; None skips the comparison.

        Returns:
          A state of the same structure as `abstract_state`.

        Raises:
          DamagedCheckpointError: a file is missing, truncated or changed.
          CheckpointError: the step does not exist.
          ValueError: names, shapes or dtypes differ from those of `abstract_state`, or the
            tokenizer differs.
        """
        self.wait()
        verify(self._directory, step, ("params", "training_state", *JSON_FILES))
        # Reads unused items too: a checkpoint that lacks one is damaged.
        stored = {item: read_json(self._directory, step, item) for item in JSON_FILES}
        if tokenizer is not None:
            verify_tokenizer(stored["tokenizer"], tokenizer)
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default
            ),
            abstract_state,
        )
        trees = {"params": target.params, "training_state": target.replace(params=None)}
        sentences = [
            sentence
            for item, tree in trees.items()
            for sentence in differences(
                named_leaves(stored_arrays(self._directory, step, item)), named_leaves(tree)
            )
        ]
        if sentences:
            raise ValueError(
                f"The checkpoint {self._directory / str(step)} is of another model or optimizer: "
                f"{'; '.join(sentences)}."
            )
        restored = {
            item: read_arrays(
                self._directory,
                step,
                item,
                tree,
                ocp.checkpoint_utils.construct_restore_args(tree),
            )
            for item, tree in trees.items()
        }
        return restored["training_state"].replace(params=restored["params"])

    def restore_latest(
        self, abstract_state: Any, *, tokenizer: Tokenizer | None = None
    ) -> tuple[Any, int] | None:
        """The newest undamaged checkpoint as (state, step); None if no checkpoint exists.

        Arguments as for `restore`.

        Logs newer checkpoints that are damaged and, once an older one is restored, renames them to
        `damaged-STEP` so that their steps can be saved again. Deletes nothing. In a job of several
        processes this needs digests: without them damage is an error, because processes that read
        other files of the checkpoint do not detect it.

        Raises:
          DamagedCheckpointError: every checkpoint is damaged.
          CheckpointError: in a job of several processes, only one has detected damage.
          ValueError: as `restore`.
        """
        self.wait()
        damaged: list[DamagedCheckpointError] = []
        damaged_steps: list[int] = []
        for step in reversed(self._manager.all_steps()):
            try:
                state = self.restore(step, abstract_state, tokenizer=tokenizer)
            except DamagedCheckpointError as error:
                _log.error("%s Trying the checkpoint before it.", error)
                damaged.append(error)
                damaged_steps.append(step)
                continue
            if damaged_steps:
                if jax.process_index() == 0:
                    for other in damaged_steps:
                        set_aside(self._directory, other)
                multihost_utils.sync_global_devices("set aside damaged checkpoints")
                self._manager.reload()
            return state, step
        if damaged:
            raise _none_left(self._directory, damaged)
        return None

    def _set_aside_damaged_metrics(self) -> None:
        # Orbax reads all metrics at construction and would fail at every start; flipped bits in
        # them could make another checkpoint the best.
        steps = steps_in(self._directory)
        damaged: dict[int, CheckpointError] = {}
        for step in steps:
            try:
                read_json(self._directory, step, "metrics")
            except CheckpointError as error:
                damaged[step] = error
        if steps and len(damaged) == len(steps):
            raise _none_left(self._directory, damaged.values())
        multihost_utils.sync_global_devices("all have looked at the metrics")
        if jax.process_index() == 0:
            for step, error in damaged.items():
                _log.error("%s It is now %s.", error, set_aside(self._directory, step))
        multihost_utils.sync_global_devices("set aside damaged metrics")

    def _write_digests(self) -> None:
        final = self._directory / str(self._saving)
        kind = ocp.path.atomicity_defaults.get_default_temporary_path_class(final)
        write_digests(Path(kind.from_final(final).get()))

    @contextlib.contextmanager
    def _naming_failure(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if self._saving is None:
                raise
            step, self._saving = self._saving, None
            self._metrics.pop(step, None)
            # Orbax drops the checkpoints that it would have deleted after this save from its list
            # before it writes; reloading restores the list.
            self._manager.reload()
            latest = self._manager.latest_step()
            usable = (
                "No earlier checkpoint exists."
                if latest is None
                else f"The checkpoint of step {latest} is untouched and usable."
            )
            raise SaveError(
                f"The checkpoint of step {step} could not be written to {self._directory}: "
                f"{reason(error)}. {usable} Make room or repair the disk, then start the same "
                f"command with --workdir={self._workdir} again."
            ) from error


def restore_params(
    workdir: str | os.PathLike[str], step: int | str | None = None
) -> RestoredParameters:
    """The parameters and JSON items of a checkpoint, without the optimiser state.

    All processes of a job make the same call.

    Arguments:
      workdir: of a pretraining or finetuning run.
      step: a step; "best" by the run's selection metric (the latest if none was evaluated: a run
        may have stopped before its first evaluation); "latest" or None for the newest undamaged
        one (damaged ones are logged).

    Returns:
      Parameters as nested dictionaries of NumPy arrays, whatever devices they were trained on.

    Raises:
      CheckpointError: no checkpoint exists, or not this one.
      DamagedCheckpointError: the requested checkpoint, or every one, is damaged; for "best" also if
        the metrics of any checkpoint are.
    """
    directory = absolute(workdir) / "checkpoints"
    steps = steps_in(directory)
    if not steps:
        raise CheckpointError(f"There are no checkpoints in {directory}. Is {workdir} a workdir?")
    if isinstance(step, int):
        return read_parameters(directory, step)
    if step == "best":
        metrics = {candidate: read_json(directory, candidate, "metrics") for candidate in steps}
        best = _best_step(metrics, **_selection(directory, steps))
        return restore_params(workdir, "latest" if best is None else best)
    if step not in ("latest", None):
        raise CheckpointError(f'{step!r} is not a step, "best" or "latest".')
    damaged: list[DamagedCheckpointError] = []
    for candidate in reversed(steps):
        try:
            return read_parameters(directory, candidate)
        except DamagedCheckpointError as error:
            _log.error("%s Trying the checkpoint before it.", error)
            damaged.append(error)
    raise _none_left(directory, damaged)


def _selection(directory: Path, steps: Sequence[int]) -> dict[str, Any]:
    """The run's selection metric and mode, which every checkpoint stores; skips damaged ones."""
    damaged: list[DamagedCheckpointError] = []
    for step in reversed(steps):
        try:
            return read_json(directory, step, "selection")
        except DamagedCheckpointError as error:
            damaged.append(error)
    raise _none_left(directory, damaged)


def verify_tokenizer(checkpoint_tokenizer: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer other than that of a checkpoint.

    Arguments:
      checkpoint_tokenizer: as stored in the checkpoint.
      tokenizer: the one to be used, such as the corpus's.

    Raises:
      ValueError: their fingerprints differ.
    """
    own = tokenizer_from_dict(dict(checkpoint_tokenizer))
    if own.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"The checkpoint was trained with another tokenizer: its own is {_describe(own)}, this "
            f"one is {_describe(tokenizer)}. Use data prepared with the checkpoint's tokenizer, or "
            "a checkpoint trained with this one."
        )


def _none_left(directory: Path, damaged: Iterable[Exception]) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"No usable checkpoint is left in {directory}: {' '.join(map(str, damaged))} Restore the "
        "directory from a backup, or start again with another --workdir."
    )


def _describe(tokenizer: Tokenizer) -> str:
    return (
        f"a {type(tokenizer).__name__} with {tokenizer.vocab_size} pieces "
        f"(fingerprint {tokenizer.fingerprint[:12]})"
    )


def _score(metrics: Mapping[str, float | None], metric: str, mode: str) -> float:
    """Higher is better; minus infinity for a checkpoint without the metric."""
    value = metrics.get(metric)
    if value is None:
        return -math.inf
    return value if mode == "max" else -value


def _best_step(
    metrics: Mapping[int, Mapping[str, float | None]], best_metric: str | None, best_mode: str
) -> int | None:
    if best_metric is None:
        return None
    scores = {step: _score(metrics[step], best_metric, best_mode) for step in sorted(metrics)}
    best = max(scores, key=scores.__getitem__, default=None)  # the first of equal ones
    return None if best is None or scores[best] == -math.inf else best


@dataclasses.dataclass(kw_only=True)
class _Best(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the checkpoint of `_best_step`; orbax's own BestN keeps the last of equal ones."""

    metric: str
    mode: str

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        metrics = {info.step: info.metrics or {} for info in checkpoints}
        best = _best_step(metrics, self.metric, self.mode)
        return [info.step == best for info in checkpoints]
