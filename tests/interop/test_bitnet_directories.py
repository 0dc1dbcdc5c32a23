"""Directories of BitNetForCausalLM: made by hand, round trips, what is refused; the comparison with
transformers itself is in tests/peers."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.flax
from safetensors.numpy import load_file

from bipft_jax import generate
from bipft_jax.checkpoints.source import load_source, warm_started
from bipft_jax.data.tokenizers import train_sentencepiece
from bipft_jax.interop import convert
from bipft_jax.interop.bitnet_weights import WEIGHT_SCALES
from bipft_jax.interop.family import Storage
from bipft_jax.interop.hugging_face import read_directory, transformers_class, write_directory
from bipft_jax.models.architectures import config_of
from bipft_jax.objectives.causal_lm import CAUSAL_LM
from bipft_jax.quantization.quantizers import TernaryMean
from tests.interop.decoder_directories import LETTERS, decoder
from tests.interop.directories import assert_same_bits, model

GATE = "model.layers.1.mlp.gate_proj.weight"
QUANTISED = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
ONLINE, OFFLINE = ({**QUANTISED, "quantization_mode": mode} for mode in ("online", "offline"))


def rewrite(directory, arrays=(), **changes):
    """Changes arrays and keys of a directory; None removes an array."""
    state = load_file(directory / "model.safetensors") | dict(arrays)
    state = {name: jnp.asarray(array) for name, array in state.items() if array is not None}
    safetensors.flax.save_file(state, directory / "model.safetensors")
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Directories of one model, by the class of packed weights ("": latent)."""
    home = tmp_path_factory.mktemp("written")
    for packed in ("", *WEIGHT_SCALES):
        write_directory(decoder(), home / f"out{packed}", Storage(packed=packed))
    return {packed: home / f"out{packed}" for packed in ("", *WEIGHT_SCALES)}


def run(*arguments):
    convert.main([str(argument) for argument in arguments])


@pytest.fixture
def by_hand(tmp_path):
    """One layer of width 8 with bfloat16 masters, under the names and keys that Hugging Face
    documents; nothing of it is written by this library."""
    rng = np.random.default_rng(1)
    linear = {
        "self_attn.q_proj": (8, 8),
        "self_attn.k_proj": (4, 8),
        "self_attn.v_proj": (4, 8),
        "self_attn.o_proj": (8, 8),
        "mlp.gate_proj": (12, 8),
        "mlp.up_proj": (12, 8),
        "mlp.down_proj": (8, 12),
    }
    gains = {"input_layernorm": 8, "post_attention_layernorm": 8}
    gains |= {"self_attn.attn_sub_norm": 8, "mlp.ffn_sub_norm": 12}
    shapes = {"model.embed_tokens": (13, 8), "model.norm": (8,)}
    shapes |= {f"model.layers.0.{name}": shape for name, shape in linear.items()}
    shapes |= {f"model.layers.0.{name}": (width,) for name, width in gains.items()}
    state = {
        f"{n}.weight": jnp.asarray(rng.normal(size=s), jnp.bfloat16) for n, s in shapes.items()
    }
    safetensors.flax.save_file(state, tmp_path / "model.safetensors")
    described = {
        "architectures": ["BitNetForCausalLM"],
        "model_type": "bitnet",
        "vocab_size": 13,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "hidden_act": "relu2",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "quantization_config": ONLINE,
    }
    (tmp_path / "config.json").write_text(json.dumps(described))
    pieces = [LETTERS.id_to_piece(number) for number in range(13)]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces))
    return tmp_path, {name: np.asarray(array, np.float32) for name, array in state.items()}


