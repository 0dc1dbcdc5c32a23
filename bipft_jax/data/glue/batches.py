"""GLUE examples as token ids, and the training and evaluation batches made of them.

An example is `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`, token type 1 for `B [SEP]`. A batch is a
dict of input_ids, token_type_ids, attention_mask int32[B, S], labels int32[B] (float32[B] for
regression) and weights float32[B], 0 for padding rows of the last evaluation batch.

S is one of a few padded lengths, because each one compiles. With several padded lengths, a batch
holds sentences of similar length, so that short ones are not padded to the longest.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from bipft_jax.data.glue.tasks import GlueSplit
from bipft_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
    """A split as token ids, stored without padding; `batch` pads.

    Attributes:
        tokens: int32[T], all examples concatenated, each `[CLS] A [SEP]` or
            `[CLS] A [SEP] B [SEP]`.
        offsets: int64[N + 1]; example i is `tokens[offsets[i]:offsets[i + 1]]`.
        first_lengths: int32[N]; number of tokens of type 0: `[CLS] A [SEP]`.
        labels: int32[N] or float32[N].
        padded_lengths: the lengths S that batches are padded to, ascending; each batch takes the
            first that fits its longest example.
        pad_id: the tokenizer's padding id.
        truncated: examples that were cut to fit.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    first_lengths: np.ndarray
    labels: np.ndarray
    padded_lengths: tuple[int, ...]
    pad_id: int
    truncated: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """int64[N]; tokens of each example."""
        return np.diff(self.offsets)

    def batch(self, indices: Sequence[int] | np.ndarray, real_rows: int) -> dict[str, np.ndarray]:
        """The examples at `indices` as one padded batch.

        Returns:
            input_ids, token_type_ids, attention_mask int32[B, S], labels [B] and weights
            float32[B]: 1 for the first `real_rows` rows, 0 for the others.
        """
        indices = np.asarray(indices)
        # Not `lengths`, which computes those of the whole split.
        longest = (self.offsets[indices + 1] - self.offsets[indices]).max()
        shape = (len(indices), next(n for n in self.padded_lengths if n >= longest))
        input_ids = np.full(shape, self.pad_id, np.int32)
        token_type_ids = np.zeros(shape, np.int32)
        attention_mask = np.zeros(shape, np.int32)
        for row, index in enumerate(indices):
            tokens = self.tokens[self.offsets[index] : self.offsets[index + 1]]
            input_ids[row, : len(tokens)] = tokens
            token_type_ids[row, self.first_lengths[index] : len(tokens)] = 1
            attention_mask[row, : len(tokens)] = 1
        return {
            "input_ids": input_ids,
            "token_type_ids": token_type_ids,
            "attention_mask": attention_mask,
            "labels": self.labels[indices],
            "weights": (np.arange(len(indices)) < real_rows).astype(np.float32),
        }


def encode(split: GlueSplit, tokenizer: Tokenizer, max_length: int) -> EncodedSplit:
    """Tokenizes a split, adding [CLS] and [SEP] and cutting examples to `max_length` tokens.

    A pair is cut "longest first", as in Hugging Face's fast tokenizers. The result has one padded
    length: the longest example's, rounded up to a multiple of 8 and at most `max_length`.

    Raises:
        ValueError: if `max_length` leaves no room for one token of each sentence.
    """
    specials = 2 if split.sentences2 is None else 3
    if max_length < 2 * specials - 1:
        raise ValueError(
            f"max_length={max_length} leaves no room for text: task {split.task.name} needs "
            f"{specials} special tokens and at least one token of each sentence"
        )
    room = max_length - specials
    cls, sep = [tokenizer.cls_id], [tokenizer.sep_id]
    encoded1 = tokenizer.encode_batch(split.sentences1)
    encoded2 = None if split.sentences2 is None else tokenizer.encode_batch(split.sentences2)
    examples: list[np.ndarray] = []
    first_lengths = np.empty(len(split), np.int32)
    truncated = 0
    for i, a in enumerate(encoded1):
        b = [] if encoded2 is None else encoded2[i]
        length1, length2 = (
            (min(len(a), room), 0)
            if encoded2 is None
            else longest_first_lengths(len(a), len(b), room)
        )
        truncated += length1 < len(a) or length2 < len(b)
        ids = cls + a[:length1] + sep
        first_lengths[i] = len(ids)
        if encoded2 is not None:
            ids += b[:length2] + sep
        examples.append(np.asarray(ids, np.int32))
    lengths = [len(example) for example in examples]
    return EncodedSplit(
        tokens=np.concatenate(examples),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        first_lengths=first_lengths,
        labels=split.labels,
        padded_lengths=(min(max_length, _multiple_of_8(max(lengths))),),
        pad_id=tokenizer.pad_id,
        truncated=int(truncated),
    )


