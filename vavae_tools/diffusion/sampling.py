"""From noise to latents: diffusers' flow-matching solvers, and guidance.

Guidance is by the null condition (classifier-free, Ho & Salimans 2022) or by a weaker model (Karras et al. 2024).

A solver's sigma is the share of noise, 1 − t, and goes down to 0; what it takes as the model's output is the
derivative by sigma, −velocity. RAE's time is that sigma.
"""

from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vavae_tools.diffusion.objectives import shift_noise
from vavae_tools.errors import UserError
from vavae_tools.machine import computing_in

GUIDED_CHANNELS = {"all": None, "first3": 3}
"""Which channels guidance acts on. LightningDiT guides the first three of 32 only ("first3"): its published scales,
such as 6.7 and 10, make sense with that alone. We guide all of them unless told otherwise, by 1.25 to 2.5."""


def guided_velocity(
    denoiser: Callable[..., Tensor],
    x: Tensor,
    t: float,
    conditioning: Tensor,
    null: Tensor | None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: str = "all",
    guide: Callable[..., Tensor] | None = None,
    guide_conditioning: Tensor | None = None,
) -> Tensor:
    """Velocity at x (B, C, h, w) and time t, float32: null + scale · (conditional − null), by one call of the denoiser.

    Outside the interval start ≤ t ≤ end, and with scale 1, it is the conditional one, and only that is computed. An
    interval of RAE's times a to b is 1 − b to 1 − a here.

    Args:
        guide: a weaker denoiser of the same kind, smaller or less trained, in the null's place: autoguidance. The null
            is not asked then and must be None.
        guide_conditioning: the same conditions from the guide's own conditioner; by default `conditioning`.
    """
    if guidance_channels not in GUIDED_CHANNELS:
        raise UserError(f"guidance_channels={guidance_channels!r} is unknown; it is 'all' or 'first3'.")
    start, end = guidance_interval
    rounding = 1e-6  # a grid point that is `start` but for float32's last digit belongs to the interval
    if guidance_scale == 1 or not start - rounding <= t <= end + rounding:
        return denoiser(x, _times(t, x), conditioning).float()
    if guide is not None:
        conditional, weak = _strong_and_weak(denoiser, guide, x, t, conditioning, null, guide_conditioning)
    else:
        conditional, weak = _with_and_without(denoiser, x, t, conditioning, null, guidance_scale)
    guided = torch.lerp(weak, conditional, guidance_scale)
    channels = GUIDED_CHANNELS[guidance_channels]
    return guided if channels is None else torch.cat([guided[:, :channels], conditional[:, channels:]], dim=1)


