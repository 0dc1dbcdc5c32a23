"""A decoder's run: its keys, what it refuses, and that it resumes where it stopped."""

import shutil

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bipft_jax import baselines, pretrain
from bipft_jax.checkpoints.source import load_source
from bipft_jax.data.corpus.command import main as prepare
from bipft_jax.data.corpus.corpus import load_corpus
from bipft_jax.models.parameters import named_leaves
from bipft_jax.objectives.table import OBJECTIVES
from bipft_jax.reports.results import RESULT_NAME
from bipft_jax.training.telemetry import read_metrics
from configs import pretrain as pretrain_config

# Keys of configs/pretrain.py that only a decoder's run shows.
KEYS = {
    "objective",
    "second_peak",
    "adam_b2",
    "decoder.gate",
    "decoder.norm",
    "decoder.groups",
    "decoder.tied",
    "decoder.rope_theta",
    "decoder.norm_epsilon",
    "decoder.separate_documents",
}


def config_of(home, arg="bitnet_b158,tiny", **changes):
    config = pretrain_config.get_config(arg)
    given = dict(batch_size=16, num_updates=4, warmup_updates=0, log_every=1, evaluate_every=2)
    given |= dict(corpus_dir=str(home / "corpus"), evaluation_sequences=16)
    config.update({**given, **changes})
    return config


def updates_by_hand(rates, decays, b2):
    """AdamW in float64, of a weight that starts at 2 and has the gradients 1, 3, -2, 1."""
    w, m, v, found = 2.0, 0.0, 0.0, []
    for t, (rate, decay, g) in enumerate(zip(rates, decays, (1.0, 3.0, -2.0, 1.0)), start=1):
        m, v = 0.9 * m + 0.1 * g, b2 * v + (1 - b2) * g**2
        w -= rate * (m / (1 - 0.9**t) / (np.sqrt(v / (1 - b2**t)) + 1e-8) + decay * w)
        found.append(w)
    return found


@pytest.mark.parametrize("block", [{}, dict(gate="silu", norm="linear", groups=2)])
def test_keys_of_a_decoder_do_what_they_say(home, block):
    more = dict(second_peak=0.5, adam_b2=0.5) if block else dict(second_peak=0.0)
    separate = bool(block)
    of_imported = dict(tied=False, rope_theta=5e5, norm_epsilon=1e-6) if block else {}
    run = pretrain.make_run(
        config_of(
            home,
            learning_rate=0.1,
            weight_decay=0.25,
            clip_norm=0.0,
            decoder=block | of_imported | dict(separate_documents=separate),
            **more,
        )
    )
    assert run.learner.objective is OBJECTIVES["causal_lm"]
    recipe = run.learner.model.config.recipe
    seen = (recipe.name, recipe.gate, recipe.norm, recipe.groups)
    assert seen == ("bitnet_b158", *(block.values() if block else ("relu2", "block", 1)))
    model = run.learner.model.config
    seen = (model.tied, model.rope_theta, model.norm_epsilon)
    assert seen == (tuple(of_imported.values()) or (True, 10_000, 1e-5))
    assert run.examples.separate_documents == separate
    falling = np.asarray([1.0, 0.75, 0.5, 0.25]) * 0.1
    second = np.asarray([1, 1, 0.5, 0.5]) if block else 1
    expected = updates_by_hand(
        falling * second,
        [0.25, 0.25, 0, 0] if block else [0.25] * 4,
        0.5 if block else 0.95,
    )
    optimizer, params, found = run.learner.optimizer, {"kernel": jnp.full((1, 1), 2.0)}, []
    state = optimizer.init(params)
    for g in (1.0, 3.0, -2.0, 1.0):
        updates, state = optimizer.update({"kernel": jnp.full((1, 1), g)}, state, params)
        params = optax.apply_updates(params, updates)
        found.append(float(params["kernel"][0, 0]))
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("arg", "changes", "message"),
    [
        ("bitnet_b158,tiny", dict(dropout=0.1), "dropout is 0.1, but recipe bitnet_b158 is a dec"),
        ("bitnet_b1,tiny", dict(lora_rank=2), "lora_rank is 2, .* leave it at 0"),
        ("fp,tiny", dict(decoder=dict(groups=2)), "decoder.groups is 2, but recipe fp is an enco"),
        ("bitnet_b1,tiny", dict(objective="mlm_nsp"), "bitnet_b1 is a decoder's: it learns causal"),
        ("fp,tiny", dict(objective="causal_lm"), "fp is an encoder's: it learns mlm_nsp, not ca"),
        ("bitnet_b2,tiny", {}, "unknown recipe 'bitnet_b2': did you mean bitnet_b1"),
        ("bitnet_b1,tiny", dict(teacher="/x"), "objective causal_lm has no teacher"),
        ("bitnet_b1,large", {}, "unknown size 'large'"),
        ("bitnet_b1,tiny", dict(decoder=dict(groups=3)), "2 kv_heads are no multiple of the grou"),
        (
            "bitnet_b1,small",
            dict(decoder=dict(groups=2), mesh=dict(tensor=4)),
            "tensor 4 does not divide the model's groups 2",
        ),
    ],
)
def test_a_config_that_cannot_work_is_explained(home, tmp_path, arg, changes, message):
    with pytest.raises(ValueError, match=message):
        pretrain.train(config_of(home, arg, **changes), str(tmp_path / "run"))


