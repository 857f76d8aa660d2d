"""Learning to tell the noise (DDPM, Ho et al. 2020), or v (Salimans & Ho 2022), on diffusers' schedule; and the choice
between that and flow matching by name."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor

from vavae_tools.diffusion.objectives import FlowMatching
from vavae_tools.errors import UserError

PREDICTIONS = ("epsilon", "v_prediction")
BETAS = {"scaled_linear": (0.00085, 0.012), "linear": (0.0001, 0.02)}
"""Schedules by diffusers' names, with their first and last noise: Stable Diffusion's, and DDPM's own."""


class NoisePrediction:
    """x = √ᾱ·data + √(1 − ᾱ)·noise on a schedule of 1000 steps; the noise (or v) is predicted, by the squared error.

    It is called as `FlowMatching` is. Our times run the other way, from noise at t = 0 to data at t = 1: timestep n of
    the schedule is t = 1 − (n + ½) / 1000, in training and in sampling alike (`time_of`, `timestep_of`). `config` keeps
    the arguments: NoisePrediction(**config) is equal.

    Args:
        prediction: "epsilon", the noise, or "v_prediction", √ᾱ·noise − √(1 − ᾱ)·data.
        betas: "scaled_linear", as Stable Diffusion, or "linear", as DDPM.
        beta_start, beta_end: noise of the first and the last step; by default those of the schedule's name.
        num_timesteps: of the schedule.
    """

    time_draws = "uniform"
    """Which numbers, one per sample, `sample_time` takes: the method's name in `vavae_tools.draws.Draws`."""

    def __init__(
        self,
        prediction: str = "epsilon",
        betas: str = "scaled_linear",
        beta_start: float | None = None,
        beta_end: float | None = None,
        num_timesteps: int = 1000,
    ) -> None:
        if prediction not in PREDICTIONS:
            raise UserError(f"prediction={prediction!r} is unknown; it is {' or '.join(map(repr, PREDICTIONS))}.")
        if betas not in BETAS:
            raise UserError(f"betas={betas!r} is unknown; it is {' or '.join(map(repr, BETAS))}.")
        start, end = BETAS[betas]
        self.prediction, self.betas, self.num_timesteps = prediction, betas, num_timesteps
        self.beta_start = start if beta_start is None else beta_start
        self.beta_end = end if beta_end is None else beta_end
        if not 0 < self.beta_start <= self.beta_end < 1 or num_timesteps < 1:
            raise UserError(
                f"beta_start={self.beta_start:g}, beta_end={self.beta_end:g}, num_timesteps={num_timesteps}: expected "
                "shares of noise that rise between 0 and 1, and at least one step."
            )
        self.scheduler = DDPMScheduler(**self.schedule)

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, all plain numbers and names."""
        names = ("prediction", "betas", "beta_start", "beta_end", "num_timesteps")
        return {name: getattr(self, name) for name in names}

    @property
    def schedule(self) -> dict[str, Any]:
        """The same for a scheduler of diffusers."""
        return {
            "num_train_timesteps": self.num_timesteps,
            "beta_schedule": self.betas,
            "beta_start": self.beta_start,
            "beta_end": self.beta_end,
            "prediction_type": self.prediction,
        }

    def sample_time(self, draws: Tensor) -> Tensor:
        """Times of timesteps that are equally likely, from uniform draws (B,)."""
        steps = (draws * self.num_timesteps).long().clamp(max=self.num_timesteps - 1)
        return time_of(steps, self.num_timesteps)

    def timestep_of(self, t: Tensor) -> Tensor:
        """The schedule's timestep, int64, at or nearest to each time."""
        return ((1 - t.double()) * self.num_timesteps - 0.5).round().long().clamp(0, self.num_timesteps - 1)

    def add_noise(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return self.scheduler.add_noise(data, noise, self.timestep_of(t))

    def target(self, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What is to be predicted."""
        return noise if self.prediction == "epsilon" else self.scheduler.get_velocity(data, noise, self.timestep_of(t))

    def loss(self, prediction: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean squared error over the batch, in float32, and its parts."""
        mse = F.mse_loss(prediction.float(), self.target(data.float(), noise.float(), t))
        return mse, {"mse": mse.detach()}

    def squared_error(self, prediction: Tensor, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """The mean squared error of each sample, float32 (B,)."""
        return (prediction.float() - self.target(data.float(), noise.float(), t)).square().flatten(1).mean(1)

    def __call__(
        self, denoiser: Callable[..., Tensor], data: Tensor, conditioning: Any, noise: Tensor, t: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One training step's loss and its parts: noise the data, let the denoiser predict, compare."""
        prediction = denoiser(self.add_noise(data, noise, t), t, conditioning)
        return self.loss(prediction, data, noise, t)


def time_of(timestep: Tensor | float, num_timesteps: int = 1000) -> Any:
    """Our time, in (0, 1), of a timestep of a noise schedule: 1 − (timestep + ½) / num_timesteps; float32 of tensors.

    >>> time_of(0), time_of(999)
    (0.9995, 0.0005)
    """
    if isinstance(timestep, torch.Tensor):
        return (1 - (timestep.double() + 0.5) / num_timesteps).float()
    return round(1 - (timestep + 0.5) / num_timesteps, 12)


OBJECTIVES: dict[str, Callable[..., NoisePrediction | FlowMatching]] = {
    "epsilon": lambda **numbers: NoisePrediction(prediction="epsilon", **numbers),
    "v_prediction": lambda **numbers: NoisePrediction(prediction="v_prediction", **numbers),
    "flow_matching": FlowMatching,
}


def make_objective(name: str, **numbers: Any) -> NoisePrediction | FlowMatching:
    """What is learned, by name: "epsilon" (DDPM), "v_prediction" or "flow_matching".

    Args:
        numbers: arguments of `NoisePrediction` or `FlowMatching`.

    Raises:
        UserError: an unknown name, or an argument that it does not have.
    """
    if name not in OBJECTIVES:
        raise UserError(f"No objective {name!r}; there are {', '.join(OBJECTIVES)}.")
    made = FlowMatching if name == "flow_matching" else NoisePrediction
    known = inspect.signature(made.__init__).parameters.keys() - {"self", "prediction"}
    unknown = sorted(numbers.keys() - known)
    if unknown:
        raise UserError(f"The objective {name} has no {', '.join(unknown)}; it has {', '.join(sorted(known))}.")
    return OBJECTIVES[name](**numbers)


def objective_of(config: Mapping[str, Any]) -> NoisePrediction | FlowMatching:
    """The objective whose `config` this is, such as a checkpoint's hyper_parameters["objective"]."""
    return NoisePrediction(**config) if "prediction" in config else FlowMatching(**config)
