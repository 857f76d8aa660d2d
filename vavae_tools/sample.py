"""Make any number of images of chosen people or of prompts, or texts with token images; interrupted, it resumes."""

import argparse
import json
import math
import os
import shlex
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vavae_tools.diffusion import FITTED_STEPS, SOLVERS, USUAL_STEPS
from vavae_tools.runtime.errors import UserError, command_parser, run_command

if TYPE_CHECKING:
    from vavae_tools.runtime.ranks import Ranks

CFG_SCALE, TEXT_CFG_SCALE = 1.25, 7.5
GUIDE_SCALE = 1.42  # RAE's for 256 pixels
CLASS_FLAGS = (
    *("labels", "class_list", "timestep_shift", "guide", "cfg_interval", "guidance_channels", "format"),
    *("image", "strength", "mask", "interpolate", "fit_schedule"),
)
UNUSED_FLAGS = {
    "LatentDiTPipeline": ("prompt", "negative_prompt"),
    "TextToImagePipeline": CLASS_FLAGS,
    "TokenImagePipeline": (*CLASS_FLAGS, "negative_prompt", "cfg_scale"),
}
"""Flags that have no meaning for a pipeline."""


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    _check(options)
    if options.as_people:
        print(_as_people(options))
        return

    from vavae_tools.runtime.launch import call_on_ranks
    from vavae_tools.runtime.machine import device_of
    from vavae_tools.runtime.ranks import Ranks
    from vavae_tools.training.devices import trainer_settings

    inside = "RANK" in os.environ  # one of several processes already
    found = trainer_settings(options.accelerator, 1 if inside else options.devices)
    if found["devices"] > 1 and not inside:
        call_on_ranks("vavae_tools.sample:main", {}, found["devices"])  # with the same command line
        return
    ranks = Ranks.from_environment()
    device = device_of(ranks.local_rank) if found["accelerator"] == "gpu" else "cpu"

    import vavae_tools
    from vavae_tools.pipelines import base
    from vavae_tools.pipelines.batches import move_to_device

    kind = ranks.share("kind", None if ranks.rank else base.kind_of(options.checkpoint))
    makes, asked, load = base.KINDS.get(kind, ("", "", "load_pipeline"))
    unused = [name for name in UNUSED_FLAGS.get(kind, ()) if getattr(options, name) != parser.get_default(name)]
    if ranks.rank:
        ranks.share(base.PLAN)  # once the first has found nothing wrong: one process says what is
    elif unused:
        found = f"{options.checkpoint} makes {makes}, for which --{', --'.join(unused)} has no meaning"
        raise UserError(f"{found}: leave it out ({asked})")
    elif options.run and base.is_folder_of_pipeline(Path(options.checkpoint)):
        raise UserError(f"{options.checkpoint} is a whole pipeline, for which --run has no meaning: leave it out")
    elif kind == "TextToImagePipeline" and not options.prompt:
        raise UserError(f"{options.checkpoint} makes {makes}: {asked}")
    load = getattr(vavae_tools, load)
    pipe = move_to_device(load(options.checkpoint, options.weights == "ema", options.run), device)
    if options.solver:
        pipe.swap_solver(options.solver)
    if options.fit_schedule and not ranks.rank:  # the others load the pipeline only after that
        _fit(pipe, options)
    written = _write(pipe, options, ranks)
    if ranks.rank == 0:
        print(_summary(kind, options, written))


def _as_people(options: argparse.Namespace) -> str:
    from vavae_tools.pipelines.people import write_as_people

    written = write_as_people(options.checkpoint, options.as_people, options.output_dir, seed=options.seed)
    folders = sorted({path.parent.name for path in written})
    return _written(written, folders, options.output_dir, options.as_people, " --gain")


