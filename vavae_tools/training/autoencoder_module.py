"""Fine-tuning the VA-VAE with Lightning: glue between the model, its loss and the Trainer."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from tqdm.auto import tqdm

from vavae_tools.autoencoders.foundation import Foundation, alignment_loss, foundation_features
from vavae_tools.autoencoders.losses import (
    PatchDiscriminator,
    PictureLoss,
    decoder_loss,
    generator_loss,
    hinge_loss,
    l1,
    whole_loss,
)
from vavae_tools.autoencoders.lpips import LPIPS
from vavae_tools.autoencoders.rae import RAE, noised
from vavae_tools.autoencoders.vavae import VAVAE
from vavae_tools.data.images import DecodedPictures, PictureSetDataModule, to_pixels, to_unit
from vavae_tools.evaluation.metrics import psnr, ssim
from vavae_tools.runtime.console import someone_looks
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import plain_config, weights_digest
from vavae_tools.runtime.machine import release_memory
from vavae_tools.runtime.precision import Computing
from vavae_tools.training.callbacks.finite import FiniteSteps, has_scaler
from vavae_tools.training.callbacks.progress import log_step
from vavae_tools.training.callbacks.throughput import flops_of
from vavae_tools.training.devices import trainer_settings
from vavae_tools.training.lightning_inside import count_no_steps_of
from vavae_tools.training.optim import EMA, warmed_up

# ---- What trainings with a discriminator share: two optimisers in one step, of which one counts


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

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = self._trainer and self.trainer.datamodule
        if isinstance(data, PictureSetDataModule):
            data.take_over(checkpoint)

    def both_optimizers(self) -> tuple[Any, Any | None]:
        """The model's, and the discriminator's or None."""
        found = self.optimizers()
        model, *others = found if isinstance(found, list) else [found]
        for other in others:
            # Lightning counts every optimiser's steps as the training's: only the model's are
            count_no_steps_of(other)
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
        """Arguments for `lightning.Trainer` on this machine (see `devices.trainer_settings`): Trainer(**settings).

        Raises:
            UserError: batches gathered by the Trainer, which cannot where a module has two optimisers.
        """
        for name in ("gradient_clip_val", "accumulate_grad_batches"):  # this module clips and gathers itself
            choice = choices.pop(name, None)
            if name == "accumulate_grad_batches" and choice not in (None, self.accumulate_grad_batches):
                raise UserError(f"accumulate_grad_batches={choice}: it is an argument of {type(self).__name__}")
        adversarial = self.hparams.disc_weight > 0
        if choices.get("strategy") == "ddp" and adversarial:
            # each optimiser's backward pass leaves the other's weights without a gradient, which plain ddp refuses
            choices["strategy"] = "ddp_find_unused_parameters_true"
        unused = adversarial or self.parts_may_go_unused
        return trainer_settings(parts_may_go_unused=unused, gradient_clip_val=None, shardable=False, **choices)


def right_rate(real: Tensor, made: Tensor) -> Tensor:
    """How often the discriminator's patches are right; 0.5 is chance."""
    return ((real > 0).float().mean() + (made < 0).float().mean()) / 2


# ---- Training the decoder of a representation autoencoder (RAE) with Lightning; its encoder stays as it is


TOKENS_LIMIT = 4 * 2**30
"""The encoder's tokens of all pictures are kept in memory up to this many bytes: 10,900 pictures of DINOv2-B's."""


