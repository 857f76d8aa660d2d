"""Reconstructions beside their originals: how true they are, and what a classifier makes of them."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from vavae_tools.autoencoders.vavae import VAVAE, other_labels, reconstruct, reconstruct_images, with_vectors_of
from vavae_tools.data.images import DecodedImages, ImageSetDataModule, spread, to_pixels, to_unit
from vavae_tools.evaluation.classifier import PersonClassifier, cached_classifier
from vavae_tools.evaluation.metrics import aligned, frechet_distance, percent, psnr, sharpness, ssim
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.machine import release_memory

OWN, ANOTHERS, NONE = "own vector", "another's vector", "no vector"


# ---- what the vectors per person do
@dataclass(frozen=True)
class ConditionScore:
    """Means over all images, in [-1, 1]; PSNR in dB."""

    absolute_error: float
    psnr: float


@dataclass(frozen=True, repr=False)
class ConditionComparison:
    """What the vectors do to reconstructions. Printed, it is a table; `plots.show_rows(images)` shows it."""

    count: int
    own: ConditionScore
    another: ConditionScore | None  # None where the images are all of one person
    none: ConditionScore
    images: dict[str, Tensor] = field(compare=False)  # uint8 (N, C, H, W) by row: one image of each of a few people

    def __str__(self) -> str:
        rows = [(f"{self.count:,} images", "absolute error", "PSNR, dB")]
        for name, score in ((OWN, self.own), (ANOTHERS, self.another), (NONE, self.none)):
            rows.append((name, f"{score.absolute_error:.4f}", f"{score.psnr:.2f}") if score else (name, "-", "-"))
        return "\n".join(aligned(rows))

    __repr__ = __str__


def compare_conditions(model: VAVAE, data: DecodedImages, batch_size: int = 32) -> ConditionComparison:
    """Encode and decode each image with its own person's vector, with the next person's in `data`, and with none.

    If the vectors carry anything, own is best.
    """
    if not model.config.condition_dim:
        raise UserError("This VA-VAE has no vectors to compare (condition_dim is 0): fine-tune it with --condition_dim")
    if (count := int(data.labels.max()) + 1) > model.config.num_conditions:
        known = f"vectors of {model.config.num_conditions} people"
        raise UserError(f"This VA-VAE has {known}, the images have {count}: fine-tune it on these images")
    model, people = model.eval(), len(data.labels.unique())
    choices = {OWN: data.labels, ANOTHERS: other_labels(data.labels), NONE: None}  # labels by an image's place
    if people == 1:
        del choices[ANOTHERS]

    def remade(batch: dict[str, Tensor], name: str) -> Tensor:
        labels = choices[name][batch["index"]].to(model.device) if name != NONE else None
        return reconstruct_images(model, batch["images"].to(model.device), labels).cpu()

    found = {name: [] for name in choices}
    for rows in torch.arange(len(data)).split(batch_size):
        batch = data.get_batch(rows.tolist())
        originals = to_unit(batch["images"])
        for name, parts in found.items():
            made = to_unit(remade(batch, name))
            parts.append(torch.stack([(made - originals).abs().mean(dim=(1, 2, 3)), psnr(originals, made)]))
    scores = {name: ConditionScore(*torch.cat(parts, 1).mean(1).tolist()) for name, parts in found.items()}
    few = data.preview_batch(min(8, people))  # which are shown
    images = {"original": few["images"], **{name: remade(few, name) for name in choices}}
    return ConditionComparison(len(data), scores[OWN], scores.get(ANOTHERS), scores[NONE], images)


def decode_as_people(model: VAVAE, data: ImageSetDataModule, images: int = 6, people: int = 8) -> dict[str, Tensor]:
    """Return a few validation images, and below them what the decoder makes of their latents with others' vectors.

    Returns:
        uint8 (N, C, H, W) by row, for `plots.show_rows`: the originals, then a row for each of so many people.
    """
    model, few = with_vectors_of(model, data.labels).eval(), data.val_data.preview_batch(images)
    pixels, own = (few[name].to(model.device) for name in ("images", "labels"))
    names = list(data.labels)
    shown = [names[place] for place in spread(people, len(names))]
    rows = {
        f"as {name}": reconstruct_images(model, pixels, own, torch.full_like(own, data.labels[name])) for name in shown
    }
    return {"original": few["images"], **{name: row.cpu() for name, row in rows.items()}}


# ---- how true reconstructions are
@dataclass(frozen=True, repr=False)
class ReconstructionScores:
    """Means over reconstructions; what needs a classifier (its accuracy, the Fréchet distance) is None without one.

    PSNR is in dB; a sharpness of 1 is the originals', without those that are flat.
    """

    images: int
    psnr: float
    ssim: float
    sharpness: float
    accuracy: float | None = None
    real_accuracy: float | None = None
    frechet: float | None = None
    real_frechet: float | None = None
    transfer: float | None = None  # share that is named as another person whose vector alone the decoder gets

    def __str__(self) -> str:
        found = f"PSNR {self.psnr:.2f} dB, SSIM {self.ssim:.3f}, sharpness {self.sharpness:.2f}"
        line = f"{self.images:,} reconstructions: {found}"
        if self.accuracy is not None:
            line += f"; accuracy {percent(self.accuracy)} (originals {percent(self.real_accuracy)})"
        if self.frechet is not None:
            times = self.frechet / max(self.real_frechet, 1e-12)
            line += f"; Fréchet distance {self.frechet:.3g} (originals {self.real_frechet:.3g}: {times:.1f} times)"
        if self.transfer is not None:
            line += f"; decoded with another's vector, {percent(self.transfer)} are named as the other"
        return line

    __repr__ = __str__


def judge_reconstructions(
    classifier: PersonClassifier, originals: Tensor, made: Tensor, labels: Tensor | None, others: Tensor | None
) -> dict[str, float]:
    """Return "accuracy" and "frechet" of reconstructions, and as "real_accuracy" and "real_frechet" the originals'.

    Images are uint8 (N, C, H, W), labels int64 (N,). The Fréchet distance is that to `others`, further real images with
    no more of each person than `originals`.
    """
    reference, scores = classifier.judge(others)[0] if others is not None else None, {}
    for kind, images in (("", made), ("real_", originals)):
        features, named = classifier.judge(images)
        if labels is not None:
            scores[f"{kind}accuracy"] = (named == labels.cpu()).float().mean().item()
        if reference is not None:
            scores[f"{kind}frechet"] = frechet_distance(features, reference)
    return scores


def evaluate_reconstructions(
    images: Tensor,
    reconstructions: Tensor,
    labels: Tensor | None = None,
    classifier: PersonClassifier | None = None,
    others: Tensor | None = None,
) -> ReconstructionScores:
    """Compare reconstructions with their originals: (N, C, H, W), uint8 or floats, which are clipped to [-1, 1].

    Labels, classifier and others are those of `judge_reconstructions`.
    """
    originals, remade = map(_in_range, (images, reconstructions))
    scores = {"psnr": psnr(originals, remade).mean().item(), "ssim": ssim(originals, remade).mean().item()}
    scores["sharpness"] = sharpness(originals, remade).nanmean().item()
    if classifier is not None:
        others = to_pixels(_in_range(others)) if others is not None else None
        scores |= judge_reconstructions(classifier, to_pixels(originals), to_pixels(remade), labels, others)
    return ReconstructionScores(len(originals), **scores)


def evaluate_vavae(
    model: VAVAE, data: ImageSetDataModule, classifier_dir: str | Path, seed: int = 0, progress: bool = True
) -> ReconstructionScores:
    """Reconstruct the validation subset, with each person's vector, and let a `cached_classifier` judge it.

    Where there are vectors, each image is also decoded with another's, and named again.
    """
    if data.val_data is None:
        raise UserError("No image validates: make a split with data_split.py --val_ratio 0.2, or set val_share")
    model = with_vectors_of(model, data.labels)
    where = {"device": model.device, "progress": progress}
    classifier = cached_classifier(data.train_data, data.num_classes, classifier_dir, seed, **where)
    originals, made = reconstruct(model, data.val_data)
    labels = data.val_data.labels
    scores = evaluate_reconstructions(originals, made, labels, classifier, as_many_others(data))
    if model.config.condition_dim and len(labels.unique()) > 1:
        others = other_labels(labels)
        named = classifier.judge(reconstruct(model, data.val_data, decoded_as=others)[1])[1]
        scores = replace(scores, transfer=(named == others).float().mean().item())
    del classifier
    release_memory()  # a notebook's process lives on
    return scores


def as_many_others(data: ImageSetDataModule) -> Tensor:
    """Training images, uint8 (M, C, H, W), of each person as many as the validation subset has, where there are."""
    wanted, labels = data.val_data.labels, data.train_data.labels
    places = [torch.where(labels == label)[0][: int((wanted == label).sum())] for label in wanted.unique()]
    return data.train_data.get_batch(torch.cat(places))["images"]


def _in_range(images: Tensor) -> Tensor:
    images = images.detach().cpu()
    return to_unit(images) if images.dtype == torch.uint8 else images.float().clamp(-1, 1)
