"""Whatever images lie in, a VA-VAE trains on them, latents are made of them, and runs and caches are known again."""

from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from test_vavae_training import Colours
from tiny import refuses, same, tiny_vavae
from torch.utils.data import DataLoader

from vavae_tools.data.datasets import ImageDataModule, image_data
from vavae_tools.data.demo.shapes import shape_data
from vavae_tools.data.images import to_unit
from vavae_tools.data.latents import LatentDataset, _cache_keys, encode_latents
from vavae_tools.data.split import split_folders
from vavae_tools.evaluation import classifier
from vavae_tools.evaluation.reconstructions import evaluate_vavae
from vavae_tools.evaluation.report import evaluate_images
from vavae_tools.runtime.errors import UserError
from vavae_tools.training.autoencoder_module import VAVAEModule
from vavae_tools.training.callbacks.record import RunRecord

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

SIZE = 16, 24
SOURCES = ("split", "folders", "sides", "dataset", "shapes")
QUIET = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}


def write_people(folder: Path, mode: str = "RGB", count: int = 8, size: tuple[int, int] = (40, 60)) -> Path:
    """Three people's images, no two alike; their files are as long wherever they are written."""
    for person in range(3):
        (folder / f"ID_{person + 1}").mkdir(parents=True)
        for i in range(count):
            array = np.random.default_rng(100 * person + i).integers(0, 256, (*size, 3), dtype=np.uint8)
            image = Image.fromarray(array).convert(mode)
            image.save(folder / f"ID_{person + 1}" / f"{i}.png", compress_level=0)
    return folder


