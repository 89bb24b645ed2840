"""Activation checkpointing: computing a layer again in the backward pass in place of keeping what it computed."""

from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.utils.checkpoint import checkpoint

Run = Callable[..., Any]
"""Runs a layer on its arguments."""


def plainly(layer: Callable[..., Any], *arguments: Any) -> Any:
    """Run a layer, keeping its activations."""
    return layer(*arguments)


def again(layer: Callable[..., Any], *arguments: Any) -> Any:
    """Run a layer, keeping what goes in alone; the backward pass runs it again."""
    # The models' own dropout is keyed, but adapters draw theirs from a generator.
    return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=True)


Mode = Literal["none", "layers"]
MODES: dict[Mode, Run] = {"none": plainly, "layers": again}
"""What runs each layer, by name."""


def checkpoint_activations(model: nn.Module, mode: Mode) -> None:
    """Choose what the layers of a model keep for the backward pass: all (none), or what goes in alone (layers)."""
    for module in model.modules():
        if hasattr(module, "run"):
            module.run = MODES[mode]  # type: ignore[assignment]
