"""The stages of notebooks 01–05 one after the other in one session: what is done is skipped, the rest ends in time."""

import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vavae_tools.autoencoders.vavae import vavae
from vavae_tools.data.latents import LatentFolder
from vavae_tools.data.split_report import read_split_info
from vavae_tools.diffusion import FITTED_STEPS
from vavae_tools.diffusion.dit import make_denoiser, split_reference_arguments
from vavae_tools.diffusion.lora import add_lora
from vavae_tools.evaluation.metrics import aligned
from vavae_tools.paths import ProjectPaths
from vavae_tools.recipes.handover import copy_record, find_run, find_stage
from vavae_tools.recipes.presets import Preset
from vavae_tools.runtime.console import clock, log
from vavae_tools.runtime.errors import UserError, disk_faults
from vavae_tools.runtime.machine import computing_in, find_device, find_machine, precision_on, release_memory
from vavae_tools.training.callbacks.record import NAME as RUN
from vavae_tools.training.callbacks.record import is_finished
from vavae_tools.training.config import session_end
from vavae_tools.training.curves import judge_training, plot_training

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRAININGS = {"vavae": "vavae", "dit": "pipeline"}
"""Stages that train, and what `find_stage` calls what they are for."""
_EARLY = ("stage1", "stage2")  # of the recipe staged: finished, they are not yet the whole
NEXT = "save another version of this notebook with this one's output attached (Add Input, Your Work): it goes on there"


