"""The denoiser for images from sentences: `DiT`'s blocks with cross-attention to a caption's tokens in each.

As in PixArt (Chen et al. 2023) the caption comes in twice: token by token through attention, and as a whole, beside the
time, in the modulation.
"""

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from vavae_tools.diffusion.conditioning import TextCondition
from vavae_tools.diffusion.layers import Backbone
from vavae_tools.diffusion.transformer import DiT_SIZES

TEXT_DIT_SIZES = {"T2I": {"hidden_size": 768, "depth": 16, "num_heads": 12}, **DiT_SIZES}


class TextDiT(Backbone, ModelMixin, ConfigMixin):
    """Latents (B, C, h, w), times in [0, 1] and a `TextCondition` → what it was trained to predict, (B, C, h, w).

    That is a velocity, or noise: the network does not know. Captions may have any length. Its arguments are `DiT`'s;
    `head`, always "text", tells `make_denoiser` this model's numbers from a `DiT`'s.
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
        self._set_grid(input_size, patch_size, in_channels)
        self._build(in_channels, cross_attention=True)

    def forward(self, x: Tensor, t: Tensor, condition: TextCondition) -> Tensor:
        """x (B, C, h, w), t (B,) with 0 = noise and 1 = data → (B, C, h, w)."""
        mask, any_text = condition.mask, condition.mask.any(1, keepdim=True)  # (B, L), (B, 1)
        seen = (mask | ~any_text)[:, None, None]  # (B, 1, 1, L): of a caption without tokens all, as softmax needs one
        text = condition.tokens.masked_fill(~mask[:, :, None], 0)  # what is no number there must not become 0 · NaN
        x = self._embed(x, self.x_embedder, self.pos_embed)  # (B, N, D)
        c = (self.t_embedder(t) + condition.vector)[:, None]  # (B, 1, D)
        x = self._run(self.blocks, x, c, self._rope(), None, (text, seen, any_text[:, None]))
        return self._unpatchify(self.final_layer(x, c))
