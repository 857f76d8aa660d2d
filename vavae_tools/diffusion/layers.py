"""The denoiser: LightningDiT (Yao & Wang 2025), a diffusion transformer (DiT, Peebles & Xie 2023) with modern parts.

Against the plain DiT it has rotary positions (RoPE, Su et al. 2021), SwiGLU (Shazeer 2020) and RMSNorm (Zhang &
Sennrich 2019). Parameters bear the reference's names, so that published weights load as they are. The network knows
nothing of noise schedules, classes or guidance: t in [0, 1] and a conditioning vector come in, a velocity goes out.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vavae_tools.diffusion.fused import GateBySwish, NormAndModulate, SplitAndRotate, add_gated, by_hand
from vavae_tools.runtime.errors import UserError

Rope = tuple[Tensor, Tensor]


class Kept(NamedTuple):
    """The patches that are computed, of each sample those in its mask, made equally many by some that are not.

    Attributes:
        places: their numbers, int64 (B, L), those in the mask first.
        there: which of them are in the mask, bool (B, L): the others are not attended to.
    """

    places: Tensor
    there: Tensor


def kept_patches(mask: Tensor, patch_size: int) -> Kept:
    """The patches that have any pixel in a mask (B, H, W). Of a mask on a GPU this waits for the GPU."""
    there = F.max_pool2d(mask[:, None].float(), patch_size).flatten(1) > 0  # (B, N)
    longest = max(1, int(there.sum(1).max()))
    places = (~there).int().argsort(dim=1, stable=True)[:, :longest]
    return Kept(places, there.gather(1, places))


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back to x's type, then times a learned weight."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).to(x.dtype) * self.weight


def make_norm(dim: int, rms_norm: bool) -> nn.Module:
    return RMSNorm(dim) if rms_norm else nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    x = x * (1 + scale)
    return x if shift is None else x + shift


def sincos_table(height: int, width: int, dim: int) -> Tensor:
    """Fixed 2-D position embedding (height·width, dim): the column in the first half of the features, then the row."""
    omega = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))

    def one_axis(position: Tensor) -> Tensor:
        angle = position[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)  # (h·w, dim / 2)

    rows, columns = _grid(height, width)
    return torch.cat([one_axis(columns), one_axis(rows)], dim=1).float()


def rope_table(height: int, width: int, head_dim: int) -> Rope:
    """Cosines and signed sines (height·width, head_dim) for `rotate`: rows turn the first half, columns the second.

    Neighbouring features are a pair (a, b) that turns by its angle to (a·cos − b·sin, b·cos + a·sin); the minus is
    already in the table, so that `rotate` needs only a swap of neighbours.
    """
    half = head_dim // 2
    frequency = 10000.0 ** (-torch.arange(0, half, 2, dtype=torch.float64) / half)
    rows, columns = _grid(height, width)
    angle = torch.cat([rows[:, None] * frequency, columns[:, None] * frequency], dim=1)  # (h·w, head_dim / 2)
    cos = angle.cos().repeat_interleave(2, dim=1)
    sin = torch.stack([-angle.sin(), angle.sin()], dim=2).flatten(1)
    return cos.float(), sin.float()


def _grid(height: int, width: int) -> tuple[Tensor, Tensor]:
    """Row and column of every token, row by row: float64 (height·width,)."""
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)
    return rows, columns


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring features of x (..., N, head_dim) by its token's angle."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (a, b) → (b, a)
    return x * cos + swapped * signed_sin


def norm_and_modulate(norm: nn.Module, x: Tensor, shift: Tensor | None, scale: Tensor) -> Tensor:
    if isinstance(norm, RMSNorm) and by_hand(x, scale, norm.weight):
        return NormAndModulate.apply(x, norm.weight * (1 + scale), shift, norm.eps)
    return modulate(norm(x), shift, scale)


class PatchEmbed(nn.Module):
    """Each square of patch_size² pixels → a vector: a convolution by its weights, a matrix product in practice.

    The convolution's own output has the features before the tokens in memory, and all that follows would inherit it.
    """

    def __init__(self, patch_size: int, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        p, q = self.proj.kernel_size
        patches = rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=q)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # (B, N, D)


class TimeEmbed(nn.Module):
    """t in [0, 1] (not scaled by 1000) → cosines and sines → a two-layer network."""

    def __init__(self, dim: int, num_features: int = 256) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(nn.Linear(num_features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        half = self.num_features // 2
        k = torch.arange(half, dtype=torch.float32, device=t.device)
        angle = t.float()[:, None] * torch.exp(k * (-math.log(10000.0) / half))  # (B, half)
        features = torch.cat([angle.cos(), angle.sin()], dim=1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))  # (B, D)


class FourierTimeEmbed(nn.Module):
    """t in [0, 1] → sines and cosines of random frequencies → a two-layer network, as RAE's models (Zheng et al. 2025).

    The frequencies `W` are drawn once and belong to the weights: a model with others is a ruined one.
    """

    def __init__(self, dim: int, num_features: int = 512) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(num_features // 2), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(num_features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float()[:, None] * self.W.float() * (2 * math.pi)  # (B, num_features / 2)
        features = torch.cat([angle.sin(), angle.cos()], dim=1)
        return self.mlp(features.to(self.mlp[0].weight.dtype))  # (B, D)


TIME_EMBEDS = {"sinusoidal": TimeEmbed, "fourier": FourierTimeEmbed}


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool, rms_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        head_dim = dim // num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        if qk_norm:  # the LayerNorm here is affine with eps 1e-5, unlike the blocks' own
            self.q_norm = RMSNorm(head_dim) if rms_norm else nn.LayerNorm(head_dim)
            self.k_norm = RMSNorm(head_dim) if rms_norm else nn.LayerNorm(head_dim)
        else:
            self.q_norm = self.k_norm = nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: Rope | None, there: Tensor | None = None) -> Tensor:
        """x (B, N, D), tables (N, head_dim) or (B, N, head_dim); where `there` (B, N) is false none attends to."""
        qkv = rearrange(self.qkv(x), "b n (three h d) -> b n three h d", three=3, h=self.num_heads)
        if rope is not None and isinstance(self.q_norm, nn.Identity) and by_hand(qkv, *rope):
            q, k, v = SplitAndRotate.apply(qkv, *rope)
        else:
            q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, N, d)
            q, k = self.q_norm(q), self.k_norm(k)
            if rope is not None:
                cos, sin = (table.unsqueeze(-3) for table in rope)  # the same for all heads
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        attended = None if there is None else there[:, None, None]  # (B, 1, 1, N)
        # Norms and the table may have made q and k float32 under autocast; softmax is in float32 inside the kernel.
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=attended)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class SwiGLU(nn.Module):
    """A perceptron whose second half of features is let through by silu of the first.

    In half precision a card's matrix units take rows of a multiple of 8, and ⅔ · 4 · 1024 is 2730: there zeros, which
    change nothing, stand behind both halves. They are put there as the weights are cast, which autocast would do too.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)
        self.lacking = -hidden % 8

    def forward(self, x: Tensor) -> Tensor:
        half = self.lacking and half_on_card(x)
        if half and type(self.w12) is type(self.w3) is nn.Linear:  # no LoRA beside them
            return self.padded(x, half)
        both = self.w12(x)
        if by_hand(both):
            return self.w3(GateBySwish.apply(both))
        gate, value = both.chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)

    def padded(self, x: Tensor, kind: torch.dtype) -> Tensor:
        """The same with zeros behind gate and value, computed in `kind`."""
        into, bias = (part.to(kind).unflatten(0, (2, -1)) for part in (self.w12.weight, self.w12.bias))  # (2, h, …)
        into, bias = F.pad(into, (0, 0, 0, self.lacking)).flatten(0, 1), F.pad(bias, (0, self.lacking)).flatten()
        gate, value = F.linear(x.to(kind), into, bias).chunk(2, dim=-1)
        back = F.pad(self.w3.weight.to(kind), (0, self.lacking))
        return F.linear(F.silu(gate) * value, back, self.w3.bias.to(kind))


