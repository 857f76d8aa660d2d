"""Train the small autoencoders that come with the package, on images other than the demo's.

`vavae`: a VA-VAE, on simulated walkers shown in many colour maps, zooms, mirrorings and contrasts, so that fine-tuning
on a CPU is fine-tuning. `shapes`: a Stable Diffusion VAE for coloured shapes, which text-to-image without data uses.
"""

import argparse
import math
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from vavae_tools.autoencoders.stable_diffusion import StableDiffusionVAE
from vavae_tools.autoencoders.vavae import VAVAE, vavae
from vavae_tools.data.demo.gait import colormap_table, simulate_image
from vavae_tools.data.demo.shapes import CaptionedShapes, ShapeImages
from vavae_tools.data.images import to_unit
from vavae_tools.data.loader import OrderedDataModule
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import run_command
from vavae_tools.training.autoencoder_module import VAVAEModule
from vavae_tools.training.callbacks.checkpointing import AtomicCheckpointIO, LastCheckpoint
from vavae_tools.training.callbacks.progress import Progress
from vavae_tools.training.config import SaveConfig
from vavae_tools.training.devices import quiet_lightning

COLORMAPS = ("jet", "jet", "viridis", "viridis", "turbo", "inferno", "magma", "plasma", "gray", "hot", "cividis")
PEOPLE_SEED = 1_000_003
"""Of the walkers; the demo's people are those of seed 0."""
SHAPES_SEED = 1_000_003
SIMULATED, SHOWN = 128, 64
"""Pixels: walkers are simulated twice as large as they are shown, so that they can be zoomed into."""


class AugmentedWalkers(Dataset):
    """Item i is always the same image: a crop, turned, stretched in contrast, coloured."""

    def __init__(self, intensities: Tensor, length: int, seed: int) -> None:
        self.intensities, self.length, self.seed = intensities, length, seed  # uint8 (N, 128, 128)
        self.tables = torch.stack([torch.tensor(colormap_table(name)) for name in COLORMAPS])  # uint8 (maps, 256, 3)

    def __len__(self) -> int:
        return self.length

    def get_batch(self, indices: list[int]) -> dict[str, Tensor]:
        index = torch.tensor(indices)
        numbers = Draws(self.seed, 0, index).uniform("augmentation", 8).tolist()
        images = [self._augment(i % len(self.intensities), *u) for i, u in zip(indices, numbers, strict=True)]
        return {"images": torch.stack(images), "labels": torch.zeros_like(index), "index": index}

    def _augment(
        self,
        i: int,
        zoom: float,
        top: float,
        left: float,
        turn: float,
        mirror: float,
        gain: float,
        offset: float,
        colour: float,
    ) -> Tensor:
        side = int(SHOWN + zoom * (SIMULATED - SHOWN))  # between a true-size crop and the whole image
        y, x = int(top * (SIMULATED - side + 1)), int(left * (SIMULATED - side + 1))
        crop = self.intensities[i, y : y + side, x : x + side].float()[None, None]
        crop = F.interpolate(crop, (SHOWN, SHOWN), mode="bilinear", antialias=True, align_corners=False)[0, 0]
        crop = crop.T if turn < 0.3 else crop
        crop = crop.flip(1) if mirror < 0.5 else crop
        crop = ((crop - 128) * (0.7 + 0.9 * gain) + 128 + 120 * (offset - 0.6)).round().clamp(0, 255)
        return self.tables[int(colour * len(self.tables))][crop.long()].permute(2, 0, 1)  # (3, 64, 64)


class WalkerDataModule(OrderedDataModule):
    def __init__(self, walkers: AugmentedWalkers, batch_size: int, seed: int) -> None:
        super().__init__(batch_size, seed=seed)
        self.train_data = walkers


def simulate_walkers(people: int, images: int) -> Tensor:
    """Intensities before the colour map: uint8 (people · images, 128, 128)."""
    tasks = [(person, image) for person in range(1, people + 1) for image in range(1, images + 1)]
    with ProcessPoolExecutor() as pool:
        return torch.from_numpy(np.stack(list(pool.map(_simulate, tasks, chunksize=32))))


def _simulate(task: tuple[int, int]) -> np.ndarray:
    # in grey the colour is the intensity
    return simulate_image(PEOPLE_SEED, *task, size=SIMULATED, colormap="gray")[..., 0].copy()


