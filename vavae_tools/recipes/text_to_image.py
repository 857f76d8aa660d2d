"""Images from sentences, whole: captioned images, their latents and texts, a DiT. `experiment=text_to_image`."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae_tools.autoencoders.encoders import silent_transformers
from vavae_tools.autoencoders.stable_diffusion import SHAPES_VAE, StableDiffusionVAE, load_stable_diffusion_vae
from vavae_tools.autoencoders.weights import load_autoencoder
from vavae_tools.data.captions import CaptionedDataModule
from vavae_tools.data.datasets import caption_data
from vavae_tools.data.demo.shapes import EXAMPLE_PROMPTS, vocabulary
from vavae_tools.data.latents import latents_digest
from vavae_tools.data.text_states import TextLatentDataModule, encode_texts, needed_bytes
from vavae_tools.diffusion.clip import TextEncoder, load_text_encoder, tiny_text_encoder
from vavae_tools.diffusion.conditioning import TextConditioner
from vavae_tools.diffusion.dit import TextDiT
from vavae_tools.diffusion.solvers import make_solver
from vavae_tools.pipelines.batches import in_batches
from vavae_tools.pipelines.text import TextToImagePipeline, load_text_pipeline
from vavae_tools.recipes.base import CaptionData, TextToImageRecipe, as_tuple
from vavae_tools.recipes.dit import denoiser_run, encode_once, latents_folder, make_recipe_objective, prepared
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import hardlink_duplicates, save_model
from vavae_tools.runtime.machine import find_device
from vavae_tools.runtime.ranks import is_rank_zero, rank_zero_first
from vavae_tools.training.callbacks.previews import SamplePreviews
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.memory import find_batch_size, keep_effective, of_size
from vavae_tools.training.run import Log, Run, Show, train

COLUMNS = 4
"""Images of each prompt in a preview."""


def build(recipe: TextToImageRecipe, output_dir: Path, resume_from: Path | None, show: Show | None, log: Log) -> Run:
    """Encode images and captions once where there is room for it, and return the training."""
    data, sampling, config, seed = recipe.data, recipe.sampling, recipe.train, recipe.seed
    objective_of = partial(make_recipe_objective, recipe.objective, TextToImageRecipe().objective)
    make_solver(sampling.solver, objective_of((4, 32, 32)))  # one that does not fit is said before anything takes time
    images = _images(data, config.batch_size, seed)
    remarks = list(images.notes)
    if not data.drop_last:
        remarks.append("drop_last=false: every step still has a whole batch; the rest of an epoch comes up in others")
    with rank_zero_first("frozen models"):
        goes_on = resume_from is not None or not is_rank_zero()  # what is left of another run is not this one's
        encoder = _text_encoder_for(recipe, output_dir / "text_encoder", goes_on)
        autoencoder = _vae_for(recipe, output_dir / "autoencoder", goes_on, log)
    shape = _latent_shape(autoencoder, images)
    objective = objective_of(shape)
    prompts = sampling.prompts or _first_prompts(images, data.dataset_name)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    states = encoder.encode([prompt for prompt in prompts for _ in range(COLUMNS)])

    numbers = asdict(recipe.model)
    conditioner = TextConditioner(
        encoder.dim, encoder.pooled_dim, recipe.model.hidden_size, numbers.pop("condition_dropout")
    )
    conditioner.set_empty(encoder.encode([""]))
    denoiser = TextDiT(input_size=shape[1:], in_channels=shape[0], **numbers)
    config, of_training = prepared(config, denoiser, seed, log)
    module = DiffusionModule(denoiser, conditioner, objective, **of_training)
    longest = encoder.max_tokens
    train_on, key, cached = _training_data(recipe, module, images, autoencoder, encoder, output_dir, log)
    del autoencoder, encoder  # where all is encoded nobody has them any more
    if data.auto_batch_size:
        gathered = _fit_batch(module, train_on, config.of_devices(), longest, log)
        config = replace(config, accumulate_grad_batches=gathered, batch_size=train_on.batch_size)

    def make(trained: nn.ModuleDict) -> Tensor:
        device = next(trained.parameters()).device
        decoder = load_autoencoder(output_dir / "autoencoder").eval().to(device)  # its memory is training's elsewhen
        parts = trained["denoiser"], trained["conditioner"], make_solver(sampling.solver, objective), objective.config
        pipe = TextToImagePipeline(decoder, None, None, *parts)
        rows = torch.arange(len(states))
        noise, on_the_way = pipe.noise(seed, rows), pipe.generators(seed, rows)
        settings = sampling.num_steps, sampling.guidance_scale

        def make_some(part: slice) -> Tensor:
            return pipe.make(states[part].to(device), noise[part].to(device), None, *settings, on_the_way[part]).cpu()

        return torch.cat(in_batches(pipe, len(rows), make_some))

    def export(checkpoint: Path, pipeline: Path) -> None:
        samples = output_dir / "samples"
        samples.mkdir(exist_ok=True)
        (samples / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        with silent_transformers():
            save_model(load_text_pipeline(checkpoint, scheduler=sampling.solver), pipeline)
        hardlink_duplicates(output_dir / "autoencoder", pipeline / "vae")
        hardlink_duplicates(output_dir / "text_encoder", pipeline / "text_encoder")

    preview = partial(SamplePreviews, make, COLUMNS, show=show)
    saves_memory = ["--auto_batch_size (the largest batch that fits)"]
    if not cached and not recipe.vae.use_slicing:
        saves_memory.append("vae.use_slicing=true (the VAE takes one image after the other)")
    further = {"saves_memory": saves_memory, "remarks": remarks}
    return denoiser_run(module, config, output_dir, export, preview, log, data=train_on, fingerprint=key, **further)


train_text_to_image = partial(train, build)


def _images(data: CaptionData, batch_size: int, seed: int) -> CaptionedDataModule:
    names = ("num_samples", "val_share", "skip_missing", "crop", "annotations", "images", "num_workers")
    options = {name: getattr(data, name) for name in names}
    size = as_tuple(data.image_size)
    return caption_data(data.dataset_name, data.data_dir, size, batch_size=batch_size, seed=seed, **options)


# ---- frozen models: a copy goes along with the checkpoints, and is that of a run that resumes


def _text_encoder_for(recipe: TextToImageRecipe, copy: Path, goes_on: bool) -> TextEncoder:
    if goes_on and (copy / "config.json").is_file():
        return load_text_encoder(copy)
    source = recipe.text_encoder.name
    if source is None and recipe.data.dataset_name != "shapes":
        clip = "a folder of transformers with CLIP's text encoder and its tokenizer (openai/clip-vit-base-patch32)"
        raise UserError(f"text_encoder.name is missing: name {clip}, or its name on Hugging Face's hub")
    encoder = load_text_encoder(source) if source else tiny_text_encoder(vocabulary(), seed=recipe.seed)
    if is_rank_zero():
        encoder.save(copy)
    return encoder


def _vae_for(recipe: TextToImageRecipe, copy: Path, goes_on: bool, log: Log) -> StableDiffusionVAE:
    vae = recipe.vae
    if goes_on and (copy / "config.json").is_file():
        return load_stable_diffusion_vae(copy, vae.use_slicing)
    if vae.name is None and recipe.data.dataset_name != "shapes":
        kl = "a folder of diffusers with Stable Diffusion's AutoencoderKL (stabilityai/sd-vae-ft-mse)"
        raise UserError(f"vae.name is missing: name {kl}, or its name on Hugging Face's hub")
    if vae.name is None:
        log("VAE: the small one for shapes that comes with the package")
    model = load_stable_diffusion_vae(vae.name or SHAPES_VAE, vae.use_slicing)
    if is_rank_zero():
        save_model(model, copy)
    return model


def _latent_shape(autoencoder: StableDiffusionVAE, images: CaptionedDataModule) -> tuple[int, int, int]:
    height, width = images.train_data.image_size
    factor = autoencoder.downsampling
    if height % factor or width % factor:
        raise UserError(f"image_size {height}×{width}: this VAE takes multiples of {factor}")
    return autoencoder.config.latent_channels, height // factor, width // factor


def _first_prompts(images: CaptionedDataModule, dataset_name: str) -> Sequence[str]:
    if dataset_name == "shapes":
        return EXAMPLE_PROMPTS
    return list(dict.fromkeys(captions[0] for captions in images.shown_data.captions[:8]))


# ---- what is trained on


def _training_data(
    recipe: TextToImageRecipe,
    module: DiffusionModule,
    images: CaptionedDataModule,
    autoencoder: StableDiffusionVAE,
    encoder: TextEncoder,
    output_dir: Path,
    log: Log,
) -> tuple[Any, str, bool]:
    """Return latents and texts where they are kept, else images that `module` encodes; their key; whether kept."""
    data, seed = recipe.data, recipe.seed
    size = "x".join(map(str, images.train_data.image_size))
    folder = latents_folder(data.latents_dir, data.data_dir, size, output_dir)
    captions = images.captions_by_subset()
    cached = data.cache
    if cached is None:
        cached = _fits_disk(encoder, images, _latent_shape(autoencoder, images), folder, log)
    if cached:
        latents = encode_once(autoencoder, images, folder, log, seed=seed, dtype="float16")
        subsets = {"train": images.train_data, "val": images.val_data}
        names = {name: subset.names for name, subset in subsets.items() if subset is not None and len(subset)}
        with rank_zero_first("texts"):
            texts = encode_texts(encoder, captions, folder / "texts", names, device=find_device(), log=log)
        log(str(texts))
        cut, key = texts.cut, f"{latents.key} {texts.key}"
        workers = data.num_workers or 0  # memory-mapped, nothing to decode
        train_on: Any = TextLatentDataModule(latents, texts, recipe.train.batch_size, workers, seed)
    else:
        log("Images and captions are encoded at every step (data.cache=true does it once)")
        different = {caption for subset in captions.values() for of_image in subset for caption in of_image}
        cut = encoder.lengths(sorted(different))[1]
        module.encode_with(autoencoder, encoder)
        train_on, key = images, f"{images.fingerprint()} {latents_digest(autoencoder)} {encoder.digest()}"
    if cut:
        what = "1 caption was cut: it is" if cut == 1 else f"{cut:,} captions were cut: they are"
        log(f"{what} longer than the {encoder.max_tokens} tokens the encoder takes")
    train_on.prefetch_factor, train_on.persistent_workers = data.prefetch_factor, data.persistent_workers
    return train_on, key, cached


def _fits_disk(
    encoder: TextEncoder, images: CaptionedDataModule, shape: tuple[int, int, int], folder: Path, log: Log
) -> bool:
    """Return whether latents and texts have room on the disk."""
    count = len(images.train_data) + (len(images.val_data) if images.val_data is not None else 0)
    needed = 2 * count * shape[0] * shape[1] * shape[2]
    needed += needed_bytes(encoder, images.captions_by_subset(), folder / "texts")
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    fits = needed < 0.8 * free
    if not fits:
        log(f"Latents and texts would take {needed / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB free")
    return fits


def _fit_batch(module: DiffusionModule, data: Any, devices: dict[str, Any], longest: int, log: Log) -> int:
    """Give `data` the largest batch that fits, of captions as long as any; return how many make the same step."""
    effective = data.batch_size * devices.get("accumulate_grad_batches", 1)
    one, settings = data.train_data.__getitems__([0]), module.trainer_settings(**devices)
    made = partial(_of_one_size, one, longest=longest)
    found = find_batch_size(module, made, settings, data.batch_size, effective, log=log)
    data.batch_size, gathered = keep_effective(effective, found)
    return gathered


def _of_one_size(batch: dict[str, Any], size: int, longest: int) -> dict[str, Any]:
    """Return a batch's samples over and over, `size` of them, each with a caption of `longest` tokens."""
    if "captions" in batch:
        return {**of_size(batch, size), "captions": ["a " * longest] * size}
    tokens = batch["text_tokens"]  # (B, L, D) → (B, longest, D)
    tokens = F.pad(tokens, (0, 0, 0, longest - tokens.shape[1]))
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return of_size({**batch, "text_tokens": tokens, "text_mask": mask}, size)
