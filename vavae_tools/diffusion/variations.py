"""Sampling that begins with an image's latents: part of the way, with a part kept, or from the noise they come from."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from vavae_tools.diffusion import solvers
from vavae_tools.diffusion.objectives import Denoiser, Objective
from vavae_tools.runtime.errors import UserError


@dataclass(frozen=True)
class Start:
    """What `solvers.sample` begins with beside noise.

    Args:
        data: normalised latents (B, C, h, w); None: what it is given as noise is x at the start already.
        strength: where it begins, 1 − t: near 0 the data, 1 noise alone; on a schedule the step nearest to it.
        mask: bool (B, 1, h, w), true where something new is made; elsewhere the data come out bit by bit.
    """

    data: Tensor | None
    strength: float = 1.0
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        usual_strength(self.strength)  # which refuses what is none

    def __getitem__(self, rows: Any) -> "Start":
        data, mask = (given if given is None else given[rows] for given in (self.data, self.mask))
        return Start(data, self.strength, mask)

    def cut(self, solver: SchedulerMixin, times: list[float]) -> list[float]:
        """Leave out the steps before the start in a solver that is laid out, and return the times that are left."""
        if self.strength == 1:
            return times
        t, starts, flow = 1 - self.strength, times[:: solver.order], solvers.solves_flows(solver)
        if flow:  # the step within which it begins is shortened
            first = max((k for k, start in enumerate(starts) if start <= t), default=0)
        else:
            first = min(range(len(starts) + 1), key=lambda k: abs([*starts, 1.0][k] - t))
        calls = first * solver.order
        solver.timesteps = solver.timesteps[calls:]
        if hasattr(solver, "sigmas"):
            solver.sigmas = solver.sigmas[calls:].clone()
        if not flow:
            return times[calls:]
        solver.sigmas[0] = self.strength
        if isinstance(solver, solvers.MidpointScheduler):
            solver.sigmas[1] = solver.sigmas[:3:2].mean()
        return [1 - sigma for sigma in solver.sigmas[: len(solver.timesteps)].tolist()]

    def first(self, noise: Tensor, t: float, objective: Objective) -> Tensor:
        """Return the x to begin with, at the first of the times that are left."""
        return noise if self.strength == 1 or self.data is None else self.noised(noise, t, objective)

    def noised(self, noise: Tensor, t: float, objective: Objective) -> Tensor:
        """Return the data as they are at time t, with this noise."""
        data = self.data.float()
        return data if t == 1 else objective.add_noise(data, noise, torch.full((len(data),), t, device=data.device))

    def kept(self, x: Tensor, noise: Tensor, t: float, objective: Objective) -> Tensor:
        """Return x with what the mask keeps as it is at time t."""
        return x if self.mask is None else torch.where(self.mask, x, self.noised(noise, t, objective))


def usual_strength(strength: float | None, mask: Any = None, usual: float = 0.6) -> float:
    """Return the strength, by default diffusers' 0.6 for flows, and with a mask 1: no trace of what was there."""
    strength = (usual if mask is None else 1.0) if strength is None else strength
    if not 0 < strength <= 1:
        raise UserError(f"strength {strength:g}: it is above 0, the image itself, and up to 1, noise alone")
    return strength


def first_order(scheduler: SchedulerMixin, objective: Objective) -> SchedulerMixin:
    """Return what `invert` undoes, with the scheduler's shift or schedule: Euler's method, of a schedule DDIM."""
    return solvers.swapped(scheduler, "ddim" if objective.path == "discrete" else "euler", objective)


@torch.no_grad()
def invert(
    denoiser: Denoiser,
    scheduler: SchedulerMixin,
    data: Tensor,
    conditioning: Any,
    num_inference_steps: int = 50,
    strength: float = 1.0,
    timestep_shift: float | None = None,
    objective: Objective | None = None,
    rounds: int = 3,
) -> Tensor:
    """Return x (B, C, h, w), float32, which `first_order` of the scheduler takes to these latents; at 1 it is noise.

    A step back solves y = a·x + b·prediction(x) for x by `rounds` of fixed-point iteration (Pan et al. 2023): one is
    DDIM's own inversion. Other arguments are those of `Start` and `solvers.sample`.
    """
    objective = objective or solvers.objective_solved_by(scheduler)
    one_step = first_order(scheduler, objective)
    laid_out = solvers.lay_out(one_step, num_inference_steps, timestep_shift, objective=objective)
    times = Start(None, strength).cut(*laid_out)
    flow, model, x = objective.path != "discrete", objective.as_solver_input(denoiser), data.float()
    for t, later in reversed([*pairwise([*times, 1.0])]):
        (alpha, sigma), (to_alpha, to_sigma) = ([share.item() for share in _shares(objective, at)] for at in (t, later))
        a, b = (1.0, later - t) if flow else (to_alpha / alpha, to_sigma - sigma * to_alpha / alpha)
        y, at = x, torch.full((len(x),), t, device=x.device)
        for _ in range(rounds):
            prediction = solvers.guided_prediction(model, x, t, conditioning)
            if not flow:
                prediction = (x - alpha * objective.clean(prediction, x, at)) / sigma
            x = (y - b * prediction) / a
    return x


def _shares(objective: Objective, t: float) -> tuple[Tensor, Tensor]:
    return (torch.ones(1), torch.zeros(1)) if t == 1 else objective.shares(torch.tensor([t], dtype=torch.float64))


def slerp(one: Tensor, other: Tensor, weights: Tensor) -> Tensor:
    """Return noise (N, C, h, w) on the arc from `one` to `other`, (C, h, w) both, at weights (N,) from 0 to 1.

    Between two draws of noise it is as long as noise is, which a straight line's middle is not.
    """
    cosine = torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0)
    angle, weights = cosine.clamp(-1, 1).acos(), weights.view(-1, 1, 1, 1).to(one)
    if angle < 1e-3:  # of one image with itself
        return torch.lerp(one[None], other[None], weights)
    return ((1 - weights) * angle).sin() / angle.sin() * one + (weights * angle).sin() / angle.sin() * other
