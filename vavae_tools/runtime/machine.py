"""Which devices there are here, whether this torch can use them, and how networks compute on them.

What measures and compares images is computed in float32, whatever precision the networks around it compute in.
"""

import ctypes
import functools
import gc
import itertools
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from vavae_tools.runtime.console import print_beside_bars
from vavae_tools.runtime.errors import UserError, check_known

Model = TypeVar("Model", bound=nn.Module)
P, R = ParamSpec("P"), TypeVar("R")
Log = Callable[[str], None]

MIN_FREE_BYTES = 2**30  # less than CUDA's context, its libraries' workspaces and the smallest training take
_MEMORY_FAULT = re.compile(
    r"CUDA[\w ':]*out of memory|(CUBLAS|CUDNN|CUSPARSE|CUSOLVER)_STATUS_ALLOC_FAILED"
    r"|DefaultCPUAllocator: (can't allocate|not enough) memory|HIP out of memory",
    re.IGNORECASE,
)

PRECISIONS = {"32": "float32", "16": "fp16", "bf16": "bf16"}  # as people type them → as messages call them
HALF_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16}
_ALSO = {"fp16": "16", "fp32": "32", "float32": "32", "no": "32", "False": "32"}  # YAML reads no as false


# ---- devices
@dataclass(frozen=True)
class Machine:
    """What training may use here."""

    kind: str  # "cpu", "t4" (a T4 or another card without bf16) or "ampere" (compute capability from 8.0 on: bf16)
    devices: int
    name: str
    memory: int = 0  # bytes of each GPU
    capability: tuple[int, int] = ()  # CUDA's, of the least of the GPUs; by default the kind's
    unusable: str = ""  # a card that is there and that this torch has no code for

    def __post_init__(self) -> None:
        of_kind = {"cpu": (0, 0), "t4": (7, 5), "ampere": (8, 0)}
        object.__setattr__(self, "capability", self.capability or of_kind[self.kind])

    def __str__(self) -> str:
        return f"{self.devices} × {self.name}" if self.kind != "cpu" else f"CPU, {os.cpu_count()} cores"


