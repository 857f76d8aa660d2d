"""What each stage takes of a card's memory, on paper: no card is needed.

The package's own code runs (training steps, validations, previews, encoding, `pipe.make`) on tensors that have shapes
and no contents, and their memory is asked of a simulation of CUDA's caching allocator. "alive" is what tensors take at
the most, "reserved" what the allocator must have of the card for it; beside it stands CUDA's context, about 0.5 GiB in
every process. Not in it: what cuDNN takes for single convolutions, and NCCL's buffers.

    python -m benchmarks.memory
    python -m benchmarks.memory --machines T4x1 --stages vavae_full --batch_size 8 --gradient_checkpointing
    python -m benchmarks.memory --measure    # on the card that is there, in place of paper
"""

import argparse
import contextlib
import logging
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import lightning as L
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

from vavae_tools.autoencoders import rae as rae_module
from vavae_tools.autoencoders.lpips import LPIPS
from vavae_tools.autoencoders.rae import RAE, RAE_SIZES
from vavae_tools.autoencoders.stable_diffusion import StableDiffusionVAE
from vavae_tools.autoencoders.vavae import VAVAE, reconstruct, vavae
from vavae_tools.data.encoded import _batches, _encoded
from vavae_tools.data.latents import _Encoder
from vavae_tools.diffusion.clip import TextStates
from vavae_tools.diffusion.conditioning import ClassConditioner, TextConditioner
from vavae_tools.diffusion.dit import TextDiT, make_denoiser
from vavae_tools.diffusion.lora import add_lora
from vavae_tools.diffusion.objectives import make_objective
from vavae_tools.diffusion.solvers import make_solver
from vavae_tools.evaluation.classifier import train_classifier
from vavae_tools.evaluation.metrics import aligned
from vavae_tools.pipelines.classes import LatentDiTPipeline
from vavae_tools.pipelines.text import TextToImagePipeline
from vavae_tools.recipes.config import compose, read_command_line
from vavae_tools.recipes.presets import Preset, find_preset, going_on
from vavae_tools.recipes.vavae import LOSSES, _needs_checkpointing
from vavae_tools.runtime.machine import Computing, Machine, for_inference, on_device
from vavae_tools.training.autoencoder_module import RAEDecoderModule, VAVAEModule
from vavae_tools.training.callbacks import previews
from vavae_tools.training.callbacks.finite import FiniteSteps
from vavae_tools.training.callbacks.previews import Previews, ReconstructionPreviews, SamplePreviews
from vavae_tools.training.denoiser_module import DiffusionModule

MIB, GIB = 2**20, 2**30
MACHINES = {
    "T4x1": Machine("t4", 1, "Tesla T4", int(14.56 * GIB)),
    "T4x2": Machine("t4", 2, "Tesla T4", int(14.56 * GIB)),
    "L4": Machine("ampere", 1, "NVIDIA L4", int(22.06 * GIB), (8, 9)),
    "A100": Machine("ampere", 1, "NVIDIA A100-SXM4-40GB", int(39.39 * GIB)),
}
CONTEXT = GIB // 2
"""Of CUDA, in every process: about so much on a T4 and an A100 with torch's kernels, cuBLAS and cuDNN loaded."""
ROOM = int(1.06 * GIB)
"""What shall be free beside what is reserved: of a T4's 14.56 GiB a stage may reserve 13.5."""
WORKSPACE = 8_519_680
"""cuBLAS's own, which it takes from the allocator at its first product (of 4096 KiB two, of 16 KiB eight)."""
PEOPLE = 31
aten = torch.ops.aten


# ---- the allocator


@dataclass
class Block:
    """A piece of a segment, which is what CUDA gave in one call."""

    small: bool
    segment: int
    start: int
    size: int
    missing: int = 0
    """bytes of it that were given back to the card, of a free piece of a segment that grows"""

    @property
    def end(self) -> int:
        return self.start + self.size


