"""Written texts beside real ones: do they decode, are they right, are they copies, and what a model knows of texts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from vavae_tools.data.tokens.dataset import TokenImageDataset
from vavae_tools.diffusion.solvers import time_grid
from vavae_tools.evaluation.bits import BitsPerToken, bits_per_token, chosen_images, unigram_bits
from vavae_tools.evaluation.metrics import aligned, percent, plain
from vavae_tools.pipelines.tokens import TokenImageOutput, TokenImagePipeline
from vavae_tools.plots import plot_curves, save_figures
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError, in_home
from vavae_tools.runtime.files import atomic_write, write_json

TIMES = tuple(step / 20 for step in range(1, 20))
NGRAMS = (1, 2, 4, 8)  # lengths of the n-grams that are looked up in the data, in tokens
COPIED_SPAN = 16  # tokens from which on a span that also stands in the data counts as copied
MAX_SEARCHED_TOKENS = 2_000_000  # of the data in which spans are looked up: their n-grams take about a gigabyte


# ---- what comes back from noise
@dataclass(frozen=True)
class Recovered:
    """What comes back exactly of clean images that were noised to t."""

    t: float
    cells: float  # share of the tokens
    images: float  # share of the images with all of their tokens


def reconstruction_curve(
    pipe: TokenImagePipeline, data: TokenImageDataset, times: Sequence[float] = TIMES, steps: int = 20, seed: int = 0
) -> list[Recovered]:
    """Noise 64 random images of the data to time t, denoise them from there on, and compare the tokens.

    A chat's prompt is known and does not count. All times see the same images and the same noise; `steps` are those
    of the whole way from 0 to 1.
    """
    grid = time_grid(steps, 1 / pipe.config.time_shift)
    lost, seen = torch.zeros(len(times), 2).double(), torch.zeros(2).double()  # cells, images
    for chosen in chosen_images(data, 64, seed):
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


# ---- copies
@dataclass(frozen=True)
class Novelty:
    """How much of some texts stands in the data, too."""

    ngrams: dict[int, float | None]  # by n: share of the n-grams that occur in the data; None where no text is so long
    longest_mean: float  # tokens in a text's longest span that stands in the data, mean over texts
    longest: int  # of all texts
    copied: float  # share of the tokens that are in copied spans of `COPIED_SPAN` tokens or more
    whole: float  # share of the texts that are in the data from the first token to the last


class KnownTexts:
    """Texts, as token numbers, in which spans of others are looked up; no span crosses the border of two.

    Only the first `texts` rows, of `MAX_SEARCHED_TOKENS` or so, are searched; `wholes` are compared as wholes.
    """

    def __init__(self, rows: Sequence[Sequence[int]], wholes: Sequence[Sequence[int]] | None = None) -> None:
        kept, tokens = [], 0
        for row in rows:
            tokens += len(row)
            if tokens > MAX_SEARCHED_TOKENS and kept:
                break
            kept.append(_as_text(row))
        self.texts, self._all = len(kept), "\0".join(kept)
        self.wholes = set(map(_as_text, rows if wholes is None else wholes))
        self._ngrams = cache(lambda n: {row[start : start + n] for row in kept for start in range(len(row) - n + 1)})

    def _has(self, span: str) -> bool:
        n = min(len(span), NGRAMS[-1])
        return span[-n:] in self._ngrams(n) and (n == len(span) or span in self._all)

    def spans(self, row: Sequence[int]) -> list[int]:
        """Return, for each token of a row, the length of the longest span from there on that stands in the texts."""
        row, lengths, length = _as_text(row), [], 0
        for start in range(len(row)):
            length = max(0, length - 1)
            while start + length < len(row) and self._has(row[start : start + length + 1]):
                length += 1
            lengths.append(length)
        return lengths


def _as_text(row: Sequence[int]) -> str:
    """Return a letter for each token, none of them the border's: Python looks spans of letters up fast."""
    return "".join(chr(int(token) + 1) for token in row)


