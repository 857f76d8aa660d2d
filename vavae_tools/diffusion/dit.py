"""Denoisers: `DiT` (LightningDiT, Yao & Wang 2025), `TextDiT` and `DDT`, and `make_denoiser`.

They know nothing of noise schedules, classes or guidance: t in [0, 1] and a condition come in, a prediction goes out.
"""

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vavae_tools.diffusion import layers
from vavae_tools.diffusion.conditioning import TextCondition
from vavae_tools.diffusion.layers import Backbone, TokenSubset, select_tokens
from vavae_tools.runtime.errors import UserError, check_known

DiT_SIZES = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    "1p0B": {"hidden_size": 1536, "depth": 24, "num_heads": 24},
    "1p6B": {"hidden_size": 1792, "depth": 28, "num_heads": 28},
}
TEXT_DIT_SIZES = {"T2I": {"hidden_size": 768, "depth": 16, "num_heads": 12}, **DiT_SIZES}
DDT_SIZES = {
    "S": {"hidden_size": (384, 2048), "depth": (12, 2), "num_heads": (6, 16)},  # published, as the guide of XL
    "B": {"hidden_size": (768, 2048), "depth": (12, 2), "num_heads": (12, 16)},  # a guess: DiT-B with the same head
    "L": {"hidden_size": (1024, 2048), "depth": (24, 2), "num_heads": (16, 16)},  # a guess likewise
    "XL": {"hidden_size": (1152, 2048), "depth": (28, 2), "num_heads": (16, 16)},  # published
}


class DiT(Backbone, ModelMixin, ConfigMixin):
    """Latents (B, C, h, w), times in [0, 1] and conditioning vectors (B, hidden_size) → velocity (B, C, h, w).

    Args:
        input_size: height and width of the latents, or one number for both.
        patch_size: width of the square of latent pixels that becomes one token.
        qk_norm: norm queries and keys; the cure when a long half-precision run's loss becomes NaN.
        swiglu, rope, rms_norm: False gives DiT's own GELU perceptron, no rotary positions, LayerNorm.
        adaln_shift: modulate the blocks with scale *and shift* (the reference's `wo_shift=False`).
        learn_sigma: compute twice the channels and drop the second half, as DiT's weights want it.
        time_embed: "sinusoidal", or "fourier" as in the models of RAE.
        reversed_time: the network itself is given the share of noise, 1 − t, and predicts noise − data, as RAE's do;
            `forward` turns both around, `predict` does not.
        positions: "grid", rows and columns of patches, or "sequence", their place in reading order, as of text.
    """

    @register_to_config
    def __init__(
        self,
        input_size: int | tuple[int, int] = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        hidden_size: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        swiglu: bool = True,
        rope: bool = True,
        rms_norm: bool = True,
        adaln_shift: bool = True,
        learn_sigma: bool = False,
        time_embed: str = "sinusoidal",
        reversed_time: bool = False,
        positions: str = "grid",
    ) -> None:
        super().__init__()
        self._build()

    def forward(self, x: Tensor, t: Tensor, conditioning: Tensor, mask: Tensor | TokenSubset | None = None) -> Tensor:
        """Return the velocity; t (B,) is 0 at noise and 1 at data.

        Patches without any pixel in the mask (B, h, w), or outside of its `select_tokens`, are not computed, no other
        attends to them, and the answer there is 0.
        """
        if self.config.reversed_time:
            return -self.predict(x, 1 - t, conditioning, mask)[:, : self.in_channels]
        return self.predict(x, t, conditioning, mask)[:, : self.in_channels]

    def predict(self, x: Tensor, t: Tensor, conditioning: Tensor, mask: Tensor | TokenSubset | None = None) -> Tensor:
        """Return the prediction in the convention of the weights: (B, C, h, w), with learn_sigma 2·C."""
        shape, rope, valid = (len(x), *x.shape[2:]), self.rope_table, None
        x = self._embed(x, self.x_embedder, self.pos_embed)  # (B, N, D)
        if mask is not None:
            if not isinstance(mask, TokenSubset) and mask.shape != shape:
                raise UserError(f"The mask is {tuple(mask.shape)}, of these latents it is {shape}: (B, h, w).")
            indices, valid = mask if isinstance(mask, TokenSubset) else select_tokens(mask, self.patch_size)
            batch, count = torch.arange(len(x), device=x.device)[:, None], x.shape[1]
            x = x[batch, indices]  # (B, L, D)
            rope = None if rope is None else rope[:, indices]  # (2, B, L, D / heads)
        c = (self.t_embedder(t) + conditioning)[:, None]  # (B, 1, D)
        x = self.final_layer(self._run(self.blocks, x, c, rope, valid), c)  # (B, N, p·p·C)
        if mask is not None:
            x = x.masked_fill(~valid[..., None], 0)
            x = x.new_zeros(len(x), count, x.shape[2]).index_put((batch, indices), x)
        return self._unpatchify(x)


