"""GLUE reading, encoding, batches and scores; most files here are hand-written oddities."""

import dataclasses
import itertools
import logging
import re
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from bipft_jax.data.glue import batches as glue_batches
from bipft_jax.data.glue import metrics as glue_metrics
from bipft_jax.data.glue import tasks as glue
from bipft_jax.data.tokenizers import SPECIAL_PIECES, WordPieceTokenizer

REAL_GLUE = Path(__file__).parents[3] / "shared" / "data" / "glue"
REAL_README = REAL_GLUE.parent / "README.md"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
VOCABULARY = [*SPECIAL_PIECES, *LETTERS]
PAD, UNK, CLS, SEP, MASK = range(5)


def write(glue_dir: Path, name: str, content: str | bytes) -> Path:
    path = glue_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def read(glue_dir: Path, task: str, split: str = "train") -> glue.GlueSplit:
    return glue.read_split(glue.glue_task(task), glue_dir, split)


def split_of(task: str, sentences1, sentences2=None, labels=None) -> glue.GlueSplit:
    labels = np.zeros(len(sentences1), np.int32) if labels is None else labels
    return glue.GlueSplit(glue.glue_task(task), "train", sentences1, sentences2, labels)


# --- the table -----------------------------------------------------------------------------------


def test_selection_metrics_and_epochs_are_those_of_the_reference_scripts():
    assert {t.name: (t.selection_metric, t.epochs) for t in glue.TASKS.values()} == {
        "cola": ("matthews", 50),
        "sst2": ("accuracy", 10),
        "mrpc": ("accuracy", 20),
        "stsb": ("pearson", 20),
        "rte": ("accuracy", 20),
        "wnli": ("accuracy", 5),
        "qnli": ("accuracy", 10),
        "qqp": ("accuracy", 6),
        "mnli": ("accuracy", 6),
    }
    assert {t.num_outputs for t in glue.TASKS.values()} == {1, 2, 3}
    # The Hugging Face datasets' class order; it differs from that of older processors.
    assert glue.TASKS["mnli"].label_names == ("entailment", "neutral", "contradiction")
    assert glue.TASKS["rte"].label_names == glue.TASKS["qnli"].label_names
    assert glue.TASKS["rte"].label_names == ("entailment", "not_entailment")
    assert all(set(t.metrics) <= set(glue_metrics.METRICS) for t in glue.TASKS.values())


def test_an_unknown_task_names_its_nearest_neighbours():
    with pytest.raises(ValueError, match=r"unknown GLUE task 'sst-2'.*id you mean sst2"):
        glue.glue_task("sst-2")
    with pytest.raises(ValueError, match=r"'translation'.* Known: cola, sst2, mrpc, "):
        glue.glue_task("translation")


# --- the real files ------------------------------------------------------------------------------

# Rows by label, counted with cut, sort and uniq.
REAL_COUNTS = {
    ("cola", "train"): {"0": 2528, "1": 6023},
    ("cola", "dev"): {"0": 322, "1": 721},
    ("sst2", "train"): {"0": 29780, "1": 37569},
    ("sst2", "dev"): {"0": 428, "1": 444},
    ("mrpc", "train"): {"0": 1194, "1": 2474},
    ("mrpc", "dev"): {"0": 129, "1": 279},
    ("rte", "train"): {"entailment": 1249, "not_entailment": 1241},
    ("rte", "dev"): {"entailment": 146, "not_entailment": 131},
    ("wnli", "train"): {"0": 323, "1": 312},
    ("wnli", "dev"): {"0": 40, "1": 31},
    ("qnli", "train"): {"entailment": 2208, "not_entailment": 2255},
    ("qnli", "dev"): {"entailment": 494, "not_entailment": 506},
    ("qqp", "train"): {"0": 15908, "1": 9465},
    ("qqp", "dev"): {"0": 4871, "1": 2729},
    ("mnli", "train"): {"entailment": 8412, "neutral": 8526, "contradiction": 8457},
    ("mnli", "dev_matched"): {"entailment": 3479, "neutral": 3123, "contradiction": 3213},
}


