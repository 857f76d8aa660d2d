"""Training is exact: the same again, and the same after any interruption; what is on the disk is always whole."""

import math
import os
import shutil
import signal
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny import SIZE, assert_same, tiny_dit, tiny_vavae
from torch import nn

from vavae_tools.checkpoints.resuming import best_checkpoint, resume_path
from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.data.latents import LatentDataModule
from vavae_tools.runtime.errors import Stopped, UserError
from vavae_tools.training import devices
from vavae_tools.training.autoencoder_module import VAVAEModule
from vavae_tools.training.callbacks.checkpointing import checkpoint_callbacks
from vavae_tools.training.config import SaveConfig
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.optim import EMA, with_warmup
from vavae_tools.training.run import build_trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, on folders that are not empty

BATCH = 6  # 24 images: four steps an epoch
KEPT = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")


def modules(kind: str, split_dir: Path, latents_dir: Path, num_workers: int = 0, batch_size: int = BATCH):
    if kind == "vavae":
        module = VAVAEModule(tiny_vavae(), lr=1e-3, warmup_steps=3)
        return module, ImageDataModule(split_dir, SIZE, batch_size, num_workers), "val/reconstruction"
    module = DiffusionModule(*tiny_dit(), lr=1e-3, warmup_steps=3, flip="half")
    return module, LatentDataModule(latents_dir, batch_size, num_workers), "val/loss"


