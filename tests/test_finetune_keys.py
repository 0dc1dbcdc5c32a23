"""Every key of configs/finetune.py does what it says: rehearsed runs that differ in all of them."""

import functools
import math
import random
from pathlib import Path

import numpy as np
import pytest

from bipft_jax import finetune, pretrain
from bipft_jax.config_keys import KEYS
from configs import finetune as finetune_config
from configs import pretrain as pretrain_config
from tests import updates_by_hand
from tests.launching import WORDS
from tests.rehearsal import rehearse
from tests.shown_keys import DEVICES, KERNEL, SHARED, Row, agree, filled, filled_by, own_fill

# Of the first three quarters of its rows a task has short sentences, of the others long ones.
SHORT, LONG = 3, 12  # words
ROWS_OF = {"SST-2": {"train": 64, "dev": 12}, "STS-B": {"train": 48, "dev": 4}}

# There are eight devices. What a run leaves out is as in `get_config`.
RUNS = {
    "plain": (
        "fp,sst2",
        dict(
            seeds=(0, 7),
            dropout=0.25,
            batch_size=8,  # small enough for batches of like lengths
            epochs=2,
            learning_rate=1e-3,
            weight_decay=0.25,
            clip_norm=0.5,
            log_every=3,
            length_buckets=1,
        ),
    ),
    "staged": (
        "fp,sst2",
        dict(
            glue_dir="other",
            init_from="plain/seed_7",
            teacher="plain/seed_0",
            distillation="direction_matching",
            intermediate_recipes=("fp",),
            teacher_dropout=True,
            seeds=(2,),
            dropout=0.5,
            batch_size=8,
            max_updates=3,
            optimizer="bert_adam",
            learning_rate=2e-3,
            scale_learning_rate=1e-4,
            schedule="linear",
            weight_decay=0.125,
            log_every=1,
            evaluate_every=2,
            max_length=12,
            length_buckets=2,
        ),
    ),
    "scores": (
        "fp,stsb",
        dict(
            pretrained=False,
            remat="full",
            mesh={"fsdp": 2, "tensor": 2},
            profile_steps="1:2",
            dtype="bfloat16",
            dropout=0.0,
            batch_size=16,
            epochs=1,
            length_buckets=1,
        ),
    ),
    "skipping": (
        "bipft_b,stsb",
        dict(
            teacher="scores/seed_0",
            distillation="bit",
            score_mse=True,
            dropout_until_evaluation=True,
            evaluate_every=1,
            estimator_rank=2,
            lora_rank=3,
            compute="int8",
            backward="float32",
            batch_size=16,
            length_buckets=1,
            max_skipped_updates=3,
            log_every=1,
        ),
    ),
    "half binary": (
        "bit_w1a1,sst2",
        dict(
            full_precision_weights=True,
            compute="float32",
            backward="bfloat16",
            accumulation=2,
            batch_size=16,
            length_buckets=1,
        ),
    ),
}
# Of a skipped update there is nothing to take the mean of.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered in scalar divide")
PARTLY = {"skipping": dict(skipping=True), "half binary": dict(only_first=True)}


def rows_of(directory, task, split):
    """Sentences, one or two, and a label; no sentence is in two splits or directories."""
    rng = random.Random(f"{directory.name} {task} {split}")
    count = ROWS_OF[task][split]
    rows = []
    for i in range(count):
        words = SHORT if i < count * 3 / 4 else LONG
        sentences = [
            " ".join(rng.choices(WORDS, k=words)) for _ in range(2 if task == "STS-B" else 1)
        ]
        # Half of the training rows are of class 0, three quarters of the dev rows.
        label = int(i % 2 if split == "train" else i % 4 == 3)
        rows.append((sentences, label))
    return rows


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory):
    """By name, rehearsed; `pretrained` is what they start from."""
    directory = tmp_path_factory.mktemp("rehearsed")
    for glue in (directory / "glue", directory / "other"):
        for task, header in (
            ("SST-2", "sentence\tlabel"),
            ("STS-B", "sentence1\tsentence2\tscore"),
        ):
            (glue / task).mkdir(parents=True)
            for split in ("train", "dev"):
                rows = ["\t".join([*s, str(label)]) for s, label in rows_of(glue, task, split)]
                (glue / task / f"{split}.tsv").write_text("\n".join([header, *rows]) + "\n")
    config = pretrain_config.get_config("fp,tiny")
    config.update({"corpus_dir": str(home / "corpus"), "batch_size": 16, "seed": 4})
    config.update({"num_updates": 1, "warmup_updates": 0, "evaluation_sequences": 8})
    rehearse(pretrain.train, config, directory / "pretrained")
    done = {}
    for name, (arg, changes) in RUNS.items():
        config = finetune_config.get_config(arg)
        config.update({"init_from": "pretrained", "glue_dir": "glue", **changes})
        for key in ("glue_dir", "init_from", "teacher"):
            config[key] = config[key] and str(directory / config[key])
        done[name] = rehearse(finetune.train, config, directory / name, **PARTLY.get(name, {}))
    return done


