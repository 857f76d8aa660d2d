"""Which of the classes that a denoiser knows explains the latents of a new one best."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vavae_tools.data.latents import LatentDataset
from vavae_tools.diffusion.ddt import DDT
from vavae_tools.diffusion.objectives import FlowMatching, time_shift_of
from vavae_tools.diffusion.transformer import DiT
from vavae_tools.draws import Draws
from vavae_tools.machine import find_machine

Batch = tuple[Tensor, Tensor, Tensor]
"""Latents (B, C, h, w), noise, and times (B,)."""


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

    All classes share times evenly over the path, each latent with noise that follows from the seed. One gradient of the
    error with respect to the conditioning, at the null row, tells to first order what each row would change; the rows
    that promise most are then tried.

    Args:
        rows: the published class table, (K, D); null: the row for any class, (D,).
        candidates: how many rows are tried.
        pairs: latents with noise and a time that each row is tried on.

    Returns:
        Own label → `Nearest`, for the labels that have latents.
    """
    machine = find_machine()
    device = "cpu" if machine.kind == "cpu" else f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % machine.devices}"
    home, trained = next(denoiser.parameters()).device, [w for w in denoiser.parameters() if w.requires_grad]
    checkpointing = denoiser.gradient_checkpointing
    rows, null = rows.float().to(device), null.float().to(device)
    denoiser.to(device).requires_grad_(False)
    denoiser.enable_gradient_checkpointing()  # one large model's activations beside its weights
    try:
        found = {}
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=machine.kind == "ampere"):
            for label in tqdm(sorted(set(data.labels.tolist())), desc="nearest classes", unit="class", disable=None):
                batches = _batches_of(label, data, denoiser.latent_shape, seed, pairs, batch_size, device)
                found[label] = _nearest(denoiser, rows, null, batches, candidates)
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


def _error(denoiser: DiT | DDT, row: Tensor, batch: Batch) -> Tensor:
    """The summed squared error of a batch's samples, all with one row (D,) as their conditioning."""
    data, noise, t = batch
    flow = FlowMatching(cosine_weight=0)
    prediction = denoiser(flow.add_noise(data, noise, t), t, row.expand(len(data), -1))
    return flow.squared_error(prediction, data, noise, t).sum()


def _nearest(denoiser: DiT | DDT, rows: Tensor, null: Tensor, batches: list[Batch], candidates: int) -> Nearest:
    number = sum(len(data) for data, _, _ in batches)
    at_null, gradient = 0.0, torch.zeros_like(null)
    for batch in batches:
        row = null.clone().requires_grad_()
        with torch.enable_grad():
            error = _error(denoiser, row, batch)
            gradient += torch.autograd.grad(error, row)[0]
        at_null += error.item() / number
    change = (rows - null) @ gradient  # (K,): the smaller, the more a row promises

    @torch.no_grad()
    def loss_of(label: int) -> float:
        return sum(_error(denoiser, rows[label], batch).item() for batch in batches) / number

    tried = {label: loss_of(label) for label in change.argsort()[:candidates].tolist()}
    best = min(tried, key=tried.get)
    return Nearest(best, tried[best], at_null)
