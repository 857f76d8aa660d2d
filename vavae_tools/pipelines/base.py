"""What all pipelines share, and what they are read from: their own folders, and checkpoints of denoiser training."""

import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from vavae_tools.autoencoders.encoders import silent_loading
from vavae_tools.autoencoders.weights import load_autoencoder
from vavae_tools.checkpoints.formats import is_checkpoint, read_any_format
from vavae_tools.data.images import to_pixels, to_unit
from vavae_tools.diffusion import conditioning, dit
from vavae_tools.diffusion.lora import merged_weights
from vavae_tools.diffusion.objectives import Objective, objective_of
from vavae_tools.diffusion.solvers import sample, swapped
from vavae_tools.pipelines.batches import all_finite, decoded, in_batches, precision_for
from vavae_tools.pipelines.inputs import pixels_of
from vavae_tools.pipelines.portable import PREFIX, as_installed, take_code_along
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError, check_known, contents, in_home, one_line
from vavae_tools.runtime.files import load_weights, plain_config, read_json, weights_digest

Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)
Generators = torch.Generator | list[torch.Generator] | None

FORMER_MODULES = {"text_conditioning": conditioning, "transformer": dit, "text_dit": dit, "ddt": dit}
"""Where older pipelines say that their classes are."""
PLAN = "plan"  # what the first of several processes shares once it has found nothing wrong
KINDS = {
    "LatentDiTPipeline": ("images of classes", "--labels ID_1,ID_2 says which", "load_pipeline"),
    "TextToImagePipeline": ("images from sentences", 'say which, with --prompt "…"', "load_text_pipeline"),
    "TokenImagePipeline": ("texts", "--prompt says how they begin", "load_token_pipeline"),
}
"""Class → what it makes, how to ask the command for it, and who loads it in Python."""


class DenoiserPipeline(DiffusionPipeline):
    """A denoiser that was trained with the objective in `config.objective`, and a solver that fits it."""

    makes = "image"
    usual_objective: Objective | None = None  # of folders that do not keep it; None: what the scheduler says

    @cached_property
    def objective(self) -> Objective | None:
        return objective_of(self.config.objective) if self.config.objective else self.usual_objective

    @classmethod
    def load_config(cls, *args: Any, **options: Any) -> Any:
        """Read what a folder says of its parts; classes of the package take the package's, and run no code of it."""
        config = super().load_config(*args, **options)
        return as_installed(config) if isinstance(config, dict) and cls.__module__.startswith(PREFIX) else config

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> None:
        """Write the folder as diffusers does, and the code that opens it where this package is not installed."""
        super().save_pretrained(save_directory, *args, **options)
        take_code_along(self, save_directory)

    def noise(self, seed: int, indices: Tensor) -> Tensor:
        """Return the noise of image number i of a seed: the same in any batch, on any number of devices."""
        return Draws(seed, 0, indices).normal("sample", *self.denoiser.latent_shape)

    def swap_solver(self, name: str) -> None:
        """Take another solver of `diffusion.SOLVERS` for the objective, with the present one's schedule or shift."""
        self.scheduler = swapped(self.scheduler, name, self.objective)


