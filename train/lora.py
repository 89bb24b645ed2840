"""Low-rank adapters beside the large projections of a model.

LoRA is added to loaded weights, before FP8, sharding, the optimizer or an average. While it is on, the weight of a
projection ``x`` is called ``x.base.weight``; merging gives it back its name.

Source: Hu et al., LoRA, 2021; Kalajdzievski, rsLoRA, 2023, for the other scale.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from train.ema import copy_tensors
from train.keyed import key_of
from train.models.blocks import Linear


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """Where adapters go, and how large they are.

    openpi takes rank 16 for Gemma and 32 for the action expert, each with an alpha of its rank, on attention and
    feed-forward. It has an adapter each for gate and up, and for every head; here the fused projections share one.
    """

    rank: int = 16
    """Of an adapter, where rank_by_part has no other."""
    alpha: float | None = None
    """An adapter counts alpha / rank; None is its own rank, which makes that 1."""
    rank_by_part: dict[str, int] = field(default_factory=dict)
    """Ranks by regular expression; the first that is found in a projection's name counts."""
    targets: tuple[str, ...] = (".*",)
    """Regular expressions; a projection gets an adapter where one is found in its name."""
    rslora: bool = False
    """Whether an adapter counts alpha / sqrt(rank) instead."""
    dropout: float = 0.0
    """Chance that a number which enters an adapter is dropped in training."""
    freeze_others: bool = True
    """Whether everything but the adapters is frozen; else only the weights beside them are."""
    seed: int = 0
    """Of the adapters' first weights, which depend on it and on the names alone, so that all ranks agree."""

    def __post_init__(self) -> None:
        """Raise ValueError where an adapter would be empty, or its scale no number."""
        ranks = [self.rank, *self.rank_by_part.values()]
        if min(ranks) < 1:
            raise ValueError(f"rank {min(ranks)} makes no adapter; give 1 or more, or leave the part out of targets")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha is {self.alpha}; give a number above 0, or None for the rank")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}; give 0 or more, and less than 1")

    def rank_of(self, name: str) -> int:
        """Return the rank of the adapter beside a projection."""
        found = (rank for pattern, rank in self.rank_by_part.items() if re.search(pattern, name))
        return next(found, self.rank)

    def scale_of(self, name: str) -> float:
        """Return what the adapter beside a projection is multiplied by."""
        rank = self.rank_of(name)
        alpha = rank if self.alpha is None else self.alpha
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank


class LoraLinear(nn.Module):
    """A frozen projection with an adapter of rank R beside it: base(x) + scale * B A x.

    The base is a module of its own, so that another precision may replace it; the adapter stays in the type of x.
    """

    def __init__(self, base: Linear, *, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        self.scale, self.dropout = scale, dropout
        like = {"dtype": torch.float32, "device": base.weight.device}
        self.lora_a = nn.Parameter(torch.empty(rank, base.in_features, **like))
        self.lora_b = nn.Parameter(torch.zeros(base.out_features, rank, **like))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project [..., in] to [..., out], in the type of x."""
        into = nn.functional.dropout(x, self.dropout, self.training) if self.dropout else x
        low = nn.functional.linear(into, self.lora_a.to(x.dtype)) * self.scale
        return self.base(x) + nn.functional.linear(low, self.lora_b.to(x.dtype))


def add_lora(model: nn.Module, config: LoraConfig) -> list[str]:
    """Put adapters beside the targeted large projections, and return the names of these.

    The model computes what it did before, since B begins at 0.

    Raises:
        ValueError: adapters are there already, a pattern finds no projection, or the weights are sharded or not loaded.
    """
    if any(isinstance(module, LoraLinear) for module in model.modules()):
        raise ValueError("the model has adapters already; merge them first")
    linears = {name: module for name, module in model.named_modules() if name and isinstance(module, Linear)}
    found = {name: linear for name, linear in linears.items() if any(re.search(each, name) for each in config.targets)}
    for patterns, names in ((config.targets, linears), (config.rank_by_part, found)):
        for pattern in patterns:
            if not any(re.search(pattern, name) for name in names):
                raise ValueError(
                    f"{pattern!r} is found in none of the names of {len(names)} large projections {list(names)[:3]}; "
                    "correct it, and add adapters before FP8"
                )
    for name, linear in found.items():
        if linear.weight.is_meta or isinstance(linear.weight, DTensor):
            raise ValueError(f"{name} is sharded or has no weights yet; load the model, add adapters, then shard it")
    if config.freeze_others:
        model.requires_grad_(requires_grad=False)
    for name, linear in found.items():
        linear.requires_grad_(requires_grad=False)
        adapted = LoraLinear(linear, rank=config.rank_of(name), scale=config.scale_of(name), dropout=config.dropout)
        _fill_a(adapted.lora_a, seed=config.seed, name=name)
        model.set_submodule(name, adapted.train(linear.training))
    return list(found)


@torch.no_grad()
def merge_lora(model: nn.Module) -> list[str]:
    """Add every adapter to its projection's weight, put that back in its place, and return the names.

    It cannot be undone. The weights stay frozen, and are rounded to their type; a projection that was replaced since by
    one of another precision stays replaced.
    """
    merged = _adapted(model)
    for name, module in merged.items():
        weight = module.base.weight
        weight.copy_(weight.float() + module.scale * (module.lora_b.float() @ module.lora_a.float()))
        model.set_submodule(name, module.base)
    return list(merged)


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the adapters themselves, not copies, by the names of their parameters; scales are not among them.

    Raises:
        ValueError: the model has no adapters.
    """
    adapted = _adapted(model)
    if not adapted:
        raise ValueError("the model has no adapters; add them first")
    return {
        f"{name}.{part}": parameter.detach()
        for name, module in adapted.items()
        for part, parameter in (("lora_a", module.lora_a), ("lora_b", module.lora_b))
    }


def load_lora_state_dict(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """Take over the adapters of a model with the same targets and ranks.

    Raises:
        ValueError: the model has no adapters, or others.
    """
    copy_tensors(state, into=lora_state_dict(model))


def _adapted(model: nn.Module) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def _fill_a(lora_a: nn.Parameter, *, seed: int, name: str) -> None:
    """Fill A with uniform numbers of -1 / sqrt(in) ... 1 / sqrt(in); on the CPU, so that devices agree."""
    generator = torch.Generator().manual_seed(key_of(seed, "lora", name) >> 1)
    bound = 1 / math.sqrt(lora_a.shape[1])
    drawn = torch.empty(lora_a.shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
    with torch.no_grad():
        lora_a.copy_(drawn)
