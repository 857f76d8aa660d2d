"""Reconstructions beside their originals: how true they are, and what a classifier makes of them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vavae_tools.data.images import to_pixels, to_unit
from vavae_tools.evaluation.classifier import PersonClassifier
from vavae_tools.evaluation.metrics import frechet_distance, percent, psnr, ssim


@dataclass(frozen=True, repr=False)
class ReconstructionScores:
    """How true reconstructions are; what needs a classifier is None without one."""

    pictures: int
    psnr: float
    """Mean, dB."""
    ssim: float
    right: float | None = None
    """Share that the classifier names rightly."""
    originals_right: float | None = None
    frechet: float | None = None
    """Fréchet distance to other real pictures."""
    originals_frechet: float | None = None

    def __str__(self) -> str:
        line = f"{self.pictures:,} reconstructions: PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.3f}"
        if self.right is not None:
            line += f"; named rightly {percent(self.right)} (originals {percent(self.originals_right)})"
        if self.frechet is not None:
            times = self.frechet / max(self.originals_frechet, 1e-12)
            line += f"; Fréchet distance {self.frechet:.3g} (originals {self.originals_frechet:.3g}: {times:.1f} times)"
        return line

    __repr__ = __str__


def evaluate_reconstructions(
    pictures: Tensor,
    reconstructions: Tensor,
    labels: Tensor | None = None,
    classifier: PersonClassifier | None = None,
    others: Tensor | None = None,
) -> ReconstructionScores:
    """Compare reconstructions with their originals.

    Args:
        pictures, reconstructions: (N, C, H, W), uint8 or floats in [-1, 1]; what lies outside is clipped.
        labels: int64 (N,); with a classifier, how often it names them rightly.
        others: further real pictures of the same persons, such as the training side's; with a classifier, the Fréchet
            distance to them from the reconstructions, and from the originals as the scale.
    """
    originals, remade = (_in_range(x) for x in (pictures, reconstructions))
    scores = {"psnr": psnr(originals, remade).mean().item(), "ssim": ssim(originals, remade).mean().item()}
    if classifier is not None:
        judged = [classifier.judge(to_pixels(x)) for x in (originals, remade)]
        if labels is not None:
            scores["originals_right"], scores["right"] = (
                (named == labels.cpu()).float().mean().item() for _, named in judged
            )
        if others is not None:
            reference = classifier.judge(to_pixels(_in_range(others)))[0]
            scores["originals_frechet"], scores["frechet"] = (
                frechet_distance(features, reference) for features, _ in judged
            )
    return ReconstructionScores(len(originals), **scores)


def _in_range(pictures: Tensor) -> Tensor:
    pictures = pictures.detach().cpu()
    return to_unit(pictures) if pictures.dtype == torch.uint8 else pictures.float().clamp(-1, 1)
