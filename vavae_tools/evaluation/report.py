"""Generated images beside real ones: are they the right person, how far off, and are they copies."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vavae_tools.data.images import to_unit
from vavae_tools.evaluation import metrics
from vavae_tools.evaluation.classifier import cached_classifier, train_classifier
from vavae_tools.evaluation.compared import (
    PersonScore,
    Sets,
    Subset,
    calibration_error,
    images_key,
    judged_by,
    load_images,
    mean_score,
)
from vavae_tools.evaluation.figures import make_figures
from vavae_tools.evaluation.html import REPORT, write_report
from vavae_tools.evaluation.metrics import aligned, percent
from vavae_tools.evaluation.texture import Texture, measure_texture
from vavae_tools.evaluation.verdicts import judge_images
from vavae_tools.plots import save_figures
from vavae_tools.runtime.errors import in_home, join_first
from vavae_tools.runtime.files import write_json
from vavae_tools.runtime.machine import device_of, release_memory

SEEDS = 3
_DRAWS = 10  # of sets of equal size
_MIN_IMAGES = 20  # in each, of which three nearest neighbours tell anything
_MIN_IMAGES_PER_PERSON = 4  # images of a person that a distance can be measured with


@dataclass(frozen=True)
class PersonNeighbourhoods:
    """`metrics.neighbourhoods` of one person's images, generated and real training ones."""

    images: int  # in each set
    generated: dict[str, metrics.Interval]
    real: dict[str, metrics.Interval]


@dataclass(frozen=True)
class SetDistances:
    """How far generated images are from real validation images, beside how far real training images are.

    The Fréchet distances and `metrics.neighbourhoods` compare sets of one size with the same number of each person's
    images, so that the bias of small samples is the same in both; they are means over ten random draws of such sets.
    The kernel distances, which have no bias, take all images, and are means over persons. All are means over
    classifiers, in whose features they are measured.
    """

    images: int  # in each set
    frechet_generated: float
    frechet_real: float
    kernel_generated: metrics.Interval
    kernel_real: metrics.Interval
    neighbourhoods_generated: dict[str, metrics.Interval]  # by name of `metrics.neighbourhoods`; none of few images
    neighbourhoods_real: dict[str, metrics.Interval]
    people: dict[str, PersonNeighbourhoods]  # of those with images enough
    times_by_classifier: list[float]  # Fréchet distances, generated over real: of blurred images three gave 12 to 42

    @property
    def times_real(self) -> float:
        return self.frechet_generated / max(self.frechet_real, 1e-12)

    def __str__(self) -> str:
        sets = f"({self.images:,} images in each set; kernel distance: all, mean over persons)"
        return "\n".join([*aligned(self.rows()), sets])

    def rows(self) -> list[tuple[str, ...]]:
        times = f"{self.times_real:.1f} times"
        if len(self.times_by_classifier) > 1:
            lowest, highest = min(self.times_by_classifier), max(self.times_by_classifier)
            times += f" ({lowest:.1f} to {highest:.1f} by classifier)"
        rows = [
            ("to real validation images from", "generated", "real training", ""),
            ("Fréchet distance", *(f"{x:.3g}" for x in (self.frechet_generated, self.frechet_real)), times),
            ("kernel distance [95 %]", str(self.kernel_generated), str(self.kernel_real), ""),
        ]
        pairs = zip(self.neighbourhoods_generated.items(), self.neighbourhoods_real.values(), strict=True)
        return rows + [(f"{name} [95 %]", f"{made:.2f}", f"{real:.2f}", "") for (name, made), real in pairs]


@dataclass(frozen=True)
class CopyCheck:
    """How near generated images come to single training images, in the classifier's features."""

    limit: float  # distance below which one training image in a hundred has another one
    generated_within: float  # share of the images with a training image nearer than `limit`
    validation_within: float | None
    times_validation: float | None  # median distance as a multiple of real validation images'; of copies near 0

    def __str__(self) -> str:
        near = f"{percent(self.generated_within)} are as near as the nearest 1 % of training images are to each other"
        if self.validation_within is None:
            return f"nearest training image: {near}"
        times = f"{self.times_validation:.2f} times as far as from real validation images (median)"
        return f"nearest training image: {times}; {near} (real validation images: {percent(self.validation_within)})"


