"""Train an experiment: `python -m vavae_tools.train experiment=NAME key=value …`, or with flags."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from vavae_tools.recipes.config import RUN_FOLDER, compose, help_text, keep_config, read_command_line, run_folder
from vavae_tools.runtime.errors import run_command


def main() -> None:
    words = sys.argv[1:]
    line = read_command_line(words)
    if line.help:
        print(help_text(line.experiment))
    elif line.print_config:
        from omegaconf import OmegaConf

        print(OmegaConf.to_yaml(compose(line), resolve=True), end="")
    else:
        _run(words)


def run_experiment(*words: str) -> Path:
    """Train as `python -m vavae_tools.train` does with these words, such as "experiment=dit_dummy", "seed=1".

    Returns:
        What the experiment made, mostly the folder of a pipeline.
    """
    return _run(words)


def _run(words: Sequence[str]) -> Path:
    config = compose(read_command_line(words))

    from importlib import import_module

    from omegaconf import OmegaConf

    from vavae_tools.runtime.launch import call_on_ranks, several_processes
    from vavae_tools.runtime.machine import release_memory
    from vavae_tools.training.devices import trainer_settings

    values = OmegaConf.to_container(config, resolve=True)
    trainer_settings(**values["trainer"])  # what this machine cannot do is said before anything is written
    several = several_processes(**values["trainer"])
    if several:
        return call_on_ranks("vavae_tools.train:_run", {"words": list(words)}, *several)

    from vavae_tools.runtime.console import say

    folder, resume, said = run_folder(config)
    if said:
        say(said)
    module, name = config.task.split(":")
    task = getattr(import_module(module), name)
    keep_config(config, words, folder)
    rooms = {name: value for name, value in values.items() if isinstance(value, dict) and name != "flags"}
    try:
        made = task(**rooms, output_dir=folder, resume=resume, seed=config.seed)
    finally:
        os.environ.pop(RUN_FOLDER, None)  # a notebook's next run has a folder of its own
        release_memory()
    if made.name == "pipeline":
        what = '--prompt "…"' if "text_encoder" in values else "--num_samples 100"
        say(f"next: python -m vavae_tools.sample --checkpoint {made} {what} --output_dir outputs/samples")
    return made


if __name__ == "__main__":
    run_command(main)