class Watch(L.Callback):
    """Notes which samples are seen in which epoch, and keeps `last.ckpt` as a power cut at each step would leave it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.seen.append((module.current_epoch, batch["index"].tolist()))
        trainer.strategy.checkpoint_io.wait()
        if (self.folder / "last.ckpt").is_file():
            shutil.copy(self.folder / "last.ckpt", self.folder / f"{trainer.global_step:02d}.kept")

    def on_validation_end(self, trainer, module):
        path = self.folder / f"{trainer.global_step:02d} validated.ckpt"
        trainer.save_checkpoint(path)
        trainer.strategy.checkpoint_io.wait()
        path.rename(path.with_suffix(".kept"))


class Fit:
    """One training with the Trainer as `runs` builds it, and `last.ckpt` after each step."""

    def __init__(self, folder, kind, data, resume=None, num_workers=0, callbacks=(), monitor=True, minutes=0, **length):
        self.folder = folder / "checkpoints"
        module, images, metric = modules(kind, *data, num_workers)
        self.module, watch = module, Watch(self.folder)
        every = checkpoint_callbacks(self.folder, metric if monitor else None, SaveConfig(minutes))
        settings = module.trainer_settings(accelerator="cpu", devices=1)
        devices.quiet_lightning()
        self.trainer = build_trainer(settings, folder, [*every, watch, *callbacks], lambda line: None, **length)
        try:
            self.trainer.fit(module, images, ckpt_path=resume, weights_only=True)
        finally:
            self.seen = watch.seen

    @cached_property
    def last(self) -> dict:
        """As it was when it was first asked for."""
        return torch.load(self.folder / "last.ckpt", weights_only=True)


def assert_same_run(resumed: Fit, whole: Fit) -> None:
    assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :]
    for part in KEPT:
        assert_same(resumed.last[part], whole.last[part], part)


LENGTHS = {
    "epochs": {"max_epochs": 3},
    "steps": {"max_steps": 10, "max_epochs": -1},  # as `train_dit`, ends within an epoch
    "steps, few validations": {"max_steps": 10, "max_epochs": -1, "check_val_every_n_epoch": 2},
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("kind", ["vavae", "dit"])
def test_a_resumed_run_equals_one_that_was_never_stopped(tmp_path, data, kind, length):
    """Stopped after any step: within an epoch, after its last step, after its validation; with and without workers."""
    whole = Fit(tmp_path / "whole", kind, data, **LENGTHS[length])
    steps = whole.last["global_step"]
    assert steps == (12 if length == "epochs" else 10) and len(whole.seen) == steps
    for epoch in {epoch for epoch, _ in whole.seen if epoch < 2}:
        assert sorted(i for e, indices in whole.seen if e == epoch for i in indices) == list(range(24))
    kept = sorted(path for path in whole.folder.glob("*.kept") if not path.name.startswith(str(steps)))
    assert len(kept) >= steps
    if kind == "vavae":  # its steps are slow: those around the end of an epoch, one within, the last
        kept = [path for path in kept if path.name[:2] in ("02", "04", "05", f"{steps - 1:02d}")]
    best = best_checkpoint(whole.folder)
    for number, path in enumerate([*kept, best]):
        step = torch.load(path, weights_only=True)["global_step"]
        if step == steps:
            continue
        workers = 2 if number in (1, 2) else 0
        resumed = Fit(tmp_path / path.stem, kind, data, path, workers, **LENGTHS[length])
        assert len(resumed.seen) == steps - step, path.name
        assert_same_run(resumed, whole)
        assert best_checkpoint(resumed.folder).name == best.name or step > int(best.name[5:8]) * 4 + 3


def test_a_run_that_is_stopped_again_and_again(tmp_path, data):
    """Every session makes three steps. Names stay the same; nothing is left beside them."""
    whole = Fit(tmp_path / "whole", "dit", data, max_epochs=3)

    class Session(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == self.end:
                raise RuntimeError("the session is over")

    session, checkpoints = Session(), tmp_path / "run" / "checkpoints"
    for session.end in (3, 6, 9, 99):
        resume = resume_path("last" if session.end > 3 else None, checkpoints)
        with pytest.raises(RuntimeError, match="the session is over") if session.end < 99 else nullcontext():
            resumed = Fit(tmp_path / "run", "dit", data, resume, callbacks=[session], max_epochs=3)
    assert_same_run(resumed, whole)
    names = sorted(path.name for path in resumed.folder.iterdir() if path.suffix != ".kept")
    assert names == [best_checkpoint(whole.folder).name, "last.ckpt", "previous.ckpt"]


@pytest.mark.parametrize(
    "ended", [{"max_steps": 6, "max_epochs": -1}, {"max_steps": 8, "max_epochs": -1}, {"max_epochs": 2}]
)
def test_a_run_that_had_ended_goes_on_with_the_rest_of_its_epoch(tmp_path, data, ended):
    seen, resume = [], None
    for number, length in enumerate((ended, {"max_steps": 10, "max_epochs": -1}, {"max_epochs": 3})):
        fit = Fit(tmp_path / str(number), "dit", data, resume, **length)
        resume, seen = fit.folder / "last.ckpt", seen + fit.seen
    assert seen == Fit(tmp_path / "whole", "dit", data, max_epochs=3).seen


# ---- stopped by a person


class Press(L.Callback):
    """Presses Ctrl-C in the middle of a step, as often as told."""

    def __init__(self, step: int, times: int = 1, number: int = signal.SIGINT) -> None:
        self.step, self.times, self.number = step, times, number

    def on_after_backward(self, trainer, module):
        if trainer.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_finishes_the_step_and_saves_it(tmp_path, data, number):
    whole = Fit(tmp_path / "whole", "dit", data, max_epochs=2)
    former = signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="Stopped after step 3; go on with --resume last"):
        Fit(tmp_path / "run", "dit", data, callbacks=[Press(2, number=number)], num_workers=2, minutes=99, max_epochs=2)
    assert signal.getsignal(signal.SIGINT) is former
    last = resume_path("last", tmp_path / "run" / "checkpoints")
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert_same_run(Fit(tmp_path / "run", "dit", data, last, max_epochs=2), whole)
    assert signal.getsignal(signal.SIGINT) is former


def test_a_second_ctrl_c_does_not_wait(tmp_path, data):
    with pytest.raises(UserError, match="Stopped at once, in the middle of a step"):
        Fit(tmp_path / "run", "dit", data, callbacks=[Press(2, times=2)], minutes=99, max_epochs=2)
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ---- what is on the disk


def test_the_best_is_named_by_its_metric(tmp_path, data):
    losses = []

    class Note(L.Callback):
        def on_validation_end(self, trainer, module):
            losses.append(float(trainer.callback_metrics["val/loss"]))

    fit = Fit(tmp_path, "dit", data, callbacks=[Note()], max_epochs=3)
    best = min(losses)
    (path,) = fit.folder.glob("best-*")
    assert path.name == f"best-{losses.index(best):03d}-{best:.4f}.ckpt" and best_checkpoint(fit.folder) == path
    assert torch.load(path, weights_only=True)["global_step"] == 4 * (losses.index(best) + 1)  # plain values only
    path.unlink()
    assert best_checkpoint(fit.folder) == fit.folder / "last.ckpt"
    with pytest.raises(UserError, match=r"No best-\*\.ckpt or last\.ckpt in .*: train first"):
        best_checkpoint(tmp_path)


def test_what_a_killed_process_left_is_cleaned(tmp_path, data):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / ".best-003-0.1000.ckpt.4321.partial").write_bytes(b"half")
    (tmp_path / "vavae" / ".x3k4.partial").mkdir(parents=True)
    (tmp_path / "vavae" / ".x3k4.partial" / "config.json").write_bytes(b"{")
    Fit(tmp_path, "dit", data, max_epochs=1)
    assert not list(tmp_path.rglob(".*"))


# ---- parts


def test_ema_follows_with_a_decay_that_warms_up():
    network = nn.Linear(2, 1, bias=False)
    network.weight.data.fill_(1.0)
    ema = EMA(network, decay=0.5)
    value = 1.0
    for step, weight, decay in ((1, 3.0, 2 / 11), (2, -1.0, 3 / 12), (100, 2.0, 0.5)):
        network.weight.data.fill_(weight)
        ema.update(network, step)
        value += (1 - decay) * (weight - value)
        torch.testing.assert_close(ema.network.weight, torch.full((1, 2), value))
    assert torch.equal(network.weight, torch.full((1, 2), 2.0))  # the network itself is left alone
    assert not any(weights.requires_grad for weights in ema.parameters())
    nn.Sequential(ema).train()
    assert not ema.network.training


def test_the_average_in_a_checkpoint_is_that_of_its_step(tmp_path, data):
    """Not of the step before, as where a callback updates it."""
    fit = Fit(tmp_path, "dit", data, max_steps=2, max_epochs=-1)
    first = torch.load(fit.folder / "01.kept", weights_only=True)["state_dict"]
    second = fit.last["state_dict"]
    for name in (name for name in second if name.startswith("network.")):
        expected = torch.lerp(first[f"ema.{name}"], second[name], 1 - 3 / 12)
        torch.testing.assert_close(second[f"ema.{name}"], expected, msg=name)


def test_the_learning_rate_rises_and_falls():
    def rates(warmup, total, steps):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
        schedule = with_warmup(optimizer, warmup, total)["lr_scheduler"]["scheduler"]
        return [2.0 * schedule.lr_lambdas[0](step) for step in range(steps)]

    made = rates(4, 104, 105)
    assert made[:4] == pytest.approx([0.4, 0.8, 1.2, 1.6]) and made[4] == 2.0
    assert made[54] == pytest.approx(1.0) and made[104] == pytest.approx(0.0)
    assert made[4:] == sorted(made[4:], reverse=True)
    assert rates(50, 20, 20)[2] == 2.0  # in a short run the warm-up takes a tenth
    assert rates(2, math.inf, 10)[2:] == [2.0] * 8
