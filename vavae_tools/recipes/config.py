"""What a command line of training means: an experiment's recipe with what was typed, and the folder of its run.

Words are Hydra's overrides, `key=value`, or flags, `--NAME VALUE`, where NAME is a key's last word. What older versions
called otherwise is translated by `configs/aliases.yaml`. A run keeps its configuration in `.hydra/config.yaml`, and by
it is found again.
"""

import functools
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from datetime import datetime
from difflib import get_close_matches
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any, get_args, get_origin

from vavae_tools.recipes.base import RECIPES, Recipe
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.ranks import is_first, of_torchrun
from vavae_tools.training.config import Setting, checked, settings_of

CONFIGS = Path(str(files("vavae_tools") / "configs"))
DEFAULT = "vavae_dit"
SECTIONS = {"training": "text_to_image"}
"""Sections of a `--config` file that only one experiment has, and so name it."""
RUNS = Path("logs/runs")
_OF_THE_RUN = {
    "resume": Setting((str, type(None)), None, {"help": "last, a .ckpt, .pth, checkpoint folder or run's folder"}),
    "output_dir": Setting((str, type(None)), None, {"help": "of this run; null: logs/runs/YYYY-MM-DD/HH-MM-SS"}),
}
_NOT_NAMED = ("name", "task", "recipe", "experiment")
"""Keys of a run's own configuration that are not set by hand."""


@dataclass
class CommandLine:
    """What was typed, sorted.

    Attributes:
        overrides: Hydra's: `key=value`, `group=option`, `+key=value`, `~key`.
        flags: name → the words after it.
    """

    overrides: list[str] = field(default_factory=list)
    flags: dict[str, list[str]] = field(default_factory=dict)
    config: str | None = None
    help: bool = False
    print_config: bool = False

    @property
    def experiment(self) -> str | None:
        """The one that was named."""
        chosen = [text.partition("=")[2] for text in self.overrides if re.match(r"\+?experiment=", text)]
        return chosen[-1] if chosen else None


@dataclass(frozen=True)
class Experiment:
    """A recipe under a name, and where its run goes."""

    name: str
    recipe: Recipe
    resume: str | None = None
    output_dir: str | None = None

    def plain(self) -> dict[str, Any]:
        """Return plain values, as `--config` reads them."""
        return {
            "experiment": self.name,
            "resume": self.resume,
            "output_dir": self.output_dir,
            **_plain(self.recipe),
        }


def read_command_line(arguments: Sequence[str]) -> CommandLine:
    """Sort the words of a command line.

    Raises:
        UserError: a word that is neither an override nor belongs to a flag.
    """
    line = CommandLine()
    words = list(arguments)
    while words:
        word = words.pop(0)
        if word in ("-h", "--help"):
            line.help = True
        elif word == "--print_config":
            line.print_config = True
        elif word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            texts = [value] if equals else []
            while not equals and words and not words[0].startswith("--") and not _is_override(words[0]):
                texts.append(words.pop(0))
            if name == "config":
                if not texts:
                    raise UserError("--config needs a value")
                line.config = texts[0]
            else:
                line.flags[name] = texts
        elif _is_override(word):
            line.overrides.append(word)
        else:
            raise UserError(f"{word!r} is neither --flag VALUE nor key=value, such as train.devices=2 (see --help)")
    return line


def _is_override(word: str) -> bool:
    return re.match(r"(~|\+{0,2})[A-Za-z_][\w./@-]*(=|$)", word) is not None and ("=" in word or word.startswith("~"))


