"""Pictures that no split was made of: folders of classes, Hugging Face datasets, made-up shapes; how they are cut."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vavae_tools.data import images as decoded
from vavae_tools.data.datasets import PictureDataModule, hold_out, picture_data
from vavae_tools.data.demo.shapes import (
    ShapePictures,
    shape_data,
)
from vavae_tools.data.images import CROPS, PictureSetDataModule, centre_crop
from vavae_tools.data.split import choose_sides
from vavae_tools.data.split_report import Picture
from vavae_tools.runtime.errors import UserError


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def flat(value: int, size: int = 8) -> Image.Image:
    """A picture that says by its grey which one it is."""
    return Image.new("RGB", (size, size), (value, value, value))


def pixels(data, place: int) -> np.ndarray:
    """(H, W, C) of one picture of a side."""
    return data[place]["pictures"].permute(1, 2, 0).numpy()


# ---- the crop


def test_the_centre_of_halved_pictures_is_the_mean_of_their_blocks():
    """64×96 to 16: twice halved, every pixel is the mean of 4×4; the middle 16 of 24 columns stay."""
    array = 16 * np.random.default_rng(0).integers(0, 16, (64, 96, 3))  # so that no mean has a fraction
    means = array.reshape(16, 4, 24, 4, 3).mean((1, 3))
    cut = centre_crop(Image.fromarray(array.astype(np.uint8)), (16, 16))
    assert np.array_equal(np.asarray(cut), means[:, 4:20])
    tall = centre_crop(Image.fromarray(array.astype(np.uint8).transpose(1, 0, 2)), (16, 16))
    assert np.array_equal(np.asarray(tall), means.transpose(1, 0, 2)[4:20])


def cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = −1/2."""
    x = np.abs(x)
    inner, outer = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))


def box(x: np.ndarray) -> np.ndarray:
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def resampled(array: np.ndarray, width: int, height: int, kernel) -> np.ndarray:
    """Each new pixel is the mean of old ones, weighted by the kernel, which is as wide as the new pixel or the old."""
    for axis, length in ((1, width), (0, height)):
        scale = array.shape[axis] / length
        old, new = np.arange(array.shape[axis]) + 0.5, (np.arange(length) + 0.5) * scale
        weights = kernel((old - new[:, None]) / max(scale, 1))
        weights /= weights.sum(1, keepdims=True)
        array = np.floor(np.moveaxis(np.tensordot(weights, array, (1, axis)), 0, axis) + 0.5).clip(0, 255)
    return array


