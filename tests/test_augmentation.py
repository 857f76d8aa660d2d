"""The gain: what is trained on what, and how sure the difference is."""

import json
from dataclasses import astuple

import pytest
import torch
from test_evaluation import copy_subset, write_people
from tiny import refuses
from torchmetrics.functional.classification import multiclass_f1_score

from vavae_tools import evaluate
from vavae_tools.data.split import split_folders
from vavae_tools.evaluation import augmentation
from vavae_tools.evaluation.augmentation import _interval, _macro_f1, _resampled, evaluate_gain
from vavae_tools.evaluation.classifier import mask_bands
from vavae_tools.evaluation.metrics import Interval
from vavae_tools.runtime.draws import Draws

QUIET = {"progress": False, "image_size": 32}


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_people(folder / "people", (1, 2, 3), 15, seed=0)
    split_folders(folder / "people", folder / "split", 0.4, 0.6, progress=False)
    return folder / "split"


class Oracle:
    """In place of a classifier: right on a share of the images that follows from what it was trained on."""

    def __init__(self, parts, people, steps, seed, device, progress, masks):
        self.images, self.masks, self.seed = sum(map(len, parts)), masks, seed
        self.by_folder = {part.folder.name: torch.bincount(part.labels).tolist() for part in parts}

    def judge(self, images):
        share = min(1.0, self.images / 40)
        right = torch.arange(len(images)) % 10 < round(10 * share)
        return None, torch.where(right, images.labels, (images.labels + 1) % 3)


@pytest.fixture
def trained(monkeypatch):
    made = []
    monkeypatch.setattr(augmentation, "train_classifier", lambda *of: made.append(Oracle(*of)) or made[-1])
    return made


def test_each_mixture_has_its_images_and_is_trained_once(split, tmp_path, trained):
    write_people(tmp_path / "made", (1, 2, 3), 12, seed=1)
    gain = evaluate_gain(tmp_path / "made", split, tmp_path / "out", shares=(0.5, 2, 4), seeds=2, **QUIET)
    names = ["real", "real, masked", "real + 0.5 generated", "real + 2 generated"]
    names += ["real, masked + 2 generated", "generated alone"]
    assert [score.name for score in gain.mixtures] == names and [score.images for score in gain.mixtures] == [
        *(18, 18, 27, 54, 54, 36)
    ]
    assert [made.seed for made in trained] == [0, 1] * 6
    assert [made.masks for made in trained[::2]] == [False, True, False, False, True, False]
    assert trained[4].by_folder == {"train": [6, 6, 6], "made": [3, 3, 3]}
    assert trained[-1].by_folder == {"made": [12, 12, 12]}
    assert "there are 2 generated images for each real one: too few for 4" in gain.notes
    assert gain.best == "real + 2 generated" and gain.mixtures[0].gain is None
    saved = json.loads((tmp_path / "out" / "gain.json").read_text())
    assert saved["verdict"] == gain.verdict and saved["mixtures"][3]["accuracy"]["value"] == 100
    assert (tmp_path / "out" / "figures" / "gain.png").is_file()
    evaluate_gain(tmp_path / "made", split, tmp_path / "out", shares=(0.5, 2, 4), seeds=2, **QUIET)
    assert len(trained) == 12
    write_people(tmp_path / "made", (1, 2, 3), 12, seed=2)  # other images under the same names
    evaluate_gain(tmp_path / "made", split, tmp_path / "out", shares=(0.5, 2, 4), seeds=2, **QUIET)
    assert len(trained) == 12 + 8


