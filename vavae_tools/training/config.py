"""How a training goes, the same for every recipe: its length, steps, devices, checkpoints and previews.

A field's type and metadata say what it takes and means. Nothing here imports torch, so that `--help` answers at once.
"""

import math
import re
import time
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import yaml

from vavae_tools.runtime.errors import UserError, is_path, with_home

MAX_TIME = re.compile(r"(\d+)(?::([0-5]\d))?(?::([0-5]\d))?"), "hours:minutes, such as 11:30"
EXPORT = "last"  # of a denoiser: the least val/loss comes before its images are sharp (60 spectrograms: 52 % accuracy)
KAGGLE_MINUTES = 12 * 60 - 15  # of a session with a GPU; the last ones are for the cells after training


def setting(default: Any, text: str, **limits: Any) -> Any:
    """Return a dataclass's field with its meaning, its range (`least`, `most`, or what it is `above`) or `pattern`."""
    metadata = {"help": text, **limits}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SaveConfig:
    """When checkpoints are written, and when training ends before its length."""

    save_every_minutes: float = setting(5.0, "between two of last.ckpt", least=0)
    save_every_n_steps: int = setting(0, "optimiser steps between two folders checkpoint-STEP/; 0 for none", least=0)
    save_every_n_epochs: int = setting(0, "epochs between two folders checkpoint-epoch-N/; 0 for none", least=0)
    keep_best: int = setting(1, "of the best checkpoints, how many stay")
    keep_last: int = setting(3, "of the folders, how many stay", least=0)
    single_files: bool = setting(False, "in place of folders write checkpoint_STEP.pth and checkpoint_epoch_N.pth")
    max_time: str | None = setting(
        None, "hours:minutes until it saves and ends; null: on Kaggle the session's own; 0: none", pattern=MAX_TIME
    )
    allow_changes: bool = setting(False, "resume although settings or data are others than the checkpoint's")


@dataclass(frozen=True)
class TrainConfig(SaveConfig):
    """The numbers of a training; None stands for what the recipe or the machine suggests."""

    batch_size: int | None = setting(None, "images per device and step; null: what suits the machine", least=1)
    max_steps: int | None = setting(None, "optimiser steps, in place of max_epochs", least=1)
    max_epochs: int | None = setting(None, "passes over the training subset", least=1)
    lr: float | None = setting(None, "AdamW's peak learning rate; null: by the model's size", above=0)
    schedule: Literal["cosine", "linear", "constant"] | None = setting("cosine", "after warm-up")
    warmup_steps: int | None = setting(100, "optimiser steps of linear warm-up", least=0)
    ema_decay: float | None = setting(0.999, "of the averaged weights", least=0, most=1)
    accumulate_grad_batches: int = setting(1, "batches gathered in one step", least=1)
    gradient_clip: float | None = setting(1.0, "largest norm of the gradients; 0 does not clip", least=0)
    compile: bool | None = setting(None, "torch.compile the blocks; null: where the card gains by it")
    gradient_checkpointing: bool | None = setting(False, "less memory, a third more time")
    early_stopping_patience: int = setting(
        0, "validations without a better value (as of the best checkpoint) until training ends; 0: never", least=0
    )
    export: str | None = setting(
        None, "the checkpoint that the result is made of: last, best, or one of this run; null: what suits"
    )
    previews: int | None = setting(
        8, "grids of samples or reconstructions in all; 0 for none; null: what suits the data", least=0
    )
    log_every_n_steps: int = setting(10, "optimiser steps between two values in the curves", least=1)
    logger: list[str] | str | None = setting(
        "tensorboard", "tensorboard, csv, wandb, mlflow, none; or several in a list. metrics.csv is always written"
    )
    accelerator: Literal["gpu", "cuda", "cpu", "auto"] = setting("auto", "what to train on")
    devices: int | Literal["auto"] = setting("auto", "how many on each machine; auto: all there are", least=1)
    num_nodes: int = setting(1, "machines", least=1)
    strategy: Literal["auto", "ddp", "ddp_find_unused_parameters_true", "fsdp", "deepspeed", "deepspeed_stage_2"] = (
        setting("auto", "how several devices work together")
    )
    precision: str | None = setting(
        None, "16, 32, bf16; null: 16 on a T4, bf16 from compute capability 8.0 on, 32 on a CPU"
    )
    deterministic: bool = setting(False, "the same numbers each time on a GPU, too; slower")
    trainer: dict[str, Any] = setting({}, "further arguments of lightning.Trainer, as trainer.NAME=VALUE")

    def of_devices(self) -> dict[str, Any]:
        """Return the arguments of `devices.trainer_settings`."""
        names = ["accelerator", "devices", "num_nodes", "strategy", "precision", "deterministic"]
        names += ["accumulate_grad_batches", "log_every_n_steps"]
        chosen = {name: getattr(self, name) for name in names}
        return {**chosen, "gradient_clip_val": self.gradient_clip, **self.trainer}

    def exported(self) -> str:
        """Return what `export` means: where patience ends a training, what came after its best is worse."""
        return self.export or ("best" if self.early_stopping_patience else EXPORT)

    def length(self) -> dict[str, int]:
        """Return max_steps where it is given, else max_epochs, as `lightning.Trainer` takes them."""
        if self.max_steps:
            return {"max_steps": self.max_steps, "max_epochs": -1}
        return {"max_steps": -1, "max_epochs": self.max_epochs or 1}


