"""Training autoencoders with Lightning: glue between the model, its loss, its adversary and the Trainer."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from vavae_tools.autoencoders import losses
from vavae_tools.autoencoders.foundation import Foundation, alignment_loss, foundation_features
from vavae_tools.autoencoders.lpips import LPIPS
from vavae_tools.autoencoders.rae import RAE, RAEFeatures, encoder_digest, noised
from vavae_tools.autoencoders.vavae import VAVAE, other_labels, reconstruct_images
from vavae_tools.data.images import DecodedImages, ImageSetDataModule, to_pixels, to_unit
from vavae_tools.evaluation.metrics import psnr, ssim
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import plain_config
from vavae_tools.runtime.ranks import current_ranks
from vavae_tools.training.callbacks.finite import ADVICE_NOT_FINITE, FiniteSteps, has_scaler
from vavae_tools.training.callbacks.progress import log_step
from vavae_tools.training.callbacks.throughput import flops_of
from vavae_tools.training.devices import trainer_settings
from vavae_tools.training.lightning_inside import exclude_from_global_step
from vavae_tools.training.optim import EMA, OwnSettings, with_warmup

Reconstruction = tuple[Tensor, Tensor, dict[str, Any]]
"""Images in [-1, 1], what the model makes of them (float32), and what `autoencoder_loss` takes besides."""


class AutoencoderModule(L.LightningModule):
    """Trains an autoencoder on batches {"images": uint8 (B, C, H, W), "labels": (B,), "index": (B,)}.

    The model and its discriminator have an optimiser each and take turns; only the model's steps count. Parts whose
    weight is 0 are neither built nor computed.

    Args:
        generator_start: the step from which the model listens to the discriminator; None: the one after `disc_start`.
        lpips: for `perceptual_weight`; validation logs it also where its weight is 0.
        more: NAME_weight of further losses in `losses.IMAGE_LOSSES`.

    The others are keys of a recipe (`recipes.base`, `training.config`).
    """

    def __init__(
        self,
        codec: VAVAE | RAE,
        lr: float = 1e-4,
        l1_weight: float = 1.0,
        gradient_weight: float = 0.5,
        spectral_weight: float = 1.0,
        perceptual_weight: float = 0.0,
        disc_weight: float = 0.0,
        disc_start: int = 0,
        generator_start: int | None = None,
        disc_width: int = 64,
        disc_lr: float = 1e-4,
        schedule: str = "cosine",
        warmup_steps: int = 50,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 1e-4,
        gradient_clip: float = 1.0,
        accumulate_grad_batches: int = 1,
        gradient_checkpointing: bool = False,
        seed: int = 0,
        lpips: LPIPS | None = None,
        **more: float,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["vavae", "rae", "codec", "lpips", "foundation"])
        self.hparams["betas"] = list(betas)
        self.automatic_optimization = False  # two optimisers
        self.accumulate_grad_batches, self.warmup_steps, self.ema = accumulate_grad_batches, warmup_steps, None
        self.generator_start = disc_start + 1 if generator_start is None else generator_start
        if perceptual_weight and lpips is None:
            instead = "perceptual_weight 0 and spectral_weight 1, which needs none"
            raise UserError(f"perceptual_weight needs LPIPS: name its weights (lpips_weights), or take {instead}")
        if disc_weight and self.generator_start < disc_start:
            order = f"generator_start {generator_start} lies before disc_start {disc_start}"
            raise UserError(f"{order}: the decoder would listen to a discriminator that has learnt nothing")
        # in a dict, so that they become no part of this module and its checkpoints
        self._models: dict[str, Any] = {"codec": codec, **({"lpips": lpips} if lpips is not None else {})}
        self._cached_encoders: dict[str, Foundation] = {}  # whose features, by their name in a batch, are computed once
        self._scales: dict[int, Tensor] = {}  # that gathered gradients were scaled by
        weights = {"l1": l1_weight, "gradient": gradient_weight, "spectral": spectral_weight}
        weights |= {"perceptual": perceptual_weight} | {k.removesuffix("_weight"): more[k] for k in more}
        self.image_loss = losses.ImageLoss(weights, lpips)
        if disc_weight:
            self.discriminator = losses.PatchDiscriminator(codec.config.in_channels, disc_width)

    def reconstruct(self, batch: dict[str, Tensor], draws: Draws) -> Reconstruction:
        raise NotImplementedError

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        settings, step = self.hparams, self.global_step
        draws = Draws(settings.seed, self.current_epoch, batch["index"])
        images, reconstruction, more = self.reconstruct(batch, draws)
        if settings.disc_weight and step >= self.generator_start:
            more["adversary"] = lambda made: losses.generator_loss(self.discriminate(made))
            more["disc_weight"] = settings.disc_weight
        loss, parts = losses.autoencoder_loss(self.image_loss, reconstruction, images, **more)
        generator, adversary = self.optimizers() if settings.disc_weight else (self.optimizers(), None)
        if self.backward_and_step(generator, loss, batch_idx) and self.ema is not None:
            # here, not in a callback: a checkpoint that is written after this step must hold this step's average
            self.ema.update(self.network, self.global_step)
        if adversary is not None and step >= settings.disc_start:
            exclude_from_global_step(adversary)  # Lightning counts every optimiser's steps as the training's
            real, made = self.discriminate(images), self.discriminate(reconstruction.detach())
            parts["discriminator"] = losses.hinge_loss(real, made)
            parts["discriminator_accuracy"] = discriminator_accuracy(real, made)
            self.backward_and_step(adversary, parts["discriminator"], batch_idx)
        lr = torch.tensor(generator.param_groups[0]["lr"])  # a number would be copied to the device, and waited for
        self.log("train/lr", lr, batch_size=len(images))
        log_step(self, parts, len(images))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        draws = Draws(self.hparams.seed + 1, 0, batch["index"])  # the same noise at every validation
        images, reconstruction, more = self.reconstruct(batch, draws)
        loss, parts = self.image_loss(reconstruction, images)
        posterior, alignment = more.get("posterior"), more.get("alignment")
        if posterior is not None:
            parts["kl"] = losses.kl(posterior, images)
            parts["loss"] = loss + self.hparams.kl_weight * parts["kl"]
            parts["latent_mean"], parts["latent_std"] = posterior.mean.mean(), posterior.mean.std()
        if alignment is not None:
            parts["alignment"] = sum(alignment)
        if "lpips" in self._models and "perceptual" not in parts:
            parts["perceptual"] = self._models["lpips"](reconstruction, images).mean()
        if self.hparams.disc_weight and self.global_step >= self.generator_start:
            real, made = self.discriminate(images), self.discriminate(reconstruction)
            parts["discriminator_accuracy"] = discriminator_accuracy(real, made)
        parts["psnr"] = psnr(reconstruction.clamp(-1, 1), images).clamp_max(100).mean()
        parts["ssim"] = ssim(reconstruction, images).mean()
        self.log_dict({f"val/{k}": v for k, v in parts.items()}, batch_size=float(len(images)), sync_dist=True)
        return {"reconstructions": to_pixels(reconstruction)}

    def flops_of_a_sample(self, batch: dict[str, Tensor]) -> int:
        """Return what a training step computes for one image (`throughput.flops_of`), without the losses' networks."""
        shape, trains = batch["images"].shape[1:], not self.hparams.get("freeze_encoder")

        def loss(codec: VAVAE | RAE) -> Tensor:
            if "tokens" in batch:
                return codec.decode(torch.zeros(1, *batch["tokens"].shape[1:])).sample.sum()
            with torch.set_grad_enabled(trains):
                latents = codec.encode_images(torch.zeros(1, *shape), torch.zeros(1, dtype=torch.int64))
            return codec.decode(latents).sample.sum()

        return flops_of(self._models["codec"], loss)

    def discriminate(self, images: Tensor) -> Tensor:
        """Return logits, in float32: the network is small, and its BatchNorm and hinges do not suit fp16."""
        with torch.autocast(self.device.type, enabled=False):
            return self.discriminator(images)

    def configure_optimizers(self) -> list[dict[str, Any]]:
        settings, fused = self.hparams, not has_scaler(self.trainer)
        adversary = list(self.discriminator.parameters()) if settings.disc_weight else []
        others = {id(weight) for weight in adversary}
        weights = [weight for weight in self.parameters() if weight.requires_grad and id(weight) not in others]
        model = torch.optim.AdamW(weights, settings.lr, settings.betas, weight_decay=settings.weight_decay, fused=fused)
        optimizers = [with_warmup(model, self.warmup_steps, self.total_steps, settings.schedule)]
        if adversary:  # as the reference trains it
            optimizers.append({"optimizer": torch.optim.Adam(adversary, settings.disc_lr, (0.5, 0.9), fused=fused)})
        return optimizers

    def backward_and_step(self, optimizer: Any, loss: Tensor, batch_idx: int) -> bool:
        """Go backwards; return whether that completed a step's batches, and the step was made."""
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
        """Bring gathered gradients to the scale of the next, which the other optimiser's step may have changed."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is None or self.accumulate_grad_batches == 1:
            return
        scale = scaler.scale(torch.ones((), device=self.device))  # a tensor: `get_scale` waits for the device
        if not begins:
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            gathered = [weight.grad for weight in weights if weight.grad is not None]
            torch._foreach_mul_(gathered, scale / self._scales[id(optimizer)])
        self._scales[id(optimizer)] = scale

    @property
    def total_steps(self) -> float:
        """The model's steps in the whole training."""
        trainer = self.trainer
        batches = trainer.estimated_stepping_batches  # sets the data up, so that their batches are known
        if trainer.max_epochs == -1:
            return batches
        return min(batches, -(-trainer.num_training_batches // self.accumulate_grad_batches) * trainer.max_epochs)

    def configure_callbacks(self) -> list[L.Callback]:
        return [FiniteSteps(self.hparams.gradient_clip, f"{ADVICE_NOT_FINITE}, or fewer losses"), OwnSettings()]

    def trainer_settings(self, **choices: Any) -> dict[str, Any]:
        """Return what `devices.trainer_settings` does, for this module."""
        gathered = choices.pop("accumulate_grad_batches", self.accumulate_grad_batches)
        if gathered != self.accumulate_grad_batches:  # a Trainer cannot gather for two optimisers
            raise UserError(f"accumulate_grad_batches={gathered}: it is an argument of {type(self).__name__}")
        # some weights get no gradient: of the other optimiser, of a condition that is dropped from a whole batch
        choices |= {"parts_may_go_unused": True, "gradient_clip_val": None}  # this module clips itself
        return trainer_settings(shardable=False, **choices)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        data = self._trainer and self.trainer.datamodule
        if isinstance(data, ImageSetDataModule):
            data.read_former_checkpoint(checkpoint)

    def on_fit_start(self) -> None:
        for model in self._models.values():
            model.to(self.device)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ImageSetDataModule) and current_ranks().size == self.trainer.world_size:
            self._cache_features({"train": data.train_data, "val": data.val_data})

    def _cache_features(self, subsets: dict[str, DecodedImages | None]) -> None:
        """Compute what frozen networks make of each image before training, where all of it can be kept."""
        for name, network in self._cached_encoders.items():
            folder = Path(self.trainer.default_root_dir) / "foundation" / name.removeprefix("foundation")
            for subset, images in subsets.items():
                if images is None:
                    continue
                grid = tuple(size // self._models["codec"].downsampling for size in images.image_size)
                path, ranks = folder / f"{subset}.safetensors", current_ranks()
                features = foundation_features(network, images, grid, path, self.device, ranks=ranks)
                if features is None:  # too many to keep
                    return
                images.extra_fields[name] = features
        if "foundation" in self._cached_encoders:
            self._cached_encoders["foundation"].to("cpu")  # its memory is the training's now


def discriminator_accuracy(real: Tensor, made: Tensor) -> Tensor:
    """Return the share of patches that are judged right; 0.5 is chance."""
    return ((real > 0).float().mean() + (made < 0).float().mean()) / 2


class VAVAEModule(AutoencoderModule):
    """Trains a VAVAE; `recipes.vavae.LOSSES` holds sets of these numbers, of which others are `AutoencoderModule`'s.

    `foundation` is for `vf_weight`; see `foundation.load_foundation`.
    """

    def __init__(
        self,
        vavae: VAVAE,
        kl_weight: float = 1e-6,
        vf_weight: float = 0.0,
        distance_margin: float = 0.0,
        cosine_margin: float = 0.0,
        condition_dropout: float = 0.1,
        freeze_encoder: bool = False,
        foundation: Foundation | None = None,
        **settings: Any,
    ) -> None:
        if vf_weight and foundation is None:
            raise UserError("vf_weight needs a vision foundation model: name its folder (foundation_model), or take 0")
        if vf_weight and freeze_encoder:
            raise UserError("vf_weight aligns the latents, which freeze_encoder keeps as they are: take one of them")
        super().__init__(vavae, **settings)
        self.hparams["vavae_config"] = plain_config(vavae)
        if self.hparams.schedule == "constant":
            self.warmup_steps = 0  # as in the reference
        self.vavae = vavae.to(memory_format=torch.channels_last)  # 4 to 24 % faster on a CPU, by its widths
        if freeze_encoder:
            vavae.freeze_encoder()
        if self.hparams.gradient_checkpointing:
            vavae.enable_gradient_checkpointing()
        if vf_weight:
            self._models["foundation"] = self._cached_encoders["foundation"] = foundation
            self.projection = nn.Conv2d(vavae.config.latent_channels, foundation.channels, 1, bias=False)

    def reconstruct(self, batch: dict[str, Tensor], draws: Draws) -> Reconstruction:
        settings, vavae = self.hparams, self.vavae
        images = to_unit(batch["images"]).contiguous(memory_format=torch.channels_last)
        keep = draws.uniform("condition dropout") >= settings.condition_dropout if self.training else None
        condition = vavae.condition_vectors(batch["labels"], keep)
        with torch.no_grad() if settings.freeze_encoder else nullcontext():
            posterior = vavae.encode(images, condition=condition).latent_dist
        noise = draws.normal("posterior", *posterior.mean.shape[1:]).to(posterior.mean.dtype)
        latents = posterior.mean + posterior.std * noise  # (B, c, h, w)
        reconstruction = vavae.decode(latents, condition=condition).sample.float()
        more = {"posterior": posterior, "kl_weight": 0.0 if settings.freeze_encoder else settings.kl_weight}
        more |= {"decoder_last": vavae.decoder.conv_out.weight, "encoder_last": vavae.encoder.conv_out.weight}
        if settings.vf_weight:
            features = batch.get("foundation")  # (B, channels, h, w)
            if features is None:
                features = self._models["foundation"](images, tuple(latents.shape[2:]))
            with torch.autocast(self.device.type, enabled=False):
                projected = self.projection(latents.float())  # (B, channels, h, w)
            margins = settings.distance_margin, settings.cosine_margin
            more |= {"alignment": alignment_loss(projected, features, *margins), "vf_weight": settings.vf_weight}
        return images, reconstruction, more

    def reconstructions(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Return the posterior's modes, decoded with each person's vector, with another's, and with none."""
        images, labels = (batch[name].to(self.device) for name in ("images", "labels"))
        of_whom = [labels, other_labels(labels), None] if self.vavae.config.condition_dim else [None]
        return [reconstruct_images(self.vavae, images, row) for row in of_whom]


RAE_DEFAULTS = {"lr": 2e-4, "betas": (0.9, 0.95), "weight_decay": 0.0, "warmup_steps": 300}
RAE_DEFAULTS |= {"l1_weight": 0.5, "gradient_weight": 0.0, "spectral_weight": 0.0}
"""The paper's numbers, where they differ from `AutoencoderModule`'s; its absolute error is of [0, 1], half of ours."""


class RAEDecoderModule(AutoencoderModule):
    """Trains the decoder of an RAE, in place; its encoder stays as it is.

    The first stage of RAE (Zheng et al. 2025): an image's tokens are noised by tau·u·n, each image by a share u of its
    own, so that the decoder bears what a denoiser will make. Other than there, the discriminator is VA-VAE's, since the
    paper's stands on DINO weights that cannot be shipped, and sees whole images without augmentation or rounding; and
    images are not cropped, so that the frozen encoder sees each once.

    What is validated and saved are the decoder's averaged weights.
    """

    def __init__(
        self, rae: RAE, noise_tau: float = 0.8, ema_decay: float = 0.9978, flips: bool = False, **settings: Any
    ) -> None:
        super().__init__(rae, **{**RAE_DEFAULTS, **settings})
        digest = self.hparams["encoder"] = encoder_digest(rae)
        self._cached_encoders["tokens"] = RAEFeatures(rae, digest)
        if flips:
            self._cached_encoders["mirrored_tokens"] = RAEFeatures(rae, f"{digest} mirrored", mirrored=True)
        self.network = rae.decoder.requires_grad_()
        self.ema = EMA(self.network, ema_decay)
        if self.hparams.gradient_checkpointing:
            rae.enable_gradient_checkpointing()

    def reconstruct(self, batch: dict[str, Tensor], draws: Draws) -> Reconstruction:
        images, tokens = self.prepare_batch(batch, draws)
        more = {"decoder_last": self.network.decoder_pred.weight, "adversary_norm": "means"}
        if not self.training:
            return images, (self.set_decoder(self.ema.network).colours(tokens) * 2 - 1).clamp(-1, 1), more
        return images, self.set_decoder(self.network).colours(self.noised_tokens(tokens, draws)) * 2 - 1, more

    def noised_tokens(self, tokens: Tensor, draws: Draws) -> Tensor:
        u, n = draws.uniform("noise level"), draws.normal("noise", *tokens.shape[1:])
        return noised(tokens, self.hparams.noise_tau, u, n)

    def set_decoder(self, decoder: nn.Module) -> RAE:
        self._models["codec"].decoder = decoder
        return self._models["codec"]

    def prepare_batch(self, batch: dict[str, Tensor], draws: Draws) -> tuple[Tensor, Tensor]:
        """Return images in [-1, 1], in training half of them mirrored where `flips`, and their tokens (B, N, C)."""
        images, features = to_unit(batch["images"]), batch.get("tokens")
        if self.training and self.hparams.flips:
            mirrored = (draws.uniform("flip") < 0.5)[:, None, None, None]
            images = torch.where(mirrored, images.flip(3), images)
            turned = batch.get("mirrored_tokens")
            features = None if turned is None else torch.where(mirrored, turned, features)
        if features is None:
            return images, self._models["codec"].tokens((images + 1) / 2)
        return images, features.flatten(2).mT.float()

    @torch.inference_mode()
    def reconstructions(self, batch: dict[str, Tensor]) -> list[Tensor]:
        """Return what the averaged decoder makes of images, uint8 (B, 3, S, S)."""
        return [to_pixels(self.set_decoder(self.ema.network)(to_unit(batch["images"].to(self.device))))]
