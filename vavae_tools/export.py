"""Give a model away: a VA-VAE as a folder for diffusers or a file for LightningDiT, a pipeline on the hub."""

from pathlib import Path
from typing import TYPE_CHECKING

from vavae_tools.runtime.errors import UserError, command_parser, contents, in_home, one_line, run_command

if TYPE_CHECKING:
    from vavae_tools.autoencoders.vavae import VAVAE


def main() -> None:
    parser = command_parser("python -m vavae_tools.export", __doc__)
    add = parser.add_argument
    formats = "reference: a torch file under the names of LightningDiT; diffusers: a folder of AutoencoderKL"
    add("--vavae", help="folder of a VA-VAE, a .ckpt of its training, or published weights")
    add("--format", choices=["reference", "diffusers"], help=formats)
    add("--output", help="file (reference) or folder (diffusers) to write")
    add("--pipeline", help="folder of a pipeline, in place of --vavae")
    hub = "private repository that it is uploaded to, with the token of HF_TOKEN or `hf auth login`"
    add("--push_to_hub", metavar="OWNER/NAME", help=hub)
    add("--license", help="of its card, by the hub's name such as mit: mind that of the weights it was derived from")
    add("--evaluation", help="evaluation.json of its samples, for the card")
    options = vars(parser.parse_args())
    of_vavae = {name: options.pop(name) for name in ("vavae", "format", "output")}
    if options["pipeline"] and options["push_to_hub"] and not any(of_vavae.values()):
        push_pipeline(**options)
    elif all(of_vavae.values()) and not any(options.values()):
        export_vavae(**of_vavae)
    else:
        raise UserError("Name --vavae, --format and --output, or --pipeline and --push_to_hub of a pipeline")


def push_pipeline(
    pipeline: str | Path, push_to_hub: str, license: str | None = None, evaluation: str | Path | None = None
) -> str:
    """Upload a pipeline's folder to a private repository of the Hugging Face hub, and return its address.

    A card, README.md, is written into the folder where it has none. A repository that is public is refused.
    """
    from huggingface_hub import HfApi, get_token

    from vavae_tools.pipelines.base import kind_of

    folder = in_home(pipeline).absolute()
    if not kind_of(folder) or not any(folder.glob("pipeline_*.py")):
        found = f"{folder} {contents(folder)}" if folder.is_dir() else f"No folder {folder}"
        raise UserError(f"{found}, expected a pipeline with its code: load_pipeline(…).save_pretrained writes it anew")
    if not (folder / "README.md").exists():
        write_card(folder, push_to_hub, license, evaluation)
    api, token = HfApi(), get_token()
    try:
        address = api.create_repo(push_to_hub, private=True, exist_ok=True)
        if not api.repo_info(push_to_hub).private:
            raise UserError(f"{push_to_hub} is public: make it private on the hub, or name another")
        api.upload_folder(repo_id=push_to_hub, folder_path=folder, ignore_patterns=[".*", "*.partial"])
    except UserError:
        raise
    except Exception as error:  # of requests or of httpx, by the client's version
        said = one_line(error, 200).replace(token or "\0", "…")
        help = (
            "check the network, the name, and the token (HF_TOKEN, or `hf auth login`), which must be allowed to write"
        )
        raise UserError(f"{push_to_hub} is not uploaded ({said}): {help}") from None
    print(f"uploaded, private: {address}")
    print(f"next: DiffusionPipeline.from_pretrained({push_to_hub!r}, trust_remote_code=True)")
    return str(address)


def _measured(evaluation: Path) -> list[str]:
    from vavae_tools.evaluation.metrics import percent
    from vavae_tools.runtime.files import read_json

    found = read_json(evaluation) if evaluation.is_file() else {}
    if not isinstance(total := found.get("total"), dict):
        raise UserError(f"{evaluation} is no evaluation.json of images: python -m vavae_tools.evaluate writes one")
    made, real = percent(total["generated_accuracy"]), percent(total["validation_accuracy"])
    lines = [f"a classifier's accuracy: {made} on {total['generated']:,} generated images"]
    lines[0] += f", {real} on {total['validation']:,} real validation images"
    if distances := found.get("distances"):
        numbers = "{frechet_generated:.3g}, of real training images {frechet_real:.3g}, by {images:,} images of each"
        lines.append("Fréchet distance to real validation images: " + numbers.format(**distances))
    return lines


