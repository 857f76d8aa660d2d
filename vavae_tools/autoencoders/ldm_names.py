"""The reference's autoencoder (LDM, VA-VAE) and diffusers' AutoencoderKL: one network, two ways to name its parts."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vavae_tools.runtime.errors import UserError

PARTS = (  # the reference's name ↔ diffusers' name; # is a number, the same in both
    (".down.#.block.#.", ".down_blocks.#.resnets.#."),
    (".down.#.attn.#.", ".down_blocks.#.attentions.#."),
    (".down.#.downsample.", ".down_blocks.#.downsamplers.0."),
    (".up.#.block.#.", ".up_blocks.#.resnets.#."),  # but the reference counts from the finest level, see `_turned`
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
VAE = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
"""What the names of the autoencoder's own weights begin with, in both."""

NEEDED = ("ch", "ch_mult", "num_res_blocks", "attn_resolutions", "in_channels", "out_ch", "resolution", "z_channels")
FIXED = {"double_z": True, "resamp_with_conv": True, "use_linear_attn": False, "tanh_out": False, "give_pre_end": False}
"""Arguments of `ddconfig` that AutoencoderKL has in one way only."""
OF_TRAINING = {
    *("lossconfig", "ckpt_path", "ignore_keys", "image_key", "colorize_nlabels", "monitor"),
    *("use_vf", "reverse_proj", "proj_fix"),
}
"""Arguments beside `ddconfig` and `embed_dim` that do not change the autoencoder."""
GROUPS = 32
PUBLISHED_RESOLUTION = 256

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod)\.")  # of DDP and torch.compile
ATTENTION = re.compile(r"\.(?:q|k|v|proj_out|to_q|to_k|to_v|to_out\.0)\.weight$")


# ---- names
def plain_names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict, or the one in a checkpoint under "state_dict", without the prefixes of DDP and torch.compile."""
    inner = state_dict.get("state_dict")
    return {WRAPPERS.sub("", str(k)): v for k, v in (inner if isinstance(inner, Mapping) else state_dict).items()}


def from_reference(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's weights under the reference's names → under diffusers'; other weights are left out.

    Attention's 1×1 convolutions (C, C, 1, 1) become linear layers (C, C).
    """
    weights = {}
    for name, tensor in _renamed(state_dict, _FROM).items():
        linear = ATTENTION.search(name) and tensor.shape[2:] == (1, 1)
        weights[name] = tensor[:, :, 0, 0] if linear else tensor
    return weights


