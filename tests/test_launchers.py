"""launch/tpu_vm.sh with a stand-in for gcloud, whose worker is a directory of this machine; the
JobSet of launch/gke_jobset.yaml and its script; a sweep whose points run on such a worker."""

import contextlib
import csv
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
HARD = ["--a=it's 5 $HOME", '--b="`x`\\', "--c=(0, 1)", "--d=;&|>#~", "l*", "", "--e=ä\nf"]

# Writes down what it was given. With WORKER, a directory, it also does that on the worker: copies a
# file into it, or runs a command with it as home, and returns although the command has left
# something running. That is then reaped, as init does on a machine.
GCLOUD = """#!{python}
import ctypes, json, os, shutil, subprocess, sys
with open({calls!r}, "a") as file:
    file.write(json.dumps(sys.argv[1:]) + chr(10))
worker = os.environ.get("WORKER")
if worker and sys.argv[4] == "scp":
    shutil.copy(sys.argv[5], os.path.join(worker, sys.argv[6].removeprefix("slice:")))
elif worker and sys.argv[4] == "ssh":
    (script,) = [x.removeprefix("--command=") for x in sys.argv if x.startswith("--command=")]
    status, written = os.pipe()
    if not os.fork():
        PR_SET_CHILD_SUBREAPER = 36
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
        home = {{"cwd": worker, "env": os.environ | {{"HOME": worker}}}}
        done = subprocess.run(["bash", "-c", script], **home)
        os.write(written, bytes([done.returncode]))
        os.closerange(0, 3)
        try:
            while True:
                os.wait()
        except ChildProcessError:
            os._exit(0)
    os.close(written)
    sys.exit(os.read(status, 1)[0])
"""

# Stands in for train.py. Goes on until SIGTERM, then saves and ends with 0; with --end=STATUS it
# ends soon; with --workdir it leaves a result there.
TRAIN = """
import json, pathlib, signal, sys, time
print(json.dumps(sys.argv[1:]), flush=True)
given = dict(x.partition("=")[::2] for x in sys.argv[1:])
if "--end" in given:
    time.sleep(0.5)
    print("ended", flush=True)
    sys.exit(int(given["--end"]))
if "--workdir" in given:
    best = {"accuracy": 1e3 * float(given["--config.learning_rate"])}
    seeds = [{"seed": 0, "best": best}]
    result = {"selection_metric": "accuracy", "higher_is_better": True, "seeds": seeds}
    directory = pathlib.Path(given["--workdir"])
    directory.mkdir(parents=True)
    (directory / "result.json").write_text(json.dumps(result))
    sys.exit()
def save(*_):
    time.sleep(0.2)
    print("saved", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(60)
"""

