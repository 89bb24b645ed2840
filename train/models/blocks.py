"""The parts that the models are built of: projections, norms, rotary positions, perceptrons.

Shapes: T rows of any kind, N features, H heads, D features of a head, C categories. Weights may be float32 masters
while activations are bfloat16: each part casts its weights to the type of what comes in, and computes norms and
rotations in float32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

_GROUP_ALIGN = 8
"""Features of a grouped product are padded to a multiple: its rows have to begin at multiples of 16 bytes."""


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return x as float32, or as float64 where it is, as only tests compute."""
    return x.to(wide_type(x.dtype))


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type that ``wide`` gives."""
    return dtype if dtype == torch.float64 else torch.float32


class Linear(nn.Linear):
    """A large projection: what ``train.precision`` may replace by one in FP8."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project [..., in] to [..., out], in the type of x."""
        return _project(self, x)


class ExactLinear(nn.Linear):
    """A small or delicate projection, which is never replaced."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project [..., in] to [..., out], in the type of x."""
        return _project(self, x)


def _project(module: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, module.weight.to(x.dtype), None if module.bias is None else module.bias.to(x.dtype))


def split_heads(x: torch.Tensor, counts: Sequence[int]) -> tuple[torch.Tensor, ...]:
    """Cut [T, all heads x D] into parts of some heads each: [T, heads, D]."""
    return x.unflatten(-1, (sum(counts), -1)).split(list(counts), dim=1)


def attend_all(qkv_BRN: torch.Tensor, heads: int) -> torch.Tensor:
    """Return what the rows of each sample gather from all of its rows [B, R, N], from their fused projection."""
    q, k, v = qkv_BRN.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Embedding(nn.Embedding):
    """A table of vectors; its rows are cast, not the table."""


class RmsNorm(nn.Module):
    """Root-mean-square norm over the last dimension; Gemma's scales by 1 + weight, Qwen's by weight."""

    def __init__(self, size: int, *, plus_one: bool = False, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.plus_one, self.eps = plus_one, eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [..., N], in the type of x."""
        scale = wide(self.weight)
        return (rms(x, self.eps) * (1 + scale if self.plus_one else scale)).to(x.dtype)


class AdaRmsNorm(nn.Module):
    """Root-mean-square norm whose scale, shift and gate come from a condition."""

    def __init__(self, size: int, condition: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.dense = ExactLinear(condition, 3 * size)
        self.eps = eps

    def forward(self, x_BHN: torch.Tensor, condition_BN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (normalised [B, H, N], gate of the residual [B, 1, N]), in the type of x."""
        scale, shift, gate = wide(self.dense(condition_BN))[:, None].chunk(3, dim=-1)
        return (rms(x_BHN, self.eps) * (1 + scale) + shift).to(x_BHN.dtype), gate.to(x_BHN.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm, computed in float32."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [..., N], in the type of x."""
        weight = None if self.weight is None else wide(self.weight)
        bias = None if self.bias is None else wide(self.bias)
        return F.layer_norm(wide(x), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class GatedMlp(nn.Module):
    """Perceptron with a gate: down(act(gate(x)) * up(x)), gate and up in one product."""

    def __init__(self, size: int, hidden: int, activation: Literal["gelu", "silu"]) -> None:
        super().__init__()
        self.gate_up = Linear(size, 2 * hidden, bias=False)
        self.down = Linear(hidden, size, bias=False)
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [..., N] from [..., N]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        gate = F.silu(gate) if self.activation == "silu" else F.gelu(gate, approximate="tanh")
        return self.down(gate * up)


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Rotary positions of some rows."""

    cos: torch.Tensor
    """float32 [T, 1, D / 2]."""
    sin: torch.Tensor
    """float32 [T, 1, D / 2]."""

    def rotate(self, x_THD: torch.Tensor) -> torch.Tensor:
        """Rotate queries or keys [T, H, D] by their positions, in their type."""
        first, second = wide(x_THD).chunk(2, dim=-1)
        turned = (first * self.cos - second * self.sin, second * self.cos + first * self.sin)
        return torch.cat(turned, dim=-1).to(x_THD.dtype)


def rotary(positions: torch.Tensor, head_dim: int, theta: float) -> Rotary:
    """Return the rotations of rows at some positions [T].

    Source: Su et al., RoFormer, 2021, with halves in place of pairs as in Gemma and Qwen.
    """
    exponents = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions[:, None, None].float() * theta**-exponents
    return Rotary(cos=angles.cos(), sin=angles.sin())


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x over its root mean square along the last dimension, as float32."""
    x = wide(x)
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Samples sorted by category, so that each category's weights are read once."""

    order_B: torch.Tensor
    """int64: sample of each place."""
    inverse_B: torch.Tensor
    """int64: place of each sample."""
    sorted_B: torch.Tensor
    """int64: category of each place."""
    ends_C: torch.Tensor
    """int32: place behind the last of each category."""


def group(category_B: torch.Tensor, num_categories: int) -> Groups:
    """Return samples sorted by category, stably; no category's size is read back from the device."""
    sorted_B, order_B = torch.sort(category_B, stable=True)
    every_C = torch.arange(num_categories, device=category_B.device)
    return Groups(
        order_B=order_B,
        inverse_B=torch.argsort(order_B),
        sorted_B=sorted_B,
        ends_C=torch.searchsorted(sorted_B, every_C, right=True).to(torch.int32),
    )


class CategoryLinear(nn.Module):
    """A projection with weights of its own for each category of sample, as one grouped product."""

    def __init__(self, num_categories: int, size: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_categories, size, out))
        self.bias = nn.Parameter(torch.empty(num_categories, out))

    def forward(self, x_BRN: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Project R rows of each sample, samples sorted: [B, R, in] to [B, R, out]."""
        bias_B1 = self.bias[groups.sorted_B][:, None].to(x_BRN.dtype)
        if x_BRN.dtype != torch.bfloat16:
            # GPUs and the compiler have no grouped products of other types, so each sample gets a copy of its weights.
            return torch.bmm(x_BRN, self.weight[groups.sorted_B].to(x_BRN.dtype)) + bias_B1
        num_rows = x_BRN.shape[1]
        weight = self.weight.to(x_BRN.dtype)
        pad = -weight.shape[1] % _GROUP_ALIGN
        out_pad = -weight.shape[2] % _GROUP_ALIGN
        x = F.pad(x_BRN.flatten(0, 1), (0, pad))
        weight = F.pad(weight, (0, out_pad, 0, pad))
        y = F.grouped_mm(x.contiguous(), weight.contiguous(), offs=groups.ends_C * num_rows)
        y = y[:, : self.bias.shape[1]].unflatten(0, (-1, num_rows))
        return y + bias_B1


def sinusoids(time_B: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
    """Return the sines, then the cosines of times under some angular frequencies F: float32 [B, 2 F].

    Angles have the frequencies' type. They are large, so their rounding shows in the result, and the models differ in
    it: pi-0.5 was trained with float64 angles, GR00T with float32 ones.
    """
    angles = time_B.to(frequencies.dtype)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def log_spaced(count: int, over: int, device: torch.device) -> torch.Tensor:
    """Return frequencies from 1 towards 1 / 10,000 in ``over`` steps, of which ``count`` are taken: float32."""
    return torch.exp(-math.log(10_000) * torch.arange(count, device=device, dtype=torch.float32) / over)
