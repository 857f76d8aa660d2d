"""A schedule fitted to a denoiser: with few steps, the times and weights that come nearest to its own fine path."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vavae_tools.diffusion.solvers import AdamsScheduler, adams_terms, guided_prediction
from vavae_tools.pipelines.batches import in_batches, move_to_device, precision_for
from vavae_tools.pipelines.classes import LatentDiTPipeline, load_pipeline
from vavae_tools.runtime.errors import UserError, in_home
from vavae_tools.runtime.files import save_model
from vavae_tools.runtime.machine import computing_in, find_device

FINE_STEPS = 50  # of the path to come near to, of second order; with 100 the few steps came no nearer
_RIDGE = 1e-4  # of the weights' squares, relative: two changes of velocity may be nearly alike


@torch.no_grad()
def fit_schedule(
    pipe: LatentDiTPipeline | str | Path,
    steps: Sequence[int] = (5, 8, 10, 20),
    guidance_scale: float = 1.25,
    images: int = 16,
    seed: int = 0,
    **guidance: Any,
) -> dict[int, float]:
    """Give the pipeline an `AdamsScheduler` fitted for these numbers of steps, and return the error of each.

    A few images are made finely once. Times among that path's are chosen as in Chen et al. 2024 ("GITS"), by dynamic
    programming over the errors of single steps; then weights, step by step where the few steps have led, by least
    squares. So few numbers cannot memorise the images. An error is the root mean square of the end's
    difference over the latents' standard deviation, of the last quarter of the images, which nothing was fitted to.

    Args:
        pipe: or the path of one, in whose folder the schedule is then kept.
        guidance_scale, guidance: arguments of `guided_prediction` with which images will be made, or nearly so.
    """
    if isinstance(pipe, str | Path):
        folder, pipe = pipe, move_to_device(load_pipeline(pipe), find_device())
        errors = fit_schedule(pipe, steps, guidance_scale, images, seed, **guidance)
        keep_schedule(pipe, folder)
        return errors
    if pipe.objective.path == "discrete":
        raise UserError("Schedules are fitted to flow matching; this model predicts noise: take dpm++ or unipc")
    if min(steps, default=0) < 1 or max(steps) > FINE_STEPS // 2:
        raise UserError(f"steps {tuple(steps)}: expected numbers from 1 to {FINE_STEPS // 2}")
    if images < 4:
        raise UserError(f"images {images}: at least 4 are needed, of which one says how good the schedule is")
    config = pipe.scheduler.config
    as_it_is = {"shift": config.get("shift", config.get("flow_shift", 1.0)), "path": pipe.objective.path}
    fine = AdamsScheduler(**as_it_is)
    velocity, noise = _velocity(pipe, images, seed, guidance_scale, guidance)
    fine.set_timesteps(FINE_STEPS)
    xs, velocities = [noise], []
    for sigma in fine.sigmas[:-1].tolist():
        velocities.append(velocity(xs[-1], sigma))
        xs.append(fine.step(velocities[-1], None, xs[-1])[0])
    known = images - images // 4
    cost = _costs([x[:known] for x in xs], [v[:known] for v in velocities])
    fitted, errors = {}, {}
    for count in sorted(set(steps)):
        grid = _cheapest(cost, count)
        weights, end = _weights(velocity, [xs[place] for place in grid], fine.sigmas[grid].tolist(), known)
        fitted[str(count)] = {"sigmas": fine.sigmas[grid].tolist(), "weights": weights}
        errors[count] = ((end - xs[-1])[known:].square().mean().sqrt() / xs[-1].std()).item()
    kept = config.get("fitted") or {}
    pipe.scheduler = AdamsScheduler(**as_it_is, fitted={**kept, **fitted})  # by name, else diffusers forgets them
    return errors


def keep_schedule(pipe: LatentDiTPipeline, folder: str | Path) -> None:
    """Write the pipeline, with its fitted solver, into its folder again."""
    folder = in_home(folder)
    if not (folder / "model_index.json").is_file():
        raise UserError(f"{folder} is no pipeline's folder, in which a schedule is kept: name one, such as pipeline/")
    save_model(pipe, folder)  # whole, as the code that goes along follows from the solver, too


def _velocity(pipe: LatentDiTPipeline, images: int, seed: int, scale: float, guidance: dict[str, Any]) -> Any:
    """Return the derivative by the share of noise as a function of x and that, and what the images begin with."""
    device, precision, people = pipe._execution_device, precision_for(pipe), sorted(pipe.people.values())
    labels = torch.tensor([people[i % len(people)] for i in range(images)], device=device)
    guide = guidance.pop("guide", None)
    scale, model = scale if pipe.is_guided(guide) else 1.0, pipe.objective.as_solver_input(pipe.denoiser)
    if guide:
        guidance = {**guidance, "guide": pipe.objective.as_solver_input(guide[0])}

    def velocity(x: Tensor, sigma: float) -> Tensor:
        def part(rows: slice) -> Tensor:
            told = {"conditioning": pipe.conditioner(labels[rows]), "guidance_scale": scale, **guidance}
            if guide:
                told["guide_conditioning"] = guide[1](labels[rows])
            elif scale != 1:
                told["null"] = pipe.conditioner.null(len(labels[rows]))
            with computing_in(precision, device):
                return -guided_prediction(model, x[rows].to(device), 1 - sigma, **told).cpu()

        return torch.cat(in_batches(pipe, images, part))

    return velocity, pipe.noise(seed, torch.arange(images))


def _costs(xs: list[Tensor], velocities: list[Tensor]) -> Tensor:
    """Return the squared error of a step from place i to j of a path, after one from k, as float64 [k, i, j].

    It is that of the best weights, of the velocity at i and its change since k; [i, i, j] is without a step before.
    """
    n, gram = len(xs), 0.0
    for rows in zip(*xs, *velocities, strict=True):  # image by image, for the memory
        flat = torch.stack(rows).flatten(1).double()
        gram = gram + flat @ flat.T
    squares, x_v, v_v = gram.diagonal()[:n], gram[:n, n:], gram[n:, n:]
    moved = squares[:, None] + squares - 2 * gram[:n, :n]  # |x_j − x_i|²
    cost = torch.full((n, n, n), torch.inf, dtype=torch.float64)
    for i in range(n - 1):
        along, own = x_v[i + 1 :] - x_v[i], v_v[i, i]  # (x_j − x_i)·v_k, for all j and k
        alone = moved[i, i + 1 :] - along[:, i] ** 2 / own
        cost[i, i, i + 1 :] = alone.clamp_min(0)
        part = v_v[i, :i] / own  # of v_k along v_i; what is left of v_k is new
        new = (v_v.diagonal()[:i] - part * v_v[i, :i]).clamp_min(1e-9 * own)
        cost[:i, i, i + 1 :] = (alone[:, None] - (along[:, :i] - along[:, [i]] * part) ** 2 / new).clamp_min(0).T
    return cost


def _cheapest(cost: Tensor, count: int) -> list[int]:
    """Return the count + 1 places, the first and the last among them, whose steps cost least together."""
    least, before = cost[0].clone(), []  # [i, j]: of all ways whose last step is from i to j
    least[1:] = torch.inf
    for _ in range(count - 1):
        least, from_ = (least[:, :, None] + cost).min(dim=0)
        before.append(from_)
    end = len(cost) - 1
    places = [end, int(least[:, end].argmin())]
    for from_ in reversed(before):
        places.append(int(from_[places[-1], places[-2]]))
    return places[::-1]


def _weights(velocity: Any, xs: list[Tensor], sigmas: list[float], known: int) -> tuple[list[list[float]], Tensor]:
    """Return the weights (n, 2) of `AdamsScheduler` that lead nearest to each of xs, and the end that they lead to."""
    x, past, found = xs[0], [], []
    for here, later, wanted in zip(sigmas, sigmas[1:], xs[1:], strict=False):
        past = [(here, velocity(x, here)), *past[:2]]
        euler, *changes = adams_terms(past, later)
        weights = torch.tensor([1.0, 0.0], dtype=torch.float64)
        if changes:
            usual = weights[: len(changes)]
            terms = torch.stack([term[:known].flatten().double() for term in changes])
            left = (wanted - x - euler)[:known].flatten().double() - usual @ terms
            gram = terms @ terms.T
            usual += torch.linalg.solve(gram + _RIDGE * gram.diagonal().diag(), terms @ left)
        found.append(weights.tolist())
        x = sum((weight * term for weight, term in zip(weights.tolist(), changes, strict=False)), x + euler)
    return found, x
