"""Answers of a packed model: for one text, or for a file of texts.

    python -m bipft_runtime MODEL.safetensors "a fine film"
    python -m bipft_runtime MODEL.safetensors --input FILE.tsv --output OUT.tsv

A task on pairs takes two texts. FILE has a header and the task's one or two columns, separated by
tabs; OUT gets these columns, the prediction and the probability of each label.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bipft_runtime.model import Model, Prediction


def rows(path: Path, columns: int) -> Iterator[tuple[str, ...]]:
    """The header and the rows of a tab-separated file.

    Raises: ValueError naming file and line for a row with another number of columns, or bytes that
      are not UTF-8.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                fields = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{number}: not valid UTF-8 ({error.reason})") from error
            cells = tuple(fields.split("\t"))
            if len(cells) != columns:
                raise ValueError(
                    f"{path}:{number}: {len(cells)} tab-separated columns, the task has {columns}"
                )
            yield cells


def _cells(answer: Prediction) -> list[str]:
    if answer.label is None:
        return [f"{answer.score:.3f}"]
    return [answer.label, *(f"{p:.4f}" for p in answer.probabilities.values())]


def main(argv: Sequence[str] | None = None) -> None:
    """The command; exits with a message for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m bipft_runtime",
        description="Answers of a packed 1-bit model: for one text, or for a file of texts.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL", help="file of bipft_jax.interop.pack")
    parser.add_argument("text", nargs="*", help="one text; two for a task on pairs")
    parser.add_argument("--input", type=Path, metavar="FILE", help="tab-separated, with a header")
    parser.add_argument("--output", type=Path, metavar="FILE", help="tab-separated, replaced")
    parser.add_argument("--threads", type=int, default=1, help="that share a text (default 1)")
    arguments = parser.parse_args(argv)
    if bool(arguments.text) == bool(arguments.input) or bool(arguments.input) != bool(
        arguments.output
    ):
        parser.error("give a text, or --input and --output")
    try:
        model = Model(arguments.model, arguments.threads)
        if arguments.text:
            if len(arguments.text) != model.task.sentences:
                name = f"task {model.task.name}" if model.task.name else "a bare encoder"
                parser.error(f"{name} takes {model.task.sentences} text(s)")
            text = arguments.text[0] if len(arguments.text) == 1 else tuple(arguments.text)
            (answer,) = model.predict([text])
            print("\t".join(_cells(answer)[:1]))
            for label, probability in answer.probabilities.items():
                print(f"  {label}\t{probability:.4f}")
            return
        _answer_file(model, arguments.input, arguments.output)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"error: {error}")


def _answer_file(model: Model, source: Path, target: Path) -> None:
    if source.resolve() == target.resolve():
        raise ValueError(f"{target} is the input: name another file as --output")
    examples = rows(source, model.task.sentences)
    header = next(examples, None)
    if header is None:
        raise ValueError(f"{source} is empty: it needs a header")
    texts = list(examples)  # so that a bad line is known before the work
    inputs = [cells[0] if len(cells) == 1 else cells for cells in texts]
    names = [f"p({label})" for label in model.task.labels]
    written = target.with_name(f"{target.name}.{os.getpid()}")  # the target changes at the end
    try:
        with written.open("w", encoding="utf-8", newline="\n") as file:
            file.write("\t".join([*header, "prediction", *names]) + "\n")
            for number, (cells, answer) in enumerate(zip(texts, model.predictions(inputs)), 1):
                file.write("\t".join([*cells, *_cells(answer)]) + "\n")
                if number % 100 == 0:
                    print(f"{number} of {len(texts)}", file=sys.stderr, flush=True)
        written.replace(target)
    finally:
        written.unlink(missing_ok=True)
    print(f"{len(texts)} rows in {target}")


if __name__ == "__main__":
    main()