def test_masters_by_hand_are_widened_and_keep_their_own_base_and_epsilon(by_hand):
    directory, state = by_hand
    source, ignored = read_directory(directory)
    assert ignored == [] and source.sequence_length == 4096
    described = source.architecture
    assert (described["recipe"], described["rope_theta"]) == ("bitnet_b158", 500_000.0)
    assert (described["norm_epsilon"], described["kv_heads"], described["tied"]) == (1e-5, 1, True)
    layers = source.params["layers"]
    place = "model.layers.0."
    for ours, theirs in (
        (source.params["words"]["embedding"], "model.embed_tokens.weight"),
        (layers["attention"]["key"]["kernel"][0].T, place + "self_attn.k_proj.weight"),
        (layers["feed_forward"]["ffn_input"]["kernel"][0].T, place + "mlp.up_proj.weight"),
        (layers["feed_forward"]["ffn_sub_norm"]["scale"][0], place + "mlp.ffn_sub_norm.weight"),
        (layers["ffn_norm"]["scale"][0], place + "post_attention_layernorm.weight"),
    ):
        assert ours.dtype == np.float32
        np.testing.assert_array_equal(ours, state[theirs])


@pytest.mark.parametrize(("linear_class", "stored"), [("autobitlinear", 0.25), ("bitlinear", 4.0)])
def test_packed_weights_by_hand_have_their_codes_and_scale(by_hand, linear_class, stored):
    directory, state = by_hand
    rng, codes, packed = np.random.default_rng(2), {}, {}
    for name, array in state.items():
        if "_proj" in name:
            c = codes[name] = rng.integers(-1, 2, array.shape)
            q = len(c) // 4  # row r of a quarter shares its byte with r + q, r + 2q, r + 3q
            packed[name] = sum((c[n * q : (n + 1) * q] + 1) << 2 * n for n in range(4)).astype("u1")
            packed[f"{name}_scale"] = jnp.full(1, stored, jnp.bfloat16)
    rewrite(directory, packed, quantization_config=OFFLINE | {"linear_class": linear_class})
    source, _ = read_directory(directory)
    assert source.run["packed"] == linear_class
    kernel = source.params["layers"]["attention"]["value"]["kernel"][0]
    encoded = TernaryMean().encode(jnp.asarray(kernel))
    np.testing.assert_array_equal(encoded.codes.T, codes["model.layers.0.self_attn.v_proj.weight"])
    assert float(encoded.scale) == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [
        ("bitnet_b158", dict(tied=True, rope_theta=12_345.0)),
        ("bitnet_b158", dict(tied=False, norm_epsilon=2e-6, gate="silu")),
        ("bitnet_fp", dict(tied=False, kv_heads=4)),
    ],
)
def test_latent_weights_come_back_bit_for_bit(tmp_path, recipe, fields):
    source = decoder(recipe, **fields, facts={"run": {"decoder": {"separate_documents": True}}})
    write_directory(source, tmp_path)
    again, ignored = read_directory(tmp_path)
    assert_same_bits(again.params, source.params)
    assert (again.architecture, again.sequence_length) == (source.architecture, 64)
    assert (ignored, again.run["decoder"]) == ([], {"separate_documents": True})
    assert 'tokenizer("the beginning"' in (tmp_path / "README.md").read_text()  # and no [SEP]
    assert transformers_class(again) == "BitNetForCausalLM"


def test_bfloat16_rounds_once(tmp_path):
    source = decoder()
    write_directory(source, tmp_path / "half", Storage("bfloat16"))
    half, _ = read_directory(tmp_path / "half")
    rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(np.float32), source.params)
    assert_same_bits(half.params, rounded)
    write_directory(half, tmp_path / "again", Storage("bfloat16"))
    first, second = (tmp_path / name / "model.safetensors" for name in ("half", "again"))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("linear_class", ["autobitlinear", "bitlinear"])