@pytest.mark.parametrize(
    ("height", "width", "size"), [(50, 37, 20), (37, 50, 37), (9, 14, 16), (43, 83, 11), (20, 31, 10), (40, 20, 20)]
)
def test_the_centre_of_any_picture(height, width, size):
    """By the definition: halved while the smaller side is at least twice the size, then resized to it, then cut."""
    array = noise(height, width, 3)
    expected = array.astype(float)
    while min(expected.shape[:2]) >= 2 * size:
        expected = resampled(expected, expected.shape[1] // 2, expected.shape[0] // 2, box)
    scale = size / min(expected.shape[:2])
    expected = resampled(expected, round(expected.shape[1] * scale), round(expected.shape[0] * scale), cubic)
    top, left = (expected.shape[0] - size) // 2, (expected.shape[1] - size) // 2
    cut = np.asarray(centre_crop(Image.fromarray(array), (size, size)))
    assert np.abs(cut - expected[top : top + size, left : left + size]).max() <= 1  # of 255: roundings


def test_a_crop_that_is_not_square_fills_its_frame():
    array = np.zeros((40, 40), dtype=np.uint8)
    array[:10], array[30:] = 100, 200  # what lies above and below the middle
    cut = np.asarray(centre_crop(Image.fromarray(array), (10, 20)))
    assert cut.shape == (10, 20) and cut.max() == 0


def test_without_a_crop_the_edges_stay():
    array = np.zeros((20, 40, 3), dtype=np.uint8)
    array[:, 0] = 255
    whole = np.asarray(CROPS["none"](Image.fromarray(array), (10, 16)))
    assert whole.shape == (10, 16, 3) and (whole[:, 0] > 60).all()
    assert np.asarray(CROPS["adm"](Image.fromarray(array), (10, 16)))[:, 0].max() == 0


# ---- folders


def write(folder: Path, values: dict[str, int]) -> Path:
    for name, value in values.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        flat(value).save(folder / name)
    return folder


def shown(data) -> dict[str, int]:
    """Name → grey, as the pictures of a side are read."""
    return {name: int(pixels(data, place).mean()) for place, name in enumerate(data.names)}


def test_a_folder_per_class(tmp_path):
    values = {"dog/2.png": 10, "dog/10.png": 20, "cat/b.jpg": 30, "cat/young/a.PNG": 40, "cat/.hidden/a.png": 50}
    data = picture_data(write(tmp_path, values), 8, val_share=0)
    assert data.labels == {"cat": 0, "dog": 1} and data.num_classes == 2 and data.val_data is None
    assert data.train_data.names == ["cat/b.jpg", "cat/young/a.PNG", "dog/2.png", "dog/10.png"]
    assert data.train_data.labels.tolist() == [0, 0, 1, 1]
    assert list(shown(data.train_data).values()) == [30, 40, 10, 20]
    assert data.train_data.image_size == (8, 8) and data.train_data.channels == 3


def test_people_keep_their_numbers(tmp_path):
    data = picture_data(write(tmp_path, {"ID_10/a.png": 1, "ID_2/a.png": 2, "ID_3/notes/none.txt.png": 3}), 8)
    assert data.labels == {"ID_2": 1, "ID_3": 2, "ID_10": 9} and data.num_classes == 10


def test_folders_without_pictures_are_no_classes(tmp_path):
    (tmp_path / "a_empty").mkdir()
    assert picture_data(write(tmp_path, {"b/1.png": 1}), 8).labels == {"b": 0}


@pytest.mark.parametrize("side", ["validation", "valid", "val", "dev", "test"])
def test_sides_in_folders(tmp_path, side):
    values = {"train/dog/1.png": 1, "train/cat/1.png": 2, f"{side}/dog/1.png": 3, "unused/fox/1.png": 4}
    data = picture_data(write(tmp_path, values), 8)
    assert shown(data.train_data) == {"cat/1.png": 2, "dog/1.png": 1} and shown(data.val_data) == {"dog/1.png": 3}
    assert data.labels == {"cat": 0, "dog": 1} and data.val_data.labels.tolist() == [1]


def test_which_side_trains_can_be_said(tmp_path):
    write(tmp_path, {f"{side}/{name}/{i}.png": i for side in ("train", "val") for name in "ab" for i in range(2)})
    data = picture_data(tmp_path, 8, train_split="val", val_share=0.5)
    assert len(data.train_data) == len(data.val_data) == 2  # val has the names' first place, and is cut
    with pytest.raises(UserError, match=r"No folders of pictures in .*extra; .* holds 2 folders, train/, val/"):
        picture_data(tmp_path, 8, train_split="extra")


def test_a_class_may_be_called_train(tmp_path):
    data = picture_data(write(tmp_path, {"train/1.png": 1, "plane/1.png": 2}), 8)
    assert data.labels == {"plane": 0, "train": 1}


def test_validation_of_other_classes_is_refused(tmp_path):
    write(tmp_path, {"train/cat/1.png": 1, "val/images/1.png": 2})
    with pytest.raises(UserError, match=r"val holds images, which is no class of .*train: expected the same folders"):
        picture_data(tmp_path, 8)


def test_a_split_is_read_as_its_own_module_reads_it(split_dir):
    own, other = PictureDataModule(split_dir, (16, 24)), picture_data(split_dir, (16, 24))
    assert other.labels == own.labels and other.num_classes == own.num_classes
    for side in ("train_data", "val_data"):
        mine, theirs = getattr(other, side), getattr(own, side)
        assert mine.names == theirs.names and torch.equal(mine.labels, theirs.labels)
        assert torch.equal(mine.in_memory(), theirs.in_memory()) and mine.crop == "none"


def test_a_splits_labels_are_those_it_says(split_dir, tmp_path):
    split = shutil.copytree(split_dir, tmp_path / "split")
    info = json.loads((split / "split_info.json").read_text())
    info["labels"] = {"ID_1": 5, "ID_2": 0, "ID_3": 2}
    (split / "split_info.json").write_text(json.dumps(info))
    data = picture_data(split, 16)
    assert data.num_classes == 6
    assert {n.split("/")[0]: k for n, k in zip(data.val_data.names, data.val_data.labels.tolist(), strict=True)} == {
        "ID_1": 5,
        "ID_2": 0,
        "ID_3": 2,
    }


def test_grey_pictures_stay_grey_unless_asked_and_large_ones_get_their_centre(tmp_path):
    array = noise(40, 60)
    (tmp_path / "a").mkdir()
    Image.fromarray(array).save(tmp_path / "a" / "1.png")
    expected = np.asarray(centre_crop(Image.fromarray(array), (16, 16)))
    read = pixels(picture_data(tmp_path, 16, channels=3).train_data, 0)
    assert read.shape == (16, 16, 3) and all(np.array_equal(read[..., k], expected) for k in range(3))
    data = picture_data(tmp_path, 16)
    assert data.channels == 1 and np.array_equal(pixels(data.train_data, 0)[..., 0], expected)


# ---- what is held out


def folder_of(tmp_path: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (tmp_path / name).mkdir(parents=True)
        for i in range(count):
            (tmp_path / name / f"{i}.png").write_bytes(f"never opened, {name} {i}".encode())
    return tmp_path


def test_a_share_of_each_class_is_held_out(tmp_path):
    data = picture_data(folder_of(tmp_path, {"a": 100, "b": 30, "c": 2, "d": 1}), 8, channels=3)
    train, val = data.train_data, data.val_data
    assert val.labels.bincount(minlength=4).tolist() == [5, 2, 1, 0]
    assert train.labels.bincount().tolist() == [95, 28, 1, 1]
    assert not set(train.names) & set(val.names) and len(set(train.names) | set(val.names)) == 133
    for side in (train, val):
        assert [path.parent.name for path in side.paths] == ["abcd"[label] for label in side.labels]
        assert ["/".join(path.parts[-2:]) for path in side.paths] == side.names


def test_what_is_held_out_follows_from_the_seed(tmp_path):
    folder_of(tmp_path, {"a": 200})

    def held(**options):
        return set(picture_data(tmp_path, 8, val_share=0.2, channels=3, **options).val_data.names)

    first = held()
    assert held() == first and len(first) == 40 and held(seed=1) != first
    (tmp_path / "a" / "more.png").write_bytes(b"")
    assert len(held() ^ first) <= 2


def test_equal_files_are_never_on_both_sides(tmp_path):
    folder_of(tmp_path, {"a": 40})
    for i in range(20):  # each of them twice
        (tmp_path / "a" / f"{i + 20}.png").write_bytes((tmp_path / "a" / f"{i}.png").read_bytes())
    data = picture_data(tmp_path, 8, val_share=0.3, channels=3)
    sides = [{path.read_bytes() for path in side.paths} for side in (data.train_data, data.val_data)]
    assert not sides[0] & sides[1] and len(data.val_data) == 12


def test_classes_are_held_out_one_by_one_as_all_at_once(tmp_path):
    """Where no pictures are equal: `choose_sides` for all, which needs a description of each at the same time."""
    counts = {f"{k}": 3 * k + 1 for k in range(9)}
    data = picture_data(folder_of(tmp_path, counts), 8, val_share=0, channels=3).train_data
    described = [
        Picture(str(label), name, path="", bytes=0, mtime_ns=0)
        for label, name in zip(data.labels.tolist(), data.names, strict=True)
    ]
    expected = choose_sides(described, 0.3, seed=4)
    train, val = hold_out(data, 0.3, seed=4)
    assert val.names == [picture.name for picture in described if expected[picture.key] == "val"]
    assert train.names == [picture.name for picture in described if expected[picture.key] == "train"]


@pytest.mark.parametrize(("share", "counts"), [(0, {"a": 9}), (0.5, {"a": 1, "b": 1})])
def test_nothing_may_be_held_out(tmp_path, share, counts):
    data = picture_data(folder_of(tmp_path, counts), 8, val_share=share, channels=3)
    assert data.val_data is None and data.val_dataloader() == [] and len(data.train_data) == sum(counts.values())


def test_every_class_keeps_one_to_train(tmp_path):
    assert len(picture_data(folder_of(tmp_path, {"a": 3}), 8, val_share=0.99, channels=3).train_data) == 1


# ---- as a data module


def test_batches_come_in_order_from_memory_or_disk(tmp_path, monkeypatch):
    folder = write(tmp_path, {f"{name}/{i}.png": 10 * k + i for k, name in enumerate("abc") for i in range(6)})
    batches = []
    for limit, workers in ((2**30, None), (0, 0), (0, 1), (2**30, 1)):
        monkeypatch.setattr(decoded, "MEMORY_LIMIT", limit)
        data = picture_data(folder, 8, batch_size=4, num_workers=workers, val_share=0.2)
        assert data.num_workers == (workers or 0)
        batches.append([*data.train_dataloader(), *data.val_dataloader()])
        assert (data.train_data._memory is None) == (limit == 0)
    for others in batches[1:]:
        assert len(others) == len(batches[0]) == 4  # 15 of 4, the rest in another epoch; 3
        for batch, other in zip(batches[0], others, strict=True):
            assert batch.keys() == other.keys() == {"pictures", "labels", "index"}
            assert all(torch.equal(batch[name], other[name]) for name in batch)
    for batch in batches[0][:3]:
        assert batch["pictures"].shape == (4, 3, 8, 8) and batch["pictures"].dtype == torch.uint8
        assert torch.equal(batch["pictures"][:, 0, 0, 0] // 10, batch["labels"])


def test_too_many_for_the_memory_have_workers(tmp_path, monkeypatch):
    write(tmp_path, {"a/1.png": 1})
    monkeypatch.setattr(decoded, "MEMORY_LIMIT", 0)
    assert picture_data(tmp_path, 8).num_workers > 0


def test_each_picture_is_opened_once(tmp_path, monkeypatch):
    folder = write(tmp_path, {f"a/{i}.png": i for i in range(130)})
    data = picture_data(folder, 8, batch_size=10, val_share=0.1)
    opened, open_picture = [], type(data.train_data).opened
    monkeypatch.setattr(
        type(data.train_data), "opened", lambda self, path: opened.append(path) or open_picture(self, path)
    )
    for _ in range(2):
        assert len([*data.train_dataloader(), *data.val_dataloader()]) == 13
    data.train_data.few_of_each(5)
    assert len(opened) == len(set(opened)) == 130


def test_previews_and_further_rows(tmp_path):
    data = picture_data(write(tmp_path, {f"{name}/{i}.png": i for name in "ab" for i in range(3)}), 8, val_share=0)
    data.train_data.along["features"] = torch.arange(6)
    few = data.train_data.few_of_each(4)
    assert few["labels"].tolist() == [0, 1, 0, 1] and few["features"].tolist() == few["index"].tolist() == [0, 3, 1, 4]


@pytest.mark.parametrize("change", [None, "size", "crop", "channels", "a picture", "seed", "a name", "labels"])
def test_the_fingerprint_tells_data_apart(tmp_path, change):
    write(tmp_path, {f"{name}/{i}.png": i for name in "ab" for i in range(6)})
    options = {"image_size": 8}
    before = picture_data(tmp_path, **options).fingerprint()
    if change in ("size", "crop", "channels", "seed"):
        options |= {
            "size": {"image_size": 9},
            "crop": {"crop": "none"},
            "channels": {"channels": 1},
            "seed": {"seed": 1},
        }[change]
    elif change == "a picture":
        flat(1, size=4).save(tmp_path / "a" / "0.png")
    elif change == "a name":
        (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "7.png")
    elif change == "labels":
        write(tmp_path, {"0/1.png": 1})
    assert (picture_data(tmp_path, **options).fingerprint() == before) == (change is None)


# ---- what cannot be


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    write(tmp_path, {"a/1.png": 1})
    (tmp_path / "a" / "2.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"a/2\.png cannot be read as an image \(.*\): remove or replace it"):
        picture_data(tmp_path, 8, val_share=0).train_data.in_memory()


def test_folders_that_hold_no_data_are_named(tmp_path):
    with pytest.raises(UserError, match=r"No such folder: .*nowhere"):
        picture_data(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"No picture folder .* in .*; it holds nothing"):
        picture_data(tmp_path)
    write(tmp_path / "loose", {"1.png": 1})
    with pytest.raises(UserError, match=r"it holds 1 file\. Put each person's pictures into a folder of their own"):
        picture_data(tmp_path / "loose")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_share": 1}, "val_share 1: expected a share from 0 to below 1"),
        ({"val_share": -0.1}, "val_share -0.1: expected"),
        ({"crop": "middle"}, "No crop 'middle'; there are adm, none"),
        ({"image_size": 0}, "image_size 0: at least one pixel"),
        ({"batch_size": 0}, "batch_size 0"),
        (
            {"use_hf_dataset": True},
            r"no Hugging Face dataset; it holds 1 folder, a/.*state\.json.*use_hf_dataset=false",
        ),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path, options, message):
    write(tmp_path, {"a/1.png": 1})
    with pytest.raises(UserError, match=message):
        picture_data(tmp_path, **options)


# ---- Hugging Face datasets


@pytest.fixture
def hf():
    return pytest.importorskip("datasets")


def labelled(hf, values, labels, picture="image", label="label", kind=None, picture_kind=None):
    """A dataset of flat pictures."""
    features = hf.Features({picture: picture_kind or hf.Image(), label: kind or hf.Value("int64")})
    pictures = [flat(value) if isinstance(value, int) else value for value in values]
    return hf.Dataset.from_dict({picture: pictures, label: labels}, features=features)


def save(data, folder: Path) -> Path:
    data.save_to_disk(str(folder))
    return folder


def test_a_dataset_with_sides(hf, tmp_path):
    kind = hf.ClassLabel(names=["wolf", "bear", "fox"])
    sides = {
        "test": labelled(hf, [9], [0], kind=kind),
        "train": labelled(hf, [1, 2, 3], [2, 0, 2], kind=kind),
        "validation": labelled(hf, [4, 5], [0, 2], kind=kind),
    }
    data = picture_data(save(hf.DatasetDict(sides), tmp_path / "d"), 8, batch_size=3)
    assert data.labels == {"wolf": 0, "bear": 1, "fox": 2} and data.num_classes == 3
    assert shown(data.train_data) == {"fox/000000": 1, "wolf/000001": 2, "fox/000002": 3}
    assert shown(data.val_data) == {"wolf/000000": 4, "fox/000001": 5}
    (batch,) = data.train_dataloader()
    assert {int(p[0, 0, 0]): int(k) for p, k in zip(batch["pictures"], batch["labels"], strict=True)} == {
        1: 2,
        2: 0,
        3: 2,
    }
    swapped = picture_data(tmp_path / "d", 8, train_split="test")
    assert shown(swapped.train_data) == {"wolf/000000": 9} and len(swapped.val_data) == 2
    with pytest.raises(UserError, match=r"No subset 'all' in .*; there are test, train, validation: set train_split"):
        picture_data(tmp_path / "d", 8, train_split="all")


def test_one_dataset_has_a_share_held_out(hf, tmp_path):
    words = ["zebra", "ape"] * 20
    folder = save(labelled(hf, list(range(40)), words, kind=hf.Value("string")), tmp_path / "d")
    data = picture_data(folder, 8, val_share=0.1)
    assert data.labels == {"ape": 0, "zebra": 1}
    assert data.val_data.labels.bincount().tolist() == [2, 2]
    both = shown(data.train_data) | shown(data.val_data)
    assert both == {f"{words[i]}/{i:06d}": i for i in range(40)}
    again, other = picture_data(folder, 8, val_share=0.1), picture_data(folder, 8, val_share=0.1, seed=1)
    assert again.fingerprint() == data.fingerprint() != other.fingerprint()
    assert again.val_data.names == data.val_data.names != other.val_data.names


@pytest.mark.parametrize("picture", ["image", "img", "picture", "pixel_values", "photo"])
@pytest.mark.parametrize("label", ["label", "labels", "fine_label", "class"])
def test_columns_are_found_by_type_and_name(hf, tmp_path, picture, label):
    data = picture_data(save(labelled(hf, [7, 8], [1, 0], picture, label), tmp_path / "d"), 8, val_share=0)
    assert list(shown(data.train_data).values()) == [7, 8] and data.train_data.labels.tolist() == [1, 0]
    assert data.labels == {"0": 0, "1": 1}


def test_a_label_column_of_any_name_by_its_type(hf, tmp_path):
    kind = hf.ClassLabel(names=["a", "b"])
    data = picture_data(save(labelled(hf, [7, 8], [1, 0], label="species", kind=kind), tmp_path / "d"), 8, val_share=0)
    assert data.labels == {"a": 0, "b": 1} and data.train_data.labels.tolist() == [1, 0]


@pytest.mark.parametrize("form", ["bytes", "path", "grey array", "colour array", "channels first", "lists"])
def test_pictures_in_columns_of_other_types(hf, tmp_path, form):
    array = noise(8, 8, 3)
    if form in ("grey array", "lists"):
        array = np.repeat(array[..., :1], 3, axis=2)
    Image.fromarray(array).save(tmp_path / "p.png")
    value, kind = {
        "bytes": ((tmp_path / "p.png").read_bytes(), hf.Value("binary")),
        "path": (str(tmp_path / "p.png"), hf.Value("string")),
        "grey array": (array[..., 0], hf.Array2D((8, 8), "uint8")),
        "colour array": (array, hf.Array3D((8, 8, 3), "uint8")),
        "channels first": (array.transpose(2, 0, 1), hf.Array3D((3, 8, 8), "int64")),
        "lists": (array[..., 0].tolist(), [[hf.Value("int32")]]),
    }[form]
    folder = save(labelled(hf, [value, value], [0, 0], "pixel_values", picture_kind=kind), tmp_path / "d")
    assert np.array_equal(pixels(picture_data(folder, 8, val_share=0, channels=3).train_data, 1), array)
    assert picture_data(folder, 8).channels == (1 if form in ("grey array", "lists") else 3)


@pytest.mark.parametrize("value", [np.full((8, 8), 0.5), np.full((8, 8), 256), np.zeros((8, 8, 2), int)])
def test_numbers_that_are_no_picture(hf, tmp_path, value):
    kind = (hf.Array2D if value.ndim == 2 else hf.Array3D)(value.shape, str(value.dtype))
    folder = save(labelled(hf, [value], [0], picture_kind=kind), tmp_path / "d")
    with pytest.raises(UserError, match=r"0/000000 of d, train cannot be read as an image .*expected"):
        picture_data(folder, 8).train_data.in_memory()


def test_datasets_that_do_not_fit_the_memory(hf, tmp_path, monkeypatch):
    """Grey ones, cut out, in batches by a worker."""
    pictures = [Image.fromarray(noise(20, 30, seed=i)) for i in range(9)]
    folder = save(labelled(hf, pictures, list(range(9))), tmp_path / "d")
    monkeypatch.setattr(decoded, "MEMORY_LIMIT", 0)
    data = picture_data(folder, 8, batch_size=4, num_workers=1, val_share=0)
    batches = list(data.train_dataloader())
    assert len(batches) == 2 and data.train_data._memory is None
    for batch in batches:
        for picture, place in zip(batch["pictures"], batch["index"], strict=True):
            expected = np.asarray(centre_crop(pictures[place], (8, 8)))
            assert picture.shape == (1, 8, 8) and np.array_equal(picture[0], expected)


def test_only_the_rows_of_a_batch_are_taken_from_several_files(hf, tmp_path, monkeypatch):
    dataset = labelled(hf, list(range(30)), [i % 3 for i in range(30)])
    dataset.save_to_disk(str(tmp_path / "d"), num_shards=4)
    assert len(list((tmp_path / "d").glob("*.arrow"))) == 4
    monkeypatch.setattr(decoded, "MEMORY_LIMIT", 0)
    data = picture_data(tmp_path / "d", 8, val_share=0).train_data
    assert data._dataset.column_names == ["image"]
    opened, open_picture = [], type(data).opened
    monkeypatch.setattr(type(data), "opened", lambda self, row: opened.append(1) or open_picture(self, row))
    batch = data.__getitems__([29, 3, 17, 8])
    assert batch["pictures"][:, 0, 0, 0].tolist() == [29, 3, 17, 8] and len(opened) == 4
    assert batch["labels"].tolist() == [2, 0, 2, 2] and data._memory is None


def test_each_row_is_opened_once(hf, tmp_path, monkeypatch):
    data = picture_data(save(labelled(hf, [1] * 70, [0] * 70), tmp_path / "d"), 8, batch_size=7, val_share=0.1)
    opened, open_picture = [], type(data.train_data).opened
    monkeypatch.setattr(type(data.train_data), "opened", lambda self, row: opened.append(1) or open_picture(self, row))
    for _ in range(2):
        assert len([*data.train_dataloader(), *data.val_dataloader()]) == 10
    assert len(opened) == 70


def test_the_fingerprint_of_a_dataset_follows_its_contents(hf, tmp_path):
    first, other = (save(labelled(hf, [1, value], [0, 1]), tmp_path / str(value)) for value in (2, 3))
    here = picture_data(first, 8).fingerprint()
    assert here == picture_data(shutil.copytree(first, tmp_path / "copy"), 8).fingerprint()
    assert here != picture_data(other, 8).fingerprint() and here != picture_data(first, 9).fingerprint()


def test_without_datasets_one_line_says_so(hf, tmp_path, monkeypatch):
    folder = save(labelled(hf, [1, 2], [0, 1]), tmp_path / "d")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r": pip install datasets$"):
        picture_data(folder, 8)
    write(tmp_path / "folders", {"a/1.png": 1})
    assert len(picture_data(tmp_path / "folders", 8).train_data) == 1  # it is not needed here


def test_folders_are_read_as_folders_where_that_is_asked_for(hf, tmp_path):
    folder = save(labelled(hf, [1, 2], [0, 1]), tmp_path / "d")
    with pytest.raises(UserError, match="No picture folder"):
        picture_data(folder, 8, use_hf_dataset=False)
    assert len(picture_data(folder, 8, use_hf_dataset=True, val_share=0).train_data) == 2


def test_a_damaged_dataset(hf, tmp_path):
    folder = save(labelled(hf, [1, 2], [0, 1]), tmp_path / "d")
    (folder / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"The dataset .*d cannot be read \(.*\): copy or save it again"):
        picture_data(folder, 8)
    (folder / "state.json").unlink()
    with pytest.raises(UserError, match=r"no Hugging Face dataset; it holds 2 files"):
        picture_data(folder, 8, use_hf_dataset=True)


def test_columns_that_are_not_found(hf, tmp_path):
    unlabelled = labelled(hf, [1], [0], label="weight")
    with pytest.raises(
        UserError, match=r"No labels in .* columns image, weight: expected one of type ClassLabel or call"
    ):
        picture_data(save(unlabelled, tmp_path / "a"), 8)
    blind = hf.Dataset.from_dict({"text": ["a"], "label": [0]})
    with pytest.raises(
        UserError, match=r"No images in .* columns text, label: .*Rename yours with dataset\.rename_col"
    ):
        picture_data(save(blind, tmp_path / "b"), 8)


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
    with pytest.raises(UserError, match=message):
        picture_data(save(labelled(hf, [1, 2], labels, kind=hf.Value(kind)), tmp_path / "d"), 8)


def test_sides_that_do_not_go_together(hf, tmp_path):
    words = hf.Value("string")
    train = labelled(hf, [1, 2], ["a", "b"], kind=words)
    unknown = hf.DatasetDict(train=train, test=labelled(hf, [1], ["c"], kind=words))
    with pytest.raises(UserError, match=r"subset test holds 'c'; expected the classes a, b of the training subset"):
        picture_data(save(unknown, tmp_path / "a"), 8)
    lacking = hf.DatasetDict(train=train, test=hf.Dataset.from_dict({"label": ["a"]}))
    with pytest.raises(UserError, match=r"The subset test of .* lacks the column image of train"):
        picture_data(save(lacking, tmp_path / "b"), 8)
    names = [labelled(hf, [1, 2], [0, 1], kind=hf.ClassLabel(names=names)) for names in (["a", "b"], ["b", "a"])]
    with pytest.raises(UserError, match="have other types or class names in test than in train"):
        picture_data(save(hf.DatasetDict(train=names[0], test=names[1]), tmp_path / "c"), 8)


# ---- shapes


def test_shapes_as_a_data_module():
    data = shape_data(20, image_size=16, batch_size=8, val_share=0.2)
    assert isinstance(data, PictureSetDataModule) and data.num_classes == 4
    assert data.labels == {"red_circle": 0, "blue_circle": 1, "red_square": 2, "blue_square": 3}
    batches = list(data.train_dataloader())
    assert [batch["pictures"].shape for batch in batches] == [(8, 3, 16, 16)] * 2
    assert (len(data.train_data), len(data.val_data), data.train_data.channels) == (20, 4, 3)
    train, val = (set(map(bytes, side.in_memory().numpy())) for side in (data.train_data, data.val_data))
    assert len(train) == 20 and not train & val
    assert shape_data(20, val_share=0).val_data is None
    prints = {shape_data(*arguments).fingerprint() for arguments in ((20,), (21,), (20, 5), (20, 4, 16))}
    assert len(prints | {shape_data(20, seed=1).fingerprint()}) == 5
    assert shape_data(20).fingerprint() in prints


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_classes": 37}, "37 classes of shapes: expected 1 to 36"),
        ({"num_classes": 0}, "0 classes"),
        ({"count": 0}, "0 images of shapes"),
        ({"image_size": 4}, "at least 8 pixels"),
        ({"image_size": (32, 7)}, "at least 8 pixels"),
        ({"val_share": 1.5}, "val_share 1.5"),
    ],
)
def test_shapes_that_cannot_be(options, message):
    with pytest.raises(UserError, match=message):
        shape_data(**options)


def test_shapes_can_be_held_out_too():
    train, val = hold_out(ShapePictures(40), 0.1)
    whole = ShapePictures(40)
    for side in (train, val):
        assert torch.equal(side.in_memory(), whole.in_memory()[[whole.names.index(name) for name in side.names]])
