"""Weights that a denoiser's training can go on from: those of a training here, and published ones."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vavae_tools.checkpoints.foreign import plain_name
from vavae_tools.checkpoints.formats import read_any_format
from vavae_tools.diffusion.dit import DDT_SIZES, DiT_SIZES
from vavae_tools.diffusion.lora import merged_weights
from vavae_tools.pipelines.base import read_pipeline
from vavae_tools.pipelines.classes import LatentDiTPipeline
from vavae_tools.published.denoisers import TABLES
from vavae_tools.runtime.errors import UserError, join_first
from vavae_tools.runtime.files import read_checkpoint, read_safetensors

KINDS = {"lightningdit": "LightningDiT", "ddt": "DiT with the wide head", "dit": "DiT"}


@dataclass(frozen=True)
class StartingWeights:
    """Weights to go on from, under our names."""

    source: Path
    kind: str
    arguments: dict[str, Any]  # of `make_denoiser`, as far as the file tells them
    denoiser: dict[str, Tensor]
    table: Tensor  # (K, D), one row for each class
    null: Tensor | None  # (D,), the row that means any class
    classes: dict[str, int] = field(default_factory=dict)  # name → label, where they are known
    tables: dict[str, Tensor] = field(default_factory=dict)  # fixed ones in the file, which our constructors compute
    left: tuple[str, ...] = ()  # names of what else is there


def read_starting_weights(source: str | Path, kind: str | None = None) -> StartingWeights:
    """Read weights to go on from.

    Args:
        source: a pipeline's folder from here, a `.ckpt`, `.pth` or checkpoint folder of DiT training here (the averaged
            weights are taken), or published weights, `.pt` or `.safetensors`, bare or under "ema" or "model".
        kind: of published weights; None: seen in their names and shapes.
    """
    source = Path(source)
    if kind is not None and kind not in KINDS:
        raise UserError(f"No weights of kind {kind!r}; there are {', '.join(KINDS)}, and null: seen in them")
    if (source / "model_index.json").is_file():
        pipe = read_pipeline(LatentDiTPipeline, source, ema=True, vae=None)
        parts = nn.ModuleDict({"denoiser": pipe.denoiser, "conditioner": pipe.conditioner})
        return _own(source, parts.state_dict(), pipe.denoiser.config, pipe.conditioner.config, pipe.config.people)
    if source.is_dir() and not (source / "model.pt").is_file():
        inside = [name for name in ("pipeline", "checkpoints/last.ckpt") if (source / name).exists()]
        hint = f"name {source / inside[0]}" if inside else "name a pipeline/, a .ckpt or published weights"
        raise UserError(f"{source} holds no weights to go on from: {hint}")
    if source.suffix == ".safetensors":
        return _published(source, read_safetensors(source), kind)
    saved = {} if source.is_dir() else read_checkpoint(source)
    if source.is_dir() or isinstance(saved.get("trainer"), dict):
        saved = read_any_format(source, lambda line: None)
    settings = saved.get("hyper_parameters")
    if not isinstance(settings, Mapping) or "denoiser_config" not in settings:
        return _published(source, saved, kind)
    weights = saved["state_dict"]
    begin = "ema.network." if any(name.startswith("ema.network.") for name in weights) else "network."
    left = tuple(name for name in weights if not name.startswith(begin))
    configs = settings["denoiser_config"], settings["conditioner_config"]
    return _own(source, _below(begin, weights), *configs, settings.get("people"), settings.get("lora"), left)


def _below(begin: str, weights: Mapping[str, Any]) -> dict[str, Any]:
    return {name.removeprefix(begin): value for name, value in weights.items() if name.startswith(begin)}


def _own(
    source: Path,
    weights: Mapping[str, Tensor],
    of_denoiser: Mapping[str, Any],
    of_conditioner: Mapping[str, Any],
    people: Mapping[str, int] | None,
    lora: Mapping[str, Any] | None = None,
    left: tuple[str, ...] = (),
) -> StartingWeights:
    denoiser, number = _below("denoiser.", weights), of_conditioner["num_classes"]
    if not denoiser:
        raise UserError(f"{source} holds no denoiser: expected network.denoiser.* in its state_dict")
    arguments = {name: value for name, value in of_denoiser.items() if not name.startswith("_")}
    kind = "ddt" if "s_embedder.proj.weight" in denoiser else "lightningdit"
    if kind == "lightningdit":  # what older configurations leave out
        arguments = {"time_embed": "sinusoidal", "reversed_time": False, **arguments}
    rows, denoiser = weights["conditioner.embedding_table.weight"], merged_weights(denoiser, lora)
    null = rows[number] if len(rows) > number else None
    return StartingWeights(source, kind, arguments, denoiser, rows[:number], null, dict(people or {}), left=left)


# ---- published weights


PARTS = re.compile(r"([xst]_embedder|s_projector|blocks|final_layer)\.")
"""What a denoiser's tensors are named by; others in a file are left."""


