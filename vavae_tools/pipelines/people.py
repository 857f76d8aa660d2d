"""Training images as other people: their content, decoded with another person's vector. It takes no DiT."""

import random
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from vavae_tools.autoencoders.vavae import reconstruct_images, resolve_image_size, with_vectors_of
from vavae_tools.autoencoders.weights import load_vavae
from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.data.images import save_image
from vavae_tools.runtime.errors import UserError, in_home
from vavae_tools.runtime.machine import find_device


@torch.inference_mode()
def write_as_people(
    vavae: str | Path,
    data_dir: str | Path,
    output_dir: str | Path = "outputs/as_people",
    images_per_person: int | None = None,
    seed: int = 0,
    batch_size: int = 32,
    progress: bool = True,
    **source: Any,
) -> list[Path]:
    """Write others' training images as each person: encoded with their own vector, decoded with the person's.

    Useful where the vectors carry the person, as after fine-tuning with `recipe="vector"` (`evaluate_vavae` says how
    often a classifier names the person whose vector decodes): then each person has the content of everybody's images.

    Args:
        vavae: a folder or `.ckpt` of a VA-VAE that was fine-tuned on these people.
        data_dir, source: what `ImageDataModule` reads, and how.
        output_dir: gets a folder per person, as `write_samples` does; it must hold no images yet.
        images_per_person: so many, chosen and ordered by the seed; None: all of others'.

    Raises:
        UserError: a VA-VAE without vectors, or of other people; one person alone; a folder that holds images.
    """
    output_dir, model = in_home(output_dir), load_vavae(vavae, log=lambda line: None).eval()
    if not model.config.condition_dim:
        raise UserError(f"{vavae} has no vectors of people: fine-tune one with --recipe vector")
    size = resolve_image_size(model, None)
    data = ImageDataModule(data_dir, size, channels=model.config.in_channels, progress=progress, **source)
    train = data.train_data
    if len(train.labels.unique()) < 2:
        raise UserError(f"{data_dir} has training images of one person alone: nobody else's can be decoded as theirs")
    model = with_vectors_of(model, data.labels, source=vavae).to(find_device())
    if any(output_dir.glob("*/*.png")):
        raise UserError(f"{output_dir} holds images already: name another --output_dir, or remove it")
    written = []
    for name, label in tqdm(data.labels.items(), "as other people", unit="person", disable=None if progress else True):
        others = (train.labels != label).nonzero().flatten().tolist()
        random.Random(f"{seed} {name}").shuffle(others)
        for start in range(0, len(others[:images_per_person]), batch_size):
            batch = train.get_batch(others[:images_per_person][start : start + batch_size])
            own, pixels = (batch[key].to(model.device) for key in ("labels", "images"))
            made = reconstruct_images(model, pixels, own, torch.full_like(own, label)).cpu()
            for place, image in enumerate(made):
                path = output_dir / name / f"{start + place:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                save_image(image, path)
                written.append(path)
    return written
