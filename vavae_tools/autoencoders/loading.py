"""Any autoencoder from its folder."""

import json
from pathlib import Path

from diffusers import ModelMixin

from vavae_tools.autoencoders.weights import load_vavae


def load_autoencoder(source: str | Path) -> ModelMixin:
    """The autoencoder in a folder that `save_pretrained` wrote, a `RAE` or a `VAVAE`, or what `load_vavae` takes.

    Raises:
        UserError: nothing there, or no autoencoder.
    """
    config = Path(source) / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("_class_name") == "RAE":
        from vavae_tools.autoencoders.rae_weights import read_rae_folder

        return read_rae_folder(source)
    return load_vavae(source, say=lambda line: None)
