"""Time of one whole training step of a LightningDiT against its matrix products and attention alone.

The step is forward, backward, AdamW and EMA. The bound is what no rearrangement saves: every matrix product of the step
(forward, for the inputs' gradients, for the weights' gradients) and attention forwards and backwards, of the same
shapes and type, nothing else. Both take turns, and so do the compiled step and the reference's where asked for, so that
a machine that gets slower in the meantime does so for all; ratios are medians over the turns.

    OMP_NUM_THREADS=2 python -m benchmarks.dit_step --sizes small wide --compile --reference ../LightningDiT
    python -m benchmarks.dit_step --device cuda --sizes XL --batch_size 64 --precision bf16 --compile
"""

import argparse
import contextlib
import copy
import statistics
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DiT, DiT_SIZES
from vavae_tools.diffusion.objectives import FlowMatching
from vavae_tools.runtime.machine import keep_freed_memory
from vavae_tools.training.optim import EMA

SIZES = {
    "small": ({"hidden_size": 384, "depth": 6, "num_heads": 6}, 8),
    "wide": ({"hidden_size": 768, "depth": 4, "num_heads": 12}, 4),
    **{name: (numbers, 16) for name, numbers in DiT_SIZES.items()},
}
"""width, blocks and heads; samples a step"""
CHANNELS, SIDE, CLASSES = 32, 16, 31
TOKENS = SIDE * SIDE
TYPES = {"32": torch.float32, "bf16": torch.bfloat16, "16": torch.float16}
PEAKS = {"H200": 989, "H100": 989, "A100": 312, "A10G": 70, "L40S": 362, "L4": 121, "V100": 125, "T4": 65}
"""TFLOP/s of dense half-precision products, as the makers give them"""


class Step:
    """A whole training step of ours, as `DiffusionModule` does it, without Lightning."""

    def __init__(self, numbers: dict[str, int], batch_size: int, device: str, dtype: torch.dtype, compile: bool):
        torch.manual_seed(0)
        self.network = nn.ModuleDict(
            {
                "denoiser": DiT(input_size=SIDE, in_channels=CHANNELS, **numbers),
                "conditioner": ClassConditioner(CLASSES, numbers["hidden_size"]),
            }
        )
        open_gates(self.network)
        self.network.to(device)
        self.ema = EMA(self.network)
        if compile:
            self.network["denoiser"].compile_repeated_blocks()
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), 2e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.objective = FlowMatching()
        self.data, self.labels = some_data(batch_size, device)
        self.autocast = half_precision(device, dtype)
        self.count = 0

    def __call__(self) -> None:
        self.count += 1
        noise = torch.randn_like(self.data)
        t = self.objective.sample_time(torch.randn(len(self.data), device=self.data.device))
        drop = torch.rand(len(self.data), device=self.data.device) < 0.1
        with self.autocast:
            conditioning = self.network["conditioner"](self.labels, drop)
            loss, _ = self.objective(self.network["denoiser"], self.data, conditioning, noise, t)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with record_function("EMA"):
            self.ema.update(self.network, self.count)


