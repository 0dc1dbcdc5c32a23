"""Results of pretraining in, a table out, by hand."""

import pytest

from bipft_jax.reports.pretraining_table import is_of_pretraining, table


def result(mlm_loss, recipe="bipft_b", seed=1, tokens=5_000_000, **config):
    best = {"mlm_loss": mlm_loss, "mlm_accuracy": 0.25, "nsp_loss": 0.5, "nsp_accuracy": 0.75}
    base = {"recipe": recipe, "seed": seed, "log_every": 50, "batch_size": 32, "dropout": 0.1}
    return {
        "recipe": recipe,
        "size": "mini",
        **({"tokens": tokens} if tokens else {}),
        "selection_metric": "mlm_loss",
        "higher_is_better": False,
        "seeds": [{"seed": seed, "best": best}],
        "config": dict(base, **config),
    }


def test_seeds_share_a_row_and_settings_are_named_by_what_they_change():
    results = [
        result(4.6, batch_size=64, dropout=0.0),
        result(4.2, seed=1),
        result(4.4, seed=2, log_every=7),
        result(3.0, recipe="fp", tokens=None),
    ]
    assert table(results).splitlines() == [
        "| pretraining | held-out mlm_loss | held-out mlm_accuracy | held-out nsp_loss "
        "| held-out nsp_accuracy | M tokens | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| `fp`, mini | 3.000 | 25.0 | 0.500 | 75.0 | - | 1 |",
        # The deviation of 4.2 and 4.4 is 0.1 * sqrt(2).
        "| `bipft_b`, mini | 4.300 ± 0.141 | 25.0 ± 0.0 | 0.500 ± 0.000 | 75.0 ± 0.0 | 5.0 | 2 |",
        "| `bipft_b`, mini: batch_size=64, dropout=0.0 "
        "| 4.600 | 25.0 | 0.500 | 75.0 | 5.0 | 1 |",
    ]


def test_a_metric_may_be_better_when_it_is_higher():
    results = [result(4.0, batch_size=64), result(5.0)]
    for each, accuracy in zip(results, (0.2, 0.3), strict=True):
        each |= {"selection_metric": "mlm_accuracy", "higher_is_better": True}
        each["seeds"][0]["best"]["mlm_accuracy"] = accuracy
    assert ["5.000" in row for row in table(results).splitlines()[2:]] == [True, False]


def test_objectives_are_not_mixed():
    with pytest.raises(ValueError, match="causal_lm and mlm_nsp have no common scores"):
        table([result(4.0), result(4.0, objective="causal_lm")])


def test_results_of_tasks_are_not_of_pretraining():
    assert is_of_pretraining(result(4.0))
    assert not is_of_pretraining({"task": "sst2", "recipe": "fp", "seeds": []})
    assert not is_of_pretraining({"recipe": "fp", "size": "mini"})  # a config.json