@dataclass(frozen=True)
class NearestImage:
    """The training image that is nearest to a generated one in the classifier's features."""

    generated: str
    training: str
    distance: float
    pixel_distance: float  # root of the mean squared difference, images in [-1, 1]


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What an evaluation found. Printed, it is a table; `figures` shows it in a notebook."""

    generated_dir: str
    data_dir: str
    output_dir: str
    image_size: tuple[int, int]
    classifiers: int  # which differ in their seeds alone, and over which accuracies and distances are means
    total: PersonScore
    people: dict[str, PersonScore]
    missing: list[str]  # persons of the real images without a generated one
    distances: SetDistances | None
    texture: Texture | None
    calibration: dict[str, float]  # mean difference of confidence and accuracy, of "generated" and "real" images
    copies: CopyCheck
    nearest: list[NearestImage]
    notes: list[str]
    key: str  # of the images, real and generated
    figures: dict[str, Any] = field(compare=False)  # matplotlib's

    @property
    def verdict(self) -> list[str]:
        return judge_images(self)

    def as_dict(self) -> dict:
        values = {"verdict": self.verdict, **metrics.plain(self), "figures": list(self.figures)}
        if self.distances:
            values["distances"]["times_real"] = self.distances.times_real
        return values

    def rows(self) -> list[tuple[str, ...]]:
        rows = [("person", "generated", "accuracy", "real validation", "accuracy")]
        for name, score in [*self.people.items(), ("all", self.total)]:
            made, real = percent(score.generated_accuracy), percent(score.validation_accuracy)
            rows.append((name, f"{score.generated:,}", made, f"{score.validation:,}", real))
        return rows

    def __str__(self) -> str:
        height, width = self.image_size
        persons = f"{len(self.people)} person{'s' * (len(self.people) != 1)}"
        about = f"{self.total.generated:,} generated images of {persons}, {height}×{width} ({self.generated_dir})"
        lines = [*self.verdict, "", about, "", *aligned(self.rows())]
        for part in (self.distances, self.texture):
            lines += ["", str(part)] if part else []
        lines += ["", str(self.copies), *(f"note: {note}" for note in self.notes)]
        return "\n".join([*lines, f"written: {REPORT}, evaluation.json, figures/ ({self.output_dir})"])

    __repr__ = __str__


def evaluate_images(
    generated_dir: str | Path,
    data_dir: str | Path,
    output_dir: str | Path = "outputs/evaluation",
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    seeds: int = SEEDS,
    progress: bool = True,
    **source: Any,
) -> Evaluation:
    """Compare generated images with the real ones that train and validate.

    Written are `evaluation.html`, which holds all and what `evaluate_gain` wrote there about the same images,
    `evaluation.json` and figures. Classifiers are trained on the real training images, once: they are kept in
    `output_dir` for the next evaluation.

    Args:
        generated_dir: holds ID_1/ ID_2/ … with the names of the split's folders, or of the other data's classes.
        data_dir, source: what `ImageDataModule` reads, such as a split, and how, such as train_split, val_share, crop.
        image_size: pixels, to which all images are resized; by default the generated images' own.
        seed: of the first classifier, of the subsets that are compared, of what is held out where nothing validates.
        seeds: classifiers, over which accuracies and distances are means.
    """
    output_dir = in_home(output_dir)
    real, generated, notes = load_images(
        in_home(generated_dir), data_dir, image_size, seed=seed, progress=progress, **source
    )
    labels, train, device = real.labels, real.train_data, device_of(0)
    several_persons = len(train.labels.unique()) > 1
    if not several_persons:
        notes.append(f"{data_dir} has images of one person only: distances are in features of an untrained network")
    several = []
    for each in range(seed, seed + seeds):
        if several_persons:
            classifier = cached_classifier(train, real.num_classes, output_dir, each, device=device, progress=progress)
        else:
            # features of random weights still tell sets of images apart (Naeem et al. 2020 measure with such)
            classifier = train_classifier(train, real.num_classes, 0, each, device, progress=False)
        all_data = generated, train, real.val_data
        several.append(Sets(labels, *(data and judged_by(classifier, data, several_persons) for data in all_data)))
        del classifier
        release_memory()
    people = {name: mean_score(several, label) for name, label in labels.items() if (generated.labels == label).any()}
    copies, pairs, closest = _check_copies(several[0])
    distances, (texture, spectra) = _distances(several, seed, notes), measure_texture(several[0])
    calibration = {kind: calibration_error(several, kind) for kind in several[0].judged()}
    figures = make_figures(people, several, distances.people if distances else {}, spectra, closest)
    evaluation = Evaluation(
        *map(str, (generated_dir, data_dir, output_dir)),
        *(train.image_size, seeds, mean_score(several, None), people, [name for name in labels if name not in people]),
        *(distances, texture, calibration, copies, pairs, notes, images_key(real, generated), figures),
    )
    save_figures(evaluation.figures, output_dir / "figures")
    write_json(output_dir / "evaluation.json", evaluation.as_dict())
    write_report(output_dir)
    return evaluation


def _distances(several: Sequence[Sets], seed: int, notes: list[str]) -> SetDistances | None:
    labels, *subsets = several[0]
    if several[0].validation is None:
        notes.append("no real validation images, so no distances and no accuracy beside (split with --val_ratio)")
        return None
    shares, few = {}, []
    for name, label in labels.items():
        fewest = min(len(subset.of(label)) for subset in subsets)
        if fewest >= _MIN_IMAGES_PER_PERSON:
            shares[label] = fewest
        elif len(several[0].generated.of(label)):
            few.append(name)
    if few:
        scope = "the distances leave them out" if shares else "no distances"
        lack = f"fewer than {_MIN_IMAGES_PER_PERSON} generated, training or validation images"
        notes.append(f"{join_first(few)}: {lack}: {scope}")
    if not shares:
        return None
    frechet, kernel = [], []
    for sets in several:
        drawn = [_same_mixes(sets, shares, seed * _DRAWS + draw) for draw in range(_DRAWS)]
        frechet.append(torch.tensor([[metrics.frechet_distance(of, unseen) for of in made] for *made, unseen in drawn]))
        *made, unseen = ([subset.features[subset.of(label)] for label in shares] for subset in sets[1:])
        kernel.append([metrics.mean_kernel_distance(of, unseen, seed=seed) for of in made])
    frechet, counts = torch.stack(frechet).mean(dim=1), sum(shares.values())  # (classifiers, 2)
    kernel = [_mean_interval(of) for of in zip(*kernel, strict=True)]
    means = _neighbourhoods(several, shares, seed) if counts >= _MIN_IMAGES else ({}, {})
    people, enough = {}, {name: label for name, label in labels.items() if shares.get(label, 0) >= _MIN_IMAGES}
    for name, label in enough.items():
        share = shares[label]
        people[name] = PersonNeighbourhoods(share, *_neighbourhoods(several, {label: share}, seed))
    times = (frechet[:, 0] / frechet[:, 1].clamp_min(1e-12)).tolist()
    return SetDistances(counts, *frechet.mean(dim=0).tolist(), *kernel, *means, people, times)


def _neighbourhoods(several: Sequence[Sets], shares: dict[int, int], seed: int) -> list[dict[str, metrics.Interval]]:
    """Return the means over classifiers and draws, of generated and of training images."""
    found = [
        [metrics.neighbourhoods(unseen, of) for of in made]
        for sets in several
        for *made, unseen in (_same_mixes(sets, shares, seed * _DRAWS + draw) for draw in range(_DRAWS))
    ]
    return [
        {name: _mean_interval([of[name] for of in drawn]) for name in drawn[0]} for drawn in zip(*found, strict=True)
    ]


def _mean_interval(intervals: Sequence[metrics.Interval]) -> metrics.Interval:
    return metrics.Interval(*torch.tensor([astuple(of) for of in intervals], dtype=torch.float64).mean(dim=0).tolist())


def _same_mixes(sets: Sets, shares: dict[int, int], seed: int) -> list[Tensor]:
    return [_same_mix(subset, shares, seed) for subset in sets[1:]]


def _same_mix(subset: Subset, shares: dict[int, int], seed: int) -> Tensor:
    """Return the features of `shares[label]` images of each label, drawn at random."""
    generator, chosen = torch.Generator().manual_seed(seed), []
    for label, n in shares.items():
        places = subset.of(label)
        chosen.append(places[torch.randperm(len(places), generator=generator)[:n]])
    return subset.features[torch.cat(chosen)]


def _check_copies(sets: Sets) -> tuple[CopyCheck, list[NearestImage], Tensor]:
    """Return the check, each generated image's nearest training image, and places (2, N) of both, nearest first."""
    made, known, unseen = sets.generated, sets.train, sets.validation
    places, lengths = metrics.nearest(made.features, known.features)
    limit = metrics.copy_limit(known.features)
    of_real = None, None
    if unseen is not None:
        usual = metrics.nearest(unseen.features, known.features)[1]
        times = lengths.median() / usual.median().clamp_min(1e-12)
        of_real = (usual < limit).float().mean().item(), times.item()
    pairs = []
    for row, (place, length) in enumerate(zip(places.tolist(), lengths.tolist(), strict=True)):
        a, b = (to_unit(data.get_batch([i])["images"]) for data, i in ((made.data, row), (known.data, place)))
        apart = (a - b).square().mean().sqrt().item()
        pairs.append(NearestImage(made.data.names[row], known.data.names[place], length, apart))
    order = lengths.argsort()
    closest = torch.stack([order, places[order]])
    return CopyCheck(limit, (lengths < limit).float().mean().item(), *of_real), pairs, closest