def test_packed_weights_come_back_as_the_same_codes_and_scales(tmp_path, linear_class):
    source = decoder(tied=False)
    zero = source.params["layers"]["attention"]["key"]["kernel"]
    zero[1] = 0
    write_directory(source, tmp_path / "first", Storage(packed=linear_class))
    again, _ = read_directory(tmp_path / "first")
    write_directory(again, tmp_path / "second", Storage(packed=linear_class))
    first, second = (
        load_file(tmp_path / name / "model.safetensors") for name in ("first", "second")
    )
    assert first[GATE].dtype == np.uint8 and first[GATE].shape == (24 // 4, 16)
    for name, array in first.items():
        if name.endswith("_scale"):  # again a mean in float32, now of equal numbers
            np.testing.assert_allclose(second[name], array, rtol=1e-5)
        else:
            np.testing.assert_array_equal(second[name], array)
    kernel = source.params["layers"]["feed_forward"]["ffn_gate"]["kernel"][1]
    mean = np.abs(kernel).astype(np.float64).mean()
    wanted = mean if linear_class == "autobitlinear" else 1 / mean
    assert first[f"{GATE}_scale"].item() == pytest.approx(wanted, rel=1e-6)


def test_a_workdir_of_the_command_generates_starts_a_run_and_goes_out_again(tmp_path, capsys):
    write_directory(decoder(rope_theta=5e5), tmp_path / "given")
    run("import", tmp_path / "given", "--workdir", tmp_path / "runs")
    printed = capsys.readouterr().out
    for line in (
        "recipe      bitnet_b158, gate relu2, norm block, groups 1\n",
        "2 layers x 16, 4 heads (2 of keys and values), vocabulary of 13\n",
        "positions   rotary base 500,000, trained on texts of 64 tokens\n",
    ):
        assert line in printed
    source = load_source(tmp_path / "runs")
    generate.main(["a b", "--workdir", str(tmp_path / "runs"), "--max_tokens", "3"])
    capsys.readouterr()

    config = source.config(compute="float32")
    fresh = jax.tree.map(np.zeros_like, source.params)
    assert_same_bits(warm_started(fresh, config, CAUSAL_LM, source), source.params)
    other = config_of({**source.architecture, "rope_theta": 1e4})
    with pytest.raises(ValueError, match="rope_theta is 500000.0 in the checkpoint and 10000.0 in"):
        warm_started(fresh, other, CAUSAL_LM, source)

    out = ("export", "--workdir", tmp_path / "runs", "--output", tmp_path / "out")
    run(*out, "--packed", "--dtype", "bfloat16")
    assert "transformers loads it as BitNetForCausalLM\n" in capsys.readouterr().out
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert described["quantization_config"] == OFFLINE and described["dtype"] == "bfloat16"
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        "pipeline_tag: text-generation\ntags:\n- bitnet\n- bitnet_b158\n",
        "arXiv:2402.17764",
        "2-bit codes for transformers' `autobitlinear`",
        'BitNetForCausalLM.from_pretrained("DIR")',
        "converted from the file",
    ):
        assert text in card


def test_what_others_leave_in_a_directory_is_cut_off_or_not_used(tmp_path):
    write_directory(decoder(tied=True), tmp_path)
    words = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    longer = np.concatenate([words, words[:3]])
    frequencies = "model.layers.0.self_attn.rotary_emb.inv_freq"
    arrays = {"model.embed_tokens.weight": longer, "lm_head.weight": longer}
    rewrite(tmp_path, arrays | {frequencies: np.ones(2)}, vocab_size=16)
    source, ignored = read_directory(tmp_path)
    np.testing.assert_array_equal(source.params["words"]["embedding"], words)
    assert (ignored, source.run["surplus_rows"]) == ([frequencies], 3)
    assert source.architecture["vocab_size"] == LETTERS.vocab_size


def test_a_directory_without_quantisation_takes_the_named_recipe(tmp_path):
    write_directory(decoder("bitnet_fp"), tmp_path)
    assert read_directory(tmp_path)[0].architecture["recipe"] == "bitnet_fp"
    assert read_directory(tmp_path, "bitnet_b1")[0].architecture["recipe"] == "bitnet_b1"
    with pytest.raises(ValueError, match="unknown recipe 'bipft_b'"):
        read_directory(tmp_path, "bipft_b")


