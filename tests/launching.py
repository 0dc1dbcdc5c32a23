"""Commands that a user types, on a corpus of a few sentences: the fixture `home`."""

import hashlib
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

from bipft_jax.checkpoints.manager import restore_params
from bipft_jax.data.corpus import command as corpus_command
from bipft_jax.models.parameters import named_leaves

ROOT = Path(__file__).parents[1]
WORDS = "the a cat dog bird tree house sees likes finds old new red big small runs sings".split()
CONFIG = "configs/pretrain.py:bipft_b,tiny"
PRETRAIN = dict(
    num_updates=40,
    keep_every=20,
    warmup_updates=4,
    batch_size=8,
    evaluate_every=4,
    log_every=4,
    evaluation_sequences=8,
    accumulation=2,
)


def furnish(home):
    """Makes corpus/ (WordPiece, sequences of 24 tokens) and glue/ in a directory."""
    rng = random.Random(0)

    def sentence():
        return " ".join(rng.choices(WORDS, k=rng.randint(4, 9))).capitalize() + "."

    documents = ["\n".join(sentence() for _ in range(60)) for _ in range(8)]
    (home / "text.txt").write_text("\n\n".join(documents))
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *WORDS]
    (home / "vocab.txt").write_text("\n".join(vocabulary))
    corpus_command.main(
        [
            *("--input", str(home / "text.txt"), "--output", str(home / "corpus")),
            *("--tokenizer", str(home / "vocab.txt"), "--sequence_length", "24"),
            *("--validation_fraction", "0.3", "--processes", "1"),
        ]
    )
    task = home / "glue" / "SST-2"
    task.mkdir(parents=True)
    for name, rows in (("train", 64), ("dev", 20)):
        lines = [f"{sentence()}\t{i % 2}" for i in range(rows)]
        (task / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")


def command(home, config, workdir, *flags, **overrides):
    options = {"corpus_dir": home / "corpus"} if "pretrain" in config else {}
    keys = [f"--config.{key}={value}" for key, value in {**options, **overrides}.items()]
    return [
        *(sys.executable, str(ROOT / "launch" / "train.py")),
        *(f"--config={ROOT / config}", f"--workdir={workdir}", *flags, *keys),
    ]


def environment(home, devices=1):
    cache = {"JAX_COMPILATION_CACHE_DIR": str(home / "compiled")}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    xla = "--xla_backend_optimization_level=0"  # as in conftest.py
    if devices > 1:
        xla += f" --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "XLA_FLAGS": xla, "PYTHONPATH": str(ROOT), **cache}


def start(home, *arguments, devices=1, variables=None, **overrides):
    """A command that runs on while the test does something else."""
    return subprocess.Popen(
        command(home, *arguments, **overrides),
        env=environment(home, devices) | (variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def start_job(home, config, workdir, processes, **options):
    """A run of several processes, each with `devices` of its own."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    flags = (f"--coordinator_address={address}", f"--num_processes={processes}")
    # With a warm cache such jobs on CPUs often abort in gloo ("Received data size doesn't match"),
    # without it they do not; programs from the cache may order their collectives differently.
    uncached = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    return [
        start(home, config, workdir, *flags, f"--process_id={k}", variables=uncached, **options)
        for k in range(processes)
    ]


def finish(process):
    """Waits. Returns: what a command printed, which must have succeeded."""
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err[-3000:]
    return subprocess.CompletedProcess(process.args, 0, out, err)


def run(home, *arguments, **overrides):
    return finish(start(home, *arguments, **overrides))


def digest(workdir):
    """A hash of the final parameters."""
    found = restore_params(workdir, "latest")
    total = hashlib.sha256(str(found.step).encode())
    for name, leaf in named_leaves(found.params).items():
        total.update(name.encode() + leaf.tobytes())
    return total.hexdigest()
