"""A prepared pretraining corpus, opened.

A corpus is a directory with `corpus.json` (written last, so its presence means that the rest is
complete), `tokenizer.json`, `unigram.npy` and a TFDS dataset of blocks in ArrayRecord shards.
`python -m bipft_jax.data.corpus` makes one.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from bipft_jax.data.corpus import preparation as preparation
from bipft_jax.data.tokenizers import Tokenizer, load_tokenizer
from bipft_jax.paths import require_local


@dataclasses.dataclass(frozen=True)
class SplitInfo:
    """Counts of one split.

    Attributes:
      blocks: number of records.
      documents: documents with at least one block.
      sentences: sentences of these documents, before long ones were split.
      tokens: ids in all blocks; `unknown_tokens` of them are [UNK].
      same_document_probability: the chance that two random blocks belong to one document.
      raw_bytes: UTF-8 text read for this split.
      text_bytes: UTF-8 text of the documents with blocks; 0 in a corpus made before it was counted.
      split_sentences: sentences longer than a block, which were split.
      skipped_documents: documents with fewer than two sentences; `skipped_at` names a few.
    """

    blocks: int
    documents: int
    sentences: int
    tokens: int
    unknown_tokens: int
    same_document_probability: float
    raw_bytes: int
    split_sentences: int
    skipped_documents: int
    skipped_at: Sequence[str]
    text_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Corpus:
    """A corpus on disk.

    A record ("block") is `dict(document, tokens, sentence_lengths)`: the number of its document in
    the corpus (int64), the ids of consecutive sentences (int32[n], 2 <= n <= sequence_length - 3),
    and the lengths of these sentences (int32[m], with sum n). The records of a document are
    consecutive and in its order.

    Attributes:
      directory: path of the corpus.
      tokenizer: the tokenizer it was made with.
      sequence_length: length of an example, special pieces included.
      seed: the seed it was prepared with.
      splits: counts of "train" and "validation".
      unigram_counts: int64[vocab_size], how often each id occurs in the train split.
      objectives: names of the objectives that it serves; objectives_reason: why not others.
      identity: everything that determines its bytes (texts as digests), independent of its path; a
        run recognises its corpus by it.
    """

    directory: Path
    tokenizer: Tokenizer
    sequence_length: int
    seed: int
    splits: dict[str, SplitInfo]
    unigram_counts: np.ndarray
    identity: dict[str, Any]
    objectives: tuple[str, ...]
    objectives_reason: str

    def require(self, objective: str) -> None:
        """Raises ValueError if the corpus does not serve the objective of that name."""
        if objective not in self.objectives:
            raise ValueError(
                f"the corpus {self.directory} does not serve the objective {objective}, only "
                f"{' and '.join(self.objectives)}: {self.objectives_reason}"
            )

    def data_source(self, split: str) -> Sequence[dict[str, Any]]:
        """Random access to the records of "train" or "validation".

        Raises:
          ValueError: for another split.
        """
        if split not in self.splits:
            raise ValueError(f"The corpus has no split {split!r}; it has {sorted(self.splits)}.")
        return self._dataset.as_data_source(split=split)

    @functools.cached_property
    def _dataset(self) -> Any:
        return tfds.builder_from_directory(self.directory / preparation.BLOCKS)


def load_corpus(directory: str | os.PathLike[str]) -> Corpus:
    """Opens a prepared corpus.

    Raises:
      ValueError: if the directory does not exist, holds no complete corpus or one of another
        version of this library, lacks (part of) a file, as after an interrupted copy, or has the
        tokenizer or the counts of another corpus; for a URL such as gs://.
    """
    require_local({"corpus directory": directory})
    directory = Path(directory)
    remedy = "run `python -m bipft_jax.data.corpus --output DIR ...` (see its --help)"
    if not directory.is_dir():
        raise ValueError(f"There is no corpus directory {directory}: to make one, {remedy}.")
    if not (directory / preparation.METADATA).is_file():
        raise ValueError(
            f"{directory} has no {preparation.METADATA}: it was not prepared, or the preparation "
            f"was interrupted: {remedy}."
        )
    metadata = preparation.read_metadata(directory)
    sizes = preparation.file_sizes(directory / preparation.BLOCKS)
    for name, size in metadata["file_sizes"].items():
        if sizes.get(name) != size:
            state = f"{sizes[name]} bytes instead of" if name in sizes else "missing, with"
            raise ValueError(
                f"{directory / preparation.BLOCKS / name}: {state} {size} bytes. The corpus was "
                "damaged or copied incompletely: copy or prepare it again."
            )
    tokenizer = load_tokenizer(directory / preparation.TOKENIZER)
    # A fingerprint, or what `trained_tokenizer` reads.
    made_with = metadata["identity"]["tokenizer"]
    trained = preparation.trained_tokenizer(made_with)
    if (trained or made_with) not in (
        tokenizer.fingerprint,
        (tokenizer.vocab_size, tokenizer.keeps_text),
    ):
        raise ValueError(
            f"{directory / preparation.TOKENIZER} is not the tokenizer that the corpus was made "
            "with: its ids would be other words. Copy or prepare the corpus again."
        )
    counts = np.load(directory / preparation.UNIGRAMS)
    if counts.shape != (tokenizer.vocab_size,) or counts.dtype != np.int64 or counts.min() < 0:
        raise ValueError(
            f"{directory / preparation.UNIGRAMS} does not have a count for each of the "
            f"tokenizer's {tokenizer.vocab_size} ids. Copy or prepare the corpus again."
        )
    # Lists become digests, because texts are many. The counts are included because another version
    # of this library may cut the same texts differently.
    identity = {**metadata["identity"], "unigrams": counts.tolist()}
    return Corpus(
        directory=directory,
        tokenizer=tokenizer,
        sequence_length=metadata["identity"]["sequence_length"],
        seed=metadata["identity"]["seed"],
        splits={name: SplitInfo(**counts) for name, counts in metadata["splits"].items()},
        unigram_counts=counts,
        # Corpora had no such keys before a tokenizer could keep the text.
        objectives=tuple(metadata.get("objectives", preparation.OBJECTIVES)),
        objectives_reason=metadata.get("objectives_reason", ""),
        identity={
            name: _digest(value) if isinstance(value, list) else value
            for name, value in identity.items()
        },
    )


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
