"""Layers of the denoisers, and `Backbone`, which all of them share; parameters bear the references' names.

Blocks are LightningDiT's (Yao & Wang 2025): those of the diffusion transformer (DiT, Peebles & Xie 2023) with rotary
positions (RoPE, Su et al. 2021), SwiGLU (Shazeer 2020) and RMSNorm (Zhang & Sennrich 2019).
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vavae_tools.runtime.errors import UserError, check_known


class TokenSubset(NamedTuple):
    """The patches that are computed, equally many of each sample."""

    indices: Tensor  # int64 (B, L), those in the mask first
    valid: Tensor  # which of them are in the mask, bool (B, L); the others fill up and are not attended to


def select_tokens(mask: Tensor, patch_size: int) -> TokenSubset:
    """Return the patches that have any pixel in a mask (B, H, W). Of a mask on a GPU this waits for the GPU."""
    covered = F.max_pool2d(mask[:, None].float(), patch_size).flatten(1) > 0  # (B, N)
    longest = max(1, int(covered.sum(1).max()))
    indices = (~covered).int().argsort(dim=1, stable=True)[:, :longest]
    return TokenSubset(indices, covered.gather(1, indices))


class RMSNorm(nn.Module):
    """x / rms(x) in float32, cast back to x's type, then times a learned weight."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype) * self.weight


def make_norm(dim: int, rms_norm: bool) -> nn.Module:
    return RMSNorm(dim) if rms_norm else nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def make_qk_norm(dim: int, qk_norm: bool, rms_norm: bool) -> nn.Module:
    if not qk_norm:
        return nn.Identity()
    return RMSNorm(dim) if rms_norm else nn.LayerNorm(dim)  # affine with eps 1e-5, unlike the blocks' own


def _angles(height: int, width: int, count: int) -> tuple[Tensor, Tensor]:
    """Return row and column of every token times `count` falling frequencies: float64 (height·width, count) each."""
    frequency = 10000.0 ** (-torch.arange(count, dtype=torch.float64) / count)
    rows = torch.arange(height, dtype=torch.float64).repeat_interleave(width)
    columns = torch.arange(width, dtype=torch.float64).repeat(height)
    return rows[:, None] * frequency, columns[:, None] * frequency


