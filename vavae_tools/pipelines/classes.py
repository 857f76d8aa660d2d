"""Images of classes as one object: a diffusers pipeline of autoencoder, denoiser, conditioner and solver."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from vavae_tools.diffusion import FITTED_STEPS, USUAL_STEPS
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.objectives import FlowMatching, objective_of
from vavae_tools.diffusion.solvers import make_solver
from vavae_tools.diffusion.variations import Start, first_order, invert, slerp, usual_strength
from vavae_tools.pipelines import base
from vavae_tools.pipelines.batches import all_finite, in_batches, precision_for
from vavae_tools.pipelines.inputs import for_each, latent_mask
from vavae_tools.runtime.errors import UserError, in_home, join_first, nearest_named

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

    @property
    def usual_steps(self) -> int:
        """Steps where none are given: fewer if the solver has a schedule that was fitted to the model."""
        return FITTED_STEPS if str(FITTED_STEPS) in (self.scheduler.config.get("fitted") or {}) else USUAL_STEPS

    def labels_of(self, wanted: Iterable[int | str]) -> list[int]:
        """Return labels, or people's names, as labels; `UserError` where there is no such."""
        people, labels, most = self.people, [], self.conditioner.num_classes - 1
        for item in wanted:
            by_name = isinstance(item, str) and not item.removeprefix("-").isdecimal()
            if by_name and item not in people:
                raise UserError(
                    f"Nobody called {item!r}{nearest_named(item, people)}; there are {join_first(people, 12)}"
                )
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
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.25,
        *,
        generator: base.Generators = None,
        latents: Tensor | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        image: Any = None,
        mask_image: Any = None,
        image_labels: Iterable[int | str] | None = None,
        strength: float | None = None,
        **sampling: Any,
    ) -> ImagePipelineOutput:
        """Make one image for each label, or person's name: from noise, or a variation of a given image.

        Args:
            num_inference_steps: None: `usual_steps`.
            generator: of the noise, one for all or one for each image.
            latents: noise to start from, (len(labels), C, h, w), in place of a generator's; with a strength and
                without an image they are on the way already, as `invert` returns them.
            batch_size: images made at once, halved where memory runs out; None: by the memory there is. It changes
                memory and speed, not the images.
            output_type: "pil" (grey ones have mode L), "pt" for uint8 (N, C, H, W), "np" for uint8 (N, H, W, C).
            image: one for all labels or one for each, in a form of `inputs.pixels_of`. Its latents get noise up to
                `strength`, and are denoised as the person of the label.
            mask_image: white where something new is made, in a form of `inputs.latent_mask`; latents of which no pixel
                is white stay as the image's.
            image_labels: whose images they are, for the autoencoder's vectors; None: those of `labels`.
            strength: share of the way from the image, near 0, to noise alone, 1; None: `variations.usual_strength`.
            sampling: further arguments of `make`.
        """
        labels = self.labels_of(labels.tolist() if isinstance(labels, Tensor) else labels)
        sampling |= {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        given = self._given(labels, image, mask_image, image_labels, strength, on_the_way=latents is not None)

        def make(rows: slice, noise: Tensor) -> Tensor:
            start = given and given(rows)
            return self.make(torch.tensor(labels[rows], device=noise.device), noise, start=start, **sampling)

        return self._images(self._noise(len(labels), latents, generator), make, batch_size, output_type)

    def _given(
        self,
        labels: list[int],
        image: Any,
        mask_image: Any,
        image_labels: Any,
        strength: float | None,
        on_the_way: bool,
    ) -> Callable[[slice], Start] | None:
        """Return what tells the start of some rows, or None without an image."""
        if image is None:
            of_image = {"mask_image": mask_image, "image_labels": image_labels}
            if strength is not None and on_the_way:
                return lambda rows: Start(None, strength)
            of_image["strength"] = strength
            if unused := [name for name, value in of_image.items() if value is not None]:
                raise UserError(f"{unused[0]} without an image: give image, too, or leave it out")
            return None
        pixels = for_each(self.pixels_of(image), len(labels), "image")
        whose = torch.tensor(labels if image_labels is None else self.labels_of(image_labels))
        whose, mask = for_each(whose, len(labels), "image label"), None
        if mask_image is not None:
            mask = for_each(latent_mask(mask_image, self.image_size, self.vae.downsampling), len(labels), "mask")
        strength = usual_strength(strength, mask)

        def start(rows: slice) -> Start:
            latents = self.encode_images(pixels[rows], whose[rows])
            return Start(latents, strength, None if mask is None else mask[rows].to(latents.device))

        return start

    @torch.no_grad()
    def interpolate(
        self,
        label: int | str,
        image: Any,
        image2: Any,
        num_images: int = 8,
        num_inference_steps: int = 50,
        strength: float = 0.8,
        *,
        image_labels: Iterable[int | str] | None = None,
        timestep_shift: float | None = None,
        precision: str | None = None,
        **options: Any,
    ) -> ImagePipelineOutput:
        """Make images of one person from one image to another, which are the first and the last.

        They begin on the arc between what the two come from (`invert`): between latents themselves the middle would be
        a double exposure. There is no guidance, which is not undone by going back.

        Args:
            strength: how far back that is. At 0.8 simulated walkers end within 0.1 of 255 grey levels from their
                reconstructions; at 1, where a little decides which way they walk, 1 of 18 ended as another image.
            image_labels: whose the two images are; None: the label's.
            options: batch_size and output_type of the call.
        """
        if num_images < 2:
            raise UserError(f"num_images {num_images}: at least the two images themselves are made")
        steps = {"num_inference_steps": num_inference_steps, "timestep_shift": timestep_shift, "precision": precision}
        own, self.scheduler = self.scheduler, first_order(self.scheduler, self.objective)
        try:
            ends = self.invert(
                [image, image2], [label] * 2 if image_labels is None else image_labels, strength, **steps
            )
            between = slerp(*ends, torch.linspace(0, 1, num_images))
            labels = [label] * num_images
            return self(labels, guidance_scale=1.0, latents=between, strength=strength, **steps, **options)
        finally:
            self.scheduler = own

    @torch.no_grad()
    def invert(
        self,
        image: Any,
        labels: Iterable[int | str],
        strength: float = 1.0,
        num_inference_steps: int = 50,
        timestep_shift: float | None = None,
        precision: str | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """Return the latents (N, C, h, w) from which Euler's method, or DDIM, makes these images without guidance.

        Args:
            image: in a form of `inputs.pixels_of`, or a list of such.
            labels: whose images they are, for the autoencoder's vectors and as the condition.
            strength: how far back; at 1 the latents are noise.
        """
        pixels = torch.cat([self.pixels_of(one) for one in (image if isinstance(image, list | tuple) else [image])])
        whose, device = torch.tensor(self.labels_of(labels)), self._execution_device
        whose, precision = for_each(whose, len(pixels), "label").to(device), precision_for(self, precision)
        steps = {"num_inference_steps": num_inference_steps, "timestep_shift": timestep_shift, "strength": strength}

        def part(of: slice) -> Tensor:
            data = self.encode_images(pixels[of], whose[of])

            def back(rows: Tensor) -> Tensor:
                given = self.denoiser, self.scheduler, data[rows], self.conditioner(whose[of][rows])
                return invert(*given, objective=self.objective, **steps)

            return all_finite(self, len(data), precision, back, "latents").cpu()

        return torch.cat(in_batches(self, len(pixels), part, batch_size))

    @torch.no_grad()
    def make(
        self,
        labels: Tensor,
        noise: Tensor,
        num_inference_steps: int | None = None,
        guidance_scale: float = 1.25,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: str = "all",
        timestep_shift: float | None = None,
        guide: Guide | None = None,
        precision: str | None = None,
        start: Start | None = None,
    ) -> Tensor:
        """Make one batch: labels int64 (B,) and noise (B, C, h, w), where the models are → uint8 (B, C, H, W).

        Steps are those of `solvers.lay_out`, guidance is that of `solvers.guided_prediction`; there is none where
        `is_guided` says no.

        Args:
            guide: guides in place of the null condition (autoguidance), by the same scale; see `load_guide`.
            precision: "32", "16" or "bf16"; None: the machine's own, or that of half weights.
            start: latents of images that these are made from; None: noise alone.
        """

        def told(rows: Tensor) -> dict[str, Any]:
            told = {"conditioning": self.conditioner(labels[rows]), "start": start and start[rows]}
            if guide:
                return {**told, "guide": guide[0], "guide_conditioning": guide[1](labels[rows])}
            return {**told, "null": self.conditioner.null(len(rows)) if guidance_scale != 1 else None}

        if not self.is_guided(guide):
            guidance_scale = 1.0
        by = {"guidance_scale": guidance_scale, "guidance_interval": guidance_interval}
        steps = self.usual_steps if num_inference_steps is None else num_inference_steps
        by |= {"num_inference_steps": steps, "timestep_shift": timestep_shift}
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