_MANY_TOKENS = 4096
"""From here on the products cost far more than that weights are copied: at 256 tokens a picture, 16 pictures."""


def half_on_card(x: Tensor) -> torch.dtype | None:
    """The half precision that products with many tokens x (…, D) are computed in on a card; None elsewhere.

    None under `torch.compile`, too: its products are padded by itself.
    """
    if x.device.type != "cuda" or x.shape[:-1].numel() < _MANY_TOKENS or torch.compiler.is_compiling():
        return None
    kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return kind if kind in (torch.float16, torch.bfloat16) else None


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then a perceptron, each on a normed and modulated copy of x and added back through a gate (adaLN)."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, qk_norm: bool, swiglu: bool, rms_norm: bool, adaln_shift: bool
    ) -> None:
        super().__init__()
        self.adaln_shift = adaln_shift
        hidden = int(dim * mlp_ratio)
        self.norm1 = make_norm(dim, rms_norm)
        self.attn = Attention(dim, num_heads, qk_norm, rms_norm)
        self.norm2 = make_norm(dim, rms_norm)
        self.mlp = SwiGLU(dim, int(2 / 3 * hidden)) if swiglu else MLP(dim, hidden)  # ⅔: as many weights as the MLP
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (6 if adaln_shift else 4) * dim))

    def forward(self, x: Tensor, c: Tensor, rope: Rope | None, there: Tensor | None = None) -> Tensor:
        """x (B, N, D); c (B, 1, D), or (B, N, D) with a conditioning of its own for each token; `there` (B, N)."""
        if self.adaln_shift:
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        else:
            scale_1, gate_1, scale_2, gate_2 = self.adaLN_modulation(c).chunk(4, dim=-1)
            shift_1 = shift_2 = None
        x = add_gated(x, gate_1, self.attn(norm_and_modulate(self.norm1, x, shift_1, scale_1), rope, there))
        return add_gated(x, gate_2, self.mlp(norm_and_modulate(self.norm2, x, shift_2, scale_2)))


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out_features: int, rms_norm: bool) -> None:
        super().__init__()
        self.norm_final = make_norm(dim, rms_norm)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(norm_and_modulate(self.norm_final, x, shift, scale))


