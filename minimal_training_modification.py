"""Fine-tune the VA-VAE with a vector per person and a KL weight, on 1 to 8 GPUs: `experiment=vavae`, in ./outputs."""

import sys

from vavae_tools.runtime.errors import run_command
from vavae_tools.train import train


def main() -> None:
    train("experiment=vavae", *sys.argv[1:], output_dir="outputs")


if __name__ == "__main__":
    run_command(main)
