"""Pixels ↔ [-1, 1], and folders of images as batches."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import noise, refuses

from vavae_tools.data import images as decoded
from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.data.images import ImageFiles, ImageFolder, channels_of, save_image, to_pixels, to_unit


def read_image(path, size, channels: int = 3) -> np.ndarray:
    """uint8 (height, width, channels)"""
    subset = ImageFiles(path.parent, [path.name], torch.zeros(1), image_size=size, channels=channels)
    return subset.images([0])[0].permute(1, 2, 0).numpy()


def test_pixels_and_numbers_are_inverse():
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = to_unit(pixels)
    assert (unit[0], unit[255], unit.dtype) == (-1, 1, torch.float32)
    assert torch.equal(unit.diff() > 0, torch.ones(255, dtype=torch.bool))
    assert torch.equal(to_pixels(unit), pixels)
    assert torch.equal(pixels, torch.arange(256, dtype=torch.uint8))  # the argument stays as it was
    numbers = torch.tensor([-1.5, -1.0, -0.998, 0.0, 0.9999, 1.0, 7.0])
    assert to_pixels(numbers).tolist() == [0, 0, 0, 128, 255, 255, 255]
    assert to_pixels(torch.tensor([0.5], dtype=torch.float16)).tolist() == [191]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_written_image_is_read_back(tmp_path, channels):
    pixels = torch.from_numpy(noise(channels, 5, 9))
    save_image(pixels, tmp_path / "p.png")
    read = read_image(tmp_path / "p.png", (5, 9), channels)
    assert np.array_equal(read.transpose(2, 0, 1), pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["p.png"]


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "LA", "1", "CMYK"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(noise(8, 8, 3)).convert(mode)
    path = tmp_path / ("p.jpg" if mode == "CMYK" else "p.png")
    image.save(path)
    with Image.open(path) as reopened:
        expected = np.asarray(reopened.convert("RGB"))
    assert np.array_equal(read_image(path, (8, 8)), expected)


@pytest.mark.parametrize(
    ("dtype", "scale", "ending"),
    [(np.uint16, white, "png") for white in (257, 64.25, 16.06, 4.012, 1)]
    + [(np.int32, white, "tif") for white in (257, 1, 65793)]
    + [(np.float32, white, "tif") for white in (1 / 255, 3 / 255, 63 / 255, 1, 257)],
)
def test_more_than_8_bits_become_8_by_the_least_white_that_holds_them(tmp_path, dtype, scale, ending):
    """Pillow's own conversion would make everything from 255 on white, and floats up to 1 black."""
    grey = np.arange(256).reshape(16, 16)
    Image.fromarray((scale * grey).astype(dtype)).save(tmp_path / f"p.{ending}")
    read = read_image(tmp_path / f"p.{ending}", (16, 16), 1)[..., 0]
    assert np.abs(read.astype(int) - grey).max() <= 1 and (scale != 257 or np.array_equal(read, grey))
    assert np.array_equal(read_image(tmp_path / f"p.{ending}", (16, 16), 3), np.stack([read] * 3, axis=2))


def test_a_dark_image_of_more_than_8_bits_stays_dark_among_others(tmp_path):
    (tmp_path / "a").mkdir()
    for i in range(100):  # of 12 bits; one in a hundred is bright
        Image.fromarray(np.full((8, 8), 4000 if i == 57 else 200, np.uint16)).save(tmp_path / f"a/{i}.png")
    data = ImageDataModule(tmp_path, 8, val_share=0.5)
    brightest = [int(subset.in_memory().max()) for subset in (data.train_data, data.val_data)]
    assert sorted(brightest) == [12, 249] and data.train_data.white == 4095


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(30), -80.0, float("nan")])
def test_what_is_no_image_is_named(tmp_path, content):
    path, words = tmp_path / "walk.tif", "numbers from .*, expected 0 for black to .*: save it in 8 bits"
    if isinstance(content, float):
        Image.fromarray(np.array([[0, 1], [content, 0.5]], np.float32)).save(path)
    else:
        path.write_bytes(content)
        words = ".*"
    says = rf"walk\.tif cannot be read as an image \({words}\): .*; data_split\.py names such"
    refuses(says, read_image, path, (2, 2))