@pytest.mark.skipif(not REAL_GLUE.is_dir(), reason=f"no GLUE data at {REAL_GLUE}")
@pytest.mark.parametrize(("name", "split"), REAL_COUNTS)
def test_real_files_are_read_whole(name, split):
    rows = read(REAL_GLUE, name, split)
    counts = Counter(rows.task.label_names[label] for label in rows.labels)
    assert counts == REAL_COUNTS[name, split]
    columns = [rows.sentences1] + ([] if rows.sentences2 is None else [rows.sentences2])
    assert len(columns) == len(rows.task.sentences)
    for column in columns:
        assert len(column) == sum(counts.values()) and all(column)
        assert not any(re.search(r"[\t\r\n]", text) for text in column)


@pytest.mark.skipif(not REAL_README.is_file(), reason=f"no {REAL_README}")
def test_real_files_have_as_many_rows_as_their_readme_says():
    text = REAL_README.read_text()
    rows = re.findall(r"^\| ([\w-]+) \| ([\d,]+) / ([\d,]+)[ |]", text, flags=re.MULTILINE)
    said = {name: tuple(int(n.replace(",", "")) for n in counts) for name, *counts in rows}
    tasks = [glue.TASKS[name] for name in glue.BENCHMARK]
    found = {
        task.directory: tuple(
            len(read(REAL_GLUE, task.name, split)) for split in ("train", task.dev_splits[0])
        )
        for task in tasks
    }
    assert found == said and len(said) == 9


@pytest.mark.skipif(not REAL_GLUE.is_dir(), reason=f"no GLUE data at {REAL_GLUE}")
def test_real_regression_scores():
    train, dev = read(REAL_GLUE, "stsb"), read(REAL_GLUE, "stsb", "dev")
    assert (len(train), len(dev)) == (5749, 1500)
    assert train.labels.dtype == np.float32
    assert 0 == train.labels.min() and train.labels.max() == 5
    assert dev.sentences2[0] == "A man wearing a hard hat is dancing." and dev.labels[1] == 4.75
    assert glue_metrics.baseline(train, dev) == {"pearson": 0.0, "spearman": 0.0}


def test_mismatched_dev_set_counts_only_where_it_exists(tmp_path):
    mnli = glue.glue_task("mnli")
    assert glue.dev_splits(mnli, tmp_path) == ("dev_matched",)
    write(tmp_path, "MNLI/dev_mismatched.tsv", "")
    assert glue.dev_splits(mnli, tmp_path) == ("dev_matched", "dev_mismatched")


# --- oddities ------------------------------------------------------------------------------------


def test_unbalanced_quotation_marks_are_ordinary_characters(tmp_path):
    # A reader that knows quoting would take lines 2 to 4 for one field.
    content = 'sentence\tlabel\n"he said\t0\n\'tis "\t1\nthe end"\t0\n""\t1\n'
    write(tmp_path, "SST-2/train.tsv", content)
    rows = read(tmp_path, "sst2")
    assert rows.sentences1 == ['"he said', "'tis \"", 'the end"', '""']
    assert rows.labels.tolist() == [0, 1, 0, 1] and rows.labels.dtype == np.int32


def test_byte_order_mark_windows_lines_and_further_columns(tmp_path):
    header = "sentence2\tgenre\tlabel\tsentence1\tannotator\tsecond\r\n"
    row = "B follows.\tnews\tnot_entailment\tA leads.\tx\tyet another\r\n"
    write(tmp_path, "RTE/train.tsv", b"\xef\xbb\xbf" + (header + row).encode() + b"\r\n")
    rows = read(tmp_path, "rte")
    assert (rows.sentences1, rows.sentences2) == (["A leads."], ["B follows."])
    assert rows.labels.tolist() == [1]
    write(tmp_path, "CoLA/train.tsv", "gj04\t1\t\tIt rains.\r\ngj04\t0\t*\tRains it it.")
    cola = read(tmp_path, "cola")  # no header, no end of the last line
    assert (cola.sentences1, cola.labels.tolist()) == (["It rains.", "Rains it it."], [1, 0])


