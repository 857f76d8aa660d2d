"""What stands between a transformer's matrix products, with gradients written out for fewer passes over memory."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def by_hand(*tensors: Tensor) -> bool:
    """Whether to take the functions of this file.

    In full precision outside of `torch.compile`: it makes passes of its own, better ones, from the plain formulas, and
    autocast is left to choose the types. Beside the matrix products, passes are what a training step on a CPU costs.
    """
    if torch.compiler.is_compiling() or torch.is_autocast_enabled(tensors[0].device.type):
        return False
    return all(x.dtype == tensors[0].dtype for x in tensors) and tensors[0].dtype in (torch.float32, torch.float64)


class NormAndModulate(torch.autograd.Function):
    """x / rms(x) · gain + shift, for x (B, N, D) and gain, shift (B, 1, D) or (B, N, D); shift may be None."""

    @staticmethod
    def forward(ctx, x: Tensor, gain: Tensor, shift: Tensor | None, eps: float) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()  # (B, N, 1)
        normed = x * inverse
        ctx.save_for_backward(normed, inverse, gain)
        ctx.shifted = shift is not None
        return normed * gain if shift is None else torch.addcmul(shift, normed, gain)

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor | None, ...]:
        normed, inverse, gain = ctx.saved_tensors
        d_gain = d * normed
        # what of the gradient points along x is lost: it would only change x's length
        along = (d_gain @ gain.mT if gain.shape[1] == 1 else (d_gain * gain).sum(-1, keepdim=True)) / d.shape[-1]
        d_x = (d * gain).addcmul_(normed, along, value=-1).mul_(inverse)
        return d_x, d_gain.sum_to_size(gain.shape), d.sum_to_size(gain.shape) if ctx.shifted else None, None


class AddGated(torch.autograd.Function):
    """x + gate · y, for x and y (B, N, D) and gate (B, 1, D) or (B, N, D)."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(gate, y)
        return torch.addcmul(x, gate, y)

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, y = ctx.saved_tensors
        return d, (d * y).sum_to_size(gate.shape), d * gate


class SplitAndRotate(torch.autograd.Function):
    """The packed (B, N, 3, H, d) → q, k, v (B, H, N, d), q and k turned: as complex numbers, in a single pass.

    The tables are (N, d), or (B, N, d) where every sample has its own.
    """

    @staticmethod
    def forward(ctx, qkv: Tensor, cos: Tensor, signed_sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        turn = torch.complex(cos[..., ::2], signed_sin[..., 1::2])[..., None, :]  # (N, 1, d / 2)
        ctx.save_for_backward(turn)
        turned = as_complex(qkv[:, :, :2]) * turn[..., None, :, :]
        q, k = torch.view_as_real(turned).flatten(-2).transpose(1, 3).unbind(2)
        return q, k, qkv[:, :, 2].transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (turn,) = ctx.saved_tensors
        d_q, d_k, d_v = (d.transpose(1, 2) for d in gradients)  # (B, N, H, d)
        d_qkv = d_q.new_empty(*d_q.shape[:2], 3, *d_q.shape[2:])
        for i, d in enumerate((d_q, d_k)):
            d = d if d.stride(-1) == 1 else d.contiguous()
            torch.mul(as_complex(d), turn.conj(), out=as_complex(d_qkv[:, :, i]))
        d_qkv[:, :, 2] = d_v
        return d_qkv, None, None


def as_complex(x: Tensor) -> Tensor:
    """Pairs of neighbouring features (..., d) as complex numbers (..., d / 2): a view."""
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


class GateBySwish(torch.autograd.Function):
    """silu(gate) · value, for (gate, value) side by side in (..., 2·hidden)."""

    @staticmethod
    def forward(ctx, both: Tensor) -> Tensor:
        gate, value = both.chunk(2, dim=-1)
        swish = F.silu(gate)
        ctx.save_for_backward(both, swish)
        return swish * value

    @staticmethod
    @once_differentiable
    def backward(ctx, d: Tensor) -> Tensor:
        both, swish = ctx.saved_tensors
        gate, value = both.chunk(2, dim=-1)
        d_both = torch.empty_like(both)
        d_gate, d_value = d_both.chunk(2, dim=-1)
        torch.mul(swish, d, out=d_value)
        torch.ops.aten.silu_backward(d * value, gate, grad_input=d_gate)
        return d_both


def add_gated(x: Tensor, gate: Tensor, y: Tensor) -> Tensor:
    return AddGated.apply(x, gate, y) if by_hand(x, gate, y) else x + gate * y
