"""Finetuning by its functions, from untrained checkpoints: teachers, stages, what is refused."""

import dataclasses
import random
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bipft_jax import finetune, stages
from bipft_jax.checkpoints.manager import Checkpointer, restore_params
from bipft_jax.checkpoints.source import checkpoint_description, load_source
from bipft_jax.data.glue import batches as glue_batches
from bipft_jax.data.glue.tasks import glue_task
from bipft_jax.data.tokenizers import WordPieceTokenizer
from bipft_jax.models.bert import BertForSequenceClassification
from bipft_jax.models.parameters import is_scale, named_leaves
from bipft_jax.models.recipes import BertConfig, recipe_named
from bipft_jax.objectives.task_distillation import (
    DISTILLATIONS,
    TaskTeacher,
    behaviour,
    bit_distillation,
    bit_distillation_of_scores,
)
from bipft_jax.reports import results
from bipft_jax.training import sharding
from bipft_jax.training import step as steps
from bipft_jax.training.state import TrainState, new_state
from bipft_jax.training.telemetry import read_metrics
from configs import finetune as finetune_config
from tests.objectives import abstract_params, objective

WORDS = "the a cat dog bird tree house sees likes finds old new red big small runs sings".split()


@pytest.fixture(scope="module", autouse=True)
def two_devices():
    """As many as a split batch needs: saving what lies on eight takes long."""
    with pytest.MonkeyPatch.context() as patch:
        mesh = sharding.make_mesh(devices=jax.devices()[:2])
        patch.setattr(sharding, "make_mesh", lambda *_: mesh)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """glue/, and two checkpoints: pretrained/ (bipft_b with its heads), teacher/ (fp, classifies).
    Their parameters are random."""
    home = tmp_path_factory.mktemp("home")
    rng = random.Random(0)
    task = home / "glue" / "SST-2"
    task.mkdir(parents=True)
    for name, rows in (("train", 64), ("dev", 16)):
        lines = [f"{' '.join(rng.choices(WORDS, k=5))}\t{i % 2}" for i in range(rows)]
        (task / f"{name}.tsv").write_text("\n".join(["sentence\tlabel", *lines]) + "\n")
    tokenizer = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])
    values = np.random.default_rng(0)
    for directory, recipe, classes in (("pretrained", "bipft_b", 0), ("teacher", "fp", 2)):
        config = BertConfig(recipe_named(recipe), tokenizer.vocab_size, 2, 16, 2, 32, 16)
        params = jax.tree.map(
            lambda leaf: jnp.asarray(values.normal(size=leaf.shape) * 0.3, leaf.dtype),
            abstract_params(config, classes),
        )
        with Checkpointer(
            home / directory, keep_every=0, best_metric="accuracy", best_mode="max"
        ) as checkpointer:
            checkpointer.save(
                1,
                TrainState(jnp.int32(1), params, (), jnp.int32(0)),
                config=checkpoint_description(
                    config, objective(classes), {"task": "sst2"} if classes else {}
                ),
                tokenizer=tokenizer.to_dict(),
                metrics={"accuracy": 0.5},
            )
    return home


def finetuning(home, arg, init_from="teacher", **overrides):
    config = finetune_config.get_config(arg)
    config.update({"init_from": str(home / init_from), "glue_dir": str(home / "glue")})
    config.update({"batch_size": 16, "max_updates": 3, "evaluate_every": 1, "log_every": 1})
    config.update(overrides)
    return config


def distilling(home, arg, **overrides):
    keys = dict(teacher=str(home / "teacher"), distillation="bit")
    return finetuning(home, arg, **{**keys, **overrides})


def leaves(workdir, step):
    return named_leaves(restore_params(workdir, step).params)


def losses(workdir):
    return [p["loss"] for p in read_metrics(workdir / "metrics.jsonl") if "loss" in p]


def test_finetuning_explains_what_is_missing(home, tmp_path):
    config = finetune_config.get_config("bipft_b,sst3")
    with pytest.raises(ValueError, match="did you mean sst2"):
        finetune.train(config, str(tmp_path))
    config.task = "sst2"
    with pytest.raises(ValueError, match="init_from is empty"):
        finetune.train(config, str(tmp_path))
    config.update({"init_from": str(tmp_path / "none"), "glue_dir": str(home / "glue")})
    with pytest.raises(ValueError, match="no checkpoints"):
        finetune.train(config, str(tmp_path))


