"""Several processes validate, judge and encode what one does; this file is also what torchrun starts for that."""

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import lightning as L
import pytest
import torch
from forked import torchrun
from safetensors.torch import load_file
from tiny import SIZE, Averages, perturb_projections, same, tiny_dit, tiny_vavae, trained_looking
from torch.distributed import HashStore
from torch.utils.data import Dataset

from vavae_tools.autoencoders.foundation import foundation_features
from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.data.demo.shapes import shape_data
from vavae_tools.data.images import to_unit
from vavae_tools.data.latents import INDEX, LatentDataset, LatentFolder, encode_latents
from vavae_tools.data.loader import OrderedDataModule
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import write_json
from vavae_tools.runtime.ranks import Ranks, current_ranks
from vavae_tools.training.autoencoder_module import VAVAEModule
from vavae_tools.training.callbacks.watch import ReconstructionWatch
from vavae_tools.training.denoiser_module import DiffusionModule

ROOT = Path(__file__).parents[1]


# ---- what each process does
class RandomLatents(Dataset):
    def __init__(self, count: int) -> None:
        noise = torch.randn(count, 2, 8, 8, generator=torch.Generator().manual_seed(count))
        self.latents = noise * torch.arange(1, count + 1)[:, None, None, None]

    def __len__(self) -> int:
        return len(self.latents)

    def get_batch(self, indices):
        index = torch.tensor(indices)
        return {"latents": self.latents[index], "labels": index % 3, "index": index}


class Latents(OrderedDataModule):
    def __init__(self, count: int, **options) -> None:
        super().__init__(**options)
        self.train_data, self.val_data = RandomLatents(8), RandomLatents(count)


class Seen(L.Callback):
    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def on_validation_batch_end(self, trainer, module, outputs, batch, *more) -> None:
        self.batches.append(batch["index"].tolist())


def trainer_for(processes: int, **options) -> L.Trainer:
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    strategy = "ddp_find_unused_parameters_true" if processes > 1 else "auto"
    place = {"accelerator": "cpu", "devices": processes, "strategy": strategy, "use_distributed_sampler": False}
    return L.Trainer(**quiet, **place, **options)


def validated(processes: int, count: int, **options) -> dict:
    """A denoiser's losses on `count` latents, and the batches of this process."""
    denoiser, conditioner = tiny_dit()
    module, seen = DiffusionModule(trained_looking(denoiser), trained_looking(conditioner)), Seen()
    trainer = trainer_for(processes, callbacks=[seen])
    trainer.validate(module, Latents(count, **options), verbose=False)
    return {"batches": seen.batches, **{name: value.item() for name, value in trainer.callback_metrics.items()}}


class Faithful(VAVAEModule):
    """What is judged are the originals: all are known again if each stands in its place."""

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        return {"reconstructions": batch["images"]}


def watched(processes: int, split: str, folder: str) -> dict:
    """What a VA-VAE comes to on five images, at a learning rate of 0."""
    data = ImageDataModule(split, SIZE, batch_size=6 // processes)
    data.val_data = data.val_data.part(range(5))
    module, watch = Faithful(perturb_projections(tiny_vavae()), lr=0.0), ReconstructionWatch(data, folder)
    trainer = trainer_for(processes, callbacks=[watch], max_epochs=1, num_sanity_val_steps=1)
    trainer.fit(module, data)
    values = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return {"judges": hasattr(watch, "judge"), **values}


class Counted(torch.nn.Module):
    """A VA-VAE that counts the images it encodes."""

    downsampling, has_own_statistics = 2, False

    def __init__(self) -> None:
        super().__init__()
        self.vavae, self.count = perturb_projections(tiny_vavae()), 0

    def encode_images(self, images, labels, normal):
        self.count += len(images)
        return self.vavae.encode_images(images, labels, normal)


def encoded(split: str, folder: str, ranks: Ranks | None = None) -> int:
    """Encode, with batches of two and shards of four → how many images this process has encoded."""
    encoder = Counted()
    encode_latents(encoder, ImageDataModule(split, SIZE), folder, True, 2, progress=False, seed=3, ranks=ranks)
    return encoder.count


def main(folder: str, split: str, latents_dir: str, classifier: str) -> None:
    """All of it by one process of several."""
    ranks = current_ranks()
    found = {f"validated {count}": validated(ranks.size, count, batch_size=2) for count in (13, 1)}
    found["watched"] = watched(ranks.size, split, classifier)
    found["encoded"] = [encoded(split, latents_dir, ranks)]
    found["encoded"].append(encoded(split, latents_dir, ranks))  # it is all there
    ranks.add("second", 1)
    if ranks.rank == 0:
        while ranks.add("second", 0) < ranks.size:
            time.sleep(0.1)
        latents = LatentFolder.read(latents_dir).path
        (latents / INDEX).unlink()
        (latents / "train-00001.safetensors").unlink()
    found["encoded"].append(encoded(split, latents_dir, ranks))
    write_json(f"{folder}/{ranks.rank}.json", found)


# ---- what is expected of them
@pytest.fixture(scope="module")
def alone(split_dir, tmp_path_factory) -> dict:
    """What one process makes."""
    folder = tmp_path_factory.mktemp("alone")
    encoded(split_dir, folder / "latents")
    return {
        **{f"validated {count}": validated(1, count, batch_size=2) for count in (13, 1)},
        "watched": watched(1, str(split_dir), str(folder / "classifier")),
        "latents": folder / "latents",
    }


@pytest.fixture(scope="module", params=[2, 3])
def several(request, split_dir, tmp_path_factory) -> tuple[list[dict], Path]:
    """What two processes of torchrun make, and three: of each, and their latents."""
    folder = tmp_path_factory.mktemp("several")
    places = folder, split_dir, folder / "latents", folder / "classifier"
    done = torchrun(__file__, *places, count=request.param)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(request.param)], folder / "latents"


