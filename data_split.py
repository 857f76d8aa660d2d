"""Split image folders, one per person, into train/ and val/: `vavae-tools split`."""

from vavae_tools.runtime.errors import run_command
from vavae_tools.split import main

if __name__ == "__main__":
    run_command(main)
