"""The denoiser for pictures from sentences: the `DiT`'s blocks with cross-attention to a caption's tokens in each.

As in PixArt (Chen et al. 2023) the caption comes in twice: token by token through attention, and as a whole, beside the
time, in the modulation. Everything else is `transformer.DiT`'s.
"""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vavae_tools.diffusion.fused import add_gated
from vavae_tools.diffusion.layers import (
    MLP,
    TIME_EMBEDS,
    Attention,
    FinalLayer,
    PatchEmbed,
    RMSNorm,
    Rope,
    SwiGLU,
    begin_as_identity,
    check_latents,
    make_norm,
    norm_and_modulate,
    patch_grid,
    rope_table,
    sincos_table,
)
from vavae_tools.diffusion.text_conditioning import TextCondition
from vavae_tools.diffusion.transformer import DiT_SIZES
from vavae_tools.runtime.errors import UserError

TEXT_DIT_SIZES = {"T2I": {"hidden_size": 768, "depth": 16, "num_heads": 12}, **DiT_SIZES}
"""`DiT_SIZES`, and the one of the issue's configuration, which `TextDiT` takes when it is given no numbers."""


class CrossAttention(nn.Module):
    """What picture tokens (B, N, D) take from text tokens (B, L, D)."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, rms_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        if qk_norm:
            self.q_norm = RMSNorm(head_dim) if rms_norm else nn.LayerNorm(head_dim)
            self.k_norm = RMSNorm(head_dim) if rms_norm else nn.LayerNorm(head_dim)
        else:
            self.q_norm = self.k_norm = nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor, seen: Tensor, any_text: Tensor) -> Tensor:
        """`seen` bool (B, 1, 1, L), with at least one token in every row; `any_text` bool (B, 1, 1), false where that
        one is none of the caption's: such a row takes nothing."""
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.kv(text), "b l (two h d) -> two b h l d", two=2, h=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=seen)
        return self.proj(rearrange(x, "b h n d -> b n (h d)").masked_fill(~any_text, 0))


class TextBlock(nn.Module):
    """Attention, cross-attention, then a perceptron, each on a normed and modulated copy of x, added through a gate."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool, swiglu: bool, rms_norm: bool) -> None:
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = make_norm(dim, rms_norm)
        self.attn = Attention(dim, num_heads, qk_norm, rms_norm)
        self.norm2 = make_norm(dim, rms_norm)
        self.cross = CrossAttention(dim, num_heads, qk_norm, rms_norm)
        self.norm3 = make_norm(dim, rms_norm)
        self.mlp = SwiGLU(dim, int(2 / 3 * hidden)) if swiglu else MLP(dim, hidden)  # ⅔: as many weights as the MLP
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 9 * dim))

    def forward(self, x: Tensor, c: Tensor, rope: Rope | None, text: Tensor, seen: Tensor, any_text: Tensor) -> Tensor:
        """x (B, N, D); c (B, 1, D); text (B, L, D) and what is `seen` of it, see `CrossAttention`."""
        by_part = self.adaLN_modulation(c).unflatten(-1, (3, 3, -1)).unbind(2)  # three of (B, 1, 3, D)
        (shift_1, scale_1, gate_1), (shift_2, scale_2, gate_2), (shift_3, scale_3, gate_3) = (
            part.unbind(2) for part in by_part
        )
        x = add_gated(x, gate_1, self.attn(norm_and_modulate(self.norm1, x, shift_1, scale_1), rope))
        x = add_gated(x, gate_2, self.cross(norm_and_modulate(self.norm2, x, shift_2, scale_2), text, seen, any_text))
        return add_gated(x, gate_3, self.mlp(norm_and_modulate(self.norm3, x, shift_3, scale_3)))


class TextDiT(ModelMixin, ConfigMixin):
    """Latents (B, C, h, w), times in [0, 1] and a `TextCondition` → what it was trained to predict, (B, C, h, w).

    That is a velocity, or noise: the network does not know. Captions may have any length.

    Args:
        input_size: height and width of the latents, or one number for both.
        patch_size: side of the square of latent pixels that becomes one token.
        qk_norm: norm queries and keys; the cure when a long half-precision run's loss becomes NaN.
        swiglu, rope, rms_norm: False gives DiT's own GELU perceptron, no rotary positions, LayerNorm.
        time_embed: "sinusoidal" or "fourier".
        head: always "text"; by it `make_denoiser` tells this model's numbers from a `DiT`'s.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["TextBlock"]  # noqa: RUF012  (diffusers wants a list)
    _repeated_blocks = ["TextBlock"]  # noqa: RUF012  (for compile_repeated_blocks: one block's code serves all)

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
        if head != "text":
            raise UserError(f"head={head!r} of a TextDiT: it is 'text', or left out.")
        if time_embed not in TIME_EMBEDS:
            raise UserError(f"time_embed={time_embed!r} is unknown; it is {' or '.join(TIME_EMBEDS)}.")
        self.rows, self.columns = patch_grid(input_size, patch_size, hidden_size, num_heads, rope)
        self.in_channels, self.patch_size = in_channels, patch_size
        self.latent_shape = (in_channels, self.rows * patch_size, self.columns * patch_size)
        self.conditioning_size = hidden_size
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TIME_EMBEDS[time_embed](hidden_size)
        self.blocks = nn.ModuleList(
            TextBlock(hidden_size, num_heads, mlp_ratio, qk_norm, swiglu, rms_norm) for _ in range(depth)
        )
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * in_channels, rms_norm)

        # The tables follow from the numbers above, so they are not saved.
        positions = sincos_table(self.rows, self.columns, hidden_size)
        self.register_buffer("pos_embed", positions[None], persistent=False)  # (1, N, D)
        cos, sin = rope_table(self.rows, self.columns, hidden_size // num_heads) if rope else (None, None)
        self.register_buffer("rope_cos", cos, persistent=False)  # (N, D / heads)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """At first every block passes x on unchanged and the output is exactly zero, as a `DiT`'s."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        begin_as_identity([self.x_embedder], self.t_embedder, self.blocks, self.final_layer)

    def forward(self, x: Tensor, t: Tensor, condition: TextCondition) -> Tensor:
        """x (B, C, h, w), t (B,) with 0 = noise and 1 = data → (B, C, h, w)."""
        check_latents(x, self.latent_shape)
        text, mask = condition.tokens, condition.mask
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        any_text = mask.any(1, keepdim=True)  # (B, 1)
        seen = (mask | ~any_text)[:, None, None]  # (B, 1, 1, L): of a caption without tokens all, as softmax needs one
        any_text = any_text[:, None]  # (B, 1, 1)
        text = text.masked_fill(~mask[:, :, None], 0)  # what is no number there must not come in as 0 · NaN
        rope = None if self.rope_cos is None else (self.rope_cos, self.rope_sin)
        x = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed  # (B, N, D), float32 in autocast
        c = (self.t_embedder(t) + condition.vector)[:, None]  # (B, 1, D)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c, rope, text, seen, any_text)
            else:
                x = block(x, c, rope, text, seen, any_text)
        x = self.final_layer(x, c)  # (B, N, p·p·C)
        p = self.patch_size
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.rows, w=self.columns, p=p, q=p)
