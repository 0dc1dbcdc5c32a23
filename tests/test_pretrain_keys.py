"""Every key of configs/pretrain.py does what it says: rehearsed runs that differ in all of them."""

import functools
import shutil

import numpy as np
import pytest

from bipft_jax import pretrain
from bipft_jax.config_keys import KEYS
from bipft_jax.data.corpus import command
from bipft_jax.data.corpus.corpus import load_corpus
from bipft_jax.data.corpus.pretraining import PretrainingExamples
from configs import pretrain as pretrain_config
from tests import test_pretrain_decoder, updates_by_hand
from tests.rehearsal import rehearse
from tests.shown_keys import DEVICES, KERNEL, SHARED, Row, agree, filled, filled_by, own_fill

# There are eight devices. What a run leaves out is as in `get_config`.
RUNS = {
    "whole": (
        "fp,tiny",
        dict(
            dtype="bfloat16",
            dropout=0.25,
            batch_size=16,
            num_updates=4,
            learning_rate=1e-3,
            warmup_updates=0,
            adam_epsilon=1e-3,
            weight_decay=0.25,
            clip_norm=0.0,
            log_every=1,
            evaluate_every=1,
            evaluation_sequences=24,
        ),
    ),
    "taught": (
        "fp,tiny",
        dict(
            seed=3,
            dropout=0.5,
            masking_rate=0.4,
            data_workers=2,
            unigram_bias=False,
            teacher="whole",
            mlm_distillation=0.8125,
            mesh={"fsdp": 2, "tensor": 2},
            batch_size=32,
            accumulation=2,
            num_updates=8,
            learning_rate=2e-3,
            warmup_updates=4,
            adam_epsilon=1e-6,
            weight_decay=0.0,
            clip_norm=0.5,
            log_every=4,
            evaluate_every=2,
            evaluation_sequences=16,
            keep_every=4,
            profile_steps="2:5",
        ),
    ),
    "skipping": (
        "fp,tiny",
        dict(
            seed=5,
            init_from="whole",
            teacher="whole",
            teacher_dropout=False,
            batch_size=16,
            num_updates=12,
            warmup_updates=4,
            max_skipped_updates=3,
            log_every=1,
        ),
    ),
    "binary": (
        "bipft_b,mini",
        dict(
            corpus_dir="long",
            batch_size=16,
            fused_attention=True,
            estimator_rank=2,
            lora_rank=3,
            compute="int8",
            backward="bfloat16",
            remat="lean",
            scan_layers=False,
        ),
    ),
    "half binary": (
        "bipft_a,tiny",
        dict(
            batch_size=16,
            full_precision_weights=True,
            compute="float32",
            backward="float32",
            remat="full",
        ),
    ),
}
PARTLY = {"skipping": dict(skipping=True)}
PARTLY |= dict.fromkeys(("binary", "half binary"), dict(only_first=True))


@pytest.fixture(scope="module")
def runs(home, tmp_path_factory):
    """By name, rehearsed."""
    directory = tmp_path_factory.mktemp("rehearsed")
    shutil.copytree(home / "corpus", directory / "corpus")
    # The fused kernel takes sequences of 128 tokens.
    command.main(
        [
            *("--input", str(home / "text.txt"), "--output", str(directory / "long")),
            *("--tokenizer", str(home / "vocab.txt"), "--sequence_length", "128"),
            *("--validation_fraction", "0.3", "--processes", "1"),
        ]
    )
    done = {}
    for name, (arg, changes) in RUNS.items():
        config = pretrain_config.get_config(arg)
        config.update({"corpus_dir": "corpus", **changes})
        for key in ("corpus_dir", "init_from", "teacher"):
            config[key] = config[key] and str(directory / config[key])
        done[name] = rehearse(pretrain.train, config, directory / name, **PARTLY.get(name, {}))
    return done


def rates(config, count):
    """Of the first updates: up to the peak, then down to 0 at the end."""
    peak, warmup, end = config.learning_rate, config.warmup_updates, config.num_updates
    shape = [t / warmup if t < warmup else (end - t) / (end - warmup) for t in range(count)]
    return [peak * max(share, 0.0) for share in shape]


@functools.cache
def _optimised(run):
    """Six updates of the optimiser, and the learning rates that were logged."""
    keys = ("weight_decay", "clip_norm")
    said = updates_by_hand.of_adamw(
        rates(run.config, 6),
        eps=run.config.adam_epsilon,
        **{key: run.config[key] for key in keys},
    )
    seen = updates_by_hand.of_optimizer(pretrain.make_run(run.config).learner.optimizer, 6)
    logged = run.logged("learning_rate")
    seen += logged.values()
    said += [rates(run.config, update)[-1] for update in logged]
    return seen, pytest.approx(said, rel=1e-4)


