"""Images from sentences, whole: captioned images, their latents and texts, a DiT. `experiment=text_to_image`."""

import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae_tools.autoencoders.stable_diffusion import SHAPES_VAE, load_stable_diffusion_vae
from vavae_tools.autoencoders.weights import load_autoencoder
from vavae_tools.data.datasets import caption_data
from vavae_tools.data.demo.shapes import EXAMPLE_PROMPTS, vocabulary
from vavae_tools.data.latents import latents_digest
from vavae_tools.data.text_states import TextLatentDataModule, encode_texts, needed_bytes, texts_key
from vavae_tools.diffusion.clip import TextEncoder, load_text_encoder, tiny_text_encoder
from vavae_tools.diffusion.conditioning import TextConditioner
from vavae_tools.diffusion.dit import TextDiT
from vavae_tools.diffusion.solvers import make_solver
from vavae_tools.pipelines.batches import in_batches
from vavae_tools.pipelines.text import TextToImagePipeline, load_text_pipeline
from vavae_tools.recipes.base import TextToImageRecipe
from vavae_tools.recipes.dit import denoiser_run, encode_once, latents_folder, make_recipe_objective, prepared
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import atomic_write, free_bytes, save_model
from vavae_tools.runtime.machine import find_device
from vavae_tools.runtime.ranks import is_rank_zero, rank_zero_first
from vavae_tools.training.callbacks.previews import SamplePreviews
from vavae_tools.training.callbacks.record import check_data
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.memory import find_batch_size, keep_effective, of_size
from vavae_tools.training.run import Log, Run, Show, check_early, train

COLUMNS = 4  # images of each prompt in a preview


def build(recipe: TextToImageRecipe, output_dir: Path, resume_from: Path | None, show: Show | None, log: Log) -> Run:
    """Encode images and captions once where there is room for it, and return the training."""
    data, sampling, config, seed = recipe.data, recipe.sampling, recipe.train, recipe.seed
    size = data.image_size
    objective_of = partial(make_recipe_objective, recipe.objective, TextToImageRecipe().objective)
    make_solver(sampling.solver, objective_of((4, 32, 32)))  # one that does not fit is said before anything takes time
    names = ("num_samples", "val_share", "train_split", "skip_missing", "crop", "annotations", "images", "num_workers")
    options = {"batch_size": config.batch_size, "seed": seed, **{name: getattr(data, name) for name in names}}
    images = caption_data(data.dataset_name, data.data_dir, tuple(size) if isinstance(size, list) else size, **options)
    with rank_zero_first("frozen models"):
        goes_on = resume_from is not None or not is_rank_zero()  # what is left of another run is not this one's
        frozen = encoder, autoencoder = _frozen_models(recipe, output_dir, goes_on, log)
    (height, width), factor = images.train_data.image_size, autoencoder.downsampling
    if height % factor or width % factor:
        raise UserError(f"image_size {height}×{width}: this VAE takes multiples of {factor}")
    shape = autoencoder.config.latent_channels, height // factor, width // factor
    objective = objective_of(shape)
    first = EXAMPLE_PROMPTS if data.dataset_name == "shapes" else [of[0] for of in images.shown_data.captions[:8]]
    prompts = sampling.prompts or list(dict.fromkeys(first))
    prompts = [prompts] if isinstance(prompts, str) else prompts
    states = encoder.encode([prompt for prompt in prompts for _ in range(COLUMNS)])

    numbers = asdict(recipe.model)
    dropout = numbers.pop("condition_dropout")
    conditioner = TextConditioner(encoder.dim, encoder.pooled_dim, recipe.model.hidden_size, dropout)
    conditioner.set_empty(encoder.encode([""]))
    denoiser = TextDiT(input_size=shape[1:], in_channels=shape[0], **numbers)
    config, of_training = prepared(config, denoiser, seed, log)
    module = DiffusionModule(denoiser, conditioner, objective, **of_training)
    check_early(module, replace(config, batch_size=None) if data.auto_batch_size else config, images, resume_from)
    longest = encoder.max_tokens
    train_on, key, cached = _training_data(recipe, module, images, frozen, output_dir, resume_from, log)
    del frozen, autoencoder, encoder  # where all is encoded nobody has them any more
    if data.auto_batch_size:
        gathered = _fit_batch(module, train_on, config.of_devices(), longest, log)
        config = replace(config, accumulate_grad_batches=gathered, batch_size=train_on.batch_size)

    def make(trained: nn.ModuleDict) -> Tensor:
        device = next(trained.parameters()).device
        decoder = (
            load_autoencoder(output_dir / "autoencoder").eval().to(device)
        )  # training needs its memory at other times
        scheduler = make_solver(sampling.solver, objective)
        pipe = TextToImagePipeline(decoder, None, None, **trained, scheduler=scheduler, objective=objective.config)
        rows = torch.arange(len(states))
        noise, on_the_way = pipe.noise(seed, rows), pipe.generators(seed, rows)
        settings = sampling.num_steps, sampling.guidance_scale

        def make_some(part: slice) -> Tensor:
            return pipe.make(states[part].to(device), noise[part].to(device), None, *settings, on_the_way[part]).cpu()

        return torch.cat(in_batches(pipe, len(rows), make_some))

    def load(checkpoint: Path) -> TextToImagePipeline:
        pipe = load_text_pipeline(checkpoint)
        if sampling.solver:
            pipe.swap_solver(sampling.solver)
        return pipe

    if is_rank_zero():
        with atomic_write(output_dir / "samples" / "prompts.txt") as partly:
            partly.write_text("\n".join(prompts) + "\n", encoding="utf-8")
    preview = partial(SamplePreviews, make, COLUMNS, show=show, rows=prompts)
    remarks, saves_memory = [], ["--auto_batch_size (the largest batch that fits)"]
    if not data.drop_last:
        remarks.append("drop_last=false: every step still has a whole batch; the rest of an epoch comes up in others")
    if not cached and not recipe.vae.use_slicing:
        saves_memory.append("vae.use_slicing=true (the VAE takes one image after the other)")
    further = {"data": train_on, "fingerprint": key, "remarks": remarks, "saves_memory": saves_memory}
    return denoiser_run(module, config, output_dir, load, preview, log, **further)


