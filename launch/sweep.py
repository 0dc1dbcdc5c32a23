"""Runs launch/train.py for every point of a sweep, and makes one table and one plot of all points.

    python launch/sweep.py --config=configs/finetune.py:bipft_b,rte --config.init_from=DIR \\
        --config.glue_dir=DIR --workdir=runs/sweep --values learning_rate=1e-4,3e-4,1e-3 \\
        --values 'seeds=(0,),(1,)'

The points are all combinations of the --values or, without --values, the config file's get_hyper(),
which may take the file's argument, as in configs/robustness.py.
--config.KEY=VALUE sets any other key for all points. Keys and the types of values are checked
before the first point starts; --list shows the points and runs nothing.

Each point has its own workdir, WORKDIR/KEY=VALUE,..., with its output in log.txt.
WORKDIR/sweep.csv and WORKDIR/sweep.png are updated as points end. A failed point does not stop the
others; the exit status is then 1. The same command resumes a stopped sweep and retries failed
points. Table and plot cover the points that the command names; other points in the same WORKDIR are
left alone.

The compilation cache is WORKDIR/compiled, unless JAX_COMPILATION_CACHE_DIR names another directory:
points that differ only in seeds share all of it, others what does not depend on the swept value.

--parallel=N runs N points at a time and leaves threads to XLA. On an accelerator only one process
can own the device: leave it at 1.

--print_arguments runs nothing either: it prints the arguments of launch/train.py for each
unfinished point, one shell-quoted line per point, to run on other machines. For a TPU slice:

    python launch/sweep.py ... --print_arguments | xargs -L 1 bash launch/tpu_vm.sh run --wait --

On a machine that sees WORKDIR, the command without --print_arguments then makes table and plot. It
also runs unfinished points there, so check with --list first.
"""

import ast
import contextlib
import fcntl
import importlib.util
import inspect
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

from absl import app, flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from bipft_jax.command_line import parse, parse_or_exit
from bipft_jax.paths import require_local
from bipft_jax.points import named, product

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "A file of configs/ with its argument: FILE.py:ARGUMENT.", lock_config=True
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory for the points, the table and the plot.")
_VALUES = flags.DEFINE_multi_string(
    "values",
    [],
    "KEY=VALUE,VALUE,... to sweep, as Python literals or plain words; may be repeated.",
)
_PARALLEL = flags.DEFINE_integer("parallel", 1, "Points that run at a time.", lower_bound=1)
_LIST = flags.DEFINE_bool("list", False, "Show points, directories and states; run nothing.")
_PRINT_ARGUMENTS = flags.DEFINE_bool(
    "print_arguments", False, "Print train.py's arguments for unfinished points; run nothing."
)
flags.mark_flags_as_required(["config", "workdir"])

_PROGRAM = Path(__file__).with_name("train.py")
_LOG_NAME = "log.txt"
_LAST_LINES = 8  # of a failed run's log, in the summary


def main(argv: list[str]) -> None:
    """Checks all points, then shows or runs them."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    # Imported late, so that --help and a mistyped flag answer at once.
    from bipft_jax import sweeps
    from bipft_jax.reports import sweep

    workdir = Path(_WORKDIR.value).expanduser()
    runs = Runs(workdir)
    try:
        require_local({"workdir": _WORKDIR.value})
        points = checked_points(workdir)
        if _LIST.value:
            for name in named(points):
                print(f"{sweep.outcome(workdir / name)[0]:9} {workdir / name}")
            return
        if _PRINT_ARGUMENTS.value:
            for name, point in named(points).items():
                if sweep.outcome(workdir / name)[0] != "finished":
                    print(shlex.join(train_arguments(point, workdir / name)))
            return
        interrupt_on_signals()
        try:
            failures = sweeps.run(points, runs.start, workdir, _PARALLEL.value)
        finally:
            runs.stop()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt as interrupt:
        print("stopped: the same command goes on from here", file=sys.stderr)
        sys.exit(128 + (interrupt.args or (signal.SIGINT,))[0])
    for name, error in failures.items():
        print(f"\nfailed: {workdir / name}\n  " + "\n  ".join(error.splitlines()))
    print(f"\n{sweep.summary(points, workdir)}")
    print(f"wrote {workdir / sweep.TABLE_NAME} and {workdir / sweep.FIGURE_NAME}")
    sys.exit(1 if failures else 0)


def checked_points(workdir: Path) -> list[dict]:
    """The requested points, each value in its config key's type (1 as 1.0 for a float key).

    Raises: ValueError for an unknown key, a value that its key cannot have, a key that is also
      set for all points, or a directory that holds a run with other settings.
    """
    from bipft_jax.checkpoints.workdir import check_workdir
    from bipft_jax.config_keys import check_keys  # imports jax, which takes a while

    points, source = swept_values(), "--values"
    if not points:
        points, source = points_of_config_file(), "get_hyper() of the config file"
    checked = []
    for point in points:
        if both := point.keys() & shared_values().keys():
            raise ValueError(
                f"{min(both)} is swept by {source} and also given for all points: leave out "
                f"--config.{min(both)}, or give other points with --values"
            )
        config = config_of(point)
        check_keys(config)
        checked.append({key: config_path.get_value(key, config) for key in point})
    for name, point in named(checked).items():
        check_workdir(workdir / name, config_of(point).to_dict())
    return checked


def swept_values() -> list[dict]:
    """The points of the --values; empty without --values.

    Raises: ValueError for one that is not KEY=VALUE,VALUE,..., or for a repeated key.
    """
    factors = []
    for text in _VALUES.value:
        key, equals, values = text.partition("=")
        if not (key and equals and values):
            raise ValueError(f"--values {text} is not KEY=VALUE,VALUE,...")
        factors.append([{key: value} for value in literals(values)])
    return product(*factors) if factors else []


def literals(text: str) -> list:
    """Parses '1e-4,3e-4' or '(0,),(1,)' or 'tiny,mini' to a list of values.

    Raises: ValueError for text with brackets or quotes that is not a list of Python literals.
    """
    try:
        return ast.literal_eval(f"[{text}]")
    except (ValueError, SyntaxError) as error:
        if any(mark in text for mark in "()[]{}'\""):
            raise ValueError(
                f"the values {text} are not Python literals with commas between: within brackets "
                "and beside quoted ones, words need quotes"
            ) from error
        return [literal_or_word(part) for part in text.split(",")]


def literal_or_word(text: str):
    """Parses any Python literal; returns other text as it is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def points_of_config_file() -> list[dict]:
    """What get_hyper() of the config file returns. One that takes an argument gets ARGUMENT.

    Raises: ValueError if it has none.
    """
    path, _, argument = config_argument().partition(":")
    spec = importlib.util.spec_from_file_location("swept_config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_hyper"):
        raise ValueError(f"{path} has no get_hyper(): give points with --values KEY=VALUE,VALUE")
    takes_argument = inspect.signature(module.get_hyper).parameters
    return module.get_hyper(argument) if argument and takes_argument else module.get_hyper()