def _write(pipe: Any, options: argparse.Namespace, ranks: "Ranks") -> list[Path]:
    from vavae_tools.pipelines import classes, writer

    names_of = ("output_dir", "seed", "batch_size", "overwrite", "precision")
    settings: dict[str, Any] = {name: getattr(options, name) for name in names_of}
    usual = getattr(pipe, "usual_steps", USUAL_STEPS)
    settings |= {"num_inference_steps": usual if options.num_steps is None else options.num_steps, "ranks": ranks}
    if pipe.makes == "text":
        return [writer.write_texts(pipe, prompts=options.prompt or (), num_samples=options.num_samples, **settings)]
    by = options.negative_prompt if options.prompt else options.guide
    if not pipe.is_guided(by):
        without = f"{options.checkpoint} was trained without a null condition (condition_dropout=0)"
        if options.cfg_scale not in (None, 1):
            instead = "leave --cfg_scale out, or " + ("add --negative_prompt" if options.prompt else "name a --guide")
            raise UserError(f"{without}, so nothing guides: {instead}")
        if ranks.rank == 0:
            print(f"{without}: images are made without guidance")
    if options.prompt:
        settings["guidance_scale"] = TEXT_CFG_SCALE if options.cfg_scale is None else options.cfg_scale
        settings |= {"negative_prompt": options.negative_prompt, "num_samples": options.num_samples}
        return writer.write_prompt_samples(pipe, options.prompt, **settings)
    labels = _labels(pipe, options)
    settings |= {"image": options.image, "strength": options.strength, "mask_image": options.mask}
    settings["interpolate"] = options.interpolate
    settings |= {name: getattr(options, name) for name in ("format", "guidance_channels", "timestep_shift")}
    guide = classes.load_guide(options.guide, pipe, options.weights == "ema") if options.guide else None
    settings |= {"guidance_scale": _scale(options), "guidance_interval": options.cfg_interval or (0.0, 1.0)}
    return writer.write_samples(pipe, labels, names=options.class_list, guide=guide, **settings)


def _fit(pipe: Any, options: argparse.Namespace) -> None:
    """Fit the pipeline's schedule, and keep it in its folder."""
    from vavae_tools.pipelines import classes
    from vavae_tools.pipelines.schedule import fit_schedule, keep_schedule

    guide = classes.load_guide(options.guide, pipe, options.weights == "ema") if options.guide else None
    guidance = {"guidance_interval": options.cfg_interval or (0.0, 1.0), "guidance_channels": options.guidance_channels}
    errors = fit_schedule(pipe, guidance_scale=_scale(options), guide=guide, **guidance)
    keep_schedule(pipe, options.checkpoint)
    found = ", ".join(f"{100 * error:.1f} % in {steps}" for steps, error in errors.items())
    print(f"fitted steps, kept in {options.checkpoint}: latents differ from those of many steps by {found}")


def _labels(pipe: Any, options: argparse.Namespace) -> list[int]:
    """Return whose images are made, one after the other; of given images those of the people whose they are."""
    who, given = pipe.labels_of(item.strip() for item in options.labels.split(",")) if options.labels else [], None
    if options.image or options.interpolate:
        from vavae_tools.pipelines.given import GivenImages

        given = GivenImages(pipe, *(options.interpolate or [options.image]))
    who = who or sorted(set(given.owners if given else ()) - {-1}) or sorted(pipe.people.values())
    usual = 100
    if given:
        many = {label: 8 if options.interpolate else len(given.places(label)) for label in who}
        if options.num_samples is None and len(set(many.values())) > 1:
            return [label for label in who for _ in range(many[label])]
        usual = sum(many.values())
    return [who[i % len(who)] for i in range(options.num_samples or usual)]


def _summary(kind: str, options: argparse.Namespace, written: list[Path]) -> str:
    grid = written[0].with_name("grid.png")
    if kind == "TokenImagePipeline":
        lines = written[0].read_text(encoding="utf-8").split("\n")[:-1]  # a text may hold what splitlines() splits at
        shown = [f"  {' '.join(json.loads(line)['text'].split())[:160]}" for line in lines[:8]]
        return "\n".join([*shown, f"written: {len(lines):,} texts ({written[0]}), {grid}"])
    if kind == "TextToImagePipeline":
        many = f" of {len(set(options.prompt))} prompts" if len(options.prompt) > 1 else ""
        return f"written: {len(written):,} images{many} ({written[0]} …), {grid}"
    if options.format == "npz":
        following = f"python evaluator.py REFERENCE.npz {shlex.quote(str(written[0]))} (of ADM's evaluations)"
        many = int(written[0].stem.removeprefix("samples_").partition("x")[0])
        return f"written: {many:,} images ({written[0]})\nnext: {following}"
    folders, out = sorted({path.parent.name for path in written}), options.output_dir
    return _written(written, folders, out, _data_dir(options))


