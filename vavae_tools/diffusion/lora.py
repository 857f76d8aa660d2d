"""Low-rank additions (LoRA, Hu et al. 2022) scale·B·A to a denoiser's linear maps W, by peft, and merged into them."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from vavae_tools.runtime.errors import UserError

TARGETS = ("qkv", "proj", "w12", "w3")  # the linear maps of all blocks' attention and of their perceptron (SwiGLU)
_ADAPTER = "default"  # peft's own name, part of the weights' names
_BASE, _A, _B = ".base_layer.", f".lora_A.{_ADAPTER}.weight", f".lora_B.{_ADAPTER}.weight"


def add_lora(denoiser: nn.Module, rank: int, alpha: float | None = None, targets: Sequence[str] = TARGETS) -> int:
    """Freeze a denoiser, put low-rank additions beside its linear maps, and return how many weights are trained.

    At first they add nothing. The arguments are kept in the denoiser's attribute `lora`.

    Args:
        rank: of the additions; 4 to 64.
        alpha: the additions are scaled by alpha / rank; None takes the rank, a scale of 1.
        targets: ends of the maps' names, at a dot: "qkv" is that of every block, "final_layer.linear" one map.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("LoRA needs the package peft: pip install peft; lora_rank=0 trains all weights") from None
    if hasattr(denoiser, "lora"):
        raise UserError("This denoiser has low-rank additions already")
    alpha, targets = float(rank if alpha is None else alpha), list(targets)
    if not alpha > 0:
        raise UserError(f"lora_alpha={alpha:g}: it is above 0, such as the rank, {rank}")
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=_linear_names(denoiser, targets))
    inject_adapter_in_model(config, denoiser, _ADAPTER)
    del denoiser.peft_config  # what diffusers would take for adapters of its own
    denoiser.lora = {"rank": rank, "alpha": alpha, "targets": targets}
    return sum(weight.numel() for weight in denoiser.parameters() if weight.requires_grad)


def merged_weights(weights: Mapping[str, Tensor], settings: Mapping[str, Any] | None) -> dict[str, Tensor]:
    """Return the plain denoiser's weights, W + scale·B·A, from a state_dict and its `lora`, without peft."""
    if settings is None:
        return dict(weights)
    scale = settings["alpha"] / settings["rank"]
    merged = {}
    for name, tensor in weights.items():
        if name.endswith((_A, _B)):
            continue
        layer, base, kind = name.rpartition(_BASE)
        if base and kind == "weight":
            low_rank = weights[layer + _B].float() @ weights[layer + _A].float()  # (out, rank) · (rank, in)
            tensor = (tensor.float() + scale * low_rank).to(tensor.dtype)  # rounded once, also of half precision
        merged[f"{layer}.{kind}" if base else name] = tensor
    return merged


def _linear_names(denoiser: nn.Module, targets: Sequence[str]) -> list[str]:
    if not targets:
        raise UserError(f"lora_targets is empty: name linear maps, such as {', '.join(TARGETS)}")
    linear, found = [name for name, module in denoiser.named_modules() if isinstance(module, nn.Linear)], []
    for target in targets:
        ending = [name for name in linear if f".{name}".endswith(f".{target}")]
        if not ending:
            ends = [name.rpartition(".")[2] for name in linear if name.startswith("blocks.")]
            ends += [name for name in linear if not name.startswith("blocks.")]
            there = ", ".join(end for end in dict.fromkeys(ends) if not end.isdecimal())
            raise UserError(f"lora_targets: no linear map {target!r} in this denoiser; there are {there}")
        found += ending
    return list(dict.fromkeys(found))