# BertAdam's first update changes nothing: the first checkpoint of a stage is what it began with.
STAGED = dict(optimizer="bert_adam", learning_rate=1e-2, schedule="linear", dropout=0.0)
STAGED |= dict(intermediate_recipes=("bit_w1a2",), seeds=(3,))
STAGE_1 = "stage_1_bit_w1a2"
SCORES_1, SCORES_2 = [0.1, 0.9, 0.5], [0.8, 0.2, 0.1]  # best: the second update, the first


def scripted(patch, scores):
    """Evaluations give these scores, and there are as many."""
    left = [{"accuracy": score} for score in scores]
    patch.setattr(finetune, "task_scores", lambda *_: left.pop(0))
    return left


@pytest.fixture(scope="module")
def staged(home, tmp_path_factory):
    """The workdir of a finished run of two stages, its config and its summary."""
    workdir = tmp_path_factory.mktemp("staged")
    config = distilling(home, "bit_w1a1,sst2", **STAGED)
    with pytest.MonkeyPatch.context() as patch:
        scripted(patch, SCORES_1 + SCORES_2)
        # All that a run has while it runs: tests go on from the middle of it.
        patch.setattr(Checkpointer, "keep_parameters", lambda *_: None)
        return workdir, config, finetune.train(config, str(workdir))


def test_a_finetuned_teacher_is_handed_over_and_imitated(home, staged):
    workdir, _, _ = staged
    points = read_metrics(workdir / STAGE_1 / "seed_3" / "metrics.jsonl")
    terms = [(p["loss"], p["soft_loss"] + p["hidden_loss"]) for p in points if "loss" in p]
    assert len(terms) == 3
    for loss, total in terms:
        assert loss == pytest.approx(total, rel=1e-5)
    found = leaves(workdir / STAGE_1 / "seed_3", 2)
    # The classifier, too, is the teacher's, but for one update of 0.03 at most.
    for name, value in leaves(home / "teacher", 1).items():
        np.testing.assert_allclose(found[name], value, atol=0.05, err_msg=name)


@pytest.mark.parametrize(
    ("run", "classes", "kept"),
    [
        ({"task": "sst2"}, 2, True),
        ({"task": "cola"}, 2, False),
        ({"task": "mnli"}, 3, False),
        ({"labels": ["NEGATIVE", "POSITIVE"]}, 2, True),
        ({"labels": ["POSITIVE", "NEGATIVE"]}, 2, False),
        ({"labels": ["0", "1"]}, 2, False),
        ({"labels": []}, 2, False),
    ],
)
def test_a_classifier_is_taken_over_from_its_own_task_only(home, monkeypatch, run, classes, kept):
    source = load_source(home / "teacher")
    shapes = abstract_params(source.config(), classes)["classifier"]
    classifier = jax.tree.map(lambda leaf: np.full(leaf.shape, 7, leaf.dtype), shapes)
    source = source._replace(
        run=run, objective=objective(classes), params={**source.params, "classifier": classifier}
    )
    monkeypatch.setattr(finetune, "load_input", lambda directory, key, begun: source)
    made = finetune.make_run(finetuning(home, "bit_w1a1,sst2"), {})
    params = finetune.begin(made, made.stage, made.source, 0).params
    assert params["classifier"]["kernel"].shape == (16, 2)
    assert bool((params["classifier"]["kernel"] == 7).all()) == kept
    pooler = source.params["bert"]["pooler"]["kernel"]
    np.testing.assert_array_equal(params["bert"]["pooler"]["kernel"], pooler)


def test_each_stage_begins_with_the_best_parameters_of_the_one_before(staged):
    workdir, _, _ = staged
    begun, before = leaves(workdir / "seed_3", 1), leaves(workdir / STAGE_1 / "seed_3", 2)
    for name, value in begun.items():  # learned scales too: they are not calibrated again
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    latest = leaves(workdir / STAGE_1 / "seed_3", 3)
    assert all((latest[name] != before[name]).any() for name in begun if is_scale(name))


def test_each_stage_has_the_one_before_as_teacher(staged):
    """The loss of the second stage's first update, from its two models."""
    workdir, config, _ = staged
    source = load_source(workdir / STAGE_1 / "seed_3")
    data = finetune.load_task(glue_task("sst2"), config.glue_dir, source.tokenizer, 128, 1)
    batch = next(glue_batches.train_batches(data.train, 16, 3, 1))
    student, teacher = (
        behaviour(
            BertForSequenceClassification(
                dataclasses.replace(source.config(), recipe=recipe_named(recipe)), 2
            ),
            *(source.params, batch, None),
        )
        for recipe in ("bit_w1a1", "bit_w1a2")
    )
    terms = bit_distillation(student, teacher, batch["labels"])
    first = losses(workdir / "seed_3")[0]
    assert first == pytest.approx(float(sum(terms.values())), rel=1e-4)


