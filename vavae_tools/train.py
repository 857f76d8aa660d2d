"""Train an experiment: `python -m vavae_tools.train experiment=NAME key=value …`, or with flags."""

import sys
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import Any

from vavae_tools.recipes.base import CaptionData, ImageData, TextData
from vavae_tools.recipes.config import DEFAULT, Experiment, compose, help_text, read_command_line
from vavae_tools.recipes.run_folder import kept_config, run_folder
from vavae_tools.runtime.errors import UserError, run_command


def main() -> None:
    train(*sys.argv[1:])


def fine_tune() -> None:
    """Fine-tune the VA-VAE as `minimal_training_modification.py` and `vavae-tools finetune` do."""
    train("experiment=vavae", *sys.argv[1:], output_dir="outputs")


def train(*words: str, **defaults: Any) -> None:
    """Do what a command line says: train, or print help or the configuration; `defaults` are keys of the recipe."""
    line = read_command_line(words)
    if "help" in line.flags:
        print(help_text(line.overrides.get("experiment")))
    elif line.flags.pop("print_config", None) is not None:
        import yaml

        from vavae_tools.recipes.presets import resolved

        plan = compose(line, **defaults)
        plan = plan._replace(recipe=resolved(plan.recipe, log=lambda line: None))  # with what this machine decides
        print(yaml.safe_dump(plan.plain(), sort_keys=False, allow_unicode=True), end="")
    else:
        run_experiment(*words, **defaults)


def run_experiment(*words: str, **defaults: Any) -> Path:
    """Train as `python -m vavae_tools.train` does with these words, and return what was made, mostly a pipeline."""
    plan = compose(read_command_line(words), **defaults)

    from importlib import import_module

    from vavae_tools.paths import find_split
    from vavae_tools.recipes.presets import resolved
    from vavae_tools.runtime.console import log
    from vavae_tools.training.devices import trainer_settings

    trainer_settings(**plan.recipe.train.of_devices())  # what this machine cannot do is said before anything is written
    _check_kind_of_data(plan)
    folder, resume, said = run_folder(plan)
    log(said or f"Writing into {folder}")
    with kept_config(plan, words, folder):
        recipe = plan.recipe
        if isinstance(recipe.data, ImageData) and recipe.data.data_dir is None:
            recipe = replace(recipe, data=replace(recipe.data, data_dir=str(find_split())))
        recipe = resolved(recipe)
        module, name = recipe.train_by.split(":")
        made = getattr(import_module(module), name)(recipe, folder, resume)
    paths = {"made": quote(str(made)), "data_dir": quote(str(recipe.data.data_dir))}
    log(f"next: python -m vavae_tools.{recipe.next_command.format(**paths)}")
    return made


def _check_kind_of_data(plan: Experiment) -> None:
    """Raise where texts are named and the experiment takes images, or the other way round, or nothing is there."""
    from vavae_tools.data.folders import EXTENSIONS, extension_of, files_below, no_such_folder
    from vavae_tools.data.sources.hugging_face import is_dataset

    data, kinds = plan.recipe.data, {"images": EXTENSIONS, "texts": ("txt", "jsonl")}
    if isinstance(data, CaptionData) or data.data_dir in (None, "shapes"):
        return
    path, texts = Path(data.data_dir), isinstance(data, TextData)
    takes, others, instead = ("texts", "images", DEFAULT) if texts else ("images", "texts", "token_images")
    of = f"experiment={plan.name} takes {takes}; experiment={instead} takes {others}"
    if not path.exists():
        if texts:
            return  # a built-in text's name
        raise UserError(f"{no_such_folder(path)} {of}")

    def first(kind: str) -> Path | None:
        if path.is_file():
            return path if extension_of(path.name) in kinds[kind] else None
        return next(files_below(path, kinds[kind]), None)

    if not is_dataset(path) and first(takes) is None and (found := first(others)):
        raise UserError(f"{path} holds {others}, such as {found.name}, and no {takes}: {of}")


if __name__ == "__main__":
    run_command(main)
