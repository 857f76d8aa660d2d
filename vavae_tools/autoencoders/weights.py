"""What autoencoders are loaded from: folders, checkpoints of VA-VAE training, published weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from torch import Tensor

from vavae_tools.autoencoders.ldm_names import VAE_PREFIXES, current_name, from_reference, to_reference, vavae_arguments
from vavae_tools.autoencoders.rae_weights import is_rae_folder, read_rae_folder
from vavae_tools.autoencoders.stable_diffusion import config_of_vae, is_stable_diffusion_vae, load_stable_diffusion_vae
from vavae_tools.autoencoders.vavae import VAVAE
from vavae_tools.checkpoints.foreign import find_weights, plain_name
from vavae_tools.runtime.errors import UserError, contents, in_home, join_first
from vavae_tools.runtime.files import load_weights, read_safetensors, read_weights

CONDITION_PREFIXES = ("conditions.", "encoder_projections.", "decoder_projections.")


@dataclass(frozen=True)
class VAVAEWeights:
    """Weights of a VA-VAE, and what came with them."""

    source: Path
    config: dict[str, Any]  # VAVAE's arguments
    weights: dict[str, Tensor]  # under VAVAE's names
    discriminator: dict[str, Tensor] | None = None  # under `main.0.weight` …
    projection: Tensor | None = None  # of the alignment with a foundation model: (its channels, latent channels, 1, 1)
    unused: tuple[str, ...] = ()  # names of what else was there


def pretrained_small_folder() -> Path:
    """Return the folder of the small VA-VAE that comes with this package (trained on simulated walkers)."""
    return Path(__file__).parent / "pretrained_small"


def load_autoencoder(source: str | Path) -> ModelMixin:
    """Load a `RAE`, a `VAVAE` or a `StableDiffusionVAE` from its folder, or from what `load_vavae` takes."""
    source = in_home(source)
    if is_rae_folder(source):
        return read_rae_folder(source)
    if is_stable_diffusion_vae(source):
        return load_stable_diffusion_vae(source)
    return load_vavae(source, log=lambda line: None)


def load_vavae(
    source: str | Path,
    condition_dim: int | None = None,
    num_conditions: int = 0,
    log: Callable[[str], None] = print,
    channels: int | None = None,
) -> VAVAE:
    """Load a VA-VAE to fine-tune: `read_vavae`, then `build_vavae`."""
    return build_vavae(read_vavae(source), condition_dim, num_conditions, channels, log)


def read_vavae(source: str | Path) -> VAVAEWeights:
    """Read a VA-VAE's weights without building it.

    Args:
        source: a folder that `save_pretrained` wrote (of a VAVAE or of diffusers' AutoencoderKL), a `.ckpt` of
            VA-VAE training here, or weights under the reference's names: the released `.pt`, a `.ckpt` of the
            reference's training, a `.safetensors` file; "small", which comes with the package.
    """
    source = in_home(source)
    if str(source) == "small" and not source.exists():
        source = pretrained_small_folder()
    if source.suffix == ".json" and source.is_file():
        source = source.parent
    if source.is_dir() or source.name.startswith("diffusion_pytorch_model"):
        return _read_folder(source)
    if not source.is_file():
        expected = "a folder with config.json, a .ckpt of VA-VAE training, or the published .pt, .ckpt or .safetensors"
        make = "Type small for the one in this package, or make one with python minimal_training_modification.py"
        raise UserError(f"No VA-VAE at {source}: expected {expected}. {make}")
    checkpoint = read_weights(source)
    settings = checkpoint.get("hyper_parameters")
    if isinstance(settings, Mapping) and "vavae_config" in settings:
        others = {plain_name(name): tensor for name, tensor in checkpoint["state_dict"].items()}
        weights = {k.removeprefix("vavae."): others.pop(k) for k in list(others) if k.startswith("vavae.")}
        beside = _split_training_state(others, "discriminator.", "projection.weight")
        return VAVAEWeights(source, dict(settings["vavae_config"]), weights, **beside)
    return from_state_dict(checkpoint, source=source)


def from_state_dict(
    state_dict: Mapping[str, Any], config: Mapping[str, Any] | None = None, source: str | Path = "state_dict"
) -> VAVAEWeights:
    """Sort weights of the reference's autoencoder, or of its whole training; `config` is as in `vavae_arguments`."""
    found = find_weights(state_dict, r"encoder\.conv_in\.weight", source)
    if found is None:
        held = f"among its {len(state_dict)} entries ({join_first(state_dict) or 'none'})"
        what = f"{source} is no checkpoint of VA-VAE training and no published VA-VAE"
        raise UserError(f"{what}: it has no encoder.conv_in.weight {held}")
    named = {name: tensor for name, tensor in found.weights.items() if isinstance(tensor, Tensor)}
    if any(name.startswith("encoder.down_blocks.") for name in named):  # diffusers' names
        named |= to_reference({current_name(name): tensor for name, tensor in named.items()})
        named = {name: tensor for name, tensor in named.items() if "_block" not in name}
    arguments = vavae_arguments(named, config, source)
    projection = "linear_proj.weight"
    if projection in named and named[projection].shape[1:] != (arguments["latent_channels"], 1, 1):
        projection = ""  # from the foundation model's channels to the latent's
    others = {name: tensor for name, tensor in named.items() if not name.startswith(VAE_PREFIXES)}
    beside = _split_training_state(others, "loss.discriminator.", projection)
    return VAVAEWeights(Path(source), arguments, from_reference(named), **beside)


def build_vavae(
    found: VAVAEWeights,
    condition_dim: int | None = None,
    num_conditions: int = 0,
    channels: int | None = None,
    log: Callable[[str], None] = print,
    people: Mapping[str, int] | None = None,
) -> VAVAE:
    """Build the model with these weights; vectors and projections that they do not hold start anew.

    Args:
        condition_dim: None keeps the vectors that the weights have, 0 drops them.
        people: whose vectors the model is to have, name → row; those that the weights know keep theirs.
        channels: of the images, see `with_channels`; None keeps them.
    """
    if channels is not None:
        found = with_channels(found, channels)
    config, weights = found.config, found.weights
    if condition_dim is not None:
        config = {**config, "condition_dim": condition_dim, "num_conditions": num_conditions}
    theirs = found.config.get("people")
    if people is not None or config.get("num_conditions") != found.config.get("num_conditions"):
        config = {**config, "people": dict(people) if people and config["condition_dim"] else None}
    model = VAVAE.from_config(config)
    there, wanted = weights.get("conditions.weight"), model.state_dict().get("conditions.weight")
    if theirs and people and theirs != people and there is not None and wanted is not None:
        kept = theirs.keys() & people.keys() if there.shape[1] == wanted.shape[1] else ()
        log(f"{found.source} has vectors of {join_first(theirs)}: {len(kept)} of {len(people)} people here keep theirs")
        there, table = (wanted.clone() if kept else None), there
        for name in kept:
            there[people[name]] = table[theirs[name]]
        weights = {**weights, "conditions.weight": there} if kept else _without_vectors(weights)
    if there is not None and (wanted is None or there.shape != wanted.shape):
        # vectors of other people, or of another length, say nothing here
        weights = _without_vectors(weights)
    loaded = load_weights(model, weights, found.source, anew=CONDITION_PREFIXES)
    parts = {"a discriminator": found.discriminator, "an alignment projection": found.projection}
    came = " and ".join(part for part, there in parts.items() if there is not None)
    unused = len(loaded.unexpected_keys) + len(found.unused)
    log(
        f"VA-VAE weights: {len(weights) - len(loaded.unexpected_keys)} matched, {len(loaded.missing_keys)} start anew, "
        f"{unused} unused{', with ' if came else ''}{came} ({found.source})"
    )
    return model


def _without_vectors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if not name.startswith(CONDITION_PREFIXES)}


