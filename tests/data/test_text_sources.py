import gzip
import json
import lzma
import os
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zstandard

from bipft_jax.data.corpus import docstrings, python_docs
from bipft_jax.data.corpus import sources as text_sources
from bipft_jax.data.corpus.sentences import split_sentences
from bipft_jax.data.corpus.sources import open_sources

TEXT = "One. Two.\nÜber drei.\n\n\n  \nZweites Dokument.\r\n\nDrittes"
DOCUMENTS = ["One. Two.\nÜber drei.", "Zweites Dokument.", "Drittes"]
LINES = [1, 6, 8]


def _zstd_in_two_frames(data: bytes) -> bytes:
    compressor = zstandard.ZstdCompressor()
    return compressor.compress(data[:20]) + compressor.compress(data[20:])


COMPRESSORS = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": _zstd_in_two_frames,
}


def _read(*specs):
    return [document for source in open_sources(specs) for document in source.documents()]


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_text_files_are_split_at_blank_lines(tmp_path, ending):
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(COMPRESSORS[ending](TEXT.encode("utf-8-sig")))
    documents = _read(str(path))
    assert [document.text for document in documents] == DOCUMENTS
    assert [document.where for document in documents] == [f"{path}:{line}" for line in LINES]
    assert documents[0].num_bytes == len(DOCUMENTS[0].encode())


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_json_lines_are_documents(tmp_path, ending):
    path = tmp_path / f"a.jsonl{ending}"
    lines = [json.dumps({"title": "t", "text": text}) for text in DOCUMENTS]
    path.write_bytes(COMPRESSORS[ending]("\n\n".join(lines).encode()))
    documents = _read(str(path))
    assert [document.text for document in documents] == DOCUMENTS
    assert [document.where for document in documents] == [f"{path}:{n}" for n in (1, 3, 5)]


