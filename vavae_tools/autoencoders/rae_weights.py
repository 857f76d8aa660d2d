"""What an RAE is built from: transformers' folders, checkpoints of the RAE authors, diffusers' AutoencoderRAE.

Weights are read as tensors only. Nothing is downloaded, except where a person names a repository of a hub.
"""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vavae_tools.autoencoders.encoders import FrozenEncoder, common_name, encoder_class
from vavae_tools.autoencoders.rae import RAE, RAE_SIZES, VARIANCE_EPS, decoder_size
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import local_folder, read_checkpoint, read_saved

PARTS = ("ema", "model", "state_dict")
"""Where a checkpoint's weights may stand, in the order they are looked for. The averaged weights come first, since the
RAE authors decode with them; encoders are frozen, so that theirs are the same everywhere. Then what was trained, as the
authors' training names it, then Lightning's name."""

_WRAPPERS = re.compile(r"^((module|_orig_mod)\.)+|(?<=\.)((module|_orig_mod)\.)+")  # of DDP and torch.compile
_ENCODER_FIRST = re.compile(r"^(.*?)embeddings\.(patch_embeddings\.projection|patch_embedding)\.weight$")
_DECODER_FIRST = re.compile(r"^(.*?)trainable_cls_token$")  # MAE's own decoder, which is another, has none
_NEEDLESS = ("decoder_pos_embed", "embeddings.mask_token")  # a formula, and of DINOv2's training
_READ_PAST = re.compile(r"^(layernorm|post_layernorm|head|pooler)\.|^embeddings\.position_ids$")
_STATISTICS = (  # mean, spread, whether the spread is a standard deviation that has the epsilon in it
    ("statistics_mean", "statistics_var", False),
    ("latent_mean", "latent_var", False),
    ("_latents_mean", "_latents_std", True),
)


def load_rae(
    encoder_cls: str = "Dinov2withNorm",
    encoder_config_path: str | Path | None = None,
    encoder_input_size: int | None = None,
    encoder_checkpoint_path: str | Path | None = None,
    decoder: str | Path | Mapping[str, Any] = "ViTXL",
    decoder_path: str | Path | None = None,
    statistics_path: str | Path | None = None,
    decoder_patch_size: int | None = None,
    image_mean: list[float] | None = None,
    image_std: list[float] | None = None,
    noise_tau: float = 0.8,
    say: Callable[[str], None] = print,
) -> RAE:
    """Build an RAE from a person's files; what no file holds starts anew, and that is said.

    Args:
        encoder_cls: see `representation.encoder_class`.
        encoder_config_path: a folder in transformers' format, with weights or without, or a `config.json`; None: the
            published base size. "owner/name" is a repository of Hugging Face's hub, read only where no such path is
            there. A folder of a whole RAE, or of diffusers' AutoencoderRAE, brings its own settings along, which hold
            in place of those given here.
        encoder_input_size: pixels of a side; None: 224 for DINOv2, 256 for SigLIP and MAE, as published.
        encoder_checkpoint_path: a `.pt`, `.pth`, `.ckpt` or `.safetensors` file (see `read_rae_weights`) with an
            encoder, a decoder or both; or a folder of a whole RAE.
        decoder: "ViTB", "ViTL", "ViTXL", "tiny"; numbers (see `rae.decoder_size`); or a folder with config.json, or
            that file, of them.
        decoder_path: a file with a decoder, such as the authors' `model.pt`; its decoder holds before another one.
        statistics_path: the authors' `stat.pt`, or a `.safetensors` file with mean and var.
        decoder_patch_size: in place of the decoder's own, 16 unless given.
        image_mean, image_std: three numbers each; None: those of preprocessor_config.json, or the encoder's own.
        noise_tau: see `RAE`.
        say: gets one line about each thing found or started anew.

    Raises:
        UserError: nothing there, damaged, or weights of another shape.
    """
    whole = next((p for p in (encoder_config_path, encoder_checkpoint_path) if p and is_rae_folder(p)), None)
    if whole is not None:
        rae, fresh = read_rae_folder(whole), set()
        settings = f"{rae.config.encoder_cls}, {rae.config.encoder_input_size} pixels"
        say(f"RAE: its own settings hold: {settings} → latents {'×'.join(map(str, rae.latent_shape))} ({whole})")
        if encoder_checkpoint_path == whole:
            encoder_checkpoint_path = None
    else:
        kind, folder = encoder_class(encoder_cls), _encoder_path(encoder_config_path)
        mean, std = _colours(folder)
        size = decoder_size(decoder) if _is_size(decoder) else _decoder_config(Path(decoder))
        if decoder_patch_size is not None:
            size["decoder_patch_size"] = decoder_patch_size
        rae = RAE(
            encoder_cls=kind.__name__,
            encoder_config=_encoder_config(folder),
            encoder_input_size=encoder_input_size,
            image_mean=image_mean or mean,
            image_std=image_std or std,
            noise_tau=noise_tau,
            **size,
        )
        fresh = {"encoder", "decoder"}
        if folder is not None and folder.is_dir() and _weight_files(folder):
            weights = _encoder_only(_folder_weights(folder), folder)
            fit(rae.encoder, weights, "encoder", str(folder), say)
            fresh.discard("encoder")
    of_encoder_file = ("encoder",) if decoder_path else ("encoder", "decoder")
    for path, parts in ((encoder_checkpoint_path, of_encoder_file), (decoder_path, ("decoder",))):
        if path is None:
            continue
        found = read_rae_weights(path)
        if not any(part in found for part in parts):
            raise UserError(f"{path} holds no {parts[0]} of an RAE, only {' and '.join(found)}: name another file")
        for part in parts:
            if part in found:
                where, weights = found[part]
                rest = "start anew" if part in fresh else "stay as they were"
                fit(getattr(rae, part), weights, part, f"{path}{where}", say, rest if part == "encoder" else None)
                fresh.discard(part)
        if "statistics" in found:
            keep_statistics(rae, found["statistics"])
    if statistics_path is not None:
        rae.set_statistics(*read_statistics(statistics_path))
    if "encoder" in fresh:
        say("encoder starts anew: its latents mean nothing until weights are named (encoder_checkpoint_path)")
    if "decoder" in fresh:
        say("decoder starts anew: reconstructions will be noise until it is trained")
    return rae.eval()