def to_reference(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The exact inverse of `from_reference`; vectors and their projections are left out."""
    weights = _renamed(state_dict, _TO)
    return {name: tensor[:, :, None, None] if ATTENTION.search(name) else tensor for name, tensor in weights.items()}


def _rules(columns: int) -> list[tuple[re.Pattern[str], str]]:
    """PARTS as substitutions: 1 from left to right, −1 from right to left."""
    rules = []
    for old, new in (pair[::columns] for pair in PARTS):
        numbers = iter((r"\1", r"\2"))
        new = re.sub("#", lambda _, numbers=numbers: next(numbers), new)
        rules.append((re.compile(re.escape(old).replace(r"\#", r"(\d+)")), new))
    return rules


_FROM, _TO = _rules(1), _rules(-1)


def _renamed(state_dict: Mapping[str, Tensor], rules: list[tuple[re.Pattern[str], str]]) -> dict[str, Tensor]:
    weights = {}
    for name, tensor in state_dict.items():
        if name.startswith(VAE):
            for old, new in rules:
                name = old.sub(new, name)
            weights[name] = tensor
    return _turned(weights)


def _turned(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The decoder's levels counted from the other end: up.0 is the finest level, up_blocks.0 the coarsest."""
    level = re.compile(r"^(decoder\.up(?:_blocks)?\.)(\d+)(?=\.)")
    last = max((int(found[2]) for found in map(level.match, weights) if found), default=0)
    return {level.sub(lambda found: f"{found[1]}{last - int(found[2])}", name): w for name, w in weights.items()}


# ---- configurations
def vavae_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """The reference's {"ddconfig": {…}, "embed_dim": …} → VAVAE's arguments.

    Raises:
        UserError: an argument that is missing or unknown, or that AutoencoderKL cannot represent.
    """
    ddconfig = dict(config.get("ddconfig") or {})
    _check_names("The configuration", config, ("ddconfig", "embed_dim"), OF_TRAINING)
    _check_names("ddconfig", ddconfig, NEEDED, {*FIXED, "dropout", "attn_type"})
    for name, only in FIXED.items():
        if ddconfig.get(name, only) != only:
            raise UserError(f"{name}={ddconfig[name]!r}: AutoencoderKL has no such network, only {name}={only!r}")
    attention = ddconfig.get("attn_type", "vanilla")
    if attention not in ("vanilla", "none"):
        raise UserError(f"attn_type={attention!r}: AutoencoderKL has attention of type 'vanilla' or 'none'")
    if config["embed_dim"] != ddconfig["z_channels"]:
        raise UserError(
            f"embed_dim={config['embed_dim']} and z_channels={ddconfig['z_channels']} differ: AutoencoderKL has one "
            "number of latent channels for both"
        )
    ch, multiples = ddconfig["ch"], tuple(ddconfig["ch_mult"])
    if ch < 1 or ch % GROUPS:
        raise UserError(f"ch={ch}: it must be divisible by {GROUPS}, the number of groups that are normalised")
    if not multiples or multiples[0] != 1 or any(m < 1 or int(m) != m for m in multiples):
        raise UserError(f"ch_mult={list(multiples)}: AutoencoderKL needs whole numbers, the first of them 1")
    levels, resolution = len(multiples), ddconfig["resolution"]
    at = set(ddconfig["attn_resolutions"]) if attention == "vanilla" else set()
    # by the nominal resolution, whatever the pictures' size; halving rounds, so the decoder counts on its own
    down = [resolution // 2**level in at for level in range(levels)]
    up = [resolution // 2 ** (levels - 1) * 2**level in at for level in range(levels)]
    return {
        "in_channels": ddconfig["in_channels"],
        "out_channels": ddconfig["out_ch"],
        "down_block_types": tuple("AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in down),
        "up_block_types": tuple("AttnUpDecoderBlock2D" if here else "UpDecoderBlock2D" for here in up),
        "block_out_channels": tuple(int(ch * multiple) for multiple in multiples),
        "layers_per_block": ddconfig["num_res_blocks"],
        "latent_channels": ddconfig["z_channels"],
        "norm_num_groups": GROUPS,
        "sample_size": resolution,
        "mid_block_add_attention": attention == "vanilla",
    }


def reference_config(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """VAVAE's arguments (its config) → the reference's {"ddconfig": {…}, "embed_dim": …}.

    Raises:
        UserError: an argument that the reference cannot represent.
    """
    widths = tuple(arguments["block_out_channels"])
    down = [kind.startswith("Attn") for kind in arguments["down_block_types"]]
    up = [kind.startswith("Attn") for kind in arguments["up_block_types"]]
    mid = arguments.get("mid_block_add_attention", True)
    for name, only in (
        ("norm_num_groups", GROUPS),
        ("act_fn", "silu"),
        ("use_quant_conv", True),
        ("use_post_quant_conv", True),
    ):
        if arguments.get(name, only) != only:
            raise UserError(f"{name}={arguments[name]!r}: the reference has no such network, only {name}={only!r}")
    if widths[0] % GROUPS or any(width % widths[0] for width in widths):
        raise UserError(
            f"block_out_channels={list(widths)}: the reference needs multiples of the first, and that of {GROUPS}"
        )
    if down != up[::-1]:
        raise UserError("up_block_types: the reference has attention at the same levels as in down_block_types")
    if any(down) and not mid:
        raise UserError("mid_block_add_attention=False: the reference has attention in the middle too, or nowhere")
    factor = 2 ** (len(widths) - 1)
    resolution = -(-arguments["sample_size"] // factor) * factor  # nominal: each level's own must be a whole number
    ddconfig = {
        "double_z": True,
        "z_channels": arguments["latent_channels"],
        "resolution": resolution,
        "in_channels": arguments["in_channels"],
        "out_ch": arguments["out_channels"],
        "ch": widths[0],
        "ch_mult": [width // widths[0] for width in widths],
        "num_res_blocks": arguments["layers_per_block"],
        "attn_resolutions": [resolution // 2**level for level, here in enumerate(down) if here],
        "dropout": 0.0,
    }
    if not mid:
        ddconfig["attn_type"] = "none"
    return {"ddconfig": ddconfig, "embed_dim": arguments["latent_channels"]}


def infer_config(state_dict: Mapping[str, Tensor], source: str | Path = "state_dict") -> dict[str, Any]:
    """The reference's configuration of weights that come without one, from their names and shapes.

    The nominal resolution leaves no trace in them but where attention stands: it is the published one, 256.

    Raises:
        UserError: a weight is missing, or of a shape that fits no VA-VAE; `source` is what the message calls them.
    """

    def shape(name: str) -> tuple[int, ...]:
        found = tuple(state_dict[name].shape) if name in state_dict else None
        if found is None:
            names = ", ".join(list(state_dict)[:3]) or "none"
            hint = "; these are diffusers' names: name the folder with their config.json"
            raise UserError(
                f"{source} is no checkpoint of VA-VAE training and no published VA-VAE: it has no {name} among its "
                f"{len(state_dict)} entries ({names}{' …' if len(state_dict) > 3 else ''})"
                f"{hint if any('.down_blocks.' in k for k in state_dict) else ''}"
            )
        if len(found) != 4:
            raise UserError(f"{source}: {name} is {found}, expected a convolution's weight of four dimensions")
        return found

    ch, in_channels = shape("encoder.conv_in.weight")[:2]
    z_channels = shape("decoder.conv_in.weight")[1]
    numbers = (re.match(r"encoder\.down\.(\d+)\.", name) for name in state_dict)
    levels = 1 + max((int(found[1]) for found in numbers if found), default=0)
    widths = [shape(f"encoder.down.{level}.block.0.conv1.weight")[0] for level in range(levels)]
    if any(width % ch for width in widths):
        raise UserError(f"{source}: the encoder's levels have {widths} channels, expected multiples of {ch}")
    blocks = sum(f"encoder.down.0.block.{block}.conv1.weight" in state_dict for block in range(len(state_dict)))
    resolution = PUBLISHED_RESOLUTION
    ddconfig = {
        "double_z": shape("encoder.conv_out.weight")[0] == 2 * z_channels,
        "z_channels": z_channels,
        "resolution": resolution,
        "in_channels": in_channels,
        "out_ch": shape("decoder.conv_out.weight")[0],
        "ch": ch,
        "ch_mult": [width // ch for width in widths],
        "num_res_blocks": blocks,
        "attn_resolutions": [
            resolution // 2**level for level in range(levels) if f"encoder.down.{level}.attn.0.q.weight" in state_dict
        ],
        "attn_type": "vanilla" if "encoder.mid.attn_1.q.weight" in state_dict else "none",
    }
    return {"ddconfig": ddconfig, "embed_dim": shape("post_quant_conv.weight")[1]}


def _check_names(what: str, given: Mapping[str, Any], needed: tuple[str, ...], others: set[str]) -> None:
    unknown = sorted(set(given) - set(needed) - others)
    if unknown:
        raise UserError(
            f"{what} of the reference has no {', '.join(unknown)}; it has {', '.join(sorted({*needed, *others}))}"
        )
    lacking = [name for name in needed if name not in given]
    if lacking:
        raise UserError(f"{what} lacks {', '.join(lacking)}; it holds {', '.join(sorted(given)) or 'nothing'}")
