"""Fine-tune the VA-VAE with a vector per person, a KL weight, and 1 to 8 GPUs: `experiment=vavae` by its flags."""

import sys

from vavae_tools.runtime.errors import run_command
from vavae_tools.train import as_experiment


def main() -> None:
    as_experiment("vavae", sys.argv[1:])


if __name__ == "__main__":
    run_command(main)