def read_rae_weights(path: str | Path) -> dict[str, Any]:
    """Sort what a file or a folder of an RAE holds.

    A checkpoint may hold its weights under one of `PARTS`, or bare, behind any prefix: an encoder under transformers'
    names, of any version; a decoder under the authors' or diffusers' names; or both.

    Returns:
        "encoder", "decoder": (where they stand, weights without the prefix), "statistics": (mean, var); only those
        that are there.

    Raises:
        UserError: nothing there, damaged, or neither an encoder nor a decoder in it.
    """
    path = Path(path)
    if path.is_dir():
        candidates: list[tuple[str, Mapping[str, Any]]] = [("", _folder_weights(path))]
    elif not path.exists():
        raise UserError(f"No weights at {path}: expected a .pt, .pth, .ckpt or .safetensors file")
    else:
        checkpoint = _read_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)
        parts = [(f", {part}", checkpoint[part]) for part in PARTS if isinstance(checkpoint.get(part), Mapping)]
        candidates = [*parts, ("", checkpoint)]
    found: dict[str, Any] = {}
    for part, tensors in candidates:
        for name, value in sorted_weights(tensors).items():
            found.setdefault(name, value if name == "statistics" else (part, value))
    if "encoder" not in found and "decoder" not in found:
        names = ", ".join(map(str, list(candidates[0][1])[:4])) or "nothing"
        raise UserError(f"{path} holds neither an encoder nor a decoder of an RAE; it holds {names} …")
    return found


