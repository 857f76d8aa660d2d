"""Give a VA-VAE away: as a folder for diffusers, or as a file for LightningDiT."""

from pathlib import Path
from typing import TYPE_CHECKING

from vavae_tools.runtime.errors import UserError, command_parser, in_home, run_command

if TYPE_CHECKING:
    from vavae_tools.autoencoders.vavae import VAVAE


def main() -> None:
    parser = command_parser("python -m vavae_tools.export", __doc__)
    add = parser.add_argument
    formats = "reference: a torch file under the names of LightningDiT; diffusers: a folder of AutoencoderKL"
    add("--vavae", required=True, help="folder of a VA-VAE, a .ckpt of its training, or published weights")
    add("--format", required=True, choices=["reference", "diffusers"], help=formats)
    add("--output", required=True, help="file (reference) or folder (diffusers) to write")
    export_vavae(**vars(parser.parse_args()))


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