def test_validation_is_shared_and_says_the_same(several, alone):
    """Thirteen latents, whose losses differ a hundredfold, so that weights that are slightly wrong are seen."""
    ranks, _ = several
    for rank in ranks:
        for name in ("validated 13", "validated 1"):
            assert rank[name].keys() == alone[name].keys() > {"val/loss"}
            for value in rank[name].keys() - {"batches"}:
                assert rank[name][value] == pytest.approx(alone[name][value], rel=1e-5), (name, value)
    batches = [rank["validated 13"]["batches"] for rank in ranks]
    assert sorted(index for of_rank in batches for batch in of_rank for index in batch) == list(range(13))
    assert len({len(of_rank) for of_rank in batches}) == 1
    assert [rank["validated 1"]["batches"] for rank in ranks] == [[[0]]] * len(ranks)


def test_reconstructions_of_all_are_judged_by_the_first(several, alone):
    ranks, _ = several
    assert [rank["watched"]["judges"] for rank in ranks] == [True] + [False] * (len(ranks) - 1)
    judged = {"val/accuracy", "val/real_accuracy", "val/frechet", "val/real_frechet", "val/frechet_ratio"}
    for rank in ranks:
        assert rank["watched"].keys() == alone["watched"].keys() > judged
        assert rank["watched"]["val/accuracy"] == rank["watched"]["val/real_accuracy"] > 0.9
        assert rank["watched"]["val/frechet_ratio"] == pytest.approx(1, abs=1e-5)
        for name in rank["watched"].keys() - {"val/latent_std", "judges"}:  # which is of a batch
            assert rank["watched"][name] == pytest.approx(alone["watched"][name], rel=1e-4), name


def rows_of(folder: Path) -> list[torch.Tensor]:
    found = LatentFolder.read(folder)
    shards = [load_file(found.path / name) for subset in ("train", "val") for name in found.shards[subset]]
    return [torch.cat([shard[key] for shard in shards]) for key in ("latents", "latents_flip", "labels")]


def test_all_encode_and_the_latents_are_those_of_one(several, alone):
    ranks, folder = several
    expected, found = LatentFolder.read(alone["latents"]), LatentFolder.read(folder)
    assert (found.key, found.names, found.people) == (expected.key, expected.names, expected.people)
    assert all(map(same, rows_of(folder), rows_of(alone["latents"])))
    for values, wanted in ((found.mean, expected.mean), (found.std, expected.std)):
        torch.testing.assert_close(torch.tensor(values), torch.tensor(wanted), rtol=1e-9, atol=1e-12)
    first, second, third = zip(*(rank["encoded"] for rank in ranks), strict=True)
    one = 2  # an image and its mirrored one, which each process encodes for the shape
    assert sum(first) == 60 + one * len(ranks) and min(first) >= 60 // len(ranks) - 4
    assert sum(second) == 0
    assert sorted(third) == [one] * (len(ranks) - 1) + [one + 2 * 4]
    left = sorted(path.name for path in found.path.iterdir())
    assert left == sorted([INDEX, *found.shards["train"], *found.shards["val"]])


