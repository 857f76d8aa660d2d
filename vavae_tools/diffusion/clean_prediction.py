"""Learning to tell the clean picture (x0) from a noisy one, by the squared error of the pixels of a mask alone."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vavae_tools.diffusion.objectives import FlowMatching
from vavae_tools.diffusion.transformer import Kept
from vavae_tools.errors import UserError

NORMALISED = ("channels", "pixels")


class CleanPrediction:
    """x_t = t·data + (1 − t)·noise; the data are predicted, Σ (x̂ − x)²·mask / (Σ mask · C + 1e-8).

    Noise, times and their draws are those of `FlowMatching` on straight paths. `config` keeps the arguments:
    CleanPrediction(**config) is equal.

    Args:
        normalised: "channels" as above, or "pixels": without C, so C times larger.
        time: "lognorm" (most often in the middle of the path) or "uniform".
        time_mean, time_std, time_shift: see `FlowMatching`. Texts are decided where noise just hides a cell's token: a
            mean of −ln of `hiding_noise` learns most there.
    """

    def __init__(
        self,
        normalised: str = "channels",
        time: str = "uniform",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        time_shift: float = 1.0,
    ) -> None:
        if normalised not in NORMALISED:
            raise UserError(f"normalised={normalised!r} is unknown; it is {' or '.join(map(repr, NORMALISED))}.")
        self.normalised = normalised
        self._path = FlowMatching(0.0, time, time_mean, time_std, time_shift=time_shift)
        self.time_draws = self._path.time_draws
        """Which numbers, one per sample, `sample_time` takes: the method's name in `vavae_tools.draws.Draws`."""

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, all plain numbers and names."""
        times = {name: getattr(self._path, name) for name in ("time", "time_mean", "time_std", "time_shift")}
        return {"normalised": self.normalised, **times}

    def sample_time(self, draws: Tensor) -> Tensor:
        """Times in [0, 1] from standard normal or uniform draws (B,), as `time_draws` says."""
        return self._path.sample_time(draws)

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self._path.add_noise(data, noise, t)

    def loss(
        self, prediction: Tensor, data: Tensor, mask: Tensor, pixels: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The masked squared error over the batch, in float32, and its parts.

        Args:
            prediction, data: (B, C, h, w).
            mask: (B, h, w), 1 where it counts.
            pixels: what the sum is divided by in place of this batch's own Σ mask, where others share the step.
        """
        squared = (prediction.float() - data.float()).square() * mask[:, None]  # (B, C, h, w)
        pixels = mask.sum() if pixels is None else pixels
        numbers = pixels * data.shape[1] if self.normalised == "channels" else pixels
        mse = squared.sum() / (numbers + 1e-8)
        return mse, {"mse": mse.detach()}

    def __call__(
        self,
        denoiser: Callable[..., Tensor],
        data: Tensor,
        conditioning: Tensor,
        noise: Tensor,
        t: Tensor,
        mask: Tensor,
        known: Tensor | None = None,
        kept: Kept | None = None,
        pixels: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One training step's loss and its parts: noise the data, let the denoiser predict, compare.

        Args:
            mask: pixels that count, (B, h, w); patches without any of them, or of `known`, are left out of attention.
            known: pixels that are given clean, (B, h, w), and do not count.
            kept: the patches that are computed, where they were found before (`transformer.kept_patches`).
            pixels: see `loss`.
        """
        known = torch.zeros_like(mask) if known is None else known
        x = with_known(self.add_noise(data, noise, t), data, known)
        prediction = denoiser(x, t, conditioning, mask + known if kept is None else kept)[:, : data.shape[1]]
        return self.loss(prediction, data, mask * (1 - known), pixels)


def hiding_noise(length: int) -> float:
    """(1 − t) / t at the time t before which a cell of `length` pixels of ±1 does not tell by itself which token it is.

    Noise hides n pixels that mean one thing as well as one pixel at √n times the noise. With the factor 0.6 two cells
    that differ in half of the pixels are told apart nine times of ten, and one from 255 others hardly ever; sentences
    were learnt well with it (n = 48: noise 4.2, t = 0.19), other factors were not compared.
    """
    return 0.6 * math.sqrt(length)


def with_known(x: Tensor, data: Tensor, known: Tensor) -> Tensor:
    """What a denoiser sees: x (B, C, h, w) with the known pixels (B, h, w) clean, and in one more channel these."""
    known = known[:, None].to(x.dtype)
    return torch.cat([torch.where(known > 0, data, x), known], dim=1)  # (B, C + 1, h, w)
