"""Short trainings of tiny models on real frames of a Unitree G1."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lakes import add
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lake import Lake, Release
from train.loader import LoaderConfig, ReadConfig, open_loader
from train.models.config import ModelConfig
from train.models.inputs import Inputs, inputs_of
from train.optimizer import OptimizerConfig, clip_gradients, learning_rate, make_optimizer, set_learning_rate
from train.plan import OrderConfig, PackConfig
from train.precision import PrecisionConfig, precision_context
from train.samples import SampleConfig

TOKENS = 800
"""Of a pack: two samples of the G1, which has one camera."""


def g1_release(folder: Path, source: Path) -> Release:
    """Return a release of the G1's good episodes, whose pictures are 64 pixels wide; no Ray is needed."""
    lake = Lake.create(str(folder / "lake"))
    add(lake, source)
    return lake.make_release()


def config_for(model: ModelConfig, *, tokens: int = TOKENS, **order: object) -> LoaderConfig:
    """Return what a loader is opened with, so that its packs fit a model.

    Args:
        tokens: of a pack.
        order: fields of the order. One of the six good episodes is held out for validation.
    """
    return LoaderConfig(
        order=replace(OrderConfig(lanes=1, validation_fraction=0.2), **order),  # type: ignore[arg-type]
        packs=PackConfig(family=model.family, tokens=tokens, vocab=model.vocab),  # type: ignore[arg-type]
        sample=SampleConfig(horizon=model.horizon, image_size=model.vision.image_size),
        read=ReadConfig(threads=2),
    )


def training_packs(release: Release, model: ModelConfig, count: int) -> list[Inputs]:
    """Return the first packs for training."""
    with open_loader(release, config_for(model)) as loader:
        return [inputs_of(batch, model) for batch in islice(loader, count)]


def validation_packs(release: Release, model: ModelConfig) -> list[Inputs]:
    """Return every frame of the episode that is held out, once."""
    with open_loader(release, config_for(model, split="validation", one_pass=True)) as loader:
        return [inputs_of(batch, model) for batch in loader if batch.num_samples]


def train_model(
    model: nn.Module, packs: Sequence[Inputs], optimizer: OptimizerConfig, precision: PrecisionConfig
) -> list[float]:
    """Train a model whose precision was applied, a step on each pack; return the loss of each."""
    adamw = make_optimizer(model, optimizer)
    losses = []
    for step, pack in enumerate(packs):
        set_learning_rate(adamw, learning_rate(optimizer, step))
        with precision_context(precision):
            loss = model(pack).mean
        loss.backward()
        clip_gradients(model.parameters(), optimizer.clip_norm)
        adamw.step()
        adamw.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def mean_loss(model: nn.Module, packs: Sequence[Inputs]) -> float:
    """Return the mean loss over all that counts in some packs, without dropout."""
    model.eval()
    losses = [model(pack) for pack in packs]
    model.train()
    return (sum(each.total for each in losses) / sum(each.weight for each in losses)).item()


class FloatProducts(TorchDispatchMode):
    """Multiply matrices of bfloat16 in float32 and round the result, which is what units for bfloat16 do.

    Processors without such units take several times as long by themselves.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS and args[-1].dtype == torch.bfloat16:
            return func(*(each.float() for each in args), **(kwargs or {})).bfloat16()
        return func(*args, **(kwargs or {}))


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