def test_unicode_line_separators_do_not_end_a_row(tmp_path):
    write(tmp_path, "SST-2/train.tsv", "sentence\tlabel\none\u2028two\x85three\x0cfour\t1\n")
    assert read(tmp_path, "sst2").sentences1 == ["one\u2028two\x85three\x0cfour"]


def test_rows_broken_over_two_lines_are_dropped_and_counted_in_qqp_only(tmp_path, caplog):
    content = (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n"
        "1\t2\t3\tWhy?\tWhy not?\t0\n"
        '4\t5\t6\tIs this "\n'
        '"\ta broken row?\t0\n'
        "7\t8\t9\tWho?\tWho is it?\t1\n"
    )
    write(tmp_path, "QQP/train.tsv", content)
    with caplog.at_level(logging.WARNING):
        rows = read(tmp_path, "qqp")
    assert rows.sentences1 == ["Why?", "Who?"] and rows.skipped_rows == 2
    assert "dropped 2 row(s)" in caplog.text and "line 3" in caplog.text


@pytest.mark.parametrize(
    ("task", "file", "content", "message"),
    [
        ("sst2", "SST-2/train.tsv", "sentence\ttag\na\t1\n", r":1: no column 'label'.*'tag'"),
        ("sst2", "SST-2/train.tsv", "sentence\tlabel\na\t1\nb\n", r":3: .*1 tab.*needs 2"),
        ("stsb", "STS-B/train.tsv", "sentence1\tsentence2\tscore\na\tb\t3\t4.5\n",
         r":2: .*4 tab.*the header 3"),
        ("cola", "CoLA/train.tsv", "x\t1\t\tGood.\nx\t0\t*\n", r":2: .*3 tab.*needs 4"),
        ("cola", "CoLA/train.tsv", "x\t1\t\tThe man\tsleeps.\n", r":1: .*5 tab.*cola 4: remove"),
        ("sst2", "SST-2/train.tsv", "sentence\tlabel\na\t1\nb\t2\n", r":3: .*label '2'.*0, 1"),
        ("rte", "RTE/train.tsv", "sentence1\tsentence2\tlabel\na\tb\tneutral\n",
         r":2: .*'neutral'.*entailment, not_entailment"),
        ("stsb", "STS-B/train.tsv", "sentence1\tsentence2\tscore\na\tb\t4,5\n", r":2: .*'4,5'"),
        ("stsb", "STS-B/train.tsv", "sentence1\tsentence2\tscore\na\tb\tnan\n", r":2: .*'nan'"),
        ("stsb", "STS-B/train.tsv", "sentence1\tsentence2\tscore\na\tb\t5\na\tb\t5.01\n",
         r"train\.tsv:3: the score '5\.01' is outside the range of task stsb, 0 to 5:"),
        ("stsb", "STS-B/train.tsv", "sentence1\tsentence2\tscore\na\tb\t0\na\tb\t-1\n",
         r":3: .*'-1'.*0 to 5"),
        ("sst2", "SST-2/train.tsv", b"sentence\tlabel\na\t1\ncaf\xe9\t1\n", r":3: .*UTF-8.*0xe9"),
        ("sst2", "SST-2/train.tsv", "", r"is empty"),
        ("sst2", "SST-2/train.tsv", "sentence\tlabel\n", r"no complete rows"),
        ("sst2", "SST-2/dev.tsv", "", r"train\.tsv does not exist.*dev\.tsv"),
        ("mnli", "SST-2/dev.tsv", "", r"no directory MNLI.*it has the tasks SST-2"),
    ],
)  # fmt: skip
def test_errors_say_what_is_wrong_and_where(tmp_path, task, file, content, message):
    write(tmp_path, file, content)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, task)


