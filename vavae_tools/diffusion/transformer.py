"""LightningDiT (Yao & Wang 2025), a diffusion transformer with modern parts (see `layers`).

The network knows nothing of noise schedules, classes or guidance: t in [0, 1] and a conditioning vector come in, a
prediction goes out.
"""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from vavae_tools.diffusion.layers import Backbone, TokenSubset, select_tokens
from vavae_tools.runtime.errors import UserError


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
        if positions not in ("grid", "sequence"):
            raise UserError(f"positions={positions!r} is unknown; it is 'grid' or 'sequence'.")
        self.reversed_time = reversed_time
        self._set_grid(input_size, patch_size, in_channels)
        self._build(in_channels * (2 if learn_sigma else 1), positions)

    def forward(self, x: Tensor, t: Tensor, conditioning: Tensor, mask: Tensor | TokenSubset | None = None) -> Tensor:
        """Return the velocity; t (B,) is 0 at noise and 1 at data.

        Patches without any pixel in the mask (B, h, w), or outside of its `select_tokens`, are not computed, no other
        attends to them, and the answer there is 0.
        """
        if self.reversed_time:
            return -self.predict(x, 1 - t, conditioning, mask)[:, : self.in_channels]
        return self.predict(x, t, conditioning, mask)[:, : self.in_channels]

    def predict(self, x: Tensor, t: Tensor, conditioning: Tensor, mask: Tensor | TokenSubset | None = None) -> Tensor:
        """Return the prediction in the convention of the weights: (B, C, h, w), with learn_sigma 2·C."""
        shape, rope, there = (len(x), *x.shape[2:]), self._rope(), None
        x = self._embed(x, self.x_embedder, self.pos_embed)  # (B, N, D)
        if mask is not None:
            if not isinstance(mask, TokenSubset) and mask.shape != shape:
                raise UserError(f"The mask is {tuple(mask.shape)}, of these latents it is {shape}: (B, h, w).")
            places, there = mask if isinstance(mask, TokenSubset) else select_tokens(mask, self.patch_size)
            batch, count = torch.arange(len(x), device=x.device)[:, None], x.shape[1]
            x = x[batch, places]  # (B, L, D)
            rope = rope and tuple(table[places] for table in rope)  # (B, L, D / heads)
        c = (self.t_embedder(t) + conditioning)[:, None]  # (B, 1, D)
        x = self.final_layer(self._run(self.blocks, x, c, rope, there), c)  # (B, N, p·p·C)
        if mask is not None:
            x = x.masked_fill(~there[..., None], 0)
            x = x.new_zeros(len(x), count, x.shape[2]).index_put((batch, places), x)
        return self._unpatchify(x)


DiT_SIZES = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    "1p0B": {"hidden_size": 1536, "depth": 24, "num_heads": 24},
    "1p6B": {"hidden_size": 1792, "depth": 28, "num_heads": 28},
}