class Stages:
    """Runs stages by name, each until the session's end: one that has not ended keeps those after it from beginning.

    So a stage may take all the time that those before it have left. Displayed, it is a table of the hours of each.

    Args:
        hours: of the stages, estimated: what `estimate_hours` returns.
        max_time: hours:minutes from now; None: on Kaggle the session's own, elsewhere no limit.
    """

    def __init__(
        self,
        place: ProjectPaths,
        hours: dict[str, float] | None = None,
        max_time: str | None = None,
        log: Callable[[str], None] = log,
    ) -> None:
        self.place, self.hours, self.end, self.log = place, hours or {}, session_end(max_time), log
        self.unfinished: str | None = None  # the stage at which this session stopped

    @disk_faults()
    def run(self, stage: str, function: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
        """Return what a stage leaves: found where it is done, else made by `function`; None where it has not ended.

        A training, "vavae" or "dit", is resumed from what is here or attached; its first argument is what it trains on.
        """
        if self.unfinished not in (None, stage):
            self.log(f"{stage}: skipped, since {self.unfinished} has not ended")
            return None
        if stage in TRAININGS and (found := self._found(stage)):
            return found
        if self.seconds_left() <= 0 and stage != "evaluation":  # for which the last quarter of an hour is
            return self._stop(stage)
        began = time.monotonic()
        if stage in self.hours:
            self.log(self._outlook(stage))
        if stage in TRAININGS:
            data, *others = arguments
            limit = None if self.end is None else clock(max(1, self.seconds_left()))
            settings = {"resume": find_run(self.place, stage, data, self.log), "max_time": limit, **settings}
            made = function(data.path if isinstance(data, LatentFolder) else data, *others, **settings)
            made = made if self._is_whole(made) else None
        elif stage == "samples":
            self._take_over_samples()
            made = function(*arguments, **{"until": self.end, **settings})
        else:
            made = function(*arguments, **settings)
        if made is None or made == []:
            return self._stop(stage)
        self.unfinished = None
        self.log(f"{stage}: ended after {_hours((time.monotonic() - began) / 3600)}")
        return made

    def plot(self, stage: str) -> "Figure | None":
        """Return the curves of a training, for "dit" below a sentence on its losses; None where it has none."""
        run = self.place.work / stage
        try:
            figure = plot_training(run)
        except UserError:
            return None
        if stage == "dit":
            self.log(judge_training(run))
        return figure

    def seconds_left(self) -> float:
        return math.inf if self.end is None else self.end - time.time()

    def _stop(self, stage: str) -> None:
        self.unfinished = stage
        self.log(f"{stage} has not ended: {NEXT}. What comes after it is skipped here")

    def _found(self, stage: str) -> Path | None:
        """Return what a finished training left, in the work folder, so that the next version has it from this one."""
        try:
            found = find_stage(self.place, TRAININGS[stage], lambda line: None)
        except UserError:
            return None
        if not self._is_whole(found):
            return None
        self.log(f"{stage}: {found} is done")
        run, own = found.parent, self.place.work / stage
        if found.is_relative_to(self.place.work) or not (run / RUN).is_file():
            return found
        own = own if run.name == stage else own / run.name
        shutil.copytree(found, own / found.name, dirs_exist_ok=True)
        copy_record(run, own)
        return own / found.name

    def _is_whole(self, folder: Path) -> bool:
        run = folder.parent  # of a training; a model without one is somebody's own
        return is_finished(run) and run.name not in _EARLY if (run / RUN).is_file() else True

    def _take_over_samples(self) -> None:
        with suppress(UserError):  # there are none
            found = find_stage(self.place, "samples", lambda line: None)
            if found != self.place.samples:
                shutil.copytree(found, self.place.samples, dirs_exist_ok=True)

    def _outlook(self, stage: str) -> str:
        line, left = f"{stage}: {_hours(self.hours[stage])} in all, as estimated", self.seconds_left() / 3600
        if self.end is None:
            return line
        enough = "" if self.hours[stage] < left else ": it may end in another version"
        return f"{line}; the session has {_hours(left)} left{enough}"

    def __repr__(self) -> str:
        done = {stage for stage in TRAININGS if self._is_done(stage)}
        rows = [("stage", "estimated")]
        rows += [(stage, "done" if stage in done else _hours(hours)) for stage, hours in self.hours.items()]
        total = sum(hours for stage, hours in self.hours.items() if stage not in done)
        line = f"in all {_hours(total)} on {find_machine()}"
        if self.end is not None:
            left = max(0.0, self.seconds_left()) / 3600
            line += f"; this session has {_hours(left)} left: "
            line += "enough" if total < left else "fewer epochs or steps, or another version that goes on"
        return "\n".join([*aligned(rows), line])

    def _is_done(self, stage: str) -> bool:
        with suppress(UserError):
            return self._is_whole(find_stage(self.place, TRAININGS[stage], lambda line: None))
        return False


def _hours(hours: float) -> str:
    return f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


# ---- estimated by steps of networks of that size, timed here
def estimate_hours(preset: Preset, split: str | Path) -> dict[str, float]:
    """Return the hours of "vavae", "dit" and "samples" from a few steps of each that are timed here.

    What is not timed: validation, previews, the losses of the recipe "full", and compiling. Training says what is
    left as it runs.
    """
    info, devices = read_split_info(split), find_machine().devices
    of_vavae, latents = _time_autoencoder(preset)
    of_dit, of_call = _time_denoiser(preset, latents, len(info["labels"]))
    release_memory()
    steps = preset.vavae_epochs * math.ceil(info["totals"]["train"] / preset.vavae_batch_size / devices)
    calls = FITTED_STEPS * (1 if preset.guidance_scale == 1 else 2)
    samples = len(info["labels"]) * preset.samples_per_person / devices
    seconds = {"vavae": steps * of_vavae, "dit": preset.dit_steps * of_dit, "samples": samples * calls * of_call}
    return {stage: value / 3600 for stage, value in seconds.items()}


def _time_autoencoder(preset: Preset) -> tuple[float, Tensor]:
    """Return the seconds of a step, and random latents of a batch of the DiT."""
    model, side = vavae(preset.vavae_size).to(find_device()), preset.image_size
    images = torch.randn(preset.vavae_batch_size, 3, side, side, device=find_device())

    def compute() -> Tensor:
        return (model.decode(model.encode(images).latent_dist.sample()).sample - images).abs().mean()

    side //= model.downsampling
    shape = preset.dit_batch_size, model.config.latent_channels, side, side
    return _seconds(compute, model), torch.randn(shape, device=find_device())


def _time_denoiser(preset: Preset, latents: Tensor, people: int) -> tuple[float, float]:
    """Return the seconds of a step, and of a call without gradients for one image."""
    count, channels, side, _ = latents.shape
    sizes = {"in_channels": channels, "input_size": side, "num_classes": people}
    of_denoiser, of_conditioner = split_reference_arguments({**preset.dit, **sizes})
    model = make_denoiser(of_denoiser)
    if rank := (preset.dit_init or {}).get("lora_rank"):
        add_lora(model, rank)
    model.to(find_device())
    conditioning = latents.new_zeros(count, of_conditioner["hidden_size"])

    def compute() -> Tensor:
        return model(latents, latents.new_full((count,), 0.5), conditioning).square().mean()

    step = _seconds(compute, model)
    with torch.no_grad():
        return step, _seconds(compute, model) / count


def _seconds(compute: Callable[[], Tensor], model: nn.Module, turns: int = 3) -> float:
    """Return the shortest time of a step, forward and, with gradients, backward; the first turn is not counted."""
    times, device = [], find_device()
    for _ in range(1 + turns):
        began = time.perf_counter()
        with computing_in(precision_on(find_machine()), device):
            loss = compute()
        if loss.requires_grad:
            loss.backward()
            model.zero_grad()
        float(loss.detach())  # waits for the card
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return min(times[1:])