def patch_grid(
    input_size: int | tuple[int, int], patch_size: int, hidden_size: int, num_heads: int, rope: bool, part: str = ""
) -> tuple[int, int]:
    """Rows and columns of patches.

    Args:
        part: whose hidden_size it is, for the message.

    Raises:
        UserError: the patches do not fill the latents, or the heads the features.
    """
    height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
    if height % patch_size or width % patch_size:
        raise UserError(f"input_size {height}×{width} cannot be cut into patches of {patch_size}×{patch_size}.")
    if hidden_size % num_heads or hidden_size % 4 or (rope and hidden_size // num_heads % 4):
        raise UserError(
            f"{part}hidden_size {hidden_size} with num_heads {num_heads}: the heads must divide it"
            + (" into parts that are multiples of 4 (for rope)." if rope else ", and 4 too (for the positions).")
        )
    return height // patch_size, width // patch_size


def begin_as_identity(
    embedders: Iterable[PatchEmbed], t_embedder: nn.Module, blocks: Iterable[Block], final_layer: FinalLayer
) -> None:
    """The beginning that all DiTs share: blocks that pass x on unchanged, and an output of exactly zero."""
    for embedder in embedders:
        # The patch convolution is a linear map of each patch: initialised as the matrix it is.
        nn.init.xavier_uniform_(embedder.proj.weight.view(embedder.proj.out_channels, -1))
        nn.init.zeros_(embedder.proj.bias)
    for layer in (t_embedder.mlp[0], t_embedder.mlp[2]):
        nn.init.normal_(layer.weight, std=0.02)
    # adaLN-zero: closed gates make each block the identity, from where deep models train well.
    modulations = [part.adaLN_modulation[1] for part in (*blocks, final_layer)]
    for layer in (*modulations, final_layer.linear):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)


def check_latents(x: Tensor, latent_shape: tuple[int, int, int]) -> None:
    """Say it where latents (B, C, h, w) are not of the shape that a denoiser was made for."""
    if x.shape[1:] != latent_shape:
        found, expected = ("×".join(map(str, shape)) for shape in (x.shape[1:], latent_shape))
        raise UserError(f"The latents are {found} (channels×height×width), this model was made for {expected}.")
