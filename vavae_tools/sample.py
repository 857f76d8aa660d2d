"""Make pictures of chosen people, in a folder for each."""

import argparse

from vavae_tools.errors import UserError, run_command


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vavae_tools.sample",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--checkpoint", required=True, default=argparse.SUPPRESS, help="pipeline folder, or a .ckpt of DiT training")
    add("--num_samples", type=int, default=100, help="pictures in all, spread evenly over the labels")
    add("--labels", help='who: labels or names with commas, "0,1,2" or "ID_1,ID_2"; without it everybody')
    add("--cfg_scale", type=float, default=1.25, help="guidance scale: 1 is none, larger is more typical, less varied")
    add("--cfg_interval", default="0,1", help="times between which guidance acts; 0 is noise, 1 is data")
    add("--num_steps", type=int, default=50, help="calls of the denoiser for each picture")
    add("--class_list", help="file with a folder name per line, in the labels' order; without it the trained names")
    add("--output_dir", default="outputs/samples", help="gets a folder for each person")
    add("--batch_size", type=int, default=64, help="pictures made at once")
    add("--seed", type=int, default=0, help="the same seed gives the same pictures, whatever the batch size")
    add("--weights", choices=["ema", "live"], default="ema", help="of a .ckpt: the averaged or the live weights")
    options = parser.parse_args()
    if options.num_samples < 1:
        raise UserError(f"--num_samples {options.num_samples}: at least one picture is needed")
    interval = _interval(options.cfg_interval)
    names = _names(options.class_list)

    from vavae_tools.diffusion.pipeline import load_pipeline, write_samples
    from vavae_tools.machine import find_device

    pipe = load_pipeline(options.checkpoint, ema=options.weights == "ema")
    pipe.to(find_device())
    who = [item.strip() for item in options.labels.split(",")] if options.labels else sorted(pipe.people.values())
    who = pipe.labels_of(who)
    written = write_samples(
        pipe,
        [who[i % len(who)] for i in range(options.num_samples)],
        options.output_dir,
        options.seed,
        names,
        num_inference_steps=options.num_steps,
        guidance_scale=options.cfg_scale,
        guidance_interval=interval,
        batch_size=options.batch_size,
    )
    folders = sorted({path.parent.name for path in written})
    print(f"written: {len(written):,} pictures of {len(folders)} people ({options.output_dir}/{folders[0]} …)")
    print(f"next: python -m vavae_tools.evaluate --generated_dir {options.output_dir} --data_dir data_split")


def _interval(text: str) -> tuple[float, float]:
    try:
        start, end = (float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--cfg_interval {text!r}: expected two times such as 0.1,1") from None
    if not 0 <= start <= end <= 1:
        raise UserError(f"--cfg_interval {text!r}: expected 0 ≤ start ≤ end ≤ 1")
    return start, end


def _names(path: str | None) -> list[str] | None:
    if path is None:
        return None
    try:
        with open(path, encoding="utf-8") as file:  # noqa: PTH123
            names = [line.strip() for line in file if line.strip()]
    except OSError as error:
        raise UserError(f"--class_list {path}: {error.strerror}") from None
    if len(set(names)) < len(names):
        raise UserError(f"--class_list {path} names somebody twice: every line is a folder of its own")
    return names


if __name__ == "__main__":
    run_command(main)
