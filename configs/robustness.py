"""Robustness: how much a finetuned score depends on learning rate and batch size, with and without
distillation from a finetuned teacher, for a binary model that starts from full-precision weights
(the baseline) and for one that was pretrained in binary. BiPFT's paper asks this of its models.

    python launch/sweep.py --config=configs/robustness.py:RECIPE,TASK,BASELINE,BINARY,TEACHER,RATE \
        --config.glue_dir=DIR --workdir=runs/robustness

BASELINE: workdir of a full-precision pretraining run. BINARY: of one of RECIPE that started from
it, with or without @UPDATE. TEACHER: of one seed of BASELINE finetuned on TASK; empty: nothing is
distilled. RATE, the middle of the learning rates, is that of configs/finetune.py if it is left out;
small models need 1e-4 to 5e-4. Other keys are those of configs/finetune.py. The three workdirs:

    python launch/train.py --config=configs/pretrain.py:fp,base \
        --config.corpus_dir=CORPUS --workdir=runs/fp
    python launch/train.py --config=configs/pretrain.py:bipft_a,base --config.corpus_dir=CORPUS \
        --config.init_from=runs/fp --config.teacher=runs/fp --workdir=runs/bipft_a
    python launch/train.py --config=configs/finetune.py:fp,rte --config.init_from=runs/fp \
        --config.glue_dir=DIR --workdir=runs/rte-fp

with which the argument is bipft_a,rte,runs/fp,runs/bipft_a,runs/rte-fp/seed_0.

The rate is swept at the default batch size and the batch size at the middle rate, not both at once:
8 points for each of the 4 lines of sweep.png. Every point trains for the task's epochs, so the cost
is 32 finetunings with each seed of --config.seeds='(0,1,2)', in updates 46 times that of the
default, on RTE 71,608. With max_updates, larger batches see more examples.

No scores have been measured yet.
"""

import runpy
from pathlib import Path

import ml_collections

from bipft_jax.data.glue.tasks import TASKS
from bipft_jax.points import product

_PARTS = ("RECIPE", "TASK", "BASELINE", "BINARY", "TEACHER", "RATE")


def get_config(arg: str = "bipft_a,rte") -> ml_collections.ConfigDict:
    """arg: "RECIPE,TASK,BASELINE,BINARY,TEACHER,RATE"; only the points need the workdirs."""
    parts = _parts(arg)
    finetune = runpy.run_path(str(Path(__file__).with_name("finetune.py")))
    config = finetune["get_config"](f"{parts['RECIPE']},{parts['TASK']}")
    if parts["RATE"]:
        try:
            config.learning_rate = float(parts["RATE"])
        except ValueError as error:
            raise ValueError(f"RATE is {parts['RATE']!r}, not a number, in {arg!r}") from error
    return config


def get_hyper(arg: str = "") -> list[dict]:
    """The points of `launch/sweep.py`. arg: as of `get_config`.

    Raises: ValueError without the workdirs, or for a teacher of all tasks.
    """
    parts, config = _parts(arg), get_config(arg)
    if not (parts["BASELINE"] and parts["BINARY"]):
        raise ValueError(
            f"the config's argument is {arg!r}: give --config=configs/robustness.py:"
            f"{','.join(_PARTS)}, of which TEACHER and RATE may be left out"
        )
    if parts["TEACHER"] and parts["TASK"] == "all":
        raise ValueError("a teacher belongs to one task: give a TASK, or leave TEACHER empty")
    rate, size = config.learning_rate, config.batch_size
    around = [
        *(dict(learning_rate=rate * by, batch_size=size) for by in (0.25, 0.5, 1.0, 2.0, 4.0)),
        *(dict(learning_rate=rate, batch_size=other) for other in (8, 16, 32, 64) if other != size),
    ]
    starts = product(init_from=(parts["BASELINE"], parts["BINARY"]))
    taught = [{}]  # by no teacher
    if parts["TEACHER"]:
        taught.append(dict(distillation="bit", teacher=parts["TEACHER"]))
        task = TASKS.get(parts["TASK"])  # None: a task of the user's own
        if task and task.is_regression:
            taught[-1]["score_mse"] = True  # else "bit" teaches no scores
    return product(starts, taught, around)


def _parts(arg: str) -> dict[str, str]:
    """The parts by name; "" for those left out."""
    values = arg.split(",")
    if len(values) > len(_PARTS):
        raise ValueError(f"the config's argument {arg!r} has more parts than {','.join(_PARTS)}")
    return dict(zip(_PARTS, [*values, *[""] * (len(_PARTS) - len(values))], strict=True))
