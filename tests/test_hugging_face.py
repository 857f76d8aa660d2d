"""Datasets of Hugging Face's `datasets` on the disk."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import flat, noise, pixels, refuses, shown

from vavae_tools.data import images as decoded
from vavae_tools.data.datasets import image_data
from vavae_tools.data.images import centre_crop
from vavae_tools.runtime.errors import UserError


@pytest.fixture
def hf():
    return pytest.importorskip("datasets")


def labelled(hf, values, labels, image="image", label="label", kind=None, image_kind=None):
    """A dataset of flat images."""
    features = hf.Features({image: image_kind or hf.Image(), label: kind or hf.Value("int64")})
    images = [flat(value) if isinstance(value, int) else value for value in values]
    return hf.Dataset.from_dict({image: images, label: labels}, features=features)


def save(data, folder: Path) -> Path:
    data.save_to_disk(str(folder))
    return folder


def test_a_dataset_with_sides(hf, tmp_path):
    kind = hf.ClassLabel(names=["wolf", "bear", "fox"])
    subsets = {
        "test": labelled(hf, [9], [0], kind=kind),
        "train": labelled(hf, [1, 2, 3], [2, 0, 2], kind=kind),
        "validation": labelled(hf, [4, 5], [0, 2], kind=kind),
    }
    data = image_data(save(hf.DatasetDict(subsets), tmp_path / "d"), 8, batch_size=3)
    assert data.labels == {"wolf": 0, "bear": 1, "fox": 2} and data.num_classes == 3
    assert shown(data.train_data) == {"fox/000000": 1, "wolf/000001": 2, "fox/000002": 3}
    assert shown(data.val_data) == {"wolf/000000": 4, "fox/000001": 5}
    (batch,) = data.train_dataloader()
    assert dict(zip(batch["images"][:, 0, 0, 0].tolist(), batch["labels"].tolist(), strict=True)) == {1: 2, 2: 0, 3: 2}
    swapped = image_data(tmp_path / "d", 8, train_split="test")
    assert shown(swapped.train_data) == {"wolf/000000": 9} and len(swapped.val_data) == 2
    with pytest.raises(UserError, match=r"No subset 'all' in .*; there are test, train, validation: set train_split"):
        image_data(tmp_path / "d", 8, train_split="all")


def test_one_dataset_has_a_share_held_out(hf, tmp_path):
    words = ["zebra", "ape"] * 20
    folder = save(labelled(hf, list(range(40)), words, kind=hf.Value("string")), tmp_path / "d")
    data = image_data(folder, 8, val_share=0.1)
    assert data.labels == {"ape": 0, "zebra": 1}
    assert data.val_data.labels.bincount().tolist() == [2, 2]
    both = shown(data.train_data) | shown(data.val_data)
    assert both == {f"{words[i]}/{i:06d}": i for i in range(40)}
    assert image_data(folder, 8, train_split=1.0).val_data is None
    assert len(image_data(folder, 8, train_split="0.8").val_data) == 8
    again, other = image_data(folder, 8, val_share=0.1), image_data(folder, 8, val_share=0.1, seed=1)
    assert again.fingerprint() == data.fingerprint() != other.fingerprint()
    assert again.val_data.names == data.val_data.names != other.val_data.names


@pytest.mark.parametrize("image", ["image", "img", "image", "pixel_values", "photo"])
@pytest.mark.parametrize("label", ["label", "labels", "fine_label", "class"])
def test_columns_are_found_by_type_and_name(hf, tmp_path, image, label):
    data = image_data(save(labelled(hf, [7, 8], [1, 0], image, label), tmp_path / "d"), 8, val_share=0)
    assert list(shown(data.train_data).values()) == [7, 8] and data.train_data.labels.tolist() == [1, 0]
    assert data.labels == {"0": 0, "1": 1}


@pytest.mark.parametrize("kind", ["binary", "string"])
def test_images_in_columns_of_other_types(hf, tmp_path, kind):
    array = noise(8, 8, 3)
    Image.fromarray(array).save(tmp_path / "p.png")
    value = (tmp_path / "p.png").read_bytes() if kind == "binary" else str(tmp_path / "p.png")
    folder = save(labelled(hf, [value, value], [0, 0], "pixel_values", image_kind=hf.Value(kind)), tmp_path / "d")
    assert np.array_equal(pixels(image_data(folder, 8, val_share=0).train_data, 1), array)
    numbers = save(labelled(hf, [array[..., 0]], [0], image_kind=hf.Array2D((8, 8), "uint8")), tmp_path / "n")
    refuses("expected a column of type Image", image_data, numbers, 8)


def test_datasets_that_do_not_fit_the_memory(hf, tmp_path, monkeypatch):
    """Grey ones, cut out, in batches by a worker."""
    images = [Image.fromarray(noise(20, 30, seed=i)) for i in range(9)]
    folder = save(labelled(hf, images, list(range(9))), tmp_path / "d")
    monkeypatch.setattr(decoded, "MEMORY_LIMIT", 0)
    data = image_data(folder, 8, batch_size=4, num_workers=1, val_share=0)
    batches = list(data.train_dataloader())
    assert len(batches) == 2 and data.train_data._memory is None
    for batch in batches:
        expected = [np.asarray(centre_crop(images[place], (8, 8))) for place in batch["index"]]
        assert np.array_equal(batch["images"][:, 0], expected) and batch["images"].shape[1] == 1


def test_the_fingerprint_of_a_dataset_follows_its_contents(hf, tmp_path):
    first, other = (save(labelled(hf, [1, value], [0, 1]), tmp_path / str(value)) for value in (2, 3))
    here = image_data(first, 8).fingerprint()
    assert here == image_data(shutil.copytree(first, tmp_path / "copy"), 8).fingerprint()
    assert here != image_data(other, 8).fingerprint() and here != image_data(first, 9).fingerprint()


def test_a_damaged_dataset(hf, tmp_path):
    folder = save(labelled(hf, [1, 2], [0, 1]), tmp_path / "d")
    (folder / "state.json").write_text("{")
    refuses(r"The dataset .*d cannot be read \(.*\): copy or save it again", image_data, folder, 8)
    (folder / "state.json").unlink()
    refuses(r"no Hugging Face dataset; it holds 2 files", image_data, folder, 8, use_hf_dataset=True)


def test_columns_that_are_not_found(hf, tmp_path):
    unlabelled = labelled(hf, [1], [0], label="weight")
    with pytest.raises(UserError, match=r"No labels in .* columns image, weight: expected one of type ClassLabel or"):
        image_data(save(unlabelled, tmp_path / "a"), 8)
    blind = hf.Dataset.from_dict({"text": ["a"], "label": [0]})
    with pytest.raises(UserError, match=r"No images in .* columns text, label: .*dataset\.rename_column"):
        image_data(save(blind, tmp_path / "b"), 8)


@pytest.mark.parametrize(
    ("labels", "kind", "message"),
    [
        ([0, -1], "int64", r"label of the subset train holds -1; expected the classes"),
        ([0, None], "int64", r"holds None; expected"),
        (["a", None], "string", r"holds 'a', None"),
        ([0.5, 1.0], "float32", r"holds 0\.5, 1\.0"),
    ],
)
def test_labels_that_are_none(hf, tmp_path, labels, kind, message):
    refuses(message, image_data, save(labelled(hf, [1, 2], labels, kind=hf.Value(kind)), tmp_path / "d"), 8)


def test_sides_that_do_not_go_together(hf, tmp_path):
    words = hf.Value("string")
    train = labelled(hf, [1, 2], ["a", "b"], kind=words)
    unknown = hf.DatasetDict(train=train, test=labelled(hf, [1], ["c"], kind=words))
    with pytest.raises(UserError, match=r"subset test holds 'c'; expected the classes a, b of the training subset"):
        image_data(save(unknown, tmp_path / "a"), 8)
    lacking = hf.DatasetDict(train=train, test=hf.Dataset.from_dict({"label": ["a"]}))
    refuses(r"The subset test of .* lacks the column image of train", image_data, save(lacking, tmp_path / "b"), 8)
    names = [labelled(hf, [1, 2], [0, 1], kind=hf.ClassLabel(names=names)) for names in (["a", "b"], ["b", "a"])]
    with pytest.raises(UserError, match="have other types or class names in test than in train"):
        image_data(save(hf.DatasetDict(train=names[0], test=names[1]), tmp_path / "c"), 8)
