"""What an RAE is built from: transformers' folders, checkpoints of the RAE authors, diffusers' AutoencoderRAE."""

import inspect
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vavae_tools.autoencoders.encoders import IMAGENET_MEAN, IMAGENET_STD, FrozenEncoder, common_name
from vavae_tools.autoencoders.rae import DECODER_NUMBERS, RAE, RAE_SIZES, VARIANCE_EPS
from vavae_tools.checkpoints.foreign import find_weights, flat_names
from vavae_tools.runtime.errors import UserError, contents, in_home, join_first
from vavae_tools.runtime.files import (
    load_model,
    load_weights,
    local_folder,
    read_json,
    read_weights,
    refuse_left_over,
    weight_files,
)

_FIRST = {
    "encoder": r"embeddings\.(?:patch_embeddings\.projection|patch_embedding)\.weight",
    "decoder": "trainable_cls_token",  # MAE's own decoder, which is another, has none
}
_ANEW = {
    "encoder": "its latents mean nothing until weights are named (encoder_checkpoint_path)",
    "decoder": "reconstructions will be noise until it is trained",
}
_STATISTICS = re.compile(r"(?:^(?:\w+\.)?|\bstat\.)(mean|var)$")  # the authors', of any part
_NEEDLESS = ("decoder_pos_embed", "embeddings.mask_token")  # a formula, and of DINOv2's training
_IGNORED = re.compile(r"^(layernorm|post_layernorm|head|pooler)\.|^embeddings\.position_ids$")


def load_rae(
    encoder_cls: str = "Dinov2withNorm",
    encoder_config_path: str | Path | None = None,
    encoder_input_size: int | None = None,
    encoder_checkpoint_path: str | Path | None = None,
    decoder: str | Path | Mapping[str, Any] = "ViTXL",
    decoder_path: str | Path | None = None,
    statistics_path: str | Path | None = None,
    log: Callable[[str], None] = print,
) -> RAE:
    """Build an RAE from a person's files; what no file holds starts anew, and `log` gets a line about each.

    Args:
        encoder_config_path: a folder in transformers' format, with weights and preprocessor_config.json or without, or
            a `config.json`; None: the published base size. "owner/name" is a repository of Hugging Face's hub, read
            only where no such path is there. The settings of a whole RAE's folder hold before those given.
        encoder_checkpoint_path: a file with an encoder, a decoder or both, or a folder of a whole RAE.
        decoder: a size of `RAE_SIZES`, some numbers, or a `config.json` or its folder.
        decoder_path: a file with a decoder, such as the authors' `model.pt`; it holds before another one.
        statistics_path: the authors' `stat.pt`, or a `.safetensors` file with mean and var.
    """
    whole = next((p for p in (encoder_config_path, encoder_checkpoint_path) if p and is_rae_folder(p)), None)
    encoder_path = None
    if whole is not None:
        rae = read_rae_folder(whole)
        settings = f"{rae.config.encoder_cls}, {rae.config.encoder_input_size} pixels"
        log(f"RAE: its own settings hold: {settings} → latents {'×'.join(map(str, rae.latent_shape))} ({whole})")
        if encoder_checkpoint_path == whole:
            encoder_checkpoint_path = None
    else:
        settings, encoder_path = _encoder_files(encoder_config_path)
        rae = RAE(encoder_cls, encoder_input_size=encoder_input_size, **settings, **_decoder_numbers(decoder))
    wanted = ["encoder"] if decoder_path else ["encoder", "decoder"]
    found: dict[str, Any] = {}
    for path, parts in ((encoder_path, ["encoder"]), (encoder_checkpoint_path, wanted), (decoder_path, ["decoder"])):
        if path is not None:
            saved = read_weights(path)
            held = sorted_weights(saved, path)
            if not any(part in held for part in parts):
                there = " and ".join(held) or join_first(flat_names(saved))
                raise UserError(f"{path} holds no {parts[0]} of an RAE, only {there}: name another file")
            found |= {part: held[part] for part in (*parts, "statistics") if part in held}
    for part, anew in _ANEW.items():
        if part in found:
            fit(getattr(rae, part), *found[part], log)
        elif whole is None:
            log(f"{part} starts anew: {anew}")
    statistics = found.get("statistics")
    if statistics_path is not None:
        statistics = sorted_weights(read_weights(statistics_path)).get("statistics")
        if statistics is None:
            raise UserError(f"{statistics_path} holds no statistics: expected the tensors mean and var")
    if statistics is not None:
        rae.set_statistics(*statistics)
    return rae.eval()