def test_the_scores_of_intermediate_stages_are_shown(staged):
    _, _, summary = staged
    (seed,) = summary["seeds"]
    assert seed["best"] == {"accuracy": 0.8}
    assert seed["intermediate"] == {STAGE_1: {"accuracy": 0.9}}
    rows = [line.split() for line in results.table(summary).splitlines()]
    assert rows[2:4] == [
        ["seed", "3,", STAGE_1, "90.0"],
        ["seed", "3", "(update", "1", "of", "3)", "80.0"],
    ]


def test_a_run_killed_in_its_second_stage_goes_on_there(staged, tmp_path, monkeypatch, capsys):
    workdir, config, whole = staged
    killed = tmp_path / "killed"
    shutil.copytree(workdir, killed)
    shutil.rmtree(killed / "seed_3" / "checkpoints" / "3")
    (killed / "seed_3" / "result.json").unlink()
    left = scripted(monkeypatch, SCORES_2[2:])
    assert finetune.train(config, str(killed)) == whole and not left
    progress = [line for line in capsys.readouterr().err.splitlines() if "stage" in line]
    assert progress and all(line.startswith("sst2 stage 2/2 bit_w1a1") for line in progress)
    expected = leaves(workdir / "seed_3", 3)
    for name, value in leaves(killed / "seed_3", 3).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)

    # A finished seed needs its intermediate stages no more.
    shutil.rmtree(killed / STAGE_1)
    assert finetune.train(config, str(killed)) == whole
    assert not (killed / STAGE_1).exists()


@pytest.mark.parametrize(
    ("arg", "keys", "message"),
    [
        ("bit_w1a1,sst2", dict(distillation=""), "distillation needs both"),
        ("bit_w1a1,sst2", dict(teacher=""), "distillation needs both"),
        ("bit_w1a1,sst2", dict(distillation="bitt"), "did you mean bit"),
        ("bit_w1a1,sst2", dict(teacher="pretrained"), "pretraining heads, task sst2 needs 2"),
        (
            "bipft_b,sst2",
            dict(init_from="pretrained", estimator_rank=4),
            "trained with estimator_rank 1, the config has 4",
        ),
        (
            "bit_w1a1,sst2",
            dict(intermediate_recipes=("bit_w1a2",), teacher="", distillation=""),
            "intermediate_recipes are stages of distillation",
        ),
        (
            "bit_w1a1,sst2",
            dict(intermediate_recipes=("bit_w1a2", "bit_w1a3")),
            "unknown recipe 'bit_w1a3': did you mean bit_w1a",
        ),
        ("bit_w1a1,sst2", dict(score_mse=True), "'bit' on task sst2: leave it at False"),
        (
            "bit_w1a1,stsb",
            dict(score_mse=True, distillation="direction_matching"),
            "not for distillation 'direction_matching' on task stsb",
        ),
        (
            "bit_w1a1,sst2",
            dict(optimizer="bert_adam", clip_norm=1.0),
            "leave clip_norm at 0",
        ),
        (
            "bibert,sst2",
            dict(distillation="direction_matching", accumulation=2),
            "norms over the whole batch.*leave accumulation at 1",
        ),
        ("bit_w1a1,sst2", dict(scale_learning_rate=1e-4), "leave scale_learning_rate at 0"),
        ("fp,sst2", dict(full_precision_weights=True, init_from="none"), "recipe 'fp' are full"),
        (
            "bibert,sst2",
            dict(dropout_until_evaluation=True, evaluate_every=0),
            "give --config.evaluate_every",
        ),
    ],
)
def test_a_finetuning_that_cannot_work_is_explained_before_it_begins(
    home, tmp_path, arg, keys, message
):
    directories = ("init_from", "teacher")
    keys = {k: str(home / v) if v and k in directories else v for k, v in keys.items()}
    with pytest.raises(ValueError, match=message):
        finetune.train(distilling(home, arg, **keys), str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_texts_longer_than_the_model_can_hold_are_refused_before_it_begins(home, tmp_path):
    shutil.copytree(home / "glue", tmp_path / "glue")
    with (tmp_path / "glue" / "SST-2" / "dev.tsv").open("a") as file:
        file.write(" ".join(40 * ["cat"]) + "\t1\n")
    config = finetuning(home, "fp,sst2", glue_dir=str(tmp_path / "glue"))
    with pytest.raises(ValueError, match="48 tokens, .* give --config.max_length=16"):
        finetune.train(config, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def trained_on(workdir):
    """Adds a checkpoint of step 2, which is better than that of step 1."""
    source = load_source(workdir)
    items = {"config": checkpoint_description(source.config(), source.objective, {})}
    items |= {"tokenizer": source.tokenizer.to_dict(), "metrics": {"accuracy": 0.9}}
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf) + 1, source.params)
    with Checkpointer(
        workdir, keep_every=1, best_metric="accuracy", best_mode="max"
    ) as checkpointer:
        checkpointer.save(2, TrainState(jnp.int32(2), params, (), jnp.int32(0)), **items)


