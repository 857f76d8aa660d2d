"""What a denoiser learns: how data are noised, what is to be predicted, and the loss."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from vavae_tools.errors import UserError


class FlowMatching:
    """Straight paths x_t = t·data + (1 − t)·noise; the velocity data − noise is predicted (Lipman et al. 2023).

    As LightningDiT (Yao & Wang 2025): times log-normal, i.e. sigmoid of a normal number, and a loss on the velocity's
    direction beside the squared error. It draws nothing itself: `noise` (standard normal) and `t` are arguments, and
    `time_draws` says what `sample_time` is to be given.

    Args:
        cosine_weight: weight of the direction's loss against the squared error's 1.
        time: "lognorm" (most often in the middle of the path) or "uniform".
        time_mean, time_std: of the normal number in "lognorm"; a mean above 0 learns nearer the data.
        cosine_eps: smallest length of a velocity in the cosine. The reference's 1e-8 gives a vector of exactly zero a
            gradient of about 1e8, and every vector is that in a fresh model (its last layer is zero): in float16 such a
            gradient overflows. 1e-2 tames it and changes nothing else, as true velocities are longer by far.
    """

    def __init__(
        self,
        cosine_weight: float = 1.0,
        time: str = "lognorm",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        cosine_eps: float = 1e-8,
    ) -> None:
        if time not in ("lognorm", "uniform"):
            raise UserError(f"time={time!r} is unknown; it is 'lognorm' or 'uniform'.")
        self.cosine_weight, self.cosine_eps = cosine_weight, cosine_eps
        self.time, self.time_mean, self.time_std = time, time_mean, time_std
        self.time_draws = "normal" if time == "lognorm" else "uniform"
        """Which numbers, one per sample, `sample_time` takes: the method's name in `vavae_tools.draws.Draws`."""

    def sample_time(self, draws: Tensor) -> Tensor:
        """Times in [0, 1] from standard normal ("lognorm") or uniform ("uniform") draws (B,)."""
        return torch.sigmoid(self.time_mean + self.time_std * draws) if self.time == "lognorm" else draws

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        t = expand_time(t, data)
        return t * data + (1 - t) * noise

    def target(self, data: Tensor, noise: Tensor) -> Tensor:
        return data - noise

    def loss(self, prediction: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the batch, in float32, and its parts; the weights do not depend on t."""
        prediction, target = prediction.float(), self.target(data.float(), noise.float())  # (B, C, h, w)
        mse = (prediction - target).square().mean()
        cosine = 1 - F.cosine_similarity(prediction, target, dim=1, eps=self.cosine_eps).mean()
        return mse + self.cosine_weight * cosine, {"mse": mse.detach(), "cosine": cosine.detach()}

    def __call__(
        self, denoiser: Callable[..., Tensor], data: Tensor, conditioning: Tensor, noise: Tensor, t: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One training step's loss and its parts: noise the data, let the denoiser predict, compare."""
        prediction = denoiser(self.add_noise(data, noise, t), t, conditioning)
        return self.loss(prediction, data, noise, t)


def score_from_velocity(velocity: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """∇ log p_t(x) of the straight path, for t < 1: x's noise is x − t·v, and the score is −noise / (1 − t)."""
    t = expand_time(t, x)
    return (t * velocity - x) / (1 - t)


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """(B,) → (B, 1, 1, …), to multiply x with."""
    return t.view(-1, *[1] * (x.ndim - 1))
