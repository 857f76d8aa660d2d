"""Images that no split was made of: folders of classes, Hugging Face datasets, made-up shapes; how they are cut."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import flat, noise, pixels, refuses, shown

from vavae_tools.data import images as decoded
from vavae_tools.data.datasets import class_data, image_data
from vavae_tools.data.images import centre_crop
from vavae_tools.runtime.errors import UserError


def reference_crop(image: Image.Image, size: int) -> np.ndarray:
    """`center_crop_arr` of guided-diffusion, by which ADM and DiT see ImageNet."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    resized = (round(image.size[0] * scale), round(image.size[1] * scale))
    array = np.array(image.resize(resized, Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize(("height", "width", "size"), [(50, 37, 20), (37, 50, 37), (9, 14, 16), (43, 83, 11)])
def test_the_centre_of_any_image(height, width, size):
    image = Image.fromarray(noise(height, width, 3))
    assert np.array_equal(centre_crop(image, (size, size)), reference_crop(image, size))


# ---- folders
def write(folder: Path, values: dict[str, int | bytes]) -> Path:
    for name, value in values.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(value) if isinstance(value, bytes) else flat(value).save(folder / name)
    return folder


def test_a_folder_per_class(tmp_path):
    values = {"dog/2.png": 10, "dog/10.png": 20, "cat/b.jpg": 30, "cat/young/a.PNG": 40, "cat/.hidden/a.png": 50}
    data = image_data(write(tmp_path, values), 8, val_share=0)
    assert data.labels == {"cat": 0, "dog": 1} and data.num_classes == 2 and data.val_data is None
    assert data.train_data.names == ["cat/b.jpg", "cat/young/a.PNG", "dog/2.png", "dog/10.png"]
    assert data.train_data.labels.tolist() == [0, 0, 1, 1]
    assert list(shown(data.train_data).values()) == [30, 40, 10, 20]
    assert data.train_data.image_size == (8, 8) and data.train_data.channels == 3


@pytest.mark.parametrize("subset", ["validation", "valid", "val", "dev", "test"])
def test_sides_in_folders(tmp_path, subset):
    values = {"train/dog/1.png": 1, "train/cat/1.png": 2, f"{subset}/dog/1.png": 3, "unused/fox/1.png": 4}
    data = image_data(write(tmp_path, values), 8)
    assert shown(data.train_data) == {"cat/1.png": 2, "dog/1.png": 1} and shown(data.val_data) == {"dog/1.png": 3}
    assert data.labels == {"cat": 0, "dog": 1} and data.val_data.labels.tolist() == [1]


def test_links_and_thumbnails_multiply_no_images(tmp_path):
    write(tmp_path, {"a/1.png": 1, "a/in/2.png": 2, "a/@eaDir/1.png": 1, "a/Previews/1.png": 1, "b/3.png": 3})
    for copy in ("a/thumb_1.jpg", "a/in/2.THUMB.png", "a/._1.png", "b/3_thumbnail-8x8.png", "b/thumb_up.png"):
        write(tmp_path, {copy: 9})  # the last one is of nothing here
    for link, target in {"a/up": "..", "a/in/self": ".", "a/again": "in", "round": ".", "b/out": "../other"}.items():
        (tmp_path / link).symlink_to(target)
    write(tmp_path, {"other/4.png": 4, "other/back/5.png": 5})
    write(tmp_path.with_name("elsewhere"), {"6.png": 6})
    (tmp_path / "other/to_b").symlink_to("../b")
    (tmp_path / "b/far").symlink_to(tmp_path.with_name("elsewhere"))
    data = image_data(tmp_path, 8, val_share=0)
    files = ["a/1.png", "a/in/2.png", "b/3.png", "b/far/6.png", "b/thumb_up.png", "other/4.png", "other/back/5.png"]
    assert sorted(data.train_data.names) == files
    said = "5 passed over, thumbnails or of programs: a/@eaDir/, a/Previews/, a/thumb_1.jpg and 2 more"
    assert data.notes == [said]


def test_images_in_both_of_ones_own_subsets_are_said(tmp_path):
    values = {"train/a/1.png": 1, "train/a/2.png": 2, "train/b/1.png": 3, "val/a/7.png": 2, "val/b/8.png": 4}
    (said,) = image_data(write(tmp_path, values), 8).notes
    assert said.startswith(f"warning: 1 image of {tmp_path}/val also in {tmp_path}/train, such as a/7.png = a/2.png: ")
    assert image_data(tmp_path, 8, train_split="val").notes == []


def test_one_name_in_two_forms_of_unicode_is_one_class(tmp_path):
    composed, apart = "Jos\u00e9", "Jose\u0301"
    write(tmp_path, {f"train/{composed}/1.png": 1, "train/ana/1.png": 2, f"val/{apart}/1.png": 3})
    data = image_data(tmp_path, 8)
    assert data.labels == {composed: 0, "ana": 1} and data.val_data.labels.tolist() == [0]
    write(tmp_path, {f"train/{apart}/1.png": 4})
    assert image_data(tmp_path, 8).train_data.labels.tolist() == [0, 0, 1]


def test_which_side_trains_can_be_said(tmp_path):
    write(tmp_path, {f"{subset}/{name}/{i}.png": i for subset in ("train", "val") for name in "ab" for i in range(2)})
    data = image_data(tmp_path, 8, train_split="val", val_share=0.5)
    assert len(data.train_data) == len(data.val_data) == 2  # val has the names' first place, and is cut
    with pytest.raises(UserError, match=r"No folders of images in .*extra; .* holds 2 folders, train/, val/"):
        image_data(tmp_path, 8, train_split="extra")
    write(tmp_path, {"val/images/1.png": 2})
    refuses(r"val holds images, which is no class of .*train: expected the same folders", image_data, tmp_path, 8)


def test_a_splits_labels_are_those_it_says(split_dir, tmp_path):
    split = shutil.copytree(split_dir, tmp_path / "split")
    info = json.loads((split / "split_info.json").read_text())
    info["labels"] = {"ID_1": 5, "ID_2": 0, "ID_3": 2}
    (split / "split_info.json").write_text(json.dumps(info))
    data = image_data(split, 16)
    assert data.num_classes == 6
    labels = zip(data.val_data.names, data.val_data.labels.tolist(), strict=True)
    assert {name.split("/")[0]: label for name, label in labels} == info["labels"]


def test_grey_images_stay_grey_unless_asked_and_large_ones_get_their_centre(tmp_path):
    array = noise(40, 60)
    (tmp_path / "a").mkdir()
    Image.fromarray(array).save(tmp_path / "a" / "1.png")
    expected = np.asarray(centre_crop(Image.fromarray(array), (16, 16)))
    read = pixels(image_data(tmp_path, 16, channels=3).train_data, 0)
    assert read.shape == (16, 16, 3) and all(np.array_equal(read[..., k], expected) for k in range(3))
    data = image_data(tmp_path, 16)
    assert data.channels == 1 and np.array_equal(pixels(data.train_data, 0)[..., 0], expected)


# ---- what is held out
def test_a_share_of_each_class_is_held_out(tmp_path):
    counts = {"a": 100, "b": 30, "c": 2, "d": 1}
    write(
        tmp_path, {f"{name}/{i}.png": f"no image, {name} {i}".encode() for name in counts for i in range(counts[name])}
    )
    assert image_data(tmp_path, 8, val_share=0, channels=3).val_dataloader() == []
    data = image_data(tmp_path, 8, channels=3)
    train, val = data.train_data, data.val_data
    assert val.labels.bincount(minlength=4).tolist() == [5, 2, 1, 0]
    assert train.labels.bincount().tolist() == [95, 28, 1, 1]
    assert not set(train.names) & set(val.names) and len(set(train.names) | set(val.names)) == 133
    for subset in (train, val):
        assert [path.parent.name for path in subset.paths] == ["abcd"[label] for label in subset.labels]

    def held(**options):
        return set(image_data(tmp_path, 8, val_share=0.2, channels=3, **options).val_data.names)

    first = held()
    assert held() == first and held(seed=1) != first  # it follows from the seed
    write(tmp_path, {"a/more.png": b""})
    assert len(held() ^ first) <= 2


@pytest.mark.parametrize(("train_split", "held"), [(1.0, 0), ("1.0", 0), (0.9, 4), ("0.75", 10), (1, 0)])
def test_a_share_of_the_data_trains(tmp_path, train_split, held):
    write(tmp_path, {f"{name}/{i}.png": 10 * k + i for k, name in enumerate("ab") for i in range(20)})
    data = image_data(tmp_path, 8, train_split=train_split)
    assert (len(data.train_data), len(data.val_data or ())) == (40 - held, held)
    write(tmp_path / "in", {f"{s}/{name}/{i}.png": i for s in ("train", "val") for name in "ab" for i in range(20)})
    data = image_data(tmp_path / "in", 8, train_split=train_split)
    assert (len(data.train_data), len(data.val_data)) == (40 - held, held or 40)  # what validates is there for 1 alone
    shapes = class_data("shapes", 8, 24, 2, train_split=train_split)
    assert len(shapes.val_data or ()) == round(24 / float(train_split)) - 24


@pytest.mark.parametrize("room", [0, 2**30])
def test_equal_images_are_never_on_both_sides(tmp_path, monkeypatch, room):
    """Equal files where the images do not fit into memory, else equal pixels."""
    monkeypatch.setattr(decoded, "MEMORY_LIMIT", room)
    write(tmp_path, {f"a/{i}.png": 5 * i for i in range(30)})
    for path in sorted(tmp_path.glob("a/*.png")):
        Image.open(path).save(path.with_name(f"{path.stem}.x.{'bmp' if room else 'png'}"))
    data = image_data(tmp_path, 8, val_share=0.3)
    train, val = ({name.partition(".")[0] for name in subset.names} for subset in (data.train_data, data.val_data))
    assert not train & val and len(val) == 9


# ---- as a data module
def test_batches_come_in_order_from_memory_or_disk(tmp_path, monkeypatch):
    folder = write(tmp_path, {f"{name}/{i}.png": 10 * k + i for k, name in enumerate("abc") for i in range(6)})
    batches = []
    for limit, workers in ((2**30, None), (0, 0), (0, 1), (2**30, 1)):
        monkeypatch.setattr(decoded, "MEMORY_LIMIT", limit)
        data = image_data(folder, 8, batch_size=4, num_workers=workers, val_share=0.2)
        assert data.num_workers == (workers or 0)
        batches.append([*data.train_dataloader(), *data.val_dataloader()])
        assert (data.train_data._memory is None) == (limit == 0)
    for others in batches[1:]:
        assert len(others) == len(batches[0]) == 4  # 15 of 4, the rest in another epoch; 3
        for batch, other in zip(batches[0], others, strict=True):
            assert batch.keys() == other.keys() == {"images", "labels", "index"}
            assert all(torch.equal(batch[name], other[name]) for name in batch)
    for batch in batches[0][:3]:
        assert batch["images"].shape == (4, 3, 8, 8) and batch["images"].dtype == torch.uint8
        assert torch.equal(batch["images"][:, 0, 0, 0] // 10, batch["labels"])


@pytest.mark.parametrize("change", [None, "image_size", "crop", "channels", "an image", "seed", "a name", "labels"])
def test_the_fingerprint_tells_data_apart(tmp_path, change):
    write(tmp_path, {f"{name}/{i}.png": i for name in "ab" for i in range(6)})
    options = {"image_size": 8}
    before = image_data(tmp_path, **options).fingerprint()
    changed = {"image_size": 9, "crop": "none", "channels": 1, "seed": 1}
    if change in changed:
        options[change] = changed[change]
    elif change == "an image":
        flat(1, size=4).save(tmp_path / "a" / "0.png")
    elif change == "a name":
        (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "7.png")
    elif change == "labels":
        write(tmp_path, {"0/1.png": 1})
    assert (image_data(tmp_path, **options).fingerprint() == before) == (change is None)


# ---- what cannot be
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_share": 1}, "val_share 1: expected a share from 0 to below 1"),
        ({"val_share": -0.1}, "val_share -0.1: expected"),
        ({"train_split": 80}, "above 0 to 1"),
        ({"train_split": "90%"}, r"No folders of images in .*/90%; .* or a share such as 0\.95"),
        ({"train_split": "0"}, "above 0"),
        ({"train_split": 0.9, "val_share": 0.3}, r"train_split 0\.9 and val_share 0\.3 do not add up"),
        ({"crop": "middle"}, "No crop 'middle'; there are adm, none"),
        ({"image_size": 0}, "image_size 0: at least one pixel"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"use_hf_dataset": True}, r"no Hugging Face dataset; it holds 1 folder, a/.*use_hf_dataset=false"),
    ],
)
def test_settings_that_cannot_be_are_named(tmp_path, options, message):
    refuses(message, image_data, write(tmp_path, {"a/1.png": 1}), **options)