class TextDiT(Backbone, ModelMixin, ConfigMixin):
    """Latents (B, C, h, w), times in [0, 1] and a `TextCondition` → what it was trained to predict, (B, C, h, w).

    As in PixArt (Chen et al. 2023) a caption, of any length, comes in twice: token by token through cross-attention in
    each block, and as a whole, beside the time, in the modulation. The arguments are `DiT`'s; `head`, always "text",
    tells `make_denoiser` this model's from a `DiT`'s.
    """

    @register_to_config
    def __init__(
        self,
        input_size: int | tuple[int, int] = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 768,
        depth: int = 16,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        swiglu: bool = True,
        rope: bool = True,
        rms_norm: bool = True,
        time_embed: str = "sinusoidal",
        head: str = "text",
    ) -> None:
        super().__init__()
        self._build(cross_attention=True)

    def forward(self, x: Tensor, t: Tensor, condition: TextCondition) -> Tensor:
        mask, any_text = condition.mask, condition.mask.any(1, keepdim=True)  # (B, L), (B, 1)
        seen = (mask | ~any_text)[:, None, None]  # (B, 1, 1, L): of a caption without tokens all, as softmax needs one
        text = condition.tokens.masked_fill(~mask[:, :, None], 0)  # what is no number there must not become 0 · NaN
        x = self._embed(x, self.x_embedder, self.pos_embed)  # (B, N, D)
        c = (self.t_embedder(t) + condition.vector)[:, None]  # (B, 1, D)
        x = self._run(self.blocks, x, c, self.rope_table, None, (text, seen, any_text[:, None]))
        return self._unpatchify(self.final_layer(x, c))


