"""Decoders as Hugging Face directories of `BitNetForCausalLM`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bipft_jax.checkpoints.source import Source
from bipft_jax.data.tokenizers import Tokenizer
from bipft_jax.interop.bitnet_weights import from_state, latent, packed, to_state
from bipft_jax.interop.config_file import CONFIG_NAME, require_values, whole_number
from bipft_jax.interop.decoder_card import decoder_card
from bipft_jax.interop.decoder_config_file import (
    DECODER,
    LOADER,
    MODEL_TYPE,
    SEQUENCE_LENGTH_KEY,
    decoder_described,
    read_decoder_config,
)
from bipft_jax.interop.family import Family, Storage, Written
from bipft_jax.interop.tokenizer_files import read_tokenizer
from bipft_jax.interop.weight_files import read_weights
from bipft_jax.models.decoder_recipes import DECODER_RECIPES, architecture
from bipft_jax.models.parameters import named_leaves
from bipft_jax.objectives.causal_lm import CAUSAL_LM

_WORDS, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_UNUSED = re.compile(r"\.rotary_emb\.inv_freq$")  # a buffer, saved by older versions


def _read(
    directory: Path, described: Mapping[str, Any], recipe: str | None
) -> tuple[Source, list[str]]:
    """`Family.read`.

    Packed weights become latent ones with the same codes and scales; the source's `run` has their
    class as "packed". A directory without bos_token_id is that of a model whose texts begin without
    the end of another.
    """
    path = directory / CONFIG_NAME
    config, linear_class = read_decoder_config(described, recipe, path)
    tokenizer, added = read_tokenizer(directory)
    begins = _read_tokens(described, tokenizer, path)
    weights, state = read_weights(directory)
    ignored = [name for name in state if _UNUSED.search(name)]
    state = {name: array for name, array in state.items() if name not in ignored}
    try:
        if linear_class:
            state = latent(state, config, linear_class)
        state = _without_tied_head(state, config.tied)
        params = from_state(state, config)
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from error
    surplus = config.vocab_size - tokenizer.vocab_size  # from rounding up or from added tokens
    if surplus < 0:
        raise ValueError(
            f"{path}: vocab_size is {config.vocab_size}, but the vocabulary has "
            f"{tokenizer.vocab_size} pieces: they belong to different models"
        )
    length = described.get(SEQUENCE_LENGTH_KEY)
    source = Source(
        workdir=str(directory),
        step=0,
        params=_cut(params, tokenizer.vocab_size),
        architecture=architecture(dataclasses.replace(config, vocab_size=tokenizer.vocab_size)),
        objective=CAUSAL_LM,
        tokenizer=tokenizer,
        run={
            "program": "import",
            "weights": str(weights),
            "recipe": config.recipe.name,
            "decoder": {"separate_documents": not begins},
            **({"packed": linear_class} if linear_class else {}),
            **({"surplus_rows": surplus, "added_tokens": added} if surplus else {}),
        },
        sequence_length=(
            None if length is None else whole_number(length, SEQUENCE_LENGTH_KEY, path)
        ),
    )
    return source, ignored


def _read_tokens(described: Mapping[str, Any], tokenizer: Tokenizer, path: Path) -> bool:
    """Whether texts begin with a token of their own: as in training here, the end of another.

    Raises: ValueError if tokens at the beginning and the end of a text are others than [SEP].
    """
    end = tokenizer.sep_id
    allowed = {"bos_token_id": (None, end), "eos_token_id": (None, end, [end])}
    require_values(described, allowed, path, f"{DECODER}, whose texts end with [SEP],")
    return described.get("bos_token_id") is not None


def _without_tied_head(state: Mapping[str, np.ndarray], tied: bool) -> dict[str, np.ndarray]:
    """The arrays without a head that repeats the embedding. Raises: ValueError if it does not."""
    if not tied or _HEAD not in state:
        return dict(state)
    if _WORDS in state and not np.array_equal(state[_HEAD], state[_WORDS]):
        raise ValueError(
            f"{_HEAD} is not {_WORDS}, and tie_word_embeddings says that the two are tied"
        )
    return {name: array for name, array in state.items() if name != _HEAD}


def _cut(params: dict[str, Any], pieces: int) -> dict[str, Any]:
    """The parameters without rows of the embedding and columns of the head beyond the pieces."""
    cut = {**params, "words": {"embedding": params["words"]["embedding"][:pieces]}}
    if "head" in params:
        cut["head"] = {"kernel": params["head"]["kernel"][:, :pieces]}
    return cut


def _written(source: Source, storage: Storage) -> Written:
    """`Family.written`."""
    config, end = source.config(), source.tokenizer.sep_id
    described = decoder_described(config, storage)
    separate = source.run.get("decoder", {}).get("separate_documents", False)
    length = {} if source.sequence_length is None else {SEQUENCE_LENGTH_KEY: source.sequence_length}
    described |= {
        **length,
        "pad_token_id": source.tokenizer.pad_id,
        "bos_token_id": None if separate else end,
        "eos_token_id": end,
    }
    for path, leaf in named_leaves(source.params).items():
        if bad := np.count_nonzero(~np.isfinite(leaf)):
            raise ValueError(f"{path} has {bad} values that are NaN or infinite")
    if storage.packed:
        arrays = packed(source.params, config, storage.packed)
    else:
        arrays = dict(to_state(source.params, config))
    dtype = jnp.dtype(storage.dtype)
    state = {
        name: np.ascontiguousarray(array if array.dtype == np.uint8 else array.astype(dtype))
        for name, array in arrays.items()
    }
    return Written(described, state, source.sequence_length)


def _summary(source: Source) -> list[str]:
    """`Family.summary`."""
    described = source.architecture
    block = ", ".join(f"{name} {described[name]}" for name in ("gate", "norm", "groups"))
    length = source.sequence_length
    return [
        f"recipe      {described['recipe']}, {block}",
        f"size        {described['layers']} layers x {described['hidden']}, "
        f"{described['heads']} heads ({described['kv_heads']} of keys and values), vocabulary of "
        f"{described['vocab_size']:,}",
        f"positions   rotary base {described['rope_theta']:,g}"
        + (f", trained on texts of {length:,} tokens" if length else ""),
        f"parameters  {sum(leaf.size for leaf in named_leaves(source.params).values()):,}",
        *(
            [f"packed      2-bit codes of class {source.run['packed']}: latent weights are lost"]
            if "packed" in source.run
            else []
        ),
    ]


DECODERS = Family(
    model_types=(MODEL_TYPE,),
    recipes=DECODER_RECIPES,
    read=_read,
    written=_written,
    loader=lambda source: LOADER,
    card=decoder_card,
    summary=_summary,
)
