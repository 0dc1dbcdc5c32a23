"""Prose in docstrings: parses source files, never imports them, and keeps the paragraphs that are
English, without code, doctests, signatures and markup."""

import ast
import inspect
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

_ROLE = re.compile(r":[a-z:+]+:`([^`<]*?)\s*(?:<[^`]*>)?`")
_LITERAL = re.compile(r"``?([^`]*)``?")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}([^\s*][^*]*?)\*{1,2}(?![\w*])")
_BULLET = re.compile(r"^(?:[*\-+•]|\d+[.)]|[a-z][.)])\s+")
_UNDERLINED_TITLE = re.compile(r"^.*\n *(?:---+|===+|~~~+) *$", re.MULTILINE)
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


def prose_paragraphs(text: str) -> Iterator[str]:
    """Yields the prose paragraphs of a docstring or topic, each on one line."""
    text = _UNDERLINED_TITLE.sub("\n", inspect.cleandoc(text).expandtabs())
    for block in _BLOCK_BREAK.split(text):
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


def docstrings(path: Path) -> list[str]:
    """The docstrings of a source file in the order of the file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in someone else's old source
        try:
            tree = ast.parse(path.read_bytes())
        # Templates and deliberately broken files, NUL bytes, expressions nested too deeply.
        except (SyntaxError, ValueError, RecursionError):
            return []
    return list(_docstrings_below(tree))


def _docstrings_below(node: ast.AST) -> Iterator[str]:
    # Visit only statements: most nodes are expressions, which have no docstring.
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        if docstring := ast.get_docstring(node, clean=False):
            yield docstring
    for block in ("body", "handlers", "orelse", "finalbody"):
        for statement in getattr(node, block, ()):
            yield from _docstrings_below(statement)
