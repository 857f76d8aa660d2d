"""Experiments: what a command line of `vavae_tools.train` means, as one configuration, and the folder of its run.

The configurations are Hydra's (`configs/`), its overrides are understood as they are typed; beside them flags, which
stand for one key each. A run keeps its configuration in `.hydra/config.yaml`, and by it is found again.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from difflib import get_close_matches
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.ranks import is_first, of_torchrun

if TYPE_CHECKING:
    from omegaconf import DictConfig


CONFIGS = Path(str(files("vavae_tools") / "configs"))
GROUPS = ("experiment", "data", "model", "trainer", "callbacks")
DEFAULT = "vavae_dit"
SECTIONS = {"training": "text_to_image"}
"""Sections of a `--config` file that only one experiment has, and so name it."""
RUNS = Path("logs/runs")
RUN_FOLDER = "VAVAE_RUN_FOLDER"
"""Environment variable by which the processes of one run agree on its folder."""


@dataclass
class CommandLine:
    """What was typed, sorted.

    Attributes:
        overrides: Hydra's: `key=value`, `group=option`, `+key=value`, `~key`.
        flags: name → the text after it; None where nothing followed.
    """

    overrides: list[str] = field(default_factory=list)
    flags: dict[str, str | None] = field(default_factory=dict)
    config: str | None = None
    help: bool = False
    print_config: bool = False

    @property
    def experiment(self) -> str | None:
        """The one that was named."""
        chosen = [text.partition("=")[2] for text in self.overrides if re.match(r"\+?experiment=", text)]
        return chosen[-1] if chosen else None


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
            text = value if equals else None
            if not equals and words and not words[0].startswith("--") and not _is_override(words[0]):
                text = words.pop(0)
            if name == "config":
                line.config = _needs_value(name, text)
            else:
                line.flags[name] = text
        elif _is_override(word):
            line.overrides.append(word.replace("hydra.run.dir=", "output_dir=", 1))
        else:
            raise UserError(f"{word!r} is neither --flag VALUE nor key=value, such as trainer.devices=2 (see --help)")
    return line


def _is_override(word: str) -> bool:
    return re.match(r"(~|\+{0,2})[A-Za-z_][\w./@-]*(=|$)", word) is not None and ("=" in word or word.startswith("~"))


def _needs_value(name: str, text: str | None) -> str:
    if text is None:
        raise UserError(f"--{name} needs a value")
    return text


def compose(line: CommandLine) -> "DictConfig":
    """The configuration that a command line means: the experiment's, then `--config`'s, then what was typed.

    Raises:
        UserError: an experiment, option or key that does not exist (the nearest that do are named), or a value of
            another kind than the key's.
    """
    from omegaconf import OmegaConf

    given = _read_config(line.config) if line.config else {}
    of_file = given.pop("experiment", None) or next((of for section, of in SECTIONS.items() if section in given), None)
    experiment = line.experiment or of_file or DEFAULT
    chosen = [text for text in line.overrides if text.partition("=")[0].lstrip("+") in GROUPS]
    chosen = [f"experiment={experiment}", *(text for text in chosen if "experiment=" not in text)]
    for text in chosen:
        _check_option(*text.lstrip("+").split("=", 1))
    base = _hydra(chosen)
    known = [key for key in _keys(base) if not _of_flags(key)]
    for name, key in given.pop("flags", {}).items():  # what --print_config says is read again
        if base.flags.get(name) != key:
            _check_key(f"flags.{name}", known, base.flags, f"{line.config}: ")
    for key, value in _leaves(given, known):
        _check_key(key, known, base.flags, f"{line.config}: ")
        OmegaConf.update(base, key, _of_its_kind(key, value, base))
    typed = [text for text in line.overrides if text.partition("=")[0].lstrip("+") not in GROUPS]
    for text in typed:
        key = text.partition("=")[0]
        if not key.startswith("+") or _of_flags(key.lstrip("+")):
            _check_key(key.lstrip("~+"), known, base.flags)
    changed = _hydra([*chosen, *typed])
    for text in typed:
        key = text.partition("=")[0].lstrip("+~")
        if text.startswith("~"):
            raise UserError(f"{text}: a key cannot be taken away; set it to null where it may be left out")
        value = OmegaConf.select(changed, key)
        value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        in_base = not text.startswith("+") or key in known
        OmegaConf.update(base, key, _of_its_kind(key, value, base) if in_base else value, force_add=not in_base)
    for name, text in line.flags.items():
        if name not in base.flags:
            raise UserError(f"No --{name}{_nearest(name, base.flags, '--')}; python -m vavae_tools.train --help")
        key = base.flags[name]
        OmegaConf.update(base, key, _of_its_kind(key, _flag_value(name, text, OmegaConf.select(base, key)), base))
    missing = OmegaConf.missing_keys(base)
    if missing:
        key = sorted(missing)[0]
        flag = next((f"--{name} …" for name, target in base.flags.items() if target == key), None)
        raise UserError(f"experiment={base.name} needs {key}=…{f' (or {flag})' if flag else ''}")
    return base


def _hydra(overrides: list[str]) -> "DictConfig":
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        with initialize_config_dir(str(CONFIGS), version_base="1.3"):
            return compose("train", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        lines = [text for text in str(error.__cause__ or error).splitlines() if text.strip()]
        raise UserError(f"{' '.join(overrides[1:]) or overrides[0]}: {' '.join(lines[:2])}") from None


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
        raise UserError(f"--config {path}: expected keys and values, such as data: {{batch_size: 32}}")
    return OmegaConf.to_container(read)


def experiments() -> dict[str, str]:
    """Name → what it is, in a line."""
    found = {}
    for path in sorted((CONFIGS / "experiment").glob("*.yaml")):
        comments = [text[1:].strip() for text in path.read_text(encoding="utf-8").splitlines() if text.startswith("#")]
        found[path.stem] = next(text for text in comments if not text.startswith("@"))
    return found


def _check_option(group: str, option: str) -> None:
    options = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
    if option not in options:
        raise UserError(f"No {group}={option}{_nearest(option, options)}; there are {', '.join(options)}")


def _of_flags(key: str) -> bool:
    """Whether a key only says what a flag stands for: to set it would train as if it had not been."""
    return key.split(".")[0] == "flags"


def _check_key(key: str, known: Sequence[str], flags: Mapping[str, str], where: str = "") -> None:
    if key in known:
        return
    meant = flags.get(key.removeprefix("flags."))
    near = f"; did you mean {meant}?" if meant else _nearest(key, known)
    raise UserError(f"{where}No key {key!r}{near}; --print_config shows all keys")


def _nearest(name: str, known: Sequence[str], before: str = "") -> str:
    by_end = {key.rpartition(".")[2]: key for key in known}
    near = get_close_matches(name, known, n=1, cutoff=0.5) or [
        by_end[end] for end in get_close_matches(name.rpartition(".")[2], by_end, n=1, cutoff=0.5)
    ]
    return f"; did you mean {before}{near[0]}?" if near else ""


def _keys(config: "DictConfig") -> list[str]:
    """All dotted keys, inner ones too."""
    from omegaconf import OmegaConf

    found: list[str] = []

    def walk(value: Any, before: str) -> None:
        for name, inner in value.items():
            found.append(f"{before}{name}")
            if isinstance(inner, dict):
                walk(inner, f"{before}{name}.")

    walk(OmegaConf.to_container(config), "")
    return found


def _leaves(values: Mapping[str, Any], known: Sequence[str], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        key = f"{before}{name}"
        if value is None and any(other.startswith(f"{key}.") for other in known):
            continue  # a section without content
        if isinstance(value, Mapping) and any(other.startswith(f"{key}.") for other in known):
            yield from _leaves(value, known, f"{key}.")
        else:
            yield key, value


def _flag_value(name: str, text: str | None, now: Any) -> Any:
    from omegaconf import OmegaConf

    if text is None:
        if isinstance(now, bool):
            return True
        raise UserError(f"--{name} needs a value")
    return OmegaConf.from_dotlist([f"value={text}"]).value  # numbers as YAML with 1e-4 reads them


def _of_its_kind(key: str, value: Any, config: "DictConfig") -> Any:
    """`value`, where it is of the kind that the key's default is: a number for a number."""
    from omegaconf import OmegaConf

    default = OmegaConf.select(config, key, throw_on_missing=False)
    if default is None or value is None or isinstance(default, str) or OmegaConf.is_config(default):
        return value
    if key.startswith("model.dit.") and isinstance(value, list):  # two numbers make a denoiser with a wide head
        return value
    if isinstance(default, bool):
        fits, kind = isinstance(value, bool), "true or false"
    elif isinstance(default, int):
        fits, kind = isinstance(value, int) and not isinstance(value, bool), "a whole number"
    else:
        fits, kind = isinstance(value, (int, float)) and not isinstance(value, bool), "a number"
    if not fits:
        raise UserError(f"{key} is {value!r}, expected {kind} such as {default}")
    return float(value) if isinstance(default, float) else value


