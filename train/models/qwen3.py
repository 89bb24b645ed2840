"""Qwen3: the causal language model under GR00T N1.5.

Shapes: T tokens, N features. Source: transformers, models/qwen3.
"""

import torch
from torch import nn

from train.models.blocks import GatedMlp, Linear, RmsNorm, Rotary, split_heads
from train.models.config import GrootConfig
from train.models.packed import Attention

THETA = 1_000_000.0
"""Of the rotary positions."""


class Qwen3Layer(nn.Module):
    """One layer; queries and keys are normalised by head."""

    def __init__(self, config: GrootConfig) -> None:
        super().__init__()
        self.split = [config.heads, config.kv_heads, config.kv_heads]
        self.norm1 = RmsNorm(config.width)
        self.qkv = Linear(config.width, sum(self.split) * config.head_dim, bias=False)
        self.q_norm = RmsNorm(config.head_dim)
        self.k_norm = RmsNorm(config.head_dim)
        self.out = Linear(config.heads * config.head_dim, config.width, bias=False)
        self.norm2 = RmsNorm(config.width)
        self.mlp = GatedMlp(config.width, config.mlp, "silu")

    def forward(self, x_TN: torch.Tensor, rotary: Rotary, segments: Attention) -> torch.Tensor:
        """Return [T, N] from [T, N]."""
        q, k, v = split_heads(self.qkv(self.norm1(x_TN)), self.split)
        q, k = rotary.rotate(self.q_norm(q)), rotary.rotate(self.k_norm(k))
        x_TN = x_TN + self.out(segments.attend(q, k, v, causal=True).flatten(1))
        return x_TN + self.mlp(self.norm2(x_TN))
