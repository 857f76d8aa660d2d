"""Time and memory of a training step on token images: 64 against 256 pixels, and half-empty images against full ones.

All are steps of the same training: forward, backward, AdamW and EMA of a DiT whose patches are the cells. 256 pixels
have 16 times the cells of 64, and attention among them 256 times the pairs; what is left of half an image's cells is
neither computed nor attended to. Kinds take turns, so that a machine that gets slower in the meantime does so for all;
times are medians, ratios those of the turns. Memory is that of one step above what weights and optimiser take, at its
peak: on a GPU as the allocator counts it, on a CPU the tensors that autograd keeps.

    OMP_NUM_THREADS=2 python -m benchmarks.token_step
    python -m benchmarks.token_step --device cuda --precision bf16 --size S --batch_size 16
"""

import argparse
import statistics

import torch
from torch import nn

from benchmarks.dit_step import TYPES, half_precision, open_gates, timed
from vavae_tools.data.tokens.code import TokenCode
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DiT, DiT_SIZES
from vavae_tools.diffusion.objectives import SamplePrediction
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.machine import keep_freed_memory
from vavae_tools.training.denoiser_module import DiffusionModule

SIZES = {"small": {"hidden_size": 128, "depth": 6, "num_heads": 4}, **DiT_SIZES}


class Steps:
    """Training steps on images of one size, the given share of whose cells have a token."""

    def __init__(self, img_size: int, filled: float, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        code = TokenCode(260, options.cell_size)
        denoiser = DiT(img_size, options.cell_size, code.channels + 1, positions="sequence", **SIZES[options.size])
        conditioner = ClassConditioner(1, denoiser.conditioning_size, dropout=0.0)
        self.module = DiffusionModule(
            denoiser,
            conditioner,
            SamplePrediction(time_shift=4.0),
            token_images={"code": code.config},
            prompt_share=0.0,
        )
        open_gates(self.module.network)
        self.module.to(options.device).eval()  # nothing in it draws by itself
        cells, self.count = code.capacity(img_size), 0
        tokens = torch.randint(260, (options.batch_size, cells))
        there = (torch.arange(cells) < round(filled * cells)).expand(len(tokens), -1)
        batch = {
            "clean": code.draw(tokens, there, img_size),
            "mask": code.spread_to_pixels(there.float(), img_size),
            "index": torch.arange(len(tokens)),
        }
        batch = self.module.on_before_batch_transfer(batch, 0)
        self.batch = {
            name: type(value)(*(part.to(options.device) for part in value))
            if isinstance(value, tuple)
            else value.to(options.device)
            for name, value in batch.items()
        }
        weights = self.module.network.parameters()
        self.optimizer = torch.optim.AdamW(weights, 1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self.autocast = half_precision(options.device, TYPES[options.precision])

    def loss(self) -> torch.Tensor:
        with self.autocast:
            return self.module.model_step(
                self.module.network, self.batch, Draws(0, self.count, self.batch["index"]), 0.0
            )[0]

    def train(self) -> None:
        self.count += 1
        self.loss().backward()
        nn.utils.clip_grad_norm_(self.module.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.module.ema.update(self.module.network, self.count)

    def memory(self) -> float:
        """Bytes of a step above weights, averages and the optimiser's state."""
        device = self.batch["index"].device
        if device.type == "cuda":
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self.train()
            return torch.cuda.max_memory_allocated() - before
        kept: dict[int, int] = {}
        own = {weight.untyped_storage().data_ptr() for weight in self.module.parameters()}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = self.loss()
        loss.backward()
        self.optimizer.zero_grad()
        return sum(kept.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--cell_size", type=int, default=4)
    parser.add_argument("--precision", choices=TYPES, default="32", help="bf16 and 16 by autocast")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each")
    options = parser.parse_args()
    if options.device == "cpu":
        keep_freed_memory()  # as trainings do

    kinds = {"64 px": (64, 1.0), "64 px, half empty": (64, 0.5), "256 px": (256, 1.0)}
    steps = {name: Steps(*kind, options) for name, kind in kinds.items()}
    for each in steps.values():
        each.train()  # the optimiser's state made, caches warm
    memory = {name: each.memory() for name, each in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.repeats):
        for name, each in steps.items():
            times[name].append(timed(each.train, options.device))

    where = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    numbers = SIZES[options.size]
    print(
        f"\nwidth {numbers['hidden_size']}, {numbers['depth']} blocks, cells of {options.cell_size} px, batch "
        f"{options.batch_size}, {options.precision}, {where}"
    )
    for name, each in steps.items():
        cells, seconds = each.batch["kept"].indices.shape[1], statistics.median(times[name])
        slower = statistics.median(one / other for one, other in zip(times[name], times["64 px"], strict=True))
        print(
            f"  {name:<18}{cells:6,} cells  {seconds * 1000:9,.1f} ms  × {slower:6.2f}   {memory[name] / 1e6:9,.1f} MB"
            f"  × {memory[name] / memory['64 px']:6.2f}"
        )


if __name__ == "__main__":
    main()
