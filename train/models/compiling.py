"""Compile a model layer by layer: layers that are alike share one graph.

That takes seconds where a whole model takes minutes, and layers are what sharding wraps too.
"""

from collections.abc import Iterator

from torch import nn

from train.models.groot import Groot
from train.models.pi05 import Pi05


def layers_of(model: Pi05 | Groot) -> Iterator[nn.Module]:
    """Yield the layers of a model, which hold nearly all of its weights, in the order of computation."""
    yield from model.vision.layers
    yield from model.language
    if isinstance(model, Pi05):
        yield model.last
        yield from model.expert
    else:
        yield from model.vl
        yield from model.dit.blocks


def compile_layers(model: Pi05 | Groot, *, backend: str = "inductor") -> None:
    """Compile each layer in place, without graph breaks; packs of the same budgets share the graphs."""
    for layer in layers_of(model):
        layer.compile(fullgraph=True, dynamic=False, backend=backend)
