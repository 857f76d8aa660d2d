"""How fast a training goes and what holds it up, measured beside the steps, which never wait for it."""

import copy
import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn

from vavae_tools.runtime.console import log
from vavae_tools.runtime.errors import Stopped, one_line
from vavae_tools.runtime.machine import peak_memory
from vavae_tools.training.callbacks.progress import is_written
from vavae_tools.training.lightning_inside import logged_step

WARM_UP = 3  # optimiser steps that are not measured: code is compiled, memory and optimiser states are made
MIN_STEPS = 2  # fewer steps say nothing
MAX_WAITING_SHARE = 0.2  # share of the time spent waiting for data from which on there is advice


class Clock:
    """Marks in time as the processor sees it, for a training on it."""

    def mark(self) -> Any:
        return time.perf_counter()

    def has_passed(self, mark: Any) -> bool:
        return True

    def seconds(self, begin: Any, end: Any) -> float:
        return end - begin

    def wait(self) -> None:
        """Wait until all marks have passed."""


class GPUClock(Clock):
    """Marks in a GPU's queue of work: between two of them lies what the GPU did, or that it had nothing to do."""

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def has_passed(self, mark: torch.cuda.Event) -> bool:
        return mark.query()

    def seconds(self, begin: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return begin.elapsed_time(end) / 1000

    def wait(self) -> None:
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Speed:
    """The speed of a run over all processes; `memory` in bytes, `waiting` a share, FLOP/s of one device."""

    images_per_second: float
    step_seconds: float
    waiting: float
    memory: float
    processes: int = 1
    flops_per_second: float | None = None
    peak_flops: float | None = None

    def __str__(self) -> str:
        together = f" ({self.processes} processes)" if self.processes > 1 else ""
        line = (
            f"throughput  {self.images_per_second:,.1f} images/s, {self.step_seconds * 1000:,.1f} ms a step"
            f"{together}, {self.waiting:.0%} of it waiting for data, peak memory {self.memory / 1e9:.1f} GB"
        )
        if self.flops_per_second and self.peak_flops:
            share = self.flops_per_second / self.peak_flops
            line += f", {share:.0%} of the card's {self.peak_flops / 1e12:,.0f} TFLOP/s"
        return line


class Throughput(L.Callback):
    """Measure images a second, a step's time, the share of waiting for data, peak memory and the card's utilisation.

    Lightning's own ThroughputMonitor makes the GPU finish at every step and does not measure the wait for data. A step
    lasts from the end of the one before it to its own end, and what lies before its own start is waiting for data;
    after validation, a checkpoint, previews or an epoch's end it lasts from its own start. The first `WARM_UP` steps do
    not count.

    `log` gets a line at the end, also where training was stopped, and one with advice where more than
    `MAX_WAITING_SHARE` of the time went into waiting for data. Loggers get `throughput/…` of the first process where
    Lightning logs a step; `speed` is the run's once it has ended. `clock` is by default that of the device.
    """

    def __init__(self, log: Callable[[str], None] = log, clock: Clock | None = None) -> None:
        self.log_line, self.speed = log, None
        self._given_clock = clock

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        on_gpu = module.device.type == "cuda"
        self._clock = self._given_clock or (GPUClock() if on_gpu else Clock())
        self._steps_before, self._measured_from = trainer.global_step, trainer.global_step + WARM_UP
        self._whole, self._lately = Counter(), Counter()  # steps, samples, seconds, and of these waited for data
        self._running: deque[tuple[Any, Any, Any, int, int]] = deque()  # batches whose marks may not have passed
        self._end: Any | None = None
        self._peak = peak_flops(module.device, str(trainer.precision)) if trainer.is_global_zero else None
        self._flops: int | None = None
        self.speed = None
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(module.device)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch, batch_idx) -> None:
        self._start = self._clock.mark()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx) -> None:
        end, begin = self._clock.mark(), self._start if self._end is None else self._end
        steps = trainer.global_step - self._steps_before
        if self._steps_before >= self._measured_from:
            has_index = isinstance(batch, dict) and "index" in batch
            samples = len(batch["index"]) if has_index else extract_batch_size(batch)
            self._running.append((begin, self._start, end, steps, samples))
        elif self._peak and self._flops is None and hasattr(module, "flops_of_a_sample"):  # nothing is measured yet
            self._count(module, batch)
        self._steps_before, self._end = trainer.global_step, end
        self._look()
        if trainer.is_global_zero and trainer.loggers and self._lately["steps"] and is_written(trainer):
            self._log(trainer, module)

    def _count(self, module: L.LightningModule, batch: Any) -> None:
        try:
            self._flops = module.flops_of_a_sample(batch)
        except Exception as error:  # a figure beside the training, which goes on without it
            self._peak = None
            reason = f"{type(error).__name__}: {one_line(error, 200)}"
            self.log_line(f"no utilisation of the card: what a step computes cannot be counted ({reason})")

    def _look(self) -> None:
        while self._running and self._clock.has_passed(self._running[0][2]):
            begin, start, end, steps, samples = self._running.popleft()
            spent = {"steps": steps, "samples": samples}
            spent |= {"seconds": self._clock.seconds(begin, end), "waited": self._clock.seconds(begin, start)}
            self._whole.update(spent)
            self._lately.update(spent)

    def _log(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        images, seconds, waiting = _rates(self._lately)
        self._lately = Counter()
        values = {"images_per_second": trainer.world_size * images, "step_ms": 1000 * seconds, "waiting": waiting}
        values["memory_gb"] = peak_memory(module.device) / 1e9
        if self._flops:
            values["utilisation"] = self._flops * images / self._peak
        for logger in trainer.loggers:
            logger.log_metrics({f"throughput/{name}": value for name, value in values.items()}, logged_step(trainer))

    def _something_else(self, *arguments: Any) -> None:
        self._end = None

    on_validation_start = on_train_epoch_end = on_save_checkpoint = _something_else

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped):  # which all processes are at the same step
            self.on_train_end(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._clock.wait()
        self._look()
        if self._whole["steps"] < MIN_STEPS:
            return
        own = torch.tensor([*_rates(self._whole), peak_memory(module.device)], device=module.device)
        images, seconds, waiting, memory = trainer.strategy.all_gather(own).view(-1, len(own)).unbind(1)
        flops = self._flops * images.mean().item() if self._flops else None
        totals = [value.item() for value in (images.sum(), seconds.mean(), waiting.mean(), memory.max())]
        self.speed = Speed(*totals, trainer.world_size, flops, self._peak)
        if trainer.is_global_zero:
            self.log_line(str(self.speed))
            if self.speed.waiting > MAX_WAITING_SHARE:
                self.log_line(
                    f"advice: {self.speed.waiting:.0%} of the time went into waiting for data: try another num_workers "
                    f"(it was {getattr(trainer.train_dataloader, 'num_workers', 0)}; there are {os.cpu_count()} "
                    "processors), keep latents and images on this machine's own disk, or take smaller images"
                )


def _rates(spent: Counter[str]) -> list[float]:
    """Return images a second, seconds a step, and the share of the time that was waiting for data."""
    return [spent["samples"] / spent["seconds"], spent["seconds"] / spent["steps"], spent["waited"] / spent["seconds"]]


def peak_flops(device: torch.device, precision: str) -> float | None:
    """Return the FLOP/s that a card's maker gives for dense matrices in a precision; None: not known."""
    if device.type != "cuda":
        return None
    dtype = torch.bfloat16 if "bf16" in precision else torch.float16 if "16" in precision else torch.float32
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of cards that are not in its table
        return get_available_flops(device, dtype)


def flops_of(network: nn.Module, loss: Callable[[nn.Module], Tensor]) -> int:
    """Return the floating-point operations of the matrix products in `loss(network)` and its gradients.

    They are counted on a copy that has shapes but no numbers; `loss` makes its own tensors, on the CPU. What gradient
    checkpointing computes twice counts once (as in Chowdhery et al. 2022), gradients of frozen weights do not count.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # the plain formula of attention: the CPU's own kernel is not in the counter's table, GPUs' compute parts twice
    with FakeTensorMode(allow_non_fake_inputs=True), sdpa_kernel(SDPBackend.MATH):
        copied = without_numbers(network, "cpu")
        with FlopCounterMode(display=False) as counter:
            loss(copied).backward()
    return counter.get_total_flops()


def without_numbers(network: nn.Module, device: str) -> nn.Module:
    """Return a copy with new float32 weights of the same shapes, and without gradient checkpointing."""
    memo: dict[int, Tensor] = {}
    for weight in network.parameters():
        memo[id(weight)] = nn.Parameter(torch.empty(weight.shape, device=device), weight.requires_grad)
    for buffer in network.buffers():
        dtype = torch.float32 if buffer.is_floating_point() else buffer.dtype
        memo[id(buffer)] = torch.empty(buffer.shape, device=device, dtype=dtype)
    made = copy.deepcopy(network, memo)
    for part in made.modules():
        if getattr(part, "gradient_checkpointing", False):
            part.gradient_checkpointing = False
    return made