def tokens(sentences, config):
    """[CLS] A [SEP] or [CLS] A [SEP] B [SEP], numbered as `launching.furnish` lists the words."""
    room = config.max_length - 1 - len(sentences)  # one sentence is cut, pairs fit
    ids = [[6 + WORDS.index(word) for word in text.split()][:room] for text in sentences]
    return (2, *(i for sentence in ids for i in (*sentence, 3)))


def wanted(run, split):
    """Token ids and label of all rows of a split of the run's task, in the file's order."""
    task = {"sst2": "SST-2", "stsb": "STS-B"}[run.config.task]
    rows = rows_of(Path(run.config.glue_dir), task, split)
    return [(tokens(sentences, run.config), label) for sentences, label in rows]


def shown(batch):
    """Token ids and label of the rows of a batch that count."""
    names = ("input_ids", "attention_mask", "labels", "weights")
    rows = zip(*(np.asarray(batch[name]) for name in names))
    return [(tuple(ids[mask > 0].tolist()), label) for ids, mask, label, weight in rows if weight]


def starts(run):
    """The first updates of all seeds and stages."""
    return [update for update in run.updates if update.arguments[0].step == 0]


def last_seed(run):
    return f"seed_{run.config.seeds[-1]}"


def logged(run, name):
    """The updates at which the last seed logged something."""
    return list(run.logged(name, last_seed(run)))


def whole(row: Row) -> Row:
    """A row of what only a run that came to its end shows."""
    return lambda run: row(run) if run.whole else None


def _first_batch(run):
    """An epoch's order is drawn from the seed and the epoch; grouping by length changes it."""
    if run.config.length_buckets > 1:
        return None
    rows, size = wanted(run, "train"), run.config.batch_size
    orders = [np.random.default_rng((seed, 0)).permutation(len(rows)) for seed in run.config.seeds]
    said = [[rows[i] for i in order[:size]] for order in orders]
    return [shown(update.batch) for update in starts(run)], said


def _seeds(run):
    """Of dropout, and of a new classifier."""
    seeds = [seed for seed in run.config.seeds for _ in (*run.config.intermediate_recipes, "last")]
    seen, said = [update.seeds for update in starts(run)], [[seed] for seed in seeds]
    if run.config.init_from.endswith("pretrained"):
        seen += [filled(update.params)["classifier/kernel"] for update in starts(run)]
        said += map(own_fill, seeds)
    return seen, said


def _start(run):
    """Its parameters, and a new classifier if there is none."""
    said = dict.fromkeys((KERNEL, "classifier/kernel"), own_fill(run.config.seeds[0]))
    if run.config.pretrained:
        said |= filled_by(run.config.init_from)
        said.pop("nsp/kernel", None)
    return filled(run.first.params), said


def _epochs(run):
    config, rows = run.config, len(wanted(run, "train"))
    said = config.max_updates or math.ceil(config.epochs * rows / config.batch_size)
    return len(run.updates) / len(starts(run)), said


def _dropped(run):
    """Of an update with a teacher that drops nothing. The run evaluates after every update, and
    three are an epoch."""
    if run.config.teacher_dropout or not run.config.dropout:
        return None
    until = run.config.dropout_until_evaluation
    said = [not until or number % 3 == 0 for number in range(len(run.updates))]
    return [update.draws > 0 for update in run.updates], said


def _draws(run):
    """Each of the five places where a model drops something draws twice, and again in the backward
    pass, which a teacher has not."""
    taught = bool(run.config.teacher) and run.config.teacher_dropout
    return run.first.draws, 20 * bool(run.config.dropout) + 10 * taught


