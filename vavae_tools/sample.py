"""Make any number of pictures of chosen people, of prompts, or texts with token images; interrupted, it goes on."""

import argparse
import json
import math
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from vavae_tools.diffusion import SOLVERS
from vavae_tools.runtime.errors import UserError, run_command

if TYPE_CHECKING:
    from vavae_tools.runtime.ranks import Ranks


CFG_SCALE = 1.25
TEXT_CFG_SCALE = 7.5
GUIDE_SCALE = 1.42
"""RAE's for 256 pixels"""
_UNLESS_GIVEN = {  # of options whose help says itself what then happens
    **dict.fromkeys(("labels", "class_list", "solver", "timestep_shift", "cfg_scale", "guide", "guide_scale")),
    **dict.fromkeys(("batch_size", "num_samples", "precision", "prompt", "negative_prompt")),
    "overwrite": False,
}


def main() -> None:
    options = _parser().parse_args(namespace=argparse.Namespace(**_UNLESS_GIVEN))
    _check(options)
    interval = _interval(options.cfg_interval)
    names = _names(options.class_list)

    from vavae_tools.runtime.launch import call_on_ranks
    from vavae_tools.runtime.machine import device_of
    from vavae_tools.runtime.ranks import Ranks
    from vavae_tools.training.devices import trainer_settings

    if "RANK" in os.environ:  # one of several processes already
        count, on_gpu = 1, trainer_settings(options.accelerator, 1)["accelerator"] == "gpu"
    else:
        found = trainer_settings(options.accelerator, options.devices)
        count, on_gpu = found["devices"], found["accelerator"] == "gpu"
    if count > 1:
        call_on_ranks("vavae_tools.sample:main", {}, count)  # with the same command line
        return
    ranks = Ranks.from_environment()
    device = device_of(ranks.local_rank) if on_gpu else "cpu"

    from vavae_tools.pipelines.tokens import is_token_pipeline

    if ranks.share("kind", ranks.rank == 0 and is_token_pipeline(options.checkpoint)):
        _sample_texts(options, ranks, device)
        return
    if options.prompt:
        _sample_prompts(options, ranks, device)
        return

    from vavae_tools.pipelines.classes import load_guide, load_pipeline
    from vavae_tools.pipelines.portions import placed
    from vavae_tools.pipelines.writer import write_samples

    if options.num_samples is None:
        options.num_samples = 100
    if ranks.rank:
        ranks.share("plan")  # once the first has found nothing wrong: one process says what is
    pipe = load_pipeline(options.checkpoint, ema=options.weights == "ema")
    placed(pipe, device)
    if options.solver:
        pipe.swap_solver(options.solver)
    guide = load_guide(options.guide, pipe, ema=options.weights == "ema") if options.guide else None
    who = [item.strip() for item in options.labels.split(",")] if options.labels else sorted(pipe.people.values())
    who = pipe.labels_of(who)
    written = write_samples(
        pipe,
        [who[i % len(who)] for i in range(options.num_samples)],
        options.output_dir,
        options.seed,
        names,
        options.format,
        options.batch_size,
        options.overwrite,
        ranks,
        num_inference_steps=options.num_steps,
        guidance_scale=_scale(options),
        guidance_interval=interval,
        guidance_channels=options.guidance_channels,
        timestep_shift=options.timestep_shift,
        guide=guide,
        precision=options.precision,
    )
    if ranks.rank == 0:
        _summary(options, written)


