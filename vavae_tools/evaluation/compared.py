"""Which images are compared with which, and what a classifier makes of them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.data.folders import IMAGE_EXTENSIONS, contents, list_folders
from vavae_tools.data.images import DecodedImages, ImageFolder, channels_of, hash_of, image_errors
from vavae_tools.evaluation.classifier import PersonClassifier
from vavae_tools.runtime.errors import UserError, join_first

CALIBRATION_BINS = 10


@dataclass(frozen=True)
class PersonScore:
    """The classifier's accuracy on images of one person or of all; None where it cannot be measured."""

    generated: int
    generated_accuracy: float | None
    validation: int
    validation_accuracy: float | None


class Subset(NamedTuple):
    """One set of images and what a classifier makes of them."""

    data: DecodedImages
    features: Tensor  # (N, D)
    probabilities: Tensor  # (N, persons)
    several_persons: bool  # else the classifier is untrained

    @property
    def named(self) -> Tensor:
        return self.probabilities.argmax(dim=1)

    def score(self, label: int | None) -> tuple[int, float | None]:
        """Return the number of its images, all or of one label, and the accuracy on them."""
        right = (self.named == self.data.labels)[self.of(label) if label is not None else slice(None)].float()
        return len(right), right.mean().item() if self.several_persons and len(right) else None

    def of(self, label: int) -> Tensor:
        """Return the places of a label's images."""
        return (self.data.labels == label).nonzero().flatten()


def judged_by(classifier: PersonClassifier, data: DecodedImages, several_persons: bool = True) -> Subset:
    features, _ = classifier.judge(data)
    with torch.inference_mode():
        probabilities = classifier.head(features.to(classifier.head.weight.device)).softmax(dim=1).cpu()
    return Subset(data, features, probabilities, several_persons)


class Sets(NamedTuple):
    labels: dict[str, int]  # by person
    generated: Subset
    train: Subset
    validation: Subset | None

    def score(self, label: int | None) -> PersonScore:
        """Return what the classifier makes of all images, or of one label's."""
        real = self.validation.score(label) if self.validation else (0, None)
        return PersonScore(*self.generated.score(label), *real)

    def judged(self) -> dict[str, Subset]:
        """Return the subsets that the classifier has not seen; none where there is nothing to tell apart."""
        subsets = {"real": self.validation, "generated": self.generated}
        return {kind: subset for kind, subset in subsets.items() if subset and subset.several_persons}


def mean_score(several: Sequence[Sets], label: int | None) -> PersonScore:
    """Return the scores of all images, or of one label's, as means over classifiers."""
    scores = [sets.score(label) for sets in several]

    def mean(name: str) -> float | None:
        values = [getattr(score, name) for score in scores]
        return None if None in values else sum(values) / len(values)

    made, real = mean("generated_accuracy"), mean("validation_accuracy")
    return replace(scores[0], generated_accuracy=made, validation_accuracy=real)


def all_answers(several: Sequence[Sets], kind: str) -> tuple[Tensor, Tensor]:
    """Return all classifiers' probabilities (M, persons) of one kind of image, and the labels (M,)."""
    subsets = [sets.judged()[kind] for sets in several]
    return torch.cat([subset.probabilities for subset in subsets]), torch.cat(
        [subset.data.labels for subset in subsets]
    )


def calibration_error(several: Sequence[Sets], kind: str) -> float:
    """Return how far confidence is from accuracy, on average over ten bins (Guo et al. 2017)."""
    from torchmetrics.functional.classification import multiclass_calibration_error

    probabilities, labels = all_answers(several, kind)
    return multiclass_calibration_error(probabilities, labels, probabilities.shape[1], n_bins=CALIBRATION_BINS).item()


def images_key(real: ImageDataModule, generated: ImageFolder) -> str:
    """Return a hash that tells these images from others."""
    return hash_of([real.fingerprint(), generated.fingerprint()])


def load_images(
    generated_dir: Path, data_dir: str | Path, image_size: int | tuple[int, int] | None, progress: bool, **source: Any
) -> tuple[ImageDataModule, ImageFolder, list[str]]:
    """Return real and generated images of one size, and what is to be said about them."""
    smallest = min(image_size) if isinstance(image_size, tuple) else image_size or 16
    if smallest < 16:
        raise UserError(f"image_size {image_size} is too small to tell persons apart: take at least 16 pixels")
    real = ImageDataModule(data_dir, image_size or smallest, num_workers=0, progress=progress, **source)
    notes, folders = [], {name: paths for name, paths in list_folders(generated_dir).items() if paths}
    if not folders:
        found = f"No generated images in {generated_dir}; it holds {contents(generated_dir)}. Expected "
        found += f"{join_first(f'{name}/' for name in real.labels)} with {', '.join(IMAGE_EXTENSIONS)} images"
        raise UserError(f"{found}, as python -m vavae_tools.sample writes them")
    unknown = [name for name in folders if name not in real.labels]
    if unknown:
        found = f"{generated_dir} has images of {join_first(unknown)}, but {data_dir} knows "
        found += join_first(real.labels, 8)
        if len(unknown) == len(folders):
            raise UserError(f"{found}. Rename the folder, or name the data the images were learnt from")
        notes.append(f"{found}: images of others are left out")
    if image_size is None:
        known = [path for name, paths in folders.items() if name in real.labels for path in paths]
        image_size = _common_size(known, notes)
        real.resize(image_size)
    if real.channels == 1 and channels_of(generated_dir) == 3:
        notes.append("the generated images are stored in colour, the real ones in grey: all are compared in grey")
    labels = real.labels | dict.fromkeys(unknown, -1)
    generated = ImageFolder(generated_dir, image_size, labels, real.channels, progress)
    if unknown:
        generated = generated.part((generated.labels >= 0).nonzero().flatten().tolist())
    return real, generated, notes


def _common_size(paths: list[Path], notes: list[str]) -> tuple[int, int]:
    """Return (height, width) of most of the images."""
    sizes = Counter()
    for path in paths:
        with image_errors(path), Image.open(path) as image:
            sizes[image.height, image.width] += 1
    (height, width), _ = sizes.most_common(1)[0]
    if len(sizes) > 1:
        notes.append(f"the generated images have {len(sizes)} sizes, all are resized to {height}×{width}")
    return height, width
