import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from bipft_jax.data.tokenizers import (
    SPECIAL_PIECES,
    SentencePieceTokenizer,
    WordPieceTokenizer,
    load_tokenizer,
    tokenizer_from_dict,
    train_sentencepiece,
)

BERT_VOCABULARY = Path(__file__).parents[2].parent / "shared/data/bert-base-uncased-vocab.txt"

#          0        1        2        3        4         5      6      7      8     9    10   11
PIECES = [*SPECIAL_PIECES, "un", "##aff", "##able", "the", "[", "]", "mask", ".", "cafe"]
TEXT = [
    f"The {noun} {verb} in the {place}, and nobody {other} why it {verb} there."
    for noun in ("cat", "dog", "old king", "Queen", "children", "sailor")
    for verb in ("slept", "waited", "laughed", "sang")
    for place in ("garden", "harbour", "house", "kitchen", "field")
    for other in ("asked", "knew", "wondered")
]


@pytest.fixture(scope="module")
def trained() -> SentencePieceTokenizer:
    return train_sentencepiece(TEXT, 48)


def test_wordpiece_ids_are_those_computed_by_hand():
    tokenizer = WordPieceTokenizer(PIECES)
    assert tokenizer.encode("The unaffable  CAFÉ.") == [8, 5, 6, 7, 13, 12]
    assert tokenizer.encode("the xyz unaffablex") == [8, 1, 1]  # one unmatched end, one [UNK]
    assert tokenizer.encode_batch(["the", "", "un."]) == [[8], [], [5, 12]]
    assert [tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id] == [0, 1, 2]
    assert [tokenizer.sep_id, tokenizer.mask_id, tokenizer.vocab_size] == [3, 4, 14]
    assert tokenizer.special_ids == {0, 1, 2, 3, 4}
    assert tokenizer.decode([2, 8, 5, 6, 7, 4, 3]) == "[CLS] the unaffable [MASK] [SEP]"


def test_a_vocabulary_may_have_a_byte_order_mark_and_end_in_blank_lines(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(PIECES) + "\n\n\n", encoding="utf-8-sig")
    assert load_tokenizer(path).fingerprint == WordPieceTokenizer(PIECES).fingerprint


def test_a_full_cache_changes_no_ids(monkeypatch):
    monkeypatch.setattr("bipft_jax.data.tokenizers._MAX_CACHED_CHARACTERS", 5)
    tokenizer = WordPieceTokenizer(PIECES)
    for _ in range(2):
        assert tokenizer.encode("The unaffable  CAFÉ.") == [8, 5, 6, 7, 13, 12]
        assert len(tokenizer._word_ids) <= 4


def test_special_pieces_typed_in_text_stay_text(trained):
    wordpiece = WordPieceTokenizer(PIECES)
    assert wordpiece.encode("[MASK]") == [9, 11, 10]
    for tokenizer in (wordpiece, trained):
        ids = set(tokenizer.encode("[MASK] the[CLS] [SEP][PAD]"))
        assert ids.isdisjoint(tokenizer.special_ids - {tokenizer.unk_id})


@pytest.mark.skipif(not BERT_VOCABULARY.exists(), reason="the BERT vocabulary is not here")
def test_bert_ids_agree_with_the_librarys_own_bert_tokenizer():
    ours = load_tokenizer(BERT_VOCABULARY)
    assert ours.encode("Hello, world! unaffable") == [7592, 1010, 2088, 999, 14477, 20961, 3468]
    assert [ours.cls_id, ours.sep_id, ours.mask_id, ours.unk_id] == [101, 102, 103, 100]
    theirs = tokenizers.BertWordPieceTokenizer(str(BERT_VOCABULARY), lowercase=True)
    for text in (
        "Tabs\tand\u00a0spaces\u3000and\x85controls\x00 \x1c here\u200b.",
        "日本 Ǆ ﬁne ΣΑΣ naïve Zoë’s 3.5% e-mail " + "x" * 150,
        "  lead  and trail  ",
    ):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == expected
        assert ours.encode(text) == expected  # now from the cache of words


