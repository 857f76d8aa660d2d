"""A denoiser's training whose samples a classifier judges: what it says, and that nothing follows from it."""

import csv
import shutil

import pytest
import torch
from tiny import assert_same_training, refuses

from vavae_tools.evaluation import classifier
from vavae_tools.recipes.dit import train_dit
from vavae_tools.training.callbacks import watch
from vavae_tools.training.callbacks.progress import SAMPLE_METRICS
from vavae_tools.training.callbacks.watch import judge_samples
from vavae_tools.training.curves import plot_training


class Levels:
    """A classifier whose one feature is an image's level, and for whom those below 5 are of person 0."""

    def judge(self, images):
        features = images.float().mean(dim=(1, 2, 3))[:, None]
        return features, (features[:, 0] >= 5).long()


def at(*levels):
    return torch.tensor(levels)[:, None].float()


def test_copies_are_no_usable_samples_nor_are_those_of_another_person():
    known, unseen = at(0, 1, 10), at(2, 8)
    made = torch.tensor([0, 3, 3, 20], dtype=torch.uint8)[:, None, None, None].expand(4, 1, 2, 2)
    found = judge_samples(Levels(), known, unseen, torch.tensor([0, 0, 1, 1]), made)
    # the first one lies on a training image, the third is another person; distances 0, 2, 2, 10 against 1 and 2
    assert found == dict(zip(SAMPLE_METRICS, (0.75, 2.0, 0.25, 0.5), strict=True))


@pytest.fixture(scope="module")
def watched(split_dir, latents_dir, vavae_dir, tmp_path_factory):
    """Train into a folder; what was said."""

    def train(folder, **settings):
        numbers = {"denoiser": {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4}, "batch_size": 6}
        numbers |= {"previews": 0, "warmup_steps": 1, "log_every_n_steps": 1, "lr": 3e-3, "max_steps": 18}
        numbers |= {"data_dir": split_dir, "devices": {"accelerator": "cpu", "devices": 1}, "sample_watch": 2}
        said = []
        train_dit(latents_dir, vavae_dir, folder, log=said.append, **{**numbers, **settings})
        return said

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "default_steps", lambda images: 3)
        train.whole = tmp_path_factory.mktemp("watching") / "whole"
        numbers = {"save_every_n_steps": 9, "early_stopping_patience": 9, "export": "last"}
        train.said = train(train.whole, monitor="usable", **numbers)
        yield train


def logged(run):
    """(step, name) → value of what validation logged, in all sessions."""
    found = {}
    for path in sorted(run.glob("lightning_logs/version_*/metrics.csv")):
        for row in csv.DictReader(path.open()):
            found |= {(int(row["step"]), name): value for name, value in row.items() if "val/" in name and value}
    return found


def test_samples_are_judged_as_often_as_asked_and_choose_the_best(watched):
    found = logged(watched.whole)
    assert {step for step, name in found if name in SAMPLE_METRICS} == {7, 15}, (
        "of validations after 4, 8, 12, 16 of 18 steps"
    )
    lines = [line for line in watched.said if line.startswith("validated")]
    assert ["val/usable" in line for line in lines] == [False, True, False, True], "none of a validation before"
    (best,) = (watched.whole / "checkpoints").glob("best-*.ckpt")
    usable = {step: float(found[step, "val/usable"]) for step in (7, 15)}
    assert best.name == f"best-{max(usable, key=usable.get) // 4:03d}-{max(usable.values()):.4f}.ckpt"
    assert any(line.startswith("24 samples were judged 2 times: ") for line in watched.said)
    assert {"samples", "nearest training image"} <= {ax.get_ylabel() for ax in plot_training(watched.whole).axes}


def test_a_resumed_run_judges_the_same_and_no_weights_follow_from_it(watched, tmp_path):
    resumed, unwatched = tmp_path / "resumed", tmp_path / "unwatched"
    shutil.copytree(watched.whole / "classifier", resumed / "classifier")
    watched(resumed, monitor="usable", early_stopping_patience=9, resume=str(watched.whole / "checkpoint-9"))
    assert_same_training(resumed, watched.whole)
    found = logged(resumed)
    assert found == {key: value for key, value in logged(watched.whole).items() if key[0] >= 9}
    assert {step for step, name in found if name == "val/usable"} == {15}
    watched(unwatched, sample_watch=0)
    assert_same_training(unwatched, watched.whole)


def test_what_goes_wrong_ends_no_training(watched, tmp_path, monkeypatch):
    def out_of_memory(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(watch, "judge_samples", out_of_memory)
    monkeypatch.setattr(watch, "cached_classifier", lambda *arguments, **options: Levels())
    said = watched(tmp_path, monitor="usable", early_stopping_patience=1)
    assert not any("Ended early" in line for line in said)
    assert "pipeline is made of last.ckpt, step 18: val/loss" in said[-1]
    assert not list((tmp_path / "checkpoints").glob("best-*"))


def test_what_cannot_be_judged_is_one_line(watched, tmp_path, gait):
    refuses(
        "--monitor usable is measured on samples: add --sample_watch",
        watched,
        tmp_path,
        sample_watch=0,
        monitor="usable",
    )
    refuses(
        "--sample_watch compares samples with real images: name them, as data_dir=", watched, tmp_path, data_dir=None
    )
    other = tmp_path / "other"
    shutil.copytree(gait / "ID_1", other / "somebody")
    refuses("other is of other people than the latents in", watched, tmp_path, data_dir=other)
