"""What is kept of generated images, and why the rest is not."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import refuses

from vavae_tools import select
from vavae_tools.evaluation import selection
from vavae_tools.evaluation.compared import Subset
from vavae_tools.evaluation.selection import farthest_first, fitted_temperature, select_images

GREY = {"a": 60, "b": 180}  # of each person's images, about


class Greys:
    """In place of a classifier: its features are an image's mean and spread, and near which grey it is says who."""

    def __init__(self) -> None:
        self.head = torch.nn.Linear(2, 2)
        self.head.weight.data = torch.tensor([[-0.1, 0.0], [0.1, 0.0]])
        self.head.bias.data = torch.tensor([12.0, -12.0])

    def judge(self, data):
        pixels = data.images(range(len(data))).float()
        features = torch.stack([pixels.mean((1, 2, 3)), pixels.std((1, 2, 3))], dim=1)
        return features, self.head(features).argmax(1)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """A split of two persons and generated images, with a fake classifier: names say what is wrong with each."""
    monkeypatch.setattr(selection, "cached_classifier", lambda *given, **more: Greys())
    for person, grey in GREY.items():
        for subset, count in (("train", 20), ("val", 4)):
            for n in range(count):
                save(tmp_path / "split" / subset / person / f"{n:02d}.png", grey + n, 20 + 3 * n)
        for n, name in enumerate(("right0", "right1", "right2")):
            between = 4.5 + 2 * n  # training images, beside the line that they are on
            save(tmp_path / "made" / person / f"{name}.png", grey + between + 2.25, 17 + 3 * between)
        save(tmp_path / "made" / person / "other.png", GREY["b" if person == "a" else "a"] + 3, 30)
        save(tmp_path / "made" / person / "odd.png", 5 if person == "a" else 250, 0)
        shutil.copy(tmp_path / "split/train" / person / "03.png", tmp_path / "made" / person / "copied.png")
    return tmp_path / "made", tmp_path / "split"


def save(path, mean: float, spread: float) -> None:
    """A grey image of two halves with about this mean and spread."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((16, 16, 3), mean + spread / 2, np.float64)
    pixels[8:] = mean - spread / 2
    Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8)).save(path)


def test_each_image_is_dropped_for_its_reason(folders, tmp_path):
    found = select_images(*folders, tmp_path / "out", 2, progress=False)
    expected = {"kept": 2, "wrong person": 1, "unsure": 0, "implausible": 1, "copy": 1, "not needed": 1}
    assert found.people == {"a": expected, "b": expected}
    assert "4 of 12 images are kept, 2 of each person wanted" in str(found)
    kept = json.loads((tmp_path / "out/selection.json").read_text())["images"]
    assert [path.relative_to(tmp_path / "out").as_posix() for path in sorted((tmp_path / "out").rglob("*.png"))] == kept
    assert all("right" in name for name in kept)
    again = select_images(*folders, tmp_path / "out", progress=False)  # replaces it
    assert again.people["a"]["kept"] == 3 and len([*(tmp_path / "out").rglob("*.png")]) == 6
    assert "a lacks 7, about 14 more samples" in str(select_images(*folders, tmp_path / "out", 10, progress=False))


def test_the_farthest_comes_next():
    assert farthest_first(torch.tensor([[0.0], [10.0], [4.0], [6.0], [5.0]])).tolist() == [4, 0, 1, 2, 3]


def test_confidence_is_made_what_accuracy_is():
    wrong_fifth = torch.tensor([0, 0, 0, 0, 1])
    sure = torch.tensor([[0.999, 0.001]]).expand(5, 2)
    temperature = fitted_temperature(Subset(type("Data", (), {"labels": wrong_fifth}), None, sure, True))
    assert (sure.log() / temperature).softmax(1)[0, 0] == pytest.approx(0.8, abs=0.01)


def test_the_command_and_what_it_refuses(folders, tmp_path, run_main, fault):
    made, split = folders
    words = ["--generated_dir", made, "--data_dir", split]
    status, out, err = run_main(select.main, *words, "--output_dir", tmp_path / "out", "--images_per_person", 1)
    assert not status and f"next: python -m vavae_tools.evaluate --generated_dir {tmp_path}/out" in out, err
    assert "is the folder to select from" in fault(select.main, *words, "--output_dir", made)
    assert "split holds train, val and no selection.json" in fault(select.main, *words, "--output_dir", split)
    assert "expected at least 1" in fault(select.main, *words, "--images_per_person", 0)
    shutil.copytree(split / "train/a", tmp_path / "one/a")
    shutil.rmtree(made / "b")
    refuses("images of one person only", select_images, made, tmp_path / "one", tmp_path / "new", progress=False)