def _published(source: Path, saved: Mapping[str, Any], kind: str | None) -> StartingWeights:
    left: list[str] = []
    parts = ("ema", "ema_model", "state_dict", "model")
    while part := next((part for part in parts if isinstance(saved.get(part), Mapping) and saved[part]), None):
        left += [str(name) for name in saved if name != part]
        saved = saved[part]
    named = {plain_name(str(name)): tensor for name, tensor in saved.items()}
    first, of_classes = "x_embedder.proj.weight", "y_embedder.embedding_table.weight"
    # a training's checkpoint may hold the live weights and their average side by side
    begins = [name.removesuffix(first) for name in named if f".{name}".endswith(f".{first}")]
    begin = min(begins, key=lambda begin: ("ema" not in begin, len(begin)), default="")
    weights = _below(begin, named)
    left += [name for name in named if not name.startswith(begin)]
    if first not in weights or of_classes not in weights:
        held = f"{source} is no denoiser with classes: it holds {join_first(sorted(named), 5) or 'nothing'}"
        raise UserError(f"{held}, expected {first} and {of_classes} as in LightningDiT's, RAE's or DiT's weights")
    rows = weights.pop(of_classes)  # all that are published have the null row, the last one
    tables = {name: weights.pop(name) for name in list(weights) if name.startswith(TABLES)}
    others = [name for name, value in weights.items() if not (isinstance(value, Tensor) and PARTS.match(name))]
    left += [begin + name for name in others if weights.pop(name) is not None]
    try:
        arguments = arguments_of(weights, tables)
    except (KeyError, ValueError) as error:
        raise UserError(f"{source} is not whole, or no denoiser that is known here ({error})") from None
    kind = _kind_of(source, arguments, kind)
    return StartingWeights(source, kind, arguments, weights, rows[:-1], rows[-1], {}, tables, tuple(left))


def _kind_of(source: Path, arguments: Mapping[str, Any], kind: str | None) -> str:
    plain = not arguments["swiglu"] and not arguments["rms_norm"] and arguments.get("learn_sigma")
    seen = "dit" if plain and arguments["time_embed"] == "sinusoidal" else "lightningdit"
    if isinstance(arguments["hidden_size"], tuple):
        seen = "ddt"
    if kind is None and seen == "dit":
        kinds = "noise at timesteps 0 … 999, as DiT's (init.kind=dit), or velocities, as SiT's (init.kind=lightningdit)"
        raise UserError(f"{source} has the form of DiT's weights, and names do not tell what they predict: {kinds}")
    if kind in (None, seen) or (kind == "lightningdit" and seen == "dit"):
        return kind or seen
    raise UserError(f"{source} is a {KINDS[seen]} by its names, not a {KINDS[kind]}: set init.kind={seen}")


def arguments_of(weights: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a denoiser's arguments, under our names, as far as its weights' names and shapes tell them.

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
    """Return a ratio with which a block of this width has `hidden` features in its perceptron."""
    tried = [4.0, hidden / width, *((math.ceil(1.5 * hidden) + more) / width for more in (0, 1))]
    return next((ratio for ratio in tried if features(width, ratio, swiglu) == hidden), hidden / width)


def features(width: int, mlp_ratio: float, swiglu: bool) -> int:
    """Return the hidden features of a block's perceptron, as `layers.Block` counts them."""
    hidden = int(width * mlp_ratio)
    return int(2 / 3 * hidden) if swiglu else hidden


def _heads(
    weights: Mapping[str, Tensor], tables: Mapping[str, Tensor], arguments: Mapping[str, Any], ropes: list[str]
) -> Any:
    """Return the heads, two numbers for a wide head, by the rotary table, the queries' norm, or a published size."""
    wide = len(ropes) == 2
    if all(name in tables for name in ropes):
        of_a_head = [tables[name].shape[-1] for name in ropes]
    elif arguments["qk_norm"] and "depth" in arguments:
        firsts = (0, arguments["depth"][0]) if wide else (0,)
        of_a_head = [len(weights[f"blocks.{i}.attn.q_norm.weight"]) for i in firsts]
    else:
        sizes = (DDT_SIZES if wide else DiT_SIZES).values()
        form = arguments["hidden_size"], arguments.get("depth")
        return next((size["num_heads"] for size in sizes if (size["hidden_size"], size["depth"]) == form), None)
    widths = arguments["hidden_size"] if wide else (arguments["hidden_size"],)
    heads = tuple(width // dim for width, dim in zip(widths, of_a_head, strict=True))
    return heads if wide else heads[0]