def sorted_weights(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The "encoder", "decoder" and "statistics" in weights of any prefix; only those that are there."""
    named = {
        _WRAPPERS.sub("", name): tensor
        for name, tensor in state_dict.items()
        if isinstance(name, str) and isinstance(tensor, Tensor)
    }
    found: dict[str, Any] = {}
    for part, first in (("encoder", _ENCODER_FIRST), ("decoder", _DECODER_FIRST)):
        starts = {match[1] for match in map(first.match, named) if match}
        if starts:  # averaged weights beside the live ones go first, as in PARTS
            start = min(starts, key=lambda start: ("ema" not in start.split("."), len(start), start))
            found[part] = {name.removeprefix(start): named[name] for name in named if name.startswith(start)}
            if part == "encoder" and not start:  # all of a file is the encoder's, except what is plainly another's
                found[part] = {name: tensor for name, tensor in named.items() if not name.startswith("decoder.")}
    last = {name.split(".")[-1]: tensor for name, tensor in named.items()}
    for mean, spread, is_deviation in _STATISTICS:
        statistics = last.get(mean), last.get(spread)
        if is_deviation:
            statistics = _from_deviation(*statistics)
        if any(tensor is not None for tensor in statistics):
            found["statistics"] = statistics
            break
    return found


def fit(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    what: str,
    source: str,
    say: Callable[[str], None] = lambda line: None,
    rest: str | None = None,
) -> None:
    """Put weights into an encoder or a decoder, whatever version's names they have.

    Args:
        what, source: how messages call the module and the weights.
        rest: what to say of weights that are missing, where as much as half of them may be; None: all are needed.

    Raises:
        UserError: weights of another shape, or too few of them.
    """
    inner = module.model if isinstance(module, FrozenEncoder) else module
    own = {common_name(name): name for name in inner.state_dict()}
    given = {common_name(name): tensor for name, tensor in weights.items()}
    tables = inner.state_dict()
    table = given.get("decoder_pos_embed")
    if table is not None and table.shape != inner.decoder_pos_embed.shape:
        del given["decoder_pos_embed"]  # of another grid; it is a formula, which the decoder has for its own
    matched = {name: tensor for name, tensor in given.items() if name in own}
    for name, tensor in matched.items():
        expected = tuple(tables[own[name]].shape)
        if tuple(tensor.shape) != expected:
            hint = _fitting_size(given) if what == "decoder" else ""
            raise UserError(
                f"{source} is of another {what}: {own[name]} is {tuple(tensor.shape)}, expected {expected}{hint}"
            )
    missing = [name for name in own if name not in matched and name not in _NEEDLESS]
    if missing and (rest is None or 2 * len(missing) > len(own)):
        raise UserError(
            f"{source} is of another {what}: it has {len(matched)} of {len(own)} weights, {own[missing[0]]} is missing"
        )
    inner.load_state_dict({own[name]: tensor.float() for name, tensor in matched.items()}, strict=False)
    unused = [name for name in given if name not in own and not _READ_PAST.match(name)]
    lacking = f"{len(missing)} missing, which {rest}" if missing else "0 missing"
    say(f"RAE {what}: {len(matched)} weights matched, {lacking}, {len(unused)} unused ({source})")


def read_statistics(path: str | Path) -> tuple[Tensor | None, Tensor | None]:
    """The mean and variance of the authors' `stat.pt`, each float32 (C, h, w), or None where it has none.

    Raises:
        UserError: no such file, damaged, or neither of both in it.
    """
    path = Path(path)
    saved = _read_safetensors(path) if path.suffix == ".safetensors" else read_saved(path)
    if not isinstance(saved, Mapping) or not {"mean", "var"} & set(saved):
        there = ", ".join(map(str, list(saved)[:4])) if isinstance(saved, Mapping) else type(saved).__name__
        raise UserError(f"{path} holds no statistics: expected mean and var, found {there or 'nothing'}")
    values = saved.get("mean"), saved.get("var")
    for name, value in zip(("mean", "var"), values, strict=True):
        if value is not None and not isinstance(value, Tensor):
            raise UserError(f"{path}: {name} is a {type(value).__name__}, expected a tensor (C, h, w) or None")
    if values[0] is None and values[1] is None:
        raise UserError(f"{path} holds neither a mean nor a variance: leave the statistics out")
    mean, var = (None if value is None else value.float() for value in values)
    return mean, var


# ---- whole folders
def is_rae_folder(path: str | Path) -> bool:
    """Whether it is a folder of a whole RAE: one from here, or of diffusers' AutoencoderRAE."""
    config = Path(path) / "config.json"
    return config.is_file() and _read_json(config).get("_class_name") in ("RAE", "AutoencoderRAE")


def read_rae_folder(folder: str | Path) -> RAE:
    """The RAE that `save_pretrained` wrote, here or in diffusers.

    Raises:
        UserError: a file missing or damaged, or weights that do not fit.
    """
    folder = Path(folder)
    config = _read_json(folder / "config.json")
    weights = _folder_weights(folder)
    if config["_class_name"] == "AutoencoderRAE":
        return from_diffusers(config, weights, str(folder)).eval()
    try:
        rae = RAE.from_config(config)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'config.json'} is no RAE's ({str(error)[:200]}): copy it again") from None
    return _filled(rae, weights, str(folder)).eval()


