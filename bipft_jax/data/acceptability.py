"""A small acceptability task in CoLA's format, made from prose that pretraining has not seen.

    python -m bipft_jax.data.acceptability --output data/glue

It lets the whole road (pretrain, finetune, score) be walked without downloading GLUE. A real
sentence is acceptable (1); one in which two words have changed places is not (0). Only word order
tells them apart:

* both kinds are drawn from the same sentences, those in which a swap is possible at all;
* a function word ("of", "is", ...) changes places with a content word, because two nouns or two
  verbs that do so often leave a sentence that reads well;
* only plain lower-case words move, never the first or last one and none with punctuation on it, so
  capitals and punctuation marks stay where they were;
* each source sentence is used once, real or swapped, in train or in dev, so that a sentence cannot
  be recognised by its words.

What to compare a score with: the majority class has accuracy 0.5 and Matthews 0, and so has a
classifier of single words; one of word pairs, counted in the pretraining prose, is right in about
73 % of cases.
"""

import argparse
import random
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bipft_jax.data.glue import TASKS
from bipft_jax.data.python_docs import held_out_sentences
from bipft_jax.paths import require_local

_PLAIN_WORD = re.compile(r"[a-z]+")
_FUNCTION_WORDS = frozenset(
    "a an the this that these those it its of to in on at by for from with as into and or but if "
    "when than not no is are was be been has have had may can will should must do does which "
    "there".split()
)
_SOURCE = "python-docs"  # CoLA's first column: where a sentence is from

# Long sentences hide a swap among many intact words, short ones have few words to swap.
MIN_WORDS, MAX_WORDS = 6, 40
MIN_DISTANCE = 2  # swapped neighbours would leave most of the order intact


def swappable_pairs(words: Sequence[str]) -> list[tuple[int, int]]:
    """Positions (i, j) of a sentence's words that may change places, i < j.

    Both are plain lower-case words, exactly one is a function word (so they differ), they are at
    least two apart and neither is the sentence's first or last word.
    """
    positions = [i for i, word in enumerate(words[:-1]) if i and _PLAIN_WORD.fullmatch(word)]
    return [
        (i, j)
        for i in positions
        for j in positions
        if j - i >= MIN_DISTANCE and (words[i] in _FUNCTION_WORDS) != (words[j] in _FUNCTION_WORDS)
    ]


def make_rows(
    sentences: Sequence[str], train: int | None, dev: int | None, seed: int
) -> dict[str, list[tuple[str, int]]]:
    """Splits and labels sentences: `{"train": [(sentence, label), ...], "dev": [...]}`.

    Args:
        sentences: source sentences; white space is normalised, repetitions count once.
        train: number of training rows; None takes all that dev leaves.
        dev: number of dev rows; None takes every ninth usable sentence (so 4,500 of them make
            4,000 training and 500 dev rows).
        seed: of the split, the choice of words and the order of rows.

    Raises:
        ValueError: if there are fewer usable sentences than rows asked for.
    """
    # Keyed without case: two sentences that differ only there are the same to an uncased model.
    unique = {
        " ".join(sentence.split()).casefold(): " ".join(sentence.split()) for sentence in sentences
    }
    usable = [
        sentence
        for sentence in unique.values()
        if MIN_WORDS <= len(sentence.split()) <= MAX_WORDS and swappable_pairs(sentence.split())
    ]
    dev = len(usable) // 9 if dev is None else dev
    train = len(usable) - dev if train is None else train
    if dev < 2 or train < 2 or train + dev > len(usable):
        raise ValueError(
            f"cannot make {train} train and {dev} dev rows: the held-out prose has {len(usable)} "
            f"usable sentences (of {MIN_WORDS} to {MAX_WORDS} words, with two words to swap), each "
            "is used once, and each split needs at least 2"
        )
    rng = random.Random(seed)
    rng.shuffle(usable)
    splits = {}
    for split, chosen in (("dev", usable[:dev]), ("train", usable[dev : dev + train])):
        rows = [(s, 1) for s in chosen[::2]] + [(_swap(s, rng), 0) for s in chosen[1::2]]
        rng.shuffle(rows)
        splits[split] = rows
    return splits


def _swap(sentence: str, rng: random.Random) -> str:
    words = sentence.split()
    i, j = rng.choice(swappable_pairs(words))
    words[i], words[j] = words[j], words[i]
    return " ".join(words)


def write_task(glue_dir: str | Path, rows: dict[str, list[tuple[str, int]]]) -> list[Path]:
    """Writes `glue_dir/acceptability/{train,dev}.tsv` in CoLA's columns: source, label, "*" if
    unacceptable, sentence; no header. Existing files are replaced. Returns the paths.

    Raises: ValueError if `glue_dir` is gs:// or the like."""
    require_local({"glue_dir": glue_dir})
    directory = Path(glue_dir) / TASKS["acceptability"].directory
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for split, split_rows in rows.items():
        path = directory / f"{split}.tsv"
        lines = (
            f"{_SOURCE}\t{label}\t{'' if label else '*'}\t{sentence}\n"
            for sentence, label in split_rows
        )
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
        paths.append(path)
    return paths


def main(argv: Sequence[str] | None = None) -> None:
    """The command: writes GLUE_DIR/acceptability/{train,dev}.tsv and says how many rows."""
    parser = argparse.ArgumentParser(
        prog="python -m bipft_jax.data.acceptability",
        description="Writes GLUE_DIR/acceptability/{train,dev}.tsv: real sentences of Python's "
        "documentation, held out from pretraining, against the same kind with two words swapped.",
    )
    parser.add_argument(
        "--output",
        required=True,
        metavar="GLUE_DIR",
        help="directory that holds the GLUE tasks' directories; finetuning's glue_dir",
    )
    parser.add_argument(
        "--train",
        type=int,
        default=None,
        metavar="ROWS",
        help="training rows, half of them swapped (default: every sentence not used for dev)",
    )
    parser.add_argument(
        "--dev",
        type=int,
        default=None,
        metavar="ROWS",
        help="dev rows, half of them swapped (default: a ninth of the usable sentences)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of the split and of the swaps; the same seed writes the same files",
    )
    arguments = parser.parse_args(argv)
    try:
        require_local(vars(arguments))
        rows = make_rows(held_out_sentences(), arguments.train, arguments.dev, arguments.seed)
        paths = write_task(arguments.output, rows)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    for path, split_rows in zip(paths, rows.values(), strict=True):
        print(f"{path}: {len(split_rows)} rows, {sum(label for _, label in split_rows)} acceptable")


if __name__ == "__main__":
    main()
