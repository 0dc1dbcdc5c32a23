"""The embedded corpora: English prose that is part of every installation of this library, so that
examples and tests can pretrain on real, if technical, English without a download.

    python-docs     the language reference in `pydoc_data.topics` and the docstrings of the standard
                    library
    package-docs    python-docs and the docstrings of the packages in `PACKAGES`, which this library
                    requires: about four times the text

The text depends on the versions of Python and of the packages, and on which parts of the standard
library are installed. For one environment it is always the same.
"""

import functools
import hashlib
import importlib.util
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from bipft_jax.data.corpus.docstrings import docstrings, prose_paragraphs
from bipft_jax.data.corpus.sentences import split_document

PYTHON_DOCS, PACKAGE_DOCS = "python-docs", "package-docs"
PACKAGES = ("numpy", "scipy", "sklearn", "matplotlib", "jax")
_PACKAGES_OF = {PYTHON_DOCS: (), PACKAGE_DOCS: PACKAGES}

# Share of the documents; it has enough sentences for validation and for a classification task.
HELD_OUT_FRACTION = 0.2

_SKIPPED_DIRECTORIES = frozenset(
    "site-packages dist-packages test tests idle_test __pycache__ lib2to3 pydoc_data".split()
)


@functools.cache
def documents(corpus: str) -> tuple[tuple[str, str], ...]:
    """All documents of `PYTHON_DOCS` or `PACKAGE_DOCS` as (name, text), Python's first; newlines
    separate paragraphs.

    A document is a source file or a topic; its name begins with its package, if it has one. Of a
    repeated paragraph (licences, copied docstrings), only the first occurrence is kept.

    Raises: KeyError for another corpus; ValueError if one of `PACKAGES` is not installed.
    """
    packages = _PACKAGES_OF[corpus]
    raw_documents = sorted(_python_documents())
    for package in packages:
        raw_documents += sorted(_documents_below(_directory(package), f"{package}/"))
    seen: set[str] = set()
    result = []
    for name, raw_texts in raw_documents:
        paragraphs = []
        for raw in raw_texts:
            for paragraph in prose_paragraphs(raw):
                if paragraph not in seen:
                    seen.add(paragraph)
                    paragraphs.append(paragraph)
        if paragraphs:
            result.append((name, "\n".join(paragraphs)))
    return tuple(result)


def training_documents(corpus: str) -> list[tuple[str, str]]:
    """The documents that are not held out, as (name, text)."""
    return [(name, text) for name, text in documents(corpus) if not _is_held_out(name)]


def held_out_documents(corpus: str) -> list[tuple[str, str]]:
    """The documents held out, chosen by a hash of their names, as (name, text)."""
    return [(name, text) for name, text in documents(corpus) if _is_held_out(name)]


def held_out_sentences(corpus: str) -> list[tuple[str, str]]:
    """The distinct sentences of the held-out documents that occur in no training document, in
    order, as (document name, sentence)."""
    # Paragraphs are deduplicated already, but different ones may share a sentence.
    seen = {s for _, text in training_documents(corpus) for s in split_document(text)}
    result = []
    for name, text in held_out_documents(corpus):
        for sentence in split_document(text):
            if sentence not in seen:
                seen.add(sentence)
                result.append((name, sentence))
    return result


def _python_documents() -> Iterator[tuple[str, list[str]]]:
    import pydoc_data.topics  # 700 kB of source

    for topic, text in pydoc_data.topics.topics.items():
        yield f"topics/{topic}", [text]
    yield from _documents_below(Path(sysconfig.get_path("stdlib")), "")


def _documents_below(root: Path, prefix: str) -> Iterator[tuple[str, list[str]]]:
    """Yields (name, docstrings) of each source file below a directory that has docstrings."""
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED_DIRECTORIES]
        for file in files:
            path = Path(directory, file)
            if path.suffix == ".py" and (texts := docstrings(path)):
                yield prefix + path.relative_to(root).as_posix(), texts


def _directory(package: str) -> Path:
    """The installation directory of a package, located without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"{PACKAGE_DOCS} needs the package {package}: pip install -e .")
    return Path(spec.submodule_search_locations[0])


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_FRACTION * 2**64
