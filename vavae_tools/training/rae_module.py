"""Training the decoder of a representation autoencoder (RAE) with Lightning; its encoder stays as it is."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vavae_tools.autoencoders.discriminator import PatchDiscriminator, adaptive_weight, generator_loss, hinge_loss
from vavae_tools.autoencoders.losses import PictureLoss, l1
from vavae_tools.autoencoders.perceptual import LPIPS
from vavae_tools.autoencoders.rae import RAE, noised
from vavae_tools.data.decoded import DecodedPictures
from vavae_tools.data.latents import weights_digest
from vavae_tools.data.pixels import to_pixels, to_unit
from vavae_tools.draws import Draws
from vavae_tools.errors import UserError
from vavae_tools.evaluation.metrics import psnr, ssim
from vavae_tools.frozen import Computing
from vavae_tools.screen import someone_looks
from vavae_tools.training.adversarial_module import AdversarialModule
from vavae_tools.training.curves import log_step
from vavae_tools.training.ema import EMA
from vavae_tools.training.finite import has_scaler
from vavae_tools.training.schedule import warmed_up
from vavae_tools.training.throughput import flops_of

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
        self.picture_loss = PictureLoss(l1_weight, gradient_weight, spectral_weight, perceptual_weight, lpips)
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


def decoder_loss(
    picture_loss: PictureLoss,
    reconstruction: Tensor,
    pictures: Tensor,
    adversary: Callable[[Tensor], Tensor] | None = None,
    disc_weight: float = 0.75,
    last: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """RAE's loss of the decoder: the picture loss + `disc_weight` · λ · the adversarial one.

    λ = |∇ picture loss| / (|∇ adversarial loss| + 1e-6) at the decoder's last layer, at most 1e4. Both losses are
    means: `losses.whole_loss`, whose limit is meant for VA-VAE's sums over a picture, would hold λ below 0.06 at 256
    pixels. As there, each is differentiated once, down to the reconstruction.

    Args:
        reconstruction: (B, 3, H, W) float32 with its graph.
        adversary: reconstruction → the generator's adversarial loss; None while there is none.
        last: the weight of the decoder's last layer.

    Returns:
        A scalar to go backwards from (its value means nothing), and the parts by name: "loss" is the loss's value,
        "disc_weight" is `disc_weight` · λ.
    """
    picture = reconstruction.detach().requires_grad_()
    loss, parts = picture_loss(picture, pictures)
    (into,) = torch.autograd.grad(loss, picture)  # (B, 3, H, W)
    total = loss.detach()
    if adversary is not None:
        parts["generator"] = adversary(picture)
        (against,) = torch.autograd.grad(parts["generator"], picture)
        scale = pictures[0].numel()  # what single pixels pull is too little for a half-precision layer
        pulls = [
            torch.autograd.grad(reconstruction, last, scale * pull, retain_graph=True)[0].float() / scale
            for pull in (into, against)
        ]
        # RAE adds 1e-6 to the norm where VQGAN, and so `adaptive_weight`, adds 1e-4
        parts["disc_weight"] = disc_weight * adaptive_weight(*(100 * pull for pull in pulls), largest=1e4)
        total = total + parts["disc_weight"] * parts["generator"].detach()
        into = into + parts["disc_weight"] * against
    parts["loss"] = total
    # a loss that is not finite must not look as if it had a gradient: on no process of several
    objective = (reconstruction * into).sum() * torch.where(torch.isfinite(total), 1.0, torch.nan)
    return objective, {name: value.detach() for name, value in parts.items()}


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
