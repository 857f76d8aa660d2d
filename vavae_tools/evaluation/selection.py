"""Keep the generated images that are the right person, plausible, no copies, and far from each other."""

import shutil
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vavae_tools.evaluation.classifier import cached_classifier
from vavae_tools.evaluation.compared import Subset, judged_by, load_images
from vavae_tools.evaluation.metrics import aligned, copy_limit, nearest, within_reach
from vavae_tools.runtime.errors import UserError, contents, in_home, join_first
from vavae_tools.runtime.files import write_json
from vavae_tools.runtime.machine import device_of

RECORD = "selection.json"
CONFIDENCE = 0.5  # calibrated: below, another person is as probable as this one
REASONS = ("wrong person", "unsure", "implausible", "copy", "not needed")
"""Why an image is dropped; the first that holds counts."""


@dataclass(frozen=True, repr=False)
class Selection:
    """What was kept and why the rest was not. Printed, it is a sentence and a table."""

    output_dir: str
    images_per_person: int | None
    temperature: float  # of the classifier's calibration (Guo et al. 2017)
    people: dict[str, dict[str, int]]  # "kept" and each of `REASONS`
    notes: list[str]

    def __str__(self) -> str:
        total = Counter()
        for counts in self.people.values():
            total.update(counts)
        wanted = f", {self.images_per_person} of each person wanted" if self.images_per_person else ""
        line = f"{total['kept']:,} of {total.total():,} images are kept{wanted} ({self.output_dir})"
        rows = [("person", "kept", *REASONS)]
        rows += [
            (name, *(f"{of[key]:,}" for key in rows[0][1:])) for name, of in [*self.people.items(), ("all", total)]
        ]
        return "\n".join([line, *self._lacking(), "", *aligned(rows), *(f"note: {note}" for note in self.notes)])

    __repr__ = __str__

    def _lacking(self) -> list[str]:
        """Return a line on how many more to sample for whom, from the share that was kept."""
        more = []
        for name, of in self.people.items():
            lack, usable = (self.images_per_person or 0) - of["kept"], of["kept"] / max(1, sum(of.values()))
            if lack > 0:
                more.append(f"{name} lacks {lack}" + (f", about {lack / usable:.0f} more samples" if usable else ""))
        return (
            [f"{join_first(more)}: sample with another --seed into the same folder, and select again"] if more else []
        )


def select_images(
    generated_dir: str | Path,
    data_dir: str | Path,
    output_dir: str | Path = "outputs/selected",
    images_per_person: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    classifier_dir: str | Path = "outputs/evaluation",
    seed: int = 0,
    progress: bool = True,
    **source: Any,
) -> Selection:
    """Copy the generated images that are worth training on into a folder per person, and `selection.json`.

    Kept are those whose person a classifier of the real training images sees, with calibrated confidence, that lie
    within the reach of a training image in its features, and that are no copies (`metrics.copy_limit`); of these the
    farthest from those kept before, until there are enough. Test images are never looked at.

    Args:
        generated_dir, data_dir, image_size, source: as of `evaluate_images`.
        output_dir: replaced where it holds an earlier selection; must hold nothing else.
        images_per_person: so many at most; None: all that may be kept.
        classifier_dir: where the evaluation keeps its classifier.
    """
    generated_dir, output_dir = in_home(generated_dir), in_home(output_dir)
    if images_per_person is not None and images_per_person < 1:
        raise UserError(f"--images_per_person {images_per_person}: expected at least 1, or nothing for all")
    if output_dir.resolve() == generated_dir.resolve():
        raise UserError(f"--output_dir {output_dir} is the folder to select from: name another")
    if output_dir.exists() and any(output_dir.iterdir()) and not (output_dir / RECORD).is_file():
        raise UserError(f"{output_dir} {contents(output_dir)} and no {RECORD}: name another --output_dir")
    real, generated, notes = load_images(generated_dir, data_dir, image_size, progress, seed=seed, **source)
    train, labels = real.train_data, real.labels
    if len(train.labels.unique()) < 2:
        raise UserError(f"{data_dir} has training images of one person only: no classifier can tell who is who")
    device = {"device": device_of(0), "progress": progress}
    classifier = cached_classifier(train, real.num_classes, in_home(classifier_dir), seed, **device)
    known, made = judged_by(classifier, train), judged_by(classifier, generated)
    temperature = 1.0
    if real.val_data is None:
        notes.append("no validation images: the classifier's confidence is as it is, not calibrated")
    else:
        temperature = fitted_temperature(judged_by(classifier, real.val_data))
    reasons = _reasons(known, made, temperature)
    people, kept = {}, []
    for name, label in labels.items():
        of, dropped = made.of(label), Counter(reasons[place] for place in made.of(label).tolist())
        if not len(of):
            notes.append(f"{name} has no generated images")
        rest = of[[reasons[place] == "" for place in of.tolist()]]
        order = rest[farthest_first(made.features[rest])] if len(rest) else rest
        chosen = order[:images_per_person].tolist()
        kept += chosen
        counts = {"kept": len(chosen), **{reason: dropped[reason] for reason in REASONS}}
        people[name] = counts | {"not needed": len(order) - len(chosen)}
    selection = Selection(str(output_dir), images_per_person, temperature, people, notes)
    _write(generated_dir, [generated.names[place] for place in kept], output_dir, selection)
    return selection


def fitted_temperature(validation: Subset) -> float:
    """Return the temperature with which held-out images are most probable as who they are (Guo et al. 2017)."""
    logits, temperatures = validation.probabilities.clamp_min(1e-12).log(), torch.logspace(-1, 1, 101)
    losses = [torch.nn.functional.cross_entropy(logits / t, validation.data.labels) for t in temperatures]
    return temperatures[torch.stack(losses).argmin()].item()


def farthest_first(features: Tensor) -> Tensor:
    """Return the order (N,) of features (N, D) from the most usual on, each the farthest from those before it."""
    features = features.double()
    apart = torch.cdist(features, features)
    order = [int((features - features.mean(dim=0)).norm(dim=1).argmin())]
    left = apart[order[0]].clone()
    for _ in range(len(features) - 1):
        left[order[-1]] = -1.0
        order.append(int(left.argmax()))
        left = torch.minimum(left, apart[order[-1]])
    return torch.tensor(order)


def _reasons(known: Subset, made: Subset, temperature: float) -> list[str]:
    """Return why each generated image is dropped, or "" where it may be kept."""
    probabilities = (made.probabilities.clamp_min(1e-12).log() / temperature).softmax(dim=1)
    confidence = probabilities.gather(1, made.data.labels[:, None])[:, 0]
    plausible = within_reach(known.features, made.features, min(3, len(known.features) - 1)).any(dim=0)
    checks = {
        "wrong person": made.named != made.data.labels,
        "unsure": confidence < CONFIDENCE,
        "implausible": ~plausible,
        "copy": nearest(made.features, known.features)[1] < copy_limit(known.features),
    }
    return [next((why for why, of in checks.items() if of[row]), "") for row in range(len(made.data))]


def _write(source: Path, names: list[str], output_dir: Path, selection: Selection) -> None:
    partial = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in names:
        target = partial / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)
    write_json(partial / RECORD, {**asdict(selection), "images": sorted(names)})
    if output_dir.exists():
        shutil.rmtree(output_dir)
    partial.replace(output_dir)