def train_vavae(walkers: Tensor, steps: int, batch_size: int, lr: float, seed: int, folder: Path) -> VAVAE:
    """Return the small VA-VAE after `steps`; a killed run resumes from `folder`'s last.ckpt."""
    quiet_lightning()
    data = AugmentedWalkers(walkers, steps * batch_size, seed)
    torch.manual_seed(seed)
    module = VAVAEModule(vavae("small"), lr=lr, warmup_steps=200, seed=seed)
    trainer = L.Trainer(
        **module.trainer_settings(),
        max_epochs=1,
        default_root_dir=folder,
        callbacks=[LastCheckpoint(folder / "checkpoints", SaveConfig(save_every_minutes=2)), Progress()],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
    )
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(module, WalkerDataModule(data, batch_size, seed), ckpt_path=last if last.is_file() else None)
    return module.vavae


def random_shapes_vae(seed: int) -> StableDiffusionVAE:
    """Return a VAE of 60,000 parameters and latents 4×H/4×W/4, whose residual blocks begin as the identity."""
    torch.manual_seed(seed)
    vae = StableDiffusionVAE(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
    )
    with torch.no_grad():
        for name, weight in vae.named_parameters():
            if ".conv2." in name:
                weight.zero_()
        vae.quant_conv.weight[4:] = 0  # a narrow posterior: a decoder that sees noise alone learns to draw grey first
        vae.quant_conv.bias[4:] = -6
    return vae


def train_shapes(steps: int, batch_size: int, lr: float, seed: int) -> StableDiffusionVAE:
    """Return a VAE trained on shapes of 32 and, every fourth step, 64 pixels; its latents have unit variance."""
    vae = random_shapes_vae(seed)
    images = {}
    for size in (32, 64):
        kinds = ShapeImages(4096, 36, size, seed=SHAPES_SEED), CaptionedShapes(4096, size, SHAPES_SEED)
        images[size] = torch.cat([kind.in_memory() for kind in kinds])  # uint8 (8192, 3, size, size)
    optimizer = torch.optim.Adam(vae.parameters(), betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, steps, pct_start=0.05)
    for step in range(steps):
        size = 64 if step % 4 == 3 else 32
        count = batch_size * 32**2 // size**2
        draws = Draws(seed, step, torch.arange(count))
        x = to_unit(images[size][(draws.uniform("picture") * len(images[size])).long()])
        posterior = vae.encode(x).latent_dist
        made = vae.decode(posterior.mean + posterior.std * draws.normal("posterior", *posterior.mean.shape[1:])).sample
        error = F.mse_loss(made, x)
        loss = error + 1e-5 * 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 199:
            print(f"step {step + 1:,}: PSNR {10 * math.log10(4 / error.item()):.1f} dB", flush=True)
    with torch.no_grad():
        latents = vae.encode(to_unit(images[32][::16])).latent_dist.mean
    vae.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    return vae


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("model", choices=("vavae", "shapes"), help="which one")
    parser.add_argument("--output_dir", default="outputs/pretrained_small", help="folder for the weights")
    parser.add_argument("--people", type=int, default=80, help="simulated people, of vavae")
    parser.add_argument("--images", type=int, default=20, help="images of each, of vavae")
    parser.add_argument("--steps", type=int, help="optimiser steps; None: 3400 of vavae, 8000 of shapes")
    parser.add_argument("--batch_size", type=int, default=16, help="images per step")
    parser.add_argument("--lr", type=float, help="peak learning rate; None: 2e-3 of vavae, 4e-3 of shapes")
    parser.add_argument("--seed", type=int, default=0, help="of weights and augmentation")
    options = parser.parse_args()

    folder, size, seed = Path(options.output_dir), options.batch_size, options.seed
    if options.model == "vavae":
        walkers = simulate_walkers(options.people, options.images)
        model = train_vavae(walkers, options.steps or 3400, size, options.lr or 2e-3, seed, folder)
    else:
        model = train_shapes(options.steps or 8000, size, options.lr or 4e-3, seed)
    model.half().save_pretrained(folder / "weights")  # enough to start from, and half of the package's room
    name = "small" if options.model == "vavae" else "shapes"
    print(f"written: {folder}/weights; its two files belong into vavae_tools/autoencoders/pretrained_{name}/")


if __name__ == "__main__":
    run_command(main)
