"""SigLIP: images to patch features.

Shapes: I images, S their side, P patches of an image, N features. Source: transformers, models/siglip.
"""

import torch
import torch.nn.functional as F
from torch import nn

from train.models.blocks import Embedding, ExactLinear, LayerNorm, Linear, attend_all, wide
from train.models.checkpointing import Run, plainly
from train.models.config import VisionConfig


class SiglipLayer(nn.Module):
    """One layer; all images have as many patches, so attention needs no segments."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = LayerNorm(config.width, eps=1e-6)
        self.qkv = ExactLinear(config.width, 3 * config.width)
        self.out = ExactLinear(config.width, config.width)
        self.norm2 = LayerNorm(config.width, eps=1e-6)
        self.fc1 = Linear(config.width, config.mlp)
        self.fc2 = Linear(config.mlp, config.width)

    def forward(self, x_IPN: torch.Tensor) -> torch.Tensor:
        """Return [I, P, N] from [I, P, N]."""
        x_IPN = x_IPN + self.out(attend_all(self.qkv(self.norm1(x_IPN)), self.heads))
        return x_IPN + self.fc2(F.gelu(self.fc1(self.norm2(x_IPN)), approximate="tanh"))


class Siglip(nn.Module):
    """The tower without its pooling head."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.run: Run = plainly
        self.patch = ExactLinear(3 * config.patch**2, config.width)
        self.position = Embedding(config.tokens, config.width)
        self.layers = nn.ModuleList([SiglipLayer(config) for _ in range(config.layers)])
        self.norm = LayerNorm(config.width, eps=1e-6)

    def forward(self, images_ISSC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return features [I, P, N] of some type.

        Args:
            images_ISSC: uint8 RGB, or floats in [-1, 1].
        """
        pixels = images_ISSC.float() / 127.5 - 1 if images_ISSC.dtype == torch.uint8 else wide(images_ISSC)
        side, patch = self.config.image_size // self.config.patch, self.config.patch
        patches = pixels.unflatten(2, (side, patch)).unflatten(1, (side, patch))
        patches = patches.permute(0, 1, 3, 5, 2, 4).flatten(3).flatten(1, 2)
        x = (self.patch(patches) + wide(self.position.weight)).to(dtype)
        for layer in self.layers:
            x = self.run(layer, x)
        return self.norm(x)