class ReferenceStep:
    """The same step by LightningDiT's code: its model, and what its train.py does around it."""

    def __init__(self, folder: Path, numbers: dict[str, int], batch_size: int, device: str, dtype: torch.dtype):
        torch.manual_seed(0)
        switches = ("use_swiglu", "use_rope", "use_rmsnorm")
        sizes = {"input_size": SIDE, "patch_size": 1, "in_channels": CHANNELS, "num_classes": CLASSES}
        self.model = reference_class(folder)(**sizes, **numbers, **dict.fromkeys(switches, True)).to(device)
        open_gates(self.model)
        self.ema = copy.deepcopy(self.model).requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 2e-4, betas=(0.9, 0.95), weight_decay=0.0)
        self.data, self.labels = some_data(batch_size, device)
        self.autocast = half_precision(device, dtype)

    def __call__(self) -> None:
        noise = torch.randn_like(self.data)
        t = torch.sigmoid(torch.randn(len(self.data))).to(self.data)
        share = t.view(-1, 1, 1, 1)
        with self.autocast:
            made = self.model(share * self.data + (1 - share) * noise, t, y=self.labels)
        velocity = self.data - noise
        loss = (made - velocity).square().mean() + (1 - F.cosine_similarity(made, velocity, dim=1)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        average = dict(self.ema.named_parameters())
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                average[name].mul_(0.9999).add_(weight.data, alpha=1e-4)
        loss.item()


class Bound:
    """The step's matrix products and attention, forwards and backwards, on tensors of their own."""

    def __init__(self, numbers: dict[str, int], batch_size: int, device: str, dtype: torch.dtype):
        dim, heads = numbers["hidden_size"], numbers["num_heads"]
        make = {"device": device, "dtype": dtype}
        self.products, self.attentions, self.flops = [], [], 0
        for i, (rows, ins, outs) in enumerate(products(dim, numbers["depth"], batch_size)):
            shapes = (rows, ins), (outs, ins), (rows, outs)
            self.products.append((*(torch.randn(shape, **make) for shape in shapes), i >= 2))  # latents and t need none
            self.flops += 2 * rows * ins * outs * (3 if i >= 2 else 2)
        for _ in range(numbers["depth"]):
            packed = torch.randn(batch_size, TOKENS, 3, heads, dim // heads, **make)
            q, k, v = (part.transpose(1, 2).requires_grad_() for part in packed.unbind(2))
            self.attentions.append((q, k, v, torch.randn_like(q)))
            self.flops += 3 * 4 * batch_size * TOKENS**2 * dim

    def __call__(self) -> None:
        for x, weight, _, _ in self.products:
            torch.mm(x, weight.mT)
        attended = [F.scaled_dot_product_attention(q, k, v) for q, k, v, _ in self.attentions]
        for out, (q, k, v, d) in zip(attended, self.attentions, strict=True):
            torch.autograd.grad(out, (q, k, v), d)
        for x, weight, d, of_input in self.products:
            torch.mm(d.mT, x)
            if of_input:
                torch.mm(d, weight)


def products(dim: int, depth: int, batch_size: int) -> list[tuple[int, int, int]]:
    """(rows, inputs, outputs) of every linear layer; the first two need no gradient of their inputs."""
    tokens, hidden = batch_size * TOKENS, int(2 / 3 * 4 * dim)
    block = [(batch_size, dim, 6 * dim), (tokens, dim, 3 * dim), (tokens, dim, dim)]
    block += [(tokens, dim, 2 * hidden), (tokens, hidden, dim)]
    ends = [(tokens, CHANNELS, dim), (batch_size, 256, dim)], [(batch_size, dim, 2 * dim), (tokens, dim, CHANNELS)]
    return [*ends[0], (batch_size, dim, dim), *block * depth, *ends[1]]


def open_gates(network: nn.Module) -> None:
    """A fresh model's gates are closed, and products with zeros would be no fair measure."""
    for weights in network.parameters():
        if not weights.any():
            nn.init.normal_(weights, std=0.02)


def some_data(batch_size: int, device: str) -> tuple[Tensor, Tensor]:
    data = torch.randn(batch_size, CHANNELS, SIDE, SIDE, device=device)
    return data, torch.arange(batch_size, device=device) % CLASSES


def half_precision(device: str, dtype: torch.dtype) -> contextlib.AbstractContextManager:
    return contextlib.nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)


def reference_class(folder: Path) -> type[nn.Module]:
    """LightningDiT's model from a checkout, with stand-ins for the little that it takes from timm and fairscale."""

    class PatchEmbed(nn.Module):
        def __init__(self, side: int, patch: int, channels: int, dim: int, bias: bool) -> None:
            super().__init__()
            self.patch_size, self.num_patches = (patch, patch), (side // patch) ** 2
            self.proj = nn.Conv2d(channels, dim, patch, patch, bias=bias)

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x).flatten(2).transpose(1, 2)

    stood_in = {
        "timm.models.vision_transformer": {"PatchEmbed": PatchEmbed, "Mlp": None},
        "fairscale.nn.model_parallel.initialize": {},
        "fairscale.nn.model_parallel.layers": dict.fromkeys(
            ("ColumnParallelLinear", "ParallelEmbedding", "RowParallelLinear")
        ),
    }
    import accelerate  # noqa: F401  (it looks which packages there are: before the stand-ins)

    for name, contents in stood_in.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        vars(sys.modules[name]).update(contents)
    sys.path.insert(0, str(folder))
    from models.lightningdit import LightningDiT

    return LightningDiT


GROUPS = {
    "EMA": "EMA",
    "Optimizer.step": "AdamW",
    "rms_norm": "norms",
    "silu": "SwiGLU",
    "CompiledFxGraph": "compiled elementwise",
    "Compiled": "compiled elementwise",
    "cosine_similarity": "loss",
    "AddmmBackward": "biases",
    "aten::linear": "biases",
    "AccumulateGrad": "residual and shared gradients",
}
"""What an operation belongs to, by a part of its own name or of what called it, innermost first."""


def group_of(event: torch.autograd.profiler_util.FunctionEvent) -> str:
    if any(name in event.name for name in ("mm", "convolution", "gemm")) and event.name.startswith("aten::"):
        return "matrix products"
    if "scaled_dot_product" in event.name:
        return "attention"
    while event is not None:
        if "scaled_dot_product" in event.name:
            return "attention"
        for name, group in GROUPS.items():
            if name in event.name:
                return group
        event = event.cpu_parent
    return "other"


def where_time_goes(step: Callable[[], None], device: str, repeats: int = 3) -> dict[str, float]:
    """Milliseconds of a step by group, the largest first. Watching costs time of its own: read the shares."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as watched:
        for _ in range(repeats):
            step()
    spent: defaultdict[str, float] = defaultdict(float)
    for event in watched.events():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        spent[group_of(event)] += own / 1000 / repeats
    return dict(sorted(spent.items(), key=lambda pair: -pair[1]))


def timed(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(name: str, options: argparse.Namespace) -> None:
    numbers, batch_size = SIZES[name]
    batch_size = options.batch_size or batch_size
    device, dtype = options.device, TYPES[options.precision]
    steps = {"the bound": Bound(numbers, batch_size, device, dtype)}
    steps["ours"] = Step(numbers, batch_size, device, dtype, compile=False)
    if options.compile:
        steps["ours, compiled"] = Step(numbers, batch_size, device, dtype, compile=True)
    if options.reference:
        steps["the reference"] = ReferenceStep(options.reference, numbers, batch_size, device, dtype)
    memory = {}
    for label, step in steps.items():
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        for _ in range(2):  # compiled, and the optimiser's state made
            step()
        if device == "cuda":  # weights and EMA of this step were there before; activations, gradients, moments not
            own = sum(
                w.nbytes for part in vars(step).values() if isinstance(part, nn.Module) for w in part.parameters()
            )
            memory[label] = torch.cuda.max_memory_allocated() - before + own
    times: dict[str, list[float]] = {label: [] for label in steps}
    for _ in range(options.repeats):
        for label, step in steps.items():
            times[label].append(timed(step, device))

    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    width, depth = numbers["hidden_size"], numbers["depth"]
    print(f"\n{name}: width {width}, {depth} blocks, batch {batch_size}, {TOKENS} tokens, {options.precision}, {where}")
    peak = next((peak for card, peak in PEAKS.items() if card in where), None) if dtype != torch.float32 else None
    flops = steps["the bound"].flops
    for label, taken in times.items():
        ratios = sorted(one / other for one, other in zip(taken, times["the bound"], strict=True))
        middle, low = statistics.median(taken), ratios[len(ratios) // 4]
        line = f"  {label:15} {middle * 1000:8.1f} ms   × {statistics.median(ratios):.2f} (lower quartile {low:.2f})"
        line += f"   {flops / middle / 1e12:7.2f} TFLOP/s"
        line += f"   MFU {flops / middle / 1e12 / peak:.0%}" if peak else ""
        line += f"   {memory[label] / 2**30:.1f} GB" if label in memory and label != "the bound" else ""
        print(line)
    for label in [label for label in steps if label.startswith("ours")]:
        spent = where_time_goes(steps[label], device)
        whole = sum(spent.values())
        shares = ", ".join(f"{group} {part / whole:.1%}" for group, part in spent.items() if part > 0.002 * whole)
        print(f"  {label}, where it goes: {shares}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["small", "wide"])
    parser.add_argument("--batch_size", type=int, help="instead of the size's own")
    parser.add_argument("--precision", choices=TYPES, default="32", help="bf16 and 16 by autocast, without a scaler")
    parser.add_argument("--compile", action="store_true", help="beside the eager step, one with compiled blocks")
    parser.add_argument("--reference", type=Path, help="a checkout of hustvl/LightningDiT, timed beside ours")
    parser.add_argument("--repeats", type=int, default=15, help="turns of each")
    options = parser.parse_args()
    if options.device == "cpu":
        keep_freed_memory()  # as trainings do
    if options.reference and not (options.reference / "models" / "lightningdit.py").is_file():
        print(f"No models/lightningdit.py in {options.reference}: the reference is left out.")
        options.reference = None
    for name in options.sizes:
        measure(name, options)


if __name__ == "__main__":
    main()
