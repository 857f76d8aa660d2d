"""Checkpoints that are whole: `best-*.ckpt`, `last.ckpt` and periodic folders, written beside training."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from vavae_tools.checkpoints.formats import clear_left_overs, read_any_format, remove, write_any_format
from vavae_tools.checkpoints.resuming import keep_newest
from vavae_tools.runtime.console import log
from vavae_tools.runtime.errors import Stopped, StoppedAtOnce, UserError
from vavae_tools.runtime.files import atomic_write
from vavae_tools.training.callbacks.progress import is_measured
from vavae_tools.training.config import SaveConfig, session_end
from vavae_tools.training.lightning_inside import leave_sigterm_to_us, reopen_epoch

OUTPUT_FOLDERS = ("checkpoints", "autoencoder", "vavae", "rae", "pipeline", "reconstructions", "samples", "classifier")


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes beside, flushes, renames: a kill or a full disk leaves the checkpoint before it as it was.

    A step waits for a copy of the weights in memory; a thread brings it to the disk, one checkpoint after the other, in
    the format that the path names (`checkpoints.formats`).
    """

    def __init__(self, log: Callable[[str], None] = log) -> None:
        super().__init__()
        self.log_line, self.note = log, lambda path: None  # is called with each checkpoint's path
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoints")
        self._pending: Future | None = None
        self.seconds = 0.0  # what the slowest checkpoint took so far, from the copy to the flushed file

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any | None = None) -> None:
        self.wait()
        began, copies = time.monotonic(), {}

        def copied(tensor: Tensor) -> Tensor:  # what shares its memory shares the copy, and is written once
            place = tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()
            if place not in copies:
                copies[place] = tensor.detach().to("cpu", copy=True)
            return copies[place]

        checkpoint = apply_to_collection(checkpoint, Tensor, copied)  # training changes the weights meanwhile
        size = sum(tensor.nbytes for tensor in copies.values())
        self._pending = self._writer.submit(self._write, checkpoint, Path(path), size, began)
        self.note(path)

    def _write(self, checkpoint: dict[str, Any], path: Path, size: int, began: float) -> None:
        free_disk_space(path, size, self.log_line)
        write_any_format(checkpoint, path)
        self.seconds = max(self.seconds, time.monotonic() - began)

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is on the disk; raise where it could not be written."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def failure(self) -> BaseException | None:
        """Return why the last checkpoint could not be written, without waiting for it."""
        return self._pending.exception() if self._pending is not None and self._pending.done() else None

    def remove_checkpoint(self, path: str) -> None:
        self.wait()
        if Path(path).exists():
            remove(Path(path))

    def load_checkpoint(self, path: str, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        return read_any_format(path, self.log_line)

    teardown = wait


def free_disk_space(path: Path, needed: int, log: Callable[[str], None]) -> None:
    """Remove `previous.ckpt`, then periodic folders, where `needed` bytes do not fit; the newest whole one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def full() -> bool:
        return shutil.disk_usage(path.parent).free < needed * 1.05 + 2**24

    previous = path.with_name("previous.ckpt")
    if full() and previous.exists() and path.with_name("last.ckpt").exists():
        remove(previous)
        log(f"The disk is nearly full: {previous} is removed (last.ckpt stays)")
    if full():
        for gone in keep_newest(path.parent if path.suffix in ("", ".pth") else path.parent.parent, 1):
            log(f"The disk is nearly full: {gone.path} is removed")


class BestCheckpoint(ModelCheckpoint):
    """Keeps the best; a run that resumes knows the best of before, also where its folder has another path now."""

    @property
    def state_key(self) -> str:
        return super().state_key.replace(type(self).__qualname__, "ModelCheckpoint")  # as it is in checkpoints

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, module, stage)
        self._trainer = trainer

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if is_measured(trainer, self.monitor):
            super().on_validation_end(trainer, module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        former = state_dict.get("best_k_models", {})
        found = self._found(former) if self._trainer.is_global_zero else {}
        found = self._trainer.strategy.broadcast(found)  # path here → score, the best first
        if found:
            best, *_, worst = [*found, *found]
            here = {"dirpath": self.dirpath, "best_k_models": found, "best_model_path": best}
            here |= {"best_model_score": found[best], "kth_best_model_path": worst, "kth_value": found[worst]}
            super().load_state_dict({**state_dict, **here})

    def _found(self, former: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return those that are here or where the run was before, as many as are kept."""
        found, resumed = {}, Path(self._trainer.ckpt_path)
        for path, score in sorted(former.items(), key=lambda pair: float(pair[1]), reverse=self.mode == "max"):
            here = Path(self.dirpath, Path(path).name)
            if 0 <= self.save_top_k <= len(found):
                if here.is_file():
                    log(f"{here} is removed (keep_best={self.save_top_k})")
                    remove(here)
                continue
            beside = (here, resumed.parent / here.name, resumed.parent / "checkpoints" / here.name, Path(path))
            there = next((place for place in beside if place.is_file()), None)
            if there is None:
                log(f"{path}, one of the best, is not there any more, nor in {self.dirpath}: it is no longer known")
                continue
            if there != here:
                with atomic_write(here) as partial:
                    shutil.copyfile(there, partial)
            found[str(here)] = score
        return found


class LastCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt` every few minutes, periodic folders, and `last.ckpt` at the end however training ends.

    Ctrl-C, a notebook's stop button, SIGTERM and the time limit end training after the step they fall into, since
    between two steps a checkpoint is exact; then `Stopped` is raised. A second Ctrl-C does not wait. Of several
    processes it is enough that one is told; all stop after the same step, about a second later. An error saves nothing:
    the others would wait for a process that is gone, and `last.ckpt` is whole. Before a session's end training stops as
    early as saving takes, twice, and a minute for what comes after.

    `folder` gets `last.ckpt`; the folder above it, the run's, periodic checkpoints.
    """

    def __init__(self, folder: Path, saving: SaveConfig | None = None) -> None:
        self.saving = saving or SaveConfig()
        interval = timedelta(minutes=self.saving.save_every_minutes)
        super().__init__(folder, "last", train_time_interval=interval, enable_version_counter=False)
        self.until = session_end(self.saving.max_time)
        self._stop, self._former_handlers = False, {}

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, module, stage)
        self.run = Path(self.dirpath).parent
        if trainer.is_global_zero:
            for folder in (self.run, *(self.run / name for name in OUTPUT_FOLDERS)):
                clear_left_overs(folder)  # of a process that was killed while it wrote

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        self._step = self._asked_after = trainer.global_step
        self._asked_at, self._interval = time.monotonic(), 1  # steps between two questions to the other processes
        leave_sigterm_to_us(trainer)
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former_handlers[number] = signal.signal(number, self._interrupt)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing: Lightning's own warns of a folder that was moved."""

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        reopen_epoch(checkpoint["loops"]["fit_loop"], trainer.max_epochs == -1)

    def _interrupt(self, number: int, frame: object) -> None:
        if number == signal.SIGTERM and os.getpid() != self._process:  # one that loads data, forked with this handler
            os._exit(128 + number)
        if self._stop and number == signal.SIGINT:  # a launcher may say SIGTERM twice
            raise StoppedAtOnce("Stopped at once, in the middle of a step; last.ckpt is as it was written before")
        self._stop = True

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ends = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        gathered = getattr(module, "accumulate_grad_batches", trainer.accumulate_grad_batches)
        if (batch_idx + 1) % gathered and not ends:
            return  # the gradients gathered so far would be lost
        validates = trainer.enable_validation and sum(trainer.num_val_batches) > 0
        if ends and validates and (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
            return  # it would be left out on resuming, and with it perhaps the best model: save after it
        self._save_what_is_due(trainer, ends)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._save_what_is_due(trainer, trainer.fit_loop.epoch_loop.batch_progress.is_last_batch, ask=True)

    def _save_what_is_due(self, trainer: L.Trainer, epoch_ends: bool, ask: bool = False) -> None:
        step, epoch = trainer.global_step, trainer.current_epoch + 1
        steps, epochs = self.saving.save_every_n_steps, self.saving.save_every_n_epochs
        if steps and step // steps > self._step // steps:
            self._save_periodic(trainer, f"checkpoint-{step}")
        if epochs and epoch_ends and epoch % epochs == 0:
            self._save_periodic(trainer, f"checkpoint-epoch-{epoch}")
        self._step = step
        if trainer.world_size > 1 and not ask and step < self._asked_after + self._interval:
            return
        writer = trainer.strategy.checkpoint_io
        fault = writer.failure()
        now = time.monotonic()
        due = now - self._last_time_checked >= self._train_time_interval.total_seconds()
        late = self.until is not None and time.time() + 2 * writer.seconds + 60 > self.until
        failed, stop = fault is not None, self._stop or trainer.received_sigterm
        if trainer.world_size > 1:
            due, stop, late, failed = self._ask(trainer, due, stop, late, failed)
        if failed:
            raise fault or UserError("The first process could not write a checkpoint, and says why")
        if due or stop or late:
            self._save(trainer)
            self._last_time_checked = now
        if stop or late:
            writer.wait()
            why = "The session's time is nearly over: stopped" if late else "Stopped"
            raise Stopped(f"{why} after step {step:,}; go on with --resume last")

    def _ask(self, trainer: L.Trainer, *wishes: bool) -> list[bool]:
        """Return for each of the wishes whether any process has it.

        To ask, processes wait for each other; so it is done after as many steps as the slowest makes in a second.
        """
        now, step = time.monotonic(), trainer.global_step
        seconds = (now - self._asked_at) / max(1, step - self._asked_after)
        asked = torch.tensor([*map(float, wishes), seconds], device=trainer.strategy.root_device)
        *wanted, seconds = trainer.strategy.reduce(asked, reduce_op="max").tolist()
        # at most doubled: the first steps are no measure, such as those that a GPU is still busy with
        self._interval = max(1, min(2 * self._interval, int(1 / max(seconds, 1e-6)), 1000))
        self._asked_at, self._asked_after = now, step
        return [bool(wish) for wish in wanted]

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._give_back_signals()
        if trainer.global_step and not trainer.fast_dev_run:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        path = self.format_checkpoint_name({}, filename="last")
        trainer.save_checkpoint(path)
        self.best_model_path = path

    def _save_periodic(self, trainer: L.Trainer, name: str) -> None:
        name = f"{name.replace('-', '_')}.pth" if self.saving.single_files else name
        trainer.save_checkpoint(self.run / name)
        if trainer.is_global_zero:
            trainer.strategy.checkpoint_io.wait()
            for gone in keep_newest(self.run, self.saving.keep_last):
                log(f"{gone.path} is removed (keep_last={self.saving.keep_last})")

    def _give_back_signals(self, *arguments: Any) -> None:
        for number, handler in self._former_handlers.items():
            signal.signal(number, handler)
        self._former_handlers = {}

    on_exception = _give_back_signals  # and nothing is saved, see above


def checkpoint_callbacks(
    folder: Path, monitor: str | None, saving: SaveConfig | None = None, mode: str = "min", best: str = "best-"
) -> list[ModelCheckpoint]:
    """Return those for `last.ckpt`, periodic folders, and the best by `monitor`, if any, as `best-EPOCH-VALUE.ckpt`."""
    last = LastCheckpoint(folder, saving)
    if not monitor:
        return [last]
    name = f"{best}{{epoch:03d}}-{{{monitor}:.4f}}"
    # at the end of a train epoch Lightning would not resume exactly where max_steps is set
    options = {"save_on_train_epoch_end": False, "auto_insert_metric_name": False, "enable_version_counter": False}
    of_best = BestCheckpoint(folder, name, monitor=monitor, mode=mode, save_top_k=last.saving.keep_best, **options)
    return [of_best, last]  # last, so that it knows of the best
