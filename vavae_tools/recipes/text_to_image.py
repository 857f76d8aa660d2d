"""Images from sentences, whole: captioned images, their latents and texts, a DiT. `experiment=text_to_image`."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae_tools.autoencoders.loading import load_autoencoder, silent_transformers
from vavae_tools.autoencoders.stable_diffusion import StableDiffusionVAE, load_stable_diffusion_vae
from vavae_tools.autoencoders.tiny import tiny_kl, train_tiny_kl
from vavae_tools.data.captions import CaptionedDataModule
from vavae_tools.data.datasets import caption_data
from vavae_tools.data.demo.shapes import EXAMPLE_PROMPTS, vocabulary
from vavae_tools.data.latents import LatentFolder, encode_latents, latents_digest
from vavae_tools.data.text_states import TextFolder, TextLatentDataModule, encode_texts, needed_bytes
from vavae_tools.diffusion.clip import TextEncoder, load_text_encoder, tiny_text_encoder
from vavae_tools.diffusion.solvers import make_solver
from vavae_tools.diffusion.text_conditioning import TextConditioner
from vavae_tools.diffusion.text_dit import TextDiT
from vavae_tools.pipelines.portions import Portions
from vavae_tools.pipelines.text import TextToImagePipeline, load_text_pipeline
from vavae_tools.recipes.base import CaptionData, TextToImageRecipe
from vavae_tools.recipes.dit import objective_for
from vavae_tools.runtime.console import say
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import keep_once, save_model
from vavae_tools.runtime.machine import find_device
from vavae_tools.runtime.ranks import first_alone, is_first, of_torchrun
from vavae_tools.training.callbacks.previews import SamplePreviews
from vavae_tools.training.denoiser_module import TextDiffusionModule
from vavae_tools.training.devices import compiles
from vavae_tools.training.memory import WITH_SEARCH, find_batch_size, keep_effective, of_size
from vavae_tools.training.run import Run, Say, Show, train

LATENTS = Path("logs/latents")
COLUMNS = 4
"""Pictures of each prompt in a preview."""
_SHARE_OF_DISK = 0.8
"""Of what is free, how much latents and texts may take by themselves."""


def train_text_to_image(
    recipe: TextToImageRecipe, output_dir: Path, resume: str | None = None, show: Show | None = None, say: Say = say
) -> Path:
    """`experiment=text_to_image`, `text_dummy`; returns the pipeline's folder.

    Images and captions are encoded once where there is room for it, and training then reads latents and texts alone.

    Raises:
        UserError: data or models that are not there, or settings that cannot be.
    """
    return train(_build, recipe, output_dir, resume, show, say)


def _build(recipe: TextToImageRecipe, output_dir: Path, resume_from: Path | None, show: Show | None, say: Say) -> Run:
    data, model, sampling, config, seed = recipe.data, recipe.model, recipe.sampling, recipe.train, recipe.seed
    if sampling.solver:  # one that does not fit is said before anything takes time
        make_solver(sampling.solver, objective_for(recipe.objective, TextToImageRecipe().objective, (4, 32, 32)))
    size = tuple(data.image_size) if isinstance(data.image_size, list) else data.image_size
    pictures = caption_data(
        data.dataset_name,
        data.data_dir,
        size,
        **{name: getattr(data, name) for name in ("num_samples", "val_share", "skip_missing", "crop")},
        **{name: getattr(data, name) for name in ("annotations", "pictures", "num_workers")},
        batch_size=config.batch_size,
        seed=seed,
    )
    remarks = [*filter(None, [pictures.remark])]
    if not data.drop_last:
        remarks.append("drop_last=false: every step still has a whole batch; the rest of an epoch comes up in others")
    with first_alone("frozen models"):
        goes_on = resume_from is not None or not is_first()  # what is left of another run is not this one's
        encoder = _text_encoder_for(recipe, output_dir / "text_encoder", goes_on)
        autoencoder = _vae_for(recipe, pictures, output_dir / "autoencoder", goes_on, say)
    shape = _latent_shape(autoencoder, pictures)
    objective = objective_for(recipe.objective, TextToImageRecipe().objective, shape)
    scheduler = make_solver(sampling.solver, objective)
    prompts = sampling.prompts or _first_prompts(pictures, data.dataset_name)
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    states = encoder.encode([prompt for prompt in prompts for _ in range(COLUMNS)])
    empty, longest = encoder.encode([""]), encoder.max_tokens

    cache = Path(data.latents_dir or _usual_folder(data, pictures, output_dir))
    cached = data.cache if data.cache is not None else _fits_disk(encoder, pictures, shape, cache, say)
    denoiser = TextDiT(
        input_size=shape[1:],
        in_channels=shape[0],
        **{name: value for name, value in asdict(model).items() if name != "condition_dropout"},
    )
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    conditioner = TextConditioner(encoder.dim, encoder.pooled_dim, model.hidden_size, model.condition_dropout)
    conditioner.set_empty(empty)
    config = replace(config, compile=compiles(config.compile, say=say))
    module = TextDiffusionModule(
        denoiser,
        conditioner,
        objective,
        lr=config.lr,
        ema_decay=config.ema_decay,
        warmup_steps=config.warmup_steps,
        schedule=config.schedule,
        seed=seed,
        compile=config.compile,
    )
    if cached:
        latents, texts = _encode(autoencoder, encoder, pictures, cache, seed, say)
        key = f"{latents.key} {texts.key}"
        del autoencoder, encoder
        workers = data.num_workers or 0  # memory-mapped, nothing to decode
        train_on: Any = TextLatentDataModule(latents, texts, config.batch_size, workers, seed)
    else:
        say("Images and captions are encoded at every step (data.cache=true does it once)")
        captions = {caption for side in pictures.captions_by_side().values() for of in side for caption in of}
        _say_cut(encoder.lengths(sorted(captions))[1], longest, say)
        module.encode_with(autoencoder, encoder)
        key = f"{pictures.fingerprint()} {latents_digest(autoencoder)} {encoder.digest()}"
        train_on = pictures
    train_on.prefetch_factor, train_on.persistent_workers = data.prefetch_factor, data.persistent_workers
    if data.auto_batch_size:
        gathered = _fit_batch(module, train_on, config.of_devices(), longest, say)
        config = replace(config, accumulate_grad_batches=gathered, batch_size=train_on.batch_size)

    def make(trained: nn.ModuleDict) -> Tensor:
        device = next(trained.parameters()).device
        decoder = load_autoencoder(output_dir / "autoencoder").eval().to(device)  # its memory is training's elsewhen
        parts = trained["denoiser"], trained["conditioner"], scheduler, objective.config
        pipe = TextToImagePipeline(decoder, None, None, *parts)
        rows = torch.arange(len(states))
        noise, on_the_way = pipe.noise(seed, rows), pipe.generators(seed, rows)
        settings = sampling.num_steps, sampling.guidance_scale

        def make_some(part: slice) -> Tensor:
            return pipe.make(states[part].to(device), noise[part].to(device), None, *settings, on_the_way[part]).cpu()

        return torch.cat(Portions(pipe)(len(rows), make_some))

    folder, checkpoints, samples = (output_dir / name for name in ("pipeline", "checkpoints", "samples"))

    def export(trainer: L.Trainer) -> None:
        samples.mkdir(exist_ok=True)
        (samples / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        with silent_transformers():
            save_model(load_text_pipeline(checkpoints / "last.ckpt", scheduler=sampling.solver), folder)
        keep_once(output_dir / "autoencoder", folder / "vae")
        keep_once(output_dir / "text_encoder", folder / "text_encoder")
        say(f"written: {folder}, {checkpoints}/, {samples}/, {output_dir / 'train.log'}")

    return Run(
        module=module,
        data=train_on,
        fingerprint=key,
        config=config,
        network=module.network,
        what=f"a {type(denoiser).__name__}",
        export=export,
        folder=folder,
        preview=lambda every: SamplePreviews(make, COLUMNS, samples, every, show),
        remarks=remarks,
        names=WITH_SEARCH,
        slicing=None if cached else recipe.vae.use_slicing,
    )


def _text_encoder_for(recipe: TextToImageRecipe, copy: Path, goes_on: bool) -> TextEncoder:
    """The text encoder, of which a copy goes along with the checkpoints, and is that of a run that resumes."""
    source = recipe.text_encoder.name
    if goes_on and (copy / "config.json").is_file():
        return load_text_encoder(copy)
    if source is None and recipe.data.dataset_name != "shapes":
        raise UserError(
            "text_encoder.name is missing: name a folder of transformers with CLIP's text encoder and its tokenizer "
            "(openai/clip-vit-base-patch32 downloaded), or its name on Hugging Face's hub where there is a network"
        )
    encoder = load_text_encoder(source) if source else tiny_text_encoder(vocabulary(), seed=recipe.seed)
    if is_first():
        encoder.save(copy)
    return encoder


def _vae_for(
    recipe: TextToImageRecipe, pictures: CaptionedDataModule, copy: Path, goes_on: bool, say: Say
) -> StableDiffusionVAE:
    """The autoencoder, of which a copy goes along with the checkpoints, and is that of a run that resumes."""
    vae, seed = recipe.vae, recipe.seed
    if goes_on and (copy / "config.json").is_file():
        return load_stable_diffusion_vae(copy, vae.use_slicing)
    if vae.name is None and recipe.data.dataset_name != "shapes":
        raise UserError(
            "vae.name is missing: name a folder of diffusers with Stable Diffusion's AutoencoderKL "
            "(stabilityai/sd-vae-ft-mse downloaded), or its name on Hugging Face's hub where there is a network"
        )
    if vae.name:
        model = load_stable_diffusion_vae(vae.name, vae.use_slicing)
    else:
        model = tiny_kl(seed=seed)
        psnr = train_tiny_kl(model, pictures.train_data.pictures(range(min(1024, len(pictures.train_data)))), seed=seed)
        say(f"A small VAE is trained on the shapes: PSNR {psnr:.1f} dB")
    if is_first():
        save_model(model, copy)
    return model


def _latent_shape(autoencoder: StableDiffusionVAE, pictures: CaptionedDataModule) -> tuple[int, int, int]:
    height, width = pictures.train_data.image_size
    factor = autoencoder.downsampling
    if height % factor or width % factor:
        raise UserError(f"image_size {height}×{width}: this VAE takes multiples of {factor}")
    return autoencoder.config.latent_channels, height // factor, width // factor


def _first_prompts(pictures: CaptionedDataModule, dataset_name: str) -> Sequence[str]:
    if dataset_name == "shapes":
        return EXAMPLE_PROMPTS
    side = pictures.val_data if pictures.val_data is not None else pictures.train_data
    return list(dict.fromkeys(captions[0] for captions in side.captions[:8]))


def _usual_folder(data: CaptionData, pictures: CaptionedDataModule, output_dir: Path) -> Path:
    if data.data_dir is None:
        return output_dir / "latents"
    size = "x".join(map(str, pictures.train_data.image_size))
    return LATENTS / f"{Path(data.data_dir).resolve().name}-{size}"


def _fits_disk(
    encoder: TextEncoder,
    pictures: CaptionedDataModule,
    shape: tuple[int, int, int],
    folder: Path,
    say: Say,
) -> bool:
    """Whether latents and texts have room on the disk."""
    sides = [side for side in (pictures.train_data, pictures.val_data) if side is not None]
    latents = sum(map(len, sides)) * 2 * shape[0] * shape[1] * shape[2]
    needed = latents + needed_bytes(encoder, pictures.captions_by_side(), folder / "texts")
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    fits = needed < _SHARE_OF_DISK * free
    if not fits:
        say(f"Latents and texts would take {needed / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB free")
    return fits


def _encode(
    autoencoder: StableDiffusionVAE,
    encoder: TextEncoder,
    pictures: CaptionedDataModule,
    folder: Path,
    seed: int,
    say: Say,
) -> tuple[LatentFolder, TextFolder]:
    device = find_device()
    latents = encode_latents(
        autoencoder, pictures, folder, device=device, seed=seed, dtype="float16", ranks=of_torchrun(), say=say
    )
    sides = {"train": pictures.train_data, "val": pictures.val_data}
    names = {name: side.names for name, side in sides.items() if side is not None and len(side)}
    with first_alone("texts"):
        captions = pictures.captions_by_side()
        texts = encode_texts(encoder, captions, folder / "texts", names, device=device, say=say)
    say(str(latents))
    say(str(texts))
    _say_cut(texts.cut, encoder.max_tokens, say)
    return latents, texts


def _say_cut(count: int, longest: int, say: Say) -> None:
    if count:
        what = "1 caption was cut: it is" if count == 1 else f"{count:,} captions were cut: they are"
        say(f"{what} longer than the {longest} tokens the encoder takes")


def _fit_batch(module: TextDiffusionModule, data: Any, devices: dict[str, Any], longest: int, say: Say) -> int:
    """Give `data` the largest batch that fits, of captions as long as any; how many of them make the same step."""
    gathered = devices.get("accumulate_grad_batches", 1)
    effective = data.batch_size * gathered
    one = data.train_data.__getitems__([0])
    found = find_batch_size(
        module,
        lambda size: _of_one_size(one, size, longest),
        module.trainer_settings(**devices),
        data.batch_size,
        effective,
        say=say,
    )
    data.batch_size, gathered = keep_effective(effective, found)
    return gathered


def _of_one_size(batch: dict[str, Any], size: int, longest: int) -> dict[str, Any]:
    """A batch's samples over and over, `size` of them, each with a caption of `longest` tokens."""
    if "captions" in batch:
        return {**of_size(batch, size), "captions": ["a " * longest] * size}
    tokens = batch["text_tokens"]  # (B, L, D) → (B, longest, D)
    tokens = F.pad(tokens, (0, 0, 0, longest - tokens.shape[1]))
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    return of_size({**batch, "text_tokens": tokens, "text_mask": mask}, size)
