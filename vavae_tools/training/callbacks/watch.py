"""Whether a classifier still knows the persons in their reconstructions, and early warnings."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from vavae_tools.data.images import ImageSetDataModule
from vavae_tools.evaluation.classifier import cached_classifier
from vavae_tools.evaluation.reconstructions import as_many_others, judge_reconstructions
from vavae_tools.runtime.console import is_interactive, log
from vavae_tools.runtime.ranks import is_rank_zero


class ReconstructionWatch(L.Callback):
    """Judge the reconstructions at each validation, with a classifier trained on the real images.

    Of several processes the first one trains the classifier, kept in `folder`, and judges what all have reconstructed;
    the others wait, 30 minutes at most (torch's limit). Logs `val/accuracy` and `val/originals_right` (the classifier's
    accuracy), `val/frechet` and `val/originals_frechet` (distances to as many real training images), and
    `val/frechet_ratio`, the first by the second.
    """

    def __init__(self, data: ImageSetDataModule, folder: str | Path, seed: int = 0) -> None:
        self.data, self.folder, self.seed = data, Path(folder), seed
        self._made: dict[int, Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.is_global_zero:
            return
        options = {"seed": self.seed, "device": module.device, "progress": is_interactive()}
        classifier = cached_classifier(self.data.train_data, self.data.num_classes, self.folder, **options)
        originals = self.data.val_data.get_batch(range(len(self.data.val_data)))
        of_originals = {"labels": originals["labels"], "others": as_many_others(self.data)}
        self.judge = partial(judge_reconstructions, classifier, originals["images"], **of_originals)

    def on_validation_batch_end(self, trainer, module, outputs, batch, batch_idx, dataloader_idx=0) -> None:
        own = dict(zip(batch["index"].tolist(), outputs["reconstructions"].cpu(), strict=True))
        parts = [own]
        if trainer.world_size > 1:
            parts = [None] * trainer.world_size
            dist.gather_object(own, parts if trainer.is_global_zero else None)
        if trainer.is_global_zero:
            self._made.update(pair for part in parts for pair in part.items())

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        made, self._made = self._made, {}
        scores = None
        if trainer.is_global_zero and len(made) == len(self.data.val_data):  # a sanity check sees a few only
            scores = self.judge(torch.stack([made[place] for place in range(len(made))]))
            scores["frechet_ratio"] = scores["frechet"] / max(scores["real_frechet"], 1e-12)
        scores = trainer.strategy.broadcast(scores)
        if scores is not None:
            module.log_dict({f"val/{name}": value for name, value in scores.items()}, sync_dist=True)


class Advice(L.Callback):
    """Say once, with advice, that the KL explodes, the latents collapse, or the discriminator wins."""

    def __init__(self, log: Callable[[str], None] = log) -> None:
        self.log_line = log
        self._least_kl, self._won, self._said = float("inf"), 0, set()

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        values = {name.removeprefix("val/"): float(v) for name, v in trainer.callback_metrics.items() if "val/" in name}
        kl, spread = values.get("kl", 0.0), values.get("latent_std", 1.0)
        self._least_kl = min(self._least_kl, kl)
        self._won = self._won + 1 if values.get("discriminator_accuracy", 0.5) > 0.95 else 0
        if kl > 20 * self._least_kl:
            self._advise(f"The KL has grown from {self._least_kl:.3g} to {kl:.3g}: raise --kl_weight or lower --lr")
        if spread < 0.1:
            collapse = f"The latents collapse (standard deviation {spread:.2g}), so they hardly tell images apart"
            self._advise(f"{collapse}: lower --kl_weight")
        if self._won == 3:
            wins = f"The discriminator's accuracy is {values['discriminator_accuracy']:.0%}, so it teaches little"
            self._advise(f"{wins}: lower --disc_weight, or let it start later with --disc_start")

    def _advise(self, line: str) -> None:
        if line[:12] not in self._said and is_rank_zero():
            self.log_line(f"advice: {line}")
        self._said.add(line[:12])
