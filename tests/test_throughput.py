"""Curves and speed of a training, on one process and on two, which torchrun starts with this file as their script."""

import json
import math
import os
import sys
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
import torch.distributed as dist
from alike import assert_curves_alike, curves
from forked import torchrun
from test_token_training import batch as token_batch
from test_token_training import module as token_module
from tiny import QUIET, new_dit, tiny_vavae

from vavae_tools.autoencoders.rae import tiny_rae
from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.data.latents import LatentDataModule
from vavae_tools.diffusion.conditioning import ClassConditioner, TextConditioner
from vavae_tools.diffusion.dit import DDT, TextDiT
from vavae_tools.diffusion.objectives import make_objective
from vavae_tools.training.autoencoder_module import RAEDecoderModule, VAVAEModule
from vavae_tools.training.callbacks import throughput
from vavae_tools.training.callbacks.throughput import Moment, Throughput
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.devices import quiet_lightning
from vavae_tools.training.run import build_trainer, fit_trainer

GLOBAL_BATCH = 8


def new_vavae(**changes) -> VAVAEModule:
    torch.manual_seed(0)
    return VAVAEModule(tiny_vavae(), **{"lr": 1e-3, "warmup_steps": 1, "schedule": "constant", **changes})


def train(module, data, folder: Path, callbacks=(), log=lambda line: None, resume=None, **settings) -> L.Trainer:
    quiet_lightning()
    length = {"max_steps": settings.pop("max_steps", 20), "max_epochs": -1}
    settings = {"limit_val_batches": 0, "enable_checkpointing": False, "log_every_n_steps": 1, **settings}
    settings = module.trainer_settings(accelerator="cpu", **settings)
    trainer = build_trainer({**length, **settings}, folder, list(callbacks), log)
    fit_trainer(trainer, module, data, resume, log)
    return trainer


# ---- what one process and two do alike


class Collectives(L.Callback):
    """Counts, batch by batch, sums over processes that Python asks for, and gradients that are sent (weights)."""

    def __init__(self) -> None:
        self.sums, self.sent = [], []

    def on_train_start(self, trainer, module):
        if trainer.world_size > 1:
            if isinstance(module, DiffusionModule):  # DDP would send its tables before each forward pass
                assert not trainer.strategy.model.modules_buffers
            from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

            def hook(group, bucket):
                self.sent[-1] += bucket.buffer().numel()
                return allreduce_hook(group, bucket)

            trainer.strategy.model.register_comm_hook(None, hook)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.sums.append(0)
        self.sent.append(0)


class Spoil(L.Callback):
    """A loss that is infinite on one process at some steps."""

    def __init__(self, rank: int, steps: range) -> None:
        self.rank, self.steps = rank, steps

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.__dict__.setdefault("whole_image_loss", module.image_loss)
        module.image_loss = module.whole_image_loss
        if trainer.global_rank == self.rank and trainer.global_step in self.steps:

            def spoilt(reconstruction, images):
                loss, parts = module.whole_image_loss(reconstruction, images)
                return loss + torch.inf, parts  # its gradient is finite

            module.image_loss = spoilt


class Ticks:
    """A clock that goes on only where it is told; moments after `done` have not passed yet."""

    def __init__(self, done: float = math.inf) -> None:
        self.now, self.done = 0.0, done

    def __call__(self) -> Moment:
        moment = Moment()
        moment.time = self.now
        moment.query = lambda: moment.time <= self.done
        moment.synchronize = lambda: setattr(self, "done", math.inf)
        return moment


def slow_data(latents_dir, batch_size: int, clock: Ticks, seconds: float) -> LatentDataModule:
    """Each batch takes so long."""
    data = LatentDataModule(latents_dir, batch_size)
    take = type(data.train_data).stored

    class Slow(type(data.train_data)):
        def stored(self, rows):
            clock.now += seconds
            return take(self, rows)

    data.train_data.__class__ = Slow
    return data


class Takes(L.Callback):
    """Time of the parts of a training: the first three steps 50 s, the others 1 s, and what is no step 1000 s."""

    def __init__(self, clock: Ticks) -> None:
        self.clock, self.steps = clock, 0

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.clock.now += 50 if self.steps < 3 else 1
        self.steps += 1

    def pause(self, *arguments):
        self.clock.now += 1000

    on_validation_batch_end = on_train_epoch_end = on_save_checkpoint = pause