def test_an_objective_that_the_corpus_does_not_serve_is_refused(home, tmp_path):
    cased = ["--tokenizer", "sentencepiece-cased:300", "--sequence_length", "24"]
    made = ["--input", str(home / "text.txt"), "--output", str(tmp_path / "corpus")]
    prepare([*made, *cased, "--processes", "1"])
    with pytest.raises(ValueError, match="does not serve the objective mlm_nsp, only causal_lm"):
        pretrain.train(config_of(tmp_path, "fp,tiny"), str(tmp_path / "run"))
    pretrain.make_run(config_of(tmp_path))


def test_a_run_resumes_bit_for_bit_and_reports_bits_of_its_text(home, tmp_path):
    config = config_of(home, decoder=dict(groups=2), mesh=dict(tensor=2))
    workdir = tmp_path / "run"
    pretrain.train(config, str(workdir))
    whole, result = load_source(workdir, 4), (workdir / RESULT_NAME).read_text()
    assert whole.config().recipe.groups == 2
    assert whole.sequence_length == load_corpus(home / "corpus").sequence_length
    shutil.rmtree(workdir / "checkpoints" / "4")
    pretrain.train(config, str(workdir))
    again = load_source(workdir, 4)
    for name, leaf in named_leaves(whole.params).items():
        np.testing.assert_array_equal(named_leaves(again.params)[name], leaf, err_msg=name)
    assert (workdir / RESULT_NAME).read_text() == result

    last = read_metrics(workdir / "metrics.jsonl")[-1]
    scores = {name.removeprefix("validation/"): value for name, value in last.items()}
    assert scores["bits_per_token"] == pytest.approx(scores["loss"] / np.log(2))
    splits = load_corpus(home / "corpus").splits
    documents = (home / "text.txt").read_text().split("\n\n")
    assert sum(split.text_bytes for split in splits.values()) == sum(map(len, documents))
    held_out = splits["validation"]
    per_token = held_out.text_bytes / (held_out.tokens + held_out.documents)  # ends are tokens
    assert scores["bits_per_byte"] == pytest.approx(scores["bits_per_token"] / per_token)
    # Weights drawn from a normal distribution are 0 where |z| < sqrt(2 / pi) / 2.
    first = read_metrics(workdir / "metrics.jsonl")[0]
    assert first["zero_ratio"] == pytest.approx(0.31, abs=0.02)
    assert {f"zeros/feed_forward/ffn_gate/{layer}" for layer in (0, 1)} < first.keys()
    # Models that count predict the same tokens: their unigrams have the run's own figure.
    *_, (name, unigram) = baselines.compared([workdir])
    assert name == "unigram"
    for key, bits in unigram.items():
        assert scores[f"unigram_{key}"] == pytest.approx(bits, rel=1e-5)
