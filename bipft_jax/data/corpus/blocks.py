"""Packs the sentences of one document into blocks, the units of BERT's pretraining data.

A block is a run of consecutive sentences that fits into one example with [CLS] and two [SEP]
(Devlin et al. 2019, `create_pretraining_data`). Unlike BERT's own script, this module truncates
nothing: a document's blocks contain its tokens, each once and in order. The cut of a block into the
two segments of an example is chosen in `bipft_jax.data.corpus.pretraining`.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

SPECIALS_PER_EXAMPLE = 3  # [CLS] A [SEP] B [SEP]
MINIMUM_SEQUENCE_LENGTH = 8


class Block(NamedTuple):
    """Consecutive sentences of one document, at least two tokens in all.

    A sentence is alone in its block only where none of its neighbours fits beside it.
    """

    tokens: list[int]
    sentence_lengths: list[int]


def pack_document(
    sentences: Sequence[Sequence[int]],
    sequence_length: int,
    short_sequence_probability: float,
    rng: np.random.Generator,
) -> tuple[list[Block], int]:
    """Packs greedily up to a target length: usually the maximum, sometimes shorter.

    With probability `short_sequence_probability`, a block's target is drawn uniformly from
    [2, sequence_length - 3], so that the model also sees short inputs. A block holds at least two
    whole sentences if two fit, even beyond a short target. Sentences longer than a block are split
    into equal pieces, which count as sentences.

    Arguments:
      sentences: token ids of each sentence, in order.
      sequence_length: length of an example, special pieces included; at least 8.
      rng: one draw per block, two for a short one.

    Returns:
      The blocks, and how many sentences were longer than a block. No blocks if the document has
      fewer than two sentences (a sentence of a single token counts as part of its neighbour).
    """
    maximum = sequence_length - SPECIALS_PER_EXAMPLE
    whole = _join_single_tokens(sentences)
    if len(whole) < 2:
        return [], 0
    pieces, num_split = _split_long(whole, maximum)

    blocks = []
    position = 0
    while position < len(pieces):
        target = maximum
        if rng.random() < short_sequence_probability:
            target = int(rng.integers(2, maximum + 1))
        end = position + 1
        length = len(pieces[position])
        while end < len(pieces):
            longer = length + len(pieces[end])
            if longer > maximum or (longer > target and end - position >= 2):
                break
            length = longer
            end += 1
        chosen = pieces[position:end]
        tokens = list(itertools.chain.from_iterable(chosen))
        blocks.append(Block(tokens, [len(piece) for piece in chosen]))
        position = end
    return blocks, num_split


def _join_single_tokens(sentences: Sequence[Sequence[int]]) -> list[list[int]]:
    """Joins each one-token sentence to the sentence before it (at the beginning, to the one after
    it): it cannot be cut in two, and is a stray mark, not language."""
    joined: list[list[int]] = []
    for sentence in sentences:
        if joined and (len(sentence) == 1 or len(joined[-1]) == 1):
            joined[-1].extend(sentence)
        elif sentence:
            joined.append(list(sentence))
    return joined


def _split_long(sentences: list[list[int]], maximum: int) -> tuple[list[list[int]], int]:
    pieces = []
    num_split = 0
    for sentence in sentences:
        if len(sentence) <= maximum:
            pieces.append(sentence)
            continue
        num_split += 1
        count = -(-len(sentence) // maximum)
        cuts = [len(sentence) * i // count for i in range(count + 1)]
        pieces.extend(sentence[a:b] for a, b in zip(cuts, cuts[1:], strict=False))
    return pieces, num_split
