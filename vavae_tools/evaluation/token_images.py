"""Written texts beside real ones: do they decode, are they right, are they copies, and what the model knows in bits."""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vavae_tools.data.token_code import TokenCode
from vavae_tools.data.token_images import TokenImageDataset
from vavae_tools.diffusion.clean_prediction import with_known
from vavae_tools.diffusion.sampling import time_grid
from vavae_tools.diffusion.token_pipeline import TokenImagePipeline, Written
from vavae_tools.diffusion.transformer import kept_patches
from vavae_tools.draws import Draws
from vavae_tools.errors import UserError
from vavae_tools.evaluation.metrics import aligned, percent
from vavae_tools.files import write_json, written_whole
from vavae_tools.plots import plot_curves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NGRAMS = (1, 2, 4, 8)
"""Lengths of the n-grams that are looked up in the data, in tokens."""
COPIED_SPAN = 16
"""Tokens from which on a span that also stands in the data counts as copied."""
TIMES = tuple(step / 20 for step in range(1, 20))
_BATCH = 64  # pictures at a time
_CURVE_STEPS = 20
_TOLD = 0.01  # bits that are left open of a token where the bound's integral ends
_AT_ONCE = 2**24  # numbers in a table of logits, cells × tokens


class _Given(NamedTuple):
    """Pictures of the data and what is known of them."""

    index: Tensor  # int64 (B,)
    clean: Tensor  # (B, C, H, W), prompts included
    mask: Tensor  # (B, H, W), 1 on all tokens
    known: Tensor  # (B, H, W), 1 on a chat's prompt
    counted: Tensor  # bool (B, L): cells that the model has to tell
    tokens: Tensor  # int64 (B, L)


def _given(data: TokenImageDataset, count: int, seed: int) -> Iterator[_Given]:
    """A random choice of pictures, in batches; those without anything to tell are left out."""
    if count < 1:
        raise UserError(f"count {count}: expected 1 picture or more")
    order, some = Draws(seed, 0, torch.arange(len(data))).uniform("picture").argsort(), False
    for part in order[:count].sort().values.split(_BATCH):
        batch = data.__getitems__(part.tolist())
        known = batch.get("condition_mask", torch.zeros_like(batch["mask"]))
        counted = data.code.over_cells(batch["mask"] * (1 - known))
        tokens = data.code.nearest(data.code.cells_of(batch["clean"]))
        given = _Given(batch["index"], batch["clean"], batch["mask"] + known, known, counted, tokens)
        if counted.any():
            some = True
            yield _Given(*(values[counted.any(1)] for values in given))
    if not some:
        raise UserError(
            f"None of {min(count, len(data)):,} pictures of {data.data_path} has a token to tell: take more"
        )


# ---- cells


def valid_share(code: TokenCode, pictures: Tensor, mask: Tensor, known: Tensor | None = None) -> float:
    """Share of cells whose signs are exactly those of a token's code; NaN where there is no cell.

    Args:
        pictures: (B, C, H, W), as a `TokenImagePipeline` predicted them.
        mask, known: pixels with a token, and those of them that were given and do not count, (B, H, W).
    """
    counted = code.over_cells(mask if known is None else mask * (1 - known))
    return code.is_valid(code.cells_of(pictures)[counted]).double().mean().item()


@dataclass(frozen=True)
class Recovered:
    """What comes back exactly of clean pictures that were noised to t."""

    t: float
    cells: float
    """Share of the tokens."""
    pictures: float
    """Share of the pictures with all of their tokens."""