class Allocator:
    """CUDA's caching allocator in torch 2.6 to 2.13, for one stream and a card without an end.

    Blocks are multiples of 512 bytes. Up to 1 MiB they are cut from segments of 2 MiB, those below 10 MiB from segments
    of 20 MiB, and larger ones have a segment of their own, a multiple of 2 MiB. What is free is kept for later blocks:
    the smallest that fits is taken and cut, and what is free side by side is one again.

    Args:
        expandable_segments: as in PYTORCH_CUDA_ALLOC_CONF: one segment of each kind, which grows at its end.

    Attributes:
        alive, reserved: bytes in blocks that are taken, and in segments; `peak_alive` and `peak_reserved` at the most.
    """

    def __init__(self, expandable_segments: bool = False) -> None:
        self.expandable_segments = expandable_segments
        self.free_blocks: list[Block] = []
        self.segments: dict[int, int] = {}
        """number → bytes from its beginning to its end"""
        self.alive = self.reserved = self.peak_alive = self.peak_reserved = 0
        self.marks: list[tuple[str, int, int]] = []

    def malloc(self, size: int) -> Block:
        """Take a block of at least so many bytes."""
        size = max(512, -(-size // 512) * 512)
        small = size <= MIB
        fitting = [block for block in self.free_blocks if block.small == small and block.size >= size]
        if fitting:
            block = min(fitting, key=lambda block: (block.missing > 0, block.size, block.segment, block.start))
            self.free_blocks.remove(block)
            again = min(block.missing, _up_to(max(0, size - block.size + block.missing), _page(small)))
            self._reserve(again)
            block.missing -= again
        elif self.expandable_segments:
            block = self._grown(small, size)
        else:
            block = self._segment(small, size)
        rest = block.size - size
        if rest >= 512 if small or self.expandable_segments else rest > MIB:
            self.free_blocks.append(Block(small, block.segment, block.start + size, rest, block.missing))
            block.size, block.missing = size, 0
        self.alive += block.size
        self.peak_alive = max(self.peak_alive, self.alive)
        return block

    def free(self, block: Block) -> None:
        """Keep a block for later, as one with what is free beside it."""
        self.alive -= block.size
        beside = [
            other
            for other in self.free_blocks
            if other.small == block.small
            and other.segment == block.segment
            and (other.end == block.start or other.start == block.end)
        ]
        for other in beside:
            self.free_blocks.remove(other)
        start = min(part.start for part in (block, *beside))
        size, missing = (sum(getattr(part, name) for part in (block, *beside)) for name in ("size", "missing"))
        self.free_blocks.append(Block(block.small, block.segment, start, size, missing))

    def empty_cache(self) -> None:
        """Give back the segments of which nothing is taken; of those that grow, all pages of which nothing is."""
        for block in [*self.free_blocks]:
            if self.expandable_segments:
                page = _page(block.small)
                gone = max(0, block.end // page * page - _up_to(block.start, page) - block.missing)
                block.missing += gone
                self._reserve(-gone)
            elif block.size == self.segments[block.segment]:
                self.free_blocks.remove(block)
                self._reserve(-block.size)

    def mark(self, name: str) -> None:
        """Note the peaks since the last mark under a name."""
        self.marks.append((name, self.peak_alive, self.peak_reserved))
        self.peak_alive, self.peak_reserved = self.alive, self.reserved

    def _segment(self, small: bool, size: int) -> Block:
        given = 2 * MIB if small else 20 * MIB if size < 10 * MIB else _up_to(size, 2 * MIB)
        number = max(self.segments, default=0) + 1
        self.segments[number] = given
        self._reserve(given)
        return Block(small, number, 0, given)

    def _grown(self, small: bool, size: int) -> Block:
        number = 0 if small else 1
        end = self.segments.get(number, 0)
        last = next((block for block in self.free_blocks if block.segment == number and block.end == end), None)
        if last is None:
            last = Block(small, number, end, 0)
        else:
            self.free_blocks.remove(last)
        given = _up_to(last.start + size, _page(small)) - end
        self.segments[number] = end + given
        self._reserve(given + last.missing)
        return Block(small, number, last.start, last.size + given)

    def _reserve(self, size: int) -> None:
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)


def _page(small: bool) -> int:
    """By how much an expandable segment grows."""
    return 2 * MIB if small else 20 * MIB


def _up_to(size: int, unit: int) -> int:
    return -(-size // unit) * unit


# ---- tensors without contents


class Simulated(TorchDispatchMode):
    """Asks an allocator for the memory of every tensor that is made, and answers where contents are asked for."""

    def __init__(self, allocator: Allocator) -> None:
        super().__init__()
        self.allocator = allocator
        self.counts = True
        self._blocks: dict[int, Block] = {}
        allocator.malloc(WORKSPACE)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function in (aten._local_scalar_dense.default, aten.item.default):
            return {torch.bool: True}.get(args[0].dtype, 1.0 if args[0].is_floating_point() else 1)
        if function is aten.nonzero.default:  # as if all were zero: nothing is amiss
            return torch.empty(0, args[0].ndim, dtype=torch.int64)
        if function is aten._unique2.default:  # as if all were different
            return tuple(torch.empty_like(args[0]) for _ in range(3))
        if torch.is_inference_mode_enabled() and function.namespace == "aten":
            with self:  # elsewhere torch has taken it apart before it asks here
                parts = function.decompose(*args, **(kwargs or {}))
            if parts is not NotImplemented:
                return parts
        copies = [self.allocator.malloc(tensor.nbytes) for tensor in _copied(function, args)]
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and self.counts:
                self._count(tensor.untyped_storage())
        for copy in copies:
            self.allocator.free(copy)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._blocks and storage.nbytes():
            self._blocks[key] = self.allocator.malloc(storage.nbytes())
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.allocator.free(self._blocks.pop(key))

    def on_the_host(self, function: Callable) -> Callable:
        """Return the function, of whose tensors none are on the card."""

        def uncounted(*args: Any, **named: Any) -> Any:
            self.counts = False
            try:
                return function(*args, **named)
            finally:
                self.counts = True

        return uncounted


class OnTheCPU(TorchFunctionMode):
    """Takes the CPU where a tensor shall be on a card; what a device is called stays."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        def here(value: Any) -> Any:
            on_card = isinstance(value, str | torch.device) and str(value).startswith("cuda")
            return torch.device("cpu") if on_card else value

        if function is torch.device:
            return function(*args, **(kwargs or {}))
        return function(*map(here, args), **{name: here(value) for name, value in (kwargs or {}).items()})


def _copied(function: Any, args: tuple) -> list[Tensor]:
    """What cuDNN's convolutions copy into their memory layout for the time of the call."""
    number = {aten.convolution.default: 2, aten.convolution_backward.default: 3}.get(function, 0)
    tensors = [tensor for tensor in args[:number] if tensor.ndim == 4]
    layout = _layout(*tensors)
    return [tensor for tensor in tensors if not tensor.is_contiguous(memory_format=layout)]


def _layout(*tensors: Tensor) -> torch.memory_format:
    """cuDNN's: channels last where one of them is that and not plain."""
    last = torch.channels_last
    some = any(t.ndim == 4 and t.is_contiguous(memory_format=last) and not t.is_contiguous() for t in tensors)
    return last if some else torch.contiguous_format


def _fail(line: str) -> None:
    raise RuntimeError(line)


def _converted(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`nn.Module._apply`, which swaps tensors in a way that those without contents refuse."""
    for part in module.modules() if recurse else [module]:
        for weight in filter(lambda weight: weight is not None, part._parameters.values()):
            weight.data = function(weight.data)
        part._buffers.update({n: function(buffer) for n, buffer in part._buffers.items() if buffer is not None})
    return module


@contextlib.contextmanager
def simulated(machine: Machine, others: int = 0, expandable_segments: bool = False) -> Iterator[Allocator]:
    """Within it tensors have no contents, and the allocator counts them as if they were on a card of this machine.

    They say that they are on the CPU. Where CUDA computes otherwise it is as there: norms are float32 under autocast
    and have plain layouts, cuDNN chooses that of convolutions, AdamW takes all weights at once.

    Args:
        others: bytes of the card that other processes have.
    """
    allocator, autocast = Allocator(expandable_segments), torch.autocast.__init__
    fake, mode = FakeTensorMode(), Simulated(allocator)
    group_norm, layer_norm = F.group_norm, F.layer_norm

    def wide(x: Tensor) -> Tensor:
        return x.float() if torch.is_autocast_enabled("cpu") else x

    def group(x: Tensor, *others: Any, **named: Any) -> Tensor:
        cast = wide(x)  # lives as long as what is made of it
        return group_norm(cast.contiguous(), *others, **named)

    def layer(x: Tensor, *others: Any, **named: Any) -> Tensor:
        return layer_norm(wide(x), *others, **named)

    def half(self: torch.autocast, device_type: str, dtype: Any = None, enabled: bool = True, **named: Any) -> None:
        autocast(self, "cpu", torch.bfloat16, enabled=enabled, **named)  # as many bytes as fp16

    properties = SimpleNamespace(name=machine.name, total_memory=machine.memory)
    card = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: machine.devices,
        "get_device_capability": lambda _=None: machine.capability,
        "get_device_name": lambda _=None: machine.name,
        "get_arch_list": lambda: [],
        "get_device_properties": lambda _=None: properties,
        "mem_get_info": lambda _=None: (machine.memory - others - CONTEXT - allocator.reserved, machine.memory),
        "empty_cache": allocator.empty_cache,
    }
    with contextlib.ExitStack() as stack:
        for place, name, stand_in in (
            *((torch.cuda, name, stand_in) for name, stand_in in card.items()),
            (F, "group_norm", group),
            (F, "layer_norm", layer),
            (torch.autocast, "__init__", half),
            (torch._C, "_conv_determine_backend_memory_format", lambda x, weight, _: _layout(x, weight)),
            (sys.modules["torch.optim.adam"], "_default_to_fused_or_foreach", lambda *_, **__: (False, True)),
            (nn.Module, "_apply", _converted),
            (nn.init, "_no_grad_trunc_normal_", lambda tensor, *_, **__: tensor),  # it draws until it is content
            (L.LightningModule, "log", lambda *_, **__: None),  # its meters are no plain tensors
            (DiffusionPipeline, "_execution_device", torch.device("cuda")),
            (Previews, "keep", lambda *_: None),
            (rae_module, "weights_digest", lambda *_: ""),
            (previews, "log", _fail),  # which a training would only be told
            (FiniteSteps, "_keep", mode.on_the_host(FiniteSteps._keep)),
        ):
            stack.enter_context(patch.object(place, name, stand_in))
        stack.enter_context(patch.object(FakeTensorMode, "__deepcopy__", lambda self, _: self, create=True))
        stack.enter_context(fake)
        stack.enter_context(mode)
        stack.enter_context(OnTheCPU())
        yield allocator


@contextlib.contextmanager
def measured(machine: Machine, others: int = 0, expandable_segments: bool = False) -> Iterator[Any]:
    """The same on the card that is there, of which no more is used than that machine's has.

    Expandable segments are what the environment says, before torch starts.
    """
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (machine.memory - others - CONTEXT) / total))
    marks: list[tuple[str, int, int]] = []

    def mark(name: str) -> None:
        marks.append((name, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
        torch.cuda.reset_peak_memory_stats()

    with patch.object(Previews, "keep", lambda *_: None):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        yield SimpleNamespace(marks=marks, mark=mark)


# ---- stages


@dataclass(frozen=True)
class Case:
    """What a stage is run with: a machine, its preset, and what was asked for on the command line."""

    machine: Machine
    preset: Preset
    on_paper: bool
    changes: dict[str, Any]
    """of the stage's numbers: batch_size, gradient_checkpointing"""

    def number(self, name: str, usual: Any) -> Any:
        given = self.changes.get(name)
        return usual if given is None else given


class Phases(L.Callback):
    """Marks the ends of training steps, validation and previews."""

    def __init__(self, card: Any, grids: Previews) -> None:
        self.card, self.grids = card, grids

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.card.mark("training")

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.card.mark("validation")
        self.grids.on_train_epoch_end(trainer, module)
        self.card.mark("previews")


def fit(card: Any, case: Case, module: L.LightningModule, batch: dict[str, Any], grids: Previews) -> None:
    """Three steps, a validation and a grid of previews by Lightning's Trainer, as in one of the machine's processes."""
    several = case.machine.devices > 1  # then DDP keeps the gradients once more, in the buckets that it sends
    bucket = sum(w.nbytes for w in module.parameters() if w.requires_grad) if several else 0
    kept = torch.empty(bucket, dtype=torch.uint8, device="cuda")
    trainer = L.Trainer(
        accelerator="cpu" if case.on_paper else "gpu",
        devices=1,
        precision="16-mixed" if case.machine.kind == "t4" and not case.on_paper else "bf16-mixed",
        max_epochs=1,
        num_sanity_val_steps=0,
        callbacks=[Phases(card, grids)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader([batch] * 3, batch_size=None), DataLoader([batch], batch_size=None))
    del kept


class Images:
    """A folder of images without contents."""

    channels = 3

    def __init__(self, count: int, size: int) -> None:
        self.count, self.image_size = count, (size, size)

    def __len__(self) -> int:
        return self.count

    def get_batch(self, rows: Any) -> dict[str, Tensor]:
        count = len(rows)
        return {
            "images": torch.zeros(count, self.channels, *self.image_size, dtype=torch.uint8),
            "labels": torch.zeros(count, dtype=torch.int64),
            "index": torch.arange(count),
        }

    def few(self, count: int) -> dict[str, Tensor]:
        return self.get_batch(range(count))


class Features:
    """Stands for a ViT-L whose features were computed before training."""

    channels, digest = 1024, ""

    def to(self, device: Any) -> "Features":
        return self


def fine_tuning(card: Any, case: Case, recipe: str) -> str:
    preset, size = case.preset, case.preset.image_size
    batch_size = case.number("batch_size", preset.vavae_batch_size)
    model = vavae(preset.vavae_size, condition_dim=32, num_conditions=PEOPLE)
    # from the first step on, what begins later: the discriminator
    numbers = {"lr": 1e-4, **LOSSES[recipe], "disc_start": 0}
    checkpointing = _needs_checkpointing(model, numbers, batch_size, size, lambda line: None)
    numbers["gradient_checkpointing"] = case.number("gradient_checkpointing", checkpointing)
    lpips = LPIPS() if numbers.get("perceptual_weight") else None
    module = VAVAEModule(model, **numbers, lpips=lpips, foundation=Features())
    images = Images(1000, size)
    batch = images.few(batch_size)
    if numbers.get("vf_weight"):
        grid = size // model.downsampling
        batch["foundation"] = torch.zeros(batch_size, Features.channels, grid, grid, dtype=torch.float16)
    fit(card, case, module, batch, ReconstructionPreviews(images.few(8), "."))
    return said_of(batch_size, numbers["gradient_checkpointing"])


def said_of(batch_size: int, checkpointing: bool) -> str:
    return f"batch {batch_size}" + (", checkpointing" if checkpointing else "")


def encoding(card: Any, case: Case) -> str:
    preset, batch_size = case.preset, case.number("batch_size", 32)
    model = vavae(preset.vavae_size, condition_dim=32, num_conditions=PEOPLE).eval()
    computing = Computing(None, "cuda", "Latents", print)
    sides = {"train": Images(3 * batch_size, preset.image_size)}
    with on_device(model, "cuda"):
        encoder = _Encoder(for_inference(model, "cuda"), sides, False, 0, torch.float32, computing)
        batches = _batches(sides["train"], [range(3 * batch_size)], batch_size, 0)
        for latents in _encoded("train", batches, encoder.fields, computing, torch.float32):
            del latents
        if case.on_paper:  # where weights cannot go back to the processor's memory
            del model, encoder
    card.mark("")
    card.mark("left behind")
    return said_of(batch_size, False)


def pipeline(case: Case, denoiser: nn.Module, conditioner: nn.Module, vae: VAVAE) -> LatentDiTPipeline:
    channels = vae.config.latent_channels
    vae.register_to_config(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    pipe = LatentDiTPipeline(vae, denoiser, conditioner, make_solver(), {f"ID_{k}": k for k in range(PEOPLE)})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def denoising(case: Case) -> tuple[nn.Module, nn.Module, VAVAE]:
    preset = case.preset
    vae = vavae(preset.vavae_size, condition_dim=32, num_conditions=PEOPLE).eval()
    side = preset.image_size // vae.downsampling
    denoiser = make_denoiser({**preset.dit, "in_channels": vae.config.latent_channels, "input_size": (side, side)})
    return denoiser, ClassConditioner(PEOPLE, denoiser.config.hidden_size), vae


def dit(card: Any, case: Case) -> str:
    denoiser, conditioner, vae = denoising(case)
    batch_size = case.number("batch_size", case.preset.dit_batch_size)
    checkpointing = case.number("gradient_checkpointing", False)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()

    if case.preset.dit_init:
        add_lora(denoiser, case.preset.dit_init["lora_rank"])

    def make(network: nn.ModuleDict) -> Tensor:  # as in `runs.train_dit`
        pipe = pipeline(case, network["denoiser"], network["conditioner"], vae.to("cuda"))
        noise = pipe.noise(0, torch.arange(64))
        return pipe([0] * 64, 2, case.preset.guidance_scale, latents=noise, output_type="pt").images

    batch = {
        "latents": torch.zeros(batch_size, *denoiser.latent_shape),
        "labels": torch.zeros(batch_size, dtype=torch.int64),
        "index": torch.arange(batch_size),
    }
    fit(card, case, DiffusionModule(denoiser, conditioner), batch, SamplePreviews(make, 8, ".", [1]))
    return said_of(batch_size, checkpointing)


def lightningdit(card: Any, case: Case) -> str:
    """Low-rank additions to the published XL."""
    xl = {"size": "XL", "patch_size": 1}
    return dit(card, replace(case, preset=going_on(case.preset, xl, {"lora_rank": 16}, case.machine)))


def sampling(card: Any, case: Case) -> str:
    denoiser, conditioner, vae = denoising(case)
    pipe = pipeline(case, denoiser, conditioner, vae).to("cuda")
    count, seen = case.number("batch_size", 256), []
    make = pipe.make
    pipe.make = lambda labels, *others, **named: seen.append(len(labels)) or make(labels, *others, **named)
    noise = pipe.noise(0, torch.arange(count))
    pipe(
        [0] * count,
        2,
        case.preset.guidance_scale,
        latents=noise,
        output_type="pt",
        batch_size=case.changes.get("batch_size"),
    )
    card.mark("")
    return f"{max(seen)} at once"


def evaluation(card: Any, case: Case) -> str:
    images = Images(1000, case.preset.image_size)
    reconstruct(denoising(case)[2].to("cuda"), Images(96, case.preset.image_size))
    card.mark("reconstructions")
    classifier = train_classifier(images, PEOPLE, steps=2, device="cuda", progress=False)
    card.mark("classifier")
    classifier.judge(images)
    card.mark("judging")
    return "batch 32, 64, 256"


def rae_decoder(card: Any, case: Case) -> str:
    """`experiment=rae_decoder`."""
    config = compose(read_command_line(["experiment=rae_decoder", "data.data_dir=."]))
    batch_size = case.number("batch_size", config.recipe.train.batch_size)
    rae = RAE(**RAE_SIZES["ViTXL"])
    numbers = {"perceptual_weight": 1.0, "disc_weight": 0.75}
    checkpointing = case.number("gradient_checkpointing", False)
    module = RAEDecoderModule(rae, **numbers, gradient_checkpointing=checkpointing, lpips=LPIPS())
    channels, height, width = rae.latent_shape
    images = Images(1000, rae.image_size)
    batch = images.few(batch_size)
    batch["tokens"] = torch.zeros(batch_size, channels, height, width, dtype=torch.float16)
    fit(card, case, module, batch, ReconstructionPreviews(images.few(8), "."))
    return said_of(batch_size, checkpointing)


def text_to_image(card: Any, case: Case) -> str:
    """`experiment=text_to_image`: CLIP ViT-B/32's texts and Stable Diffusion's latents, both encoded before."""
    config = compose(read_command_line(["experiment=text_to_image", "data.dataset_name=shapes"]))
    batch_size = case.number("batch_size", config.recipe.train.batch_size)
    objective = make_objective("epsilon")
    denoiser = TextDiT(input_size=32, in_channels=4, patch_size=2, hidden_size=768, depth=16, num_heads=12)
    checkpointing = case.number("gradient_checkpointing", False)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    conditioner = TextConditioner(512, 512, 768)
    conditioner.empty_tokens.fill_(1.0)  # zeros stand for an empty prompt that is not known
    vae = StableDiffusionVAE(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
    ).eval()

    def states(count: int) -> dict[str, Tensor]:
        return {
            "text_tokens": torch.zeros(count, 77, 512, dtype=torch.float16),
            "text_mask": torch.ones(count, 77, dtype=torch.bool),
            "text_pooled": torch.zeros(count, 512, dtype=torch.float16),
        }

    def make(network: nn.ModuleDict) -> Tensor:  # as in `text_to_image.train_text_to_image`
        scheduler = make_solver("ddim", objective)  # dpm++ wants numbers
        pipe = TextToImagePipeline(vae.to("cuda"), None, None, network["denoiser"], network["conditioner"], scheduler)
        noise = torch.zeros(16, *denoiser.latent_shape, device="cuda")
        return pipe.make(TextStates(*states(16).values()).to("cuda"), noise, None, 2, 7.5)

    batch = {"latents": torch.zeros(batch_size, 4, 32, 32), "index": torch.arange(batch_size), **states(batch_size)}
    module = DiffusionModule(denoiser, conditioner, objective)
    fit(card, case, module, batch, SamplePreviews(make, 4, ".", [1]))
    return said_of(batch_size, checkpointing)


STAGES: dict[str, Callable[[Any, Case], str]] = {
    "vavae_light": lambda card, case: fine_tuning(card, case, "light"),
    "vavae_full": lambda card, case: fine_tuning(card, case, "full"),
    "encoding": encoding,
    "dit": dit,
    "lightningdit": lightningdit,
    "sampling": sampling,
    "evaluation": evaluation,
    "rae_decoder": rae_decoder,
    "text_to_image": text_to_image,
}
LAUNCHED = ("vavae_light", "vavae_full", "dit", "lightningdit", "rae_decoder", "text_to_image")
"""Where there are several cards these run in processes of their own, beside the notebook's, which has a context too."""


# ---- the table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=[*MACHINES])
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=[*STAGES])
    parser.add_argument("--image_size", type=int, help="pixels, in place of the preset's")
    parser.add_argument("--batch_size", type=int, help="in place of the preset's or the experiment's")
    parser.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction)
    parser.add_argument("--expandable_segments", action="store_true", help="as PYTORCH_CUDA_ALLOC_CONF sets it")
    parser.add_argument("--others_gib", type=float, default=0.0, help="what else other processes hold of the card")
    parser.add_argument("--measure", action="store_true", help="on the card that is there, of that machine's memory")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    changes = {"batch_size": options.batch_size, "gradient_checkpointing": options.gradient_checkpointing}
    rows = [("machine", "stage", "with", "alive", "reserved", "others", "usable", "")]
    for machine_name in options.machines:
        machine = MACHINES[machine_name]
        preset = find_preset(vavae="f16d32", machine=machine)
        if options.image_size:
            preset = replace(preset, image_size=options.image_size)
        case = Case(machine, preset, not options.measure, changes)
        for stage in options.stages:
            launched = machine.devices > 1 and stage in LAUNCHED
            others = int(options.others_gib * GIB) + (CONTEXT if launched else 0)
            on = measured if options.measure else simulated
            with on(machine, others, options.expandable_segments) as card:
                said = STAGES[stage](card, case)
            for phase, alive, reserved in card.marks:
                sizes = [f"{size / GIB:.2f}" for size in (alive, reserved, others, machine.memory)]
                name = f"{stage} {phase}".strip()
                rows.append((machine_name, name, said, *sizes, verdict(reserved, others, machine.memory)))
            print("\n".join(aligned(rows[-len(card.marks) :])), file=sys.stderr, flush=True)
    print("\n".join(aligned(rows)))


def verdict(reserved: int, others: int, usable: int) -> str:
    if reserved + others + CONTEXT > usable:
        return "does not fit"
    return "fits" if reserved + ROOM <= usable else "tight"


if __name__ == "__main__":
    main()
