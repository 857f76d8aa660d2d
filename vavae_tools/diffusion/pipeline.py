"""Sampling as one object: a diffusers pipeline of VA-VAE, denoiser, conditioner and solver, in one folder."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from vavae_tools.autoencoders.vavae import VAVAE
from vavae_tools.autoencoders.weights import load_vavae
from vavae_tools.data.images import save_picture, to_pixels
from vavae_tools.diffusion.conditioning import ClassConditioner, check_labels
from vavae_tools.diffusion.sampling import sample
from vavae_tools.diffusion.transformer import DiT
from vavae_tools.draws import Draws
from vavae_tools.errors import UserError
from vavae_tools.files import read_checkpoint


class LatentDiTPipeline(DiffusionPipeline):
    """Labels → pictures: `pipe(labels=[0, 1], num_inference_steps=50, guidance_scale=1.25).images`.

    Args:
        vae: with the statistics of its latents, which travel with it.
        denoiser, conditioner: as trained; the averaged weights unless one chose otherwise.
        scheduler: any of diffusers' flow-matching solvers.
        people: folder name → label, so that pictures can be asked for by name and are written to `ID_k/`.

    `save_pretrained(folder)` and `LatentDiTPipeline.from_pretrained(folder)` keep all of it, also people.
    """

    model_cpu_offload_seq = "conditioner->denoiser->vae"

    def __init__(
        self,
        vae: VAVAE,
        denoiser: DiT,
        conditioner: ClassConditioner,
        scheduler: SchedulerMixin,
        people: dict[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, denoiser=denoiser, conditioner=conditioner, scheduler=scheduler)
        self.register_to_config(people=people)

    @property
    def people(self) -> dict[str, int]:
        """Folder name → label; `ID_k` → k − 1 where no names were kept."""
        kept = self.config.people
        return dict(kept) if kept else {f"ID_{label + 1}": label for label in range(self.conditioner.num_classes)}

    def labels_of(self, wanted: Iterable[int | str]) -> list[int]:
        """Labels, or people's names, as labels.

        Raises:
            UserError: a label out of range, or a name that is not known.
        """
        labels = []
        for item in wanted:
            if isinstance(item, str) and not item.removeprefix("-").isdecimal():
                if item not in self.people:
                    raise UserError(f"Nobody called {item!r}; there are {', '.join(self.people)}")
                labels.append(self.people[item])
            else:
                labels.append(int(item))
        check_labels(labels, self.conditioner.num_classes)
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
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        batch_size: int = 64,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Make one picture for each label.

        Args:
            labels: of the people wanted, or their names.
            num_inference_steps: calls of the denoiser; see `sampling.make_solver`.
            guidance_scale, guidance_interval, guidance_channels: see `sampling.guided_velocity`.
            generator: of the noise, one for all or one for each picture.
            latents: noise to start from, (len(labels), C, h, w), in place of a generator's.
            batch_size: pictures made at once; it changes memory and speed, not the pictures.
            output_type: "pil" (grey ones have mode L), "pt" for uint8 (N, C, H, W), "np" for uint8 (N, H, W, C).
        """
        if output_type not in ("pil", "pt", "np"):
            raise UserError(f"No output_type {output_type!r}; there are pil, pt, np")
        labels = self.labels_of(labels.tolist() if isinstance(labels, Tensor) else labels)
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: at least one picture at once is needed")
        device, shape = self._execution_device, (len(labels), *self.denoiser.latent_shape)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise UserError(f"latents are {tuple(latents.shape)}, expected {shape}")
        pictures = []
        with self.progress_bar(total=len(labels)) as bar:
            for start in range(0, len(labels), batch_size):
                of_batch = torch.tensor(labels[start : start + batch_size], device=device)
                noise = latents[start : start + batch_size].to(device)
                made = sample(
                    self.denoiser,
                    self.scheduler,
                    noise,
                    self.conditioner(of_batch),
                    self.conditioner.null(len(of_batch)) if guidance_scale != 1 else None,
                    num_inference_steps,
                    guidance_scale,
                    guidance_interval,
                    guidance_channels,
                    timestep_shift,
                )
                pictures.append(to_pixels(self.vae.decode_latents(made, of_batch)).cpu())
                bar.update(len(of_batch))
        images: Tensor | np.ndarray | list[Image.Image] = torch.cat(pictures)  # uint8 (N, C, H, W)
        if output_type != "pt":
            images = images.permute(0, 2, 3, 1).numpy()  # (N, H, W, C)
        if output_type == "pil":
            images = [Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array) for array in images]
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def noise(self, seed: int, indices: Tensor) -> Tensor:
        """The noise of picture number i of a seed: the same whatever else is made beside it, on any device count."""
        return Draws(seed, 0, indices).normal("sample", *self.denoiser.latent_shape)