def reconstruction_curve(
    pipe: TokenImagePipeline,
    data: TokenImageDataset,
    times: Sequence[float] = TIMES,
    count: int = 64,
    steps: int = _CURVE_STEPS,
    eta: float = 1.0,
    seed: int = 0,
) -> list[Recovered]:
    """Noise pictures of the data to t·clean + (1 − t)·noise, denoise them from there on, and compare the tokens.

    A chat's prompt is known and does not count. Of one seed all times see the same pictures and the same noise.

    Args:
        times: from 0, noise, to below 1, the data.
        count: pictures, chosen at random.
        steps: of the whole way; from t on those are made that are left of it.
        eta: see `TokenImagePipeline`.

    Raises:
        UserError: a time that is no such time, or no picture.
    """
    for t in times:
        if not 0 <= t < 1:
            raise UserError(f"time {t:g}: expected times from 0 (noise) to below 1 (data)")
    grid = time_grid(steps, 1 / pipe.config.time_shift)
    right = {t: [] for t in times}  # bool (B, L), cells that do not count are right
    counted = []
    for given in _given(data, count, seed):
        draws, shape = Draws(seed, 0, given.index.to(pipe.device)), given.clean.shape[1:]
        noise = draws.normal("noise to start from", *shape).cpu()
        counted.append(given.counted)
        for t in times:
            x = t * given.clean + (1 - t) * noise
            left = torch.cat([torch.tensor([t]), grid[grid > t + 1e-4]])  # no step of a rounding error
            fresh = (draws.normal(f"noise {step}", *shape) for step in range(len(left)))
            made = pipe.denoise(x, given.mask, given.known, given.clean, left, eta, fresh).cpu()
            tokens = data.code.nearest(data.code.cells_of(made))
            right[t].append((tokens == given.tokens) | ~given.counted)
    told = torch.cat(counted)
    found = {t: torch.cat(parts) for t, parts in right.items()}
    return [Recovered(t, ok[told].double().mean().item(), ok.all(1).double().mean().item()) for t, ok in found.items()]


# ---- copies

_BLOCK = 2**18  # tokens whose hashes are made at once: they fit into a processor's cache
_BASE = 0xD1342543DE82EF95  # odd, so that it has an inverse mod 2⁶⁴
_INVERSE = pow(_BASE, -1, 2**64)
_FILTER = 20  # bits of a hash by which most windows are told apart


