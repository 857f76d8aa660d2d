"""How fast the built-in data is written: whole `write_gait_dataset` runs, as a user would start them.

Beside it, the same number of noise JPEGs of the same size by the same number of processes: what the files alone cost.
On a shared machine look at the ratio rather than at the rate.
Run it in the repository's folder: python -m benchmarks.gait_speed
"""

import argparse
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from vavae_tools.data.demo.gait import write_gait_dataset


def write_noise(folder: str, size: int, number: int) -> None:
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(Path(folder) / f"{number}.jpg", quality=92, subsampling=0)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gait_speed",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=60, help="per person, of 6 people")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    options = parser.parse_args()
    count = 6 * options.images

    print(f"{count:,} images by {options.workers} processes; the machine's load was {os.getloadavg()[0]:.1f}")
    for size in (256, 64):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            write_gait_dataset(f"{folder}/gait", 6, options.images, size, workers=options.workers, progress=False)
            gait = time.perf_counter() - start

            start = time.perf_counter()
            with ProcessPoolExecutor(options.workers) as pool:
                list(pool.map(partial(write_noise, folder, size), range(count), chunksize=8))
            noise = time.perf_counter() - start
        print(
            f"{size:>3} × {size:<3} {count / gait:7.1f} images/s   noise JPEGs {count / noise:7.1f}/s   "
            f"ratio of times {gait / noise:.1f}"
        )


if __name__ == "__main__":
    main()
