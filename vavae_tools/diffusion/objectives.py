"""What a denoiser learns: how data are noised, what is to be predicted, and the loss; chosen by `make_objective`."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import NormalDist
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from vavae_tools.diffusion.layers import TokenSubset
from vavae_tools.runtime.errors import UserError, check_known

Denoiser = Callable[..., Tensor]


class Objective:
    """Base of the objectives. They draw nothing themselves: `noise` (standard normal) and `t` are arguments."""

    prediction: str  # by diffusers' names: "flow_prediction", "sample", "epsilon" or "v_prediction"
    path: str  # how data and noise are mixed: "linear", "gvp", or "discrete", a schedule of timesteps
    time_distribution: str  # which draws (B,) `sample_time` takes, a method of `runtime.draws.Draws`
    normalised = "channels"
    cosine_weight = 0.0
    cosine_eps = 1e-2

    @property
    def config(self) -> dict[str, Any]:
        """The arguments, plain numbers and names, for `objective_of`."""
        return asdict(self)

    def loss(
        self, prediction: Tensor, data: Tensor, noise: Tensor, t: Tensor, *masked: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean over the batch, in float32, and its parts; `masked` are `__call__`'s mask and pixels."""
        prediction, target = prediction.float(), self.target(data.float(), noise.float(), t)
        mse = self._mean((prediction - target).square(), *masked)
        if self.cosine_weight == 0:
            return mse, {"mse": mse.detach()}
        alike = F.cosine_similarity(prediction, target, dim=1, eps=self.cosine_eps)[:, None]  # (B, 1, h, w)
        cosine = 1 - self._mean(alike, *masked)
        return mse + self.cosine_weight * cosine, {"mse": mse.detach(), "cosine": cosine.detach()}

    def _mean(self, values: Tensor, mask: Tensor | None = None, pixels: Tensor | None = None) -> Tensor:
        """Return Σ values·mask / (Σ mask · C + 1e-8), or without C, of values (B, C, h, w) and a mask (B, h, w)."""
        of_pixels = self.normalised == "pixels"
        if mask is None:
            return values.mean() * (values.shape[1] if of_pixels else 1)
        count = mask.sum() if pixels is None else pixels
        return (values * mask[:, None]).sum() / (count * (1 if of_pixels else values.shape[1]) + 1e-8)

    def __call__(
        self,
        denoiser: Denoiser,
        data: Tensor,
        conditioning: Any,
        noise: Tensor,
        t: Tensor,
        mask: Tensor | None = None,
        known: Tensor | None = None,
        kept: TokenSubset | None = None,
        pixels: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return one training step's loss and its parts: noise the data, let the denoiser predict, compare.

        Args:
            mask: pixels that count, (B, h, w); patches without any of them, or of `known`, are left out of attention,
                and the denoiser sees in one more channel what is known. None: all count, and there is no such channel.
            known: pixels that are given clean, (B, h, w), and do not count.
            kept: the patches that are computed, where they were found before (`layers.select_tokens`).
            pixels: what the sum is divided by in place of this batch's own Σ mask, where others share the step.
        """
        x = self.add_noise(data, noise, t)
        if mask is None:
            return self.loss(denoiser(x, t, conditioning), data, noise, t)
        known = torch.zeros_like(mask) if known is None else known
        prediction = denoiser(with_known(x, data, known), t, conditioning, mask + known if kept is None else kept)
        return self.loss(prediction[:, : data.shape[1]], data, noise, t, mask * (1 - known), pixels)

    def as_solver_input(self, denoiser: Denoiser) -> Denoiser:
        """Return the denoiser, predicting what this objective's solvers take."""
        return denoiser


class _PathObjective(Objective):
    """x_t = α·data + σ·noise at times t from 0 to 1; see `FlowMatching`."""

    path = "linear"
    largest_noise = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.largest_noise <= 1:
            raise UserError(f"largest_noise={self.largest_noise:g}: it is a share above 0 and up to 1, such as 0.999.")
        self.time_distribution = "normal" if self.time == "lognorm" and self.largest_noise == 1 else "uniform"

    def sample_time(self, draws: Tensor) -> Tensor:
        """Return times in [0, 1] from standard normal or uniform draws (B,), as `time_distribution` says.

        With largest_noise below 1 a large draw means much noise, as in RAE; else it means little.
        """
        if self.largest_noise == 1:
            t = torch.sigmoid(self.time_mean + self.time_std * draws) if self.time == "lognorm" else draws
            return t if self.time_shift == 1 else 1 - shift_noise(1 - t, self.time_shift)
        noise = self.largest_noise * draws
        if self.time == "lognorm":  # by the inverse of the distribution function of those that are kept
            logit = math.log(self.largest_noise / (1 - self.largest_noise))
            kept = NormalDist().cdf((logit + self.time_mean) / self.time_std)  # the share of all draws
            noise = torch.sigmoid(self.time_std * torch.special.ndtri(kept * draws) - self.time_mean)
            noise = noise.clamp(max=self.largest_noise)
        return 1 - shift_noise(noise, self.time_shift)

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.shares(expand_time(t, data))
        return alpha * data + sigma * noise

    def shares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return how much of data (α) and noise (σ) is in x at time t."""
        return path_shares(self.path, t)[:2]

    def time_at(self, ratio: Tensor) -> Tensor:
        """Return the time at which x has data and noise in this ratio (B,), of a schedule the nearest."""
        return ratio / (1 + ratio) if self.path == "linear" else ratio.atan() * (2 / math.pi)


@dataclass
class FlowMatching(_PathObjective):
    """Paths x_t = α·data + σ·noise; the velocity dx/dt is predicted (Lipman et al. 2023). The defaults: LightningDiT's.

    RAE's objective (Zheng et al. 2025) is `FlowMatching(cosine_weight=0, largest_noise=0.999,
    time_shift=time_shift_of(latent_shape))`; its "logit-normal_μ_σ" has time_mean −μ.

    Args:
        cosine_weight: weight of the velocity's direction against the squared error's 1.
        time: "lognorm", the sigmoid of a normal number, most often in the middle of the path, or "uniform".
        time_mean, time_std: of that normal number; a mean above 0 learns nearer the data.
        cosine_eps: smallest length of a velocity in the cosine. The reference's 1e-8 gives a vector of exactly zero,
            as all are in a fresh model, a gradient of about 1e8, which overflows in float16.
        time_shift: s of `shift_noise`; above 1 learns more at high noise, as latents of many numbers need.
        largest_noise: times with a larger share of noise, before the shift, are not drawn.
        path: "linear", α = t and σ = 1 − t, or "gvp" (variance-preserving), α = sin(π·t/2) and σ = cos(π·t/2).
    """

    prediction = "flow_prediction"

    cosine_weight: float = 1.0
    time: str = "lognorm"
    time_mean: float = 0.0
    time_std: float = 1.0
    cosine_eps: float = 1e-2
    time_shift: float = 1.0
    largest_noise: float = 1.0
    path: str = "linear"

    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        if self.path == "linear":
            return data - noise
        *_, alpha_rate, sigma_rate = path_shares(self.path, expand_time(t, data))
        return alpha_rate * data + sigma_rate * noise

    def clean(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """Return the data that a prediction at x and times t (B,) means."""
        return unmix(prediction, x, t, self.path)[0]


def shift_noise(noise_share: Tensor, shift: float) -> Tensor:
    """r → s·r / (1 + (s − 1)·r): for s above 1 nearer to 1, where all is noise (Esser et al. 2024)."""
    return shift * noise_share / (1 + (shift - 1) * noise_share)


def time_shift_of(latent_shape: Sequence[int], base: int = 4096) -> float:
    """Return √(numbers in a latent / base): more of them need more noise to be hidden as well (Esser et al. 2024).

    RAE's base of 4096 gives 768×16×16 a shift of 6.93. Below 1, of small latents, RAE takes none.
    """
    return math.sqrt(math.prod(latent_shape) / base)


def path_shares(path: str, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return how much of data (α) and noise (σ) is in x at time t, and the derivatives of both by t."""
    if path == "linear":
        return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
    angle = t * (math.pi / 2)
    return angle.sin(), angle.cos(), angle.cos() * (math.pi / 2), angle.sin() * (-math.pi / 2)


def unmix(velocity: Tensor, x: Tensor, t: Tensor, path: str = "linear") -> tuple[Tensor, Tensor]:
    """Return data and noise of x = α·data + σ·noise and its velocity α'·data + σ'·noise at times t (B,)."""
    alpha, sigma, alpha_rate, sigma_rate = path_shares(path, expand_time(t, x))
    determinant = alpha_rate * sigma - alpha * sigma_rate
    return (sigma * velocity - sigma_rate * x) / determinant, (alpha_rate * x - alpha * velocity) / determinant


def expand_time(t: Tensor, x: Tensor) -> Tensor:
    """(B,) → (B, 1, 1, …), to multiply x with."""
    return t.view(-1, *[1] * (x.ndim - 1))


@dataclass
class SamplePrediction(_PathObjective):
    """x_t = t·data + (1 − t)·noise; the data (x0) are predicted, Σ (x̂ − x)²·mask / (Σ mask · C + 1e-8).

    With normalised="pixels" it is without C, so C times larger. Texts are decided where noise just hides a token: there
    a time_mean of −ln of `noise_level_hiding_a_token` learns most.
    """

    prediction = "sample"

    normalised: str = "channels"
    time: str = "uniform"
    time_mean: float = 0.0
    time_std: float = 1.0
    time_shift: float = 1.0

    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return data

    def clean(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        return prediction

    def as_solver_input(self, denoiser: Denoiser) -> Denoiser:
        """Return a denoiser that predicts the velocity, (x̂ − x) / (1 − t), as solvers of flows take it."""

        def velocity(x: Tensor, t: Tensor, *conditions: Any) -> Tensor:
            return (denoiser(x, t, *conditions).float() - x) / (1 - expand_time(t, x))

        return velocity


def noise_level_hiding_a_token(length: int) -> float:
    """Return (1 − t) / t at the time t before which a cell of `length` pixels of ±1 does not show its token by itself.

    Noise hides n pixels that mean one thing as well as one pixel at √n times the noise. With the factor 0.6 two cells
    that differ in half of the pixels are told apart nine times of ten, and one from 255 others hardly ever.
    """
    return 0.6 * math.sqrt(length)


def with_known(x: Tensor, data: Tensor, known: Tensor) -> Tensor:
    """x (B, C, h, w) with the known pixels (B, h, w) clean, and in one more channel these: (B, C + 1, h, w)."""
    known = known[:, None].to(x.dtype)
    return torch.cat([torch.where(known > 0, data, x), known], dim=1)


@dataclass
class NoisePrediction(Objective):
    """x = √ᾱ·data + √(1 − ᾱ)·noise on diffusers' schedule of 1000 steps; see `time_of` for its times.

    Args:
        prediction: "epsilon", the noise (Ho et al. 2020), or "v_prediction", √ᾱ·noise − √(1 − ᾱ)·data (Salimans & Ho
            2022).
        betas: "scaled_linear", as Stable Diffusion, or "linear", as DDPM, where beta_start and beta_end are not given.
    """

    path, time_distribution = "discrete", "uniform"

    prediction: str = "epsilon"
    betas: str = "scaled_linear"
    beta_start: float | None = None
    beta_end: float | None = None
    num_timesteps: int = 1000

    def __post_init__(self) -> None:
        first, last = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}[self.betas]
        self.beta_start = first if self.beta_start is None else self.beta_start
        self.beta_end = last if self.beta_end is None else self.beta_end
        betas = {"beta_schedule": self.betas, "beta_start": self.beta_start, "beta_end": self.beta_end}
        self.schedule = {"num_train_timesteps": self.num_timesteps, "prediction_type": self.prediction, **betas}
        self.scheduler = DDPMScheduler(**self.schedule)

    def sample_time(self, draws: Tensor) -> Tensor:
        steps = (draws * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)
        return time_of(steps, self.num_timesteps)

    def timestep_of(self, t: Tensor) -> Tensor:
        """The schedule's timestep, int64, at or nearest to each time."""
        return ((1 - t.double()) * self.num_timesteps - 0.5).round().long().clamp(0, self.num_timesteps - 1)

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.scheduler.add_noise(data, noise, self.timestep_of(t))

    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise if self.prediction == "epsilon" else self.scheduler.get_velocity(data, noise, self.timestep_of(t))

    def shares(self, t: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.scheduler.alphas_cumprod.to(t.device)[self.timestep_of(t)]
        return kept.sqrt(), (1 - kept).sqrt()

    def time_at(self, ratio: Tensor) -> Tensor:
        kept = self.scheduler.alphas_cumprod.to(ratio.device)
        nearest = (kept.sqrt() / (1 - kept).sqrt() - ratio[:, None]).abs().argmin(1)
        return time_of(nearest, self.num_timesteps)

    def clean(self, prediction: Tensor, x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = self.shares(expand_time(t, x))
        return (x - sigma * prediction) / alpha if self.prediction == "epsilon" else alpha * x - sigma * prediction


def time_of(timestep: Tensor, num_timesteps: int = 1000) -> Tensor:
    """Return the time, float32 in (0, 1), of a timestep, which counts from data to noise."""
    return (1 - (timestep.double() + 0.5) / num_timesteps).float()


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "flow_matching": FlowMatching,
    "epsilon": partial(NoisePrediction, "epsilon"),
    "v_prediction": partial(NoisePrediction, "v_prediction"),
    "sample": SamplePrediction,
}
ALIASES = {"v": "v_prediction", "x0": "sample"}


def make_objective(name: str, **numbers: Any) -> Objective:
    """Return an objective by a name of `OBJECTIVES` or `ALIASES`; of its arguments those that are None are left out."""
    check_known("objective", name, [*OBJECTIVES, *ALIASES])
    made, numbers = OBJECTIVES[ALIASES.get(name, name)], {k: v for k, v in numbers.items() if v is not None}
    for number in sorted(numbers):
        check_known("argument", number, inspect.signature(made).parameters, f" of the objective {name}")
    return made(**numbers)


def objective_of(config: Mapping[str, Any]) -> Objective:
    """Return the objective whose `config` this is, such as a checkpoint's hyper_parameters["objective"]."""
    made = NoisePrediction if "prediction" in config else SamplePrediction if "normalised" in config else FlowMatching
    return made(**config)