def test_a_missing_glue_directory_is_named(tmp_path):
    with pytest.raises(ValueError, match="no GLUE directory .*nowhere"):
        read(tmp_path / "nowhere", "cola")


# --- encoding ------------------------------------------------------------------------------------


def reference_encoder(max_length: int) -> tokenizers.Tokenizer:
    """Hugging Face's own pair encoding and truncation over the same vocabulary."""
    reference = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({piece: i for i, piece in enumerate(VOCABULARY)}, "[UNK]")
    )
    reference.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    reference.post_processor = tokenizers.processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    reference.enable_truncation(max_length, strategy="longest_first")
    return reference


@pytest.mark.parametrize("max_length", [5, 10, 13])
def test_pairs_are_cut_and_joined_as_hugging_face_does(max_length):
    lengths = list(itertools.product((1, 2, 4, 5, 6, 12), repeat=2))
    sentences1 = [" ".join(LETTERS[:n]) for n, _ in lengths]
    sentences2 = [" ".join(LETTERS[-n:]) for _, n in lengths]
    encoded = glue_batches.encode(
        split_of("rte", sentences1, sentences2), WordPieceTokenizer(VOCABULARY), max_length
    )
    reference = reference_encoder(max_length)
    batch = encoded.batch(range(len(lengths)), len(lengths))
    for row, pair in enumerate(zip(sentences1, sentences2, strict=True)):
        expected = reference.encode(*pair)
        real = batch["attention_mask"][row].astype(bool)
        assert real.sum() == len(expected.ids) and real[: len(expected.ids)].all()
        assert batch["input_ids"][row][real].tolist() == expected.ids
        assert batch["token_type_ids"][row][real].tolist() == expected.type_ids
        assert not batch["input_ids"][row][~real].any()
        assert not batch["token_type_ids"][row][~real].any()
    assert encoded.truncated == sum(n + m + 3 > max_length for n, m in lengths)


def test_single_sentences_and_padded_length():
    tokenizer = WordPieceTokenizer(VOCABULARY)
    split = split_of("sst2", ["a b", " ".join(LETTERS[:9]), "C!"])
    encoded = glue_batches.encode(split, tokenizer, 128)
    assert encoded.padded_lengths == (16,) and encoded.truncated == 0  # 11 tokens
    batch = encoded.batch([0, 2], 2)
    assert batch["input_ids"][:, :5].tolist() == [[CLS, 5, 6, SEP, PAD], [CLS, 7, UNK, SEP, PAD]]
    assert batch["attention_mask"].sum(axis=1).tolist() == [4, 4]
    assert not batch["token_type_ids"].any()
    assert all(
        batch[key].dtype == np.int32
        for key in ("input_ids", "token_type_ids", "attention_mask", "labels")
    )
    cut = glue_batches.encode(split, tokenizer, 6)
    assert cut.padded_lengths == (6,) and cut.truncated == 1
    assert cut.batch([1], 1)["input_ids"].tolist() == [[CLS, 5, 6, 7, 8, SEP]]
    with pytest.raises(ValueError, match="max_length=4"):
        glue_batches.encode(split_of("rte", ["a"], ["b"]), tokenizer, 4)


# --- batches -------------------------------------------------------------------------------------


def numbered(num_examples: int) -> glue_batches.EncodedSplit:
    """A split whose labels are the example numbers."""
    labels = np.arange(num_examples, dtype=np.int32)
    split = split_of("sst2", ["a"] * num_examples, labels=labels)
    return glue_batches.encode(split, WordPieceTokenizer(VOCABULARY), 8)


def order(encoded, batch_size, seed, updates, start=0) -> list[int]:
    batches = glue_batches.train_batches(encoded, batch_size, seed, updates, start)
    return [n for b in batches for n in b["labels"].tolist()]