def find_machine() -> Machine:
    """Return the devices that this torch can use; warn of a card it has no code for (a P100 on Kaggle's image)."""
    if not torch.cuda.is_available():
        return Machine("cpu", 1, "CPU")
    cards = range(torch.cuda.device_count())
    capability, card = min((torch.cuda.get_device_capability(card), card) for card in cards)  # the least sets the pace
    name, (major, minor) = torch.cuda.get_device_name(card), capability
    built_for = [int(arch.split("_")[1].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch.startswith("sm_")]
    if built_for and not any(arch // 10 == major and arch % 10 <= minor for arch in built_for):
        unusable = f"{name} (sm_{major}{minor})"
        found = f"torch {torch.__version__} of this image has no code for a {unusable}: the CPU is taken"
        warnings.warn(f"{found}. Switch to another accelerator, such as Kaggle's GPU T4 x2", stacklevel=2)
        return Machine("cpu", 1, "CPU", unusable=unusable)
    # is_bf16_supported() is True on a T4, where it is emulated and slow: the capability decides
    memory = min(torch.cuda.get_device_properties(card).total_memory for card in cards)
    return Machine("ampere" if major >= 8 else "t4", len(cards), name, memory, capability)


def find_device() -> str:
    """Return the device to run a model on here, "cuda" or "cpu"."""
    return "cpu" if find_machine().kind == "cpu" else "cuda"


def device_of(number: int) -> str:
    """Take the device of process number 0, 1, … on this machine, and return it: "cuda:0", …, or "cpu"."""
    if find_device() == "cpu":
        return "cpu"
    take_card(number)
    return f"cuda:{number}"


def take_card(number: int = 0) -> None:
    """Let "cuda" mean this card, if any; raise where another process leaves less than `MIN_FREE_BYTES`."""
    if not torch.cuda.is_available():
        return
    if number >= torch.cuda.device_count():
        found = f"There is no GPU for process {number + 1} on this machine, which has {torch.cuda.device_count()}"
        raise UserError(f"{found}: start as many processes as there are GPUs")
    try:
        if number:
            torch.cuda.set_device(number)
        free, total = torch.cuda.mem_get_info(number)
        room = free + torch.cuda.memory_reserved(number)
        what = f"{free / 2**30:.1f} of its {total / 2**30:.1f} GiB free"
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        if not any(word in reason.lower() for word in ("out of memory", "busy")):
            raise
        room, what = 0, f"no room for this process ({reason})"
    if room < MIN_FREE_BYTES:
        holder = "another process holds it, such as a notebook's other kernel or a run (nvidia-smi names it)"
        raise UserError(
            f"GPU {number} has {what}: {holder}. End that one, or restart the notebook's kernels, and try again"
        )


def machine_of(device: str | torch.device) -> Machine:
    """Return what there is to compute on where this is the device."""
    return find_machine() if torch.device(device).type == "cuda" else Machine("cpu", 1, "CPU")


def release_memory() -> None:
    """Give back to the card what this process keeps of its memory without a tensor in it."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with suppress(RuntimeError):  # of an earlier fault of the card
            torch.cuda.empty_cache()


def is_memory_fault(error: BaseException) -> bool:
    """Whether torch, CUDA's libraries or Python say that memory is too small, or something that they caused."""
    return any(
        isinstance(link, (torch.OutOfMemoryError, MemoryError))
        or (isinstance(link, RuntimeError) and _MEMORY_FAULT.search(str(link)) is not None)
        for link in (error, error.__cause__)
    )


def peak_memory(device: torch.device) -> int:
    """Return the bytes that a GPU's tensors took at most since training began, or else this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with suppress(ImportError):  # Windows has none
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


def keep_freed_memory() -> None:
    """Let this process keep the memory that a step on a CPU frees, where glibc would give it back each time."""
    with suppress(OSError, AttributeError):
        adjust = ctypes.CDLL(None).mallopt
        adjust(-4, 0)  # M_MMAP_MAX: none of the blocks comes from the system alone
        adjust(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: the heap's end is not given back


@contextmanager
def on_device(model: Any, device: str | torch.device) -> Iterator[None]:
    """Have a model (an `nn.Module`, or what has `device` and `to`) on a device, and afterwards where it was."""
    module = isinstance(model, nn.Module)
    home = (
        next(itertools.chain(model.parameters(), model.buffers()), torch.zeros(())).device if module else model.device
    )
    try:
        model.to(device)
        yield
    finally:
        model.to(home)
        if torch.device(device).type == "cuda":
            release_memory()


# ---- precisions
def precision_on(machine: Machine, name: str | None = None) -> str:
    """Return a precision's name in `PRECISIONS`; None: fp16 on a T4, bf16 on newer cards, float32 on a CPU."""
    if name is None:
        return {"cpu": "32", "t4": "16", "ampere": "bf16"}[machine.kind]
    name = _ALSO.get(str(name), str(name))
    check_known("precision", name, PRECISIONS)
    if name == "bf16" and machine.kind == "t4":
        raise UserError(f"{machine.name} has no bf16 (it is emulated and slow): use --precision 16 or 32")
    if name == "16" and machine.kind == "cpu":
        raise UserError("A CPU has no fp16: use --precision 32")
    return name


def computing_in(precision: str, device: str | torch.device) -> torch.autocast:
    """Return autocast to a precision of `PRECISIONS`; "32" switches it off."""
    return torch.autocast(torch.device(device).type, HALF_DTYPES.get(precision), enabled=precision in HALF_DTYPES)


def for_inference(model: Model, device: str | torch.device) -> Model:
    """Lay the weights of convolutions out as a card takes them fastest, in place; on a CPU nothing happens."""
    return model.to(memory_format=torch.channels_last) if torch.device(device).type == "cuda" else model


@contextmanager
def trying_convolutions() -> Iterator[None]:
    """Let cuDNN keep its fastest convolutions, for many batches of one size, but under deterministic algorithms."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Computing:
    """How a frozen model goes through data once: `computing(function)`, and `.again(function)` if that is not finite.

    Args:
        precision: "32", "16" or "bf16"; None: fp16 on a card (ten bits after the point, bf16 has seven), else float32.
        what: what it makes, such as "Latents of this VAVAE", for the line that `again` tells `log`.
    """

    def __init__(
        self, precision: str | None, device: str | torch.device, what: str, log: Log = print_beside_bars
    ) -> None:
        half = "16" if torch.device(device).type == "cuda" else "32"
        self.precision = half if precision is None else precision_on(machine_of(device), precision)
        self.device, self.what, self.log = device, what, log
        self.in_half = self.precision != "32"
        self._said = False

    def __call__(self, function: Callable[[], R]) -> R:
        with computing_in(self.precision, self.device):
            return function()

    def again(self, function: Callable[[], R]) -> R:
        """Compute in float32, and say so the first time."""
        if not self._said:
            self._said = True
            self.log(f"{self.what} are not finite in half precision: such batches are computed again in float32")
        with computing_in("32", self.device):
            return function()


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate what half precision makes wrong (an SSIM of 1 became 0.66): it computes in float32, without autocast."""

    @functools.wraps(function)
    def computed(*arguments: P.args, **named: P.kwargs) -> R:
        kinds = {value.device.type for value in (*arguments, *named.values()) if isinstance(value, Tensor)}
        with torch.autocast(next(iter(kinds), "cpu"), enabled=False):
            return function(*map(_float32, arguments), **{name: _float32(value) for name, value in named.items()})

    return computed


def _float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value