def compose(line: CommandLine) -> Experiment:
    """Return what a command line means: the experiment's values, then `--config`'s, then what was typed.

    Raises:
        UserError: an experiment, option or key that does not exist (the nearest that do are named), or a value of
            another kind than the key's.
    """
    given = _read_config(line.config) if line.config else {}
    name = line.experiment or given.get("experiment") or given.get("name")
    name = name or next((of for section, of in SECTIONS.items() if section in given), None) or DEFAULT
    experiment = _read_experiment(name)
    keys = _Keys(RECIPES[experiment.pop("recipe")]())
    for key, value in _leaves(experiment, keys):
        keys.set(key, value)
    groups = _aliases()["groups"]
    chosen = [text.lstrip("+").split("=", 1) for text in line.overrides if text.partition("=")[0].lstrip("+") in groups]
    for group, option in chosen:
        if option not in groups[group]:
            raise UserError(
                f"No {group}={option}{_nearest(option, groups[group])}; there are {', '.join(groups[group])}"
            )
        for key, value in groups[group][option].items():
            keys.set(key, value)
    keys.given.clear()
    where = f"{line.config}: "
    for flag, meant in (given.pop("flags", None) or {}).items():  # what older versions' --print_config said
        if keys.home(str(meant)) is None:
            raise UserError(f"{where}No key {f'flags.{flag}'!r}{keys.near(flag)}; --print_config shows all keys")
    for key, value in _leaves({k: v for k, v in given.items() if k not in _NOT_NAMED}, keys):
        keys.set(key, value, where)
    for text in line.overrides:
        key = text.partition("=")[0].lstrip("+")
        if key != "experiment" and key not in groups:
            keys.set_typed(text)
    for flag, texts in line.flags.items():
        keys.set_flag(flag, texts)
    needed = [key for key in keys.recipe.needs if keys.values[key] is None]
    if needed:
        raise UserError(f"experiment={name} needs {needed[0]}=… (or --{needed[0].rpartition('.')[2]} …)")
    return Experiment(name, keys.built(), keys.values["resume"], keys.values["output_dir"])


