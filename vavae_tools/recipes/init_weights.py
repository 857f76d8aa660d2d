"""Weights that a denoiser's training can go on from: those of a training here, and published ones."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from vavae_tools.checkpoints.formats import read_any
from vavae_tools.diffusion.ddt import DDT_SIZES
from vavae_tools.diffusion.lora import merged_weights
from vavae_tools.diffusion.transformer import DiT_SIZES
from vavae_tools.published.denoisers import TABLES, WRAPPERS
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import read_checkpoint

KINDS = {"lightningdit": "LightningDiT", "ddt": "DiT with the wide head", "dit": "DiT"}


@dataclass(frozen=True)
class StartingWeights:
    """Weights to go on from.

    Attributes:
        kind: "lightningdit", "ddt" or "dit".
        arguments: of `make_denoiser`, as far as the file tells them.
        denoiser: under our names.
        table: one row for each class, (K, D).
        null: the row that means any class, (D,); None where there is none.
        classes: name → label, where they are known.
        tables: the fixed tables in the file, which our constructors compute.
        left: names of what else is there.
        is_own: written by this package.
    """

    source: Path
    kind: str
    arguments: dict[str, Any]
    denoiser: dict[str, Tensor]
    table: Tensor
    null: Tensor | None
    classes: dict[str, int] = field(default_factory=dict)
    tables: dict[str, Tensor] = field(default_factory=dict)
    left: tuple[str, ...] = ()
    is_own: bool = False


def read_starting_weights(source: str | Path, kind: str | None = None) -> StartingWeights:
    """Read weights to go on from.

    Args:
        source: a pipeline's folder from here, a `.ckpt`, `.pth` or checkpoint folder of DiT training here (the averaged
            weights are taken), or published weights, `.pt` or `.safetensors`, bare or under "ema" or "model".
        kind: of published weights; None: seen in their names and shapes.

    Raises:
        UserError: nothing there, damaged, no denoiser, or of another kind.
    """
    source = Path(source)
    if kind is not None and kind not in KINDS:
        raise UserError(f"No weights of kind {kind!r}; there are {', '.join(KINDS)}, and null: seen in them")
    if source.is_dir():
        if (source / "model_index.json").is_file():
            return _from_pipeline(source)
        if not (source / "model.pt").is_file():
            inside = [name for name in ("pipeline", "checkpoints/last.ckpt") if (source / name).exists()]
            there = ", ".join(sorted(path.name for path in source.iterdir())[:6]) or "nothing"
            hint = f"name {source / inside[0]}" if inside else "name a pipeline/, a .ckpt or published weights"
            raise UserError(f"{source} holds no weights to go on from ({there}): {hint}")
        saved = read_any(source, lambda line: None)
    elif source.suffix == ".safetensors":
        saved = _read_safetensors(source)
    else:
        saved = read_checkpoint(source)
        if isinstance(saved.get("trainer"), dict):
            saved = read_any(source, lambda line: None)
    settings = saved.get("hyper_parameters")
    if isinstance(settings, Mapping) and "denoiser_config" in settings:
        return _from_training(source, saved, settings)
    return _published(source, saved, kind)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise UserError(f"No weights {path}")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from None


def _from_pipeline(folder: Path) -> StartingWeights:
    def part(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = _read_json(folder / name / "config.json")
        files = sorted((folder / name).glob("*.safetensors"))
        if not files:
            raise UserError(f"{folder / name} has no .safetensors: copy the pipeline again")
        return config, {key: tensor for path in files for key, tensor in _read_safetensors(path).items()}

    config, weights = part("denoiser")
    of_conditioner, table = part("conditioner")
    people = _read_json(folder / "model_index.json").get("people") or {}
    return _own(folder, config, weights, of_conditioner, table, people, ())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy the pipeline again") from None


def _from_training(path: Path, checkpoint: Mapping[str, Any], settings: Mapping[str, Any]) -> StartingWeights:
    named = checkpoint["state_dict"]
    beginnings = ("ema.network.", "network.")
    begin = next((b for b in beginnings if any(name.startswith(f"{b}denoiser.") for name in named)), None)
    if begin is None:
        raise UserError(f"{path} holds no denoiser: expected network.denoiser.* in its state_dict")

    def part(name: str) -> dict[str, Tensor]:
        start = f"{begin}{name}."
        return {key.removeprefix(start): tensor for key, tensor in named.items() if key.startswith(start)}

    left = tuple(name for name in named if not name.startswith((f"{begin}denoiser.", f"{begin}conditioner.")))
    weights = merged_weights(part("denoiser"), settings.get("lora"))
    of_conditioner, people = settings["conditioner_config"], settings.get("people") or {}
    return _own(path, settings["denoiser_config"], weights, of_conditioner, part("conditioner"), people, left)


def _own(
    source: Path,
    config: Mapping[str, Any],
    weights: dict[str, Tensor],
    of_conditioner: Mapping[str, Any],
    of_table: dict[str, Tensor],
    people: Mapping[str, int],
    left: tuple[str, ...],
) -> StartingWeights:
    arguments = {name: value for name, value in config.items() if not name.startswith("_")}
    kind = "ddt" if "s_embedder.proj.weight" in weights else "lightningdit"
    if kind == "lightningdit":  # what older configurations leave out
        arguments = {"time_embed": "sinusoidal", "reversed_time": False, **arguments}
    rows, number = of_table["embedding_table.weight"], of_conditioner["num_classes"]
    null = rows[number] if len(rows) > number else None
    return StartingWeights(source, kind, arguments, weights, rows[:number], null, dict(people), left=left, is_own=True)


def _published(source: Path, saved: Mapping[str, Any], kind: str | None) -> StartingWeights:
    left: list[str] = []
    parts = ("ema", "ema_model", "state_dict", "model")
    while part := next((part for part in parts if isinstance(saved.get(part), Mapping) and saved[part]), None):
        left += [str(name) for name in saved if name != part]
        saved = saved[part]
    named = {WRAPPERS.sub("", str(name)): tensor for name, tensor in saved.items()}
    first, of_classes = "x_embedder.proj.weight", "y_embedder.embedding_table.weight"
    beginnings = [name.removesuffix(first) for name in named if name == first or name.endswith(f".{first}")]
    # a training's checkpoint may hold the live weights and their average side by side
    begin = min(beginnings, key=lambda begin: ("ema" not in begin, len(begin)), default=None)
    if begin is None or begin + of_classes not in named:
        some = ", ".join(list(named)[:3]) or "nothing"
        raise UserError(
            f"{source} is no denoiser with classes: it holds {some} …, expected {first} and {of_classes} as in "
            "LightningDiT's, RAE's or DiT's weights; one from here is a pipeline/ or a .ckpt"
        )
    inside = {name.removeprefix(begin): name for name in named if name.startswith(begin)}
    weights, tables = {}, {}
    for name, whole in inside.items():
        if name.startswith(TABLES):
            tables[name] = named[whole]
        elif isinstance(named[whole], Tensor) and re.match(r"([xst]_embedder|s_projector|blocks|final_layer)\.", name):
            weights[name] = named[whole]
        elif name != of_classes:
            left.append(whole)
    left += [name for name in named if not name.startswith(begin)]
    try:
        arguments = arguments_of(weights, tables)
    except (KeyError, ValueError) as error:
        raise UserError(f"{source} is not whole, or no denoiser that is known here ({error})") from None
    rows = named[begin + of_classes]
    return StartingWeights(
        source,
        _kind_of(source, weights, arguments, kind),
        arguments,
        weights,
        rows[:-1],  # all that are published have the null row, the last one
        rows[-1],
        tables=tables,
        left=tuple(left),
    )


def _kind_of(source: Path, weights: Mapping[str, Tensor], arguments: Mapping[str, Any], kind: str | None) -> str:
    if "s_embedder.proj.weight" in weights:
        seen = "ddt"
    else:
        plain = not arguments["swiglu"] and not arguments["rms_norm"] and arguments["learn_sigma"]
        seen = "dit" if plain and arguments["time_embed"] == "sinusoidal" else "lightningdit"
    if kind is None and seen == "dit":
        raise UserError(
            f"{source} has the form of DiT's weights, and names do not tell what they predict: noise at timesteps 0 … "
            "999, as DiT's, of which only patches, blocks and classes are kept (init.kind=dit), or velocities, "
            "as SiT's, of which all is kept (init.kind=lightningdit)"
        )
    if kind in (None, seen) or (kind == "lightningdit" and seen == "dit"):
        return kind or seen
    raise UserError(f"{source} is a {KINDS[seen]} by its names, not a {KINDS[kind]}: set init.kind={seen}")


def arguments_of(weights: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Any]:
    """A denoiser's arguments, under our names, as far as its weights' names and shapes tell them.

    Heads follow from the rotary table, from the norm of queries, or from a published width and depth; where nothing
    tells a value, it is left out.

    Raises:
        KeyError, ValueError: a weight that every denoiser has is missing or of another form.
    """
    wide = "s_embedder.proj.weight" in weights
    head, channels, patch, _ = weights["x_embedder.proj.weight"].shape  # (D, C, p, p)
    width = weights["s_embedder.proj.weight"].shape[0] if wide else head
    blocks = 1 + max((int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))), default=-1)
    if not blocks:
        raise KeyError("blocks.0.attn.qkv.weight")
    of_width = [weights[f"blocks.{i}.attn.qkv.weight"].shape[1] == width for i in range(blocks)]
    swiglu = "blocks.0.mlp.w3.weight" in weights
    hidden = weights["blocks.0.mlp.w3.weight"].shape[1] if swiglu else weights["blocks.0.mlp.fc1.weight"].shape[0]
    arguments: dict[str, Any] = {
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": (width, head) if wide else width,
        "mlp_ratio": _mlp_ratio(width, hidden, swiglu),
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "swiglu": swiglu,
        "rms_norm": "blocks.0.norm1.weight" in weights,
        "adaln_shift": weights["blocks.0.adaLN_modulation.1.weight"].shape[0] == 6 * width,
    }
    if not wide:
        fourier = "t_embedder.W" in weights  # only RAE's have these, and their time runs the other way
        arguments |= {"depth": blocks, "time_embed": "fourier" if fourier else "sinusoidal", "reversed_time": fourier}
        arguments["learn_sigma"] = weights["final_layer.linear.weight"].shape[0] == 2 * patch**2 * channels
    elif width != head:
        arguments["depth"] = (sum(of_width), blocks - sum(of_width))
    ropes = [f"{part}feat_rope.freqs_cos" for part in (("enc_", "dec_") if wide else ("",))]
    if any(name in tables for name in ropes):
        arguments["rope"] = True
        if wide:
            arguments["pos_embed"] = "pos_embed" in tables
    elif not swiglu and not arguments["rms_norm"]:
        arguments["rope"] = False  # the plain form; of the others the table may have been left out
    if heads := _heads(weights, tables, arguments, ropes):
        arguments["num_heads"] = heads
    return arguments


def _mlp_ratio(width: int, hidden: int, swiglu: bool) -> float:
    """A ratio with which a block of this width has `hidden` features in its perceptron."""
    tried = [4.0, hidden / width, *((math.ceil(1.5 * hidden) + more) / width for more in (0, 1))]
    return next((ratio for ratio in tried if features(width, ratio, swiglu) == hidden), hidden / width)


def features(width: int, mlp_ratio: float, swiglu: bool) -> int:
    """Hidden features of a block's perceptron, as `transformer.Block` counts them."""
    hidden = int(width * mlp_ratio)
    return int(2 / 3 * hidden) if swiglu else hidden


def _heads(
    weights: Mapping[str, Tensor], tables: Mapping[str, Tensor], arguments: Mapping[str, Any], ropes: list[str]
) -> Any:
    """Heads, two numbers for a wide head; None where nothing tells them."""
    widths = arguments["hidden_size"] if len(ropes) == 2 else (arguments["hidden_size"],)
    if all(name in tables for name in ropes):
        of_a_head = [tables[name].shape[-1] for name in ropes]
    elif arguments["qk_norm"] and "depth" in arguments:
        firsts = (0, arguments["depth"][0]) if len(ropes) == 2 else (0,)
        of_a_head = [len(weights[f"blocks.{i}.attn.q_norm.weight"]) for i in firsts]
    else:
        for size in (DDT_SIZES if len(ropes) == 2 else DiT_SIZES).values():
            if all(size[name] == arguments.get(name) for name in ("hidden_size", "depth")):
                return size["num_heads"]
        return None
    heads = tuple(width // dim for width, dim in zip(widths, of_a_head, strict=True))
    return heads if len(ropes) == 2 else heads[0]