class DDT(Backbone, ModelMixin, ConfigMixin):
    """DiT^DH of RAE (Zheng et al. 2025), after DDT (Wang et al. 2025): a deep encoder and a wide head.

    Latents (B, C, h, w), times in [0, 1] and conditioning vectors (B, encoder's width) → velocity (B, C, h, w). The
    encoder tells for each token what the image shall be, and the head predicts with that as its conditioning: latents
    of foundation models have more channels than a DiT has features, and a network narrower than they cannot remove
    their noise. The network itself is given 1 − t and predicts noise − data, see `DiT`'s reversed_time.

    Args:
        hidden_size, depth, num_heads: two numbers each, of the encoder and of the head; one number of heads is both's.
            The head should be wider than `in_channels`.
        pos_embed: add fixed positions to the encoder's tokens; the head's have none but the rotary ones.
    """

    @register_to_config
    def __init__(
        self,
        input_size: int | Sequence[int] = 16,
        patch_size: int | Sequence[int] = 1,
        in_channels: int = 768,
        hidden_size: Sequence[int] = (1152, 2048),
        depth: Sequence[int] = (28, 2),
        num_heads: int | Sequence[int] = (16, 16),
        mlp_ratio: float = 4.0,
        qk_norm: bool = False,
        swiglu: bool = True,
        rope: bool = True,
        rms_norm: bool = True,
        adaln_shift: bool = True,
        pos_embed: bool = True,
    ) -> None:
        super().__init__()
        depths, widths = _two("depth", depth), _two("hidden_size", hidden_size)
        heads, (patch_size, of_head) = _two("num_heads", num_heads, True), _two("patch_size", patch_size, True)
        if patch_size != of_head:  # a token of the encoder conditions the head's token in the same place
            raise UserError(f"patch_size {patch_size} and {of_head}: encoder and head need the same; give one number.")
        self._set_grid(input_size, patch_size, in_channels)
        self.encoder_depth, (encoder, head) = depths[0], widths
        self.conditioning_size = encoder
        self.s_embedder = layers.PatchEmbed(patch_size, in_channels, encoder)
        self.x_embedder = layers.PatchEmbed(patch_size, in_channels, head)
        self.t_embedder = layers.FourierTimeEmbed(encoder)
        self.s_projector = nn.Linear(encoder, head) if encoder != head else nn.Identity()
        self.blocks, grid = nn.ModuleList(), (self.rows, self.columns)
        positions = layers.sincos_table(*grid, encoder)[None] if pos_embed else None
        self.register_buffer("enc_pos_embed", positions, persistent=False)  # (1, N, D of the encoder)
        for i, (name, part) in enumerate((("enc_rope", "The encoder's "), ("dec_rope", "The head's "))):
            self.blocks.extend(self._make_blocks(depths[i], widths[i], heads[i], part=part))
            table = layers.rope_table(*grid, widths[i] // heads[i]) if rope else None
            self.register_buffer(name, table, persistent=False)  # (2, N, D / heads)
        self.final_layer = layers.FinalLayer(head, patch_size**2 * in_channels, rms_norm)
        self._initialize(linear=False)

    def forward(self, x: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
        return -self.predict(x, 1 - t, conditioning)

    def predict(self, x: Tensor, t: Tensor, conditioning: Tensor | None, s: Tensor | None = None) -> Tensor:
        """Return the network's own prediction at the share of noise t: noise − data, (B, C, h, w).

        With s (B, N, D) from `encode` only the head is computed, which t and conditioning reach through s alone.
        """
        s = self.s_projector(self.encode(x, t, conditioning) if s is None else s)  # (B, N, D of the head)
        x = self._embed(x, self.x_embedder)
        x = self._run(self.blocks[self.encoder_depth :], x, s, self.dec_rope)
        return self._unpatchify(self.final_layer(x, s))

    def encode(self, x: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
        """Return what conditions the head at each token of x, at the share of noise t: (B, N, D of the encoder)."""
        time = self.t_embedder(t)  # (B, D)
        c = F.silu(time + conditioning)[:, None]  # (B, 1, D)
        s = self._embed(x, self.s_embedder, self.enc_pos_embed)  # (B, N, D)
        s = self._run(self.blocks[: self.encoder_depth], s, c, self.enc_rope)
        return F.silu(time[:, None] + s)


def _two(name: str, value: int | Sequence[int], may_share: bool = False) -> tuple[int, int]:
    if may_share and isinstance(value, int):
        return value, value
    if isinstance(value, int) or len(value) != 2:
        raise UserError(f"{name} is {value}, expected two numbers: the encoder's and the head's, as in [1152, 2048].")
    return value[0], value[1]


# ---- from plain numbers, under our names or the references'
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
    arguments = _normalised(config)
    made = TextDiT if "head" in arguments else DDT if _is_wide(arguments) else DiT
    _check_known(arguments, inspect.signature(made).parameters, made.__name__)
    return made(**arguments)


def split_reference_arguments(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of `make_denoiser` and of `ClassConditioner` from a reference's model, which holds both.

    num_classes (1000 where it is not given) and class_dropout_prob (0.1) are the conditioner's, and its hidden_size is
    the denoiser's, with a wide head the encoder's.
    """
    others = CONDITIONER_ARGUMENTS | IGNORED_ARGUMENTS
    denoiser = _normalised({name: value for name, value in config.items() if name not in others})
    of_dit, of_ddt = inspect.signature(DiT).parameters, inspect.signature(DDT).parameters
    _check_known(denoiser, {**of_dit, **of_ddt}, "the model")
    width = denoiser.get("hidden_size", of_dit["hidden_size"].default)
    conditioner = {
        "num_classes": config.get("num_classes", 1000),
        "hidden_size": width[0] if _is_wide(denoiser) else width,
        "dropout": config.get("class_dropout_prob", 0.1),
    }
    return denoiser, conditioner


def _normalised(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a denoiser's arguments under our names, a named size written out, two numbers as tuples."""
    arguments = {}
    for name, value in config.items():
        if name == "wo_shift":
            name, value = "adaln_shift", not value
        is_plain = value is None or isinstance(value, str | int | float)
        arguments[RENAMED.get(name, name)] = value if is_plain else tuple(value)
    size, head = arguments.pop("size", None), arguments.pop("head", None)
    if head is not None:
        check_known("head", head, ("wide", "text"))
    if head == "text":
        arguments["head"] = head
    if size is None:
        if head == "wide" and not _is_wide(arguments):
            raise UserError('head="wide" needs a size, or two numbers as hidden_size: of the encoder and of the head.')
        return arguments
    sizes = {"wide": DDT_SIZES, "text": TEXT_DIT_SIZES}.get(head, DiT_SIZES)
    check_known("denoiser of size", size, sizes, f" with a {head} head" if head else "")
    return {**sizes[size], **arguments}


def _is_wide(arguments: Mapping[str, Any]) -> bool:
    return isinstance(arguments.get("hidden_size"), tuple)


def _check_known(arguments: Mapping[str, Any], known: Collection[str], model: str) -> None:
    for name in arguments:
        if name in CONDITIONER_ARGUMENTS:
            raise UserError(f"{name} is the conditioner's, not the denoiser's: use split_reference_arguments(config).")
        names = [*known, *(reference for reference, ours in RENAMED.items() if ours in known), "wo_shift", "size"]
        check_known("argument", name, names, f" of {model}")
