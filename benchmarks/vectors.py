"""What a person's vector carries, and what it costs: a table over KL weight, latent channels and where it enters.

python -m benchmarks.vectors --data_dir data_split --kl_weights 1e-6 1e-2 10 --latent_channels 8 2

PSNR of the validation images with their own vector, with another person's and with none; how often a classifier names
the right person after decoding with the own vector (own), and how often the other person when an image encoded with its
own vector is decoded with another's (transfer). Each row is kept in `--output_dir`, and is not measured again.
"""

import argparse
import itertools
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import torch

from vavae_tools.autoencoders.vavae import VAVAE
from vavae_tools.autoencoders.weights import load_vavae
from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.evaluation.reconstructions import compare_conditions, evaluate_vavae
from vavae_tools.recipes.vavae import fine_tune_vavae

WHERE = {"both": ("encoder_projections", "decoder_projections"), "encoder": ("encoder_projections",)}
WHERE["decoder"] = ("decoder_projections",)
_through = VAVAE._through


def started_from_small(channels: int, folder: Path) -> Path:
    """Write the packaged VA-VAE with other latent channels: the layers beside the latent are new; return its folder."""
    small = load_vavae("small", log=lambda line: None)
    torch.manual_seed(0)
    model = VAVAE.from_config({**small.config, "latent_channels": channels})
    new, old = model.state_dict(), small.state_dict()
    model.load_state_dict({name: t if t.shape == new[name].shape else new[name] for name, t in old.items()})
    model.save_pretrained(folder)
    return folder


def measure(model: VAVAE, images: ImageDataModule, folder: Path) -> dict[str, float]:
    """Return PSNR with own, another's and no vector, and the shares that are named as their own and as the other."""
    vectors = compare_conditions(model, images.val_data)
    scores = evaluate_vavae(model, images, folder, progress=False)
    decibels = {"own": vectors.own.psnr, "another": vectors.another.psnr, "none": vectors.none.psnr}
    return {**decibels, "own_named": scores.accuracy, "transfer": scores.transfer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True, help="a split, as data_split.py writes it")
    parser.add_argument("--output_dir", default="vectors", help="a JSON for each row, and the classifier")
    parser.add_argument("--kl_weights", type=float, nargs="+", default=[1e-6, 1e-4, 1e-2, 1, 10, 30])
    parser.add_argument("--latent_channels", type=int, nargs="+", default=[8], help="the packaged VA-VAE has 8")
    parser.add_argument("--where", choices=WHERE, nargs="+", default=["both"], help="the networks the vector enters")
    parser.add_argument("--image_size", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=6)
    options = parser.parse_args()
    folder = Path(options.output_dir)
    images = ImageDataModule(options.data_dir, options.image_size)
    print("| where | latent channels | kl_weight | own, dB | another's, dB | none, dB | own named | transfer |")
    print("| --- " * 8 + "|")
    for where, channels, kl in itertools.product(options.where, options.latent_channels, options.kl_weights):
        path = folder / f"{where}-{channels}-{kl:g}-{options.epochs}-{options.image_size}.json"
        if not path.is_file():
            entered = WHERE[where]

            def through(self, blocks, projections, h, condition, entered=entered):
                return _through(self, blocks, projections, h, condition if projections in entered else None)

            with TemporaryDirectory() as name, mock.patch.object(VAVAE, "_through", through):
                start = "small" if channels == 8 else started_from_small(channels, Path(name) / "start")
                settings = {
                    "kl_weight": kl,
                    "max_epochs": options.epochs,
                    "batch_size": 32,
                    "previews": 0,
                    "monitor": "loss",
                }
                settings |= {"classifier_dir": folder, "image_size": options.image_size, "log": lambda line: None}
                made = fine_tune_vavae(options.data_dir, Path(name) / "run", start, **settings)
                model = load_vavae(made, log=lambda line: None).eval()
                path.write_text(json.dumps(measure(model, images, folder)))
        found = json.loads(path.read_text())
        decibels = " | ".join(f"{found[name]:.2f}" for name in ("own", "another", "none"))
        shares = " | ".join(f"{100 * found[name]:.1f} %" for name in ("own_named", "transfer"))
        print(f"| {where} | {channels} | {kl:g} | {decibels} | {shares} |", flush=True)


if __name__ == "__main__":
    main()
