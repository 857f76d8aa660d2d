"""Sampling as one object: a diffusers pipeline of autoencoder, denoiser, conditioner and solver, in one folder."""

from collections.abc import Iterable
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from vavae_tools.autoencoders.loading import load_autoencoder
from vavae_tools.checkpoints.formats import is_checkpoint
from vavae_tools.data.images import to_pixels
from vavae_tools.diffusion.conditioning import ClassConditioner, check_labels
from vavae_tools.diffusion.objectives import Objective, objective_of
from vavae_tools.diffusion.solvers import make_solver, sample
from vavae_tools.pipelines.base import (
    OF_TOKENS,
    DenoiserPipeline,
    as_output_type,
    autoencoder_beside,
    check_output_type,
    read_index,
    read_pipeline,
    read_training,
    trained_models,
)
from vavae_tools.pipelines.portions import Portions
from vavae_tools.pipelines.precision import all_finite, decoded, precisions_for
from vavae_tools.runtime.errors import UserError

Guide = tuple[ModelMixin, ClassConditioner]
"""A weaker denoiser of the same latents and classes with its conditioner, for autoguidance."""


class LatentDiTPipeline(DenoiserPipeline):
    """Labels → pictures: `pipe(labels=[0, 1], num_inference_steps=50, guidance_scale=1.25).images`.

    Args:
        vae: a `VAVAE` or `RAE`, with the statistics of its latents, which travel with it.
        denoiser, conditioner: a `DiT` or `DDT` and its `ClassConditioner`, as trained; the averaged weights unless one
            chose otherwise.
        scheduler: of `make_solver`, or another one of diffusers that fits the objective.
        people: folder name → label, so that pictures can be asked for by name and are written to `ID_k/`.
        objective: the config of what was trained with; None: flow matching.

    `save_pretrained(folder)` and `LatentDiTPipeline.from_pretrained(folder)` keep all of it, also people.
    """

    model_cpu_offload_seq = "conditioner->denoiser->vae"

    def __init__(
        self,
        vae: ModelMixin,
        denoiser: ModelMixin,
        conditioner: ClassConditioner,
        scheduler: SchedulerMixin,
        people: dict[str, int] | None = None,
        objective: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, denoiser=denoiser, conditioner=conditioner, scheduler=scheduler)
        self.register_to_config(people=people, objective=objective)

    @cached_property
    def objective(self) -> Objective:
        return objective_of(self.config.objective or {})

    @property
    def people(self) -> dict[str, int]:
        """Folder name → label; `ID_k` → k − 1 where no names were kept."""
        kept = self.config.people
        return dict(kept) if kept else {f"ID_{label + 1}": label for label in range(self.conditioner.num_classes)}

    def labels_of(self, wanted: Iterable[int | str]) -> list[int]:
        """Labels, or people's names, as labels.

        Raises:
            UserError: a label out of range or of nobody, or a name that is not known.
        """
        people, labels = self.people, []
        for item in wanted:
            if isinstance(item, str) and not item.removeprefix("-").isdecimal():
                if item not in people:
                    raise UserError(f"Nobody called {item!r}; there are {_some(people)}")
                labels.append(people[item])
            else:
                labels.append(int(item))
        check_labels(labels, self.conditioner.num_classes)
        nameless = set(labels) - set(people.values())
        if nameless:  # rows of the conditioner that no person was trained with
            known = _some(f"{label} ({name})" for name, label in people.items())
            raise UserError(f"Label {min(nameless)} is nobody's; there are {known}")
        return labels

    @torch.no_grad()
    def __call__(
        self,
        labels: Iterable[int | str] | Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.25,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: str = "all",
        timestep_shift: float | None = None,
        guide: Guide | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        precision: str | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Make one picture for each label.

        Args:
            labels: of the people wanted, or their names.
            num_inference_steps, guidance_scale, guidance_interval, guidance_channels, timestep_shift, guide, precision:
                of `make`.
            generator: of the noise, one for all or one for each picture.
            latents: noise to start from, (len(labels), C, h, w), in place of a generator's.
            batch_size: pictures made at once, halved where memory runs out; None: by the memory there is. It
                changes memory and speed, not the pictures.
            output_type: "pil" (grey ones have mode L), "pt" for uint8 (N, C, H, W), "np" for uint8 (N, H, W, C).
        """
        check_output_type(output_type)
        labels = self.labels_of(labels.tolist() if isinstance(labels, Tensor) else labels)
        in_portions = Portions(self, batch_size)
        device, shape = self._execution_device, (len(labels), *self.denoiser.latent_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise UserError(f"latents are {tuple(latents.shape)}, expected {shape}")
        settings = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
            "guidance_channels": guidance_channels,
            "timestep_shift": timestep_shift,
            "guide": guide,
            "precision": precision,
        }

        def make(rows: slice) -> Tensor:
            return self.make(torch.tensor(labels[rows], device=device), latents[rows].to(device), **settings).cpu()

        with self.progress_bar(total=len(labels)) as bar:
            pictures = in_portions(len(labels), make, bar.update)
        self.maybe_free_model_hooks()  # of `enable_model_cpu_offload`
        images = as_output_type(torch.cat(pictures), output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    @torch.no_grad()
    def make(
        self,
        labels: Tensor,
        noise: Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.25,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: str = "all",
        timestep_shift: float | None = None,
        guide: Guide | None = None,
        precision: str | None = None,
    ) -> Tensor:
        """One batch: labels int64 (B,) and noise (B, C, h, w), where the models are → pictures uint8 (B, C, H, W).

        Args:
            num_inference_steps, timestep_shift: calls of the denoiser and their times; see `solvers.lay_out`.
            guidance_scale, guidance_interval, guidance_channels: see `solvers.guided_prediction`.
            guide: guides in place of the null condition (autoguidance), by the same scale; see `load_guide`.
            precision: "32", "16" or "bf16", see `precision`; None: the machine's own, or that of half weights.
        """
        by_null = guidance_scale != 1 and guide is None
        precision, count = precisions_for(self, precision)[0], len(labels)

        def denoise(rows: slice | Tensor) -> Tensor:
            conditioning = self.conditioner(labels[rows])
            return sample(
                self.denoiser,
                self.scheduler,
                noise[rows],
                conditioning,
                self.conditioner.null(len(conditioning)) if by_null else None,
                num_inference_steps,
                guidance_scale,
                guidance_interval,
                guidance_channels,
                timestep_shift,
                guide=guide[0] if guide else None,
                guide_conditioning=guide[1](labels[rows]) if guide else None,
                objective=self.objective,
            )

        latents = all_finite(self, count, precision, denoise, "latents")
        return to_pixels(decoded(self, latents, precision, labels))


def _some(names: Iterable[str]) -> str:
    names = iter(names)
    first = list(islice(names, 12))
    return ", ".join(first) + (" …" if next(names, None) is not None else "")


# ---- from files
def load_pipeline(path: str | Path, ema: bool = True, autoencoder_dir: str | Path | None = None) -> LatentDiTPipeline:
    """Load a pipeline from its folder, or from a `.ckpt` of DiT training.

    Args:
        path: a folder that `save_pretrained` wrote, or `best-*.ckpt`, `last.ckpt`.
        ema: of a checkpoint, take the averaged weights; False takes the live ones.
        autoencoder_dir: the autoencoder of a checkpoint; by default `autoencoder/` beside the checkpoints' folder.

    Raises:
        UserError: nothing there, a checkpoint of another kind, no autoencoder beside it, or live weights of a folder.
    """
    path = Path(path)
    if path.is_dir() and not is_checkpoint(path):
        return _read_folder(path, ema)
    state, settings = read_training(path)
    if "text_dim" in settings.get("conditioner_config", {}):
        raise UserError(_OF_TEXT.format(path))
    if "token_images" in settings:
        raise UserError(OF_TOKENS.format(path))
    vae = load_autoencoder(autoencoder_dir or autoencoder_beside(path))
    denoiser, conditioner = trained_models(path, state, settings, ClassConditioner, ema)
    config = settings.get("objective", {})
    solver = make_solver(None, objective_of(config))
    return LatentDiTPipeline(vae.eval(), denoiser, conditioner, solver, settings.get("people"), config)


def load_guide(path: str | Path, pipe: LatentDiTPipeline, ema: bool = True) -> Guide:
    """Load the denoiser that guides a pipeline (autoguidance, Karras et al. 2024), to where the pipeline computes.

    Args:
        path: as in `load_pipeline`; of an autoencoder nothing is needed.

    Raises:
        UserError: as there, or its latents or classes are not the pipeline's.
    """
    path = Path(path)
    if path.is_dir() and not is_checkpoint(path):
        weak = _read_folder(path, ema, vae=None)
        denoiser, conditioner, people = weak.denoiser, weak.conditioner, weak.config.people
        objective = weak.objective
    else:
        state, settings = read_training(path)
        denoiser, conditioner = trained_models(path, state, settings, ClassConditioner, ema)
        people, objective = settings.get("people"), objective_of(settings.get("objective", {}))
    for what, found, expected in (
        ("latents of shape", denoiser.latent_shape, pipe.denoiser.latent_shape),
        ("classes:", conditioner.num_classes, pipe.conditioner.num_classes),
        ("people", people, pipe.config.people),
        ("a denoiser of", *(f"{of.prediction} ({of.path})" for of in (objective, pipe.objective))),
    ):
        known = found is not None and expected is not None
        if known and (dict(found) != dict(expected) if what == "people" else found != expected):
            found, expected = (_some(v) if what == "people" else v for v in (found, expected))
            must = "it must be of the same data and objective"
            raise UserError(f"The guide {path} has {what} {found}, the model {expected}: {must}")
    return denoiser.to(pipe._execution_device), conditioner.to(pipe._execution_device)


_OF_TEXT = '{} makes pictures from sentences: say which, with --prompt "…" (in Python load_text_pipeline)'


def _read_folder(path: Path, ema: bool, **parts: None) -> LatentDiTPipeline:
    if read_index(path).get("_class_name") == "TextToImagePipeline":
        raise UserError(_OF_TEXT.format(path))
    return read_pipeline(LatentDiTPipeline, path, ema, **parts)
