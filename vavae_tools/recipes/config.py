"""What a command line of training means: an experiment's recipe with what was typed, and the folder of its run.

Words are `key=value`, or `--NAME VALUE`, where NAME is a key's last word; `configs/aliases.yaml` has other names.
"""

import functools
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass, replace
from difflib import get_close_matches
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml

from vavae_tools.recipes.base import RECIPES, AnyRecipe, Recipe
from vavae_tools.runtime.errors import UserError, check_known, is_path, one_line, with_home
from vavae_tools.training.config import (
    Setting,
    TypedLoader,
    as_taken,
    checked,
    members,
    read_typed,
    read_word,
    settings_of,
)

CONFIGS = Path(str(files("vavae_tools") / "configs"))
DEFAULT = "vavae_dit"
_TRAINER = "train.trainer"
_SET_HERE = {
    "callbacks": "each experiment has its own",
    "plugins": "each experiment has its own",
    "enable_progress_bar": "there is one line for all of it",
    "enable_checkpointing": "what was trained is always kept",
    "default_root_dir": "output_dir=FOLDER says where a run writes",
    "fast_dev_run": "train.max_steps=2 is a short run",
}
_OF_TRAINER = re.compile(r"(train(er)?|train\.trainer)\.")  # begins keys that may be arguments of lightning.Trainer


class CommandLine(NamedTuple):
    """What was typed, sorted: key → value, and flag → the words after it."""

    overrides: dict[str, str]
    flags: dict[str, list[str]]


class Experiment(NamedTuple):
    name: str
    recipe: Recipe

    def plain(self) -> dict[str, Any]:
        """Return plain values, as `--config` reads them."""
        return {"experiment": self.name, **asdict(self.recipe)}


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    line, texts, needs = CommandLine({}, {}), None, False  # of the last flag: its words, and whether there must be one
    for word in arguments:
        key, equals, value = word.partition("=")
        is_key = equals and re.fullmatch(r"\+{0,2}[A-Za-z_][\w./@-]*", key) and (texts is None or not is_path(word))
        if word == "-h" or (word.startswith("--") and len(word) > 2):
            name = "help" if key in ("-h", "--h") else key.lstrip("-").rstrip(":").replace("-", "_")
            line.flags[name] = texts = [value] if equals else []
            needs = not equals and not _stands_alone(name)
        elif is_key and (not needs or _is_known(key.lstrip("+"))):  # else a flag's value, such as epoch=003-0.57.ckpt
            line.overrides[key.lstrip("+")] = value
            texts, needs = None, False
        elif texts is None:
            raise UserError(f"{word!r} is neither --flag VALUE nor key=value, such as train.devices=2 (see --help)")
        else:
            texts.append(word)
            needs = False
    if "experiment" in line.flags:
        line.overrides["experiment"] = "".join(line.flags.pop("experiment")[:1])
    if line.overrides.get("experiment") == "":
        raise UserError(f"experiment= needs a name; there are {', '.join(experiments())}")
    return line


@functools.cache
def _all_settings() -> dict[str, "RecipeSettings"]:
    return {name: RecipeSettings(recipe()) for name, recipe in RECIPES.items()}


def _lightnings(key: str) -> Setting | None:
    """Return what a `lightning.Trainer` takes as an argument of this name, if it does, and it is not set here."""
    if not _OF_TRAINER.match(key):
        return None
    from lightning import Trainer  # takes seconds, so only where a key is not one of ours

    name = last_word(key)
    if name in _SET_HERE:
        raise UserError(f"No {key} here, as {_SET_HERE[name]}: leave it out")
    kind = get_type_hints(Trainer.__init__).get(name)
    return None if kind is None else Setting(members(kind), None, {})


def _is_known(key: str) -> bool:
    """Return whether any experiment has a key of this name, or a group."""
    return key in ("experiment", *_aliases()["groups"]) or any(of.home(key) for of in _all_settings().values())


def _stands_alone(flag: str) -> bool:
    """Return whether a flag may have no value."""
    kinds = {kind for of in _all_settings().values() for key in of.named(flag) for kind in of.kinds(key)}
    return bool in kinds or flag in ("help", "print_config")


def compose(line: CommandLine, **defaults: Any) -> Experiment:
    """Return what a command line means: the experiment's values, `defaults`, then `--config`'s, then what was typed."""
    config = line.flags.get("config")
    if config == []:
        raise UserError("--config needs a value")
    given = _read_config(config[0]) if config else {}
    name = str(line.overrides.get("experiment") or given.get("experiment") or given.get("name") or "")
    name = name or ("text_to_image" if "training" in given else DEFAULT)  # that alone has this section
    keys, groups = _settings_of_experiment(name), _aliases()["groups"]
    for group, options in groups.items():
        if group in line.overrides:
            check_known(group, line.overrides[group], options)
            keys.set_all(options[line.overrides[group]])
    keys.set_all(defaults)
    keys.end_layer()
    flags = given.pop("flags", None) or {}  # what older versions' --print_config said: flag → key
    given |= {f"flags.{flag}": key for flag, key in flags.items() if keys.home(str(key)) is None}
    try:
        keys.set_all({k: v for k, v in given.items() if k not in ("name", "task", "recipe", "experiment")})
    except UserError as error:
        raise UserError(f"{config[0]}: {error}") from None
    keys.end_layer()
    for key, text in line.overrides.items():
        if key not in ("experiment", *groups):
            keys.set(key, read_word(text))
    for flag, texts in line.flags.items():
        if flag != "config":
            keys.set_flag(flag, texts)
    for key in keys.recipe.needs:
        if keys.values[key] is None:
            raise UserError(f"experiment={name} needs {key}=… (or --{last_word(key)} …)")
    return Experiment(name, keys.built())


