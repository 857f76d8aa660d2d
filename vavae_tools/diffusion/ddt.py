"""The denoiser with a wide head: DiT^DH of RAE (Zheng et al. 2025), after DDT (Wang et al. 2025).

Latents of a vision foundation model have more channels than a DiT has features, and a network narrower than its latents
cannot remove their noise. Here a deep encoder of the usual width works out, for each token, what the picture shall be,
and a head of a few blocks, wider than the latents, says the velocity with that as its conditioning. Parameters bear the
reference's names, so that published weights load as they are.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vavae_tools.diffusion.layers import (
    Block,
    FinalLayer,
    FourierTimeEmbed,
    PatchEmbed,
    Rope,
    begin_as_identity,
    check_latents,
    patch_grid,
    rope_table,
    sincos_table,
)
from vavae_tools.runtime.errors import UserError


class DDT(ModelMixin, ConfigMixin):
    """Latents (B, C, h, w), times in [0, 1] and conditioning vectors (B, encoder's width) → velocity (B, C, h, w).

    The network itself is given the share of noise, 1 − t, and predicts noise − data, as RAE's: `forward` turns both
    around, `predict` does not. At first the output is exactly zero.

    Args:
        input_size: height and width of the latents, or one number for both.
        patch_size: side of the square of latent pixels that becomes one token.
        hidden_size, depth, num_heads: two numbers each, of the encoder and of the head; one number of heads is both's.
            The head should be wider than `in_channels`.
        qk_norm, swiglu, rope, rms_norm, adaln_shift: as in `DiT`.
        pos_embed: add fixed positions to the encoder's tokens; the head's have none but the rotary ones.

    The reference's code fails with patch_size above 1, rope=False or adaln_shift=False (its `wo_shift`); these work
    here, and no published weights have them.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (diffusers wants a list)
    _repeated_blocks = ["Block"]  # noqa: RUF012  (for compile_repeated_blocks: one block's code serves all)

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
        height, width = _pair("input_size", input_size)
        patch_size = _one_patch_size(patch_size)
        heads, self.encoder_depth = _pair("num_heads", num_heads), _two("depth", depth)[0]
        encoder, head = _two("hidden_size", hidden_size)
        for part, dim, number in (("encoder", encoder, heads[0]), ("head", head, heads[1])):
            self.rows, self.columns = patch_grid((height, width), patch_size, dim, number, rope, f"The {part}'s ")
        self.in_channels, self.patch_size = in_channels, patch_size
        self.latent_shape = (in_channels, height, width)
        self.conditioning_size = encoder
        self.gradient_checkpointing = False

        self.s_embedder = PatchEmbed(patch_size, in_channels, encoder)
        self.x_embedder = PatchEmbed(patch_size, in_channels, head)
        self.t_embedder = FourierTimeEmbed(encoder)
        self.s_projector = nn.Linear(encoder, head) if encoder != head else nn.Identity()
        self.blocks = nn.ModuleList(
            Block(dim, number, mlp_ratio, qk_norm, swiglu, rms_norm, adaln_shift)
            for dim, number, count in zip((encoder, head), heads, depth, strict=True)
            for _ in range(count)
        )
        self.final_layer = FinalLayer(head, patch_size**2 * in_channels, rms_norm)

        # The tables follow from the numbers above, so they are not saved.
        positions = sincos_table(self.rows, self.columns, encoder)[None] if pos_embed else None
        self.register_buffer("enc_pos_embed", positions, persistent=False)  # (1, N, D of the encoder)
        for part, dim, number in (("enc", encoder, heads[0]), ("dec", head, heads[1])):
            cos, sin = rope_table(self.rows, self.columns, dim // number) if rope else (None, None)
            self.register_buffer(f"{part}_rope_cos", cos, persistent=False)  # (N, D / heads)
            self.register_buffer(f"{part}_rope_sin", sin, persistent=False)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """As the reference: only what is named here, the other linear maps keep PyTorch's own beginning."""
        begin_as_identity([self.s_embedder, self.x_embedder], self.t_embedder, self.blocks, self.final_layer)

    def forward(self, x: Tensor, t: Tensor, conditioning: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, C, h, w), t (B,) with 0 = noise and 1 = data, conditioning (B, D) → velocity (B, C, h, w)."""
        if mask is not None:
            raise UserError("This denoiser takes no mask: leave it out.")
        return -self.predict(x, 1 - t, conditioning)

    def predict(self, x: Tensor, t: Tensor, conditioning: Tensor | None, s: Tensor | None = None) -> Tensor:
        """What the network itself says at the share of noise t: noise − data, (B, C, h, w).

        Args:
            s: the encoder's answer (B, N, D), from `encode`; the encoder is not run then, and t and conditioning, which
                reach the head through s alone, do not count.
        """
        check_latents(x, self.latent_shape)
        x = x.to(self.x_embedder.proj.weight.dtype)
        s = self.s_projector(self.encode(x, t, conditioning) if s is None else s)  # (B, N, D of the head)
        x = self._through(self.blocks[self.encoder_depth :], self.x_embedder(x), s, self._rope("dec"))
        x, p = self.final_layer(x, s), self.patch_size  # (B, N, p·p·C)
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.rows, w=self.columns, p=p, q=p)

    def encode(self, x: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
        """What the head shall make of each token of x at the share of noise t: (B, N, D of the encoder)."""
        time = self.t_embedder(t)  # (B, D)
        c = F.silu(time + conditioning)[:, None]  # (B, 1, D)
        s = self.s_embedder(x.to(self.s_embedder.proj.weight.dtype))  # (B, N, D)
        if self.enc_pos_embed is not None:
            s = s + self.enc_pos_embed
        s = self._through(self.blocks[: self.encoder_depth], s, c, self._rope("enc"))
        return F.silu(time[:, None] + s)

    def _rope(self, part: str) -> Rope | None:
        cos, sin = getattr(self, f"{part}_rope_cos"), getattr(self, f"{part}_rope_sin")
        return None if cos is None else (cos, sin)

    def _through(self, blocks: nn.ModuleList, x: Tensor, c: Tensor, rope: Rope | None) -> Tensor:
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c, rope)
            else:
                x = block(x, c, rope)
        return x


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Two numbers, or one for both."""
    return (value, value) if isinstance(value, int) else _two(name, value)


def _two(name: str, value: Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int) or len(value) != 2:
        raise UserError(f"{name} is {value}, expected two numbers: the encoder's and the head's, as in [1152, 2048].")
    return value[0], value[1]


def _one_patch_size(patch_size: int | Sequence[int]) -> int:
    """One number, also from RAE's pair: a token of the encoder conditions the token of the head in the same place."""
    encoder, head = _pair("patch_size", patch_size)
    if encoder != head:
        raise UserError(f"patch_size {encoder} and {head}: encoder and head need the same tokens; give one number.")
    return encoder


DDT_SIZES = {
    "S": {"hidden_size": (384, 2048), "depth": (12, 2), "num_heads": (6, 16)},  # published, as the guide of XL
    "B": {"hidden_size": (768, 2048), "depth": (12, 2), "num_heads": (12, 16)},  # a guess: DiT-B with the same head
    "L": {"hidden_size": (1024, 2048), "depth": (24, 2), "num_heads": (16, 16)},  # a guess likewise
    "XL": {"hidden_size": (1152, 2048), "depth": (28, 2), "num_heads": (16, 16)},  # published
}


def ddt(size: str, **kwargs) -> DDT:
    """A `DDT` of a named size: `ddt("XL", input_size=16, in_channels=768)`."""
    if size not in DDT_SIZES:
        raise UserError(f"No DDT of size {size!r}; there are {', '.join(DDT_SIZES)}.")
    return DDT(**{**DDT_SIZES[size], **kwargs})
