"""LightningDiT, RAE's LightningDiT and DiT^DH, and DiT as published → our denoisers, called as the reference's are."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vavae_tools.checkpoints.foreign import find_weights
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DDT, DDT_SIZES, DiT, DiT_SIZES, make_denoiser, split_reference_arguments
from vavae_tools.diffusion.layers import rope_table, sincos_table
from vavae_tools.diffusion.objectives import expand_time
from vavae_tools.runtime.errors import UserError, join_first
from vavae_tools.runtime.files import load_weights, read_saved

TABLES = ("pos_embed", "feat_rope.", "enc_feat_rope.", "dec_feat_rope.")  # fixed, computed by our constructors

Interval = tuple[float, float]
Intervals = Sequence[Interval] | Interval


class PublishedDenoiser(nn.Module):
    """A denoiser and a conditioner as one model: x (B, C, h, w), t (B,), labels y (B,) → what the network predicts.

    Time and sign are the reference's; LightningDiT's are a velocity and t = 1 at data. Batches of `forward_with_cfg`
    are [conditional | null], of the first half's x, and so are its answers: [guided | guided].
    """

    def __init__(self, denoiser: DiT | DDT, conditioner: ClassConditioner) -> None:
        super().__init__()
        self.denoiser, self.conditioner = denoiser, conditioner

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.denoiser.predict(x, t, self.conditioner(y))[:, : self.denoiser.in_channels]


class PlainDiT(PublishedDenoiser):
    """DiT's: timesteps 0 … 999, noise and variance predicted, (B, 2·C, h, w); (B, C, h, w) without learn_sigma."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.denoiser.predict(x, t, self.conditioner(y))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Guide three channels only."""
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        conditional, null = out[:, :3].chunk(2)
        guided = null + cfg_scale * (conditional - null)
        return torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)