def recipe_with(recipe: AnyRecipe, values: Mapping[str, Any]) -> AnyRecipe:
    """Return a recipe with values as Python's functions take them, checked as typed ones are.

    Args:
        values: by their keys' last words, as flags have them; what is None is left out. A dict is a section's, such as
            {"model": {"size": "S"}}; `devices` may be one with the arguments of `devices.trainer_settings`, also those
            of lightning.Trainer, and `saving` one with the numbers of a `SaveConfig`, or that.
    """
    keys = RecipeSettings(recipe)
    sections = {each.name for each in fields(recipe) if is_dataclass(getattr(recipe, each.name))}
    for name, value in values.items():
        if is_dataclass(value):
            value = asdict(value)
        if name in ("devices", "saving") and isinstance(value, Mapping):
            for inner, number in value.items():
                keys.set(f"train.{inner}", number, inner)
        elif name in sections and isinstance(value, Mapping):
            keys.set_all({f"{name}.{inner}": part for inner, part in value.items() if part is not None})
        elif value is not None:
            keys.set(name, value, name)
    return keys.built()


class RecipeSettings:
    """The keys of a recipe, by their own names and others, and the values that they get."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.settings = settings_of(recipe)
        self.values = {key: setting.default for key, setting in self.settings.items()}
        self.given: set[str] = set()  # keys that got a value

    def home(self, key: str) -> str | None:
        """Return the recipe's own key of a name, None for one that it does not have."""
        if key in self.settings or key in _aliases()["values"]:
            return key
        others = _aliases()["keys"]
        begins = [old for old in others if key == old or (old.endswith(".") and key.startswith(old))]
        if not begins:
            return None
        longest = max(begins, key=len)
        return self.home(others[longest] + key.removeprefix(longest))  # which may be an alias, too

    def set(self, key: str, value: Any, called: str | None = None) -> None:
        """Set a key of any name, or raise a `UserError` about what was `called` so."""
        home, called = self.own(key, called or f"key {key!r}"), called or key
        if home not in self.settings and home not in _aliases()["values"]:  # of lightning.Trainer
            read = checked(called, read_typed(value, (bool, Any)), _lightnings(key))
            self.values[_TRAINER] = {**self.values[_TRAINER], last_word(key): read}
            return
        meanings = _aliases()["values"].get(home)
        if meanings is None:
            try:
                self.values[home] = checked(called, as_taken(value, self.settings[home]), self.settings[home])
            except yaml.YAMLError as error:
                raise UserError(f"{called}={value} is no list: {one_line(error, 200)}") from None
            self.given |= {home} if value is not None else set()
        elif (value := read_typed(value, (bool,))) not in meanings:
            raise UserError(f"{called} is {value!r}, expected {' or '.join(map(_as_typed, meanings))}")
        elif meanings[value] != "keep":
            self.set_all(meanings[value])

    def set_all(self, values: Mapping[str, Any], before: str = "") -> None:
        for name, value in values.items():
            key = f"{before}{name}"
            if isinstance(value, Mapping):
                self.set_all(value, f"{key}.")
            elif value is not None or self.home(key):  # a section may have no content
                self.set(key, value)

    def set_flag(self, flag: str, texts: list[str]) -> None:
        """Set what a flag says: `--NAME VALUE`, or several values for a list."""
        key = self.own(flag, f"--{flag}")
        kinds = self.kinds(key)
        if len(texts) > 1 and not any(get_origin(kind) is list for kind in kinds):
            raise UserError(f"{texts[1]!r} is neither --flag VALUE nor key=value, such as train.devices=2 (see --help)")
        if not texts and bool not in kinds:
            raise UserError(f"--{flag} needs a value")
        values = [read_word(text) for text in texts] or [True]
        self.set(key, values[0] if len(values) == 1 else values, f"--{flag}")

    def kinds(self, key: str) -> tuple[Any, ...]:
        return self.settings[key].kinds if key in self.settings else (bool,)

    def named(self, name: str) -> list[str]:
        """Return the keys that a name may stand for."""
        if several := _aliases()["several"].get(name):
            return [key for key in several if key in self.settings]
        if home := self.home(name):
            return [home]
        found = [key for key in self.settings if last_word(key) == name]
        if found or "." in name:
            return found
        return [home for section in ("training", "data") if (home := self.home(f"{section}.{name}"))]

    def own(self, name: str, called: str) -> str:
        """Return the key of a name, all of it or its last word; what lightning.Trainer takes stays as it is."""
        found = self.named(name)
        if len(found) > 1:
            raise UserError(f"{called} could be {' or '.join(found)}: type the key, as {found[0]}=…")
        if found or _lightnings(name):
            return found[0] if found else name
        raise self.unknown(name, called)

    def unknown(self, name: str, called: str) -> UserError:
        having = [each for each, of in _all_settings().items() if of.named(name)]
        if having:
            return UserError(f"No {called} here: it is one of experiment={' or '.join(having)}")
        known = {last_word(each): key for each in (*_aliases()["keys"], *self.settings) if (key := self.home(each))}
        return UserError(f"No {called}{_did_you_mean(last_word(name), known)}; --print_config shows all keys")

    def end_layer(self) -> None:
        """Let a length that was given hold before the other one from below: the recipe's, or a file's."""
        if "train.max_epochs" in self.given and "train.max_steps" not in self.given:
            self.values["train.max_steps"] = None
        self.given.clear()

    def built(self) -> Recipe:
        self.end_layer()
        return _with_values(self.recipe, self.values)


