"""Decoders in and out against `transformers`' BitNetForCausalLM, which shares no code with ours."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from bipft_jax.data.tokenizers import SPECIAL_PIECES, train_sentencepiece
from bipft_jax.generate import Sampling, texts
from bipft_jax.interop.family import Storage
from bipft_jax.interop.hugging_face import read_directory, write_directory
from bipft_jax.interop.tokenizer_files import write_tokenizer
from bipft_jax.models.decoder import Decoder
from tests.interop.decoder_directories import decoder

# Two texts, the second padded on the left.
IDS = np.asarray([[3, 5, 6, 7, 8, 9, 10, 3, 11, 12], [0, 0, 0, 3, 12, 5, 5, 9, 3, 7]])
MASK = (IDS > 0).astype(np.int64)


@pytest.fixture(autouse=True)
def uncompiled():
    """Its quantisers are decorated with torch.compile, which takes a minute."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def our_logits(source) -> np.ndarray:
    model = Decoder(source.config())
    params = jax.tree.map(jnp.asarray, source.params)
    inputs = (jnp.asarray(IDS, jnp.int32), jnp.asarray(MASK, jnp.int32))
    return np.asarray(model.apply({"params": params}, *inputs).logits)


def their_logits(directory, **options) -> np.ndarray:
    model, report = transformers.BitNetForCausalLM.from_pretrained(
        directory, output_loading_info=True, **options
    )
    assert not any(report.values()), report
    positions = np.maximum(MASK.cumsum(1) - 1, 0)
    with torch.no_grad():
        output = model.eval()(
            input_ids=torch.from_numpy(IDS),
            attention_mask=torch.from_numpy(MASK),
            position_ids=torch.from_numpy(positions),
        )
    return output.logits.float().numpy()


def agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within SPEC 12's tolerance of a forward pass, at real tokens."""
    real = MASK > 0
    tolerance = 2e-5 + 2e-6 * np.abs(ours[real]).max()
    worst = np.abs(ours - theirs)[real].max()
    assert worst < tolerance


@pytest.mark.parametrize("packed", ["", "autobitlinear", "bitlinear"])
@pytest.mark.parametrize("tied", [True, False])
def test_an_export_has_the_same_logits_in_transformers(tmp_path, packed, tied):
    source = decoder("bitnet_b158", tied=tied, rope_theta=500_000.0, norm_epsilon=1e-4)
    write_directory(source, tmp_path / "out", Storage(packed=packed))
    agree(our_logits(source), their_logits(tmp_path / "out"))
    again, _ = read_directory(tmp_path / "out")
    agree(our_logits(again), their_logits(tmp_path / "out"))


@pytest.mark.parametrize("gate", ["relu2", "silu"])
def test_a_full_precision_twin_has_the_same_logits(tmp_path, gate):
    source = decoder("bitnet_fp", gate=gate)
    write_directory(source, tmp_path / "out")
    agree(our_logits(source), their_logits(tmp_path / "out"))


def test_what_transformers_saves_in_bfloat16_shards_has_its_logits_here(tmp_path):
    given, saved = tmp_path / "given", tmp_path / "saved"
    write_directory(decoder("bitnet_b158", tied=False, rope_theta=2e4), given)
    theirs = transformers.BitNetForCausalLM.from_pretrained(given, dtype=torch.bfloat16)
    theirs.save_pretrained(saved, max_shard_size="8KB")
    assert len(list(saved.glob("model-*.safetensors"))) > 1
    for name in ("vocab.txt", "tokenizer_config.json"):
        shutil.copy(given / name, saved)
    source, ignored = read_directory(saved)
    assert (ignored, source.architecture["rope_theta"], source.sequence_length) == ([], 2e4, 64)
    assert source.architecture["recipe"] == "bitnet_b158" and not source.architecture["tied"]
    agree(our_logits(source), their_logits(saved, dtype=torch.float32))


def test_the_tokenizer_and_generation_agree(tmp_path):
    source = decoder("bitnet_b158", tied=False)
    write_directory(source, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("[SEP] A b c", add_special_tokens=False)["input_ids"]
    assert ids == [source.tokenizer.sep_id, *source.tokenizer.encode("a B c")]
    model = transformers.BitNetForCausalLM.from_pretrained(tmp_path)
    theirs = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
    ours = list(texts(source, "a b c", 12, Sampling(), 0, None))[-1]
    new = theirs[0, 1:].tolist()
    assert ours == source.tokenizer.decode(new[: new.index(3)] if 3 in new else new)


def test_an_export_that_keeps_the_text_has_the_same_ids_in_transformers(tmp_path):
    paragraphs = Path("README.md").read_text().split("\n\n")
    tokenizer = train_sentencepiece(paragraphs, 900, keeps_text=True)
    write_tokenizer(tokenizer, 64, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = [p for p in paragraphs if not any(piece in p for piece in SPECIAL_PIECES)]
    texts = [*plain, "  A b\n\n C ", "def f(x):\n    return x\n", "é \U0001f600 ﬁ"]
    ids = theirs(texts, add_special_tokens=False)["input_ids"]
    assert ids == tokenizer.encode_batch(texts)
    assert [theirs.decode(i, clean_up_tokenization_spaces=False) for i in ids] == texts


def test_a_sentencepiece_export_has_the_same_ids_in_transformers(tmp_path):
    lines = Path("README.md").read_text().splitlines()
    tokenizer = train_sentencepiece(lines, 600)
    write_tokenizer(tokenizer, 64, tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = [line for line in lines if line.strip() and not any(p in line for p in SPECIAL_PIECES)]
    texts = [*plain, "Été  ① ﬁne\tx ", "日本語", "İstanbul ß"]
    actual = theirs(texts, add_special_tokens=False)["input_ids"]
    expected = tokenizer.encode_batch(texts)
    # Two segmentations of one score are chosen between differently: as many ids of a text.
    different = [(a, b) for a, b in zip(actual, expected, strict=True) if a != b]
    assert len(different) < len(texts) / 100
    assert all(len(a) == len(b) for a, b in different)
    assert theirs.decode(actual[0]) == tokenizer.decode(expected[0])
    ids = theirs("[SEP] a [MASK]", add_special_tokens=False)["input_ids"]
    assert ids == [tokenizer.sep_id, *tokenizer.encode("a"), tokenizer.mask_id]
    around = theirs("a", "b")["input_ids"]
    a, b = tokenizer.encode_batch(["a", "b"])
    assert around == [tokenizer.cls_id, *a, tokenizer.sep_id, *b, tokenizer.sep_id]
