"""Which checkpoint a training's result is made of, and what is said of the others."""

import pytest
import torch
from tiny import contents, refuses, same

from vavae_tools.checkpoints.formats import read_any_format
from vavae_tools.pipelines.classes import load_pipeline
from vavae_tools.recipes.dit import train_dit
from vavae_tools.training.denoiser_module import DiffusionModule

DIT = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
QUICK = {"denoiser": DIT, "batch_size": 6, "previews": 0, "warmup_steps": 0, "log_every_n_steps": 1}
QUICK |= {"devices": {"accelerator": "cpu", "devices": 1}}


CURVE = [0.8, 0.5, 0.7, 0.75, 0.9, 1.0, 1.0]  # val/loss of each epoch of 4 steps


class Training:
    """A training whose validation loss is that curve, and its exports."""

    def __init__(self, latents_dir, vavae_dir, folder):
        self.on, self.folder, self.checkpoints = (latents_dir, vavae_dir, folder), folder, folder / "checkpoints"

    def __call__(self, max_epochs=4, **settings):
        self.said = []
        numbers = {"lr": 3e-3, "ema_decay": 0.5, "schedule": "constant", "max_epochs": max_epochs, **settings}
        train_dit(*self.on, **{**QUICK, **numbers}, log=self.said.append)
        (self.line,) = [line for line in self.said if "is made of" in line]
        return self

    @property
    def best(self):
        return next(self.checkpoints.glob("best-*.ckpt"))

    def is_of(self, checkpoint):
        """Whether the pipeline holds the averages of this checkpoint, bit by bit."""
        state, pipe = read_any_format(checkpoint, print)["state_dict"], load_pipeline(self.folder / "pipeline")
        own = {f"ema.network.denoiser.{name}": weights for name, weights in pipe.denoiser.state_dict().items()}
        own |= {f"ema.network.conditioner.{name}": weights for name, weights in pipe.conditioner.state_dict().items()}
        return all(same(state[name], weights) for name, weights in own.items())


@pytest.fixture(scope="module", autouse=True)
def curve():
    def validation_step(self, batch, batch_idx):
        self.log("val/loss", torch.tensor(CURVE[self.current_epoch]), batch_size=len(batch["index"]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiffusionModule, "validation_step", validation_step)
        yield


@pytest.fixture(scope="module")
def run(latents_dir, vavae_dir, tmp_path_factory):
    run = Training(latents_dir, vavae_dir, tmp_path_factory.mktemp("exporting") / "dit")
    return run(save_every_n_steps=6, single_files=True)


OF_LAST = "last.ckpt, step 16: val/loss 0.75"
OF_BEST = "best-001-0.5000.ckpt, step 8: val/loss 0.5"


def test_the_last_is_exported_with_a_word_on_memorising(run):
    run(resume="last")
    line, verdict = run.line.splitlines()
    assert line.endswith(f"pipeline is made of {OF_LAST} (export=last); {OF_BEST}")
    assert verdict.startswith("val/loss 0.75 at step 15, its least 0.5 at step 7, while train/loss fell: it memorises")
    assert run.is_of(run.checkpoints / "last.ckpt") and not run.is_of(run.best)


def test_a_finished_run_is_exported_again_from_any_of_its_checkpoints(run):
    before = contents(run.checkpoints)
    run(resume="last", export="best")
    assert run.line.endswith(f"pipeline is made of {OF_BEST} (export=best); {OF_LAST}"), "and no word on memorising"
    assert run.is_of(run.best) and not run.is_of(run.checkpoints / "last.ckpt")
    for name in ("checkpoint_6.pth", str(run.folder / "checkpoint_6.pth")):
        run(resume="last", export=name)
        of = f"checkpoint_6.pth, step 6: val/loss 0.8 (export={name}); {OF_BEST}; {OF_LAST}"
        assert run.line.endswith(f"pipeline is made of {of}")
    assert run.is_of(run.folder / "checkpoint_6.pth")
    assert contents(run.checkpoints)[run.best.name] == before[run.best.name]
    assert contents(run.checkpoints).keys() == before.keys()


@pytest.mark.parametrize("name", ["bset", "checkpoint_7.pth", "nowhere/last.ckpt"])
def test_what_is_no_checkpoint_of_the_run_is_one_line(run, name):
    before = contents(run.folder / "pipeline")
    has = "which has last.ckpt, .*best-001-0.5000.ckpt, checkpoint_6.pth: expected last, best, or one of them"
    refuses(f"export={name} is no checkpoint of .*dit, {has}", run, resume="last", export=name)
    assert contents(run.folder / "pipeline") == before


def test_anothers_checkpoint_is_refused_before_training(run, latents_dir, vavae_dir, tmp_path):
    other = Training(latents_dir, vavae_dir, tmp_path / "other")
    refuses("is no checkpoint of .*other, which has none: expected", other, export=str(run.best))
    assert not other.checkpoints.exists()


def test_patience_exports_the_best_and_a_resumed_run_stays_ended(latents_dir, vavae_dir, tmp_path):
    run = Training(latents_dir, vavae_dir, tmp_path / "dit")(max_epochs=7, early_stopping_patience=2)
    last = run.checkpoints / "last.ckpt"
    assert any(line.startswith("Ended early, after step 16: val/loss was not better than 0.5 in") for line in run.said)
    assert run.line.endswith(f"pipeline is made of {OF_BEST} (export=best); {OF_LAST}") and run.is_of(run.best)
    run(max_epochs=7, early_stopping_patience=2, resume="last", export="last")
    assert f"pipeline is made of {OF_LAST} (export=last); {OF_BEST}" in run.line and run.is_of(last)
    assert any("is at step 16 of 28; take a larger --early_stopping_patience" in line for line in run.said)
    run(max_epochs=7, early_stopping_patience=3, resume="last")
    assert any(line.startswith("Ended early, after step 20: ") for line in run.said), "its patience is this run's"


def test_where_nothing_validates_the_best_is_the_last_and_that_is_said(train):
    words = [
        "experiment=dit_dummy",
        "data.num_images=16",
        "data.batch_size=8",
        "train.max_epochs=1",
        "data.val_share=0",
    ]
    words += ["model.hidden_size=[16,16]", "model.depth=[1,1]", "model.num_heads=[2,2]", "train.accelerator=cpu"]
    said = train(*words, "train.previews=0", "--export", "best", "--output_dir", "run")
    assert "run/pipeline is made of last.ckpt, step 2 (export=best, but no image validates)\n" in said
