"""A denoiser on latents of images of classes: from a folder to a pipeline. `experiment=vavae_dit`, notebook 03."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from vavae_tools.autoencoders.encoders import silent_loading
from vavae_tools.autoencoders.vavae import VAVAE, resolve_image_size, with_vectors_of
from vavae_tools.autoencoders.weights import load_autoencoder, load_vavae
from vavae_tools.data.datasets import class_data
from vavae_tools.data.images import ImageSetDataModule, spread
from vavae_tools.data.latents import FIRST_SHARD, LatentDataModule, LatentFolder, encode_latents, latents_digest
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DDT, DiT, make_denoiser, split_reference_arguments
from vavae_tools.diffusion.lora import add_lora
from vavae_tools.diffusion.objectives import ALIASES, OBJECTIVES, make_objective, time_shift_of
from vavae_tools.diffusion.objectives import Objective as Learned
from vavae_tools.diffusion.solvers import make_solver
from vavae_tools.paths import folders_with
from vavae_tools.pipelines.classes import LatentDiTPipeline, load_pipeline
from vavae_tools.published.denoisers import read_latent_statistics
from vavae_tools.recipes.base import InitFrom, LatentRecipe, Objective, VAVAEDiTRecipe
from vavae_tools.recipes.config import recipe_with
from vavae_tools.recipes.init_from import read_fitting_weights, start_from, time_is_told
from vavae_tools.recipes.presets import resolved
from vavae_tools.runtime.console import log
from vavae_tools.runtime.errors import UserError, in_home
from vavae_tools.runtime.files import hardlink_duplicates, save_model
from vavae_tools.runtime.launch import call_on_ranks, several_processes
from vavae_tools.runtime.machine import find_device, take_card
from vavae_tools.runtime.ranks import current_ranks, is_rank_zero, rank_zero_first
from vavae_tools.training.callbacks.previews import SamplePreviews
from vavae_tools.training.callbacks.record import check_data
from vavae_tools.training.callbacks.watch import WATCHED_STEPS, SampleWatch
from vavae_tools.training.config import TrainConfig
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.devices import compiles
from vavae_tools.training.run import Log, Run, Show, check_early, train, written

ROWS, COLUMNS = 8, 8  # classes in a preview, spread over all, and samples of each


def encode_split(
    data_dir: str | Path,
    vavae_dir: str | Path,
    output_dir: str | Path,
    image_size: int | tuple[int, int] | None = None,
    flips: bool = False,
    seed: int = 0,
    log: Log = log,
    latents_stats: str | Path | None = None,
    other_people: bool = False,
    attached: Sequence[Path] = (),
    **of_data: Any,
) -> LatentFolder:
    """Encode what `datasets.class_data` reads with a VA-VAE, once, on all GPUs of this machine.

    Args:
        vavae_dir: a folder or a `.ckpt`.
        output_dir: each encoding has a folder of its own in it, which is the result's `path`.
        latents_stats: of published weights to start from; None: computed on the training subset.
        other_people: take a VA-VAE that was fine-tuned on other people; whom it does not know has no vector.
        attached: folders below which latents may be that are read in place, such as `ProjectPaths.attached`.
    """
    if several := several_processes():
        arguments = {"data_dir": data_dir, "vavae_dir": vavae_dir, "output_dir": output_dir, "image_size": image_size}
        arguments |= {"flips": flips, "seed": seed, "log": log, "latents_stats": latents_stats, "attached": attached}
        return call_on_ranks(
            f"{__name__}:_encode_here", {**arguments, "other_people": other_people, **of_data}, several
        )
    model, images = _vavae_and_images(vavae_dir, data_dir, image_size, seed, other_people, **of_data)
    options = {"flips": flips, "seed": seed, "attached": list(folders_with(attached, FIRST_SHARD))}
    return encode_once(model, images, output_dir, log, latents_stats, **options)


def _encode_here(**arguments: Any) -> LatentFolder:
    """Encode this process's share of a split, on its device."""
    take_card(current_ranks().local_rank)
    return encode_split(**arguments)


def _vavae_and_images(
    source: str | Path, data_dir: str | Path, image_size: Any, seed: int, other_people: bool, **of_data: Any
) -> tuple[VAVAE, ImageSetDataModule]:
    model = load_vavae(source, log=lambda line: None)
    size = resolve_image_size(model, image_size)
    images = class_data(data_dir, size, seed=seed, channels=model.config.in_channels, **of_data)
    return with_vectors_of(model, images.labels, other_people, source), images


