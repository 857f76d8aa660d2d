"""Which images are compared with which, and what a classifier makes of them."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.data.folders import IMAGE_EXTENSIONS, contents, list_folders
from vavae_tools.data.images import DecodedImages, ImageFolder, channels_of, image_errors
from vavae_tools.runtime.errors import UserError, join_first


@dataclass(frozen=True)
class PersonScore:
    """The classifier's accuracy on images of one person or of all; None where it cannot be measured."""

    generated: int
    generated_accuracy: float | None
    validation: int
    validation_accuracy: float | None


class Subset(NamedTuple):
    """One set of images and what the classifier makes of them."""

    data: DecodedImages
    features: Tensor
    named: Tensor
    several_persons: bool

    def score(self, label: int | None) -> tuple[int, float | None]:
        """Return the number of its images, all or of one label, and the accuracy on them."""
        right = (self.named == self.data.labels)[self.of(label) if label is not None else slice(None)].float()
        return len(right), right.mean().item() if self.several_persons and len(right) else None

    def of(self, label: int) -> Tensor:
        """Return the places of a label's images."""
        return (self.data.labels == label).nonzero().flatten()


class Sets(NamedTuple):
    labels: dict[str, int]  # by person
    generated: Subset
    train: Subset
    validation: Subset | None

    def score(self, label: int | None) -> PersonScore:
        """Return what the classifier makes of all images, or of one label's."""
        real = self.validation.score(label) if self.validation else (0, None)
        return PersonScore(*self.generated.score(label), *real)


def load_images(
    generated_dir: Path, data_dir: str | Path, image_size: int | tuple[int, int] | None, progress: bool, **source: Any
) -> tuple[ImageDataModule, ImageFolder, list[str]]:
    """Return real and generated images of one size, and what is to be said about them."""
    smallest = min(image_size) if isinstance(image_size, tuple) else image_size or 16
    if smallest < 16:
        raise UserError(f"image_size {image_size} is too small to tell persons apart: take at least 16 pixels")
    real = ImageDataModule(data_dir, image_size or smallest, num_workers=0, progress=progress, **source)
    folders = {name: paths for name, paths in list_folders(generated_dir).items() if paths}
    if not folders:
        found = f"No generated images in {generated_dir}; it holds {contents(generated_dir)}. Expected "
        found += f"{join_first(f'{name}/' for name in real.labels)} with {', '.join(IMAGE_EXTENSIONS)} images"
        raise UserError(f"{found}, as python -m vavae_tools.sample writes them")
    if unknown := [name for name in folders if name not in real.labels]:
        found = f"{generated_dir} has images of {join_first(unknown)}, but {data_dir} knows "
        found += join_first(real.labels, 8)
        raise UserError(f"{found}. Rename the folder, or name the data the images were learnt from")
    notes = []
    if image_size is None:
        image_size = _common_size([path for paths in folders.values() for path in paths], notes)
        real.resize(image_size)
    if real.channels == 1 and channels_of(generated_dir) == 3:
        notes.append("the generated images are stored in colour, the real ones in grey: all are compared in grey")
    return real, ImageFolder(generated_dir, image_size, real.labels, real.channels, progress), notes


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