def with_channels(found: VAVAEWeights, channels: int) -> VAVAEWeights:
    """Return the same weights for images of one channel in place of several, or the reverse.

    The grey model and its discriminator equal the others fed with equal channels, their output averaged over them.
    """
    now, discriminator = found.config["in_channels"], found.discriminator
    if channels < 1 or (channels != now and 1 not in (channels, now)):
        raise UserError(f"channels={channels}: weights for {now} channels can become weights for 1, not for {channels}")
    fitted = {
        name: _fit_channels(found.weights[name], dim, channels)
        for name, dim in (("encoder.conv_in.weight", 1), ("decoder.conv_out.weight", 0), ("decoder.conv_out.bias", 0))
        if name in found.weights
    }
    if discriminator is not None and (first := discriminator.get("main.0.weight")) is not None:
        discriminator = {**discriminator, "main.0.weight": _fit_channels(first, 1, channels)}
    config = {**found.config, "in_channels": channels, "out_channels": channels}
    return replace(found, config=config, weights={**found.weights, **fitted}, discriminator=discriminator)


def _fit_channels(tensor: Tensor, dim: int, channels: int) -> Tensor:
    """Fit a convolution's weight (out, in, k, k) or bias (out,) to another number of equal channels, at `dim`."""
    if channels == 1:
        return tensor.float().sum(1, keepdim=True) if dim == 1 else tensor.float().mean(0, keepdim=True)
    if tensor.shape[dim] == channels:
        return tensor
    return tensor.repeat_interleave(channels, dim) / (channels if dim == 1 else 1)