def test_a_sentencepiece_model_comes_back(tmp_path):
    tokenizer = train_sentencepiece(["a cat sat on the mat and looked at a dog"] * 20, 21)
    source = decoder()
    words = source.params["words"]["embedding"]
    source.params["words"]["embedding"] = np.resize(words, (tokenizer.vocab_size, 16))
    described = {**source.architecture, "vocab_size": tokenizer.vocab_size}
    source = source._replace(tokenizer=tokenizer, architecture=described)
    write_directory(source, tmp_path)
    again, _ = read_directory(tmp_path)
    assert again.tokenizer.fingerprint == tokenizer.fingerprint
    assert_same_bits(again.params, source.params)


@pytest.mark.parametrize(
    ("source", "storage", "message"),
    [
        (lambda: decoder("bitnet_b1"), {}, "recipe is 'bitnet_b1', .* has only 'bitnet_b158' or"),
        (lambda: decoder(groups=2), {}, "decoder.groups is 2, .* BitNetForCausalLM has only 1"),
        (lambda: decoder(norm="linear"), {}, "decoder.norm is 'linear', .* has only 'block'"),
        (lambda: decoder("bitnet_fp"), {"packed": "bitlinear"}, "bitnet_fp has no quantised weigh"),
        (
            lambda: decoder(intermediate=22),
            {"packed": "autobitlinear"},
            "model.layers.0.mlp.gate_proj.weight has 22 rows: .* must be a multiple of 4",
        ),
        (lambda: model("fp"), {"packed": "bitlinear"}, "encoder, .* latent float32 weights only"),
        (lambda: model("fp"), {"dtype": "bfloat16"}, "encoder, .* latent float32 weights only"),
    ],
)
def test_what_the_class_cannot_say_is_refused_and_leaves_nothing(
    tmp_path, source, storage, message
):
    with pytest.raises(ValueError, match=message):
        write_directory(source(), tmp_path / "out", Storage(**storage))
    assert not (tmp_path / "out").exists()


