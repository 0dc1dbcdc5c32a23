"""Small random models with a packed file of each, and their answers in JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from bipft_jax.checkpoints.source import Source
from bipft_jax.data.glue.tasks import TASKS
from bipft_jax.data.tokenizers import WordPieceTokenizer
from bipft_jax.interop.pack import packed
from bipft_jax.models.bert import Bert
from bipft_jax.models.parameters import is_scale
from bipft_jax.models.recipes import architecture, bert_config, recipe_named
from bipft_jax.objectives.classification import classification

LETTERS = [*"abcdefghijklmnopqrstuvwxyz", *(f"##{c}" for c in "abcdefghijklmnopqrstuvwxyz")]
TOKENIZER = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, "film"])
_SCALES = {"query_scale": 0.5, "key_scale": 0.5, "value_scale": 0.5, "probs_scale": 0.08}


def random_source(recipe, size="tiny", rank=-1, task="sst2", seed=0):
    """A classifier whose biases, shifts and norms are random too, and its scales set."""
    row = TASKS[task]
    config = bert_config(recipe_named(recipe, rank), size, TOKENIZER.vocab_size, dropout=0.0)
    objective = classification(row.num_outputs)
    rng = np.random.default_rng(seed)

    def value(path, leaf):
        name = path[-1].key
        if is_scale(name):  # half of a probability's scale is its threshold: about 1/24
            return rng.uniform(0.5, 1.0, leaf.shape).astype(np.float32) * _SCALES.get(name, 1.0)
        spread = {"kernel": 0.05, "embedding": 0.05, "input_shift": 0.1}.get(name, 0.05)
        values = rng.normal(0, spread, leaf.shape).astype(np.float32)
        return values + 1 if name == "scale" else values

    params = jax.tree_util.tree_map_with_path(value, objective.abstract_params(config))
    return Source(
        workdir="model",
        step=1,
        params=params,
        architecture=architecture(config),
        objective=objective,
        tokenizer=TOKENIZER,
        run={"task": task, "max_length": 32},
    )


def inputs(rng, rows, tokens):
    """ids, segments and mask, int32 [rows, tokens], without padding."""
    shape = rows, tokens
    ids = rng.integers(5, TOKENIZER.vocab_size, shape, np.int32)
    segments = (np.arange(tokens) >= tokens // 2).astype(np.int32) + np.zeros(shape, np.int32)
    return ids, segments, np.ones(shape, np.int32)


@functools.cache
def _compiled(config, objective):
    def apply(params, *batch):
        output = objective.model(config).apply({"params": params}, *batch)
        hidden, _, pooled = Bert(config).apply({"params": params["bert"]}, *batch, True)
        return output.logits, output.hidden_states, hidden, pooled

    return jax.jit(apply)


def in_jax(source, ids, segments):
    """(logits, hidden states of all layers, last hidden states, pooled) of one sequence."""
    batch = [jnp.asarray(x)[None] for x in (ids, segments, np.ones_like(ids))]
    outputs = _compiled(source.config(), source.objective)(source.params, *batch)
    logits, states, hidden, pooled = map(np.asarray, outputs)
    return logits[0], states[:, 0], hidden[0], pooled[0]


def packed_source(*arguments, **keywords):
    """A source and its packed model."""
    source = random_source(*arguments, **keywords)
    return source, packed(source)
