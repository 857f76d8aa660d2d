"""The reference's autoencoder (LDM, VA-VAE) and diffusers' AutoencoderKL: one network, two ways to name its parts."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vavae_tools.autoencoders.vavae import block_types
from vavae_tools.runtime.errors import UserError, join_first

PARTS = (  # the reference's name ↔ diffusers' name; # is a number, the same in both
    (".down.#.block.#.", ".down_blocks.#.resnets.#."),
    (".down.#.attn.#.", ".down_blocks.#.attentions.#."),
    (".down.#.downsample.", ".down_blocks.#.downsamplers.0."),
    (".up.#.block.#.", ".up_blocks.#.resnets.#."),
    (".up.#.attn.#.", ".up_blocks.#.attentions.#."),
    (".up.#.upsample.", ".up_blocks.#.upsamplers.0."),
    (".mid.block_1.", ".mid_block.resnets.0."),
    (".mid.attn_1.", ".mid_block.attentions.0."),
    (".mid.block_2.", ".mid_block.resnets.1."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm_out.", ".conv_norm_out."),
    (".norm.", ".group_norm."),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".proj_out.", ".to_out.0."),
)
HALVES = "encoder.down", "decoder.up"
VAE_PREFIXES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
GROUPS = 32
FIXED = {
    **{"double_z": True, "resamp_with_conv": True, "use_linear_attn": False, "attn_type": ("vanilla", "none")},
    **{"tanh_out": False, "give_pre_end": False, "use_3d_conv": False},
}
"""What of `ddconfig` leaves no trace in the weights, and AutoencoderKL has in these ways only."""
ATTENTION = re.compile(r"\.(?:q|k|v|proj_out|to_q|to_k|to_v|to_out\.0)\.weight$")


# ---- names
def from_reference(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the autoencoder's weights under diffusers' names; other weights are left out.

    Attention's 1×1 convolutions (C, C, 1, 1) become linear layers (C, C).
    """
    weights = _renamed(state_dict, 1)
    convolutions = [name for name, w in weights.items() if ATTENTION.search(name) and w.shape[2:] == (1, 1)]
    return weights | {name: weights[name][:, :, 0, 0] for name in convolutions}


