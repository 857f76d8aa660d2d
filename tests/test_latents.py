"""Latents: encoded once, with the training subset's statistics, read memory-mapped; stale ones are never used."""

import json
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from golden_cases import assert_close, load_case
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import SIZE, Averages, contents, perturb_projections, refuses, same, tiny_vavae

from vavae_tools.autoencoders.rae import tiny_rae
from vavae_tools.autoencoders.vavae import VAVAE
from vavae_tools.autoencoders.weights import load_vavae
from vavae_tools.data import encoded, latents
from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.data.demo.shapes import shape_data
from vavae_tools.data.images import to_unit
from vavae_tools.data.latents import INDEX, LatentDataModule, LatentDataset, LatentFolder, encode_latents
from vavae_tools.recipes import dit
from vavae_tools.recipes.dit import _latents_of, encode_split, train_dit
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import weights_digest

SHAPE = 1
"""An image that is encoded to learn the shape of latents."""


@pytest.fixture
def split(split_dir, tmp_path) -> Path:
    """A copy of the split, to change."""
    return shutil.copytree(split_dir, tmp_path / "split")


@pytest.fixture
def count_encoded(monkeypatch) -> list[int]:
    """How many images each call of `VAVAE.encode` got."""
    counts, encode = [], VAVAE.encode

    def counting(self, x, *arguments, **options):
        counts.append(len(x))
        return encode(self, x, *arguments, **options)

    monkeypatch.setattr(VAVAE, "encode", counting)
    return counts


def model(seed: int = 0) -> VAVAE:
    return perturb_projections(tiny_vavae(seed))


def encode(split, folder, vae=None, **options) -> LatentFolder:
    return encode_latents(vae or model(), ImageDataModule(split, SIZE), folder, progress=False, **options)


# ---- statistics


def test_statistics_equal_the_reference():
    case, io = load_case("latent_stats")
    found = latents.channel_statistics(io["latents"].split(3))  # shard by shard
    for name, values in zip(("mean", "std"), found, strict=True):
        assert_close(torch.tensor(values).view(1, -1, 1, 1), io[name], case["tolerance"])
    z = 1000 + torch.randn(50, 2, 8, 8, generator=torch.Generator().manual_seed(0))  # far from zero
    torch.testing.assert_close(torch.tensor(latents.channel_statistics([z])[1]), z.double().std((0, 2, 3)).float())


# ---- what is encoded


@torch.no_grad()
def test_each_image_is_encoded_with_its_own_vector_and_noise(split, tmp_path, count_encoded):
    """And mirrored only when asked for: the image is mirrored, not the latent."""
    vae, data = model().eval(), ImageDataModule(split, SIZE)
    plain = encode(split, tmp_path / "plain", vae, batch_size=5, seed=3)
    assert sum(count_encoded) == 30 + SHAPE and not plain.flips
    folder = encode(split, tmp_path / "flips", vae, batch_size=5, seed=3, flips=True)
    assert sum(count_encoded) == 3 * (30 + SHAPE) and folder.flips
    assert folder.shape == (2, 8, 8) and folder.image_size == (SIZE, SIZE)
    for subset, images, seed in (("train", data.train_data, 3), ("val", data.val_data, 4)):
        rows = range(len(images))
        found, without = (LatentDataset(one, subset).stored(rows) for one in (folder, plain))
        assert set(without) == {"latents", "labels", "index"} and same(without["latents"], found["latents"])
        assert torch.equal(found["labels"], images.labels) and folder.names[subset] == images.names
        for i in rows:  # one by one, in place of batches
            batch = images.get_batch([i])
            x, vectors = to_unit(batch["images"]), vae.condition_vectors(batch["labels"])
            mirrored = ("latents_flip", "posterior of the mirrored picture", x.flip(3))
            for name, noise, seen in (("latents", "posterior", x), mirrored):
                posterior = vae.encode(seen, condition=vectors).latent_dist
                drawn = Draws(seed, 0, torch.tensor([i])).normal(noise, 2, 8, 8)
                expected = posterior.mean + posterior.std * drawn
                torch.testing.assert_close(found[name][i : i + 1], expected, rtol=1e-4, atol=1e-4)


# ---- once