def _terms(run):
    said = {
        "": set(),
        "bit": {"score_loss" if run.config.score_mse else "soft_loss", "hidden_loss"},
        "direction_matching": {f"{x}_loss" for x in ("task", "hidden", "query", "key", "value")},
    }[run.config.distillation]
    return run.first.metrics, said | {"loss", "gradient_norm", "skipped"}


def rates(config, peak, total, count):
    """Constant, or up over a tenth of the updates and down to 0 at the end."""
    if config.schedule == "constant":
        return [peak] * count
    warmup = total / 10
    shape = [t / warmup if t < warmup else (total - t) / (total - warmup) for t in range(count)]
    return [peak * max(share, 0.0) for share in shape]


@functools.cache
def _optimised(run):
    """Three updates of the optimiser, and the learning rates that were logged."""
    config, total = run.config, int(_epochs(run)[1])
    of_all = rates(config, config.learning_rate, total, total)
    if config.optimizer == "adamw":
        how = {key: config[key] for key in ("weight_decay", "clip_norm")}
        said = updates_by_hand.of_adamw(of_all[:3], **how)
    else:
        of_scales = rates(config, config.scale_learning_rate, total, 3)
        how = {"weight_decay": config.weight_decay}
        said = updates_by_hand.of_bert_adam(of_all[:3], of_scales, **how)
    seen = updates_by_hand.of_optimizer(finetune.make_run(config, {}).stage.learner.optimizer, 3)
    by_update = run.logged("learning_rate", last_seed(run))
    seen += by_update.values()
    said += [of_all[update - 1] for update in by_update]
    return seen, pytest.approx(said, rel=1e-4)


def _log_points(run):
    updates = int(_epochs(run)[1])
    steps = range(1, updates + 1)
    said = [step for step in steps if step % run.config.log_every == 0 or step == updates]
    return logged(run, "loss"), said


def _evaluations(run):
    updates, every = int(_epochs(run)[1]), run.config.evaluate_every
    every = every or len(wanted(run, "train")) // run.config.batch_size  # it divides them here
    said = [step for step in range(1, updates + 1) if step % every == 0 or step == updates]
    (name,) = {"sst2": ["dev/accuracy"], "stsb": ["dev/pearson"]}[run.config.task]
    return logged(run, name), said


ROWS: dict[str, Row] = {
    **SHARED,
    **{name: row for name, row in DEVICES.items() if name in KEYS["finetune"]},
    "init_from": _start,
    "pretrained": _start,
    "teacher_dropout": _draws,
    "distillation": _terms,
    "score_mse": _terms,
    "intermediate_recipes": lambda run: (
        sorted(path.name for path in run.workdir.glob("stage_*")),
        [f"stage_1_{recipe}" for recipe in run.config.intermediate_recipes],
    ),
    "dropout_until_evaluation": _dropped,
    "task": lambda run: (
        run.first.params["classifier/kernel"].shape[1],
        {"sst2": 2, "stsb": 1}[run.config.task],
    ),
    "glue_dir": _first_batch,
    "max_length": lambda run: (
        max(len(ids) for update in run.updates for ids, _ in shown(update.batch)),
        max(len(ids) for ids, _ in wanted(run, "train")),
    ),
    "length_buckets": lambda run: (
        len({update.batch["input_ids"].shape[1] for update in run.updates}),
        run.config.length_buckets,
    ),
    "seeds": _seeds,
    "epochs": whole(_epochs),
    "max_updates": whole(_epochs),
    "optimizer": whole(_optimised),
    "learning_rate": whole(_optimised),
    "scale_learning_rate": whole(_optimised),
    "schedule": whole(_optimised),
    "weight_decay": whole(_optimised),
    "clip_norm": whole(_optimised),
    "log_every": whole(_log_points),
    "evaluate_every": whole(_evaluations),
}


def test_every_key_has_a_row():
    assert ROWS.keys() == KEYS["finetune"].keys()


@pytest.mark.parametrize("key", KEYS["finetune"])
def test_a_key_does_what_it_says(key, runs):
    agree(ROWS[key], runs)


def test_scores_are_those_of_the_dev_split(runs):
    """Class 0 is always predicted: half of the training rows are of it, but three quarters of the
    dev rows."""
    for name in ("plain", "staged"):
        run = runs[name]
        rows = [row for batch in run.evaluated for row in shown(batch)]
        assert set(rows) == set(wanted(run, "dev")), name
        assert set(run.logged("dev/accuracy", last_seed(run)).values()) == {0.75}, name
