"""Denoisers from plain numbers, under our names or the references'."""

import inspect
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from vavae_tools.diffusion.ddt import DDT, DDT_SIZES
from vavae_tools.diffusion.text_dit import TEXT_DIT_SIZES, TextDiT
from vavae_tools.diffusion.transformer import DiT, DiT_SIZES
from vavae_tools.runtime.errors import UserError

RENAMED = {  # the constructor arguments of LightningDiT and RAE that have other names here; `wo_shift` is turned around
    "use_qknorm": "qk_norm",
    "use_swiglu": "swiglu",
    "use_rope": "rope",
    "use_rmsnorm": "rms_norm",
    "use_pos_embed": "pos_embed",
}
CONDITIONER_ARGUMENTS = {"num_classes", "class_dropout_prob"}
IGNORED_ARGUMENTS = {"use_checkpoint", "use_gembed"}  # how the reference computes, or what it no longer reads


def make_denoiser(config: Mapping[str, Any]) -> DiT | DDT | TextDiT:
    """Return a `DiT`, with two numbers for hidden_size a `DDT`, with "head": "text" a `TextDiT`.

    Args:
        config: arguments under our names or the references' (`use_rope`, `wo_shift`, …). "size" stands for
            hidden_size, depth and num_heads: "S" to "XL", with "head": "wide" those of the `DDT`.
    """
    arguments = normalise_arguments(config)
    made = TextDiT if "head" in arguments else DDT if _is_wide(arguments) else DiT
    _check_known(arguments, inspect.signature(made.__init__).parameters.keys() - {"self"}, made.__name__)
    return made(**arguments)


def normalise_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments of a denoiser under our names, a named size written out, two numbers as tuples."""
    arguments = {}
    for name, value in config.items():
        if name == "wo_shift":
            name, value = "adaln_shift", not value
        is_plain = value is None or isinstance(value, str | int | float)
        arguments[RENAMED.get(name, name)] = value if is_plain else tuple(value)
    size, head = arguments.pop("size", None), arguments.pop("head", None)
    if head not in (None, "wide", "text"):
        raise UserError(f'head={head!r} is unknown; it is "wide", "text", or left out.')
    if head == "text":
        arguments["head"] = head
    if size is None and head == "wide" and not _is_wide(arguments):
        raise UserError("head=\"wide\" needs a size, or hidden_size with two numbers: the encoder's and the head's.")
    if size is None:
        return arguments
    sizes = {"wide": DDT_SIZES, "text": TEXT_DIT_SIZES}.get(head, DiT_SIZES)
    if size not in sizes:
        with_head = f" with a {head} head" if head else ""
        raise UserError(f"No denoiser of size {size!r}{with_head}; there are {', '.join(sizes)}.")
    return {**sizes[size], **arguments}


def split_reference_arguments(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of `make_denoiser` and of `ClassConditioner` from a reference's model, which holds both.

    num_classes (1000 where it is not given) and class_dropout_prob (0.1) are the conditioner's, and its hidden_size is
    the denoiser's, with a wide head the encoder's.
    """
    others = CONDITIONER_ARGUMENTS | IGNORED_ARGUMENTS
    denoiser = normalise_arguments({name: value for name, value in config.items() if name not in others})
    made = DDT if _is_wide(denoiser) else DiT
    of_dit, of_ddt = (inspect.signature(model.__init__).parameters for model in (DiT, DDT))
    _check_known(denoiser, (of_dit.keys() | of_ddt.keys()) - {"self"}, "The model")
    width = denoiser.get("hidden_size", (of_ddt if made is DDT else of_dit)["hidden_size"].default)
    conditioner = {
        "num_classes": config.get("num_classes", 1000),
        "hidden_size": width[0] if made is DDT else width,
        "dropout": config.get("class_dropout_prob", 0.1),
    }
    return denoiser, conditioner


def _is_wide(arguments: Mapping[str, Any]) -> bool:
    return isinstance(arguments.get("hidden_size"), tuple)


def _check_known(arguments: Mapping[str, Any], known: Collection[str], model: str) -> None:
    for name in arguments:
        if name in known:
            continue
        if name in CONDITIONER_ARGUMENTS:
            raise UserError(f"{name} is the conditioner's, not the denoiser's: use split_reference_arguments(config).")
        names = {*known, *(reference for reference, ours in RENAMED.items() if ours in known), "wo_shift", "size"}
        nearest = get_close_matches(name, names, n=1, cutoff=0)
        raise UserError(f"{model} has no argument {name}; the nearest one is {nearest[0]}.")
