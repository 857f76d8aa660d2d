"""Do generated images make a classifier better? It is trained with and without them, and asked about images it has not
seen; time and frequency masks (SpecAugment) are the rival.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vavae_tools.data.images import DecodedImages, ImageSetDataModule
from vavae_tools.evaluation.classifier import default_steps, train_classifier
from vavae_tools.evaluation.compared import images_key, load_images
from vavae_tools.evaluation.html import write_report
from vavae_tools.evaluation.metrics import Interval, aligned, percent, plain
from vavae_tools.plots import plot_intervals, save_figures
from vavae_tools.runtime.console import print_beside_bars
from vavae_tools.runtime.errors import UserError, in_home, join_first
from vavae_tools.runtime.files import read_json, write_json
from vavae_tools.runtime.machine import device_of

REAL, MASKS = "real", "real, masked"
TRAININGS = "gain_trainings.json"
SHARES = (0.5, 1.0, 2.0, 4.0)  # generated images for each real one
SEEDS = 3  # one classifier's accuracy varies by more than most gains
DRAWS = 2000  # of the bootstrap
FEWEST = 10  # test images of a person from which there is a number for that person


@dataclass(frozen=True)
class MixtureScore:
    """What classifiers that were trained on one mixture of images do on the test images, as a mean over seeds."""

    name: str
    images: int  # they were trained on
    accuracy: Interval  # in percent, as all that follows
    macro_f1: Interval
    gain: Interval | None  # of accuracy, beside real images alone, image by image; None: these are they
    people: dict[str, float]  # accuracy, of those with images enough
    share: float | None = None  # generated images for each real one, beside all of these and without masks


@dataclass(frozen=True, repr=False)
class Gain:
    """Whether generated images help. Printed, it is a sentence and a table; `figures` shows it in a notebook."""

    verdict: str
    subset: str  # the images that are asked about
    test_images: int
    steps: int  # of each training
    seeds: int
    best: str  # the mixture with generated images that the verdict is about
    mixtures: list[MixtureScore]
    notes: list[str]
    key: str  # of the images, as `Evaluation` has it
    figures: dict[str, Any] = field(compare=False)  # matplotlib's

    def __str__(self) -> str:
        rows = [("trained on", "images", "accuracy, % [95 %]", "macro F1, %", "gain, points [95 %]")]
        for score in self.mixtures:
            gain = f"{score.gain:+.1f}" if score.gain else "-"
            rows.append((score.name, f"{score.images:,}", f"{score.accuracy:.1f}", f"{score.macro_f1.value:.1f}", gain))
        how = f"{self.test_images:,} {self.subset} images, {self.seeds} seeds, {self.steps:,} steps each"
        return "\n".join([self.verdict, "", *aligned(rows), f"({how})", *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__


class _Mixture(NamedTuple):
    name: str
    parts: Sequence[DecodedImages]
    masks: bool = False
    share: float | None = None  # of one that the verdict may be about


def evaluate_gain(
    generated_dir: str | Path,
    data_dir: str | Path,
    output_dir: str | Path = "outputs/evaluation",
    image_size: int | tuple[int, int] | None = None,
    shares: Sequence[float] = SHARES,
    seeds: int = SEEDS,
    steps: int | None = None,
    images_per_person: int | None = None,
    progress: bool = True,
    **source: Any,
) -> Gain:
    """Train classifiers on real images, on generated ones and on both.

    Written are `gain.json`, a figure, and `evaluation.html`, which holds what `evaluate_images` wrote there, too.

    All are trained for the same number of steps, and asked about the test images, or where a data set has none, about
    those that validate. What is already trained in `output_dir` is not trained again.

    Args:
        generated_dir, data_dir, image_size, source: as of `evaluate_images`.
        shares: generated images for each real one; those for which there are too few are left out, and said.
        seeds: trainings of each kind.
        images_per_person: real ones to train on; by default all.
    """
    output_dir = in_home(output_dir)
    real, generated, notes = load_images(in_home(generated_dir), data_dir, image_size, progress=progress, **source)
    labels = real.labels
    subset, test = ("test", real.test_data) if real.test_data is not None else ("validation", real.val_data)
    if test is None:
        raise UserError("No image is held out to ask about: split the data with data_split.py --test_ratio 0.2")
    if len(labels) < 2:
        raise UserError("The data has images of one person only: nothing to tell apart")
    if subset == "validation":
        notes.append(
            "the validation images chose checkpoints and the mixture, too: data_split.py --test_ratio 0.2 keeps others"
        )
    mixtures = list(_mixtures(generated, real, shares, images_per_person, notes))
    steps = steps or default_steps(2 * sum(map(len, mixtures[0].parts)))
    asked, hidden = (test,) if test is real.val_data else (test, real.val_data), None if progress else True
    asked = [data for data in asked if data is not None]
    named = _named(mixtures, asked, len(labels), steps, seeds, output_dir / TRAININGS, disable=hidden)
    known = test.labels
    scores = [_score(mixture, named[mixture.name][0], named[REAL][0], known, labels) for mixture in mixtures]
    best = _best(scores, named, asked[-1].labels)  # the validation images choose where others are asked about
    if few := [name for name, label in labels.items() if (known == label).sum() < FEWEST]:
        notes.append(f"{join_first(few)}: fewer than {FEWEST} {subset} images, too few for a number of their own")
    key = images_key(real, generated)
    figures = {"gain": plot_intervals({score.name: astuple(score.accuracy) for score in scores}, "accuracy, %")}
    gain = Gain(
        _verdict(best, scores[0], subset), subset, len(test), steps, seeds, best.name, scores, notes, key, figures
    )
    save_figures(figures, output_dir / "figures")
    write_json(output_dir / "gain.json", plain(gain))
    write_report(output_dir)
    return gain


def _best(scores: Sequence[MixtureScore], named: dict[str, list[Tensor]], known: Tensor) -> MixtureScore:
    """Return the share of generated images beside all real ones that is best on the last set that was asked about."""
    return max(
        (score for score in scores if score.share is not None), key=lambda score: (named[score.name][-1] == known).sum()
    )


# ---- what is trained on
def _mixtures(
    generated: DecodedImages,
    real: ImageSetDataModule,
    shares: Sequence[float],
    per_person: int | None,
    notes: list[str],
) -> Iterator[_Mixture]:
    """Yield the mixtures; of each person the first images by the data's own order, which is by name."""
    train, labels = real.train_data, list(real.labels.values())
    places = {label: (train.labels == label).nonzero().flatten().tolist() for label in labels}
    counts = {label: min(len(rows), per_person or len(rows)) for label, rows in places.items()}
    of_real = _first(train, places, counts)
    yield _Mixture(REAL, [of_real])
    yield _Mixture(MASKS, [of_real], masks=True)
    made = {label: (generated.labels == label).nonzero().flatten().tolist() for label in labels}
    left = {label: rows[counts[label] :] for label, rows in places.items()}
    enough = [share for share in sorted(shares) if all(round(share * counts[i]) <= len(made[i]) for i in labels)]
    if missing := [f"{share:g}" for share in shares if share not in enough]:
        few = f"{min(len(made[label]) / max(1, counts[label]) for label in labels):.2g}"
        notes.append(f"there are {few} generated images for each real one: too few for {', '.join(missing)}")
    if not enough:
        enough = [min(len(made[label]) / max(1, counts[label]) for label in labels)]
    for share in enough:
        wanted = {label: round(share * count) for label, count in counts.items()}
        part = _first(generated, made, wanted)
        yield _Mixture(f"real + {share:.2g} generated", [of_real, part], share=share)
        if share == enough[-1]:
            yield _Mixture(f"{MASKS} + {share:.2g} generated", [of_real, part], masks=True)
            yield _Mixture("generated alone", [part])
        if per_person and all(len(left[label]) >= count for label, count in wanted.items()):
            yield _Mixture(f"real + {share:.2g} more real", [of_real, _first(train, left, wanted)])


