"""Published weights that are attached: known by names and shapes of what is in them, whatever the files are called."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vavae_tools.autoencoders.foundation import MODEL_TYPES
from vavae_tools.autoencoders.lpips import LPIPS, own_name
from vavae_tools.autoencoders.vavae import VAVAE_SIZES
from vavae_tools.autoencoders.weights import from_state_dict
from vavae_tools.checkpoints.foreign import flat_names
from vavae_tools.checkpoints.formats import reason_of
from vavae_tools.paths import ProjectPaths, attached_roots, walked
from vavae_tools.published.denoisers import KINDS, read_published
from vavae_tools.runtime.console import log
from vavae_tools.runtime.errors import UserError, join_first, one_line
from vavae_tools.runtime.files import read_json, read_weights, weight_files

ENDINGS = (".pt", ".pth", ".ckpt", ".safetensors")
PUBLISHED = VAVAE_SIZES["f16d32"]


class AttachedWeights(NamedTuple):
    """Where the weights of each kind are; None: there are none."""

    vavae: Path | None = None  # of the published size
    denoiser: Path | None = None  # LightningDiT's on its latents
    lpips: Path | None = None  # VGG16's convolutions
    foundation: Path | None = None  # a folder of transformers

    def named(self) -> dict[str, Path]:
        """Return {what it is called: where it is} of those that are there."""
        called = ("VA-VAE", "LightningDiT", "LPIPS's VGG16", "DINOv2")
        return {name: path for name, path in zip(called, self, strict=True) if path}


def find_attached_weights(place: ProjectPaths | None = None, log: Callable[[str], None] = log) -> AttachedWeights:
    """Return the newest weights of each kind that are attached; without `place`, where `find_paths` looks.

    Log in one line what was found, and what was passed over.
    """
    roots, found, passed = attached_roots() if place is None else place.attached, {}, []
    for path in sorted(_candidates(roots), key=lambda each: (-each.stat().st_mtime, each)):
        try:
            kinds = dict(_kinds(path))
        except UserError as error:
            passed.append(f"{path} ({one_line(reason_of(error, path), 300)})")
            continue
        if kinds and kinds.keys() <= found.keys():
            passed.append(f"{path} (older)")
        found = kinds | found
    weights = AttachedWeights(**found)
    if found or passed:
        listed = join_first((f"{name} ({path})" for name, path in weights.named().items()), 4) or "none"
        log(f"Attached weights: {listed}" + (f"; passed over: {join_first(passed)}" if passed else ""))
    return weights


def _candidates(roots: Iterable[Path]) -> Iterator[Path]:
    for folder, names in walked(roots):
        of_weights = (name for name in names if name.endswith(ENDINGS) and not name.startswith("."))
        yield from (folder / name for name in (*of_weights, *{"config.json"}.intersection(names)))


def _kinds(path: Path) -> Iterator[tuple[str, Path]]:
    """Yield what a file can be used as, and where that is; raise what speaks against one that nearly can."""
    if path.name == "config.json":
        if read_json(path).get("model_type") in MODEL_TYPES:
            for file in weight_files(path.parent):
                _read_shapes(file)  # half of one is told here
            yield "foundation", path.parent
        return
    saved = _read_shapes(path)
    tensors = {name: value for name, value in flat_names(saved).items() if isinstance(value, Tensor)}
    if any(name.endswith("encoder.down.0.block.0.conv1.weight") for name in tensors):
        config = from_state_dict(saved, source=path).config
        if any(config[name] != PUBLISHED[name] for name in ("latent_channels", "block_out_channels")):
            size = f"{config['latent_channels']} channels at 1/{2 ** (len(config['block_out_channels']) - 1)}"
            raise UserError(f"{path} is an autoencoder of another size, {size}: expected VA-VAE's 32 at 1/16")
        yield "vavae", path
    if any(name.endswith("y_embedder.embedding_table.weight") for name in tensors):
        found = read_published(path, read_weights(path))
        channels = found.arguments["in_channels"]
        if found.kind != "lightningdit" or channels != PUBLISHED["latent_channels"]:
            what = f"a {KINDS[found.kind]} on {channels} channels"
            raise UserError(f"{path} is {what}: expected LightningDiT on VA-VAE's 32")
        yield "denoiser", path
    if _vgg16() <= {(own_name(name), tuple(tensor.shape)) for name, tensor in tensors.items()}:
        yield "lpips", path


def _read_shapes(path: Path) -> Mapping[str, Any]:
    """Return what a file of weights holds, its tensors unread."""
    if path.suffix != ".safetensors":
        return read_weights(path)
    try:
        with safe_open(path, "pt") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from None
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _vgg16() -> set[tuple[str, tuple[int, ...]]]:
    with torch.device("meta"):
        return {(name, tuple(weights.shape)) for name, weights in LPIPS().convolutions.named_parameters("convolutions")}
