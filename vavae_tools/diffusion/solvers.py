"""From noise to latents: diffusers' solvers and two of our own, and guidance.

A flow solver's sigma is the share of noise, 1 − t, and goes down to 0; what it takes as the model's output is the
derivative by sigma, −velocity. RAE's time is that sigma.
"""

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import diffusers
import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from torch.overrides import TorchFunctionMode

from vavae_tools.diffusion import SOLVERS, objectives
from vavae_tools.diffusion.conditioning import TextCondition
from vavae_tools.diffusion.objectives import Objective
from vavae_tools.runtime.errors import UserError, check_known
from vavae_tools.runtime.machine import computing_in

if TYPE_CHECKING:
    from vavae_tools.diffusion.variations import Start

Condition = Tensor | TextCondition
PATH_LABELS = {"linear": "flow matching or sample", "gvp": "flow matching on the path gvp", "discrete": "noise or v"}


# ---- the table
def solvers_for(objective: Objective) -> list[str]:
    """Return the names in `SOLVERS` that fit."""
    return [name for name, (paths, _) in SOLVERS.items() if objective.path in paths]


def make_solver(
    name: str | None = None, objective: Objective | None = None, time_shift: float | None = None
) -> SchedulerMixin:
    """Return a solver for what a denoiser was trained with, by default flow matching.

    Args:
        name: one of `solvers_for(objective)`; by default "euler", of noise and v prediction "dpm++".
        time_shift: of a flow's steps, above 1 finer near the noise; by default that of training.
    """
    objective = objective or objectives.FlowMatching()
    discrete = objective.path == "discrete"
    name, fitting = name or ("dpm++" if discrete else "euler"), solvers_for(objective)
    check_known("solver", name, fitting, f" for {PATH_LABELS[objective.path]}")
    made = globals().get(SOLVERS[name][1]) or getattr(diffusers, SOLVERS[name][1])
    if discrete:  # trailing: from the noisiest step on, as a latent of pure noise belongs there
        settings = {**objective.schedule, "timestep_spacing": "trailing", "clip_sample": False}
    else:
        shift = objective.time_shift if time_shift is None else time_shift
        of_flows = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
        settings = {"shift": shift, "flow_shift": shift, "path": objective.path, **of_flows}
    known = inspect.signature(made.__init__).parameters
    return made(**{key: value for key, value in settings.items() if key in known})


def swapped(scheduler: SchedulerMixin, name: str, objective: Objective | None = None) -> SchedulerMixin:
    """Return another solver for the same denoiser, with the same shift or schedule.

    The objective is by default `objective_solved_by` the scheduler.
    """
    config = scheduler.config
    if name in SOLVERS and SOLVERS[name][1] == type(scheduler).__name__:
        return scheduler  # with what was fitted
    return make_solver(name, objective or objective_solved_by(scheduler), config.get("shift", config.get("flow_shift")))


def objective_solved_by(scheduler: SchedulerMixin) -> Objective:
    """Return the objective that a scheduler alone tells of: a velocity, noise or v, and its schedule."""
    config = scheduler.config
    if solves_flows(scheduler):
        return objectives.FlowMatching(path=config.get("path", "linear"))
    schedule = (config[key] for key in ("prediction_type", "beta_schedule", "beta_start", "beta_end"))
    return objectives.NoisePrediction(*schedule, config.num_train_timesteps)


def solves_flows(scheduler: SchedulerMixin) -> bool:
    return scheduler.config.get("prediction_type", "flow_prediction") == "flow_prediction"


def _paths(scheduler: SchedulerMixin) -> tuple[str, ...]:
    """Return what a scheduler, also one that was not made here, solves, by `Objective.path`."""
    config = scheduler.config
    if not solves_flows(scheduler):
        return ("discrete",)
    if "prediction_type" in config:
        return ("linear",) if config.get("use_flow_sigmas") else ()
    if "shift" not in config or config.get("invert_sigmas", False):
        return ()
    return (config["path"],) if "path" in config else ("linear", "gvp")


