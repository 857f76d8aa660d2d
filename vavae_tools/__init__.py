"""Synthetic images of a chosen person, from a few thousand private ones and one or two 16 GB GPUs.

The names that notebooks use; each is imported when it is first asked for, so that a command starts at once.
"""

import os
import sys
import warnings
from collections.abc import MutableMapping
from importlib import import_module


def prepare_environment(environment: MutableMapping[str, str] = os.environ, platform: str = sys.platform) -> None:
    """Set what torch and CUDA read as they begin, where the user has not.

    Segments that grow leave no gaps that are too small for the next tensor; Windows has none. cuBLAS gets workspaces
    with which it computes the same each time, for `deterministic`: 32 MiB.
    """
    allocator = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # newer and older versions of torch read them
    if platform == "linux" and not any(name in environment for name in allocator):
        environment.update(dict.fromkeys(allocator, "expandable_segments:True"))
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


prepare_environment()  # before anything uses a card
if "IPython" in sys.modules:  # before anything takes tqdm's widgets
    import_module("vavae_tools.runtime.console").bars_into_cell()

_NAMES = {
    "data.demo.gait": "write_gait_dataset",
    "data.split": "split_folders",
    "paths": "find_paths",
    "runtime.machine": "find_device",
    "recipes.attached": "find_attached_weights",
    "recipes.presets": "find_preset",
    "recipes.handover": "find_stage find_run find_or_make_split images_or_walkers",
    "recipes.stages": "Stages estimate_hours",
    "recipes.vavae": "fine_tune_vavae",
    "training.config": "SaveConfig",
    "recipes.dit": "encode_split train_dit",
    "train": "run_experiment",
    "recipes.rae": "fine_tune_rae_decoder",
    "autoencoders.rae_weights": "load_rae",
    "published": "load_reference",
    "data.datasets": "image_data caption_data ImageDataModule",
    "data.demo.shapes": "captioned_shape_data",
    "data.tokens.dataset": "TokenImageDataset",
    "data.demo.sentences": "grammatical_share answers",
    "data.images": "ImageFolder channels_of",
    "data.latents": "LatentDataModule",
    "training.autoencoder_module": "VAVAEModule",
    "training.denoiser_module": "DiffusionModule",
    "autoencoders.weights": "load_vavae",
    "autoencoders.vavae": "reconstruct",
    "pipelines.classes": "load_pipeline",
    "pipelines.schedule": "fit_schedule",
    "pipelines.text": "load_text_pipeline",
    "pipelines.tokens": "load_token_pipeline",
    "training.run": "fit",
    "training.curves": "plot_training judge_training",
    "pipelines.writer": "write_samples",
    "pipelines.people": "write_as_people",
    "evaluation.report": "evaluate_images",
    "evaluation.reconstructions": "evaluate_reconstructions evaluate_vavae compare_conditions decode_as_people",
    "evaluation.augmentation": "evaluate_gain",
    "evaluation.panel": "SamplingPanel",
    "evaluation.selection": "select_images",
    "evaluation.verdicts": "judge_vavae judge_images",
    "evaluation.texts": "evaluate_tokens",
    "kaggle.session": "push_session pull_session",
    "plots": "show_images show_rows plot_followed",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
_FORMER = {
    "picture_data": "image_data",
    "PictureDataModule": "ImageDataModule",
    "PictureFolder": "ImageFolder",
    "evaluate_pictures": "evaluate_images",
    "show_pictures": "show_images",
    "find_place": "find_paths",
    "Saving": "SaveConfig",
}
"""Names of before, for one release."""

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name in _FORMER:
        warnings.warn(f"vavae_tools.{name} is now called {_FORMER[name]}", FutureWarning, stacklevel=2)
        return __getattr__(_FORMER[name])
    if name not in _HOME:
        raise AttributeError(f"vavae_tools has no {name!r}; it offers {', '.join(_HOME)}")
    value = getattr(import_module(f"vavae_tools.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