def test_save_and_load_keep_everything(tmp_path, trained):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES) + "\n", encoding="utf-8")
    wordpiece = load_tokenizer(tmp_path / "vocab.txt")
    for tokenizer in (wordpiece, trained):
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = load_tokenizer(tmp_path / "tokenizer.json")
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint == tokenizer.fingerprint
        text = "The unaffable queen slept."
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(tokenizer.encode(text)) == tokenizer.decode(tokenizer.encode(text))
    reordered = WordPieceTokenizer([*PIECES[:-2], PIECES[-1], PIECES[-2]])
    assert reordered.fingerprint != wordpiece.fingerprint != trained.fingerprint


def hugging_face_json(path, pieces=PIECES, **options) -> dict:
    """What Hugging Face's own library writes of an uncased BERT tokenizer."""
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizers.BertWordPieceTokenizer(vocabulary, **options).save(str(path))
    return json.loads(path.read_text(encoding="utf-8"))


def test_hugging_faces_json_is_read_as_its_vocabulary(tmp_path):
    path = tmp_path / "tokenizer.json"
    content = hugging_face_json(path)
    expected = WordPieceTokenizer(PIECES).fingerprint
    assert load_tokenizer(path).fingerprint == expected
    del content["model"]["vocab"]["[MASK]"], content["model"]["type"]  # only among added_tokens
    content["added_tokens"].append({"id": 4, "content": "[MASK]"})
    content["added_tokens"].append({"id": 14, "content": "<user>"})  # behind the vocabulary
    path.write_text(json.dumps(content), encoding="utf-8-sig")
    assert load_tokenizer(path).fingerprint == expected


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("normalizer", {"lowercase": False}, "normalizer.lowercase is False; .* which has True"),
        ("normalizer", {"strip_accents": False}, "normalizer.strip_accents is False"),
        ("normalizer", {"type": "Sequence"}, "normalizer.type is 'Sequence'"),
        ("pre_tokenizer", {"type": "ByteLevel"}, "pre_tokenizer.type is 'ByteLevel'"),
        ("model", {"type": "BPE"}, "model.type is 'BPE'"),
        ("model", {"continuing_subword_prefix": None}, "continuing_subword_prefix is None"),
        ("model", {"vocab": []}, "model.vocab is not an object"),
        ("model", {"vocab": {"[PAD]": 0.0}}, "model.vocab has 0.0 as the id of '.PAD.'"),
        ("model", {"vocab": {"[PAD]": 0, "a": 2}}, "not 0, 1, 2, ...: 'a' has 2 where 1 is next"),
    ],
)
def test_another_tokenizer_of_hugging_face_is_refused_by_its_key(tmp_path, part, change, message):
    path = tmp_path / "tokenizer.json"
    content = hugging_face_json(path)
    content["added_tokens"] = []
    content[part] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"tokenizer.json: .*{message}"):
        load_tokenizer(path)


def test_training_is_deterministic_and_special_pieces_come_first(trained, tmp_path):
    assert train_sentencepiece(TEXT, 48).fingerprint == trained.fingerprint
    assert [trained.id_to_piece(i) for i in range(5)] == list(SPECIAL_PIECES)
    assert trained.vocab_size == 48
    assert trained.decode(trained.encode("The old KING laughed")) == "the old king laughed"
    (tmp_path / "own.model").write_bytes(__import__("base64").b64decode(trained.to_dict()["model"]))
    assert load_tokenizer(tmp_path / "own.model").fingerprint == trained.fingerprint


@pytest.fixture(scope="module")
def cased() -> SentencePieceTokenizer:
    return train_sentencepiece(TEXT, 300, keeps_text=True)


