"""Time of a training step on cached latents and texts against one that encodes images and captions every time.

Both are steps of the same text-to-image training: forward, backward, AdamW and EMA of a TextDiT. The one reads a batch
from the disk, memory-mapped, as training does by default; the other passes images that are in memory already through
the VAE's encoder and captions through the text encoder (decoding image files comes on top, in other processes). They
take turns, so that a machine that gets slower in the meantime does so for both; times are medians, the ratio that of
the turns.

Without folders the frozen models have random weights of the sizes' own shapes: time does not depend on them.

    OMP_NUM_THREADS=2 python -m benchmarks.text_step
    python -m benchmarks.text_step --device cuda --size T2I --batch_size 32 --precision bf16 --clip FOLDER --vae FOLDER
"""

import argparse
import statistics
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from benchmarks.dit_step import TYPES, half_precision, open_gates, timed
from vavae_tools.autoencoders.stable_diffusion import StableDiffusionVAE, load_stable_diffusion_vae
from vavae_tools.data.demo.shapes import captioned_shape_data, vocabulary
from vavae_tools.data.latents import encode_latents
from vavae_tools.data.text_states import TextLatentDataModule, encode_texts
from vavae_tools.diffusion.clip import TextEncoder, load_text_encoder, tiny_text_encoder
from vavae_tools.diffusion.conditioning import TextConditioner
from vavae_tools.diffusion.dit import TextDiT
from vavae_tools.diffusion.objectives import make_objective
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.machine import keep_freed_memory
from vavae_tools.training.denoiser_module import DiffusionModule


@dataclass(frozen=True)
class Size:
    """The denoiser's numbers, channels of the VAE at each of its four sizes, the text encoder's width, layers, heads,
    and pixels and images of a step."""

    denoiser: dict[str, int]
    vae: tuple[int, ...]
    text: tuple[int, int, int]
    image_size: int
    batch_size: int


SIZES = {
    "small": Size({"hidden_size": 256, "depth": 4, "num_heads": 4}, (32, 64, 128, 128), (256, 6, 4), 128, 4),
    "T2I": Size({"hidden_size": 768, "depth": 16, "num_heads": 12}, (128, 256, 512, 512), (512, 12, 8), 256, 96),
}
"""T2I is the issue's: Stable Diffusion's VAE, the text half of CLIP ViT-B/32"""


