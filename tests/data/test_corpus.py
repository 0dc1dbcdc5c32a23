import hashlib
import json
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bipft_jax.data.corpus import builder as corpus_builder
from bipft_jax.data.corpus import preparation, python_docs
from bipft_jax.data.corpus.blocks import pack_document
from bipft_jax.data.corpus.command import main
from bipft_jax.data.corpus.corpus import load_corpus
from bipft_jax.data.tokenizers import SPECIAL_PIECES, WordPieceTokenizer

WORDS = ["red", "green", "blue", "old", "new", "cat", "dog", "bird", "runs", "sleeps", "eats"]
SEQUENCE_LENGTH = 16


def _documents(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [
        "\n".join(
            " ".join(
                " ".join(rng.choices(WORDS, k=rng.randint(1, 9))).capitalize() + "."
                for _ in range(rng.randint(1, 4))
            )
            for _ in range(rng.randint(2, 5))
        )
        for _ in range(count)
    ]


def _write(path, documents) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return str(path)


@pytest.fixture
def arguments(tmp_path):
    """Command-line arguments for a small corpus in tmp_path / "out"."""
    (tmp_path / "vocab.txt").write_text("\n".join([*SPECIAL_PIECES, ".", *WORDS, "##s"]))
    return {
        "input": _write(tmp_path / "train.jsonl", _documents(60)),
        "output": str(tmp_path / "out"),
        "tokenizer": str(tmp_path / "vocab.txt"),
        "sequence_length": str(SEQUENCE_LENGTH),
        "validation_fraction": "0.1",
        "processes": "1",
    }


def _prepare(arguments, **changes):
    flags = {**arguments, **{name: str(value) for name, value in changes.items()}}
    main([part for name, value in flags.items() for part in (f"--{name}", value)])
    return load_corpus(flags["output"])


def _bytes(directory) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def _records(corpus, split):
    source = corpus.data_source(split)
    return [source[index] for index in range(len(source))]


@given(
    sentences=st.lists(st.integers(0, 40), max_size=12),
    sequence_length=st.integers(8, 24),
    short=st.sampled_from([0.0, 0.1, 1.0]),
    seed=st.integers(0, 9),
)
def test_blocks_hold_every_token_once_and_are_never_too_long(
    sentences, sequence_length, short, seed
):
    ends = np.cumsum([0, *sentences])
    texts = [list(range(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
    blocks, num_split = pack_document(texts, sequence_length, short, np.random.default_rng(seed))
    if not blocks:
        assert sum(length > 0 for length in sentences) < 2 or 1 in sentences
        return
    assert [token for block in blocks for token in block.tokens] == list(range(ends[-1]))
    for block in blocks:
        assert min(block.sentence_lengths) >= 1
        assert sum(block.sentence_lengths) == len(block.tokens)
        assert 2 <= len(block.tokens) <= sequence_length - 3
    if 1 not in sentences:
        assert num_split == sum(length > sequence_length - 3 for length in sentences)


def test_blocks_are_cut_between_sentences_where_two_fit():
    def pack(lengths, short=0.0):
        ends = np.cumsum([0, *lengths])
        texts = [list(range(a, b)) for a, b in zip(ends, ends[1:], strict=False)]
        blocks, num_split = pack_document(texts, 13, short, np.random.default_rng(0))
        return [block.sentence_lengths for block in blocks], num_split

    assert pack([3, 3, 4, 5, 5, 2, 2]) == ([[3, 3, 4], [5, 5], [2, 2]], 0)
    assert pack([4, 4, 9, 4, 4]) == ([[4, 4], [9], [4, 4]], 0)  # neither neighbour fits
    assert pack([21, 3]) == ([[7], [7], [7, 3]], 1)  # three pieces of 7
    assert pack([1, 3, 3, 1]) == ([[4, 4]], 0)
    assert pack([5]) == pack([1, 5]) == pack([0, 5]) == pack([]) == ([], 0)
    assert pack([2] * 10)[0] == [[2] * 5] * 2
    shortened, _ = pack([2] * 10, short=1.0)
    assert len(shortened) > 2 and all(len(lengths) >= 2 for lengths in shortened)


def test_records_give_the_text_back(arguments, capsys):
    corpus = _prepare(arguments)
    documents = _documents(60)
    tokenizer = WordPieceTokenizer([*SPECIAL_PIECES, ".", *WORDS, "##s"])
    assert corpus.tokenizer.fingerprint == tokenizer.fingerprint
    assert corpus.sequence_length == SEQUENCE_LENGTH
    texts: dict[int, list[int]] = {}
    blocks_of = {"train": {}, "validation": {}}
    for split, counts in blocks_of.items():
        info = corpus.splits[split]
        records = _records(corpus, split)
        assert info.blocks == len(records)
        numbers = [int(record["document"]) for record in records]
        assert numbers == sorted(numbers)
        for number, record in zip(numbers, records, strict=True):
            assert record["tokens"].dtype == record["sentence_lengths"].dtype == np.int32
            texts.setdefault(number, []).extend(record["tokens"].tolist())
            counts[number] = counts.get(number, 0) + 1
        assert info.documents == len(counts)
        assert info.tokens == sum(len(record["tokens"]) for record in records)
        shares = np.array(list(counts.values())) / len(records)
        assert info.same_document_probability == pytest.approx((shares**2).sum())
    assert not blocks_of["train"].keys() & blocks_of["validation"].keys()
    assert 1 <= len(blocks_of["validation"]) < 20
    skipped = sum(info.skipped_documents for info in corpus.splits.values())
    assert len(texts) == 60 - skipped
    for number, ids in texts.items():
        assert ids == tokenizer.encode(documents[number].replace("\n", " "))
    train_ids = [i for number in blocks_of["train"] for i in texts[number]]
    np.testing.assert_array_equal(
        corpus.unigram_counts, np.bincount(train_ids, minlength=tokenizer.vocab_size)
    )
    printed = capsys.readouterr().out
    first = tokenizer.decode(_records(corpus, "train")[0]["tokens"][:4])
    assert f"{corpus.splits['train'].tokens:,}" in printed and first.split()[0] in printed


def test_bytes_do_not_depend_on_processes_or_interruptions(
    arguments, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(corpus_builder, "_BATCH_BYTES", 1000)
    monkeypatch.setattr(corpus_builder, "_SMALLEST_SHARD", 30)
    expected = _bytes(_prepare(arguments).directory)
    assert sum("blocks-train.array_record" in name for name in expected) > 3

    two = _bytes(_prepare(arguments, output=tmp_path / "two", processes=2).directory)
    assert two == expected

    broken = tmp_path / "broken"
    write = corpus_builder.DatasetWriter.write

    def fail_late(self, split, records):
        write(self, split, records)
        if split == "validation":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus_builder.DatasetWriter, "write", fail_late)
        with pytest.raises(SystemExit, match="run the same command again"):
            _prepare(arguments, output=broken)
    assert any((broken / "blocks").iterdir())
    with pytest.raises(ValueError, match=r"no corpus\.json.*interrupted.*bipft_jax\.data\.corpus"):
        load_corpus(broken)
    assert _bytes(_prepare(arguments, output=broken).directory) == expected

    other_seed = _prepare(arguments, output=tmp_path / "seed", seed=1)
    assert _bytes(other_seed.directory) != expected


def test_a_finished_corpus_is_kept_and_a_different_one_refused(arguments, tmp_path, capsys):
    directory = _prepare(arguments).directory
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
    capsys.readouterr()
    _prepare(arguments, processes=2)
    assert "Already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before
    with pytest.raises(SystemExit, match=r"--seed \(there 0, now 7\).*another --output"):
        _prepare(arguments, seed=7)
    _write(tmp_path / "train.jsonl", _documents(60, seed=1))
    with pytest.raises(SystemExit, match="the files or contents of --input"):
        _prepare(arguments)
    assert {path: path.stat().st_mtime_ns for path in directory.rglob("*")} == before


def test_a_directory_with_other_things_is_left_alone(arguments, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="not empty and holds no corpus"):
        _prepare(arguments)
    assert (tmp_path / "out" / "thesis.tex").read_text() == "years of work"


def test_validation_input_and_at_least_two_held_out_documents(arguments, tmp_path):
    validation = _write(tmp_path / "validation.jsonl", _documents(3, seed=5))
    corpus = _prepare(arguments, validation_input=validation, output=tmp_path / "given")
    assert {int(r["document"]) for r in _records(corpus, "validation")} <= {60, 61, 62}
    assert len({int(r["document"]) for r in _records(corpus, "train")}) > 55
    other = _prepare(arguments, validation_input=validation, seed=1, output=tmp_path / "seed")
    ids, other_ids = ([r["tokens"] for r in _records(c, "train")] for c in (corpus, other))
    np.testing.assert_array_equal(np.concatenate(ids), np.concatenate(other_ids))
    assert list(map(len, ids)) != list(map(len, other_ids))  # the seed decides the short blocks
    corpus = _prepare(arguments, validation_fraction=1e-9, output=tmp_path / "tiny")
    assert corpus.splits["validation"].documents == 2
    with pytest.raises(SystemExit, match="both for training and for validation"):
        _prepare(arguments, validation_input=arguments["input"], output=tmp_path / "same")


def test_the_same_text_under_another_name_is_noticed(arguments, tmp_path, caplog):
    copy = _write(tmp_path / "copy.jsonl", _documents(60))
    with pytest.raises(SystemExit, match=r"copy\.jsonl is given both for training \(there as "):
        _prepare(arguments, validation_input=copy)
    _prepare({**arguments, "input": f"{tmp_path}/*.jsonl"})
    assert "train.jsonl has the same content as" in caplog.text and "twice" in caplog.text


def test_text_that_grows_while_it_is_prepared_is_refused(arguments, tmp_path, monkeypatch):
    def survey(self):
        _write(tmp_path / "train.jsonl", _documents(61))
        return documents(self)

    documents = preparation._Survey.documents
    monkeypatch.setattr(preparation._Survey, "documents", survey)
    with pytest.raises(SystemExit, match="The text changed while it was being prepared"):
        _prepare(arguments)


def test_documents_that_cannot_be_used_are_named(arguments, tmp_path):
    lines = ["Red cat. Blue dog.", "Only one sentence here", "", "Old bird. New cat."] * 5
    corpus = _prepare(arguments, input=_write(tmp_path / "some.jsonl", lines))
    skipped = {name for split in corpus.splits.values() for name in split.skipped_at}
    assert f"{tmp_path}/some.jsonl:2" in skipped and f"{tmp_path}/some.jsonl:3" in skipped
    assert sum(split.skipped_documents for split in corpus.splits.values()) == 10

    for name, lines, message in [
        ("none", ["Only one", "sentence each"] * 3, r"train split has 0 .*none\.jsonl:\d"),
        ("one", ["Red cat. Blue dog. Old bird."], "train split has 0 .*1 documents of the input"),
        ("two", ["Red cat. Blue dog."] * 2, "train split has 0 .* 2 documents .* at least four"),
    ]:
        path = _write(tmp_path / f"{name}.jsonl", lines)
        output = tmp_path / f"out-{name}"
        with pytest.raises(SystemExit, match=message):
            _prepare(arguments, input=path, output=output)
        with pytest.raises(ValueError, match="not prepared"):
            load_corpus(output)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 7}, "sequence_length is 7; it must be at least 8"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
        ({"short_sequence_probability": -0.1}, "short_sequence_probability is -0.1"),
        ({"seed": -1}, "seed is -1"),
        ({"processes": 0}, "number of processes is 0"),
        ({"tokenizer": "sentencepiece:many"}, "needs a vocabulary size"),
        ({"tokenizer": "sentencepiece-cased:0"}, "size, as in 'sentencepiece-cased:8192'"),
        ({"tokenizer": "nowhere/vocab.txt"}, "nowhere/vocab.txt"),
        ({"tokenizer": "sentencepiece:5000"}, "5000 pieces"),
        ({"input": "nowhere/*.txt"}, "No file matches"),
    ],
)
def test_wrong_arguments_are_explained(arguments, changes, message):
    with pytest.raises(SystemExit, match=message):
        _prepare(arguments, **changes)


def test_load_corpus_says_what_is_missing(arguments, tmp_path):
    with pytest.raises(ValueError, match="no corpus directory .*python -m bipft_jax.data.corpus"):
        load_corpus(tmp_path / "nothing")
    corpus = _prepare(arguments)
    with pytest.raises(ValueError, match=r"no split 'test'.*'train', 'validation'"):
        corpus.data_source("test")
    metadata = json.loads((corpus.directory / "corpus.json").read_text())
    (corpus.directory / "corpus.json").write_text(json.dumps({**metadata, "format": 99}))
    with pytest.raises(ValueError, match="format 99"):
        load_corpus(corpus.directory)
    with pytest.raises(SystemExit, match="format 99"):
        _prepare(arguments)
    (corpus.directory / "corpus.json").write_text("{")
    with pytest.raises(ValueError, match=r"corpus\.json: damaged"):
        load_corpus(corpus.directory)


def test_a_corpus_with_another_ones_files_is_refused(arguments):
    directory = _prepare(arguments).directory
    other = WordPieceTokenizer([*SPECIAL_PIECES, ".", *reversed(WORDS), "##s"])
    counts = np.load(directory / "unigram.npy")
    np.save(directory / "unigram.npy", counts[:-1])
    with pytest.raises(
        ValueError, match=r"unigram\.npy does not have a count for each of .* 18 ids"
    ):
        load_corpus(directory)
    other.save(directory / "tokenizer.json")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the tokenizer that the corpus"):
        load_corpus(directory)


@pytest.mark.parametrize("bytes_left", [100, None])
def test_a_corpus_copied_incompletely_is_refused_before_it_is_read(arguments, bytes_left):
    corpus = _prepare(arguments)
    shard = max((corpus.directory / "blocks").glob("*train*"))
    size = shard.stat().st_size
    if bytes_left is None:
        shard.unlink()
        found = f"missing, with {size} bytes"
    else:
        shard.write_bytes(shard.read_bytes()[:bytes_left])
        found = f"100 bytes instead of {size} bytes"
    with pytest.raises(ValueError, match=f"{shard}: {found}.* copy or prepare it again"):
        load_corpus(corpus.directory)


@pytest.mark.parametrize("failing", ["write", "close"])
def test_a_full_disk_ends_the_preparation_with_a_message(arguments, monkeypatch, failing):
    class Writer:
        def __init__(self, path, options):
            pass

        def write(self, record):
            if failing == "write":
                raise RuntimeError("write() failed: No space left on device")

        def close(self):
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(corpus_builder.array_record_module, "ArrayRecordWriter", Writer)
    with pytest.raises(SystemExit, match=r"cannot write to .*blocks: .*No space left"):
        _prepare(arguments)
    with pytest.raises(ValueError, match="not prepared"):
        load_corpus(arguments["output"])


def test_documents_always_held_out_are_in_no_split_beside_other_validation_text(
    arguments, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        python_docs, "training_documents", lambda corpus: [("a", "Red cat. Blue dog.")]
    )
    monkeypatch.setattr(
        python_docs, "held_out_documents", lambda corpus: [("z", "Old bird. New cat.")]
    )
    text = _write(tmp_path / "more.jsonl", _documents(3))
    validation = _write(tmp_path / "validation.jsonl", _documents(3, seed=1))
    flags = {**arguments, "validation_input": validation, "input": "python-docs"}
    arguments_list = [part for name, value in flags.items() for part in (f"--{name}", value)]
    arguments_list.insert(arguments_list.index("python-docs"), text)
    main(arguments_list)
    corpus = load_corpus(flags["output"])
    # Numbers: three documents of the file, the training and the held-out one, three to validate on.
    assert {int(r["document"]) for r in _records(corpus, "train")} == {0, 1, 2, 3}
    assert {int(r["document"]) for r in _records(corpus, "validation")} == {5, 6, 7}


def test_python_docs_with_a_tokenizer_trained_on_its_train_split(tmp_path, monkeypatch):
    training = [("a", "The box is old. It is red.\nIt opens."), ("b", "A dog. A cat.")]
    held_out = [("z", "Zebras zigzag. Zoos zoom."), ("y", "Zips zap. Zinc is zesty.")]
    monkeypatch.setattr(python_docs, "training_documents", lambda corpus: training)
    monkeypatch.setattr(python_docs, "held_out_documents", lambda corpus: held_out)
    flags = {"tokenizer": "sentencepiece:25", "sequence_length": "16", "processes": "1"}
    corpora = [
        _prepare(flags, input="python-docs", output=tmp_path / name) for name in ("one", "two")
    ]
    assert _bytes(corpora[0].directory) == _bytes(corpora[1].directory)
    assert {int(record["document"]) for record in _records(corpora[0], "validation")} == {2, 3}
    tokenizer = corpora[0].tokenizer
    assert tokenizer.vocab_size == 25
    assert tokenizer.unk_id in tokenizer.encode("z")  # the held-out letter was never seen
    assert corpora[0].splits["validation"].unknown_tokens > 0


def test_a_cased_corpus_keeps_its_text_and_serves_decoders_only(arguments, tmp_path, capsys):
    documents = [
        text.replace(" ", "  ", 1).replace("e", "É\t", 1) + " \n" for text in _documents(60)
    ]
    text = _write(tmp_path / "cased.jsonl", documents)
    cased = {"tokenizer": "sentencepiece-cased:300", "input": text, "output": tmp_path / "cased"}
    corpus = _prepare(arguments, **cased)
    texts: dict[int, list[int]] = {}
    for split in ("train", "validation"):
        assert corpus.splits[split].unknown_tokens == 0
        for record in _records(corpus, split):
            texts.setdefault(int(record["document"]), []).extend(record["tokens"].tolist())
    assert len(texts) > 50
    for number, ids in texts.items():
        assert corpus.tokenizer.decode(ids) == documents[number]

    corpus.require("causal_lm")
    with pytest.raises(ValueError, match="not serve the objective mlm_nsp, only causal_lm: its to"):
        corpus.require("mlm_nsp")
    assert "objectives        causal_lm only: its tokenizer keeps" in capsys.readouterr().out
    # With that tokenizer, another corpus is of the same kind.
    again = dict(tokenizer=corpus.directory / "tokenizer.json", output=tmp_path / "again")
    assert _prepare(arguments, **again).objectives == ("causal_lm",)
    with pytest.raises(SystemExit, match="prepared differently: .*tokenizer"):
        _prepare(arguments, **{**cased, "tokenizer": "sentencepiece:300"})

    uncased = _prepare(arguments)
    metadata = json.loads((uncased.directory / "corpus.json").read_text())
    assert metadata["objectives"] == ["mlm_nsp", "causal_lm"] == list(uncased.objectives)
    del metadata["objectives"], metadata["objectives_reason"]  # of an earlier version
    (uncased.directory / "corpus.json").write_text(json.dumps(metadata))
    load_corpus(uncased.directory).require("mlm_nsp")


def test_the_sample_for_a_tokenizer_is_bounded_and_evenly_spread(monkeypatch):
    monkeypatch.setattr(preparation, "_SAMPLE_BYTES", 1000)
    sample = preparation._Sample()
    for number in range(400):
        document = preparation.Document(f"{number:04d}\n{number:04d}", "here", 9)
        sample.add(number, document)
    numbers = [number for number, _ in sample.items]
    assert 100 <= len(numbers) <= 250
    assert len(set(np.diff(numbers))) == 1 and numbers[-1] > 390
