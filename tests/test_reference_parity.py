"""Our numbers against those that the references computed, and the command that compares them.

BIPFT_FIXTURES names the folder of fixtures; without it the comparison with the references is
skipped, and what is left are the hand-computed cases here and in the tests of each module.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from bipft_jax.interop import check_fixture
from bipft_jax.interop.fixtures import bitnet_units
from bipft_jax.interop.fixtures.fixture import Fixture

ROOT = Path(__file__).parents[1]
FOLDER = Path(os.environ.get("BIPFT_FIXTURES", ROOT.parent / "shared" / "golden"))
BITNET = FOLDER.parent / "bitnet" / "golden"
FIXTURES = [*sorted(FOLDER.glob("*.npz")), *sorted(BITNET.glob("*.npz"))]


def without_a_check(path: Path) -> str:
    """The fixture's kind (or its unit), if the library has no check for it."""
    about = json.loads(path.with_suffix(".json").read_text())
    known = check_fixture.CHECKS.keys() | bitnet_units.UNITS.keys()
    return "" if about.get("unit", about["kind"]) in known else about.get("unit", about["kind"])


if not FIXTURES:
    FIXTURES = [
        pytest.param(
            FOLDER / "none.npz",
            marks=pytest.mark.skip(f"no fixtures in {FOLDER}: set BIPFT_FIXTURES to their folder"),
        )
    ]


def one_of_each_recipe() -> list[Path]:
    """The largest fixtures, one for each recipe and number of bits, and a trajectory."""
    largest: dict[tuple, tuple[int, Path]] = {}
    for path in (*FOLDER.glob("*.npz"), *BITNET.glob("H*.npz")):
        about = json.loads(path.with_suffix(".json").read_text())
        if "recipe" in about:
            steps = about.get("compare_steps")  # given where exact ties decide
            key = (about["recipe"], about.get("activation_bits"), steps)
            largest[key] = max(largest.get(key, (0, path)), (path.stat().st_size, path))
    return sorted(path for _, path in largest.values())


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_agrees_with_the_reference(path):
    if kind := without_a_check(path):
        pytest.skip(f"there is no check for {kind}")
    report = check_fixture.check(path)
    assert report.passed, report.complaints()


@pytest.mark.parametrize("path", one_of_each_recipe(), ids=lambda path: path.stem)
@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"there is no {FOLDER}")
def test_integer_products_agree_with_the_reference_too(path):
    report = check_fixture.check(path, compute="int8")
    assert report.passed, report.complaints()


# A fixture by hand: weights 1, 3, -1, 1 have mean 1 and mean magnitude 1.5.
WEIGHTS = {
    "one/w": np.float32([[1, 3], [-1, 1]]),
    "one/g": np.float32([[5, -7], [0.5, 100]]),
    "one/y": np.float32([[0, 1.5], [-1.5, 0]]),
    "one/gw": np.float32([[5, -7], [0.5, 100]]),
}
ABOUT = {"kind": "unit", "cases": {"one": {"layerwise": True}}}


def written(directory: Path, name: str, arrays: dict, about: dict) -> Path:
    np.savez(directory / f"{name}.npz", **arrays)
    (directory / f"{name}.json").write_text(json.dumps(about))
    return directory / f"{name}.npz"


def run(capsys, *arguments) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stopped:
        check_fixture.main([str(argument) for argument in arguments])
    return stopped.value.code, capsys.readouterr().out