def encode_once(
    model: nn.Module, images: Any, folder: str | Path, log: Log, stats: str | Path | None = None, **options: Any
) -> LatentFolder:
    """Return `encode_latents` with all processes, each on its device; `stats` is the file of published statistics."""
    for note in images.notes:
        log(note)
    options["statistics"] = read_latent_statistics(stats) if stats else None
    options |= {"device": find_device(), "ranks": current_ranks(), "log": log}
    latents = encode_latents(model, images, in_home(folder), **options)
    log(str(latents))
    return latents


def train_dit(
    latents_dir: str | Path,
    autoencoder_dir: str | Path,
    output_dir: str | Path = "outputs/dit",
    denoiser: dict[str, Any] | None = None,
    flip: str = "none",
    resume: str | None = None,
    show: Show | None = None,
    log: Log = log,
    **settings: Any,
) -> Path:
    """Train a denoiser on latents; what is not given is as in `experiment=vavae_dit`.

    Args:
        latents_dir, autoencoder_dir: where `encode_split` wrote, and the autoencoder that it took.
        output_dir: gets `checkpoints/best-*.ckpt` and `last.ckpt`, `lightning_logs/`, `samples/`, `autoencoder/`, and
            at the end `pipeline/`, with the averaged weights of the checkpoint `export`, whose path is returned.
        denoiser: keys of `model`, such as {"size": "S", "patch_size": 1}.
        flip: "half" trains half the time on mirrored images, where they were encoded.
        show: called with each grid, uint8 (3, H, W); by default a notebook's cell shows it.
        settings: the experiment's keys by their last words, `objective` and `init` as dicts; see `config.recipe_with`.
    """
    given = {"latents_dir": latents_dir, "model": denoiser, "flips": flip == "half", **settings}
    recipe = resolved(recipe_with(LatentRecipe(), given), autoencoder_dir, log)
    on_these = {"autoencoder": autoencoder_dir, "best": "best-"}
    return train(partial(build_on_latents, **on_these), recipe, output_dir, resume, show, log)