def from_diffusers(config: Mapping[str, Any], state_dict: Mapping[str, Tensor], source: str = "state_dict") -> RAE:
    """diffusers' AutoencoderRAE, by its arguments and weights, as an RAE.

    Its latents are divided by a standard deviation that has the epsilon in it, to which diffusers adds another one;
    here, as in the authors' code, it counts once.
    """
    given = {name: value for name, value in config.items() if value is not None}
    kind = encoder_class(given.get("encoder_type", "dinov2"))
    width = given.get("encoder_hidden_size", 768)
    patch = given.get("encoder_patch_size", 14)
    encoder = {
        "hidden_size": width,
        "patch_size": patch,
        "num_hidden_layers": given.get("encoder_num_hidden_layers", 12),
        "num_attention_heads": width // 64,
    }
    mean, std = (
        state_dict[name].flatten().tolist() if name in state_dict else given.get(argument, default)
        for name, argument, default in (
            ("encoder_mean", "encoder_norm_mean", [0.485, 0.456, 0.406]),
            ("encoder_std", "encoder_norm_std", [0.229, 0.224, 0.225]),
        )
    )
    rae = RAE(
        encoder_cls=kind.__name__,
        encoder_config=encoder,
        encoder_input_size=given.get("encoder_input_size", 224),
        decoder_hidden_size=given.get("decoder_hidden_size", 512),
        decoder_num_hidden_layers=given.get("decoder_num_hidden_layers", 8),
        decoder_num_attention_heads=given.get("decoder_num_attention_heads", 16),
        decoder_intermediate_size=given.get("decoder_intermediate_size", 2048),
        decoder_patch_size=given.get("patch_size", 16),
        image_mean=mean,
        image_std=std,
        noise_tau=given.get("noise_tau", 0.0),
    )
    buffers = {name: tensor for name, tensor in state_dict.items() if name in ("_latents_mean", "_latents_std")}
    for name in ("latents_mean", "latents_std"):  # where its weights do not hold them
        if f"_{name}" not in buffers and not isinstance(given.get(name), (str, type(None))):
            buffers[f"_{name}"] = torch.as_tensor(given[name], dtype=torch.float32)
    scale = given.get("scaling_factor", 1.0)
    if scale != 1:
        buffers["_latents_std"] = buffers.get("_latents_std", torch.ones(1)).float() / scale
    found = {"statistics": _from_deviation(buffers.get("_latents_mean"), buffers.get("_latents_std"))}
    weights = {**sorted_weights(state_dict), **found}
    for part in ("encoder", "decoder"):
        if part not in weights:
            raise UserError(f"{source} holds no {part} of an AutoencoderRAE")
        fit(getattr(rae, part), weights[part], part, source)
    keep_statistics(rae, found["statistics"])
    return rae


def _filled(rae: RAE, state_dict: Mapping[str, Tensor], source: str) -> RAE:
    found = sorted_weights(state_dict)
    for part in ("encoder", "decoder"):
        if part not in found:
            raise UserError(f"{source} holds no {part} of an RAE: copy the folder again")
        fit(getattr(rae, part), found[part], part, source)
    if rae.has_own_statistics:
        if "statistics" not in found:
            raise UserError(f"{source} lacks the statistics that its config.json speaks of: copy the folder again")
        rae.set_statistics(*found["statistics"])
    return rae


