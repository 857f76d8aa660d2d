"""Pictures from sentences, whole: captioned pictures, their latents and texts, a DiT. `experiment=text_to_image`."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from vavae_tools.autoencoders.loading import load_autoencoder, silent_transformers
from vavae_tools.autoencoders.stable_diffusion import StableDiffusionVAE, load_stable_diffusion_vae
from vavae_tools.autoencoders.tiny import tiny_kl, train_tiny_kl
from vavae_tools.checkpoints.resuming import resume_path
from vavae_tools.data.captions import CaptionedDataModule
from vavae_tools.data.datasets import caption_data
from vavae_tools.data.demo.shapes import EXAMPLE_PROMPTS, vocabulary
from vavae_tools.data.latents import LatentFolder, encode_latents, latents_digest
from vavae_tools.data.text_states import TextFolder, TextLatentDataModule, encode_texts, needed_bytes
from vavae_tools.diffusion.clip import TextEncoder, load_text_encoder, tiny_text_encoder
from vavae_tools.diffusion.objectives import make_objective
from vavae_tools.diffusion.solvers import make_scheduler
from vavae_tools.diffusion.text_conditioning import TextConditioner
from vavae_tools.diffusion.text_dit import TextDiT
from vavae_tools.pipelines.portions import Portions
from vavae_tools.pipelines.text import TextToImagePipeline, load_text_pipeline
from vavae_tools.runtime.console import say
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import keep_once, save_model
from vavae_tools.runtime.machine import find_device
from vavae_tools.runtime.ranks import first_alone, is_first, of_torchrun
from vavae_tools.training.callbacks.train_log import TrainLog
from vavae_tools.training.config import Saving, saving_knobs
from vavae_tools.training.denoiser_module import TextDiffusionModule
from vavae_tools.training.devices import compiles, quiet_lightning
from vavae_tools.training.memory import TEXT_TO_IMAGE, find_batch_size, keep_effective, of_size
from vavae_tools.training.optim import DECAYS
from vavae_tools.training.run import length_of, train_denoiser

Show = Callable[[Tensor], None]

LATENTS = Path("logs/latents")
COLUMNS = 4
"""Pictures of each prompt in a preview."""
_SHARE_OF_DISK = 0.8
"""Of what is free, how much latents and texts may take by themselves."""


def train_text_to_image(
    data: dict[str, Any],
    model: dict[str, Any],
    training: dict[str, Any],
    lr_scheduler: dict[str, Any],
    text_encoder: dict[str, Any],
    vae: dict[str, Any],
    ema: dict[str, Any],
    sampling: dict[str, Any],
    trainer: dict[str, Any],
    callbacks: dict[str, Any],
    output_dir: str | Path,
    resume: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = say,
    show: Show | None = None,
) -> Path:
    """`experiment=text_to_image`, `text_dummy`, with the keys of `configs/`; returns the pipeline's folder.

    Pictures and captions are encoded once where there is room for it, and training then reads latents and texts alone.

    Raises:
        UserError: data or models that are not there, or settings that cannot be.
    """
    _check(data=data, model=model, training=training, text_encoder=text_encoder, vae=vae, ema=ema, sampling=sampling)
    if lr_scheduler["type"] not in DECAYS:
        raise UserError(f"lr_scheduler.type is {lr_scheduler['type']!r}, expected one of {', '.join(DECAYS)}")
    objective = make_objective(model["objective"])
    scheduler = make_scheduler(sampling["scheduler"], objective)
    L.seed_everything(seed, verbose=False)
    quiet_lightning()
    output_dir = Path(output_dir)
    resume_from = resume_path(resume, output_dir / "checkpoints", say)
    pictures = caption_data(
        **{name: data[name] for name in ("dataset_name", "dataset_path", "image_size", "num_samples", "val_share")},
        **{name: data[name] for name in ("skip_missing", "crop", "annotations", "pictures")},
        batch_size=training["batch_size"],
        num_workers=training["num_workers"],
        seed=seed,
    )
    if pictures.remark:
        say(pictures.remark)
    if not training["drop_last"]:
        say("drop_last=false: every step still has a whole batch; what is left of an epoch comes up in others")
    with first_alone("frozen models"):
        goes_on = resume is not None or not is_first()  # what is left of another run is not this one's
        encoder = _text_encoder_for(
            text_encoder["name"], data["dataset_name"], output_dir / "text_encoder", goes_on, seed
        )
        autoencoder = _vae_for(vae, data["dataset_name"], pictures, output_dir / "autoencoder", goes_on, seed, say)
    shape = _latent_shape(autoencoder, pictures)
    prompts = sampling["prompts"] or _first_prompts(pictures, data["dataset_name"])
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    states = encoder.encode([prompt for prompt in prompts for _ in range(COLUMNS)])
    empty, longest = encoder.encode([""]), encoder.max_tokens

    folder = Path(data["latents_dir"] or _usual_folder(data, pictures, output_dir))
    cached = data["cache"] if data["cache"] is not None else _fits_disk(encoder, pictures, shape, folder, say)
    denoiser = TextDiT(
        input_size=shape[1:],
        in_channels=shape[0],
        patch_size=model["patch_size"],
        hidden_size=model["hidden_size"],
        depth=model["num_layers"],
        num_heads=model["num_heads"],
        mlp_ratio=model["mlp_ratio"],
        qk_norm=model["qk_norm"],
    )
    if model["gradient_checkpointing"]:
        denoiser.enable_gradient_checkpointing()
    conditioner = TextConditioner(encoder.dim, encoder.pooled_dim, model["hidden_size"], model["caption_dropout"])
    conditioner.set_empty(empty)
    compile = compiles(model["compile"], say=say)
    module = TextDiffusionModule(
        denoiser,
        conditioner,
        objective,
        lr=training["learning_rate"],
        ema_decay=ema["decay"] if ema["enabled"] else 0.0,  # an average over nothing but the last step
        warmup_steps=lr_scheduler["warmup_steps"],
        schedule=lr_scheduler["type"],
        seed=seed,
        compile=compile,
    )
    if cached:
        latents, texts = _encode(autoencoder, encoder, pictures, folder, seed, say)
        key = f"{latents.key} {texts.key}"
        del autoencoder, encoder
        workers = training["num_workers"] or 0  # memory-mapped, nothing to decode
        train_on: Any = TextLatentDataModule(latents, texts, training["batch_size"], workers, seed)
    else:
        say("Pictures and captions are encoded at every step (data.cache=true does it once)")
        captions = {caption for side in pictures.captions_by_side().values() for of in side for caption in of}
        _say_cut(encoder.lengths(sorted(captions))[1], longest, say)
        module.encode_with(autoencoder, encoder)
        key = f"{pictures.fingerprint()} {latents_digest(autoencoder)} {encoder.digest()}"
        train_on = pictures
    train_on.prefetch_factor, train_on.persistent_workers = training["prefetch_factor"], training["persistent_workers"]
    devices = {**trainer, "log_every_n_steps": training["logging_steps"]}
    if training["auto_batch_size"]:
        devices |= {"accumulate_grad_batches": _fit_batch(module, train_on, devices, longest, say)}

    def make(trained: torch.nn.ModuleDict) -> Tensor:
        device = next(trained.parameters()).device
        decoder = load_autoencoder(output_dir / "autoencoder").eval().to(device)  # its memory is training's elsewhen
        pipe = TextToImagePipeline(decoder, None, None, trained["denoiser"], trained["conditioner"], scheduler)
        rows = torch.arange(len(states))
        noise, on_the_way = pipe.noise(seed, rows), pipe.generators(seed, rows)
        settings = sampling["num_steps"], sampling["cfg_scale"]

        def make_some(part: slice) -> Tensor:
            return pipe.make(states[part].to(device), noise[part].to(device), None, *settings, on_the_way[part]).cpu()

        return torch.cat(Portions(pipe)(len(rows), make_some))

    done = train_denoiser(
        module,
        train_on,
        output_dir,
        make,
        COLUMNS,
        callbacks["previews"],
        data_key=key,
        devices=devices,
        saving=Saving(**saving_knobs(callbacks)),
        best="epoch=",
        compile=compile,
        say=say,
        resume_from=resume_from,
        show=show,
        callbacks=[TrainLog(output_dir, training["logging_steps"], say)],
        names=TEXT_TO_IMAGE,
        slicing=None if cached else vae["use_slicing"],
        **length_of(training),
    )
    made = output_dir / "pipeline"
    if done.is_global_zero:
        (output_dir / "samples").mkdir(exist_ok=True)
        (output_dir / "samples" / "prompts.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")
        pipe = load_text_pipeline(output_dir / "checkpoints" / "last.ckpt", scheduler=sampling["scheduler"])
        with silent_transformers():
            save_model(pipe, made)
        keep_once(output_dir / "autoencoder", made / "vae")
        keep_once(output_dir / "text_encoder", made / "text_encoder")
        say(f"written: {made}, {output_dir / 'checkpoints'}/, {output_dir / 'samples'}/, {output_dir / 'train.log'}")
    return made


_WHOLE = ("data.num_samples", "training.max_steps", "training.num_workers")
_YES_OR_NO = ("data.cache",)
_TEXT = (
    *("data.dataset_name", "data.dataset_path", "data.annotations", "data.pictures", "data.latents_dir"),
    *("text_encoder.name", "vae.name"),
)
"""Keys whose default tells nothing of their kind."""
_FROM_ONE = (
    *("training.batch_size", "training.gradient_accumulation_steps", "training.num_epochs", "training.max_steps"),
    *("training.prefetch_factor", "training.logging_steps", "sampling.num_steps"),
)
_SHARES = ("model.caption_dropout", "ema.decay")


def _check(**rooms: dict[str, Any]) -> None:
    """Say what cannot be before anything takes time.

    Raises:
        UserError: the first of it.
    """
    values = {f"{room}.{name}": value for room, inner in rooms.items() for name, value in inner.items()}

    def check(key: str, fits: bool, expected: str) -> None:
        if values[key] is not None and not fits:
            raise UserError(f"{key} is {values[key]!r}, expected {expected}")

    for keys, kind, expected in (
        (_WHOLE, int, "a whole number"),
        (_YES_OR_NO, bool, "true or false"),
        (_TEXT, str, "text"),
    ):
        for key in keys:
            check(key, type(values[key]) is kind, expected)
    size = values["data.image_size"]
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    check("data.image_size", all(type(side) is int for side in sides), "a whole number, or [height, width]")
    for key in _FROM_ONE:
        check(key, (values[key] or 0) >= 1, "1 or more")
    for key in _SHARES:
        check(key, 0 <= values[key] <= 1, "a share from 0 to 1")
    check("training.learning_rate", values["training.learning_rate"] > 0, "more than 0")


def _text_encoder_for(source: str | None, dataset_name: str, copy: Path, goes_on: bool, seed: int) -> TextEncoder:
    """The text encoder, of which a copy goes along with the checkpoints, and is that of a run that goes on."""
    if goes_on and (copy / "config.json").is_file():
        return load_text_encoder(copy)
    if source is None and dataset_name != "shapes":
        raise UserError(
            "text_encoder.name is missing: name a folder of transformers with CLIP's text encoder and its tokenizer "
            "(openai/clip-vit-base-patch32 downloaded), or its name on Hugging Face's hub where there is a network"
        )
    encoder = load_text_encoder(source) if source else tiny_text_encoder(vocabulary(), seed=seed)
    if is_first():
        encoder.save(copy)
    return encoder


def _vae_for(
    vae: dict[str, Any],
    dataset_name: str,
    pictures: CaptionedDataModule,
    copy: Path,
    goes_on: bool,
    seed: int,
    say: Callable[[str], None],
) -> StableDiffusionVAE:
    """The autoencoder, of which a copy goes along with the checkpoints, and is that of a run that goes on."""
    if goes_on and (copy / "config.json").is_file():
        return load_stable_diffusion_vae(copy, vae["use_slicing"])
    if vae["name"] is None and dataset_name != "shapes":
        raise UserError(
            "vae.name is missing: name a folder of diffusers with Stable Diffusion's AutoencoderKL "
            "(stabilityai/sd-vae-ft-mse downloaded), or its name on Hugging Face's hub where there is a network"
        )
    if vae["name"]:
        model = load_stable_diffusion_vae(vae["name"], vae["use_slicing"])
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


def _usual_folder(data: dict[str, Any], pictures: CaptionedDataModule, output_dir: Path) -> Path:
    if data["dataset_path"] is None:
        return output_dir / "latents"
    size = "x".join(map(str, pictures.train_data.image_size))
    return LATENTS / f"{Path(data['dataset_path']).resolve().name}-{size}"


def _fits_disk(
    encoder: TextEncoder,
    pictures: CaptionedDataModule,
    shape: tuple[int, int, int],
    folder: Path,
    say: Callable[[str], None],
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
    say: Callable[[str], None],
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


def _say_cut(count: int, longest: int, say: Callable[[str], None]) -> None:
    if count:
        what = "1 caption was cut: it is" if count == 1 else f"{count:,} captions were cut: they are"
        say(f"{what} longer than the {longest} tokens the encoder takes")


def _fit_batch(
    module: TextDiffusionModule, data: Any, devices: dict[str, Any], longest: int, say: Callable[[str], None]
) -> int:
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
