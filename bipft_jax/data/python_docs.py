"""The embedded default corpus: English prose that every Python interpreter carries.

The language reference in `pydoc_data.topics` and the docstrings of the standard library (read by
parsing the source files, never by importing them), with code, doctests, signatures and markup
removed. It needs no download, so examples and tests can pretrain on real, if technical, English.
The text depends on the Python version; for one interpreter it is always the same.
"""

import ast
import functools
import hashlib
import inspect
import os
import pydoc_data.topics
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from bipft_jax.data.sentences import split_document

# Of the documents: enough sentences to validate on and to make a sentence task of.
HELD_OUT_FRACTION = 0.2

_SKIPPED_DIRECTORIES = frozenset(
    "site-packages dist-packages test tests idle_test __pycache__ lib2to3 pydoc_data".split()
)
_ROLE = re.compile(r":[a-z:+]+:`([^`<]*?)\s*(?:<[^`]*>)?`")
_LITERAL = re.compile(r"``?([^`]*)``?")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}([^\s*][^*]*?)\*{1,2}(?![\w*])")
_BULLET = re.compile(r"^(?:[*\-+•]|\d+[.)]|[a-z][.)])\s+")
# A blank line, or the beginning of the next item of a list.
_BLOCK_BREAK = re.compile(r"\n\s*\n|\n(?= *[*\-+•] )")
_SPACE_BEFORE_MARK = re.compile(r" +(?=[,.;:!?](?: |$))")
_CODE = re.compile(
    r">>>|^(?:Args|Arguments|Parameters|Returns|Raises|Attributes):"
    r"|^\s*(?:def|class|import|from|@|\.\.|:\w|\$|#)"
    r"|[{}\\|~^]|==|!=|->|\w\(\w*=|\s=\s|_{3,}"
)
_PROSE_CHARACTER = re.compile(r"[A-Za-z ,.;:'\"()\-?!0-9]")
_MINIMUM_WORDS = 5


@functools.cache
def documents() -> tuple[tuple[str, str], ...]:
    """All documents as (name, text), sorted by name; paragraphs are separated by newlines.

    A paragraph that occurs more than once (licences, copied docstrings) is kept the first time.
    """
    seen: set[str] = set()
    result = []
    for name, raw_texts in sorted(_raw_documents()):
        paragraphs = []
        for raw in raw_texts:
            for paragraph in prose_paragraphs(raw):
                if paragraph not in seen:
                    seen.add(paragraph)
                    paragraphs.append(paragraph)
        if paragraphs:
            result.append((name, "\n".join(paragraphs)))
    return tuple(result)


def training_documents() -> list[tuple[str, str]]:
    """The documents that are not held out, as (name, text)."""
    return [(name, text) for name, text in documents() if not _is_held_out(name)]


def held_out_documents() -> list[tuple[str, str]]:
    """The documents held out, chosen by a hash of their names, as (name, text)."""
    return [(name, text) for name, text in documents() if _is_held_out(name)]


@functools.cache
def _held_out_sentences() -> tuple[str, ...]:
    # Some paragraphs differ and yet share a sentence.
    seen = {s for _, text in training_documents() for s in split_document(text)}
    sentences = (s for _, text in held_out_documents() for s in split_document(text))
    return tuple(dict.fromkeys(s for s in sentences if s not in seen))


def held_out_sentences() -> list[str]:
    """The distinct sentences of the held-out documents that no training document has, in order."""
    return list(_held_out_sentences())


def prose_paragraphs(text: str) -> Iterator[str]:
    """Yields the paragraphs of a docstring or topic that are prose, each on one line."""
    for block in _BLOCK_BREAK.split(inspect.cleandoc(text).expandtabs()):
        lines = block.splitlines()
        indents = [len(line) - len(line.lstrip()) for line in lines]
        if not lines or min(indents) > 4:
            continue  # an indented block is code or a table
        paragraph = " ".join(line.strip() for line in lines)
        paragraph = _ROLE.sub(r"\1", paragraph)
        paragraph = _LITERAL.sub(r"\1", paragraph)
        paragraph = _EMPHASIS.sub(r"\1", paragraph)
        paragraph = _BULLET.sub("", re.sub(r"\s+", " ", paragraph).strip())
        paragraph = _SPACE_BEFORE_MARK.sub("", paragraph)
        paragraph = paragraph.removesuffix("::") + (":" if paragraph.endswith("::") else "")
        if _is_prose(paragraph):
            yield paragraph


def _is_prose(paragraph: str) -> bool:
    if not paragraph[:1].isupper() or paragraph[-1] not in ".!?:" or _CODE.search(paragraph):
        return False
    words = paragraph.split()
    if len(words) < _MINIMUM_WORDS:
        return False
    ordinary = sum(word.strip(".,;:()\"'!?-").replace("-", "").isalpha() for word in words)
    prose_characters = len(_PROSE_CHARACTER.findall(paragraph))
    return ordinary >= 0.8 * len(words) and prose_characters >= 0.97 * len(paragraph)


def _raw_documents() -> Iterator[tuple[str, list[str]]]:
    for topic, text in pydoc_data.topics.topics.items():
        yield f"topics/{topic}", [text]
    library = Path(sysconfig.get_path("stdlib"))
    for directory, subdirectories, files in os.walk(library):
        subdirectories[:] = [name for name in subdirectories if name not in _SKIPPED_DIRECTORIES]
        for file in files:
            path = Path(directory, file)
            if path.suffix == ".py" and (docstrings := _docstrings(path)):
                yield path.relative_to(library).as_posix(), docstrings


def _docstrings(path: Path) -> list[str]:
    """The docstrings of a source file in the order of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in someone else's old source
        try:
            tree = ast.parse(path.read_bytes())
        except SyntaxError:
            return []  # templates and deliberately broken files are no modules
    return list(_docstrings_below(tree))


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    # Only statements are visited: most nodes are expressions, and hold no docstring.
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        if docstring := ast.get_docstring(node, clean=False):
            yield docstring
    for block in ("body", "handlers", "orelse", "finalbody"):
        for statement in getattr(node, block, ()):
            yield from _docstrings_below(statement)


def _is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_FRACTION * 2**64
