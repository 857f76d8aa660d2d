"""What the vectors per person do: reconstructions with the right vector, with another person's, and with none."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from vavae_tools.autoencoders.vavae import VAVAE, anothers, reconstruct_pictures
from vavae_tools.data.images import PictureFolder
from vavae_tools.data.pixels import to_unit
from vavae_tools.errors import UserError
from vavae_tools.evaluation.metrics import aligned, psnr

_MOST_COLUMNS = 8  # persons whose pictures are kept to be shown
OWN, ANOTHERS, NONE = "own vector", "another's vector", "no vector"


@dataclass(frozen=True)
class ConditionScore:
    """How true reconstructions with one choice of vectors are, over all pictures."""

    absolute_error: float
    """Mean, of pictures in [-1, 1]."""
    psnr: float
    """Mean, dB."""


@dataclass(frozen=True, repr=False)
class ConditionComparison:
    """What the vectors do to reconstructions. Printed, it is a table; `plots.show_rows(pictures)` shows it."""

    count: int
    """Pictures compared."""
    own: ConditionScore
    another: ConditionScore | None
    """None where the pictures are all of one person."""
    none: ConditionScore
    pictures: dict[str, Tensor] = field(compare=False)
    """The first picture of each of a few people and its reconstructions, a row of uint8 (N, C, H, W) each."""

    def __str__(self) -> str:
        rows = [(f"{self.count:,} pictures", "absolute error", "PSNR, dB")]
        for name, score in ((OWN, self.own), (ANOTHERS, self.another), (NONE, self.none)):
            rows.append((name, f"{score.absolute_error:.4f}", f"{score.psnr:.2f}") if score else (name, "-", "-"))
        return "\n".join(aligned(rows))

    __repr__ = __str__


def compare_conditions(model: VAVAE, data: PictureFolder, batch_size: int = 32) -> ConditionComparison:
    """Encode and decode each picture with its own person's vector, with another person's, and with none.

    The other person is the next one in `data`, after the last the first. The posterior's mode is decoded, and what
    lies outside [-1, 1] is clipped. If the vectors carry anything, own is best; if all three are alike, they carry
    nothing.

    Raises:
        UserError: the model has no vectors.
    """
    if not model.config.condition_dim:
        raise UserError("This VA-VAE has no vectors to compare (condition_dim is 0): fine-tune it with --condition_dim")
    model = model.eval()
    people = len(data.labels.unique())
    # labels are looked up by a picture's place: None stands for no vector
    choices = {OWN: data.labels, ANOTHERS: anothers(data.labels), NONE: None}
    if people == 1:
        del choices[ANOTHERS]

    def remade(batch: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        labels = labels[batch["index"]].to(model.device) if labels is not None else None
        return reconstruct_pictures(model, batch["pictures"].to(model.device), labels).cpu()

    errors: dict[str, list[Tensor]] = {name: [] for name in choices}
    ratios: dict[str, list[Tensor]] = {name: [] for name in choices}
    for start in range(0, len(data), batch_size):
        batch = data.__getitems__(range(start, min(start + batch_size, len(data))))
        originals = to_unit(batch["pictures"])
        for name, labels in choices.items():
            reconstructions = to_unit(remade(batch, labels))
            errors[name].append((reconstructions - originals).abs().mean(dim=(1, 2, 3)))
            ratios[name].append(psnr(originals, reconstructions))
    scores = {
        name: ConditionScore(torch.cat(errors[name]).mean().item(), torch.cat(ratios[name]).mean().item())
        for name in choices
    }
    few = data.few_of_each(min(_MOST_COLUMNS, people))
    pictures = {"original": few["pictures"], **{name: remade(few, labels) for name, labels in choices.items()}}
    return ConditionComparison(len(data), scores[OWN], scores.get(ANOTHERS), scores[NONE], pictures)