def _examples(run, split, **how):
    return PretrainingExamples.from_corpus(load_corpus(run.config.corpus_dir), split, **how)


def _hash(batches):
    """Of all rows of all inputs, in order."""
    joined = {name: np.concatenate([b[name] for b in batches]) for name in sorted(batches[0])}
    return [(name, rows.shape, hash(rows.tobytes())) for name, rows in joined.items()]


def _first_batch(run):
    config = run.config
    examples = _examples(run, "train", seed=config.seed, masking_rate=config.masking_rate)
    return _hash([run.first.batch]), _hash([examples.batch(0, config.batch_size)])


def _held_out(run):
    """The same for every seed and rate of masking; a run evaluates on it several times."""
    if not run.whole:
        return None
    examples = _examples(run, "validation", seed=0)
    times = len(run.logged("validation/loss"))
    said = [examples.batch(0, run.config.evaluation_sequences)] * times
    return _hash(run.evaluated), _hash(said)


def _start(run):
    seen = filled(run.first.params)
    if run.config.init_from:
        return seen, filled_by(run.config.init_from)
    return seen, dict.fromkeys(seen, own_fill(run.config.seed))


def _mlm_bias(run):
    if run.config.init_from:
        return None
    counts = load_corpus(run.config.corpus_dir).unigram_counts + 1.0
    said = np.log(counts / counts.sum()).tolist()
    if not run.config.unigram_bias:
        said = [own_fill(run.config.seed)] * len(counts)
    return run.first.params["mlm_bias"].tolist(), pytest.approx(said)


def _draws(run):
    """Each of the eight places where fp drops something draws once forward and once backward; of a
    teacher, once."""
    if run.config.recipe != "fp":
        return None
    taught = bool(run.config.teacher) and run.config.teacher_dropout
    return run.first.draws, 16 + 8 * taught


def _imitates_words(run):
    """Whether the loss has the term, and its weight is in the program."""
    weights = [
        x.val for e in run.first.equations("mul") for x in e.invars if type(x).__name__ == "Literal"
    ]
    weight = run.config.mlm_distillation
    seen = "mlm_soft_loss" in run.first.metrics, bool(weight) and weight in weights
    return seen, (bool(weight), bool(weight))


def _kept(run):
    """Of the checkpoints at every second update, the first of which is the best and the last two
    are the latest."""
    every = run.config.evaluate_every
    if not run.whole:
        return None
    kept = sorted(int(path.name) for path in (run.workdir / "checkpoints").iterdir())
    made = range(every, run.config.num_updates + 1, every)
    wanted = {made[0], *made[-2:]}
    if run.config.keep_every:
        wanted |= {step for step in made if step % run.config.keep_every == 0}
    return kept, sorted(wanted)


def _whole(row: Row) -> Row:
    """A row of what only a run that came to its end shows."""
    return lambda run: row(run) if run.whole else None


def _every(run, key):
    steps = range(1, run.config.num_updates + 1)
    return [step for step in steps if step % run.config[key] == 0]


ROWS: dict[str, Row] = {
    **SHARED,
    **DEVICES,
    "size": lambda run: (
        run.first.params[KERNEL].shape,
        {"tiny": (2, 128, 512), "mini": (4, 256, 1024)}[run.config.size],
    ),
    "learning_rate": _optimised,
    "warmup_updates": _optimised,
    "adam_epsilon": _optimised,
    "weight_decay": _optimised,
    "clip_norm": _optimised,
    "corpus_dir": _first_batch,
    "masking_rate": _first_batch,
    "seed": lambda run: (run.first.seeds, [run.config.seed]),
    "init_from": _start,
    "unigram_bias": _mlm_bias,
    "teacher_dropout": _draws,
    "mlm_distillation": _imitates_words,
    "data_workers": lambda run: (run.workers, run.config.data_workers),
    "num_updates": _whole(lambda run: (len(run.updates), run.config.num_updates)),
    "log_every": _whole(lambda run: (list(run.logged("loss")), _every(run, "log_every"))),
    "evaluate_every": _whole(
        lambda run: (list(run.logged("validation/loss")), _every(run, "evaluate_every"))
    ),
    "evaluation_sequences": _held_out,
    "keep_every": _kept,
}


def test_every_key_has_a_row():
    assert ROWS.keys() | test_pretrain_decoder.KEYS == KEYS["pretrain"].keys()


@pytest.mark.parametrize("key", ROWS)
def test_a_key_does_what_it_says(key, runs):
    agree(ROWS[key], runs)


def test_the_seed_decides_parameters_and_data(runs):
    """Those of a run that starts from nothing; the row above is of dropout."""
    agree(lambda run: None if run.config.init_from else _start(run), runs)
