"""The denoiser with a wide head: DiT^DH of RAE (Zheng et al. 2025), after DDT (Wang et al. 2025).

Latents of a vision foundation model have more channels than a DiT has features, and a network narrower than its latents
cannot remove their noise. Here a deep encoder of the usual width works out, for each token, what the image shall be,
and a head of a few blocks, wider than the latents, predicts the velocity with that as its conditioning.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from vavae_tools.diffusion.layers import Backbone, FinalLayer, FourierTimeEmbed, PatchEmbed, sincos_table
from vavae_tools.runtime.errors import UserError


class DDT(Backbone, ModelMixin, ConfigMixin):
    """Latents (B, C, h, w), times in [0, 1] and conditioning vectors (B, encoder's width) → velocity (B, C, h, w).

    The network itself is given the share of noise, 1 − t, and predicts noise − data, as RAE's: `forward` turns both
    around, `predict` does not. At first the output is exactly zero.

    Args:
        hidden_size, depth, num_heads: two numbers each, of the encoder and of the head; one number of heads is both's.
            The head should be wider than `in_channels`.
        pos_embed: add fixed positions to the encoder's tokens; the head's have none but the rotary ones.

    Others are `DiT`'s. The reference's code fails with patch_size above 1, rope=False or adaln_shift=False (its
    `wo_shift`); these work here, and no published weights have them.
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
        heads, depths, widths = _pair("num_heads", num_heads), _two("depth", depth), _two("hidden_size", hidden_size)
        patch_size, of_head = _pair("patch_size", patch_size)
        if patch_size != of_head:  # a token of the encoder conditions the head's token in the same place
            raise UserError(f"patch_size {patch_size} and {of_head}: encoder and head need the same; give one number.")
        self._set_grid(_pair("input_size", input_size), patch_size, in_channels)
        self.encoder_depth, (encoder, head) = depths[0], widths
        self.conditioning_size = encoder
        self.s_embedder = PatchEmbed(patch_size, in_channels, encoder)
        self.x_embedder = PatchEmbed(patch_size, in_channels, head)
        self.t_embedder = FourierTimeEmbed(encoder)
        self.s_projector = nn.Linear(encoder, head) if encoder != head else nn.Identity()
        self.blocks, grid = nn.ModuleList(), (self.rows, self.columns)
        positions = sincos_table(*grid, encoder)[None] if pos_embed else None
        self.register_buffer("enc_pos_embed", positions, persistent=False)  # (1, N, D of the encoder)
        for i, (name, part) in enumerate((("enc_rope", "The encoder's "), ("dec_rope", "The head's "))):
            self.blocks.extend(self._make_blocks(depths[i], widths[i], heads[i], part=part))
            self._register_rope(name, grid, widths[i] // heads[i])
        self.final_layer = FinalLayer(head, patch_size**2 * in_channels, rms_norm)
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """As the reference: only what is named here, the other linear maps keep PyTorch's own initialisation."""
        self._init_adaln_zero([self.s_embedder, self.x_embedder])

    def forward(self, x: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
        return -self.predict(x, 1 - t, conditioning)

    def predict(self, x: Tensor, t: Tensor, conditioning: Tensor | None, s: Tensor | None = None) -> Tensor:
        """Return the network's own prediction at the share of noise t: noise − data, (B, C, h, w).

        Args:
            s: (B, N, D) from `encode`, which is not called then; t and conditioning reach the head through s alone.
        """
        s = self.s_projector(self.encode(x, t, conditioning) if s is None else s)  # (B, N, D of the head)
        x = self._embed(x, self.x_embedder)
        x = self._run(self.blocks[self.encoder_depth :], x, s, self._rope("dec_rope"))
        return self._unpatchify(self.final_layer(x, s))

    def encode(self, x: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
        """Return what conditions the head at each token of x, at the share of noise t: (B, N, D of the encoder)."""
        time = self.t_embedder(t)  # (B, D)
        c = F.silu(time + conditioning)[:, None]  # (B, 1, D)
        s = self._embed(x, self.s_embedder, self.enc_pos_embed)  # (B, N, D)
        s = self._run(self.blocks[: self.encoder_depth], s, c, self._rope("enc_rope"))
        return F.silu(time[:, None] + s)


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    """Two numbers, or one for both."""
    return (value, value) if isinstance(value, int) else _two(name, value)


def _two(name: str, value: Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int) or len(value) != 2:
        raise UserError(f"{name} is {value}, expected two numbers: the encoder's and the head's, as in [1152, 2048].")
    return value[0], value[1]


DDT_SIZES = {
    "S": {"hidden_size": (384, 2048), "depth": (12, 2), "num_heads": (6, 16)},  # published, as the guide of XL
    "B": {"hidden_size": (768, 2048), "depth": (12, 2), "num_heads": (12, 16)},  # a guess: DiT-B with the same head
    "L": {"hidden_size": (1024, 2048), "depth": (24, 2), "num_heads": (16, 16)},  # a guess likewise
    "XL": {"hidden_size": (1152, 2048), "depth": (28, 2), "num_heads": (16, 16)},  # published
}
