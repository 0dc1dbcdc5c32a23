"""An encoder's part of a model card."""

from __future__ import annotations

from collections.abc import Iterator

from bipft_jax.checkpoints.source import Source
from bipft_jax.interop.family import Card, Storage
from bipft_jax.interop.tokenizer_files import transformers_tokenizer
from bipft_jax.models.parameters import named_leaves

_BIPFT = "BiPFT, Xing et al. 2023, arXiv:2312.08937"
_BIT = "BiT, Liu et al. 2022, arXiv:2205.13016"
_PAPERS = {
    "fp": "BERT, Devlin et al. 2018, arXiv:1810.04805",
    "bipft_a": _BIPFT,
    "bipft_b": _BIPFT,
    "bit_w1a1": _BIT,
    "bit_w1a2": _BIT,
    "bit_w1a4": _BIT,
    "bibert": "BiBERT, Qin et al. 2022, arXiv:2203.06390",
}


def heads(source: Source) -> list[str]:
    """The heads of a model, of "MLM", "NSP" and "classifier"."""
    if source.objective.outputs:
        return ["classifier"]
    parts = {"MLM": "mlm_bias", "NSP": "nsp/kernel"}
    return [head for head, path in parts.items() if path not in source.missing]


def encoder_card(source: Source, loader: str | None, storage: Storage) -> Card:
    """`Family.card`."""
    recipe = source.config().recipe
    pipeline = "text-classification" if source.objective.outputs else "feature-extraction"
    binary = ["binary-neural-network"] if recipe.weight is not None else []
    licence = "BiT's reference code is CC BY-NC 4.0; none of it is used here."
    return Card(
        pipeline="fill-mask" if "MLM" in heads(source) else pipeline,
        tags=["bert", recipe.name, *binary],
        facts=list(_facts(source)),
        uses="`init_from`, `teacher` or `load_source`",
        loading=list(_loading(source, loader)),
        licence=[licence] if recipe.name.startswith("bit_") else [],
    )


def _facts(source: Source) -> Iterator[str]:
    described, recipe = source.architecture, source.config().recipe
    parameters = sum(leaf.size for leaf in named_leaves(source.params).values())
    binary = recipe.weight is not None or recipe.embedding is not None
    yield f"- Recipe: `{recipe.name}` of bipft_jax ({_PAPERS[recipe.name]})"
    for switch in ("estimator_rank", "lora_rank", "full_precision_weights"):
        if described[switch]:
            yield f"- {switch}: {described[switch]}"
    yield (
        f"- Size: {described['layers']} layers, hidden size {described['hidden']}, "
        f"{described['heads']} heads, vocabulary of {described['vocab_size']:,}, uncased; "
        f"{parameters:,} parameters"
    )
    if binary:
        yield "- Weights: latent float32, binarised as the model runs"
    yield f"- Heads: {', '.join(heads(source)) or 'none'}"


def _loading(source: Source, loader: str | None) -> Iterator[str]:
    if loader is None:
        yield "`transformers` has no such model; the weights in its BERT are another function."
        return
    pooler = loader != "BertModel" or "bert/pooler/kernel" not in source.missing
    tokenizer = transformers_tokenizer(source.tokenizer)
    yield "With transformers:"
    yield ""
    yield "```python"
    yield f"from transformers import {tokenizer}, {loader}"
    yield ""
    options = "" if pooler else ", add_pooling_layer=False"
    yield f'model = {loader}.from_pretrained("DIR"{options})'
    yield f'tokenizer = {tokenizer}.from_pretrained("DIR")'
    yield "```"
