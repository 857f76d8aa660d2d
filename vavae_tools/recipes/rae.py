"""Representation autoencoders (RAE), whole: a look at their reconstructions, their decoder's training, and a DiT."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from vavae_tools.autoencoders.rae import RAE, tiny_rae
from vavae_tools.autoencoders.rae_weights import is_rae_folder, load_rae, read_rae_folder
from vavae_tools.checkpoints.formats import AVERAGE, read_any_format
from vavae_tools.data.datasets import class_data
from vavae_tools.data.images import DecodedImages, ImageSetDataModule, save_image, to_pixels, to_unit
from vavae_tools.evaluation.metrics import psnr
from vavae_tools.plots import image_grid, labelled_grid, show_inline
from vavae_tools.recipes.base import DecoderRecipe, ImageData, RAEDiTRecipe, RAEParts
from vavae_tools.recipes.config import recipe_with
from vavae_tools.recipes.dit import build_on_latents, check_before_encoding, encode_once, latents_folder
from vavae_tools.recipes.vavae import describe_weights, given_numbers, lpips_of
from vavae_tools.runtime.console import log
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import save_model
from vavae_tools.runtime.machine import find_device, release_memory
from vavae_tools.runtime.ranks import is_rank_zero
from vavae_tools.training.autoencoder_module import RAEDecoderModule
from vavae_tools.training.callbacks.previews import ReconstructionPreviews
from vavae_tools.training.callbacks.record import check_data, checkpoint_in
from vavae_tools.training.devices import compiles
from vavae_tools.training.run import Log, Run, Show, train, written

MIN_PSNR_DB = 20.0  # an RAE whose reconstructions are further away does not see the images well
MAX_PSNR_IMAGES = 256  # that the PSNR before and after a training is measured on


def fine_tune_rae_decoder(
    data: str | Path | dict[str, Any],
    rae: str | Path | dict[str, Any],
    output_dir: str | Path = "outputs/rae_decoder",
    resume: str | None = None,
    show: Show | None = None,
    log: Log = log,
    **settings: Any,
) -> Path:
    """Fine-tune the decoder of an RAE, not its encoder; what is not given is as in `experiment=rae_decoder`.

    Args:
        data: a folder of images, or the keys of the experiment's `data`; without data_dir made-up shapes.
        rae: a folder of a whole RAE, "tiny" for a small random one, or the keys of the experiment's `rae`.
        output_dir: gets `checkpoints/epoch=*.ckpt` (best by PSNR) and `last.ckpt`, `lightning_logs/`,
            `reconstructions/`, and at the end `rae/`, whose path is returned: the whole RAE with the averaged decoder
            of the last step, not the best one's, since PSNR falls where the discriminator makes images sharper.
        show, settings: as of `train_dit`.
    """
    data = {"data_dir": "shapes", **data} if isinstance(data, dict) else {"data_dir": data}
    rae = rae if isinstance(rae, dict) else {"folder": rae}
    recipe = recipe_with(DecoderRecipe(), {"data": data, "rae": rae, **settings})
    return train(build, recipe, output_dir, resume, show, log)


def build(recipe: DecoderRecipe, output_dir: Path, resume_from: Path | None, show: Show | None, log: Log) -> Run:
    loss, config, seed = recipe.loss, recipe.train, recipe.seed
    model = rae_from(recipe.rae, seed, log)
    images = images_for(model, recipe.data, config.batch_size, seed)
    lpips = lpips_of(loss.lpips_weights, log)
    if lpips is None:
        log("No lpips_weights: the perceptual part (LPIPS) is left out")
    batches = max(1, -(-len(images.train_data) // config.batch_size) // config.accumulate_grad_batches)
    steps = config.max_steps or (config.max_epochs or 1) * batches
    began = checkpoint_in(resume_from).get("hyper_parameters", {})
    numbers = {"ema_decay": config.ema_decay, "flips": recipe.data.flips, "seed": seed, **given_numbers(loss, config)}
    numbers.setdefault("perceptual_weight", 1.0 if loss.lpips_weights else 0.0)
    numbers.setdefault("disc_start", began.get("disc_start", steps * 3 // 8))  # as it was in a run that resumes
    numbers.setdefault("generator_start", began.get("generator_start", max(numbers["disc_start"] + 1, steps // 2)))
    module = RAEDecoderModule(model, **numbers, lpips=lpips)
    remark = f"Losses: {describe_weights(module)}"
    if loss.disc_weight:
        start, listen = numbers["disc_start"], numbers["generator_start"]
        remark += f"; the discriminator begins at step {start:,} and is listened to from step {listen:,}"

    subset = images.shown_data
    shown = subset.preview_batch(8)
    folder, checkpoints, reconstructions = (output_dir / name for name in ("rae", "checkpoints", "reconstructions"))
    if is_rank_zero():
        device = module.trainer_settings(**config.of_devices())["accelerator"].replace("gpu", "cuda")
        before = _look(model.to(device), subset, reconstructions / "before.png", show or show_inline)

    def export(trainer: L.Trainer, checkpoint: Path) -> None:
        averages = f"{AVERAGE}network."
        state = read_any_format(checkpoint, log)["state_dict"]
        weights = {k.removeprefix(averages): tensor for k, tensor in state.items() if k.startswith(averages)}
        model.decoder.load_state_dict(weights)
        model.register_to_config(noise_tau=loss.noise_tau)
        model.disable_gradient_checkpointing()
        after = _look(model.eval().to(device), subset, reconstructions / "after.png")
        save_model(model.to("cpu"), folder)
        where = "that validate" if images.val_data is not None else "that it was trained on, since none validate"
        count = min(len(subset), MAX_PSNR_IMAGES)
        log(f"PSNR {before:.1f} dB before, {after:.1f} dB after, on {count:,} images {where}")
        if after < MIN_PSNR_DB:
            log(f"advice: below {MIN_PSNR_DB:.0f} dB, train longer, or with a larger decoder")
        log(written(folder, checkpoints, reconstructions))

    return Run(
        module=module,
        data=images,
        fingerprint=images.fingerprint(),
        config=config,
        network=module.network,
        what="an RAE's decoder",
        export=export,
        folder=folder,
        preview=lambda epochs: ReconstructionPreviews(shown, reconstructions, epochs, show),
        monitor=("val/psnr", "max"),
        recorded={"batch_size": config.batch_size},
        remarks=[remark],
    )


train_rae_decoder = partial(train, build)


def rae_from(parts: RAEParts, seed: int = 0, log: Log = log) -> RAE:
    """Return the RAE of a folder, a small random one, or one of several files; `seed` is of weights no file holds."""
    settings, folder = asdict(parts), parts.folder
    del settings["folder"]
    if folder and (beside := [name for name, value in settings.items() if value != getattr(RAEParts(), name)]):
        raise UserError(f"rae.folder={folder} is a whole RAE: leave out rae.{', rae.'.join(beside)}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if folder is None:
            return load_rae(**settings, log=log)
        if folder == "tiny":
            log("RAE: a tiny one with random weights, which shows how things go and not what they can reach")
            return tiny_rae().eval()
    if not is_rae_folder(folder):
        expected = "a config.json that says RAE or AutoencoderRAE"
        raise UserError(f"{folder} is no folder of a whole RAE ({expected}): name one, or parts (rae.encoder_cls …)")
    return read_rae_folder(folder)


def images_for(rae: RAE, data: ImageData, batch_size: int = 16, seed: int = 0) -> ImageSetDataModule:
    """Return images as large as the RAE's decoder makes them."""
    if data.image_size not in (None, rae.image_size):
        why = f"this RAE makes images of {rae.image_size} of any size, so another one saves no memory: leave it out"
        saves = "a smaller train.batch_size and more train.accumulate_grad_batches do, or a smaller encoder_input_size"
        raise UserError(f"image_size {data.image_size}: {why}; {saves} (this is {rae.config.encoder_input_size})")
    options = {**data.arguments(), "image_size": rae.image_size}
    return class_data(**options, batch_size=batch_size, seed=seed, channels=3)


