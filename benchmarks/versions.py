"""Install the project in a fresh environment with chosen versions, and run the short path there on simulated walkers.

The packages of the set are installed first, as an image of Kaggle or Colab has them, then the project as a person does
it: where that replaces one of them, torch above all, it is a failure. Then each command in a process of its own: a line
with its time, and at the end the versions that were there and a verdict. uv is taken where it is installed, else venv
and pip. torch brings NVIDIA's libraries from PyPI: 3 GB to download, 6 GB on the disk until the run has ended.

    python -m benchmarks.versions --set floor
    python -m benchmarks.versions --set kaggle transformers==5.3.0 --python python3.11
"""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
REQUIREMENTS = (ROOT / "requirements.txt").read_text(encoding="utf-8")
FLOORS = tuple(f"{name}=={version}" for name, version in re.findall(r"^([\w-]+)>=([\w.]+)", REQUIREMENTS, re.M))

SETS = {
    # the oldest of everything that requirements.txt names, on the oldest Python
    "floor": ("python3.11", FLOORS),
    # what is got today where nothing is there yet, on the newest Python that Kaggle or Colab has
    "newest": ("python3.13", ("torch", "lightning", "diffusers", "transformers")),
    # Kaggle's image as it was read in 2026 (of transformers no more is known than the 5); it has no lightning, no hydra
    "kaggle": (
        "python3.12",
        ("torch==2.10.0", "diffusers==0.37.1", "transformers==5.0.0", "numpy==2.0.2"),
    ),
    # Colab's, of the same time
    "colab": ("python3.13", ("torch==2.11.0", "diffusers==0.39.0", "transformers==5.15.0")),
}
"""Each set's Python, and the packages that are there before the project is installed."""

WALKERS = "from vavae_tools.data.demo.gait import write_gait_dataset as w; w('images', 3, 10, 32, 1, progress=False)"
TRAIN = "-m vavae_tools.train"
SAMPLE = "-m vavae_tools.sample --num_steps 2 --checkpoint"
DIT = f"{TRAIN} --data_dir data_split --hidden_size 32 --depth 1 --num_heads 2 --previews 1 --output_dir outputs/dit"
PATH = {
    "walkers": f'-c "{WALKERS}"',
    "split": f"{ROOT}/data_split.py --input_dir images",
    "VA-VAE, 2 steps": f"{ROOT}/minimal_training_modification.py --data_dir data_split --original_vavae small "
    "--image_size 32 --batch_size 12 --max_epochs 1",
    "latents, DiT, 2 steps": f"{DIT} --max_steps 2",
    "2 more after a resume": f"{DIT} --max_steps 4 --resume last",
    "samples": f"{SAMPLE} outputs/dit/pipeline --num_samples 12",
    "evaluation": "-m vavae_tools.evaluate --generated_dir outputs/samples --data_dir data_split",
    "export": "-m vavae_tools.export --vavae outputs/vavae --format diffusers --output kl",
    "text_dummy": f"{TRAIN} experiment=text_dummy vae.name=kl --max_steps 1 --num_samples 64 --batch_size 8 "
    "--previews 1 sampling.num_steps=2 --output_dir text",
    "its samples": f'{SAMPLE} text/pipeline --prompt "a small red circle" --output_dir text/samples',
    "token_dummy": f"{TRAIN} experiment=token_dummy --max_steps 1 --batch_size 8 --previews 1 sampling.num_steps=2 "
    "--output_dir tokens",
    "its texts": f"{SAMPLE} tokens/pipeline --num_samples 2 --output_dir tokens/samples",
    "rae_decoder": f"{TRAIN} experiment=rae_decoder model.rae.folder=tiny --data_dir data_split --image_size 32 "
    "--max_steps 1 --output_dir rae",
    "dit_dummy": f"{TRAIN} experiment=dit_dummy --max_steps 1 --previews 1 --output_dir dummy",
    "its samples as well": f"{SAMPLE} dummy/pipeline --num_samples 4 --output_dir dummy/samples",
}
"""What runs, in this order, in one folder: words of a Python command line."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=SETS, required=True)
    parser.add_argument("packages", nargs="*", metavar="NAME==VERSION", help="in place of the set's, or beside them")
    parser.add_argument("--python", help="in place of the set's, a name or a path")
    options = parser.parse_intermixed_args()
    python, packages = SETS[options.set]
    chosen = {_name(package): package for package in (*packages, *options.packages)}
    with tempfile.TemporaryDirectory(prefix="versions-") as folder:
        failures = check(options.python or python, list(chosen.values()), Path(folder))
    print(f"{options.set}: {'failed: ' + ', '.join(failures) if failures else 'all of it works'}")
    sys.exit(bool(failures))


def check(python: str, packages: Sequence[str], folder: Path) -> list[str]:
    """Install and run everything in `folder`, and return what failed."""
    there = folder / "environment" / "bin" / "python"
    uv = shutil.which("uv")
    make = [uv, "venv", "--quiet", "--python", python] if uv else [python, "-m", "venv"]
    pip = [uv, "pip"] if uv else [str(there), "-m", "pip"]
    into = ["--python", str(there)] if uv else []
    if not run("environment", [*make, str(there.parents[1])], folder):
        return ["environment"]
    if not run("packages of the set", [*pip, "install", "--quiet", *into, *packages], folder):
        return ["packages of the set"]
    before = installed([*pip, "freeze", *into])
    if not run(
        "the project", [*pip, "install", "--quiet", *into, "--editable", f"{ROOT}[notebooks,kaggle,rae]"], folder
    ):
        return ["the project"]
    after = installed([*pip, "freeze", *into])
    replaced = [name for name in map(_name, packages) if before[name] != after[name]]
    failures = [f"{name} {before[name]} was replaced by {after[name]}" for name in replaced]
    failures += [name for name, words in PATH.items() if not run(name, [str(there), *shlex.split(words)], folder)]
    print(f"{python}, " + ", ".join(f"{name} {after[name]}" for name in map(_name, FLOORS)))
    return failures


def run(name: str, command: Sequence[str], folder: Path) -> bool:
    """Whether a command ends well; prints its time, and where it does not its last lines."""
    began = time.perf_counter()
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}  # a card's path is gpu_check's
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(f"{name:22} {time.perf_counter() - began:6.1f} s{'' if done.returncode == 0 else '  failed'}", flush=True)
    if done.returncode:
        print("\n".join(f"    {line}" for line in done.stdout.strip().splitlines()[-12:]), flush=True)
    return done.returncode == 0


def installed(freeze: Sequence[str]) -> dict[str, str]:
    """The version of each package, by its name."""
    listed = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout
    return {_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", listed, re.M)}


def _name(requirement: str) -> str:
    """A package's name in the form in which they are compared.

    >>> _name("Hydra_core==1.3.2")
    'hydra-core'
    """
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


if __name__ == "__main__":
    main()
