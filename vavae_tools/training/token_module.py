"""Training a denoiser on token images: the clean picture is learnt, on the cells of tokens alone."""

from typing import Any

import torch
from torch import Tensor, nn

from vavae_tools.data.token_code import TokenCode
from vavae_tools.diffusion.clean_prediction import CleanPrediction
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.transformer import DiT, Kept, kept_patches
from vavae_tools.draws import Draws
from vavae_tools.training.diffusion_module import DiffusionModule
from vavae_tools.training.throughput import flops_of


class TokenImageModule(DiffusionModule):
    """Trains a `DiT` on batches of `data.token_images`; padding is neither computed nor attended to.

    Args:
        denoiser: its patches are the code's cells; in_channels is one more than the pictures have.
        conditioner: of the one class "text".
        token_images: what a `TokenImagePipeline` needs besides the models: code, lengths, time_shift,
            use_chat_template.
        prompt_share: of the samples, whose first cells, a number from none to all but one, are given clean and not
            learnt: so it can go on with a text.
        settings: see `DiffusionModule`.
    """

    qk_norm_key = "model.qk_norm"
    objective: CleanPrediction

    def __init__(
        self,
        denoiser: DiT,
        conditioner: ClassConditioner,
        objective: CleanPrediction,
        token_images: dict[str, Any],
        prompt_share: float = 0.5,
        **settings: Any,
    ) -> None:
        super().__init__(denoiser, conditioner, objective, **settings)
        self.code = TokenCode(**token_images["code"])

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Find the cells to compute, here where no GPU has to be waited for."""
        kept = kept_patches(_all_cells(batch), self.code.cell_size)
        if self.device.type == "cuda":  # as the loader pins what it makes, so that the copy is not waited for
            kept = Kept(*(tensor.pin_memory() for tensor in kept))
        return {**batch, "kept": kept}

    def model_step(
        self, network: nn.ModuleDict, batch: dict[str, Any], draws: Draws, dropout: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        clean, mask = batch["clean"], batch["mask"]
        known = batch["condition_mask"] if "condition_mask" in batch else torch.zeros_like(mask)
        if self.training and self.hparams.prompt_share:
            known = known + self.beginnings(mask, draws)
        noise = draws.normal("noise", *clean.shape[1:])
        t = self.objective.sample_time(getattr(draws, self.objective.time_draws)("time"))
        conditioning = network["conditioner"](torch.zeros_like(batch["index"]))
        pixels = (mask * (1 - known)).sum()
        if self.training and self.trainer.world_size > 1:  # so that many processes make the step that one would make
            pixels = self.trainer.strategy.reduce(pixels, reduce_op="mean")
        return self.objective(network["denoiser"], clean, conditioning, noise, t, mask, known, batch["kept"], pixels)

    def beginnings(self, mask: Tensor, draws: Draws) -> Tensor:
        """Pixels (B, H, W) of the first cells of a mask, in `prompt_share` of the samples."""
        there = self.code.over_cells(mask)  # (B, N)
        place = there.cumsum(1)
        chosen = draws.uniform("beginning") < self.hparams.prompt_share  # (B,)
        count = (draws.uniform("length") * place[:, -1]).floor() * chosen
        return self.code.over_pixels((there & (place <= count[:, None])).float(), mask.shape[-1])

    def weight_of(self, batch: dict[str, Any]) -> float:
        return float(batch["mask"].sum())

    def flops_of_a_sample(self, batch: dict[str, Any]) -> int:
        cells = batch["kept"].places.shape[1]

        def loss(network: nn.ModuleDict) -> Tensor:
            clean, mask = torch.zeros(1, *batch["clean"].shape[1:]), torch.ones(1, *batch["mask"].shape[1:])
            conditioning = network["conditioner"](torch.zeros(1, dtype=torch.int64))
            kept = Kept(torch.arange(cells)[None], torch.ones(1, cells, dtype=torch.bool))
            return self.objective(network["denoiser"], clean, conditioning, clean, torch.zeros(1), mask, kept=kept)[0]

        return flops_of(self._whole["network"], loss)


def _all_cells(batch: dict[str, Tensor]) -> Tensor:
    return batch["mask"] + batch["condition_mask"] if "condition_mask" in batch else batch["mask"]
