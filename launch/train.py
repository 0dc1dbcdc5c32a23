"""Starts a training run. Flags only; the programs are bipft_jax/pretrain.py and finetune_all.py.

    python launch/train.py --config=configs/pretrain.py:bipft_b,mini \
        --config.corpus_dir=DIR --workdir=DIR
    python launch/train.py --config=configs/finetune.py:bipft_b,sst2 \
        --config.init_from=DIR --config.glue_dir=DIR --workdir=DIR

--config.KEY=VALUE sets any key of the config. The same command resumes a stopped run; on SIGTERM a
run saves and stops. With --distributed, the same command on all hosts of a TPU slice, GKE or Slurm
job is one run.
"""

import sys

from absl import app, flags, logging
from ml_collections import config_flags

from bipft_jax.command_line import parse_or_exit

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/ with its argument: FILE.py:ARGUMENT.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for checkpoints and telemetry.")
_DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Join the other processes of this TPU slice, GKE or Slurm job."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator_address", None, "Elsewhere, HOST:PORT of process 0; with the next two."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the job.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of this process, from 0.")
flags.mark_flags_as_required(["config", "workdir"])


def main(argv: list[str]) -> None:
    """Runs the program that the config is for."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # orbax and tfds log every step
    # Imported late, so that --help and a mistyped flag answer at once.
    from bipft_jax import finetune_all, pretrain, processes
    from bipft_jax.config_keys import check_keys

    programs = {"pretrain": pretrain.train, "finetune": finetune_all.train}
    with processes.failing_at_once():
        try:
            check_keys(_CONFIG.value)
            processes.join(
                _DISTRIBUTED.value, _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
            )
            programs[_CONFIG.value.program](_CONFIG.value, _WORKDIR.value)
        except (ValueError, FloatingPointError, OSError) as error:
            if flags.FLAGS["verbosity"].present:
                raise
            sys.exit(f"error: {error}\n(--verbosity=0 shows where)")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_or_exit)