def _settings_of_experiment(name: str) -> RecipeSettings:
    check_known("experiment", name, experiments())
    if name in RECIPES:
        return RecipeSettings(RECIPES[name]())
    values = yaml.safe_load((CONFIGS / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))
    keys = RecipeSettings(RECIPES[values.pop("recipe")]())
    keys.set_all(values)
    return keys


def _with_values(config: Any, values: Mapping[str, Any], before: str = "") -> Any:
    changes = {}
    for each in fields(config):
        now, key = getattr(config, each.name), f"{before}{each.name}"
        changes[each.name] = _with_values(now, values, f"{key}.") if is_dataclass(now) else values[key]
    return replace(config, **changes)


def last_word(key: str) -> str:
    return key.rpartition(".")[2]


def _did_you_mean(word: str, known: Mapping[str, str]) -> str:
    nearest = get_close_matches(word, known, n=1, cutoff=0.7) or [name for name in known if word in name.split("_")]
    return f"; did you mean {known[nearest[0]]}?" if nearest else ""


@functools.cache
def _aliases() -> dict[str, Any]:
    return yaml.safe_load((CONFIGS / "aliases.yaml").read_text(encoding="utf-8"))


def _read_config(path: str) -> dict[str, Any]:
    given, ours = Path(with_home(path)), CONFIGS / Path(path).name  # such as configs/train_config.yaml, the example
    try:
        text = (ours if not given.exists() and ours.is_file() else given).read_text(encoding="utf-8")
        read = yaml.load(text, TypedLoader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"--config {path} is no YAML in UTF-8: {one_line(error, 200)}") from None
    if isinstance(read, dict):
        return read
    raise UserError(f"--config {path}: expected keys and values, such as train: {{batch_size: 32}}")


def _as_typed(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def experiments() -> dict[str, str]:
    """Return name → what it is, in a line: the recipes, and the variants in `configs/experiment/`."""
    found = {name: (recipe.__doc__ or "").splitlines()[0].rstrip(".") for name, recipe in RECIPES.items()}
    for path in (CONFIGS / "experiment").glob("*.yaml"):
        found[path.stem] = path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    return dict(sorted(found.items()))


def help_text(experiment: str | None) -> str:
    """Return what `--help` prints: experiments, and the keys of one experiment with their meanings."""
    name = experiment or DEFAULT
    keys = _settings_of_experiment(name)
    width = max(map(len, experiments()))
    listed = "\n".join(f"  {each:<{width}}  {what}" for each, what in experiments().items())
    sections: dict[str, list[str]] = {"": []}
    ends = [last_word(key) for key in keys.settings]
    for key, setting in keys.settings.items():
        section, _, end = key.rpartition(".")
        if section and section not in sections:
            sections[section] = [f"{section}:  # {type(getattr(keys.recipe, section)).__doc__.splitlines()[0]}"]
        typed = f"--{end}" if ends.count(end) == 1 else f"{key}="
        choices = [str(choice) for kind in setting.kinds if get_origin(kind) is Literal for choice in get_args(kind)]
        among = f"{', '.join(choices)}: " if len(choices) > 1 else ""
        text = f"  {typed} [{_as_typed(keys.values[key])}]  {among}{setting.metadata['help']}"
        sections[section].append(textwrap.fill(text, 118, subsequent_indent=" " * 8, break_long_words=False))
    blocks = "\n\n".join("\n".join(lines) for lines in sections.values())
    return f"""usage: python -m vavae_tools.train [experiment=NAME] [key=value …] [--flag VALUE …]

Train an experiment. Each run has its folder logs/runs/YYYY-MM-DD/HH-MM-SS/ with its checkpoints, curves and images.

experiments (experiment=NAME --help shows its keys):
{listed}

  --config FILE   a YAML file with keys and values, and its experiment under `experiment`
  --resume PATH   last, a .ckpt, .pth, checkpoint folder or run's folder to resume
  --print_config  show all that a run would use, and end

keys of {name}, typed as --NAME VALUE or SECTION.NAME=VALUE; in brackets what holds where they are not typed:

{blocks}"""