class _Part:
    """Hashes of the windows that begin in one part of a row of tokens: Σ v(token i + j)·Bʲ mod 2⁶⁴.

    A window is a difference of two running sums, whatever its length (Karp & Rabin 1987).
    """

    def __init__(self, tokens: np.ndarray, room: np.ndarray) -> None:
        self._room, powers = room, np.full(len(tokens) + 1, _BASE, np.uint64)
        powers[0] = 1
        values = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
        self._sums = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum(values * powers.cumprod()[:-1], out=self._sums[1:])
        inverses = np.full(len(room), _INVERSE, np.uint64)
        inverses[:1] = 1
        self._inverses = inverses.cumprod()

    def windows(self, size: int, likely: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Where windows of so many tokens begin that do not cross a border, and their hashes, uint64.

        Args:
            likely: by a hash's first bits, bool (2^_FILTER,): leave out those that are not.
        """
        count = max(0, min(len(self._room), len(self._sums) - size))
        hashes = self._sums[size : size + count] - self._sums[:count]
        hashes *= self._inverses[:count]
        where = np.arange(count) if likely is None else np.flatnonzero(likely[_first_bits(hashes)])
        where = where[self._room[where] >= size]
        return where, hashes[where]


class _Tokens:
    """Rows of tokens one behind the other, and where each ends."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.lengths = np.array([len(row) for row in rows], np.int64)
        self._flat = np.concatenate([np.asarray(row, np.int32) for row in rows]) if len(rows) else np.zeros(0, np.int32)
        self._room = (np.repeat(self.lengths.cumsum(), self.lengths) - np.arange(len(self._flat))).astype(np.int32)

    @cached_property
    def row_of(self) -> np.ndarray:
        """The row of each token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def parts(self, longest: int) -> Iterator[_Part]:
        """Parts that hold windows of up to so many tokens whole."""
        for start in range(0, len(self._flat), _BLOCK):
            yield _Part(self._flat[start : start + _BLOCK + longest - 1], self._room[start : start + _BLOCK])

    def windows(self, sizes: Sequence[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Of each size where its windows begin, and their hashes: as much memory as there are windows."""
        parts = list(self.parts(max(sizes)))
        found = {}
        for size in sizes:
            each = [part.windows(size) for part in parts]
            starts = [where + number * _BLOCK for number, (where, _) in enumerate(each)]
            found[size] = tuple(np.concatenate(arrays) for arrays in (starts, [hashes for _, hashes in each]))
        return found


class KnownTexts:
    """Texts in which spans of others are looked up, by hashes of 64 bits; no span crosses the border of two.

    Thirty million tokens take 240 MB, and all numbers of a `novelty` of 200 texts 5 to 40 s on one core.

    Args:
        rows: token numbers of each text, or of each picture where texts are longer than these.
        wholes: what `whole_share` compares with; None: the rows.
    """

    def __init__(self, rows: Sequence[Sequence[int]], wholes: Sequence[Sequence[int]] | None = None) -> None:
        self._tokens = _Tokens(rows)
        self._wholes = rows if wholes is None else wholes

    def has(self, asked: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Which hashes of windows, by their size, are those of windows here: bool of the same shape."""
        wanted = {size: np.unique(hashes, return_inverse=True) for size, hashes in asked.items() if len(hashes)}
        seen = {size: np.zeros(len(hashes), bool) for size, (hashes, _) in wanted.items()}
        likely = {size: _likely(hashes) for size, (hashes, _) in wanted.items()}
        for part in self._tokens.parts(max(wanted, default=1)):
            for size in list(likely):
                hashes, found = wanted[size][0], seen[size]
                windows = part.windows(size, likely[size])[1]
                places = np.minimum(np.searchsorted(hashes, windows), len(hashes) - 1)
                places = places[hashes[places] == windows]
                if len(places):
                    found[places] = True
                    likely[size] = _likely(hashes[~found])  # what was found once costs no time again
                    if found.all():
                        del likely[size]
        return {size: seen[size][wanted[size][1]] if size in wanted else np.zeros(0, bool) for size in asked}

    def longest_spans(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Of each row the length of its longest span that stands in one of these texts: int64, 0 for none."""
        tokens = _Tokens(rows)
        longest = np.zeros(len(rows), np.int64)
        step = 1 << (int(tokens.lengths.max(initial=0)).bit_length() - 1) if tokens.lengths.any() else 0
        while step:  # a row with a copied span has all shorter ones, so that halving finds the longest
            tried = np.where(longest + step <= tokens.lengths, longest + step, 0)
            windows = tokens.windows(np.unique(tried[tried > 0]).tolist()) if tried.any() else {}
            rows_of, asked = {}, {}
            for size, (where, hashes) in windows.items():
                concerned = tried[tokens.row_of[where]] == size
                rows_of[size], asked[size] = tokens.row_of[where[concerned]], hashes[concerned]
            for size, found in self.has(asked).items():
                longest[rows_of[size][found]] = size
            step //= 2
        return longest

    def whole_share(self, rows: Sequence[Sequence[int]]) -> float:
        """Share of rows that are equal to one of these, from the first token to the last."""
        asked = [np.asarray(row, np.int32).tobytes() for row in rows]
        sought, seen = set(asked), set()
        for row in self._wholes:  # not a set of all of them: there may be millions
            content = np.asarray(row, np.int32).tobytes()
            if content in sought:
                seen.add(content)
        return sum(content in seen for content in asked) / len(asked)


def _likely(hashes: np.ndarray) -> np.ndarray:
    table = np.zeros(2**_FILTER, bool)
    table[_first_bits(hashes)] = True
    return table


def _first_bits(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _FILTER)).view(np.int64)  # as an index of another type it would be copied


@dataclass(frozen=True)
class Novelty:
    """How much of some texts stands in the data, too."""

    texts: int
    ngrams: dict[int, float | None]
    """By n, in tokens: share of the texts' n-grams, each as often as it occurs, that occur in the data; None where no
    text is so long."""
    longest_mean: float
    """Tokens in a text's longest span that stands in the data, mean over texts."""
    longest: int
    """The longest of all texts."""
    copied: float
    """Share of the tokens that are in copied spans of `COPIED_SPAN` tokens or more."""
    whole: float
    """Share of the texts that stand in the data as they are, from the first token to the last."""


def novelty(
    rows: Sequence[Sequence[int]],
    known: KnownTexts,
    wholes: Sequence[Sequence[int]] | None = None,
    sizes: Sequence[int] = NGRAMS,
    copied_span: int = COPIED_SPAN,
) -> Novelty:
    """Look token numbers of texts up in those of the data.

    Args:
        wholes: the same texts as they are compared as wholes, such as with their prompts; None: the rows.
        sizes: n of the n-grams.
        copied_span: tokens.

    Raises:
        UserError: there is no token in them.
    """
    tokens = _Tokens(rows)
    if not len(tokens.row_of):
        raise UserError("No tokens to look up: expected at least one text that is not empty")
    windows = tokens.windows([*sizes, copied_span])
    found = known.has({size: hashes for size, (_, hashes) in windows.items()})
    spans = windows[copied_span][0][found[copied_span]]
    depth = np.zeros(len(tokens.row_of) + 1, np.int64)  # how many copied spans are over a token
    np.add.at(depth, spans, 1)
    np.add.at(depth, spans + copied_span, -1)
    longest = known.longest_spans(rows)
    return Novelty(
        len(rows),
        {size: float(found[size].mean()) if len(found[size]) else None for size in sizes},
        float(longest.mean()),
        int(longest.max()),
        float((depth.cumsum()[:-1] > 0).mean()),
        known.whole_share(rows if wholes is None else wholes),
    )


# ---- bits


@dataclass(frozen=True)
class BitsPerToken:
    """An upper bound on −log₂ p(tokens) of texts, given their lengths and, of chats, the prompts; per token."""

    bits: float
    error: float | None
    """Standard error over the pictures, bits; None of a single one."""
    diffusion: float
    reconstruction: float
    """The two parts of `bits`."""
    last_time: float
    """Where the integral ends and the tokens are told by their own noisy cells alone."""
    pictures: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.bits:.3f}" + (f" ± {self.error:.3f}" if self.error is not None else "")