def test_a_damaged_weight_is_not_exported(tmp_path):
    source = decoder()
    source.params["final_norm"]["scale"][3] = np.nan
    with pytest.raises(ValueError, match="final_norm/scale has 1 values that are NaN or infinite"):
        write_directory(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama', .* only 'bert' or 'bipft_jax' or 'bitn"),
        ({"architectures": ["BitNetModel"]}, r"architectures is \['BitNetModel'\], .*BitNetForCa"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', .* only 'relu2' or 'silu'"),
        ({"head_dim": 8}, "head_dim is 8, .* has only None or 4"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, it must be a positive number"),
        ({"num_key_value_heads": 3}, "4 heads are no multiple of the kv_heads, 3"),
        ({"rms_norm_eps": 2}, "rms_norm_eps is 2, it must be a positive number below 1"),
        ({"rope_theta": 0}, "rope_theta is 0, it must be a number above 0"),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, "rope_theta is 5.0, and 6.0"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "has partial_rotary_factor, which"),
        ({"rope_scaling": {"factor": 2}}, "rope_scaling is {'factor': 2}"),
        ({"eos_token_id": 5}, r"eos_token_id is 5, .* end with \[SEP\], has only None or 3"),
        ({"bos_token_id": 128000}, "bos_token_id is 128000"),
        ({"max_position_embeddings": -1}, "max_position_embeddings is -1"),
        ({"max_position_embeddings": 0}, "max_position_embeddings is 0"),
        ({"quantization_config": {"bits": 2}}, "without a quant_method"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method is 'gptq'"),
        (
            {"quantization_config": {"quant_method": "bitnet"}},
            "no linear_class, which says what weight_scale means: autobitlinear or bitlinear",
        ),
        ({"quantization_config": ONLINE | {"linear_class": "x"}}, "linear_class is 'x'"),
        ({"quantization_config": ONLINE | {"use_rms_norm": True}}, "use_rms_norm is True"),
        (
            {"quantization_config": ONLINE | {"modules_to_not_convert": ["mlp"]}},
            r"modules_to_not_convert is \['mlp'\]",
        ),
        (
            {"quantization_config": ONLINE | {"linear_class": "bitlinear"}},
            "'bitlinear', whose weights are packed, but quantization_mode is 'online'",
        ),
        ({"vocab_size": 12}, "model.embed_tokens.weight has shape"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
        ({"quantization_config": OFFLINE}, "o_proj.weight_scale is missing"),
    ],
)
def test_another_kind_of_directory_is_refused_by_key_and_value(tmp_path, written, changes, message):
    shutil.copytree(written[""], tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path, **changes)
    with pytest.raises(ValueError, match=f"{tmp_path}.*{message}"):
        read_directory(tmp_path)


def test_a_missing_size_a_recipe_and_a_foreign_tokenizer_are_named(tmp_path, written):
    shutil.copytree(written[""], tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="the recipe is bitnet_b158, not bitnet_fp"):
        read_directory(tmp_path, "bitnet_fp")
    described = json.loads((tmp_path / "config.json").read_text())
    del described["num_key_value_heads"]
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(ValueError, match="config.json has no num_key_value_heads, so it does not"):
        read_directory(tmp_path)
    rewrite(tmp_path, num_key_value_heads=2)
    for name in ("vocab.txt", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    content = {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="tokenizer.json: model.type is 'BPE'; only BERT's"):
        read_directory(tmp_path)


@pytest.mark.parametrize(
    ("packed", "arrays", "message"),
    [
        ("", {GATE: None}, "gate_proj.weight is missing"),
        ("", {GATE: np.zeros((24, 16), np.uint8)}, "gate_proj.weight has type uint8, not one of"),
        ("", {GATE: np.full((24, 16), np.nan)}, "gate_proj.weight has 384 values that are NaN"),
        ("", {f"{GATE}_scale": np.ones(1)}, "gate_proj.weight_scale is unexpected"),
        ("", {"lm_head.weight": np.zeros((13, 16))}, "lm_head.weight is not model.embed_tokens.we"),
        ("bitlinear", {GATE: None}, "gate_proj.weight is missing"),
        (
            "bitlinear",
            {GATE: np.full((6, 16), 3, np.uint8)},
            "gate_proj.weight: two bits of a co",
        ),
        (
            "bitlinear",
            {GATE: np.zeros((24, 16))},
            r"gate_proj.weight is float32 \(24, 16\): pac",
        ),
        ("bitlinear", {f"{GATE}_scale": -np.ones(1)}, r"weight_scale is \[-1.0\]: it must be one"),
        ("bitlinear", {f"{GATE}_scale": np.ones(24)}, "it must be one positive number"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path, written, packed, arrays, message):
    shutil.copytree(written[packed], tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path, arrays)
    with pytest.raises(ValueError, match=f"model.safetensors.*{message}"):
        read_directory(tmp_path)


@pytest.mark.parametrize("names", [("autobitlinear", "bitlinear"), ("bitlinear", "autobitlinear")])
def test_scales_of_the_other_meaning_are_refused(tmp_path, written, names):
    meant, claimed = names
    shutil.copytree(written[meant], tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path, quantization_config=OFFLINE | {"linear_class": claimed})
    with pytest.raises(ValueError, match=f"meaning of linear_class '{meant}': .*Correct linear_"):
        read_directory(tmp_path)


def test_a_packed_directory_with_rows_that_are_no_multiple_of_4_is_refused(tmp_path, written):
    shutil.copytree(written["bitlinear"], tmp_path, dirs_exist_ok=True)
    rewrite(tmp_path, intermediate_size=22)
    with pytest.raises(ValueError, match="gate_proj.weight has 22 rows: .* multiple of 4"):
        read_directory(tmp_path)