UV = f"""#!/bin/sh
echo "$*" >> uv.txt
mkdir -p venv/bin
ln -sf {shlex.quote(sys.executable)} venv/bin/python
"""


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Cloud:
    """A checkout with launch/tpu_vm.sh, gcloud's stand-in, and the home directory of a worker."""

    def __init__(self, directory: Path) -> None:
        self.checkout, self.worker = directory / "the checkout", directory / "worker"
        self.archive = self.checkout / "build" / "bipft_jax.tar.gz"
        self.bin, self._tools = directory / "bin", directory / "tools"
        self._calls = directory / "calls"
        program(self.checkout / "launch" / "train.py", TRAIN)
        shutil.copy(ROOT / "launch" / "tpu_vm.sh", self.checkout / "launch")
        (self.checkout / ".gitignore").write_text("build/\n")
        self.git("init", "--quiet")
        self.commit()

        program(self.bin / "gcloud", GCLOUD.format(python=sys.executable, calls=str(self._calls)))
        program(self.bin / "sleep", f"#!/bin/sh\nexec {shutil.which('sleep')} 0.02\n")
        program(self.worker / ".local" / "bin" / "uv", UV)
        self._tools.mkdir()
        for tool in ("bash", "cat", "dirname", "git", "sed"):  # a machine without gcloud
            (self._tools / tool).symlink_to(shutil.which(tool))

    def git(self, *arguments: str) -> None:
        names = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", self.checkout, *names, *arguments], check=True)

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message=all")

    def environment(self, *, gcloud: bool = True, worker: bool = False) -> dict[str, str]:
        return os.environ | {
            **{"TPU_NAME": "slice", "TPU_ZONE": "us-west4-a", "TPU_PROJECT": "project"},
            "PATH": f"{self.bin}:{os.environ['PATH']}" if gcloud else str(self._tools),
            "WORKER": str(self.worker) if worker else "",
        }

    def bash(self, *arguments, **where) -> subprocess.CompletedProcess:
        return subprocess.run(
            [shutil.which("bash"), *arguments],
            env=self.environment(**where),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def tpu_vm(self, *arguments, **where) -> subprocess.CompletedProcess:
        return self.bash(self.checkout / "launch" / "tpu_vm.sh", *arguments, **where)

    def calls(self) -> list[list[str]]:
        """What gcloud was given since the last time."""
        if not self._calls.exists():
            return []
        lines = self._calls.read_text().splitlines()
        self._calls.unlink()
        return [json.loads(line) for line in lines]

    def log(self) -> list[str]:
        return (self.worker / "bipft_jax" / "log.txt").read_text().splitlines()


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud
    for process in Path("/proc").glob("[0-9]*"):  # what a failed test has left running
        with contextlib.suppress(OSError):
            if (process / "cwd").readlink().is_relative_to(cloud.worker):
                os.kill(int(process.name), signal.SIGKILL)


@pytest.fixture
def ready(cloud):
    """A worker after setup."""
    done = cloud.tpu_vm("setup", worker=True)
    assert done.returncode == 0, done.stderr
    return cloud


VM, QUEUE = ["compute", "tpus", "tpu-vm"], ["compute", "tpus", "queued-resources"]
ON_ALL = [*VM, "ssh", "slice", "--worker=all", "--command=..."]
COPY = [*VM, "scp", "ARCHIVE", "slice:bipft_jax.tar.gz", "--worker=all"]
V5E, V6E = "--accelerator-type=v5litepod-16", "--accelerator-type=v6e-8"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (
            ["create", "--accelerator=v5litepod-16", "--spot"],
            [[*VM, "create", "slice", V5E, "--version=v2-alpha-tpuv5-lite", "--spot"]],
        ),
        (
            ["create", "--accelerator=v5litepod-16", "--version=other"],
            [[*VM, "create", "slice", V5E, "--version=other"]],
        ),
        (
            ["create", "--accelerator=v6e-8", "--queued", "--spot"],
            [
                [*QUEUE, "create", "slice", "--node-id=slice", V6E]
                + ["--runtime-version=v2-alpha-tpuv6e", "--spot"]
            ],
        ),
        (["setup"], [COPY, ON_ALL]),
        (["setup", "--bucket=my-bucket"], [COPY, ON_ALL, ON_ALL]),
        (["run", "--", *HARD], [ON_ALL]),
        (["run", "--wait", "--", "--config=x"], [ON_ALL, ON_ALL]),
        (["logs"], [[*VM, "ssh", "slice", "--worker=0", "--command=..."]]),
        (["logs", "--worker=3"], [[*VM, "ssh", "slice", "--worker=3", "--command=..."]]),
        (["status"], [[*VM, "describe", "slice", "--format=value(state,health)"], ON_ALL]),
        (["status", "--queued"], [[*QUEUE, "describe", "slice", "--format=value(state.state)"]]),
        (["stop"], [ON_ALL]),
        (["delete"], [[*VM, "delete", "slice"]]),
        (["delete", "--queued"], [[*QUEUE, "delete", "slice", "--force"]]),
    ],
)
def test_a_dry_run_prints_what_a_run_executes(cloud, arguments, expected):
    command, *options = arguments
    printed = cloud.tpu_vm(command, "--dry-run", *options, gcloud=False)
    assert printed.returncode == 0, printed.stderr
    assert cloud.calls() == [] and not cloud.archive.exists()

    assert cloud.bash("-c", printed.stdout).returncode == 0
    pasted = cloud.calls()
    assert cloud.archive.exists() == (command == "setup")
    assert cloud.tpu_vm(*arguments).returncode == 0
    assert cloud.calls() == pasted

    scripts = [word for call in pasted for word in call if word.startswith("--command=")]
    for script in scripts:
        checked = cloud.bash("-n", "-c", script.removeprefix("--command="))
        assert checked.returncode == 0, checked.stderr
    names = dict.fromkeys(scripts, "--command=...") | {str(cloud.archive): "ARCHIVE"}
    assert [[names.get(word, word) for word in call] for call in pasted] == [
        [*call, "--zone=us-west4-a", "--project=project"] for call in expected
    ]


