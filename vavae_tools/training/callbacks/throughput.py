"""How fast a training goes and what holds it up, measured beside the steps, which never wait for it."""

import copy
import os
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable
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
MAX_WAITING_SHARE = 0.2  # share of the time spent waiting for data from which on there is advice


class Moment:
    """A moment of a training on the processor, as a `torch.cuda.Event` is one in a GPU's queue of work."""

    def __init__(self) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Moment") -> float:
        return 1000 * (end.time - self.time)


def gpu_moment() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


class Throughput(L.Callback):
    """Measure images a second, a step's time, the share of waiting for data, peak memory and the card's utilisation.

    Lightning's own ThroughputMonitor makes the GPU finish at every step and does not measure the wait for data. A step
    lasts from the end of the one before it to its own end, and what lies before its own start is waiting for data;
    after validation, a checkpoint, previews or an epoch's end it lasts from its own start. The first `WARM_UP` steps do
    not count.

    `log` gets a line at the end, also where training was stopped, and advice where more than `MAX_WAITING_SHARE` of the
    time went into waiting. Loggers get `throughput/…` of the first process where Lightning logs a step; `speed` holds
    the same of the whole run once it has ended. `moment` is by default the device's.
    """

    def __init__(self, log: Callable[[str], None] = log, moment: Callable[[], Any] | None = None) -> None:
        self.log_line, self._moment, self.speed = log, moment, {}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        on_gpu = module.device.type == "cuda"
        self._moment = self._moment or (gpu_moment if on_gpu else Moment)
        self._steps_before, self._measured_from = trainer.global_step, trainer.global_step + WARM_UP
        self._whole, self._lately = Counter(), Counter()  # steps, samples, ms, and of these waited for data
        self._running: deque[tuple[Any, Any, Any, int, int]] = deque()  # batches whose end may not have passed
        self._end: Any | None = None
        self._peak = peak_flops(module.device, str(trainer.precision)) if trainer.is_global_zero else None
        self._flops: int | None = None
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(module.device)

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch, batch_idx) -> None:
        self._start = self._moment()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx) -> None:
        end, begin = self._moment(), self._start if self._end is None else self._end
        steps = trainer.global_step - self._steps_before
        if self._steps_before >= self._measured_from:
            has_index = isinstance(batch, dict) and "index" in batch
            samples = len(batch["index"]) if has_index else extract_batch_size(batch)
            self._running.append((begin, self._start, end, steps, samples))
        elif self._peak and self._flops is None and hasattr(module, "flops_of_a_sample"):  # nothing is measured yet
            self._count(module, batch)
        self._steps_before, self._end = trainer.global_step, end
        self._collect()
        if trainer.is_global_zero and trainer.loggers and self._lately["steps"] and is_written(trainer):
            speed = self._speed(self._lately, module.device)
            speed["images_per_second"] *= trainer.world_size
            for logger in trainer.loggers:
                logger.log_metrics({f"throughput/{name}": value for name, value in speed.items()}, logged_step(trainer))
            self._lately = Counter()

    def _count(self, module: L.LightningModule, batch: Any) -> None:
        try:
            self._flops = module.flops_of_a_sample(batch)
        except Exception as error:  # a figure beside the training, which goes on without it
            self._peak = None
            reason = f"{type(error).__name__}: {one_line(error, 200)}"
            self.log_line(f"no utilisation of the card: what a step computes cannot be counted ({reason})")

    def _collect(self) -> None:
        while self._running and self._running[0][2].query():
            begin, start, end, steps, samples = self._running.popleft()
            spent = {"ms": begin.elapsed_time(end), "waited": begin.elapsed_time(start)}
            for sums in (self._whole, self._lately):
                sums.update(spent, steps=steps, samples=samples)

    def _speed(self, spent: Counter[str], device: torch.device) -> dict[str, float]:
        images = 1000 * spent["samples"] / spent["ms"]
        speed = {"images_per_second": images, "step_ms": spent["ms"] / spent["steps"]}
        speed |= {"waiting": spent["waited"] / spent["ms"], "memory_gb": peak_memory(device) / 1e9}
        return {**speed, "utilisation": self._flops * images / self._peak} if self._flops else speed

    def _something_else(self, *arguments: Any) -> None:
        self._end = None

    on_validation_start = on_train_epoch_end = on_save_checkpoint = _something_else

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped):  # which all processes are at the same step
            self.on_train_end(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._running:
            self._running[-1][2].synchronize()
        self._collect()
        if self._whole["steps"] < 2:  # which say nothing
            return
        speed = self._speed(self._whole, module.device)
        names = ("images_per_second", "step_ms", "waiting", "memory_gb")
        own = torch.tensor([speed[name] for name in names], device=module.device)
        images, step_ms, waiting, memory = trainer.strategy.all_gather(own).view(-1, len(own)).unbind(1)
        together = (images.sum(), step_ms.mean(), waiting.mean(), memory.max())
        self.speed = dict(zip(names, (value.item() for value in together), strict=True))
        if not trainer.is_global_zero:
            return
        images_per_second, step_ms, waiting, memory = self.speed.values()
        processes = f" ({trainer.world_size} processes)" if trainer.world_size > 1 else ""
        line = f"throughput  {images_per_second:,.1f} images/s, {step_ms:,.1f} ms a step{processes}, "
        line += f"{waiting:.0%} of it waiting for data, peak memory {memory:.1f} GB"
        if self._flops:
            self.speed["utilisation"] = self._flops * images.mean().item() / self._peak
            line += f", {self.speed['utilisation']:.0%} of the card's {self._peak / 1e12:,.0f} TFLOP/s"
        self.log_line(line)
        if waiting > MAX_WAITING_SHARE:
            self.log_line(
                f"advice: {waiting:.0%} of the time went into waiting for data: try another num_workers "
                f"(it was {getattr(trainer.train_dataloader, 'num_workers', 0)}; there are {os.cpu_count()} "
                "processors), keep latents and images on this machine's own disk, or take smaller images"
            )


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
