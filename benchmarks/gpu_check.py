"""What the package claims of GPUs, tried on one in about eight minutes: a line for each check, one JSON at the end.

    python -m benchmarks.gpu_check > gpu_check.json
    python -m benchmarks.gpu_check --device cpu --tiny      # without a GPU: whether the script itself runs

Checks that stand for a T4 may take no more memory than one process has there, on whatever card they run. A step's
`waits` are the lines where it made the processor wait for the GPU. `identical` compares a training that was resumed
with one that was not interrupted, bit by bit.
"""

import argparse
import gc
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

import vavae_tools as vt
from vavae_tools.autoencoders.lpips import LPIPS
from vavae_tools.autoencoders.vavae import VAVAE, vavae
from vavae_tools.checkpoints.formats import read_any_format
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DiT, DiT_SIZES
from vavae_tools.diffusion.layers import SwiGLU
from vavae_tools.diffusion.solvers import make_solver
from vavae_tools.evaluation.metrics import ssim
from vavae_tools.pipelines.classes import LatentDiTPipeline
from vavae_tools.runtime.machine import computing_in, find_machine, for_inference, trying_convolutions
from vavae_tools.training.autoencoder_module import VAVAEModule
from vavae_tools.training.callbacks.throughput import peak_flops
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.devices import allow_tf32, compiles, quiet_lightning

GIB = 2**30
T4 = 14.56 * GIB
"""What a T4 has for one process."""
PEOPLE = 31
TINY = {"hidden_size": 64, "depth": 2, "num_heads": 2}

