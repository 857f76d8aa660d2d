"""The denoiser: LightningDiT (Yao & Wang 2025), a diffusion transformer (DiT, Peebles & Xie 2023) with modern parts.

Against the plain DiT it has rotary positions (RoPE, Su et al. 2021), SwiGLU (Shazeer 2020) and RMSNorm (Zhang &
Sennrich 2019). Parameters bear the reference's names, so that published weights load as they are. The network knows
nothing of noise schedules, classes or guidance: t in [0, 1] and a conditioning vector come in, a velocity goes out.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from einops import rearrange
from torch import Tensor, nn

from vavae_tools.diffusion.layers import (
    TIME_EMBEDS,
    Block,
    FinalLayer,
    Kept,
    PatchEmbed,
    begin_as_identity,
    check_latents,
    kept_patches,
    patch_grid,
    rope_table,
    sincos_table,
)
from vavae_tools.runtime.errors import UserError


class DiT(ModelMixin, ConfigMixin):
    """Latents (B, C, h, w), times in [0, 1] and conditioning vectors (B, hidden_size) → velocity (B, C, h, w).

    Args:
        input_size: height and width of the latents, or one number for both.
        patch_size: side of the square of latent pixels that becomes one token.
        qk_norm: norm queries and keys; the cure when a long half-precision run's loss becomes NaN.
        swiglu, rope, rms_norm: False gives DiT's own GELU perceptron, no rotary positions, LayerNorm.
        adaln_shift: modulate the blocks with scale *and shift* (the reference's `wo_shift=False`).
        learn_sigma: compute twice the channels and drop the second half, as DiT's weights want it.
        time_embed: "sinusoidal", or "fourier" as in the models of RAE.
        reversed_time: the network itself is given the share of noise, 1 − t, and predicts noise − data, as RAE's do;
            `forward` turns both around, `predict` does not.
        positions: "grid", rows and columns of patches, or "sequence", their place in reading order, as of text.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (diffusers wants a list)
    _repeated_blocks = ["Block"]  # noqa: RUF012  (for compile_repeated_blocks: one block's code serves all)

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
        if positions not in ("grid", "sequence"):
            raise UserError(f"positions={positions!r} is unknown; it is 'grid' or 'sequence'.")
        if time_embed not in TIME_EMBEDS:
            raise UserError(f"time_embed={time_embed!r} is unknown; it is {' or '.join(TIME_EMBEDS)}.")
        self.rows, self.columns = patch_grid(input_size, patch_size, hidden_size, num_heads, rope)
        self.in_channels, self.patch_size = in_channels, patch_size
        self.latent_shape = (in_channels, self.rows * patch_size, self.columns * patch_size)
        self.conditioning_size, self.reversed_time = hidden_size, reversed_time
        self.gradient_checkpointing = False

        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TIME_EMBEDS[time_embed](hidden_size)
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, mlp_ratio, qk_norm, swiglu, rms_norm, adaln_shift) for _ in range(depth)
        )
        out_channels = in_channels * (2 if learn_sigma else 1)
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * out_channels, rms_norm)

        # The tables follow from the numbers above, so they are not saved.
        grid = (self.rows, self.columns) if positions == "grid" else (1, self.rows * self.columns)
        self.register_buffer("pos_embed", sincos_table(*grid, hidden_size)[None], persistent=False)  # (1, N, D)
        cos, sin = rope_table(*grid, hidden_size // num_heads) if rope else (None, None)
        self.register_buffer("rope_cos", cos, persistent=False)  # (N, D / heads)
        self.register_buffer("rope_sin", sin, persistent=False)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """As the reference: at first every block passes x on unchanged and the output is exactly zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        begin_as_identity([self.x_embedder], self.t_embedder, self.blocks, self.final_layer)

    def forward(self, x: Tensor, t: Tensor, conditioning: Tensor, mask: Tensor | Kept | None = None) -> Tensor:
        """x (B, C, h, w), t (B,) with 0 = noise and 1 = data, conditioning (B, D) → velocity (B, C, h, w).

        Args:
            mask: (B, h, w), or its `kept_patches`. Patches without any pixel in it are left out: they are not computed,
                no other attends to them, and the answer there is 0.
        """
        if self.reversed_time:
            return -self.predict(x, 1 - t, conditioning, mask)[:, : self.in_channels]
        return self.predict(x, t, conditioning, mask)[:, : self.in_channels]

    def predict(self, x: Tensor, t: Tensor, conditioning: Tensor, mask: Tensor | Kept | None = None) -> Tensor:
        """What the network itself says, in the convention of its weights: (B, C, h, w), with learn_sigma 2·C."""
        check_latents(x, self.latent_shape)
        rope, there = None if self.rope_cos is None else (self.rope_cos, self.rope_sin), None
        given = x
        x = self.x_embedder(x.to(self.x_embedder.proj.weight.dtype)) + self.pos_embed  # (B, N, D), float32 in autocast
        if mask is not None:
            places, there = mask if isinstance(mask, Kept) else self._kept(mask, given.shape)
            batch, everything = torch.arange(len(x), device=x.device)[:, None], x.shape[1]
            x = x[batch, places]  # (B, L, D)
            rope = rope and tuple(table[places] for table in rope)  # (B, L, D / heads)
        c = (self.t_embedder(t) + conditioning)[:, None]  # (B, 1, D)
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c, rope, there)
            else:
                x = block(x, c, rope, there)
        x = self.final_layer(x, c)  # (B, N, p·p·C)
        if mask is not None:
            x = x.masked_fill(~there[..., None], 0)
            x = x.new_zeros(len(x), everything, x.shape[2]).index_put((batch, places), x)
        p = self.patch_size
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.rows, w=self.columns, p=p, q=p)

    def _kept(self, mask: Tensor, shape: torch.Size) -> Kept:
        expected = (shape[0], *shape[2:])
        if mask.shape != expected:
            raise UserError(f"The mask is {tuple(mask.shape)}, of these latents it is {expected}: (B, h, w).")
        return kept_patches(mask, self.patch_size)


DiT_SIZES = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    "1p0B": {"hidden_size": 1536, "depth": 24, "num_heads": 24},
    "1p6B": {"hidden_size": 1792, "depth": 28, "num_heads": 28},
}


def dit(size: str, **kwargs) -> DiT:
    """A `DiT` of a named size: `dit("B", input_size=16, in_channels=32)`."""
    if size not in DiT_SIZES:
        raise UserError(f"No DiT of size {size!r}; there are {', '.join(DiT_SIZES)}.")
    return DiT(**{**DiT_SIZES[size], **kwargs})
