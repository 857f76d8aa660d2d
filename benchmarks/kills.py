"""Kill trainings at random moments and go on: is the end, bit by bit, that of the training that was never stopped?

Each training is a command in a process of its own on a few simulated images; it saves after every step, so that many
kills (SIGKILL) fall into the writing of a checkpoint. Compared are weights, averaged weights, optimisers, schedules and
all logged losses; looked for are damaged checkpoints and what is left over.

    python -m benchmarks.kills --kills 30
"""

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from vavae_tools.checkpoints.resuming import checkpoint_info
from vavae_tools.data.demo.gait import write_gait_dataset
from vavae_tools.data.split import split_folders

ROOT = Path(__file__).parents[1]
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")


def commands(folder: Path, tiny: bool = False) -> dict[str, list[str]]:
    """The command of each training, without its output folder; latents and their VA-VAE are made first."""
    data = ["--data_dir", str(folder / "split")]
    tune = [sys.executable, str(ROOT / "minimal_training_modification.py"), *data, "--original_vavae", "small"]
    tune += ["--image_size", "32", "--batch_size", "4", "--max_epochs", "2" if tiny else "8"]
    tune += ["--disc_weight", "0.5", "--disc_start", "10", "--disc_width", "8"]
    train = [sys.executable, "-m", "vavae_tools.train", *data, "--vavae", str(folder / "first" / "vavae")]
    train += ["--latents_dir", str(folder / "latents"), "--hidden_size", "64", "--depth", "2", "--num_heads", "2"]
    train += ["--batch_size", "8", "--max_steps", "12" if tiny else "60", "--previews", "0"]
    return {"VA-VAE": tune, "DiT": train}


def run(command: list[str], output_dir: Path, after: float | None = None, resume: bool = False) -> bool:
    """Whether it ran to its end; with `after`, killed so many seconds after training began."""
    line = [*command, "--output_dir", str(output_dir), "--save_every_minutes", "0"]
    line += ["--resume", "last"] if resume else []
    with subprocess.Popen(line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        said = []
        for text in process.stdout:
            said.append(text)
            if after is not None and (text.startswith("step ") or text.startswith("resuming after")):
                time.sleep(after)
                process.kill()
                break
        process.stdout.read()
        status = process.wait()
    if status not in (0, -9):
        raise SystemExit("".join(said[-20:]))
    return status == 0


def logged(output_dir: Path) -> dict[tuple[str, int], float]:
    """All logged values of all sessions of a run but its speed, by name and step; a later session's count."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values: dict[tuple[str, int], float] = {}
    versions = sorted((output_dir / "lightning_logs").iterdir(), key=lambda path: int(path.name.split("_")[1]))
    for version in versions:
        events = EventAccumulator(str(version), size_guidance={"scalars": 0}).Reload()
        for name in events.Tags()["scalars"]:
            if not name.startswith("throughput/"):  # which no two runs share
                values |= {(name, event.step): event.value for event in events.Scalars(name)}
    return values


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differences(output_dir: Path, expected: Path) -> list[str]:
    """Names of what differs at the end of two runs."""
    ends = [torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (output_dir, expected)]
    found = [part for part in COMPARED if not same(ends[0][part], ends[1][part])]
    found += ["logged losses"] * (logged(output_dir) != logged(expected))
    best = [sorted(path.name for path in (f / "checkpoints").glob("best-*")) for f in (output_dir, expected)]
    return found + ["best"] * (best[0] != best[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="in all, half of them in each training")
    parser.add_argument("--seconds", type=float, default=4.0, help="a kill falls into the first ones of a session")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--tiny", action="store_true", help="few steps, to try the script itself")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_gait_dataset(folder / "pictures", 3, 10, 32, progress=False)
        split_folders(folder / "pictures", folder / "split", progress=False)
        for kind, command in commands(folder, options.tiny).items():
            run(command, folder / "first" if kind == "VA-VAE" else folder / "first_dit")
            expected = folder / "first" if kind == "VA-VAE" else folder / "first_dit"
            identical, kills, runs, damaged, left = 0, 0, 0, 0, 0
            while kills < options.kills // 2:
                output_dir, runs, resume, ended = folder / f"{kind}-{runs}", runs + 1, False, False
                while not ended:
                    again = kills < options.kills // 2 and chance.random() < 0.8
                    ended = run(command, output_dir, chance.uniform(0, options.seconds) if again else None, resume)
                    last = output_dir / "checkpoints" / "last.ckpt"
                    kills, resume = kills + (not ended), last.is_file()
                    damaged += resume and checkpoint_info(last).damage() is not None
                left += len(list(output_dir.rglob(".*.partial")))
                found = differences(output_dir, expected)
                identical += not found
                print(f"{kind}: run {runs}, {kills} kills so far: {', '.join(found) or 'identical'}", flush=True)
            end = f"{identical} of {runs} runs identical, {damaged} damaged last.ckpt, {left} files left over"
            print(f"{kind}: {kills} kills, {end}", flush=True)


if __name__ == "__main__":
    main()
