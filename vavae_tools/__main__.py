"""All commands of the package in one: `vavae-tools COMMAND`, or `python -m vavae_tools COMMAND`."""

import sys
from importlib import import_module

from vavae_tools.runtime.errors import check_known, run_command

COMMANDS = {
    "split": ("split:main", "images of persons' folders into train/, val/ and test/"),
    "finetune": ("train:fine_tune", "the VA-VAE, with a vector for each person"),
    "train": ("train:main", "any experiment, such as the DiT on its latents"),
    "sample": ("sample:main", "images of chosen persons, or of sentences, or texts"),
    "evaluate": ("evaluate:main", "generated images beside real ones; --gain: do they help a classifier"),
    "select": ("select:main", "the generated images that are worth training on"),
    "export": ("export:main", "a VA-VAE for diffusers or for LightningDiT"),
    "checkpoints": ("checkpoints.__main__:main", "list, inspect, prune, convert, verify, trust"),
    "kaggle": ("kaggle_session:main", "push and pull a run, write a kernel, collect wheels"),
}


def main() -> None:
    name, *words = sys.argv[1:] or ["--help"]
    if name in ("--help", "-h"):
        lines = (f"  {name:<12}{what}" for name, (_, what) in COMMANDS.items())
        print("usage: vavae-tools COMMAND …", "", *lines, "", "vavae-tools COMMAND --help says more.", sep="\n")
        return
    if name == "--version":
        from vavae_tools.training.callbacks.record import versions

        print("\n".join(f"{package} {version}" for package, version in versions().items()))
        return
    check_known("command", name, COMMANDS)
    module, function = COMMANDS[name][0].split(":")
    sys.argv = [f"vavae-tools {name}", *words]
    getattr(import_module(f"vavae_tools.{module}"), function)()


def run() -> None:
    run_command(main)


if __name__ == "__main__":
    run()
