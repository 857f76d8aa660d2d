"""Latents: encoded once, with the training side's statistics, read memory-mapped; stale ones are never used."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden_cases import assert_close, load_case
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import SIZE, perturb_projections, same, tiny_vavae

from vavae_tools.autoencoders.vavae import VAVAE
from vavae_tools.data import latents
from vavae_tools.data.images import PictureDataModule, to_unit
from vavae_tools.data.latents import (
    INDEX,
    LatentDataModule,
    LatentDataset,
    LatentFolder,
    encode_latents,
    weights_digest,
)
from vavae_tools.draws import Draws
from vavae_tools.errors import UserError
from vavae_tools.training.runs import encode_split, train_dit


@pytest.fixture
def split(split_dir, tmp_path) -> Path:
    """A copy of the split, to change."""
    return shutil.copytree(split_dir, tmp_path / "split")


@pytest.fixture
def count_encoded(monkeypatch) -> list[int]:
    """How many pictures each call of `VAVAE.encode` got."""
    counts, encode = [], VAVAE.encode

    def counting(self, x, *arguments, **options):
        counts.append(len(x))
        return encode(self, x, *arguments, **options)

    monkeypatch.setattr(VAVAE, "encode", counting)
    return counts


def model(seed: int = 0) -> VAVAE:
    return perturb_projections(tiny_vavae(seed))


def encode(split, folder, vae=None, **options) -> LatentFolder:
    return encode_latents(vae or model(), PictureDataModule(split, SIZE), folder, progress=False, **options)


# ---- statistics


def test_statistics_equal_the_reference():
    case, io = load_case("latent_stats")
    statistics = latents._ChannelStatistics()
    for part in io["latents"].split(3):  # shard by shard
        statistics.add(part)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in statistics.mean_and_std())
    assert_close(mean, io["mean"], case["tolerance"])
    assert_close(std, io["std"], case["tolerance"])


def test_statistics_of_numbers_far_from_zero():
    z = 1000 + torch.randn(50, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    statistics = latents._ChannelStatistics()
    statistics.add(z)
    torch.testing.assert_close(torch.tensor(statistics.mean_and_std()[1]), z.double().std((0, 2, 3)).float())


def test_statistics_are_those_of_the_training_side(split, tmp_path):
    folder = encode(split, tmp_path / "latents", flips=True)
    z = load_file(folder.path / "train-00000.safetensors")["latents"].double()
    torch.testing.assert_close(torch.tensor(folder.mean), z.mean((0, 2, 3)).float())
    torch.testing.assert_close(torch.tensor(folder.std), z.std((0, 2, 3)).float())
    for picture in (split / "val").glob("*/*.jpg"):
        Image.new("RGB", (SIZE, SIZE), "white").save(picture)
    changed = encode(split, tmp_path / "others", flips=True)
    assert (changed.mean, changed.std) == (folder.mean, folder.std) and changed.key != folder.key


# ---- what is encoded


@torch.no_grad()
def test_each_picture_is_encoded_with_its_own_vector_and_noise(split, tmp_path):
    vae = model().eval()
    folder = encode(split, tmp_path / "latents", vae, batch_size=5, seed=3)
    assert folder.shape == (2, 8, 8) and folder.image_size == (SIZE, SIZE) and not folder.flips
    data = PictureDataModule(split, SIZE)
    for side, pictures, seed in (("train", data.train_data, 3), ("val", data.val_data, 4)):
        shard = load_file(folder.path / f"{side}-00000.safetensors")
        assert set(shard) == {"latents", "labels"} and torch.equal(shard["labels"], pictures.labels)
        assert folder.names[side] == pictures.names
        for i in range(len(pictures)):  # one by one, in place of batches
            batch = pictures.__getitems__([i])
            vectors = vae.condition_vectors(batch["labels"])
            posterior = vae.encode(to_unit(batch["pictures"]), condition=vectors).latent_dist
            noise = Draws(seed, 0, torch.tensor([i])).normal("posterior", 2, 8, 8)
            expected = posterior.mean + posterior.std * noise
            torch.testing.assert_close(shard["latents"][i : i + 1], expected, rtol=1e-4, atol=1e-4)


def test_flips_are_encoded_only_when_asked_for(split, tmp_path, count_encoded):
    encode(split, tmp_path / "plain")
    assert sum(count_encoded) == 30
    folder = encode(split, tmp_path / "flips", flips=True)
    assert sum(count_encoded) == 90 and folder.flips
    batch = LatentDataset(folder, "train").__getitems__([0, 1])
    assert batch["latents_flip"].shape == batch["latents"].shape
    assert "latents_flip" not in LatentDataset(LatentFolder.read(tmp_path / "plain"), "train")[0]
    plain, both = (load_file(tmp_path / name / "train-00000.safetensors") for name in ("plain", "flips"))
    assert same(plain["latents"], both["latents"])

    with torch.no_grad():  # the mirrored picture is encoded, not the latent mirrored
        vae, data = model().eval(), PictureDataModule(split, SIZE).train_data
        batch = data.__getitems__([4])
        vectors = vae.condition_vectors(batch["labels"])
        posterior = vae.encode(to_unit(batch["pictures"]).flip(3), condition=vectors).latent_dist
        noise = Draws(0, 0, torch.tensor([4])).normal("posterior of the mirrored picture", 2, 8, 8)
    torch.testing.assert_close(both["latents_flip"][4:5], posterior.mean + posterior.std * noise, rtol=1e-4, atol=1e-4)


def test_a_model_without_vectors_encodes_too(split, tmp_path):
    folder = encode(split, tmp_path / "latents", tiny_vavae(condition_dim=0))
    assert len(LatentDataset(folder, "train")) == 24


def test_pictures_that_do_not_fit_are_refused_before_anything_is_written(split, tmp_path):
    data = PictureDataModule(split, (16, 17))
    with pytest.raises(UserError, match="Pictures of 16×17 do not fit this VA-VAE: both must be divisible by 2"):
        encode_latents(model(), data, tmp_path / "latents", progress=False)
    assert not (tmp_path / "latents").exists()


# ---- once


def test_what_is_there_is_not_encoded_again(split, tmp_path, count_encoded):
    first = encode(split, tmp_path / "latents")
    del count_encoded[:]
    assert encode(split, tmp_path / "latents") == first and count_encoded == []


@pytest.mark.parametrize("change", ["weights", "a vector", "a picture", "another split", "flips", "seed", "size"])
def test_what_is_stale_is(split, tmp_path, count_encoded, change):
    first = encode(split, tmp_path / "latents")
    del count_encoded[:]
    vae, options, size = model(), {}, SIZE
    if change == "weights":
        vae.decoder.conv_out.bias.data[0] += 1e-6
    elif change == "a vector":
        vae.conditions.weight.data[2, 3] += 1e-6
    elif change == "a picture":
        Image.new("RGB", (SIZE, SIZE), "red").save(next((split / "val").glob("*/*.jpg")))
    elif change == "another split":
        moved = next((split / "val" / "ID_2").iterdir())
        moved.rename(split / "train" / "ID_2" / moved.name)
    elif change == "size":
        size = 2 * SIZE
    else:
        options = {"flips": True} if change == "flips" else {"seed": 1}
    folder = encode_latents(vae, PictureDataModule(split, size), tmp_path / "latents", progress=False, **options)
    assert sum(count_encoded) in (30, 60) and folder.key != first.key
    assert LatentFolder.read(tmp_path / "latents") == folder


def test_a_damaged_folder_is_encoded_again(split, tmp_path, count_encoded):
    first = encode(split, tmp_path / "latents")
    index, shard = tmp_path / "latents" / INDEX, tmp_path / "latents" / "val-00000.safetensors"
    for damage in (index.unlink, shard.unlink, lambda: index.write_text('{"key": ')):
        damage()
        del count_encoded[:]
        assert encode(split, tmp_path / "latents") == first and sum(count_encoded) == 30


def test_an_interrupted_encoding_leaves_no_index(split, tmp_path, monkeypatch):
    """Whatever has an index is whole; the shards of other weights are gone."""
    monkeypatch.setattr(latents, "SHARD_SIZE", 8)
    folder = encode(split, tmp_path / "latents").path
    assert len(list(folder.glob("train-*.safetensors"))) == 3
    save, saved = latents.save_file, []

    def full(tensors, path):
        if len(saved) == 2:
            Path(path).write_bytes(b"half")
            raise latents.SafetensorError("I/O error: No space left on device (os error 28)")
        saved.append(path)
        save(tensors, path)

    monkeypatch.setattr(latents, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        encode(split, folder, model(seed=1))
    assert sorted(path.name for path in folder.iterdir()) == ["train-00000.safetensors", "train-00001.safetensors"]
    with pytest.raises(UserError, match="No latents in"):
        LatentDataModule(folder)


# ---- reading


def test_batches_are_normalised(split, tmp_path):
    data = LatentDataModule(encode(split, tmp_path / "latents"), batch_size=24)
    (batch,) = data.train_dataloader()
    z = batch["latents"]
    assert z.shape == (24, 2, 8, 8) and z.dtype == torch.float32 and data.num_classes == 3
    torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-5)
    torch.testing.assert_close(z.std((0, 2, 3)), torch.ones(2), rtol=0, atol=1e-5)
    (validation,) = data.val_dataloader()
    assert validation["latents"].mean((0, 2, 3)).abs().max() > 1e-3  # by the training side's statistics


def test_shards_are_one_data_set(split, tmp_path, monkeypatch):
    whole = LatentDataset(encode(split, tmp_path / "one", flips=True), "train")
    monkeypatch.setattr(latents, "SHARD_SIZE", 7)
    folder = encode(split, tmp_path / "many", flips=True)
    assert folder.shards["train"] == [f"train-{n:05d}.safetensors" for n in range(4)]
    parts = LatentDataset(folder, "train")
    assert torch.equal(parts.labels, whole.labels) and len(parts) == 24
    wanted = [23, 0, 6, 7, 13, 14, 20, 21, 0]
    batch, expected = parts.__getitems__(wanted), whole.__getitems__(wanted)
    assert batch.keys() == expected.keys() and batch["index"].tolist() == wanted
    for name in batch:
        torch.testing.assert_close(batch[name], expected[name], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.tensor(folder.mean), torch.tensor(LatentFolder.read(tmp_path / "one").mean))


def test_latents_are_mapped_not_read(latents_dir, tmp_path):
    """A gigabyte of latents costs what its batches cost: the file stands behind the tensor."""
    folder = LatentFolder.read(latents_dir)
    shutil.copytree(latents_dir, tmp_path / "big")
    rows = 65_536  # 64 MiB
    big = {"latents": torch.ones(rows, 2, 8, 8), "labels": torch.zeros(rows, dtype=torch.int64)}
    save_file(big, tmp_path / "big" / "train-00000.safetensors")
    del big

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 // 2**20

    before = resident()
    data = LatentDataset(LatentFolder.read(tmp_path / "big"), "train")
    assert len(data) == rows
    data.__getitems__([0, 30_000, rows - 1])
    assert resident() - before < 16
    assert str(tmp_path / "big" / "train-00000.safetensors") in Path("/proc/self/maps").read_text()
    assert folder.shards["train"] == ["train-00000.safetensors"]


def test_damaged_shards_are_named(split, tmp_path):
    folder = encode(split, tmp_path / "latents")
    shard = folder.path / "train-00000.safetensors"
    whole = shard.read_bytes()
    for content in (whole[: len(whole) // 2], b"", b"no tensors here at all" * 10):
        shard.write_bytes(content)
        with pytest.raises(UserError, match=rf"train-00000\.safetensors cannot be read .*: delete {INDEX}"):
            LatentDataModule(folder.path)
    shard.unlink()
    with pytest.raises(UserError, match=r"train-00000\.safetensors cannot be read"):
        LatentDataModule(folder.path)


@pytest.mark.parametrize("content", ['{"key": ', "{}", "[]", '{"key": "a", "shape": 3, "image_size": 4}'])
def test_a_damaged_index_is_named(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(UserError, match=r"latents\.json is damaged .* encode the pictures again"):
        LatentFolder.read(tmp_path)


def test_no_latents(tmp_path):
    with pytest.raises(UserError, match=r"No latents in .* \(latents\.json is missing\): encode the pictures first"):
        LatentDataModule(tmp_path)


# ---- the statistics travel


def test_encoding_a_split_leaves_the_vavae_as_it_is(split, tmp_path, count_encoded):
    """It may lie in a folder that cannot be written, such as Kaggle's input."""
    vae = model()
    vae.save_pretrained(tmp_path / "vavae")
    before = {path.name: path.read_bytes() for path in (tmp_path / "vavae").iterdir()}
    said = []
    folder = encode_split(split, tmp_path / "vavae", tmp_path / "latents", say=said.append)
    assert {path.name: path.read_bytes() for path in (tmp_path / "vavae").iterdir()} == before
    assert folder.weights == weights_digest(vae) and folder.weights != weights_digest(model(1))
    assert said[0] == f"Latents 2×8×8 of pictures 16×16: train 24, val 6 ({tmp_path / 'latents'})"
    assert json.loads((tmp_path / "latents" / INDEX).read_text())["people"] == {"ID_1": 0, "ID_2": 1, "ID_3": 2}
    del count_encoded[:]
    assert encode_split(split, tmp_path / "vavae", tmp_path / "latents", say=said.append) == folder
    assert count_encoded == []


def test_latents_of_another_vavae_are_refused(split, tmp_path):
    for seed in (0, 1):
        model(seed).save_pretrained(tmp_path / f"vavae{seed}")
    encode_split(split, tmp_path / "vavae0", tmp_path / "latents", say=lambda line: None)
    with pytest.raises(UserError, match=r"latents was not made by .*vavae1: encode the pictures again"):
        train_dit(tmp_path / "latents", tmp_path / "vavae1", tmp_path / "dit", {"hidden_size": 16, "num_heads": 2})
    assert not (tmp_path / "dit").exists()