# ---- the run's folder
_TURNS = count(1)


def run_folder(config: "DictConfig", now: datetime | None = None) -> tuple[Path, str | None, str | None]:
    """Where a run writes, what it goes on from, and a line about it.

    `ckpt_path=last` takes the newest run of the same experiment and goes on in its folder, and so does a path into a
    run's folder; another checkpoint starts a folder of its own.

    Raises:
        UserError: `ckpt_path=last`, and no run of this experiment has a checkpoint.
    """
    ranks = of_torchrun()
    if ranks.size > 1:  # the clock says another second to each of them
        found = _run_folder(config, now) if ranks.rank == 0 else None
        turn = f"vavae run folder {next(_TURNS)}"  # a process may train several
        folder, resume, said = ranks.share(turn, found and (str(found[0]), *found[1:]))
        return Path(folder), resume, said
    return _run_folder(config, now)


def _run_folder(config: "DictConfig", now: datetime | None) -> tuple[Path, str | None, str | None]:
    resume, chosen = config.ckpt_path, config.output_dir
    shared = os.environ.get(RUN_FOLDER)
    if resume is not None:
        resume = str(resume)
    if chosen is not None:
        return Path(str(chosen)), resume, None
    if resume == "last":
        found = Path(shared) if shared else _newest_run(config.name)
        return found, "last", f"ckpt_path=last: going on with {found}"
    if resume is not None:
        of_run = [folder for folder in (Path(resume), *Path(resume).parents) if (folder / ".hydra").is_dir()]
        if of_run:
            return of_run[0], resume, f"going on in {of_run[0]}"
    return Path(shared) if shared else _new_run(now or datetime.now()), resume, None


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
        of = OmegaConf.load(path).get("name")
        run = path.parent.parent
        if of == name and any(run.glob("checkpoints/*.ckpt")):
            return run
        known.append(f"{run} ({of}{'' if of != name else ', no checkpoint yet'})")
    there = f"; there are {', '.join(known[:3])}" if known else ""
    raise UserError(f"ckpt_path=last: no run of {name} with a checkpoint in {RUNS}{there}. Start one without ckpt_path")


