"""Fine-tuning with every loss: two optimisers exactly, steps that are finite, what is frozen is asked once."""

from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from test_training import KEPT, Watch
from tiny import QUIET, assert_same, last, same, tiny_vavae
from torch import Tensor
from torch.utils.data import DataLoader

from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.data.loader import in_batches
from vavae_tools.recipes.vavae import LOSSES
from vavae_tools.runtime.errors import UserError
from vavae_tools.training import devices
from vavae_tools.training.autoencoder_module import VAVAEModule
from vavae_tools.training.callbacks.checkpointing import checkpoint_callbacks
from vavae_tools.training.callbacks.finite import FiniteSteps
from vavae_tools.training.config import SaveConfig
from vavae_tools.training.run import build_trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PIXELS = 24
"""The smallest images that the discriminator can judge."""
EVERYTHING = {"vf_weight": 0.1, "disc_weight": 0.5, "disc_start": 3, "disc_width": 4, "perceptual_weight": 0.2}


class Colours:
    """A foundation model of four channels; notes how many images it was asked about."""

    channels, digest = 4, "colours"

    def __init__(self) -> None:
        self.asked = 0

    def to(self, device) -> "Colours":
        return self

    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        self.asked += len(images)
        small = torch.nn.functional.adaptive_avg_pool2d(images, grid)
        return torch.cat([small, small.square().sum(dim=1, keepdim=True)], dim=1)


class Squares(torch.nn.Module):
    """Stands for LPIPS."""

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        return (reconstruction - images).square().mean(dim=(1, 2, 3))


def new_module(**changes) -> VAVAEModule:
    settings = {"lr": 1e-3, "warmup_steps": 3, **EVERYTHING, **changes}
    torch.manual_seed(1)
    return VAVAEModule(tiny_vavae(), **settings, lpips=Squares(), foundation=Colours())


def fit(folder, data, module=None, resume=None, callbacks=(), batch_size=6, monitor="val/reconstruction", **length):
    """One training on data or a split's folder; (trainer, `last.ckpt`, what was seen)."""
    module = module or new_module()
    data = ImageDataModule(data, PIXELS, batch_size) if isinstance(data, Path) else data
    watch = Watch(folder / "checkpoints")
    every = checkpoint_callbacks(watch.folder, monitor, SaveConfig(0))
    devices.quiet_lightning()
    settings = module.trainer_settings(accelerator="cpu", devices=1)
    trainer = build_trainer(settings, folder, [*every, watch, *callbacks], lambda line: None, **length)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return trainer, last(folder), watch.seen


def assert_goes_on_exactly(fit, folder: Path, steps: set[int], whole: dict, seen: list) -> None:
    """That `fit(folder, resume)`, from what was kept after these steps of `folder`/whole, ends as that did."""
    for path in sorted((folder / "whole" / "checkpoints").glob("*.kept")):
        if torch.load(path, weights_only=True)["global_step"] in steps:
            _, resumed, rest = fit(folder / path.stem, path)
            assert rest == seen[len(seen) - len(rest) :]
            for part in KEPT:
                assert_same(resumed[part], whole[part], part)


