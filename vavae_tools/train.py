"""Encode a split with a fine-tuned VA-VAE (once), and train a DiT on the latents."""

import argparse

from vavae_tools.errors import UserError, run_command
from vavae_tools.training.saving import add_saving_arguments, saving_of


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vavae_tools.train",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--data_dir", help="split written by data_split.py; without it the split in its usual place is taken")
    add("--vavae", default="outputs/vavae", help="VA-VAE folder that minimal_training_modification.py wrote")
    add("--latents_dir", default="outputs/latents", help="latents are kept here; stale ones are encoded again")
    add("--flips", action="store_true", help="also train on mirrored pictures (wrong for time–frequency pictures)")
    add("--size", choices=["S", "B", "L", "XL"], help="of the DiT; without it the numbers below")
    add("--hidden_size", type=int, default=192, help="features of a token")
    add("--depth", type=int, default=6, help="transformer blocks")
    add("--num_heads", type=int, default=3, help="attention heads")
    add("--patch_size", type=int, default=2, help="side of the square of latent pixels that is one token")
    add("--max_steps", type=int, default=6000, help="optimiser steps")
    add("--batch_size", type=int, default=32, help="latents per device and step")
    add("--lr", type=float, default=1e-3, help="AdamW's peak learning rate; 2e-4 for S and above")
    add("--ema_decay", type=float, default=0.999, help="of the averaged weights; 0.9999 for runs of 100,000 steps")
    add("--previews", type=int, default=8, help="grids of samples in all; 0 for none")
    add("--devices", type=int, help="GPUs; without it all there are")
    add("--strategy", default="auto", help="how several devices work together")
    add("--accelerator", choices=["gpu", "cpu", "auto"], default="auto", help="what to train on")
    add("--precision", choices=["16", "32", "bf16"], help="without it 16 on a T4, bf16 on newer cards, 32 on a CPU")
    add("--output_dir", default="outputs/dit", help="gets checkpoints/, lightning_logs/, samples/, pipeline/")
    add("--seed", type=int, default=0, help="the same seed, data and settings give the same weights")
    add("--resume", help="last, a .ckpt, .pth or checkpoint folder, or a run's folder: go on from there")
    add_saving_arguments(parser)
    options = parser.parse_args()
    if options.max_steps < 1:
        raise UserError(f"--max_steps {options.max_steps}: at least one step is needed")

    from vavae_tools.places import find_split
    from vavae_tools.training.runs import encode_split, say, train_dit

    encode_split(options.data_dir or find_split(), options.vavae, options.latents_dir, flips=options.flips)
    numbers = {name: getattr(options, name) for name in ("hidden_size", "depth", "num_heads")}
    denoiser = {"patch_size": options.patch_size, **({"size": options.size} if options.size else numbers)}
    pipeline = train_dit(
        options.latents_dir,
        options.vavae,
        options.output_dir,
        denoiser,
        options.max_steps,
        options.batch_size,
        options.lr,
        options.ema_decay,
        "half" if options.flips else "none",
        options.seed,
        options.resume,
        options.previews,
        devices={
            "devices": options.devices or "auto",
            "strategy": options.strategy,
            "accelerator": options.accelerator,
            "precision": options.precision,
        },
        saving=saving_of(vars(options)),
    )
    say(f"next: python -m vavae_tools.sample --checkpoint {pipeline} --num_samples 100 --output_dir outputs/samples")


if __name__ == "__main__":
    run_command(main)
