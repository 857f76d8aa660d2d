"""From noise to latents: diffusers' flow-matching solvers, and guidance.

Guidance is by the null condition (classifier-free, Ho & Salimans 2022) or by a weaker model (Karras et al. 2024).

A solver's sigma is the share of noise, 1 − t, and goes down to 0; what it takes as the model's output is the
derivative by sigma, −velocity. RAE's time is that sigma.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    SchedulerMixin,
    UniPCMultistepScheduler,
)
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vavae_tools.diffusion.objectives import NoisePrediction, path_shares, score_from_velocity, shift_noise, time_of
from vavae_tools.diffusion.text_conditioning import TextCondition
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.precision import computing_in

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


_FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SOLVERS: dict[str, Callable[[float], SchedulerMixin]] = {
    "euler": lambda shift: FlowMatchEulerDiscreteScheduler(shift=shift),
    "heun": lambda shift: FlowMatchHeunDiscreteScheduler(shift=shift),
    "dpm++": lambda shift: DPMSolverMultistepScheduler(flow_shift=shift, **_FLOW),
    "unipc": lambda shift: UniPCMultistepScheduler(flow_shift=shift, **_FLOW),
}


def solver(time_shift: float = 1.0, name: str = "euler") -> SchedulerMixin:
    """Euler's method, or another of `SOLVERS`, on even steps, or on steps finer near the noise by training's shift.

    `timestep_shift=0.3` at sampling gives the grid of LightningDiT's recipe.
    """
    return SOLVERS[name](time_shift)


# ---- From noise to latents by a stochastic differential equation: fresh noise in every step, and less than is taken
# away
#
# For any amount of diffusion w ≥ 0, dx = (v + w·score)·dt + √(2w)·dW has the same x at every time as the velocity v
# alone (Albergo et al. 2023, Ma et al. 2024): what one step gets wrong, later noise can hide and later steps mend.


DIFFUSIONS: dict[str, Callable[[float, float, float], float]] = {  # of the share of noise r, σ and a factor
    "sigma": lambda r, sigma, norm: norm * sigma,
    "linear": lambda r, sigma, norm: norm * r,
    "constant": lambda r, sigma, norm: norm,
    "decreasing": lambda r, sigma, norm: 0.25 * (norm * math.cos(math.pi * (1 - r)) + 1) ** 2,
    "increasing-decreasing": lambda r, sigma, norm: norm * math.sin(math.pi * (1 - r)) ** 2,
}
"""How strong the diffusion w is along the way, by the names of SiT and RAE; with "SBDM" it would begin at infinity."""

LAST_STEPS = ("mean", "tweedie", "euler", "none")


@torch.no_grad()
def sample_stochastic(
    velocity: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    times: Tensor,
    increments: Iterable[Tensor],
    diffusion: str = "sigma",
    diffusion_norm: float = 1.0,
    method: str = "euler",
    last_step: str = "mean",
    last_step_size: float | None = None,
    path: str = "linear",
    callback: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor:
    """Follow a velocity and the score it implies from noise to latents (B, C, h, w), float32.

    Args:
        velocity: (x, t) → velocity, such as `lambda x, t: guided_velocity(denoiser, x, t, conditioning)`.
        noise: (B, C, h, w), x at the first time.
        times: (n + 1,), from `time_grid`. They must end before 1, where the score is infinite: RAE's N steps of shift s
            are `time_grid(N - 1, 1 / s, last_noise=0.04)`.
        increments: n standard normal tensors like noise, one for each update, drawn by the caller.
        diffusion, diffusion_norm: see `DIFFUSIONS`, and its factor.
        method: "euler" (Euler–Maruyama), or "heun" with two calls an update.
        last_step: how the rest of the noise goes, by one more call without fresh noise: "mean" and "euler" one update
            with and without the score, "tweedie" straight to the expected data; "none" leaves it in.
        last_step_size: the share of noise that this last call takes x to have. By default what it has at the last
            time; RAE takes the 0.04 of before its shift, where x still has 0.22.
        path: as in `FlowMatching`.
        callback: called after each update, the last one too, with its number, the time it started from, and the new x.

    Raises:
        UserError: a name that does not exist, or fewer increments than updates.
    """
    for name, value, known in (
        ("diffusion", diffusion, DIFFUSIONS),
        ("method", method, STEPS),
        ("last_step", last_step, LAST_STEPS),
    ):
        if value not in known:
            raise UserError(f"{name}={value!r} is unknown; it is {', '.join(known)}.")

    def strength(t: float) -> float:
        sigma = path_shares(path, torch.tensor(t, dtype=torch.float64))[1].item()
        return DIFFUSIONS[diffusion](1 - t, sigma, diffusion_norm)

    def drift(x: Tensor, t: float) -> Tensor:
        v = velocity(x, t)
        return v + strength(t) * score_from_velocity(v, x, _batch(t, x), path)

    x, times, increments = noise.float(), times.tolist(), iter(increments)
    for i, (t, later) in enumerate(pairwise(times)):
        increment = next(increments, None)
        if increment is None:
            raise UserError(f"There are {i} increments for {len(times) - 1} updates: one is needed for each.")
        kick = math.sqrt(2 * strength(t) * (later - t)) * increment
        x = STEPS[method](drift, x, kick, t, later)
        if callback is not None:
            callback(i, t, x)
    size = 1 - times[-1] if last_step_size is None else last_step_size
    if last_step != "none" and size > 0:
        x = _last_step(last_step, velocity, drift, x, size, path)
        if callback is not None:
            callback(len(times) - 1, 1 - size, x)
    return x


def euler_maruyama_step(
    drift: Callable[[Tensor, float], Tensor], x: Tensor, kick: Tensor, t: float, later: float
) -> Tensor:
    """x at a later time, by the drift where it was, and the noise's kick."""
    return x + (later - t) * drift(x, t) + kick


