"""GLUE examples as token ids, and the training and evaluation batches made of them.

An example is `[CLS] A [SEP]` or `[CLS] A [SEP] B [SEP]`, token type 1 for `B [SEP]`. A batch is a
dict of input_ids, token_type_ids, attention_mask int32[B, S], labels int32[B] (float32[B] for
regression) and weights float32[B], 0 for the rows that only fill up the last evaluation batch.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from bipft_jax.data.glue import GlueSplit
from bipft_jax.data.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class EncodedSplit:
    """A split as token ids, kept without padding: rows are padded when a batch is made.

    Attributes:
        tokens: int32[T], all examples one after the other, each `[CLS] A [SEP]` or
            `[CLS] A [SEP] B [SEP]`.
        offsets: int64[N + 1]; example i is `tokens[offsets[i]:offsets[i + 1]]`.
        first_lengths: int32[N]; tokens of token type 0: `[CLS] A [SEP]`.
        labels: int32[N] or float32[N].
        sequence_length: the padded length S of every batch (so that a step compiles once).
        pad_id: the tokenizer's padding id.
        truncated: examples that were cut to fit.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    first_lengths: np.ndarray
    labels: np.ndarray
    sequence_length: int
    pad_id: int
    truncated: int

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Sequence[int] | np.ndarray, real_rows: int) -> dict[str, np.ndarray]:
        """The examples at `indices` as one padded batch.

        Returns:
            input_ids, token_type_ids, attention_mask int32[B, S], labels [B] and weights
            float32[B]: 1 for the first `real_rows` rows, 0 for the others.
        """
        shape = (len(indices), self.sequence_length)
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
            "labels": self.labels[np.asarray(indices)],
            "weights": (np.arange(len(indices)) < real_rows).astype(np.float32),
        }


def encode(split: GlueSplit, tokenizer: Tokenizer, max_length: int) -> EncodedSplit:
    """Tokenizes a split, adding [CLS] and [SEP] and cutting examples to `max_length` tokens.

    A pair is cut "longest first", as Hugging Face's fast tokenizers do. The padded length is the
    longest example's, rounded up to a multiple of 8 and at most `max_length`.

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
    lengths = np.array([len(example) for example in examples])
    return EncodedSplit(
        tokens=np.concatenate(examples),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        first_lengths=first_lengths,
        labels=split.labels,
        sequence_length=min(max_length, -(-int(lengths.max()) // 8) * 8),
        pad_id=tokenizer.pad_id,
        truncated=int(truncated),
    )


def longest_first_lengths(length1: int, length2: int, room: int) -> tuple[int, int]:
    """How many tokens of each sentence of a pair to keep so that together they fit in `room`.

    Only the longer one is cut until both are of one length; an odd token left over goes to the
    one that was longer (the second, if neither was). This is `truncation="longest_first"` of
    Hugging Face's `tokenizers` library, which the reference uses.
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


def updates_for_epochs(num_examples: int, batch_size: int, epochs: int) -> int:
    """Updates of `batch_size` examples until every example was seen `epochs` times, rounded up."""
    return -(-num_examples * epochs // batch_size)


def train_batches(
    encoded: EncodedSplit, batch_size: int, seed: int, start_update: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Endless shuffled training batches, beginning with that of update `start_update` (0-based).

    The batches cut one long stream of examples into equal pieces; the stream is a fresh
    permutation of the split for every epoch, drawn from (seed, epoch). So each example comes once
    per epoch, no batch is short, one that crosses the end of an epoch takes its rest from the
    next, and batch u depends on nothing but (seed, u): a resumed run goes on exactly where it
    stopped. Every process of a multi-host run makes the same global batch.
    """
    num_examples = len(encoded)
    rows = np.arange(batch_size)
    epoch, order = -1, np.empty(0, np.int64)
    update = start_update
    while True:
        stream = update * batch_size + rows
        indices = np.empty(batch_size, np.int64)
        # Usually one epoch, two at a boundary, more only if the split is smaller than a batch.
        for needed in np.unique(stream // num_examples):
            if needed != epoch:
                epoch = int(needed)
                order = np.random.default_rng((seed, epoch)).permutation(num_examples)
            here = stream // num_examples == epoch
            indices[here] = order[stream[here] % num_examples]
        yield encoded.batch(indices, real_rows=batch_size)
        update += 1


def evaluation_batches(encoded: EncodedSplit, batch_size: int) -> Iterator[dict[str, np.ndarray]]:
    """All examples once, in file order. The last batch is filled up by repeating the last example
    with weight 0 (a row of padding alone would leave attention without a valid key)."""
    for start in range(0, len(encoded), batch_size):
        indices = np.arange(start, start + batch_size)
        real_rows = min(batch_size, len(encoded) - start)
        yield encoded.batch(np.minimum(indices, len(encoded) - 1), real_rows)
