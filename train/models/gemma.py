"""Gemma with an action expert: two streams of layers, the second of which attends to the keys and values of the first.

The first stream never sees the second, so it runs through all its layers at once, and its keys and values serve any
number of passes of the second: one in training, each denoising step in sampling.

Shapes: T tokens of images and text, B samples, H actions of a chunk, N features, K heads of keys, D features of a
head. Source: openpi, models_pytorch/gemma_pytorch.py.
"""

import torch
from torch import nn

from train.models.blocks import AdaRmsNorm, GatedMlp, Linear, RmsNorm, Rotary, split_heads
from train.models.config import Pi05Config
from train.models.packed import KeysValues, Layout

THETA = 10_000.0
"""Of the rotary positions."""


class PrefixLayer(nn.Module):
    """A layer of images and text."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.split = [config.heads, config.kv_heads, config.kv_heads]
        self.norm1 = RmsNorm(config.width, plus_one=True)
        self.qkv = Linear(config.width, sum(self.split) * config.head_dim, bias=False)
        self.out = Linear(config.heads * config.head_dim, config.width, bias=False)
        self.norm2 = RmsNorm(config.width, plus_one=True)
        self.mlp = GatedMlp(config.width, config.mlp, "gelu")

    def forward(self, x_TN: torch.Tensor, rotary: Rotary, layout: Layout) -> tuple[torch.Tensor, KeysValues]:
        """Return ([T, N], keys and values)."""
        q, k, v = split_heads(self.qkv(self.norm1(x_TN)), self.split)
        k, v = rotary.rotate(k), v.contiguous()
        x_TN = x_TN + self.out(layout.prefix(rotary.rotate(q), k, v).flatten(1))
        return x_TN + self.mlp(self.norm2(x_TN)), (k, v)


class LastPrefixLayer(nn.Module):
    """What the actions need of the last layer of images and text: its keys and values.

    Queries, output, perceptron and final norm would feed nothing.
    """

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        self.kv_heads = config.kv_heads
        self.norm1 = RmsNorm(config.width, plus_one=True)
        self.kv = Linear(config.width, 2 * config.kv_heads * config.head_dim, bias=False)

    def forward(self, x_TN: torch.Tensor, rotary: Rotary) -> KeysValues:
        """Return keys and values."""
        k, v = split_heads(self.kv(self.norm1(x_TN)), [self.kv_heads, self.kv_heads])
        return rotary.rotate(k), v.contiguous()


class ExpertLayer(nn.Module):
    """A layer of actions; its norms, and the gates of its residuals, depend on the time."""

    def __init__(self, config: Pi05Config) -> None:
        super().__init__()
        size = config.expert_width
        self.split = [config.heads, config.kv_heads, config.kv_heads]
        self.norm1 = AdaRmsNorm(size, size)
        self.qkv = Linear(size, sum(self.split) * config.head_dim, bias=False)
        self.out = Linear(config.heads * config.head_dim, size, bias=False)
        self.norm2 = AdaRmsNorm(size, size)
        self.mlp = GatedMlp(size, config.expert_mlp, "gelu")

    def forward(
        self,
        x_BHN: torch.Tensor,
        condition_BN: torch.Tensor,
        rotary: Rotary,
        before: KeysValues,
        layout: Layout,
    ) -> torch.Tensor:
        """Return [B, H, N]; ``before`` are the keys and values of the same layer of images and text."""
        y, gate = self.norm1(x_BHN, condition_BN)
        q, k, v = split_heads(self.qkv(y).flatten(0, 1), self.split)
        mixed = layout.suffix(rotary.rotate(q), before, (rotary.rotate(k), v))
        x_BHN = x_BHN + gate * self.out(mixed.reshape(*x_BHN.shape[:2], -1))
        y, gate = self.norm2(x_BHN, condition_BN)
        return x_BHN + gate * self.mlp(y)
