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

_HOME = {
    "write_gait_dataset": "data.demo.gait",
    "split_folders": "data.split",
    "find_paths": "paths",
    "find_device": "runtime.machine",
    "find_preset": "recipes.presets",
    "fine_tune_vavae": "recipes.vavae",
    "SaveConfig": "training.config",
    "encode_split": "recipes.dit",
    "train_dit": "recipes.dit",
    "run_experiment": "train",
    "fine_tune_rae_decoder": "recipes.rae",
    "load_rae": "autoencoders.rae_weights",
    "load_reference": "published",
    "image_data": "data.datasets",
    "caption_data": "data.datasets",
    "captioned_shape_data": "data.demo.shapes",
    "TokenImageDataset": "data.tokens.dataset",
    "grammatical_share": "data.demo.sentences",
    "answers": "data.demo.sentences",
    "ImageDataModule": "data.datasets",
    "ImageFolder": "data.images",
    "channels_of": "data.images",
    "LatentDataModule": "data.latents",
    "VAVAEModule": "training.autoencoder_module",
    "DiffusionModule": "training.denoiser_module",
    "load_vavae": "autoencoders.weights",
    "reconstruct": "autoencoders.vavae",
    "load_pipeline": "pipelines.classes",
    "load_text_pipeline": "pipelines.text",
    "load_token_pipeline": "pipelines.tokens",
    "fit": "training.run",
    "write_samples": "pipelines.writer",
    "evaluate_images": "evaluation.report",
    "evaluate_reconstructions": "evaluation.reconstructions",
    "evaluate_vavae": "evaluation.reconstructions",
    "evaluate_tokens": "evaluation.texts",
    "compare_conditions": "evaluation.reconstructions",
    "push_session": "kaggle.session",
    "pull_session": "kaggle.session",
    "show_images": "plots",
    "show_rows": "plots",
    "plot_followed": "plots",
}

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
