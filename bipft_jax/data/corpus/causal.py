"""Sequences for causal language modelling, cut from the blocks of a corpus.

The text of a split is one stream: the tokens of its blocks in their order, and a [SEP] after each
document. Example `p` (any integer >= 0) is a pure function of (seed, p) and the blocks: an epoch
cuts the stream into windows of S + 1 tokens that share their ends, from an offset of its own, and
has its own permutation of the windows. So a run resumes by counting batches, and the data do not
depend on the number of hosts or workers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bipft_jax.data.corpus.orders import permutation

if TYPE_CHECKING:
    from bipft_jax.data.corpus.corpus import Corpus

Block = Mapping[str, Any]  # the record of bipft_jax.data.corpus: document, tokens, sentence_lengths
Example = dict[str, np.ndarray]

_READ_AT_A_TIME = 4096  # blocks, when their lengths are counted


class CausalExamples:
    """Random access to the endless sequence of examples; see the module's docstring.

    An example has static shapes, with S = sequence_length: input_ids, target_ids (each input's next
    token) and segment_ids int32[S], target_weights float32[S] (1: every position has a target). A
    batch adds a leading axis. segment_ids are 1; with `separate_documents` they count the documents
    of the example from 1, so that attention does not cross their ends.

    Instances are thread-safe, and can be pickled (for worker processes) if `blocks` can.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        sequence_length: int,
        end_id: int,
        seed: int,
        separate_documents: bool = False,
    ):
        """Reads all blocks once, for their lengths.

        Arguments:
          blocks: random-access sequence of records with `document` (int) and `tokens` (int[n]);
            those of a document are consecutive. Read in batches through `__getitems__` if it has
            that method.
          sequence_length: S.
          end_id: the token after each document.
          seed: any integer in [0, 2**64); determines offsets and order.

        Raises: ValueError if the text is shorter than two sequences.
        """
        self.sequence_length = sequence_length
        self.separate_documents = separate_documents
        self.seed = seed
        self._blocks, self._end_id = blocks, end_id
        lengths, documents = [], []
        for first in range(0, len(blocks), _READ_AT_A_TIME):
            for block in self._read(range(first, min(first + _READ_AT_A_TIME, len(blocks)))):
                lengths.append(len(block["tokens"]))
                documents.append(int(block["document"]))
        # Whether a document ends with the block.
        self._ends = np.append(np.diff(documents) != 0, True)
        self._starts = np.concatenate([[0], np.cumsum(np.asarray(lengths) + self._ends)])
        total = int(self._starts[-1])
        # One window less than fit, so that the count does not depend on an epoch's offset.
        self._windows = (total - 1) // sequence_length - 1
        if self._windows < 1:
            raise ValueError(
                f"the text has {total} tokens: causal language modelling needs at least two "
                f"sequences of {sequence_length} and one token more"
            )

    @classmethod
    def from_corpus(
        cls, corpus: Corpus, split: str, *, seed: int, separate_documents: bool = False
    ) -> CausalExamples:
        """The examples of one split ("train" or "validation") of a prepared corpus."""
        return cls(
            corpus.data_source(split),
            sequence_length=corpus.sequence_length,
            end_id=corpus.tokenizer.sep_id,
            seed=seed,
            separate_documents=separate_documents,
        )

    def __len__(self) -> int:
        """Examples per epoch."""
        return self._windows

    def stream(self) -> np.ndarray:
        """The whole text, with the end of each document: int32 [N]."""
        parts = []
        for first in range(0, len(self._blocks), _READ_AT_A_TIME):
            indices = range(first, min(first + _READ_AT_A_TIME, len(self._blocks)))
            for index, block in zip(indices, self._read(indices)):
                parts.append(self._with_end(block["tokens"], self._ends[index]))
        return np.concatenate(parts).astype(np.int32)

    def at(self, positions: Sequence[int] | np.ndarray) -> Example:
        """The examples at `positions` (at least one; >= 0, below 2**63), stacked."""
        epochs, windows = np.divmod(np.asarray(positions), self._windows)
        starts = np.empty(len(epochs), np.int64)
        for epoch in np.unique(epochs).tolist():
            order, offset = self._order_of_epoch(epoch)
            here = np.flatnonzero(epochs == epoch)
            starts[here] = [order(index) for index in windows[here].tolist()]
            starts[here] = starts[here] * self.sequence_length + offset
        tokens, documents = self._cut(starts)
        segments = np.ones_like(documents)
        if self.separate_documents:
            segments += documents - documents[:, :1]
        return {
            "input_ids": tokens[:, :-1],
            "target_ids": tokens[:, 1:],
            "target_weights": np.ones(tokens[:, 1:].shape, np.float32),
            "segment_ids": segments[:, :-1],
        }

    def _order_of_epoch(self, epoch: int) -> tuple[Callable[[int], int], int]:
        """A permutation of the windows, and the place of the first in the stream."""
        entropy, of_offset = np.random.SeedSequence((self.seed, epoch)).spawn(2)
        offset = int(of_offset.generate_state(1)[0]) % self.sequence_length
        return permutation(self._windows, entropy), offset

    def _cut(self, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The S + 1 tokens from each place of the stream, and how many documents ended before
        each: int32 [starts, S + 1]."""
        length = self.sequence_length + 1
        first = np.searchsorted(self._starts, starts, side="right") - 1
        last = np.searchsorted(self._starts, starts + length)
        blocks = iter(self._read([i for a, b in zip(first, last) for i in range(a, b)]))
        shape = len(starts), length
        tokens, documents = np.empty(shape, np.int32), np.empty(shape, np.int32)
        for row, start in enumerate(starts.tolist()):
            mine = range(first[row], last[row])
            read = [self._with_end(next(blocks)["tokens"], self._ends[i]) for i in mine]
            ends = self._ends[mine.start : mine.stop].astype(np.int32)
            ended = np.cumsum(ends) - ends
            begin = start - int(self._starts[mine.start])
            tokens[row] = np.concatenate(read)[begin : begin + length]
            ended = np.repeat(ended, [len(part) for part in read])
            documents[row] = ended[begin : begin + length]
        return tokens, documents

    def _with_end(self, tokens: np.ndarray, ends: bool) -> np.ndarray:
        return np.append(tokens, self._end_id) if ends else np.asarray(tokens)

    def _read(self, indices: Sequence[int]) -> list[Block]:
        if hasattr(self._blocks, "__getitems__"):
            return self._blocks.__getitems__(list(indices))
        return [self._blocks[index] for index in indices]
