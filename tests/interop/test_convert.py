"""The command: directories to workdirs that everything else takes, and back."""

import jax
import numpy as np
import pytest

from bipft_jax import fill_mask
from bipft_jax.checkpoints.source import load_source
from bipft_jax.checkpoints.workdir import check_workdir
from bipft_jax.interop import convert
from bipft_jax.interop.hugging_face import read_directory, write_directory
from bipft_jax.objectives.classification import classification
from bipft_jax.objectives.mlm_nsp import MLM_NSP
from tests.interop.directories import assert_same_bits, model, state_of, write


def run(*arguments):
    convert.main([str(argument) for argument in arguments])


def test_a_directory_goes_through_a_workdir_and_comes_out_the_same(tmp_path, capsys):
    source = model("bipft_b", metrics={"loss": 2.0})
    write_directory(source, tmp_path / "given")
    run("import", tmp_path / "given", "--workdir", tmp_path / "runs")
    printed = capsys.readouterr().out
    for line in (
        f"read {tmp_path / 'given' / 'model.safetensors'}\n",
        "recipe      bipft_b, estimator rank 1, lora rank 0\n",
        "size        2 layers x 8, 2 heads, vocabulary of 11\n",
        f"parameters  {sum(leaf.size for leaf in jax.tree.leaves(source.params)):,}\n",
        "heads       MLM, NSP\n",
        f"wrote {tmp_path / 'runs'}, a checkpoint of step 0\n",
    ):
        assert line in printed
    assert "missing" not in printed and "not used" not in printed and "scales" not in printed

    found = load_source(tmp_path / "runs")
    assert_same_bits(found.params, source.params)
    assert (found.architecture, found.missing) == (source.architecture, ())
    assert found.objective == MLM_NSP
    assert found.tokenizer.fingerprint == source.tokenizer.fingerprint
    assert found.run["weights"] == str(tmp_path / "given" / "model.safetensors")

    run("export", "--workdir", tmp_path / "runs", "--output", tmp_path / "out", "--step", "0")
    printed = capsys.readouterr().out
    assert f"read {tmp_path / 'runs'}, step 0\n" in printed
    assert "README.md, config.json, model.safetensors, tokenizer_config.json, vocab.txt" in printed
    assert "transformers cannot load it\n" in printed
    assert_same_bits(read_directory(tmp_path / "out")[0].params, source.params)


def test_what_a_file_lacks_and_what_is_not_used_is_said_and_remembered(tmp_path, capsys):
    source = model("bit_w1a1")
    name = "bert.encoder.layer.1.attention.self.clip_query"
    state = {k: v for k, v in state_of(source).items() if k.startswith("bert.")}
    state |= {name: np.float32(1), "bert.embeddings.position_ids": np.arange(16)[None]}
    write(tmp_path / "given", source, state)
    run("import", tmp_path / "given", "--recipe", "bit_w1a1", "--workdir", tmp_path / "runs")
    printed = capsys.readouterr().out
    assert "heads       none\n" in printed
    assert "missing     mlm_bias, mlm_dense/bias" in printed
    assert "scales      1 were never initialised" in printed
    assert "not used    1 arrays: bert.embeddings.position_ids\n" in printed
    found = load_source(tmp_path / "runs")
    assert "nsp/kernel" in found.missing
    layers = found.params["bert"]["encoder"]["layers"]
    assert list(np.isnan(layers["attention"]["query_scale"])) == [False, True]
    with pytest.raises(SystemExit, match="error: .*without a masked-word head"):
        fill_mask.main(["the [MASK]", "--workdir", str(tmp_path / "runs")])


def test_what_is_cut_off_is_said(tmp_path, capsys):
    source = model()
    words = "bert.embeddings.word_embeddings.weight"
    state = state_of(source)
    state = {name: state[name] for name in state if not name.startswith("cls.")}
    state[words] = np.concatenate([state[words], state[words][:2]])
    write(tmp_path / "given", source, state, vocab_size=13)
    (tmp_path / "given" / "added_tokens.json").write_text('{"<url>": 11}')
    run("import", tmp_path / "given", "--workdir", tmp_path / "runs")
    printed = capsys.readouterr().out
    assert "cut off     2 rows of the embedding" in printed and "tokens <url>\n" in printed
    assert load_source(tmp_path / "runs").run["surplus_rows"] == 2


def test_a_classifier_keeps_its_outputs(tmp_path, capsys):
    write_directory(model("fp", 3), tmp_path / "given")
    run("import", tmp_path / "given", "--workdir", tmp_path / "runs")
    assert "heads       classifier with 3 outputs\n" in capsys.readouterr().out
    run("export", "--workdir", tmp_path / "runs", "--output", tmp_path / "out")
    assert "loads it as BertForSequenceClassification\n" in capsys.readouterr().out
    assert load_source(tmp_path / "runs").objective == classification(3)


def test_an_imported_workdir_belongs_to_no_run_and_nothing_in_use_is_overwritten(tmp_path):
    write_directory(model(), tmp_path / "given")
    run("import", tmp_path / "given", "--workdir", tmp_path / "runs")
    with pytest.raises(ValueError, match="holds a run with another configuration"):
        check_workdir(tmp_path / "runs", {"program": "pretrain"})
    for arguments in (
        ("import", tmp_path / "given", "--workdir", tmp_path / "runs"),
        ("export", "--workdir", tmp_path / "runs", "--output", tmp_path / "given"),
    ):
        with pytest.raises(SystemExit, match="error: .* is not empty, and nothing is overwritten"):
            run(*arguments)


def test_mistakes_end_in_one_line_and_leave_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit, match="error: there is no .*given/config.json"):
        run("import", tmp_path / "given", "--workdir", tmp_path / "runs")
    with pytest.raises(SystemExit, match="error: There are no checkpoints in .*runs/checkpoints"):
        run("export", "--workdir", tmp_path / "runs", "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        run("export", "--workdir", tmp_path, "--output", tmp_path / "out", "--step", "newest")
    assert "argument --step: invalid" in capsys.readouterr().err
