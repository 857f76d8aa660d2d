"""Any autoencoder from its folder."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import ModelMixin

from vavae_tools.autoencoders.weights import load_vavae


@contextmanager
def silent_transformers() -> Iterator[None]:
    """Keep transformers from printing bars and warnings."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_autoencoder(source: str | Path) -> ModelMixin:
    """Load a `RAE`, a `VAVAE`, or Stable Diffusion's AutoencoderKL.

    Args:
        source: the folder that `save_pretrained` wrote, of a pipeline with `vae/` too, or what `load_vavae` takes.

    Raises:
        UserError: nothing there, or no autoencoder.
    """
    config = Path(source) / "config.json"
    if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("_class_name") == "RAE":
        from vavae_tools.autoencoders.rae_weights import read_rae_folder

        return read_rae_folder(source)
    from vavae_tools.autoencoders.stable_diffusion import is_stable_diffusion_vae, load_stable_diffusion_vae

    if Path(source).is_dir() and is_stable_diffusion_vae(source):
        return load_stable_diffusion_vae(source)
    return load_vavae(source, log=lambda line: None)