def _first(data: DecodedImages, places: dict[int, list[int]], counts: dict[int, int]) -> DecodedImages:
    return data.part([place for label, count in counts.items() for place in places[label][:count]])


# ---- what the classifiers say
def _named(
    mixtures: Sequence[_Mixture], asked: Sequence[DecodedImages], people: int, steps: int, seeds: int, path: Path, **bar
) -> dict[str, list[Tensor]]:
    """Return by mixture the labels that its classifiers give the images of each set that is asked about: (seeds, N)."""
    kept, device, found = read_json(path) if path.is_file() else {}, device_of(0), {}
    with tqdm(total=len(mixtures) * seeds, desc="training classifiers", unit="training", **bar) as progress:
        for mixture in mixtures:
            rows = []
            for seed in range(seeds):
                key = _key(mixture, asked, steps, seed)
                if key not in kept:
                    model = train_classifier(mixture.parts, people, steps, seed, device, False, mixture.masks)
                    kept[key] = [model.judge(data)[1].tolist() for data in asked]
                    write_json(path, kept)
                rows.append(kept[key])
                progress.update()
            found[mixture.name] = [torch.tensor(of_set) for of_set in zip(*rows, strict=True)]
            if not bar.get("disable"):
                right = (found[mixture.name][0] == asked[0].labels).float().mean().item()
                print_beside_bars(f"{mixture.name}: accuracy {percent(right)}")
    return found


