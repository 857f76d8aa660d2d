"""Fine-tuning the VA-VAE, whole: from a split to a model's folder. Notebook 02 and the commands call this."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L

from vavae_tools.autoencoders.foundation import load_foundation
from vavae_tools.autoencoders.lpips import load_lpips
from vavae_tools.autoencoders.vavae import VAVAE, fitting_size, vavae
from vavae_tools.autoencoders.weights import (
    VAVAEWeights,
    build_vavae,
    load_vavae,
    pretrained_small_folder,
    read_condition_file,
    read_vavae,
    with_channels,
)
from vavae_tools.checkpoints.resuming import best_checkpoint
from vavae_tools.data.datasets import class_data
from vavae_tools.evaluation.reconstructions import compare_conditions
from vavae_tools.paths import find_split
from vavae_tools.recipes.base import VAVAERecipe
from vavae_tools.recipes.presets import resolved
from vavae_tools.runtime.console import say
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import save_model
from vavae_tools.runtime.machine import find_machine
from vavae_tools.training.autoencoder_module import VAVAEModule
from vavae_tools.training.callbacks.previews import ReconstructionPreviews
from vavae_tools.training.callbacks.record import has_ended
from vavae_tools.training.callbacks.watch import Advice, ReconstructionWatch
from vavae_tools.training.config import Saving, filled
from vavae_tools.training.run import Run, Say, Show, train

# ---- How a VA-VAE is fine-tuned: named sets of losses, their weights, and the optimiser's numbers


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
    # The autoencoder alone, with losses that need no weights from elsewhere: where a few thousand pictures are all
    # there is. Its learning rate depends on the model's size.
    "light": {},
    # Every loss of the reference in one stage (its f16d32_vfdinov2). Its discriminator starts at 5,001 steps of both
    # optimisers, which are 2,500 of the model's.
    "full": {**_REFERENCE, "vf_weight": 0.1, "distance_margin": 0.25, "cosine_margin": 0.5, "disc_start": 2500},
    # The released model's three stages of 100, 15 and 15 epochs, each from the weights of the one before.
    "stage1": {**_REFERENCE, "vf_weight": 0.5, "disc_start": 2500},
    "stage2": {**_REFERENCE, "vf_weight": 0.1, "disc_start": 0},
    "stage3": {**_REFERENCE, "vf_weight": 0.1, "distance_margin": 0.25, "cosine_margin": 0.5, "disc_start": 0},
}

STAGES = {"stage1": 100, "stage2": 15, "stage3": 15}
"""Epochs of the released model's stages: the shares that the recipe "staged" gives to each."""


