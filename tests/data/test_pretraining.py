"""The examples' promises, on blocks of unique token ids: an id tells document and position."""

from __future__ import annotations

import json
import multiprocessing
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats
from sklearn.ensemble import HistGradientBoostingClassifier

from bipft_jax.benchmarks import input as input_benchmark
from bipft_jax.data.corpus.blocks import pack_document
from bipft_jax.data.corpus.corpus import load_corpus
from bipft_jax.data.corpus.preparation import CorpusRequest, prepare_corpus
from bipft_jax.data.corpus.pretraining import (
    PretrainingExamples,
    max_predictions,
    pretraining_batches,
)

SPECIAL = frozenset([0, 7, 8, 9, 10])  # not all at the start, as in BERT's vocabulary
FIRST_TEXT_ID = 100
FIELDS = {
    "input_ids": ("S", np.int32),
    "token_type_ids": ("S", np.int32),
    "attention_mask": ("S", np.int32),
    "mlm_positions": ("P", np.int32),
    "mlm_ids": ("P", np.int32),
    "mlm_weights": ("P", np.float32),
    "nsp_labels": ("", np.int32),
}


def tokenizer(vocab_size):
    return SimpleNamespace(
        vocab_size=vocab_size,
        pad_id=0,
        unk_id=7,
        cls_id=8,
        sep_id=9,
        mask_id=10,
        special_ids=SPECIAL,
    )


def corpus_of(tokens_per_document, sequence_length, sentence_length=25):
    """Blocks and the document of every id; ids skip one between documents.

    Lengths of sentences vary as in real text, so some sentences are alone in a block.
    """
    rng = np.random.default_rng(0)
    blocks, next_id = [], FIRST_TEXT_ID
    for document, size in enumerate(tokens_per_document):
        sentences, end = [], next_id + size
        while next_id < end:
            length = min(int(rng.lognormal(np.log(sentence_length), 0.6)) + 2, end - next_id)
            sentences.append(range(next_id, next_id + length))
            next_id += length
        for block in pack_document(sentences, sequence_length, 0.1, rng)[0]:
            tokens, lengths = map(np.array, block)
            blocks.append(dict(document=document, tokens=tokens, sentence_lengths=lengths))
        next_id += 1
    document_of = np.full(next_id, -1)
    for block in blocks:
        document_of[block["tokens"]] = block["document"]
    return blocks, document_of


def make(tokens_per_document=(6_000,) * 40, sequence_length=128, seed=1, **kwargs):
    blocks, document_of = corpus_of(tokens_per_document, sequence_length, **kwargs)
    vocabulary = tokenizer(len(document_of))
    examples = PretrainingExamples(blocks, vocabulary, sequence_length=sequence_length, seed=seed)
    return examples, blocks, document_of


def unmasked(batch):
    """The input ids before masking, put back from mlm_ids."""
    ids = batch["input_ids"].copy()
    rows, slots = np.nonzero(batch["mlm_weights"])
    ids[rows, batch["mlm_positions"][rows, slots]] = batch["mlm_ids"][rows, slots]
    return ids


def segments(batch):
    """[(A, B)] of original ids, after checking the frame [CLS] A [SEP] B [SEP] and the padding."""
    pairs = []
    for ids, types, mask in zip(unmasked(batch), batch["token_type_ids"], batch["attention_mask"]):
        end = mask.sum()
        first, last = np.flatnonzero(ids == 9)
        assert ids[0] == 8 and last == end - 1 and first < last
        assert mask[:end].all() and not ids[end:].any() and not types[end:].any()
        assert not types[: first + 1].any() and types[first + 1 : end].all()
        pairs.append((ids[1:first], ids[first + 1 : last]))
    return pairs


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def rows(batch, start, stop):
    return {name: values[start:stop] for name, values in batch.items()}