def _written(written: list[Path], folders: list[str], out: str, data_dir: str, more: str = "") -> str:
    following = f"--generated_dir {shlex.quote(out)} --data_dir {shlex.quote(data_dir)}{more}"
    said = f"written: {len(written):,} images of {len(folders)} people ({out}/{folders[0]} …)"
    return f"{said}\nnext: python -m vavae_tools.evaluate {following}"


def _data_dir(options: argparse.Namespace) -> str:
    """Return the split that the run beside a checkpoint was trained on, and elsewhere the usual one's name."""
    import yaml

    given = Path(options.run or options.checkpoint).absolute()
    for folder in (given, *given.parents[:2]):
        if (file := folder / ".hydra" / "config.yaml").is_file():
            kept = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
            return str((kept.get("data") or {}).get("data_dir") or "data_split")
    return "data_split"


# fmt: off
def _parser() -> argparse.ArgumentParser:
    parser = command_parser("python -m vavae_tools.sample", __doc__)
    add = parser.add_argument
    add("--checkpoint", required=True, help="pipeline folder, or a .ckpt of DiT training")
    add("--as_people", metavar="DATA_DIR", help="write these training images as every other person: --checkpoint is "
        "a VA-VAE whose vectors carry the person (finetune --recipe vector), and no DiT is needed")
    add("--weights", choices=["ema", "live"], default="ema", help="of a .ckpt: the averaged or the live weights")
    add("--run", help="the run's folder of a .ckpt that was copied elsewhere: what it needs is taken from there")
    add("--num_samples", type=int, help="in all, spread over labels or prompts (default: 100, of prompts and of each "
        "person's --image one each, with --interpolate 8 of each person)")
    add("--prompt", nargs="+", help='of text-to-image: what the images shall show, "a small red bird", one or several; '
        "of token images: how texts begin, or questions")
    add("--negative_prompt", help="what guidance leads away from; without it the empty prompt")
    add("--labels", help='who: labels or names with commas, "0,1,2" or "ID_1,ID_2"; without it everybody')
    add("--class_list", type=_names, help="file of folder names in place of the trained ones, by label, a line each")
    add("--image", help="vary it: an image, or a folder of some, where a person's own are in one of that name")
    add("--strength", type=float, help="how far from --image: near 0 it stays, 1 is noise alone (default: 0.6, with "
        "--mask 1, with --interpolate 0.8)")
    add("--mask", help="image file, white where something new is made; elsewhere --image stays")
    add("--interpolate", nargs=2, metavar=("A", "B"), help="make images between two, which are the first and the last")
    add("--num_steps", type=int, help="steps of the solver; Euler's calls the denoiser once in each (default: "
        f"{USUAL_STEPS}, of a pipeline with a fitted schedule {FITTED_STEPS})")
    add("--fit_schedule", action="store_true", help="first fit the times of 5, 8, 10 and 20 steps to the model, with "
        "this guidance; they are kept in the pipeline's folder, and taken wherever so many steps are made")
    add("--solver", choices=list(SOLVERS), help="one that fits what was trained; without it the pipeline's own: "
        "Euler's, of noise prediction DPM-Solver++, of texts steps with fresh noise")
    add("--timestep_shift", type=float, help="LightningDiT's: below 1, steps are finer near the noise, 0 is no shift; "
        "without it training's own; RAE's shift s is 1/s here")
    add("--cfg_scale", type=float, help="guidance scale: 1 is none, larger is more typical, less varied; not with "
        f"--guide (default: {CFG_SCALE}, of prompts {TEXT_CFG_SCALE})")
    add("--guide", help="folder or .ckpt of a weaker model that guides in the null condition's place: autoguidance")
    add("--guide_scale", type=float, help=f"its scale; 1 is none (default: {GUIDE_SCALE})")
    add("--cfg_interval", type=_interval, help="times between which either guidance acts; 0 is noise, 1 is data "
        "(default: 0,1)")
    add("--guidance_channels", choices=["all", "first3"], default="all", help="first3 is LightningDiT's way")
    add("--output_dir", default="outputs/samples", help="gets a folder per person, or texts.jsonl, and samples.json")
    add("--format", choices=["png", "npz"], default="png", help="image files, or one .npz as ADM's evaluator reads it")
    add("--overwrite", action="store_true", help="replace images or texts of other settings in --output_dir; those of "
        "the same settings are kept in any case, and only what is missing is made")
    add("--batch_size", type=int, help="made at once on each device; without it as many as fit; halved if they do not")
    add("--precision", choices=["16", "32", "bf16"], help="what matrix products compute in; without it that of what is "
        "there already, else fp16 on a T4, bf16 from A100 and L4 on, float32 on a CPU")
    add("--seed", type=int, default=0, help="the same seed gives the same images, whatever the devices")
    add("--accelerator", choices=["auto", "gpu", "cpu"], default="auto", help="what to run on")
    add("--devices", default="auto", help="how many, each with a process of its own; auto: all GPUs. torchrun, too")
    return parser