def config_argument() -> str:
    """FILE.py:ARGUMENT."""
    return config_flags.get_config_filename(flags.FLAGS["config"])


def shared_values() -> dict:
    """Keys set as --config.KEY=VALUE, with their values."""
    return config_flags.get_override_values(flags.FLAGS["config"])


def config_arguments(point: dict) -> list[str]:
    """The --config arguments of train.py for a point."""
    values = {**shared_values(), **point}
    texts = {k: value if isinstance(value, str) else repr(value) for k, value in values.items()}
    return [
        f"--config={config_argument()}",
        *(f"--config.{key}={text}" for key, text in texts.items()),
    ]


def train_arguments(point: dict, directory: Path) -> list[str]:
    """The arguments of train.py that run a point in a directory."""
    verbosity = flags.FLAGS["verbosity"]
    return [
        f"--workdir={directory}",
        *config_arguments(point),
        *([f"--verbosity={verbosity.value}"] if verbosity.present else []),
    ]


def config_of(point: dict) -> ConfigDict:
    """The config that train.py will build, parsed from the same arguments.

    Raises: ValueError for an unknown key or a value of another type.
    """
    argv = [str(_PROGRAM), *config_arguments(point)]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values, sys_argv=argv)
    parse(argv, values)
    return values["config"].value


def interrupt_on_signals() -> None:
    """Makes SIGTERM and SIGHUP stop the sweep as Ctrl-C does. Further signals do not interrupt the
    shutdown. Signals that the caller ignores (nohup) stay ignored."""
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    numbers = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]

    def interrupt(number: int, frame) -> None:
        for other in numbers:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt(number)

    for number in numbers:
        signal.signal(number, interrupt)


class Runs:
    """The train.py processes of a sweep."""

    def __init__(self, workdir: Path) -> None:
        self._compiled = workdir.absolute() / "compiled"
        self._running: list[subprocess.Popen] = []
        self._changing = threading.Lock()  # held while a process starts or all are killed
        self._stopped = threading.Event()

    def start(self, point: dict, directory: Path) -> None:
        """Runs a point to its end and appends its output to DIRECTORY/log.txt.

        Raises: ChildProcessError with the last lines of output if it fails.
        """
        from bipft_jax.reports.sweep import outcome

        command = [sys.executable, "-u", str(_PROGRAM), *train_arguments(point, directory)]
        with (directory / _LOG_NAME).open("a+b") as log:
            waited = self._wait_for(log, directory)
            if waited and outcome(directory)[0] == "finished":
                return
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            begin = log.tell()
            with self._changing:
                if self._stopped.is_set():
                    raise ChildProcessError("the sweep was stopped")
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C reaches only the sweep, which kills all runs
                    env={"JAX_COMPILATION_CACHE_DIR": str(self._compiled), **os.environ},
                )
                self._running.append(process)
            if status := process.wait():
                log.seek(begin)
                lines = log.read().decode(errors="replace").replace("\r", "\n").splitlines()
                lines = [line for line in lines if line.strip()][-_LAST_LINES:]
                end = f"exit status {status}" if status > 0 else signal.Signals(-status).name
                raise ChildProcessError(
                    "\n".join([f"{end}, {directory / _LOG_NAME} ends with:", *lines])
                )

    def stop(self) -> None:
        """Kills all processes and lets no other start. A killed run resumes from its last
        checkpoint."""
        with self._changing:
            self._stopped.set()
            for process in self._running:
                if process.poll() is None:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
        for process in self._running:
            process.wait()

    def _wait_for(self, log, directory: Path) -> bool:
        """Locks the log, waiting while another process holds it: the runs of a killed sweep live on
        and keep their log locked, and two runs in one workdir would corrupt it. Returns whether it
        had to wait."""
        waited = False
        while True:
            try:
                fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return waited
            except BlockingIOError:
                if not waited:
                    print(f"{directory} is being run by another sweep: waiting", flush=True)
                waited = True
            if self._stopped.wait(timeout=1):
                raise ChildProcessError("the sweep was stopped")


if __name__ == "__main__":
    app.run(main, flags_parser=parse_or_exit)