@torch.no_grad()
def bits_per_token(
    pipe: TokenImagePipeline,
    data: TokenImageDataset,
    count: int = 64,
    times: int = 16,
    seed: int = 0,
    last_time: float | None = None,
) -> BitsPerToken:
    """The variational bound of a diffusion model in continuous time (Kingma et al. 2021, "VDM") on discrete tokens.

    −ln p(tokens) ≤ ½ ∫ SNR'(t)·E‖x − x̂(x_t, t)‖² dt + E[−ln p(tokens | x_last)], with SNR = (t / (1 − t))², over the
    pixels of tokens that are not known. It begins at t = 0, where x_t is the prior's noise exactly: no term for the
    prior is needed. x̂ is clipped to the pictures' range. At the last time, p of each token alone is the softmax of the
    Gaussian log-likelihoods of all codes, whatever the denoiser says.

    With r = √SNR the integral is ∫ r·E‖x − x̂‖² dr: r is drawn evenly (it is most of all between 0.2 and 1 that cells
    become known), for each picture by one random shift of `times` even places, which keeps it unbiased.

    Args:
        count: pictures, chosen at random.
        times: calls of the denoiser for each.
        last_time: below 1. By default where `_TOLD` bits of a token are left open: earlier the cells do not tell it,
            later the bound suffers from every pixel that is not −1 or 1 to the last digit.

    Raises:
        UserError: numbers that cannot be.
    """
    if times < 1 or (last_time is not None and not 0 < last_time < 1):
        raise UserError(f"times {times}, last_time {last_time}: expected 1 or more, and a time between 0 and 1")
    code = data.code
    end = _where_told(data, seed) if last_time is None else last_time / (1 - last_time)
    parts, lengths = [], []
    for given in _given(data, count, seed):
        draws, shape = Draws(seed, 0, given.index), given.clean.shape[1:]
        pixels = code.over_pixels(given.counted.float(), data.img_size)[:, None]  # (B, 1, H, W)
        start, integral = draws.uniform("place"), torch.zeros(len(given.index), dtype=torch.float64)
        for step in range(times):
            r = (step + start) * (end / times)  # (B,)
            x = _noised(given.clean, draws.normal(f"bits {step}", *shape), r)
            predicted = _predicted(pipe, x, r / (1 + r), given).clamp(-1, 1)
            squared = ((predicted - given.clean).square() * pixels).sum((1, 2, 3)).double()
            integral += (end / times) * r * squared
        noisy = _noised(given.clean, draws.normal("bits at the end", *shape), torch.full_like(start, end))
        told = torch.zeros(given.counted.shape, dtype=torch.float64)
        told[given.counted] = _bits_alone(
            code, (1 + end) * code.cells_of(noisy)[given.counted], given.tokens[given.counted], end
        )
        parts.append(torch.stack([integral / math.log(2), told.sum(1)], dim=1))
        lengths.append(given.counted.sum(1))
    each, tokens = torch.cat(parts), torch.cat(lengths).double()  # (N, 2), (N,)
    diffusion, reconstruction = (each.sum(0) / tokens.sum()).tolist()
    bits, error = diffusion + reconstruction, None
    if len(each) > 1:  # of a ratio of two sums over pictures
        off = each.sum(1) - bits * tokens
        error = (off.square().sum() * len(each) / (len(each) - 1)).sqrt().item() / tokens.sum().item()
    return BitsPerToken(bits, error, diffusion, reconstruction, end / (1 + end), len(each), int(tokens.sum()))