# ---- guidance
def guided_prediction(
    denoiser: Callable[..., Tensor],
    x: Tensor,
    t: float,
    conditioning: Condition,
    null: Condition | None = None,
    guidance_scale: float = 1.0,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    guidance_channels: str = "all",
    guide: Callable[..., Tensor] | None = None,
    guide_conditioning: Condition | None = None,
) -> Tensor:
    """Return the prediction at x (B, C, h, w) and time t, float32: null + scale · (conditional − null), by one call.

    Outside the interval start ≤ t ≤ end, and with scale 1, it is the conditional one, and only that is computed. An
    interval of RAE's times a to b is 1 − b to 1 − a here.

    Args:
        null: of guidance without a classifier (Ho & Salimans 2022).
        guidance_channels: "all" (scales of 1.25 to 2.5), or "first3", as LightningDiT guides the first three of 32
            only: its published scales, such as 6.7 and 10, make sense with that alone.
        guide: a weaker denoiser, smaller or less trained, in the null's place: autoguidance (Karras et al. 2024).
        guide_conditioning: the same conditions from the guide's own conditioner; by default `conditioning`.
    """
    check_known("guidance_channels", guidance_channels, ("all", "first3"))
    start, end = guidance_interval
    rounding = 1e-6  # a grid point that is `start` but for float32's last digit belongs to the interval
    times = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
    if guidance_scale == 1 or not start - rounding <= t <= end + rounding:
        return denoiser(x, times, conditioning).float()
    if guide is not None:
        conditional = denoiser(x, times, conditioning).float()
        weak = guide(x, times, conditioning if guide_conditioning is None else guide_conditioning).float()
    elif null is not None:
        cat = TextCondition.cat if isinstance(conditioning, TextCondition) else torch.cat
        twice = denoiser(torch.cat([x, x]), torch.cat([times, times]), cat([conditioning, null]))
        conditional, weak = twice.float().chunk(2)
    else:
        raise UserError(f"guidance_scale={guidance_scale:g} needs the null condition, or a guide")
    guided = torch.lerp(weak, conditional, guidance_scale)
    return guided if guidance_channels == "all" else torch.cat([guided[:, :3], conditional[:, 3:]], dim=1)


# ---- steps
def time_grid(num_inference_steps: int, timestep_shift: float = 1.0, last_noise: float = 0.0) -> Tensor:
    """Return times t, float32 (n + 1,), even in the share of noise from 1 down to `last_noise`, then shifted.

    RAE's grid of N points with its shift s is `time_grid(N - 1, 1 / s, last_noise=0.001)`.
    """
    sigmas = torch.linspace(1, last_noise, num_inference_steps + 1, dtype=torch.float64)
    return (1 - objectives.shift_noise(sigmas, 1 / (timestep_shift or 1))).float()


def lay_out(
    scheduler: SchedulerMixin,
    num_inference_steps: int,
    timestep_shift: float | None = None,
    last_noise: float = 0.0,
    objective: Objective | None = None,
) -> tuple[SchedulerMixin, list[float]]:
    """Return a fresh copy of the scheduler with its grid laid out, and the time t of each of its model calls.

    Args:
        num_inference_steps: updates, and so model calls (Heun's method makes 2n − 1, the midpoint method 2n).
            LightningDiT's and RAE's `num_steps` counts grid points instead, one more: 250 steps are our 249.
        timestep_shift: of flows, LightningDiT's s in t → s·t / (1 + (s − 1)·t), finer near the noise where below 1;
            diffusers' and RAE's shift is 1/s. 0 and 1 mean no shift, None leaves the scheduler's own.
        last_noise: share of noise, before the shift, at which the last update ends; of Euler's and the midpoint method,
            and of "sde" the last but one. 0, all the way to the data, is better; RAE stops at 0.001.
        objective: what the scheduler must fit.
    """
    config, changes = scheduler.config, {}
    paths, path = _paths(scheduler), objective.path if objective else None
    other = path == "discrete" and config.get("prediction_type") != objective.prediction
    if not paths or (path and path not in paths) or other:
        fitting = ", ".join(solvers_for(objective) if objective else SOLVERS)
        found = f"{type(scheduler).__name__} as configured does not solve {PATH_LABELS[path or 'linear']}"
        raise UserError(f"{found}: take make_solver's {fitting}")
    if "discrete" in paths:
        if timestep_shift is not None or last_noise:
            raise UserError("timestep_shift and last_noise are for flow matching, not for noise: leave it out")
        return _lay_out_discrete(scheduler, num_inference_steps)
    if num_inference_steps < 1:
        raise UserError(f"num_inference_steps={num_inference_steps}: at least one step is needed.")
    if timestep_shift is not None:
        if timestep_shift < 0:
            raise UserError(f"timestep_shift={timestep_shift:g}: it is above 0, with 0 or 1 for none.")
        changes["shift" if "shift" in config else "flow_shift"] = 1 / (timestep_shift or 1)
        changes |= {"fitted": None} if config.get("fitted") else {}
    solver = type(scheduler).from_config(config, **changes)
    if isinstance(solver, diffusers.FlowMatchEulerDiscreteScheduler) and not config.use_dynamic_shifting:
        # its own grid ends at sigma 1/1000 instead of evenly at 1/n, and is shifted twice there
        last = last_noise + (1 - last_noise) / num_inference_steps
        solver.set_timesteps(sigmas=np.linspace(1, last, num_inference_steps))
        solver.sigmas[-1] = objectives.shift_noise(last_noise, solver.shift)
    else:
        own = {"last_noise": last_noise} if isinstance(solver, FlowScheduler) else {}
        solver.set_timesteps(num_inference_steps, **own)
    solver.set_begin_index(0)  # else the first step looks its place up on the GPU
    # From sigmas, as some solvers round their timesteps to whole numbers. They stay on the CPU: no wait in the loop.
    return solver, [1 - sigma for sigma in solver.sigmas[: len(solver.timesteps)].tolist()]


