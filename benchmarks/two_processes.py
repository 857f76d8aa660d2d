"""Throughput of two processes that train together against one, each on a core of its own, and what speaking costs them.

One small DiT learns made-up latents: in one process on one core, then in two (torchrun, ddp over gloo), each with as
many latents a step. They take turns, so that a machine that gets slower in the meantime does so for both; the ratio is
the median over the turns. In between the two processes train for a while without sending gradients: what a step is then
shorter is what they cost. From that follows what two processes would do that share neither a core nor its memory and
caches (as two virtual processors often do): 2 × the time of a step alone / (that time + the cost of speaking).

    python -m benchmarks.two_processes
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning as L
import torch

SIZE = {"input_size": 16, "in_channels": 32, "hidden_size": 256, "depth": 3, "num_heads": 4}
PART = 5
"""Steps in a row with, and then without, gradients that are sent."""


class Latents(L.LightningDataModule):
    """Made-up latents in memory, the same batch over and over: reading data is no part of this."""

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        shape = (batch_size, SIZE["in_channels"], SIZE["input_size"], SIZE["input_size"])
        self.batch = {
            "latents": torch.randn(shape, generator=torch.Generator().manual_seed(0)),
            "labels": torch.arange(batch_size) % 10,
            "index": torch.arange(batch_size),
        }

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return torch.utils.data.DataLoader([self.batch] * 10_000, batch_size=None)


class Silence(L.Callback):
    """Times of steps with gradients that are sent and, every other `PART` steps, without; the weights drift apart."""

    def __init__(self) -> None:
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self.began = 0.0

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        now = time.perf_counter()
        sent = batch_idx // PART % 2 == 0
        if batch_idx % PART > 1:  # neither the first of a part, which meets the other process
            self.times[sent].append(now - self.began)
        trainer.strategy.model.require_backward_grad_sync = sent
        self.began = now


def train(options: argparse.Namespace) -> None:
    """What each process does: train, and the first one writes down what it has seen."""
    from vavae_tools.diffusion.conditioning import ClassConditioner
    from vavae_tools.diffusion.dit import DiT
    from vavae_tools.training.callbacks.throughput import Throughput
    from vavae_tools.training.denoiser_module import DiffusionModule
    from vavae_tools.training.devices import quiet_lightning
    from vavae_tools.training.run import build_trainer

    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[int(os.environ.get("LOCAL_RANK", 0)) % len(cores)]})
    torch.set_num_threads(1)
    quiet_lightning()
    together = "LOCAL_RANK" in os.environ
    found = {}

    def speed_with(callbacks: list[L.Callback], steps: int) -> dict[str, float]:
        torch.manual_seed(0)
        module = DiffusionModule(DiT(**SIZE), ClassConditioner(10, SIZE["hidden_size"]))
        settings = module.trainer_settings(accelerator="cpu", devices=1)
        settings |= {"enable_checkpointing": False, "limit_val_batches": 0, "max_steps": steps, "max_epochs": -1}
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(settings, Path(folder), callbacks, lambda line: None)
            trainer.fit(module, Latents(options.batch_size))
        found["megabytes"] = 4 * sum(w.numel() for w in module.network.parameters()) / 1e6
        return next(part for part in trainer.callbacks if isinstance(part, Throughput)).speed

    speed = speed_with([], options.steps)
    found |= {"pictures": speed["images_per_second"], "seconds": speed["step_ms"] / 1000}
    if together:
        silence = Silence()
        speed_with([silence], options.steps)
        found["sent"], found["unsent"] = (statistics.median(silence.times[sent]) for sent in (True, False))
    if int(os.environ.get("RANK", 0)) == 0:
        options.write.write_text(json.dumps(found))


def measured(processes: int, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    path = folder / "found.json"
    words = ["-m", "benchmarks.two_processes", "--write", str(path)]
    words += ["--steps", str(options.steps), "--batch_size", str(options.batch_size)]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    return json.loads(path.read_text())


def processor() -> str:
    """What the cores are, as Linux says it."""
    said = subprocess.run(["lscpu"], capture_output=True, text=True).stdout.splitlines()
    lines = [line.split(":", 1) for line in said if ":" in line]
    known = {name.strip(): value.strip() for name, value in lines}
    wanted = ("Model name", "CPU(s)", "Thread(s) per core", "Core(s) per socket", "Hypervisor vendor")
    return ", ".join(f"{name} {known[name]}" for name in wanted if name in known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="of each turn, ten at least")
    parser.add_argument("--batch_size", type=int, default=4, help="of each process")
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < 2 * PART:
        parser.error(f"--steps {options.steps}: expected {2 * PART} at least, with gradients that are sent and without")
    if options.write:
        train(options)
        return
    print(processor())
    alone, both = [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(options.turns):
            alone.append(measured(1, options, Path(folder)))
            both.append(measured(2, options, Path(folder)))
            one, two = alone[-1], both[-1]
            print(
                f"turn {turn + 1}: one process {one['pictures']:6.1f} images/s, two {two['pictures']:6.1f}: "
                f"× {two['pictures'] / one['pictures']:.2f}; a step that sends nothing {two['unsent'] * 1000:.1f} ms, "
                f"gradients {two['sent'] * 1000:.1f} ms",
                flush=True,
            )
    ratio = statistics.median(two["pictures"] / one["pictures"] for one, two in zip(alone, both, strict=True))
    seconds = statistics.median(one["seconds"] for one in alone)
    cost = statistics.median(two["sent"] - two["unsent"] for two in both)
    share = statistics.median(1 - two["unsent"] / two["sent"] for two in both)
    slower = statistics.median(two["unsent"] / one["seconds"] for one, two in zip(alone, both, strict=True))
    print(f"\ntwo processes do × {ratio:.2f} of one (aim: 1.7), {options.batch_size} latents each a step")
    print(f"sending {both[0]['megabytes']:.1f} MB of gradients: {share:.1%} of a step ({cost * 1000:.1f} ms)")
    print(f"a step that sends nothing takes × {slower:.2f} as long beside another process as alone: shared hardware")
    print(f"so two that share none: 2 × {seconds * 1000:.1f} / ({seconds * 1000:.1f} + {cost * 1000:.1f}) = × ", end="")
    print(f"{2 * seconds / (seconds + max(0.0, cost)):.2f}")


if __name__ == "__main__":
    main()