def test_more_real_images_stand_beside_generated_ones_where_there_are_some(split, tmp_path, trained):
    write_people(tmp_path / "made", (1, 2, 3), 4, seed=1)
    gain = evaluate_gain(tmp_path / "made", split, tmp_path, shares=(1, 2), seeds=1, images_per_person=2, **QUIET)
    by_name = {score.name: score for score in gain.mixtures}
    assert by_name["real"].images == 6
    assert by_name["real + 2 more real"].images == by_name["real + 2 generated"].images == 18
    assert len(gain.mixtures) == 8 and gain.steps == 100


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        (
            12,
            "use 2 generated images for each real one: +55.6 points (95 % +37.0 to +74.1), accuracy on validation "
            "images 44.4 % → 100.",
        ),
        (0, "no gain that can be told: +0.0 points"),
    ],
)
def test_a_verdict_is_a_sentence(split, tmp_path, trained, monkeypatch, made, verdict):
    write_people(tmp_path / "made", (1, 2, 3), 12, seed=1)
    if not made:
        monkeypatch.setattr(Oracle, "judge", lambda self, images: (None, images.labels.clone()))
    gain = evaluate_gain(tmp_path / "made", split, tmp_path, seeds=2, **QUIET)
    assert gain.verdict.startswith(verdict), gain.verdict
    assert str(gain).splitlines()[0] == gain.verdict


def test_an_interval_holds_the_mean_and_is_that_of_the_binomial():
    torch.manual_seed(0)
    known = torch.arange(4).repeat(100)
    right = (torch.rand(1, 400) < 0.8).float().expand(3, 400)  # three seeds that agree
    value, low, high = astuple(_interval(right, *_resampled(known, 3)))
    share = right[0].mean().item()
    half = 1.96 * (share * (1 - share) / 400) ** 0.5
    assert value == pytest.approx(share, abs=1e-6)
    assert share - low == pytest.approx(half, rel=0.1) and high - share == pytest.approx(half, rel=0.1)
    assert _interval(torch.zeros(3, 400), *_resampled(known, 3)) == Interval(0, 0, 0)


def test_macro_f1_is_that_of_torchmetrics():
    torch.manual_seed(1)
    known = torch.arange(3).repeat(20)
    named = torch.where(torch.rand(2, 60) < 0.7, known, torch.randint(3, (2, 60)))
    wanted = sum(multiclass_f1_score(of, known, num_classes=3, average="macro") for of in named) / 2
    assert _macro_f1(named, known, *_resampled(known, 2)).value == pytest.approx(100 * wanted.item(), abs=1e-3)


def test_masks_hide_bands_of_rows_and_columns():
    x = torch.randn(64, 2, 20, 30, generator=torch.Generator().manual_seed(0))
    masked = mask_bands(x, Draws(0, 0, torch.arange(64)))
    changed = (masked != x).all(dim=1)  # (B, H, W), in all channels alike
    rows, columns = changed.all(dim=2), changed.all(dim=1)
    assert changed.equal(rows[:, :, None] | columns[:, None, :])
    assert 0 < rows.sum(1).float().mean() <= 8 and 0 < columns.sum(1).float().mean() <= 12
    mean = x.mean(dim=(1, 2, 3))
    assert (
        masked[changed[:, None].expand_as(x)] == mean[:, None, None, None].expand_as(x)[changed[:, None].expand_as(x)]
    ).all()


def test_the_command_trains_tells_and_refuses(split, tmp_path, fault, run_main):
    made = copy_subset(split / "train", tmp_path / "made")
    words = ["--generated_dir", made, "--data_dir", split, "--output_dir", tmp_path / "out", "--image_size", 32]
    status, out, err = run_main(evaluate.main, *words, "--gain", "--seeds", 1, "--steps", 2)
    assert not status and "generated alone" in out and (tmp_path / "out" / "gain.json").is_file(), err
    assert "generated alone: accuracy " in err  # as soon as it is known
    assert "--steps is for --gain" in fault(evaluate.main, *words, "--steps", 2)


def test_without_held_out_images_there_is_no_gain_to_tell(split, tmp_path):
    copy_subset(split / "train", tmp_path / "made")
    data = copy_subset(split / "train", tmp_path / "data")
    refuses("No image is held out", evaluate_gain, tmp_path / "made", data, tmp_path, val_share=0, **QUIET)