class Steps:
    """Training steps of one network, as `DiffusionModule` makes them, without Lightning."""

    def __init__(self, size: Size, options: argparse.Namespace, folder: Path) -> None:
        torch.manual_seed(0)
        self.device, self.batch_size = options.device, options.batch_size or size.batch_size
        vae = load_stable_diffusion_vae(options.vae) if options.vae else random_vae(size.vae)
        encoder = load_text_encoder(options.clip) if options.clip else random_text_encoder(*size.text)
        vae.to(self.device)
        encoder.to(self.device)
        pixels = options.image_size or size.image_size
        images = captioned_shape_data(2 * self.batch_size, pixels, self.batch_size, val_share=0)
        self.images = images.train_data
        latents = encode_latents(vae, images, folder, device=self.device, dtype="float16")
        texts = encode_texts(encoder, images.captions_by_subset(), folder / "texts", progress=False)
        self.cached = TextLatentDataModule(latents, texts, self.batch_size).train_data

        side = pixels // vae.downsampling
        denoiser = TextDiT((side, side), 2, vae.config.latent_channels, **size.denoiser)
        conditioner = TextConditioner(encoder.dim, encoder.pooled_dim, size.denoiser["hidden_size"])
        conditioner.set_empty(encoder.encode([""]))
        self.module = DiffusionModule(denoiser, conditioner, make_objective("epsilon"))
        open_gates(self.module.network)
        self.module.to(self.device).encode_with(vae, encoder)
        network = self.module.network
        self.optimizer = torch.optim.AdamW(network.parameters(), 1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.autocast = half_precision(self.device, TYPES[options.precision])
        self.tokens, self.count = (side // 2) ** 2, 0

    def rows(self) -> list[tuple[int, int]]:
        """Images and their captions' numbers, of the two batches in turn."""
        start = self.count % 2 * self.batch_size
        return [(place, self.count % 8) for place in range(start, start + self.batch_size)]

    def from_cache(self) -> dict:
        return self.on_device(self.cached.get_batch(self.rows()))

    def encoded(self) -> dict:
        return self.module.encoded(self.on_device(self.images.get_batch(self.rows())))

    def on_device(self, batch: dict) -> dict:
        return {k: v.to(self.device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}

    def train(self, batch: dict) -> None:
        self.count += 1
        module = self.module
        draws = Draws(0, self.count, batch["index"])
        with self.autocast:
            loss, _ = module.model_step(module.network, batch, draws, dropout=0.1)
        loss.backward()
        nn.utils.clip_grad_norm_(module.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        module.ema.update(module.network, self.count)


def random_vae(channels: tuple[int, ...]) -> StableDiffusionVAE:
    """Stable Diffusion's architecture."""
    return StableDiffusionVAE(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=channels,
        layers_per_block=2,
        latent_channels=4,
    ).eval()


def random_text_encoder(width: int, layers: int, heads: int) -> TextEncoder:
    """CLIP's architecture, and a tokenizer that knows the shapes' words."""
    from transformers import CLIPTextConfig, CLIPTextModel

    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    model = CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=heads))
    return TextEncoder(model, tiny_text_encoder(vocabulary(), dim=16, num_layers=1, max_tokens=77).tokenizer)


def measure(name: str, options: argparse.Namespace) -> None:
    size = SIZES[name]
    with TemporaryDirectory() as folder:
        steps = Steps(size, options, Path(folder))
        for _ in range(2):  # the optimiser's state made, caches warm
            steps.train(steps.from_cache())
            steps.train(steps.encoded())
        cached, encoding, of_which = [], [], []
        for _ in range(options.repeats):
            cached.append(timed(lambda: steps.train(steps.from_cache()), steps.device))
            batch: dict = {}
            of_which.append(timed(lambda into=batch: into.update(steps.encoded()), steps.device))
            encoding.append(of_which[-1] + timed(lambda batch=batch: steps.train(batch), steps.device))

    where = torch.cuda.get_device_name() if steps.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    pixels, numbers = options.image_size or size.image_size, size.denoiser
    print(
        f"\n{name}: width {numbers['hidden_size']}, {numbers['depth']} blocks, {pixels} px, {steps.tokens} tokens, "
        f"batch {steps.batch_size}, {options.precision}, {where}"
    )
    ratios = sorted(one / other for one, other in zip(encoding, cached, strict=True))
    shares = [part / whole for part, whole in zip(of_which, encoding, strict=True)]
    print(f"  cached             {statistics.median(cached) * 1000:8.1f} ms")
    print(
        f"  encoding each time {statistics.median(encoding) * 1000:8.1f} ms   × {statistics.median(ratios):.2f} "
        f"(quartiles {ratios[len(ratios) // 4]:.2f} to {ratios[-1 - len(ratios) // 4]:.2f})   encoding is "
        f"{statistics.median(shares):.0%} of it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--image_size", type=int, help="pixels, instead of the size's own")
    parser.add_argument("--batch_size", type=int, help="instead of the size's own")
    parser.add_argument("--precision", choices=TYPES, default="32", help="of the denoiser, bf16 and 16 by autocast")
    parser.add_argument("--clip", type=Path, help="a folder with CLIP's text encoder and its tokenizer")
    parser.add_argument("--vae", type=Path, help="a folder with Stable Diffusion's VAE")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each")
    options = parser.parse_args()
    if options.device == "cpu":
        keep_freed_memory()  # as trainings do
    measure(options.size, options)


if __name__ == "__main__":
    main()
