"""The commands a user types, on a corpus of a few sentences: pretrain, finetune, fill a mask."""

import dataclasses
import json
import re
import shutil
import subprocess

import jax
import numpy as np
import pytest

from bipft_jax import fill_mask, pretrain
from bipft_jax.checkpoints.manager import restore_params
from bipft_jax.data.corpus.corpus import load_corpus
from bipft_jax.data.corpus.pretraining import PretrainingExamples
from bipft_jax.data.tokenizers import train_sentencepiece
from bipft_jax.training import evaluation, sharding
from bipft_jax.training.telemetry import read_metrics
from configs import pretrain as pretrain_config
from tests.launching import CONFIG, PRETRAIN, WORDS, command, environment, run


def test_the_untrained_bias_scores_like_the_unigram_baseline(home, monkeypatch):
    """With the bias at log frequencies and nothing else (hidden states times zero embeddings). Over
    six batches with different numbers of masked tokens, all of which count alike."""
    monkeypatch.setattr(evaluation, "EVALUATION_ROWS", 1)
    run = pretrain.make_run(pretraining(home, "fp,tiny", evaluation_sequences=48))
    params = pretrain.begin(run, None).params
    words = params["bert"]["words"]
    words["embedding"] = jax.numpy.zeros_like(words["embedding"])
    found, counts = pretrain.evaluation_of(run)(params, 0), run.corpus.unigram_counts
    assert found["mlm_perplexity"] == pytest.approx(found["unigram_perplexity"], rel=1e-4)
    assert found["mlm_accuracy"] == pytest.approx(found["unigram_accuracy"])
    held_out = PretrainingExamples.from_corpus(run.corpus, "validation", seed=0).batch(0, 48)
    ids = held_out["mlm_ids"][held_out["mlm_weights"] > 0]
    of_ids = ((counts + 1) / (counts + 1).sum())[ids]
    assert found["unigram_perplexity"] == pytest.approx(np.exp(-np.mean(np.log(of_ids))))
    assert found["unigram_accuracy"] == pytest.approx(np.mean(ids == np.argmax(counts)))


def test_held_out_text_is_the_same_whatever_the_mesh_and_the_training(home, monkeypatch):
    monkeypatch.setattr(evaluation, "EVALUATION_ROWS", 3)
    held_out = []
    monkeypatch.setattr(pretrain, "held_out_metrics", lambda *given: held_out.append(given[-1]))

    def batches(devices, sequences):
        run = pretrain.make_run(pretraining(home, masking_rate=0.4, evaluation_sequences=sequences))
        assert run.examples.max_predictions == 10  # of 24 tokens
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        learner = dataclasses.replace(run.learner, mesh=mesh)
        run = dataclasses.replace(run, learner=learner)
        with pytest.raises(TypeError):  # there are no metrics
            pretrain.evaluation_of(run)(None, 0)
        return list(held_out.pop())

    corpus = load_corpus(home / "corpus")
    expected = PretrainingExamples.from_corpus(corpus, "validation", seed=0).batch(0, 16)
    assert expected["mlm_ids"].shape == (16, 4)
    for devices, sizes in ((1, [3, 3, 3, 3, 3, 1]), (2, [6, 6, 4]), (8, [16])):
        made = batches(devices, 16)
        assert [len(batch["nsp_labels"]) for batch in made] == sizes
        for name, values in expected.items():
            np.testing.assert_array_equal(np.concatenate([b[name] for b in made]), values)
    # There are 54. What does not fill a row of every shard is left over; each has one at least.
    cases = ((1, 0), (8, 0), (8, 5))
    totals = [sum(len(b["nsp_labels"]) for b in batches(*case)) for case in cases]
    assert totals == [54, 48, 8]


def test_telemetry_has_what_a_run_is_judged_by(pretrained):
    points = read_metrics(pretrained / "metrics.jsonl")
    training = [point for point in points if "loss" in point]
    held_out = [point for point in points if "validation/loss" in point]
    assert len(training) == len(held_out) == 10
    assert {point["tokens"] / point["step"] for point in points} == {PRETRAIN["batch_size"] * 24}
    result = json.loads((pretrained / "result.json").read_text())
    assert result["tokens"] == points[-1]["tokens"]
    wanted = {"mlm_loss", "nsp_loss", "learning_rate", "flip_ratio", "gradient_norm"}
    wanted |= {"sequences_per_second", "tokens_per_second", "model_flops_per_second"}
    wanted |= {"eta_seconds", "scales/attention/query/input_scale/1", "flips/pooler"}
    assert wanted <= set(training[-2])
    wanted = {"unigram_accuracy", "nsp_accuracy", "mlm_perplexity", "attended_keys/1"}
    assert {f"validation/{name}" for name in wanted} <= set(held_out[0])


