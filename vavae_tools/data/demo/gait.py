"""Write the built-in data: simulated micro-Doppler images of walking people, in folders ID_1, ID_2 …

A radar hears every part of a walker at its own speed. An image of speed (rows) over time (columns) therefore shows
the gait: a bright wavy line for the torso, a lobe for each step, arcs for the arms.
"""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from vavae_tools.data.demo import walking
from vavae_tools.data.demo.walking import Person, draw_person, generator
from vavae_tools.runtime.errors import UserError, command_parser, in_home, run_command

GRID = 256  # a smaller image is this one, averaged
DECIBELS = 42.0  # from the lowest colour to the highest
FINISHED = "gait.json"


def simulate_walk(person: Person, rng: np.random.Generator, size: int = 256) -> np.ndarray:
    """Return one walk of `person` as a micro-Doppler image before it is coloured: (size, size) uint8.

    Row 0 is the highest speed towards the radar, + 7 m/s, the last row the highest away from it, time runs to the
    right, and 255 is `DECIBELS` above 0. The walk is towards the radar or away, within 15° of the line of sight.
    """
    towards, aspect = rng.random() < 0.5, rng.uniform(-15, 15)
    ranges, strengths = walking.walk_before_radar(walking.walk_again(person, rng), rng, towards, aspect)
    power = walking.spectrogram(walking.received(walking.echo(ranges, strengths), rng), max(size, GRID))
    reference = np.quantile(power[:, ::8], 0.997)  # an eighth of the columns says as much
    intensity = 255 * (1 + 10 / DECIBELS * np.log10(np.maximum(power / reference, 1e-12)))
    image = np.clip(np.rint(intensity), 0, 255).astype(np.uint8)
    if size < GRID:
        image = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BOX))
    return image


def simulate_image(seed: int, person: int, image: int, size: int = 256, colormap: str = "jet") -> np.ndarray:
    """Return an image of a person of the people of `seed`, (size, size, 3) uint8: the same, whatever else is made."""
    pixels = simulate_walk(draw_person(seed, person), generator(seed, person, image), size)
    return colormap_table(colormap).take(pixels, axis=0)


@lru_cache(maxsize=8)
def colormap_table(name: str) -> np.ndarray:
    import matplotlib

    if name not in matplotlib.colormaps:
        raise UserError(f"No matplotlib colour map is called {name!r}. Try jet, viridis, turbo, magma or gray.")
    return matplotlib.colormaps[name](np.arange(256), bytes=True)[:, :3]


def write_gait_dataset(
    output_dir: str | Path,
    people: int = 6,
    images: int = 60,
    size: int = 256,
    seed: int = 0,
    colormap: str = "jet",
    workers: int | None = None,
    progress: bool = True,
) -> Path:
    """Write `images` of each of `people` walkers as ID_1/walk_001.jpg … and return the folder.

    The bytes of an image depend on `size` (pixels), `seed` and `colormap` alone; `workers` (processes; None: one per
    core) only set the pace. gait.json holds the settings and how each person walks. All of it comes at once when it is
    whole; a folder of these very settings is left as it is.
    """
    output_dir = in_home(output_dir)
    settings = {"people": people, "pictures": images, "size": size, "seed": seed, "colormap": colormap}
    lowest = {"people": 1, "images": 1, "size": 16, "seed": 0, "workers": 1}
    for name, value in {**settings, "images": images, "workers": workers}.items():
        if name in lowest and value is not None and value < lowest[name]:
            raise UserError(f"{name} is {value}: expected {lowest[name]} or more.")
    colormap_table(colormap)
    if (output_dir / FINISHED).is_file():
        found = json.loads((output_dir / FINISHED).read_text())["settings"]
        if found != settings:
            other = f"simulated images of other settings ({found}; asked for: {settings})"
            raise UserError(f"{output_dir} holds {other}. Choose another --output_dir, or delete that folder.")
        return output_dir
    there = output_dir.iterdir() if output_dir.is_dir() else ()
    if others := sorted(path.name for path in there if not path.name.startswith(".")):
        there = f"other files or folders ({', '.join(others[:3])})"
        raise UserError(f"{output_dir} already holds {there}: choose a new or an empty folder as --output_dir.")

    partial_dir, walkers = output_dir / ".partial", range(1, people + 1)
    shutil.rmtree(partial_dir, ignore_errors=True)  # of a run that was killed
    try:
        for person in walkers:
            (partial_dir / f"ID_{person}").mkdir(parents=True)
        tasks = [(person, image) for person in walkers for image in range(1, images + 1)]
        _in_processes(partial(_write_image, partial_dir, size, seed, colormap), tasks, workers, progress)
        drawn = {f"ID_{person}": asdict(draw_person(seed, person)) for person in walkers}
        (partial_dir / FINISHED).write_text(json.dumps({"settings": settings, "people": drawn}, indent=1) + "\n")
        for path in sorted(partial_dir.iterdir()):  # gait.json last
            path.rename(output_dir / path.name)
    except OSError as error:
        raise UserError(f"Cannot write into {output_dir} ({error.strerror}). Choose another --output_dir.") from None
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)
    return output_dir