Result = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What is checked, and how large."""

    device: str
    tiny: bool

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def bf16(self) -> bool:
        return self.on_gpu and find_machine().kind == "ampere"

    @property
    def fp16(self) -> str:
        """fp16, of which a CPU has none to train in."""
        return "16" if self.on_gpu else "32"

    @property
    def half(self) -> str:
        """The precision that this card trains in."""
        return "bf16" if self.bf16 else self.fp16

    @property
    def roomy(self) -> bool:
        return self.on_gpu and find_machine().memory > 30 * GIB

    @property
    def image_size(self) -> int:
        return 64 if self.tiny else 256

    def batch(self, size: int) -> int:
        return min(size, 4) if self.tiny else size

    def vavae(self, **changes: Any) -> VAVAE:
        torch.manual_seed(0)
        return vavae("small" if self.tiny else "f16d32", condition_dim=32, num_conditions=PEOPLE, **changes)

    def dit(self, size: str, **changes: Any) -> tuple[DiT, ClassConditioner]:
        torch.manual_seed(0)
        numbers = TINY if self.tiny else DiT_SIZES[size]
        return DiT(**{**numbers, **changes}), ClassConditioner(PEOPLE, numbers["hidden_size"])

    def wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


# ---- a training's steps


class Watch(L.Callback):
    """Times steps from the `first` on, and lists where the one after it makes the processor wait for the GPU."""

    def __init__(self, setup: Setup, first: int) -> None:
        self.setup, self.first, self.milliseconds = setup, first, 0.0
        self.waits: list[str] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx) -> None:
        if batch_idx == self.first:
            self.setup.wait()
            self.began = time.perf_counter()
        if self.setup.on_gpu and batch_idx == self.first + 1:
            self.caught = warnings.catch_warnings(record=True)
            self.listed = self.caught.__enter__()
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if self.setup.on_gpu and batch_idx == self.first + 1:
            torch.cuda.set_sync_debug_mode("default")
            self.caught.__exit__(None, None, None)
            waits = [warning for warning in self.listed if "synchronizing" in str(warning.message)]
            self.waits = [f"{Path(warning.filename).name}:{warning.lineno}" for warning in waits]
        if batch_idx >= self.first:
            self.setup.wait()
            self.milliseconds = 1000 * (time.perf_counter() - self.began) / (batch_idx - self.first + 1)


def steps_of(setup: Setup, module: L.LightningModule, batch: dict[str, Tensor], count: int, first: int, **of_trainer):
    """Train on one batch again and again → what its steps take, and whether what was trained is finite."""
    accelerator = "gpu" if setup.on_gpu else "cpu"
    settings = module.trainer_settings(accelerator=accelerator, devices=1, **of_trainer)
    allow_tf32(settings)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
    watch = Watch(setup, first)
    # steps that are logged read their values: none of those that are measured
    trainer = L.Trainer(**{**settings, **quiet, "log_every_n_steps": count}, max_steps=count, callbacks=[watch])
    trainer.fit(module, DataLoader([batch] * count, batch_size=None))
    shown = {k: v for k, v in trainer.callback_metrics.items() if "loss" in k or "skipped" in k}
    return {
        "ms_a_step": watch.milliseconds,
        "waits_in_a_step": watch.waits,
        "weights_finite": all(bool(weight.isfinite().all()) for weight in module.parameters()),
        **{name: float(value) for name, value in shown.items()},
    }


def some_batch(count: int, **tensors: Tensor) -> dict[str, Tensor]:
    return {**tensors, "labels": torch.arange(count) % PEOPLE, "index": torch.arange(count)}


def dit_steps(setup: Setup, size: str, count: int, precision: str, compile: bool = False) -> Result:
    count = setup.batch(count)
    module = DiffusionModule(*setup.dit(size, input_size=16, in_channels=32), compile=compile)
    batch = some_batch(count, latents=torch.randn(count, 32, 16, 16))
    operations = module.flops_of_a_sample(batch) * count
    result = steps_of(setup, module, batch, 14, 6, precision=precision)
    peak = peak_flops(torch.device("cuda"), precision) if setup.on_gpu else None
    utilisation = operations / result["ms_a_step"] * 1000 / peak if peak else None
    return {**result, "tflop_a_step": operations / 1e12, "utilisation": utilisation}


class Features:
    """Stands for a ViT-L whose features were computed before training."""

    channels, digest = 1024, ""

    def to(self, device: torch.device) -> None:
        pass


def vavae_steps(setup: Setup, count: int, full: bool, gradient_checkpointing: bool) -> Result:
    count = setup.batch(count)
    losses: dict[str, Any] = {"perceptual_weight": 1.0, "gradient_weight": 0.0, "spectral_weight": 0.0}
    losses |= {"vf_weight": 0.1, "disc_weight": 0.5, "disc_start": 1, "foundation": Features()}
    losses["lpips"] = LPIPS((4, 4, 8, 8, 8)) if setup.tiny else LPIPS()
    model = setup.vavae()
    module = VAVAEModule(model, gradient_checkpointing=gradient_checkpointing, **(losses if full else {}))
    size, grid = setup.image_size, setup.image_size // model.downsampling
    images = torch.randint(256, (count, 3, size, size), dtype=torch.uint8)
    features = torch.randn(count, Features.channels, grid, grid).half()
    return steps_of(setup, module, some_batch(count, images=images, foundation=features), 8, 3, precision=setup.fp16)


# ---- images


def pipeline(setup: Setup) -> LatentDiTPipeline:
    channels = setup.vavae().config.latent_channels
    model = setup.vavae(latents_mean=[0.0] * channels, latents_std=[1.0] * channels)
    denoiser, conditioner = setup.dit("S", input_size=setup.image_size // model.downsampling, in_channels=channels)
    pipe = LatentDiTPipeline(model.eval(), denoiser.eval(), conditioner, make_solver()).to(setup.device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sampling(setup: Setup, count: int, num_steps: int) -> Result:
    """Images a second in each precision, and how far they are from float32's, in levels of 255."""
    count, num_steps = setup.batch(count), setup.batch(num_steps)
    pipe, result, reference = pipeline(setup), {}, None
    labels = torch.arange(count, device=setup.device) % PEOPLE
    noise = pipe.noise(0, torch.arange(count)).to(setup.device)
    precisions = ["32", *(["16"] if setup.on_gpu else []), *(["bf16"] if setup.bf16 else [])]
    for precision in precisions:
        pipe.make(labels, noise, 2, precision=precision)
        setup.wait()
        began = time.perf_counter()
        made = pipe.make(labels, noise, num_steps, precision=precision).cpu()
        seconds = time.perf_counter() - began
        reference = made if reference is None else reference
        flat = int((made.flatten(1).float().std(1) == 0).sum())  # black, or of another single colour
        off = (made.float() - reference.float()).abs().mean().item()
        result[precision] = {"images_a_second": count / seconds, "levels_off": off, "flat_images": flat}
    return result


def seconds_of(setup: Setup, function: Callable[[], Any], times: int = 5) -> float:
    """The least of several calls, after one that does not count."""
    taken = []
    for _ in range(times + 1):
        setup.wait()
        began = time.perf_counter()
        function()
        setup.wait()
        taken.append(time.perf_counter() - began)
    return min(taken[1:])


