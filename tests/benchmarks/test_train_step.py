"""The timing command: what it compares, not how fast that is."""

import json

import pytest

from bipft_jax.benchmarks import train_step
from bipft_jax.benchmarks.workload import FAMILIES, Workload


def test_writes_a_row_for_every_variant(tmp_path, capsys):
    file = tmp_path / "rows.json"
    train_step.main(
        "--size tiny --batch 2 --length 16 --recipes fp,bipft_a "
        f"--compute auto,simulated --repeats 1 --json {file}".split()
    )
    rows = json.loads(file.read_text())
    assert [(row["recipe"], row["compute"]) for row in rows] == [
        ("fp", "float32"),  # in which nothing is quantised
        ("bipft_a", "auto"),
        ("bipft_a", "simulated"),
    ]
    assert rows[0]["ratio_to_fp"] == 1
    for row in rows:
        assert row["tokens_per_second"] == pytest.approx(32 / row["seconds"])
        # At least the parameters and Adam's two moments, and not orders of magnitude more.
        assert 3 * 4 * 30522 * 128 < row["peak_bytes"] < 1e9
    assert "simulated" in capsys.readouterr().out


def test_decoders_are_compared_with_their_own_twin():
    variants = [
        train_step.Variant(recipe, "auto", None, lambda: None)
        for recipe in ("bitnet_b158", "bipft_a", "bitnet_fp")
    ]
    rows = train_step.measure(variants, tokens=1, repeats=1)
    assert [row["ratio_to_fp"] is None for row in rows] == [False, True, False]
    assert rows[2]["ratio_to_fp"] == 1


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.twin)
def test_a_workload_has_the_batch_and_the_recipe_of_a_run(family):
    workload = Workload("tiny", 2, 16, "float32", vocab_size=50)
    batch = workload.arrays(family.twin)
    expected = family.objective.from_corpus.example(16, None)
    assert {name: (rows.shape[1:], rows.dtype) for name, rows in batch.items()} == {
        name: (one.shape, one.dtype) for name, one in expected.items()
    }
    for recipe, row in family.recipes.items():
        config = workload.config(recipe, "auto")
        assert config.recipe is row and (config.hidden, config.vocab_size) == (128, 50)


def test_an_update_of_a_decoder_runs_with_micro_batches():
    workload = Workload("2x48", 4, 8, "float32", vocab_size=50, accumulation=2)
    variant = train_step.compile_variant(workload, "bitnet_b158", "auto")
    state, metrics = variant.run()
    assert state.step == 1 and 3 < metrics["loss"] < 5  # log 50 = 3.9


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--size base --recipes bitnet_b1", "unknown size 'base': .*Known: tiny"),
        ("--compute int4", "one of auto, int8"),
        ("--recipes bipft", "did you mean"),
    ],
)
def test_unknown_names_are_answered(arguments, complaint):
    with pytest.raises(SystemExit, match=complaint):
        train_step.main(["--size", "tiny", *arguments.split()])