def test_a_run_goes_on_with_what_it_was_begun_with_or_not_at_all(
    home, tmp_path, monkeypatch, capsys
):
    """Between two seeds the pretraining goes on, and then the task's files change."""
    for name in ("glue", "pretrained"):
        shutil.copytree(home / name, tmp_path / name)
    config = finetuning(tmp_path, "bipft_b,sst2", "pretrained", seeds=(0, 1), max_updates=1)
    workdir = tmp_path / "run"
    scripted(monkeypatch, [0.5, 0.5, 0.5])
    finetune.train(config, str(workdir))

    def stop_before_second_seed():
        shutil.rmtree(workdir / "seed_1")
        (workdir / "result.json").unlink()

    stop_before_second_seed()
    trained_on(tmp_path / "pretrained")
    capsys.readouterr()
    finetune.train(config, str(workdir))
    assert f"starting from {tmp_path / 'pretrained'}, step 1, " in capsys.readouterr().out

    stop_before_second_seed()
    dev = tmp_path / "glue" / "SST-2" / "dev.tsv"
    before = dev.read_text()
    dev.write_text(before + "a cat\t1\n")
    with pytest.raises(ValueError, match="begun with other inputs:\n  glue_dir: dev .* now\n"):
        finetune.train(config, str(workdir))
    assert not (workdir / "seed_1").exists()
    dev.write_text(before)
    shutil.rmtree(tmp_path / "pretrained" / "checkpoints" / "1")
    with pytest.raises(ValueError, match="begun with step 1 of init_from .* there are 2"):
        finetune.train(config, str(workdir))


def test_a_run_starts_from_the_checkpoint_of_an_update(home, tmp_path):
    shutil.copytree(home / "glue", tmp_path / "glue")
    shutil.copytree(home / "pretrained", tmp_path / "pretrained")
    shutil.copytree(home / "pretrained", tmp_path / "pretrained@2")  # a workdir, of step 1 only
    pretrained = tmp_path / "pretrained"
    trained_on(pretrained)
    sources = {end: load_source(f"{pretrained}{end}") for end in ("", "@1", "@2")}
    assert {end: source.step for end, source in sources.items()} == {"": 2, "@1": 1, "@2": 1}
    assert sources["@2"].workdir == f"{pretrained}@2"
    assert sources["@1"].workdir == str(pretrained)
    with pytest.raises(ValueError, match="pretrained/checkpoints has no .* step 7; there are 1, 2"):
        load_source(f"{pretrained}@7")
    with pytest.raises(ValueError, match="checkpoint of update 1, not of step best: give .*ed$"):
        load_source(f"{pretrained}@1", "best")

    config = finetuning(tmp_path, "bipft_b,sst2", "pretrained@1")
    inputs = finetune.make_run(config, {}).inputs
    assert inputs["init_from"] == sources["@1"].identity != sources[""].identity
    assert finetune.make_run(config, inputs).source.step == 1
    shutil.rmtree(pretrained / "checkpoints" / "1")
    with pytest.raises(ValueError, match="begun with step 1 of init_from .*@1: .* there are 2"):
        finetune.make_run(config, inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(layers=1), "the teacher has layers 1, the student 2"),
        (dict(hidden=32), "the teacher has hidden 32, the student 16"),
        (dict(heads=1), "the teacher has heads 1, the student 2"),
        (dict(task="cola"), "was finetuned on cola, not on sst2"),
        (dict(labels=["b", "a"]), None),
        (dict(labels=["1", "0"]), "labels in the order 1, 0, task sst2 in the order 0, 1"),
        (dict(scale=np.nan), "has scales that were never initialised, such as bert/pooler/input"),
    ],
)
def test_a_teacher_must_be_comparable(home, changes, message):
    student = load_source(home / "teacher")
    changes = dict(changes)
    run = {name: changes.pop(name) for name in ("labels", "task") if name in changes}
    params = student.params
    if changes.get("scale"):
        params = {"bert": {"pooler": {"input_scale": np.float32(changes.pop("scale"))}}}
    architecture = {**student.architecture, **changes}
    teacher = student._replace(architecture=architecture, run=run, params=params)
    config = distilling(home, "bibert,sst2", distillation="direction_matching")
    if message is None:
        made = stages.make_teacher(config, glue_task("sst2"), student, teacher)
        assert made.model.config.layers == 2
        return
    with pytest.raises(ValueError, match=message):
        stages.make_teacher(config, glue_task("sst2"), student, teacher)