def _with_and_without(
    denoiser: Callable[..., Tensor], x: Tensor, t: float, conditioning: Tensor, null: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    if null is None:
        raise UserError(
            f"guidance_scale={scale:g} needs the null condition: pass conditioner.null(batch_size), or a guide."
        )
    twice = torch.cat([x, x])
    return denoiser(twice, _times(t, twice), torch.cat([conditioning, null])).float().chunk(2)


def _strong_and_weak(
    denoiser: Callable[..., Tensor],
    guide: Callable[..., Tensor],
    x: Tensor,
    t: float,
    conditioning: Tensor,
    null: Tensor | None,
    guide_conditioning: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if null is not None:
        raise UserError("Guidance is by the null condition or by a guide, not both: pass null=None with a guide.")
    times = _times(t, x)
    of_guide = conditioning if guide_conditioning is None else guide_conditioning
    return denoiser(x, times, conditioning).float(), guide(x, times, of_guide).float()


def _times(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float32, device=x.device)


def time_grid(num_inference_steps: int, timestep_shift: float = 1.0, last_noise: float = 0.0) -> Tensor:
    """Times t, float32 (n + 1,), even in the share of noise from 1 down to `last_noise`, then shifted: `make_solver`'s.

    RAE's grid of N points with its shift s is `time_grid(N - 1, 1 / s, last_noise=0.001)`.
    """
    sigmas = torch.linspace(1, last_noise, num_inference_steps + 1, dtype=torch.float64)
    return (1 - shift_noise(sigmas, 1 / (timestep_shift or 1))).float()


def make_solver(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    timestep_shift: float | None = None,
    last_noise: float = 0.0,
) -> tuple[SchedulerMixin, list[float]]:
    """A fresh copy of the scheduler with its grid laid out, and the time t of each of its model calls.

    Args:
        num_inference_steps: model calls, and so updates (Heun's method makes 2n − 1 calls). LightningDiT's and RAE's
            `num_steps` counts grid points instead, one more: 250 steps are our 249.
        timestep_shift: LightningDiT's s in t → s·t / (1 + (s − 1)·t); 0.3 steps finer near the noise. It is diffusers'
            shift 1/s, and RAE's too: its shift of 6.93 is our timestep_shift 1/6.93. 0 and 1 mean no shift, None leaves
            the scheduler's own.
        last_noise: share of noise, before the shift, at which the last update ends; for Euler's method only. 0, all the
            way to the data, is better; RAE stops at 0.001, which its shift makes 0.007 at 256 pixels.
    """
    if num_inference_steps < 1:
        raise UserError(f"num_inference_steps={num_inference_steps}: at least one step is needed.")
    config = scheduler.config
    if not _solves_flows(config):
        raise UserError(
            f"{type(scheduler).__name__} as configured does not solve flow matching. "
            "Use FlowMatchEulerDiscreteScheduler(), or DPMSolverMultistepScheduler(use_flow_sigmas=True, "
            "prediction_type='flow_prediction')."
        )
    changes = {}
    if timestep_shift is not None:
        if timestep_shift < 0:
            raise UserError(f"timestep_shift={timestep_shift:g}: it is above 0, with 0 or 1 for none.")
        changes["shift" if "shift" in config else "flow_shift"] = 1 / (timestep_shift or 1)
    solver = type(scheduler).from_config(config, **changes)
    if isinstance(solver, FlowMatchEulerDiscreteScheduler) and not config.use_dynamic_shifting:
        _lay_out_euler(solver, num_inference_steps, last_noise)
    elif last_noise:
        raise UserError(f"last_noise={last_noise:g} is for FlowMatchEulerDiscreteScheduler alone: leave it out.")
    else:
        solver.set_timesteps(num_inference_steps)
    solver.set_begin_index(0)  # else the first step looks its place up on the GPU
    # From sigmas, as some solvers round their timesteps to whole numbers. They stay on the CPU: no wait in the loop.
    return solver, [1 - sigma for sigma in solver.sigmas[: len(solver.timesteps)].tolist()]


def _lay_out_euler(solver: FlowMatchEulerDiscreteScheduler, steps: int, last_noise: float) -> None:
    """Its own grid ends at sigma 1/1000 instead of evenly at 1/n, and is shifted twice there."""
    if not 0 <= last_noise < 1:
        raise UserError(f"last_noise={last_noise:g}: it is a share of noise from 0, which is best, to below 1.")
    solver.set_timesteps(sigmas=np.linspace(1, last_noise + (1 - last_noise) / steps, steps))
    if last_noise:
        solver.sigmas[-1] = shift_noise(last_noise, solver.shift)


def _solves_flows(config: dict) -> bool:
    if "prediction_type" in config:
        return config["prediction_type"] == "flow_prediction" and bool(config.get("use_flow_sigmas"))
    return "shift" in config and not config.get("invert_sigmas", False)


def solver_step(solver: SchedulerMixin, output: Tensor, timestep: Tensor, x: Tensor, **options: Any) -> Tensor:
    """The next x by diffusers' own step: in float32 whatever is set around it, and without a wait for the card."""
    with computing_in("32", x.device), _WithoutWaits() if x.device.type == "cuda" else nullcontext():
        return solver.step(output, timestep, x, return_dict=False, **options)[0]


class _WithoutWaits(TorchFunctionMode):
    """What diffusers' solvers make on the CPU goes to the card unwaited for, and they solve equations unchecked.

    UniPC takes shares of noise there one by one, and DDPM the noise of generators that are the CPU's.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and "device" in kwargs:
            return func(*args, **{**kwargs, "device": "cpu"}).pin_memory().to(kwargs["device"], non_blocking=True)
        to_device = func is torch.Tensor.to and isinstance([*args, kwargs.get("device")][1], torch.device)
        if to_device and args[0].device.type == "cpu":
            return func(args[0].pin_memory(), *args[1:], **{**kwargs, "non_blocking": True})
        if func is torch.linalg.solve:
            return torch.linalg.solve_ex(*args, **kwargs).result
        return func(*args, **kwargs)


@torch.no_grad()
def sample(
    denoiser: Callable[..., Tensor],
    scheduler: SchedulerMixin,
    noise: Tensor,
    conditioning: Tensor,
    null: Tensor | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: str = "all",
    timestep_shift: float | None = None,
    callback: Callable[[int, float, Tensor], None] | None = None,
    guide: Callable[..., Tensor] | None = None,
    guide_conditioning: Tensor | None = None,
    last_noise: float = 0.0,
) -> Tensor:
    """Follow the velocity from noise (B, C, h, w) at t = 0 to latents at t = 1; float32, whatever the denoiser is.

    Args:
        scheduler: diffusers' FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, or DPMSolverMultistep- or
            UniPCMultistepScheduler with use_flow_sigmas and prediction_type "flow_prediction". It is not changed.
        conditioning, null: (B, hidden_size), from the conditioner; null is needed for guidance only.
        num_inference_steps, timestep_shift, last_noise: see `make_solver`.
        guidance_scale, guidance_interval, guidance_channels, guide, guide_conditioning: see `guided_velocity`.
        callback: called after each update with its number, the time it started from, and the new x.
    """
    solver, times = make_solver(scheduler, num_inference_steps, timestep_shift, last_noise)
    x = noise.float()
    for i, (timestep, t) in enumerate(zip(solver.timesteps, times, strict=True)):
        velocity = guided_velocity(
            denoiser,
            x,
            t,
            conditioning,
            null,
            guidance_scale,
            guidance_interval,
            guidance_channels,
            guide,
            guide_conditioning,
        )
        x = solver_step(solver, -velocity, timestep, x)
        if callback is not None:
            callback(i, t, x)
    return x


@torch.no_grad()
def sample_midpoint(
    velocity: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    times: Tensor,
    callback: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor:
    """Follow a velocity by the midpoint method: two calls an update, and an error of second order.

    Args:
        velocity: (x, t) → velocity, such as `lambda x, t: guided_velocity(denoiser, x, t, conditioning)`.
        noise: (B, C, h, w), x at the first time.
        times: (n + 1,), from `time_grid`.
        callback: called after each update with its number, the time it started from, and the new x.
    """
    x, times = noise.float(), times.tolist()
    for i, (t, later) in enumerate(pairwise(times)):
        half = (later - t) / 2
        x = x + (later - t) * velocity(x + half * velocity(x, t), t + half)
        if callback is not None:
            callback(i, t, x)
    return x
