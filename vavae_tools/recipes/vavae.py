"""Fine-tuning the VA-VAE, whole: from a split to a model's folder. `experiment=vavae`, notebook 02."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import lightning as L

from vavae_tools.autoencoders import weights
from vavae_tools.autoencoders.foundation import load_foundation
from vavae_tools.autoencoders.lpips import LPIPS, load_lpips
from vavae_tools.autoencoders.vavae import VAVAE, VAVAE_SIZES, resolve_image_size, vavae
from vavae_tools.autoencoders.weights import VAVAEWeights
from vavae_tools.data.datasets import class_data
from vavae_tools.data.images import ImageSetDataModule
from vavae_tools.evaluation.reconstructions import compare_conditions
from vavae_tools.recipes.base import AutoencoderLoss, FineTunedVAVAE, VAVAERecipe
from vavae_tools.recipes.config import recipe_with
from vavae_tools.recipes.presets import resolved
from vavae_tools.runtime.console import log
from vavae_tools.runtime.errors import UserError, in_home
from vavae_tools.runtime.files import save_model
from vavae_tools.runtime.machine import find_machine
from vavae_tools.training.autoencoder_module import VAVAEModule
from vavae_tools.training.callbacks.previews import ReconstructionPreviews
from vavae_tools.training.callbacks.record import is_finished
from vavae_tools.training.callbacks.watch import Advice, ReconstructionWatch
from vavae_tools.training.config import TrainConfig
from vavae_tools.training.run import Log, Run, Show, train, written

# ---- named sets of losses, their weights, and the optimiser's numbers: arguments of VAVAEModule
# The reference's numbers (VA-VAE, Yao & Wang 2025): Adam with a constant learning rate, nothing clipped.
_REFERENCE: dict[str, Any] = {
    "lr": 1e-4,
    "schedule": "constant",
    "betas": (0.5, 0.9),
    "weight_decay": 0.0,
    "gradient_clip": 0.0,
    "gradient_weight": 0.0,
    "spectral_weight": 0.0,
    "perceptual_weight": 1.0,
    "disc_weight": 0.5,
    "disc_lr": 1e-4,
}

LOSSES: dict[str, dict[str, Any]] = {
    # The autoencoder alone, with losses that need no weights from elsewhere: where a few thousand images are all there
    # is. Its learning rate depends on the model's size.
    "light": {},
    # The vector carries the person, at a cost in PSNR: the KL takes from the latents what the vector can tell. Of 1e-6
    # to 30, the least weight with which a classifier nearly always names the person whose vector decodes
    # (benchmarks/vectors.py; docs, "The VA-VAE").
    "vector": {"kl_weight": 10.0},
    # Every loss of the reference in one stage (its f16d32_vfdinov2). Its discriminator starts at 5,001 steps of both
    # optimisers, which are 2,500 of the model's.
    "full": {**_REFERENCE, "vf_weight": 0.1, "distance_margin": 0.25, "cosine_margin": 0.5, "disc_start": 2500},
    # The released model's three stages of 100, 15 and 15 epochs, each from the weights of the one before.
    "stage1": {**_REFERENCE, "vf_weight": 0.5, "disc_start": 2500},
    "stage2": {**_REFERENCE, "vf_weight": 0.1, "disc_start": 0},
    "stage3": {**_REFERENCE, "vf_weight": 0.1, "distance_margin": 0.25, "cosine_margin": 0.5, "disc_start": 0},
}

Size = int | tuple[int, int]  # pixels, or (height, width)


def fine_tune_vavae(
    data_dir: str | Path,
    output_dir: str | Path = "outputs",
    original_vavae: str | Path | None = None,
    size: str | None = None,
    image_size: Size | None = None,
    resume: str | None = None,
    show: Show | None = None,
    log: Log = log,
    **settings: Any,
) -> Path:
    """Fine-tune a VA-VAE with a vector per person; what is not given is as in `experiment=vavae`.

    Args:
        data_dir: what `datasets.class_data` reads.
        output_dir: gets `checkpoints/best-*.ckpt` and `last.ckpt`, `lightning_logs/`, `reconstructions/`, and at the
            end `vavae/`, the best model as a diffusers folder, whose path is returned.
        original_vavae: the published `.pt` or training `.ckpt`, a diffusers folder, a `.ckpt` of this training, or
            "small", which comes with the package; None: fresh weights of a `size`, "small" or "f16d32", without one
            what is attached, else "small".
        show, settings: as of `train_dit`.
    """
    given = {"data_dir": data_dir, "original_vavae": original_vavae, "size": size, "image_size": image_size}
    recipe = resolved(recipe_with(VAVAERecipe(), {**given, **settings}), log=log)
    return train_vavae(recipe, in_home(output_dir), resume, show, log)


def train_vavae(
    recipe: VAVAERecipe, output_dir: Path, resume: str | None = None, show: Show | None = None, log: Log = log
) -> Path:
    """`experiment=vavae`; the recipe staged is three trainings in folders of their own. Return the model's folder."""
    if recipe.loss.recipe != "staged":
        return train(build, recipe, output_dir, resume, show, log)
    epochs = recipe.train.max_epochs or 0
    if epochs < 3:
        raise UserError(f"--max_epochs {epochs}: the recipe staged needs at least one for each stage, 3, not max_steps")
    late = max(1, round(epochs * 15 / 130))  # as the released model's
    for name, length in (("stage1", epochs - 2 * late), ("stage2", late), ("stage3", late)):
        folder = output_dir / name
        last = folder / "checkpoints" / "last.ckpt"
        if resume and is_finished(folder):
            log(f"{name} is complete ({folder})")
        else:
            config = replace(recipe.train, max_epochs=length, previews=min(recipe.train.previews or 0, length))
            stage = replace(recipe, loss=replace(recipe.loss, recipe=name), train=config)
            train(build, stage, folder, "last" if resume and last.is_file() else None, show, log)
        if not is_finished(folder):  # stopped: the next session goes on with this stage
            break
        recipe = replace(recipe, vavae=replace(recipe.vavae, original_vavae=str(last)))
    return folder / "vavae"


