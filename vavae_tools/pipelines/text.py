"""Images from sentences as one object: a diffusers pipeline of text encoder, denoiser, solver and autoencoder."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor

from vavae_tools.diffusion.clip import TextEncoder, TextStates, load_text_encoder
from vavae_tools.diffusion.conditioning import TextConditioner
from vavae_tools.diffusion.objectives import objective_of
from vavae_tools.diffusion.solvers import make_solver
from vavae_tools.pipelines import base
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError, in_home


class TextToImagePipeline(base.ImagePipeline):
    """Sentences → images: `pipe("a small red bird", guidance_scale=7.5, seed=0).images`.

    Args:
        vae: a `StableDiffusionVAE`, or another autoencoder with the statistics of its latents.
        objective: the config of what was trained with; None: what the scheduler says.
    """

    model_cpu_offload_seq = "text_encoder->conditioner->denoiser->vae"

    def __init__(
        self,
        vae: ModelMixin,
        text_encoder: Any,
        tokenizer: Any,
        denoiser: ModelMixin,
        conditioner: TextConditioner,
        scheduler: SchedulerMixin,
        objective: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        models = {"vae": vae, "text_encoder": text_encoder, "denoiser": denoiser, "conditioner": conditioner}
        self.register_modules(**models, tokenizer=tokenizer, scheduler=scheduler)
        self.register_to_config(objective=objective)

    def encode(self, prompts: Sequence[str]) -> TextStates:
        """Return the states of prompts, each different one computed once."""
        place = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        states = TextEncoder(self.text_encoder, self.tokenizer).encode(list(place)).to(self._execution_device)
        return states[torch.tensor([place[prompt] for prompt in prompts], device=states.pooled.device)]

    def facts(self) -> dict[str, Any]:
        return {**super().facts(), "text encoder": TextEncoder(self.text_encoder, self.tokenizer).digest()}

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        seed: int | None = None,
        generator: base.Generators = None,
        latents: Tensor | None = None,
        batch_size: int | None = None,
        output_type: str = "pil",
        precision: str | None = None,
    ) -> ImagePipelineOutput:
        """Make one image for each prompt.

        Args:
            negative_prompt: what guidance leads away from, one for all or one for each; by default the empty prompt.
            seed: of the noise; image number i of a seed is the same whatever else is made beside it.
            generator, latents, batch_size, output_type: as of `LatentDiTPipeline`.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not prompts:
            raise UserError("No prompts: at least one is needed")
        generators, numbers = generator if isinstance(generator, list) else None, torch.arange(len(prompts))
        if seed is not None:
            latents = self.noise(seed, numbers) if latents is None else latents
            generators = self.generators(seed, numbers)
        states, negative = self.encode(prompts), None
        if negative_prompt is not None and guidance_scale != 1:
            away = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else list(negative_prompt)
            if len(away) != len(prompts):
                many = f"{len(away)} negative prompts for {len(prompts)} prompts"
                raise UserError(f"{many}: give one for all, or one for each")
            negative = self.encode(away)

        def make(rows: slice, noise: Tensor) -> Tensor:
            of_rows = negative and negative[rows], num_inference_steps, guidance_scale, generators and generators[rows]
            return self.make(states[rows], noise, *of_rows, precision)

        return self._images(self._noise(len(prompts), latents, generator), make, batch_size, output_type)

    @torch.no_grad()
    def make(
        self,
        states: TextStates,
        noise: Tensor,
        negative: TextStates | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        generators: list[torch.Generator] | None = None,
        precision: str | None = None,
    ) -> Tensor:
        """Make one batch: captions' states (B) and noise (B, C, h, w), where the models are → uint8 (B, C, H, W).

        Args:
            negative: states of what guidance leads away from; None: the empty prompt that the conditioner keeps.
            guidance_scale: how far from there towards the caption; 1 asks for the caption alone, at half the price, and
                so it is where `is_guided` says no.
            generators: of the noise that DDPM adds on the way, one for each image; by default it follows from `noise`.
        """
        if not self.is_guided(negative):
            guidance_scale = 1.0

        def told(rows: Tensor) -> dict[str, Any]:
            conditions = {"conditioning": self.conditioner(states[rows])}
            if guidance_scale != 1:
                null = self.conditioner.null(len(rows)) if negative is None else self.conditioner(negative[rows])
                conditions["null"] = null
            if generators:  # which are asked again, maybe
                conditions["generators"] = [generators[row].clone_state() for row in rows.tolist()]
            return conditions

        by = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        return self._sampled(noise, told, precision, None, **by)

    def generators(self, seed: int, indices: Tensor) -> list[torch.Generator]:
        """Return where image number i of a seed takes the noise from that DDPM adds on the way."""
        seeds = (Draws(seed, 0, indices.cpu()).uniform("on the way", 2).double() * 2**23).long()  # (B, 2) of 23 bits
        return [torch.Generator().manual_seed(a << 23 | b) for a, b in seeds.tolist()]


# ---- from files
def load_text_pipeline(path: str | Path, ema: bool = True, run: str | Path | None = None) -> TextToImagePipeline:
    """Load as `load_pipeline` does, of text-to-image training; `text_encoder/` is beside `autoencoder/`."""
    path = in_home(path)
    if base.is_folder_of_pipeline(path):
        return base.read_pipeline(TextToImagePipeline, path, ema, local_files_only=True)
    denoiser, conditioner, settings = base.read_training(TextToImagePipeline, path, ema, TextConditioner)
    encoder = load_text_encoder(base.folder_beside(path, "text_encoder", run=run))
    if encoder.dim != conditioner.config.text_dim:
        trained = f"{path} was trained with {conditioner.config.text_dim}: take the text_encoder/ of its training"
        raise UserError(f"The text encoder's states have {encoder.dim} numbers, {trained}")
    config = settings.get("objective", {})
    parts = encoder.model, encoder.tokenizer, denoiser, conditioner, make_solver(None, objective_of(config)), config
    return TextToImagePipeline(base.autoencoder_beside(path, run), *parts)
