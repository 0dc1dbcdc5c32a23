"""The model card (README.md) of an exported model: description, origin, how to load it."""

from __future__ import annotations

from collections.abc import Iterator

from bipft_jax.checkpoints.source import Source
from bipft_jax.interop.family import Card

# Keys of a run's config that name what a model learned from, with their wording.
_DATA_KEYS = {
    "weights": "converted from the file",
    "init_from": "started from",
    "corpus_dir": "pretrained on the corpus",
    "task": "finetuned on the task",
    "teacher": "distilled from",
}


def model_card(source: Source, card: Card) -> str:
    """Markdown with the front matter that the Hugging Face Hub reads. card: of the family."""
    described = source.architecture
    sections = [
        _front_matter(card),
        [f"# {described['recipe']}, {described['layers']} x {described['hidden']}"],
        [*card.facts, _origin(source)],
        _metrics(source),
        _loading(card),
        _licence(card),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _front_matter(card: Card) -> Iterator[str]:
    yield "---"
    yield "library_name: bipft_jax"
    yield f"pipeline_tag: {card.pipeline}"
    yield "tags:"
    yield from (f"- {tag}" for tag in card.tags)
    yield "---"


def _origin(source: Source) -> str:
    run = source.run
    told = [f"{text} `{run[key]}`" for key, text in _DATA_KEYS.items() if run.get(key)]
    return f"- Origin: {', '.join(told) or 'not recorded'}; step {source.step}"


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


def _loading(card: Card) -> Iterator[str]:
    yield "## Loading"
    yield ""
    yield f"With bipft_jax, this directory being `DIR`, as a workdir for {card.uses}:"
    yield ""
    yield "```bash"
    yield "python -m bipft_jax.interop.convert import DIR --workdir runs/imported"
    yield "```"
    yield ""
    yield from card.loading


def _licence(card: Card) -> Iterator[str]:
    yield "## Licence"
    yield ""
    yield "bipft_jax sets no licence on weights: their terms depend on the text they were trained"
    yield "on and on the model they came from. Name one before you publish them."
    yield from card.licence
