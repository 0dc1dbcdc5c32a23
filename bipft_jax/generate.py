"""Continues texts with a decoder, token by token.

    python -m bipft_jax.generate --workdir DIR "Once upon a time"

Temperature 0 takes the most probable token; above, tokens are drawn from the distribution, of which
--top_k keeps the most probable ones and --top_p the smallest set of such a total probability. The
text ends at the end of a document or after --max_tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bipft_jax.checkpoints.source import Source, load_source
from bipft_jax.models.causal_attention import CACHE
from bipft_jax.models.decoder import Decoder
from bipft_jax.models.decoder_recipes import DecoderConfig
from bipft_jax.models.parameters import Params
from bipft_jax.models.weights_once import quantised_once, taking_values
from bipft_jax.objectives.causal_lm import CAUSAL_LM

CONTEXT = 512  # tokens of prompt and continuation, for a model that does not say its own
NEW_TOKENS = 100  # by default, if the context has room for them

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """The choice of a token from its distribution.

    temperature: divides the logits; 0 takes the largest, of equal ones the first.
    top_k: the number of tokens to draw from; 0 for all.
    top_p: draws from the fewest tokens whose probabilities add up to this.

    Raises: ValueError for a value out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}: it must be 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: it must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be more than 0 and at most 1")

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """Logits [B, vocab] -> tokens int32 [B]."""
        if not self.temperature:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        logits = logits / jnp.asarray(self.temperature, logits.dtype)
        if self.top_k:
            smallest = jax.lax.top_k(logits, min(self.top_k, logits.shape[-1]))[0][:, -1:]
            logits = jnp.where(logits < smallest, -jnp.inf, logits)
        if self.top_p < 1:
            ordered = jnp.sort(logits, axis=-1, descending=True)
            probabilities = jax.nn.softmax(ordered)
            before = jnp.cumsum(probabilities, axis=-1) - probabilities
            kept = jnp.where(before < self.top_p, ordered, jnp.inf)
            logits = jnp.where(logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits)
        return jax.random.categorical(key, logits).astype(jnp.int32)


class Generator:
    """A decoder with its weights quantised once, applied with a cache of keys and values."""

    def __init__(self, config: DecoderConfig, params: Params):
        """params: of `Decoder(config)`."""
        self._params = jax.jit(quantised_once, static_argnums=1)(params, config)
        model = Decoder(taking_values(config))

        def apply(params, cache, ids, segments, place):
            output, kept = model.apply(
                {"params": params, **cache}, ids, segments, start=place, mutable=[CACHE]
            )
            return output.logits[:, -1].astype(jnp.float32), {CACHE: kept[CACHE]}

        self._apply = jax.jit(apply, donate_argnums=1)

    def prompt(self, ids: np.ndarray, segments: np.ndarray) -> tuple[jax.Array, Any]:
        """The logits of the token after the prompts, float32 [B, vocab], and the cache.

        Arguments:
          ids: int32 [B, P], padded on the left.
          segments: int32 [B, T], 1 at tokens, 0 at padding and after the prompts; T is the context.
        """
        return self._apply(self._params, {}, ids, segments, np.int32(0))

    def token(
        self, cache: Any, tokens: np.ndarray, segments: np.ndarray, place: int
    ) -> tuple[jax.Array, Any]:
        """The same after one more token each. Donates the cache.

        Arguments:
          tokens: int32 [B].
          segments: int32 [B, T], 1 at the tokens' own place, too.
          place: of the tokens in the context.
        """
        return self._apply(self._params, cache, tokens[:, None], segments, np.int32(place))

    @property
    def compiled(self) -> int:
        """The number of compiled programs: one for each length of prompts, and one for tokens."""
        return self._apply._cache_size()

    def continued(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        end_id: int,
        sampling: Sampling | None = None,
        seed: int = 0,
        context: int = CONTEXT,
    ) -> Iterator[np.ndarray]:
        """The next tokens of all prompts, int32 [B], until all have ended (a text that has goes on
        with `end_id`) or for `max_tokens` steps.

        Raises: ValueError for no prompt or an empty one, or if the longest and max_tokens do not
          fit into the context.
        """
        if not prompts or not all(len(prompt) for prompt in prompts):
            raise ValueError("a prompt is empty: give at least one token")
        longest = max(map(len, prompts))
        if max_tokens < 1 or longest + max_tokens > context:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_tokens} new ones do not fit into a context "
                f"of {context}: at least one new token, and no more than the context in all"
            )
        # Few lengths, so that few programs are compiled.
        width = min(1 << (longest - 1).bit_length(), context - max_tokens)
        ids = np.zeros((len(prompts), width), np.int32)
        segments = np.zeros((len(prompts), context), np.int32)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = prompt
            segments[row, width - len(prompt) : width] = 1
        choose = jax.jit(sampling or Sampling())
        key, ended = jax.random.key(seed), np.zeros(len(prompts), bool)
        logits, cache = self.prompt(ids, segments)
        for place in range(width, width + max_tokens):
            tokens = np.asarray(choose(logits, jax.random.fold_in(key, place)))
            tokens = np.where(ended, np.int32(end_id), tokens)
            yield tokens
            ended |= tokens == end_id
            if ended.all() or place + 1 == width + max_tokens:
                return
            segments[:, place] = 1
            logits, cache = self.token(cache, tokens, segments, place)