def heun_step(drift: Callable[[Tensor, float], Tensor], x: Tensor, kick: Tensor, t: float, later: float) -> Tensor:
    """The kick first, then the mean of the drifts at both ends of the step."""
    x = x + kick
    first = drift(x, t)
    second = drift(x + (later - t) * first, later)
    return x + (later - t) / 2 * (first + second)


STEPS = {"euler": euler_maruyama_step, "heun": heun_step}


def _last_step(
    name: str,
    velocity: Callable[[Tensor, float], Tensor],
    drift: Callable[[Tensor, float], Tensor],
    x: Tensor,
    size: float,
    path: str,
) -> Tensor:
    t = 1 - size
    if name == "mean":
        return x + size * drift(x, t)
    v = velocity(x, t)
    if name == "euler":
        return x + size * v
    times = _batch(t, x)
    alpha, sigma = (share.view(-1, *[1] * (x.ndim - 1)) for share in path_shares(path, times))
    return (x + sigma**2 * score_from_velocity(v, x, times, path)) / alpha  # Tweedie's formula


def _batch(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=torch.float32, device=x.device)


_TRAILING = {"timestep_spacing": "trailing"}  # from the noisiest step on: a latent of pure noise belongs there
SCHEDULERS: dict[str, Callable[..., SchedulerMixin]] = {
    "ddpm": lambda **schedule: DDPMScheduler(clip_sample=False, **_TRAILING, **schedule),
    "ddim": lambda **schedule: DDIMScheduler(clip_sample=False, **_TRAILING, **schedule),
    "dpm++": lambda **schedule: DPMSolverMultistepScheduler(**_TRAILING, **schedule),
    "unipc": lambda **schedule: UniPCMultistepScheduler(**_TRAILING, **schedule),
}
"""For denoisers that predict noise or v; for those of flow matching there are `pipeline.SOLVERS`."""

_SCHEDULE = ("num_train_timesteps", "beta_schedule", "beta_start", "beta_end", "prediction_type")


