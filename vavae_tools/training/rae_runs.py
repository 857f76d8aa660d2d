"""Stage 2 of a representation autoencoder (RAE), whole: pictures, a look at their reconstructions, latents, a DiT."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vavae_tools.autoencoders.rae import RAE, tiny_rae
from vavae_tools.autoencoders.rae_weights import load_rae, read_rae_folder
from vavae_tools.data.latents import LatentFolder, encode_latents
from vavae_tools.data.picture_sets import PictureSetDataModule, picture_data
from vavae_tools.data.shapes import shape_data
from vavae_tools.errors import UserError
from vavae_tools.files import save_model
from vavae_tools.machine import find_device
from vavae_tools.training.progress import say
from vavae_tools.training.rae_decoder import check_reconstructions
from vavae_tools.training.runs import Show, experiment_arguments, train_dit

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
    rae = read_rae_folder(copy) if resume and copy.is_dir() else rae_of(model["rae"], seed, say)
    pictures = pictures_of(data, rae, seed)
    _check(model, rae, pictures)
    noted = {}
    if int(os.environ.get("LOCAL_RANK", 0)) == 0:
        device = find_device()
        rae.to(device).eval()
        shown = pictures.val_data if pictures.val_data is not None else pictures.train_data
        noted["rae/psnr"] = check_reconstructions(rae, shown, output_dir / "reconstructions", say, show)
    latents = encode_pictures(rae, pictures, data, model["rae"]["encoder_cls"], output_dir, seed, say)
    save_model(rae.to("cpu"), copy)
    arguments = experiment_arguments(data, model, trainer, callbacks)
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


def rae_of(settings: dict[str, Any], seed: int = 0, say: Callable[[str], None] = say) -> RAE:
    """The frozen first stage that `model.rae` means: a folder, "tiny" for a small random one, or parts (`load_rae`)."""
    settings = dict(settings)
    folder = settings.pop("folder", None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of what starts anew
        if folder == "tiny":
            say("RAE: a tiny one with random weights, which shows how things go and not what they can reach")
            return tiny_rae()
        return read_rae_folder(folder) if folder else load_rae(**settings, say=say)


def pictures_of(data: dict[str, Any], rae: RAE, seed: int = 0) -> PictureSetDataModule:
    """The pictures that `data` means: made-up shapes where it has no `data_dir`."""
    size = data["image_size"] or rae.picture_size
    if "data_dir" in data:
        names = ("data_dir", "use_hf_dataset", "train_split", "val_share", "crop", "num_workers")
        return picture_data(image_size=size, seed=seed, **{name: data[name] for name in names})
    return shape_data(data["num_pictures"], data["num_classes"], size, seed=seed, val_share=data["val_share"])


def encode_pictures(
    rae: RAE,
    pictures: PictureSetDataModule,
    data: dict[str, Any],
    encoder: str,
    output_dir: Path,
    seed: int,
    say: Callable[[str], None] = say,
) -> LatentFolder:
    """The pictures' latents, made once: in `data.latents_dir`, or in a folder named after data and encoder."""
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
