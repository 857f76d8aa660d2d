"""What a model that predicts clean images knows of their tokens, in bits: a variational bound."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vavae_tools.data.tokens.code import TokenCode
from vavae_tools.data.tokens.dataset import TokenImageDataset
from vavae_tools.diffusion.objectives import expand_time
from vavae_tools.pipelines.tokens import TokenImagePipeline
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.machine import in_float32

_OPEN_BITS = 0.01  # bits that are left open of a token where the bound's integral ends


class Chosen(NamedTuple):
    """Images of the data."""

    index: Tensor  # int64 (B,)
    clean: Tensor  # (B, C, H, W), prompts included
    mask: Tensor  # (B, H, W), 1 on all tokens
    known: Tensor  # (B, H, W), 1 on a chat's prompt
    counted: Tensor  # bool (B, L): cells that the model has to tell
    tokens: Tensor  # int64 (B, L)


def chosen_images(data: TokenImageDataset, count: int, seed: int) -> Iterator[Chosen]:
    """Yield a random choice of images in batches, without those that have no token to tell."""
    order, found = Draws(seed, 0, torch.arange(len(data))).uniform("picture").argsort(), False
    for part in order[:count].sort().values.split(64):
        batch = data.get_batch(part.tolist())
        known = batch.get("condition_mask", torch.zeros_like(batch["mask"]))
        counted = data.code.mask_to_cells(batch["mask"] * (1 - known))
        tokens = data.code.nearest(data.code.cells_of(batch["clean"]))
        chosen = Chosen(batch["index"], batch["clean"], batch["mask"] + known, known, counted, tokens)
        if counted.any():
            found = True
            yield Chosen(*(values[counted.any(1)] for values in chosen))
    if not found:
        raise UserError(f"None of {min(count, len(data)):,} images of {data.data_path} has a token to tell: take more")


@dataclass(frozen=True)
class BitsPerToken:
    """An upper bound on −log₂ p(tokens) of texts, given their lengths and, of chats, the prompts; per token."""

    bits: float  # diffusion + reconstruction
    error: float | None  # standard error over the images; None of a single one
    diffusion: float
    reconstruction: float
    last_time: float  # where the integral ends and the tokens are told by their own noisy cells alone
    images: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.bits:.3f}" + (f" ± {self.error:.3f}" if self.error is not None else "")


@torch.no_grad()
def bits_per_token(
    pipe: TokenImagePipeline, data: TokenImageDataset, count: int = 64, times: int = 16, seed: int = 0
) -> BitsPerToken:
    """Return the variational bound of a diffusion model in continuous time (Kingma et al. 2021, "VDM") on tokens.

    −ln p(tokens) ≤ ½ ∫ SNR'(t)·E‖x − x̂(x_t, t)‖² dt + E[−ln p(tokens | x_last)], with SNR = (t / (1 − t))², over the
    pixels of tokens that are not known. It begins at t = 0, where x_t is the prior's noise exactly: no term for the
    prior is needed. x̂ is clipped to the images' range. At the last time, p of each token alone is the softmax of the
    Gaussian log-likelihoods of all codes, whatever the denoiser says.

    With r = √SNR the integral is ∫ r·E‖x − x̂‖² dr, unbiased by r drawn evenly: for each of `count` random images one
    random shift of `times` even places, each a call of the denoiser.
    """
    code, end, parts, lengths = data.code, _ratio_without_open_bits(data, seed), [], []
    for chosen in chosen_images(data, count, seed):
        draws, shape = Draws(seed, 0, chosen.index), chosen.clean.shape[1:]
        ask, _, clean = pipe.asked_of(chosen.mask, chosen.known, chosen.clean)
        pixels = code.spread_to_pixels(chosen.counted.float(), data.img_size)[:, None]  # (B, 1, H, W)
        start, integral = draws.uniform("place"), torch.zeros(len(chosen.index), dtype=torch.float64)
        for step in range(times):
            r = (step + start) * (end / times)  # (B,)
            signal, noise = expand_time(r, chosen.clean), draws.normal(f"bits {step}", *shape)
            t = pipe.objective.time_at(r)
            x = (signal * chosen.clean + noise) / (1 + signal) * sum(pipe.objective.shares(expand_time(t, noise)))
            x, t = x.to(clean.device), t.to(clean.device)
            predicted = pipe.objective.clean(ask(x, t).float(), x, t).cpu().clamp(-1, 1)
            squared = ((predicted - chosen.clean).square() * pixels).sum((1, 2, 3)).double()
            integral += (end / times) * r * squared
        cells = code.cells_of(end * chosen.clean + draws.normal("bits at the end", *shape))
        told = torch.zeros(chosen.counted.shape, dtype=torch.float64)
        told[chosen.counted] = _bits_alone(code, cells[chosen.counted], chosen.tokens[chosen.counted], end)
        parts.append(torch.stack([integral / math.log(2), told.sum(1)], dim=1))
        lengths.append(chosen.counted.sum(1))
    each, tokens = torch.cat(parts), torch.cat(lengths).double()  # (N, 2), (N,)
    diffusion, reconstruction = (each.sum(0) / tokens.sum()).tolist()
    bits, error = diffusion + reconstruction, None
    if len(each) > 1:  # of a ratio of two sums over images
        off = each.sum(1) - bits * tokens
        error = (off.square().sum() * len(each) / (len(each) - 1)).sqrt().item() / tokens.sum().item()
    return BitsPerToken(bits, error, diffusion, reconstruction, end / (1 + end), len(each), int(tokens.sum()))


@in_float32
def _bits_alone(code: TokenCode, cells: Tensor, tokens: Tensor, r: float) -> Tensor:
    """Return −log₂ p(token | cell) of cells r·code + noise (N, n) with normal noise, all tokens as likely: (N,)."""
    bits, at_once = [], max(1, 2**24 // code.num_tokens)  # that many logits
    for rows, right in zip(cells.split(at_once), tokens.split(at_once), strict=True):
        logits = (r * rows @ code.table.T).double()  # all codes are equally long: the likelihood's other terms cancel
        bits.append(cross_entropy(logits, right, reduction="none") / math.log(2))
    return torch.cat(bits)


def _ratio_without_open_bits(data: TokenImageDataset, seed: int) -> float:
    """Return the smallest r on a grid where cells alone leave less than `_OPEN_BITS` bits of a token open."""
    tokens = torch.cat([chosen.tokens[chosen.counted] for chosen in chosen_images(data, 8, seed)])
    tokens = tokens.repeat(-(-512 // len(tokens)))[:1024]
    noise = Draws(seed, 1, torch.arange(len(tokens))).normal("told", data.code.length)
    cells, r = data.code.drawn(tokens), 0.25
    while _bits_alone(data.code, r * cells + noise, tokens, r).mean() > _OPEN_BITS:
        r *= 2**0.25
    return r


def unigram_bits(rows: Sequence[Sequence[int]]) -> float:
    """Return the entropy of the tokens' frequencies in bits."""
    counts = torch.bincount(torch.cat([torch.as_tensor(row, dtype=torch.int64) for row in rows])).double()
    return torch.special.entr(counts / counts.sum()).sum().item() / math.log(2)
