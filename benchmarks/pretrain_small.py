"""Train the small VA-VAE that comes with the package, on simulated walkers other than the demo's.

The walkers are shown in many colour maps, zooms, mirrorings and contrasts, so that the weights know time–frequency
pictures in general and fine-tuning on a CPU is fine-tuning. The shipped weights took 3,400 steps.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from vavae_tools.autoencoders.vavae import VAVAE, vavae
from vavae_tools.data.demo.gait import colormap_table, simulate_picture
from vavae_tools.data.loader import OrderedDataModule
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import run_command
from vavae_tools.training.autoencoder_module import VAVAEModule
from vavae_tools.training.callbacks.checkpointing import LastCheckpoint, WholeCheckpointIO
from vavae_tools.training.callbacks.progress import Progress
from vavae_tools.training.config import Saving
from vavae_tools.training.devices import quiet_lightning

COLORMAPS = ("jet", "jet", "viridis", "viridis", "turbo", "inferno", "magma", "plasma", "gray", "hot", "cividis")
PEOPLE_SEED = 1_000_003
"""Of the walkers; the demo's people are those of seed 0."""
SIMULATED, SHOWN = 128, 64
"""Pixels: walkers are simulated twice as large as they are shown, so that they can be zoomed into."""


class AugmentedWalkers(Dataset):
    """Item i is always the same picture: a crop, turned, stretched in contrast, coloured."""

    def __init__(self, intensities: Tensor, length: int, seed: int) -> None:
        self.intensities, self.length, self.seed = intensities, length, seed  # uint8 (N, 128, 128)
        self.tables = torch.stack([torch.tensor(colormap_table(name)) for name in COLORMAPS])  # uint8 (maps, 256, 3)

    def __len__(self) -> int:
        return self.length

    def __getitems__(self, indices: list[int]) -> dict[str, Tensor]:
        index = torch.tensor(indices)
        numbers = Draws(self.seed, 0, index).uniform("augmentation", 8).tolist()
        pictures = [self._augment(i % len(self.intensities), *u) for i, u in zip(indices, numbers, strict=True)]
        return {"pictures": torch.stack(pictures), "labels": torch.zeros_like(index), "index": index}

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
        side = int(SHOWN + zoom * (SIMULATED - SHOWN))  # between a true-size crop and the whole picture
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


def simulate_walkers(people: int, pictures: int) -> Tensor:
    """Intensities before the colour map: uint8 (people · pictures, 128, 128)."""
    tasks = [(person, picture) for person in range(1, people + 1) for picture in range(1, pictures + 1)]
    with ProcessPoolExecutor() as pool:
        return torch.from_numpy(np.stack(list(pool.map(_simulate, tasks, chunksize=32))))


def _simulate(task: tuple[int, int]) -> np.ndarray:
    # in grey the colour is the intensity
    return simulate_picture(PEOPLE_SEED, *task, size=SIMULATED, colormap="gray")[..., 0].copy()


def export(model: VAVAE, folder: Path) -> None:
    """Save in half precision, which is enough to start fine-tuning from and keeps the package under 1 MB."""
    half = VAVAE.from_config(model.config).half()
    half.load_state_dict(model.state_dict())
    half.save_pretrained(folder)
    print(f"written: {folder}/; its two files belong into vavae_tools/autoencoders/pretrained_small/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/pretrained_small", help="folder for the weights")
    parser.add_argument("--people", type=int, default=80, help="simulated people")
    parser.add_argument("--pictures", type=int, default=20, help="pictures of each")
    parser.add_argument("--steps", type=int, default=3400, help="optimiser steps")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="of weights and augmentation")
    parser.add_argument("--resume", action="store_true", help="go on from last.ckpt in output_dir")
    options = parser.parse_args()

    quiet_lightning()
    walkers = simulate_walkers(options.people, options.pictures)
    data = AugmentedWalkers(walkers, options.steps * options.batch_size, options.seed)
    torch.manual_seed(options.seed)
    module = VAVAEModule(vavae("small"), lr=options.lr, warmup_steps=200, seed=options.seed)
    folder = Path(options.output_dir)
    trainer = L.Trainer(
        **module.trainer_settings(),
        max_epochs=1,
        default_root_dir=folder,
        callbacks=[LastCheckpoint(folder / "checkpoints", Saving(save_every_minutes=2)), Progress()],
        plugins=[WholeCheckpointIO()],
        enable_progress_bar=False,
    )
    last = folder / "checkpoints" / "last.ckpt" if options.resume else None
    trainer.fit(module, WalkerDataModule(data, options.batch_size, options.seed), ckpt_path=last)
    export(module.vavae, folder / "weights")


if __name__ == "__main__":
    run_command(main)