def test_options_name_another_slice(cloud):
    options = ["--name=other", "--zone=europe-west4-b", "--project=p"]
    assert cloud.tpu_vm("delete", *options).returncode == 0
    assert cloud.calls() == [[*VM, "delete", "other", *options[1:]]]


def test_setup_brings_the_last_commit_and_the_bucket_to_a_worker(cloud):
    for name in ("sudo", "mountpoint"):  # nothing is mounted, and nothing is done as root
        program(cloud.bin / name, '#!/bin/sh\necho "${0##*/} $*" >> ~/root.txt\n[ "$1" != -q ]\n')
    program(cloud.bin / "gcsfuse", "#!/bin/sh\n")
    (cloud.checkout / "launch" / "not_committed.py").touch()
    done = cloud.tpu_vm("setup", "--bucket=my-bucket", worker=True)
    assert done.returncode == 0, done.stderr
    assert "the last commit, without the changes since" in done.stderr
    source = cloud.worker / "bipft_jax" / "source"
    assert sorted(path.name for path in source.iterdir()) == [".gitignore", "launch"]
    launch = source / "launch"
    assert sorted(path.name for path in launch.iterdir()) == ["tpu_vm.sh", "train.py"]
    assert (cloud.worker / "bipft_jax" / "uv.txt").read_text().splitlines() == [
        "venv --quiet --allow-existing --python 3.12 venv",
        "pip install --quiet --python venv --editable source jax[tpu]",
    ]
    assert (cloud.worker / "root.txt").read_text().splitlines() == [
        "sudo mkdir -p /mnt/my-bucket",
        "mountpoint -q /mnt/my-bucket",
        f"sudo gcsfuse -o allow_other --uid={os.getuid()} --gid={os.getgid()} "
        "--metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "
        "my-bucket /mnt/my-bucket",
    ]

    (cloud.checkout / "launch" / "train.py").unlink()
    cloud.commit()
    again = cloud.tpu_vm("setup", worker=True)
    assert again.returncode == 0 and again.stderr == ""
    assert sorted(path.name for path in launch.iterdir()) == ["not_committed.py", "tpu_vm.sh"]


def test_a_run_outlives_its_command_is_stopped_and_goes_on(ready):
    def status():
        return ready.tpu_vm("status", worker=True).stdout.rpartition(": ")[2]

    assert status() == "no run\n"
    nothing = ready.tpu_vm("stop", worker=True)
    assert (nothing.returncode, nothing.stdout, nothing.stderr) == (0, "", "")
    assert ready.tpu_vm("run", "--", *HARD, worker=True).returncode == 0
    logs = subprocess.Popen(
        ["bash", ready.checkout / "launch" / "tpu_vm.sh", "logs"],
        env=ready.environment(worker=True),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert json.loads(logs.stdout.readline()) == ["--distributed", *HARD]
        assert logs.stdout.readline() == "ready\n"
    finally:
        os.killpg(logs.pid, signal.SIGKILL)
        logs.communicate()
    assert status() == "running\n"

    refused = ready.tpu_vm("run", "--", "--other", worker=True)
    assert refused.returncode == 1 and "a run is going on here" in refused.stderr
    assert ready.tpu_vm("stop", worker=True).returncode == 0
    assert ready.log()[1:] == ["ready", "saved"] and status() == "no run\n"

    assert ready.tpu_vm("run", "--wait", "--", "--end=1", worker=True).returncode == 0
    assert json.loads(ready.log()[3]) == ["--distributed", "--end=1"]
    assert ready.log()[4:] == ["ended"] and status() == "no run\n"


def test_nothing_runs_on_a_worker_without_setup(cloud):
    done = cloud.tpu_vm("run", "--wait", "--", "--config=x", worker=True)
    assert done.returncode == 1 and "bipft_jax/source: No such file" in done.stderr
    assert len(cloud.calls()) == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["begin"], "begin is no command: create, setup, run, logs, status, stop or delete"),
        (["stop", "--name="], "--name= is not in the form"),
        (["stop", "--name", "x"], "--name is not in the form"),
        (["stop", "--worker=1"], "stop has no --worker=1: bash launch/tpu_vm.sh stop --help"),
        (["stop", "now"], "stop has no now"),
        (["create"], "create needs --accelerator=TYPE"),
        (["create", "--accelerator=v9-8"], "no runtime version is known for v9-8"),
        (["setup", "--bucket=gs://b"], "gs://b is no bucket's name"),
        (["run", "--config=x"], "run has no --config=x"),
        (["run", "--"], "run needs the arguments of launch/train.py after --"),
        (["run", "--", "--config=x", "--dry-run"], "--dry-run comes before --"),
    ],
)
def test_mistakes_are_named_and_nothing_is_done(cloud, arguments, message):
    done = cloud.tpu_vm(*arguments)
    assert (done.returncode, done.stdout, cloud.calls()) == (1, "", [])
    assert done.stderr.startswith("error: ") and message in done.stderr


