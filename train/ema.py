"""Moving average of a model's trainable weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

DECAYS = {"pi05": 0.99, "pi05_libero": 0.999}
"""The published ones. Source: openpi, training/config.py."""


class Ema:
    """A float32 average of the trainable parameters: average = decay * average + (1 - decay) * weights.

    Build it after the weights are loaded and sharded, and what is frozen is frozen. Sharded parameters have sharded
    averages, and no update communicates.
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.99, warmup: bool = False) -> None:
        """Start the average at the weights.

        Args:
            decay: how much of the average is kept at each update.
            warmup: whether early updates keep less, as ``decay_at`` says.

        Raises:
            ValueError: a decay outside 0 ... 1, nothing trainable, or weights that are not there yet.
        """
        if not 0 <= decay < 1:
            raise ValueError(f"decay is {decay}; give 0 or more, and less than 1")
        self.decay, self.warmup = decay, warmup
        self._model = model
        self._live = {name: each for name, each in model.named_parameters() if each.requires_grad}
        if not self._live:
            raise ValueError("the model has no trainable parameter to average; leave some unfrozen")
        if absent := [name for name, each in self._live.items() if each.is_meta]:
            raise ValueError(f"{absent[0]} has no weights yet; load the model, then build its average")
        self._average = {name: each.detach().clone().float() for name, each in self._live.items()}

    @torch.no_grad()
    def update(self, step: int | None = None) -> None:
        """Move the average towards the weights.

        Args:
            step: of the optimizer, the first is 0; needed only with a warm-up.

        Raises:
            ValueError: a warm-up without a step.
        """
        decay = self.decay
        if self.warmup:
            if step is None:
                raise ValueError("an average with warm-up needs the step at each update; give it")
            decay = decay_at(decay, step)
        live = [_local(each).float() for each in self._live.values()]
        torch._foreach_lerp_([_local(each) for each in self._average.values()], live, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @contextmanager
    def swap(self) -> Iterator[None]:
        """Put the average into the model, and back what was there when the block ends, however it ends.

        It takes memory for one more copy of the trainable weights. What the block changes in them is lost.
        """
        with torch.no_grad():
            kept = [_local(each).clone() for each in self._live.values()]
        try:
            self._put([_local(each) for each in self._average.values()])
            yield
        finally:
            self._put(kept)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the average itself, not a copy, by the names of the parameters."""
        return dict(self._average)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over an average.

        Raises:
            ValueError: other names or shapes than the trainable parameters have.
        """
        copy_tensors(state, into=self._average)

    @torch.no_grad()
    def _put(self, weights: list[torch.Tensor]) -> None:
        # Of an evaluation before, FSDP may hold gathered weights, and would take them for those of now.
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        for live, weight in zip(self._live.values(), weights, strict=True):
            _local(live).copy_(weight)


def decay_at(decay: float, step: int) -> float:
    """Return min(decay, (1 + step) / (10 + step)): what an average with warm-up keeps at a step, the first being 0.

    Source: TensorFlow, ExponentialMovingAverage with num_updates.
    """
    return min(decay, (1 + step) / (10 + step))


def copy_tensors(given: Mapping[str, torch.Tensor], *, into: Mapping[str, torch.Tensor]) -> None:
    """Copy tensors into those of the same names, or none of them.

    Raises:
        ValueError: other names or shapes.
    """
    missing, unknown = sorted(into.keys() - given.keys()), sorted(given.keys() - into.keys())
    if missing or unknown:
        raise ValueError(
            f"{len(missing)} tensors are missing {missing[:3]} and {len(unknown)} are unknown {unknown[:3]}; give the "
            "state of a model with the same parts trainable"
        )
    for name, tensor in into.items():
        if given[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has the shape {tuple(given[name].shape)} where {tuple(tensor.shape)} is needed; give the "
                "state of a model of the same sizes"
            )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(given[name])


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a tensor, which shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
