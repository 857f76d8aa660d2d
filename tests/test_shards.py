"""WebDataset and parquet shards become a dataset on the disk: exactly, or with an error."""

import gzip
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import refuses

from vavae_tools.data.datasets import caption_data, image_data
from vavae_tools.data.sources import shards
from vavae_tools.data.sources.shards import convert_shards

datasets = pytest.importorskip("datasets")


def image(seed: int, kind: str = "jpg") -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format={"jpg": "jpeg"}.get(kind, kind))
    return file.getvalue()


def pack(path: Path, members: dict[str, bytes | str], form: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def labelled(count: int, first: int = 0) -> dict[str, bytes | str]:
    members = {}
    for i in range(first, first + count):
        members |= {f"{i:05d}.jpg": image(i), f"{i:05d}.cls": f"{i % 3}\n", f"{i:05d}.txt": f"caption {i}, é"}
    return members


def refused(source: Path, words: str) -> None:
    refuses(words, convert_shards, source, source.parent / "refused")
    assert not [path for path in source.parent.iterdir() if "refused" in path.name]


def test_labels_captions_and_bytes_arrive_exactly(tmp_path, run_main, monkeypatch):
    for name, count, first in (("train-000000", 12, 0), ("train-000001", 8, 12), ("val-000000", 5, 20)):
        pack(tmp_path / "in" / f"{name}.tar", labelled(count, first))
    status, said, _ = run_main(shards.main, tmp_path / "in", tmp_path / "out")
    assert status == 0 and "train: 20 images with the columns image, text, label\nval: 5 images" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]

    found = datasets.load_from_disk(str(tmp_path / "out"))
    for subset, numbers in (("train", range(20)), ("val", range(20, 25))):
        rows = found[subset].cast_column("image", datasets.Image(decode=False))
        assert [row["image"]["bytes"] for row in rows] == [image(i) for i in numbers]
        assert rows["label"][:] == [i % 3 for i in numbers] and rows["text"][:] == [f"caption {i}, é" for i in numbers]

    data = image_data(tmp_path / "out", 8)
    assert data.labels == {"0": 0, "1": 1, "2": 2} and len(data.train_data) == 20 and len(data.val_data) == 5
    assert np.array_equal(data.val_data[1]["images"].permute(1, 2, 0), Image.open(io.BytesIO(image(21))))
    assert caption_data("custom", tmp_path / "out", 8).train_data.captions[7] == ("caption 7, é",)


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize(
    ("beside", "labels"),
    [
        ({"json": ({"label": 2, "w": 3}, {"label": 0, "w": 4})}, [2, 0]),
        ({"json": ({"class_name": "wolf"}, {"class_name": "ape"})}, ["wolf", "ape"]),
        ({"json": ({"w": 1}, {"w": 2}), "cls": ("1", "0")}, [1, 0]),
        ({"json": ({"w": 1}, {"w": 2})}, ["né", "x"]),  # the folders
        ({}, ["né", "x"]),
        ({"txt": ("a", "b")}, ["né", "x"]),
    ],
)
def test_where_labels_are(tmp_path, form, beside, labels):
    members = {}
    for k, key in enumerate(("né/a", f"{'d' * 60}/x/{'b' * 60}")):
        members[f"./{key}.PNG"] = image(k, "png")
        for kind, values in beside.items():
            members[f"./{key}.{kind}"] = json.dumps(values[k]) if kind == "json" else values[k]
    pack(tmp_path / "in" / "0.tar", members, form)
    found = convert_shards(tmp_path / "in", tmp_path / "out")
    assert found["train"]["label"][:] == labels
    assert image_data(tmp_path / "out", 8, val_share=0).labels.keys() == set(map(str, labels))


def test_parquet_and_captions_without_labels(tmp_path):
    pack(tmp_path / "tars" / "0.tar", {"1.jpg": image(1), "1.txt": "a", "2.jpg": image(2), "2.txt": "b"})
    assert convert_shards(tmp_path / "tars", tmp_path / "texts")["train"].column_names == ["image", "text"]
    (tmp_path / "in").mkdir()
    rows = {"image": [{"bytes": image(i), "path": None} for i in range(4)], "label": [0, 1, 0, 1]}
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["ape", "wolf"]))
    for subset in ("train", "test"):
        file = str(tmp_path / "in" / f"{subset}-0.parquet")
        datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    convert_shards(tmp_path / "in", tmp_path / "out")
    data = image_data(tmp_path / "out", 8)
    assert data.labels == {"ape": 0, "wolf": 1} and len(data.train_data) == len(data.val_data) == 4


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data, at: data[: at[9]], "0.tar is damaged or cut off at byte"),  # at the end of a member
        (lambda data, at: data[: at[9] + 700], "0.tar is damaged"),
        (lambda data, at: data[: at[9]] + bytes(512) + data[at[9] + 512 :], "damaged or cut off at byte"),
        (lambda data, at: data[: at[9]] + b"?" * 512 + data[at[9] + 512 :], "damaged or cut off at byte"),
        (lambda data, at: data[: at[9]] + bytes(2**21), "damaged or cut off at byte"),  # allocated, never written
        (lambda data, at: data + data, "damaged or cut off at byte"),  # two in one file
        (lambda data, at: gzip.compress(data), "no plain tar"),
        (lambda data, at: b"version https://git-lfs\n", "no plain tar"),
    ],
)
def test_a_damaged_tar_is_an_error(tmp_path, damage, words):
    path = pack(tmp_path / "in" / "0.tar", labelled(8))
    with tarfile.open(path) as tar:
        headers = [member.offset for member in tar]
    path.write_bytes(damage(path.read_bytes(), headers))
    refused(tmp_path / "in", words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"00007.jpg": None, "00007.png": image(7, "png")}, "of 8 images 7 are found, in 8 samples"),
        ({"00007.jpg": None}, "of 7 images 7 are found, in 8 samples"),
        ({"00007.cls": None}, "in, train: 00007 has no label"),
        ({"00007.cls": "wolf"}, "cannot be read .*invalid literal"),
        ({"00000.jpg": None, "00000.JPG": image(0)}, "cannot be read .*share the same"),
        ({"00000.jpg": None, "last.jpg": image(0)}, "cannot be read|are found"),
    ],
)
def test_what_does_not_go_together_is_an_error(tmp_path, changes, words):
    members = labelled(8) | changes
    pack(tmp_path / "in" / "0.tar", {name: content for name, content in members.items() if content is not None})
    refused(tmp_path / "in", words)


def test_folders_that_cannot_be_converted(tmp_path, monkeypatch):
    refused(tmp_path / "nowhere", "No such folder")
    (tmp_path / "in").mkdir()
    refused(tmp_path / "in", r"No \.tar and no \.parquet")
    for name in ("train-0.tar", "extra.tar"):
        pack(tmp_path / "in" / name, labelled(2))
    refused(tmp_path / "in", r"extra\.tar: put train, val or test into every name")
    refuses("is there already", convert_shards, tmp_path / "in", tmp_path)
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(tmp_path / "in", "pip install datasets")


@pytest.mark.parametrize("name", ["", "train", "train/0.tar", "train/{0..9}.tar"])
def test_a_training_on_shards_names_the_command(tmp_path, name):
    pack(tmp_path / "train" / "0.tar", labelled(2))
    words = r"holds tar shards: .*python -m vavae_tools\.data\.sources\.shards .* OUTPUT"
    refuses(words, image_data, tmp_path / name)
    refuses(words, caption_data, "custom", tmp_path / name)