class ImagePipeline(DenoiserPipeline):
    """Noise → latents → images, by a denoiser that is told something and an autoencoder."""

    @property
    def image_size(self) -> tuple[int, int]:
        height, width = self.denoiser.latent_shape[1:]
        return height * self.vae.downsampling, width * self.vae.downsampling

    def is_guided(self, by: Any = None) -> bool:
        """Return whether anything can guide: what is given, or a null condition, if it was trained with one."""
        return by is not None or self.conditioner.dropout > 0

    def facts(self) -> dict[str, Any]:
        """Return what images follow from besides the arguments of `make`: the models' digest, and the solver."""
        solver = {"name": type(self.scheduler).__name__, **plain_config(self.scheduler)}
        return {"model": digest_of(self.denoiser, self.conditioner, self.vae), "solver": solver}

    def pixels_of(self, image: Any) -> Tensor:
        return pixels_of(image, self.vae.config.get("in_channels", 3), self.image_size)

    def encode_images(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return normalised latents, float32 (B, C, h, w), of images uint8 (B, C, H, W) by the vectors of `labels`."""
        images, labels = (given.to(self._execution_device) for given in (images, labels))
        return self.vae.normalise(self.vae.encode_images(to_unit(images).to(self.vae.dtype), labels)).float()

    def _sampled(self, noise: Tensor, told: Callable, precision: str, labels: Tensor | None, **by: Any) -> Tensor:
        """Return images uint8 (B, C, H, W) from noise (B, C, h, w), where the models are; `told`: rows → conditions."""
        precision = precision_for(self, precision)
        if not torch.as_tensor(by["guidance_scale"]).isfinite().all():
            raise UserError(f"guidance_scale={by['guidance_scale']} is no number to guide by: 1 is none, 1.25 a little")

        def denoise(rows: Tensor) -> Tensor:
            return sample(self.denoiser, self.scheduler, noise[rows], objective=self.objective, **told(rows), **by)

        latents = all_finite(self, len(noise), precision, denoise, "latents")
        return to_pixels(decoded(self, latents, precision, labels))

    def _noise(self, count: int, latents: Tensor | None, generator: Generators) -> Tensor:
        """Return what `count` images begin with, (N, C, h, w): these latents, or drawn ones."""
        shape = count, *self.denoiser.latent_shape
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise UserError(f"latents are {tuple(latents.shape)}, expected {shape}")
        return latents

    def _images(
        self, noise: Tensor, make: Callable[[slice, Tensor], Tensor], batch_size: int | None, output_type: str
    ) -> ImagePipelineOutput:
        """Return images as a pipeline's call does, by `make`: rows and their noise (b, C, h, w) → images."""
        check_known("output_type", output_type, ("pil", "pt", "np"))

        def part(rows: slice) -> Tensor:
            return make(rows, noise[rows].to(self._execution_device)).cpu()

        with self.progress_bar(total=len(noise)) as bar:
            images = torch.cat(in_batches(self, len(noise), part, batch_size, bar.update))  # uint8 (N, C, H, W)
        self.maybe_free_model_hooks()  # of `enable_model_cpu_offload`
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
        if output_type == "pil":  # grey ones in mode L
            images = [Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array) for array in images]
        return ImagePipelineOutput(images=images)


def digest_of(*models: ModelMixin) -> str:
    parts = [[weights_digest(model), plain_config(model)] for model in models]
    return hashlib.sha256("".join(json.dumps(part, sort_keys=True, default=str) for part in parts).encode()).hexdigest()


# ---- from files
def is_folder_of_pipeline(path: Path) -> bool:
    return path.is_dir() and not is_checkpoint(path)


def kind_of(path: str | Path) -> str:
    """Return the class, of `KINDS`, of a pipeline's folder or a checkpoint of training; "" of another folder."""
    if is_folder_of_pipeline(Path(path)):
        index = Path(path) / "model_index.json"
        return str(as_installed(read_json(index)).get("_class_name")) if index.is_file() else ""
    return _kind_trained(_read_checkpoint(Path(path))["hyper_parameters"])


def _kind_trained(settings: dict[str, Any]) -> str:
    if "token_images" in settings:
        return "TokenImagePipeline"
    return "TextToImagePipeline" if "text_dim" in settings.get("conditioner_config", {}) else "LatentDiTPipeline"


def _check_kind(path: Path, found: str, wanted: type[DiffusionPipeline]) -> None:
    if found in KINDS and found != wanted.__name__:
        (makes, asked, load), wanted = KINDS[found], KINDS[wanted.__name__][0]
        raise UserError(f"{path} makes {makes}, expected one that makes {wanted}: {asked} (in Python {load})")


