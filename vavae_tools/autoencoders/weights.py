"""What a VA-VAE can start from: its own folders and checkpoints, diffusers' AutoencoderKL, the published weights."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vavae_tools.autoencoders.ldm_names import VAE, from_reference, infer_config, plain_names, vavae_arguments
from vavae_tools.autoencoders.vavae import VAVAE
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import read_checkpoint, read_safetensors

OF_VECTORS = ("conditions.", "encoder_projections.", "decoder_projections.")
FOLDER_WEIGHTS = "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class VAVAEWeights:
    """Weights of a VA-VAE, and what came with them.

    Attributes:
        config: VAVAE's arguments.
        weights: under VAVAE's names, float32.
        discriminator: under `main.0.weight` …, where the checkpoint of a training held one.
        projection: of the alignment with a foundation model: (its channels, latent channels, 1, 1).
        unused: names of what else was there.
    """

    source: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    discriminator: dict[str, Tensor] | None = None
    projection: Tensor | None = None
    unused: tuple[str, ...] = ()


def pretrained_small_folder() -> Path:
    """The folder of the small VA-VAE that comes with this package (trained on simulated walkers)."""
    return Path(str(files("vavae_tools.autoencoders") / "pretrained_small"))


def load_vavae(
    source: str | Path,
    condition_dim: int | None = None,
    num_conditions: int = 0,
    say: Callable[[str], None] = print,
    channels: int | None = None,
) -> VAVAE:
    """Load a VA-VAE to fine-tune; vectors and projections that the weights do not hold start anew.

    Args:
        source: what `read_vavae` takes.
        condition_dim, num_conditions, channels: of the model wanted, see `build_vavae`.

    Raises:
        UserError: nothing there, not a VA-VAE, or weights of another shape.
    """
    return build_vavae(read_vavae(source), condition_dim, num_conditions, channels, say)


def read_vavae(source: str | Path) -> VAVAEWeights:
    """Read a VA-VAE's weights without building it.

    Args:
        source: a folder that `save_pretrained` wrote (of a VAVAE or of diffusers' AutoencoderKL), a `.ckpt` of
            VA-VAE training here, or weights under the reference's names: the released `.pt`, a `.ckpt` of the
            reference's training, a `.safetensors` file. The latter tell their configuration by names and shapes.

    Raises:
        UserError: nothing there, damaged, or not a VA-VAE.
    """
    source = Path(source)
    if source.is_dir():
        return _read_folder(source)
    if not source.is_file():
        raise UserError(
            f"No VA-VAE at {source}: expected a folder with config.json or a .ckpt of VA-VAE training, "
            "or the published .pt, .ckpt or .safetensors"
        )
    if source.suffix == ".safetensors":
        return from_state_dict(read_safetensors(source), source=source)
    checkpoint = read_checkpoint(source)
    settings = checkpoint.get("hyper_parameters")
    if isinstance(settings, Mapping) and "vavae_config" in settings:
        return _from_training(checkpoint, settings["vavae_config"], source)
    return from_state_dict(checkpoint, source=source)


def from_state_dict(
    state_dict: Mapping[str, Any], config: Mapping[str, Any] | None = None, source: str | Path = "state_dict"
) -> VAVAEWeights:
    """Sort weights under the reference's names, of the autoencoder alone or of its whole training.

    Args:
        state_dict: bare, or a checkpoint that holds it under "state_dict".
        config: {"ddconfig": {…}, "embed_dim": …}; by default what names and shapes tell.
        source: what messages call them.
    """
    named = {name: tensor for name, tensor in plain_names(state_dict).items() if isinstance(tensor, Tensor)}
    if config is None:
        named = named or {name: torch.empty(0) for name in state_dict}  # what it holds in place of weights is told
        config = infer_config(named, source)
    try:
        arguments = vavae_arguments(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    projection = named.get("linear_proj.weight")
    if projection is not None and projection.shape[1:] != (arguments["latent_channels"], 1, 1):
        projection = None  # from the foundation model's channels to the latent's
    own = [name for name in named if name.startswith(VAE)]
    return _sorted_weights(
        Path(source),
        arguments,
        from_reference({name: named[name] for name in own}),
        named,
        own,
        "loss.discriminator.",
        None if projection is None else "linear_proj.weight",
    )


def build_vavae(
    found: VAVAEWeights,
    condition_dim: int | None = None,
    num_conditions: int = 0,
    channels: int | None = None,
    say: Callable[[str], None] = print,
) -> VAVAE:
    """The model with these weights; vectors and projections that they do not hold start anew.

    Args:
        condition_dim, num_conditions: of the model wanted; None keeps what the weights have, 0 drops it.
        channels: of the pictures, see `with_channels`; None keeps them.

    Raises:
        UserError: weights that are missing, or of another shape.
    """
    if channels is not None:
        found = with_channels(found, channels)
    config, weights = found.config, found.weights
    if condition_dim is not None:
        config = {**config, "condition_dim": condition_dim, "num_conditions": num_conditions}
    model = VAVAE.from_config(config)
    own = model.state_dict()
    other_people = "conditions.weight" in weights and weights["conditions.weight"].shape != tuple(
        own.get("conditions.weight", torch.empty(0)).shape
    )
    if other_people:  # vectors of other people, or of another length, say nothing here
        weights = {name: tensor for name, tensor in weights.items() if not name.startswith(OF_VECTORS)}
    wrong = [name for name in weights if name in own and own[name].shape != weights[name].shape]
    if wrong:
        shapes = tuple(weights[wrong[0]].shape), tuple(own[wrong[0]].shape)
        raise UserError(f"{found.source} is of another architecture: {wrong[0]} is {shapes[0]}, expected {shapes[1]}")
    loaded = model.load_state_dict(weights, strict=False)
    fresh = [name for name in loaded.missing_keys if not name.startswith(OF_VECTORS)]
    if fresh:
        raise UserError(
            f"{found.source} lacks {len(fresh)} of the model's weights, the first {fresh[0]}; is it a VA-VAE?"
        )
    parts = {"a discriminator": found.discriminator, "an alignment projection": found.projection}
    came = [part for part, there in parts.items() if there is not None]
    also = f", with {' and '.join(came)}" if came else ""
    say(
        f"VA-VAE weights: {len(weights) - len(loaded.unexpected_keys)} matched, {len(loaded.missing_keys)} start anew, "
        f"{len(loaded.unexpected_keys) + len(found.unused)} unused{also} ({found.source})"
    )
    return model


def with_channels(found: VAVAEWeights, channels: int) -> VAVAEWeights:
    """The same weights for pictures of one channel in place of several, or the reverse.

    A grey picture stands for one of equal channels, so that nothing that was learned is lost: the grey model equals
    the other one fed with equal channels, its output averaged over them; and so does the discriminator.

    Raises:
        UserError: neither the number now nor the one wanted is 1.
    """
    discriminator = found.discriminator
    conv_in, conv_out, first = "encoder.conv_in.weight", "decoder.conv_out.", "main.0.weight"
    weights = dict(found.weights)
    for name, tensor in found.weights.items():
        if name == conv_in:
            weights[name] = _for_input(tensor, channels)
        elif name.startswith(conv_out):
            weights[name] = _for_output(tensor, channels)
    if discriminator is not None and first in discriminator:
        discriminator = {**discriminator, first: _for_input(discriminator[first], channels)}
    config = {**found.config, "in_channels": channels, "out_channels": channels}
    return replace(found, config=config, weights=weights, discriminator=discriminator)


def read_condition_file(path: str | Path, labels: dict[str, int]) -> Tensor:
    """Read one vector per person from a safetensors file whose keys are the folders' names (`ID_1`, …).

    Returns:
        float32 (number of labels, condition_dim), in the order of the labels.

    Raises:
        UserError: no such file, a person without a vector, or vectors of different lengths.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise UserError(f"No condition file {path}; it holds one vector per person under the folder's name (ID_1 …)")
    try:
        vectors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error})") from None
    missing = sorted(set(labels) - set(vectors))
    if missing:
        raise UserError(f"{path} has no vector for {', '.join(missing[:5])}; it holds {len(vectors)} vectors")
    shapes = {tuple(vectors[name].shape) for name in labels}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise UserError(f"The vectors of {path} differ in shape: {sorted(shapes)}; expected one length for all")
    table = torch.zeros(max(labels.values()) + 1, next(iter(shapes))[0])
    for name, label in labels.items():
        table[label] = vectors[name].float()
    return table