def generator_of(source: Source) -> Generator:
    """The decoder of a checkpoint. Raises: ValueError if the checkpoint is no decoder's."""
    if source.objective.name != CAUSAL_LM.name:
        raise ValueError(
            f"{source.workdir} holds a model for {source.objective.name}, which generates no text: "
            "give the workdir of a decoder (configs/pretrain.py:bitnet_b158,SIZE)"
        )
    return Generator(source.config(compute="auto"), source.params)


def room(
    source: Source, prompt: int, max_tokens: int | None, context: int | None
) -> tuple[int, int]:
    """(new tokens, context) for a prompt of so many tokens. Logs a warning if the text may become
    longer than what the model was trained on.

    Arguments:
      max_tokens: None for `NEW_TOKENS`, or as many as the context has room for.
      context: None for the length of text that the model was trained on, or else `CONTEXT`.

    Raises: ValueError if the context has no room for a new token.
    """
    trained = source.sequence_length
    if context is None:
        context = trained or CONTEXT
    if prompt >= context:
        length = f"{context}{', as the model was trained' if context == trained else ''}"
        raise ValueError(
            f"the prompt has {prompt} tokens, but prompt and continuation have a context of "
            f"{length}: give a shorter prompt, or a longer --context"
        )
    if max_tokens is None:
        max_tokens = min(NEW_TOKENS, context - prompt)
    if trained and trained < prompt + max_tokens <= context:
        _log.warning(
            "a prompt of %d tokens and %d new ones are more than the %d tokens that the "
            "model was trained on: what comes after them may be nonsense",
            prompt,
            max_tokens,
            trained,
        )
    return max_tokens, context


def texts(
    source: Source,
    text: str,
    max_tokens: int | None,
    sampling: Sampling,
    seed: int,
    context: int | None,
) -> Iterator[str]:
    """The continuation of a text, as longer and longer text; max_tokens, context: as for `room`.

    Raises: ValueError as `generator_of`, `room` and `Generator.continued`, or for an empty text.
    """
    tokenizer = source.tokenizer
    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the prompt is empty: give the beginning of a text")
    # A document begins after the end of another, unless attention does not see that.
    separate = source.run.get("decoder", {}).get("separate_documents", False)
    prompt = ids if separate else [tokenizer.sep_id, *ids]
    max_tokens, context = room(source, len(prompt), max_tokens, context)
    steps = generator_of(source).continued(
        [prompt], max_tokens, tokenizer.sep_id, sampling, seed, context
    )
    for (token,) in steps:
        if token == tokenizer.sep_id:
            return
        ids.append(int(token))
        yield tokenizer.decode(ids)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    first, _, details = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.generate",
        description=first,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("text", help="the beginning of a text")
    parser.add_argument(
        "--workdir", required=True, help="of a decoder's pretraining: DIR, or DIR@UPDATE"
    )
    parser.add_argument(
        "--max_tokens", type=int, help=f"{NEW_TOKENS}, if the context has room for them"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="%(default)s")
    parser.add_argument("--top_k", type=int, default=0, help="0: all")
    parser.add_argument("--top_p", type=float, default=0.95, help="%(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--context",
        type=int,
        help="tokens of prompt and continuation (the length of text that the model was trained on; "
        f"{CONTEXT} if it does not say)",
    )
    arguments = parser.parse_args(argv)
    shown = ""
    try:
        sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
        source = load_source(arguments.workdir)
        how = arguments.max_tokens, sampling, arguments.seed, arguments.context
        for text in texts(source, arguments.text, *how):
            # A piece may change the space before it; what was printed stays. A character of several
            # byte pieces is U+FFFD until its last one.
            text = text.rstrip("\ufffd")
            print(text[len(shown) :], end="", flush=True)
            shown = text
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print()


if __name__ == "__main__":
    main()
