"""Training a denoiser on latents, captioned images or token images: any denoiser, conditioner and objective."""

import copy
import functools
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method

from vavae_tools.autoencoders.stable_diffusion import StableDiffusionVAE
from vavae_tools.data.images import to_unit
from vavae_tools.data.tokens.code import TokenCode
from vavae_tools.diffusion.clip import TextEncoder, TextStates
from vavae_tools.diffusion.conditioning import ClassConditioner, TextConditioner
from vavae_tools.diffusion.layers import Backbone, TokenSubset, select_tokens
from vavae_tools.diffusion.objectives import FlowMatching, Objective
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.files import plain_config
from vavae_tools.training.callbacks.finite import ADVICE_NOT_FINITE, FiniteSteps, has_scaler
from vavae_tools.training.callbacks.progress import log_step
from vavae_tools.training.callbacks.throughput import flops_of, without_numbers
from vavae_tools.training.devices import trainer_settings
from vavae_tools.training.lightning_inside import is_gathering
from vavae_tools.training.optim import EMA, OwnSettings, with_warmup


class DiffusionModule(L.LightningModule):
    """Trains a denoiser and its conditioner on batches that have one "index" a sample, "labels" or texts, and data.

    - Data are "latents", normalised (B, C, h, w), with flip="half" also "latents_flip"; or "clean" (B, C, H, W) in the
      patches of "mask" (B, H, W) alone, with what is known beforehand in "condition_mask": token images.
    - Texts are "text_tokens", "text_mask" and "text_pooled", the fields of `TextStates`. Without labels or texts all
      samples are of class 0.
    - After `encode_with`, {"images", "captions", "index"} are encoded at every step.

    Args:
        denoiser, conditioner: what is trained; their averages, which validation and sampling use, are `ema.network`.
        lr, warmup_steps, schedule: of AdamW, see `optim.with_warmup`.
        compile: `torch.compile` the denoiser's blocks: the first step takes a minute, those after it less.
        flip: "none", or "half": half of the latents are those of the mirrored images.
        token_images: arguments of a `TokenImagePipeline` besides the models, such as code, lengths, time_shift. The
            denoiser's patches are the code's cells, and it has one channel more than the images.
        prompt_share: of the token images, whose first cells, none to all but one, are given clean and not learnt.

    Logs `train/…` and `val/…`: loss, mse, cosine. Draws follow from `seed`, epoch and sample, at validation the same.
    """

    trainer_settings = staticmethod(trainer_settings)

    def __init__(
        self,
        denoiser: Backbone,
        conditioner: ClassConditioner | TextConditioner,
        objective: Objective | None = None,
        lr: float = 2e-4,
        ema_decay: float = 0.9999,
        warmup_steps: int = 100,
        flip: str = "none",
        seed: int = 0,
        schedule: str = "cosine",
        compile: bool = False,
        token_images: dict[str, Any] | None = None,
        prompt_share: float = 0.5,
    ) -> None:
        super().__init__()
        elsewhere = [] if token_images else ["token_images", "prompt_share"]
        self.save_hyperparameters(ignore=["denoiser", "conditioner", "objective", "compile", *elsewhere])
        self.hparams["denoiser_config"] = plain_config(denoiser)
        self.hparams["conditioner_config"] = plain_config(conditioner)
        self.hparams["lora"] = getattr(denoiser, "lora", None)
        self.network = nn.ModuleDict({"denoiser": denoiser, "conditioner": conditioner})
        self.ema = EMA(self.network, ema_decay)
        self.objective = objective or FlowMatching()
        self.hparams["objective"] = dict(self.objective.config)
        self.code = TokenCode(**token_images["code"]) if token_images else None
        # in dicts, so that they become no part of this module and its checkpoints
        self._whole, self._frozen = {"network": self.network}, {}
        # tables of positions, the same everywhere: DDP would send them to all processes before every step
        self._ddp_params_and_buffers_to_ignore = {name for name, _ in self.named_buffers()}
        if compile:  # after the average was copied, which sees few steps
            denoiser.compile_repeated_blocks()

    def encode_with(self, vae: StableDiffusionVAE, text_encoder: TextEncoder) -> None:
        self._frozen = {"vae": vae.eval().requires_grad_(False), "text_encoder": text_encoder}

    def on_fit_start(self) -> None:
        for model in self._frozen.values():
            model.to(self.device)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Find the cells to compute, where no GPU has to be waited for."""
        if "mask" not in batch:
            return batch
        kept = select_tokens(batch["mask"] + batch.get("condition_mask", 0), self.code.cell_size)
        if self.device.type == "cuda":  # as the loader pins what it makes, so that the copy is not waited for
            kept = TokenSubset(*(tensor.pin_memory() for tensor in kept))
        return {**batch, "kept": kept}

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return self.encoded(batch) if "captions" in batch else batch

    @torch.no_grad()
    def encoded(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return latents and texts of images and captions, in training by a posterior sample of this epoch's."""
        seed, epoch = (self.hparams.seed, self.current_epoch) if self.training else (self.hparams.seed + 1, 0)
        draws = Draws(seed, epoch, batch["index"])
        with torch.autocast(self.device.type, enabled=False):  # a VAE in half precision makes black images
            labels, normal = torch.zeros_like(batch["index"]), functools.partial(draws.normal, "posterior")
            latents = self._frozen["vae"].encode_images(to_unit(batch["images"]), labels, normal)
            states = self._frozen["text_encoder"].encode(batch["captions"]).to(self.device)
        texts = {"text_tokens": states.tokens, "text_mask": states.mask, "text_pooled": states.pooled}
        return {"latents": latents.float(), "index": batch["index"], **texts}

    def model_step(
        self, network: nn.ModuleDict, batch: dict[str, Any], draws: Draws, dropout: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        masked = self._masks(batch, draws) if "mask" in batch else {}
        data = batch["clean"] if masked else batch["latents"]
        if self.hparams.flip == "half":
            mirrored = draws.uniform("flip") < 0.5
            data = torch.where(mirrored[:, None, None, None], batch["latents_flip"], data)
        noise = draws.normal("noise", *data.shape[1:])
        t = self.objective.sample_time(getattr(draws, self.objective.time_distribution)("time"))
        drop = draws.uniform("condition dropout") < dropout if dropout else None
        conditioning = network["conditioner"](_conditions(batch), drop)
        return self.objective(network["denoiser"], data, conditioning, noise, t, **masked)

    def _masks(self, batch: dict[str, Any], draws: Draws) -> dict[str, Any]:
        """Return what counts of token images, what is known of them, and what the sum is divided by."""
        mask = batch["mask"]
        known = batch.get("condition_mask", torch.zeros_like(mask))
        if self.training and self.hparams.prompt_share:
            known = known + self.beginnings(mask, draws)
        pixels = (mask * (1 - known)).sum()
        if self.training and self.trainer.world_size > 1:  # so that many processes make the step that one would make
            pixels = self.trainer.strategy.reduce(pixels, reduce_op="mean")
        return {"mask": mask, "known": known, "kept": batch["kept"], "pixels": pixels}

    def beginnings(self, mask: Tensor, draws: Draws) -> Tensor:
        """Return the pixels (B, H, W) of a mask's first cells, in `prompt_share` of the samples."""
        there = self.code.mask_to_cells(mask)  # (B, N)
        place = there.cumsum(1)
        chosen = draws.uniform("beginning") < self.hparams.prompt_share  # (B,)
        count = (draws.uniform("length") * place[:, -1]).floor() * chosen
        return self.code.spread_to_pixels((there & (place <= count[:, None])).float(), mask.shape[-1])

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        draws = Draws(self.hparams.seed, self.current_epoch, batch["index"])
        loss, parts = self.model_step(self.network, batch, draws, self.network["conditioner"].dropout)
        lr = self.lr_schedulers().get_last_lr()[0]
        self.log("train/lr", torch.tensor(lr), batch_size=len(batch["index"]))  # of a number the device would wait
        log_step(self, {"loss": loss, **parts}, len(batch["index"]))
        return loss

    def configure_callbacks(self) -> list[L.Callback]:
        return [FiniteSteps(None, f"{ADVICE_NOT_FINITE}, or a new run with model.qk_norm=true"), OwnSettings()]

    def configure_gradient_clipping(self, *arguments: Any, **named: Any) -> None:
        """Leave gradients as `FiniteSteps` clipped them: Lightning refuses to clip where AdamW is fused."""

    def optimizer_step(self, *arguments: Any, **named: Any) -> None:
        super().optimizer_step(*arguments, **named)
        if is_gathering(self.trainer):
            return  # DeepSpeed gathers batches itself, and is asked at each of them
        # here, not in a callback: a checkpoint that is written after this step must hold this step's average
        self.ema.update(self.network, self.trainer.global_step + 1)  # Lightning counts this step later

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        draws = Draws(self.hparams.seed + 1, 0, batch["index"])  # the same noise and times at every validation
        loss, parts = self.model_step(self.ema.network, batch, draws, dropout=0.0)
        weight = batch["mask"].sum() if "mask" in batch else len(batch["index"])  # in the mean over all batches
        values = {f"val/{name}": value for name, value in {"loss": loss, **parts}.items()}
        self.log_dict(values, batch_size=float(weight), sync_dist=True)

    def configure_model(self) -> None:
        """Cut denoiser, conditioner and their averages over the devices, where the strategy is `optim.Sharded`."""
        if self.device_mesh is None or isinstance(self.network["denoiser"], FSDPModule):
            return
        self._whole["network"] = without_numbers(self.network, "meta")
        mesh = self.device_mesh["data_parallel"]
        for network in (self.network, self.ema.network):
            for block in network["denoiser"].blocks:
                fully_shard(block, mesh=mesh)
            for part in network.values():
                fully_shard(part, mesh=mesh)
            register_fsdp_forward_method(network["conditioner"], "null")

    def configure_optimizers(self) -> dict[str, Any]:
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        # one kernel for all weights; a gradient scaler would unscale inside it, where it is too late to clip
        fused = not has_scaler(self.trainer)
        optimizer = torch.optim.AdamW(weights, self.hparams.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)
        steps = self.trainer.estimated_stepping_batches
        return with_warmup(optimizer, self.hparams.warmup_steps, steps, self.hparams.schedule)

    def flops_of_a_sample(self, batch: dict[str, Any]) -> int:
        """Return what a training step computes for one sample of this batch (`throughput.flops_of`)."""
        objective = copy.deepcopy(self.objective)  # its noise schedule loses its numbers

        def loss(network: nn.ModuleDict) -> Tensor:
            one = {k: torch.zeros(1, *v.shape[1:], dtype=v.dtype) for k, v in batch.items() if isinstance(v, Tensor)}
            masked, data = {}, one["clean"] if "mask" in one else one["latents"]  # (1, C, h, w)
            if "mask" in one:
                kept = TokenSubset(*(torch.zeros(1, part.shape[1], dtype=part.dtype) for part in batch["kept"]))
                masked = {"mask": one["mask"], "kept": kept}
            conditioning = network["conditioner"](_conditions({"index": torch.zeros(1, dtype=torch.int64), **one}))
            return objective(network["denoiser"], data, conditioning, data, torch.zeros(1), **masked)[0]

        return flops_of(self._whole["network"], loss)


def _conditions(batch: dict[str, Any]) -> Tensor | TextStates:
    if "text_tokens" in batch:
        return TextStates(batch["text_tokens"], batch["text_mask"], batch["text_pooled"])
    return batch["labels"] if "labels" in batch else torch.zeros_like(batch["index"])
