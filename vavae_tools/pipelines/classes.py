"""Images of classes as one object: a diffusers pipeline of autoencoder, denoiser, conditioner and solver."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from torch import Tensor

from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.objectives import FlowMatching, objective_of
from vavae_tools.diffusion.solvers import make_solver
from vavae_tools.pipelines import base
from vavae_tools.runtime.errors import UserError, in_home, join_first

Guide = tuple[ModelMixin, ClassConditioner]  # a weaker denoiser of the same latents and classes, for autoguidance


class LatentDiTPipeline(base.ImagePipeline):
    """Labels → images: `pipe(labels=[0, 1], num_inference_steps=50, guidance_scale=1.25).images`.

    Args:
        vae: a `VAVAE` or `RAE`, with the statistics of its latents, which travel with it.
        people: folder name → label, so that images can be asked for by name and are written to `ID_k/`.
        objective: the config of what was trained with; None: flow matching.
    """

    model_cpu_offload_seq = "conditioner->denoiser->vae"
    usual_objective = FlowMatching()

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

    @property
    def people(self) -> dict[str, int]:
        """Folder name → label; `ID_k` → k − 1 where no names were kept."""
        kept = self.config.people
        return dict(kept) if kept else {f"ID_{label + 1}": label for label in range(self.conditioner.num_classes)}

    def labels_of(self, wanted: Iterable[int | str]) -> list[int]:
        """Return labels, or people's names, as labels; `UserError` where there is no such."""
        people, labels, most = self.people, [], self.conditioner.num_classes - 1
        for item in wanted:
            by_name = isinstance(item, str) and not item.removeprefix("-").isdecimal()
            if by_name and item not in people:
                raise UserError(f"Nobody called {item!r}; there are {join_first(people, 12)}")
            labels.append(people[item] if by_name else int(item))
            if not 0 <= labels[-1] <= most:
                raise UserError(f"Label {labels[-1]} does not exist: labels go from 0 to {most}")
        nameless = set(labels) - set(people.values())
        if nameless:  # rows of the conditioner that no person was trained with
            known = join_first((f"{label} ({name})" for name, label in people.items()), 12)
            raise UserError(f"Label {min(nameless)} is nobody's; there are {known}")
        return labels

    @torch.no_grad()
    def __call__(
        self,
        labels: Iterable[int | str] | Tensor,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.25,
        *,
        generator: base.Generators = None,
        latents: Tensor | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        **sampling: Any,
    ) -> ImagePipelineOutput:
        """Make one image for each label, or person's name.

        Args:
            generator: of the noise, one for all or one for each image.
            latents: noise to start from, (len(labels), C, h, w), in place of a generator's.
            batch_size: images made at once, halved where memory runs out; None: by the memory there is. It changes
                memory and speed, not the images.
            output_type: "pil" (grey ones have mode L), "pt" for uint8 (N, C, H, W), "np" for uint8 (N, H, W, C).
            sampling: further arguments of `make`.
        """
        labels = self.labels_of(labels.tolist() if isinstance(labels, Tensor) else labels)
        sampling |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}

        def make(rows: slice, noise: Tensor) -> Tensor:
            return self.make(torch.tensor(labels[rows], device=noise.device), noise, **sampling)

        return self._images(self._noise(len(labels), latents, generator), make, batch_size, output_type)

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
        """Make one batch: labels int64 (B,) and noise (B, C, h, w), where the models are → uint8 (B, C, H, W).

        Steps are those of `solvers.lay_out`, guidance is that of `solvers.guided_prediction`; there is none where
        `is_guided` says no.

        Args:
            guide: guides in place of the null condition (autoguidance), by the same scale; see `load_guide`.
            precision: "32", "16" or "bf16"; None: the machine's own, or that of half weights.
        """

        def told(rows: Tensor) -> dict[str, Any]:
            conditioning = self.conditioner(labels[rows])
            if guide:
                return {"conditioning": conditioning, "guide": guide[0], "guide_conditioning": guide[1](labels[rows])}
            null = self.conditioner.null(len(conditioning)) if guidance_scale != 1 else None
            return {"conditioning": conditioning, "null": null}

        if not self.is_guided(guide):
            guidance_scale = 1.0
        by = {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval}
        by |= {"num_inference_steps": num_inference_steps, "timestep_shift": timestep_shift}
        return self._sampled(noise, told, precision, labels, guidance_channels=guidance_channels, **by)


# ---- from files
def load_pipeline(
    path: str | Path, ema: bool = True, run: str | Path | None = None, with_autoencoder: bool = True
) -> LatentDiTPipeline:
    """Load a pipeline from its folder, or from a checkpoint of DiT training with `autoencoder/` beside its folder.

    Of a checkpoint the averaged weights are taken, with ema=False the live ones; `run` is its run's folder where it was
    copied elsewhere.
    """
    path = in_home(path)
    if base.is_folder_of_pipeline(path):
        return base.read_pipeline(LatentDiTPipeline, path, ema, **({} if with_autoencoder else {"vae": None}))
    *models, settings = base.read_training(LatentDiTPipeline, path, ema, ClassConditioner)
    vae, config = base.autoencoder_beside(path, run) if with_autoencoder else None, settings.get("objective", {})
    return LatentDiTPipeline(vae, *models, make_solver(None, objective_of(config)), settings.get("people"), config)


def load_guide(path: str | Path, pipe: LatentDiTPipeline, ema: bool = True) -> Guide:
    """Load the denoiser that guides a pipeline (autoguidance, Karras et al. 2024), to where the pipeline computes."""
    weak = load_pipeline(path, ema, with_autoencoder=False)
    for what, found, expected in (
        ("latents of shape", weak.denoiser.latent_shape, pipe.denoiser.latent_shape),
        ("classes:", weak.conditioner.num_classes, pipe.conditioner.num_classes),
        ("people", weak.config.people, pipe.config.people),
        ("a denoiser of", *(f"{of.objective.prediction} ({of.objective.path})" for of in (weak, pipe))),
    ):
        if found is not None and expected is not None and found != expected:
            shown, wanted = (join_first(x, 12) if what == "people" else x for x in (found, expected))
            differ = f"The guide {path} has {what} {shown}, the model {wanted}"
            raise UserError(f"{differ}: it must be of the same data and objective")
    return weak.denoiser.to(pipe._execution_device), weak.conditioner.to(pipe._execution_device)
