"""Blocks of GR00T N1.5's action head: self-attention over images and text, and the diffusion transformer.

Shapes: T tokens of images and text, B samples, R tokens of a sample's action stream, N features. Source: Isaac-GR00T
n1.5, model/action_head/cross_attention_dit.py, and the parts of diffusers that it uses.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from train.models.blocks import (
    ExactLinear,
    LayerNorm,
    Linear,
    attend_all,
    log_spaced,
    sinusoids,
    split_heads,
    wide,
    wide_type,
)
from train.models.checkpointing import Run, plainly
from train.models.inputs import dropout
from train.models.packed import Attention, KeysValues

_TIME_FEATURES = 256

Vl = tuple[torch.Tensor | KeysValues, Attention]
"""Images and text [T, other], or a block's keys and values of them, and which rows attend to which."""


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Dropout of one block in training, keyed by rows."""

    seeds: torch.Tensor
    """int64 [T], or [B, R]: of each row in this block."""
    probability: float

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        """Drop elements of attention's output, which the published model does twice in a row."""
        return dropout(x, self.seeds, 0, 1 - (1 - self.probability) ** 2)

    def hidden(self, x: torch.Tensor) -> torch.Tensor:
        """Drop elements within the perceptron."""
        return dropout(x, self.seeds, 1, self.probability)

    def output(self, x: torch.Tensor) -> torch.Tensor:
        """Drop elements of the perceptron's output."""
        return dropout(x, self.seeds, 2, self.probability)


class FeedForward(nn.Module):
    """A perceptron without a gate."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.fc1 = Linear(size, 4 * size)
        self.fc2 = Linear(4 * size, size)

    def forward(self, x: torch.Tensor, drop: Dropout | None) -> torch.Tensor:
        """Return [..., N] from [..., N]."""
        hidden = F.gelu(self.fc1(x), approximate="tanh")
        if drop is None:
            return self.fc2(hidden)
        return drop.output(self.fc2(drop.hidden(hidden)))


class VlBlock(nn.Module):
    """Self-attention over the images and text of a sample, in both directions and without positions."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = LayerNorm(size)
        self.qkv = Linear(size, 3 * size)
        self.out = Linear(size, size)
        self.norm2 = LayerNorm(size)
        self.ff = FeedForward(size)

    def forward(self, x_TN: torch.Tensor, segments: Attention, drop: Dropout | None) -> torch.Tensor:
        """Return [T, N] from [T, N]."""
        q, k, v = split_heads(self.qkv(self.norm1(x_TN)), [self.heads] * 3)
        mixed = self.out(segments.attend(q, k, v).flatten(1))
        x_TN = x_TN + (mixed if drop is None else drop.attention(mixed))
        return x_TN + self.ff(self.norm2(x_TN), drop)


class TimeEncoder(nn.Module):
    """The denoising time as a vector."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.fc1 = ExactLinear(_TIME_FEATURES, size)
        self.fc2 = ExactLinear(size, size)

    def forward(self, step_B: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return [B, N] of some type from the time's integer step."""
        half = _TIME_FEATURES // 2
        sines, cosines = sinusoids(step_B, log_spaced(half, half - 1, step_B.device)).chunk(2, dim=-1)
        features_BN = torch.cat([cosines, sines], dim=-1).to(dtype)
        return self.fc2(F.silu(self.fc1(features_BN)))


class DitBlock(nn.Module):
    """A block of the action stream that attends to images and text, or, without ``other``, to itself."""

    def __init__(self, size: int, heads: int, other: int | None) -> None:
        super().__init__()
        self.heads, self.is_cross = heads, other is not None
        self.norm1 = LayerNorm(size, elementwise_affine=False)
        self.modulation = ExactLinear(size, 2 * size)
        if other is None:
            self.qkv = ExactLinear(size, 3 * size)
        else:
            self.q = ExactLinear(size, size)
            self.kv = ExactLinear(other, 2 * size)
        self.out = ExactLinear(size, size)
        self.norm2 = LayerNorm(size, elementwise_affine=False)
        self.ff = FeedForward(size)

    def forward(
        self,
        x_BRN: torch.Tensor,
        time_BN: torch.Tensor,
        vl: Vl,
        drop: Dropout | None,
    ) -> torch.Tensor:
        """Return [B, R, N].

        Args:
            time_BN: of the time encoder.
        """
        scale, shift = self.modulation(F.silu(time_BN))[:, None].chunk(2, dim=-1)
        y = _modulated(self.norm1(x_BRN), scale, shift)
        mixed = self.out(self._cross(y, vl) if self.is_cross else attend_all(self.qkv(y), self.heads))
        x_BRN = x_BRN + (mixed if drop is None else drop.attention(mixed))
        return x_BRN + self.ff(self.norm2(x_BRN), drop)

    def remember(self, vl_TN: torch.Tensor) -> KeysValues:
        """Return the keys and values of images and text, which do not depend on the time."""
        k, v = split_heads(self.kv(vl_TN), [self.heads, self.heads])
        return k, v

    def _cross(self, y_BRN: torch.Tensor, vl: Vl) -> torch.Tensor:
        (q,) = split_heads(self.q(y_BRN).flatten(0, 1), [self.heads])
        seen, segments = vl
        k, v = self.remember(seen) if isinstance(seen, torch.Tensor) else seen
        return segments.attend(q, k, v).reshape(y_BRN.shape)


class Dit(nn.Module):
    """The diffusion transformer."""

    def __init__(self, size: int, *, heads: int, layers: int, other: int, out: int) -> None:
        super().__init__()
        self.run: Run = plainly
        self.time = TimeEncoder(size)
        self.blocks = nn.ModuleList(
            [DitBlock(size, heads, other if at % 2 == 0 else None) for at in range(layers)],
        )
        self.norm = LayerNorm(size, elementwise_affine=False, eps=1e-6)
        self.modulation = ExactLinear(size, 2 * size)
        self.out = ExactLinear(size, out)

    def forward(
        self,
        x_BRN: torch.Tensor,
        step_B: torch.Tensor,
        vl: Sequence[Vl],
        drop: tuple[Sequence[torch.Tensor], float] | None,
    ) -> torch.Tensor:
        """Return [B, R, out].

        Args:
            step_B: the time's integer step.
            vl: what each block sees of images and text; blocks of self-attention do not look.
            drop: seeds [B, R] of each block, and probability of dropout.
        """
        time_BN = self.time(step_B, wide_type(x_BRN.dtype))
        for at, (block, seen) in enumerate(zip(self.blocks, vl, strict=True)):
            each = None if drop is None else Dropout(seeds=drop[0][at], probability=drop[1])
            x_BRN = self.run(block, x_BRN, time_BN, seen, each)
        shift, scale = self.modulation(F.silu(time_BN))[:, None].chunk(2, dim=-1)
        return self.out(_modulated(self.norm(x_BRN), scale, shift))

    def remember(self, vl: Vl) -> list[Vl]:
        """Return what each block sees, with its keys and values computed: for several passes over the same."""
        seen, segments = vl
        assert isinstance(seen, torch.Tensor)
        return [
            (block.remember(seen), segments) if isinstance(block, DitBlock) and block.is_cross else vl
            for block in self.blocks
        ]


def _modulated(x_BRN: torch.Tensor, scale_B1N: torch.Tensor, shift_B1N: torch.Tensor) -> torch.Tensor:
    return (wide(x_BRN) * (1 + scale_B1N) + shift_B1N).to(x_BRN.dtype)
