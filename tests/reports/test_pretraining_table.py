"""Results of pretraining in, tables out, by hand."""

from pathlib import Path

import pytest

from bipft_jax.reports.pretraining_table import is_of_pretraining, tables


def result(loss, recipe="bipft_b", seed=1, tokens=5_000_000, **config):
    scores = {"loss": loss, "mlm_loss": loss - 0.5, "mlm_accuracy": 0.25}
    scores |= {"nsp_loss": 0.5, "nsp_accuracy": 0.75}
    base = {"recipe": recipe, "size": "mini", "seed": seed, "batch_size": 32, "dropout": 0.1}
    return {
        "recipe": recipe,
        "size": "mini",
        **({"tokens": tokens} if tokens else {}),
        "selection_metric": "loss",
        "higher_is_better": False,
        "seeds": [{"seed": seed, "best": scores, "last": {**scores, "nsp_loss": None}}],
        "config": dict(base, log_every=50, **config),
    }


def filed(*results):
    return {Path(f"{number}.json"): each for number, each in enumerate(results)}


def test_seeds_share_a_row_which_has_the_settings_that_differ():
    results = filed(
        result(4.6, batch_size=64, dropout=0.0),
        # Of a version with a key more, and computed in another way.
        result(4.2, seed=1, mlm_distillation=0.0, mesh={"fsdp": 2}),
        {**result(4.4, seed=2), "config": {**result(4.4, seed=2)["config"], "log_every": 7}},
        result(3.0, recipe="fp", tokens=None),
    )
    (table,) = tables(results)
    assert table.splitlines() == [
        "| pretraining | held-out loss | held-out mlm_loss | held-out mlm_accuracy "
        "| held-out nsp_loss | held-out nsp_accuracy | M tokens | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| `fp`, mini | 3.000 | 2.500 | 25.0 | 0.500 | 75.0 | - | 1 |",
        # The deviation of 4.2 and 4.4 is 0.1 * sqrt(2).
        "| `bipft_b`, mini: batch_size=32, dropout=0.1 "
        "| 4.300 ± 0.141 | 3.800 ± 0.141 | 25.0 ± 0.0 | 0.500 ± 0.000 | 75.0 ± 0.0 | 5.0 | 2 |",
        "| `bipft_b`, mini: batch_size=64, dropout=0.0 "
        "| 4.600 | 4.100 | 25.0 | 0.500 | 75.0 | 5.0 | 1 |",
    ]


def test_the_last_evaluation_may_have_a_score_that_is_not_finite():
    (table,) = tables(filed(result(4.0)), last=True)
    row = "| `bipft_b`, mini | 4.000 | 3.500 | 25.0 | - | 75.0 | 5.0 | 1 |"
    assert table.splitlines()[-1] == row


def test_a_metric_may_be_better_when_it_is_higher():
    results = [result(4.0, batch_size=64), result(5.0)]
    for each, accuracy in zip(results, (0.2, 0.3), strict=True):
        each |= {"selection_metric": "mlm_accuracy", "higher_is_better": True}
        each["seeds"][0]["best"]["mlm_accuracy"] = accuracy
    (table,) = tables(filed(*results))
    assert ["batch_size=64" in row for row in table.splitlines()[2:]] == [False, True]


def test_every_objective_has_a_table():
    decoder = result(4.0, recipe="bitnet_fp", objective="causal_lm")
    decoder["seeds"][0]["best"]["accuracy"] = 0.2
    of_encoders, of_decoders = tables(filed(result(4.0), decoder))
    assert "mlm_loss" in of_encoders and "bitnet_fp" not in of_encoders
    assert of_decoders.splitlines()[2] == "| `bitnet_fp`, mini | 4.000 | 20.0 | 5.0 | 1 |"


def test_a_seed_counts_once():
    with pytest.raises(ValueError, match="0.json and 1.json are both seed 1 of .*bipft_b, mini"):
        tables(filed(result(4.0), result(4.0, compute="int8")))


def test_results_of_tasks_are_not_of_pretraining():
    assert is_of_pretraining(result(4.0))
    assert not is_of_pretraining({"task": "sst2", "recipe": "fp", "seeds": []})
    assert not is_of_pretraining({"recipe": "fp", "size": "mini"})  # a config.json