@pytest.mark.parametrize("change", ["weights", "a vector", "an image", "another split", "flips", "seed", "size"])
def test_what_is_stale_is(split, tmp_path, count_encoded, change):
    first, vae = encode(split, tmp_path / "latents"), model()
    del count_encoded[:]
    assert encode(split, tmp_path / "latents") == first and count_encoded == []
    options = {"flips": change == "flips", "seed": int(change == "seed")}
    if change == "weights":
        vae.decoder.conv_out.bias.data[0] += 1e-6
    elif change == "a vector":
        vae.conditions.weight.data[2, 3] += 1e-6
    elif change == "an image":
        Image.new("RGB", (SIZE, SIZE), "red").save(next((split / "val").glob("*/*.jpg")))
    elif change == "another split":
        moved = next((split / "val" / "ID_2").iterdir())
        moved.rename(split / "train" / "ID_2" / moved.name)
    images = ImageDataModule(split, 2 * SIZE if change == "size" else SIZE)
    folder = encode_latents(vae, images, tmp_path / "latents", progress=False, **options)
    assert sum(count_encoded) == (30 + SHAPE) * (1 + (change == "flips")) and folder.key != first.key
    both = sorted([first, folder], key=lambda one: one.path)
    assert LatentFolder.read(folder.path) == folder and LatentFolder.read_all(tmp_path / "latents") == both
    refuses(r"latents of 2 encodings, expected one: name ", LatentDataModule, tmp_path / "latents")


def test_encodings_at_once_into_one_folder_are_each_their_own(split, tmp_path):
    """Those of one key wait for each other; the autoencoder tells which of them a training reads."""
    made = {seed: encode(split, tmp_path / f"alone{seed}", model(seed)) for seed in (0, 1)}
    path, said, at_once = tmp_path / "latents", [], threading.Barrier(5)
    path.mkdir()

    def run(vae: VAVAE) -> LatentFolder:
        images = ImageDataModule(split, SIZE)
        at_once.wait(60)
        return encode_latents(vae, images, path, progress=False, batch_size=3, log=said.append)

    with ThreadPoolExecutor(4) as pool, FileLock(path / f".{made[0].path.name}.lock"):
        running = [pool.submit(run, vae) for vae in map(model, (0, 1, 0, 1))]
        at_once.wait(60)
        wait([running[1], running[3]])
        until = time.monotonic() + 60
        while not said and time.monotonic() < until:
            time.sleep(0.01)
        assert not running[0].done() and not running[2].done()
    for seed, found in zip((0, 1, 0, 1), running, strict=True):
        assert found.result().key == made[seed].key
        a, b = (LatentDataset(one, "train").get_batch(range(24))["latents"] for one in (found.result(), made[seed]))
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        model(seed).save_pretrained(tmp_path / f"vavae{seed}")
        assert _latents_of(tmp_path / f"vavae{seed}", path)[1] == found.result()
    assert set(said) >= {f"Another process encodes into {path / made[0].path.name}: waiting for it"}


def test_latents_of_an_earlier_version_lie_in_the_folder_itself(split, tmp_path, count_encoded):
    """Whole or begun. What is of another key there stays as it is. Shards with the key of the whole are another form"""
    folder = encode(split, tmp_path / "latents", batch_size=3)
    for path in folder.path.iterdir():
        path.rename(tmp_path / "latents" / path.name)
    del count_encoded[:]
    former = encode(split, tmp_path / "latents")
    assert (former.path, former.key) == (tmp_path / "latents", folder.key) and count_encoded == []
    assert LatentFolder.read(tmp_path / "latents") == former
    kept = sorted((tmp_path / "latents").glob("*.safetensors"))
    assert encode(split, tmp_path / "latents", model(1)).path.parent == former.path
    assert sorted((tmp_path / "latents").glob("*.safetensors")) == kept
    (former.path / INDEX).unlink()
    kept[0].unlink()
    del count_encoded[:]
    assert encode(split, tmp_path / "latents", batch_size=3) == folder and 0 < sum(count_encoded) <= 4 + SHAPE
    for path in [*kept[1:], *folder.path.glob("*.safetensors")]:
        save_file(load_file(path), path, metadata={"key": folder.key})
    assert encode(split, tmp_path / "latents") == folder  # with its index it is whole
    (folder.path / INDEX).unlink()
    del count_encoded[:]
    assert encode(split, tmp_path / "latents").key == folder.key and sum(count_encoded) == 30 + SHAPE


