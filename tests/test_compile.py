"""Compiled models: one graph for every pack of the same budgets, and the numbers of the models that are not compiled."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from goldens import FAMILIES, config_of, golden_model, golden_samples, pack_inputs
from torch._dynamo.testing import CompileCounterWithBackend

from train.freezing import PRESETS, freeze
from train.made import Lengths, packed_inputs, random_sample
from train.models.blocks import AdaRmsNorm
from train.models.build import build
from train.models.checkpointing import MODES
from train.models.compiling import compile_layers
from train.models.config import GrootConfig, ModelConfig
from train.models.groot import Groot
from train.models.inputs import Inputs
from train.models.pi05 import Pi05
from train.packing import Budgets
from train.precision import PrecisionConfig, apply_precision

Step = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
"""The loss, that of each sample, and the gradients."""

BUDGETS = Budgets(tokens=64, images=6, samples=5)
PACKINGS = [
    [(2, 7), (1, 5), (3, 1)],
    [(0, 30)],
    [],
    # Every budget is full.
    [(1, 10), (1, 8), (1, 9), (2, 4), (1, 9)],
]
"""Views, of four tokens each, and text tokens of each sample."""


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@cache
def small(family: str, compute: str = "float32") -> ModelConfig:
    """Return the configuration of a golden with as few layers as show everything; GR00T's with dropout."""
    config = config_of(family)
    config = replace(config, vision=replace(config.vision, layers=1), layers=2, compute=compute)
    return replace(config, vl_layers=1, dit_layers=2, dropout=0.3) if isinstance(config, GrootConfig) else config


def made(config: ModelConfig) -> Pi05 | Groot:
    """Return a model of which every weight gets a gradient: norms that depend on the time begin at zero otherwise."""
    model = build(config, seed=3)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, AdaRmsNorm):
                module.dense.weight.copy_(0.2 * torch.randn(module.dense.weight.shape, generator=generator))
    return model


def packs(config: ModelConfig) -> list[Inputs]:
    return [
        packed_inputs(
            config,
            [random_sample(config, Lengths(views=v, text=t), seed=10 * n + at) for at, (v, t) in enumerate(packing)],
            BUDGETS,
        )
        for n, packing in enumerate(PACKINGS)
    ]


def run(model: Pi05 | Groot, call: torch.nn.Module, inputs: Inputs) -> Step:
    model.zero_grad()
    loss = call(inputs)
    loss.mean.backward()
    grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return loss.mean.detach(), loss.sample_B, grads


def assert_equal(found: Step, wanted: Step, *, tolerance: float) -> None:
    """Fail where losses or gradients differ by more than a share of the largest of a tensor."""
    assert found[2].keys() == wanted[2].keys()
    for name, (a, b) in {
        "mean": (found[0], wanted[0]),
        "samples": (found[1], wanted[1]),
        **{name: (each, wanted[2][name]) for name, each in found[2].items()},
    }.items():
        assert (a - b).abs().max() <= tolerance * b.abs().max(), name


def assert_compiles(model: Pi05 | Groot, *, backend: str = "aot_eager", tolerance: float = 1e-5) -> None:
    """Fail where a model breaks its graph, has a graph for each packing, or other numbers."""
    inputs = packs(model.config)
    wanted = [run(model, model, each) for each in inputs]
    num_trained = sum(each.requires_grad for each in model.parameters())
    assert all(len(each[2]) == num_trained for each in wanted)
    assert all(each.abs().max() > 0 for name, each in wanted[0][2].items())
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for each, eager in zip(inputs, wanted, strict=True):
        assert_equal(run(model, compiled, each), eager, tolerance=tolerance)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("family", "compute"), [("pi05", "float32"), ("groot_n15", "bfloat16")])
def test_one_graph_serves_every_packing(family: str, compute: str) -> None:
    assert_compiles(made(small(family, compute)))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_serves_every_packing_with_layers_computed_again_in_fp8(family: str) -> None:
    model = made(small(family))
    model.run = MODES["layers"]
    assert apply_precision(model, PrecisionConfig(backend="emulate", min_features=16)).converted
    assert_compiles(model)