def to_reference(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the exact inverse of `from_reference`; vectors and their projections are left out."""
    weights = _renamed(state_dict, -1)
    return {name: tensor[:, :, None, None] if ATTENTION.search(name) else tensor for name, tensor in weights.items()}


def current_name(name: str) -> str:
    """Return attention's name in AutoencoderKL now, of a former one."""
    now = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(rf"(?<=\.attentions\.0\.)({'|'.join(now)})(?=\.)", lambda found: now[found[1]], name)


def _renamed(state_dict: Mapping[str, Tensor], direction: int) -> dict[str, Tensor]:
    """Rename by PARTS: 1 from left to right, −1 from right to left."""
    rules = []
    for old, new in (pair[::direction] for pair in PARTS):
        first, *others = new.split("#")
        new = first + "".join(rf"\{number}{part}" for number, part in enumerate(others, 1))
        rules.append((re.compile(re.escape(old).replace(r"\#", r"(\d+)")), new))
    weights = {}
    for name, tensor in state_dict.items():
        if name.startswith(VAE_PREFIXES):
            for old, new in rules:
                name = old.sub(new, name)
            weights[name] = tensor
    # the decoder's levels count from the other end: up.0 is the finest, up_blocks.0 the coarsest
    level = re.compile(r"^(decoder\.up(?:_blocks)?\.)(\d+)(?=\.)")
    last = max((int(found[2]) for found in map(level.match, weights) if found), default=0)
    return {level.sub(lambda found: f"{found[1]}{last - int(found[2])}", name): w for name, w in weights.items()}


# ---- configurations
def vavae_arguments(
    weights: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, source: str | Path = "state_dict"
) -> dict[str, Any]:
    """Return VAVAE's arguments, told by the names and shapes of weights under the reference's names.

    Args:
        config: the reference's {"ddconfig": {…}}, for what leaves no trace in the weights: the nominal resolution, by
            default the published 256, and `FIXED`.
        source: what messages call the weights.
    """

    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            held = f"among its {len(weights)} entries ({join_first(weights) or 'none'})"
            what = f"{source} is no checkpoint of VA-VAE training and no published VA-VAE"
            raise UserError(f"{what}: it has no {name} {held}")
        return tuple(weights[name].shape)

    ddconfig = (config or {}).get("ddconfig") or {}
    for name, only in FIXED.items():
        known = only if isinstance(only, tuple) else (only,)
        if ddconfig.get(name, known[0]) not in known:
            expected = " or ".join(map(repr, known))
            raise UserError(f"{source}: {name} is {ddconfig[name]!r}, and AutoencoderKL has only {expected}")
    in_channels, levels = shape("encoder.conv_in.weight")[1], range(_count(weights, r"encoder\.down\.(\d+)\."))
    widths = tuple(shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in levels)
    if not widths or any(width % GROUPS for width in widths):
        raise UserError(f"{source}: levels of {list(widths)} channels, expected multiples of {GROUPS}, for its norms")
    with_quant = any("quant_conv" in name for name in weights)  # both or none; if one is missing, that is said
    return {
        "in_channels": in_channels,
        "out_channels": shape("decoder.conv_out.weight")[0],
        **block_types(*([f"{half}.{level}.attn.0.q.weight" in weights for level in levels] for half in HALVES)),
        "block_out_channels": widths,
        "layers_per_block": _count(weights, r"encoder\.down\.0\.block\.(\d+)\.conv1\.w"),
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "norm_num_groups": GROUPS,
        "sample_size": ddconfig.get("resolution", 256),
        "mid_block_add_attention": "encoder.mid.attn_1.q.weight" in weights,
        **({} if with_quant else {"use_quant_conv": False, "use_post_quant_conv": False}),
    }


def _count(names: Iterable[str], pattern: str) -> int:
    """Return how many numbers stand at the pattern's group."""
    return len({found[1] for found in map(re.compile(pattern).match, names) if found})


def reference_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the reference's {"ddconfig": {…}, "embed_dim": …} of VAVAE's arguments (its config)."""
    widths, mid = tuple(arguments["block_out_channels"]), arguments.get("mid_block_add_attention", True)
    down, up = ([kind[:4] == "Attn" for kind in arguments[f"{half}_block_types"]] for half in ("down", "up"))
    fixed = {"norm_num_groups": GROUPS, "act_fn": "silu", "use_quant_conv": True, "use_post_quant_conv": True}
    for name, only in fixed.items():
        if arguments.get(name, only) != only:
            raise UserError(f"{name}={arguments[name]!r}: the reference has no such network, only {name}={only!r}")
    if any(width % widths[0] or width % GROUPS for width in widths) or down != up[::-1] or (any(down) and not mid):
        needed = f"multiples of the first and of {GROUPS}, attention at the same levels in both halves"
        given = f"block_out_channels={list(widths)}: the reference needs {needed}"
        raise UserError(f"{given}, and in the middle where it has any")
    factor = 2 ** (len(widths) - 1)
    resolution = -(-arguments["sample_size"] // factor) * factor  # nominal: each level's own must be a whole number
    ddconfig = {
        **{"double_z": True, "z_channels": arguments["latent_channels"], "resolution": resolution},
        **{"in_channels": arguments["in_channels"], "out_ch": arguments["out_channels"], "ch": widths[0]},
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": arguments["layers_per_block"],
        "attn_resolutions": [resolution // 2**level for level, here in enumerate(down) if here],
        "dropout": 0.0,
        **({} if mid else {"attn_type": "none"}),
    }
    return {"ddconfig": ddconfig, "embed_dim": arguments["latent_channels"]}
