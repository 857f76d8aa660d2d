"""Fine-tuning the VA-VAE with Lightning: glue between the model, its loss and the Trainer."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from diffusers import ConfigMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from vavae_tools.autoencoders.discriminator import PatchDiscriminator, generator_loss, hinge_loss
from vavae_tools.autoencoders.foundation import Foundation, alignment_loss, foundation_features
from vavae_tools.autoencoders.losses import PictureLoss, whole_loss
from vavae_tools.autoencoders.perceptual import LPIPS
from vavae_tools.autoencoders.vavae import VAVAE
from vavae_tools.data.images import PictureDataModule, PictureFolder
from vavae_tools.data.pixels import to_pixels, to_unit
from vavae_tools.draws import Draws
from vavae_tools.errors import UserError
from vavae_tools.evaluation.metrics import psnr, ssim
from vavae_tools.machine import release_memory
from vavae_tools.training.adversarial_module import AdversarialModule, right_rate
from vavae_tools.training.curves import log_step
from vavae_tools.training.finite import has_scaler
from vavae_tools.training.schedule import warmed_up
from vavae_tools.training.throughput import flops_of


class VAVAEModule(AdversarialModule):
    """Trains a VAVAE on batches {"pictures": uint8 (B, C, H, W), "labels": (B,), "index": (B,)}.

    A weight of 0 turns its part off: nothing of it is built or computed. `recipes.RECIPES` holds sets of these numbers.

    Args:
        vavae: the model; with `condition_dim` 0 labels are not used.
        lr: the learning rate of the model; not scaled by batch or devices.
        kl_weight, l1_weight, gradient_weight, spectral_weight, perceptual_weight: see `losses`.
        vf_weight: of the alignment with a vision foundation model (VA-VAE), relative to the picture loss's gradient
            at the encoder's last layer; needs `foundation`.
        distance_margin, cosine_margin: differences of the alignment up to these are free.
        disc_weight: of the adversarial part, relative to the picture loss's gradient at the decoder's last layer.
        disc_start: optimiser step at which the discriminator begins; the model listens to it from the next one on.
        disc_width: channels of the discriminator's first layer; 64 is the published one.
        disc_lr: Adam's learning rate for the discriminator.
        schedule: "cosine" falls to zero after `warmup_steps`; "constant" is the reference's.
        betas, weight_decay: AdamW's, of the model.
        gradient_clip: largest global norm of the gradients; 0 does not clip.
        accumulate_grad_batches: batches gathered in one step.
        condition_dropout: share of pictures that are trained without their vector, so that "no vector" stays a
            meaningful condition.
        freeze_encoder: train the decoder alone, on latents that stay as they are.
        gradient_checkpointing: compute activations twice in place of keeping them.
        seed: every random draw follows from it, the epoch and the sample.
        lpips: (reconstruction, pictures) → (B,), for `perceptual_weight`; see `perceptual.load_lpips`. Validation logs
            it also where its weight is 0.
        foundation: for `vf_weight`; see `foundation.load_foundation`.

    Logs `train/…` and `val/…`: loss and its parts; validation also PSNR in dB, SSIM, the latents' mean and standard
    deviation, and the discriminator's right rate.
    """

    parts_may_go_unused = True
    """A condition that is dropped from a whole batch, or is switched off, leaves its weights without a gradient."""

    def __init__(
        self,
        vavae: VAVAE,
        lr: float = 1e-4,
        kl_weight: float = 1e-6,
        l1_weight: float = 1.0,
        gradient_weight: float = 0.5,
        spectral_weight: float = 1.0,
        perceptual_weight: float = 0.0,
        vf_weight: float = 0.0,
        distance_margin: float = 0.0,
        cosine_margin: float = 0.0,
        disc_weight: float = 0.0,
        disc_start: int = 0,
        disc_width: int = 64,
        disc_lr: float = 1e-4,
        schedule: str = "cosine",
        warmup_steps: int = 50,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-4,
        gradient_clip: float = 1.0,
        accumulate_grad_batches: int = 1,
        condition_dropout: float = 0.1,
        freeze_encoder: bool = False,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        lpips: LPIPS | None = None,
        foundation: Foundation | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["vavae", "lpips", "foundation"])
        self.hparams["betas"] = list(betas)
        self.hparams["vavae_config"] = plain_config(vavae)
        self.accumulate_grad_batches = accumulate_grad_batches
        if perceptual_weight and lpips is None:
            raise UserError(
                "perceptual_weight needs LPIPS: name its weights (lpips_weights), or take perceptual_weight 0 and "
                "spectral_weight 1, which needs none"
            )
        if vf_weight and foundation is None:
            raise UserError(
                "vf_weight needs a vision foundation model: name its folder (foundation_model), or take vf_weight 0"
            )
        if vf_weight and freeze_encoder:
            raise UserError("vf_weight aligns the latents, which freeze_encoder keeps as they are: take one of them")
        # in a dict, so that what is frozen does not become a part of this module and its checkpoints
        self._frozen = {"lpips": lpips, "foundation": foundation if vf_weight else None}
        self.vavae = vavae.to(memory_format=torch.channels_last)  # 4 to 24 % faster on a CPU, by its widths
        if freeze_encoder:
            vavae.freeze_encoder()
        if gradient_checkpointing:
            vavae.enable_gradient_checkpointing()
        self.picture_loss = PictureLoss(l1_weight, gradient_weight, spectral_weight, perceptual_weight, lpips)
        if disc_weight:
            self.discriminator = PatchDiscriminator(vavae.config.out_channels, disc_width)
        if vf_weight:
            self.projection = nn.Conv2d(vavae.config.latent_channels, foundation.channels, 1, bias=False)

    def reconstruct(
        self, pictures: Tensor, labels: Tensor | None, draws: Draws, keep: Tensor | None = None
    ) -> tuple[Tensor, DiagonalGaussianDistribution, Tensor]:
        """Encode, draw from the posterior, decode: (reconstruction (B, C, H, W), posterior, latents (B, c, h, w))."""
        condition = self.vavae.condition_vectors(labels, keep) if self.vavae.config.condition_dim else None
        with torch.no_grad() if self.hparams.freeze_encoder else nullcontext():
            posterior = self.vavae.encode(pictures, condition=condition).latent_dist
        noise = draws.normal("posterior", *posterior.mean.shape[1:]).to(posterior.mean.dtype)
        latents = posterior.mean + posterior.std * noise
        return self.vavae.decode(latents, condition=condition).sample.float(), posterior, latents

    def alignment(self, latents: Tensor, batch: dict[str, Tensor], pictures: Tensor) -> tuple[Tensor, Tensor] | None:
        """The two parts of the alignment loss; None where it is off."""
        if not self.hparams.vf_weight:
            return None
        features = batch.get("foundation")  # (B, channels, h, w)
        if features is None:
            features = self._frozen["foundation"](pictures, tuple(latents.shape[2:]))
        with self._float32():
            projected = self.projection(latents.float())  # (B, channels, h, w)
        return alignment_loss(projected, features, self.hparams.distance_margin, self.hparams.cosine_margin)

    def _float32(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        settings, step = self.hparams, self.global_step
        draws = Draws(settings.seed, self.current_epoch, batch["index"])
        keep = draws.uniform("condition dropout") >= settings.condition_dropout
        pictures = to_unit(batch["pictures"]).contiguous(memory_format=torch.channels_last)
        reconstruction, posterior, latents = self.reconstruct(pictures, batch["labels"], draws, keep)

        aligned = self.alignment(latents, batch, pictures)
        adversarial = settings.disc_weight > 0 and step > settings.disc_start
        loss, parts = whole_loss(
            self.picture_loss,
            reconstruction,
            pictures,
            posterior,
            0.0 if settings.freeze_encoder else settings.kl_weight,
            adversary=(lambda made: generator_loss(self.judged(made))) if adversarial else None,
            disc_weight=settings.disc_weight,
            decoder_last=self.vavae.decoder.conv_out.weight,
            alignment=sum(aligned) if aligned else None,
            vf_weight=settings.vf_weight,
            encoder_last=self.vavae.encoder.conv_out.weight,
        )
        if aligned:
            parts["distance"], parts["cosine"] = (part.detach() for part in aligned)
        generator, adversary = self.both_optimizers()
        self.descend(generator, loss, batch_idx)

        if settings.disc_weight and step >= settings.disc_start:
            real, made = self.judged(pictures), self.judged(reconstruction.detach())
            parts["discriminator"] = hinge_loss(real, made)
            parts["discriminator_right"] = right_rate(real, made)
            self.descend(adversary, parts["discriminator"], batch_idx)
        log_step(self, parts, len(keep))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        draws = Draws(self.hparams.seed + 1, 0, batch["index"])  # the same noise at every validation
        pictures = to_unit(batch["pictures"]).contiguous(memory_format=torch.channels_last)
        reconstruction, posterior, latents = self.reconstruct(pictures, batch["labels"], draws)
        loss, parts = self.picture_loss(reconstruction, pictures)
        parts["kl"] = posterior.kl().mean() / pictures[0].numel()
        parts["loss"] = loss + self.hparams.kl_weight * parts["kl"]
        parts["latent_mean"], parts["latent_std"] = posterior.mean.mean(), posterior.mean.std()
        if self._frozen["lpips"] is not None and "perceptual" not in parts:
            parts["perceptual"] = self._frozen["lpips"](reconstruction, pictures).mean()
        aligned = self.alignment(latents, batch, pictures)
        if aligned:
            parts["alignment"] = sum(aligned)
        if self.hparams.disc_weight and self.global_step > self.hparams.disc_start:
            parts["discriminator_right"] = right_rate(self.judged(pictures), self.judged(reconstruction))
        parts["psnr"] = psnr(reconstruction.clamp(-1, 1), pictures).clamp_max(100).mean()
        parts["ssim"] = ssim(reconstruction, pictures).mean()
        self.log_dict({f"val/{k}": v for k, v in parts.items()}, batch_size=float(len(pictures)), sync_dist=True)
        return {"reconstructions": to_pixels(reconstruction)}

    def flops_of_a_sample(self, batch: dict[str, Tensor]) -> int:
        """What the model computes for one picture in a step, forwards and backwards; losses' networks do not count."""
        shape = batch["pictures"].shape[1:]

        def loss(vavae: VAVAE) -> Tensor:
            pictures, label = torch.zeros(1, *shape), torch.zeros(1, dtype=torch.long)  # (1, C, H, W)
            condition = vavae.condition_vectors(label) if vavae.config.condition_dim else None
            with torch.no_grad() if self.hparams.freeze_encoder else nullcontext():
                latents = vavae.encode(pictures, condition=condition).latent_dist.mean
            return vavae.decode(latents, condition=condition).sample.sum()

        return flops_of(self.vavae, loss)

    def on_fit_start(self) -> None:
        if self._frozen["lpips"] is not None:
            self._frozen["lpips"].to(self.device)
        if self._frozen["foundation"] is not None:
            self._look_once()

    def _look_once(self) -> None:
        """What the frozen foundation model makes of each picture is computed before training, not at every step."""
        data, foundation = getattr(self.trainer, "datamodule", None), self._frozen["foundation"]
        foundation.to(self.device)
        if not isinstance(data, PictureDataModule):
            return
        folder = Path(self.trainer.default_root_dir) / "foundation"
        for side, pictures in (("train", data.train_data), ("val", data.val_data)):
            if pictures is not None:
                features = self._features(pictures, folder / f"{side}.safetensors")
                if features is None:  # too many to keep
                    return
                pictures.along["foundation"] = features
        foundation.to("cpu")  # its memory is the training's now
        release_memory()

    def _features(self, pictures: PictureFolder, path: Path) -> Tensor | None:
        grid = tuple(size // self.vavae.downsampling for size in pictures.image_size)
        for first in (True, False):  # one process computes, then all read
            if first == self.trainer.is_global_zero:
                features = foundation_features(self._frozen["foundation"], pictures, grid, path, self.device)
            self.trainer.strategy.barrier()
        return features

    def configure_optimizers(self) -> list[dict[str, Any]]:
        settings = self.hparams
        weights = [*self.vavae.parameters(), *(self.projection.parameters() if settings.vf_weight else [])]
        optimizer = torch.optim.AdamW(
            [p for p in weights if p.requires_grad],
            settings.lr,
            settings.betas,
            weight_decay=settings.weight_decay,
            fused=not has_scaler(self.trainer),
        )
        if settings.schedule == "cosine":
            optimizers = [warmed_up(optimizer, settings.warmup_steps, self.total_steps)]
        else:
            optimizers = [{"optimizer": optimizer}]
        if settings.disc_weight:
            optimizers.append({"optimizer": self.discriminator_optimizer()})
        return optimizers


def plain_config(model: ConfigMixin) -> dict[str, Any]:
    """A diffusers model's configuration as plain values, which `weights_only=True` can read."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items() if not k.startswith("_")}