def novelty(rows: Sequence[Sequence[int]], known: KnownTexts, wholes: Sequence[Sequence[int]] | None = None) -> Novelty:
    """Look token numbers of texts up in those of the data; `wholes` (None: the rows) are compared as wholes."""
    spans = list(map(known.spans, rows))
    tokens = sum(map(len, spans))
    if not tokens:
        raise UserError("No tokens to look up: expected at least one text that is not empty")
    ngrams = {}
    for n in NGRAMS:
        found = [length >= n for lengths in spans for length in lengths[: max(0, len(lengths) - n + 1)]]
        ngrams[n] = sum(found) / len(found) if found else None
    copied = 0
    for lengths in spans:
        until = 0  # the end of the last copied span
        for start, length in enumerate(lengths):
            until = start + length if length >= COPIED_SPAN else until
            copied += start < until
    longest = [max(lengths, default=0) for lengths in spans]
    whole = [_as_text(row) in known.wholes for row in (rows if wholes is None else wholes)]
    return Novelty(ngrams, sum(longest) / len(longest), max(longest), copied / tokens, sum(whole) / len(whole))


# ---- all of it
@dataclass(frozen=True)
class TextScores:
    """What was found of one set of texts; None is what cannot be said of it."""

    texts: int
    valid: float | None  # share of the written cells whose signs are a token's
    right: float | None  # mean of what `is_right` returns of the texts
    novelty: Novelty  # of what was written, without prompts

    def column(self) -> dict[str, str]:
        found = self.novelty
        return {
            "texts": f"{self.texts:,}",
            "right": percent(self.right),
            "valid cells": percent(self.valid),
            **{f"{n}-grams in training" if n > 1 else "tokens in training": percent(found.ngrams[n]) for n in NGRAMS},
            f"in copied spans of {COPIED_SPAN}+ tokens": percent(found.copied),
            "longest copied span, mean": f"{found.longest_mean:.1f}",
            "longest copied span, largest": f"{found.longest:,}",
            "copied whole": percent(found.whole),
        }


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
    figures: dict[str, Any] = field(compare=False)  # matplotlib's

    def as_dict(self) -> dict:
        """Return plain values for JSON."""
        return {**plain(self), "copied_span": COPIED_SPAN}

    def __str__(self) -> str:
        columns = [scores.column() for scores in self.scores.values()]
        rows = [(title, *(column[title] for column in columns)) for title in columns[0]] if columns else []
        rows = [row for row in rows if set(row[1:]) != {"-"}]
        table = aligned([("", *self.scores), *rows]) if rows else []
        lines = [f"made texts beside those of {self.data}", "", *table, ""]
        subsets = ", ".join(f"{subset} {bits}" for subset, bits in self.bits.items())
        lines.append(f"bits per token, at most: {subsets} (by their frequencies alone {self.unigram_bits:.3f})")
        few = self.curve[:: -(-len(self.curve) // 7)]
        rows = [(f"noised {self.curve_of}, from t =", *(f"{one.t:.2f}" for one in few))]
        rows += [(f"{title} that come back", *map(percent, shares)) for title, shares in _shares(few).items()]
        lines += ["", *aligned(rows), *(f"note: {note}" for note in self.notes)]
        if self.output_dir is not None:
            figures = ", ".join(f"figures/{name}.png" for name in self.figures)
            lines.append(f"written: evaluation.json, samples.jsonl, {figures} ({self.output_dir})")
        return "\n".join(lines)

    __repr__ = __str__


def _shares(curve: Sequence[Recovered]) -> dict[str, list[float]]:
    return {"cells": [one.cells for one in curve], "whole images": [one.images for one in curve]}


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
        is_right: text (of chats: question, answer) → whether, or how far, it is right, such as `grammatical_share`.
    """
    model, data = (f"{of.code.config} in images of {of.img_size}" for of in (pipe, train))
    if model != data:
        found = f"The model draws {model}, the data {data}"
        raise UserError(f"{found}: give both the same tokenizer, cell_size, channels and img_size")
    subset, real = ("validation", val) if val is not None else ("training", train)
    judge, notes, scores, lines = _Judge(train, is_right), [], {}, []
    chosen = Draws(seed, 0, torch.arange(len(real))).uniform("text").argsort()[:num_samples].tolist()
    asked = _asked(train, val, chosen, notes)
    if not train.use_chat_template:
        asked = {"samples": [[]] * num_samples, **asked}
    if judge.known.texts < len(train):
        notes.append(f"copies are looked for in the first {judge.known.texts:,} of {len(train):,} training texts")
    for name, prompts in asked.items():
        log(f"writing {len(prompts):,} {name} in {num_inference_steps} steps")
        written = pipe(prompts, num_inference_steps=num_inference_steps, seed=seed)
        scores[name] = judge.of_written(written, prompts)
        starts = [train.text(prompt) if prompt else None for prompt in prompts]
        lines += [{"text": text, "prompt": start} for text, start in zip(written.texts, starts, strict=True)]
    if val is not None:
        scores["real"] = judge.of_real(val, chosen)
    log("measuring bits per token and what comes back from noise")
    bits = {name: bits_per_token(pipe, of, seed=seed) for name, of in {subset: real, "training": train}.items()}
    curve = reconstruction_curve(pipe, real, seed=seed)
    axes = "t (0 is noise, 1 is data)", "share that comes back exactly", (0, 1)
    figures = {"reconstruction": plot_curves([one.t for one in curve], _shares(curve), *axes)}
    out = None if output_dir is None else str(output_dir)
    about, of_data = (train.data_path, num_inference_steps, seed), (bits, judge.unigram_bits, subset, curve)
    report = TokenReport(*about, scores, *of_data, notes, out, figures)
    if output_dir is not None:
        folder = in_home(output_dir)
        save_figures(report.figures, folder / "figures")
        with atomic_write(folder / "samples.jsonl") as partial:
            partial.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        write_json(folder / "evaluation.json", report.as_dict())
    return report


def _asked(
    train: TokenImageDataset, val: TokenImageDataset | None, chosen: list[int], notes: list[str]
) -> dict[str, list[list[int]]]:
    """Return the prompts of completions or answers, by that name; a note is added where they cannot be written."""
    chats = train.use_chat_template
    if val is None:
        prompts = "answers to training questions" if chats else "no completions"
        notes.append(f"no texts that validate: {prompts}, nothing real beside them, bits and curve of training texts")
        if not chats:
            return {}
    prompts = (train if val is None else val).prompts(chosen)
    prompts = [prompt for prompt in prompts if prompt and len(prompt) < train.max_tokens]
    if not prompts:
        notes.append("no real text begins with a prompt that leaves room to go on: nothing was completed")
    return {"answers" if chats else "completions": prompts} if prompts else {}


class _Judge:
    """What the training subset says of other texts."""

    def __init__(self, train: TokenImageDataset, is_right: Callable[..., bool | float] | None) -> None:
        self._train, self._is_right = train, is_right
        everything = range(len(train))
        _, learnt = self._split(train, everything)
        self.known, self.unigram_bits = KnownTexts(list(map(train.tokens_of, everything)), learnt), unigram_bits(learnt)

    def _split(self, data: TokenImageDataset, indices: Sequence[int]) -> tuple[list[list[int]], list[Sequence[int]]]:
        """Return the prompts of chats, of texts nothing, and what follows them."""
        starts = data.prompts(indices) if data.use_chat_template else [[]] * len(indices)
        return starts, [data.tokens_of(index)[len(start) :] for index, start in zip(indices, starts, strict=True)]

    def of_written(self, written: TokenImageOutput, prompts: list[list[int]]) -> TextScores:
        new = [row[len(prompt) :] for row, prompt in zip(written.tokens, prompts, strict=True)]
        code, wholes = self._train.code, new if self._train.use_chat_template else written.tokens
        cells = code.cells_of(written.images)[code.mask_to_cells(written.mask * (1 - written.known))]
        valid = code.is_valid(cells).double().mean().item()
        return TextScores(len(new), valid, self._right(prompts, written.texts), novelty(new, self.known, wholes))

    def of_real(self, val: TokenImageDataset, chosen: list[int]) -> TextScores:
        starts, rows = self._split(val, chosen)
        right = self._right(starts, [val.text(row.tolist()) for row in rows])
        return TextScores(len(rows), None, right, novelty(rows, self.known))

    def _right(self, prompts: list[list[int]], texts: list[str]) -> float | None:
        if self._is_right is None:
            return None
        asked = [map(self._train.text, prompts)] if self._train.use_chat_template else []
        return sum(map(float, map(self._is_right, *asked, texts))) / len(texts)