def test_shapes_and_dtypes_are_static():
    assert max_predictions(128, 0.4) == 52 and max_predictions(100, 0.55) == 55
    for size, slots in ((64, 10), (128, 20), (20, 3)):
        assert max_predictions(size) == slots
        batch = make((2000,) * 3, size)[0].batch(3, 8)
        sizes = {"S": (size,), "P": (slots,), "": ()}
        assert batch.keys() == FIELDS.keys()
        for name, (axis, dtype) in FIELDS.items():
            assert batch[name].shape == (5, *sizes[axis]) and batch[name].dtype == dtype, name


def test_an_example_depends_on_nothing_but_seed_and_position():
    examples = make()[0]
    size = len(examples)
    across_epochs = examples.batch(size - 5, size + 6)  # odd ends, and an epoch ends inside
    again = make()[0]
    for i in (3, 0, 10, 4):
        one = again.example(size - 5 + i)
        assert_same(one, {name: values[i] for name, values in across_epochs.items()})
    other = make(seed=2)[0].batch(0, 64)
    assert (unmasked(other) != unmasked(again.batch(0, 64))).any(axis=1).sum() > 60


@pytest.mark.parametrize("sequence_length", [64, 128])
@pytest.mark.parametrize("drop_last", [0, 1])
def test_an_epoch_visits_the_text_once(sequence_length, drop_last):
    blocks, document_of = corpus_of((9_000,) * 12, sequence_length)
    blocks = blocks[: len(blocks) // 2 * 2 - drop_last]
    examples = PretrainingExamples(
        blocks, tokenizer(len(document_of)), sequence_length=sequence_length, seed=5
    )
    assert len(examples) == len(blocks) - drop_last
    total = sum(len(block["tokens"]) for block in blocks)
    for epoch in (0, 3):
        seen = np.zeros(len(document_of), int)
        for a, b in segments(examples.batch(epoch * len(examples), (epoch + 1) * len(examples))):
            seen[a] += 1
            seen[b] += 1
        assert seen.max() == 1
        assert seen.sum() >= 0.98 * total


def test_many_blocks_are_each_used_once_an_epoch():
    """A corpus too large for a stored permutation."""

    class ManyBlocks:
        asked = []

        def __len__(self):
            return 20_001

        def __getitems__(self, indices):
            self.asked += indices
            block = dict(document=0, tokens=np.array([100, 101]), sentence_lengths=np.array([1, 1]))
            return [block] * len(indices)

    examples = PretrainingExamples(
        ManyBlocks(), tokenizer(200), sequence_length=8, seed=0, same_document_probability=1.0
    )
    examples.batch(0, 2 * len(examples))
    first, second = np.array(ManyBlocks.asked).reshape(2, 20_000)
    for epoch in (first, second):
        assert len(set(epoch)) == 20_000 and set(epoch) <= set(range(20_001))
    assert (first == second).mean() < 0.001
    assert abs(np.corrcoef(first[::2], first[1::2])[0, 1]) < 0.05


def test_epochs_differ_in_order_and_masks():
    blocks, document_of = corpus_of((400,), 128)
    blocks = blocks[:2]  # whichever way round, the same two blocks meet in every epoch
    examples = PretrainingExamples(blocks, tokenizer(len(document_of)), sequence_length=128, seed=0)
    epochs = examples.batch(0, 2 * 64)
    assert len({tuple(ids) for ids in epochs["mlm_ids"]}) > 120
    other = PretrainingExamples(blocks, tokenizer(len(document_of)), sequence_length=128, seed=1)
    differs = other.batch(0, 2 * 64)["mlm_positions"] != epochs["mlm_positions"]
    assert differs.any(axis=1).mean() > 0.95
    big, *_ = make()
    first, second = (unmasked(big.batch(e * len(big), e * len(big) + 100)) for e in (0, 1))
    assert (first != second).any(axis=1).sum() > 95


def binomial_bounds(trials, probability):
    """Counts that a right program leaves once in a million times."""
    return stats.binom.interval(1 - 1e-6, trials, probability)


def check_next_sentence(examples, document_of, count):
    """Labels against the ids themselves; returns the labels, one a pair."""
    batch = examples.batch(0, count)
    for (a, b), label in zip(segments(batch), batch["nsp_labels"]):
        assert (np.diff(a) == 1).all() and (np.diff(b) == 1).all()  # consecutive text
        assert len(set(document_of[a])) == len(set(document_of[b])) == 1
        if label:
            assert document_of[a[0]] != document_of[b[0]]
        else:
            assert b[0] == a[-1] + 1 and document_of[a[0]] == document_of[b[0]]
    labels = batch["nsp_labels"]
    np.testing.assert_array_equal(labels[::2], labels[1::2])
    return labels[::2]


@pytest.mark.parametrize(
    "tokens_per_document, share",
    [
        ((6_000,) * 40, 0.5),
        ((3_000, 3_000), 0.5),  # half of the pairs are of one document: all others are swapped
        ((9_000, 6_000, 3_000), 0.5),
        ((90,) * 6, 0.5),  # one block a document: no pair is of one document
        ((45_000, 5_000), None),  # more than half are: 2 * 0.9 * 0.1 at most can be swapped
    ],
)
def test_next_sentence_labels_are_true_and_balanced(tokens_per_document, share):
    examples, blocks, document_of = make(tokens_per_document)
    if share is None:
        n = np.bincount([block["document"] for block in blocks])
        share = 2 * n[0] * n[1] / (n.sum() * (n.sum() - 1))
        assert 0.1 < share < 0.25
    assert examples.random_next_share == pytest.approx(share, abs=0.02)
    labels = check_next_sentence(examples, document_of, 6000)
    low, high = binomial_bounds(len(labels), share)
    assert low <= labels.sum() <= high


def test_the_given_probability_of_one_document_means_the_counted_one():
    blocks, document_of = corpus_of((3_000, 5_000, 300), 64)
    n = np.bincount([block["document"] for block in blocks])
    given = PretrainingExamples(
        blocks,
        tokenizer(len(document_of)),
        sequence_length=64,
        seed=1,
        same_document_probability=float(((n / n.sum()) ** 2).sum()),
    )
    counted = PretrainingExamples(blocks, tokenizer(len(document_of)), sequence_length=64, seed=1)
    assert_same(given.batch(0, 200), counted.batch(0, 200))


@pytest.mark.parametrize("sequence_length", [64, 128])
def test_neither_lengths_nor_cut_sentences_give_the_label_away(sequence_length):
    examples, blocks, document_of = make((9_000,) * 40, sequence_length)
    alone = np.mean([len(block["sentence_lengths"]) == 1 for block in blocks])
    assert alone > (0.3 if sequence_length == 64 else 0.01)
    begins_sentence = np.zeros(len(document_of) + 1, bool)
    for block in blocks:
        begins_sentence[block["tokens"][0] + np.cumsum([0, *block["sentence_lengths"]])] = True

    batch = examples.batch(0, 6 * len(examples))
    pairs, label = segments(batch), batch["nsp_labels"]
    lengths = np.array([(len(a), len(b)) for a, b in pairs])
    half = len(pairs) // 4 * 2  # a classifier of lengths, tested on the other half
    classifier = HistGradientBoostingClassifier(random_state=0).fit(lengths[:half], label[:half])
    majority = max(label[half:].mean(), 1 - label[half:].mean())
    assert classifier.score(lengths[half:], label[half:]) < majority + 0.02

    a_is_whole = np.array([begins_sentence[a[-1] + 1] for a, _ in pairs])
    b_is_whole = np.array([begins_sentence[b[0]] for _, b in pairs])
    for joint in (a_is_whole & b_is_whole, a_is_whole & ~b_is_whole, ~a_is_whole & b_is_whole):
        assert abs(joint[label == 1].mean() - joint[label == 0].mean()) < 0.02


@pytest.mark.parametrize(
    "x, y, cuts",
    [
        ([30, 20], [35, 20], {(30, 35)}),  # a boundary each; a swap changes lengths by 5
        ([10, 20, 30], [40, 20], {(30, 40)}),  # lengths change by 10, with (10, 40) by 30
        # X1 with Y2 would have 210 tokens. Both are cut within a sentence.
        ([110, 15], [20, 100], {(c, c) for c in range(1, 120) if c not in (20, 110)}),
        ([60], [5, 3], {(c, c) for c in (1, 2, 3, 4, 6, 7)}),
        ([60], [5], {(c, c) for c in range(1, 5)}),
        ([60], [1, 1], {(1, 1)}),  # there is no other place
    ],
)
def test_cuts(x, y, cuts):
    blocks, first = [], FIRST_TEXT_ID
    for document, sentences in enumerate((x, y)):
        tokens = np.arange(first, first + sum(sentences))
        blocks.append(dict(document=document, tokens=tokens, sentence_lengths=np.array(sentences)))
        first += 500
    examples = PretrainingExamples(blocks, tokenizer(2000), sequence_length=128, seed=0)
    batch = examples.batch(0, 4000)
    pairs = segments(batch)
    found = set()
    for both in zip(pairs[::2], pairs[1::2]):
        (a, b), (c, d) = sorted(both, key=lambda pair: pair[0][0])
        found.add((len(a), len(c)))
        assert len(b) + len(d) == sum(x) + sum(y) - len(a) - len(c)
    assert found == cuts


@pytest.mark.parametrize(("rate", "slots", "common"), [(0.15, 20, 17), (0.4, 52, 40)])
def test_masking_follows_the_recipe(rate, slots, common):
    """So many targets; 80/10/10; special tokens neither hidden, nor inserted, [UNK] included."""
    rng = np.random.default_rng(0)
    vocab_size, size = 60, 128
    ordinary = np.setdiff1d(np.arange(vocab_size), list(SPECIAL))
    blocks = []
    for document in range(600):
        tokens = rng.choice(np.append(ordinary, [7] * 6), int(rng.integers(2, size - 2)))
        lengths = np.array([len(tokens) // 2, len(tokens) - len(tokens) // 2])
        blocks.append(dict(document=document, tokens=tokens, sentence_lengths=lengths))
    for document in range(10):
        blocks[document]["tokens"] = np.full(len(blocks[document]["tokens"]), 7)
    examples = PretrainingExamples(
        blocks, tokenizer(vocab_size), sequence_length=size, seed=4, masking_rate=rate
    )
    batch = examples.batch(0, 20 * len(examples))
    used = batch["mlm_weights"] == 1
    assert set(np.unique(batch["mlm_weights"])) == {0, 1}
    assert not batch["mlm_positions"][~used].any() and not batch["mlm_ids"][~used].any()

    original = unmasked(batch)
    is_ordinary = ~np.isin(original, list(SPECIAL))
    counts = is_ordinary.sum(axis=1).tolist()
    expected = [min(slots, n and max(1, round(rate * n))) for n in counts]
    # Examples of nothing but [UNK] have no target, those of very few tokens have one.
    assert (is_ordinary.sum(axis=1) == 0).any() and common in expected
    np.testing.assert_array_equal(used.sum(axis=1), expected)
    for positions, weights in zip(batch["mlm_positions"], used):
        assert (np.diff(positions[weights]) > 0).all()
        assert (np.diff(weights.astype(int)) <= 0).all()  # the padding is at the end

    row, slot = np.nonzero(used)
    where = batch["mlm_positions"][row, slot]
    target, shown = batch["mlm_ids"][row, slot], batch["input_ids"][row, where]
    assert is_ordinary[row, where].all()
    changed = original != batch["input_ids"]
    assert changed.sum() == (shown != target).sum()  # nothing but targets changed
    masked = shown == 10
    assert set(np.unique(shown[~masked])) == set(ordinary)
    # A random token equals the original once in len(ordinary) times.
    n, same = len(target), 0.1 / len(ordinary)
    for count, probability in (
        (masked.sum(), 0.8),
        ((~masked & (shown == target)).sum(), 0.1 + same),
        ((~masked & (shown != target)).sum(), 0.1 - same),
    ):
        low, high = binomial_bounds(n, probability)
        assert low <= count <= high
    random_ids = shown[~masked & (shown != target)]
    assert stats.chisquare(np.bincount(random_ids, minlength=vocab_size)[ordinary]).pvalue > 1e-6

    # Every place of a full example is a target equally often.
    long = is_ordinary.sum(axis=1) > 100
    targets = np.bincount(where[long[row]], minlength=size)
    could = is_ordinary[long].sum(axis=0)
    rate = targets.sum() / could.sum()
    middle = slice(1, 100)
    spread = (targets - could * rate)[middle] / np.sqrt(could * rate * (1 - rate))[middle]
    assert abs(spread).max() < 5


def test_batches_are_the_sequence_cut_up():
    examples = make()[0]
    whole = examples.batch(0, 9 * 12)
    resumed = pretraining_batches(examples, 12, start_batch=3, num_batches=6)
    hosts = [
        pretraining_batches(examples, 12, num_batches=9, rows=range(3 * k, 3 * k + 3))
        for k in range(4)
    ]
    for b, parts in enumerate(zip(*hosts, strict=True)):
        expected = rows(whole, 12 * b, 12 * (b + 1))
        assert_same({name: np.concatenate([p[name] for p in parts]) for name in whole}, expected)
        if b >= 3:
            assert_same(next(resumed), expected)
    assert next(resumed, None) is None
    endless = pretraining_batches(examples, 12, start_batch=10**12)
    assert_same(next(endless), examples.batch(12 * 10**12, 12 * 10**12 + 12))
    endless.close()


def test_a_host_makes_its_rows_wherever_they_lie_in_a_batch():
    """Single rows, runs, both of a pair or one of it, on either side of an epoch's end."""
    examples = make()[0]
    blocks, reads = examples._blocks, []

    class Counted(list):
        def __getitems__(self, indices):
            reads.append(len(indices))
            return [blocks[index] for index in indices]

    examples._blocks = Counted(blocks)
    size, rows_held = 40, np.array([0, 3, 4, 5, 17, 20, 21, 22, 23, 39])
    first = len(examples) // size * size  # this batch has the end of the first epoch
    assert first < len(examples) < first + size
    whole = examples.batch(first, first + 2 * size)
    reads.clear()
    batches = pretraining_batches(examples, size, first // size, 2, rows=rows_held)
    for start in (0, size):
        expected = {name: values[start + rows_held] for name, values in whole.items()}
        assert_same(next(batches), expected)
    assert reads == [2 * 7] * 2  # two blocks for each pair that a row belongs to, and no others


def test_close_ends_the_thread():
    before = set(threading.enumerate())
    batches = pretraining_batches(make()[0], 8)
    next(batches)
    started = set(threading.enumerate()) - before
    assert started
    batches.close()
    for thread in started:
        thread.join(timeout=10)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Four documents of 200 sentences; words are numbered, so a word tells document and place."""
    directory = tmp_path_factory.mktemp("corpus")
    words = [f"w{i}" for i in range(4 * 200 * 10)]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", *words]
    (directory / "vocab.txt").write_text("\n".join(vocabulary) + "\n")
    sentences = [" ".join(words[i : i + 10]) + "." for i in range(0, len(words), 10)]
    documents = ["\n".join(sentences[i : i + 200]) for i in range(0, len(sentences), 200)]
    (directory / "text.txt").write_text("\n\n".join(documents))
    request = CorpusRequest([str(directory / "text.txt")], str(directory / "vocab.txt"))
    prepare_corpus(request, directory / "corpus", num_processes=1)
    return load_corpus(directory / "corpus")


def test_examples_of_a_prepared_corpus(corpus):
    examples = PretrainingExamples.from_corpus(corpus, "train", seed=0)
    assert len(examples) == corpus.splits["train"].blocks // 2 * 2
    batch = examples.batch(0, len(examples))
    ids, sep = unmasked(batch), corpus.tokenizer.sep_id
    for row, label in zip(ids, batch["nsp_labels"]):
        words = row[row != 5]  # without full stops
        first_sep = np.flatnonzero(words == sep)[0]
        last, first = (
            int(corpus.tokenizer.id_to_piece(int(words[i]))[1:])
            for i in (first_sep - 1, first_sep + 1)
        )
        assert (first == last + 1) == (label == 0)
        assert (first // 2000 == last // 2000) == (label == 0)
    assert 0 < batch["nsp_labels"].mean() < 1


def test_worker_processes_make_the_same_batches_and_end(corpus):
    """With the records on disk: they are opened anew in each worker."""
    examples = PretrainingExamples.from_corpus(corpus, "train", seed=0)
    before = set(multiprocessing.active_children())
    batches = pretraining_batches(examples, 16, start_batch=2, num_workers=2)
    for b in range(2, 9):
        assert_same(next(batches), examples.batch(16 * b, 16 * (b + 1)))
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    assert set(multiprocessing.active_children()) <= before


def test_the_benchmark_writes_its_rows(corpus, tmp_path):
    text, vocabulary = (str(corpus.directory.parent / name) for name in ("text.txt", "vocab.txt"))
    rows_file = tmp_path / "rows.json"
    settings = ["--workers", "0", "--repeats", "2", "--seconds", "0.01", "--json", str(rows_file)]
    input_benchmark.main(["--input", text, "--tokenizer", vocabulary, *settings])
    preparation, making = json.loads(rows_file.read_text())
    assert (preparation["unit"], preparation["repeats"]) == ("MB of text/s", 2)
    assert (making["unit"], making["workers"], making["repeats"]) == ("sequences/s", 0, 2)
    for row in (preparation, making):
        assert 0 < row["minimum"] <= row["median"] <= row["maximum"]
    input_benchmark.main(["--corpus", str(corpus.directory), *settings])
    assert [row["unit"] for row in json.loads(rows_file.read_text())] == ["sequences/s"]


@pytest.mark.parametrize(
    "kwargs, words",
    [
        (dict(batch_size=10, rows=range(8, 12)), "a batch of 10 has no"),
        (dict(batch_size=10, rows=[3, 2]), "a batch of 10 has no"),
        (dict(batch_size=0), "a batch of 0 has no"),
        (dict(batch_size=8, start_batch=-1), "must not be negative"),
    ],
)
def test_wrong_arguments_are_named_before_the_first_batch(kwargs, words):
    examples = make((2_000,) * 2)[0]
    with pytest.raises(ValueError, match=words):
        pretraining_batches(examples, **kwargs)


def test_wrong_blocks_are_named():
    blocks, document_of = corpus_of((4_000,) * 2, 128)
    vocabulary = tokenizer(len(document_of))
    with pytest.raises(ValueError, match="two blocks, there are 1"):
        PretrainingExamples(blocks[:1], vocabulary, sequence_length=128, seed=0)
    with pytest.raises(ValueError, match="masking_rate must be between 0 and 1, got 15"):
        PretrainingExamples(blocks, vocabulary, sequence_length=128, seed=0, masking_rate=15)
    short = PretrainingExamples(blocks, vocabulary, sequence_length=64, seed=0)
    with pytest.raises(ValueError, match=r"block \d+ has \d+ tokens: .* at most 61, for"):
        short.batch(0, len(short))
