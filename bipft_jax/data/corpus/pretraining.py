"""MLM + NSP pretraining examples, made on the fly from the blocks of a corpus.

Example `p` (any integer >= 0) is a pure function of (seed, p) and the blocks. So a run resumes by
counting batches, and the data do not depend on the number of hosts or workers:

1. `epoch, i = divmod(p // 2, pairs per epoch)`. Every epoch has its own permutation of the blocks;
   blocks X and Y at positions 2i and 2i + 1 of it make examples 2i and 2i + 1 of the epoch. An
   epoch uses every block once; with an odd number of blocks it omits a random one.
2. Both blocks are cut in two. The pair is either "is next": (X1, X2), (Y1, Y2); or "swapped":
   (X1, Y2), (Y1, X2). Swapping loses no text, unlike drawing the second segment from the corpus.
3. A fraction of the ordinary tokens (BERT: 15 %) is predicted: 80 % of them are replaced by [MASK],
   10 % by a random ordinary token, 10 % are unchanged (Devlin et al. 2019, section 3.1 and
   appendix A.1).

Neither the lengths of the segments nor a cut within a sentence may reveal the NSP label. Therefore
both cuts of a pair are chosen jointly, before the swap is decided: at sentence boundaries for which
a swap (nearly) keeps the pair's lengths, or, if no such boundaries exist (as in a block of one long
sentence), both within a sentence, after the same number of tokens.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import grain
import numpy as np
from absl import flags

from bipft_jax.data.corpus.orders import permutation

if TYPE_CHECKING:
    from bipft_jax.data.corpus.corpus import Corpus
    from bipft_jax.data.tokenizers import Tokenizer

Block = Mapping[str, Any]  # the record of bipft_jax.data.corpus: document, tokens, sentence_lengths
Example = dict[str, np.ndarray]

BERT_MASKING_RATE = 0.15
_MASK_SHARE, _RANDOM_SHARE = 0.8, 0.1  # the remaining 10 % of the targets stay as they are
_LENGTH_TOLERANCE = 8  # tokens; changes of length up to this count as none when cuts are compared
_DRAWS_PER_PAIR = 2  # uniform numbers for cuts and swap; see `_segments`
_ENDLESS = 2**62


def max_predictions(sequence_length: int, masking_rate: float = BERT_MASKING_RATE) -> int:
    """P, the maximum number of MLM targets of an example: masking_rate * sequence_length, rounded
    up (ignoring float64 rounding errors)."""
    return math.ceil(round(sequence_length * masking_rate, 9))


class PretrainingExamples:
    """Random access to the endless sequence of examples; see the module's docstring.

    An example has static shapes, with S = sequence_length and P = max_predictions(S, masking_rate):
    input_ids, token_type_ids, attention_mask int32[S]; mlm_positions int32[P] (ascending),
    mlm_ids int32[P] (the original tokens), mlm_weights float32[P] (1 for a target; 0 for padding,
    where position and id are 0 too); nsp_labels int32[] (0: B follows A; 1: B is from another
    document). A batch adds a leading axis.

    On average, half of all examples have label 1. Two blocks of one document are never swapped, so
    pairs from two documents are swapped with probability 0.5 / (1 - s), where s is the probability
    that both blocks are from one document. If s > 0.5 (one document dominates), it is capped at 1,
    and only a fraction 1 - s of the examples has label 1. `random_next_share` is the expected
    fraction.

    Instances are thread-safe, and can be pickled (for worker processes) if `blocks` can.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        seed: int,
        masking_rate: float = BERT_MASKING_RATE,
        same_document_probability: float | None = None,
    ):
        """Makes the examples of `blocks`.

        Args:
          blocks: random-access sequence of records with `document` (int), `tokens` (int[n],
            2 <= n <= sequence_length - 3) and `sentence_lengths` (int[m], m >= 1, of sum n). Read
            in batches through `__getitems__` if it has that method.
          tokenizer: only its vocab_size and special ids are used.
          sequence_length: S, tokens per example including [CLS] and two [SEP].
          seed: any integer in [0, 2**64); determines order, cuts, swaps and masks.
          masking_rate: fraction of the ordinary tokens that are MLM targets, in (0, 1).
          same_document_probability: sum over documents of (fraction of the blocks)**2, as a corpus
            records it. If None, counted by reading all of `blocks`.

        Raises:
          ValueError: for fewer than two blocks, a sequence_length < 5, or a seed or masking_rate
            out of range.
        """
        if len(blocks) < 2:
            raise ValueError(f"next-sentence prediction needs two blocks, there are {len(blocks)}")
        if sequence_length < 5:
            raise ValueError(f"sequence_length must be at least 5, got {sequence_length}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be in [0, 2**64), got {seed}")
        if not 0 < masking_rate < 1:
            raise ValueError(f"masking_rate must be between 0 and 1, got {masking_rate}")
        self.sequence_length = sequence_length
        self.masking_rate = masking_rate
        self.max_predictions = max_predictions(sequence_length, masking_rate)
        self.seed = seed
        self._blocks = blocks
        self._pad_id, self._mask_id = tokenizer.pad_id, tokenizer.mask_id
        self._cls_id, self._sep_id = tokenizer.cls_id, tokenizer.sep_id
        self._ordinary = np.ones(tokenizer.vocab_size, bool)
        self._ordinary[list(tokenizer.special_ids)] = False
        self._ordinary_ids = np.flatnonzero(self._ordinary).astype(np.int32)

        count = len(blocks)
        if same_document_probability is None:
            documents = collections.Counter(int(block["document"]) for block in blocks)
            same_document_probability = sum((c / count) ** 2 for c in documents.values())
        # The argument is for two draws with replacement; a pair is drawn without.
        self._same_document_share = max(0.0, (same_document_probability * count - 1) / (count - 1))
        self.random_next_share = min(0.5, 1 - self._same_document_share)

    @classmethod
    def from_corpus(
        cls, corpus: Corpus, split: str, *, seed: int, masking_rate: float = BERT_MASKING_RATE
    ) -> PretrainingExamples:
        """The examples of one split ("train" or "validation") of a prepared corpus."""
        return cls(
            corpus.data_source(split),
            corpus.tokenizer,
            sequence_length=corpus.sequence_length,
            seed=seed,
            masking_rate=masking_rate,
            same_document_probability=corpus.splits[split].same_document_probability,
        )

    def __len__(self) -> int:
        """Examples per epoch (even)."""
        return len(self._blocks) // 2 * 2

    def example(self, position: int) -> Example:
        """Example `position` (>= 0) of the endless sequence; its epoch is position // len(self)."""
        return {name: values[0] for name, values in self.batch(position, position + 1).items()}

    def batch(self, start: int, stop: int) -> Example:
        """Examples start, ..., stop - 1 (0 <= start < stop), stacked."""
        return self.at(range(start, stop))

    def at(self, positions: Sequence[int] | np.ndarray) -> Example:
        """The examples at `positions` (at least one; >= 0, ascending, below 2**63), stacked."""
        positions = np.asarray(positions)
        if len(positions) == 0 or positions[0] < 0 or (np.diff(positions) < 1).any():
            raise ValueError(f"positions must be one or more, from 0, ascending, not {positions}")
        # Makes both examples of every pair, and drops those not requested.
        pairs, pair_of_example = np.unique(positions // 2, return_inverse=True)
        kept = 2 * pair_of_example + positions % 2
        pair_draws, example_draws = self._uniform_numbers(pairs)
        segments = []
        for (x, y), draws in zip(self._read_pairs(pairs), pair_draws.tolist(), strict=True):
            segments += self._segments(x, y, draws)
        batch = self._assemble([segments[example] for example in kept])
        self._mask(batch, example_draws[kept])
        return batch

    def _uniform_numbers(self, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers in [0, 1) that depend only on the seed and the pair's number.

        Every pair owns a fixed range of one counter-based stream, so that consecutive pairs are
        generated in one call.

        Returns:
          float64[pairs, _DRAWS_PER_PAIR] and float64[2 * pairs, S + 2 * P].
        """
        per_example = self.sequence_length + 2 * self.max_predictions
        words = _DRAWS_PER_PAIR + 2 * per_example
        words += -words % 4  # Philox's counter advances once per four words
        runs = np.split(pairs, np.flatnonzero(np.diff(pairs) > 1) + 1)
        raw = [
            np.random.Philox(key=self.seed, counter=int(run[0]) * (words // 4)).random_raw(
                len(run) * words
            )
            for run in runs
        ]
        uniform = (np.concatenate(raw) >> np.uint64(11)) * 2.0**-53
        uniform = uniform.reshape(len(pairs), words)
        for_examples = uniform[:, _DRAWS_PER_PAIR : _DRAWS_PER_PAIR + 2 * per_example]
        return uniform[:, :_DRAWS_PER_PAIR], for_examples.reshape(2 * len(pairs), per_example)

    def _order_of_epoch(self, epoch: int) -> Callable[[int], int]:
        """A random permutation of the blocks, as a function from position to block index."""
        return permutation(len(self._blocks), np.random.SeedSequence((self.seed, epoch)))

    def _read_pairs(self, pairs: np.ndarray) -> list[tuple[Block, Block]]:
        indices: list[int] = []
        known_epoch = None
        for pair in pairs.tolist():
            epoch, i = divmod(pair, len(self) // 2)
            if epoch != known_epoch:
                known_epoch, block_at = epoch, self._order_of_epoch(epoch)
            indices += [block_at(2 * i), block_at(2 * i + 1)]
        if hasattr(self._blocks, "__getitems__"):
            blocks = self._blocks.__getitems__(indices)
        else:
            blocks = [self._blocks[index] for index in indices]
        room = self.sequence_length - 3
        for index, block in zip(indices, blocks, strict=True):
            if not 2 <= len(block["tokens"]) <= room:
                raise ValueError(
                    f"block {index} has {len(block['tokens'])} tokens: it must have at least 2, to "
                    f"be cut in two, and at most {room}, for sequence_length {self.sequence_length}"
                )
        return list(zip(blocks[::2], blocks[1::2], strict=True))

    def _segments(
        self, x: Block, y: Block, draws: list[float]
    ) -> list[tuple[np.ndarray, np.ndarray, int]]:
        """(A, B, NSP label) of the two examples of one pair; A and B fit into S - 3 tokens."""
        x_tokens, y_tokens = x["tokens"], y["tokens"]
        cut_x, cut_y = self._cuts(x["sentence_lengths"], y["sentence_lengths"], draws[0])
        x1, x2, y1, y2 = x_tokens[:cut_x], x_tokens[cut_x:], y_tokens[:cut_y], y_tokens[cut_y:]
        # `draws[1] * (1 - share) < 0.5` is `draws[1] < swap probability`, cap included.
        if x["document"] != y["document"] and draws[1] * (1 - self._same_document_share) < 0.5:
            return [(x1, y2, 1), (y1, x2, 1)]
        return [(x1, x2, 0), (y1, y2, 0)]

    def _cuts(self, x_lengths: np.ndarray, y_lengths: np.ndarray, u: float) -> tuple[int, int]:
        """Chooses the cuts of X and Y such that a swap fits and (nearly) keeps the pair's lengths.

        A swap turns the lengths |X|, |Y| into |Y| + d and |X| - d with d = cut_x - cut_y. The two
        lengths stay the same if d is 0 or |X| - |Y|. The candidates are the pairs of sentence
        boundaries that fit and change the lengths least (changes up to _LENGTH_TOLERANCE count as
        none). If no pair fits, d is 0, with both cuts within a sentence if possible: a whole A
        before a B that begins within a sentence would reveal a swap. u in [0, 1) chooses among the
        candidates.
        """
        x_ends, y_ends = np.cumsum(x_lengths), np.cumsum(y_lengths)
        x_size, y_size = x_ends[-1], y_ends[-1]
        d = x_ends[:-1, None] - y_ends[:-1]
        room = self.sequence_length - 3
        fits = (y_size + d <= room) & (x_size - d <= room)
        if fits.any():
            change = np.minimum(abs(d), abs(d - (x_size - y_size)))
            cost = np.maximum(change, _LENGTH_TOLERANCE)
            best = np.flatnonzero(fits & (cost == cost[fits].min()))
            i, j = divmod(int(best[int(u * len(best))]), len(y_ends) - 1)
            return int(x_ends[i]), int(y_ends[j])
        shorter = min(x_size, y_size)
        every = np.arange(1, shorter)
        places = np.setdiff1d(every, np.union1d(x_ends, y_ends))
        if len(places) == 0:
            places = every
        cut = int(places[int(u * len(places))])
        return cut, cut

    def _assemble(self, segments: Sequence[tuple[np.ndarray, np.ndarray, int]]) -> Example:
        """[CLS] A [SEP] B [SEP] and padding."""
        shape = (len(segments), self.sequence_length)
        input_ids = np.full(shape, self._pad_id, np.int32)
        token_type_ids = np.zeros(shape, np.int32)
        attention_mask = np.zeros(shape, np.int32)
        input_ids[:, 0] = self._cls_id
        for row, (a, b, _) in enumerate(segments):
            b_start = len(a) + 2
            end = b_start + len(b) + 1
            input_ids[row, 1 : b_start - 1] = a
            input_ids[row, b_start - 1] = self._sep_id
            input_ids[row, b_start : end - 1] = b
            input_ids[row, end - 1] = self._sep_id
            token_type_ids[row, b_start:end] = 1
            attention_mask[row, :end] = 1
        return {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "attention_mask": attention_mask,
            "nsp_labels": np.array([label for _, _, label in segments], np.int32),
        }

    def _mask(self, batch: Example, draws: np.ndarray) -> None:
        """Chooses the MLM targets, hides them in input_ids (in place) and adds mlm_*.

        Special tokens ([UNK] included) are never targets and never drawn as random tokens.
        `draws`: float64[B, S + 2 * P].
        """
        size, slots = self.sequence_length, self.max_predictions
        input_ids = batch["input_ids"]
        candidate = self._ordinary[input_ids]
        candidates = candidate.sum(axis=1)
        # As in BERT, at least one target, unless all tokens are special.
        targets = np.clip(np.rint(candidates * self.masking_rate), 1, slots)
        targets = np.minimum(targets, candidates)
        # The candidates with the smallest draws are a uniformly random subset. The sort is stable,
        # so that the order of equal keys does not depend on the machine.
        order = np.argsort(np.where(candidate, draws[:, :size], 1.0), axis=1, kind="stable")
        used = np.arange(slots) < targets[:, None]
        positions = np.sort(np.where(used, order[:, :slots], size), axis=1)
        positions[~used] = 0
        original = np.where(used, np.take_along_axis(input_ids, positions, axis=1), 0)

        treatment, choice = draws[:, size : size + slots], draws[:, size + slots :]
        random_ids = self._ordinary_ids[(choice * len(self._ordinary_ids)).astype(np.int64)]
        shown = np.where(treatment < _MASK_SHARE + _RANDOM_SHARE, random_ids, original)
        shown = np.where(treatment < _MASK_SHARE, self._mask_id, shown)
        rows, columns = np.nonzero(used)
        input_ids[rows, positions[rows, columns]] = shown[rows, columns]
        batch["mlm_positions"] = positions.astype(np.int32)
        batch["mlm_ids"] = original
        batch["mlm_weights"] = used.astype(np.float32)


class _Batches:
    """Random access to some rows of the global batches, starting at start_batch."""

    def __init__(
        self,
        examples: PretrainingExamples,
        batch_size: int,
        start_batch: int,
        num_batches: int,
        rows: np.ndarray,
    ):
        self._examples = examples
        self._batch_size = batch_size
        self._start_batch = start_batch
        self._num_batches = num_batches
        self._rows = rows

    def __len__(self) -> int:
        return self._num_batches

    def __getitem__(self, index: int) -> Example:
        start = (self._start_batch + index) * self._batch_size
        return self._examples.at(start + self._rows)


def pretraining_batches(
    examples: PretrainingExamples,
    batch_size: int,
    start_batch: int = 0,
    num_batches: int | None = None,
    rows: Sequence[int] | np.ndarray | None = None,
    num_workers: int = 0,
) -> Iterator[Example]:
    """Batches of examples, prefetched in the background.

    Global batch b is examples [b * batch_size, (b + 1) * batch_size). A process makes only the rows
    that its devices hold, so the data do not depend on the number of processes or workers. A run
    resumes after s batches with start_batch = s.

    Args:
      examples: the source of the examples.
      batch_size: examples in a global batch.
      start_batch: b of the first batch.
      num_batches: batches to yield; None for endlessly many.
      rows: rows of each global batch to make, ascending; None for all.
      num_workers: worker processes on this host; 0 for one thread of this process, which suffices
        up to some thousand examples per second. Workers are spawned: a script that uses them needs
        the usual `if __name__ == "__main__":`.

    Returns:
      A generator of dicts of numpy arrays with len(rows) rows (see PretrainingExamples). Its
      `close()`, also called on garbage collection, ends threads and worker processes.

    Raises:
      ValueError: for a batch_size that is not positive, rows outside the batch, or a negative
        number.
    """
    rows = np.arange(batch_size) if rows is None else np.asarray(rows)
    ascending = len(rows) and (np.diff(rows) > 0).all()
    if not ascending or rows[0] < 0 or rows[-1] >= batch_size:
        raise ValueError(f"a batch of {batch_size} has no rows {rows} (at least one, ascending)")
    if start_batch < 0 or num_workers < 0 or (num_batches is not None and num_batches < 0):
        raise ValueError(
            f"start_batch ({start_batch}), num_batches ({num_batches}) and num_workers "
            f"({num_workers}) must not be negative"
        )
    batches = _Batches(
        examples, batch_size, start_batch, _ENDLESS if num_batches is None else num_batches, rows
    )
    return _iterate(batches, num_workers)


def _iterate(batches: _Batches, num_workers: int) -> Iterator[Example]:
    if len(batches) == 0:
        return
    # One thread: more would only wait for the GIL (Python and numpy on small arrays).
    one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    dataset = grain.MapDataset.source(batches).to_iter_dataset(one_thread)
    if num_workers:
        if not flags.FLAGS.is_parsed():
            # grain's workers read absl flags, which a notebook has not parsed.
            flags.FLAGS.mark_as_parsed()
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=2)
        dataset = dataset.mp_prefetch(options)
    iterator = iter(dataset)
    try:
        yield from iterator
    finally:
        iterator.close()