def with_clock(monkeypatch, clock: Ticks) -> None:
    monkeypatch.setattr("vavae_tools.training.run.Throughput", lambda log: Throughput(log, clock))


def run_all(folder: Path, latents_dir: Path, split_dir: Path) -> None:
    """What is compared between one process and two; each leaves a JSON file."""
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    share = GLOBAL_BATCH // world
    found = {}
    counted, sums = Collectives(), dist.all_reduce

    def counting(*arguments, **named):
        if counted.sums and not named.get("async_op"):  # those of gradients are asynchronous
            counted.sums[-1] += 1
        return sums(*arguments, **named)

    if world > 1:
        dist.all_reduce = counting
    latents = lambda: LatentDataModule(latents_dir, share)  # noqa: E731
    images = lambda: ImageDataModule(split_dir, 24, share)  # noqa: E731

    train(new_dit(), latents(), folder / "dit")
    train(new_vavae(), images(), folder / "vavae")

    counted.sums, counted.sent = [], []
    train(new_dit(), latents(), folder / "seldom", [counted], log_every_n_steps=5, accumulate_grad_batches=2)
    found["seldom"] = {"sums": counted.sums, "sent": counted.sent}

    counted.sums, counted.sent = [], []
    module = new_vavae(disc_weight=0.5, disc_start=0, disc_width=8, accumulate_grad_batches=3)
    train(module, images(), folder / "gathered", [counted], max_steps=4)
    found["gathered"] = {"sent": counted.sent}

    for name, steps in (("spoilt", range(2, 4)), ("ruined", range(2, 7))):
        module = new_vavae()
        train(module, images(), folder / name, [Spoil(world - 1, steps)], max_steps=9)
        found[name] = [w.double().sum().item() for w in module.vavae.parameters()]

    if world > 1:
        clock, said = Ticks(), []
        with_clock(pytest.MonkeyPatch(), clock)
        data = slow_data(latents_dir, share, clock, 1.0 + 2 * rank)
        train(new_dit(), data, folder / "timed", [Takes(clock)], said.append, max_steps=8)
        found["said"] = said
    (folder / f"{rank} of {world}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def one_and_two(latents_dir, split_dir, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("processes")
    (folder / "1").mkdir()
    (folder / "2").mkdir()
    done = torchrun(__file__, folder / "2", latents_dir, split_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    run_all(folder / "1", latents_dir, split_dir)
    return folder / "1", folder / "2"


def of(folder: Path, rank: int, what: str):
    return json.loads((folder / f"{rank} of {folder.name}.json").read_text())[what]


@pytest.mark.parametrize("kind", ["dit", "vavae"])
def test_the_curves_of_two_processes_are_those_of_one(one_and_two, kind):
    one, two = (curves(folder / kind) for folder in one_and_two)
    names = {name for name in one if name.startswith("train/")}
    assert {"train/loss", "train/lr" if kind == "dit" else "train/gradient_norm"} <= names == {*two} & names
    for name in names:
        assert len(one[name]) == 20 and [step for step, _ in one[name]] == [step for step, _ in two[name]]
        assert_curves_alike([value for _, value in two[name]], [value for _, value in one[name]], name)
    assert len({value for _, value in one["train/loss"]}) == 20


def test_processes_speak_about_curves_once_a_written_step(one_and_two):
    """Twenty steps of two batches, of which each fifth step is written; gradients, too, are sent at steps alone."""
    for rank in (0, 1):
        found = of(one_and_two[1], rank, "seldom")
        complete = [batch % 3 > 0 for batch in range(30)]  # an epoch's third batch makes a step of its own
        assert [bool(sent) for sent in found["sent"]] == complete
        assert found["sums"] == [int(now and sum(complete[: i + 1]) % 5 == 0) for i, now in enumerate(complete)]


def test_no_gradient_is_sent_before_the_last_of_the_batches_gathered(one_and_two):
    """Neither the discriminator's, nor where losses are weighed against each other."""
    found = of(one_and_two[1], 0, "gathered")
    assert [bool(sent) for sent in found["sent"]] == [batch % 3 == 2 for batch in range(12)]


@pytest.mark.parametrize(("name", "skipped"), [("spoilt", 2), ("ruined", 5)])
def test_a_loss_that_one_process_alone_finds_infinite_is_so_for_all(one_and_two, name, skipped):
    """Two steps are left out; after five in a row all go back to the state at the beginning."""
    one, two = (curves(folder / name) for folder in one_and_two)
    for found in (one, two):
        assert found["train/skipped_steps"][-1] == (8, skipped)
    assert of(one_and_two[1], 0, name) == of(one_and_two[1], 1, name)
    assert of(one_and_two[1], 0, name) == pytest.approx(of(one_and_two[0], 0, name), abs=1e-4)


def test_the_speeds_of_processes_are_added_and_said_once(one_and_two):
    """4 images in 2 s and in 4 s, of which half and three quarters are waiting, but after an epoch's end."""
    said = [line for line in of(one_and_two[1], 0, "said") if not line.startswith("step")]
    assert said[0].startswith("throughput  3.9 images/s, 2,200.0 ms a step (2 processes), 51% of it waiting for data")
    assert len(said) == 2 and of(one_and_two[1], 1, "said") == []


# ---- what is measured


def timed(monkeypatch, latents_dir, folder, module=None, data_takes=3.0, **settings):
    """(lines that were said at the end, curves, the callback) of a training with 4 latents a batch."""
    clock, said = Ticks(), []
    with_clock(monkeypatch, clock)
    data = slow_data(latents_dir, 4, clock, data_takes)
    settings = {"limit_val_batches": 1, "max_steps": 15, "check_val_every_n_epoch": 1, **settings}

    class Save(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if trainer.global_step % 4 == 0:
                trainer.save_checkpoint(folder / "a.ckpt")

    trainer = train(module or new_dit(), data, folder, [Takes(clock), Save()], said.append, **settings)
    lines = [line for line in said if line.startswith(("throughput", "advice"))]
    return lines, curves(folder), next(part for part in trainer.callbacks if isinstance(part, Throughput))


def test_only_steps_count_and_only_the_wait_for_their_data_is_waiting(monkeypatch, latents_dir, tmp_path):
    """1 s of 4 is the step; 1000 s of validation, of checkpoints and at an epoch's end, 50 s of first steps are not.

    After four of the twelve steps comes one of these: the next step goes from its own start.
    """
    (line, advice), found, measured = timed(monkeypatch, latents_dir, tmp_path)
    assert line.startswith("throughput  1.3 images/s, 3,000.0 ms a step, 67% of it waiting for data, peak memory ")
    assert "TFLOP/s" not in line
    assert advice.startswith("advice: 67% of the time") and "num_workers (it was 0; " in advice
    assert {name: {value for _, value in found[f"throughput/{name}"]} for name in ("waiting", "step_ms")} == {
        "waiting": {0.75, 0.0},
        "step_ms": {4000.0, 1000.0},
    }
    assert [step for step, _ in found["throughput/images_per_second"]] == list(range(3, 15))
    assert measured.speed["memory_gb"] > 0.05


def test_gathered_batches_are_one_step(monkeypatch, latents_dir, tmp_path):
    lines, _, measured = timed(monkeypatch, latents_dir, tmp_path, data_takes=0.0, accumulate_grad_batches=3)
    assert measured.speed["step_ms"] == 3000 and measured.speed["images_per_second"] == 4
    assert len(lines) == 1  # no advice


def test_the_use_of_a_known_card(monkeypatch, latents_dir, tmp_path):
    monkeypatch.setattr(throughput, "peak_flops", lambda device, precision: 5e6)
    (line, _), found, measured = timed(monkeypatch, latents_dir, tmp_path)
    flops = new_dit().flops_of_a_sample({"latents": torch.zeros(1, 2, 8, 8), "labels": torch.zeros(1).long()})
    assert measured.speed["utilisation"] == pytest.approx(flops * 4 / 3 / 5e6)  # four images in three seconds
    found = [value / (flops / 5e6) for _, value in found["throughput/utilisation"]]
    assert sorted(found) == pytest.approx([1] * 8 + [4] * 4)
    assert line.endswith(f", {flops * 4 / 3 / 5e6:.0%} of the card's 0 TFLOP/s")


def test_marks_in_a_gpus_queue_are_read_once_they_have_passed(monkeypatch, latents_dir, tmp_path):
    """The processor is three batches ahead: none of them counts until the GPU has come to its end."""
    clock = Ticks(done=-1.0)
    measured = Throughput(lambda line: None, clock)
    seen = []

    class Run(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            clock.now += 1
            clock.done = clock.now - 3
            seen.append(measured._whole["steps"])

    module = new_dit()
    settings = module.trainer_settings(accelerator="cpu", devices=1)
    trainer = L.Trainer(**settings, **QUIET, max_steps=10, callbacks=[measured, Run()])
    trainer.fit(module, slow_data(latents_dir, 2, clock, 0.0))
    assert seen == [0, 0, 0, 0, 0, 0, 1, 2, 3, 4]
    assert measured.speed["step_ms"] == 1000 and measured._whole["steps"] == 7


# ---- operations


def products(tokens: int, channels: int, dim: int, depth: int) -> tuple[int, int]:
    """Forward operations of a DiT's matrix products on one sample: all, and those whose input needs no gradient."""
    hidden = int(2 / 3 * 4 * dim)
    block = [(1, dim, 6 * dim), (tokens, dim, 3 * dim), (tokens, dim, dim)]
    block += [(tokens, dim, 2 * hidden), (tokens, hidden, dim)]
    first = [(tokens, channels, dim), (1, 256, dim)]
    rest = [(1, dim, dim), *block * depth, (1, dim, 2 * dim), (tokens, dim, channels)]
    count = lambda layers: sum(2 * rows * ins * outs for rows, ins, outs in layers)  # noqa: E731
    return count(first + rest) + depth * 4 * tokens**2 * dim, count(first)


@pytest.mark.parametrize("changed", ["as it is", "checkpointing", "compiled"])
def test_operations_of_a_denoiser(changed):
    """Three times the forward products, less the gradients of what is no weight; recomputation does not count."""
    module = new_dit(compile=changed == "compiled")
    if changed == "checkpointing":
        module.network["denoiser"].enable_gradient_checkpointing()
    before = {name: weight.clone() for name, weight in module.state_dict().items()}
    forward, without = products(tokens=4, channels=2 * 4 * 4, dim=16, depth=1)
    found = module.flops_of_a_sample({"latents": torch.zeros(3, 2, 8, 8), "labels": torch.zeros(3).long()})
    assert found == 3 * forward - without
    assert all(torch.equal(weight, before[name]) for name, weight in module.state_dict().items())
    assert all(weight.grad is None for weight in module.parameters())
    assert module.network["denoiser"].gradient_checkpointing == (changed == "checkpointing")


def new_text(objective: str) -> tuple[DiffusionModule, dict]:
    denoiser = TextDiT((4, 4), 2, 4, hidden_size=16, depth=1, num_heads=2)
    module = DiffusionModule(denoiser, TextConditioner(8, 8, 16), make_objective(objective))
    texts = {"text_tokens": torch.zeros(3, 5, 8), "text_mask": torch.ones(3, 5).bool()}
    texts["text_pooled"] = torch.zeros(3, 8)
    return module, {"latents": torch.zeros(3, 4, 4, 4), "index": torch.arange(3), **texts}


def new_rae_decoder() -> tuple[RAEDecoderModule, dict]:
    module = RAEDecoderModule(tiny_rae(24), disc_start=0, generator_start=0, disc_width=8, spectral_weight=1.0)
    return module, {"images": torch.zeros(3, 3, 24, 24, dtype=torch.uint8)}


def new_tokens() -> tuple[DiffusionModule, dict]:
    module = token_module()
    return module, token_batch(module, 0, 1)


def new_ddt() -> tuple[DiffusionModule, dict]:
    denoiser = DDT((4, 4), 1, 2, (16, 24), (1, 1), (2, 2))
    conditioner = ClassConditioner(2, denoiser.conditioning_size)
    return DiffusionModule(denoiser, conditioner), {"latents": torch.zeros(3, 2, 4, 4), "labels": torch.zeros(3).long()}


OTHERS = {
    **{name: partial(new_text, name) for name in ("epsilon", "v_prediction", "flow_matching")},
    **{"tokens": new_tokens, "rae": new_rae_decoder, "ddt": new_ddt},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_every_training_counts_its_operations(kind):
    module, batch = OTHERS[kind]()
    assert module.flops_of_a_sample(batch) == module.flops_of_a_sample(batch) > 0


if __name__ == "__main__":
    run_all(*map(Path, sys.argv[1:]))