def test_finetuning_several_seeds_is_summarised_and_not_repeated(home, pretrained):
    workdir = home / "sst2"
    options = dict(init_from=pretrained, glue_dir=home / "glue", max_updates=4, seeds="(0, 3)")
    options |= dict(batch_size=16, learning_rate=1e-3, evaluate_every=2)
    first = run(home, "configs/finetune.py:bipft_b,sst2", workdir, **options)
    result = json.loads((workdir / "result.json").read_text())
    assert [seed["seed"] for seed in result["seeds"]] == [0, 3]
    assert result["majority_class"] == {"accuracy": 0.5}
    scores = [seed["best"]["accuracy"] for seed in result["seeds"]]
    assert result["mean"]["accuracy"] == pytest.approx(sum(scores) / 2)
    assert "majority class" in first.stdout and "50.0" in first.stdout
    begun, seed, title, *_ = first.stdout.splitlines()
    assert begun.startswith(f"starting from {pretrained}, step ") and "new classifier" in begun
    assert seed == f"sst2, seed 0: accuracy {100 * scores[0]:.1f}"
    assert title.startswith("sst2, bipft_b,")

    again = run(home, "configs/finetune.py:bipft_b,sst2", workdir, **options)
    assert again.stdout == first.stdout
    # No progress line: nothing was trained again.
    assert "sst2" in first.stderr and "sst2" not in again.stderr
    with pytest.raises(SystemExit, match="holds a finetuned classifier"):
        fill_mask.main(["--workdir", str(workdir / "seed_0"), "A [MASK] sees."])


def test_fill_mask_prints_five_words(pretrained, capsys):
    fill_mask.main(["--workdir", str(pretrained), "the old [MASK] sees a cat ."])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 5 and all(word in [*WORDS, "."] for _, word in lines)
    probabilities = [float(probability) for probability, _ in lines]
    assert probabilities == sorted(probabilities, reverse=True) and sum(probabilities) <= 1
    with pytest.raises(SystemExit, match=r"no \[MASK\]"):
        fill_mask.main(["--workdir", str(pretrained), "nothing to find"])


def test_a_binary_run_starts_from_full_precision_and_learns_from_it(home):
    options = dict(PRETRAIN, num_updates=8)
    run(home, "configs/pretrain.py:fp,tiny", home / "fp", **options)
    options |= dict(init_from=home / "fp", teacher=home / "fp", learning_rate=1e-5)
    run(home, "configs/pretrain.py:bipft_a,tiny", home / "student", **options)
    teacher = restore_params(home / "fp", "best").params
    student = restore_params(home / "student", "latest").params
    same = jax.numpy.corrcoef(
        teacher["bert"]["encoder"]["layers"]["ffn_input"]["kernel"].ravel(),
        student["bert"]["encoder"]["layers"]["ffn_input"]["kernel"].ravel(),
    )
    assert same[0, 1] > 0.9
    last = [p for p in read_metrics(home / "student" / "metrics.jsonl") if "loss" in p][-1]
    terms = [last[name] for name in ("mlm_loss", "nsp_loss", "nsp_soft_loss", "hidden_loss")]
    assert last["loss"] == pytest.approx(sum(terms), rel=1e-5)


def pretraining(home, arg="bipft_b,tiny", **overrides):
    config = pretrain_config.get_config(arg)
    # In this process there are eight devices.
    config.update({"corpus_dir": str(home / "corpus"), **PRETRAIN, "batch_size": 16, **overrides})
    return config


