"""A decoder's part of a model card."""

from __future__ import annotations

from collections.abc import Iterator

from bipft_jax.checkpoints.source import Source
from bipft_jax.interop.family import Card, Storage
from bipft_jax.interop.tokenizer_files import transformers_tokenizer
from bipft_jax.models.parameters import named_leaves

_PAPERS = {
    "bitnet_fp": "the full-precision twin of BitNet b1.58",
    "bitnet_b158": "BitNet b1.58, Ma et al. 2024, arXiv:2402.17764",
}


def decoder_card(source: Source, loader: str | None, storage: Storage) -> Card:
    """`Family.card`."""
    quantised = source.config().recipe.weight is not None
    return Card(
        pipeline="text-generation",
        tags=["bitnet", source.architecture["recipe"]],
        facts=list(_facts(source, storage, quantised)),
        uses="`init_from`, `load_source` or `bipft_jax.generate`",
        loading=list(_loading(source, loader, storage, quantised)),
        licence=[],
    )


def _facts(source: Source, storage: Storage, quantised: bool) -> Iterator[str]:
    described = source.architecture
    parameters = sum(leaf.size for leaf in named_leaves(source.params).values())
    case = "with case and line ends" if source.tokenizer.keeps_text else "uncased"
    yield f"- Recipe: `{described['recipe']}` of bipft_jax ({_PAPERS[described['recipe']]})"
    yield (
        f"- Size: {described['layers']} layers, hidden size {described['hidden']}, "
        f"{described['heads']} heads ({described['kv_heads']} of keys and values), vocabulary of "
        f"{described['vocab_size']:,}, {case}; {parameters:,} parameters"
    )
    if source.sequence_length:
        yield f"- Trained on texts of {source.sequence_length:,} tokens"
    if storage.packed:
        yield (
            f"- Weights of linears: 2-bit codes for transformers' `{storage.packed}`, for "
            f"inference; the others: {storage.dtype}"
        )
    else:
        latent = ", latent: quantised as the model runs" if quantised else ""
        yield f"- Weights: {storage.dtype}{latent}"


def _loading(
    source: Source, loader: str | None, storage: Storage, quantised: bool
) -> Iterator[str]:
    if storage.packed:
        yield "Training can start from the imported model, but not where it was left: a latent"
        yield "weight becomes 0 or one magnitude with a sign."
        yield ""
    tokenizer = transformers_tokenizer(source.tokenizer)
    needs = ", which needs `accelerate` for quantised linears" if quantised else ""
    yield f"With transformers{needs}:"
    yield ""
    yield "```python"
    yield f"from transformers import {loader}, {tokenizer}"
    yield ""
    yield f'model = {loader}.from_pretrained("DIR")'
    yield f'tokenizer = {tokenizer}.from_pretrained("DIR")'
    begins = "[SEP] "
    if source.run.get("decoder", {}).get("separate_documents"):
        begins = ""
    else:
        yield "# A text begins after the end of another one."
    text = f'"{begins}the beginning"'
    yield f'ids = tokenizer({text}, add_special_tokens=False, return_tensors="pt")'
    yield "tokenizer.decode(model.generate(ids.input_ids, max_new_tokens=50)[0])"
    yield "```"
