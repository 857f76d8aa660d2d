"""A few real images per person, everything learnt from them alone, and what the generated ones are worth.

python -m benchmarks.low_data --data_dir DIR --images_per_person 5 10 20 --max_time 8:00

`--data_dir` has a folder per person. Of each person `--test_images` are kept away from everything; of the others N
train and N validate. For each N a VA-VAE and a DiT are trained, images are sampled from each of `--checkpoints`, and
classifiers say what they give beside the real ones. What is done in `--output_dir` is not done again: the same command
goes on where it was stopped, or where `--max_time` ended it.
"""

import argparse
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vavae_tools.checkpoints.resuming import best_checkpoint
from vavae_tools.data.folders import list_folders
from vavae_tools.diffusion import USUAL_STEPS
from vavae_tools.evaluation.augmentation import Gain, evaluate_gain
from vavae_tools.evaluation.report import evaluate_images
from vavae_tools.pipelines.people import write_as_people
from vavae_tools.pipelines.writer import write_samples
from vavae_tools.recipes.dit import encode_split, train_dit
from vavae_tools.recipes.presets import find_preset
from vavae_tools.recipes.vavae import fine_tune_vavae
from vavae_tools.runtime.console import clock
from vavae_tools.training.callbacks.record import is_finished
from vavae_tools.training.config import session_end

COLUMNS = "per person | checkpoint | trained on | accuracy, % [95 %] | gain, points [95 %] | error × "


def make_split(data_dir: Path, folder: Path, per_person: int, test_images: int, seed: int) -> Path:
    """Copy images to train/, val/ and test/: the smaller subsets of one seed are parts of the larger ones."""
    for person, paths in list_folders(data_dir).items():
        order = sorted(paths)
        random.Random(f"{seed} {person}").shuffle(order)
        test, rest = order[:test_images], order[test_images:]
        subsets = {"test": test, "train": rest[:per_person], "val": rest[-per_person:]}
        if len(rest) < 2 * per_person:
            raise SystemExit(f"{person} has {len(order)} images: too few for {test_images} + 2 · {per_person}")
        for subset, images in subsets.items():
            (folder / subset / person).mkdir(parents=True, exist_ok=True)
            for path in images:
                shutil.copy(path, folder / subset / person)
    return folder


def checkpoint_of(run: Path, name: str) -> Path:
    """Return what is sampled from: "last" is the pipeline, "best" the least val/loss, a number a step."""
    if name == "last":
        return run / "pipeline"
    return best_checkpoint(run / "checkpoints") if name == "best" else run / f"checkpoint-{name}"


def rows(per_person: int, checkpoint: str, gain: Gain) -> list[str]:
    real = gain.mixtures[0].accuracy.value
    found = []
    for score in gain.mixtures:
        difference = f"{score.gain:+.1f}" if score.gain else "-"
        error = f"{(100 - score.accuracy.value) / max(100 - real, 1e-9):.2f}"
        found.append(f"{per_person} | {checkpoint} | {score.name} | {score.accuracy:.1f} | {difference} | {error}")
    return found


def finished(run: Path, made: str, end: float | None, train: Callable[..., Path], *words: Any, **numbers: Any) -> bool:
    """Train, or resume, until `end`, what is not finished in a run's folder; return whether it is."""
    if not is_finished(run):
        resume = "last" if (run / "checkpoints/last.ckpt").is_file() else None
        limit = "0" if end is None else clock(max(1, end - time.time()))
        train(*words, output_dir=run, resume=resume, max_time=limit, previews=0, **numbers)
    return is_finished(run) and (run / made).is_dir()


def measure(options: argparse.Namespace, per_person: int, end: float | None) -> None:
    work, preset = Path(options.output_dir) / str(per_person), find_preset(log=lambda line: None)
    split, vavae, dit = work / "data_split", work / "vavae", work / "dit"
    if not split.is_dir():
        make_split(Path(options.data_dir), split, per_person, options.test_images, options.seed)
    batch = min(preset.vavae_batch_size, per_person)
    numbers = {"max_epochs": options.vavae_epochs, "batch_size": batch, "image_size": options.image_size}
    numbers["recipe"] = options.recipe
    if not finished(vavae, "vavae", end, fine_tune_vavae, split, original_vavae="small", **numbers):
        return
    if "people" in options.checkpoints:
        samples = work / "samples_people"
        if not samples.is_dir():
            write_as_people(vavae / "vavae", split, samples)
        judge(options, per_person, "people", split, samples)
    if options.checkpoints == ["people"]:
        return
    latents = encode_split(split, vavae / "vavae", work / "latents")
    numbers = {"max_steps": options.dit_steps, "batch_size": options.batch_size, "lr": preset.dit_lr}
    numbers |= {"ema_decay": preset.ema_decay, "save_every_n_steps": max(1, options.dit_steps // 6), "keep_last": 6}
    denoiser = {**preset.dit, "depth": options.depth}
    if not finished(dit, "pipeline", end, train_dit, latents.path, vavae / "vavae", denoiser=denoiser, **numbers):
        return
    for name in (each for each in options.checkpoints if each != "people"):
        samples = work / f"samples_{name}"
        labels = list(list_folders(split / "train")) * options.samples_per_person
        settings = {"num_inference_steps": USUAL_STEPS, "guidance_scale": options.guidance_scale}
        in_time = end is None or time.time() < end
        if not in_time or not write_samples(
            checkpoint_of(dit, name), labels, samples, options.seed, until=end, **settings
        ):
            return
        judge(options, per_person, name, split, samples)


def judge(options: argparse.Namespace, per_person: int, name: str, split: Path, samples: Path) -> None:
    found = samples.with_name(f"evaluation_{name}")
    print(evaluate_images(samples, split, found))
    gain = evaluate_gain(samples, split, found, shares=options.shares, seeds=options.seeds, steps=options.steps)
    print(*rows(per_person, name, gain), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data_dir", required=True, help="a folder for each person")
    add("--output_dir", default="low_data")
    add("--images_per_person", type=int, nargs="+", default=[5, 10, 20])
    add("--test_images", type=int, default=100, help="of each person")
    add(
        "--checkpoints",
        nargs="+",
        default=["last", "best"],
        help="last, best, steps, multiples of a sixth of all; "
        "people: training images decoded as other people, with --recipe vector, in place of a DiT's",
    )
    add("--recipe", default="light", help="of the VA-VAE")
    add("--samples_per_person", type=int, default=80)
    add("--guidance_scale", type=float, default=1.25)
    add("--image_size", type=int, default=64)
    add("--vavae_epochs", type=int, default=120)
    add("--dit_steps", type=int, default=1500)
    add("--depth", type=int, default=6, help="blocks of the denoiser")
    add("--batch_size", type=int, default=32, help="of the denoiser's training")
    add("--shares", type=float, nargs="+", default=[1.0, 2.0, 4.0], help="generated images for each real one")
    add("--seeds", type=int, default=3, help="trainings of a classifier on each mixture")
    add("--steps", type=int, default=400, help="of each classifier")
    add("--seed", type=int, default=0)
    add("--max_time", help="hours:minutes, after which no stage begins and a training saves and ends")
    options = parser.parse_args()
    end = session_end(options.max_time or "0")
    for per_person in options.images_per_person:
        print(f"{per_person} images per person\n{COLUMNS}", flush=True)
        measure(options, per_person, end)


if __name__ == "__main__":
    main()