def test_what_a_damaged_folder_lacks_is_encoded_again(split, tmp_path, count_encoded):
    """Whole shards say that they belong to these images and weights, and are kept."""
    first = encode(split, tmp_path / "latents")
    index, shard = first.path / INDEX, first.path / "val-00000.safetensors"
    whole = shard.read_bytes()
    for damage, again in (
        (index.unlink, 0),
        (lambda: index.write_text('{"key": '), 0),
        (shard.unlink, 6),
        (lambda: (index.unlink(), shard.write_bytes(whole[: len(whole) // 2])), 6),
    ):
        damage()
        del count_encoded[:]
        assert encode(split, tmp_path / "latents") == first and sum(count_encoded) == again + SHAPE
        assert shard.read_bytes() == whole


@pytest.mark.parametrize("flips", [False, True])
def test_an_interrupted_encoding_resumes(split, tmp_path, monkeypatch, count_encoded, flips):
    """Bit by bit as if nothing had happened, statistics too; what is there is not made again, what is stale goes."""
    unbroken = encode(split, tmp_path / "unbroken", flips=flips, batch_size=3)
    folder, save = tmp_path / "broken" / unbroken.path.name, encoded.save_file

    def full(tensors, path, **options):
        if len(list(folder.glob("*.safetensors"))) == 2:
            Path(path).write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        save(tensors, path, **options)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(encoded, "save_file", full)
        encode(split, folder.parent, flips=flips, batch_size=3)
    assert sorted(contents(folder)) == ["train-00000.safetensors", "train-00001.safetensors"]
    refuses("No latents in", LatentDataModule, folder)  # whatever has an index is whole
    (folder / ".train-00002.safetensors.17.partial").write_bytes(b"of a process that was killed")
    del count_encoded[:]
    encode(split, folder.parent, flips=flips, batch_size=3)
    assert sum(count_encoded) == (30 - 6 + SHAPE) * (1 + flips)
    assert contents(folder) == contents(unbroken.path) and len(contents(folder)) == 1 + 8 + 2


def test_shards_are_whole_batches_and_bounded():
    def lengths(*arguments):
        return [len(shard.rows) for shard in encoded.cut("train", *arguments, key="k").values()]

    assert lengths(30, 1, 32) == [30] and lengths(24, 1, 2) == [4] * 6 and lengths(0, 1, 2) == []
    assert lengths(100, 1, 8) == [16] * 6 + [4] and lengths(100_001, 1, 8) == [10_000] * 10 + [1]
    assert lengths(100, encoded.SHARD_BYTES // 10, 4) == [10] * 10
    assert lengths(3, 2 * encoded.SHARD_BYTES, 4) == [1] * 3


def test_a_disk_that_is_too_small_is_told_before_anything_is_encoded(split, tmp_path, monkeypatch, count_encoded):
    """30 images of 2×8×8 numbers of 4 bytes, or 2, and a label of 8 bytes each; other encodings stay."""
    old = encode(split, tmp_path / "latents")
    kept = contents(old.path)
    del count_encoded[:]
    needed = 30 * (2 * 8 * 8 * 2 + 8)
    monkeypatch.setattr(encoded.shutil, "disk_usage", lambda path: SimpleNamespace(free=needed))
    says = r"No space: Latents of this VAVAE need 0\.000 GB, 0\.000 GB are free.*\(other encodings are in "
    refuses(says, encode, split, tmp_path / "latents", model(1))
    assert sum(count_encoded) == SHAPE and contents(old.path) == kept
    assert encode(split, tmp_path / "latents", model(1), dtype="float16").key != old.key


def shards(folder: LatentFolder) -> list[Path]:
    return [folder.path / name for name in folder.shards["train"]]


# ---- any data, any autoencoder


def test_loading_processes_change_nothing(tmp_path):
    made = []
    for num_workers in (0, 1):
        data = shape_data(20, num_classes=3, image_size=16, seed=4, val_share=0.2, num_workers=num_workers)
        folder = encode_latents(Averages(), data, tmp_path / str(num_workers), batch_size=3, progress=False)
        made.append(contents(folder.path))
    assert made[0] == made[1] and folder.shape == (3, 2, 2) and LatentDataModule(folder).num_classes == 3
    assert folder.people == {"red_circle": 0, "blue_circle": 1, "red_square": 2}
    images = to_unit(data.val_data.get_batch([1])["images"])
    mean, std = (torch.tensor(values)[:, None, None] for values in (folder.mean, folder.std))
    found = LatentDataset(folder, "val").get_batch([1])["latents"] * std + mean
    torch.testing.assert_close(found, torch.nn.functional.avg_pool2d(images, 8), rtol=0, atol=1e-5)


def test_how_an_autoencoder_reads_images_is_part_of_the_key(tmp_path):
    """Its configuration; not the statistics that are kept with it afterwards, nor where it was read from."""
    data = shape_data(8, image_size=16)

    def key(**config):
        vae = Averages()
        vae.image_size, vae.config = 16, {"image_mean": [0.5], "latents_mean": None, **config}
        return encode_latents(vae, data, tmp_path / "latents", progress=False).key

    assert key() == key(latents_mean=[1.0, 2.0, 3.0], _name_or_path="elsewhere") != key(image_mean=[0.4])
    normalised = Averages()
    normalised.has_own_statistics = True
    folder = encode_latents(normalised, data, tmp_path / "own", progress=False)
    assert (folder.mean, folder.std) == ([0.0] * 3, [1.0] * 3)


def test_published_statistics_take_the_place_of_computed_ones(split, tmp_path):
    given = [1.0, -2.0], [0.5, 4.0]
    mean, std = (torch.tensor(values).view(1, 2, 1, 1) for values in given)
    computed = encode(split, tmp_path / "latents")
    folder = encode(split, tmp_path / "given", statistics=given)
    assert (folder.mean, folder.std) == given and folder.key != computed.key
    z, computed_z = (load_file(shards(one)[0])["latents"] for one in (folder, computed))
    assert same(z, computed_z)
    torch.testing.assert_close(LatentDataset(folder, "train").get_batch([3])["latents"], (z[3:4] - mean) / std)
    assert encode(split, tmp_path / "given", statistics=given) == folder
    says = "The statistics have 3 and 3 numbers, latents of this autoencoder 2 channels"
    refuses(says, encode, split, tmp_path / "none", statistics=([0.0] * 3, [1.0] * 3))
    assert not list((tmp_path / "none").glob("*/"))


def test_statistics_are_those_of_the_training_subset_as_it_is_stored(split, tmp_path):
    whole = encode(split, tmp_path / "whole", batch_size=3)
    half = encode(split, tmp_path / "half", dtype="float16", batch_size=3)
    assert (whole.dtype, half.dtype) == ("float32", "float16") and whole.key != half.key
    z, stored = (torch.cat([load_file(path)["latents"] for path in shards(folder)]) for folder in (whole, half))
    assert same(stored, z.half())
    for folder, values in ((whole, z.double()), (half, stored.double())):
        expected = torch.stack([values.mean((0, 2, 3)), values.std((0, 2, 3))])
        torch.testing.assert_close(torch.tensor([folder.mean, folder.std]), expected.float())


def test_what_cannot_be_is_told(tmp_path):
    data = shape_data(8, image_size=16)
    for options, scale, message in (
        ({"dtype": "float16"}, 1e6, r"Latents of this Averages reach [0-9,]+, and float16 holds up to 65,504"),
        ({}, float("inf"), "Latents of this Averages are not finite"),
        ({"precision": "64"}, 1.0, "No precision '64'; there are 32, 16, bf16"),
        ({"precision": "16"}, 1.0, "A CPU has no fp16"),
    ):
        refuses(message, encode_latents, Averages(scale), data, tmp_path / "latents", progress=False, **options)
    encode_latents(Averages(1e6), data, tmp_path / "latents", progress=False)


def test_latents_of_another_precision_are_kept_unless_one_is_asked_for(split, tmp_path, count_encoded):
    half = encode(split, tmp_path / "latents", precision="bf16")
    del count_encoded[:]
    assert encode(split, tmp_path / "latents") == half and count_encoded == []
    assert encode(split, tmp_path / "latents", seed=1).key != half.key  # all else must be the same
    whole = encode(split, tmp_path / "latents", precision="32")
    a = load_file(shards(whole)[0])["latents"]
    assert whole.key == encode(split, tmp_path / "other").key != half.key
    assert encode(split, tmp_path / "latents", precision="bf16").key == half.key
    assert sum(count_encoded) == 3 * (30 + SHAPE)  # each precision once: the others' are still there
    b = load_file(shards(half)[0])["latents"]
    assert b.dtype == torch.float32 and 0 < (a - b).abs().max() < 0.2 * a.std()


class Overflowing(Averages):
    """Latents of bright images are not finite in half precision."""

    def encode_images(self, images, labels, normal):
        latents = super().encode_images(images, labels, normal)
        bright = (latents.mean((1, 2, 3), keepdim=True) > 0) & torch.is_autocast_enabled("cpu")
        return torch.where(bright, torch.inf, latents)


def test_what_overflows_in_half_precision_is_encoded_in_float32_and_said_once(tmp_path):
    data, said = shape_data(24, image_size=16), []
    options = {"batch_size": 1, "flips": True, "progress": False, "log": said.append}
    half = encode_latents(Overflowing(), data, tmp_path / "half", precision="bf16", **options)
    (line,) = said
    assert line.startswith("Latents of this Overflowing are not finite in half precision: such batches are ")
    whole = encode_latents(Overflowing(), data, tmp_path / "whole", **options)
    for name in ("latents", "latents_flip"):
        a, b = (torch.cat([load_file(path)[name] for path in shards(folder)]) for folder in (half, whole))
        assert same(a, b)  # means of pixels are no product that autocast rounds
    assert len(said) == 1 and (b.mean((1, 2, 3)) > 0).any()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_batches_travel_as_they_are_stored_and_are_normalised_on_the_device(split, tmp_path, dtype):
    """What a step sees is bit by bit what the data set gives; the loader does no arithmetic, and half are half."""
    folder = encode(split, tmp_path / "latents", dtype=dtype, flips=True, batch_size=3)
    data = LatentDataModule(folder, batch_size=24)
    stored = torch.cat([load_file(path)["latents"] for path in shards(folder)])
    for subset, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        (batch,) = loader
        if subset == "train":
            assert same(batch["latents"], stored[batch["index"]])
        assert batch["latents_flip"].dtype == stored.dtype == getattr(torch, dtype)
        batch = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
        expected = LatentDataset(folder, subset).get_batch(batch["index"].tolist())
        assert batch.keys() == expected.keys() and all(same(batch[name], expected[name]) for name in batch)
        assert batch["latents"].dtype == batch["latents_flip"].dtype == torch.float32
        mean, std = batch["latents"].mean((0, 2, 3)), batch["latents"].std((0, 2, 3))
        if subset == "train":  # by whose statistics those to validate are normalised, too
            torch.testing.assert_close((mean, std), (torch.zeros(2), torch.ones(2)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("read_at_once", [0, 2**20])
def test_shards_are_one_data_set(split, tmp_path, monkeypatch, read_at_once):
    monkeypatch.setattr(encoded, "READ_AT_ONCE", read_at_once)
    one, folder = (encode(split, tmp_path / name, batch_size=size) for name, size in (("one", 32), ("many", 3)))
    assert folder.shards["train"] == [f"train-{n:05d}.safetensors" for n in range(8)]
    parts, whole = LatentDataset(folder, "train"), LatentDataset(one, "train")
    assert torch.equal(parts.labels, whole.labels) and len(parts) == 24
    wanted = [23, 0, 6, 7, 13, 14, 20, 21, 0]
    batch, expected = parts.get_batch(wanted), whole.get_batch(wanted)
    assert batch.keys() == expected.keys() and batch["index"].tolist() == wanted
    torch.testing.assert_close(batch["latents"], expected["latents"], rtol=1e-4, atol=1e-4)


def test_latents_are_mapped_not_read(latents_dir, tmp_path):
    """A gigabyte of latents costs what its batches cost: the file stands behind the tensor."""
    shutil.copytree(latents_dir, tmp_path / "big")
    rows = 65_536  # 64 MiB
    big = {"latents": torch.ones(rows, 2, 8, 8), "labels": torch.zeros(rows, dtype=torch.int64)}
    save_file(big, LatentFolder.read(tmp_path / "big").path / "train-00000.safetensors")
    del big

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20

    before = resident()
    LatentDataset(LatentFolder.read(tmp_path / "big"), "train").get_batch([0, 30_000, rows - 1])
    assert resident() - before < 16


def test_damaged_folders_are_named(split, tmp_path):
    folder, other = (encode(split, tmp_path / "latents", model(seed)) for seed in (0, 1))
    (shard,), index = shards(folder), folder.path / INDEX
    foreign = r"train-00000\.safetensors is of another encoding than latents\.json beside"
    damaged = r"train-00000\.safetensors cannot be read .*: delete it and"
    whole = shard.read_bytes()
    for content, words in ((shards(other)[0].read_bytes(), foreign), (whole[:1000], damaged), (b"", damaged)):
        shard.write_bytes(content)
        refuses(words, LatentDataModule, folder.path)
    for content in ('{"key": ', "[]", '{"key": "a", "shape": 3, "image_size": 4}'):
        index.write_text(content)
        refuses(r"latents\.json is damaged .* encode again", LatentFolder.read, folder.path)
    refuses(r"No latents in .* \(latents\.json is missing\): encode them first", LatentDataModule, tmp_path)


def test_encoding_a_split_leaves_the_vavae_as_it_is_and_another_is_refused(split, tmp_path, count_encoded):
    """It may lie in a folder that cannot be written, such as Kaggle's input."""
    for seed in (0, 1):
        model(seed).save_pretrained(tmp_path / f"vavae{seed}")
    before, said = contents(tmp_path / "vavae0"), []
    folder = encode_split(split, tmp_path / "vavae0", tmp_path / "latents", log=said.append)
    assert contents(tmp_path / "vavae0") == before and folder.weights == weights_digest(model())
    assert said[0] == f"Latents 2×8×8 of images 16×16: train 24, val 6 ({folder.path})"
    assert json.loads((folder.path / INDEX).read_text())["people"] == {"ID_1": 0, "ID_2": 1, "ID_3": 2}
    del count_encoded[:]
    assert encode_split(split, tmp_path / "vavae0", tmp_path / "latents", log=said.append) == folder
    assert count_encoded == []
    with pytest.raises(UserError, match=r"/latents was not made by .*vavae1: encode the images again"):
        train_dit(tmp_path / "latents", tmp_path / "vavae1", tmp_path / "dit", {"hidden_size": 16, "num_heads": 2})
    assert not (tmp_path / "dit").exists()


def test_a_split_is_encoded_on_all_devices(split, tmp_path, monkeypatch, forked, count_encoded):
    model().save_pretrained(tmp_path / "vavae")
    one = encode_split(split, tmp_path / "vavae", tmp_path / "one", log=lambda line: None)
    del count_encoded[:]
    monkeypatch.setattr(dit, "several_processes", lambda: 2)
    two = encode_split(split, tmp_path / "vavae", tmp_path / "two", log=lambda line: None)
    assert count_encoded == [] and two.path.parent == tmp_path / "two"  # not by this process
    assert two.path.name == one.path.name and contents(two.path) == contents(one.path)
    (tmp_path / "vavae" / "config.json").unlink()
    with pytest.raises(UserError):
        encode_split(split, tmp_path / "vavae", tmp_path / "two", log=lambda line: None)


def test_a_vavae_of_other_people_is_refused_unless_that_is_asked_for(split, tmp_path, count_encoded):
    """Whom it knows has the own vector, by name, and the others none: in encoding and in what is trained on."""
    for name, people in (("one", {"ID_3": 0, "ID_9": 1, "ID_1": 2}), ("unnamed", None)):
        vae = perturb_projections(tiny_vavae(num_conditions=3 if people else 2, people=people))
        vae.save_pretrained(tmp_path / name)
    says = r"one has vectors of ID_1, ID_3, ID_9, none for ID_2 of the images: .* vavae\.other_people=true"
    refuses(says, encode_split, split, tmp_path / "one", tmp_path / "latents")
    with pytest.raises(UserError, match="unnamed has vectors of 2 people without their names, none for 3 people"):
        encode_split(split, tmp_path / "unnamed", tmp_path / "latents")
    assert count_encoded == [] and not (tmp_path / "latents").exists()
    folder = encode_split(split, tmp_path / "one", tmp_path / "latents", other_people=True)
    vae, same_latents = _latents_of(tmp_path / "one", tmp_path / "latents")
    rows = load_vavae(tmp_path / "one").conditions.weight
    assert folder == same_latents and vae.config.people == {"ID_1": 0, "ID_3": 2}
    assert same(vae.conditions.weight, torch.stack([rows[2], torch.zeros_like(rows[0]), rows[0]]))
    vae.save_pretrained(tmp_path / "copy")  # which knows no more people
    with pytest.raises(UserError, match=r"copy has vectors of ID_1, ID_3, none for ID_2 of the images"):
        encode_split(split, tmp_path / "copy", tmp_path / "latents")
    assert encode_split(split, tmp_path / "copy", tmp_path / "latents", other_people=True) == folder


def test_another_decoder_leaves_the_latents_of_an_rae_valid(tmp_path):
    torch.manual_seed(0)
    rae, data = tiny_rae().eval(), shape_data(8, 2, 32, val_share=0)

    def key_with(changed) -> str:
        for weights in changed.parameters():
            weights.data += 1
        return encode_latents(rae, data, tmp_path, progress=False).key

    assert key_with(torch.nn.Identity()) == key_with(rae.decoder) != key_with(rae.encoder)
