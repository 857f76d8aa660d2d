"""What an evaluation shows."""

from typing import Any

import torch
from torch import Tensor

from vavae_tools.evaluation.compared import PersonScore, Sets, Subset
from vavae_tools.plots import plot_bars, show_rows

_IMAGES_PER_ROW = 4  # images of each kind beside each other


def make_figures(people: dict[str, PersonScore], sets: Sets, closest: Tensor) -> dict[str, Any]:
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
    figures["generated_and_nearest"] = show_rows(pairs, titles)
    if made.several_persons:
        groups = {"generated": [100 * score.generated_accuracy for score in people.values()]}
        if unseen is not None:
            groups = {"real": [100 * (score.validation_accuracy or 0.0) for score in people.values()], **groups}
        figures["right_person"] = plot_bars(groups, list(people), "accuracy, %")
    return figures


def _some(subset: Subset, label: int) -> Tensor:
    """Return a few images of one label, from its first to its last; white where there are too few."""
    places, data = subset.of(label), subset.data
    if len(places) > _IMAGES_PER_ROW:
        places = places[torch.linspace(0, len(places) - 1, _IMAGES_PER_ROW).long()]
    white = torch.full((_IMAGES_PER_ROW - len(places), data.channels, *data.image_size), 255, dtype=torch.uint8)
    return torch.cat([data.get_batch(places)["images"], white]) if len(places) else white