@given(text=st.text())
@example("The king\n\n  laughed,\tand THE\r\nqueen. ")
@example("▁ [MASK] <0x0A> ⁇ \0 ﬁ e\u0301 😀")
def test_decoding_gives_every_text_back(cased, text):
    ids = cased.encode(text)
    assert cased.decode(ids) == text
    assert cased.special_ids.isdisjoint(ids)
    # Sentences are encoded alone, and their ids joined.
    assert cased.decode(cased.encode("A b") + ids + cased.encode(" c")) == f"A b{text} c"


def test_a_tokenizer_knows_whether_it_keeps_the_text(cased, trained, tmp_path):
    assert cased.keeps_text and not trained.keeps_text
    assert not WordPieceTokenizer(PIECES).keeps_text
    assert trained.decode(trained.encode(" The OLD\n king ")) == "the old king"
    assert cased.encode("\n\n") == [5, 5] and cased.id_to_piece(5) == "\n"
    cased.save(tmp_path / "tokenizer.json")
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.keeps_text and loaded.fingerprint == cased.fingerprint


def test_long_text_without_breaks_is_not_dropped_from_training():
    # SentencePiece silently skips lines of more than 4,192 bytes.
    tokenizer = train_sentencepiece([" ".join(TEXT)], 48)
    assert tokenizer.encode("The old king")
    assert tokenizer.unk_id not in tokenizer.encode(" ".join(TEXT))


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        (PIECES[:4] + PIECES[5:], r"lacks the special pieces \['\[MASK\]'\]"),
        (PIECES[1:] + PIECES[:1], r"\[PAD\] has id 13"),
        ([*PIECES, "the"], "line 15 repeats 'the' of line 9"),
        ([*PIECES, "The", "Un"], "have capital letters, such as 'The'"),
    ],
)
def test_bad_vocabularies_are_refused(tmp_path, pieces, message):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(pieces), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)


def test_files_that_are_no_tokenizers_are_refused(tmp_path):
    for name, content, message in [
        ("vocab.bin", b"", "a tokenizer is a vocab.txt"),
        ("a.json", b"{", "not a JSON file"),
        ("b.json", b"[1]", "'kind' is None"),
        ("c.json", json.dumps({"kind": "wordpiece"}).encode(), "'vocabulary'.* is missing"),
        ("e.json", json.dumps({"kind": "wordpiece", "vocabulary": "ab"}).encode(), "not a list of"),
        ("f.json", json.dumps({"kind": "sentencepiece", "model": "%"}).encode(), "not in base64"),
        ("g.json", b"[" * 100_000, "not a JSON file"),
        ("d.model", b"garbage", "not a SentencePiece model"),
        ("vocab.txt", b"\xff\xfe", "not a UTF-8 text file"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_tokenizer(tmp_path / name)


def test_a_sentencepiece_model_with_other_special_pieces_is_refused(tmp_path):
    prefix = str(tmp_path / "plain")
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=iter(TEXT), model_prefix=prefix, vocab_size=44, minloglevel=2
    )
    with pytest.raises(ValueError, match=r"lacks the special pieces \['\[PAD\]'"):
        load_tokenizer(prefix + ".model")


def test_unusable_training_text_is_refused():
    with pytest.raises(ValueError, match="no text"):
        train_sentencepiece(["", "  "], 100)
    with pytest.raises(ValueError, match="5000 pieces.*too high.*<="):
        train_sentencepiece(TEXT, 5000)


def test_ids_outside_the_vocabulary_are_refused(trained):
    for tokenizer in (WordPieceTokenizer(PIECES), trained):
        for bad in (-1, tokenizer.vocab_size):
            with pytest.raises(ValueError, match="outside"):
                tokenizer.id_to_piece(bad)
            with pytest.raises(ValueError, match="outside"):
                tokenizer.decode([5, bad])
    with pytest.raises(ValueError, match="expected 'wordpiece' or 'sentencepiece'"):
        tokenizer_from_dict({"kind": "bpe"})