@pytest.mark.parametrize("gathered", [1, 3])
def test_two_optimisers_are_resumed_exactly(tmp_path, split_dir, gathered):
    """Three batches a step leave one of the epoch's four: it makes a step of its own."""
    steps = 12 if gathered == 1 else 6
    changes = {"accumulate_grad_batches": gathered, "disc_start": 3 if gathered == 1 else 1}

    def run(folder, resume=None):
        return fit(folder, split_dir, new_module(**changes), resume, max_epochs=3)

    trainer, whole, seen = run(tmp_path / "whole")
    assert trainer.global_step == whole["global_step"] == steps  # the model's steps, not both optimisers'
    assert len(whole["optimizer_states"]) == 2
    first, second = (state["state"][0]["step"].item() for state in whole["optimizer_states"])
    assert first == steps and second == steps - changes["disc_start"]
    kept = sorted((tmp_path / "whole" / "checkpoints").glob("*.kept"))
    assert len({torch.load(path, weights_only=True)["global_step"] for path in kept}) >= steps - 1
    assert_goes_on_exactly(run, tmp_path, {changes["disc_start"], steps // 2, steps - 1}, whole, seen)


def test_gathered_batches_are_one_batch(tmp_path, split_dir):
    """The gradient of two batches of six is that of one of twelve (without the discriminator's BatchNorm)."""
    grads = {}

    class Note(L.Callback):
        def on_before_optimizer_step(self, trainer, module, optimizer):
            grads.setdefault(self.name, [p.grad.clone() for p in module.vavae.parameters() if p.grad is not None])

    plain = {"disc_weight": 0.0, "vf_weight": 0.0, "gradient_clip": 0.0}
    for Note.name, batch_size, gathered in (("gathered", 6, 2), ("one", 12, 1)):
        module = new_module(accumulate_grad_batches=gathered, **plain)
        fit(tmp_path / Note.name, split_dir, module, callbacks=[Note()], batch_size=batch_size, max_epochs=1)
    for gathered, one in zip(grads["gathered"], grads["one"], strict=True):
        torch.testing.assert_close(gathered, one, rtol=1e-4, atol=1e-6)


def test_what_is_off_is_not_built(split_dir, tmp_path):
    module = new_module(vf_weight=0.0, disc_weight=0.0, perceptual_weight=0.0)
    assert {name.split(".")[0] for name in module.state_dict()} == {"vavae"}
    trainer, found, _ = fit(tmp_path, split_dir, module, max_epochs=1)
    assert len(found["optimizer_states"]) == 1
    names = {name for name in trainer.logged_metrics if name.startswith("train/")}
    assert not {"train/alignment", "train/discriminator", "train/generator", "train/perceptual"} & names


def test_every_part_is_logged_by_its_name(split_dir, tmp_path):
    trainer, _, _ = fit(tmp_path, split_dir, max_epochs=2)
    parts = "loss reconstruction l1 gradient spectral perceptual kl alignment distance cosine vf_weight generator "
    names = {f"train/{name}" for name in (parts + "disc_weight discriminator discriminator_accuracy").split()}
    parts = "loss psnr ssim kl alignment latent_mean latent_std discriminator_accuracy"
    assert names | {f"val/{name}" for name in parts.split()} <= set(trainer.logged_metrics)
    assert all(value.isfinite() for value in trainer.logged_metrics.values())


def test_the_foundation_model_is_asked_once_about_each_image(split_dir, tmp_path):
    module = new_module()
    fit(tmp_path, split_dir, module, max_epochs=2)
    assert module._models["foundation"].asked == 30
    again = new_module()
    fit(tmp_path, split_dir, again, max_epochs=1)  # kept on the disk
    assert again._models["foundation"].asked == 0


@pytest.mark.parametrize(("generator_start", "heard"), [(None, 3), (2, 2)])
def test_the_discriminator_begins_before_the_model_listens(split_dir, tmp_path, generator_start, heard):
    """The reference counts both optimisers' steps: its odd start s is step (s − 1)/2 here, and the model's one more."""
    seen = []

    class Note(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            logged = trainer.logged_metrics  # keeps what was logged before: a part is there from its first step on
            seen.append(("train/discriminator" in logged, "train/generator" in logged))

    module = new_module(disc_start=2, generator_start=generator_start)
    fit(tmp_path, split_dir, module, callbacks=[Note()], max_epochs=1)
    assert seen == [(step >= 2, step >= heard) for step in range(4)]


# ---- steps that are not finite


def test_after_several_in_a_row_the_last_good_state_comes_back(split_dir, tmp_path, capsys):
    class Damage(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step == 3:  # all later losses are NaN
                module.vavae.decoder.conv_out.weight.data.fill_(torch.nan)

    module = new_module()
    guard = FiniteSteps(1.0, "", in_a_row=3, every=2, look_every=1)
    module.configure_callbacks = lambda: [guard]
    trainer, _, _ = fit(tmp_path, split_dir, module, callbacks=[Damage()], max_epochs=3)
    assert (
        "3 steps in a row without finite gradients (step 6): back to the weights of step 2" in capsys.readouterr().out
    )
    assert trainer.global_step == 12 and guard.state_dict()["skipped"] == 6  # of both optimisers
    assert all(weight.isfinite().all() for weight in module.state_dict().values())


# ---- memory


def test_a_frozen_encoder_keeps_the_latents(split_dir, tmp_path):
    module = new_module(vf_weight=0.0, freeze_encoder=True)
    before = {name: weight.clone() for name, weight in module.vavae.state_dict().items()}
    fit(tmp_path, split_dir, module, max_epochs=1)
    changed = {name.split(".")[0] for name, w in module.vavae.state_dict().items() if not same(w, before[name])}
    assert "decoder" in changed and not changed & {"encoder", "quant_conv", "encoder_projections"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vf_weight": 0.1, "freeze_encoder": True}, "take one of them"),
        ({"vf_weight": 0.1, "foundation": None}, "needs a vision foundation model"),
        ({"perceptual_weight": 1.0, "lpips": None}, "spectral_weight 1, which needs none"),
        ({"disc_weight": 0.5, "disc_start": 5, "generator_start": 4}, "generator_start 4 lies before disc_start 5"),
    ],
)
def test_parts_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        VAVAEModule(tiny_vavae(), **{"foundation": Colours(), "lpips": Squares(), **changes})


def test_recipes_are_of_numbers_that_the_module_takes():
    for recipe in LOSSES.values():
        VAVAEModule(tiny_vavae(), **{"lr": 1e-3, **recipe, "disc_width": 4}, lpips=Squares(), foundation=Colours())


# ---- half precision


PLAIN = {"gradient_clip": 0.0, "perceptual_weight": 0.0, "gradient_weight": 0.0, "spectral_weight": 0.0}


def in_fp16(module, split_dir, scaler, callback, resume=None, **length) -> L.Trainer:
    settings = {**module.trainer_settings(accelerator="cpu", devices=1), "precision": None}
    settings["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler)]
    trainer = L.Trainer(**settings, **QUIET, **length, callbacks=[callback])
    data = DataLoader(in_batches(ImageDataModule(split_dir, PIXELS).train_data), 6, collate_fn=lambda batch: batch)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return trainer


def test_the_scaler_goes_on_where_it_was(split_dir, tmp_path):
    """Stopped while the scale is still being found, some steps were left out by it."""

    def trained(epochs: int, resume=None):
        norms = []

        class Note(L.Callback):
            def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
                norms.append(str(float(trainer.callback_metrics["train/gradient_norm"])))

        module, scaler = new_module(**PLAIN, schedule="constant"), torch.amp.GradScaler("cpu", init_scale=2.0**30)
        return in_fp16(module, split_dir, scaler, Note(), resume, max_epochs=epochs), module, norms, scaler

    whole = trained(3)
    trained(1)[0].save_checkpoint(tmp_path / "one.ckpt")
    resumed = trained(3, tmp_path / "one.ckpt")
    assert resumed[3].state_dict() == whole[3].state_dict()
    assert_same(dict(resumed[1].state_dict()), dict(whole[1].state_dict()))
    assert resumed[2] == whole[2][4:] and {"inf", "nan"} & {*whole[2]}


def test_gathered_gradients_of_the_discriminator_bear_a_scale_that_changes(split_dir):
    """The model's step comes before the discriminator's last batch, and may change the scale."""

    def gathered(growth_interval: int) -> list[Tensor]:
        found = []

        class Note(L.Callback):
            def on_before_optimizer_step(self, trainer, module, optimizer):
                if optimizer is trainer.optimizers[1]:
                    found.extend(weight.grad.clone() for weight in module.discriminator.parameters())

        module = new_module(**PLAIN, disc_start=0, lr=0.0, accumulate_grad_batches=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=growth_interval)
        in_fp16(module, split_dir, scaler, Note(), max_steps=1)
        return found

    changing, constant = gathered(1), gathered(1000)
    assert len(constant) > 4 and constant[0].abs().max() > 0
    for one, other in zip(changing, constant, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=0)
