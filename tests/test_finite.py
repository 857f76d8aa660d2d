"""Steps of denoisers that are not finite: left out on the device, counted, gone back from, and never exported."""

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from tiny import PEOPLE, QUIET, new_dit, refuses, same, tiny_pipeline

from vavae_tools.data.latents import LatentDataModule
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import save_model


class Spoil(L.Callback):
    """Make the gradients of these batches NaN, and keep the weights as they were before each batch."""

    def __init__(self, *batches: int) -> None:
        self.spoilt, self.before, self.averages = batches, [], []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.before.append([weight.detach().clone() for weight in module.network.parameters()])
        self.averages.append([weight.clone() for weight in module.ema.network.parameters()])

    def on_after_backward(self, trainer, module):
        if len(self.before) - 1 in self.spoilt:
            next(module.network.parameters()).grad.fill_(torch.nan)


def train(latents_dir, *callbacks, guard=None, max_steps=6, plugins=(), resume=None, **choices):
    module = new_dit()
    if guard is not None:
        module.configure_callbacks = lambda: [guard]
    settings = {**module.trainer_settings(accelerator="cpu", devices=1, **choices), **QUIET, "plugins": list(plugins)}
    if plugins:
        settings["precision"] = None
    trainer = L.Trainer(**settings, max_steps=max_steps, callbacks=list(callbacks))
    trainer.fit(module, LatentDataModule(latents_dir, 8), ckpt_path=resume, weights_only=True)
    return trainer, module


def fp16() -> list[MixedPrecision]:
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**10))]


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_a_step_with_nan_changes_no_weight_and_is_counted(latents_dir, precision):
    spoil = Spoil(2)
    trainer, module = train(latents_dir, spoil, precision=precision)
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {5}  # Adam's own count
    assert all(same(a, b) for a, b in zip(spoil.before[2], spoil.before[3], strict=True))
    assert not all(same(a, b) for a, b in zip(spoil.before[3], spoil.before[4], strict=True))
    assert all(weight.isfinite().all() for weight in module.state_dict().values())
    assert not all(same(a, b) for a, b in zip(spoil.averages[2], spoil.averages[3], strict=True))  # it follows on
    assert trainer.callback_metrics["train/skipped_steps"] == 1


def test_gradients_are_clipped_by_the_trainers_number(latents_dir):
    """A clipped step equals the step of gradients that were scaled by hand."""
    norms = []

    class Note(L.Callback):
        def on_before_zero_grad(self, trainer, module, optimizer):
            grads = [weight.grad for weight in module.network.parameters() if weight.grad is not None]
            if grads:
                norms.append(torch.nn.utils.get_total_norm(grads).item())

    train(latents_dir, Note(), max_steps=2, gradient_clip_val=0.01)
    assert norms and all(norm == pytest.approx(0.01, rel=1e-3) for norm in norms)
    refuses("by their norm", train, latents_dir, gradient_clip_algorithm="value")


@pytest.mark.parametrize("scaled", [False, True])
def test_a_training_without_a_finite_step_ends_with_advice(latents_dir, scaled):
    """fp16 with activations beyond 65,504 skips every step: it used to go on to the end, and to be exported."""
    plugins = fp16() if scaled else []
    with pytest.raises(UserError, match=r"not finite again after going back to step 0.*qk_norm"):
        train(latents_dir, Spoil(*range(100)), max_steps=60, plugins=plugins)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_training_goes_on_with_or_without_a_scaler(latents_dir, tmp_path, scaled):
    """From a T4 to an A100 and back: a checkpoint says that its optimiser was fused, or that it was not."""
    first, _ = train(latents_dir, max_steps=2, plugins=fp16() if scaled else [])
    first.save_checkpoint(tmp_path / "two.ckpt")
    trainer, module = train(latents_dir, max_steps=5, plugins=[] if scaled else fp16(), resume=tmp_path / "two.ckpt")
    assert trainer.global_step == 5 and trainer.optimizers[0].param_groups[0]["fused"] is scaled
    assert {int(state["step"]) for state in trainer.optimizers[0].state.values()} == {5}
    assert all(weight.isfinite().all() for weight in module.state_dict().values())


def test_weights_that_are_not_finite_are_never_exported(tmp_path):
    pipe = tiny_pipeline()
    save_model(pipe, tmp_path / "whole")
    next(pipe.conditioner.parameters()).data[PEOPLE - 1, 0] = torch.inf
    refuses(r"1 weights of conditioner are not finite .*not written", save_model, pipe, tmp_path / "pipeline")
    assert (tmp_path / "whole" / "model_index.json").is_file() and not (tmp_path / "pipeline").exists()