class RAEDecoderModule(AdversarialModule):
    """Trains the decoder of an RAE on batches {"pictures": uint8 (B, 3, S, S), "labels": (B,), "index": (B,)}.

    The first stage of RAE (Zheng et al. 2025): a picture's tokens are noised by tau·u·n, each picture by a share u of
    its own, so that the decoder bears what a denoiser will make; it learns by absolute error, LPIPS and a
    discriminator. Three things differ: the discriminator is VA-VAE's patch discriminator, since the paper's stands on
    DINO weights that cannot be shipped; it sees whole pictures as they were decoded, without augmentation or rounding
    to 8 bits; and pictures are not cropped, so that the frozen encoder sees each once, before training, and its tokens
    stay valid. They are kept in memory (float16) up to `TOKENS_LIMIT`, else computed at each step.

    Args:
        rae: its decoder is trained, in place.
        lr, betas, weight_decay: AdamW's, of the decoder.
        noise_tau: the largest standard deviation of the noise on tokens; 0: none.
        l1_weight, gradient_weight, spectral_weight, perceptual_weight: see `losses`; the paper's error is of [0, 1],
            half of ours.
        disc_weight: of the adversarial part, relative to the picture loss's gradient at the decoder's last layer; 0:
            no discriminator.
        disc_start: optimiser step at which the discriminator begins.
        generator_start: the step at which the decoder begins to listen to it; None: at the next one.
        disc_width: channels of the discriminator's first layer.
        disc_lr: Adam's learning rate for the discriminator.
        ema_decay: of the decoder's averaged weights, which validation and what is saved take.
        schedule, warmup_steps: of the learning rate, see `schedule.warmed_up`.
        gradient_clip: largest global norm of the gradients; 0 does not clip.
        accumulate_grad_batches: batches gathered in one step.
        flips: half of the pictures are mirrored.
        gradient_checkpointing: compute the decoder's activations twice in place of keeping them.
        seed: every random draw follows from it, the epoch and the sample.
        lpips: for `perceptual_weight`; validation logs it also where its weight is 0.
        more: weights of further losses, see `PictureLoss`.

    Logs `train/…` (loss and its parts) and `val/…`: PSNR in dB, SSIM, L1, of the averaged decoder without noise.

    Raises:
        UserError: settings that cannot be.
    """

    def __init__(
        self,
        rae: RAE,
        lr: float = 2e-4,
        noise_tau: float = 0.8,
        l1_weight: float = 0.5,
        gradient_weight: float = 0.0,
        spectral_weight: float = 0.0,
        perceptual_weight: float = 0.0,
        disc_weight: float = 0.0,
        disc_start: int = 0,
        generator_start: int | None = None,
        disc_width: int = 64,
        disc_lr: float = 1e-4,
        ema_decay: float = 0.9978,
        schedule: str = "cosine",
        warmup_steps: int = 300,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        gradient_clip: float = 1.0,
        accumulate_grad_batches: int = 1,
        flips: bool = False,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        lpips: LPIPS | None = None,
        **more: float,
    ) -> None:
        super().__init__()
        generator_start = disc_start + 1 if generator_start is None else generator_start
        self.save_hyperparameters(ignore=["rae", "lpips"])
        self.hparams["betas"] = list(betas)
        self.hparams["encoder"] = encoder_digest(rae)
        self.accumulate_grad_batches = accumulate_grad_batches
        if noise_tau < 0:
            raise UserError(f"noise_tau {noise_tau} is a standard deviation: expected 0 or more")
        if perceptual_weight and lpips is None:
            raise UserError(
                "perceptual_weight needs LPIPS: name its weights (lpips_weights), or take perceptual_weight 0"
            )
        if disc_weight and generator_start < disc_start:
            raise UserError(
                f"generator_start {generator_start} lies before disc_start {disc_start}: the decoder would listen to a "
                "discriminator that has learnt nothing. Take a later one"
            )
        # in a dict, so that what is frozen does not become a part of this module and its checkpoints
        self._frozen = {"rae": rae, "lpips": lpips}
        self.network = rae.decoder.requires_grad_()
        self.ema = EMA(self.network, ema_decay)
        if gradient_checkpointing:
            rae.enable_gradient_checkpointing()
        self.picture_loss = PictureLoss(l1_weight, gradient_weight, spectral_weight, perceptual_weight, lpips, **more)
        if disc_weight:
            self.discriminator = PatchDiscriminator(3, disc_width)

    def decoded(self, tokens: Tensor) -> Tensor:
        """Tokens (B, N, C) → pictures float32 (B, 3, S, S) near [-1, 1]."""
        return self._frozen["rae"].colours(tokens) * 2 - 1

    @contextmanager
    def averaged(self) -> Iterator[RAE]:
        """The RAE with the averaged decoder in place of the trained one."""
        rae = self._frozen["rae"]
        rae.decoder = self.ema.network
        try:
            yield rae
        finally:
            rae.decoder = self.network

    def looked_at(self, batch: dict[str, Tensor], draws: Draws | None = None) -> tuple[Tensor, Tensor]:
        """Pictures in [-1, 1], half of them mirrored where `flips` and `draws` say so, and their tokens (B, N, C)."""
        pictures, tokens = to_unit(batch["pictures"]), batch.get("tokens")
        if draws is not None and self.hparams.flips:
            mirrored = draws.uniform("flip") < 0.5
            pictures = torch.where(mirrored[:, None, None, None], pictures.flip(3), pictures)
            if tokens is not None:
                tokens = torch.where(mirrored[:, None, None], batch["mirrored_tokens"], tokens)
        if tokens is None:
            tokens = self._frozen["rae"].tokens((pictures + 1) / 2)
        return pictures, tokens.float()

    def noised_tokens(self, tokens: Tensor, draws: Draws) -> Tensor:
        """Tokens (B, N, C) + tau·u·n, u one number per picture."""
        tau = self.hparams.noise_tau
        if not tau:
            return tokens
        return noised(tokens, tau, draws.uniform("noise level"), draws.normal("noise", *tokens.shape[1:]))

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        settings, step = self.hparams, self.global_step
        draws = Draws(settings.seed, self.current_epoch, batch["index"])
        pictures, tokens = self.looked_at(batch, draws)
        reconstruction = self.decoded(self.noised_tokens(tokens, draws))
        listens = settings.disc_weight > 0 and step >= settings.generator_start
        loss, parts = decoder_loss(
            self.picture_loss,
            reconstruction,
            pictures,
            adversary=(lambda made: generator_loss(self.judged(made))) if listens else None,
            disc_weight=settings.disc_weight,
            last=self.network.decoder_pred.weight,
        )
        generator, adversary = self.both_optimizers()
        if self.descend(generator, loss, batch_idx):
            # here, not in a callback: a checkpoint that is written after this step must hold this step's average
            self.ema.update(self.network, self.global_step)
        if adversary is not None and step >= settings.disc_start:
            real, made = self.judged(pictures), self.judged(reconstruction.detach())
            parts["discriminator"] = hinge_loss(real, made)
            parts["discriminator_right"] = ((real > 0).float().mean() + (made < 0).float().mean()) / 2
            self.descend(adversary, parts["discriminator"], batch_idx)
        lr = torch.tensor(generator.param_groups[0]["lr"])  # a number would be copied to the device, and waited for
        self.log("train/lr", lr, batch_size=len(pictures))
        log_step(self, parts, len(pictures))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        pictures, tokens = self.looked_at(batch)
        with self.averaged():
            reconstruction = self.decoded(tokens).clamp(-1, 1)
        parts = {
            "l1": l1(reconstruction, pictures),
            "psnr": psnr(reconstruction, pictures).clamp_max(100).mean(),
            "ssim": ssim(reconstruction, pictures).mean(),
        }
        if self._frozen["lpips"] is not None:
            parts["perceptual"] = self._frozen["lpips"](reconstruction, pictures).mean()
        self.log_dict({f"val/{k}": v for k, v in parts.items()}, batch_size=float(len(pictures)), sync_dist=True)

    def flops_of_a_sample(self, batch: dict[str, Tensor]) -> int:
        """What RAE computes for one picture in a step, forwards and backwards; losses' networks do not count."""
        shape, looked_once = batch["pictures"].shape[1:], "tokens" in batch
        channels, height, width = self._frozen["rae"].latent_shape

        def loss(rae: RAE) -> Tensor:
            tokens = torch.zeros(1, height * width, channels)  # (1, N, C)
            if not looked_once:
                tokens = rae.tokens(torch.zeros(1, *shape))
            return rae.colours(tokens).sum()

        return flops_of(self._frozen["rae"], loss)

    @torch.inference_mode()
    def reconstructed(self, pictures: Tensor) -> Tensor:
        """Pictures uint8 (B, 3, S, S) → what the averaged decoder makes of them, uint8."""
        with self.averaged() as rae:
            return to_pixels(rae(to_unit(pictures.to(self.device))))

    def on_fit_start(self) -> None:
        for frozen in self._frozen.values():
            if frozen is not None:
                frozen.to(self.device)
        self._look_once()

    def _look_once(self) -> None:
        """What the frozen encoder makes of each picture is computed before training, where all of it can be kept."""
        data, rae = getattr(self.trainer, "datamodule", None), self._frozen["rae"]
        train, val = getattr(data, "train_data", None), getattr(data, "val_data", None)
        if not hasattr(train, "along"):
            return
        wanted = [(train, "tokens", False)]
        if self.hparams.flips:
            wanted.append((train, "mirrored_tokens", True))
        if val is not None:
            wanted.append((val, "tokens", False))
        if sum(len(side) for side, _, _ in wanted) * 2 * math.prod(rae.latent_shape) > TOKENS_LIMIT:
            return
        for side, name, mirrored in wanted:
            side.along[name] = tokens_of_all(rae, side, self.device, mirrored)

    def configure_optimizers(self) -> list[dict[str, Any]]:
        settings = self.hparams
        optimizer = torch.optim.AdamW(
            self.network.parameters(),
            settings.lr,
            settings.betas,
            weight_decay=settings.weight_decay,
            fused=not has_scaler(self.trainer),
        )
        optimizers = [warmed_up(optimizer, settings.warmup_steps, self.total_steps, settings.schedule)]
        if settings.disc_weight:  # the discriminator is VA-VAE's, and so is its optimiser
            optimizers.append({"optimizer": self.discriminator_optimizer()})
        return optimizers


