"""Our WordPiece against the pure-Python one of transformers, on real text."""

import itertools
import json
import lzma
import os
from pathlib import Path

import pytest
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy

from bipft_jax.data.tokenizers import WordPieceTokenizer

DATA = Path(os.environ.get("BIPFT_DATA", Path(__file__).parents[3] / "shared" / "data"))


def lines_of(path):
    with lzma.open(path, "rt", encoding="utf-8") as documents:
        for document in documents:
            yield from json.loads(document)["text"].split("\n")


@pytest.mark.skipif(not DATA.is_dir(), reason="needs text and BERT's vocabulary in BIPFT_DATA")
def test_ids_agree_on_ten_thousand_lines():
    vocabulary = DATA / "bert-base-uncased-vocab.txt"
    ours = WordPieceTokenizer.from_file(vocabulary)
    theirs = BertTokenizerLegacy(str(vocabulary), do_lower_case=True)
    files = sorted((DATA / "corpus").glob("*-train-*.jsonl.xz"))
    assert files, f"no corpus in {DATA}: set BIPFT_DATA"
    each = -(-10_000 // len(files))
    lines = [line for path in files for line in itertools.islice(lines_of(path), each)]
    assert len(lines) >= 10_000
    for line, ids in zip(lines, ours.encode_batch(lines), strict=True):
        assert ids == theirs.convert_tokens_to_ids(theirs.tokenize(line)), line