def read_condition_file(path: str | Path, labels: dict[str, int]) -> Tensor:
    """Return a person's vector in each label's row, float32 (labels, dim), of a safetensors file by folders' names."""
    vectors = read_safetensors(path)
    if missing := sorted(labels.keys() - vectors.keys()):
        raise UserError(f"{path} has no vector for {join_first(missing)}; it holds {len(vectors)} vectors")
    shapes = sorted({tuple(vectors[name].shape) for name in labels})
    if len(shapes) > 1 or len(shapes[0]) != 1:
        raise UserError(f"The vectors of {path} differ in shape: {shapes}; expected one length for all")
    table = torch.zeros(max(labels.values()) + 1, *shapes[0])
    for name, label in labels.items():
        table[label] = vectors[name].float()
    return table


# ---- reading
def _read_folder(source: Path) -> VAVAEWeights:
    """Read diffusers' folder, the `vae/` in a pipeline's, or one of the files of weights in such a folder."""
    folder, config = config_of_vae(source if source.is_dir() else source.parent)
    if not config and source.is_file():
        beside = "which says what these weights are of: copy it from where the weights are from"
        raise UserError(f"{source} has no config.json beside it, {beside}")
    if not config:
        needed = "config.json and diffusion_pytorch_model.safetensors, or the name of a .pt, .ckpt or .safetensors file"
        inside = (folder / name for name in ("vavae", "autoencoder", "pipeline/vae"))  # of a run
        if found := next((path for path in inside if (path / "config.json").is_file()), None):
            raise UserError(f"{folder} is no VA-VAE folder, but there is one in it: name {found}")
        raise UserError(f"{folder} is no VA-VAE folder: it {contents(folder)}, expected {needed}")
    of_class = config.get("_class_name", "VAVAE")
    if of_class not in ("VAVAE", "AutoencoderKL", "StableDiffusionVAE"):
        raise UserError(f"{folder} holds a {of_class}, expected a VAVAE or an AutoencoderKL")
    held = read_weights(source if source.is_file() else folder)
    weights = {current_name(name): tensor for name, tensor in held.items()}
    if of_class == "AutoencoderKL":
        config = {"scaling_factor": 0.18215, **config}  # its default, which older folders leave out
    return VAVAEWeights(folder, {k: v for k, v in config.items() if not k.startswith("_")}, weights)


def _split_training_state(others: Mapping[str, Tensor], discriminator: str, projection: str) -> dict[str, Any]:
    """Sort what stands beside an autoencoder's weights in a checkpoint of its training."""
    judge = [name for name in others if name.startswith(f"{discriminator}main.")]
    return {
        "discriminator": {name.removeprefix(discriminator): others[name] for name in judge} or None,
        "projection": others.get(projection),
        "unused": tuple(name for name in others if name not in (*judge, projection)),
    }