@pytest.mark.parametrize(
    ("arg", "overrides", "message"),
    [
        ("bipft_b,tiny", {"corpus_dir": ""}, "give --config.corpus_dir=DIR"),
        ("bipft_b,tiny", {"corpus_dir": "/nowhere"}, "python -m bipft_jax.data.corpus"),
        ("bipft_c,tiny", {}, "unknown recipe 'bipft_c': did you mean bipft_"),
        ("bipft_b,tinny", {}, "unknown size 'tinny': did you mean tiny"),
        ("bipft_b,tiny", {"accumulation": 3}, "batch_size 16 is not a multiple of accumulation 3"),
        ("bipft_b,tiny", {"compute": "int4", "accumulation": 1}, "unknown compute 'int4'"),
    ],
)
def test_a_config_that_cannot_work_is_explained(home, tmp_path, arg, overrides, message):
    with pytest.raises(ValueError, match=message):
        pretrain.train(pretraining(home, arg, **overrides), str(tmp_path / "run"))


def test_a_run_that_never_began_does_not_occupy_its_workdir(home, tmp_path):
    with pytest.raises(ValueError, match="no checkpoints"):
        pretrain.train(pretraining(home, init_from="/nowhere"), str(tmp_path))
    assert not (tmp_path / "config.json").exists()


def test_sentencepiece_text_after_a_mask_is_encoded_as_in_running_text():
    sentences = [f"the value of item {i} is none." for i in range(200)]
    tokenizer = train_sentencepiece(sentences, 45)
    running = tokenizer.encode("the value is none.")
    ids = fill_mask.encode_masked(tokenizer, "the [MASK] is [MASK].")
    mask, stop = tokenizer.mask_id, running[-1]
    words = [tokenizer.encode(word) for word in ("the", "is")]
    assert ids == [tokenizer.cls_id, *words[0], mask, *words[1], mask, stop, tokenizer.sep_id]


def test_a_workdir_of_another_config_is_refused_by_its_keys(home, pretrained):
    config = json.loads((pretrained / "config.json").read_text())
    changed = pretraining(home, accumulation=1, learning_rate=0.125)
    assert config["learning_rate"] != 0.125
    with pytest.raises(ValueError, match=r"(?s)learning_rate.*0\.125"):
        pretrain.train(changed, str(pretrained))


def test_a_corpus_that_changed_under_a_run_is_refused_wherever_it_lies(home, pretrained):
    """The parameters and the tokenizer of the checkpoint fit it."""
    corpus = home / "other"
    shutil.copytree(home / "corpus", corpus)
    metadata = json.loads((corpus / "corpus.json").read_text())
    metadata["identity"]["input"] = ["another text"]
    (corpus / "corpus.json").write_text(json.dumps(metadata))
    done = subprocess.run(
        command(home, CONFIG, pretrained, **{**PRETRAIN, "corpus_dir": corpus}),
        env=environment(home),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    differing = [line.strip() for line in done.stderr.splitlines() if line.startswith("  ")]
    assert len(differing) == 1 and differing[0].startswith("corpus_dir: input ")


def test_a_mistyped_key_is_answered_with_the_nearest(home):
    done = subprocess.run(
        command(home, "configs/pretrain.py:bipft_b,tiny", home / "x", learning_rat=1),
        env=environment(home),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "unknown config key 'learning_rat'" in done.stderr
    assert 'Did you mean "learning_rate"' in done.stderr
    assert "Traceback" not in done.stderr


def test_programs_are_those_that_a_run_compiles(home, tmp_path, caplog):
    """By name, shapes and dtypes, on eight devices."""
    # Single operations, on scales at calibration and on a device's part of an array when saving.
    single = {"jit(isfinite)", "jit(_reduce_all)", "jit(slice)"}

    def compiled(function):
        caplog.clear()
        with jax.log_compiles(), caplog.at_level("WARNING"):
            function()
        found = re.findall(r"Compiling (\S+) with global shapes and types (.*?)\. Arg", caplog.text)
        return {one for one in found if one[0] not in single and re.search(r"\[\d", one[1])}

    config = pretraining(home, num_updates=2, warmup_updates=0, log_every=1, evaluate_every=2)
    config.mesh.fsdp = 2
    made = compiled(lambda: pretrain.train(config, str(tmp_path / "run")))
    mesh = sharding.make_mesh(fsdp=2)
    vocabulary = load_corpus(home / "corpus").tokenizer.vocab_size
    programs = pretrain.programs(config, pretrain.learner_of(config, vocabulary, mesh), 24)
    jax.clear_caches()
    assert compiled(lambda: [program.lowered(mesh) for program in programs]) == made