# ---- several that are threads of this process: what needs no torchrun
class OneThread(Ranks):
    """One of several threads, which all end after one has failed, as a launcher's processes do."""

    def share(self, name, value=None):
        while self.rank and not self.store.check([name]):
            self.look()
        return super().share(name, value)

    def add(self, name, count):
        self.look()
        return super().add(name, count)

    def look(self):
        time.sleep(0.001)
        if self.store.check(["failed"]):
            raise RuntimeError("ended by another's fault")


def at_once(size: int, work) -> list:
    """`work(ranks)` of each → what it returned, or the error it raised."""
    store = HashStore()

    def run(rank: int):
        try:
            return work(OneThread(rank, size, rank, store))
        except Exception as error:
            store.set("failed", "")
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


@pytest.mark.parametrize(("size", "count"), [(2, 64), (4, 1), (7, 5)])
def test_any_number_of_processes_encode_any_number_of_images(tmp_path, size, count):
    data = shape_data(count, image_size=16, val_share=0.2)

    def encode(folder, ranks=None):
        return encode_latents(Averages(), data, tmp_path / folder, batch_size=3, progress=False, ranks=ranks)

    one = encode("one")
    found = at_once(size, lambda ranks: encode("all", ranks))
    assert all(isinstance(folder, LatentFolder) for folder in found), found
    for subset in ("train", "val"):
        mine, theirs = (LatentDataset(folder, subset) for folder in (found[0], one))
        assert len(mine) == len(theirs) and torch.equal(mine.labels, theirs.labels)
        if len(mine):
            a, b = (data.get_batch(list(range(len(mine))))["latents"] for data in (mine, theirs))
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    assert found[0].mean == pytest.approx(one.mean, rel=1e-9) and found[0].std == pytest.approx(one.std, rel=1e-9)
    again = at_once(3, lambda ranks: encode("all", ranks))
    assert again == [found[0]] * 3


class Means:
    """A foundation model that counts the images that it is asked about."""

    channels, digest, asked = 3, "means", 0

    def __call__(self, images, grid):
        self.asked += len(images)
        return torch.nn.functional.adaptive_avg_pool2d(images, grid)


def test_features_of_a_foundation_model_are_shared_too(tmp_path):
    data, models = shape_data(24, image_size=16, val_share=0).train_data, [Means(), Means()]

    def features(ranks):
        path = tmp_path / "train.safetensors"
        return foundation_features(models[ranks.rank], data, (2, 2), path, "cpu", 3, progress=False, ranks=ranks)

    rows = [found[torch.arange(24)] for found in at_once(2, features)]
    expected = torch.nn.functional.adaptive_avg_pool2d(to_unit(data.in_memory()), (2, 2)).half()
    assert [model.asked for model in models] == [12, 12] and all(same(found, expected) for found in rows)


def test_another_autoencoder_or_other_images_are_told_by_the_process_that_has_them(tmp_path):
    def encode(ranks, scale=0.0, count=0):
        odd = ranks.rank == 1
        data = shape_data(8 + odd * count, image_size=16)
        return encode_latents(Averages(1 + odd * scale), data, tmp_path, progress=False, ranks=ranks)

    for options in ({"scale": 1.0}, {"count": 1}):
        _, error, *_ = at_once(2, lambda ranks, options=options: encode(ranks, **options))
        assert isinstance(error, UserError) and "Process 2 of 2 has other weights or images than" in str(error)


def test_machines_without_a_common_disk_are_told(tmp_path, monkeypatch):
    """Unless each has encoded before: what is there is taken."""
    monkeypatch.setattr("vavae_tools.data.encoded.PATIENCE", 0.0)
    data = shape_data(8, image_size=16)

    def encode(ranks, machine=None):
        folder = tmp_path / str(ranks.rank if machine is None else machine)
        return encode_latents(Averages(), data, folder, progress=False, ranks=ranks)

    error = next(error for error in at_once(2, encode) if isinstance(error, UserError))
    assert "of 2 does not see" in str(error) and "encode on each machine first" in str(error)
    before = [encode(Ranks(), machine) for machine in range(2)]
    assert at_once(2, encode) == before


if __name__ == "__main__":
    main(*sys.argv[1:])
