"""What an evaluation shows."""

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor

from vavae_tools.evaluation.compared import CALIBRATION_BINS, PersonScore, Sets, Subset, all_answers
from vavae_tools.plots import plot_bars, plot_calibration, plot_confusions, plot_crosses, plot_curves, show_rows

_IMAGES_PER_ROW = 4  # images of each kind beside each other
_MOST_PEOPLE = 40  # in a confusion matrix that a page holds
_MIN_IMAGES = 10  # in a bin of confidence, of which an accuracy tells anything


def make_figures(
    people: dict[str, PersonScore],
    several: Sequence[Sets],
    neighbourhoods: dict[str, Any],
    spectra: dict[str, dict[str, Tensor]],
    closest: Tensor,
) -> dict[str, Any]:
    """Return figures by name: images, and of the numbers those for which there are images enough.

    Args:
        people, neighbourhoods: scores and `PersonNeighbourhoods` by person.
        several: what each of the classifiers says; the images are shown with the first one's distances.
        spectra: by axis and subset.
        closest: places (2, N) of generated images and the training images nearest to them, the nearest first.
    """
    figures = _images(people, several[0], closest)
    if several[0].generated.several_persons:
        groups = {"generated": [100 * score.generated_accuracy for score in people.values()]}
        if several[0].validation is not None:
            groups = {"real": [100 * (score.validation_accuracy or 0.0) for score in people.values()], **groups}
        figures["right_person"] = plot_bars(groups, list(people), "accuracy, %")
    answers = {kind: all_answers(several, kind) for kind in several[0].judged()}
    names = list(several[0].labels)
    if answers and len(names) <= _MOST_PEOPLE:
        labels = list(several[0].labels.values())
        shares = {kind: _confusion(*of)[labels][:, labels] for kind, of in answers.items()}
        figures["confusion"] = plot_confusions(shares, names)
    if bins := {kind: found for kind, of in answers.items() if (found := _bins(*of, len(several)))}:
        figures["calibration"] = plot_calibration(bins)
    if neighbourhoods:
        kinds = {"generated": "o", "real": "x"}
        crosses = {
            (name, kind, mark): tuple(astuple(getattr(of, kind)[which]) for which in ("recall", "precision"))
            for name, of in neighbourhoods.items()
            for kind, mark in kinds.items()
        }
        figures["precision_recall"] = plot_crosses(crosses, "recall", "precision")
    for axis, by_subset in spectra.items():
        curves = {name: (10 * values[1:].clamp_min(1e-12).log10()).tolist() for name, values in by_subset.items()}
        cycles = range(1, 1 + len(curves["generated"]))
        figures[f"spectrum_{axis}"] = plot_curves(cycles, curves, f"cycles in an image along {axis}", "power, dB")
    return figures


def _confusion(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return percent of the images of each person (rows) that are named as each (columns); NaN without images."""
    from torchmetrics.functional.classification import multiclass_confusion_matrix

    counts = multiclass_confusion_matrix(probabilities, labels, probabilities.shape[1])
    return 100 * counts / counts.sum(dim=1, keepdim=True)


def _bins(probabilities: Tensor, labels: Tensor, classifiers: int) -> tuple[list[float], list[float]]:
    """Return percent of mean confidence and of accuracy in each bin with images enough."""
    confidence, named = probabilities.max(dim=1)
    right, place = (named == labels).float(), (confidence * CALIBRATION_BINS).long().clamp_max(CALIBRATION_BINS - 1)
    inside = [place == bin for bin in range(CALIBRATION_BINS)]
    inside = [of for of in inside if of.sum() >= _MIN_IMAGES * classifiers]
    return tuple([100 * values[of].mean().item() for of in inside] for values in (confidence, right)) if inside else ()


def _images(people: dict[str, PersonScore], sets: Sets, closest: Tensor) -> dict[str, Any]:
    labels, made, known, unseen = sets
    shown = list(people)[:: -(-len(people) // 8)]  # no more than 8
    rows = {name: torch.cat([_some(subset, labels[name]) for subset in (unseen or known, made)]) for name in shown}
    titles = ["real", *[""] * (_IMAGES_PER_ROW - 1), "generated"]
    figures = {"real_and_generated": show_rows(rows, titles, gap_after=_IMAGES_PER_ROW)}
    a, b = closest[:, : 2 * _IMAGES_PER_ROW]
    first, second, apart = made.data.get_batch(a), known.data.get_batch(b), made.features[a] - known.features[b]
    name_of = {label: name for name, label in labels.items()}
    three = zip(first["labels"].tolist(), second["labels"].tolist(), apart.norm(dim=1).tolist(), strict=True)
    titles = [f"{name_of[one]} / {name_of[other]}\ndistance {length:.2f}" for one, other, length in three]
    pairs = {"generated": first["images"], "nearest in training": second["images"]}
    return {**figures, "generated_and_nearest": show_rows(pairs, titles)}


def _some(subset: Subset, label: int) -> Tensor:
    """Return a few images of one label, from its first to its last; white where there are too few."""
    places, data = subset.of(label), subset.data
    if len(places) > _IMAGES_PER_ROW:
        places = places[torch.linspace(0, len(places) - 1, _IMAGES_PER_ROW).long()]
    white = torch.full((_IMAGES_PER_ROW - len(places), data.channels, *data.image_size), 255, dtype=torch.uint8)
    return torch.cat([data.get_batch(places)["images"], white]) if len(places) else white
