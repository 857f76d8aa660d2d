"""Stage 2 of a representation autoencoder (RAE), whole: pictures, a look at their reconstructions, latents, a DiT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vavae_tools.autoencoders.rae import RAE
from vavae_tools.autoencoders.rae_weights import read_rae_folder
from vavae_tools.data.latents import LatentFolder, encode_latents
from vavae_tools.data.picture_sets import PictureSetDataModule
from vavae_tools.errors import UserError
from vavae_tools.files import save_model
from vavae_tools.machine import find_device, release_memory
from vavae_tools.ranks import first_alone, is_first, of_torchrun
from vavae_tools.training.devices import compiles
from vavae_tools.training.progress import say
from vavae_tools.training.rae_decoder import check_reconstructions, pictures_arguments, pictures_for, rae_from
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
