"""Values that no run can use are refused by their keys, before anything is loaded or claimed."""

import subprocess
import sys
from pathlib import Path

import ml_collections
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from bipft_jax import finetune, finetune_all, pretrain
from bipft_jax.config_keys import KEYS, check_keys
from configs import finetune as finetune_config
from configs import pretrain as pretrain_config

ROOT = Path(__file__).parents[1]
CONFIGS = {"pretrain": pretrain_config.get_config, "finetune": finetune_config.get_config}
TRAIN = {"pretrain": pretrain.train, "finetune": finetune_all.train}
NAN, INF = float("nan"), float("inf")

# Of each kind that configs have. 1e39 and 1e-46 are infinity and 0 in float32.
WRONG = {
    "pretrain": {
        "recipe": ["bipft_c", ""],
        "size": ["tinny"],
        "dtype": ["float16"],
        "compute": ["int4"],
        "backward": ["int8"],
        "remat": ["lea"],
        "seed": [-1, 2**31, 0.5, True],
        "log_every": [0, -1, None],
        "evaluate_every": [0],
        "batch_size": [0],
        "num_updates": [0],
        "accumulation": [0],
        "mesh.fsdp": [0],
        "mesh.tensor": [-1],
        "learning_rate": [0.0, -1e-4, NAN, INF, 1e39, 1e-46, "1e-4"],
        "adam_epsilon": [0.0, 1e-46],
        "weight_decay": [-0.1, NAN],
        "clip_norm": [-1.0, NAN, INF],
        "dropout": [1.0, -0.1, NAN, 1 - 1e-9],
        "masking_rate": [0.0, 1.0],
        "warmup_updates": [-1],
        "evaluation_sequences": [-1],
        "keep_every": [-1],
        "data_workers": [-1],
        "max_skipped_updates": [0],
        "lora_rank": [-1],
        "estimator_rank": [-2],
        "scan_layers": [1],
        "profile_steps": ["5", "5:5"],
        "corpus_dir": [3],
    },
    "finetune": {
        "seeds": [(), (0.5,), (-1,), (2**31,), (3, 3), 0],
        "task": ["sst3"],
        "optimizer": ["adam"],
        "schedule": ["cosine"],
        "distillation": ["bitt"],
        "intermediate_recipes": [("bit_w1a3",), "bit_w1a2"],
        "max_updates": [-5],
        "epochs": [-1],
        "evaluate_every": [-1],
        "max_length": [2],
        "length_buckets": [0],
        "scale_learning_rate": [-1.0],
    },
}


@pytest.mark.parametrize("program", KEYS)
def test_every_key_has_a_row(program):
    values = flatten_dict(CONFIGS[program]().to_dict(), sep=".")
    assert values.keys() == KEYS[program].keys() | {"program"}


@pytest.mark.parametrize(
    "program, key, value",
    [(program, k, v) for program in WRONG for k, values in WRONG[program].items() for v in values],
)
def test_a_value_that_no_run_can_use_is_refused_by_its_key(program, key, value, tmp_path):
    """The paths are empty: were they looked at first, the message would be another."""
    values = flatten_dict(CONFIGS[program]().to_dict(), sep=".")
    config = ml_collections.ConfigDict(unflatten_dict({**values, key: value}, sep="."))
    kind = {"intermediate_recipes": "recipe", "task": "GLUE task"}.get(key, key)
    with pytest.raises(ValueError, match=rf"{key}\b|unknown {kind}"):
        TRAIN[program](config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_config_must_be_the_programs_own():
    with pytest.raises(ValueError, match="unknown program 'pretrain'"):
        finetune.train(pretrain_config.get_config(), "run")
    config = pretrain_config.get_config()
    config.learning_rat = 1.0
    with pytest.raises(ValueError, match="unknown config key 'learning_rat'.*mean learning_rate"):
        check_keys(config)
    del config.learning_rat, config.mesh.fsdp
    with pytest.raises(ValueError, match="config key 'mesh.fsdp' is missing"):
        check_keys(config)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["train.py", "--config.corpus.seed=2"], "unknown config key 'corpus'"),
        (["train.py", "--config.learning_rate.x=2"], "unknown config key 'learning_rate.x'"),
        (["train.py", "--config.seeds[0]=2"], "unknown config key 'seeds[0]'"),
        (["train.py", "--config.program=tune"], "unknown program 'tune'"),
        (["sweep.py", "--list", "--values=corpus.seed=1,2"], "unknown config key 'corpus'"),
        (["sweep.py", "--values=learning_rate=1e-3,nan"], "learning_rate is nan"),
        (["sweep.py", "--values=seeds=(0,),(0.5,)"], "an entry of seeds is 0.5"),
    ],
)
def test_the_commands_say_it_in_one_line(tmp_path, flags, message):
    program, *flags = flags
    config = f"--config={ROOT / 'configs' / 'finetune.py'}:fp,sst2"
    done = subprocess.run(
        [sys.executable, ROOT / "launch" / program, config, f"--workdir={tmp_path / 'w'}", *flags],
        env={"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.startswith(f"error: {message}"), done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "w").exists()