def longest_first_lengths(length1: int, length2: int, room: int) -> tuple[int, int]:
    """The number of tokens of each sentence of a pair to keep, so that both fit in `room`.

    The longer sentence is cut until both have equal length; an odd remaining token goes to the one
    that was longer (the second, if neither was). This is `truncation="longest_first"` of Hugging
    Face's `tokenizers` library, which the reference uses.
    """
    if length1 + length2 <= room:
        return length1, length2
    shorter, longer = sorted((length1, length2))
    # The shorter sentence stays whole if what is left is at least as long as it.
    if 2 * shorter <= room:
        longer = room - shorter
    else:
        shorter, longer = room // 2, room - room // 2
    return (longer, shorter) if length1 > length2 else (shorter, longer)


# --- batches -------------------------------------------------------------------------------------

_WINDOW = 50  # batches within which examples are grouped by length, as in Hugging Face's trainer
_WINDOWS_IN_EPOCH = 4  # at least


def padded_lengths(longest: int, count: int) -> tuple[int, ...]:
    """At most `count` padded lengths, ascending: `longest`, its half, quarter, ..., rounded up to
    multiples of 8."""
    shorter = {_multiple_of_8(-(-longest // 2**halvings)) for halvings in range(1, count)}
    return (*sorted(n for n in shorter if n < longest), longest)


def updates_for_epochs(num_examples: int, batch_size: int, epochs: int) -> int:
    """The number of updates in which every example is seen `epochs` times, rounded up."""
    return -(-num_examples * epochs // batch_size)


def train_batches(
    encoded: EncodedSplit, batch_size: int, seed: int, num_updates: int, start_update: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Shuffled training batches of the updates `start_update` (0-based) to `num_updates` - 1.

    Batches are consecutive pieces of one stream: a new permutation of the split for every epoch,
    drawn from (seed, epoch). So each example occurs once per epoch, no batch is short, and a batch
    may span two epochs. With several padded lengths, the examples of a window of batches (at most a
    quarter of an epoch) are sorted by length and cut into batches, which are then shuffled; a
    window that spans two epochs mixes their examples.

    Batch u depends only on seed, u and `num_updates`, where the last window ends, so a resumed run
    gets the same batches. Every process of a multi-host run makes the same global batch.
    """
    window = 1
    if len(encoded.padded_lengths) > 1:
        window = max(min(len(encoded) // (_WINDOWS_IN_EPOCH * batch_size), _WINDOW), 1)
    for first in range(start_update // window * window, num_updates, window):
        last = min(first + window, num_updates)
        batches = _stream(len(encoded), seed, first * batch_size, last * batch_size)
        if window > 1:
            batches = batches[np.argsort(encoded.lengths[batches], kind="stable")]
        batches = batches.reshape(-1, batch_size)
        if window > 1:  # the third number separates these draws from an epoch's
            np.random.default_rng((seed, first, 1)).shuffle(batches)
        for indices in batches[max(start_update - first, 0) :]:
            yield encoded.batch(indices, real_rows=batch_size)


def _stream(num_examples: int, seed: int, start: int, stop: int) -> np.ndarray:
    """int64[stop - start]; the examples at positions start, ..., stop - 1 of the endless stream."""
    epochs = range(start // num_examples, -(-stop // num_examples))
    orders = [np.random.default_rng((seed, e)).permutation(num_examples) for e in epochs]
    begin = epochs.start * num_examples
    return np.concatenate(orders)[start - begin : stop - begin]


def evaluation_batches(
    encoded: EncodedSplit, batch_size: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
    """Yields (example numbers, batch) until every example occurred once, short ones first. The last
    batch is padded with copies of its last example, with weight 0 and without a number (a row of
    only padding would leave attention without a valid key)."""
    order = np.argsort(encoded.lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        filled = np.pad(numbers, (0, batch_size - len(numbers)), mode="edge")
        yield numbers, encoded.batch(filled, len(numbers))


def _multiple_of_8(length: int) -> int:
    return -(-length // 8) * 8