def build(recipe: VAVAERecipe, output_dir: Path, resume_from: Path | None, show: Show | None, log: Log) -> Run:
    loss, config, seed, original = recipe.loss, recipe.train, recipe.seed, recipe.vavae.original_vavae
    folder, checkpoints, reconstructions = (output_dir / name for name in ("vavae", "checkpoints", "reconstructions"))
    replaced = {folder.resolve(), checkpoints.resolve()} if recipe.overwrite and resume_from is None else set()
    if original and replaced & {Path(original).resolve(), *Path(original).resolve().parents}:
        raise UserError(f"--overwrite would replace {original}, which this run begins with: name another --output_dir")
    images = class_data(**recipe.data.arguments(), batch_size=config.batch_size, seed=seed)
    model, found = _model_to_start_from(recipe.vavae, images, log)
    image_size = resolve_image_size(model, recipe.data.image_size)
    model.register_to_config(sample_size=image_size)
    images.resize(image_size)
    numbers = {**LOSSES[loss.recipe], **given_numbers(loss, config), "seed": seed}
    numbers |= {name: getattr(recipe.vavae, name) for name in ("condition_dropout", "freeze_encoder")}
    numbers.setdefault("lr", 2e-3 if model.config.block_out_channels[0] < 64 else 1e-4)
    if "gradient_checkpointing" not in numbers:
        numbers["gradient_checkpointing"] = _needs_checkpointing(model, numbers, config.batch_size, image_size, log)
    files = loss.lpips_weights
    if not files and numbers.get("perceptual_weight") and found is not None:  # the reference's checkpoints hold LPIPS
        files = found.source if any(name.startswith("loss.perceptual_loss.") for name in found.unused) else None
    aligned = loss.foundation_model and numbers.get("vf_weight")
    foundation = load_foundation(loss.foundation_model) if aligned else None
    module = VAVAEModule(model, **numbers, lpips=lpips_of(files, log), foundation=foundation)
    if found is not None:
        _load_auxiliary(module, found, log)
        module.hparams["started_from"] = None if original in VAVAE_SIZES else str(found.source)
    remarks = [f"Recipe {loss.recipe}: {describe_weights(module)}"]
    settings = module.trainer_settings(**config.of_devices())
    if (world := settings["devices"] * settings["num_nodes"]) > 1:
        rule = f"lr × sqrt({world}) = {numbers['lr'] * world**0.5:.2g}"
        remarks.append(f"Rule of thumb for {world} devices: {rule}; lr stays as given")
    watching: list[L.Callback] = []
    if images.val_data is not None:
        watching = [ReconstructionWatch(images, recipe.classifier_dir or output_dir / "classifier", seed), Advice(log)]
    shown = images.shown_data.preview_batch(8)
    # with a large KL weight reconstructions are best at first, before the latents have lost anything
    monitor = recipe.monitor or ("loss" if loss.recipe == "vector" else "reconstruction")
    watched = {"right": "accuracy"}.get(monitor, monitor)  # its name before

    def export(trainer: L.Trainer, checkpoint: Path) -> None:
        best = weights.load_vavae(checkpoint, log=lambda line: None)
        save_model(best, folder)
        if best.config.condition_dim and images.val_data is not None:
            log(str(compare_conditions(best.to(trainer.strategy.root_device), images.val_data)))
        log(written(folder, checkpoints, reconstructions))

    return Run(
        module=module,
        data=images,
        fingerprint=images.fingerprint(),
        config=config,
        network=model,
        what=f"a VA-VAE of {images.num_classes} people",
        export=export,
        folder=folder,
        preview=lambda epochs: ReconstructionPreviews(shown, reconstructions, epochs, show, images.labels),
        monitor=(f"val/{watched}", "min" if watched in ("reconstruction", "loss", "frechet") else "max"),
        best="best-",
        callbacks=watching,
        recorded={"recipe": loss.recipe, "image_size": image_size},
        remarks=remarks,
        validations=config.max_epochs or 1,
    )


