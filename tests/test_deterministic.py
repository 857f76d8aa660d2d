"""Trainings whose numbers are the same each time, on a card, too: as far as a processor can show."""

import pytest
import torch
from test_throughput import OTHERS, train
from test_vavae_training import new_module as whole_vavae
from tiny import new_dit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader

RAISE_ON_A_CARD = (
    *("adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "avg_pool3d_backward", "fractional_max_pool"),
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward", "max_unpool"),
    *("upsample_trilinear3d_backward", "_upsample_bilinear2d_aa_backward", "_upsample_bicubic2d_aa_backward"),
    *("reflection_pad1d_backward", "reflection_pad2d_backward", "reflection_pad3d_backward", "nll_loss2d", "ctc_loss"),
    *("_embedding_bag", "put_.default", "histc", "grid_sampler_2d_backward", "scatter_reduce"),
)
"""What has no deterministic form on CUDA, as `torch.use_deterministic_algorithms` lists it; and sums along the way."""


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    yield
    torch.use_deterministic_algorithms(False)


class Operations(TorchDispatchMode):
    """Notes what would raise on a card."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.found = 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        self.count += torch.are_deterministic_algorithms_enabled()
        if name.startswith("cumsum"):
            if any(isinstance(leaf, torch.Tensor) and leaf.is_floating_point() for leaf in tree_leaves(args)):
                self.found.add(name)
        elif name.startswith(RAISE_ON_A_CARD):
            self.found.add(name)
        return func(*args, **(kwargs or {}))


def image_batch(module, size: int = 24) -> tuple:
    labels = torch.arange(6) % 3
    images = torch.randint(0, 256, (6, 3, size, size), dtype=torch.uint8)
    return module, {"images": images, "labels": labels, "index": torch.arange(6)}


def latent_batch() -> tuple:
    return new_dit(), {"latents": torch.randn(4, 2, 8, 8), "labels": torch.arange(4) % 3, "index": torch.arange(4)}


TRAININGS = {**OTHERS, "dit": latent_batch, "vavae": lambda: image_batch(whole_vavae(disc_start=0))}


@pytest.mark.parametrize("kind", TRAININGS)
def test_every_training_has_a_deterministic_form(kind, tmp_path):
    """On a processor it runs, and none of its operations is one that a card would refuse."""
    module, batch = TRAININGS[kind]()
    if kind in ("epsilon", "v_prediction", "flow_matching"):
        module.network["conditioner"].dropout = 0.0  # which needs to know the empty prompt
    batch.setdefault("index", torch.arange(len(next(iter(batch.values())))))
    batch.pop("kept", None)  # found again as batches travel
    with Operations() as operations:
        train(module, DataLoader([batch] * 3, batch_size=None), tmp_path, deterministic=True, max_steps=3)
    assert operations.count > 100 and operations.found == set()
    assert torch.backends.cudnn.benchmark is False
