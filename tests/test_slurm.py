"""launch/slurm.sbatch with stand-ins for srun and scontrol."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_launchers import HARD, ROOT, program

# Stands in for srun and for what it starts, on a single node. Writes down what it was given and the
# number of the process, which is in a session of its own: on a node it is no child of srun.
SRUN = """#!{python}
import json, os, pathlib, subprocess, sys
words = sys.argv[1:]
command = words[words.index("python"):]
step = subprocess.Popen(command, start_new_session=True)
devices = os.environ.get("JAX_LOCAL_DEVICE_IDS")
pathlib.Path("written").write_text(json.dumps([words, devices, step.pid]))
pathlib.Path("written").rename("srun")
sys.exit(step.wait())
"""

# Stands in for a train.py that reaches its end soon, with --end=STATUS, or waits for SIGTERM.
STEP = """
import pathlib, signal, sys, time
given = dict(x.partition("=")[::2] for x in sys.argv[1:])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
pathlib.Path("ready").touch()
if "--end" not in given:
    time.sleep(60)
if given["--end"] == "0":
    workdir = pathlib.Path(given["--workdir"]).expanduser()
    workdir.mkdir(parents=True)
    (workdir / "result.json").touch()
sys.exit(int(given["--end"]))
"""


class Slurm:
    """A checkout with launch/slurm.sbatch, and a machine with stand-ins for Slurm's commands."""

    def __init__(self, directory: Path) -> None:
        self.checkout, self._bin = directory / "the checkout", directory / "bin"
        program(self.checkout / "launch" / "train.py", STEP)
        program(self._bin / "srun", SRUN.format(python=sys.executable))
        program(self._bin / "scontrol", '#!/bin/sh\necho "$*" >> requeued\n')
        (self._bin / "python").symlink_to(sys.executable)
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")}
        self.environment |= {
            "PATH": f"{self._bin}:{os.environ['PATH']}",
            "HOME": str(directory),
        }

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen:
        spool = self.checkout.parent / "slurm_script"  # a job has a copy of the file
        shutil.copy(ROOT / "launch" / "slurm.sbatch", spool)
        return subprocess.Popen(
            ["bash", spool, *arguments],
            cwd=self.checkout,
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start_and_wait(self, *arguments: str, **variables: str) -> subprocess.Popen:
        """Until the process that srun has started is at work."""
        job = self.start(*arguments, **variables)
        while not all((self.checkout / name).exists() for name in ("srun", "ready")):
            assert job.poll() is None
            time.sleep(0.02)
        return job

    def given(self) -> list:
        """What srun was given: its arguments, JAX_LOCAL_DEVICE_IDS, the number of the process."""
        return json.loads((self.checkout / "srun").read_text())

    def requeued(self) -> str:
        """What scontrol was given."""
        path = self.checkout / "requeued"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def slurm(tmp_path):
    slurm = Slurm(tmp_path)
    yield slurm
    with contextlib.suppress(OSError):  # what a job that was cancelled has left running
        os.kill(slurm.given()[2], signal.SIGKILL)


def test_a_slurm_jobs_dry_run_prints_what_the_job_runs(slurm):
    arguments = [*HARD, "--workdir=~/a run", "--end=0"]
    printed = slurm.start("--dry-run", *arguments, SLURM_CPUS_PER_TASK="7")
    line, errors = printed.communicate()
    assert (printed.returncode, errors) == (0, "") and not (slurm.checkout / "srun").exists()
    pasted = subprocess.run(["bash", "-c", line], cwd=slurm.checkout, env=slurm.environment)
    assert pasted.returncode == 0
    words, _, _ = slurm.given()
    shutil.rmtree(slurm.checkout.parent / "a run")

    job = slurm.start(*arguments, SLURM_JOB_ID="17", SLURM_CPUS_PER_TASK="7")
    assert job.communicate() == ("", "") and job.returncode == 0
    assert (
        slurm.given()[0]
        == words
        == [
            *("--kill-on-bad-exit=1", "--cpus-per-task=7"),
            *("python", "-u", "launch/train.py", "--distributed", *arguments),
        ]
    )
    assert slurm.requeued() == ""  # it is finished: ~/a run/result.json


def test_a_slurm_jobs_processes_are_told_to_save_and_it_may_come_again():
    text = (ROOT / "launch" / "slurm.sbatch").read_text()
    before_commands, _, _ = text.partition("\nset -euo pipefail\n")
    options = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in before_commands.splitlines()
        if line.startswith("#SBATCH ")
    )
    assert text.count("\n#SBATCH ") == len(options)  # sbatch reads none after the first command
    assert options["ntasks-per-node"] == "1"
    assert options.keys() >= {"requeue"} and options["open-mode"] == "append"
    name, seconds = options["signal"].split("@")
    assert name == "TERM" and int(seconds) >= 120  # to the processes: B:TERM is for the shell


def test_a_slurm_job_that_has_saved_before_its_limit_comes_again(slurm):
    job = slurm.start_and_wait("--workdir=run", SLURM_JOB_ID="17", SLURM_GPUS_ON_NODE="3")
    _, devices, process = slurm.given()
    assert devices == "0,1,2"
    os.kill(process, signal.SIGTERM)  # as slurmstepd does: neither srun nor the shell
    said, errors = job.communicate(timeout=60)
    assert (job.returncode, errors) == (0, "") and "job 17 goes back into the queue" in said
    assert slurm.requeued() == "requeue 17\n"


def test_a_slurm_job_that_is_cancelled_does_not_come_again(slurm):
    job = slurm.start_and_wait("--workdir=run", SLURM_JOB_ID="17")
    job.terminate()  # scancel tells the shell and the processes
    os.kill(slurm.given()[2], signal.SIGTERM)
    assert job.wait(timeout=60) == -signal.SIGTERM
    job.communicate()
    assert slurm.requeued() == ""


@pytest.mark.parametrize("end, scontrol, status", [("3", "exit 0", 3), ("", "exit 5", 5)])
def test_a_slurm_job_ends_with_the_status_of_what_failed(slurm, tmp_path, end, scontrol, status):
    program(tmp_path / "bin" / "scontrol", f'#!/bin/sh\necho "$*" >> requeued\n{scontrol}\n')
    if not end:  # stopped at once, whatever it was doing
        program(tmp_path / "bin" / "srun", "#!/bin/sh\n")
    job = slurm.start("--workdir=run", f"--end={end}", SLURM_JOB_ID="17")
    job.communicate()
    assert job.returncode == status
    assert slurm.requeued() == ("" if end else "requeue 17\n")


@pytest.mark.parametrize(
    "arguments, variables, message",
    [
        (["--config=x", "--workdir=run"], {}, "this is no Slurm job: give the file to sbatch"),
        (["--config=x"], {"SLURM_JOB_ID": "17"}, "--workdir=DIR is missing"),
        (["--dry-run", "--config=x"], {}, "--workdir=DIR is missing"),
    ],
)
def test_mistakes_with_slurm_are_named_and_nothing_is_done(slurm, arguments, variables, message):
    job = slurm.start(*arguments, **variables)
    said, errors = job.communicate()
    assert (job.returncode, said) == (1, "") and errors.startswith(f"error: {message}")
    assert not (slurm.checkout / "srun").exists()