def sorted_weights(state_dict: Mapping[str, Any], source: str | Path = "state_dict") -> dict[str, Any]:
    """Sort an RAE's weights, in any part, behind any prefix.

    Returns:
        "encoder", "decoder": (weights without the prefix, where they stand), "statistics": (mean, var); only those
        that are there.
    """
    named = {name: tensor for name, tensor in flat_names(state_dict).items() if isinstance(tensor, Tensor)}
    found: dict[str, Any] = {}
    for part, first in _FIRST.items():
        if held := find_weights(named, first, source):
            # all that begins as an encoder's is the encoder's, except what is plainly another's
            weights = {k: v for k, v in held.weights.items() if part == "decoder" or not k.startswith("decoder.")}
            place = held.prefix.split(".")[0]
            found[part] = weights, f"{source}, {place}" if isinstance(state_dict.get(place), Mapping) else str(source)
    last = {name.split(".")[-1]: tensor for name, tensor in named.items()}
    statistics = [(last.get(f"{name}_mean"), last.get(f"{name}_var")) for name in ("statistics", "latent")]
    beside = {match[1]: tensor for name, tensor in named.items() if (match := _STATISTICS.search(name))}
    statistics.append((beside.get("mean"), beside.get("var")))
    if "_latents_std" in last:  # diffusers', with the epsilon in it; its stand-ins, 0 and 1, are none
        mean, std = last.get("_latents_mean", torch.zeros(1)), last["_latents_std"]
        if mean.any() or (std != 1).any():
            statistics.append((mean.float(), (std.double().square() - VARIANCE_EPS).float()))
    for mean, var in statistics:
        if mean is not None or var is not None:
            return {**found, "statistics": (mean, var)}
    return found


def fit(
    module: nn.Module, weights: Mapping[str, Tensor], source: str = "state_dict", log: Callable = lambda line: None
) -> None:
    """Put weights into an encoder or a decoder, whatever version's names they have."""
    inner, what = (module.model, "encoder") if isinstance(module, FrozenEncoder) else (module, "decoder")
    tensors = inner.state_dict()
    own = {common_name(name): name for name in tensors}
    given = {common_name(name): tensor for name, tensor in weights.items()}
    table = given.get("decoder_pos_embed")
    if table is not None and table.shape != inner.decoder_pos_embed.shape:
        del given["decoder_pos_embed"]  # of another grid; it is a formula, which the decoder has for its own
    matched = {own[name]: tensor for name, tensor in given.items() if name in own}
    for name, tensor in matched.items():
        if tensor.shape != tensors[name].shape:
            width = given["decoder_embed.weight"].shape[0] if what == "decoder" else None
            fits = [f": take decoder={size}" for size, numbers in RAE_SIZES.items() if width in numbers.values()]
            shapes = f"{tuple(tensor.shape)}, expected {tuple(tensors[name].shape)}"
            raise UserError(f"{source} is of another {what}: {name} is {shapes}{fits[0] if fits else ''}")
    needless = tuple(own[name] for name in _NEEDLESS if name in own)
    load_weights(inner, {name: tensor.float() for name, tensor in matched.items()}, source, anew=needless)
    unused = [name for name in given if name not in own and not _IGNORED.match(name) and name not in _NEEDLESS]
    refuse_left_over(own, unused, source)
    log(f"RAE {what}: {len(matched)} weights matched, 0 missing, {len(unused)} unused ({source})")


def is_rae_folder(path: str | Path) -> bool:
    """Return whether it is a folder of a whole RAE: one from here, or of diffusers' AutoencoderRAE."""
    config = in_home(path) / "config.json"
    return config.is_file() and read_json(config).get("_class_name") in ("RAE", "AutoencoderRAE")