@pytest.mark.parametrize("variable", ["TPU_NAME", "TPU_ZONE", "TPU_PROJECT"])
def test_what_says_which_slice_must_be_there(cloud, monkeypatch, variable):
    slice_of = cloud.environment
    monkeypatch.setattr(cloud, "environment", lambda **where: slice_of(**where) | {variable: ""})
    done = cloud.tpu_vm("stop")
    assert done.returncode == 1 and done.stderr.endswith(f"or set {variable}\n")
    assert cloud.calls() == []


def test_without_gcloud_only_dry_runs_work(cloud):
    done = cloud.tpu_vm("stop", gcloud=False)
    assert done.returncode == 1 and "error: gcloud is not here" in done.stderr


@pytest.mark.parametrize(
    "command, options",
    [
        ("", ["create", "setup", "run", "logs", "status", "stop", "delete"]),
        ("create", ["--accelerator=", "--version=", "--spot", "--queued"]),
        ("setup", ["--bucket="]),
        ("run", ["--wait"]),
        ("logs", ["--worker="]),
        ("status", ["--queued"]),
        ("stop", []),
        ("delete", ["--queued"]),
    ],
)
def test_help_has_every_option(cloud, command, options):
    done = cloud.tpu_vm(*command.split(), "--help", gcloud=False)
    assert done.returncode == 0 and done.stdout.startswith(
        f"usage: bash launch/tpu_vm.sh {command or 'COMMAND'} "
    )
    for option in [*options, "--name=", "--zone=", "--project=", "--dry-run"]:
        assert f"\n  {option}" in done.stdout


def jobset(**values: str) -> dict:
    """The manifest as the envsubst that its first lines show makes it."""
    text = (ROOT / "launch" / "gke_jobset.yaml").read_text()
    (listed,) = re.findall(r"^#   envsubst '(.*)' < launch/gke_jobset.yaml", text, re.M)
    assert {f"${name}" for name in values} == set(listed.split())
    for name, value in values.items():
        text = text.replace(f"${{{name}}}", value)
    return yaml.safe_load(text)