def source(kind: str, root: Path, channels: int, image_size=SIZE, **options):
    """The data module of each kind of data, and the images that went into it by name; None of shapes."""
    if kind == "shapes":
        return shape_data(18, 3, image_size, 8, seed=1, val_share=0.25, channels=channels), None
    people = write_people(root / "people", "L" if channels == 1 else "RGB")
    paths = {f"{path.parent.name}/{path.name}": path for path in sorted(people.glob("*/*.png"))}
    if kind == "split":
        split_folders(people, root / "data", progress=False)
    elif kind == "sides":
        for subset, numbers in (("train", range(6)), ("val", (6, 7))):
            for name, path in paths.items():
                if int(path.stem) in numbers:
                    (root / "data" / subset / name).parent.mkdir(parents=True, exist_ok=True)
                    (root / "data" / subset / name).write_bytes(path.read_bytes())
    elif kind == "dataset":
        hf = pytest.importorskip("datasets")
        names = [f"ID_{k}" for k in (1, 2, 3)]
        features = hf.Features(image=hf.Image(), label=hf.ClassLabel(names=names))
        values = {"image": list(map(str, paths.values())), "label": [name.split("/")[0] for name in paths]}
        hf.Dataset.from_dict(values, features=features).save_to_disk(str(root / "data"))
        paths = {f"{path.parent.name}/{i:06d}": path for i, path in enumerate(paths.values())}
    folder = people if kind == "folders" else root / "data"
    return ImageDataModule(folder, image_size, 8, seed=1, crop="none", **options), paths


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("kind", SOURCES)
def test_a_vavae_trains_and_encodes(tmp_path, kind, channels):
    """Images that are not square, in colour and in grey, which is found where nobody says it."""
    data, paths = source(kind, tmp_path, channels, val_share=None if kind == "split" else 0.25)
    assert data.channels == data.val_data.channels == channels and data.num_classes == 3
    assert len(data.train_data) + len(data.val_data) == (23 if kind == "shapes" else 24) and data.num_workers == 0
    for subset in (data.train_data, data.val_data) if paths else ():
        assert set(subset.names) <= paths.keys()
        whole = subset.in_memory()
        for place in (0, len(subset) - 1):
            with Image.open(paths[subset.names[place]]) as image:
                expected = np.asarray(image.resize(SIZE[::-1], Image.Resampling.BICUBIC)).reshape(*SIZE, channels)
            assert np.array_equal(whole[place].permute(1, 2, 0), expected)
            assert list(data.labels)[subset.labels[place]] == subset.names[place].split("/")[0]

    model, foundation = tiny_vavae(in_channels=channels, out_channels=channels), Colours() if channels == 3 else None
    alignment = {"vf_weight": 0.1, "foundation": foundation} if foundation else {}
    module = VAVAEModule(model, lr=1e-3, warmup_steps=1, **alignment)
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    trainer = L.Trainer(max_steps=2, limit_val_batches=1, default_root_dir=tmp_path / "run", **QUIET)
    trainer.fit(module, data)
    assert trainer.global_step == 2 and trainer.callback_metrics["val/psnr"].isfinite()
    changed = [name for name, weights in model.state_dict().items() if not torch.equal(weights, before[name])]
    assert "conditions.weight" in changed and "decoder.conv_out.weight" in changed
    if foundation:  # each image once, before training
        assert foundation.asked == len(data.train_data) + len(data.val_data)

    folder = encode_latents(model, data, tmp_path / "latents", progress=False)
    assert folder.shape == (2, SIZE[0] // 2, SIZE[1] // 2) and folder.people == data.labels
    assert folder.names == {"train": list(data.train_data.names), "val": list(data.val_data.names)}
    batch, images = LatentDataset(folder, "val").get_batch([1]), data.val_data.get_batch([1])
    samples = next(iter(DataLoader(LatentDataset(folder, "val"), 2)))  # torch's own loader
    assert torch.equal(samples["latents"][1], batch["latents"][0])
    with torch.no_grad():
        posterior = model.encode(to_unit(images["images"]), condition=model.condition_vectors(images["labels"]))
    mean, std = (torch.tensor(values)[:, None, None] for values in (folder.mean, folder.std))
    apart = batch["latents"] * std + mean - posterior.latent_dist.mean
    assert (apart.abs() < 5 * posterior.latent_dist.std).all() and torch.equal(batch["labels"], images["labels"])


def test_images_are_read_at_another_size_once_it_is_known(tmp_path, monkeypatch):
    data, _ = source("folders", tmp_path, 3, image_size=64)
    assert data.train_data.in_memory().shape[2:] == (64, 64)
    data.resize((8, 12))
    other = ImageDataModule(tmp_path / "people", (8, 12), 8, seed=1, crop="none")
    assert same(data.train_data.in_memory(), other.train_data.in_memory()) and data.fingerprint() == other.fingerprint()
    assert data.val_data.image_size == (8, 12)
    monkeypatch.setattr("vavae_tools.data.images.MEMORY_LIMIT", len(data.train_data) * 8 * 12 * 3)
    monkeypatch.setattr("vavae_tools.data.images.loading_workers", lambda: 3)
    for size, workers in ((9, 3), (8, 0)):  # as many workers as this size needs
        data.resize((size, 12))
        assert data.num_workers == workers


# ---- evaluation
def test_generated_images_beside_a_folder_per_class(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "default_steps", lambda images: 2)
    people = write_people(tmp_path / "people", "L", 12, (24, 40))
    found = evaluate_images(people, people, tmp_path / "out", seed=3, progress=False, val_share=0.2)
    held = image_data(people, (24, 40), seed=3, val_share=0.2)
    assert found.image_size == (24, 40) and found.total.generated == 36 and found.notes[0].startswith("ID_1, ID_2")
    assert found.total.validation == len(held.val_data)
    trained = [one for one in found.nearest if one.generated in held.train_data.names]
    assert len(trained) == 36 - len(held.val_data) < 36
    assert all(one.training == one.generated and one.distance < 0.01 for one in trained)
    assert (tmp_path / "out" / "figures" / "generated_and_nearest.png").is_file()


def test_reconstructions_of_a_dataset_are_judged_by_a_classifier_that_is_kept(tmp_path, monkeypatch):
    data, _ = source("dataset", tmp_path, 3, val_share=0.25)
    monkeypatch.setattr(classifier, "default_steps", lambda images: 2)
    scores = evaluate_vavae(tiny_vavae(), data, tmp_path / "classifier", progress=False)
    assert scores.images == len(data.val_data) and scores.accuracy is not None and scores.frechet > 0
    monkeypatch.setattr(classifier, "train_classifier", None)
    assert evaluate_vavae(tiny_vavae(), data, tmp_path / "classifier", progress=False) == scores
    others = tiny_vavae(people={"a": 0, "b": 1, "c": 2})
    with pytest.raises(UserError, match=r"VA-VAE here has vectors of a, b, c, none for "):
        evaluate_vavae(others, data, tmp_path / "classifier", progress=False)


# ---- known again
def known(folder: Path):
    """What the tests below know: a split, and folders, of images whose files have the same bytes everywhere."""
    for person in range(3):
        (folder / "in" / f"ID_{person + 1}").mkdir(parents=True)
        for i in range(5):
            value = np.arange(6 * 4, dtype=np.uint8).reshape(6, 4) * 5 + 40 * person + i
            image = Image.fromarray(value if person else np.stack([value] * 3, 2))
            image.save(folder / "in" / f"ID_{person + 1}" / f"{i}.png", compress_level=0)
    split_folders(folder / "in", folder / "split", progress=False)
    return folder


def test_fingerprints_and_keys_are_those_of_runs_and_latents_that_are_there(tmp_path):
    """The numbers are what each source's own module gave, before there was one for all."""
    known(tmp_path)
    split = ImageDataModule(tmp_path / "split", (8, 6))
    assert split.channels == 3  # one in colour is enough
    found = {
        "split": split,
        "grey split": ImageDataModule(tmp_path / "split", 8, channels=1),
        "folders": image_data(tmp_path / "in", 8, channels=3),
        "whole images of folders": image_data(tmp_path / "in", 8, crop="none", val_share=0.3, channels=3),
        "shapes": shape_data(20),
    }
    assert {name: data.fingerprint() for name, data in found.items()} == {
        "split": "2438c7b32e1da701110a327d030da080f7d580447025d0f7e00be54f3757003b",
        "grey split": "de5188e77ca201ec68ff35b0d805e0dfeec681a57e45ba1894c683d87f6c3b42",
        "folders": "dbc16d3a3914503239dc4764cfcec17971a0226fbafbe8fcca9b0045cc365257",
        "whole images of folders": "762071a4a3f185f8a6c9efa7a01d7f61636d8fa5957e07f1f487735a96e21a1a",
        "shapes": "22c25322906f84e2651cc77b8065b1547fc9af490a659ed864337f461671cb22",
    }

    def key(data):
        subsets = {"train": data.train_data, "val": data.val_data}
        usual = {"dtype": "float32", "statistics": None, "precision": "32"}
        return _cache_keys(torch.nn.Identity(), subsets, "form 2, flips True, seed 3, weights", [usual])[0]

    assert {name: key(data) for name, data in found.items() if name != "grey split"} == {
        "split": "bbd53135c72421fb4abf5a86436abbf7cb10805293111e624f2798450be67a32",
        "folders": "1fbd831638bba14d9afc712e7232aec6ccace1c3479c8810580fe68369986240",
        "whole images of folders": "56853f6ff93cfa35ad35cdca4c6949fc41ad633706a0938596f528aff90f445f",
        "shapes": "a046024c86d47786d2d8ca013a497bf064a5e7086dccfd10aa6bba5cfcb3988c",
    }


class Order(L.Callback):
    """Notes which images each step sees, and keeps the fifth step's checkpoint."""

    def __init__(self, path: Path) -> None:
        self.path, self.seen = path, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        self.seen.append(batch["index"].tolist())

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 5:
            trainer.save_checkpoint(self.path)


FORMER = "ae55835be59ab4681430cf33d4b0acf59fd754a962cc70b197d336d683020f24"
"""What an RAE's own data module gave for the split of `known`."""


@pytest.mark.parametrize("data_then", [FORMER, "another"])
def test_a_run_from_when_an_rae_had_a_data_module_of_its_own_goes_on(tmp_path, data_then):
    """At the very image, in the middle of an epoch; and other data are still other data."""

    def fit(resume=None):
        data, order = ImageDataModule(split, (8, 6), 3, seed=4), Order(tmp_path / "former.ckpt")
        record = RunRecord(tmp_path / "run", {}, data.fingerprint(), False, lambda line: None)
        trainer = L.Trainer(max_steps=7, callbacks=[order, record], default_root_dir=tmp_path, **QUIET)
        trainer.fit(VAVAEModule(tiny_vavae(), warmup_steps=1), data, ckpt_path=resume, weights_only=True)
        return order.seen

    split = known(tmp_path) / "split"
    whole = fit()
    checkpoint = torch.load(tmp_path / "former.ckpt", weights_only=True)
    assert checkpoint["ImageDataModule"]["batches_done"] == 1
    checkpoint["ImageSetDataModule"] = checkpoint.pop("ImageDataModule")
    checkpoint["run"]["data"] = data_then
    torch.save(checkpoint, tmp_path / "former.ckpt")
    if data_then == FORMER:
        assert fit(tmp_path / "former.ckpt") == whole[5:]
    else:
        refuses("the data are others", fit, tmp_path / "former.ckpt")