def keep_config(config: "DictConfig", overrides: Sequence[str], folder: Path) -> None:
    """Write `.hydra/config.yaml` and `.hydra/overrides.yaml`, as Hydra does, and tell the run's other processes."""
    from omegaconf import OmegaConf

    from vavae_tools.runtime.files import written_whole

    os.environ[RUN_FOLDER] = str(folder)
    if not is_first():
        return
    for name, value in (("config", config), ("overrides", list(overrides))):
        with written_whole(folder / ".hydra" / f"{name}.yaml") as partial:
            partial.write_text(OmegaConf.to_yaml(OmegaConf.create(value), resolve=name == "config"), encoding="utf-8")


def help_text(experiment: str | None) -> str:
    """What `--help` prints: experiments, flags, and the keys of one experiment with their meanings."""
    import yaml

    name = experiment or DEFAULT
    _check_option("experiment", name)
    groups = {"data": "split", "model": DEFAULT, "trainer": "auto", "callbacks": "default"}
    flags = yaml.safe_load((CONFIGS / "train.yaml").read_text(encoding="utf-8"))["flags"]
    texts = []
    base: str | None = name
    while base:  # an experiment, and the one that it is built on
        texts.append((CONFIGS / "experiment" / f"{base}.yaml").read_text(encoding="utf-8"))
        read = yaml.safe_load(texts[-1])
        flags |= read.get("flags", {})
        base = None
        for entry in read.get("defaults", []):
            if isinstance(entry, dict):
                groups.update({group.removeprefix("override /"): option for group, option in entry.items()})
            elif entry != "_self_":
                base = entry
    width = max(map(len, experiments()))
    listed = "\n".join(f"  {each:<{width}}  {what}" for each, what in experiments().items())
    wide = max(map(len, flags)) + 2
    typed = "\n".join(f"  {f'--{flag}':<{wide}}  {key}" for flag, key in flags.items())
    keys = "\n\n".join(
        f"{group}:  # {option}\n"
        + "".join(f"  {text}\n" for text in _without_title(CONFIGS / group / f"{option}.yaml")).rstrip()
        for group, option in groups.items()
    )
    own = next((text for text in reversed(texts) if re.search(r"^(data|model|trainer|callbacks):", text, re.M)), None)
    replaced = f"\n\nand in their place:\n{own}" if own else ""
    return f"""usage: python -m vavae_tools.train [experiment=NAME] [key=value …] [--flag VALUE …]

Train an experiment. Each run has its folder logs/runs/YYYY-MM-DD/HH-MM-SS/ with its checkpoints, curves and pictures.

experiments (experiment=NAME --help shows its keys):
{listed}

  --config FILE   a YAML file with keys and values, and its experiment under `experiment`
  --resume PATH   as ckpt_path=PATH: last, a .ckpt, .pth, checkpoint folder or run's folder
  --print_config  show all that a run would use, and end

flags of {name}, each for a key:
{typed}

keys of {name}:
{keys}{replaced}"""


def _without_title(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[1:] if lines[0].startswith("#") else lines