class _Keys:
    """The keys of a recipe, by their own names and others, and the values that they get."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.settings = {**_OF_THE_RUN, **settings_of(recipe)}
        self.values = {key: setting.default for key, setting in self.settings.items()}
        self.given: set[str] = set()
        """Keys that got a value."""

    def home(self, key: str) -> str | None:
        """Return the recipe's own key of a name, None for one that it does not have."""
        for _ in range(3):  # an alias may stand for an alias
            if key in self.settings or key in _aliases()["values"]:
                return key
            found = _translated(key)
            if found is None:
                return None
            key = found
        return None

    def set(self, key: str, value: Any, where: str = "", called: str | None = None) -> None:
        """Set a key of any name.

        Args:
            where: before the line of a fault.
            called: what was typed in place of the key.

        Raises:
            UserError: no such key, or a value that it does not take.
        """
        home = self.home(key)
        if home is None:
            raise UserError(f"{where}No key {key!r}{self.near(key)}; --print_config shows all keys")
        meanings = _aliases()["values"].get(home)
        if meanings is None:
            self.values[home] = checked(
                f"{where}{called or key}", _as_size(value, self.settings[home]), self.settings[home]
            )
            self.given |= {home} if value is not None else set()
            return
        if value not in meanings:
            raise UserError(f"{where}{called or key} is {value!r}, expected {' or '.join(map(_written, meanings))}")
        if meanings[value] != "keep":
            for other, meant in meanings[value].items():
                self.set(other, meant, where)

    def set_typed(self, text: str) -> None:
        """Set what an override says."""
        key, value = _parsed(text)
        if text.startswith("~"):
            if self.home(key) is None:
                raise UserError(f"No key {key!r}{self.near(key)}; --print_config shows all keys")
            raise UserError(f"{text}: a key cannot be taken away; set it to null where it may be left out")
        further = re.fullmatch(r"train(?:er)?\.(?:trainer\.)?(\w+)", key)
        if text.startswith("+") and further and self.home(key) is None:
            self.values["train.trainer"] = {**self.values["train.trainer"], further[1]: value}
        else:
            self.set(key, value)

    def set_flag(self, flag: str, texts: list[str]) -> None:
        """Set what a flag says: `--NAME VALUE`, or several values for a list."""
        key = self.of_flag(flag)
        setting = self.settings.get(key)
        takes_lists = setting is not None and any(get_origin(kind) is list for kind in setting.kinds)
        if len(texts) > 1 and not takes_lists:
            raise UserError(f"{texts[1]!r} is neither --flag VALUE nor key=value, such as train.devices=2 (see --help)")
        if not texts and not (setting is None or bool in setting.kinds):
            raise UserError(f"--{flag} needs a value")
        values = [_read(text) for text in texts] or [True]
        self.set(key, values[0] if len(values) == 1 else values, called=f"--{flag}")

    def of_flag(self, flag: str) -> str:
        """Return the key that a flag stands for: one of its last word, or by all of its words."""
        if "." in flag and self.home(flag):
            return flag
        by_end: dict[str, list[str]] = {}
        for key in self.settings:
            by_end.setdefault(key.rpartition(".")[2], []).append(key)
        meant = _aliases()["flags"].get(flag, [])
        named = [key for name in ([meant] if isinstance(meant, str) else meant) if (key := self.home(name))]
        found = named or by_end.get(flag, [])
        if len(found) == 1 or named:
            return found[0]
        if found:
            raise UserError(f"--{flag} could be {' or '.join(found)}: type the key, as {found[0]}=…")
        near = get_close_matches(flag, [*by_end, *_aliases()["flags"]], n=1, cutoff=0.5)
        meant = f"; did you mean --{near[0]}?" if near else ""
        raise UserError(f"No --{flag}{meant}; python -m vavae_tools.train --help")

    def near(self, key: str) -> str:
        """Return the words that name the key that was meant, if there is one like it."""
        end = key.rpartition(".")[2]
        exact = [known for known in self.settings if known.rpartition(".")[2] == end]
        flag = _aliases()["flags"].get(end)
        if not exact and isinstance(flag, str) and self.home(flag):
            exact = [self.home(flag)]
        if exact:
            return f"; did you mean {exact[0]}?"
        by_alias = {old.rpartition(".")[2]: new for old in _aliases()["keys"] if (new := self.home(old))}
        names = {**by_alias, **{known.rpartition(".")[2]: known for known in self.settings}}
        found = [names[name] for name in get_close_matches(end, names, n=1, cutoff=0.6)]
        found = found or get_close_matches(_translated(key) or key, list(self.settings), n=1, cutoff=0.5)
        return f"; did you mean {found[0]}?" if found else ""

    def built(self) -> Recipe:
        if "train.max_epochs" in self.given and "train.max_steps" not in self.given:
            self.values["train.max_steps"] = None  # the recipe's own, which would hold in its place
        return _with_values(self.recipe, {k: v for k, v in self.values.items() if k not in _OF_THE_RUN})


def _with_values(config: Any, values: Mapping[str, Any], before: str = "") -> Any:
    changes = {}
    for each in fields(config):
        now, key = getattr(config, each.name), f"{before}{each.name}"
        changes[each.name] = _with_values(now, values, f"{key}.") if is_dataclass(now) else values[key]
    return replace(config, **changes)


def _plain(config: Any) -> dict[str, Any]:
    return {
        each.name: _plain(value) if is_dataclass(value := getattr(config, each.name)) else value
        for each in fields(config)
    }


@functools.cache
def _aliases() -> dict[str, Any]:
    import yaml

    return yaml.safe_load((CONFIGS / "aliases.yaml").read_text(encoding="utf-8"))


def _translated(key: str) -> str | None:
    """Return what a key of another name stands for."""
    others = _aliases()["keys"]
    if key in others:
        return others[key]
    begins = [old for old in others if old.endswith(".") and key.startswith(old)]
    if not begins:
        return None
    longest = max(begins, key=len)
    return others[longest] + key.removeprefix(longest)


def _as_size(value: Any, setting: Setting) -> Any:
    """Return 128x256 as [128, 256] where a setting takes two whole numbers."""
    takes = any(get_origin(kind) is list and get_args(kind) == (int,) for kind in setting.kinds)
    if takes and isinstance(value, str) and re.fullmatch(r"\d+[xX]\d+", value):
        return [int(side) for side in value.lower().split("x")]
    return value


