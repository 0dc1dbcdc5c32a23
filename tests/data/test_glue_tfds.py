"""GLUE as TFDS's own builder prepares it from the benchmark's files, against those files."""

import json
import re
import shutil
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.text.glue import Glue

from bipft_jax.data.glue import tasks as glue

SPLITS = {"mnli": ("train", "dev_matched", "dev_mismatched", "test_matched", "test_mismatched")}
BUILT = ("cola", "sst2", "qqp", "stsb", "rte", "mnli")


def write_files(directory: Path, name: str) -> None:
    """A task's files with 20 to 24 rows. CoLA's have no header, test files no labels."""
    task = glue.glue_task(name)
    columns = [*task.sentence_names, task.label]
    for split in SPLITS.get(name, ("train", "dev", "test")):
        rows = []
        for number in range(20 + len(split) % 5):
            texts = [f'{split} {number} {column}: "é\u2028 \x85' for column in task.sentence_names]
            label = f"{number * 0.237 % 5:.3f}"
            if task.label_names:
                label = task.label_names[number * 7 % 5 % len(task.label_names)]
            if name == "cola" and split != "test":
                rows.append(f"x\t{label}\t\t{texts[0]}")
            else:
                rows.append("\t".join(texts if "test" in split else [*texts, label]))
        if name != "cola" or split == "test":
            rows.insert(0, "\t".join(columns[:-1] if "test" in split else columns))
        if name == "qqp":
            rows.insert(5, "a broken\trow")
        path = directory / task.directory / f"{split}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def files_and_data(tmp_path_factory):
    """The directory of the benchmark's files and TFDS's data directory, both to be left alone."""
    files, data = tmp_path_factory.mktemp("files"), tmp_path_factory.mktemp("data")
    unpacked = mock.patch.object(
        tfds.download.DownloadManager, "download_and_extract", lambda *_: str(files)
    )
    # Else TFDS asks its bucket for statistics, and leaves a directory in /tmp.
    no_bucket = mock.patch.object(tfds.core.DatasetInfo, "initialize_from_bucket", lambda _: None)
    for name in BUILT:
        write_files(files, name)
        with unpacked, no_bucket:
            Glue(config=name, data_dir=data, file_format="array_record").download_and_prepare()
    return files, data


@pytest.fixture
def data(files_and_data, tmp_path):
    """A copy of SST-2's dataset."""
    shutil.copytree(files_and_data[1] / "glue" / "sst2", tmp_path / "glue" / "sst2")
    return tmp_path


def read(glue_dir, name: str, split: str = "train") -> glue.GlueSplit:
    return glue.read_split(glue.glue_task(name), glue_dir, split)


def test_the_table_has_the_catalogues_features_and_classes():
    configs = {config.name: config for config in Glue.BUILDER_CONFIGS}
    for name, task in glue.TASKS.items():
        columns = {"cola": ("sentence",), "mrpc": ("", "")}.get(name, task.sentences)
        features = task.tfds_sentences or task.sentence_names
        assert configs[name].text_features == dict(zip(features, columns, strict=True))
        assert list(configs[name].text_features) == list(features)
        classes = task.tfds_label_names or task.label_names
        assert configs[name].label_classes == (classes and list(classes))


@pytest.mark.parametrize("name", BUILT)
def test_a_dataset_reads_as_the_files_that_it_was_made_from(files_and_data, name):
    files, data = files_and_data
    task = glue.glue_task(name)
    assert glue.dev_splits(task, data) == task.dev_splits
    for split in ("train", *task.dev_splits):
        ours, theirs = read(data, name, split), read(files, name, split)
        assert (ours.task, ours.split) == (theirs.task, theirs.split)
        assert ours.sentences1 == theirs.sentences1 and ours.sentences2 == theirs.sentences2
        np.testing.assert_array_equal(ours.labels, theirs.labels, strict=True)  # and the type
        assert len(ours) == 20 + len(split) % 5 and len(set(ours.labels.tolist())) > 1


