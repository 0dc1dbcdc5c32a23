"""Fills [MASK] in a sentence with the most probable words of a pretrained model.

python -m bipft_jax.fill_mask --workdir DIR "The capital of France is [MASK]."
"""

from __future__ import annotations

import argparse
import sys

import jax
import jax.numpy as jnp
import numpy as np

from bipft_jax.checkpoints.source import Source, load_source
from bipft_jax.data.tokenizers import Tokenizer
from bipft_jax.models.bert import BertForPreTraining

MASK = "[MASK]"


def encode_masked(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of [CLS] text [SEP], with the mask token for every literal "[MASK]".

    Raises: ValueError if the text has no [MASK].
    """

    def continuation(part: str) -> list[int]:
        # SentencePiece adds a word boundary before every text; text after a mask may have none.
        ids = tokenizer.encode(part)
        glued = part and not part[0].isspace()
        return ids[1:] if glued and ids and tokenizer.id_to_piece(ids[0]) == "▁" else ids

    pieces = text.split(MASK)
    if len(pieces) == 1:
        raise ValueError(f"no {MASK} in {text!r}: put {MASK} where a word is to be predicted")
    ids = [tokenizer.cls_id, *tokenizer.encode(pieces[0])]
    for piece in pieces[1:]:
        ids += [tokenizer.mask_id, *continuation(piece)]
    return [*ids, tokenizer.sep_id]


def fill_mask(source: Source, text: str, top: int = 5) -> list[list[tuple[str, float]]]:
    """The most probable pieces for every [MASK] of a text, with their probabilities.

    top: number of pieces per mask, from 1 to the number of pieces that are not special.

    Raises: ValueError if the text has no [MASK] or is too long, `top` is out of range, or the model
      has no MLM head or gives logits that are not finite.
    """
    if "mlm_bias" not in source.objective.abstract_params(source.config()):
        kind = "finetuned classifier" if source.objective.outputs else source.objective.name
        raise ValueError(
            f"{source.workdir} holds a {kind}, which has no masked-word head: give the workdir of "
            "a pretraining run"
        )
    if "mlm_bias" in source.missing:
        raise ValueError(
            f"{source.workdir} holds an encoder that was imported without a masked-word head: "
            "pretrain from it first (--config.init_from)"
        )
    tokenizer = source.tokenizer
    if not 1 <= top <= tokenizer.vocab_size - len(tokenizer.special_ids):
        raise ValueError(
            f"top is {top}: it must be from 1 to the "
            f"{tokenizer.vocab_size - len(tokenizer.special_ids)} ordinary pieces of the vocabulary"
        )
    ids = np.asarray(encode_masked(tokenizer, text))
    positions = np.flatnonzero(ids == tokenizer.mask_id)
    model = BertForPreTraining(source.config())
    inputs = jnp.asarray(ids)[None]
    output = model.apply(
        {"params": source.filled_params()},
        inputs,
        jnp.zeros_like(inputs),
        jnp.ones_like(inputs),
        jnp.asarray(positions)[None],
    )
    special = jnp.asarray(sorted(tokenizer.special_ids))
    logits = output.mlm_logits[0].astype(jnp.float32)
    if not jnp.isfinite(logits).all():
        raise ValueError(
            f"{source.workdir} (step {source.step}): logits are NaN or infinite: its weights are "
            "damaged, or it has learned scales that were never initialised"
        )
    logits = logits.at[:, special].set(-jnp.inf)
    probabilities, top_ids = jax.lax.top_k(jax.nn.softmax(logits), top)
    return [
        [
            (tokenizer.id_to_piece(int(i)).removeprefix("▁"), float(p))
            for i, p in zip(row, ps, strict=True)
        ]
        for row, ps in zip(np.asarray(top_ids), np.asarray(probabilities), strict=True)
    ]


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.fill_mask", description=__doc__.splitlines()[0]
    )
    parser.add_argument("text", help=f'a sentence with {MASK}, such as "The capital is {MASK}."')
    parser.add_argument("--workdir", required=True, help="of a pretraining run: DIR, or DIR@UPDATE")
    parser.add_argument("--top", type=int, default=5, help="words to show (default 5)")
    arguments = parser.parse_args(argv)
    try:
        filled = fill_mask(load_source(arguments.workdir), arguments.text, arguments.top)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for number, words in enumerate(filled, start=1):
        if len(filled) > 1:
            print(f"{MASK} number {number}")
        for word, probability in words:
            print(f"{probability:8.4f}  {word}")


if __name__ == "__main__":
    main()