def _model_to_start_from(start: FineTunedVAVAE, images: ImageSetDataModule, log: Log) -> tuple[VAVAE, Any]:
    """Return a model with a vector for each person, and its `VAVAEWeights`, None where they are fresh."""
    channels, dim = images.channels, start.condition_dim
    table = weights.read_condition_file(start.condition_file, images.labels) if start.condition_file else None
    if table is not None and dim not in (None, table.shape[1]):
        held = f"{start.condition_file} holds vectors of length {table.shape[1]}"
        raise UserError(f"{held}, but --condition_dim is {dim}: leave it out, or name another file")
    dim = table.shape[1] if table is not None else 32 if dim is None else dim
    people = images.num_classes if dim else 0
    if start.original_vavae is not None:
        found = weights.with_channels(weights.read_vavae(start.original_vavae), channels)
        model = weights.build_vavae(found, dim, people, log=log, people=images.labels)
    else:
        found = None
        log(f"A fresh VA-VAE ({start.size}); --original_vavae small learns faster, from trained weights")
        vectors = {"condition_dim": dim, "num_conditions": people, "people": images.labels if dim else None}
        model = vavae(start.size, **vectors, in_channels=channels, out_channels=channels)
    if table is not None:
        model.conditions.weight.data.copy_(table)
        model.conditions.requires_grad_(False)
    return model, found


def _load_auxiliary(module: VAVAEModule, found: VAVAEWeights, log: Log) -> None:
    """Load discriminator and alignment projection where the weights to start from bring them along."""
    projection = {"weight": found.projection} if found.projection is not None else None
    for part, given in (("discriminator", found.discriminator), ("projection", projection)):
        own = getattr(module, part, None)
        if own is None or given is None:
            continue
        shapes = [{name: tensor.shape for name, tensor in of.items()} for of in (own.state_dict(), given)]
        if shapes[0] != shapes[1]:
            log(f"The {part} in {found.source} has another form or shape: a fresh one is taken")
        else:
            own.load_state_dict(given)
            log(f"The {part} starts from {found.source}")


def _needs_checkpointing(model: VAVAE, numbers: dict[str, Any], batch_size: int, image_size: Size, log: Log) -> bool:
    """Return whether a step with all its activations kept would leave less than a tenth of the GPU's memory."""
    memory = find_machine().memory
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    # By benchmarks/memory.py, in GiB and mixed precision: an image of 256×256 at 128 channels; weights, optimisers,
    # DDP's copy of the gradients, and validation and previews between what training keeps.
    images = batch_size * height * width / 256**2 * model.config.block_out_channels[0] / 128
    more = any(numbers.get(f"{part}_weight") for part in ("perceptual", "disc", "vf"))
    needed = 1.5 * images + (1.5 if more else 1.3)
    if not memory or needed < 0.9 * memory / 2**30:
        return False
    need = f"{batch_size} images would need about {needed:.0f} of {memory / 2**30:.0f} GB"
    log(f"Gradient checkpointing is on: {need} (a smaller --batch_size is faster)")
    return True


# ---- what both autoencoders' trainings share
def given_numbers(loss: AutoencoderLoss, config: TrainConfig) -> dict[str, Any]:
    """Return the arguments of an autoencoder's module that have a value."""
    names = ("lr", "schedule", "warmup_steps", "gradient_clip", "accumulate_grad_batches", "gradient_checkpointing")
    given = {**asdict(loss), **{name: getattr(config, name) for name in names}}
    files = ("recipe", "lpips_weights", "foundation_model")
    return {name: value for name, value in given.items() if value is not None and name not in files}


def lpips_of(files: str | Path | list[str] | None, log: Log) -> LPIPS | None:
    if not files:
        return None
    lpips = load_lpips(files)
    log(f"LPIPS: {lpips.origin}")
    return lpips


def describe_weights(module: L.LightningModule) -> str:
    """Return the losses that are not turned off."""
    used = {name: value for name, value in module.hparams.items() if name.endswith("_weight") and value}
    return ", ".join(f"{name} {value:g}" for name, value in used.items())