def test_the_jobset_is_of_one_slice_and_restarts():
    manifest = jobset(NAME="run-1", IMAGE="image:1", BUCKET="my-bucket", ARGUMENTS="--config=x")
    assert "${" not in json.dumps(manifest)
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert manifest["metadata"]["name"] == "run-1"
    assert manifest["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert manifest["spec"]["network"]["enableDNSHostnames"] is True
    assert manifest["spec"]["failurePolicy"]["maxRestarts"] > 0
    (replicated,) = manifest["spec"]["replicatedJobs"]
    job, pod = replicated["template"]["spec"], replicated["template"]["spec"]["template"]
    assert replicated["replicas"] == 1 and job["backoffLimit"] == 0
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["spec"]["terminationGracePeriodSeconds"] >= 300

    (container,) = pod["spec"]["containers"]
    chips = container["resources"]["limits"]["google.com/tpu"]
    selector = pod["spec"]["nodeSelector"]
    topology = selector["cloud.google.com/gke-tpu-topology"]
    assert job["parallelism"] == job["completions"] > 1
    assert job["parallelism"] * chips == math.prod(map(int, topology.split("x")))
    assert selector["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    assert container["image"] == "image:1"

    assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    (volume,), (mount,) = pod["spec"]["volumes"], container["volumeMounts"]
    assert mount == {"name": volume["name"], "mountPath": "/mnt/my-bucket"}
    assert volume["csi"]["driver"] == "gcsfuse.csi.storage.gke.io"
    assert volume["csi"]["volumeAttributes"] == {
        "bucketName": "my-bucket",
        "mountOptions": "metadata-cache:ttl-secs:0,metadata-cache:negative-ttl-secs:0",
    }


@pytest.mark.parametrize("end, stop, status", [("0", False, 0), ("3", False, 3), ("", True, 1)])
def test_a_pod_passes_sigterm_on_and_is_no_success_then(tmp_path, end, stop, status):
    program(tmp_path / "launch" / "train.py", TRAIN)
    (tmp_path / "python").symlink_to(sys.executable)
    hard = [word for word in HARD if "\n" not in word] + [f"--end={end}"] * bool(end)
    manifest = jobset(NAME="n", IMAGE="i", BUCKET="b", ARGUMENTS=shlex.join(hard))
    (replicated,) = manifest["spec"]["replicatedJobs"]
    (container,) = replicated["template"]["spec"]["template"]["spec"]["containers"]
    output = tmp_path / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            [*container["command"], *container["args"]],
            cwd=tmp_path,
            env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
            stdout=file,
        )
    if stop:
        while "ready" not in output.read_text():
            assert process.poll() is None
            time.sleep(0.02)
        process.terminate()  # bash alone, as Kubernetes does
    assert process.wait(timeout=60) == status
    first, *others = output.read_text().splitlines()  # there when bash ends: the pod ends with it
    assert json.loads(first) == ["--distributed", *hard]
    assert others == (["ready", "saved"] if stop else ["ended"])


def test_a_sweeps_points_run_on_a_slice_and_come_to_one_table(ready, tmp_path):
    workdir = tmp_path / "bucket" / "sweep"
    sweep = [
        *(sys.executable, str(ROOT / "launch" / "sweep.py"), f"--workdir={workdir}"),
        *(f"--config={ROOT / 'configs' / 'finetune.py'}:bipft_b,rte", "--verbosity=-1"),
        *("--config.init_from=it's $HOME", "--values=learning_rate=1e-3,2e-3,4e-3"),
    ]
    finished = workdir / "learning_rate=0.002"
    finished.mkdir(parents=True)
    seeds = [{"seed": 0, "best": {"accuracy": 0.5}}]
    result = {"selection_metric": "accuracy", "higher_is_better": True, "seeds": seeds}
    (finished / "result.json").write_text(json.dumps(result))

    printed = subprocess.run([*sweep, "--print_arguments"], capture_output=True, text=True)
    assert printed.returncode == 0, printed.stderr
    assert [path.name for path in workdir.iterdir()] == [finished.name]
    run = ["bash", str(ready.checkout / "launch" / "tpu_vm.sh"), "run", "--wait", "--"]
    done = subprocess.run(
        ["xargs", "-L", "1", *run],
        input=printed.stdout,
        text=True,
        env=ready.environment(worker=True),
    )
    assert done.returncode == 0
    shared = [*sweep[3:5], "--config.init_from=it's $HOME"]
    assert [json.loads(line) for line in ready.log()] == [
        [
            *("--distributed", f"--workdir={workdir}/learning_rate={rate}", shared[0], shared[2]),
            *(f"--config.learning_rate={rate}", shared[1]),
        ]
        for rate in ("0.001", "0.004")
    ]

    collected = subprocess.run(sweep, capture_output=True, text=True)
    assert collected.returncode == 0, collected.stderr
    assert "3 points" in collected.stdout and "3 finished before" in collected.stdout
    with (workdir / "sweep.csv").open(newline="") as file:
        assert [float(row["accuracy"]) for row in csv.DictReader(file)] == [1.0, 0.5, 4.0]