def _key(mixture: _Mixture, asked: Sequence[DecodedImages], steps: int, seed: int) -> str:
    digest = hashlib.sha256(json.dumps([mixture.masks, steps, seed]).encode())
    for data in (*mixture.parts, *asked):
        digest.update(json.dumps([data.names, data.labels.tolist()]).encode())
        for part in data.contents():
            digest.update(part)
    return digest.hexdigest()[:16]


def _score(mixture: _Mixture, named: Tensor, of_real: Tensor, known: Tensor, labels: dict[str, int]) -> MixtureScore:
    right, real = (100.0 * (of == known) for of in (named, of_real))  # (seeds, N)
    weights = _resampled(known, len(named))
    gain = None if mixture.name == REAL else _interval(right - real, *weights)
    people = {name: right[:, known == label].mean().item() for name, label in labels.items()}
    people = {name: value for name, value in people.items() if (known == labels[name]).sum() >= FEWEST}
    images = sum(map(len, mixture.parts))
    accuracy, f1 = _interval(right, *weights), _macro_f1(named, known, *weights)
    return MixtureScore(mixture.name, images, accuracy, f1, gain, people, mixture.share)


def _resampled(known: Tensor, seeds: int) -> tuple[Tensor, Tensor]:
    """Return weights of seeds (DRAWS + 1, seeds) and of images (DRAWS + 1, N): all equal, then drawn with replacement.

    Images are drawn person by person, seeds and images independently (the pigeonhole bootstrap, Owen 2007).
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(places: Tensor, size: int) -> Tensor:
        rows = places[torch.randint(len(places), (DRAWS, len(places)), generator=generator)]
        return torch.zeros(DRAWS, size).scatter_add_(1, rows, torch.ones(rows.shape))

    of_images = sum(drawn((known == label).nonzero().flatten(), len(known)) for label in known.unique())
    of_seeds = drawn(torch.arange(seeds), seeds)
    return tuple(torch.cat([torch.ones(1, of.shape[1]), of]) for of in (of_seeds, of_images))


def _interval(values: Tensor, of_seeds: Tensor, of_images: Tensor) -> Interval:
    """Return the mean of values (seeds, N) and its interval."""
    return _of_draws(of_seeds, of_images @ values.T / values.shape[1])


def _macro_f1(named: Tensor, known: Tensor, of_seeds: Tensor, of_images: Tensor) -> Interval:
    of_people = []
    for label in known.unique():
        found, there = (named == label).float(), (known == label).float().expand(named.shape)
        both = of_images @ (found * there).T  # (DRAWS + 1, seeds)
        of_people.append(200 * both / (of_images @ (found + there).T).clamp_min(1))
    return _of_draws(of_seeds, torch.stack(of_people).mean(dim=0))


def _of_draws(of_seeds: Tensor, values: Tensor) -> Interval:
    means = (of_seeds * values).sum(dim=1) / of_seeds.sum(dim=1)
    low, high = means[1:].quantile(torch.tensor([0.025, 0.975])).tolist()
    return Interval(means[0].item(), low, high)


def _verdict(best: MixtureScore, real: MixtureScore, subset: str) -> str:
    low, high = best.gain.low, best.gain.high
    share = f"{best.share:.2g} generated images for each real one"
    points = f"{best.gain.value:+.1f} points (95 % {low:+.1f} to {high:+.1f})"
    where = f"accuracy on {subset} images {real.accuracy.value:.1f} % → {best.accuracy.value:.1f} %"
    if low > 0:
        return f"use {share}: {points}, {where}"
    found = "a loss: do not use them" if high < 0 else "no gain that can be told"
    return f"{found}: {points} with {share}, the best share: {where}"