def tokens_of_all(
    rae: RAE, data: DecodedPictures, device: str | torch.device = "cpu", mirrored: bool = False, batch_size: int = 32
) -> Tensor:
    """The frozen encoder's tokens of all pictures: float16 (N, h·w, C), which their last norm keeps in its range.

    Args:
        data: pictures uint8 (B, 3, S, S), in the order of the rows.
        mirrored: tokens of the pictures turned left to right.
    """
    channels, height, width = rae.latent_shape
    kept = torch.empty(len(data), height * width, channels, dtype=torch.float16)
    looked = someone_looks() and len(data) >= 500
    computing = Computing(None, device, f"Tokens of this {type(rae).__name__}")
    with tqdm(total=len(data), desc="frozen encoder", unit="picture", disable=not looked) as bar:
        for start in range(0, len(data), batch_size):
            rows = range(start, min(start + batch_size, len(data)))
            pictures = data.__getitems__(rows)["pictures"].to(device)
            colours = (to_unit(pictures.flip(3) if mirrored else pictures) + 1) / 2
            tokens = computing(partial(rae.tokens, colours)).half().cpu()
            if computing.in_half and not tokens.isfinite().all():
                tokens = computing.again(partial(rae.tokens, colours)).half().cpu()
            kept[rows.start : rows.stop] = tokens
            bar.update(len(rows))
    return kept


def encoder_digest(rae: RAE) -> str:
    """By what a checkpoint of a decoder knows the encoder it belongs to: weights and how pictures are given to it."""
    given = {key: value for key, value in rae.config.items() if key.startswith(("encoder_", "image_"))}
    of_config = json.dumps(given, sort_keys=True, default=list)
    return hashlib.sha256((weights_digest(rae.encoder) + of_config).encode()).hexdigest()[:16]


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
        more: weights of further losses, see `PictureLoss`.

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
        **more: float,
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
        self.picture_loss = PictureLoss(l1_weight, gradient_weight, spectral_weight, perceptual_weight, lpips, **more)
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
        if not isinstance(data, PictureSetDataModule):
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

    def _features(self, pictures: DecodedPictures, path: Path) -> Tensor | None:
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
