"""What a denoiser learns: how data are noised, what is to be predicted, and the loss."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vavae_tools.errors import UserError

PATHS = ("linear", "gvp")


class FlowMatching:
    """Paths x_t = α·data + σ·noise; the velocity dx/dt is predicted (Lipman et al. 2023). Straight ones have α = t.

    As LightningDiT (Yao & Wang 2025): times log-normal, i.e. sigmoid of a normal number, and a loss on the velocity's
    direction beside the squared error. It draws nothing itself: `noise` (standard normal) and `t` are arguments, and
    `time_draws` says what `sample_time` is to be given. `config` keeps the arguments: FlowMatching(**config) is equal.

    RAE's objective (Zheng et al. 2025) is `FlowMatching(cosine_weight=0, largest_noise=0.999,
    time_shift=time_shift_of(latent_shape))`; its "logit-normal_μ_σ" has time_mean −μ, as it counts the noise.

    Args:
        cosine_weight: weight of the direction's loss against the squared error's 1; 0 leaves it out.
        time: "lognorm" (most often in the middle of the path) or "uniform".
        time_mean, time_std: of the normal number in "lognorm"; a mean above 0 learns nearer the data.
        cosine_eps: smallest length of a velocity in the cosine. The reference's 1e-8 gives a vector of exactly zero a
            gradient of about 1e8, and every vector is that in a fresh model (its last layer is zero): in float16 such a
            gradient overflows. 1e-2 tames it and changes nothing else, as true velocities are longer by far.
        time_shift: s in r → s·r / (1 + (s − 1)·r) of the share of noise r = 1 − t; above 1 learns more at high noise,
            as latents of many numbers need (`time_shift_of`).
        largest_noise: times with a larger share of noise, before the shift, are not drawn.
        path: "linear", α = t and σ = 1 − t, or "gvp" (variance-preserving), α = sin(π·t/2) and σ = cos(π·t/2).
    """

    def __init__(
        self,
        cosine_weight: float = 1.0,
        time: str = "lognorm",
        time_mean: float = 0.0,
        time_std: float = 1.0,
        cosine_eps: float = 1e-2,
        time_shift: float = 1.0,
        largest_noise: float = 1.0,
        path: str = "linear",
    ) -> None:
        if time not in ("lognorm", "uniform"):
            raise UserError(f"time={time!r} is unknown; it is 'lognorm' or 'uniform'.")
        _check_path(path)
        if not time_shift > 0:
            raise UserError(f"time_shift={time_shift:g}: it is above 0, with 1 for none.")
        if not 0 < largest_noise <= 1:
            raise UserError(f"largest_noise={largest_noise:g}: it is a share above 0 and up to 1, such as 0.999.")
        self.cosine_weight, self.cosine_eps = cosine_weight, cosine_eps
        self.time, self.time_mean, self.time_std = time, time_mean, time_std
        self.time_shift, self.largest_noise, self.path = time_shift, largest_noise, path
        self.time_draws = "normal" if time == "lognorm" and largest_noise == 1 else "uniform"
        """Which numbers, one per sample, `sample_time` takes: the method's name in `vavae_tools.draws.Draws`."""

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, all plain numbers and names."""
        return {
            "cosine_weight": self.cosine_weight,
            "time": self.time,
            "time_mean": self.time_mean,
            "time_std": self.time_std,
            "cosine_eps": self.cosine_eps,
            "time_shift": self.time_shift,
            "largest_noise": self.largest_noise,
            "path": self.path,
        }

    def sample_time(self, draws: Tensor) -> Tensor:
        """Times in [0, 1] from standard normal or uniform draws (B,), as `time_draws` says.

        With largest_noise below 1 a large draw means much noise, as in RAE; else it means little.
        """
        if self.largest_noise < 1:
            noise_share = self._truncated(draws)
            return 1 - shift_noise(noise_share, self.time_shift)
        t = torch.sigmoid(self.time_mean + self.time_std * draws) if self.time == "lognorm" else draws
        return t if self.time_shift == 1 else 1 - shift_noise(1 - t, self.time_shift)

    def _truncated(self, uniform: Tensor) -> Tensor:
        """Shares of noise up to the largest, by the inverse of their distribution function."""
        if self.time == "uniform":
            return self.largest_noise * uniform
        logit = math.log(self.largest_noise / (1 - self.largest_noise))
        below = NormalDist().cdf((logit + self.time_mean) / self.time_std)  # the share of all draws that is kept
        normal = torch.special.ndtri(below * uniform)
        return torch.sigmoid(self.time_std * normal - self.time_mean).clamp(max=self.largest_noise)

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = path_shares(self.path, expand_time(t, data))
        return alpha * data + sigma * noise

    def target(self, data: Tensor, noise: Tensor, t: Tensor | None = None) -> Tensor:
        """The velocity; straight paths have the same one, data − noise, at all times."""
        if self.path == "linear":
            return data - noise
        if t is None:
            raise UserError(f"The velocity of the path {self.path!r} changes with time: give target its t.")
        alpha_rate, sigma_rate = _path_rates(self.path, expand_time(t, data))
        return alpha_rate * data + sigma_rate * noise

    def loss(self, prediction: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean over the batch, in float32, and its parts; the weights do not depend on t."""
        prediction, target = prediction.float(), self.target(data.float(), noise.float(), t)  # (B, C, h, w)
        mse = (prediction - target).square().mean()
        if self.cosine_weight == 0:
            return mse, {"mse": mse.detach()}
        cosine = 1 - F.cosine_similarity(prediction, target, dim=1, eps=self.cosine_eps).mean()
        return mse + self.cosine_weight * cosine, {"mse": mse.detach(), "cosine": cosine.detach()}

    def squared_error(self, prediction: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The mean squared error of each sample, float32 (B,)."""
        return (prediction.float() - self.target(data.float(), noise.float(), t)).square().flatten(1).mean(1)

    def __call__(
        self, denoiser: Callable[..., Tensor], data: Tensor, conditioning: Tensor, noise: Tensor, t: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One training step's loss and its parts: noise the data, let the denoiser predict, compare."""
        prediction = denoiser(self.add_noise(data, noise, t), t, conditioning)
        return self.loss(prediction, data, noise, t)


def shift_noise(noise_share: Tensor, shift: float) -> Tensor:
    """r → s·r / (1 + (s − 1)·r): for s above 1 nearer to 1, where all is noise (Esser et al. 2024)."""
    return shift * noise_share / (1 + (shift - 1) * noise_share)


def time_shift_of(latent_shape: Sequence[int], base: int = 4096) -> float:
    """√(numbers in a latent / base): the more of them, the more noise hides them equally well (Esser et al. 2024).

    RAE's base of 4096 gives 768×16×16 a shift of 6.93. Below 1, of small latents, RAE takes none.
    """
    return math.sqrt(math.prod(latent_shape) / base)


def path_shares(path: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """How much of data (α) and noise (σ) is in x at time t."""
    _check_path(path)
    if path == "linear":
        return t, 1 - t
    return torch.sin(t * (math.pi / 2)), torch.cos(t * (math.pi / 2))


def _path_rates(path: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """The derivatives of `path_shares` by t."""
    if path == "linear":
        return torch.ones_like(t), -torch.ones_like(t)
    return torch.cos(t * (math.pi / 2)) * (math.pi / 2), torch.sin(t * (math.pi / 2)) * (-math.pi / 2)


def _check_path(path: str) -> None:
    if path not in PATHS:
        raise UserError(f"path={path!r} is unknown; it is {' or '.join(map(repr, PATHS))}.")


def score_from_velocity(velocity: Tensor, x: Tensor, t: Tensor, path: str = "linear") -> Tensor:
    """∇ log p_t(x) = −noise / σ for t < 1, with the noise that x and its velocity tell: x − t·v on straight paths."""
    t = expand_time(t, x)
    if path == "linear":
        return (t * velocity - x) / (1 - t)
    alpha, sigma = path_shares(path, t)
    alpha_rate, sigma_rate = _path_rates(path, t)
    noise = (alpha_rate * x - alpha * velocity) / (alpha_rate * sigma - alpha * sigma_rate)
    return -noise / sigma


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """(B,) → (B, 1, 1, …), to multiply x with."""
    return t.view(-1, *[1] * (x.ndim - 1))