def _parsed(text: str) -> tuple[str, Any]:
    """Return an override's key and value, by Hydra's grammar."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(text)
        value = override.value()
    except HydraException as error:
        lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
        raise UserError(f"{text}: {' '.join(lines[:2])}") from None
    if override.is_sweep_override():
        raise UserError(f"{text}: several values; one with a comma needs quotes, key='\"a,b\"', a list brackets, [a,b]")
    return override.key_or_group, value


def _read(text: str) -> Any:
    """Return a flag's text as YAML reads it, 1e-4 as a number."""
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]


def _written(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _read_config(path: str) -> dict[str, Any]:
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    ours = CONFIGS / Path(path).name  # such as configs/train_config.yaml, the example
    try:
        read = OmegaConf.load(ours if not Path(path).exists() and ours.is_file() else path)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}") from None
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"--config {path} is no YAML: {' '.join(str(error).split())[:200]}") from None
    if not OmegaConf.is_dict(read):
        raise UserError(f"--config {path}: expected keys and values, such as train: {{batch_size: 32}}")
    return OmegaConf.to_container(read, resolve=True)


def experiments() -> dict[str, str]:
    """Return name → what it is, in a line: the recipes, and the variants in `configs/experiment/`."""
    found = {name: (recipe.__doc__ or "").splitlines()[0].rstrip(".") for name, recipe in RECIPES.items()}
    for path in (CONFIGS / "experiment").glob("*.yaml"):
        found[path.stem] = path.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ")
    return dict(sorted(found.items()))


def _read_experiment(name: str) -> dict[str, Any]:
    import yaml

    options = list(experiments())
    if name not in options:
        raise UserError(f"No experiment={name}{_nearest(name, options)}; there are {', '.join(options)}")
    if name in RECIPES:
        return {"recipe": name}
    return yaml.safe_load((CONFIGS / "experiment" / f"{name}.yaml").read_text(encoding="utf-8"))


def _nearest(name: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


def _leaves(values: Mapping[str, Any], keys: _Keys, before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{before}{name}"
        home = keys.home(key)
        is_section = any(
            known.startswith(f"{key}.") for known in (*keys.settings, *_aliases()["keys"], *_aliases()["values"])
        )
        if isinstance(value, Mapping) and not (
            home in keys.settings and dict in map(_origin, keys.settings[home].kinds)
        ):
            yield from _leaves(value, keys, f"{key}.")
        elif not (value is None and home is None and is_section):  # a section without content
            yield key, value


def _origin(kind: Any) -> Any:
    return get_origin(kind) or kind


# ---- the run's folder
_TURNS = count(1)


def run_folder(plan: Experiment, now: datetime | None = None) -> tuple[Path, str | None, str | None]:
    """Return where a run writes, what it resumes from, and a line about it.

    `resume=last` takes the newest run of the same experiment and writes into its folder, and so does a path into a
    run's folder; another checkpoint starts a folder of its own.

    Raises:
        UserError: `resume=last`, and no run of this experiment has a checkpoint.
    """
    ranks = of_torchrun()
    if ranks.size > 1:  # the clock says another second to each of them
        found = _run_folder(plan, now) if ranks.rank == 0 else None
        turn = f"vavae run folder {next(_TURNS)}"  # a process may train several
        folder, resume, said = ranks.share(turn, found and (str(found[0]), *found[1:]))
        return Path(folder), resume, said
    return _run_folder(plan, now)


def _run_folder(plan: Experiment, now: datetime | None) -> tuple[Path, str | None, str | None]:
    resume = plan.resume
    if plan.output_dir is not None:
        return Path(plan.output_dir), resume, None
    if resume == "last":
        found = _newest_run(plan.name)
        return found, "last", f"resume=last: resuming {found}"
    if resume is not None:
        of_run = [folder for folder in (Path(resume), *Path(resume).parents) if (folder / ".hydra").is_dir()]
        if of_run:
            return of_run[0], resume, f"resuming {of_run[0]}"
    return _new_run(now or datetime.now()), resume, None


def _new_run(now: datetime) -> Path:
    folder = RUNS / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}"
    for number in range(2, 100):
        if not folder.exists():
            break
        folder = folder.with_name(f"{now:%H-%M-%S}-{number}")  # another run of the same second
    return folder


def _newest_run(name: str) -> Path:
    from omegaconf import OmegaConf

    known = []
    for path in sorted(RUNS.glob("*/*/.hydra/config.yaml"), reverse=True):
        kept = OmegaConf.load(path)
        of = kept.get("experiment") or kept.get("name")  # as older versions wrote it
        run = path.parent.parent
        if of == name and any(run.glob("checkpoints/*.ckpt")):
            return run
        known.append(f"{run} ({of}{'' if of != name else ', no checkpoint yet'})")
    there = f"; there are {', '.join(known[:3])}" if known else ""
    raise UserError(f"resume=last: no run of {name} with a checkpoint in {RUNS}{there}. Start one without resume")


def keep_config(plan: Experiment, words: Sequence[str], folder: Path) -> None:
    """Write `.hydra/config.yaml` and `.hydra/overrides.yaml`, as Hydra does."""
    import yaml

    from vavae_tools.runtime.files import written_whole

    if not is_first():
        return
    for name, value in (("config", plan.plain()), ("overrides", list(words))):
        with written_whole(folder / ".hydra" / f"{name}.yaml") as partial:
            partial.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), encoding="utf-8")