def build(recipe: VAVAEDiTRecipe, output_dir: Path, resume_from: Path | None, show: Show | None, log: Log) -> Run:
    """Encode a split, and return the training on its latents."""
    compiles(recipe.train.compile, log=log)  # what it lacks is said before anything takes time
    data, vavae = recipe.data, recipe.vavae
    arguments = {"seed": recipe.seed, "other_people": vavae.other_people, **data.arguments()}
    model, images = _vavae_and_images(vavae.source, **arguments)
    sides = [side // model.downsampling for side in images.train_data.image_size]
    check_before_encoding(recipe, (model.config.latent_channels, *sides), images, resume_from)
    folder = latents_folder(data.latents_dir, data.data_dir, "vavae", output_dir)
    check = partial(check_data, resume_from, recipe.train.allow_changes)
    options = {"flips": data.flips, "seed": recipe.seed, "check": check}
    latents = encode_once(model, images, folder, log, vavae.latents_stats, **options)
    return build_on_latents(
        recipe, output_dir, resume_from, show, log, autoencoder=model, folder=latents, images=images
    )


train_vavae_dit = partial(train, build)


def build_on_latents(
    recipe: LatentRecipe,
    output_dir: Path,
    resume_from: Path | None,
    show: Show | None,
    log: Log,
    autoencoder: nn.Module | str | Path,
    folder: LatentFolder | None = None,
    images: ImageSetDataModule | None = None,
    **of_run: Any,
) -> Run:
    """Return the training of a denoiser on the latents in `folder`, a `Run` with further fields.

    `autoencoder` made them of `images`, or, of those in `recipe.data.latents_dir`, is the folder or the `.ckpt` of what
    did.
    """
    config, seed = recipe.train, recipe.seed
    if folder is None:
        autoencoder, folder = _latents_of(autoencoder, recipe.data.latents_dir)
    L.seed_everything(seed, verbose=False)  # the same weights, whether latents were encoded just now or not
    latents = LatentDataModule(folder, config.batch_size, recipe.data.num_workers or 0, seed=seed)
    if recipe.data.flips and not folder.flips:
        raise UserError(f"{folder.path} has no mirrored latents to train on: encode with flips=True")
    network, conditioner = _denoiser_for(folder.shape, latents.num_classes, recipe)
    init = recipe.init
    if init.weights and resume_from is None:
        start_from(network, conditioner, init, latents, seed, log, recipe.model.reversed_time)
    elif init.weights and init.lora_rank:  # a run that resumes has its weights, and needs the same form
        add_lora(network, init.lora_rank, init.lora_alpha, init.lora_targets)
    config, numbers = prepared(config, network, seed, log)
    copy = output_dir / "autoencoder"
    if not autoencoder.has_own_statistics:
        autoencoder.register_to_config(latents_mean=folder.mean, latents_std=folder.std)
    with rank_zero_first("autoencoder"):  # the others read what it writes
        if is_rank_zero():
            save_model(autoencoder, copy)
    objective = make_recipe_objective(recipe.objective, type(recipe)().objective, folder.shape)
    flip = "half" if recipe.data.flips else "none"
    module = DiffusionModule(network, conditioner, objective, flip=flip, **numbers)
    module.hparams.update(people=folder.people, started_from=init.weights)
    named = sorted((label, name) for name, label in folder.people.items())
    shown = [named[place] for place in spread(ROWS, len(named))]

    def draw(trained: nn.ModuleDict, labels: list[int], num_steps: int) -> Tensor:
        # loaded each time, since training needs its memory at other times
        vae = load_autoencoder(copy).eval().to(next(trained.parameters()).device)
        further = {"people": folder.people, "objective": objective.config}
        pipe = LatentDiTPipeline(vae, **trained, scheduler=make_solver(None, objective), **further)
        pipe.set_progress_bar_config(disable=True)
        noise, scale = pipe.noise(seed, torch.arange(len(labels))), recipe.sampling.guidance_scale
        return pipe(labels, num_steps, scale, latents=noise, output_type="pt").images

    of_rows = [label for label, _ in shown for _ in range(COLUMNS)]
    make = partial(draw, labels=of_rows, num_steps=recipe.sampling.num_steps)
    preview = partial(SamplePreviews, make, COLUMNS, show=show, rows=[name for _, name in shown])
    of_run |= {"data": latents, "fingerprint": folder.key}
    if config.sample_watch:
        real = _images_of(recipe, folder, autoencoder) if images is None else images
        few = partial(draw, num_steps=WATCHED_STEPS)
        home = config.classifier_dir or output_dir / "classifier"
        of_run["callbacks"] = [SampleWatch(few, real, home, config.sample_watch, seed, log)]
    if config.monitor != "loss":
        of_run["monitor"] = f"val/{config.monitor}", "max"
    return denoiser_run(module, config, output_dir, load_pipeline, preview, log, **of_run)


def check_before_encoding(
    recipe: LatentRecipe, shape: tuple[int, ...], images: ImageSetDataModule, resume_from: Path | None
) -> None:
    """Say what of a training will not fit before anything takes time: it is built, but for its weights' memory."""
    config, init, people = recipe.train, recipe.init, images.labels
    with torch.device("meta"):
        network, conditioner = _denoiser_for(shape, max(people.values()) + 1, recipe)
    if init.weights and resume_from is None:
        found = read_fitting_weights(network, conditioner, init, people)
        time_is_told(found, network, recipe.model.reversed_time)
    if init.weights and init.lora_rank:
        add_lora(network, init.lora_rank, init.lora_alpha, init.lora_targets)
    objective = make_recipe_objective(recipe.objective, type(recipe)().objective, shape)
    with torch.device("meta"):
        module = DiffusionModule(network, conditioner, objective, ema_decay=config.ema_decay)
    check_early(module, config, images, resume_from)


def _images_of(recipe: LatentRecipe, folder: LatentFolder, autoencoder: nn.Module) -> ImageSetDataModule:
    """Return the images that latents were made of, as `recipe.data` names them."""
    if recipe.data.data_dir is None:
        raise UserError("--sample_watch compares samples with real images: name them, as data_dir=data_split")
    size = tuple(side * autoencoder.downsampling for side in folder.shape[1:])
    options = {**recipe.data.arguments(), "image_size": size, "channels": autoencoder.config.in_channels}
    images = class_data(**options, seed=recipe.seed)
    if images.labels != folder.people:
        raise UserError(
            f"{recipe.data.data_dir} is of other people than the latents in {folder.path}: name their images"
        )
    return images


def _latents_of(source: str | Path, latents_dir: str | Path) -> tuple[nn.Module, LatentFolder]:
    """Return the autoencoder in `source`, with the vectors of the latents' people, and the latents that it made."""
    model, found = load_autoencoder(source), LatentFolder.read_all(latents_dir)
    models = [with_vectors_of(model, folder.people, other_people=True) for folder in found]
    fitting = [pair for pair in zip(models, found, strict=True) if latents_digest(pair[0]) == pair[1].weights]
    if found and not fitting:
        raise UserError(f"{latents_dir} was not made by {source}: encode the images again with this one")
    folder = LatentFolder.only(latents_dir, [folder for _, folder in fitting])
    return fitting[0][0], folder


# ---- what all denoisers' trainings share
def latents_folder(latents_dir: str | None, data_dir: str | None, ending: str, output_dir: Path) -> Path:
    """Return where latents are kept: in the folder named, else by the data's name, of made-up data in the run's."""
    if latents_dir is None and data_dir in (None, "shapes"):
        return output_dir / "latents"
    return Path(latents_dir or f"logs/latents/{Path(data_dir).resolve().name}-{ending}")


def prepared(config: TrainConfig, denoiser: nn.Module, seed: int, log: Log) -> tuple[TrainConfig, dict[str, Any]]:
    """Switch on gradient checkpointing if asked; return whether to compile, decided, and the module's numbers."""
    if config.gradient_checkpointing:
        denoiser.enable_gradient_checkpointing()
    config = replace(config, compile=compiles(config.compile, log=log))
    names = ("lr", "ema_decay", "warmup_steps", "schedule", "compile")
    return config, {"seed": seed, **{name: getattr(config, name) for name in names}}


def denoiser_run(
    module: DiffusionModule,
    config: TrainConfig,
    output_dir: Path,
    load: Callable[[Path], DiffusionPipeline],
    preview: Callable[..., L.Callback],
    log: Log,
    remarks: Sequence[str] = (),
    **further: Any,
) -> Run:
    """Return a `Run`, with further fields, that ends with the pipeline that `load` makes of a checkpoint.

    `preview` makes the callback of a folder and the epochs after which there is one.
    """
    folder, checkpoints, samples = (output_dir / name for name in ("pipeline", "checkpoints", "samples"))
    if module.code is None and not module.network["conditioner"].dropout:
        remarks = [*remarks, "No null condition (condition_dropout=0): previews and samples are made without guidance"]

    def export(trainer: L.Trainer, checkpoint: Path) -> None:
        with silent_loading():
            save_model(load(checkpoint), folder)
        hardlink_duplicates(output_dir / "autoencoder", folder / "vae")  # an RAE is 2 GB
        hardlink_duplicates(output_dir / "text_encoder", folder / "text_encoder")
        log(written(folder, checkpoints, samples))

    return Run(
        module=module,
        config=config,
        network=module.network,
        what=f"a {type(module.network['denoiser']).__name__}",
        export=export,
        folder=folder,
        preview=partial(preview, samples),
        remarks=remarks,
        **further,
    )


def given_size(model: Any) -> dict[str, Any]:
    """Return what a recipe gives of its model; a size by name stands before numbers."""
    left_out = ("hidden_size", "depth", "num_heads") if model.size else ()
    return {k: v for k, v in asdict(model).items() if v is not None and k not in left_out}


def make_recipe_objective(wanted: Objective, default: Objective, shape: tuple[int, ...]) -> Learned:
    """Return an objective on data of a shape (C, h, w), without what only the recipe's `default` one takes."""
    numbers = asdict(wanted)
    name = numbers.pop("name")
    taken = inspect.signature(OBJECTIVES[ALIASES.get(name, name)]).parameters
    numbers = {key: value for key, value in numbers.items() if key in taken or value != getattr(default, key)}
    if "time_shift" in numbers and numbers["time_shift"] is None:
        numbers["time_shift"] = max(1.0, time_shift_of(shape))
    return make_objective(name, **numbers)


def _denoiser_for(shape: tuple[int, ...], num_classes: int, recipe: LatentRecipe) -> tuple[DiT | DDT, ClassConditioner]:
    (channels, height, width), model = shape, recipe.model
    given = [name for name, value in asdict(recipe.init).items() if value != asdict(InitFrom())[name]]
    if given and not recipe.init.weights:
        raise UserError(f"init.{given[0]} is of weights to start from: name them as init.weights, or leave it out")
    arguments = given_size(model)
    size = [height, width] if height != width or isinstance(model.input_size, list) else height
    fitting = {"in_channels": channels, "input_size": size, "latent_size": [channels, height, width]}
    for name, value in fitting.items():
        if arguments.pop(name, value) != value:
            here = f"the latents, which are {channels}×{height}×{width}"
            raise UserError(f"model.{name}={getattr(model, name)} does not fit {here}: leave it out")
    classes, null_label = model.num_classes or num_classes, arguments.pop("null_label", None)
    if classes < num_classes:
        raise UserError(f"num_classes {classes}, but {num_classes} in the data: set model.num_classes=null")
    if null_label not in (None, classes):
        raise UserError(f"model.null_label={null_label}, expected {classes}, the label after the last: leave it out")
    arguments |= {"in_channels": channels, "input_size": (height, width), "num_classes": classes}
    arguments["class_dropout_prob"] = arguments.pop("condition_dropout")
    of_denoiser, of_conditioner = split_reference_arguments(arguments)
    return make_denoiser(of_denoiser), ClassConditioner(**of_conditioner)