@pytest.mark.parametrize(("num_examples", "batch_size"), [(10, 4), (8, 4), (3, 8)])
def test_every_example_comes_once_per_epoch_in_a_new_order(num_examples, batch_size):
    epochs = 6
    updates = glue_batches.updates_for_epochs(num_examples, batch_size, epochs)
    assert (updates - 1) * batch_size < epochs * num_examples <= updates * batch_size
    stream = order(numbered(num_examples), batch_size, 1, updates)
    seen = [tuple(stream[e * num_examples : (e + 1) * num_examples]) for e in range(epochs)]
    assert all(sorted(epoch) == list(range(num_examples)) for epoch in seen)
    assert len(set(seen)) > 1
    assert stream != order(numbered(num_examples), batch_size, 2, updates)


def test_a_resumed_run_sees_the_same_batches():
    encoded = numbered(10)
    straight = order(encoded, 4, seed=3, updates=12)
    for start in (1, 2, 5, 10):
        assert order(encoded, 4, seed=3, updates=12, start=start) == straight[4 * start :]
    batch = next(glue_batches.train_batches(encoded, 4, 3, 1))
    assert batch["weights"].tolist() == [1] * 4 and batch["weights"].dtype == np.float32


def of_lengths(words, padded_lengths) -> glue_batches.EncodedSplit:
    """Examples of so many words each, whose labels are their numbers."""
    texts = [" ".join("a" * n) for n in words]
    split = split_of("sst2", texts, labels=np.arange(len(words), dtype=np.int32))
    encoded = glue_batches.encode(split, WordPieceTokenizer(VOCABULARY), 32)
    return dataclasses.replace(encoded, padded_lengths=padded_lengths)


def test_padded_lengths_halve():
    assert glue_batches.padded_lengths(64, 1) == (64,)
    assert glue_batches.padded_lengths(128, 4) == (16, 32, 64, 128)
    assert glue_batches.padded_lengths(72, 4) == (16, 24, 40, 72)
    assert glue_batches.padded_lengths(16, 9) == (8, 16)
    assert glue_batches.padded_lengths(6, 4) == (6,)


