"""From noise to latents by a stochastic differential equation: fresh noise in every step, and less than is taken away.

For any amount of diffusion w ≥ 0, dx = (v + w·score)·dt + √(2w)·dW has the same x at every time as the velocity v alone
(Albergo et al. 2023, Ma et al. 2024): what one step gets wrong, later noise can hide and later steps mend.
"""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor

from vavae_tools.diffusion.objectives import path_shares, score_from_velocity
from vavae_tools.errors import UserError

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