def check_reconstructions(
    rae: RAE, data: DecodedImages, folder: str | Path, log: Log = log, show: Show | None = None, count: int = 16
) -> float:
    """Write and show `before.png`, originals above their reconstructions; log and return the mean PSNR of `count`."""
    path = Path(folder) / "before.png"
    mean = _look(rae, data, path, show or show_inline, count)
    log(f"The RAE's reconstructions of {min(count, len(data))} images: PSNR {mean:.1f} dB ({path})")
    if mean < MIN_PSNR_DB:
        advice = "fine-tune the decoder on these images (experiment=rae_decoder, with the same rae.… and data)"
        log(f"warning: below {MIN_PSNR_DB:.0f} dB, which no denoiser makes good: {advice}")
    return mean


@torch.inference_mode()
def _look(rae: RAE, data: DecodedImages, path: Path, show: Show | None = None, count: int = MAX_PSNR_IMAGES) -> float:
    """Write a grid of eight images, and return the mean PSNR in dB of `count`, each no more than 100."""
    originals = data.preview_batch(count)["images"]
    made = torch.cat([to_pixels(rae(to_unit(part).to(rae.device))).cpu() for part in originals.split(16)])
    shown, columns = torch.cat([originals[:8], made[:8]]), len(made[:8])
    save_image(image_grid(shown, columns), path)
    mean = psnr(to_unit(made), to_unit(originals)).clamp_max(100).mean().item()
    if show is not None:
        title = f"reconstructions, PSNR {mean:.1f} dB"
        show(labelled_grid(shown, columns, ["original", "reconstruction"], title))
    return mean


def build_rae_dit(recipe: RAEDiTRecipe, output_dir: Path, resume_from: Path | None, show: Show | None, log: Log) -> Run:
    """Encode images once, with all processes, and return the training on their latents; the RAE leaves the GPU."""
    copy, seed, data = output_dir / "autoencoder", recipe.seed, recipe.data
    compiles(recipe.train.compile, log=log)  # what it lacks is said before anything takes time
    rae = read_rae_folder(copy) if resume_from and copy.is_dir() else rae_from(recipe.rae, seed, log)
    images = images_for(rae, data, seed=seed)
    check_before_encoding(recipe, rae.latent_shape, images, resume_from)
    logged = {}
    if is_rank_zero():
        rae.to(find_device()).eval()
        logged["rae/psnr"] = check_reconstructions(rae, images.shown_data, output_dir / "reconstructions", log, show)
    encoder = f"{recipe.rae.encoder_cls}-{rae.config.encoder_input_size}"
    folder = latents_folder(data.latents_dir, data.data_dir, encoder, output_dir)
    # float16: half the disk of latents with 768 channels, and its rounding lies far below the decoder's noise
    options = {"flips": data.flips, "seed": seed, "dtype": "float16"}
    check = partial(check_data, resume_from, recipe.train.allow_changes)
    latents = encode_once(rae, images, folder, log, **options, check=check)
    rae.to("cpu")  # its memory is training's
    release_memory()
    recipe = replace(recipe, data=replace(data, num_workers=0))
    return build_on_latents(recipe, output_dir, resume_from, show, log, rae, latents, images, logged=logged)


train_rae_dit = partial(train, build_rae_dit)
