"""A SentencePiece unigram model as the tokenizer.json of Hugging Face's `tokenizers`."""

from __future__ import annotations

from collections.abc import Iterator

import tokenizers
from sentencepiece import sentencepiece_model_pb2
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from bipft_jax.data.tokenizers import CLS, SEP, SPACE_SIGN, SPECIAL_PIECES


def library_tokenizer(model: bytes) -> tokenizers.Tokenizer:
    """The tokenizer of a model of `train_sentencepiece`, with the special pieces of BERT around
    texts and pairs unless `add_special_tokens` is False.

    It gives the same ids, except where two segmentations of a word have one score; and special
    pieces in a text are special.

    Arguments:
      model: the bytes of a `.model` file of kind unigram, without case or one that keeps the text.
    """
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model)
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    rare = proto.trainer_spec.byte_fallback  # whether rare characters are pieces of bytes
    prepended = "always" if proto.normalizer_spec.add_dummy_prefix else "never"
    backend = tokenizers.Tokenizer(
        models.Unigram(pieces, unk_id=proto.trainer_spec.unk_id, byte_fallback=rare)
    )
    backend.normalizer = normalizers.Sequence(list(_normalizers(proto.normalizer_spec)))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        SPACE_SIGN, prepend_scheme=prepended, split=False
    )
    backend.decoder = decoders.Metaspace(SPACE_SIGN, prepend_scheme=prepended)
    if rare:
        backend.decoder = decoders.Sequence(
            [decoders.Replace(SPACE_SIGN, " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    own = [piece.piece for piece in proto.pieces if piece.type == piece.USER_DEFINED]
    backend.add_tokens([tokenizers.AddedToken(piece, normalized=False) for piece in own])
    backend.add_special_tokens(list(SPECIAL_PIECES))
    backend.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(piece, backend.token_to_id(piece)) for piece in (CLS, SEP)],
    )
    return backend


def _normalizers(spec: sentencepiece_model_pb2.NormalizerSpec) -> Iterator[normalizers.Normalizer]:
    if spec.precompiled_charsmap:
        yield normalizers.Precompiled(spec.precompiled_charsmap)
    if spec.remove_extra_whitespaces:
        yield normalizers.Strip()
        yield normalizers.Replace(tokenizers.Regex(" {2,}"), " ")