def _noised(clean: Tensor, noise: Tensor, r: Tensor) -> Tensor:
    """x_t of the time t = r / (1 + r), whose signal is r times as strong as its noise."""
    r = r[:, None, None, None]
    return (r * clean + noise) / (1 + r)


def _predicted(pipe: TokenImagePipeline, x: Tensor, t: Tensor, given: _Given) -> Tensor:
    """The clean pictures that the denoiser predicts, each at a time of its own (B,)."""
    device = pipe.device
    x, t, clean, mask, known = (value.to(device) for value in (x, t, given.clean, given.mask, given.known))
    conditioning = pipe.conditioner(torch.zeros(len(x), dtype=torch.int64, device=device))
    predicted = pipe.denoiser(with_known(x, clean, known), t, conditioning, kept_patches(mask, pipe.code.cell_size))
    return predicted[:, : x.shape[1]].float().cpu()


def _bits_alone(code: TokenCode, cells: Tensor, tokens: Tensor, r: float) -> Tensor:
    """−log₂ p(token | cell) of cells r·code + noise (N, n) with standard normal noise, all tokens as likely: (N,)."""
    bits = []
    for rows, right in zip(
        *(values.split(max(1, _AT_ONCE // code.num_tokens)) for values in (cells, tokens)), strict=True
    ):
        logits = (r * rows @ code.table.T).double()  # all codes are equally long: the likelihood's other terms cancel
        bits.append((logits.logsumexp(1) - logits.gather(1, right[:, None])[:, 0]) / math.log(2))
    return torch.cat(bits)


def _where_told(data: TokenImageDataset, seed: int) -> float:
    """The smallest r on a grid where cells alone leave less than `_TOLD` bits of a token open."""
    tokens = torch.cat([given.tokens[given.counted] for given in _given(data, 8, seed)])
    tokens = tokens.repeat(-(-512 // len(tokens)))[:1024]
    noise = Draws(seed, 1, torch.arange(len(tokens))).normal("told", data.code.length)
    cells, r = data.code.drawn(tokens), 0.25
    while _bits_alone(data.code, r * cells + noise, tokens, r).mean() > _TOLD:
        r *= 2**0.25
    return r


def unigram_bits(rows: Sequence[Sequence[int]]) -> float:
    """Entropy of the tokens' frequencies, bits: what a token costs where nothing but these is known."""
    counts = np.bincount(np.concatenate([np.asarray(row, np.int64) for row in rows]))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


# ---- all of it


@dataclass(frozen=True)
class TextScores:
    """What was found of one set of texts; None is what cannot be said of it."""

    texts: int
    valid: float | None
    """Share of the written cells whose signs are a token's."""
    right: float | None
    """Share of the texts that `is_right` takes."""
    prompts_kept: float | None
    """Share of the texts that begin with all tokens of their prompts."""
    novelty: Novelty
    """Of what was written, without prompts; against the training side."""


@dataclass(frozen=True, repr=False)
class TokenReport:
    """What an evaluation of written texts found. Printed, it is a table; `figures` shows the curve in a notebook."""

    data: str
    num_inference_steps: int
    seed: int
    scores: dict[str, TextScores]
    """By set: "samples" and "completions", of chats "answers", and "real" texts that validate, as their scale."""
    bits: dict[str, BitsPerToken]
    """By side, "validation" and "training"."""
    unigram_bits: float
    """Entropy of the training side's token frequencies, the scale of `bits`."""
    curve_of: str
    """The side whose pictures were noised."""
    curve: list[Recovered]
    notes: list[str]
    """What could not be said, and why."""
    output_dir: str | None
    figures: dict[str, "Figure"] = field(compare=False)

    def as_dict(self) -> dict:
        """Plain values for JSON."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "figures"}
        for name in ("scores", "bits"):
            plain[name] = {key: asdict(value) for key, value in plain[name].items()}
        return {**plain, "curve": [asdict(one) for one in self.curve], "copied_span": COPIED_SPAN}

    def __str__(self) -> str:
        lines = [self._summary()]
        if self.scores:
            lines += ["", *aligned(_rows(self.scores))]
        sides = ", ".join(f"{side} {bits}" for side, bits in self.bits.items())
        lines += ["", f"bits per token, at most: {sides} (by their frequencies alone {self.unigram_bits:.3f})"]
        few = self.curve[:: -(-len(self.curve) // 7)]
        rows = [(f"noised {self.curve_of}, from t =", *(f"{one.t:.2f}" for one in few))]
        rows += [(f"{name} that come back", *(percent(getattr(one, name)) for one in few)) for name in _CURVES]
        lines += ["", *aligned(rows)] if few else []
        lines += [f"note: {note}" for note in self.notes]
        if self.output_dir is not None:
            figures = ", ".join(f"figures/{name}.png" for name in self.figures)
            lines.append(f"written: evaluation.json, samples.jsonl, {figures} ({self.output_dir})")
        return "\n".join(lines)

    __repr__ = __str__

    def _summary(self) -> str:
        said = []
        for name, scores in self.scores.items():
            if name != "real":
                right = f"{percent(scores.right)} right, " if scores.right is not None else ""
                said.append(f"{scores.texts:,} {name}, {right}{percent(scores.novelty.whole)} copied whole")
        side, bits = next(iter(self.bits.items()))
        return "; ".join([*said, f"{bits.bits:.2f} bits per token of {side} texts"]) + f" ({self.data})"


_CURVES = {"cells": "cells", "pictures": "whole pictures"}


def _rows(scores: dict[str, TextScores]) -> list[tuple[str, ...]]:
    each = list(scores.values())
    rows = [("", *scores), ("texts", *(f"{one.texts:,}" for one in each))]
    shares = {"right": "right", "valid": "valid cells", "prompts_kept": "prompts kept"}
    for name, title in shares.items():
        values = [getattr(one, name) for one in each]
        if any(value is not None for value in values):
            rows.append((title, *map(percent, values)))
    rows += [
        (f"{n}-grams in training" if n > 1 else "tokens in training", *(percent(one.novelty.ngrams[n]) for one in each))
        for n in NGRAMS
    ]
    return [
        *rows,
        (f"in copied spans of {COPIED_SPAN}+ tokens", *(percent(one.novelty.copied) for one in each)),
        ("longest copied span, mean", *(f"{one.novelty.longest_mean:.1f}" for one in each)),
        ("longest copied span, largest", *(f"{one.novelty.longest:,}" for one in each)),
        ("copied whole", *(percent(one.novelty.whole) for one in each)),
    ]


def evaluate_tokens(
    pipe: TokenImagePipeline,
    train: TokenImageDataset,
    val: TokenImageDataset | None = None,
    output_dir: str | Path | None = None,
    num_samples: int = 256,
    num_inference_steps: int = 100,
    seed: int = 0,
    is_right: Callable[..., bool | float] | None = None,
    say: Callable[[str], None] = print,
) -> TokenReport:
    """Write texts and compare them with the data; write `evaluation.json`, `samples.jsonl` and a figure.

    Of texts, `num_samples` of their own and as many that go on with the first third of one that validates; of chats,
    answers to questions that validate. Beside them the same numbers of real texts that validate.

    Args:
        train, val: the sides of the data (`TokenImageDataset.sides`).
        output_dir: None: nothing is written.
        is_right: text → whether, or how far, it is right, such as `data.sentences.grammatical_share`; of chats
            (question, answer) →, such as `data.sentences.answers`.
        say: told what is being done, a line each; the report is returned.

    Raises:
        UserError: the model draws tokens otherwise than the data.
    """
    if (pipe.code.config, pipe.img_size) != (train.code.config, train.img_size):
        raise UserError(
            f"The model draws {pipe.code.config} in pictures of {pipe.img_size}, the data {train.code.config} in "
            f"pictures of {train.img_size}: give both the same tokenizer, cell_size, channels and img_size"
        )
    side, real = ("validation", val) if val is not None else ("training", train)
    chats, notes = train.use_chat_template, []
    if val is None:
        missing = "answers are to training questions," if chats else "no completions,"
        notes.append(f"no texts that validate: {missing} nothing real beside them, bits and curve of training texts")

    known = _Known(train, is_right)
    scores, lines = {}, []
    settings = {"num_inference_steps": num_inference_steps, "seed": seed}
    if not chats:
        say(f"writing {num_samples:,} samples in {num_inference_steps} steps")
        written = pipe(num_samples=num_samples, **settings)
        scores["samples"] = known.scores(written, None)
        lines += [{"text": text, "prompt": None} for text in written.texts]
    chosen = Draws(seed, 0, torch.arange(len(real))).uniform("text").argsort()[:num_samples].tolist()
    if chats or val is not None:
        prompts = [prompt for prompt in real.prompts(chosen) if prompt and len(prompt) < train.max_tokens]
        if prompts:
            name = "answers" if chats else "completions"
            say(f"writing {len(prompts):,} {name}")
            written = pipe(prompts, **settings)
            scores[name] = known.scores(written, prompts)
            asked = [train.text(prompt) for prompt in prompts]
            lines += [{"text": text, "prompt": of} for text, of in zip(written.texts, asked, strict=True)]
        else:
            notes.append(f"no {side} text begins with a prompt that leaves room to go on: nothing was completed")
    if val is not None:
        scores["real"] = known.of_real(val, chosen)
    say("measuring bits per token and what comes back from noise")
    bits = {side: bits_per_token(pipe, real, seed=seed)}
    if val is not None:
        bits["training"] = bits_per_token(pipe, train, seed=seed)
    curve = reconstruction_curve(pipe, real, seed=seed)
    shares = {title: [getattr(one, name) for one in curve] for name, title in _CURVES.items()}
    figure = plot_curves(
        [one.t for one in curve], shares, "t (0 is noise, 1 is data)", "share that comes back exactly", (0, 1)
    )
    report = TokenReport(
        train.data_path,
        num_inference_steps,
        seed,
        scores,
        bits,
        known.unigram_bits,
        side,
        curve,
        notes,
        None if output_dir is None else str(output_dir),
        {"reconstruction": figure},
    )
    if output_dir is not None:
        _write(report, lines, Path(output_dir))
    return report


def _write(report: TokenReport, lines: list[dict[str, str | None]], folder: Path) -> None:
    for name, figure in report.figures.items():
        with written_whole(folder / "figures" / f"{name}.png") as partial:
            figure.savefig(partial, format="png")
    with written_whole(folder / "samples.jsonl") as partial:
        partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    write_json(folder / "evaluation.json", report.as_dict())


class _Known:
    """The training side, to look up in, and what is right."""

    def __init__(self, train: TokenImageDataset, is_right: Callable[..., bool | float] | None) -> None:
        self._data, self._is_right = train, is_right
        rows = [train.tokens_of(index) for index in range(len(train))]
        wholes = _answers(train, range(len(train))) if train.use_chat_template else rows
        self._texts = KnownTexts(rows, wholes)
        self.unigram_bits = unigram_bits(wholes)

    def scores(self, written: Written, prompts: list[list[int]] | None) -> TextScores:
        starts = prompts or [[]] * len(written.tokens)
        new = [row[len(start) :] for row, start in zip(written.tokens, starts, strict=True)]
        kept = [row[: len(start)] == start for row, start in zip(written.tokens, starts, strict=True)]
        return TextScores(
            len(new),
            valid_share(self._data.code, written.pictures, written.mask, written.known),
            self._right(starts, written.texts),
            sum(kept) / len(kept) if prompts else None,
            novelty(new, self._texts, new if self._data.use_chat_template else written.tokens),
        )

    def of_real(self, val: TokenImageDataset, chosen: list[int]) -> TextScores:
        rows = [val.tokens_of(index) for index in chosen]
        starts = val.prompts(chosen) if val.use_chat_template else [[]] * len(rows)
        rows = [row[len(start) :] for row, start in zip(rows, starts, strict=True)]
        right = self._right(starts, [val.text(row.tolist()) for row in rows])
        return TextScores(len(rows), None, right, None, novelty(rows, self._texts))

    def _right(self, prompts: list[list[int]], texts: list[str]) -> float | None:
        if self._is_right is None:
            return None
        if self._data.use_chat_template:
            judged = [self._is_right(self._data.text(start), text) for start, text in zip(prompts, texts, strict=True)]
        else:
            judged = [self._is_right(text) for text in texts]
        return sum(map(bool, judged)) / len(judged)


def _answers(data: TokenImageDataset, indices: Sequence[int]) -> list[np.ndarray]:
    """What follows the prompts of chats."""
    prompts = data.prompts(indices)
    return [data.tokens_of(index)[len(prompt) :] for index, prompt in zip(indices, prompts, strict=True)]
