"""What trainings with a discriminator share: two optimisers in one step, of which one counts."""

from contextlib import nullcontext
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from vavae_tools.training.devices import trainer_settings
from vavae_tools.training.finite import FiniteSteps, has_scaler


class AdversarialModule(L.LightningModule):
    """A model and a discriminator in one training step, an optimiser for each; only the model's steps count.

    A subclass has the hyper-parameters `disc_weight` and `gradient_clip`, the attribute `accumulate_grad_batches`, and
    a `discriminator` where `disc_weight` is not 0; its `configure_optimizers` names the model's optimiser first.
    """

    accumulate_grad_batches = 1
    parts_may_go_unused = False
    """Whether some of the model's weights may get no gradient in a step."""
    discriminator: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False  # two optimisers
        self._scales: dict[int, Tensor] = {}  # that gathered gradients were scaled by

    def both_optimizers(self) -> tuple[Any, Any | None]:
        """The model's, and the discriminator's or None."""
        found = self.optimizers()
        model, *others = found if isinstance(found, list) else [found]
        for other in others:
            # Lightning counts every optimiser's steps as the training's: only the model's are
            other._on_before_step = other._on_after_step = _not_counted
        return model, others[0] if others else None

    def descend(self, optimizer: Any, loss: Tensor, batch_idx: int) -> bool:
        """Go backwards, and make a step once as many batches are gathered as belong together; whether it was made."""
        first = batch_idx - batch_idx % self.accumulate_grad_batches
        together = min(self.accumulate_grad_batches, self.trainer.num_training_batches - first)
        complete = batch_idx + 1 == first + together
        alone = getattr(self.trainer.strategy, "block_backward_sync", nullcontext)  # processes agree once a step
        self._rescale(optimizer, begins=batch_idx == first)
        with nullcontext() if complete else alone():
            self.manual_backward(loss / together)
        if complete:
            optimizer.step()
            optimizer.zero_grad()
            schedule = self.lr_schedulers()
            if schedule is not None and schedule.optimizer is optimizer.optimizer:
                schedule.step()
        return complete

    def _rescale(self, optimizer: Any, begins: bool) -> None:
        """Bring gathered gradients to the scale of the next: the other optimiser's step may have changed it."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None or self.accumulate_grad_batches == 1:
            return
        scale = scaler.scale(torch.ones((), device=self.device))  # a tensor: `get_scale` waits for the device
        if not begins:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            gathered = [weight.grad for weight in weights if weight.grad is not None]
            torch._foreach_mul_(gathered, scale / self._scales[id(optimizer)])
        self._scales[id(optimizer)] = scale

    def discriminator_optimizer(self) -> torch.optim.Optimizer:
        """The reference's for its discriminator."""
        fused = not has_scaler(self.trainer)
        return torch.optim.Adam(self.discriminator.parameters(), self.hparams.disc_lr, betas=(0.5, 0.9), fused=fused)

    def judged(self, pictures: Tensor) -> Tensor:
        """The discriminator's logits in float32: it is small, and its BatchNorm and hinges do not suit fp16."""
        with torch.autocast(self.device.type, enabled=False):
            return self.discriminator(pictures)

    @property
    def total_steps(self) -> float:
        """Optimiser steps of the whole training; the model's, not those of both optimisers."""
        if self.trainer.max_epochs == -1:
            return self.trainer.estimated_stepping_batches
        self.trainer.estimated_stepping_batches  # noqa: B018  (sets the data up, so that their batches are known)
        steps = -(-self.trainer.num_training_batches // self.accumulate_grad_batches) * self.trainer.max_epochs
        return steps if self.trainer.max_steps == -1 else min(steps, self.trainer.max_steps)

    def configure_callbacks(self) -> list[L.Callback]:
        return [FiniteSteps(self.hparams.gradient_clip)]

    def trainer_settings(self, **choices: Any) -> dict[str, Any]:
        """Arguments for `lightning.Trainer` on this machine (see `devices.trainer_settings`): Trainer(**settings)."""
        adversarial = self.hparams.disc_weight > 0
        if choices.get("strategy") == "ddp" and adversarial:
            # each optimiser's backward pass leaves the other's weights without a gradient, which plain ddp refuses
            choices["strategy"] = "ddp_find_unused_parameters_true"
        unused = adversarial or self.parts_may_go_unused
        return trainer_settings(parts_may_go_unused=unused, gradient_clip_val=None, shardable=False, **choices)


def right_rate(real: Tensor, made: Tensor) -> Tensor:
    """How often the discriminator's patches are right; 0.5 is chance."""
    return ((real > 0).float().mean() + (made < 0).float().mean()) / 2


def _not_counted() -> None:
    pass
