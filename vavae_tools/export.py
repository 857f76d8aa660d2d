"""Give a VA-VAE away: as a folder for diffusers, or as a file for LightningDiT."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from vavae_tools.runtime.errors import UserError, run_command

if TYPE_CHECKING:
    from vavae_tools.autoencoders.vavae import VAVAE


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vavae_tools.export",
        description=__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    needed = {"required": True, "default": argparse.SUPPRESS}
    add("--vavae", help="folder of a VA-VAE, a .ckpt of its training, or published weights", **needed)
    add(
        "--format",
        choices=["reference", "diffusers"],
        help="reference: a torch file under the names of LightningDiT; diffusers: a folder of AutoencoderKL",
        **needed,
    )
    add("--output", help="file (reference) or folder (diffusers) to write", **needed)
    args = parser.parse_args()
    export_vavae(args.vavae, args.format, args.output)


def export_vavae(vavae: str | Path, format: str, output: str | Path, say: Callable[[str], None] = print) -> list[Path]:
    """Write a VA-VAE, without vectors, as others read it.

    Args:
        vavae: what `load_vavae` takes.
        format: "reference" writes the file `output`, {"state_dict": …} under the reference's names, and
            `latents_stats.pt` beside it where the model knows them; "diffusers" writes the folder `output`, which
            diffusers' own AutoencoderKL loads.

    Returns:
        The files written.

    Raises:
        UserError: no VA-VAE, a model that the format cannot represent, or an output that cannot be written.
    """
    from vavae_tools.autoencoders.weights import load_vavae

    output = Path(output)
    if output.exists() and output.resolve() == Path(vavae).resolve():
        raise UserError(f"--output {output} is the VA-VAE itself: name another place")
    model = load_vavae(vavae, say=lambda line: None)
    if model.config.condition_dim:
        say(f"left out: the vectors of {model.config.num_conditions} people; this is the model with no vector")
    if format == "diffusers":
        written, further = _write_diffusers(model, output)
    elif format == "reference":
        written, further = _write_reference(model, output)
    else:
        raise UserError(f"--format {format}: expected reference or diffusers")
    say(f"written: {', '.join(map(str, written))}")
    say(f"next: {further}")
    return written


def _write_diffusers(model: "VAVAE", folder: Path) -> tuple[list[Path], str]:
    from diffusers import AutoencoderKL

    from vavae_tools.runtime.files import save_model

    of_vectors = ("condition_dim", "num_conditions")
    plain = AutoencoderKL(**{k: v for k, v in model.config.items() if not k.startswith("_") and k not in of_vectors})
    plain.load_state_dict({name: tensor for name, tensor in model.state_dict().items() if name in plain.state_dict()})
    save_model(plain, folder)
    written = [folder / "config.json", folder / "diffusion_pytorch_model.safetensors"]
    return written, f"from diffusers import AutoencoderKL; AutoencoderKL.from_pretrained({str(folder)!r})"


def _write_reference(model: "VAVAE", path: Path) -> tuple[list[Path], str]:
    import torch

    from vavae_tools.autoencoders.ldm_names import reference_config, to_reference
    from vavae_tools.autoencoders.vavae import VAVAE_SIZES

    if path.is_dir():
        raise UserError(f"--output {path} is a folder, expected a file such as {path / 'vavae.pt'}")
    config = reference_config(model.config)
    weights = to_reference(model.state_dict())
    written = [path]
    _save({"state_dict": {name: tensor.contiguous() for name, tensor in weights.items()}}, path)
    if model.config.latents_mean is not None and model.config.latents_std is not None:
        mean, std = (torch.tensor(model.config[name]).view(1, -1, 1, 1) for name in ("latents_mean", "latents_std"))
        written.append(path.with_name("latents_stats.pt"))
        _save({"mean": mean, "std": std}, written[-1])
    published = {**VAVAE_SIZES["f16d32"], "in_channels": 3, "out_channels": 3}
    if reference_config({**model.config, "sample_size": published["sample_size"]}) == reference_config(published):
        return written, f"in LightningDiT, ckpt_path: {path} in tokenizer/configs/vavae_f16d32.yaml"
    return written, f"LightningDiT's tokenizer is f16d32 alone; its training (vavae/configs) reads this with {config}"


def _save(value: dict, path: Path) -> None:
    import torch

    from vavae_tools.runtime.files import written_whole

    try:
        with written_whole(path) as partial:
            torch.save(value, partial)
    except RuntimeError as error:  # torch.save says so where the disk is full
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} could not be written ({reason}): free some space and run it again") from None


if __name__ == "__main__":
    run_command(main)
