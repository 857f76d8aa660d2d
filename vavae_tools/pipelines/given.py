"""Samples from images in files: which one each sample varies, whose it is, and what a record says of it."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from vavae_tools.data.folders import EXTENSIONS, files_below, no_such_folder
from vavae_tools.data.images import ImageFiles, image_errors
from vavae_tools.diffusion.variations import slerp
from vavae_tools.pipelines.classes import LatentDiTPipeline
from vavae_tools.pipelines.inputs import latent_mask
from vavae_tools.runtime.errors import UserError, in_home

Asked = Callable[[Sequence[int], Sequence[int]], dict[str, Any]]
"""Labels, and each one's number among the samples of its label → arguments of the pipeline's call."""


class GivenImages:
    """Images in a file, or anywhere in a folder; one in a folder with a person's name is that person's.

    A person's samples vary his or her own images in turn, or all where none are.
    """

    def __init__(self, pipe: LatentDiTPipeline, *paths: str | Path) -> None:
        found = []
        for path in map(in_home, paths):
            if not path.exists():
                raise UserError(no_such_folder(path).replace("No such folder", "No such image or folder"))
            found += [path] if path.is_file() else files_below(path, EXTENSIONS)
        if not found:
            raise UserError(f"No images ({', '.join(EXTENSIONS)}) in {paths[0]}")
        owners = [pipe.people.get(path.absolute().parent.name, -1) for path in found]
        names, channels = [str(path.absolute()) for path in found], pipe.vae.config.get("in_channels", 3)
        self.files = ImageFiles("/", names, torch.tensor(owners), pipe.image_size, "none", channels, progress=False)

    @property
    def owners(self) -> list[int]:
        """The label of each image's person, or −1."""
        return self.files.labels.tolist()

    def places(self, label: int) -> list[int]:
        own = [place for place, owner in enumerate(self.owners) if owner == label]
        return own or list(range(len(self.files)))

    def digest(self) -> str:
        """Return what identifies all of them, once it is known that they can be read."""
        if self.files.fits_memory():
            self.files.in_memory()
        content = hashlib.sha256()
        for name in self.files.names:
            content.update(hashlib.sha256(Path(name).read_bytes()).digest())
        return content.hexdigest()


def from_images(
    pipe: LatentDiTPipeline, image: str | Path, strength: float | None, mask_image: str | Path | None
) -> tuple[Asked, dict[str, Any]]:
    """Return what to ask for variations of the images in a file or folder, and what a record says of it."""
    given, mask, options = GivenImages(pipe, image), None, {"strength": strength}
    record = {"image": given.digest(), "strength": strength}
    if mask_image is not None:
        path = in_home(mask_image)
        with image_errors(path), Image.open(path) as opened:
            mask = opened.convert("L")
        latent_mask(mask, pipe.image_size, pipe.vae.downsampling, str(path))  # which says what is wrong in time
        record["mask"] = hashlib.sha256(mask.tobytes()).hexdigest()
    places = cache(given.places)

    def asked(labels: Sequence[int], numbers: Sequence[int]) -> dict[str, Any]:
        taken = [places(label)[n % len(places(label))] for label, n in zip(labels, numbers, strict=True)]
        owners = [given.owners[place] for place in taken]
        whose = [label if owner < 0 else owner for label, owner in zip(labels, owners, strict=True)]
        return {"image": given.files.images(taken), "image_labels": whose, "mask_image": mask, **options}

    return asked, record


def between_images(
    pipe: LatentDiTPipeline, paths: Sequence[str | Path], labels: Sequence[int], strength: float, **steps: Any
) -> tuple[Asked, dict[str, Any]]:
    """Return what to ask for each label's images on the way between two, as `LatentDiTPipeline.interpolate` makes them.

    `steps` are those of `LatentDiTPipeline.invert`, which is called with the first batch.
    """
    counts = Counter(labels)
    if min(counts.values()) < 2:
        raise UserError("interpolate makes at least the two images themselves of each person: take more samples")
    given = GivenImages(pipe, *paths)
    if len(given.files) != 2:
        raise UserError(f"interpolate goes from one image to another, and {len(given.files)} were given")

    @cache
    def ends() -> dict[int, Tensor]:
        pairs = [(label, place) for label in sorted(counts) for place in (0, 1)]
        whose = [label if given.owners[place] < 0 else given.owners[place] for label, place in pairs]
        noise = pipe.invert(given.files.images([place for _, place in pairs]), whose, strength, **steps)
        return dict(zip(sorted(counts), noise.unflatten(0, (-1, 2)), strict=True))

    def asked(labels: Sequence[int], numbers: Sequence[int]) -> dict[str, Any]:
        shares = [torch.tensor([n / (counts[label] - 1)]) for label, n in zip(labels, numbers, strict=True)]
        made = [slerp(*ends()[label], share) for label, share in zip(labels, shares, strict=True)]
        return {"latents": torch.cat(made), "strength": strength}

    of_each = sorted(set(counts.values()))
    between = of_each[0] if len(of_each) == 1 else of_each
    return asked, {"image": given.digest(), "between": between, "strength": strength}