def test_scores_are_learned_from_the_teacher_only_where_that_is_asked_for():
    config = finetune_config.get_config("bit_w1a1,stsb")
    config.update({"teacher": "runs/fp", "distillation": "bit"})
    assert stages.distillation_of(config) is DISTILLATIONS["bit"]
    config.score_mse = True
    assert stages.distillation_of(config) is bit_distillation_of_scores


def test_an_evaluation_counts_until_its_epoch_ends():
    # Ten examples in batches of four: epochs begin with updates 0, 3, 5 and 8.
    found = [finetune.evaluated_in_epoch(step, {1, 3, 5, 7}, 10, 4) for step in range(9)]
    assert found == [False, True, True, False, False, False, False, True, False]
    # A batch of more than an epoch.
    assert not any(finetune.evaluated_in_epoch(step, set(range(9)), 3, 4) for step in range(9))


def test_dropout_may_end_at_an_epochs_first_evaluation(home, tmp_path, monkeypatch):
    """Four updates are an epoch, every second is evaluated: after 2, and at the epoch's end."""

    def step(state, teacher_params, seed, batch, dropout):
        metrics = {"loss": jnp.float32(dropout), "skipped": jnp.float32(0)}
        return state.replace(step=state.step + 1), metrics

    monkeypatch.setattr(steps, "update", lambda *_, **options: step)
    keys = dict(max_updates=6, evaluate_every=2)
    for until_evaluation, expected in ((True, [1, 1, 0, 0, 1, 1]), (False, 6 * [1])):
        scripted(monkeypatch, [0.0, 0.0, 0.0])
        config = finetuning(home, "fp,sst2", dropout_until_evaluation=until_evaluation, **keys)
        workdir = tmp_path / str(until_evaluation)
        finetune.train(config, str(workdir))
        assert losses(workdir / "seed_0") == expected


@pytest.mark.parametrize("teacher_dropout", [None, False, True])
def test_a_student_without_dropout_draws_no_random_numbers(home, teacher_dropout):
    source = load_source(home / "teacher")
    model = BertForSequenceClassification(source.config(), 2)
    teacher = None
    if teacher_dropout is not None:
        teacher = TaskTeacher(model, bit_distillation, teacher_dropout)
    optimizer = optax.sgd(0.1)
    step = steps.update(source.objective, model, optimizer, teacher=teacher)
    ids = jnp.full((2, 8), 5)
    batch = {name: ids for name in source.objective.inputs}
    batch |= {"labels": jnp.asarray([0, 1]), "weights": jnp.ones(2)}
    state = new_state(source.params, optimizer)

    def draws(dropout):
        traced = jax.make_jaxpr(step, static_argnums=4)(state, source.params, 0, batch, dropout)
        return "random_bits" in str(traced)

    assert draws(True) and draws(False) == bool(teacher_dropout)


def test_bert_adam_has_a_learning_rate_for_scales():
    config = finetune_config.get_config("bit_w1a1,sst2")
    keys = dict(optimizer="bert_adam", learning_rate=0.1, scale_learning_rate=0.001)
    config.update(keys)
    schedule, optimizer = stages.make_optimizer(config, 20)
    params = {"kernel": jnp.ones(()), "input_scale": jnp.ones(())}
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert schedule(0) == pytest.approx(0.1)
    assert updates["kernel"] == pytest.approx(100 * updates["input_scale"])
