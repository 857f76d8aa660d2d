"""Whether a classifier still knows the persons in their reconstructions and in samples, and early warnings."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor, nn

from vavae_tools.data.images import ImageSetDataModule, spread
from vavae_tools.evaluation.classifier import PersonClassifier, cached_classifier
from vavae_tools.evaluation.metrics import nearest, percent
from vavae_tools.evaluation.reconstructions import as_many_others, judge_reconstructions
from vavae_tools.runtime.console import is_interactive, log
from vavae_tools.runtime.ranks import is_rank_zero
from vavae_tools.training.callbacks.previews import looking_on, made_by_some
from vavae_tools.training.callbacks.progress import SAMPLE_METRICS

WATCHED_IMAGES = 64  # at most, so that it takes seconds
WATCHED_STEPS = 10


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


class SampleWatch(L.Callback):
    """Judge a few samples at validations, `times` in all, with a classifier trained on the real images.

    They are of all persons, or of some spread over all, always from the same noise. Logs `SAMPLE_METRICS`: the
    classifier's accuracy on them; their median distance to the nearest training image in its features, as a multiple of
    the validation images'; the share that is as near to one as no real images are, suspected copies; the share that is
    usable, of the right person and no copy. Nothing that training follows from is touched, and no error ends it.

    Args:
        make: the averaged network and labels → samples, uint8 (N, C, H, W), where the network is.
        folder: keeps the classifier.
    """

    def __init__(
        self,
        make: Callable[[nn.ModuleDict, list[int]], Tensor],
        data: ImageSetDataModule,
        folder: str | Path,
        times: int,
        seed: int = 0,
        log: Callable[[str], None] = log,
    ) -> None:
        self.make, self.data, self.folder, self.times, self.seed, self.log_line = make, data, folder, times, seed, log
        people = sorted(data.labels.values())
        shown = [people[place] for place in spread(WATCHED_IMAGES, len(people))]
        self.labels = [label for label in shown for _ in range(max(1, min(8, WATCHED_IMAGES // len(shown))))]
        self._judge: Callable[[Tensor], dict[str, float]] | None = None
        self._judged, self._seconds = 0, 0.0

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._began = time.monotonic()
        if trainer.is_global_zero:
            with looking_on(trainer, module, "judging samples"):
                options = {"seed": self.seed, "device": module.device, "progress": is_interactive()}
                classifier = cached_classifier(self.data.train_data, self.data.num_classes, self.folder, **options)
                known, unseen = (classifier.judge(data)[0] for data in (self.data.train_data, self.data.val_data))
                self._judge = partial(judge_samples, classifier, known, unseen, torch.tensor(self.labels))
        self._seconds += time.monotonic() - self._began

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for name in SAMPLE_METRICS:  # those of a validation before are not this one's
            trainer.callback_metrics.pop(name, None)
            trainer.logged_metrics.pop(name, None)

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking or not self.is_due(trainer):
            return
        began, scores = time.monotonic(), None
        with looking_on(trainer, module, "judging samples"):
            made = made_by_some(trainer, partial(self.make, module.ema.network, self.labels), "Judging samples")
            if self._judge and made is not None:
                scores = self._judge(made)
        scores = trainer.strategy.broadcast(scores)
        if scores is not None:
            module.log_dict(scores, sync_dist=True)
            self._judged += 1
        self._seconds += time.monotonic() - began

    def is_due(self, trainer: L.Trainer) -> bool:
        """Return whether this validation is one of those that are spread evenly, the last one among them."""
        batches, gathered = trainer.num_training_batches, trainer.accumulate_grad_batches
        between = -(-batches // gathered) * (trainer.check_val_every_n_epoch or 1)  # optimiser steps
        step, last = trainer.global_step, max(1, trainer.estimated_stepping_batches // between) * between
        return step * self.times // last > (step - between) * self.times // last

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero and self._judged:
            share = self._seconds / max(time.monotonic() - self._began, 1e-9)
            judged = f"{len(self.labels)} samples were judged {self._judged} times"
            self.log_line(f"{judged}: {self._seconds:.1f} s, {percent(share)} of the time (sample_watch)")


def judge_samples(
    classifier: PersonClassifier, known: Tensor, unseen: Tensor, labels: Tensor, made: Tensor
) -> dict[str, float]:
    """Return `SAMPLE_METRICS` of samples, uint8 (N, C, H, W).

    `known` and `unseen` are the features of training and validation images.
    """
    features, named = classifier.judge(made)
    lengths, usual = (nearest(of, known)[1] for of in (features, unseen))
    right, copies = named == labels, lengths < nearest(known)[1].quantile(0.01)
    ratio = lengths.median() / usual.median().clamp_min(1e-12)
    shares = [values.float().mean().item() for values in (right, copies, right & ~copies)]
    return dict(zip(SAMPLE_METRICS, [shares[0], ratio.item(), *shares[1:]], strict=True))


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
