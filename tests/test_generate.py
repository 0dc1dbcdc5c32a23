"""Generation with a cache against the model applied to the whole text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bipft_jax import generate
from bipft_jax.checkpoints.source import Source
from bipft_jax.data.tokenizers import WordPieceTokenizer
from bipft_jax.generate import Generator, Sampling
from bipft_jax.models.architectures import architecture
from bipft_jax.models.decoder import Decoder
from bipft_jax.models.decoder_recipes import DecoderConfig, decoder_recipe_named
from bipft_jax.objectives.causal_lm import CAUSAL_LM
from bipft_jax.objectives.mlm_nsp import MLM_NSP
from bipft_jax.training.state import initial_params

TOKENIZER = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"])
END = TOKENIZER.sep_id


@pytest.fixture(scope="module")
def source():
    recipe = decoder_recipe_named("bitnet_b1", groups=2)
    config = DecoderConfig(recipe, TOKENIZER.vocab_size, 2, 16, 32, 4, 2, tied=False)
    ids = jnp.ones((1, 4), jnp.int32)
    params = initial_params(Decoder(config), jax.random.key(1), ids, ids)
    params["head"]["kernel"] = 3 * jax.random.normal(jax.random.key(2), (16, TOKENIZER.vocab_size))
    return Source("runs/b1", 3, params, architecture(config), CAUSAL_LM, TOKENIZER)


@pytest.fixture(scope="module")
def greedy(source):
    """(prompt, count) -> tokens, from the whole text each time; after the end only the end."""
    model = Decoder(source.config())

    @jax.jit
    def next_tokens(ids, segments):
        return jnp.argmax(model.apply({"params": source.params}, ids, segments).logits[0], axis=-1)

    def continued(prompt, count):
        ids = list(prompt)
        for _ in range(count):
            whole = np.zeros((1, 16), np.int32)
            whole[0, : len(ids)] = ids
            segments = (np.arange(16) < len(ids)).astype(np.int32)[None]
            ended = len(ids) > len(prompt) and ids[-1] == END
            ids.append(END if ended else int(next_tokens(whole, segments)[len(ids) - 1]))
        return ids[len(prompt) :]

    return continued


def test_a_batch_continues_each_text_as_the_whole_model_does(source, greedy):
    prompts = [[END, 5, 6, 7, 8], [END, 9], [END, 12, 11, 10]]
    generator = generate.generator_of(source)
    found = np.stack(list(generator.continued(prompts, 5, END, context=16)), axis=1)
    for row, prompt in zip(found.tolist(), prompts):
        expected = greedy(prompt, 5)
        assert row[: len(expected)] == expected
    assert generator.compiled == 2  # prompts of 8, and tokens
    list(generator.continued([p[:3] + [5, 6, 7] for p in prompts], 5, END, context=16))
    assert generator.compiled == 2  # other lengths, the same programs


def test_sampling_keeps_the_most_probable():
    logits = jnp.log(jnp.asarray([[0.1, 0.4, 0.2, 0.3]]))

    def drawn(**how):
        sampling = Sampling(**how)
        keys = jax.random.split(jax.random.key(0), 200)
        return set(np.asarray(jax.vmap(lambda key: sampling(logits, key))(keys)).ravel().tolist())

    assert drawn() == {1}
    assert drawn(temperature=1.0) == {0, 1, 2, 3}
    assert drawn(temperature=1.0, top_k=2) == {1, 3}
    assert drawn(temperature=1.0, top_p=0.75) == {1, 2, 3}  # 0.4 + 0.3 are not enough
    assert drawn(temperature=0.02) == {1}
    assert Sampling()(jnp.zeros((1, 3)), jax.random.key(0)) == 0  # of equal ones the first


def test_a_text_grows_by_what_it_said(source, greedy):
    shown = list(generate.texts(source, "a b", 4, Sampling(), 0, 16))
    expected = greedy([END, *TOKENIZER.encode("a b")], 4)
    expected = expected[: expected.index(END)] if END in expected else expected
    assert len(shown) == len(expected)
    if shown:
        assert shown[-1] == TOKENIZER.decode([*TOKENIZER.encode("a b"), *expected])


def test_a_text_stays_within_what_the_model_was_trained_on_unless_it_is_told(source, caplog):
    assert generate.room(source, 4, None, None) == (100, generate.CONTEXT)
    assert generate.room(source, 450, None, None) == (62, generate.CONTEXT)
    trained = source._replace(sequence_length=16)
    assert generate.room(trained, 4, None, None) == (12, 16)
    assert generate.room(trained, 4, 12, None) == (12, 16)
    assert not caplog.records
    assert generate.room(trained, 4, None, 64) == (60, 64)
    (record,) = caplog.records
    assert "4 tokens and 60 new ones are more than the 16 tokens" in record.getMessage()


def test_help_shows_the_command_as_it_is_typed(capsys):
    with pytest.raises(SystemExit):
        generate.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m bipft_jax.generate ")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s: list(
                generate.texts(s._replace(sequence_length=4), "a b c", None, Sampling(), 0, None)
            ),
            "the prompt has 4 tokens, .* a context of 4, as the model was trained: give a shorter",
        ),
        (
            lambda s: list(generate.texts(s, "a b c", None, Sampling(), 0, 3)),
            "the prompt has 4 tokens, .* a context of 3: give a shorter",
        ),
        (lambda s: list(generate.texts(s, " ", 4, Sampling(), 0, 16)), "the prompt is empty"),
        (
            lambda s: list(generate.texts(s, "a b c", 14, Sampling(), 0, 16)),
            "a prompt of 4 tokens and 14 new ones do not fit into a context of 16",
        ),
        (lambda s: generate.generator_of(s._replace(objective=MLM_NSP)), "holds a model for mlm_n"),
        (lambda s: Sampling(top_p=0), "top_p is 0"),
        (lambda s: Sampling(temperature=-1), "temperature is -1"),
        (lambda s: Sampling(top_k=-1), "top_k is -1"),
        (lambda s: list(Generator(s.config(), s.params).continued([[]], 1, END)), "is empty"),
    ],
)
def test_what_cannot_be_continued_is_explained(source, call, message):
    with pytest.raises(ValueError, match=message):
        call(source)


def test_a_character_of_several_pieces_is_printed_once(monkeypatch, capsys):
    grown = ("a \ufffd", "a \ufffd\ufffd", "a é", "a é.")
    monkeypatch.setattr(generate, "load_source", lambda workdir: None)
    monkeypatch.setattr(generate, "texts", lambda *arguments: iter(grown))
    generate.main(["--workdir", "runs/b1", "a"])
    assert capsys.readouterr().out == "a é.\n"