class RAELightningDiT(PublishedDenoiser):
    """RAE's: t is the share of noise, the answer noise − data.

    Its guidance takes a list of intervals *in* which another scale holds (`interval_cfg`; up to 1: none), t[0] deciding
    for the batch. One interval (min, max), which RAE's sampling passes and its model cannot take, is that of DiT^DH:
    guidance is for the times inside.
    """

    autoguides_half = True

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, cfg_interval: Intervals = (), interval_cfg: float = 0.0
    ) -> Tensor:
        half = x[: len(x) // 2]
        conditional, null = self(torch.cat([half, half]), t, y).chunk(2)
        guided = _guided(conditional, null, t[: len(half)], cfg_scale, cfg_interval, interval_cfg)
        return torch.cat([guided, guided])

    def forward_with_autoguidance(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        additional_model_forward: Callable[..., Tensor],
        cfg_interval: Intervals = (),
        interval_cfg: float = 0.0,
    ) -> Tensor:
        """Return [guided | guided] for the first half of the batch, of DiT^DH the whole batch guided."""
        if self.autoguides_half:
            x, t, y = (part[: len(x) // 2] for part in (x, t, y))
        weak = additional_model_forward(x, t, y)[:, : self.denoiser.in_channels]
        guided = _guided(self(x, t, y), weak, t, cfg_scale, cfg_interval, interval_cfg)
        return torch.cat([guided, guided]) if self.autoguides_half else guided


class DiTDH(RAELightningDiT):
    """DiT^DH's, in the same convention, with autoguidance (Karras et al. 2024) of the whole batch."""

    autoguides_half = False

    def forward(self, x: Tensor, t: Tensor, y: Tensor, s: Tensor | None = None) -> Tensor:
        """With the encoder's answer s (B, N, D) only the head is computed."""
        return self.denoiser.predict(x, t, self.conditioner(y), s)


def _guided(strong: Tensor, weak: Tensor, t: Tensor, scale: float, interval: Intervals, inside: float) -> Tensor:
    """Return weak + scale · (strong − weak), or `strong` where there is no guidance; see `RAELightningDiT`."""
    if len(interval) == 2 and not isinstance(interval[0], Sequence):
        start, end = interval
        if not start < end:
            raise UserError(f"cfg_interval is ({start:g}, {end:g}), expected (min, max) with min < max.")
        return torch.where(expand_time((t >= start) & (t <= end), strong), weak + scale * (strong - weak), strong)
    if any(start <= t[0] < end for start, end in interval):
        scale = max(inside, 1.0)
    return weak + scale * (strong - weak) if scale != 1 else strong


# ---- weights
_XL = DiT_SIZES["XL"]
_PLAIN = {"swiglu": False, "rope": False, "rms_norm": False}
DENOISERS: dict[str, tuple[type[PublishedDenoiser], dict[str, Any]]] = {
    "lightningdit": (PublishedDenoiser, {"input_size": 32, "patch_size": 2, **_XL, **_PLAIN}),
    "rae_lightningdit": (RAELightningDiT, {"in_channels": 768, **_XL, "time_embed": "fourier", "reversed_time": True}),
    "ddt": (DiTDH, {"input_size": 1, **DDT_SIZES["XL"]}),
    "dit": (PlainDiT, {"input_size": 32, "patch_size": 2, "in_channels": 4, **_XL, **_PLAIN, "learn_sigma": True}),
}
"""Kind → its model, and the constructor's defaults of the reference where they are not ours."""


def load_denoiser(kind: str, state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> PublishedDenoiser:
    """Return one of `DENOISERS` in eval mode; RAE's LightningDiT is known by its random frequencies of time."""
    found = find_weights(state_dict, r"x_embedder\.proj\.weight", "state_dict")
    weights = found.weights if found else state_dict
    if kind == "lightningdit" and "t_embedder.W" in weights:
        kind = "rae_lightningdit"
    made, defaults = DENOISERS[kind]
    denoiser, conditioner = split_reference_arguments({**defaults, **config})
    model = made(make_denoiser(denoiser), ClassConditioner(**conditioner))
    for part, of_part in zip((model.denoiser, model.conditioner), split_state_dict(weights), strict=True):
        load_weights(part, of_part, "The state_dict")
    # The published table is the one that ours computes; another is honoured here, though `save_pretrained` keeps none.
    ours = model.denoiser.enc_pos_embed if kind == "ddt" else model.denoiser.pos_embed
    if "pos_embed" in weights:
        found, expected = tuple(weights["pos_embed"].shape), None if ours is None else tuple(ours.shape)
        if found != expected:
            arguments = "use_pos_embed, input_size, patch_size and hidden_size"
            raise UserError(f"pos_embed is {found} in these weights, {expected} by {arguments}.")
        ours.copy_(weights["pos_embed"])
    return model.eval()


def split_state_dict(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of the denoiser and of `ClassConditioner`; the fixed tables are left out."""
    denoiser, conditioner = {}, {}
    for name, tensor in weights.items():
        if name.startswith("y_embedder."):
            conditioner[name.removeprefix("y_embedder.")] = tensor
        elif not name.startswith(TABLES):
            denoiser[name] = tensor
    return denoiser, conditioner


# ---- weights to start from
KINDS = {"lightningdit": "LightningDiT", "ddt": "DiT with the wide head", "dit": "DiT"}


class StartingWeights(NamedTuple):
    """Weights to start from, under our names."""

    source: Path
    kind: str
    arguments: Mapping[str, Any]  # of `make_denoiser`, as far as the file tells them
    denoiser: dict[str, Tensor]
    table: Tensor  # (K, D), one row for each class
    null: Tensor | None  # (D,), the row that means any class
    classes: Mapping[str, int]  # name → label, where they are known
    left: str = ""  # what else is there


PARTS = re.compile(r"([xst]_embedder|s_projector|blocks|final_layer)\.")  # others in a file are left


def read_published(source: Path, saved: Mapping[str, Any], kind: str | None = None) -> StartingWeights:
    """Sort what a file holds, and tell by names and shapes what it is of."""
    first, of_classes = "x_embedder.proj.weight", "y_embedder.embedding_table.weight"
    inside, others, _ = find_weights(saved, re.escape(first), source) or ({}, saved, "")
    if of_classes not in inside:
        held = join_first(sorted(map(str, inside or others)), 5) or "nothing"
        expected = f"expected {first} and {of_classes} as in LightningDiT's, RAE's or DiT's weights"
        raise UserError(f"{source} is no denoiser with classes: it holds {held}, {expected}")
    tables = {name: value for name, value in inside.items() if name.startswith(TABLES)}
    weights = {name: value for name, value in inside.items() if isinstance(value, Tensor) and PARTS.match(name)}
    left = [name for name in inside if name not in {*weights, *tables, of_classes}]
    left += dict.fromkeys(name.split(".")[0] for name in others)
    try:
        arguments = _arguments_of(weights, tables)
    except (KeyError, ValueError) as error:
        raise UserError(f"{source} is not whole, or no denoiser that is known here ({error})") from None
    kind, rows = _kind_of(source, arguments, kind), inside[of_classes]  # which all have the null row, the last one
    not_loaded = [f"{', '.join(tables)} (computed here)"] * bool(tables) + [join_first(sorted(left), 5)] * bool(left)
    not_loaded += [
        f"{name} is another (by up to {apart:.2g}) than is computed here and holds: weights start farther off"
        for name, table in tables.items()
        if table.ndim > 1 and (apart := _apart(name, table)) > 0.02  # half precision makes less
    ]
    return StartingWeights(source, kind, arguments, weights, rows[:-1], rows[-1], {}, ", ".join(not_loaded))


def _apart(name: str, table: Tensor) -> float:
    """Return how far a table of positions is from the one that is computed here, but for signs."""
    table, side = table.float().squeeze(0), math.isqrt(table.shape[-2])  # (N, D)
    if name == "pos_embed":
        computed = sincos_table(side, side, table.shape[-1])
    else:
        computed = rope_table(side, side, table.shape[-1])[int(name.endswith("sin"))]
    return (table.abs() - computed.abs()).abs().max().item() if table.shape == computed.shape else math.inf


def _kind_of(source: Path, arguments: Mapping[str, Any], kind: str | None) -> str:
    plain = not arguments["swiglu"] and not arguments["rms_norm"] and arguments.get("learn_sigma")
    seen = "dit" if plain and arguments["time_embed"] == "sinusoidal" else "lightningdit"
    if isinstance(arguments["hidden_size"], tuple):
        seen = "ddt"
    if kind is None and seen == "dit":
        kinds = "noise at timesteps 0 … 999, as DiT's (init.kind=dit), or velocities, as SiT's (init.kind=lightningdit)"
        raise UserError(f"{source} has the form of DiT's weights, and names do not tell what they predict: {kinds}")
    return kind if kind == "lightningdit" and seen == "dit" else seen


def _arguments_of(weights: Mapping[str, Tensor], tables: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a denoiser's arguments, under our names, as far as names and shapes tell; KeyError or ValueError: none."""
    wide = "s_embedder.proj.weight" in weights
    head, channels, patch, _ = weights["x_embedder.proj.weight"].shape  # (D, C, p, p)
    width = weights["s_embedder.proj.weight"].shape[0] if wide else head
    blocks = {int(found[1]) for name in weights if (found := re.match(r"blocks\.(\d+)\.", name))}
    narrow = sum(weights[f"blocks.{i}.attn.qkv.weight"].shape[1] == width for i in blocks)
    swiglu, rms_norm = "blocks.0.mlp.w3.weight" in weights, "blocks.0.norm1.weight" in weights
    arguments: dict[str, Any] = {
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": (width, head) if wide else width,
        "depth": (narrow, len(blocks) - narrow) if wide else len(blocks),
        "qk_norm": "blocks.0.attn.q_norm.weight" in weights,
        "swiglu": swiglu,
        "rms_norm": rms_norm,
        "adaln_shift": weights["blocks.0.adaLN_modulation.1.weight"].shape[0] == 6 * width,
    }
    if not wide:
        fourier = "t_embedder.W" in weights  # only RAE's have these, and their time runs the other way
        arguments |= {"time_embed": "fourier", "reversed_time": True} if fourier else {"time_embed": "sinusoidal"}
        arguments["learn_sigma"] = weights["final_layer.linear.weight"].shape[0] == 2 * patch**2 * channels
    elif width == head:
        del arguments["depth"]  # which of the blocks are the head's cannot be seen
    ropes = [f"{part}feat_rope.freqs_cos" for part in (("enc_", "dec_") if wide else ("",))]
    if all(name in tables for name in ropes):
        widths = (width, head) if wide else (width,)
        heads = tuple(size // tables[name].shape[-1] for size, name in zip(widths, ropes, strict=True))
        arguments |= {"rope": True, "num_heads": heads if wide else heads[0]}
        arguments |= {"pos_embed": "pos_embed" in tables} if wide else {}
        return arguments
    if not swiglu and not rms_norm:
        arguments["rope"] = False  # the plain form; of the others the table may have been left out
    form = arguments["hidden_size"], arguments.get("depth")
    sizes = (DDT_SIZES if wide else DiT_SIZES).values()
    heads = next((size["num_heads"] for size in sizes if (size["hidden_size"], size["depth"]) == form), None)
    return arguments if heads is None else {**arguments, "num_heads": heads}


def read_latent_statistics(path: str | Path) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each latent channel, from LightningDiT's `latents_stats.pt` {mean, std}."""
    saved = read_saved(path)
    tensors = {k: v for k, v in saved.items() if isinstance(v, Tensor)} if isinstance(saved, Mapping) else {}
    mean, std = tensors.get("mean"), tensors.get("std")
    if mean is None or std is None or not mean.shape == std.shape == (1, mean.numel(), 1, 1):
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()) or "no tensors"
        raise UserError(f"{path} holds {found}, expected mean and std, each (1, channels, 1, 1), of latents_stats.pt.")
    mean, std = mean.flatten(), std.flatten()
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise UserError(f"{path} has numbers that are not finite or a std of 0 in it: make the statistics again.")
    return mean.tolist(), std.tolist()