def test_the_command_prints_a_line_each_and_fails_if_one_does(tmp_path, capsys):
    good = written(tmp_path, "any_name", WEIGHTS, ABOUT)
    code, out = run(capsys, good)
    assert code == 0
    assert out.splitlines()[1].split() == ["any_name", "2/2", "0.0e+00", "0.000", "-", "pass"]

    wrong = WEIGHTS | {"one/gw": WEIGHTS["one/gw"] + np.float32([[0, 0], [0, 0.0101]])}
    written(tmp_path, "wrong", wrong, ABOUT)
    code, out = run(capsys, tmp_path)
    assert code == 1 and "any_name" in out and out.endswith("1 of 2 pass\n")
    # 1e-4 of the largest element, 100.0101, and a floor of 2e-7.
    assert "one/gw: error 0.0101, allowed 0.01\n" in out
    assert f"{1.01:.3f}" in out.splitlines()[2] and "FAIL" in out.splitlines()[2]


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"one/out/y": np.zeros(1)}, "no check is for the arrays one/out/{y}"),
        ({"grad/w": np.zeros(1)}, "grad/w: not compared"),
        ({"one/more": np.zeros(1)}, "one/more: not compared"),
        ({"one/y": np.zeros((2, 3))}, "one/y has shape (2, 3), ours (2, 2)"),
        ({"one/y": np.float32([[0, 1.5], [-1.5, np.nan]])}, "one/y: error nan"),
    ],
)
def test_what_was_not_or_cannot_be_compared_is_a_failure(tmp_path, change, complaint):
    arrays = {**WEIGHTS, **change}
    report = check_fixture.check(written(tmp_path, "changed", arrays, ABOUT))
    assert not report.passed
    assert complaint in "\n".join(report.complaints())


def test_reading_a_result_is_not_comparing_it(tmp_path):
    fixture = Fixture(written(tmp_path, "read", {"out/loss": np.ones(1), "x": np.ones(1)}, ABOUT))
    assert fixture.missed() == ["out/loss", "x"]
    assert len(fixture.group("")) == 2  # read
    assert fixture.missed() == ["out/loss"]
    fixture.forward("out/loss", np.ones(1))
    assert not fixture.missed()


def test_a_result_that_is_listed_and_not_there_is_missed(tmp_path):
    about = {**ABOUT, "arrays": {**dict.fromkeys(WEIGHTS, {}), "one/gone": {}}}
    report = check_fixture.check(written(tmp_path, "less", WEIGHTS, about))
    assert report.complaints() == ["one/gone: not compared"]


def test_a_small_scale_is_compared_at_its_own_size(tmp_path):
    """The clamp of a negative scale at 1e-5 (SPEC 1.2), which is half the forward tolerance."""
    x = np.float32([-2, 0, 3])
    arrays = {"x": x, "g": np.ones(3), "alpha_in": np.float32(-0.4), "galpha": np.float32(0)}
    arrays |= {"y": np.sign(x) * 1e-5, "gx": np.float32([0, 1, 0]), "alpha_after": -0.4}
    arrays = {f"one/{name}": np.float32(array) for name, array in arrays.items()}
    case = {"bits": 1, "initialised_flag_before": True}
    about = {"kind": "unit", "symmetric": True, "cases": {"one": case}}
    assert check_fixture.check(written(tmp_path, "right", arrays, about)).passed
    arrays["one/y"] = -arrays["one/y"]
    report = check_fixture.check(written(tmp_path, "wrong", arrays, about))
    assert [line.split(":")[0] for line in report.complaints()] == ["one/y"]


def test_an_error_without_words_is_a_failure_too(tmp_path, monkeypatch):
    def stumbling(fixture, compute):
        check_fixture.check_units(fixture, compute)
        raise AssertionError

    monkeypatch.setitem(check_fixture.CHECKS, "unit", stumbling)
    report = check_fixture.check(written(tmp_path, "stumbling", WEIGHTS, ABOUT))
    assert not report.passed and report.problem == "AssertionError"


def test_an_array_that_says_unused_need_not_be_compared(tmp_path):
    arrays = {**WEIGHTS, "one/y_UNUSED": np.zeros(1)}
    assert check_fixture.check(written(tmp_path, "unused", arrays, ABOUT)).passed


def test_what_is_no_fixture_is_explained(tmp_path, capsys):
    for content in (b"", b"PK\x03\x04 cut off"):
        for about in ("{}", "[]"):
            (tmp_path / "broken.json").write_text(about)
            (tmp_path / "broken.npz").write_bytes(content)
            report = check_fixture.check(tmp_path / "broken.npz")
            assert not report.passed and "cannot be read" in report.problem
    report = check_fixture.check(written(tmp_path, "kind", WEIGHTS, {"kind": "units"}))
    assert "unknown kind 'units': did you mean unit" in report.problem
    report = check_fixture.check(written(tmp_path, "bare", WEIGHTS, {"kind": "unit"}))
    assert "no 'layerwise'" in report.problem