def _in_processes(write: Callable, tasks: Sequence[tuple[int, int]], workers: int | None, progress: bool) -> None:
    """Do the tasks, in processes where there are several: threads are a third slower, as they wait for each other."""
    import scipy.fft
    import scipy.interpolate  # noqa: F401 (once here, instead of once in each process)

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(workers or cores or 1, len(tasks))
    bar = partial(tqdm, total=len(tasks), unit="image", disable=None if progress else True)
    if workers < 2 or multiprocessing.current_process().daemon:  # a daemon may have no children
        for task in bar(tasks):
            write(task)
        return
    # a fork needs no `if __name__ == "__main__"` in the caller's script, but only Linux forks safely
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, signal.signal, (signal.SIGINT, signal.SIG_IGN))  # Ctrl-C is for us
    try:
        for _ in bar(pool.map(write, tasks, chunksize=min(8, -(-len(tasks) // workers)))):
            pass
    except BrokenProcessPool:
        killed = f"One of {workers} worker processes was killed, perhaps for memory"
        raise UserError(f"{killed}. Run it again with fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _write_image(folder: Path, size: int, seed: int, colormap: str, task: tuple[int, int]) -> None:
    image = Image.fromarray(simulate_image(seed, *task, size, colormap))
    image.save(folder / "ID_{}/walk_{:03d}.jpg".format(*task), "JPEG", quality=92, subsampling=0)


def main() -> None:
    parser = command_parser("python -m vavae_tools.data.demo.gait", __doc__)
    parser.add_argument("--output_dir", type=Path, required=True, help="a new or an empty folder")
    parser.add_argument("--people", type=int, default=6, help="walkers, each in a folder of their own")
    parser.add_argument("--images", "--pictures", type=int, default=60, help="images per person")
    parser.add_argument("--size", type=int, default=256, help="pixels across and down, 16 or more")
    parser.add_argument("--seed", type=int, default=0, help="with another number, other people walk")
    parser.add_argument("--colormap", default="jet", help="a matplotlib colour map: jet, viridis, turbo, gray …")
    parser.add_argument("--workers", type=int, help="processes; without it one per core")
    options = vars(parser.parse_args())
    output_dir, count = options["output_dir"], options["people"] * options["images"]
    there, start = (output_dir / FINISHED).is_file(), time.perf_counter()
    write_gait_dataset(**options, progress=sys.stderr.isatty())
    when = "were there already" if there else f"in {time.perf_counter() - start:.1f} s"
    what = f"{count:,} images of {options['people']:,} simulated walkers, {options['size']} × {options['size']} pixels"
    print(f"{what}, {when} ({output_dir}/ID_1/walk_001.jpg …)")
    print(f"Settings, and how each person walks: {output_dir / FINISHED}")
    print(f"Next: python data_split.py --input_dir {output_dir} --output_dir {output_dir}_split")


if __name__ == "__main__":
    run_command(main)