@torch.inference_mode()
def decoding(setup: Setup, count: int) -> Result:
    """Images a second decoded in fp16: as weights come, laid out for a card, and with convolutions tried."""
    count, result = setup.batch(count), {}
    model = setup.vavae().eval().to(setup.device)
    size, labels = setup.image_size // model.downsampling, torch.zeros(count, dtype=torch.int64, device=setup.device)
    latents = torch.randn(count, model.config.latent_channels, size, size, device=setup.device)
    vectors = model.condition_vectors(labels)
    with computing_in(setup.fp16, setup.device):
        for name, tries in (
            ("as_it_comes", nullcontext()),
            ("channels_last", nullcontext()),
            ("tried", trying_convolutions()),
        ):
            if name == "channels_last":
                for_inference(model, setup.device)
            with tries:
                result[name] = count / seconds_of(setup, lambda: model.decode(latents, condition=vectors).sample)
    return result


@torch.inference_mode()
def swiglu(setup: Setup, tokens: int) -> Result:
    """The time of a width that is no multiple of 8 (2730, of size L), by that with zeros behind it."""
    layer, tokens = SwiGLU(1024, 2730).to(setup.device), tokens // 64 if setup.tiny else tokens
    x, result = torch.randn(tokens, 1024, device=setup.device), {}
    with computing_in(setup.half, setup.device):
        for name, lacking in (("with", layer.lacking), ("without", 0)):
            layer.lacking = lacking
            result[name] = seconds_of(setup, lambda: layer(x))
    return {"times": result["without"] / result["with"]}


@torch.inference_mode()
def preview(setup: Setup, count: int) -> Result:
    """A preview's images, after an encoding in the same process."""
    pipe, half = pipeline(setup), setup.batch(count) // 2
    nobody = torch.zeros(half, dtype=torch.int64, device=setup.device)
    images = torch.zeros(half, 3, setup.image_size, setup.image_size, device=setup.device)
    pipe.vae.encode_images(images, nobody)
    kept = torch.cuda.memory_reserved() / GIB if setup.on_gpu else 0.0
    pipe([0] * setup.batch(count), num_inference_steps=1)
    return {"reserved_after_encoding_gib": kept}


def ssim_in_autocast(setup: Setup) -> Result:
    image = torch.linspace(-1, 1, 64, device=setup.device).expand(1, 3, 64, 64)
    with torch.autocast(setup.device, torch.float16 if setup.on_gpu else torch.bfloat16):
        return {"of_equal_images": ssim(image, image).item()}


# ---- whole trainings


def experiment(setup: Setup, *words: str) -> Result:
    with tempfile.TemporaryDirectory() as folder:
        return {"made": Path(vt.run_experiment(*words, f"output_dir={folder}", "callbacks.previews=1")).name}


def resumed(setup: Setup, *words: str) -> Result:
    words = ("experiment=dit_dummy", "model.dit_module.max_steps=40", "callbacks.previews=0", *words)
    words += ("callbacks.save_every_n_steps=20", f"trainer={'gpu' if setup.on_gpu else 'cpu'}", "trainer.devices=1")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        words += (f"data.latents_dir={folder}/latents",)
        vt.run_experiment(*words, f"output_dir={folder}/whole")
        shutil.copytree(folder / "whole", folder / "cut")
        (folder / "cut" / "checkpoints" / "last.ckpt").unlink()
        vt.run_experiment(*words, f"output_dir={folder}/cut", f"ckpt_path={folder}/cut/checkpoint-20")
        one, other = (_weights(folder / run / "checkpoints" / "last.ckpt") for run in ("whole", "cut"))
        apart = max((one[name].double() - other[name].double()).abs().max().item() for name in one)
    return {"identical": apart == 0, "largest_difference": apart}


def _weights(path: Path) -> dict[str, Tensor]:
    state = read_any_format(path, lambda line: None)["state_dict"]
    return {name: weight.clone() for name, weight in state.items()}  # the file goes with its folder


