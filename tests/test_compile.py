"""Compiled models: one graph for every pack of the same budgets, with the numbers of models that are not compiled."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from goldens import FAMILIES, config_of, golden_model, golden_samples, pack_inputs
from torch._dynamo.testing import CompileCounterWithBackend

from train.freezing import PRESETS, freeze
from train.made import Lengths, packed_inputs, random_sample
from train.models.blocks import AdaRmsNorm, CategoryLinear, Embedding
from train.models.build import build
from train.models.checkpointing import checkpoint_activations
from train.models.compiling import compile_layers, layers_of
from train.models.config import CONFIGS, GrootConfig, ModelConfig
from train.models.flow import Loss
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


def run(model: Pi05 | Groot, call: Callable[[Inputs], Loss], inputs: Inputs) -> Step:
    model.zero_grad()
    loss = call(inputs)
    loss.mean.backward()
    grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
    return loss.mean.detach(), loss.sample_B, grads


def assert_equal(found: Step, wanted: Step, *, tolerance: float = 1e-5) -> None:
    """Fail where losses or gradients differ by more than a share of the largest of a tensor."""
    assert found[2].keys() == wanted[2].keys()
    for name, (a, b) in {
        "mean": (found[0], wanted[0]),
        "samples": (found[1], wanted[1]),
        **{name: (each, wanted[2][name]) for name, each in found[2].items()},
    }.items():
        assert (a - b).abs().max() <= tolerance * b.abs().max(), name


def eager_steps(model: Pi05 | Groot) -> list[tuple[Inputs, Step]]:
    """Return packs of one size, with what a model that is not compiled makes of them."""
    steps = [(each, run(model, model, each)) for each in packs(model.config)]
    num_trained = sum(each.requires_grad for each in model.parameters())
    assert all(len(grads) == num_trained for _, (_, _, grads) in steps)
    assert all(each.abs().max() > 0 for each in steps[0][1][2].values())
    return steps


def assert_whole_compiles(model: Pi05 | Groot) -> None:
    """Fail where a model breaks its graph, has more than one, or gives other numbers."""
    steps, counter = eager_steps(model), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for inputs, wanted in steps:
        assert_equal(run(model, compiled, inputs), wanted)
    assert counter.frame_count == 1


def changed(model: Pi05 | Groot, *, again: bool = False, fp8: bool = False, frozen: str = "none") -> Pi05 | Groot:
    freeze(model, PRESETS[model.config.family][frozen])
    checkpoint_activations(model, "layers" if again else "none")
    if fp8:
        assert apply_precision(model, PrecisionConfig(backend="emulate", min_features=16)).converted
    return model


@pytest.mark.parametrize(("family", "compute"), [("pi05", "float32"), ("groot_n15", "bfloat16")])
def test_one_graph_serves_every_packing(family: str, compute: str) -> None:
    assert_whole_compiles(made(small(family, compute)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "compute", "frozen"),
    [
        ("pi05", "bfloat16", "expert_only"),
        ("groot_n15", "float32", "published"),
    ],
)
def test_one_graph_serves_every_packing_with_fp8_and_layers_computed_again(
    family: str, compute: str, frozen: str
) -> None:
    assert_whole_compiles(changed(made(small(family, compute)), again=True, fp8=True, frozen=frozen))


KINDS = {"pi05": 4, "groot_n15": 5}
"""Of layers; pi-0.5 has a last one of images and text, GR00T two of its diffusion transformer."""


# What goes into a layer is no leaf. The compiler looks at its .grad, and hides the warning where it would be shown: too
# late where warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("family", "compute", "again", "fp8"),
    [
        ("pi05", "float32", False, False),
        pytest.param("groot_n15", "bfloat16", True, True, marks=pytest.mark.slow),
        pytest.param("pi05", "bfloat16", True, True, marks=pytest.mark.slow),
        pytest.param("groot_n15", "float32", False, False, marks=pytest.mark.slow),
    ],
)
def test_layers_that_are_alike_share_one_graph(family: str, compute: str, again: bool, fp8: bool) -> None:
    config = small(family, compute)
    config = replace(config, layers=3, vision=replace(config.vision, layers=2))
    if isinstance(config, GrootConfig):
        config = replace(config, vl_layers=2, dit_layers=4)
    model = changed(made(config), again=again, fp8=fp8)
    steps, counter = eager_steps(model), CompileCounterWithBackend("aot_eager")
    compile_layers(model)
    with torch.compiler.set_stance("default", force_backend=counter):
        for inputs, wanted in steps:
            assert_equal(run(model, model, inputs), wanted)
    assert counter.frame_count == KINDS[family]


def test_layers_are_those_that_hold_nearly_all_weights() -> None:
    for name in ("pi05", "groot_n15"):
        model = build(CONFIGS[name], device="meta")
        layers = list(layers_of(model))
        assert len(layers) == {"pi05": 27 + 18 + 18, "groot_n15": 27 + 12 + 4 + 16}[name]
        held = sum(weight.numel() for layer in layers for weight in layer.parameters())
        others = [weight.numel() for weight in model.parameters()]
        tables = sum(each.weight.numel() for each in model.modules() if isinstance(each, Embedding | CategoryLinear))
        assert held > 0.98 * (sum(others) - tables)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_inductor_gives_the_numbers_of_the_goldens(family: str) -> None:
    model, samples, compiled = golden_model(family), golden_samples(family), golden_model(family)
    compile_layers(compiled)
    # Of the same sizes, and packed otherwise.
    for inputs in (pack_inputs(model.config, samples), pack_inputs(model.config, samples[::-1])):
        assert_equal(run(compiled, compiled, inputs), run(model, model, inputs), tolerance=1e-4)
