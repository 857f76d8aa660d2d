"""Written texts beside real ones: do they decode, are they right, are they copies, and what a model knows of texts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vavae_tools.data.tokens.code import TokenCode
from vavae_tools.data.tokens.dataset import TokenImageDataset
from vavae_tools.diffusion.solvers import time_grid
from vavae_tools.evaluation.bits import BitsPerToken, bits_per_token, chosen_images, unigram_bits
from vavae_tools.evaluation.metrics import aligned, percent, plain
from vavae_tools.evaluation.novelty import COPIED_SPAN, NGRAMS, KnownTexts, Novelty, novelty
from vavae_tools.pipelines.tokens import TokenImageOutput, TokenImagePipeline
from vavae_tools.plots import plot_curves, save_figures
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import atomic_write, write_json

if TYPE_CHECKING:
    from matplotlib.figure import Figure


TIMES = tuple(step / 20 for step in range(1, 20))


def valid_share(code: TokenCode, images: Tensor, mask: Tensor) -> float:
    """Return the share of cells of images (B, C, H, W) whose signs are exactly those of a token's code.

    Only those in a mask (B, H, W) count; NaN where there is none.
    """
    return code.is_valid(code.cells_of(images)[code.mask_to_cells(mask)]).double().mean().item()


@dataclass(frozen=True)
class Recovered:
    """What comes back exactly of clean images that were noised to t."""

    t: float
    cells: float  # share of the tokens
    images: float  # share of the images with all of their tokens


def reconstruction_curve(
    pipe: TokenImagePipeline,
    data: TokenImageDataset,
    times: Sequence[float] = TIMES,
    count: int = 64,
    steps: int = 20,
    seed: int = 0,
) -> list[Recovered]:
    """Noise images of the data to time t, denoise them from there on, and compare the tokens.

    A chat's prompt is known and does not count. All times see the same images and the same noise.

    Args:
        count: images, chosen at random.
        steps: of the whole way from 0 to 1.
    """
    grid = time_grid(steps, 1 / pipe.config.time_shift)
    lost, seen = torch.zeros(len(times), 2).double(), torch.zeros(2).double()  # cells, images
    for chosen in chosen_images(data, count, seed):
        draws, shape = Draws(seed, 0, chosen.index.to(pipe.device)), chosen.clean.shape[1:]
        noise = draws.normal("noise to start from", *shape).cpu()
        seen += torch.tensor([chosen.counted.sum(), len(chosen.counted)])
        for t, of_time in zip(times, lost, strict=True):
            alpha, sigma = pipe.shares(t)
            x = alpha * chosen.clean + sigma * noise
            left = torch.cat([torch.tensor([t]), grid[grid > t + 1e-4]])  # no step of a rounding error
            fresh = (draws.normal(f"noise {step}", *shape) for step in range(len(left)))
            made = pipe.denoise(x, chosen.mask, chosen.known, chosen.clean, left, noise=fresh).cpu()
            wrong = (data.code.nearest(data.code.cells_of(made)) != chosen.tokens) & chosen.counted  # (B, L)
            of_time += torch.tensor([wrong.sum(), wrong.any(1).sum()])
    return [Recovered(t, *shares) for t, shares in zip(times, ((seen - lost) / seen).tolist(), strict=True)]


# ---- all of it
@dataclass(frozen=True)
class TextScores:
    """What was found of one set of texts; None is what cannot be said of it."""

    texts: int
    valid: float | None  # share of the written cells whose signs are a token's
    right: float | None  # mean of what `is_right` returns of the texts
    prompts_kept: float | None  # share of the texts that begin with all tokens of their prompts
    novelty: Novelty  # of what was written, without prompts


@dataclass(frozen=True, repr=False)
class TokenReport:
    """What an evaluation of written texts found. Printed, it is a table; `figures` shows the curve in a notebook."""

    data: str
    num_inference_steps: int
    seed: int
    scores: dict[str, TextScores]  # "samples" and "completions", of chats "answers", and "real" texts that validate
    bits: dict[str, BitsPerToken]  # by subset, "validation" and "training"
    unigram_bits: float  # of token frequencies alone: the scale of `bits`
    curve_of: str
    curve: list[Recovered]  # what comes back of noised images of that subset
    notes: list[str]  # what could not be measured, and why
    output_dir: str | None
    figures: dict[str, "Figure"] = field(compare=False)

    def as_dict(self) -> dict:
        """Return plain values for JSON."""
        return {**plain(self), "copied_span": COPIED_SPAN}

    def __str__(self) -> str:
        subsets = ", ".join(f"{subset} {bits}" for subset, bits in self.bits.items())
        lines = [self._summary(), *(["", *aligned(_rows(self.scores))] if self.scores else []), ""]
        lines.append(f"bits per token, at most: {subsets} (by their frequencies alone {self.unigram_bits:.3f})")
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
        subset, bits = next(iter(self.bits.items()))
        return "; ".join([*said, f"{bits.bits:.2f} bits per token of {subset} texts"]) + f" ({self.data})"


_CURVES = {"cells": "cells", "images": "whole images"}


def _rows(scores: dict[str, TextScores]) -> list[tuple[str, ...]]:
    each = list(scores.values())
    rows = [("", *scores), ("texts", *(f"{one.texts:,}" for one in each))]
    for name, title in {"right": "right", "valid": "valid cells", "prompts_kept": "prompts kept"}.items():
        values = [getattr(one, name) for one in each]
        if any(value is not None for value in values):
            rows.append((title, *map(percent, values)))
    found = [one.novelty for one in each]
    for n in NGRAMS:
        title = f"{n}-grams in training" if n > 1 else "tokens in training"
        rows.append((title, *(percent(one.ngrams[n]) for one in found)))
    return [
        *rows,
        (f"in copied spans of {COPIED_SPAN}+ tokens", *(percent(one.copied) for one in found)),
        ("longest copied span, mean", *(f"{one.longest_mean:.1f}" for one in found)),
        ("longest copied span, largest", *(f"{one.longest:,}" for one in found)),
        ("copied whole", *(percent(one.whole) for one in found)),
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
    log: Callable[[str], None] = print,
) -> TokenReport:
    """Write texts and compare them with the data; write `evaluation.json`, `samples.jsonl` and a figure.

    Of texts, `num_samples` of their own and as many completions of the first third of one that validates; of chats,
    answers to questions that validate. Beside them stand as many real texts that validate.

    Args:
        output_dir: None: nothing is written.
        is_right: text → whether, or how far, it is right, such as `data.sentences.grammatical_share`; of chats
            (question, answer) →, such as `data.sentences.answers`.
    """
    if (pipe.code.config, pipe.img_size) != (train.code.config, train.img_size):
        raise UserError(
            f"The model draws {pipe.code.config} in images of {pipe.img_size}, the data {train.code.config} in "
            f"images of {train.img_size}: give both the same tokenizer, cell_size, channels and img_size"
        )
    subset, real = ("validation", val) if val is not None else ("training", train)
    known, notes = _Known(train, is_right), []
    chosen = Draws(seed, 0, torch.arange(len(real))).uniform("text").argsort()[:num_samples].tolist()
    asked = _asked(train, val, chosen, notes)
    if known.texts.texts < len(train):
        notes.append(f"copies are looked for in the first {known.texts.texts:,} of {len(train):,} training texts")
    scores, lines = {}, []
    for name, prompts in asked.items():
        of_what = {"prompts": prompts} if prompts else {"num_samples": num_samples}
        log(f"writing {len(prompts) if prompts else num_samples:,} {name} in {num_inference_steps} steps")
        written = pipe(**of_what, num_inference_steps=num_inference_steps, seed=seed)
        scores[name] = known.scores(written, prompts)
        begun = map(train.text, prompts) if prompts else [None] * num_samples
        texts = [{"text": text, "prompt": prompt} for text, prompt in zip(written.texts, begun, strict=True)]
        lines += [json.dumps(text, ensure_ascii=False) + "\n" for text in texts]
    if val is not None:
        scores["real"] = known.of_real(val, chosen)
    log("measuring bits per token and what comes back from noise")
    bits = {subset: bits_per_token(pipe, real, seed=seed)}
    if val is not None:
        bits["training"] = bits_per_token(pipe, train, seed=seed)
    curve = reconstruction_curve(pipe, real, seed=seed)
    shares = {title: [getattr(one, name) for one in curve] for name, title in _CURVES.items()}
    axes = "t (0 is noise, 1 is data)", "share that comes back exactly", (0, 1)
    report = TokenReport(
        train.data_path,
        num_inference_steps,
        seed,
        scores,
        bits,
        known.unigram_bits,
        subset,
        curve,
        notes,
        None if output_dir is None else str(output_dir),
        {"reconstruction": plot_curves([one.t for one in curve], shares, *axes)},
    )
    if output_dir is not None:
        folder = Path(output_dir)
        save_figures(report.figures, folder / "figures")
        with atomic_write(folder / "samples.jsonl") as partial:
            partial.write_text("".join(lines), encoding="utf-8")
        write_json(folder / "evaluation.json", report.as_dict())
    return report


def _asked(
    train: TokenImageDataset, val: TokenImageDataset | None, chosen: list[int], notes: list[str]
) -> dict[str, list[list[int]] | None]:
    """Return the sets of texts to write, with the prompts of each; a note is added where one cannot be."""
    chats, real = train.use_chat_template, train if val is None else val
    if val is None:
        missing = "answers are to training questions," if chats else "no completions,"
        notes.append(f"no texts that validate: {missing} nothing real beside them, bits and curve of training texts")
        if not chats:
            return {"samples": None}
    prompts = [prompt for prompt in real.prompts(chosen) if prompt and len(prompt) < train.max_tokens]
    if not prompts:
        notes.append("no real text begins with a prompt that leaves room to go on: nothing was completed")
    of_prompts = {"answers" if chats else "completions": prompts} if prompts else {}
    return of_prompts if chats else {"samples": None, **of_prompts}


class _Known:
    """The training subset, to look up in, and what is right."""

    def __init__(self, train: TokenImageDataset, is_right: Callable[..., bool | float] | None) -> None:
        self._data, self._is_right = train, is_right
        _, learnt = self._split(train, range(len(train)))
        self.texts = KnownTexts([train.tokens_of(index) for index in range(len(train))], learnt)
        self.unigram_bits = unigram_bits(learnt)

    def _split(self, data: TokenImageDataset, indices: Sequence[int]) -> tuple[list[list[int]], list[np.ndarray]]:
        """Return the prompts of chats, of texts nothing, and what follows them."""
        starts = data.prompts(indices) if data.use_chat_template else [[]] * len(indices)
        return starts, [data.tokens_of(index)[len(start) :] for index, start in zip(indices, starts, strict=True)]

    def scores(self, written: TokenImageOutput, prompts: list[list[int]] | None) -> TextScores:
        starts = prompts or [[]] * len(written.tokens)
        new = [row[len(start) :] for row, start in zip(written.tokens, starts, strict=True)]
        kept = [row[: len(start)] == start for row, start in zip(written.tokens, starts, strict=True)]
        return TextScores(
            len(new),
            valid_share(self._data.code, written.images, written.mask * (1 - written.known)),
            self._right(starts, written.texts),
            sum(kept) / len(kept) if prompts else None,
            novelty(new, self.texts, new if self._data.use_chat_template else written.tokens),
        )

    def of_real(self, val: TokenImageDataset, chosen: list[int]) -> TextScores:
        starts, rows = self._split(val, chosen)
        right = self._right(starts, [val.text(row.tolist()) for row in rows])
        return TextScores(len(rows), None, right, None, novelty(rows, self.texts))

    def _right(self, prompts: list[list[int]], texts: list[str]) -> float | None:
        if self._is_right is None:
            return None
        judged = [(text,) for text in texts]
        if self._data.use_chat_template:
            judged = zip(map(self._data.text, prompts), texts, strict=True)
        return sum(float(self._is_right(*of)) for of in judged) / len(texts)