def test_the_newest_finished_version_is_read(data, monkeypatch):
    versions = data / "glue" / "sst2"
    shutil.copytree(versions / "2.0.0", versions / "10.0.0")
    shutil.copytree(versions / "2.0.0", versions / "9.0.0")
    for stale in ("2.0.0", "9.0.0"):
        (versions / stale / "dataset_info.json").unlink()
    (versions / "incomplete.AB_11.0.0").mkdir()
    monkeypatch.setenv("HOME", str(data))
    assert len(read("~", "sst2")) == 20


def test_dev_sets_count_where_the_dataset_has_them(files_and_data, tmp_path):
    shutil.copytree(files_and_data[1] / "glue" / "mnli", tmp_path / "glue" / "mnli")
    info = tmp_path / "glue" / "mnli" / "2.0.0" / "dataset_info.json"
    content = json.loads(info.read_text())
    content["splits"] = [s for s in content["splits"] if s["name"] != "validation_mismatched"]
    info.write_text(json.dumps(content))
    assert glue.dev_splits(glue.glue_task("mnli"), tmp_path) == ("dev_matched",)


def overwrite_shard(dataset: Path, example: dict) -> None:
    features = tfds.builder_from_directory(dataset).info.features
    shard = dataset / "glue-train.array_record-00000-of-00001"
    writer = array_record_module.ArrayRecordWriter(str(shard), "group_size:1")
    for number in range(20):
        writer.write(features.serialize_example({"idx": number, **example}))
    writer.close()


def as_tfrecord(dataset: Path) -> None:
    info = dataset / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))


def swap_labels(dataset: Path) -> None:
    (dataset / "label.labels.txt").write_text("positive\nnegative\n")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (as_tfrecord, r"2\.0\.0: .*format is tfrecord.*Prepare it with file_format='array_record'"),
        (swap_labels, r"label: one of negative, positive; .*label: one of positive, negative"),
        (lambda d: (d / "dataset_info.json").unlink(), r"2\.0\.0 cannot be opened .*prepare"),
        (lambda d: (d / "features.json").unlink(), r"2\.0\.0 cannot be opened .*prepare"),
        (lambda d: (d / "glue-train.array_record-00000-of-00001").unlink(),
         r"2\.0\.0: split train cannot be read .*No such file"),
        (lambda d: overwrite_shard(d, {"sentence": b"caf\xe9", "label": 1}),
         r"2\.0\.0: split train: the record with idx 0: not valid UTF-8"),
        (lambda d: overwrite_shard(d, {"sentence": "a", "label": 1, "idx": 3}),
         r"2\.0\.0: split train: the record with idx 3 occurs twice"),
        (lambda d: (d.parents[2] / "SST-2").mkdir(),
         r"sst2 exists twice.*/SST-2 .*/glue/sst2/2\.0\.0: remove or move"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(data, damage, message):
    damage(data / "glue" / "sst2" / "2.0.0")
    with pytest.raises(ValueError, match=message) as raised:
        read(data, "sst2")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("dataset", "task", "message"),
    [
        ("sst2", "rte", "features are sentence1: text; .* it has .*sentence: text"),
        ("stsb", "rte", "label: one of entailment, not_entailment; .* it has .*label: float32"),
        ("rte", "stsb", "label: float32; .* it has .*label: one of entailment, not_entailment"),
    ],
)
def test_another_tasks_dataset_is_refused(files_and_data, tmp_path, dataset, task, message):
    shutil.copytree(files_and_data[1] / "glue" / dataset, tmp_path / "glue" / task)
    with pytest.raises(ValueError, match=message):
        read(tmp_path, task)


@pytest.mark.parametrize("name", ["sst2", "stsb"])
def test_a_test_set_has_no_labels(files_and_data, name):
    with pytest.raises(ValueError, match=r"split test: the record with idx 0 has the label -1"):
        read(files_and_data[1], name, "test")


def test_a_missing_split_or_task_lists_what_is_there(data):
    with pytest.raises(ValueError, match="no split validation_matched; it has train, validation"):
        read(data, "sst2", "dev_matched")
    (data / "CoLA").mkdir()
    expected = "no directory MNLI and no TFDS dataset glue/mnli/VERSION, .* tasks CoLA, glue/sst2"
    with pytest.raises(ValueError, match=re.compile(expected + "$")):
        read(data, "mnli")
