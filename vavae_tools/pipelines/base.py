"""What all pipelines share, and what they are read from: their own folders, and checkpoints of DiT training."""

import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import logging
from PIL import Image
from torch import Tensor

from vavae_tools.checkpoints.formats import read_any
from vavae_tools.diffusion import conditioning
from vavae_tools.diffusion.factory import make_denoiser
from vavae_tools.diffusion.lora import merged_weights
from vavae_tools.diffusion.objectives import Objective, objective_of
from vavae_tools.diffusion.solvers import swapped
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)
Conditioner = TypeVar("Conditioner", bound=ModelMixin)

LOADERS = {
    "LatentDiTPipeline": "load_pipeline",
    "TextToImagePipeline": "load_text_pipeline",
    "TokenImagePipeline": "load_token_pipeline",
}
OF_TOKENS = f"{{}} is of token images, which makes texts: load it by {LOADERS['TokenImagePipeline']}"


class DenoiserPipeline(DiffusionPipeline):
    """A denoiser that was trained with the objective in `config.objective`, and a solver that fits it."""

    @cached_property
    def objective(self) -> Objective | None:
        """None: what its scheduler says, in folders that do not keep it."""
        return objective_of(self.config.objective) if self.config.objective else None

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures, in pixels."""
        height, width = self.denoiser.latent_shape[1:]
        return height * self.vae.downsampling, width * self.vae.downsampling

    def noise(self, seed: int, indices: Tensor) -> Tensor:
        """The noise of picture number i of a seed: the same whatever else is made beside it, on any device count."""
        return Draws(seed, 0, indices).normal("sample", *self.denoiser.latent_shape)

    def swap_solver(self, name: str) -> None:
        """Take another solver of `diffusion.SOLVERS`, with the schedule or the time shift of the present one.

        Raises:
            UserError: an unknown name, or one for another objective.
        """
        self.scheduler = swapped(self.scheduler, name, self.objective)


# ---- a pipeline's own folder
def read_index(folder: Path) -> dict[str, Any]:
    """What a pipeline's folder holds; nothing where that is missing or damaged, which is said where it is read."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return index if isinstance(index, dict) else {}


def read_pipeline(kind: type[Pipeline], path: Path, ema: bool, **options: Any) -> Pipeline:
    """The pipeline that `save_pretrained` wrote; `options` are those of `from_pretrained`.

    Raises:
        UserError: no pipeline, one of another kind, live weights wanted (ema false), or files that are damaged.
    """
    if not (path / "model_index.json").is_file():
        there = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        raise UserError(f"{path} is no pipeline (no model_index.json); it holds {there}. Name a .ckpt or pipeline/")
    found = read_index(path).get("_class_name")
    if found in LOADERS and found != kind.__name__:
        raise UserError(f"{path} is a {found}: load it by {LOADERS[found]}")
    if not ema:
        raise UserError(f"{path} holds the averaged weights alone: name a .ckpt of the training for the live ones")
    _import_own_parts(path)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # it loads within a second
    try:  # without low_cpu_mem_usage it does not ask for a package that is of no use here
        return kind.from_pretrained(path, low_cpu_mem_usage=False, **options)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"The pipeline {path} cannot be read ({str(error)[:200]}): copy it again") from None
    finally:
        if bars:
            logging.enable_progress_bar()


_MOVED = {"vavae_tools.diffusion.text_conditioning": conditioning}
"""Modules that older pipelines name."""


def _import_own_parts(folder: Path) -> None:
    """Import the modules of ours that a folder needs: diffusers loads parts of imported modules alone."""
    sys.modules.update(_MOVED)
    for part in read_index(folder).values():
        home = part[0] if isinstance(part, list) and part else None
        if isinstance(home, str) and home.startswith("vavae_tools.autoencoders."):
            with suppress(ImportError):
                import_module(home)


# ---- a checkpoint of training
def read_training(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Of a checkpoint of DiT training: the weights, and what the models are made of.

    Raises:
        UserError: a checkpoint of something else.
    """
    checkpoint = read_any(path, lambda line: None)
    settings = checkpoint.get("hyper_parameters", {})
    if "denoiser_config" not in settings:
        raise UserError(f"{path} is no checkpoint of DiT training (it holds {', '.join(list(checkpoint)[:4])} …)")
    return checkpoint["state_dict"], settings


def trained_models(
    path: Path, state: Mapping[str, Tensor], settings: Mapping[str, Any], kind: type[Conditioner], ema: bool
) -> tuple[ModelMixin, Conditioner]:
    """Denoiser and conditioner of a checkpoint, as `read_training` gives it, to be used.

    Args:
        kind: of the conditioner.
        ema: take the averaged weights; False takes the live ones.

    Raises:
        UserError: weights that do not fit.
    """
    models = make_denoiser(settings["denoiser_config"]), kind(**settings["conditioner_config"])
    for name, model in zip(("denoiser", "conditioner"), models, strict=True):
        start = f"{'ema.network.' if ema else 'network.'}{name}."
        weights = {key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)}
        if name == "denoiser":
            weights = merged_weights(weights, settings.get("lora"))
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:120]
            raise UserError(f"{path}: its {start}* do not fit its own settings ({reason}): copy it again") from None
        model.eval()
    return models


def autoencoder_beside(checkpoint: Path) -> Path:
    """The autoencoder's folder of a training, by one of its checkpoints."""
    run = checkpoint.parent if (checkpoint.parent / "autoencoder").is_dir() else checkpoint.parent.parent
    folder = run / "autoencoder"
    return folder if folder.is_dir() else run / "vavae"  # as it was called before


def check_output_type(output_type: str) -> None:
    """Say it before anything is made if there is no such kind of output.

    Raises:
        UserError: it is none of "pil", "pt", "np".
    """
    if output_type not in ("pil", "pt", "np"):
        raise UserError(f"No output_type {output_type!r}; there are pil, pt, np")


def as_output_type(pictures: Tensor, output_type: str) -> Tensor | np.ndarray | list[Image.Image]:
    """Pictures uint8 (N, C, H, W) as they are ("pt"), as (N, H, W, C) ("np"), or as PIL's, grey ones in mode L."""
    if output_type == "pt":
        return pictures
    arrays = pictures.permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
    if output_type == "np":
        return arrays
    return [Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array) for array in arrays]