# fmt: on


def _check(options: argparse.Namespace) -> None:
    if options.num_samples is not None and options.num_samples < 1:
        raise UserError(f"--num_samples {options.num_samples}: at least one image is needed")
    if options.num_steps is not None and options.num_steps < 1:
        raise UserError(f"--num_steps {options.num_steps}: at least one step is needed, such as {FITTED_STEPS}")
    if options.fit_schedule and (options.solver or "adams") != "adams":
        raise UserError(f"--fit_schedule with --solver {options.solver}: its solver is adams, so leave that out")
    without = "mask" if options.mask else "strength" if options.strength is not None and not options.interpolate else ""
    if without and not options.image:
        raise UserError(f"--{without} without --image: name the image or the folder that is varied")
    if options.interpolate and (options.image or options.guide or options.cfg_scale not in (None, 1)):
        other = "image" if options.image else "guide" if options.guide else "cfg_scale"
        raise UserError(f"--interpolate with --{other}: it goes between two images without guidance, so leave that out")
    if options.guide and options.cfg_scale is not None:
        instead = "a guide takes the null condition's place, so give its --guide_scale alone"
        raise UserError(f"--cfg_scale {options.cfg_scale:g} with --guide: {instead}")
    if options.guide_scale is not None and not options.guide:
        raise UserError(f"--guide_scale {options.guide_scale:g} without --guide: name the weaker model's checkpoint")
    if not math.isfinite(_scale(options)):
        raise UserError(f"The guidance scale {_scale(options)} is no number to guide by: 1 is none, 1.25 a little")


def _scale(options: argparse.Namespace) -> float:
    given, usual = (options.guide_scale, GUIDE_SCALE) if options.guide else (options.cfg_scale, CFG_SCALE)
    return usual if given is None else given


def _interval(text: str) -> tuple[float, float]:
    with suppress(ValueError):
        start, end = map(float, text.split(","))
        if 0 <= start <= end <= 1:
            return start, end
    raise UserError(f"--cfg_interval {text!r}: expected two times such as 0.1,1, with 0 ≤ start ≤ end ≤ 1")


def _names(path: str) -> list[str]:
    try:
        names = [line.strip() for line in Path(path).read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--class_list {path} is no text in UTF-8 with a folder name in each line: {error}") from None
    for name in names:
        if names.count(name) > 1 or name.startswith(".") or set(name) & set('/\\:*?"<>|\0'):
            raise UserError(f"--class_list {path}: {name!r} cannot be the name of a folder of its own: write another")
    return names


if __name__ == "__main__":
    run_command(main)