def loss_numbers(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The arguments for `VAVAEModule` of a recipe, with single numbers replaced; None keeps the recipe's.

    Raises:
        UserError: no such recipe.
    """
    if name not in LOSSES:
        raise UserError(f"No recipe {name!r}; there are {', '.join(LOSSES)}, and staged for stage1 to stage3 in turn")
    return {**LOSSES[name], **{key: value for key, value in changes.items() if value is not None}}


def epochs_of_stages(max_epochs: int) -> dict[str, int]:
    """How many of `max_epochs` each stage gets, one at least.

    >>> epochs_of_stages(130)
    {'stage1': 100, 'stage2': 15, 'stage3': 15}
    >>> epochs_of_stages(3)
    {'stage1': 1, 'stage2': 1, 'stage3': 1}
    """
    if max_epochs < len(STAGES):
        raise UserError(f"--max_epochs {max_epochs}: the recipe staged needs at least one for each stage, 3")
    late = {name: max(1, round(max_epochs * STAGES[name] / sum(STAGES.values()))) for name in ("stage2", "stage3")}
    return {"stage1": max_epochs - sum(late.values()), **late}


MONITORS = {"reconstruction": "min", "psnr": "max", "ssim": "max", "right": "max", "frechet": "min"}
"""What `best-*.ckpt` can be chosen by, and whether less or more of it is better."""


def fine_tune_vavae(
    data_dir: str | Path,
    output_dir: str | Path = "outputs",
    original_vavae: str | Path | None = None,
    size: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    condition_dim: int | None = None,
    condition_file: str | Path | None = None,
    recipe: str = "light",
    batch_size: int | None = None,
    max_epochs: int | None = None,
    lpips_weights: str | Path | list[str | Path] | None = None,
    foundation_model: str | Path | None = None,
    monitor: str = "reconstruction",
    classifier_dir: str | Path | None = None,
    seed: int = 0,
    resume: str | None = None,
    preview_every: int | None = None,
    show: Show | None = None,
    say: Say = say,
    devices: dict[str, Any] | None = None,
    saving: Saving | dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Fine-tune a VA-VAE with a vector per person, as `experiment=vavae` does.

    Args:
        data_dir: a split, or what else `datasets.PictureDataModule` reads.
        output_dir: gets `checkpoints/best-*.ckpt` and `last.ckpt`, `lightning_logs/`, `reconstructions/`, and at the
            end `vavae/`, the best model as a diffusers folder.
        original_vavae: weights to start from: the published `.pt` or training `.ckpt`, a diffusers folder, a `.ckpt`
            of this training, or "small" for those that come with the package; None starts from fresh ones.
        size: "small" or "f16d32" for fresh weights; by default what suits the machine.
        image_size: pixels, one number or (height, width); by default the size the weights were made for.
        condition_dim: length of a person's vector, by default 32 or that of the file's; 0 for none.
        condition_file: safetensors with a fixed vector per person, in place of learned ones.
        recipe: "light", "full", "stage1" to "stage3", or "staged" for these three in turn (`LOSSES`).
        batch_size, max_epochs: by default what suits the machine (`presets`).
        lpips_weights: local files for the perceptual part (`lpips.load_lpips`); by default `original_vavae`, where
            that is a training checkpoint which holds them.
        foundation_model: local folder of a DINOv2 for the alignment (`foundation.load_foundation`).
        monitor: what the best checkpoint is chosen by: "reconstruction", "psnr", "ssim", or by a classifier that is
            trained on the real images, "right" or "frechet".
        classifier_dir: keeps that classifier; by default `output_dir/classifier`.
        resume: "last" or a `.ckpt`.
        preview_every: epochs between two grids of reconstructions; by default about ten in all.
        show: called with each grid, uint8 (3, H, W); by default a notebook's cell shows it.
        devices: arguments of `devices.trainer_settings`, such as {"devices": 2, "precision": "16"}.
        saving: when checkpoints are written and training ends, a `Saving` or its numbers as a dict.
        changes: arguments of `VAVAEModule` in place of the recipe's, such as lr, kl_weight, disc_weight; None keeps
            the recipe's. The learning rate of "light" is 1e-4 for f16d32 and 2e-3 for small: 70 M and 0.4 M weights.

    Returns:
        The folder of the best model.
    """
    settings = {
        **{"data_dir": data_dir, "image_size": image_size, "original_vavae": original_vavae, "size": size},
        **{"condition_dim": condition_dim, "condition_file": condition_file, "recipe": recipe, "seed": seed},
        **{"lpips_weights": lpips_weights, "foundation_model": foundation_model, "monitor": monitor},
        **{"classifier_dir": classifier_dir, "batch_size": batch_size, "max_epochs": max_epochs},
        **{"devices": devices, "saving": saving, **changes},
    }
    wanted, further = filled(VAVAERecipe(), settings)
    lightning = {name: further.pop(name) for name in (devices or {}).keys() & further.keys()}
    config = replace(wanted.train, trainer=lightning)
    wanted = resolved(replace(wanted, train=config))
    if preview_every:
        previews = max(1, wanted.train.max_epochs // preview_every)
        wanted = replace(wanted, train=replace(wanted.train, previews=previews))
    return _train(wanted, Path(output_dir), resume, show, say, further)


def train_vavae(
    recipe: VAVAERecipe, output_dir: Path, resume: str | None = None, show: Show | None = None, say: Say = say
) -> Path:
    """`experiment=vavae`; returns the folder of the best model."""
    data_dir = recipe.data.data_dir or str(find_split())
    recipe = resolved(replace(recipe, data=replace(recipe.data, data_dir=data_dir)))
    folder = _train(recipe, output_dir, resume, show, say)
    say(f"next: python -m vavae_tools.train --data_dir {data_dir} --vavae {folder}")
    return folder


def _train(
    recipe: VAVAERecipe,
    output_dir: Path,
    resume: str | None,
    show: Show | None,
    say: Say,
    further: Mapping[str, Any] | None = None,
) -> Path:
    build = partial(_build, further=further or {})
    if recipe.loss.recipe != "staged":
        return train(build, recipe, output_dir, resume, show, say)
    # the released model's stages in turn, each in a folder of its own, each from the last weights of the former
    if recipe.train.max_epochs is None:
        raise UserError("The recipe staged counts in epochs: set max_epochs in place of max_steps")
    folder = output_dir
    for name, epochs in epochs_of_stages(recipe.train.max_epochs).items():
        folder = output_dir / name
        last = folder / "checkpoints" / "last.ckpt"
        if resume and has_ended(folder):
            say(f"{name} is complete ({folder})")
        else:
            stage = replace(
                recipe,
                loss=replace(recipe.loss, recipe=name),
                train=replace(recipe.train, max_epochs=epochs, previews=min(recipe.train.previews, epochs)),
                classifier_dir=recipe.classifier_dir,
            )
            train(build, stage, folder, "last" if resume and last.is_file() else None, show, say)
        if not has_ended(folder):  # stopped: the next session goes on with this stage
            break
        recipe = replace(recipe, vavae=replace(recipe.vavae, original_vavae=str(last)))
    return folder / "vavae"


def _build(
    recipe: VAVAERecipe,
    output_dir: Path,
    resume_from: Path | None,
    show: Show | None,
    say: Say,
    further: Mapping[str, Any],
) -> Run:
    loss, start, config, seed = recipe.loss, recipe.vavae, recipe.train, recipe.seed
    changes = {name: value for name, value in asdict(loss).items() if name not in _FILES}
    own = ("lr", "schedule", "warmup_steps", "gradient_clip", "accumulate_grad_batches", "gradient_checkpointing")
    changes |= {name: getattr(config, name) for name in own}
    numbers = loss_numbers(loss.recipe, {**changes, **further})
    numbers |= {"condition_dropout": start.condition_dropout, "freeze_encoder": start.freeze_encoder}
    images = class_data(**recipe.data.arguments(), batch_size=config.batch_size, seed=seed)
    people, channels = images.labels, images.channels
    table = read_condition_file(start.condition_file, people) if start.condition_file else None
    condition_dim = start.condition_dim
    if table is not None and condition_dim not in (None, table.shape[1]):
        raise UserError(
            f"{start.condition_file} holds vectors of length {table.shape[1]}, but --condition_dim is {condition_dim}: "
            "leave it out, or name another file"
        )
    condition_dim = table.shape[1] if table is not None else 32 if condition_dim is None else condition_dim
    found = _weights_to_start_from(start.original_vavae, channels)
    model = _vavae_to_start_from(found, start.size, condition_dim, images.num_classes, channels, say)
    if table is not None:
        model.conditions.weight.data.copy_(table)
        model.conditions.requires_grad_(False)
    image_size = fitting_size(model, recipe.data.arguments()["image_size"])
    model.register_to_config(sample_size=image_size)
    images.resize(image_size)
    numbers["lr"] = numbers.get("lr") or (2e-3 if model.config.block_out_channels[0] < 64 else 1e-4)
    if numbers.get("gradient_checkpointing") is None:
        numbers["gradient_checkpointing"] = _needs_checkpointing(model, numbers, config.batch_size, image_size, say)
    lpips_weights = loss.lpips_weights
    if not lpips_weights and numbers.get("perceptual_weight") and found is not None:
        brought = any(name.startswith("loss.perceptual_loss.") for name in found.unused)
        lpips_weights = found.source if brought else None  # the reference's training checkpoints hold it
    lpips = load_lpips(lpips_weights) if lpips_weights else None
    if lpips is not None:
        say(f"LPIPS: {lpips.origin}")
    foundation = load_foundation(loss.foundation_model) if loss.foundation_model and numbers.get("vf_weight") else None
    module = VAVAEModule(model, **numbers, seed=seed, lpips=lpips, foundation=foundation)
    _take_over(module, found, say)
    settings = module.trainer_settings(**config.of_devices())
    world = settings["devices"] * settings["num_nodes"]
    remarks = [*filter(None, [images.remark]), f"Recipe {loss.recipe}: {_weights_in_words(module)}"]
    if world > 1:
        lr = numbers["lr"]
        remarks.append(
            f"Rule of thumb for {world} devices: lr × sqrt({world}) = {lr * world**0.5:.2g}; lr stays as given"
        )
    validated = images.val_data is not None
    shown = (images.val_data or images.train_data).few_of_each(8)
    watching = (
        [ReconstructionWatch(images, recipe.classifier_dir or output_dir / "classifier", seed), Advice(say)]
        if validated
        else []
    )
    folder, checkpoints, reconstructions = (
        output_dir / "vavae",
        output_dir / "checkpoints",
        output_dir / "reconstructions",
    )

    def export(trainer: L.Trainer) -> None:
        path = best_checkpoint(checkpoints)
        best = load_vavae(path, say=lambda line: None)
        save_model(best, folder)
        if best.config.condition_dim and validated:
            say(str(compare_conditions(best.to(trainer.strategy.root_device), images.val_data)))
        say(f"written: {folder} (from {path}), {reconstructions}/")

    return Run(
        module=module,
        data=images,
        fingerprint=images.fingerprint(),
        config=config,
        network=model,
        what=f"a VA-VAE of {images.num_classes} people",
        export=export,
        folder=folder,
        preview=lambda every: ReconstructionPreviews(shown, reconstructions, every, show),
        monitor=(f"val/{recipe.monitor}", MONITORS[recipe.monitor]),
        best="best-",
        callbacks=watching,
        recorded={"recipe": loss.recipe, "image_size": image_size},
        remarks=remarks,
        validations=config.max_epochs or 1,
    )


_FILES = ("recipe", "lpips_weights", "foundation_model")
"""Of `VAVAELoss`, what is no argument of `VAVAEModule`."""


def _weights_to_start_from(original: str | Path | None, channels: int) -> VAVAEWeights | None:
    if original is None:
        return None
    return with_channels(read_vavae(pretrained_small_folder() if str(original) == "small" else original), channels)


def _vavae_to_start_from(
    found: VAVAEWeights | None,
    size: str | None,
    condition_dim: int,
    people: int,
    channels: int,
    say: Say,
) -> VAVAE:
    people = people if condition_dim else 0
    if found is not None:
        return build_vavae(found, condition_dim, people, say=say)
    size = size or ("small" if find_machine().kind == "cpu" else "f16d32")
    say(f"No weights given: starting from a fresh VA-VAE ({size})")
    form = {"condition_dim": condition_dim, "num_conditions": people, "in_channels": channels, "out_channels": channels}
    return vavae(size, **form)


def _take_over(module: VAVAEModule, found: VAVAEWeights | None, say: Say) -> None:
    """Discriminator and alignment projection go on where the weights to start from bring them along."""
    if found is None:
        return
    for part, weights in (
        ("discriminator", found.discriminator),
        ("projection", {"weight": found.projection} if found.projection is not None else None),
    ):
        own = getattr(module, part, None)
        if own is None or weights is None:
            continue
        if any(weights[name].shape != tensor.shape for name, tensor in own.state_dict().items() if name in weights):
            say(f"The {part} in {found.source} has another shape: a fresh one is taken")
        else:
            own.load_state_dict(weights)
            say(f"The {part} goes on from {found.source}")


def _needs_checkpointing(
    model: VAVAE,
    numbers: dict[str, Any],
    batch_size: int,
    image_size: int | tuple[int, int],
    say: Say,
) -> bool:
    """Whether a step with all its activations kept would leave less than a tenth of the GPU's memory.

    That tenth is for CUDA itself and for what a notebook's own process has of the card. Losses count from the first
    step on, also a discriminator that begins later.
    """
    memory = find_machine().memory
    height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    # By benchmarks/memory.py, in GiB and mixed precision: a picture of 256×256 at 128 channels; weights, optimisers,
    # DDP's copy of the gradients, and validation and previews between what training keeps.
    pictures = batch_size * height * width / 256**2 * model.config.block_out_channels[0] / 128
    more = any(numbers.get(f"{part}_weight") for part in ("perceptual", "disc", "vf"))
    needed = 1.5 * pictures + (1.5 if more else 1.3)
    if not memory or needed < 0.9 * memory / 2**30:
        return False
    say(
        f"Gradient checkpointing is on: {batch_size} pictures would need about {needed:.0f} of {memory / 2**30:.0f} GB "
        "(a smaller --batch_size is faster)"
    )
    return True


def _weights_in_words(module: VAVAEModule) -> str:
    settings = module.hparams
    names = [name for name in settings if name.endswith("_weight") and settings[name]]
    return ", ".join(f"{name} {settings[name]:g}" for name in names)
