"""Stage 2 of a representation autoencoder (RAE), whole: pictures, a look at their reconstructions, latents, a DiT."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from vavae_tools.autoencoders.lpips import load_lpips
from vavae_tools.autoencoders.rae import RAE, reconstruction_psnr
from vavae_tools.autoencoders.rae_weights import is_rae_folder, load_rae, read_rae_folder
from vavae_tools.autoencoders.tiny import tiny_rae
from vavae_tools.checkpoints.formats import read_any
from vavae_tools.checkpoints.resuming import check_resumable, resume_path
from vavae_tools.data.datasets import picture_data
from vavae_tools.data.demo.shapes import shape_data
from vavae_tools.data.images import DecodedPictures, PictureSetDataModule, save_picture, to_pixels, to_unit
from vavae_tools.data.latents import LatentFolder, encode_latents
from vavae_tools.plots import picture_grid, show_inline
from vavae_tools.recipes.dit import Show, experiment_arguments, train_dit
from vavae_tools.runtime.console import say
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import save_model
from vavae_tools.runtime.machine import find_device, release_memory
from vavae_tools.runtime.ranks import first_alone, is_first, of_torchrun
from vavae_tools.training.autoencoder_module import RAEDecoderModule
from vavae_tools.training.callbacks.checkpointing import checkpoint_callbacks
from vavae_tools.training.callbacks.previews import Previews
from vavae_tools.training.callbacks.record import RunRecord
from vavae_tools.training.config import Saving, saving_knobs
from vavae_tools.training.devices import compiles, describe, quiet_lightning
from vavae_tools.training.memory import RAE_DECODER
from vavae_tools.training.run import build_trainer, fit_trainer, on_all_devices

# ---- Fine-tuning the decoder of a representation autoencoder (RAE) on one's own pictures, whole; and a look at how
# well an RAE reconstructs them.


ENOUGH = 20.0
"""dB: an RAE whose reconstructions are further away does not see the pictures well."""
MEASURED = 256
"""Pictures that the PSNR before and after a training is measured on, at most."""


@on_all_devices
def fine_tune_rae_decoder(
    data: str | Path | dict[str, Any],
    rae: str | Path | dict[str, Any],
    output_dir: str | Path = "outputs/rae_decoder",
    batch_size: int = 8,
    max_steps: int = 5000,
    lr: float = 2e-4,
    noise_tau: float = 0.8,
    lpips_weights: str | Path | list[str | Path] | None = None,
    perceptual_weight: float | None = None,
    disc_weight: float = 0.75,
    disc_start: int | None = None,
    generator_start: int | None = None,
    seed: int = 0,
    resume: str | None = None,
    previews: int = 8,
    show: Show | None = None,
    say: Callable[[str], None] = say,
    devices: dict[str, Any] | None = None,
    saving: Saving | dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Fine-tune the decoder of an RAE; its encoder, and so its latents, stay as they are.

    Args:
        data: a folder of pictures, or the arguments of `picture_data`, or those of `shape_data` for made-up ones; all
            plain values.
        rae: a folder of a whole RAE, "tiny" for a small random one, or the arguments of `load_rae`.
        output_dir: gets `checkpoints/epoch=*.ckpt` (best by PSNR) and `last.ckpt`, `lightning_logs/`,
            `reconstructions/`, and at the end `rae/`: the whole RAE with the averaged decoder of the last step. Not the
            best one's, since PSNR falls where the discriminator makes pictures sharper.
        batch_size: pictures per device and step.
        max_steps: optimiser steps of the decoder.
        lr: AdamW's after warm-up; 2e-4 is the paper's, a tiny decoder takes ten times that.
        noise_tau: see `RAEDecoderModule`.
        lpips_weights: local files for the perceptual part (`perceptual.load_lpips`).
        perceptual_weight: None: 1, the paper's, where `lpips_weights` are named; else 0, which is said.
        disc_weight: of the adversarial part; 0: none.
        disc_start, generator_start: steps at which the discriminator begins, and the decoder to listen to it; None: at
            3/8 and at half of all steps, as in the paper (epochs 6 and 8 of 16), or as in the run that goes on.
        previews: grids of reconstructions in all; 0: none.
        show: called with each grid, uint8 (3, H, W); by default a notebook's cell shows it.
        devices: arguments of `devices.trainer_settings`, such as {"devices": 2, "precision": "16"}.
        saving: when checkpoints are written and training ends, a `Saving` or its numbers as a dict.
        changes: further arguments of `RAEDecoderModule`.

    Returns:
        The folder of the RAE.

    Raises:
        UserError: files that are not there, or settings that cannot be.
    """
    L.seed_everything(seed, verbose=False)
    quiet_lightning()
    if max_steps < 1:
        raise UserError(f"max_steps {max_steps}: at least one step is needed")
    if perceptual_weight and not lpips_weights:
        raise UserError(
            f"perceptual_weight {perceptual_weight:g} needs LPIPS's weights: name them (lpips_weights), or leave "
            "perceptual_weight out, and the absolute error alone compares the pictures"
        )
    saving = Saving(**saving) if isinstance(saving, dict) else saving or Saving()
    output_dir = Path(output_dir)
    checkpoints = output_dir / "checkpoints"
    resume_from = resume_path(resume, checkpoints, say)
    model = rae_from(rae, seed, say)
    pictures = pictures_for(model, data, batch_size, seed)

    lpips = load_lpips(lpips_weights) if lpips_weights else None
    if perceptual_weight is None:
        perceptual_weight = 1.0 if lpips is not None else 0.0
    say(f"LPIPS: {lpips.origin}" if lpips is not None else "No lpips_weights: the perceptual part (LPIPS) is left out")
    # a run that goes on to more steps keeps where the discriminator began
    began = read_any(resume_from, lambda line: None).get("hyper_parameters", {}) if resume_from else {}
    if disc_start is None:
        disc_start = began.get("disc_start", max_steps * 3 // 8)
    if generator_start is None:
        generator_start = began.get("generator_start", max(disc_start + 1, max_steps // 2))
    module = RAEDecoderModule(
        model,
        lr=lr,
        noise_tau=noise_tau,
        perceptual_weight=perceptual_weight,
        disc_weight=disc_weight,
        disc_start=disc_start,
        generator_start=generator_start,
        seed=seed,
        lpips=lpips,
        **changes,
    )
    settings = module.trainer_settings(**(devices or {}))
    a_step = batch_size * settings["devices"] * settings["num_nodes"]
    epochs = -(-max_steps * module.accumulate_grad_batches // max(1, len(pictures.train_data) // a_step))
    _say_plan(module, pictures, max_steps, a_step, epochs, say)
    say(describe(settings, batch_size=batch_size, num_workers=pictures.num_workers))
    if pictures.remark:
        say(pictures.remark)

    side = pictures.val_data if pictures.val_data is not None else pictures.train_data
    show, first = show or show_inline, is_first()
    if first:
        device = "cuda" if settings["accelerator"] == "gpu" else "cpu"
        model.to(device)
        before = _look(model, side, output_dir / "reconstructions" / "before.png", show)
    validated = pictures.val_data is not None
    callbacks = checkpoint_callbacks(checkpoints, "val/psnr" if validated else None, saving, "max", best="epoch=")
    if previews:
        shown = side.few_of_each(8)["pictures"]
        callbacks.append(DecoderPreviews(shown, output_dir / "reconstructions", max(1, epochs // previews), show))
    own = {"batch_size": batch_size, "precision": settings["precision"]}
    callbacks.append(RunRecord(output_dir, own, pictures.fingerprint(), saving.allow_changes, say))
    length = {"max_steps": max_steps, "max_epochs": -1, "check_val_every_n_epoch": max(1, epochs // 20)}
    trainer = build_trainer({**length, **settings}, output_dir, callbacks, say)
    check_resumable(resume_from, module)
    fit_trainer(trainer, module, pictures, resume_from, say, RAE_DECODER)

    folder = output_dir / "rae"
    if trainer.is_global_zero:
        model.decoder.load_state_dict(module.ema.network.state_dict())
        model.register_to_config(noise_tau=noise_tau)
        model.disable_gradient_checkpointing()
        after = _look(model.eval().to(device), side, output_dir / "reconstructions" / "after.png")
        save_model(model.to("cpu"), folder)
        where = "that validate" if validated else "that it was trained on, since none validate"
        say(f"PSNR {before:.1f} dB before, {after:.1f} dB after, on {min(len(side), MEASURED):,} pictures {where}")
        if after < ENOUGH:
            say(
                f"advice: below {ENOUGH:.0f} dB pictures are hard to know again: train longer, or with a larger decoder"
            )
        say(f"written: {folder}, {checkpoints}/, {output_dir / 'reconstructions'}/")
    return folder


def train_rae_decoder(
    data: dict[str, Any],
    model: dict[str, Any],
    trainer: dict[str, Any],
    callbacks: dict[str, Any],
    output_dir: str | Path,
    resume: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = say,
    show: Show | None = None,
) -> Path:
    """`experiment=rae_decoder`, with the keys of `configs/`; returns the folder of the RAE."""
    devices = dict(trainer)
    module, losses = dict(model["decoder_module"]), dict(model["losses"])
    numbers = {
        "lr": module.pop("learning_rate"),
        "gradient_clip": devices.pop("gradient_clip_val"),  # the module clips and gathers, since it has two optimisers
        "accumulate_grad_batches": devices.pop("accumulate_grad_batches"),
        "flips": data["flips"],
        **module,
        **losses,
    }
    folder = fine_tune_rae_decoder(
        pictures_arguments(data),
        model["rae"],
        output_dir,
        data["batch_size"],
        seed=seed,
        resume=resume,
        previews=callbacks["previews"],
        show=show,
        say=say,
        devices=devices,
        saving=saving_knobs(callbacks),
        **numbers,
    )
    its_data = f"data.data_dir={data['data_dir']}" if "data_dir" in data else "data=shapes"
    say(f"next: python -m vavae_tools.train experiment=rae_dit model.rae.folder={folder} {its_data}")
    return folder


def rae_from(source: str | Path | Mapping[str, Any], seed: int = 0, say: Callable[[str], None] = say) -> RAE:
    """An RAE: that of a folder, "tiny" for a small random one, or of the arguments of `load_rae`.

    Args:
        source: among the arguments `folder` may stand, and holds in place of the others.
        seed: of the weights that no file holds.

    Raises:
        UserError: nothing there, or another autoencoder.
    """
    settings = dict(source) if isinstance(source, Mapping) else {"folder": source}
    folder = settings.pop("folder", None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if folder is None:
            return load_rae(**settings, say=say)
        if str(folder) == "tiny":
            say("RAE: a tiny one with random weights, which shows how things go and not what they can reach")
            return tiny_rae().eval()
    if not is_rae_folder(folder):
        raise UserError(
            f"{folder} is no folder of a whole RAE (a config.json that says RAE or AutoencoderRAE): name one, or the "
            "parts, such as encoder_config_path"
        )
    return read_rae_folder(folder)


def pictures_arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `configs/data/pictures.yaml` or `shapes.yaml` → the arguments of `picture_data` or `shape_data`."""
    if "data_dir" in data:
        names = ("data_dir", "image_size", "use_hf_dataset", "train_split", "val_share", "crop", "num_workers")
        return {name: data[name] for name in names if name in data}
    return {"count": data["num_pictures"], **{name: data[name] for name in ("num_classes", "image_size", "val_share")}}


def pictures_for(
    rae: RAE, data: str | Path | Mapping[str, Any], batch_size: int = 16, seed: int = 0
) -> PictureSetDataModule:
    """Pictures as large as the RAE's decoder makes them.

    Args:
        data: a folder, or the arguments of `picture_data`, or those of `shape_data`.

    Raises:
        UserError: none there, or an `image_size` that is another.
    """
    given = dict(data) if isinstance(data, Mapping) else {"data_dir": data}
    size = given.pop("image_size", None)
    if size not in (None, rae.picture_size):
        raise UserError(f"image_size {size}: this RAE's decoder makes pictures of {rae.picture_size}: leave it out")
    options = {"image_size": rae.picture_size, "batch_size": batch_size, "seed": seed, **given}
    return picture_data(**options) if "data_dir" in given else shape_data(**options)


# ---- a look
def check_reconstructions(
    rae: RAE,
    data: DecodedPictures,
    folder: str | Path,
    say: Callable[[str], None] = say,
    show: Show | None = None,
    count: int = 16,
) -> float:
    """Reconstruct some of a person's pictures before their latents are used, and say how near that is.

    Writes `before.png`, rows of originals above their reconstructions, and shows it. An RAE away from what it was
    trained on reconstructs badly: below 20 dB there is a line of advice.

    Args:
        data: one side of the pictures; the first `count` are taken, one class after the other.
        folder: of the picture.
        show: called with it, uint8 (3, H, W); by default a notebook's cell shows it.

    Returns:
        The mean PSNR in dB.
    """
    path = Path(folder) / "before.png"
    mean = _look(rae, data, path, show or show_inline, count, count)
    say(f"The RAE's reconstructions of {min(count, len(data))} pictures: PSNR {mean:.1f} dB ({path})")
    if mean < ENOUGH:
        say(
            f"warning: below {ENOUGH:.0f} dB, which no denoiser makes good: fine-tune the decoder on these pictures "
            "(python -m vavae_tools.train experiment=rae_decoder, with the same model.rae.… and data), or take another "
            "encoder if that does not help"
        )
    return mean


def reconstruct_some(rae: RAE, data: DecodedPictures, count: int, at_once: int = 16) -> tuple[Tensor, Tensor, float]:
    """The first `count` pictures, one class after the other, as large as the RAE makes them.

    Returns:
        The originals and their reconstructions, uint8 (count, 3, S, S), and the mean PSNR in dB, each no more than 100.
    """
    originals = data.few_of_each(count)["pictures"]
    found = [reconstruction_psnr(rae, part) for part in originals.split(at_once)]
    made, values = (torch.cat([part[i].cpu() for part in found]) for i in (0, 1))
    if originals.shape[2:] != made.shape[2:]:
        resized = F.interpolate(to_unit(originals), made.shape[2:], mode="bicubic", align_corners=False, antialias=True)
        originals = to_pixels(resized)
    return originals, made, values.clamp_max(100).mean().item()


def originals_above(originals: Tensor, made: Tensor, columns: int = 8) -> Tensor:
    """Rows of originals, each above their reconstructions, on white: uint8 (3, H, W)."""
    columns = min(columns, len(originals))
    rows = []
    for above, below in zip(originals.split(columns), made.split(columns), strict=True):
        for row in (above, below):
            rows += [row, row.new_full((columns - len(row), *row.shape[1:]), 255)]
    return picture_grid(torch.cat(rows), columns)


class DecoderPreviews(Previews):
    """Originals above what the averaged decoder makes of them."""

    name = "reconstructions"

    def __init__(self, pictures: Tensor, folder: str | Path, every: int = 1, show: Show | None = None) -> None:
        super().__init__(folder, every, show)
        self.pictures = pictures

    def grid(self, module: L.LightningModule) -> Tensor:
        return originals_above(self.pictures, module.reconstructed(self.pictures).cpu())


def _look(
    rae: RAE, data: DecodedPictures, path: Path, show: Show | None = None, count: int = MEASURED, shown: int = 16
) -> float:
    originals, made, mean = reconstruct_some(rae, data, count)
    grid = originals_above(originals[:shown], made[:shown])
    save_picture(grid, path)
    if show is not None:
        show(grid)
    return mean


def _say_plan(
    module: RAEDecoderModule,
    pictures: PictureSetDataModule,
    max_steps: int,
    a_step: int,
    epochs: int,
    say: Callable[[str], None],
) -> None:
    settings, weights = module.hparams, sum(p.numel() for p in module.network.parameters())
    say(
        f"Training an RAE's decoder of {weights / 1e6:,.1f} M weights on {len(pictures.train_data):,} pictures: "
        f"{max_steps:,} steps of {a_step * module.accumulate_grad_batches}, {epochs:,} epochs, lr {settings.lr:g}; "
        "its encoder stays as it is"
    )
    parts = [f"{name} {settings[name]:g}" for name in settings if name.endswith("_weight") and settings[name]]
    begins = f"; the discriminator begins at step {settings.disc_start:,} and is listened to from step "
    begins += f"{settings.generator_start:,}"
    say(f"Losses: {', '.join(parts)}{begins if settings.disc_weight else ''}")


LATENTS = Path("logs/latents")


def train_rae_dit(
    data: dict[str, Any],
    model: dict[str, Any],
    trainer: dict[str, Any],
    callbacks: dict[str, Any],
    output_dir: str | Path,
    resume: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = say,
    show: Show | None = None,
) -> Path:
    """`experiment=rae_dit`, `dit_dino`, `dit_dummy`, with the keys of `configs/`; returns the pipeline's folder.

    The frozen RAE sees every picture once; training then reads latents alone.

    Raises:
        UserError: a latent size or number of classes that does not fit the encoder or the data.
    """
    output_dir = Path(output_dir)
    copy = output_dir / "autoencoder"
    arguments = experiment_arguments(data, model, trainer, callbacks)
    arguments["compile"] = compiles(arguments["compile"], say=say)  # what it lacks is said before anything takes time
    rae = read_rae_folder(copy) if resume and copy.is_dir() else rae_from(model["rae"], seed, say)
    pictures = pictures_for(rae, pictures_arguments(data), seed=seed)
    _check(model, rae, pictures)
    noted = {}
    if is_first():
        device = find_device()
        rae.to(device).eval()
        shown = pictures.val_data if pictures.val_data is not None else pictures.train_data
        noted["rae/psnr"] = check_reconstructions(rae, shown, output_dir / "reconstructions", say, show)
    latents = encode_pictures(rae, pictures, data, model["rae"]["encoder_cls"], output_dir, seed, say)
    rae.to("cpu")  # its memory is training's
    release_memory()
    with first_alone("autoencoder"):
        if is_first():
            save_model(rae, copy)
    return train_dit(
        latents.path,
        copy,
        output_dir,
        resume=resume,
        seed=seed,
        say=say,
        show=show,
        noted=noted,
        **arguments,
    )


def encode_pictures(
    rae: RAE,
    pictures: PictureSetDataModule,
    data: dict[str, Any],
    encoder: str,
    output_dir: Path,
    seed: int,
    say: Callable[[str], None] = say,
) -> LatentFolder:
    """The pictures' latents, made once, by all processes: in `data.latents_dir`, or in a folder named after data and
    encoder."""
    folder = data["latents_dir"]
    if folder is None and "data_dir" in data:
        folder = LATENTS / f"{Path(data['data_dir']).resolve().name}-{encoder}-{rae.config.encoder_input_size}"
    # float16: half the disk of latents with 768 channels, and its rounding lies far below the decoder's noise
    latents = encode_latents(
        rae,
        pictures,
        folder or output_dir / "latents",
        data["flips"],
        device=find_device(),
        seed=seed,
        dtype="float16",
        ranks=of_torchrun(),
        say=say,
    )
    say(str(latents))
    return latents


def _check(model: dict[str, Any], rae: RAE, pictures: PictureSetDataModule) -> None:
    module, found = model["dit_module"], list(rae.latent_shape)
    wanted = module.get("latent_size")
    if wanted is not None and list(wanted) != found:
        sizes = "×".join(map(str, wanted)), "×".join(map(str, found))
        raise UserError(
            f"latent_size {sizes[0]} does not fit the encoder, whose latents are {sizes[1]}: set "
            f"model.dit.in_channels={found[0]} model.dit.input_size={found[1]}"
        )
    classes = model["dit"].get("num_classes") or pictures.num_classes
    for name, expected in (("num_classes", classes), ("null_label", classes)):
        if module.get(name) not in (None, expected):
            raise UserError(
                f"model.dit_module.{name}={module[name]}, but the model has {expected} classes, and the label after "
                f"the last one, {expected}, stands for any: leave it out, or set model.dit.num_classes"
            )