def test_globs_are_sorted_and_files_come_once(tmp_path):
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    sources = open_sources([f"{tmp_path}/b.txt", f"{tmp_path}/**/*.txt"])
    assert [source.name[-5:] for source in sources] == ["b.txt", "a.txt", "c.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\n\nbad \xff here\n", r"a\.txt:3: not valid UTF-8 at byte 4"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}', r"a\.jsonl:2: .* no field 'text'"),
        ("a.jsonl", b'{"text": 3}', r"a\.jsonl:1: .* no field 'text'"),
        ("a.jsonl", b'["text"]', r"a\.jsonl:1: .* no field 'text'"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"a\.jsonl:1: not valid Unicode"),
        ("a.jsonl", b'{"text": "a", "text": "b"}', r"a\.jsonl:1: .* the key 'text' twice"),
        ("a.jsonl", b'\n{"n": ' + b"7" * 5000 + b"}", r"a\.jsonl:2: not valid JSON .*4300 digits"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl:1: not valid JSON \(it is nested too deeply\)"),
        ("a.txt", b"\n \n", r"a\.txt: holds no document"),
        ("a.txt", b"", r"a\.txt: holds no document"),
        ("a.csv", b"x", r"a\.csv: .*Supported endings"),
        ("a.gz", b"x", r"a\.gz: .*Supported endings"),
        ("a.txt.gz", b"not gzip", r"a\.txt\.gz: damaged"),
        ("a.txt.xz", b"not xz", r"a\.txt\.xz: damaged"),
        ("a.txt.zst", b"not zst", r"a\.txt\.zst: damaged"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        _read(str(tmp_path / name))


@pytest.mark.parametrize("ending", [".gz", ".xz", ".zst"])
def test_a_truncated_file_is_an_error_not_a_short_corpus(tmp_path, ending):
    text = "\n\n".join(f"Document {i}." for i in range(100_000)).encode()
    path = tmp_path / f"a.txt{ending}"
    path.write_bytes(COMPRESSORS[ending](text)[:-9])
    with pytest.raises(ValueError, match=r"damaged or incomplete .* after line \d+"):
        _read(str(path))


@pytest.mark.parametrize("ending", [".gz", ".xz"])
def test_all_members_are_read_or_the_file_is_damaged(tmp_path, ending):
    compress, path = COMPRESSORS[ending], tmp_path / f"a.txt{ending}"
    path.write_bytes(compress(b"one\n\n") + compress(b"two") + b"\0" * 8)  # padding, as of tapes
    assert [document.text for document in _read(str(path))] == ["one", "two"]
    path.write_bytes(compress(b"one\n\n") + b"?" + compress(b"two")[1:])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        _read(str(path))


def test_a_window_of_zstd_may_be_long_but_not_longer_than_memory(tmp_path):
    path = tmp_path / "a.txt.zst"
    long = zstandard.ZstdCompressionParameters.from_level(3, window_log=28, enable_ldm=True)
    compressor = zstandard.ZstdCompressor(compression_params=long).compressobj()
    path.write_bytes(compressor.compress(TEXT.encode()) + compressor.flush())
    assert [document.text for document in _read(str(path))] == DOCUMENTS
    window_of_4_gib = bytes([(32 - 10) << 3])
    path.write_bytes(b"\x28\xb5\x2f\xfd\0" + window_of_4_gib + b"\x01\0\0")
    with pytest.raises(ValueError, match=r"a\.txt\.zst: more memory is needed"):
        _read(str(path))


@pytest.mark.parametrize(
    "line", ["\u200b", "\ufeff \u00ad", "\u2060\t", "\x00", "\u0301\ufe0f", "\u3164"]
)
def test_a_line_that_shows_nothing_is_blank(tmp_path, line):
    path = tmp_path / "a.txt"
    path.write_text(f"One.\n{line}\nTwo.\u200b\n", encoding="utf-8")
    assert [(d.text, d.where) for d in _read(str(path))] == [
        ("One.", f"{path}:1"),
        ("Two.\u200b", f"{path}:3"),
    ]


def test_a_carriage_return_alone_ends_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\rTwo.\r\rThree.\r")
    assert [d.text for d in _read(f"{tmp_path}/a.txt")] == ["One.\nTwo.", "Three."]


def test_a_long_line_is_put_together_once():
    class Block(bytes):
        def __radd__(self, other):
            raise AssertionError("copied before the line ended")

    blocks = [Block(b"a\nb"), *[Block(b"c")] * 3, Block(b"\n\nd")]
    assert list(text_sources._lines(blocks)) == [b"a", b"bccc", b"", b"d"]


def test_a_name_that_exists_is_no_pattern(tmp_path):
    directory = tmp_path / "data [v1]"
    directory.mkdir()
    for name in ("[ab].txt", "a.txt", "c.txt"):
        (directory / name).write_text(name)

    def names(spec):
        return [source.name.rpartition("/")[2] for source in open_sources([f"{directory}/{spec}"])]

    assert names("[ab].txt") == ["[ab].txt"]
    assert names("a.txt") == ["a.txt"]
    assert names("[ac].txt") == ["a.txt", "c.txt"]  # nothing has this name
    with pytest.raises(ValueError, match=r"data \[v1\] is a directory"):
        open_sources([str(directory)])


def test_what_can_be_read_only_once_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"a\.txt is a pipe .* several times"):
        open_sources([f"{tmp_path}/a.txt"])


def test_a_glob_that_matches_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"No file matches .*\*\.txt"):
        open_sources([f"{tmp_path}/*.txt"])


@pytest.fixture
def tfds_directory(tmp_path):
    from array_record.python import array_record_module

    features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "n": np.int64})
    path = tmp_path / "mine-test.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for number, text in enumerate(DOCUMENTS):
        writer.write(features.serialize_example({"text": text, "n": number}))
    writer.close()
    template = tfds.core.ShardedFileTemplate(
        data_dir=tmp_path, dataset_name="mine", split="test", filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name="test", shard_lengths=[3], num_bytes=1, filename_template=template
    )
    tfds.folder_dataset.write_metadata(
        data_dir=tmp_path, features=features, split_infos=[split], check_data=False
    )
    return tmp_path


