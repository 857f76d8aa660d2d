"""Frozen encoders whose patch tokens are an autoencoder's latents (RAE, Zheng et al. 2025): DINOv2, SigLIP, MAE."""

import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vavae_tools.runtime.errors import UserError, one_line

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_KEPT = (  # what an encoder's tokens follow from, beside the model_type
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "mlp_ratio", "use_swiglu_ffn"),
    *("hidden_act", "layer_norm_eps", "qkv_bias", "layerscale_value", "image_size", "patch_size", "num_channels"),
    "num_register_tokens",
)


class FrozenEncoder(nn.Module):
    """A ViT whose patch tokens, after a last norm without affine weights, are what RAE encodes to.

    It never leaves evaluation mode. Position tables are resampled to the images' grid as transformers does it.

    Args:
        config: arguments of a transformers configuration, or all that a `config.json` holds; what is left out is as
            published by the RAE authors (the base size). `arguments` are the complete ones.
    """

    kinds: ClassVar[dict[str, str]]
    """model_type → how transformers' classes are called before "Config" and "Model"; the first is the published one"""
    published: ClassVar[dict[str, Any]]
    fixed: ClassVar[dict[str, Any]] = {}  # arguments that no configuration changes
    input_size: ClassVar[int]  # pixels of a side that the published RAE encodes at
    mean: ClassVar[tuple[float, ...]] = IMAGENET_MEAN
    std: ClassVar[tuple[float, ...]] = IMAGENET_STD
    norm: ClassVar[str] = "layernorm"

    def __init__(self, config: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        model_type, arguments = self._arguments(config or {})
        import transformers

        name = self.kinds[model_type]
        try:
            full = getattr(transformers, f"{name}Config")(**arguments)
            heads = full.num_attention_heads
            if full.hidden_size % heads:
                raise ValueError(f"hidden_size {full.hidden_size} is not divisible by {heads} attention heads")
            self.patch_size, image_size = int(full.patch_size), int(full.image_size)  # no lists: squares
            model = getattr(transformers, f"{name}Model")(full)
        except Exception as error:  # of any kind, by transformers' version
            found = f"transformers cannot build a {model_type} of this encoder configuration ({one_line(error, 200)})"
            raise UserError(f"{found}: take the config.json that came with the weights") from None
        self.arguments = {key: value for key, value in full.to_dict().items() if key in _KEPT}
        self.arguments |= {"model_type": model_type, "patch_size": self.patch_size, "image_size": image_size}
        self.channels: int = full.hidden_size
        self.model = getattr(model, "vision_model", model)  # until transformers 5 SigLIP's stood inside another
        eps = getattr(self.model, self.norm).eps
        setattr(self.model, self.norm, nn.LayerNorm(self.channels, eps=eps, elementwise_affine=False))
        self.requires_grad_(False).eval()

    @classmethod
    def _arguments(cls, config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return the model_type of a configuration, and the arguments of its class in transformers."""
        if "vision_config" in config:  # of a model of images and texts
            config = {"architectures": None, **config["vision_config"]}
        published_type = next(iter(cls.kinds))
        model_type = config.get("model_type") or published_type
        if model_type not in cls.kinds:
            known = {name: kind.__name__ for kind in _FAMILIES.values() for name in kind.kinds}
            fitting = f"take encoder_cls={known[model_type]}" if model_type in known else f"expected {', '.join(known)}"
            raise UserError(f"The encoder configuration is of a {model_type!r}, not for {cls.__name__}: {fitting}")
        # a config.json leaves out what equals transformers' own defaults, which are not the published base size
        is_file = "architectures" in config or "transformers_version" in config
        defaults = cls.published if model_type == published_type and not is_file else {}
        return model_type, {**defaults, **{key: config[key] for key in _KEPT if key in config}, **cls.fixed}

    def train(self, mode: bool = True) -> "FrozenEncoder":
        return super().train(False)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Return patch tokens (B, N, C), row by row, of images (B, 3, H, W) normalised as the encoder wants them."""
        height, width = pixel_values.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise UserError(f"Images of {height}×{width} do not fall into patches of {self.patch_size} pixels")
        count = (height // self.patch_size) * (width // self.patch_size)
        return patch_tokens(self.model, pixel_values.to(next(self.model.parameters()).dtype), count)


class Dinov2withNorm(FrozenEncoder):
    """DINOv2 with registers, or without; its class token and registers are dropped."""

    kinds: ClassVar = {"dinov2_with_registers": "Dinov2WithRegisters", "dinov2": "Dinov2"}
    published: ClassVar = {"image_size": 518, "patch_size": 14}
    input_size = 224


class SigLIPwithNorm(FrozenEncoder):
    """SigLIP's or SigLIP 2's vision half without its pooling head; it has patch tokens only."""

    kinds: ClassVar = {"siglip_vision_model": "SiglipVision"}
    published: ClassVar = {"image_size": 256, "patch_size": 16}
    fixed: ClassVar = {"vision_use_head": False}
    input_size = 256
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    norm = "post_layernorm"


class MAEwithNorm(FrozenEncoder):
    """The encoder of a masked autoencoder; every patch is seen, in its place, and the class token is dropped."""

    kinds: ClassVar = {"vit_mae": "ViTMAE"}
    published: ClassVar = {"image_size": 224, "patch_size": 16}
    fixed: ClassVar = {"mask_ratio": 0.0}
    input_size = 256


def patch_tokens(model: nn.Module, pixel_values: Tensor, count: int) -> Tensor:
    """Return the tokens (B, count, C) of all patches, row by row, without class token and registers."""
    kind, options = model.config.model_type, {}
    if not kind.startswith("dinov2"):
        options["interpolate_pos_encoding"] = True
    if kind == "vit_mae":  # it sorts patches by this noise: whole numbers, which half precision would round
        options["noise"] = torch.arange(count, device=pixel_values.device).expand(len(pixel_values), -1)
    return model(pixel_values, **options).last_hidden_state[:, -count:]


_FAMILIES: dict[str, type[FrozenEncoder]] = {"dinov2": Dinov2withNorm, "siglip": SigLIPwithNorm, "mae": MAEwithNorm}
_NAME = re.compile(r"(dinov2|siglip|mae)2?(w(ith)?norm)?", re.IGNORECASE)  # ours, the RAE authors', diffusers'


def encoder_class(name: str) -> type[FrozenEncoder]:
    """Return an encoder's class by its name here, in the RAE authors' code or in diffusers; case does not matter.

    >>> encoder_class("SigLIP2wNorm") is encoder_class("siglip2") is SigLIPwithNorm
    True
    """
    match = _NAME.fullmatch(name.strip())
    if match is None:
        raise UserError(f"No encoder {name!r}; there are {', '.join(kind.__name__ for kind in _FAMILIES.values())}")
    return _FAMILIES[match[1].lower()]


@contextmanager
def silent_loading() -> Iterator[None]:
    """Keep diffusers and transformers from printing bars and warnings."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    with ExitStack() as before:
        for logging in (of_diffusers, of_transformers):
            before.callback(logging.set_verbosity, logging.get_verbosity())
            if logging.is_progress_bar_enabled():
                before.callback(logging.enable_progress_bar)
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        yield


_COMMON_NAMES = {
    r"(^|(?<=^encoder\.model\.))(encoder\.)?layers?\.(?=\d)": "layers.",
    r"(attention\.attention\.query|attention\.to_q|(attention|self_attn)\.q_proj)(?=\.)": "attention.q",
    r"(attention\.attention\.key|attention\.to_k|(attention|self_attn)\.k_proj)(?=\.)": "attention.k",
    r"(attention\.attention\.value|attention\.to_v|(attention|self_attn)\.v_proj)(?=\.)": "attention.v",
    r"(attention\.(output\.dense|to_out\.0|o_proj)|self_attn\.out_proj)(?=\.)": "attention.o",
    r"(?<=\.)intermediate\.dense(?=\.)": "mlp.fc1",
    r"(?<=\d\.)output\.dense(?=\.)": "mlp.fc2",
}


def common_name(name: str) -> str:
    """Return one name of a weight of an encoder or a decoder, for all versions of transformers and diffusers.

    >>> common_name("encoder.layer.0.attention.attention.query.bias")
    'layers.0.attention.q.bias'
    >>> common_name("decoder_layers.1.attention.to_out.0.weight")
    'decoder_layers.1.attention.o.weight'
    """
    for pattern, replacement in _COMMON_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name
