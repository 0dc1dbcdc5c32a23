"""The model card (README.md) of an exported model: description, origin, how to load it."""

from __future__ import annotations

from collections.abc import Iterator

from bipft_jax.checkpoints.source import Source
from bipft_jax.data.tokenizers import WordPieceTokenizer
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
# Keys of a run's config that name what a model learned from, with their wording.
_DATA_KEYS = {
    "weights": "converted from the file",
    "init_from": "started from",
    "corpus_dir": "pretrained on the corpus",
    "task": "finetuned on the task",
    "teacher": "distilled from",
}


def heads(source: Source) -> list[str]:
    """The heads of a model, of "MLM", "NSP" and "classifier"."""
    if source.objective.outputs:
        return ["classifier"]
    parts = {"MLM": "mlm_bias", "NSP": "nsp/kernel"}
    return [head for head, path in parts.items() if path not in source.missing]


def model_card(source: Source, transformers_class: str | None) -> str:
    """Markdown with the front matter that the Hugging Face Hub reads.

    transformers_class: the class of `transformers` that loads the model; None without one.
    """
    recipe = source.architecture["recipe"]
    sections = [
        "\n".join(_front_matter(source)),
        f"# {recipe}, {source.architecture['layers']} x {source.architecture['hidden']}",
        "\n".join(_facts(source)),
        "\n".join(_metrics(source)),
        "\n".join(_loading(source, transformers_class)),
        "\n".join(_licence(recipe)),
    ]
    return "\n\n".join(sections) + "\n"


def _front_matter(source: Source) -> Iterator[str]:
    present = heads(source)
    pipeline = "text-classification" if source.objective.outputs else "feature-extraction"
    yield "---"
    yield "library_name: bipft_jax"
    yield f"pipeline_tag: {'fill-mask' if 'MLM' in present else pipeline}"
    yield "tags:"
    yield "- bert"
    yield f"- {source.architecture['recipe']}"
    if source.config().recipe.weight is not None:
        yield "- binary-neural-network"
    yield "---"


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
    run = source.run
    told = [f"{text} `{run[key]}`" for key, text in _DATA_KEYS.items() if run.get(key)]
    yield f"- Origin: {', '.join(told) or 'not recorded'}; step {source.step}"


def _metrics(source: Source) -> Iterator[str]:
    yield "## Metrics"
    yield ""
    if not source.metrics:
        yield "None are stored with this checkpoint."
        return
    yield f"On held-out data, at step {source.step}:"
    yield ""
    yield "| metric | value |"
    yield "|---|---|"
    for name, value in source.metrics.items():
        yield f"| {name} | {'not finite' if value is None else f'{value:.4g}'} |"


def _loading(source: Source, transformers_class: str | None) -> Iterator[str]:
    yield "## Loading"
    yield ""
    yield "With bipft_jax, this directory being `DIR`, as a workdir for `init_from`, `teacher` or"
    yield "`load_source`:"
    yield ""
    yield "```bash"
    yield "python -m bipft_jax.interop.convert import DIR --workdir runs/imported"
    yield "```"
    yield ""
    if transformers_class is None:
        yield "`transformers` has no such model; the weights in its BERT are another function."
        return
    pooler = transformers_class != "BertModel" or "bert/pooler/kernel" not in source.missing
    wordpiece = isinstance(source.tokenizer, WordPieceTokenizer)
    own = "" if wordpiece else " (the weights; only bipft_jax reads the vocabulary)"
    yield f"With transformers{own}:"
    yield ""
    yield "```python"
    yield f"from transformers import {'BertTokenizer, ' if wordpiece else ''}{transformers_class}"
    yield ""
    options = "" if pooler else ", add_pooling_layer=False"
    yield f'model = {transformers_class}.from_pretrained("DIR"{options})'
    if wordpiece:
        yield 'tokenizer = BertTokenizer.from_pretrained("DIR")'
    yield "```"


def _licence(recipe: str) -> Iterator[str]:
    yield "## Licence"
    yield ""
    yield "bipft_jax sets no licence on weights: their terms depend on the text they were trained"
    yield "on and on the model they came from. Name one before you publish them."
    if recipe.startswith("bit_"):
        yield "BiT's reference code is CC BY-NC 4.0; none of it is used here."
