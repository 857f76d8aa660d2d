"""How sharp generated images are, and how their power is spread over time and frequency, beside real ones."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vavae_tools.data.images import to_unit
from vavae_tools.evaluation import metrics
from vavae_tools.evaluation.compared import Sets, Subset

AXES = {"time": 3, "frequency": 2}  # columns and rows


@dataclass(frozen=True)
class Texture:
    """Generated images, and as their scale real training images, each beside real validation images.

    All are means over persons. Sharpness is `metrics.gradients`, as a multiple of the validation images'; spectra hold
    `metrics.log_spectral_distance` along each axis.
    """

    images: dict[str, int]  # by "generated", "training" and "validation"
    sharpness_generated: float
    sharpness_real: float
    spectra_generated: dict[str, float]  # dB
    spectra_real: dict[str, float]

    def __str__(self) -> str:
        return "\n".join(metrics.aligned(self.rows()))

    def rows(self) -> list[tuple[str, str, str]]:
        sharp = f"{self.sharpness_generated:.2f}", f"{self.sharpness_real:.2f}"
        spectra = zip(self.spectra_generated.items(), self.spectra_real.values(), strict=True)
        rows = [("beside real validation images", "generated", "real training"), ("sharpness (theirs is 1)", *sharp)]
        rows += [(f"spectrum along {axis}, dB off", f"{made:.1f}", f"{real:.1f}") for (axis, made), real in spectra]
        return [*rows, ("images", *(f"{self.images[kind]:,}" for kind in ("generated", "training")))]


def measure_texture(sets: Sets) -> tuple[Texture | None, dict[str, dict[str, Tensor]]]:
    """Return what was measured and the spectra by axis and subset, float64 (K,); nothing without persons in all."""
    subsets = {"generated": sets.generated, "training": sets.train, "validation": sets.validation}
    if sets.validation is None:
        return None, {}
    people = [label for label in sets.labels.values() if all(len(subset.of(label)) for subset in subsets.values())]
    if not people:
        return None, {}
    found = {name: _of_subset(subset, people) for name, subset in subsets.items()}
    sharp = {name: of["gradients"].item() for name, of in found.items()}
    spectra = {axis: {name: of[axis] for name, of in found.items()} for axis in AXES}
    about = []
    for name in ("generated", "training"):
        about.append(sharp[name] / max(sharp["validation"], 1e-12))
    for name in ("generated", "training"):
        about.append({axis: metrics.log_spectral_distance(of[name], of["validation"]) for axis, of in spectra.items()})
    counts = {name: sum(len(subset.of(label)) for label in people) for name, subset in subsets.items()}
    return Texture(counts, *about), spectra


def _of_subset(subset: Subset, people: list[int]) -> dict[str, Tensor]:
    """Return the means over persons of what is measured of an image."""
    parts = []
    for places in torch.arange(len(subset.data)).split(256):
        images = to_unit(subset.data.get_batch(places.tolist())["images"])
        spectra = {axis: metrics.power_spectrum(images, dim) for axis, dim in AXES.items()}
        parts.append({"gradients": metrics.gradients(images), **spectra})
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return {
        name: torch.stack([values[subset.of(label)].mean(dim=0) for label in people]).mean(dim=0)
        for name, values in joined.items()
    }