def write_card(folder: Path, name: str, license: str | None = None, evaluation: str | Path | None = None) -> None:
    """Write a pipeline's card, README.md: what it is in numbers, and how it is opened; no names and no paths."""
    from vavae_tools.pipelines.base import kind_of
    from vavae_tools.runtime.files import atomic_write, read_json

    index, run, kind = read_json(folder / "model_index.json"), folder.parent / "run.json", kind_of(folder)
    conditions = read_json(folder / "conditioner" / "config.json").get("num_classes")
    sizes = {part: sum(file.stat().st_size for file in (folder / part).glob("*.safetensors")) for part in index}
    steps = read_json(run).get("global_step") if run.is_file() else None
    facts = [f"{conditions} classes (people)"] if kind == "LatentDiTPipeline" and conditions else []
    facts += [f"{part}: {index[part][1]}, {size / 1e6:.1f} MB" for part, size in sorted(sizes.items()) if size]
    facts += [f"solver: {index['scheduler'][1]}"] if "scheduler" in index else []
    facts += [f"training: {steps:,} steps"] if steps else []
    facts += _measured(in_home(evaluation)) if evaluation else []
    previews = sorted((folder.parent / "samples").glob("*-[0-9]*.png"))
    if previews and not (folder / "grid.png").exists():
        with atomic_write(folder / "grid.png") as partial:
            partial.write_bytes(previews[-1].read_bytes())
    call = {"LatentDiTPipeline": "labels=[0, 1]", "TextToImagePipeline": '"a sentence"'}.get(kind, "num_samples=2")
    told = "No license was named: mind that of the weights it was derived from."
    lines = ["---", "library_name: diffusers", *([f"license: {license}"] if license else [])]
    lines += ["tags:", "- vavae-tools", f"- {kind}", "---", "", f"# {name.split('/')[-1]}", ""]
    lines += [*(["![samples](grid.png)", ""] if (folder / "grid.png").exists() else []), *(f"- {one}" for one in facts)]
    lines += ["", *([] if license else [told, ""]), "```python", "from diffusers import DiffusionPipeline"]
    lines += [f"pipe = DiffusionPipeline.from_pretrained({name!r}, trust_remote_code=True)"]
    lines += [f"pipe({call}).{'images' if '[' in call or 'sentence' in call else 'texts'}", "```"]
    with atomic_write(folder / "README.md") as partial:
        partial.write_text("\n".join(lines) + "\n", encoding="utf-8")


def export_vavae(vavae: str | Path, format: str, output: str | Path) -> list[Path]:
    """Write what `load_vavae` takes, without vectors, as others read it, and return the files.

    "reference" writes the file `output`, {"state_dict": …} under the reference's names, and `latents_stats.pt` beside
    it where the model knows them; "diffusers" writes the folder `output`, which diffusers' own AutoencoderKL loads.
    """
    from vavae_tools.autoencoders.weights import load_vavae

    vavae, output = in_home(vavae), in_home(output)
    if output.exists() and output.resolve() == vavae.resolve():
        raise UserError(f"--output {output} is the VA-VAE itself: name another place")
    model = load_vavae(vavae, log=lambda line: None)
    if model.config.condition_dim:
        print(f"left out: the vectors of {model.config.num_conditions} people; this is the model with no vector")
    write = {"diffusers": _write_diffusers, "reference": _write_reference}[format]
    written, following = write(model, output)
    print(f"written: {', '.join(map(str, written))}")
    print(f"next: {following}")
    return written


def _write_diffusers(model: "VAVAE", folder: Path) -> tuple[list[Path], str]:
    from diffusers import AutoencoderKL

    from vavae_tools.runtime.files import save_model

    of_vectors = ("condition_dim", "num_conditions", "people")
    plain = AutoencoderKL(**{k: v for k, v in model.config.items() if not k.startswith("_") and k not in of_vectors})
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()})
    save_model(plain, folder)
    written = [folder / "config.json", folder / "diffusion_pytorch_model.safetensors"]
    return written, f"from diffusers import AutoencoderKL; AutoencoderKL.from_pretrained({str(folder)!r})"


def _write_reference(model: "VAVAE", path: Path) -> tuple[list[Path], str]:
    import torch

    from vavae_tools.autoencoders.ldm_names import reference_config, to_reference
    from vavae_tools.autoencoders.vavae import VAVAE_SIZES
    from vavae_tools.runtime.files import atomic_write

    if path.is_dir():
        raise UserError(f"--output {path} is a folder, expected a file such as {path / 'vavae.pt'}")
    config = reference_config(model.config)
    weights = {name: tensor.contiguous() for name, tensor in to_reference(model.state_dict()).items()}
    files: dict[Path, dict] = {path: {"state_dict": weights}}
    if model.config.latents_mean is not None and model.config.latents_std is not None:
        mean, std = (torch.tensor(model.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        files[path.with_name("latents_stats.pt")] = {"mean": mean, "std": std}
    for target, value in files.items():
        with atomic_write(target) as partial, partial.open("wb") as file:  # of a file it raises OSError on a full disk
            torch.save(value, file)
    published = {**VAVAE_SIZES["f16d32"], "in_channels": 3, "out_channels": 3}
    following = f"LightningDiT's tokenizer is f16d32 alone; its training (vavae/configs) reads this with {config}"
    if reference_config({**model.config, "sample_size": published["sample_size"]}) == reference_config(published):
        following = f"in LightningDiT, ckpt_path: {path} in tokenizer/configs/vavae_f16d32.yaml"
    return list(files), following


if __name__ == "__main__":
    run_command(main)