def write_samples(
    pipe: LatentDiTPipeline,
    labels: Iterable[int | str],
    output_dir: str | Path,
    seed: int = 0,
    names: list[str] | None = None,
    **sampling: object,
) -> list[Path]:
    """Make a picture for each label and write it to `output_dir/ID_k/`, where a split and any classifier find it.

    Args:
        seed: the n-th picture of a label follows from it, the label and n.
        names: folder names in the labels' order, in place of the pipeline's own.
        sampling: further arguments of the pipeline.

    Returns:
        The written files, in the order of `labels`. Files of the same name are replaced.
    """
    labels = pipe.labels_of(labels)
    if names is not None and len(names) != pipe.conditioner.num_classes:
        raise UserError(f"The class list has {len(names)} names, the model {pipe.conditioner.num_classes} classes")
    folder_of = dict(enumerate(names)) if names else {label: name for name, label in pipe.people.items()}
    counts: dict[int, int] = {}
    numbers = []
    for label in labels:
        numbers.append(counts.get(label, 0))
        counts[label] = numbers[-1] + 1
    indices = torch.tensor([label * 1_000_003 + number for label, number in zip(labels, numbers, strict=True)])
    pipe.set_progress_bar_config(desc="sampling", unit="picture", disable=None)
    images = pipe(labels, latents=pipe.noise(seed, indices), output_type="pt", **sampling).images
    written = []
    for image, label, number in zip(images, labels, numbers, strict=True):
        folder = Path(output_dir) / folder_of.get(label, f"ID_{label + 1}")
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"seed{seed}_{number:05d}.png")
        save_picture(image, written[-1])
    return written


def load_pipeline(path: str | Path, ema: bool = True, vavae_dir: str | Path | None = None) -> LatentDiTPipeline:
    """Load a pipeline from its folder, or from a `.ckpt` of DiT training.

    Args:
        path: a folder that `save_pretrained` wrote, or `best-*.ckpt`, `last.ckpt`.
        ema: of a checkpoint, take the averaged weights; False takes the live ones.
        vavae_dir: the VA-VAE of a checkpoint; by default `vavae/` beside the checkpoints' folder.

    Raises:
        UserError: nothing there, a checkpoint of another kind, or no VA-VAE beside it.
    """
    path = Path(path)
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            there = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
            raise UserError(f"{path} is no pipeline (no model_index.json); it holds {there}. Name a .ckpt or pipeline/")
        bars = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()  # it loads within a second
        try:  # without low_cpu_mem_usage it does not ask for a package that is of no use here
            return LatentDiTPipeline.from_pretrained(path, low_cpu_mem_usage=False)
        except (OSError, ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UserError(f"The pipeline {path} cannot be read ({str(error)[:200]}): copy it again") from None
        finally:
            if bars:
                logging.enable_progress_bar()
    checkpoint = read_checkpoint(path)
    settings = checkpoint.get("hyper_parameters", {})
    if "denoiser_config" not in settings:
        raise UserError(f"{path} is no checkpoint of DiT training (it holds {', '.join(list(checkpoint)[:4])} …)")
    folder = Path(vavae_dir) if vavae_dir else path.parent.parent / "vavae"
    vae = load_vavae(folder, say=lambda line: None)
    denoiser, conditioner = DiT(**settings["denoiser_config"]), ClassConditioner(**settings["conditioner_config"])
    prefix = "ema.network." if ema else "network."
    for name, model in (("denoiser", denoiser), ("conditioner", conditioner)):
        start = f"{prefix}{name}."
        weights = {k.removeprefix(start): v for k, v in checkpoint["state_dict"].items() if k.startswith(start)}
        model.load_state_dict(weights)
    people = settings.get("people")
    return LatentDiTPipeline(vae.eval(), denoiser.eval(), conditioner.eval(), solver(), people)


def solver() -> FlowMatchEulerDiscreteScheduler:
    """Euler's method on even steps; `timestep_shift=0.3` at sampling gives the grid of LightningDiT's recipe."""
    return FlowMatchEulerDiscreteScheduler()
