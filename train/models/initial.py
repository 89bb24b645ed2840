"""Weights to begin training from nothing, each drawn from its own name: the same on any number of ranks."""

import torch
from torch import nn

from train.keyed import key_of
from train.models.blocks import CategoryLinear, Embedding, LayerNorm, RmsNorm


@torch.no_grad()
def initialise(model: nn.Module, *, seed: int = 0) -> None:
    """Fill all weights: projections by the size of what comes in, norms with what leaves things as they are.

    Norms that depend on a condition begin at zero, gates of residuals with them, as the published models began.
    """
    for name, module in model.named_modules():
        for kind, weight in module.named_parameters(recurse=False):
            full = f"{name}.{kind}"
            if isinstance(module, LayerNorm | RmsNorm):
                is_one = kind == "weight" and not (isinstance(module, RmsNorm) and module.plus_one)
                weight.fill_(float(is_one))
            elif kind == "bias" or name.endswith(".dense"):
                weight.zero_()
            else:
                _draw(weight, _spread(module, weight), key_of(seed, full))


def _spread(module: nn.Module, weight: torch.Tensor) -> float:
    """Return the standard deviation of a module's weights."""
    if isinstance(module, Embedding):
        # Text is scaled by the square root of this in pi-0.5, and learned queries start small.
        return weight.shape[1] ** -0.5
    return weight.shape[1 if isinstance(module, CategoryLinear) else -1] ** -0.5


def _draw(weight: torch.Tensor, spread: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed >> 1)
    weight.copy_(torch.randn(weight.shape, generator=generator) * spread)