def sincos_table(height: int, width: int, dim: int) -> Tensor:
    """Return fixed 2-D positions (height·width, dim): the column in the first half of the features, then the row."""
    rows, columns = _angles(height, width, dim // 4)
    return torch.cat([columns.sin(), columns.cos(), rows.sin(), rows.cos()], dim=1).float()


def rope_table(height: int, width: int, head_dim: int) -> Tensor:
    """Return cosines and signed sines (2, height·width, head_dim) for `rotate`: half by row, then half by column.

    Neighbouring features (a, b) turn to (a·cos − b·sin, b·cos + a·sin); the minus is in the table.
    """
    angle = torch.cat(_angles(height, width, head_dim // 4), dim=1)  # (h·w, head_dim / 2)
    cos = angle.cos().repeat_interleave(2, dim=1)
    sin = torch.stack([-angle.sin(), angle.sin()], dim=2).flatten(1)
    return torch.stack([cos, sin]).float()


def rotate(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Turn each pair of neighbouring features of x (..., N, head_dim) by its token's angle."""
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (a, b) → (b, a)
    return x * cos + swapped * signed_sin


class PatchEmbed(nn.Module):
    """Each square of patch_size² pixels → a vector: a convolution, as a matrix product for the memory's order."""

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

    def features(self, t: Tensor) -> Tensor:
        half = self.num_features // 2
        k = torch.arange(half, dtype=torch.float32, device=t.device)
        angle = t[:, None] * torch.exp(k * (-math.log(10000.0) / half))  # (B, half)
        return torch.cat([angle.cos(), angle.sin()], dim=1)

    def forward(self, t: Tensor) -> Tensor:
        return self.mlp(self.features(t.float()).to(self.mlp[0].weight.dtype))  # (B, D)


class FourierTimeEmbed(TimeEmbed):
    """As `TimeEmbed` with random frequencies `W`, which belong to the weights, as RAE's models (Zheng et al. 2025)."""

    def __init__(self, dim: int, num_features: int = 512) -> None:
        frequencies = torch.randn(num_features // 2)
        super().__init__(dim, num_features)
        self.W = nn.Parameter(frequencies, requires_grad=False)

    def features(self, t: Tensor) -> Tensor:
        angle = t[:, None] * self.W.float() * (2 * math.pi)  # (B, num_features / 2)
        return torch.cat([angle.sin(), angle.cos()], dim=1)


TIME_EMBEDS = {"sinusoidal": TimeEmbed, "fourier": FourierTimeEmbed}


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int, qk_norm: bool, rms_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = make_qk_norm(dim // num_heads, qk_norm, rms_norm)
        self.k_norm = make_qk_norm(dim // num_heads, qk_norm, rms_norm)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: Tensor | None, valid: Tensor | None = None) -> Tensor:
        """x (B, N, D), rope (2, N, head_dim) or (2, B, N, head_dim); where `valid` (B, N) is false none attends to."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            cos, sin = rope.unsqueeze(-3)  # the same for all heads
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mask = None if valid is None else valid[:, None, None]  # (B, 1, 1, N)
        # Norms and the table may have made q and k float32 under autocast; softmax is in float32 inside the kernel.
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask)
        return self.proj(rearrange(x, "b h n d -> b n (h d)"))


class CrossAttention(nn.Module):
    """Attention of image tokens (B, N, D) to text tokens (B, L, D)."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, rms_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.q_norm = make_qk_norm(dim // num_heads, qk_norm, rms_norm)
        self.k_norm = make_qk_norm(dim // num_heads, qk_norm, rms_norm)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, text: Tensor, seen: Tensor, any_text: Tensor) -> Tensor:
        """`seen` bool (B, 1, 1, L), one token or more in each row; `any_text` bool (B, 1, 1): false gives 0."""
        q = rearrange(self.q(x), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.kv(text), "b l (two h d) -> two b h l d", two=2, h=self.num_heads)
        q, k = self.q_norm(q), self.k_norm(k)
        x = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=seen)
        return self.proj(rearrange(x, "b h n d -> b n (h d)").masked_fill(~any_text, 0))


class SwiGLU(nn.Module):
    """A perceptron whose second half of features is let through by silu of the first.

    A card's matrix units take half-precision rows of a multiple of 8, which ⅔ · 4 · 1024 is not: there zeros, which
    change nothing, are put behind both halves.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)
        self.lacking = -hidden % 8

    def forward(self, x: Tensor) -> Tensor:
        half = self.lacking and half_precision_of(x)
        if half and type(self.w12) is type(self.w3) is nn.Linear:  # no LoRA beside them
            return self.padded(x, half)
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)

    def padded(self, x: Tensor, kind: torch.dtype) -> Tensor:
        """The same with zeros behind gate and value, computed in `kind`."""
        into, bias = (part.to(kind).unflatten(0, (2, -1)) for part in (self.w12.weight, self.w12.bias))  # (2, h, …)
        into, bias = F.pad(into, (0, 0, 0, self.lacking)).flatten(0, 1), F.pad(bias, (0, self.lacking)).flatten()
        gate, value = F.linear(x.to(kind), into, bias).chunk(2, dim=-1)
        back = F.pad(self.w3.weight.to(kind), (0, self.lacking))
        return F.linear(F.silu(gate) * value, back, self.w3.bias.to(kind))


def half_precision_of(x: Tensor) -> torch.dtype | None:
    """Return the half precision of products with 4096 tokens or more, x (…, D), on a card; None elsewhere.

    With fewer, copies of weights cost as much as they save; `torch.compile` pads by itself.
    """
    if x.device.type != "cuda" or x.shape[:-1].numel() < 4096 or torch.compiler.is_compiling():
        return None
    kind = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    return kind if kind in (torch.float16, torch.bfloat16) else None


def mlp(dim: int, hidden: int) -> nn.Sequential:
    layers = {"fc1": nn.Linear(dim, hidden), "gelu": nn.GELU(approximate="tanh"), "fc2": nn.Linear(hidden, dim)}
    return nn.Sequential(OrderedDict(layers))


class Block(nn.Module):
    """Attention, if asked also to a text, and a perceptron: each of a normed, modulated x, added by a gate (adaLN)."""

    def __init__(self, dim: int, num_heads: int, config: Mapping[str, Any], cross_attention: bool = False) -> None:
        super().__init__()
        self.size_of_modulation = 3 if config.get("adaln_shift", True) else 2  # shift, scale and gate, or without shift
        self.num_modulations = (3 if cross_attention else 2) * self.size_of_modulation
        hidden, rms_norm = int(dim * config["mlp_ratio"]), config["rms_norm"]
        self.norm1 = make_norm(dim, rms_norm)
        self.attn = Attention(dim, num_heads, config["qk_norm"], rms_norm)
        self.norm2 = make_norm(dim, rms_norm)
        if cross_attention:
            self.cross = CrossAttention(dim, num_heads, config["qk_norm"], rms_norm)
            self.norm3 = make_norm(dim, rms_norm)
        # ⅔: as many weights as the MLP
        self.mlp = SwiGLU(dim, int(2 / 3 * hidden)) if config["swiglu"] else mlp(dim, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, self.num_modulations * dim))

    def forward(
        self, x: Tensor, c: Tensor, rope: Tensor | None, valid: Tensor | None = None, text: tuple[Tensor, ...] = ()
    ) -> Tensor:
        """x (B, N, D); c (B, 1, D) or (B, N, D); `valid` (B, N), see `Attention`; text: what `CrossAttention` takes."""
        parts, step = self.adaLN_modulation(c).chunk(self.num_modulations, dim=-1), self.size_of_modulation
        x = _add(x, parts[:step], self.norm1, self.attn, rope, valid)
        if text:
            x = _add(x, parts[step : 2 * step], self.norm2, self.cross, *text)
        return _add(x, parts[-step:], self.norm3 if text else self.norm2, self.mlp)


def _add(x: Tensor, modulation: tuple[Tensor, ...], norm: nn.Module, branch: nn.Module, *arguments: Any) -> Tensor:
    """Return x + gate · branch(norm of x · (1 + scale) + shift), for (shift, scale, gate) or (scale, gate)."""
    *shift, scale, gate = modulation
    modulated = norm(x) * (1 + scale)
    return x + gate * branch(modulated + shift[0] if shift else modulated, *arguments)


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out_features: int, rms_norm: bool) -> None:
        super().__init__()
        self.norm_final = make_norm(dim, rms_norm)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class Backbone:
    """Mixin of the denoisers: patches and their positions, a loop over blocks, and patches back to latents."""

    _supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012  (diffusers wants a list)
    _repeated_blocks = ["Block"]  # noqa: RUF012  (for compile_repeated_blocks: one block's code serves all)
    gradient_checkpointing = False

    def _set_grid(self, input_size: int | Sequence[int], patch_size: int, in_channels: int) -> None:
        height, width = (input_size, input_size) if isinstance(input_size, int) else input_size
        if height % patch_size or width % patch_size:
            raise UserError(f"input_size {height}×{width} cannot be cut into patches of {patch_size}×{patch_size}.")
        self.rows, self.columns = height // patch_size, width // patch_size
        self.in_channels, self.patch_size = in_channels, patch_size
        self.latent_shape = (in_channels, height, width)

    def _make_blocks(self, depth: int, dim: int, num_heads: int, cross_attention: bool = False, part: str = "") -> list:
        """Return blocks as `config` says; `part` names them in a message."""
        rope = self.config.rope
        if dim % num_heads or dim % 4 or (rope and dim // num_heads % 4):
            parts = " into parts that are multiples of 4 (for rope)" if rope else ", and 4 too (for positions)"
            raise UserError(f"{part}hidden_size {dim} with num_heads {num_heads}: the heads must divide it{parts}")
        return [Block(dim, num_heads, self.config, cross_attention) for _ in range(depth)]

    def _build(self, cross_attention: bool = False) -> None:
        """Make a denoiser with one stack of blocks as `config` says."""
        config, dim = self.config, self.config.hidden_size
        self._set_grid(config.input_size, config.patch_size, config.in_channels)
        check_known("time_embed", config.time_embed, TIME_EMBEDS)
        self.conditioning_size = dim
        self.x_embedder = PatchEmbed(self.patch_size, self.in_channels, dim)
        self.t_embedder = TIME_EMBEDS[config.time_embed](dim)
        self.blocks = nn.ModuleList(self._make_blocks(config.depth, dim, config.num_heads, cross_attention))
        out_channels = self.in_channels * (2 if config.get("learn_sigma") else 1)
        self.final_layer = FinalLayer(dim, self.patch_size**2 * out_channels, config.rms_norm)
        in_order = config.get("positions") == "sequence"
        grid = (1, self.rows * self.columns) if in_order else (self.rows, self.columns)
        self.register_buffer("pos_embed", sincos_table(*grid, dim)[None], persistent=False)  # (1, N, D)
        rope = rope_table(*grid, dim // config.num_heads) if config.rope else None
        self.register_buffer("rope_table", rope, persistent=False)  # (2, N, D / heads)
        self._initialize()

    def _initialize(self, linear: bool = True) -> None:
        """As the references: at first every block passes x on unchanged and the output is exactly zero.

        Without `linear`, as DiT^DH, linear maps that are not named here keep PyTorch's own initialisation.
        """
        for module in self.modules():
            if linear and isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, PatchEmbed):  # a linear map of each patch: initialised as the matrix it is
                nn.init.xavier_uniform_(module.proj.weight.flatten(1))
                nn.init.zeros_(module.proj.bias)
        for layer in (self.t_embedder.mlp[0], self.t_embedder.mlp[2]):
            nn.init.normal_(layer.weight, std=0.02)
        # adaLN-zero: closed gates make each block the identity, from where deep models train well.
        modulations = [part.adaLN_modulation[1] for part in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _embed(self, x: Tensor, embedder: PatchEmbed, positions: Tensor | None = None) -> Tensor:
        """Latents (B, C, h, w) → tokens (B, N, D), under autocast float32 where positions are added."""
        if x.shape[1:] != self.latent_shape:
            found, expected = ("×".join(map(str, shape)) for shape in (x.shape[1:], self.latent_shape))
            raise UserError(f"The latents are {found} (channels×height×width), this model was made for {expected}.")
        x = embedder(x.to(embedder.proj.weight.dtype))
        return x if positions is None else x + positions

    def _run(self, blocks: Iterable[Block], x: Tensor, c: Tensor, rope: Tensor | None, *arguments: Any) -> Tensor:
        for block in blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, c, rope, *arguments)
            else:
                x = block(x, c, rope, *arguments)
        return x

    def _unpatchify(self, x: Tensor) -> Tensor:
        """Tokens (B, N, p·p·C) → (B, C, h, w)."""
        p = self.patch_size
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=self.rows, w=self.columns, p=p, q=p)
