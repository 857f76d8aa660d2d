"""Fine-tune the VA-VAE with a vector per person, a KL weight, and 1 to 8 GPUs."""

import argparse

from vavae_tools.runtime.errors import run_command
from vavae_tools.training.config import add_saving_arguments, saving_of


def size(text: str) -> int | tuple[int, int]:
    """256, or 128x256 for height and width."""
    sides = tuple(int(side) for side in text.lower().split("x"))
    if len(sides) > 2:
        raise ValueError(text)
    return sides[0] if len(sides) == 1 else sides


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data_dir", help="split written by data_split.py; without it the split in its usual place is taken")
    add(
        "--original_vavae",
        help="weights to start from: the published .pt or a training .ckpt, a diffusers folder, or small (in the "
        "package); without it fresh ones",
    )
    add("--size", choices=["small", "f16d32"], help="of fresh weights; without it small on a CPU, f16d32 on a GPU")
    add("--image_size", type=size, help="pixels, 256 or 128x256 (height x width); without it what the weights are for")
    add("--condition_dim", type=int, help="length of each person's vector, without it 32 or the file's; 0 for none")
    add("--condition_file", help="safetensors with a fixed vector per person (keys ID_1 …), in place of learned ones")
    recipes = ["light", "full", "stage1", "stage2", "stage3", "staged"]
    add(
        "--recipe", choices=recipes, default="light", help="losses and optimiser; light needs no weights from elsewhere"
    )
    add("--batch_size", type=int, default=16, help="pictures per device and step")
    add("--max_epochs", type=int, default=100, help="passes over the training side")

    losses = parser.add_argument_group("in place of the recipe's own numbers (a weight of 0 turns its part off)")
    number = losses.add_argument
    number("--lr", type=float, help="peak learning rate; light takes 1e-4 for f16d32 and 2e-3 for small, full 1e-4")
    number("--kl_weight", type=float, help="of the KL divergence against absolute errors, both summed (1e-6)")
    number("--l1_weight", type=float, help="of the absolute error")
    number("--gradient_weight", type=float, help="of the multi-scale gradients")
    number("--spectral_weight", type=float, help="of the short-time spectra")
    number("--perceptual_weight", type=float, help="of LPIPS; needs --lpips_weights")
    number(
        "--lpips_weights", nargs="+", help="local files: VGG16's, LPIPS's, or a VA-VAE training .ckpt that holds both"
    )
    number("--vf_weight", type=float, help="of the alignment; needs --foundation_model")
    number("--foundation_model", help="local folder of a DINOv2 as transformers saves it")
    number("--distance_margin", type=float, help="of the alignment's distances")
    number("--cosine_margin", type=float, help="of the alignment's cosines")
    number("--disc_weight", type=float, help="of the adversarial part")
    number("--disc_start", type=int, help="optimiser step at which the discriminator begins")
    number("--disc_width", type=int, help="channels of the discriminator's first layer (64)")
    number("--disc_lr", type=float, help="learning rate of the discriminator (1e-4)")
    number("--gradient_clip", type=float, help="largest global norm of the gradients; 0 does not clip")
    number("--condition_dropout", type=float, help="share of pictures trained without their vector (0.1)")

    memory = parser.add_argument_group("memory")
    memory.add_argument("--accumulate_grad_batches", type=int, help="batches gathered in one step (1)")
    switch = {"action": "store_true", "default": None}
    memory.add_argument("--gradient_checkpointing", help="compute activations twice, keep few of them", **switch)
    memory.add_argument("--freeze_encoder", help="train the decoder alone: the latents stay as they are", **switch)

    add("--devices", type=int, choices=[1, 2, 4, 8], help="GPUs on each machine; without it all there are")
    add("--num_nodes", type=int, default=1, help="machines")
    strategies = ["auto", "ddp", "ddp_find_unused_parameters_true", "fsdp", "deepspeed"]
    add("--strategy", choices=strategies, default="auto", help="how several devices work together")
    add("--accelerator", choices=["gpu", "cpu", "auto"], default="auto", help="what to train on")
    add("--precision", choices=["16", "32", "bf16"], help="without it 16 on a T4, bf16 on newer cards, 32 on a CPU")
    add("--deterministic", action="store_true", help="the same numbers each time on a GPU, too; slower")
    monitors = ["reconstruction", "psnr", "ssim", "right", "frechet"]
    add("--monitor", choices=monitors, default="reconstruction", help="what best-*.ckpt is chosen by")
    add("--output_dir", default="outputs", help="gets checkpoints/, lightning_logs/, reconstructions/, vavae/")
    add("--seed", type=int, default=0, help="the same seed, data and settings give the same weights")
    add("--resume", help="last, a .ckpt, .pth or checkpoint folder, or a run's folder: go on from there")
    add_saving_arguments(parser)
    options = vars(parser.parse_args())
    saving = saving_of(options)
    of_devices = ("devices", "num_nodes", "strategy", "accelerator", "precision", "deterministic")
    choices = {name: options.pop(name) for name in of_devices}
    choices["devices"] = choices["devices"] or "auto"

    from vavae_tools.paths import find_split
    from vavae_tools.recipes.vavae import fine_tune_vavae
    from vavae_tools.runtime.console import say

    data_dir = options.pop("data_dir") or find_split()
    vavae_dir = fine_tune_vavae(data_dir, **options, devices=choices, saving=saving)
    say(f"next: python -m vavae_tools.train --data_dir {data_dir} --vavae {vavae_dir}")


if __name__ == "__main__":
    run_command(main)