# ---- sampling
@torch.no_grad()
def sample_text(
    denoiser: Callable[..., Tensor],
    scheduler: SchedulerMixin,
    noise: Tensor,
    condition: TextCondition,
    null: TextCondition | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    generators: list[torch.Generator] | None = None,
    callback: Callable[[int, float, Tensor], None] | None = None,
) -> Tensor:
    """From noise (B, C, h, w) to latents, by any scheduler of `SCHEDULERS` or `pipeline.SOLVERS`; float32 themselves.

    Args:
        scheduler: its config says what the denoiser predicts: noise, v or a velocity. It is not changed.
        condition, null: from the conditioner; null is needed for guidance only.
        num_inference_steps: updates.
        generators: of the noise added on the way, where a scheduler adds some; one for each sample.
        callback: called after each update with its number, the time it started from, and the new x.
    """
    flow = solves_flows(scheduler)
    if flow:
        solver, times = make_solver(scheduler, num_inference_steps)
    else:
        solver, times = _laid_out(scheduler, num_inference_steps)
    options = {}
    if generators and "generator" in inspect.signature(solver.step).parameters:
        options["generator"] = generators
    x = noise.float() * (1.0 if flow else solver.init_noise_sigma)
    for i, (timestep, t) in enumerate(zip(solver.timesteps, times, strict=True)):
        prediction = guided_prediction(denoiser, x, t, condition, null, guidance_scale)
        x = solver_step(solver, -prediction if flow else prediction, timestep, x, **options)
        if callback is not None:
            callback(i, t, x)
    return x


def guided_prediction(
    denoiser: Callable[..., Tensor],
    x: Tensor,
    t: float,
    condition: TextCondition,
    null: TextCondition | None = None,
    guidance_scale: float = 1.0,
) -> Tensor:
    """What is predicted at x (B, C, h, w) and time t, float32: null + scale · (conditional − null), by one call.

    With scale 1 it is the conditional prediction, and only that is computed.
    """
    if guidance_scale == 1:
        return denoiser(x, _times(t, x), condition).float()
    if null is None:
        raise UserError(
            f"guidance_scale={guidance_scale:g} needs the null condition: pass conditioner.null(batch_size)."
        )
    twice = torch.cat([x, x])
    conditional, weak = denoiser(twice, _times(t, twice), TextCondition.cat([condition, null])).float().chunk(2)
    return torch.lerp(weak, conditional, guidance_scale)


def _laid_out(scheduler: SchedulerMixin, num_inference_steps: int) -> tuple[SchedulerMixin, list[float]]:
    most = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= most:
        raise UserError(f"num_inference_steps={num_inference_steps}: expected 1 to {most}, the steps of the schedule.")
    if isinstance(scheduler, DDIMScheduler) and most % num_inference_steps:
        # diffusers' own takes strides of whole timesteps, misses its next one then, and ends before the data; DDIM is
        # DPM-Solver of first order (Lu et al. 2022)
        solver = DPMSolverMultistepScheduler.from_config(scheduler.config, solver_order=1)
    else:
        solver = type(scheduler).from_config(scheduler.config)
    solver.set_timesteps(num_inference_steps)
    return solver, [time_of(timestep, most) for timestep in solver.timesteps.tolist()]


# ---- schedulers
def solves_flows(scheduler: SchedulerMixin) -> bool:
    """Whether a scheduler takes velocities, of flow matching."""
    return scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction"


def make_scheduler(name: str | None = None, objective: Any = None) -> SchedulerMixin:
    """A scheduler for what a denoiser was trained with.

    Args:
        name: "ddpm", "ddim", "dpm++" or "unipc"; of flow matching "euler", "heun", "dpm++" or "unipc". By default
            "dpm++", and of flow matching "euler".
        objective: a `NoisePrediction`, by default the usual one, or a `FlowMatching`.

    Raises:
        UserError: an unknown name, or one for another kind of training.
    """
    objective = objective or NoisePrediction()
    if isinstance(objective, NoisePrediction):
        return _known(SCHEDULERS, name or "dpm++", "noise or v")(**objective.schedule)
    return _known(SOLVERS, name or "euler", "a velocity (flow matching)")(objective.time_shift)


def swapped(scheduler: SchedulerMixin, name: str) -> SchedulerMixin:
    """Another scheduler for the same denoiser: it keeps the schedule and what is predicted, or a flow's time shift.

    Raises:
        UserError: an unknown name, or one for another kind of training.
    """
    config = scheduler.config
    if solves_flows(scheduler):
        return _known(SOLVERS, name, "a velocity (flow matching)")(config.get("shift", config.get("flow_shift", 1.0)))
    return _known(SCHEDULERS, name, "noise or v")(**{key: config[key] for key in _SCHEDULE if key in config})


def _known(table: dict[str, Callable[..., SchedulerMixin]], name: str, predicted: str) -> Callable[..., SchedulerMixin]:
    if name not in table:
        raise UserError(f"No scheduler {name!r} for a denoiser that predicts {predicted}; there are {', '.join(table)}")
    return table[name]