def read_rae_folder(folder: str | Path) -> RAE:
    """Return the RAE that `save_pretrained` wrote, here or in diffusers."""
    folder = in_home(folder)
    config = read_json(folder / "config.json")
    if config["_class_name"] == "AutoencoderRAE":
        return from_diffusers(config, read_weights(folder), str(folder)).eval()
    return load_model(RAE, folder)


def from_diffusers(config: Mapping[str, Any], state_dict: Mapping[str, Tensor], source: str = "state_dict") -> RAE:
    """Return diffusers' AutoencoderRAE, by its arguments and weights, as an RAE.

    Its latents are divided by a standard deviation that has the epsilon in it, to which diffusers adds another one;
    here, as in the authors' code, it counts once.
    """
    from diffusers import AutoencoderRAE

    defaults = {name: argument.default for name, argument in inspect.signature(AutoencoderRAE).parameters.items()}
    given = {**defaults, **{name: value for name, value in config.items() if value is not None}}
    width = given["encoder_hidden_size"]
    encoder = {"hidden_size": width, "num_attention_heads": width // 64, "patch_size": given["encoder_patch_size"]}
    rae = RAE(
        encoder_cls=given["encoder_type"],
        encoder_config={**encoder, "num_hidden_layers": given["encoder_num_hidden_layers"]},
        encoder_input_size=given["encoder_input_size"],
        **{name: given[name] for name in DECODER_NUMBERS},
        decoder_patch_size=given["patch_size"],
        image_mean=given["encoder_norm_mean"] or list(IMAGENET_MEAN),  # diffusers' default for every encoder
        image_std=given["encoder_norm_std"] or list(IMAGENET_STD),
        noise_tau=given["noise_tau"],
    )
    scale = given.get("scaling_factor", 1.0)
    if scale != 1:
        state_dict = {**state_dict, "_latents_std": state_dict.get("_latents_std", torch.ones(1)).float() / scale}
    found = sorted_weights(state_dict, source)
    for part in ("encoder", "decoder"):
        fit(getattr(rae, part), *found.get(part, ({}, source)))
    if "statistics" in found:
        rae.set_statistics(*found["statistics"])
    return rae


def _decoder_numbers(decoder: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    if isinstance(decoder, Mapping):
        return decoder
    if decoder in RAE_SIZES:
        return RAE_SIZES[decoder]
    path = in_home(decoder)
    if not path.exists():
        raise UserError(f"No decoder size {str(decoder)!r}, nor a config.json there; there are {', '.join(RAE_SIZES)}")
    config = read_json(path / "config.json" if path.is_dir() else path)
    if "decoder_hidden_size" not in config:
        raise UserError(f"{path} is no decoder's configuration: it has no decoder_hidden_size")
    config["decoder_layer_norm_eps"] = config.get("layer_norm_eps", 1e-12)
    known = (*RAE_SIZES["ViTXL"], "decoder_layer_norm_eps")
    return {name: config[name] for name in known if name in config}  # its patch_size is a word there: 16


def _encoder_files(source: str | Path | None) -> tuple[dict[str, Any], Path | None]:
    """Return the arguments of `RAE` that a folder in transformers' format, or a config.json, holds, and its weights."""
    if source is None:
        return {}, None
    path = local_folder(
        source,
        of="an encoder",
        instead="download its config.json, preprocessor_config.json and model.safetensors and name their folder",
        file="config.json",
    )
    config = path / "config.json" if path.is_dir() else path
    if not config.is_file():
        raise UserError(f"{path} is no encoder's folder: config.json is missing; it {contents(path)}")
    preprocessor = config.with_name("preprocessor_config.json")
    colours = read_json(preprocessor) if preprocessor.is_file() else {}
    arguments = {name: colours[name] for name in ("image_mean", "image_std") if name in colours}
    return {"encoder_config": read_json(config), **arguments}, path if path.is_dir() and weight_files(path) else None