def read_pipeline(kind: type[Pipeline], path: Path, ema: bool, **options: Any) -> Pipeline:
    """Return the pipeline that `save_pretrained` wrote; `options` are those of `from_pretrained`."""
    if not (path / "model_index.json").is_file():
        inner = next(filter(Path.is_dir, (path / "pipeline", path.parent / "pipeline")), "a .ckpt or pipeline/")
        raise UserError(f"{path} is no pipeline (no model_index.json); it {contents(path)}: name {inner}")
    index = as_installed(read_json(path / "model_index.json"))
    _check_kind(path, str(index.get("_class_name")), kind)
    if not ema:
        raise UserError(f"{path} holds the averaged weights alone: name a .ckpt of the training for the live ones")
    sys.modules.update({f"vavae_tools.diffusion.{name}": module for name, module in FORMER_MODULES.items()})
    homes = [str(part[0]) for part in index.values() if isinstance(part, list) and part]
    for home in homes:  # diffusers finds our classes in modules that are imported already
        if home.startswith("vavae_tools.autoencoders."):
            with suppress(ImportError):
                import_module(home)
    parts = [n for n, of in index.items() if isinstance(of, list) and len(of) == 2 and isinstance(of[0], str)]
    if lacking := [f"{name}/" for name in parts if name not in options and _lacks(path / name)]:
        raise UserError(f"The pipeline {path} lacks {', '.join(lacking)}, or its weights: copy the whole folder again")
    try:  # without low_cpu_mem_usage it does not ask for a package that is of no use here
        with silent_loading():
            return kind.from_pretrained(path, low_cpu_mem_usage=False, **options)
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"The pipeline {path} cannot be read ({one_line(error, 200)}): copy it again") from None


def _lacks(part: Path) -> bool:
    """Return whether a part of a pipeline is not there, or is a model without weights."""
    has_weights = any(file.suffix in (".safetensors", ".bin") for file in part.iterdir()) if part.is_dir() else False
    return not part.is_dir() or ((part / "config.json").is_file() and not has_weights)


def _read_checkpoint(path: Path) -> dict[str, Any]:
    checkpoint = read_any_format(path, lambda line: None)
    if "denoiser_config" not in checkpoint.get("hyper_parameters", {}):
        raise UserError(f"{path} is no checkpoint of DiT training (it holds {', '.join(list(checkpoint)[:4])} …)")
    return checkpoint


def read_training(
    kind: type[DiffusionPipeline], path: Path, ema: bool, conditioner: type[ModelMixin]
) -> tuple[ModelMixin, ModelMixin, dict[str, Any]]:
    """Return denoiser and conditioner of a checkpoint, in evaluation mode, and the settings of its training."""
    checkpoint = _read_checkpoint(path)
    state, settings = checkpoint["state_dict"], checkpoint["hyper_parameters"]
    _check_kind(path, _kind_trained(settings), kind)
    models = dit.make_denoiser(settings["denoiser_config"]), conditioner(**settings["conditioner_config"])
    for name, model in zip(("denoiser", "conditioner"), models, strict=True):
        start = f"{'ema.network.' if ema else 'network.'}{name}."
        weights = {key.removeprefix(start): tensor for key, tensor in state.items() if key.startswith(start)}
        if name == "denoiser":
            weights = merged_weights(weights, settings.get("lora"))
        load_weights(model.eval(), weights, f"{path} ({start}*)")
    return *models, settings


def folder_beside(path: Path, *names: str, run: str | Path | None = None) -> Path:
    """Return the first folder of these names in `run`, in a pipeline, or beside a checkpoint or its folder."""
    beside = dict.fromkeys((*path.absolute().parents[:2], *path.resolve().parents[:2]))  # also where a link points to
    for folder in (in_home(home) / name for home in ([run] if run else [path, *beside]) for name in names):
        if folder.is_dir():
            return folder
    if run:
        raise UserError(f"No {names[0]}/ in {run}: it {contents(Path(run))}; name the folder of the run of {path}")
    needs = f"what {path.name} needs of its training; name the run's folder by --run, or copy {names[0]}/ from there"
    raise UserError(f"No {names[0]}/ in or beside {path}, {needs}")


def autoencoder_beside(path: Path, run: str | Path | None = None) -> ModelMixin:
    names = "autoencoder", "vavae", "vae"  # as it was called before, and as it is in a pipeline
    return load_autoencoder(folder_beside(path, *names, run=run)).eval()
