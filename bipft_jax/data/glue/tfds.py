"""GLUE as TensorFlow Datasets (TFDS) prepares it: `GLUE_DIR/glue/<task>/<version>/`.

Prepare a dataset once, on a machine with TensorFlow (which the catalogue's builder uses to unpack
its downloads) and access to the GLUE download:

    import tensorflow_datasets as tfds
    builder = tfds.builder("glue/sst2", data_dir=GLUE_DIR, file_format="array_record")
    builder.download_and_prepare()

Reading needs no TensorFlow; a prepared directory can be copied to another machine.
"""

import math
import operator
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def newest_version(glue_dir: Path, task: str) -> Path | None:
    """The directory of the newest version of a task's dataset; None without any."""
    directory = glue_dir / "glue" / task
    if not directory.is_dir():
        return None
    import tensorflow_datasets as tfds  # slow to import, and only this layout needs it

    names = [path.name for path in directory.iterdir() if tfds.core.Version.is_valid(path.name)]
    return directory / max(names, key=tfds.core.Version) if names else None


def has_split(dataset: Path, split: str) -> bool:
    """Whether a dataset has the split that `split` names in the benchmark's files.

    Raises: ValueError if the dataset cannot be opened.
    """
    return _catalogue_name(split) in _open(dataset).info.splits


def read_records(
    dataset: Path, split: str, sentences: Sequence[str], label_names: Sequence[str] | None
) -> tuple[list[list[str]], np.ndarray]:
    """Reads a split, in the order of the benchmark's file that it was made from.

    Arguments:
        dataset: directory of one version.
        split: its name in the benchmark's files: "train", "dev", "dev_matched", ...
        sentences: names of the text features.
        label_names: names of the classes, in order; None for scores.

    Returns: N strings for each of `sentences`; the labels, int32[N] class numbers or float32[N].

    Raises:
        ValueError: naming the dataset: incomplete, not in ArrayRecord format, no such split, other
            features or classes, no records, two records with the same idx, a record without a
            label, text that is not UTF-8.
    """
    builder = _open(dataset)
    _check_features(dataset, builder.info.features, sentences, label_names)
    name = _catalogue_name(split)
    if name not in builder.info.splits:
        raise ValueError(f"{dataset} has no split {name}; it has {', '.join(builder.info.splits)}")
    try:
        source = builder.as_data_source(name, file_format="array_record")
        records = source.__getitems__(range(len(source)))  # a third of the time of single reads
    except RuntimeError as error:  # array_record raises it for a missing or truncated shard
        raise ValueError(
            f"{dataset}: split {name} cannot be read ({error}): copy or prepare the dataset again"
        ) from error
    if not records:
        raise ValueError(f"{dataset}: split {name} has no records")

    # TFDS shuffles what it writes; idx is the row's number in the file.
    records = sorted(records, key=operator.itemgetter("idx"))
    where = f"{dataset}: split {name}: the record with idx"
    numbers = [record["idx"] for record in records]
    if twice := next((str(a) for a, b in zip(numbers, numbers[1:], strict=False) if a == b), None):
        raise ValueError(f"{where} {twice} occurs twice: copy or prepare the dataset again")
    for record in records:
        if record["label"] == -1 or not math.isfinite(record["label"]):
            raise ValueError(
                f"{where} {record['idx']} has the label {record['label']}, which stands for none: "
                "the benchmark's test sets cannot be scored"
            )
    texts = [
        [_text(record[name], f"{where} {record['idx']}") for record in records]
        for name in sentences
    ]
    dtype = np.float32 if label_names is None else np.int32
    return texts, np.asarray([record["label"] for record in records], dtype)


def _catalogue_name(split: str) -> str:
    return split.replace("dev", "validation")


def _open(dataset: Path) -> Any:
    """A `tfds.core.DatasetBuilder`."""
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(dataset)
    except (OSError, ValueError) as error:  # a missing or unreadable dataset_info or features
        raise ValueError(
            f"{dataset} cannot be opened ({error}): copy or prepare the dataset again"
        ) from error
    formats = builder.info.available_file_formats()
    if tfds.core.FileFormat.ARRAY_RECORD not in formats:
        names = ", ".join(sorted(form.value for form in formats)) or "unknown"
        raise ValueError(
            f"{dataset}: cannot be read at random positions (its format is {names}). Prepare it "
            "with file_format='array_record'."
        )
    return builder


def _check_features(
    dataset: Path, features: Any, sentences: Sequence[str], label_names: Sequence[str] | None
) -> None:
    """found: a `tfds.features.FeaturesDict`, which may have features that the task does not use."""
    wanted = dict.fromkeys(sentences, "text")
    wanted |= {"label": "float32" if label_names is None else _classes(label_names), "idx": "int32"}
    present = {name: _kind(feature) for name, feature in features.items()}
    if not wanted.items() <= present.items():
        raise ValueError(
            f"{dataset}: not the dataset of this task in TFDS's catalogue, whose features are "
            f"{_listed(wanted)}: it has {_listed(present)}"
        )


def _kind(feature: Any) -> str:
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Text):
        return "text"
    if isinstance(feature, tfds.features.ClassLabel):
        return _classes(feature.names)
    return np.dtype(feature.np_dtype).name if feature.shape == () else str(feature)


def _classes(names: Sequence[str]) -> str:
    return f"one of {', '.join(names)}"


def _listed(kinds: dict[str, str]) -> str:
    return "; ".join(f"{name}: {kind}" for name, kind in kinds.items())


def _text(value: bytes, where: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not valid UTF-8 ({error.reason})") from error
