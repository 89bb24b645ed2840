"""Activation checkpointing: computing a layer again in the backward pass in place of keeping what it computed."""

from collections.abc import Callable
from typing import Any

from torch.utils.checkpoint import checkpoint

Run = Callable[..., Any]
"""Runs a layer on its arguments."""


def plainly(layer: Callable[..., Any], *arguments: Any) -> Any:
    """Run a layer, keeping its activations."""
    return layer(*arguments)


def again(layer: Callable[..., Any], *arguments: Any) -> Any:
    """Run a layer, keeping what goes in alone; the backward pass runs it again."""
    # Nothing here draws from a generator: dropout is keyed.
    return checkpoint(layer, *arguments, use_reentrant=False, preserve_rng_state=False)


MODES: dict[str, Run] = {"none": plainly, "layers": again}
"""What ``model.run`` may be, by name."""