def _lay_out_discrete(scheduler: SchedulerMixin, num_inference_steps: int) -> tuple[SchedulerMixin, list[float]]:
    most = scheduler.config.num_train_timesteps
    if not 1 <= num_inference_steps <= most:
        raise UserError(f"num_inference_steps={num_inference_steps}: expected 1 to {most}, the steps of the schedule.")
    if isinstance(scheduler, diffusers.DDIMScheduler) and most % num_inference_steps:
        # diffusers' own takes strides of whole timesteps, misses its next one then, and ends before the data; DDIM is
        # DPM-Solver of first order (Lu et al. 2022)
        solver = diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config, solver_order=1)
    else:
        solver = type(scheduler).from_config(scheduler.config)
    solver.set_timesteps(num_inference_steps)
    return solver, objectives.time_of(solver.timesteps, most).tolist()


class _WithoutWaits(TorchFunctionMode):
    """Copy tensors that UniPC and DDPM make on the CPU to the card without waiting, and solve equations unchecked."""

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
    conditioning: Condition,
    null: Condition | None = None,
    num_inference_steps: int = 50,
    guidance_scale: float = 1.0,
    timestep_shift: float | None = None,
    last_noise: float = 0.0,
    objective: Objective | None = None,
    generators: list[torch.Generator] | None = None,
    callback: Callable[[int, float, Tensor], None] | None = None,
    start: "Start | None" = None,
    **guidance: Any,
) -> Tensor:
    """Return latents at t = 1 from noise (B, C, h, w) at t = 0; float32, whatever the denoiser is.

    Steps are those of `lay_out`, which leaves the scheduler as it is, and guidance is that of `guided_prediction`.

    Args:
        objective: what denoiser and guide were trained with; by default what the scheduler takes as it is.
        generators: of the noise added on the way, where a scheduler adds some, one for each sample; by default it
            follows from the noise that the sample starts from.
        callback: called after each update with its number, the time it started from, and the new x.
        start: latents of images from which it begins with this noise, in place of the noise alone.
    """
    solver, times = lay_out(scheduler, num_inference_steps, timestep_shift, last_noise, objective)
    flow, options = solves_flows(scheduler), {}
    if objective is not None:
        denoiser = objective.as_solver_input(denoiser)
        if guidance.get("guide") is not None:
            guidance["guide"] = objective.as_solver_input(guidance["guide"])
    if "generator" in inspect.signature(solver.step).parameters:
        if isinstance(solver, diffusers.DDPMScheduler | StochasticScheduler) and not generators:
            # seeded by a sample's first two numbers, so that samples do not depend on their batch
            seeds = noise.flatten(1)[:, :2].float().cpu().contiguous().view(torch.int64)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds.flatten().tolist()]
        options["generator"] = generators
    x = noise = noise.float() * (1.0 if flow else solver.init_noise_sigma)
    if start is not None:
        of_start, times = objective or objective_solved_by(scheduler), start.cut(solver, times)
        x = start.first(noise, [*times, 1.0][0], of_start)
    for i, (timestep, t) in enumerate(zip(solver.timesteps, times, strict=True)):
        prediction = guided_prediction(denoiser, x, t, conditioning, null, guidance_scale, **guidance)
        # in float32 whatever is set around it, and not waiting for the card
        with computing_in("32", x.device), _WithoutWaits() if x.device.type == "cuda" else nullcontext():
            x = solver.step(-prediction if flow else prediction, timestep, x, **options)[0]
        if start is not None:
            x = start.kept(x, noise, [*times, 1.0][i + 1], of_start)
        if callback is not None:
            callback(i, t, x)
    return x


# ---- solvers of flows that diffusers does not have, called as its own are
class FlowScheduler(SchedulerMixin, ConfigMixin):
    """Base of solvers that take a velocity along shares of noise `sigmas`; a shift above 1 is finer near the noise."""

    order = 1  # model calls of an update, as diffusers' own say it

    @register_to_config
    def __init__(self, shift: float = 1.0, path: str = "linear") -> None:
        self.set_timesteps(1)

    def set_timesteps(self, num_inference_steps: int, last_noise: float = 0.0) -> None:
        self.sigmas = self.grid(num_inference_steps, last_noise)
        self.timesteps = 1000 * self.sigmas[:-1]
        self.set_begin_index(0)

    def set_begin_index(self, index: int) -> None:
        self.place = index


