"""What saving beside training costs: how long a step waits, and how much slower steps are while a thread writes.

python -m benchmarks.saving_cost --megabytes 840
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from vavae_tools.training.callbacks.checkpointing import AtomicCheckpointIO


def seconds(work: torch.nn.Module, images: torch.Tensor) -> float:
    began = time.perf_counter()
    work(images).square().mean().backward()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=840, help="of a checkpoint: f16d32 with Adam's state has 840")
    parser.add_argument("--saves", type=int, default=5, help="checkpoints written")
    parser.add_argument("--every", type=float, default=300.0, help="seconds between two, for the share")
    parser.add_argument("--steps", type=int, default=20, help="timed alone")
    parser.add_argument("--folder", help="where to write; by default the system's temporary folder")
    options = parser.parse_args()
    checkpoint = {"state_dict": {str(i): torch.randn(2**18) for i in range(options.megabytes)}}
    work = torch.nn.Sequential(*(torch.nn.Conv2d(64, 64, 3, padding=1) for _ in range(4)))
    images = torch.randn(8, 64, 64, 64)
    alone = statistics.median(seconds(work, images) for _ in range(options.steps))
    waits, writes, extra = [], [], []
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        writer = AtomicCheckpointIO()
        for _ in range(options.saves):
            began = time.perf_counter()
            writer.save_checkpoint(checkpoint, str(Path(name) / "last.ckpt"))
            waits.append(time.perf_counter() - began)
            steps = []
            while not writer._pending.done():
                steps.append(seconds(work, images))
            writes.append(time.perf_counter() - began)
            extra.append(sum(steps) - len(steps) * alone)  # what these steps took longer than alone
            writer.wait()
    wait, slower = statistics.median(waits), max(0.0, statistics.median(extra))
    print(f"{options.megabytes} MB: a step waits {wait:.2f} s, written after {statistics.median(writes):.1f} s,")
    print(f"steps meanwhile {slower:.2f} s slower in all: {100 * (wait + slower) / options.every:.2f} % of the time")


if __name__ == "__main__":
    main()
