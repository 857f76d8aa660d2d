"""Fine-tune the VA-VAE with a vector per person and a KL weight, on 1 to 8 GPUs: `vavae-tools finetune`."""

from vavae_tools.runtime.errors import run_command
from vavae_tools.train import fine_tune as main

if __name__ == "__main__":
    run_command(main)