def test_batches_of_like_lengths_are_short_and_nothing_is_lost():
    """32 examples of 3 to 34 tokens in batches of 2: windows of 4 batches, 4 windows an epoch."""
    encoded = of_lengths([1 + i * 7 % 32 for i in range(32)], (8, 16, 32))
    batches = list(glue_batches.train_batches(encoded, 2, seed=0, num_updates=32))
    for window in range(8):
        here = batches[4 * window : 4 * window + 4]
        found = sorted(n for batch in here for n in encoded.lengths[batch["labels"]].tolist())
        # Each batch has neighbours in length, and the first padded length that holds them.
        pairs = sorted(sorted(encoded.lengths[batch["labels"]].tolist()) for batch in here)
        assert pairs == [found[i : i + 2] for i in range(0, 8, 2)]
        for batch in here:
            longest = encoded.lengths[batch["labels"]].max()
            width = batch["input_ids"].shape[1]
            assert longest <= width and (width == 8 or longest > width // 2)
    lengths = [[int(b["attention_mask"].sum()) for b in batches[i : i + 4]] for i in (0, 4, 8)]
    assert any(row != sorted(row) for row in lengths)  # nor are short batches always first
    for epoch in (0, 1):
        stream = [n for b in batches[16 * epoch : 16 * epoch + 16] for n in b["labels"].tolist()]
        assert sorted(stream) == list(range(32))


def test_a_run_that_ends_within_a_window_still_sees_each_example_once():
    encoded = of_lengths([1 + i * 7 % 30 for i in range(33)], (8, 16, 32))
    straight = order(encoded, 3, seed=5, updates=11)  # windows of 2 batches
    assert sorted(straight) == list(range(33))
    for start in (1, 2, 10):
        assert order(encoded, 3, seed=5, updates=11, start=start) == straight[3 * start :]


def test_evaluation_sees_each_example_once_with_weight_one_and_short_ones_first():
    encoded = of_lengths([9, 1, 20, 3, 2, 25, 1, 1, 1, 5], (8, 16, 32))
    batches = list(glue_batches.evaluation_batches(encoded, 4))
    assert [numbers.tolist() for numbers, _ in batches] == [[1, 6, 7, 8], [4, 3, 9, 0], [2, 5]]
    assert [b["labels"].tolist() for _, b in batches] == [[1, 6, 7, 8], [4, 3, 9, 0], [2, 5, 5, 5]]
    assert [b["weights"].tolist() for _, b in batches] == [[1] * 4, [1] * 4, [1, 1, 0, 0]]
    assert [b["input_ids"].shape for _, b in batches] == [(4, 8), (4, 16), (4, 32)]
    assert all(b["attention_mask"].any(axis=1).all() for _, b in batches)


# --- scores --------------------------------------------------------------------------------------


def test_metrics_agree_with_their_definitions():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 200)
    predictions = np.where(rng.random(200) < 0.7, labels, 1 - labels)
    tp, tn, fp, fn = (
        float(np.sum((predictions == p) & (labels == t)))
        for p, t in ((1, 1), (0, 0), (1, 0), (0, 1))
    )
    logits = np.stack([-predictions, predictions], axis=1) * 3.0
    mrpc = glue_metrics.evaluate(glue.glue_task("mrpc"), logits, labels)
    assert mrpc == pytest.approx({"accuracy": (tp + tn) / 200, "f1": 2 * tp / (2 * tp + fp + fn)})
    cola = glue_metrics.evaluate(glue.glue_task("cola"), predictions, labels)
    denominator = np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert cola["matthews"] == pytest.approx((tp * tn - fp * fn) / denominator)

    scores = rng.normal(size=(200, 1)).astype(np.float32)
    truth = (scores[:, 0] ** 3 + rng.normal(size=200)).astype(np.float32)
    stsb = glue_metrics.evaluate(glue.glue_task("stsb"), scores, truth)
    ranks = [np.argsort(np.argsort(x)) for x in (scores[:, 0], truth)]
    assert stsb["pearson"] == pytest.approx(np.corrcoef(scores[:, 0], truth)[0, 1], abs=1e-6)
    assert stsb["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("labels", [[0, 1, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
@pytest.mark.parametrize("name", ["cola", "mrpc", "sst2", "stsb"])
def test_constant_predictions_score_without_warnings(name, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = glue_metrics.evaluate(glue.glue_task(name), np.zeros(4), np.array(labels))
    assert list(scores) == list(glue.glue_task(name).metrics)
    for metric, value in scores.items():
        assert value == (np.mean(np.array(labels) == 0) if metric == "accuracy" else 0.0)


def test_baseline_predicts_the_majority_class_of_train_not_of_dev():
    train = split_of("mrpc", ["a"] * 3, ["b"] * 3, np.array([1, 0, 1], np.int32))
    dev = split_of("mrpc", ["a"] * 4, ["b"] * 4, np.array([0, 0, 0, 1], np.int32))
    assert glue_metrics.baseline(train, dev) == {"accuracy": 0.25, "f1": pytest.approx(0.4)}


def test_outputs_that_cannot_be_scored_are_refused():
    task = glue.glue_task("mnli")
    with pytest.raises(ValueError, match=r"\(4, 2\).*\[N, 3\]"):
        glue_metrics.evaluate(task, np.zeros((4, 2)), np.zeros(4, int))
    with pytest.raises(ValueError, match=r"1 of 6 model outputs are NaN or infinite.*diverged"):
        glue_metrics.evaluate(task, np.array([[0, 1, np.nan], [0, 0, 1]]), np.zeros(2, int))


def test_the_task_table_cannot_be_changed_by_accident():
    with pytest.raises(dataclasses.FrozenInstanceError):
        glue.glue_task("cola").epochs = 3