def session_end(
    max_time: str | None, kaggle: Path = Path("/kaggle/working"), began: Path = Path("/proc/1")
) -> float | None:
    """Return the `time.time()` at which training has to be over; None where nothing limits it.

    `max_time` is "11:30" (hours and minutes from now), "0" for no limit, or None for Kaggle's where there is the folder
    `kaggle`: its sessions are as old as the file `began`.
    """
    if max_time is None:
        if not kaggle.is_dir() or not began.exists():
            return None
        return began.stat().st_ctime + 60 * KAGGLE_MINUTES
    found = MAX_TIME[0].fullmatch(str(max_time).strip())
    if not found:
        raise UserError(f"--max_time {max_time!r}: expected {MAX_TIME[1]}")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    seconds += hours * 3600 + minutes * 60
    return time.time() + seconds if seconds else None


@dataclass(frozen=True)
class WatchedConfig(TrainConfig):
    """Of a denoiser whose samples a classifier can judge."""

    sample_watch: int = setting(0, "validations, spread evenly, at which a few samples are judged; 0: none", least=0)
    monitor: Literal["loss", "sample_accuracy", "usable"] = setting(
        "loss", "what the best checkpoint is chosen by; usable: samples of the right person that are no copies"
    )
    classifier_dir: str | None = setting(None, "keeps the classifier that judges them; null: in the run's folder")

    def __post_init__(self) -> None:
        if self.monitor != "loss" and not self.sample_watch:
            raise UserError(f"--monitor {self.monitor} is measured on samples: add --sample_watch 10, or as often")


class Setting(NamedTuple):
    kinds: tuple[Any, ...]  # types that it takes, `Literal`s among them
    default: Any
    metadata: Mapping[str, Any]


def members(kind: Any) -> tuple[Any, ...]:
    """Return the types that a union is made of; of another type, that one."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _inside(kinds: tuple[Any, ...], outer: type) -> tuple[Any, ...]:
    """Return the types that the values of a list, or of a dict, may have."""
    return next((members(get_args(kind)[-1]) for kind in kinds if get_origin(kind) is outer), (Any,))


def settings_of(config: Any, before: str = "") -> dict[str, Setting]:
    """Return dotted key → setting of a dataclass's instance, inner ones too."""
    hints, found = get_type_hints(type(config)), {}
    for each in fields(config):
        value, key = getattr(config, each.name), f"{before}{each.name}"
        if is_dataclass(value):
            found |= settings_of(value, f"{key}.")
        else:
            found[key] = Setting(members(hints[each.name]), value, each.metadata)
    return found


class Typed(str):
    """A word as it was typed, or a plain one of a YAML file, which its setting's kinds give a meaning."""


