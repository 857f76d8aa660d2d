"""Peak memory of a fine-tuning step in mixed precision: measured on a GPU, and derived where there is none.

Derived: the step runs on tensors without contents, and what is alive at the same time is added up; the rounding of
CUDA's allocator, its workspaces and the 0.5 GB of its context are not in it. Weights, both optimisers' states and the
gradients are.

    python -m benchmarks.vavae_memory --batch_size 12 --recipe full
"""

import argparse
import weakref
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vavae_tools.autoencoders.discriminator import generator_loss, hinge_loss
from vavae_tools.autoencoders.foundation import alignment_loss
from vavae_tools.autoencoders.losses import whole_loss
from vavae_tools.autoencoders.perceptual import LPIPS
from vavae_tools.autoencoders.vavae import vavae
from vavae_tools.data.pixels import to_unit
from vavae_tools.training.recipes import RECIPES
from vavae_tools.training.vavae_module import VAVAEModule

CARD = 16 * 2**30


class Alive(TorchDispatchMode):
    """Adds up the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, int] = {}
        self.now, self.peak = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.storages:
            self.storages[key] = size
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self.storages.pop(key)


class Features:
    """Stands for a ViT-L whose features were computed before training."""

    channels, digest = 1024, ""


def one_step(module: VAVAEModule, optimizers: list[torch.optim.Optimizer], batch: dict[str, Tensor], half: Any) -> None:
    """`VAVAEModule.training_step` without Lightning and without its draws, with every part on."""
    settings = module.hparams
    pictures = to_unit(batch["pictures"])
    with half:
        vectors = module.vavae.condition_vectors(batch["labels"])
        posterior = module.vavae.encode(pictures, condition=vectors).latent_dist
        latents = posterior.mean + posterior.std * torch.zeros_like(posterior.mean)
        made = module.vavae.decode(latents, condition=vectors).sample.float()
        aligned = None
        if settings.vf_weight:
            aligned = sum(alignment_loss(module.projection(latents), batch["foundation"]))
        loss, _ = whole_loss(
            module.picture_loss,
            made,
            pictures,
            posterior,
            adversary=(lambda x: generator_loss(module.judged(x))) if settings.disc_weight else None,
            decoder_last=module.vavae.decoder.conv_out.weight,
            alignment=aligned,
            encoder_last=module.vavae.encoder.conv_out.weight,
        )
    loss.backward()
    optimizers[0].step()
    optimizers[0].zero_grad()
    if settings.disc_weight:
        hinge_loss(module.judged(pictures), module.judged(made.detach())).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()


def run(options: argparse.Namespace, device: str, half: Any) -> None:
    settings = {**RECIPES[options.recipe], "gradient_checkpointing": options.gradient_checkpointing}
    lpips = LPIPS().to(device) if settings.get("perceptual_weight") else None
    module = VAVAEModule(
        vavae("f16d32", condition_dim=32, num_conditions=31), **settings, lpips=lpips, foundation=Features()
    )
    module = module.to(device)
    optimizers = [torch.optim.AdamW(module.vavae.parameters())]
    if settings.get("disc_weight"):
        optimizers.append(torch.optim.Adam(module.discriminator.parameters()))
    count, size = options.batch_size, options.image_size
    batch = {
        "pictures": torch.zeros(count, 3, size, size, dtype=torch.uint8, device=device),
        "labels": torch.zeros(count, dtype=torch.int64, device=device),
        "foundation": torch.zeros(count, 1024, size // 16, size // 16, dtype=torch.float16, device=device),
    }
    for _ in range(2):  # the optimisers' states come with the first step
        one_step(module, optimizers, batch, half)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--batch_size", type=int, default=12, help="pictures")
    parser.add_argument("--image_size", type=int, default=256, help="pixels")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    options = parser.parse_args()
    if torch.cuda.is_available():
        torch.cuda.set_per_process_memory_fraction(min(1.0, CARD / torch.cuda.get_device_properties(0).total_memory))
        run(options, "cuda", torch.autocast("cuda", torch.float16))
        peak, how = torch.cuda.max_memory_reserved(), "measured"
    else:
        normalise = F.group_norm
        F.group_norm = lambda x, *others, **named: normalise(x.float(), *others, **named)  # as CUDA's autocast does
        torch.nn.Module.to = lambda self, *others, **named: self  # tensors without contents cannot be moved
        alive = Alive()
        with FakeTensorMode(), alive:
            run(options, "cpu", torch.autocast("cpu", torch.bfloat16))  # as many bytes as fp16
        peak, how = alive.peak, "derived"
    name = f"{options.recipe}, f16d32 at {options.image_size} px, batch {options.batch_size}"
    name += ", gradient checkpointing" if options.gradient_checkpointing else ""
    print(f"{name}: {how} peak {peak / 2**30:.1f} GB")


if __name__ == "__main__":
    main()
