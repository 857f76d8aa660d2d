"""Synthetic pictures of a chosen person, from a few thousand private ones and one or two 16 GB GPUs.

The names that notebooks use; each is imported when it is first asked for, so that a command starts at once.
"""

from importlib import import_module

from vavae_tools.card import prepare_environment

prepare_environment()  # before anything uses a card

_HOME = {
    "write_gait_dataset": "data.gait",
    "split_folders": "data.split",
    "find_place": "places",
    "find_device": "machine",
    "find_preset": "training.presets",
    "fine_tune_vavae": "training.fine_tuning",
    "Saving": "training.saving",
    "encode_split": "training.runs",
    "train_dit": "training.runs",
    "run_experiment": "train",
    "fine_tune_rae_decoder": "training.rae_decoder",
    "load_rae": "autoencoders.rae_weights",
    "load_reference": "convert",
    "picture_data": "data.picture_sets",
    "caption_data": "data.captions",
    "captioned_shape_data": "data.captioned_shapes",
    "TokenImageDataset": "data.token_images",
    "grammatical_share": "data.sentences",
    "answers": "data.sentences",
    "PictureDataModule": "data.images",
    "PictureFolder": "data.images",
    "channels_of": "data.images",
    "LatentDataModule": "data.latents",
    "VAVAEModule": "training.vavae_module",
    "DiffusionModule": "training.diffusion_module",
    "load_vavae": "autoencoders.weights",
    "reconstruct": "autoencoders.vavae",
    "load_pipeline": "diffusion.pipeline",
    "load_text_pipeline": "diffusion.text_pipeline",
    "load_token_pipeline": "diffusion.token_pipeline",
    "fit": "training.processes",
    "write_samples": "diffusion.sample_sets",
    "evaluate_pictures": "evaluation.report",
    "evaluate_reconstructions": "evaluation.reconstructions",
    "evaluate_vavae": "evaluation.reconstructions",
    "evaluate_tokens": "evaluation.token_images",
    "compare_conditions": "evaluation.conditions",
    "push_session": "training.sessions",
    "pull_session": "training.sessions",
    "show_pictures": "plots",
    "show_rows": "plots",
    "plot_followed": "plots",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"vavae_tools has no {name!r}; it offers {', '.join(_HOME)}")
    value = getattr(import_module(f"vavae_tools.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