@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_stored_turned_come_upright(tmp_path, ending, orientation):
    back = [None, None, 0, 3, 1, 5, 2, 6, 4][orientation]  # the Transpose that undoes what the viewer does
    exif, upright = Image.Exif(), np.kron(noise(4, 6, 3), np.ones((8, 8, 1), np.uint8))
    exif[274] = orientation
    stored = Image.fromarray(upright)
    stored = stored if back is None else stored.transpose(Image.Transpose(back))
    options = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}}.get(ending, {})
    stored.save(tmp_path / f"p.{ending}", exif=exif, **options)
    read = read_image(tmp_path / f"p.{ending}", upright.shape[:2])
    assert np.abs(read.astype(int) - upright).max() <= (12 if ending == "jpg" else 0)
    contents = ImageFiles(tmp_path, [f"p.{ending}"], torch.zeros(1), 8).contents()
    assert next(contents).endswith(b"upright") == (orientation > 1 and ending != "tif")


@pytest.mark.parametrize(
    ("modes", "channels"),
    [(["L", "1", "LA", "I;16"], 1), (["RGBA"], 3), (["P"], 3), (["L", "L", "RGB"], 3), (["L"] * 70 + ["RGB"], 3)],
)
def test_how_many_channels_images_have(tmp_path, modes, channels):
    for number, mode in enumerate(modes):
        (tmp_path / f"ID_{number + 1}").mkdir()
        image = Image.fromarray(noise(8, 8, 3, seed=number)).convert("L" if mode == "I;16" else mode)
        if mode == "I;16":
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
        image.save(tmp_path / f"ID_{number + 1}" / "p.png")
    assert channels_of(tmp_path) == channels


@pytest.mark.parametrize("limit", [0, 2**30])
def test_batches_of_a_folder(tmp_path, monkeypatch, limit):
    """The same from the disk and from memory."""
    names = ["ID_1/p0.png", "ID_1/p1.png", "ID_3/p0.png", "ID_3/p1.png", "ID_3/p2.png", "ID_12/p0.png"]
    for seed, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(noise(8, 12, 3, seed=seed)).save(tmp_path / name)
    monkeypatch.setattr(decoded, "MEMORY_LIMIT", limit)
    data = ImageFolder(tmp_path, (8, 12), progress=False)
    assert data.names == names and data.labels.tolist() == [0, 0, 2, 2, 2, 11]
    batch = data.get_batch([5, 0])
    assert batch["images"].shape == (2, 3, 8, 12) and batch["images"].dtype == torch.uint8
    assert batch["labels"].tolist() == [11, 0] and batch["index"].tolist() == [5, 0]
    for image, seed in zip(batch["images"], (5, 0), strict=True):
        assert np.array_equal(image.permute(1, 2, 0), noise(8, 12, 3, seed=seed))
    assert torch.equal(data[5]["images"], batch["images"][0]) and (data._memory is None) == (limit == 0)
    assert data.preview_batch(5)["labels"].tolist() == [0, 2, 11, 0, 2]  # people in turn
    assert sorted(data.preview_batch(100)["index"].tolist()) == list(range(6))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_rows_on_the_disk_go_along_through_the_loader(split_dir, tmp_path, num_workers):
    data = ImageDataModule(split_dir, 16, batch_size=5, num_workers=num_workers)
    np.arange(24 * 3, dtype=np.float16).reshape(24, 3).tofile(tmp_path / "features")
    rows = np.memmap(tmp_path / "features", np.float16, "r+", shape=(24, 3))
    data.train_data.extra_fields["features"] = torch.from_numpy(rows)
    batches = list(data.train_dataloader())
    assert len(batches) == 4
    for batch in batches:
        assert torch.equal(batch["features"], torch.from_numpy(rows)[batch["index"]])
        assert torch.equal(batch["images"], data.train_data.in_memory()[batch["index"]])
    assert "features" not in next(iter(data.val_dataloader()))
