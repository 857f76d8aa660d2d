"""Time of a fine-tuning step with every loss, as a ratio to the same losses in the order of the reference's loop.

The reference's loop (LightningDiT's VA-VAE) asks the foundation model about every image at every step, computes LPIPS
for both optimisers, and goes backwards through it once for each weight it needs. Both loops train the same networks of
random weights on the same images in one process, in turn; the first step of each turn is not counted.

    python -m benchmarks.vavae_step --size small --image_size 64 --batch_size 8
"""

import argparse
import statistics
import time

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vavae_tools.autoencoders.foundation import TransformersFoundation, alignment_loss
from vavae_tools.autoencoders.losses import PatchDiscriminator, adaptive_weight, generator_loss, hinge_loss
from vavae_tools.autoencoders.lpips import LPIPS
from vavae_tools.autoencoders.vavae import VAVAE, vavae
from vavae_tools.data.images import to_unit
from vavae_tools.recipes.vavae import LOSSES
from vavae_tools.training.autoencoder_module import VAVAEModule
from vavae_tools.training.devices import quiet_lightning

VITS = {"small": (384, 12, 6), "base": (768, 12, 12), "large": (1024, 24, 16)}


def random_dinov2(size: str) -> TransformersFoundation:
    from transformers import Dinov2Config, Dinov2Model

    width, layers, heads = VITS[size]
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    return TransformersFoundation(Dinov2Model(Dinov2Config(**sizes, image_size=518, patch_size=14)))


class ReferenceLoop:
    """The order of the reference's training step, with the same networks as ours."""

    def __init__(self, model: VAVAE, lpips: LPIPS, foundation: TransformersFoundation, settings: dict) -> None:
        self.model, self.lpips, self.foundation, self.settings = model, lpips, foundation, settings
        self.discriminator = PatchDiscriminator(3, settings["disc_width"])
        self.projection = torch.nn.Conv2d(model.config.latent_channels, foundation.channels, 1, bias=False)
        weights = [*model.parameters(), *self.projection.parameters()]
        self.generator = torch.optim.Adam(weights, 1e-4, betas=(0.5, 0.9))
        self.adversary = torch.optim.Adam(self.discriminator.parameters(), 1e-4, betas=(0.5, 0.9))

    def image_loss(self, images: Tensor, made: Tensor) -> Tensor:
        error = (images - made).abs() + self.lpips(made, images)[:, None, None, None]
        return error.sum() / len(error)

    def step(self, images: Tensor) -> None:
        settings = self.settings
        posterior = self.model.encode(images).latent_dist
        latents = posterior.sample()
        made = self.model.decode(latents).sample
        features = self.foundation(images, tuple(latents.shape[2:]))
        projected = self.projection(latents)

        nll = self.image_loss(images, made)
        kl = posterior.kl().mean()
        adversarial = generator_loss(self.discriminator(made))
        last = self.model.decoder.conv_out.weight
        weighed = [torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (nll, adversarial)]
        disc_weight = settings["disc_weight"] * adaptive_weight(*weighed, largest=1e4)
        margins = settings["distance_margin"], settings["cosine_margin"]
        aligned = sum(alignment_loss(projected, features, *margins))
        last = self.model.encoder.conv_out.weight
        weighed = [torch.autograd.grad(loss, last, retain_graph=True)[0] for loss in (nll, aligned)]
        vf_weight = settings["vf_weight"] * adaptive_weight(*weighed, largest=1e8)
        self.generator.zero_grad()
        (nll + 1e-6 * kl + disc_weight * adversarial + vf_weight * aligned).backward()
        self.generator.step()

        self.image_loss(images, made)  # computed for the second optimiser too, and not used
        posterior.kl()
        loss = hinge_loss(self.discriminator(images), self.discriminator(made.detach()))
        self.adversary.zero_grad()
        loss.backward()
        self.adversary.step()


class Clock(L.Callback):
    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.began = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter() - self.began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=["small", "f16d32"], default="small", help="of the VA-VAE")
    parser.add_argument("--image_size", type=int, default=64, help="pixels")
    parser.add_argument("--batch_size", type=int, default=8, help="images a step")
    parser.add_argument("--foundation", choices=VITS, default="small", help="DINOv2's size")
    parser.add_argument("--disc_width", type=int, default=64, help="channels of the discriminator's first layer")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of each turn")
    parser.add_argument("--turns", type=int, default=3, help="of each loop")
    options = parser.parse_args()
    quiet_lightning()

    torch.manual_seed(0)
    settings = {**LOSSES["full"], "disc_width": options.disc_width, "disc_start": 0}
    lpips, foundation = LPIPS(), random_dinov2(options.foundation)
    reference = ReferenceLoop(vavae(options.size), lpips, foundation, settings)
    module = VAVAEModule(vavae(options.size), **settings, lpips=lpips, foundation=foundation)
    images = torch.randint(0, 256, (options.batch_size, 3, options.image_size, options.image_size)).to(torch.uint8)
    grid = (options.image_size // module.vavae.downsampling,) * 2
    index = torch.arange(options.batch_size)
    batch = {
        "images": images,
        "labels": torch.zeros_like(index),
        "index": index,
        "foundation": foundation(to_unit(images), grid).half(),  # as kept by the first look at each image
    }
    ours, theirs = [], []
    for _ in range(options.turns):
        clock = Clock()
        trainer = L.Trainer(
            **module.trainer_settings(accelerator="cpu", precision="32"),
            max_steps=options.steps + 2,
            callbacks=[clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        trainer.fit(module, DataLoader([batch] * (options.steps + 2), batch_size=None))
        ours += clock.times[2:]  # the discriminator is heard from the second step on
        for step in range(options.steps + 1):
            began = time.perf_counter()
            reference.step(to_unit(images))
            if step:
                theirs.append(time.perf_counter() - began)
    mine, other = statistics.median(ours), statistics.median(theirs)
    print(
        f"{options.size} at {options.image_size} px, batch {options.batch_size}, DINOv2 {options.foundation}, "
        f"{torch.get_num_threads()} threads: ours {mine:.3f} s, the reference's loop {other:.3f} s a step, "
        f"ratio {mine / other:.2f}"
    )


if __name__ == "__main__":
    main()