def test_tfds_datasets_are_read_without_tensorflow(tfds_directory):
    documents = _read(f"tfds:{tfds_directory}:test[1:]")
    assert [document.text for document in documents] == DOCUMENTS[1:]
    assert len(open_sources([f"tfds:{tfds_directory}{end}" for end in (":test", "/:test")])) == 1
    with pytest.raises(ValueError, match="'train'"):
        open_sources([f"tfds:{tfds_directory}"])
    with pytest.raises(ValueError, match="no_such_dataset: no such dataset"):
        open_sources(["tfds:no_such_dataset"])
    assert "tensorflow" not in sys.modules


def test_fingerprints_follow_the_content(tmp_path):
    prints = []
    for content in ("a", "b", "a"):
        (tmp_path / "a.txt").write_text(content)
        prints.append(open_sources([f"{tmp_path}/a.txt"])[0].fingerprint())
    assert prints[0] == prints[2] != prints[1]


def test_the_embedded_corpus_is_prose_and_its_held_out_part_is_apart():
    documents = _read("python-docs")
    assert sum(document.num_bytes for document in documents) > 800_000
    assert not any(d.where.startswith("python-docs:numpy/") for d in documents)
    held_out_texts = dict(python_docs.held_out_documents("python-docs"))
    training = {
        p for _, text in python_docs.training_documents("python-docs") for p in text.split("\n")
    }
    held_out = {p for text in held_out_texts.values() for p in text.split("\n")}
    assert held_out and training.isdisjoint(held_out)
    assert {d.text for d in documents if d.held_out} == set(held_out_texts.values())
    sentences = [s for _, s in python_docs.held_out_sentences("python-docs")]
    assert not {s for p in training for s in split_sentences(p)} & set(sentences)
    assert len(sentences) > 300 and len(set(sentences)) == len(sentences)
    for name, sentence in python_docs.held_out_sentences("python-docs")[:50]:
        assert sentence in " ".join(held_out_texts[name].split())
    everything = "\n".join(document.text for document in documents)
    for markup in (">>>", "``", ":func:", "::\n", "->", "{", "----"):
        assert markup not in everything


def test_the_corpus_of_packages_is_python_and_their_docstrings(tmp_path, monkeypatch):
    package = tmp_path / "numpy"
    (package / "tests").mkdir(parents=True)
    (package / "tests" / "a.py").write_text('"""This is text of a test and not for reading."""')
    (package / "b.py").write_text('"""This is the prose of a made up package."""')
    monkeypatch.setattr(python_docs, "PACKAGES", ("numpy",))
    monkeypatch.setattr(
        python_docs, "_python_documents", lambda: [("z.py", ["Its own words are here."])]
    )
    monkeypatch.setattr(python_docs, "_directory", lambda package: tmp_path / package)
    python_docs.documents.cache_clear()
    try:
        documents = _read("package-docs")
    finally:
        python_docs.documents.cache_clear()
    assert {d.where: d.text for d in documents} == {
        "package-docs:z.py": "Its own words are here.",
        "package-docs:numpy/b.py": "This is the prose of a made up package.",
    }
    with pytest.raises(ValueError, match="package-docs has all of python-docs"):
        open_sources(["python-docs", "package-docs"])


def test_prose_is_kept_and_code_is_not():
    docstring = """Return the `list` of *all* items in the :class:`Box`.

    >>> box.items()
    [1, 2]

        indented = code(here)

    items(x, y=1) -> list

    * The first item is never removed
      by this function.
    - short one
    """
    assert list(docstrings.prose_paragraphs(docstring)) == [
        "Return the list of all items in the Box.",
        "The first item is never removed by this function.",
    ]