def _from_deviation(mean: Tensor | None, std: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """diffusers' buffers → a mean and a variance without the epsilon; its stand-ins of one number are none."""
    mean = None if mean is None or (mean.numel() == 1 and not mean.any()) else mean.float()
    std = None if std is None or (std.numel() == 1 and bool((std == 1).all())) else std.double()
    return mean, None if std is None else (std.square() - VARIANCE_EPS).float()


def keep_statistics(rae: RAE, statistics: tuple[Tensor | None, Tensor | None]) -> None:
    """Statistics that broadcast, as diffusers takes them: a number each per channel, or per element."""
    mean, var = statistics
    if mean is None and var is None:
        return
    try:
        mean, var = (None if t is None else t.expand(1, *rae.latent_shape)[0] for t in (mean, var))
    except RuntimeError:
        raise UserError(
            f"The latents' statistics {[tuple(t.shape) for t in (mean, var) if t is not None]} do not fit latents of "
            f"{'×'.join(map(str, rae.latent_shape))}"
        ) from None
    rae.set_statistics(mean, var)


# ---- files
def _is_size(decoder: str | Path | Mapping[str, Any]) -> bool:
    return isinstance(decoder, Mapping) or (
        isinstance(decoder, str) and (decoder in RAE_SIZES or not Path(decoder).exists())
    )


def _decoder_config(path: Path) -> dict[str, Any]:
    """A decoder's numbers in a config.json; the authors' patch size is a word there, set elsewhere: 16."""
    config = _read_json(path / "config.json" if path.is_dir() else path)
    size = {name: config[name] for name in RAE_SIZES["ViTXL"] if name in config}
    if "decoder_hidden_size" not in size:
        raise UserError(
            f"{path} is no decoder's configuration: it has no decoder_hidden_size; or name one of "
            f"{', '.join(RAE_SIZES)}"
        )
    if isinstance(config.get("layer_norm_eps"), float):
        size["decoder_layer_norm_eps"] = config["layer_norm_eps"]
    return size


def _encoder_path(source: str | Path | None) -> Path | None:
    if source is None:
        return None
    return local_folder(
        source,
        of="an encoder",
        name="one in transformers' format",
        instead="download its config.json, preprocessor_config.json and model.safetensors and name their folder",
        patterns=["*.json", "*.safetensors"],
        file="config.json",
    )


def _encoder_config(path: Path | None) -> dict[str, Any] | None:
    if path is None:
        return None
    config = path / "config.json" if path.is_dir() else path
    if not config.is_file():
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:5]) or "nothing"
        raise UserError(f"{path} is no encoder's folder: config.json is missing; it holds {there}")
    found = _read_json(config)
    if "model_type" not in found and "hidden_size" not in found:
        raise UserError(f"{config} is no encoder's configuration: it has neither model_type nor hidden_size")
    return found


def _colours(path: Path | None) -> tuple[list[float] | None, list[float] | None]:
    """The mean and standard deviation per colour of the preprocessor beside an encoder's configuration."""
    if path is None:
        return None, None
    file = (path if path.is_dir() else path.parent) / "preprocessor_config.json"
    config = _read_json(file) if file.is_file() else {}
    return config.get("image_mean"), config.get("image_std")


def _encoder_only(state_dict: Mapping[str, Tensor], source: Path) -> Mapping[str, Tensor]:
    found = sorted_weights(state_dict)
    if "encoder" not in found:
        some = ", ".join(list(state_dict)[:3]) or "nothing"
        raise UserError(f"The weights in {source} are no encoder's: they are {some} …")
    return found["encoder"]


def _weight_files(folder: Path) -> list[Path]:
    for pattern in ("diffusion_pytorch_model*.safetensors", "model*.safetensors", "pytorch_model*.bin"):
        files = sorted(folder.glob(pattern))
        if files:
            return files
    return []


def _folder_weights(folder: Path) -> dict[str, Tensor]:
    files = _weight_files(folder)
    if not files:
        there = ", ".join(sorted(entry.name for entry in folder.iterdir())[:5]) or "nothing"
        raise UserError(f"No weights in {folder}: expected model.safetensors, found {there}")
    weights: dict[str, Tensor] = {}
    for file in files:
        weights.update(_read_safetensors(file) if file.suffix == ".safetensors" else read_checkpoint(file))
    return weights


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected an object of settings")
    return value


def _fitting_size(weights: Mapping[str, Tensor]) -> str:
    """Which of the known sizes a decoder's weights are of, for a message."""
    embed = weights.get("decoder_embed.weight")
    layers = len({name.split(".")[1] for name in weights if name.startswith("decoder_layers.")})
    for name, size in RAE_SIZES.items():
        known = size["decoder_hidden_size"], size["decoder_num_hidden_layers"]
        if embed is not None and (embed.shape[0], layers) == known:
            return f": take decoder={name}"
    return ""
