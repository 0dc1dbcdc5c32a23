"""A SentencePiece unigram model as the tokenizer.json of Hugging Face's `tokenizers`."""

from __future__ import annotations

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from bipft_jax.data.tokenizers import CLS, SEP, SPECIAL_PIECES

_SPACE = "▁"


def library_tokenizer(model: bytes) -> tokenizers.Tokenizer:
    """The tokenizer of a model of `train_sentencepiece`, with the special pieces of BERT around
    texts and pairs unless `add_special_tokens` is False.

    It gives the same ids, except where two segmentations of a word have one score; and special
    pieces in a text are special.

    Arguments:
      model: the bytes of a `.model` file, of kind unigram without byte fallback.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    backend = tokenizers.Tokenizer(
        models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=False)
    )
    charsmap = proto.normalizer_spec.precompiled_charsmap
    backend.normalizer = normalizers.Sequence(
        [
            *([normalizers.Precompiled(charsmap)] if charsmap else []),
            normalizers.Strip(),
            normalizers.Replace(tokenizers.Regex(" {2,}"), " "),
        ]
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(_SPACE, prepend_scheme="always", split=False)
    backend.decoder = decoders.Metaspace(_SPACE, prepend_scheme="always")
    backend.add_special_tokens(list(SPECIAL_PIECES))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(piece, backend.token_to_id(piece)) for piece in (CLS, SEP)],
    )
    return backend
