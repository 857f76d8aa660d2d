"""Time `split_folders` against the package split-folders, which copies blindly, on the same images in one run.

    pip install split-folders
    python benchmarks/split_speed.py

Everything is timed in alternation, because other work on the machine comes and goes; the ratios are of the medians.
The images' folder decides which disk is measured: --directory. Files are removed at the end only: on ext4, making
files right after removing many is several times slower, and would hit whichever is timed next.
"""

import argparse
import functools
import io
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a clone, installed or not

import splitfolders.split

from vavae_tools.data.split import split_folders

splitfolders.split.use_tqdm = False  # neither side draws a bar

WAYS = {
    "split-folders, copies": None,
    "a  contents compared, copies": {"check": "contents"},
    "b  decoded, copies": {"check": "decode"},
    "c  contents compared, hard links": {"check": "contents", "link": "hard"},
    "c  contents compared, symbolic links": {"check": "contents", "link": "symbolic"},
    "   decoded, hard links": {"check": "decode", "link": "hard"},
}


def make_images(root: Path, count: int, size: int, persons: int = 31) -> int:
    """Smooth noise as JPEG, each file different; returns the bytes written."""
    total = 0
    for i in range(count):
        folder = root / f"ID_{i % persons + 1}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.frombytes("RGB", (16, 16), random.Random(i).randbytes(768))
        file = io.BytesIO()
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        total += (folder / f"p{i}.jpg").write_bytes(file.getvalue())
    return total


def measure(run: functools.partial) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--size", type=int, default=128, help="pixels (128)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, help="threads of split_folders (its own choice)")
    parser.add_argument("--directory", help="where to work (the system's temporary folder)")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        source = Path(folder, "pictures")
        total = make_images(source, args.images, args.size)
        print(f"{args.images:,} JPEGs of {args.size} px, {total / 1e6:.0f} MB ({folder}), {args.rounds} rounds")
        seconds = {name: [] for name in WAYS}
        for place in range(args.rounds):
            for name, options in WAYS.items():
                target = Path(folder, f"{place} {name}")
                if options is None:
                    run = functools.partial(splitfolders.ratio, source, output=target, seed=0, ratio=(0.8, 0.2))
                else:
                    options = {**options, "workers": args.workers, "progress": False}
                    run = functools.partial(split_folders, source, target, **options)
                seconds[name].append(measure(run))
        base = statistics.median(seconds["split-folders, copies"])
        print(f"{'':40}{'seconds':>9}{'× split-folders':>17}   of {args.rounds} rounds")
        for name, times in seconds.items():
            median = statistics.median(times)
            print(f"{name:40}{median:9.2f}{median / base:17.2f}   {', '.join(f'{t:.2f}' for t in times)}")


if __name__ == "__main__":
    main()
