"""Documents from text files, TFDS text datasets and the embedded corpus, read as a stream.

A source is named on the command line by a string:

  'books/*.txt'       text files: a blank line between documents; each line is a paragraph (or, as
                      in BERT's own data, a sentence)
  'wiki/*.jsonl.xz'   JSON lines: one document per line in the field `text`, newlines between
                      paragraphs
  'tfds:NAME[:SPLIT]' a TFDS dataset with a text feature `text`, one document per record; NAME may
                      be the path of a prepared dataset; SPLIT is `train` unless given
  'python-docs'       an embedded corpus, the prose of Python's own documentation
  'package-docs'      python-docs and the prose of the installed NumPy, SciPy, scikit-learn,
                      matplotlib and JAX (`bipft_jax.data.corpus.python_docs`)

Text files may be plain or compressed (.gz, .xz, .zst). The name of an existing file is that file,
even with brackets in it; any other name is a pattern.
"""

import abc
import dataclasses
import hashlib
import lzma
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from bipft_jax.data.corpus import python_docs
from bipft_jax.json_text import parse_json
from bipft_jax.paths import files_named

_BLOCK_BYTES = 1 << 20
# Compressed bytes: a small piece can decompress to a thousand times as much text.
_COMPRESSED_BLOCK_BYTES = 1 << 16
# Each decompresses one member (gzip), stream (xz) or frame (zstd); a file may have several.
_DECOMPRESSORS: dict[str, Callable[[], Any]] = {
    ".gz": lambda: zlib.decompressobj(wbits=16 + zlib.MAX_WBITS),
    ".xz": lzma.LZMADecompressor,
    # zstd's own limit, that of --long=31; the library's is 128 MiB.
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj(),
}
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
# Unicode categories; and letters and symbols without a glyph (Hangul fillers, the Braille blank).
_INVISIBLE = frozenset(("Cc", "Cf", "Cn", "Co", "Cs", "Mn"))
_FILLERS = frozenset("\u115f\u1160\u2800\u3164\uffa0\ufffd")
_TFDS_SPEC = re.compile(r"tfds:(?P<name>[^:]+(?::[\d.*]+(?=:|$))?)(?::(?P<split>.+))?")


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
      text: paragraphs separated by newlines.
      where: where it begins, such as `file:line`, for error messages.
      num_bytes: length of `text` in UTF-8.
      held_out: whether the document is held out, if the source decides that; else None.
    """

    text: str
    where: str
    num_bytes: int
    held_out: bool | None = None


class TextSource(abc.ABC):
    """Yields the same documents in the same order on every call."""

    name: str

    @abc.abstractmethod
    def documents(self) -> Iterator[Document]:
        """Reads all documents from the beginning. Raises ValueError that says where it failed."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """Changes when the content changes."""


def open_sources(specs: Sequence[str]) -> list[TextSource]:
    """Opens the sources named by `specs`; a pattern's files in sorted order, each file once.

    Raises:
      ValueError: for a name or pattern that matches no file, a file that can be read only once (a
        pipe), a file that is neither text nor JSON lines, or both embedded corpora.
    """
    sources: dict[str, TextSource] = {}
    for spec in specs:
        if spec in (python_docs.PYTHON_DOCS, python_docs.PACKAGE_DOCS):
            sources[spec] = EmbeddedSource(spec)
        elif spec.startswith("tfds:"):
            source = TfdsSource(spec)
            sources.setdefault(source.identity, source)
        else:
            for path in files_named(spec):
                sources.setdefault(str(Path(path).resolve()), FileSource(path))
    if python_docs.PYTHON_DOCS in sources and python_docs.PACKAGE_DOCS in sources:
        raise ValueError(
            f"{python_docs.PACKAGE_DOCS} has all of {python_docs.PYTHON_DOCS}: give one of them"
        )
    return list(sources.values())


class FileSource(TextSource):
    """A .txt or .jsonl file, plain or compressed."""

    def __init__(self, path: str):
        self.name = path
        suffixes = Path(path).suffixes
        self._compression = suffixes.pop() if suffixes and suffixes[-1] in _DECOMPRESSORS else ""
        kind = suffixes[-1] if suffixes else ""
        if kind not in (".txt", ".jsonl"):
            raise ValueError(
                f"{path}: not a text file this program reads. Supported endings are .txt and "
                ".jsonl, alone or followed by .gz, .xz or .zst."
            )
        self._is_jsonl = kind == ".jsonl"

    def fingerprint(self) -> str:
        with open(self.name, "rb") as content:
            return hashlib.file_digest(content, "sha256").hexdigest()

    def documents(self) -> Iterator[Document]:
        documents = self._json_documents() if self._is_jsonl else self._text_documents()
        empty = True
        for document in documents:
            empty = False
            yield document
        if empty:
            raise ValueError(f"{self.name}: holds no document.")

    def _lines(self) -> Iterator[tuple[int, str]]:
        """Yields line numbers from 1 and lines without their line break."""
        number = 0
        try:
            for number, line in enumerate(_lines(self._blocks()), start=1):
                encoding = "utf-8-sig" if number == 1 else "utf-8"
                yield number, line.decode(encoding).rstrip("\r")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self.name}:{number}: not valid UTF-8 at byte {error.start} of the line "
                f"({error.reason}). Convert the file to UTF-8."
            ) from error
        except (MemoryError, *_DAMAGED) as error:
            # The file sets the size of zstd's window and of xz's dictionary.
            if isinstance(error, MemoryError) or "memory" in str(error):
                reason = "more memory is needed to decompress it than may be used"
            else:
                reason = "damaged or incomplete compressed file"
            raise ValueError(
                f"{self.name}: {reason}, unreadable after line {number} ({error})."
            ) from error

    def _blocks(self) -> Iterator[bytes]:
        """Yields the decompressed content in pieces."""
        with open(self.name, "rb") as stream:
            if self._compression:
                yield from _decompressed(stream, _DECOMPRESSORS[self._compression])
                return
            while block := stream.read(_BLOCK_BYTES):
                yield block

    def _text_documents(self) -> Iterator[Document]:
        paragraphs: list[str] = []
        first = 0
        for number, line in self._lines():
            for part in line.split("\r"):  # classic Mac OS line breaks, or a partial conversion
                if not _is_blank(part):
                    if not paragraphs:
                        first = number
                    paragraphs.append(part)
                elif paragraphs:
                    yield self._document("\n".join(paragraphs), first)
                    paragraphs = []
        if paragraphs:
            yield self._document("\n".join(paragraphs), first)

    def _json_documents(self) -> Iterator[Document]:
        for number, line in self._lines():
            if _is_blank(line):
                continue
            try:
                record = parse_json(line)
            except ValueError as error:
                raise ValueError(
                    f"{self.name}:{number}: not valid JSON ({error}). A .jsonl file has one JSON "
                    "object on each line."
                ) from error
            text = record.get("text") if isinstance(record, dict) else None
            if not isinstance(text, str):
                raise ValueError(
                    f"{self.name}:{number}: the JSON object has no field 'text' that is a string."
                )
            yield self._document(text, number)

    def _document(self, text: str, line: int) -> Document:
        where = f"{self.name}:{line}"
        try:
            return Document(text, where, len(text.encode("utf-8")))
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
            raise ValueError(f"{where}: not valid Unicode text ({error.reason}).") from error


class TfdsSource(TextSource):
    """A dataset of TensorFlow Datasets with a text feature `text`."""

    def __init__(self, spec: str):
        match = _TFDS_SPEC.fullmatch(spec)
        if match is None:
            raise ValueError(f"{spec!r}: a TFDS dataset is given as tfds:NAME or tfds:NAME:SPLIT.")
        self.name = spec
        self._dataset = match["name"]
        self._split = match["split"] or "train"
        self._records = self._load()

    @property
    def identity(self) -> str:
        """Equal for all specs of the same records."""
        return f"{Path(self._dataset).expanduser().resolve()}:{self._split}"

    def _load(self) -> Sequence[dict[str, object]]:
        import tensorflow_datasets as tfds  # slow to import, and only this source needs it

        directory = Path(self._dataset).expanduser()
        try:
            if (directory / "dataset_info.json").is_file():
                builder = tfds.builder_from_directory(directory)
            else:
                builder = tfds.builder(self._dataset, file_format="array_record")
                builder.download_and_prepare()
            features = dict((builder.info.features or {}).items())
            if not isinstance(features.get("text"), tfds.features.Text):
                raise ValueError(
                    f"{self.name}: the dataset has no text feature 'text'; it has "
                    f"{', '.join(f'{name}: {feature}' for name, feature in features.items())}."
                )
            records = builder.as_data_source(split=self._split)
        except ImportError as error:
            raise ValueError(
                f"{self.name}: preparing this dataset of the TFDS catalogue needs a package that "
                f"is not installed ({error}). Many catalogue datasets need TensorFlow to be "
                "prepared (not to be read): install it, or prepare the dataset elsewhere with "
                "file_format='array_record' and give its directory as tfds:DIR."
            ) from error
        except tfds.core.DatasetNotFoundError as error:
            raise ValueError(
                f"{self.name}: no such dataset ({str(error).splitlines()[0]}) A dataset whose "
                "builder imports TensorFlow is also not found where TensorFlow is not installed; "
                "one prepared elsewhere can be given by its directory, as tfds:DIR."
            ) from error
        except NotImplementedError as error:  # such as a TFRecord dataset
            raise ValueError(
                f"{self.name}: cannot be read at random positions ({error}). Prepare it with "
                "file_format='array_record'."
            ) from error
        self._version = f"{builder.info.full_name} {builder.info.splits[self._split].num_bytes}"
        return records

    def fingerprint(self) -> str:
        identity = f"{self._version} {self._split} {len(self._records)}"
        return hashlib.sha256(identity.encode()).hexdigest()

    def documents(self) -> Iterator[Document]:
        for index in range(len(self._records)):
            where = f"{self.name} record {index}"
            raw = self._records[index]["text"]
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not valid UTF-8 ({error.reason}).") from error
            yield Document(text, where, len(text.encode("utf-8")))


class EmbeddedSource(TextSource):
    """An embedded corpus, with its own choice of held-out documents."""

    def __init__(self, name: str):
        self.name = name

    def documents(self) -> Iterator[Document]:
        for held_out, documents in (
            (False, python_docs.training_documents(self.name)),
            (True, python_docs.held_out_documents(self.name)),
        ):
            for name, text in documents:
                where = f"{self.name}:{name}"
                yield Document(text, where, len(text.encode("utf-8")), held_out)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for document in self.documents():
            digest.update(f"{document.where}\0{document.text}\0".encode())
        return digest.hexdigest()


def _lines(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Yields the lines of a file read in blocks, without their line breaks."""
    pieces: list[bytes] = []  # of the current line
    for block in blocks:
        first, *others = block.split(b"\n")
        pieces.append(first)
        for other in others:
            yield b"".join(pieces)
            pieces = [other]
    if rest := b"".join(pieces):
        yield rest


def _is_blank(line: str) -> bool:
    """Whether a line has only white space and invisible characters, which tokenizers drop:
    controls, formats (U+200B, U+FEFF, U+00AD), combining marks without a base letter."""
    return all(
        char.isspace() or char in _FILLERS or unicodedata.category(char) in _INVISIBLE
        for char in line
    )


def _decompressed(stream: BinaryIO, decompressor: Callable[[], Any]) -> Iterator[bytes]:
    """Yields the content of all members of a compressed file in order. The libraries' own readers
    stop silently at a truncated zstd frame and before a damaged xz stream."""
    member = None
    while compressed := stream.read(_COMPRESSED_BLOCK_BYTES):
        while compressed:
            if member is None:  # gzip and xz allow zeros after a member
                compressed = compressed.lstrip(b"\0")
                if not compressed:
                    break
                member = decompressor()
            yield member.decompress(compressed)
            compressed = member.unused_data if member.eof else b""
            if member.eof:
                member = None
    if member is not None:
        raise EOFError("the file ends in the middle of its compressed content")
