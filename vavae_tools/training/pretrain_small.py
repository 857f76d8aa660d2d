"""Train the small VA-VAE that comes with the package, on simulated walkers other than the demo's.

The walkers are shown in many colour maps, zooms, mirrorings and contrasts, so that the weights know
time–frequency pictures in general and fine-tuning on a CPU is fine-tuning. Takes about an hour on two cores.
"""

import argparse
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

COLORMAPS = ("jet", "jet", "viridis", "viridis", "turbo", "inferno", "magma", "plasma", "gray", "hot", "cividis")
PEOPLE_SEED = 1_000_003  # the demo's people are those of small seeds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output_dir", default="outputs/pretrained_small", help="folder for the weights")
    parser.add_argument("--people", type=int, default=120, help="simulated people")
    parser.add_argument("--pictures", type=int, default=20, help="pictures of each")
    parser.add_argument("--steps", type=int, default=12_000, help="optimiser steps")
    parser.add_argument("--batch_size", type=int, default=16, help="pictures per step")
    parser.add_argument("--lr", type=float, default=2e-3, help="peak learning rate of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="of weights and augmentation")
    parser.add_argument("--resume", action="store_true", help="go on from last.ckpt in output_dir")
    arguments = parser.parse_args()
    pretrain(**vars(arguments))


def simulate_walkers(people: int, pictures: int, size: int = 128):
    """Intensities before the colour map: uint8 (people · pictures, size, size)."""
    import numpy as np

    tasks = [(person, picture) for person in range(1, people + 1) for picture in range(pictures)]
    with ProcessPoolExecutor() as pool:
        return np.stack(list(pool.map(partial(_simulate, size=size), tasks, chunksize=32)))


def _simulate(task: tuple[int, int], size: int):
    import numpy as np

    from vavae_tools.data.gait import simulate_picture

    # in grey the colour is the intensity
    return np.ascontiguousarray(simulate_picture(PEOPLE_SEED, *task, size=size, colormap="gray")[..., 0])


def pretrain(
    output_dir: str, people: int, pictures: int, steps: int, batch_size: int, lr: float, seed: int, resume: bool
) -> None:
    import lightning as L
    import torch
    from torch.utils.data import DataLoader, Dataset

    from vavae_tools.autoencoders.vavae import vavae
    from vavae_tools.data.gait import colormap_table
    from vavae_tools.draws import Draws
    from vavae_tools.training.checkpoints import LastCheckpoint, WholeCheckpointIO
    from vavae_tools.training.vavae_module import VAVAEModule

    intensities = torch.from_numpy(simulate_walkers(people, pictures))
    tables = torch.stack([torch.from_numpy(colormap_table(name).copy()) for name in COLORMAPS])

    class AugmentedWalkers(Dataset):
        """Item i is always the same: a crop, turned, stretched in contrast, coloured."""

        def __len__(self) -> int:
            return steps * batch_size

        def __getitems__(self, indices: list[int]) -> dict[str, torch.Tensor]:
            index = torch.tensor(indices)
            u = Draws(seed, 0, index).uniform("augmentation", 8).tolist()
            items = [self.augment(int(i) % len(intensities), *numbers) for i, numbers in zip(indices, u, strict=True)]
            return {"pictures": torch.stack(items), "labels": torch.zeros_like(index), "index": index}

        def augment(self, i, zoom, top, left, turn, mirror, gain, offset, colour) -> torch.Tensor:
            side = int(64 + zoom * 64)  # between a true-size crop and the whole picture
            y, x = int(top * (128 - side + 1)), int(left * (128 - side + 1))
            crop = intensities[i, y : y + side, x : x + side].float()[None, None]
            crop = torch.nn.functional.interpolate(crop, (64, 64), mode="bilinear", antialias=True, align_corners=False)
            crop = crop[0, 0]
            crop = crop.T if turn < 0.3 else crop
            crop = crop.flip(1) if mirror < 0.5 else crop
            crop = ((crop - 128) * (0.7 + 0.9 * gain) + 128 + 120 * (offset - 0.6)).round().clamp(0, 255)
            table = tables[int(colour * len(tables))]
            return table[crop.long()].permute(2, 0, 1)

    torch.manual_seed(seed)
    module = VAVAEModule(vavae("small"), lr=lr, warmup_steps=200, seed=seed)
    folder = Path(output_dir)
    trainer = L.Trainer(
        **module.trainer_settings(),
        max_epochs=1,
        default_root_dir=folder,
        callbacks=[LastCheckpoint(folder, every_minutes=2)],
        plugins=[WholeCheckpointIO()],
    )
    loader = DataLoader(AugmentedWalkers(), batch_size, num_workers=0, collate_fn=lambda batch: batch)
    trainer.fit(module, loader, ckpt_path=folder / "last.ckpt" if resume else None)
    export(module.vavae, folder / "weights")


def export(model, folder: Path) -> None:
    """Save in half precision, which is enough to start fine-tuning from and keeps the package under 1 MB."""
    import copy

    import torch

    copy.deepcopy(model).to(torch.float16).save_pretrained(folder)
    print(f"written: {folder}; copy its two files to vavae_tools/autoencoders/pretrained_small/")


if __name__ == "__main__":
    main()
