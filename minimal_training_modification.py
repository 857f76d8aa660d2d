"""Fine-tune the VA-VAE with a vector per person, a KL weight, and 1 to 8 GPUs."""

import argparse

from vavae_tools.errors import run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data_dir", help="split written by data_split.py; without it the split in its usual place is taken")
    add(
        "--original_vavae",
        help="weights to start from: a diffusers folder, a .ckpt, or small (in the package); without it fresh ones",
    )
    add("--size", choices=["small", "f16d32"], help="of fresh weights; without it small on a CPU, f16d32 on a GPU")
    add("--image_size", type=int, help="pixels; without it the size the weights were made for")
    add("--condition_dim", type=int, default=32, help="length of each person's vector; 0 for none")
    add("--condition_file", help="safetensors with a fixed vector per person (keys ID_1 …), in place of learned ones")
    add("--kl_weight", type=float, default=1e-6, help="of the KL divergence against absolute errors, both summed")
    add("--gradient_weight", type=float, default=0.5, help="of the multi-scale gradient loss; 0 turns it off")
    add("--spectral_weight", type=float, default=1.0, help="of the short-time spectral loss; 0 turns it off")
    add("--batch_size", type=int, default=16, help="pictures per device and step")
    add("--max_epochs", type=int, default=100, help="passes over the training side")
    add("--lr", type=float, help="AdamW's peak learning rate; without it 1e-4 for f16d32, 2e-3 for small")
    add("--devices", type=int, choices=[1, 2, 4, 8], help="GPUs on each machine; without it all there are")
    add("--num_nodes", type=int, default=1, help="machines")
    strategies = ["auto", "ddp", "ddp_find_unused_parameters_true", "deepspeed"]
    add("--strategy", choices=strategies, default="auto", help="how several devices work together")
    add("--accelerator", choices=["gpu", "cpu", "auto"], default="auto", help="what to train on")
    add("--precision", choices=["16", "32", "bf16"], help="without it 16 on a T4, bf16 on newer cards, 32 on a CPU")
    add("--output_dir", default="outputs", help="gets checkpoints/, lightning_logs/, reconstructions/, vavae/")
    add("--seed", type=int, default=0, help="the same seed, data and settings give the same weights")
    add("--resume", help="last, or a .ckpt: go on from there")
    options = vars(parser.parse_args())
    choices = {name: options.pop(name) for name in ("devices", "num_nodes", "strategy", "accelerator", "precision")}
    choices["devices"] = choices["devices"] or "auto"

    from vavae_tools.places import find_split
    from vavae_tools.training.runs import fine_tune_vavae, say

    data_dir = options.pop("data_dir") or find_split()
    vavae_dir = fine_tune_vavae(data_dir, **options, devices=choices)
    say(f"next: python -m vavae_tools.train --data_dir {data_dir} --vavae {vavae_dir}")


if __name__ == "__main__":
    run_command(main)
