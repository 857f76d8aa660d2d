"""Which of the classes that a denoiser knows explains the latents of a new one best."""

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vavae_tools.data.latents import LatentDataset
from vavae_tools.diffusion.ddt import DDT
from vavae_tools.diffusion.objectives import FlowMatching, time_shift_of
from vavae_tools.diffusion.transformer import DiT
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.machine import find_machine
from vavae_tools.runtime.ranks import of_torchrun

Batch = tuple[Tensor, Tensor, Tensor]
"""Latents (B, C, h, w), noise, and times (B,)."""
PROBES = 128
"""Random projections in all: they estimate the squared move of the predictions to 12 %."""


@dataclass(frozen=True)
class Nearest:
    """The published class that explains a class's latents best, and the loss with it and with the null row."""

    published: int
    loss: float
    loss_of_null: float


def nearest_classes(
    denoiser: DiT | DDT,
    rows: Tensor,
    null: Tensor,
    data: LatentDataset,
    seed: int = 0,
    candidates: int = 8,
    pairs: int = 32,
    batch_size: int = 8,
) -> dict[int, Nearest]:
    """For each class in `data` the row with which the denoiser's squared error on its latents is smallest.

    All classes share times evenly over the path, each latent with noise that follows from the seed. What the step from
    the null row to each row would change is estimated there: to first order by the error's gradient with respect to the
    conditioning, to second by how much the predictions move (Gauss–Newton, by random projections), since to first order
    a row that changes much promises much. From so far away the second order overstates the move, three times in a
    trained model, so a row is judged by the best part of the step to it. The rows that promise most are then tried.

    Args:
        rows: the published class table, (K, D); null: the row for any class, (D,).
        candidates: how many rows are tried.
        pairs: latents with noise and a time that each row is tried on.

    Returns:
        Own label → `Nearest`, for the labels that have latents.
    """
    machine = find_machine()
    device = "cpu" if machine.kind == "cpu" else f"cuda:{of_torchrun().local_rank % machine.devices}"
    home, trained = next(denoiser.parameters()).device, [w for w in denoiser.parameters() if w.requires_grad]
    checkpointing = denoiser.gradient_checkpointing
    rows, null = rows.float().to(device), null.float().to(device)
    labels = sorted(set(data.labels.tolist()))
    probes = -(-PROBES * batch_size // (len(labels) * pairs))  # for each batch

    def batches(label: int) -> list[Batch]:
        return _batches_of(label, data, denoiser.latent_shape, seed, pairs, batch_size, device)

    denoiser.to(device).requires_grad_(False)
    denoiser.enable_gradient_checkpointing()  # a large model's activations have to fit beside its weights
    try:
        half = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=machine.kind == "ampere")
        with half, tqdm(total=2 * len(labels), desc="nearest classes", disable=None) as bar:
            slopes, moved = {}, []
            for label in labels:
                slopes[label], moves = _slope(denoiser, null, batches(label), seed, probes)
                moved += moves
                bar.update()
            steps = rows - null  # (K, D)
            bend = pairs * (steps @ torch.stack(moved, dim=1)).square().mean(1)  # (K,): the squared move of predictions
            found = {}
            for label in labels:
                slope = steps @ slopes[label]  # (K,)
                part = (-slope / (2 * bend + 1e-12)).clamp(0, 1)  # of the step to each row, the best one
                promise = part * slope + part.square() * bend  # the change of the error: the smaller the better
                found[label] = _best(denoiser, rows, null, batches(label), promise.argsort()[:candidates].tolist())
                bar.update()
        return found
    finally:
        denoiser.to(home)
        for weight in trained:
            weight.requires_grad_()
        if not checkpointing:
            denoiser.disable_gradient_checkpointing()


def _batches_of(
    label: int, data: LatentDataset, shape: tuple[int, ...], seed: int, pairs: int, batch_size: int, device: str
) -> list[Batch]:
    """`pairs` of latents of one class, with noise, and a time each; a class of fewer latents has them several times."""
    places = (data.labels == label).nonzero().flatten()
    places = places[torch.linspace(0, len(places) - 1, min(pairs, len(places))).round().long()]  # evenly over the class
    rounds = -(-pairs // len(places))
    latents = data.__getitems__(places.tolist())["latents"].repeat(rounds, 1, 1, 1)[:pairs]  # (pairs, C, h, w)
    noise = torch.cat([Draws(seed, number, places).normal("nearest class", *shape) for number in range(rounds)])[:pairs]
    path = FlowMatching(time="uniform", time_shift=max(1.0, time_shift_of(shape)))
    t = path.sample_time((torch.arange(pairs) + 0.5) / pairs)
    return list(zip(*(part.to(device).split(batch_size) for part in (latents, noise, t)), strict=True))


def _error(denoiser: DiT | DDT, row: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """The summed squared error of a batch, all of it with one row (D,) as conditioning, and the prediction."""
    data, noise, t = batch
    flow = FlowMatching(cosine_weight=0)
    prediction = denoiser(flow.add_noise(data, noise, t), t, row.expand(len(data), -1))
    return flow.squared_error(prediction, data, noise, t).sum(), prediction


def _slope(
    denoiser: DiT | DDT, null: Tensor, batches: list[Batch], seed: int, probes: int
) -> tuple[Tensor, list[Tensor]]:
    """At the null row: the error's gradient (D,), and vectors p (D,) with E (p·step)² = a prediction's squared move."""
    slope, moves = torch.zeros_like(null), []
    for number, batch in enumerate(batches):
        row = null.clone().requires_grad_()
        with torch.enable_grad():
            error, prediction = _error(denoiser, row, batch)
        slope += torch.autograd.grad(error, row, retain_graph=True)[0]
        samples = torch.arange(len(prediction), device=prediction.device)
        for probe in range(probes):
            signs = Draws(seed, probe, samples).normal(f"probe {number}", *prediction.shape[1:])
            move = torch.autograd.grad(prediction, row, signs.to(prediction.dtype), retain_graph=True)[0]
            moves.append(move / prediction.numel() ** 0.5)
    return slope, moves


@torch.no_grad()
def _best(denoiser: DiT | DDT, rows: Tensor, null: Tensor, batches: list[Batch], tried: list[int]) -> Nearest:
    number = sum(len(data) for data, _, _ in batches)

    def loss(row: Tensor) -> float:
        return sum(_error(denoiser, row, batch)[0].item() for batch in batches) / number

    losses = {label: loss(rows[label]) for label in tried}
    best = min(losses, key=losses.get)
    return Nearest(best, losses[best], loss(null))