def help_text(experiment: str | None) -> str:
    """Return what `--help` prints: experiments, and the keys of one experiment with their meanings."""
    name = experiment or DEFAULT
    values = _read_experiment(name)
    keys = _Keys(RECIPES[values.pop("recipe")]())
    for key, value in _leaves(values, keys):
        keys.set(key, value)
    width = max(map(len, experiments()))
    listed = "\n".join(f"  {each:<{width}}  {what}" for each, what in experiments().items())
    sections: dict[str, list[str]] = {"": []}
    ends = [key.rpartition(".")[2] for key in keys.settings]
    for key, setting in keys.settings.items():
        section, _, end = key.rpartition(".")
        typed = f"--{end}" if ends.count(end) == 1 else f"{key}="
        sections.setdefault(section, []).append(_described(typed, keys.values[key], setting))
    recipe = keys.recipe
    shown = [
        f"{section}:" + (f"  # {(type(getattr(recipe, section)).__doc__ or '').splitlines()[0]}" if section else "")
        for section in sections
    ]
    blocks = "\n\n".join(
        "\n".join(([title] if section else []) + lines)
        for title, (section, lines) in zip(shown, sections.items(), strict=True)
    )
    return f"""usage: python -m vavae_tools.train [experiment=NAME] [key=value …] [--flag VALUE …]

Train an experiment. Each run has its folder logs/runs/YYYY-MM-DD/HH-MM-SS/ with its checkpoints, curves and images.

experiments (experiment=NAME --help shows its keys):
{listed}

  --config FILE   a YAML file with keys and values, and its experiment under `experiment`
  --resume PATH   last, a .ckpt, .pth, checkpoint folder or run's folder: go on from there
  --print_config  show all that a run would use, and end

keys of {name}, typed as --NAME VALUE or SECTION.NAME=VALUE; in brackets what holds where they are not typed:

{blocks}"""


def _described(name: str, value: Any, setting: Setting) -> str:
    choices = [str(c) for kind in setting.kinds if str(get_origin(kind)) == "typing.Literal" for c in get_args(kind)]
    text = setting.metadata.get("help", "")
    text = f"{', '.join(choices)}: {text}" if len(choices) > 1 else text
    before = f"  {name} [{_written(value)}]"
    return textwrap.fill(f"{before}  {text}", 118, subsequent_indent=" " * 8, break_long_words=False)
