"""The table of objectives, and what a checkpoint says of one."""

import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bipft_jax.checkpoints.manager import Checkpointer
from bipft_jax.checkpoints.source import checkpoint_description, load_source
from bipft_jax.data.corpus.preparation import OBJECTIVES as OF_CORPORA
from bipft_jax.data.tokenizers import WordPieceTokenizer
from bipft_jax.models.recipes import BertConfig, recipe_named
from bipft_jax.objectives.classification import classification
from bipft_jax.objectives.mlm_nsp import MLM_NSP
from bipft_jax.objectives.objective import weighted_mean
from bipft_jax.objectives.table import OBJECTIVES, objective_of
from bipft_jax.training.state import new_state

TOKENIZER = WordPieceTokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdef"])
CONFIG = BertConfig(recipe_named("fp"), TOKENIZER.vocab_size, 1, 8, 2, 16, 8)


@pytest.mark.parametrize("objective", [MLM_NSP, classification(3), classification(1)])
@pytest.mark.parametrize("named", [True, False])
def test_a_checkpoint_says_its_objective_also_one_of_before_they_had_names(
    tmp_path, objective, named
):
    described = checkpoint_description(CONFIG, objective, {})
    if not named:
        del described["objective"]
        described["classes"] = objective.outputs
    state = new_state({"w": jnp.zeros(1)}, optax.identity())
    with Checkpointer(tmp_path, keep_every=0, best_metric=None, best_mode="max") as checkpointer:
        checkpointer.save(1, state, config=described, tokenizer=TOKENIZER.to_dict())
    assert load_source(tmp_path).objective == objective


def test_an_objective_that_this_version_does_not_know_is_named():
    record = {"name": "mlm_nps", "outputs": 0}
    with pytest.raises(ValueError, match="unknown objective 'mlm_nps': did you mean mlm_nsp"):
        objective_of({"objective": record})
    assert objective_of({"objective": json.loads(json.dumps(MLM_NSP.described()))}) == MLM_NSP


def test_corpora_name_every_objective_that_learns_from_one():
    assert set(OF_CORPORA) == {name for name, row in OBJECTIVES.items() if row.from_corpus}


def test_means_over_batches_are_weighted_by_their_counts():
    results = [{"loss": np.float32(1), "tokens": 1.0}, {"loss": np.float32(4), "tokens": 2.0}]
    assert weighted_mean(results, "loss", "tokens") == 3.0