class MidpointScheduler(FlowScheduler):
    """The midpoint method: two calls an update, and an error of second order."""

    order = 2

    def grid(self, num_inference_steps: int, last_noise: float) -> Tensor:
        ends = 1 - time_grid(num_inference_steps, 1 / self.config.shift, last_noise)
        between = (ends[:-1] + ends[1:]) / 2
        return torch.cat([torch.stack([ends[:-1], between], 1).flatten(), ends[-1:]])

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> tuple[Tensor]:
        if self.place % 2 == 0:  # to the middle
            self.start = sample
        start, later = self.sigmas[[self.place - self.place % 2, self.place + 1]].tolist()
        self.place += 1
        return (self.start + (later - start) * model_output,)


class AdamsScheduler(FlowScheduler):
    """Adams–Bashforth's method: the last velocities are carried on; one call an update, an error of second order.

    Args:
        fitted: what `pipelines.schedule.fit_schedule` found for a model: by number of steps, as text, the shares of
            noise "sigmas" (n + 1) and the "weights" (n, 2) of the last two changes of velocity, here 1 and 0.
    """

    @register_to_config
    def __init__(self, shift: float = 1.0, path: str = "linear", fitted: dict[str, Any] | None = None) -> None:
        self.set_timesteps(1)

    def grid(self, num_inference_steps: int, last_noise: float) -> Tensor:
        fitted, self.past = self.config.fitted or {}, []
        if not last_noise and (own := fitted.get(str(num_inference_steps))):
            self.weights = own["weights"]
            return torch.tensor(own["sigmas"], dtype=torch.float32)
        self.weights = [(1.0, 0.0)] * num_inference_steps
        return 1 - time_grid(num_inference_steps, 1 / self.config.shift, last_noise)

    def step(self, model_output: Tensor, timestep: Tensor, sample: Tensor) -> tuple[Tensor]:
        here, later = self.sigmas[self.place : self.place + 2].tolist()
        weights = self.weights[self.place + 1 - len(self.sigmas)]  # from the end, as a `Start` cuts the first steps
        self.place, self.past = self.place + 1, [(here, model_output), *self.past[:2]]
        terms = adams_terms(self.past, later)
        return (sum((weight * term for weight, term in zip(weights, terms[1:], strict=False)), sample + terms[0]),)


def adams_terms(past: list[tuple[float, Tensor]], later: float) -> list[Tensor]:
    """Return what a step to `later` adds: of Euler's method, and for each change of velocity, the newest first.

    `past` holds up to three shares of noise and the derivatives there, the newest first.
    """
    step = later - past[0][0]
    changes = [step**2 / 2 / (new - old) * (v - before) for (new, v), (old, before) in pairwise(past)]
    return [step * past[0][1], *changes]


class StochasticScheduler(FlowScheduler):
    """A stochastic differential equation by Euler–Maruyama: fresh noise in every step, and less than is taken away.

    For any diffusion w ≥ 0, dx = (v + w·score)·dt + √(2w)·dW has the same x at every time as the velocity v alone
    (Albergo et al. 2023, Ma et al. 2024). Here w is σ, as in SiT and RAE, and so w·score is −noise. The last but one
    step ends at `last_noise`, by default RAE's 0.04, as the score is infinite at the data; the last adds no noise.
    """

    def grid(self, num_inference_steps: int, last_noise: float) -> Tensor:
        ends = time_grid(num_inference_steps - 1, 1 / self.config.shift, last_noise or 0.04)
        return torch.cat([1 - ends, torch.zeros(1)])

    def step(
        self, model_output: Tensor, timestep: Tensor, sample: Tensor, generator: Any = None, variance_noise: Any = None
    ) -> tuple[Tensor]:
        here, later = self.sigmas[self.place : self.place + 2].tolist()
        self.place += 1
        t, path = torch.full((len(sample),), 1 - here, dtype=torch.float32, device=sample.device), self.config.path
        noise = objectives.unmix(-model_output, sample, t, path)[1]
        moved = sample - (here - later) * (noise + model_output)
        if later == 0:
            return (moved,)
        if variance_noise is None:
            variance_noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=sample.dtype)
        diffusion = objectives.path_shares(path, torch.tensor(1 - here, dtype=torch.float64))[1].item()
        return (moved + math.sqrt(2 * diffusion * (here - later)) * variance_noise,)
