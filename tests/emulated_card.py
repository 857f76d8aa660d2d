"""An emulated CUDA card on a torch for CPUs: numbers are real and computed on the CPU, tensors are on `cuda:0`.

    card = insert("t4")  # before torch is imported
    torch.ones(2, device="cuda") + torch.ones(2)  # RuntimeError: Expected all tensors to be on the same device …
    card.heard  # where the processor waited for the card, what was copied, what computed in half precision

Torch's own: autograd, autocast, gradient scalers, fused and foreach optimisers, pinned memory. Not
emulated: several cards, compilation (`torch.compile` does nothing), the card's kernels (attention is the plain one,
numbers round as on a CPU, a T4 computes in bf16 too), memory, speed, streams and the card's random numbers.
"""

import ctypes
import hashlib
import importlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
CARDS = {"t4": ("Tesla T4", (7, 5), 15_828_320_256), "a100": ("NVIDIA A100-SXM4-40GB", (8, 0), 42_297_786_368)}
"""Name, compute capability and bytes."""
_ROOT = Path(__file__).parents[1]
_PACKAGE = f"{_ROOT / 'vavae_tools'}/"
_LISTENER = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, ctypes.c_int64)


class Heard(NamedTuple):
    """Something that the card was asked for."""

    kind: str
    """"wait" (the processor waits for the card), "copy", or "half" (a half-precision operation in `float32_only`)."""
    what: str
    bytes: int
    where: str
    """file:line of the package, and of what it called; empty in autograd's own thread."""


class Card:
    """The card that was inserted, and what it heard so far."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.heard: list[Heard] = []
        self._library, self._listener = library, _LISTENER(self._listen)
        library.tell(self._listener)

    def _listen(self, kind: bytes, what: bytes, size: int) -> None:
        self.heard.append(Heard(kind.decode(), what.decode(), size, _where()))

    def counted(self, kind: str, since: int = 0) -> Counter[str]:
        """ "what @ where" of a kind → how often, from `heard[since]` on."""
        return Counter(f"{heard.what} @ {heard.where}" for heard in self.heard[since:] if heard.kind == kind)

    def synchronized(self, *_: Any) -> None:
        self._listen(b"wait", b"synchronize", 0)

    @contextmanager
    def float32_only(self) -> Iterator[None]:
        """Hear of each operation on half-precision tensors; to convert them is none."""
        self._library.expect_float32(1)
        try:
            yield
        finally:
            self._library.expect_float32(-1)


def insert(kind: str) -> Card:
    """Put a card of `CARDS` into this process, which has not imported torch yet; it stays there."""
    if "torch" in sys.modules:
        raise RuntimeError("the emulated card must be inserted before torch is imported")
    library = ctypes.CDLL(str(build()))
    card = Card(library)
    import torch

    library.insert()
    _answer(card, *CARDS[kind])
    torch.nn.Module.compile = _always(None)
    torch.compile = lambda model=None, **_: model or (lambda function: function)
    # whole storages, as deepcopy and torch.load move them: torch for CPUs has them on the CPU alone
    torch.UntypedStorage.clone = lambda storage: _copied(storage, storage.device)
    torch.serialization.register_package(
        5, _always(None), lambda storage, place: _copied(storage, place) if place.startswith("cuda") else None
    )
    return card


def _answer(card: Card, name: str, capability: tuple[int, int], memory: int) -> None:
    """Let torch and Lightning answer in Python what they ask CUDA."""
    import torch

    properties = {"name": name, "major": capability[0], "minor": capability[1], "total_memory": memory}
    properties |= {"multi_processor_count": 40, "uuid": "emulated", "gcnArchName": "", "warp_size": 32}
    answers = {
        **{"is_available": True, "is_initialized": True, "device_count": 1, "current_device": 0},
        **{"get_device_name": name, "get_device_capability": capability, "is_bf16_supported": True},
        **{"get_device_properties": SimpleNamespace(**properties), "get_arch_list": ["sm_75", "sm_80", "sm_90"]},
        **{"memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0, "max_memory_reserved": 0},
        **{"mem_get_info": (memory, memory), "memory_stats": {}, "reset_peak_memory_stats": None, "empty_cache": None},
        **{"_lazy_init": None, "set_device": None, "_exchange_device": 0, "_maybe_exchange_device": 0},
        **{"manual_seed": None, "manual_seed_all": None, "get_rng_state": torch.zeros(16, dtype=torch.uint8)},
        **{"set_rng_state": None, "get_rng_state_all": [], "set_rng_state_all": None},
        **{"is_current_stream_capturing": False, "set_per_process_memory_fraction": None},
    }
    for question, answer in answers.items():
        setattr(torch.cuda, question, _always(answer))

    class Event:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.time = 0.0

        def record(self, *_: Any) -> None:
            self.time = time.perf_counter()

        def query(self) -> bool:
            return True

        def elapsed_time(self, later: "Event") -> float:
            return (later.time - self.time) * 1000

        def wait(self, *_: Any) -> None:
            pass

        synchronize = card.synchronized

    torch.cuda.Event, torch.cuda.synchronize = Event, card.synchronized
    for module in ("torch.cuda.amp.common", "torch.amp.grad_scaler", "torch.amp.autocast_mode"):
        importlib.import_module(module).amp_definitely_not_available = _always(False)
    for module in ("lightning.fabric.accelerators.cuda", "lightning.pytorch.accelerators.cuda"):
        importlib.import_module(module).num_cuda_devices = _always(1)
    fabric = importlib.import_module("lightning.fabric.accelerators.cuda")
    fabric.is_cuda_available, fabric._get_all_visible_cuda_devices = _always(True), _always([0])


def build() -> Path:
    """The library, compiled once for each torch (half a minute) and kept among the system's temporary files."""
    source, torch = Path(__file__).with_suffix(".cpp"), Path(importlib.util.find_spec("torch").origin).parent
    made_of = source.read_bytes() + (torch / "version.py").read_bytes() + str(torch).encode()
    built = Path(tempfile.gettempdir()) / f"emulated-card-{hashlib.sha256(made_of).hexdigest()[:16]}.so"
    if not built.exists():
        with tempfile.TemporaryDirectory(dir=built.parent) as folder:
            partial = Path(folder) / built.name
            headers = [f"-I{torch / 'include'}", f"-I{torch / 'include/torch/csrc/api/include'}"]
            libraries = [f"-L{torch / 'lib'}", f"-Wl,-rpath,{torch / 'lib'}", "-lc10", "-ltorch_cpu"]
            flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w"]
            subprocess.run([COMPILER, *flags, str(source), "-o", str(partial), *headers, *libraries], check=True)
            partial.replace(built)
    return built


def _always(answer: Any) -> Callable[..., Any]:
    return lambda *_, **__: answer


def _copied(storage: Any, device: Any) -> Any:
    import torch

    return torch.empty(storage.nbytes(), dtype=torch.uint8, device=device).untyped_storage().copy_(storage)


def _where() -> str:
    """The nearest line of the package, and before it the one of what it called, if that is not torch."""
    called, frame = "", sys._getframe(2)
    while frame is not None:
        file, line = frame.f_code.co_filename, frame.f_lineno
        if file.startswith(_PACKAGE):
            return f"{Path(file).relative_to(_ROOT)}:{line}{called}"
        if not called and "/torch/" not in file and file != __file__:
            called = f" ({file.rpartition('site-packages/')[2]}:{line})"
        frame = frame.f_back
    return called.strip(" ()")