class TypedLoader(yaml.SafeLoader):
    """Leaves what looks like a number, a truth value or a date as it is written; refuses a key that stands twice."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.composer.ComposerError(None, None, f"{key.value} stands twice", key.start_mark)
            seen |= {key.value} if isinstance(key.value, str) else set()
        return node

    def construct_text(self, node: yaml.ScalarNode) -> str:
        if node.style is None:
            return Typed(node.value)
        return node.value.rstrip("\n") if node.style in "|>" else node.value


TypedLoader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"(~|null|Null|NULL|)$"), ["~", "n", "N", ""])
TypedLoader.add_implicit_resolver("tag:yaml.org,2002:merge", re.compile(r"<<$"), ["<"])
TypedLoader.add_constructor("tag:yaml.org,2002:str", TypedLoader.construct_text)


def read_typed(value: Any, kinds: tuple[Any, ...]) -> Any:
    """Return a value whose `Typed` words are what a setting takes; a text stays as it was typed."""
    outer = {"[]": list, "{}": dict}.get(value[:1] + value[-1:]) if isinstance(value, Typed) else None
    if outer and any(kind is Any or (get_origin(kind) or kind) is outer for kind in kinds) and not is_path(value):
        try:
            value = yaml.load(str(value), TypedLoader)
        except yaml.YAMLError:
            if str not in kinds:
                raise
    return _read(value, kinds)


def _read(value: Any, kinds: tuple[Any, ...]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_read(each, _inside(kinds, list)) for each in value]
    if isinstance(value, Mapping):
        return {str(key): _read(each, _inside(kinds, dict)) for key, each in value.items()}
    optional, text = types.NoneType in kinds or Any in kinds, str(value)
    if optional and value == "":
        return None
    if not isinstance(value, Typed):
        return value
    if text in ("null", "Null", "NULL") and optional:
        return None
    if str in kinds or any(text in map(str, get_args(kind)) for kind in kinds if get_origin(kind) is Literal):
        return text
    if re.fullmatch(r"[-+]?\d[\d_]*", text):
        return int(text.replace("_", ""))
    if re.fullmatch(r"[-+]?(\d[\d_]*\.?\d*|\.\d+)([eE][-+]?\d+)?", text):
        return float(text.replace("_", ""))
    words = {"true": True, "false": False}
    if bool in kinds:
        words |= {"yes": True, "on": True, "no": False, "off": False}
    return words.get(text.lower(), text)


def as_taken(value: Any, setting: Setting) -> Any:
    """Return what was typed as its setting takes it, ~ as the home folder, and 128x256 as [128, 256]."""
    value = read_typed(value, setting.kinds)
    if isinstance(value, (list, tuple)):
        return [with_home(each) if isinstance(each, str) else each for each in value]
    if isinstance(value, (str, Path)):
        if list[int] in setting.kinds and re.fullmatch(r"\d+[xX]\d+", str(value)):
            return [int(side) for side in str(value).lower().split("x")]
        return with_home(str(value)) if str in setting.kinds else value
    return value


def read_word(text: str) -> str:
    """Return a word of the command line, which its setting will read; quotes around all of it keep what is inside."""
    quoted = re.fullmatch(r"""(['"])(.*)\1""", text, re.DOTALL)
    return quoted[2] if quoted and not is_path(text) else Typed(text)


def checked(key: str, value: Any, setting: Setting) -> Any:
    """Return a value as its setting takes it, or raise: a whole number for a fraction is a float, for a text a text."""
    taken = _of_kind(value, setting.kinds)
    if taken is _NOT:
        such = f" such as {setting.default}" if type(setting.default) in (int, float) else ""
        expected = " or ".join(dict.fromkeys(words for kind in setting.kinds if (words := _in_words(kind))))
        raise UserError(f"{key} is {value!r}, expected {expected}{such}")
    limits = setting.metadata
    if "pattern" in limits and taken is not None and not limits["pattern"][0].fullmatch(taken.strip()):
        raise UserError(f"{key} is {value!r}, expected {limits['pattern'][1]}")
    least, most, above = limits.get("least", -math.inf), limits.get("most", math.inf), limits.get("above", -math.inf)
    numbers = [each for each in (taken if isinstance(taken, list) else [taken]) if type(each) in (int, float)]
    if all(least <= number <= most and number > above for number in numbers):
        return taken
    if above > -math.inf:
        expected = f"more than {above:g}"
    elif most < math.inf:
        expected = f"{'a share' if (least, most) == (0, 1) else 'a number'} from {least:g} to {most:g}"
    else:
        expected = f"{'a whole number of ' if int in setting.kinds else ''}{least:g} or more"
    words = [f" or {get_args(kind)[0]}" for kind in setting.kinds if get_origin(kind) is Literal]
    raise UserError(f"{key} is {value!r}, expected {expected}{''.join(words)}")


_NOT = object()


def _of_kind(value: Any, kinds: tuple[Any, ...]) -> Any:
    for kind in kinds:
        origin = get_origin(kind) or kind
        if origin is Literal:
            found = [choice for choice in get_args(kind) if str(value) == str(choice)]
            if found:
                return found[0]
        elif origin is Any:
            return value
        elif origin is list and isinstance(value, (list, tuple)):
            inner = [_of_kind(each, _inside((kind,), list)) for each in value]
            if _NOT not in inner:
                return inner
        elif origin is dict and isinstance(value, Mapping):
            return dict(value)
        elif value is None and kind is types.NoneType:
            return None
        elif isinstance(value, bool):  # which is an int, too
            if kind is bool:
                return value
        elif kind is float and isinstance(value, (int, float)):
            return float(value)
        elif kind is int and isinstance(value, float) and value.is_integer() and float not in kinds:  # 1e5
            return int(value)
        elif isinstance(origin, type) and isinstance(value, origin):
            return value
    if str in kinds and isinstance(value, (int, float)):  # a folder that is called 2024, precision=16
        return str(value)
    return _NOT


def _in_words(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is list:
        return f"a list of {_in_words(_inside((kind,), list)[0]).removeprefix('a ')}s"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "keys and values"}
    return words.get(get_origin(kind) or kind, "")
