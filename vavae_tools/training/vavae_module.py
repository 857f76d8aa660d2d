"""Fine-tuning the VA-VAE with Lightning: glue between the model, its loss and the Trainer."""

import math
from typing import Any

import lightning as L
import torch
from diffusers import ConfigMixin
from torch import Tensor

from vavae_tools.autoencoders.losses import VAVAELoss
from vavae_tools.autoencoders.vavae import VAVAE
from vavae_tools.data.images import to_unit
from vavae_tools.draws import Draws
from vavae_tools.training.devices import trainer_settings


class VAVAEModule(L.LightningModule):
    """Trains a VAVAE on batches {"pictures": uint8 (B, C, H, W), "labels": (B,), "index": (B,)}.

    Args:
        vavae: the model; with `condition_dim` 0 labels are not used.
        lr: AdamW's learning rate after warm-up; it falls to zero along a half cosine.
        kl_weight, l1_weight, gradient_weight, spectral_weight: see `VAVAELoss`.
        condition_dropout: share of pictures that are trained without their vector, so that "no vector" stays a
            meaningful condition.
        warmup_steps: optimiser steps of linear warm-up.
        seed: every random draw follows from it, the epoch and the sample.

    Logs `train/…` and `val/…`: loss and its parts, and PSNR in dB.
    """

    def __init__(
        self,
        vavae: VAVAE,
        lr: float = 1e-4,
        kl_weight: float = 1e-6,
        l1_weight: float = 1.0,
        gradient_weight: float = 0.5,
        spectral_weight: float = 1.0,
        condition_dropout: float = 0.1,
        warmup_steps: int = 50,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["vavae"])
        self.hparams["vavae_config"] = plain_config(vavae)
        self.vavae = vavae.to(memory_format=torch.channels_last)  # 4 to 24 % faster on a CPU, by its widths
        self.loss = VAVAELoss(l1_weight, gradient_weight, spectral_weight, kl_weight)

    def reconstruct(self, pictures: Tensor, labels: Tensor | None, draws: Draws, keep: Tensor | None = None):
        """Encode, draw from the posterior, decode: (reconstruction (B, C, H, W), posterior)."""
        condition = self.vavae.condition_vectors(labels, keep) if self.vavae.config.condition_dim else None
        posterior = self.vavae.encode(pictures, condition=condition).latent_dist
        noise = draws.normal("posterior", *posterior.mean.shape[1:]).to(posterior.mean.dtype)
        latents = posterior.mean + posterior.std * noise
        return self.vavae.decode(latents, condition=condition).sample, posterior

    def model_step(self, batch: dict[str, Tensor], draws: Draws, keep: Tensor | None = None):
        pictures = to_unit(batch["pictures"]).contiguous(memory_format=torch.channels_last)
        reconstruction, posterior = self.reconstruct(pictures, batch["labels"], draws, keep)
        loss, parts = self.loss(reconstruction.float(), pictures, posterior)
        return loss, parts, reconstruction, pictures

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        draws = Draws(self.hparams.seed, self.current_epoch, batch["index"])
        keep = draws.uniform("condition dropout") >= self.hparams.condition_dropout
        loss, parts, _, _ = self.model_step(batch, draws, keep)
        self.log_dict({f"train/{name}": value for name, value in parts.items()}, batch_size=len(keep))
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        draws = Draws(self.hparams.seed + 1, 0, batch["index"])  # the same noise at every validation
        _, parts, reconstruction, pictures = self.model_step(batch, draws)
        error = (reconstruction.float().clamp(-1, 1) - pictures).square().mean(dim=(1, 2, 3))
        parts["psnr"] = (10 * torch.log10(4 / error.clamp_min(1e-10))).mean()  # the range of [-1, 1] is 2, squared 4
        self.log_dict({f"val/{k}": v for k, v in parts.items()}, batch_size=len(pictures), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), self.hparams.lr, betas=(0.9, 0.99), weight_decay=1e-4)
        return cosine_with_warmup(optimizer, self.hparams.warmup_steps, self.trainer.estimated_stepping_batches)

    def trainer_settings(self, **choices: Any) -> dict[str, Any]:
        """Arguments for `lightning.Trainer` on this machine (see `devices.trainer_settings`): Trainer(**settings)."""
        # a condition that is dropped from a whole batch, or is switched off, leaves its weights without a gradient
        return trainer_settings(parts_may_go_unused=True, **choices)


def plain_config(model: ConfigMixin) -> dict[str, Any]:
    """A diffusers model's configuration as plain values, which `weights_only=True` can read."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items() if not k.startswith("_")}


def cosine_with_warmup(optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: float) -> dict[str, Any]:
    """Linear warm-up, then a half cosine to zero, counted in optimiser steps; what `configure_optimizers` returns."""
    warmup_steps = min(warmup_steps, total_steps / 10)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if math.isinf(total_steps):
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return 0.5 * (1 + math.cos(math.pi * progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