# ---- reading
def _read_folder(folder: Path) -> VAVAEWeights:
    path = folder / FOLDER_WEIGHTS
    if not (folder / "config.json").is_file() or not path.is_file():
        raise UserError(_no_folder(folder))
    try:
        config = VAVAE.load_config(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read ({error}): copy it again") from None
    weights = {_current_name(name): tensor.float() for name, tensor in read_safetensors(path).items()}
    if not any(name.startswith("encoder.") for name in weights):
        some = ", ".join(list(weights)[:3]) or "none"
        raise UserError(
            f"{folder} is no VA-VAE folder: its {len(weights)} weights are {some} …, expected encoder.* and decoder.*"
        )
    if config.get("_class_name") == "AutoencoderKL":
        config = {"scaling_factor": 0.18215, **config}  # its default, which older folders leave out
    return VAVAEWeights(folder, {k: v for k, v in config.items() if not k.startswith("_")}, weights)


def _no_folder(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    message = f"{folder} is no VA-VAE folder: expected config.json and {FOLDER_WEIGHTS}, found "
    message += ", ".join(names[:5]) or "nothing"
    pickles = [name for name in names if name.endswith(".bin")]
    single = [name for name in names if name.endswith((".pt", ".ckpt", ".safetensors"))]
    if "config.json" in names and pickles:
        return (
            f'{message}. A .bin may hold code: where you trust it, run python -c "from diffusers import AutoencoderKL; '
            f"AutoencoderKL.from_pretrained('{folder}', use_safetensors=False).save_pretrained('{folder}')\""
        )
    return f"{message}. Name the file itself: {folder / single[0]}" if single else message


def _from_training(checkpoint: Mapping[str, Any], config: Mapping[str, Any], source: Path) -> VAVAEWeights:
    named = plain_names({"state_dict": checkpoint.get("state_dict", {})})
    own = [name for name in named if name.startswith("vavae.")]
    weights = {name.removeprefix("vavae."): named[name] for name in own}
    return _sorted_weights(source, dict(config), weights, named, own, "discriminator.", "projection.weight")


def _sorted_weights(
    source: Path,
    config: dict[str, Any],
    weights: dict[str, Tensor],
    named: Mapping[str, Tensor],
    own: list[str],
    discriminator: str,
    projection: str | None,
) -> VAVAEWeights:
    """Only what is used becomes float32: a foundation model of 300 M frozen weights may stand in the same file."""
    of_discriminator = [name for name in named if name.startswith(f"{discriminator}main.")]
    used = {*own, *of_discriminator, projection}
    return VAVAEWeights(
        source,
        config,
        {name: tensor.float() for name, tensor in weights.items()},
        {name.removeprefix(discriminator): _float(named[name]) for name in of_discriminator} or None,
        named[projection].float() if projection in named else None,
        tuple(name for name in named if name not in used),
    )


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor  # batch normalisation counts its batches


def _current_name(name: str) -> str:
    """Attention as AutoencoderKL names it now, in place of its former names."""
    now = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    return re.sub(rf"(?<=\.attentions\.0\.)({'|'.join(now)})(?=\.)", lambda found: now[found[1]], name)


# ---- channels
def _for_input(weight: Tensor, channels: int) -> Tensor:
    """A convolution's weight (out, in, k, k) for another number of equal input channels."""
    _check_channels(weight.shape[1], channels)
    if weight.shape[1] == channels:
        return weight
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight.repeat_interleave(channels, 1) / channels


def _for_output(tensor: Tensor, channels: int) -> Tensor:
    """A convolution's weight (out, in, k, k) or bias (out,) for another number of output channels."""
    _check_channels(tensor.shape[0], channels)
    if tensor.shape[0] == channels:
        return tensor
    return tensor.mean(0, keepdim=True) if channels == 1 else tensor.repeat_interleave(channels, 0)


def _check_channels(found: int, wanted: int) -> None:
    if wanted < 1 or (wanted != found and 1 not in (found, wanted)):
        raise UserError(f"channels={wanted}: weights for {found} channels can become weights for 1, not for {wanted}")
