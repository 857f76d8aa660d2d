"""Any autoencoder from its folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffusers import ModelMixin

from vavae_tools.autoencoders.rae_weights import is_rae_folder, read_rae_folder
from vavae_tools.autoencoders.stable_diffusion import is_stable_diffusion_vae, load_stable_diffusion_vae
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
    """Load a `RAE`, a `VAVAE`, or Stable Diffusion's AutoencoderKL, from the folder that `save_pretrained` wrote (of a
    pipeline with `vae/` too), or from what `load_vavae` takes.
    """
    if is_rae_folder(source):
        return read_rae_folder(source)
    if is_stable_diffusion_vae(source):
        return load_stable_diffusion_vae(source)
    return load_vavae(source, log=lambda line: None)