def two_processes(setup: Setup) -> Result:
    """Two processes with a discriminator and a gradient scaler, on one card: whether their weights stay the same."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "benchmarks.gpu_check", "--worker", "--device", setup.device]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150, check=False)
    said = sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))
    if len(said) != 2:
        return {"error": done.stderr[-300:]}
    return {"ranks": said, "identical": len({line.split("weights ")[1] for line in said}) == 1}


def one_of_two(setup: Setup) -> None:
    torch.manual_seed(0)
    rank = int(os.environ["RANK"])
    device = torch.device("cuda", 0) if setup.on_gpu else torch.device("cpu")
    model = vavae("small", condition_dim=8, num_conditions=PEOPLE)
    module = VAVAEModule(model, lr=1e-3, disc_weight=0.5, disc_start=2, disc_width=8)
    strategy = L.pytorch.strategies.DDPStrategy(
        parallel_devices=[device] * 2, process_group_backend="gloo", find_unused_parameters=True
    )
    accelerator = {"accelerator": "gpu", "precision": "16-mixed"} if setup.on_gpu else {"accelerator": "cpu"}
    trainer = L.Trainer(
        **accelerator,
        devices="auto" if setup.on_gpu else 2,
        strategy=strategy,
        max_steps=6,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    batch = some_batch(4, images=torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8))
    batch["index"] += 4 * rank
    trainer.fit(module, DataLoader([batch] * 6, batch_size=None))
    weights = sum(weight.double().abs().sum().item() for weight in module.parameters())
    print("rank", rank, "steps", trainer.global_step, "weights", weights, flush=True)


def environment(setup: Setup) -> Result:
    return {
        "torch": torch.__version__,
        "lightning": L.__version__,
        "machine": str(find_machine()),
        "compiles": compiles(None),
    }


# ---- all of it


def checks(setup: Setup) -> dict[str, tuple[Callable[[Setup], Result], bool]]:
    """Name → (check, whether it may take no more than a T4 has)."""
    precisions = ["32", *(["16"] if setup.on_gpu else []), *(["bf16"] if setup.bf16 or not setup.on_gpu else [])]
    found: dict[str, tuple[Callable[[Setup], Result], bool]] = {"environment": (environment, False)}
    for precision in precisions:
        found[f"dit_S_{precision}"] = partial(dit_steps, size="S", count=64, precision=precision), True
    words = {
        "rae_decoder": ("data=shapes", "model.rae.folder=tiny", "model.decoder_module.max_steps=8"),
        "token_dummy": ("training.max_steps=8",),
        "text_dummy": ("training.max_steps=8", "data.num_samples=64", "training.batch_size=8"),
    }
    for name, of_run in words.items():
        found[name] = (lambda setup, name=name, of_run=of_run: experiment(setup, f"experiment={name}", *of_run)), True
    found |= {
        "ssim_in_autocast": (ssim_in_autocast, True),
        "vavae_full_batch_12": (partial(vavae_steps, count=12, full=True, gradient_checkpointing=True), True),
        "vavae_light_batch_8": (partial(vavae_steps, count=8, full=False, gradient_checkpointing=False), True),
        "preview_of_64": (partial(preview, count=64), True),
        "sampling": (partial(sampling, count=32, num_steps=50), False),
        "decoding": (partial(decoding, count=32), False),
        "swiglu": (partial(swiglu, tokens=16_384), False),
        "two_processes": (two_processes, False),
        "resume": (resumed, False),
        "resume_deterministic": (lambda setup: resumed(setup, "trainer.deterministic=true"), False),
    }
    if setup.on_gpu and compiles(None):
        found["dit_S_compiled"] = partial(dit_steps, size="S", count=64, precision=setup.half, compile=True), True
        size, count = ("XL", 64) if setup.roomy else ("B", 16)
        large = partial(dit_steps, size=size, count=count, precision=setup.half)
        found[f"dit_{size}"] = large, False
        found[f"dit_{size}_compiled"] = partial(large, compile=True), False
    return found


def run(setup: Setup, check: Callable[[Setup], Result], cap: bool) -> Result:
    """What a check found, its peak of memory and its time; a fault is an answer too."""
    gc.collect()
    if setup.on_gpu:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.set_per_process_memory_fraction(min(1.0, T4 / total) if cap else 1.0)
    began = time.perf_counter()
    try:
        with redirect_stdout(sys.stderr):  # the JSON is alone in a file
            result = check(setup)
    except (Exception, SystemExit) as error:
        where = traceback.format_exc().splitlines()[-4:-1]
        result = {"error": f"{type(error).__name__}: {str(error)[:300]}", "at": where}
    if setup.on_gpu:
        result["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        result["reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    result["seconds"] = time.perf_counter() - began
    return rounded(result)


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to try the script itself")
    parser.add_argument("--seconds", type=float, default=400, help="no check is begun after these")
    parser.add_argument("--only", nargs="*", default=[""], help="checks whose names begin so")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    setup = Setup(options.device, options.tiny)
    quiet_lightning()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    if options.worker:
        return one_of_two(setup)
    began, found = time.perf_counter(), {}
    for name, (check, cap) in checks(setup).items():
        if not name.startswith(tuple(options.only)):
            continue
        late = time.perf_counter() - began > options.seconds
        found[name] = "not begun: no time left" if late else run(setup, check, cap)
        print(name, found[name], file=sys.stderr, flush=True)
    print(json.dumps({**found, "seconds": round(time.perf_counter() - began)}, indent=1))
    failed = [name for name, result in found.items() if isinstance(result, str) or "error" in result]
    if failed:
        sys.exit(f"failed or not begun: {', '.join(failed)}")


if __name__ == "__main__":
    main()