train_text_to_image = partial(train, build)


def _frozen_models(recipe: TextToImageRecipe, output_dir: Path, goes_on: bool, log: Log) -> tuple[TextEncoder, Any]:
    """Return text encoder and VAE. A copy goes along with the checkpoints, and is that of a run that resumes."""
    name, vae = recipe.text_encoder.name, recipe.vae
    copies = output_dir / "text_encoder", output_dir / "autoencoder"
    if goes_on and all((copy / "config.json").is_file() for copy in copies):
        return load_text_encoder(copies[0]), load_stable_diffusion_vae(copies[1], vae.use_slicing)
    clip = "transformers with CLIP's text encoder and its tokenizer (openai/clip-vit-base-patch32)"
    kl = "diffusers with Stable Diffusion's AutoencoderKL (stabilityai/sd-vae-ft-mse)"
    for key, given, what in (("text_encoder.name", name, clip), ("vae.name", vae.name, kl)):
        if given is None and recipe.data.dataset_name != "shapes":
            raise UserError(f"{key} is missing: name a folder of {what}, or its name on Hugging Face's hub")
    encoder = load_text_encoder(name) if name else tiny_text_encoder(vocabulary(), seed=recipe.seed)
    if vae.name is None:
        log("VAE: the small one for shapes that comes with the package")
    autoencoder = load_stable_diffusion_vae(vae.name or SHAPES_VAE, vae.use_slicing)
    if is_rank_zero():
        encoder.save(copies[0])
        save_model(autoencoder, copies[1])
    return encoder, autoencoder


# ---- what is trained on
def _training_data(
    recipe: TextToImageRecipe,
    module: DiffusionModule,
    images: Any,
    frozen: tuple,
    output_dir: Path,
    resume_from: Path | None,
    log: Log,
) -> tuple[Any, str, bool]:
    """Return latents and texts where they are kept, else images that `module` encodes; their key; whether kept."""
    data, seed, (encoder, autoencoder) = recipe.data, recipe.seed, frozen
    size = "x".join(map(str, images.train_data.image_size))
    folder = latents_folder(data.latents_dir, data.data_dir, size, output_dir)
    captions = images.captions_by_subset()
    cached = data.cache
    if cached is None:
        numbers = sum(map(len, captions.values())) * math.prod(module.network["denoiser"].latent_shape)
        needed = 2 * numbers + needed_bytes(encoder, captions, folder / "texts")
        free = free_bytes(folder)
        cached = needed < 0.8 * free
        if not cached:
            log(f"Latents and texts would take {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB free")
    if cached:
        subsets = {"train": images.train_data, "val": images.val_data}
        names = {name: subset.names for name, subset in subsets.items() if subset is not None and len(subset)}
        of_texts = texts_key(encoder, captions, names)

        def check(key: str) -> None:
            check_data(resume_from, recipe.train.allow_changes, f"{key} {of_texts}")

        latents = encode_once(autoencoder, images, folder, log, seed=seed, dtype="float16", check=check)
        with rank_zero_first("texts"):
            texts = encode_texts(encoder, captions, folder / "texts", names, device=find_device(), log=log)
        log(str(texts))
        cut, key = texts.cut, f"{latents.key} {texts.key}"
        workers = data.num_workers or 0  # memory-mapped, nothing to decode
        train_on: Any = TextLatentDataModule(latents, texts, recipe.train.batch_size, num_workers=workers, seed=seed)
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


def _fit_batch(module: DiffusionModule, data: Any, devices: dict[str, Any], longest: int, log: Log) -> int:
    """Give `data` the largest batch that fits, of captions as long as any; return how many make the same step."""
    effective = data.batch_size * devices.get("accumulate_grad_batches", 1)
    one = data.train_data.get_batch([0])
    if "captions" not in one:
        tokens = one["text_tokens"]  # (1, L, D) → (1, longest, D)
        one["text_tokens"] = F.pad(tokens, (0, 0, 0, longest - tokens.shape[1]))
        one["text_mask"] = torch.ones(1, longest, dtype=torch.bool)

    def made(size: int) -> dict[str, Any]:
        captions = {"captions": ["a " * longest] * size} if "captions" in one else {}
        return {**of_size(one, size), **captions}

    found = find_batch_size(module, made, module.trainer_settings(**devices), data.batch_size, effective, log=log)
    data.batch_size, gathered = keep_effective(effective, found)
    return gathered