def _sample_prompts(options: argparse.Namespace, ranks: "Ranks", device: str) -> None:
    from vavae_tools.pipelines.portions import placed
    from vavae_tools.pipelines.text import load_text_pipeline
    from vavae_tools.pipelines.writer import write_prompted

    pipe = load_text_pipeline(options.checkpoint, options.weights == "ema", scheduler=options.solver)
    pipe.set_progress_bar_config(disable=True)
    written = write_prompted(
        placed(pipe, device),
        options.prompt,
        options.output_dir,
        options.num_samples,
        options.seed,
        options.batch_size,
        options.overwrite,
        ranks,
        options.negative_prompt,
        num_inference_steps=options.num_steps,
        guidance_scale=TEXT_CFG_SCALE if options.cfg_scale is None else options.cfg_scale,
        precision=options.precision,
    )
    if ranks.rank == 0:
        many = f" of {len(set(options.prompt))} prompts" if len(options.prompt) > 1 else ""
        print(f"written: {len(written):,} pictures{many} ({written[0]} …), {written[0].with_name('grid.png')}")


def _sample_texts(options: argparse.Namespace, ranks: "Ranks", device: str) -> None:
    from vavae_tools.pipelines.portions import placed
    from vavae_tools.pipelines.tokens import load_token_pipeline
    from vavae_tools.pipelines.writer import write_texts

    of_pictures = ("labels", "class_list", "negative_prompt", "timestep_shift", "cfg_scale", "guide")
    usual = {"cfg_interval": "0,1", "guidance_channels": "all", "format": "png"}
    given = [f"--{name}" for name in (*of_pictures, *usual) if getattr(options, name) != usual.get(name)]
    if given and ranks.rank == 0:
        raise UserError(f"{options.checkpoint} makes texts, for which {', '.join(given)} has no meaning: leave it out")
    if ranks.rank:
        ranks.share("missing texts")  # once the first has found nothing wrong: one process says what is
    pipe = placed(load_token_pipeline(options.checkpoint, options.weights == "ema"), device)
    if options.solver:
        pipe.swap_solver(options.solver)
    pipe.set_progress_bar_config(disable=True)
    written = write_texts(
        pipe,
        options.output_dir,
        options.prompt or (),
        options.num_samples,
        options.seed,
        options.batch_size,
        options.overwrite,
        ranks,
        num_inference_steps=options.num_steps,
        precision=options.precision,
    )
    if ranks.rank == 0:
        lines = written.read_text(encoding="utf-8").split("\n")[:-1]  # a text may hold what splitlines() splits at
        for line in lines[:8]:
            print(f"  {' '.join(json.loads(line)['text'].split())[:160]}")
        print(f"written: {len(lines):,} texts ({written}), {written.with_name('grid.png')}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vavae_tools.sample",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    none = {"default": argparse.SUPPRESS}  # of which the help says nothing
    add = parser.add_argument
    add("--checkpoint", required=True, **none, help="pipeline folder, or a .ckpt of DiT training")
    add("--weights", choices=["ema", "live"], default="ema", help="of a .ckpt: the averaged or the live weights")
    add("--num_samples", type=int, **none, help="pictures or texts in all, spread evenly over labels or prompts "
        "(default: 100, of prompts one each)")  # fmt: skip
    add("--prompt", nargs="+", **none, help='of text-to-image: what the pictures shall show, "a small red bird", one '
        "or several; of token images: how texts begin, or questions")  # fmt: skip
    add("--negative_prompt", **none, help="what guidance leads away from; without it the empty prompt")
    add("--labels", **none, help='who: labels or names with commas, "0,1,2" or "ID_1,ID_2"; without it everybody')
    add("--class_list", **none, help="file with a folder name per line, one for each label that the model knows, in "
        "their order; without it the trained names")  # fmt: skip
    add("--num_steps", type=int, default=50, help="steps of the solver; Euler's calls the denoiser once in each")
    add("--solver", choices=list(SOLVERS), **none, help="one that fits what was trained; without it the pipeline's "
        "own: Euler's, of noise prediction DPM-Solver++, of texts steps with fresh noise")  # fmt: skip
    add("--timestep_shift", type=float, **none, help="LightningDiT's: below 1, steps are finer near the noise, 0 is no "
        "shift; without it training's own; RAE's shift s is 1/s here")  # fmt: skip
    add("--cfg_scale", type=float, **none, help="guidance scale: 1 is none, larger is more typical, less varied; not "
        f"with --guide (default: {CFG_SCALE}, of prompts {TEXT_CFG_SCALE})")  # fmt: skip
    add("--guide", **none, help="pipeline folder or .ckpt of a weaker model, which guides in place of --cfg_scale's "
        "null condition: autoguidance")  # fmt: skip
    add("--guide_scale", type=float, **none, help=f"its scale; 1 is none (default: {GUIDE_SCALE})")
    add("--cfg_interval", default="0,1", help="times between which either guidance acts; 0 is noise, 1 is data")
    add("--guidance_channels", choices=["all", "first3"], default="all", help="first3 is LightningDiT's way")
    add("--output_dir", default="outputs/samples", help="gets a folder for each person, or texts.jsonl, and "
        "samples.json")  # fmt: skip
    add(
        "--format", choices=["png", "npz"], default="png", help="picture files, or one .npz as ADM's evaluator reads it"
    )
    add("--overwrite", action="store_true", **none, help="replace pictures or texts of other settings in --output_dir; "
        "those of the same settings are kept in any case, and only what is missing is made")  # fmt: skip
    add("--batch_size", type=int, **none, help="pictures or texts made at once on each device; without it as many as "
        "fit the memory; halved where they do not fit")  # fmt: skip
    add("--precision", choices=["16", "32", "bf16"], **none, help="what matrix products compute in; without it that of "
        "what is there already, else fp16 on a T4, bf16 from A100 and L4 on, float32 on a CPU")  # fmt: skip
    add("--seed", type=int, default=0, help="the same seed gives the same pictures, whatever the devices")
    add("--accelerator", choices=["auto", "gpu", "cpu"], default="auto", help="what to run on")
    add("--devices", default="auto", help="how many, each with a process of its own; auto: all GPUs. torchrun, too")
    return parser


def _check(options: argparse.Namespace) -> None:
    if options.num_samples is not None and options.num_samples < 1:
        raise UserError(f"--num_samples {options.num_samples}: at least one picture is needed")
    if options.guide and options.cfg_scale is not None:
        raise UserError(
            f"--cfg_scale {options.cfg_scale:g} with --guide: a guide takes the null condition's place, so give its "
            "--guide_scale alone"
        )
    if options.guide_scale is not None and not options.guide:
        raise UserError(f"--guide_scale {options.guide_scale:g} without --guide: name the weaker model's checkpoint")
    if not math.isfinite(_scale(options)):
        raise UserError(f"The guidance scale {_scale(options)} is no number to guide by: 1 is none, 1.25 a little")


def _scale(options: argparse.Namespace) -> float:
    given, usual = (options.guide_scale, GUIDE_SCALE) if options.guide else (options.cfg_scale, CFG_SCALE)
    return usual if given is None else given


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
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except OSError as error:
        raise UserError(f"--class_list {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"--class_list {path} is no text in UTF-8: expected a folder name in each line") from None
    if len(set(names)) < len(names):
        raise UserError(f"--class_list {path} names somebody twice: every line is a folder of its own")
    for name in names:
        if name.startswith(".") or set(name) & set('/\\:*?"<>|\0'):
            raise UserError(f"--class_list {path}: {name!r} cannot be the name of a folder; write it without / and .")
    return names


def _summary(options: argparse.Namespace, written: list[Path]) -> None:
    if options.format == "npz":
        print(f"written: {options.num_samples:,} pictures ({written[0]})")
        print(f"next: python evaluator.py REFERENCE.npz {shlex.quote(str(written[0]))} (of ADM's evaluations)")
        return
    folders = sorted({path.parent.name for path in written})
    print(f"written: {len(written):,} pictures of {len(folders)} people ({options.output_dir}/{folders[0]} …)")
    print(f"next: python -m vavae_tools.evaluate --generated_dir {options.output_dir} --data_dir data_split")


if __name__ == "__main__":
    run_command(main)
