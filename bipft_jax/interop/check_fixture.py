"""Compares our numbers with those that the references computed.

    python -m bipft_jax.interop.check_fixture PATH...

PATH is a NAME.npz with NAME.json beside it, or a directory of such pairs. Each fixture gives one
line: the number of arrays compared, the worst error of the forward pass (absolute), of gradients
(as a fraction of the tolerance) and of training steps (absolute), and whether all are within the
tolerances of `bipft_jax/interop/fixtures/fixture.py`. A fixture fails if an array was not compared.
The exit status is 1 if any fixture fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from bipft_jax.errors import unknown_name
from bipft_jax.interop.fixtures.bitnet_laws import check_energy, check_scaling_fit
from bipft_jax.interop.fixtures.bitnet_packing import check_packing
from bipft_jax.interop.fixtures.bitnet_units import check_bitnet_units
from bipft_jax.interop.fixtures.causal import check_decoder
from bipft_jax.interop.fixtures.causal_generation import check_generation
from bipft_jax.interop.fixtures.causal_training import check_causal_trajectory, check_schedules
from bipft_jax.interop.fixtures.fixture import Comparison, Fixture
from bipft_jax.interop.fixtures.models import (
    check_distillation,
    check_model,
    check_scale_initialisation,
)
from bipft_jax.interop.fixtures.trajectories import check_trajectory
from bipft_jax.interop.fixtures.units import check_units
from bipft_jax.paths import require_local
from bipft_jax.quantization.arithmetic import COMPUTE_MODES

CHECKS: dict[str, Callable[[Fixture, str], None]] = {
    "unit": check_units,
    "pretraining": check_model,
    "sequence_classification": check_model,
    "finetune_from_pretrained": check_model,
    "scale_initialisation": check_scale_initialisation,
    "distillation": check_distillation,
    "trajectory": check_trajectory,
    "bitnet_unit": check_bitnet_units,
    "bitnet_packing": check_packing,
    "bitnet_schedule": check_schedules,
    "bitnet_cost": check_energy,
    "bitnet_scaling_fit": check_scaling_fit,
    "causal_lm": check_decoder,
    "causal_lm_trajectory": check_causal_trajectory,
    "causal_lm_generation": check_generation,
}


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of checking one fixture.

    comparisons: one per compared array. missed: arrays that were not compared. problem: why the
    check could not finish, else empty.
    """

    name: str
    comparisons: list[Comparison]
    missed: list[str]
    problem: str = ""

    @property
    def passed(self) -> bool:
        return bool(self.comparisons) and not self.complaints()

    def complaints(self) -> list[str]:
        """Everything that is wrong, one line each."""
        lines = [
            f"{c.key}: error {c.error:.3g}, allowed {c.tolerance:.3g}"
            for c in self.comparisons
            if not c.passed
        ]
        lines += [f"{key}: not compared" for key in self.missed]
        return [self.problem, *lines] if self.problem else lines

    def line(self, width: int) -> str:
        """One line of the table."""
        compared = len(self.comparisons)
        bounded = sum(c.kind == "bounded" for c in self.comparisons)
        cells = [
            f"{compared}/{compared + len(self.missed)}",
            self._worst("forward", lambda c: f"{c.error:.1e}"),
            self._worst("gradient", lambda c: f"{c.ratio:.3f}"),
            self._worst("trajectory", lambda c: f"{c.error:.1e}"),
        ]
        verdict = "pass" if self.passed else "FAIL"
        if bounded:
            verdict += f"  ({bounded} arrays, after updates that cannot be compared, only bounded)"
        return f"{self.name:{width}}" + "".join(f"{cell:>12}" for cell in cells) + f"  {verdict}"

    def _worst(self, kind: str, shown: Callable[[Comparison], str]) -> str:
        found = [c for c in self.comparisons if c.kind == kind]
        return shown(max(found, key=lambda c: (not c.passed, c.ratio))) if found else "-"


def check(path: Path, compute: str = "float32") -> Report:
    """Compares all arrays of one fixture.

    Arguments:
      path: the .npz file.
      compute: arithmetic of products of codes, as `binary_dot_general` takes it.
    """
    fixture, problem = None, ""
    try:
        fixture = Fixture(path)
        kind = fixture.about.get("kind")
        if kind not in CHECKS:
            raise unknown_name("kind", str(kind), CHECKS)
        CHECKS[kind](fixture, compute)
    except Exception as error:  # an error in one file must not hide the others
        problem = f"no {error}" if isinstance(error, KeyError) else str(error)
        problem = problem or type(error).__name__  # the error may have no message
    if fixture is None:
        return Report(path.stem, [], [], problem)
    return Report(path.stem, fixture.comparisons, fixture.missed(), problem)


def fixtures_in(paths: list[Path]) -> Iterator[Path]:
    """The .npz files among the paths and in directories among them, in order."""
    for path in paths:
        if path.is_dir():
            yield from sorted(path.glob("*.npz"))
        else:
            yield path


def main(argv: list[str] | None = None) -> None:
    """The command."""
    first, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.interop.check_fixture",
        description=first,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", metavar="PATH")
    parser.add_argument("--compute", choices=COMPUTE_MODES, default="float32")
    arguments = parser.parse_args(argv)
    try:
        require_local(vars(arguments))
    except ValueError as error:
        sys.exit(f"error: {error}")
    found = list(fixtures_in([Path(path) for path in arguments.paths]))
    if not found:
        sys.exit(f"error: no .npz in {', '.join(arguments.paths)}")
    width = max(len(path.stem) for path in found) + 2
    heads = ("arrays", "forward", "gradients", "steps")
    print(f"{'':{width}}" + "".join(f"{head:>12}" for head in heads))
    failed = 0
    for path in found:
        report = check(path, arguments.compute)
        failed += not report.passed
        print(report.line(width), flush=True)
        for complaint in report.complaints():
            print(f"    {complaint}")
    print(f"{len(found) - failed} of {len(found)} pass")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
