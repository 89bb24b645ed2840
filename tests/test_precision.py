"""Tests of train/precision.py, train/fp8_emulated.py and train/fp8_inference.py."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from train.fp8_emulated import Recipe, rounded
from train.fp8_inference import BLOCK, BlockLinear, from_blocks, quantise, to_blocks
from train.models.blocks import Linear
from train.precision import (
    Applied,
    Backend,
    PrecisionConfig,
    _check_device,
    apply_precision,
    eligible,
    plain_state_dict,
    precision_context,
    refresh_scales,
)

RELAXED = settings(deadline=None, max_examples=25)
RECIPES: tuple[Recipe, ...] = get_args(Recipe)
TRAINED = [(backend, recipe) for backend in ("emulate", "torchao") for recipe in RECIPES]
TYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
]
"""Of masters and of activations."""


class Other(Linear):
    """A class of somebody else, whose forward we do not know."""


class Model(nn.Module):
    """Two projections that are converted, one that is too small, and three of other classes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = Linear(64, 96)
        self.block = nn.ModuleDict({"down": Linear(96, 48, bias=False)})
        self.narrow = Linear(48, 16)
        self.odd = Linear(48, 40)
        self.head = nn.Linear(48, 32)
        self.other = Other(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.block["down"](nn.functional.gelu(self.up(x)))
        cast = self.head.weight.to(y.dtype), self.head.bias.to(y.dtype)
        return nn.functional.linear(y, *cast) + self.other(y)


def config_of(backend: Backend, recipe: Recipe = "tensorwise") -> PrecisionConfig:
    return PrecisionConfig(backend=backend, recipe=recipe, min_features=32)


def model_of(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return Model().to(dtype)


def one(module: Linear, config: PrecisionConfig) -> Any:
    model = nn.Sequential(module)
    apply_precision(model, config)
    return model


def step(model: Any, x: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Return (output, gradient of the input, gradients of the parameters)."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(grad)
    grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert x.grad is not None
    return [y.detach(), x.grad, *grads]


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    found, wanted = (each.to_local() if isinstance(each, DTensor) else each for each in (found, wanted))
    found, wanted = found.float(), wanted.float()
    return ((found - wanted).norm() / wanted.norm()).item()


# Which projections


@pytest.mark.parametrize(
    ("K", "N", "tensorwise", "rowwise"),
    [
        (2048, 2560, True, False),  # Gemma's query, key and value as one
        (2048, 2048, True, False),  # its output
        (2048, 32_768, True, True),  # gate and up
        (16_384, 2048, True, False),  # down
        (2048, 256, False, False),  # key or value alone
        (1152, 4304, True, True),  # SigLIP
        (4304, 1152, True, False),
        (1024, 8192, True, False),  # the action expert
        (4096, 1024, False, False),
        (4112, 1024, True, False),
        (4096, 1040, True, False),
        (2048, 4096, True, False),
        (2064, 4096, True, True),
        (2049, 4096, False, False),
        (2048, 32_760, False, False),
    ],
)
def test_a_projection_is_eligible_where_torchao_finds_that_it_gains(
    K: int, N: int, tensorwise: bool, rowwise: bool
) -> None:
    from torchao.float8 import _auto_filter_for_recipe

    assert eligible(K, N) == tensorwise
    assert eligible(K, N, recipe="rowwise") == eligible(K, N, recipe="rowwise_with_gw_hp") == rowwise
    with torch.device("meta"):
        projection = nn.Linear(K, N)
    assert _auto_filter_for_recipe("tensorwise", [])(projection, "name") == tensorwise
    assert _auto_filter_for_recipe("rowwise", [])(projection, "name") == rowwise


def test_min_features_stands_instead_of_the_rule_but_not_of_the_multiples_of_16() -> None:
    assert eligible(32, 32, min_features=32)
    assert not eligible(32, 16, min_features=32)
    assert not eligible(16, 32, min_features=32)
    assert not eligible(40, 32, min_features=32)
    assert not eligible(2048, 2560, min_features=4096)


@pytest.mark.parametrize("backend", ["emulate", "torchao"])
def test_only_large_projections_are_replaced_and_their_parameters_stay(backend: Backend) -> None:
    model = model_of().eval()
    model.up.train()
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    before = {name: type(module) for name, module in model.named_modules()}
    applied = apply_precision(model, config_of(backend))
    assert applied.converted == ("up", "block.down")
    assert set(applied.skipped) == {"narrow", "odd"}
    assert "less than min_features=32" in applied.skipped["narrow"]
    assert "not both multiples of 16" in applied.skipped["odd"]
    changed = {name for name, module in model.named_modules() if type(module) is not before[name]}
    assert changed == {"up", "block.down"}
    assert list(model.state_dict()) == keys
    assert [id(each) for each in model.parameters()] == [id(each) for each in parameters.values()]
    assert model.up.training
    assert not model.block["down"].training


@pytest.mark.parametrize("backend", ["emulate", "torchao"])
def test_a_projection_in_several_places_stays_one(backend: Backend) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = Linear(32, 32)
            self.b = self.a
            self.deep = nn.Sequential(self.a)

    model = Shared()
    assert apply_precision(model, config_of(backend)).converted == ("a", "b", "deep.0")
    assert type(model.a) is not Linear
    assert model.a is model.b is model.deep[0]


def test_no_back_end_leaves_the_model_alone() -> None:
    model = model_of()
    assert apply_precision(model, PrecisionConfig()) == Applied(converted=(), skipped={})
    assert type(model.up) is Linear


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        (Model(), PrecisionConfig(backend="emulate"), "up: K=64 and N=96 are too small .* lower min_features"),
        (nn.Sequential(nn.Linear(32, 32)), config_of("emulate"), "the model has none"),
        (Linear(32, 32), config_of("emulate"), "wrap it in a module"),
        (Model(), config_of("block"), "call train.fp8_inference.quantise"),
    ],
)
def test_a_model_that_cannot_be_converted_is_refused(model: nn.Module, config: PrecisionConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        apply_precision(model, config)


def test_precision_is_chosen_once() -> None:
    model = model_of()
    apply_precision(model, config_of("emulate"))
    with pytest.raises(ValueError, match="build the model anew"):
        apply_precision(model, config_of("torchao"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"backend": "fp4"}, "no back end 'fp4' .* none, emulate, torchao, te, block"),
        ({"recipe": "delayed"}, "no FP8 recipe 'delayed'; there are tensorwise"),
        ({"backend": "te", "recipe": "rowwise"}, "te has no recipe 'rowwise'"),
        ({"backend": "emulate", "float8_all_gather": True}, "float8_all_gather is of torchao's tensorwise"),
        ({"backend": "torchao", "recipe": "rowwise", "float8_all_gather": True}, "this is rowwise of torchao"),
        ({"min_features": 0}, "min_features=0; give 1 or more"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrecisionConfig(**fields)


@pytest.mark.parametrize("backend", ["torchao", "te"])
def test_a_device_without_fp8_is_refused(backend: Backend) -> None:
    with pytest.raises(ValueError, match=r"up is on mps, which does not multiply FP8.* take the back end emulate"):
        _check_device("up", torch.device("mps"), config_of(backend))


@pytest.mark.parametrize(
    ("backend", "package", "remedy"),
    [("torchao", "torchao.float8", "robolake.train."), ("te", "transformer_engine.pytorch", "robolake.gpu.")],
)
def test_a_missing_package_is_named_with_what_installs_it(
    backend: Backend, package: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"the back end {backend} needs .* pip install .*{remedy}"):
        apply_precision(model_of(), config_of(backend))


def test_torchao_is_loaded_without_a_word() -> None:
    code = (
        "from torch import nn; from train.precision import *; from train.models.blocks import Linear;"
        "apply_precision(nn.Sequential(Linear(32, 32)), PrecisionConfig(backend='torchao', min_features=32))"
    )
    command, root = [sys.executable, "-W", "error", "-c", code], Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Numbers


def test_rounding_keeps_what_fp8_holds_and_scales_each_row() -> None:
    held = torch.tensor([448.0, -416.0, 2.0**-9, 0.0, 1.125])
    assert torch.equal(rounded(held, torch.float8_e4m3fn), held)
    assert torch.equal(rounded(held / 2**20, torch.float8_e4m3fn), held / 2**20)
    assert not torch.equal(rounded(held, torch.float8_e5m2), held)
    rows = torch.stack([held, held * 2.0**-30])
    assert torch.equal(rounded(rows, torch.float8_e4m3fn, dim=1), rows)
    assert torch.equal(rounded(rows.t(), torch.float8_e4m3fn, dim=0), rows.t())
    assert rounded(rows, torch.float8_e4m3fn)[1].abs().sum() == 0
    # A scale of 448 / 300 becomes 1, which leaves 300 between 288 and 320.
    assert rounded(torch.tensor([300.0]), torch.float8_e4m3fn, power_of_2=True).tolist() == [288.0]
    assert rounded(torch.tensor([300.0]), torch.float8_e4m3fn).item() == pytest.approx(300)
    assert rounded(torch.tensor([1.0, float("inf")]), torch.float8_e4m3fn).isnan().any()


@pytest.mark.parametrize(("weights", "activations"), TYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_emulation_is_torchaos_to_the_bit(recipe: Recipe, weights: torch.dtype, activations: torch.dtype) -> None:
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(1)
    module = Linear(96, 64).to(weights)
    x, grad = torch.randn(3, 10, 96).to(activations), torch.randn(3, 10, 64).to(activations) * 1e-4
    peer = nn.Sequential(module)
    convert_to_float8_training(peer, config=replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True))
    wanted = step(peer, x, grad)
    found = step(one(module, config_of("emulate", recipe)), x, grad)
    assert [each.dtype for each in found] == [activations, activations, weights, weights]
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("weights", "activations"), TYPES)
@pytest.mark.parametrize("recipe", RECIPES)
def test_products_in_fp8_are_what_emulation_says(
    recipe: Recipe, weights: torch.dtype, activations: torch.dtype
) -> None:
    """On a CPU ``torch._scaled_mm`` takes FP8 operands; 30 rows are no multiple of 16."""
    torch.manual_seed(2)
    module = Linear(96, 64).to(weights)
    x, grad = torch.randn(30, 96).to(activations), torch.randn(30, 64).to(activations)
    wanted = step(one(module, config_of("emulate", recipe)), x, grad)
    found = step(one(module, config_of("torchao", recipe)), x, grad)
    assert [each.dtype for each in found] == [activations, activations, weights, weights]
    # torchao's rowwise products are in bfloat16 always.
    exact = recipe == "tensorwise" and activations is torch.float32
    for mine, theirs in zip(found, wanted, strict=True):
        assert distance(mine, theirs) < (1e-6 if exact else 3e-3)


@pytest.mark.parametrize(("backend", "recipe"), TRAINED)
def test_fp8_is_near_to_float32_but_not_the_same(backend: Backend, recipe: Recipe) -> None:
    torch.manual_seed(3)
    module = Linear(256, 128)
    x, grad = torch.randn(64, 256), torch.randn(64, 128)
    wanted = step(nn.Sequential(module), x, grad)
    y, grad_x, grad_weight, grad_bias = (
        distance(mine, exact)
        for mine, exact in zip(step(one(module, config_of(backend, recipe)), x, grad), wanted, strict=True)
    )
    # Rounding to 3 bits errs by 2.6 % on average, to 2 bits by 5.2 %, and a product has two operands.
    assert 0.03 < y < 0.045
    assert 0.03 < grad_x < (0.065 if recipe == "tensorwise" else 0.045)
    if recipe == "rowwise_with_gw_hp":
        assert grad_weight < 1e-6
    else:
        assert 0.03 < grad_weight < (0.065 if recipe == "tensorwise" else 0.045)
    assert grad_bias < 1e-6


@pytest.mark.parametrize(("backend", "recipe"), TRAINED)
def test_zeros_are_harmless(backend: Backend, recipe: Recipe) -> None:
    module = Linear(32, 48)
    model = one(module, config_of(backend, recipe))
    y, grad_x, grad_weight, grad_bias = step(model, torch.zeros(16, 32), torch.zeros(16, 48))
    assert torch.equal(y, module.bias.detach().expand(16, 48))
    assert not any(each.any() for each in (grad_x, grad_weight, grad_bias))
    nn.init.zeros_(module.weight)
    y, grad_x, grad_weight, _ = step(model, torch.ones(16, 32), torch.ones(16, 48))
    assert torch.equal(y, module.bias.detach().expand(16, 48))
    assert not grad_x.any()
    assert torch.equal(grad_weight, torch.full((48, 32), 16.0))


@pytest.mark.parametrize("backend", ["emulate", "torchao"])
def test_a_frozen_projection_hands_the_gradient_on(backend: Backend) -> None:
    module = Linear(32, 48).requires_grad_(requires_grad=False)
    y, grad_x = step(one(module, config_of(backend)), torch.randn(16, 32), torch.randn(16, 48))
    assert y.shape == (16, 48)
    assert grad_x.any()
    assert module.weight.grad is None


@pytest.mark.parametrize("backend", ["emulate", "torchao"])
def test_training_in_fp8_follows_training_in_bfloat16(backend: Backend) -> None:
    """Masters and their gradients are in float32, activations in bfloat16."""
    torch.manual_seed(4)
    x, target = torch.randn(64, 64, dtype=torch.bfloat16), torch.randn(64, 32)
    losses = []
    for config in (PrecisionConfig(), config_of(backend)):
        model = model_of()
        apply_precision(model, config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, fused=True)
        curve = []
        for _ in range(20):
            with precision_context(config):
                loss = (model(x).float() - target).square().mean()
            loss.backward()
            assert model.up.weight.grad is not None
            assert model.up.weight.grad.dtype == model.block["down"].weight.grad.dtype == torch.float32
            optimizer.step()
            optimizer.zero_grad()
            curve.append(loss.detach())
        losses.append(torch.stack(curve))
    exact, fp8 = losses
    assert exact[-1] < 0.3 * exact[0]
    assert not torch.equal(exact, fp8)
    assert ((fp8 - exact).abs() / exact).max() < 0.05


@pytest.mark.parametrize(
    ("backend", "recipe"),
    [("emulate", "tensorwise"), ("emulate", "rowwise_with_gw_hp"), ("torchao", "tensorwise"), ("torchao", "rowwise")],
)
def test_a_converted_model_compiles_as_one_graph(backend: Backend, recipe: Recipe) -> None:
    torch.compiler.reset()
    model = one(Linear(64, 32), config_of(backend, recipe))
    x, grad = torch.randn(20, 64, dtype=torch.bfloat16), torch.randn(20, 32, dtype=torch.bfloat16)
    wanted = step(model, x, grad)
    found = step(torch.compile(model, fullgraph=True, backend="aot_eager"), x, grad)
    for mine, eager in zip(found, wanted, strict=True):
        assert torch.equal(mine, eager)


def test_torchao_pads_what_a_gpu_wants_in_multiples_of_16() -> None:
    """A CPU takes any number of rows, so only the setting can be seen here."""
    assert one(Linear(32, 32), config_of("torchao"))[0].config.pad_inner_dim


# FSDP


def scale_of(model: Any) -> Any:
    """Return the scale that was computed beforehand for a weight that FSDP gathers."""
    return model.up.weight._local_tensor._precomputed_scale


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_fsdp_gathers_weights_in_fp8() -> None:
    config = replace(config_of("torchao"), float8_all_gather=True)
    plain, model = model_of(), model_of()
    apply_precision(plain, config_of("torchao"))
    apply_precision(model, config)
    assert list(model.state_dict()) == list(plain.state_dict())
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(model, mesh=mesh, mp_policy=policy)
    x, grad = torch.randn(16, 64, dtype=torch.bfloat16), torch.randn(16, 32, dtype=torch.bfloat16)
    wanted, found = step(plain, x, grad), step(model, x, grad)
    assert found[2].dtype == torch.float32
    for mine, theirs in zip(found, wanted, strict=True):
        assert distance(mine, theirs) < 1e-2
    assert scale_of(model) is None
    refresh_scales(model, config_of("torchao"))
    assert scale_of(model) is None
    refresh_scales(model, config)
    assert scale_of(model).item() == pytest.approx(448 / plain.up.weight.abs().max().item())
    assert torch.equal(step(model, x, grad)[0], found[0])
    whole: Any = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    for name, value in plain.state_dict().items():
        assert torch.equal(whole[name], value)


@pytest.mark.usefixtures("process_group")
def test_a_sharded_model_is_refused() -> None:
    model = model_of()
    fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="up is sharded already; choose its precision before fully_shard"):
        apply_precision(model, config_of("emulate"))


# Transformer Engine


@dataclass
class Stub:
    """What a stand-in for Transformer Engine saw. Its modules multiply in high precision, and refuse what it would."""

    made: list[dict[str, Any]] = field(default_factory=list)
    entered: list[dict[str, Any]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    inside: bool = False


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    seen = Stub()

    class TransformerLinear(nn.Module):
        def __init__(self, in_features: int, out_features: int, **options: Any) -> None:
            super().__init__()
            seen.made.append({"in_features": in_features, "out_features": out_features, **options})
            like = {"device": options["device"], "dtype": options["params_dtype"]}
            self.weight = nn.Parameter(torch.empty(out_features, in_features, **like))
            if options["bias"]:
                self.bias = nn.Parameter(torch.empty(out_features, **like))
            else:
                self.bias = torch.tensor([], **like)

        def forward(self, inp: torch.Tensor) -> torch.Tensor:
            if not torch.is_autocast_enabled(inp.device.type):
                assert {each.dtype for each in self.parameters()} == {inp.dtype}
            assert inp.shape[:-1].numel() % 8 == 0
            assert seen.inside
            seen.rows.append(inp.shape[:-1].numel())
            return nn.functional.linear(inp, self.weight, self.bias if self.bias.numel() else None)

        def get_extra_state(self) -> torch.Tensor:
            return torch.zeros(3, dtype=torch.uint8)

        def set_extra_state(self, state: torch.Tensor) -> None:
            raise AssertionError(f"{state} is not to be kept")

    class Float8CurrentScaling:
        pass

    @contextmanager
    def autocast(**options: Any) -> Iterator[None]:
        seen.entered.append(options)
        seen.inside = True
        yield
        seen.inside = False

    package = ModuleType("transformer_engine.pytorch")
    recipes = ModuleType("transformer_engine.common.recipe")
    vars(package).update(Linear=TransformerLinear, autocast=autocast)
    vars(recipes).update(Float8CurrentScaling=Float8CurrentScaling)
    for module in (package, recipes):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("transformer_engine", "transformer_engine.common"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    return seen


def test_transformer_engine_is_given_our_parameters(stub: Stub) -> None:
    model = model_of(torch.bfloat16)
    parameters, keys = list(map(id, model.parameters())), list(model.state_dict())
    assert apply_precision(model, config_of("te")).converted == ("up", "block.down")
    sizes = {"device": "meta", "params_dtype": torch.bfloat16}
    assert stub.made == [
        {"in_features": 64, "out_features": 96, "bias": True, **sizes},
        {"in_features": 96, "out_features": 48, "bias": False, **sizes},
    ]
    assert list(map(id, model.parameters())) == parameters
    assert list(model.state_dict()) == keys
    model.load_state_dict(model_of(torch.bfloat16).state_dict(), strict=True)


@pytest.mark.parametrize(("weights", "activations"), TYPES)
def test_transformer_engine_runs_inside_its_context(stub: Stub, weights: torch.dtype, activations: torch.dtype) -> None:
    x, grad = torch.randn(2, 10, 64).to(activations), torch.randn(2, 10, 32).to(activations)
    wanted = step(model_of(weights), x, grad)
    model, config = model_of(weights), config_of("te")
    apply_precision(model, config)
    with precision_context(config):
        assert stub.inside
        found = step(model, x, grad)
    assert not stub.inside
    (options,) = stub.entered
    assert options["enabled"] is True
    assert type(options["recipe"]).__name__ == "Float8CurrentScaling"
    assert stub.rows == [32, 32], "20 rows are padded to a multiple of 16"
    assert [each.dtype for each in found] == [each.dtype for each in wanted]
    for mine, theirs in zip(found, wanted, strict=True):
        assert distance(mine, theirs) < 1e-2


@pytest.mark.parametrize("backend", ["none", "emulate", "torchao", "block"])
def test_other_back_ends_need_no_context(backend: Backend, stub: Stub) -> None:
    with precision_context(PrecisionConfig(backend=backend)) as inside:
        assert inside is None
    assert stub.entered == []


def test_a_plain_state_has_tensors_alone(stub: Stub) -> None:
    te: Any = sys.modules["transformer_engine.pytorch"]
    model = nn.Sequential(te.Linear(32, 32, bias=True, device="cpu", params_dtype=torch.float32))
    assert "0._extra_state" in model.state_dict()
    assert list(plain_state_dict(model)) == ["0.weight", "0.bias"]


# Inference


@RELAXED
@given(
    N=st.integers(1, 300),
    K=st.integers(1, 300),
    exponent=st.integers(-30, 30),
    spread=st.floats(0, 6),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_weight_in_blocks_errs_by_no_more_than_fp8_does(
    N: int, K: int, exponent: int, spread: float, seed: int
) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(N, K) * torch.exp(spread * torch.randn(N, K)) * 2.0**exponent
    values, scale = to_blocks(weight)
    assert (values.dtype, values.shape) == (torch.float8_e4m3fn, weight.shape)
    assert (scale.dtype, scale.shape) == (torch.float32, (-(-N // BLOCK), -(-K // BLOCK)))
    back = from_blocks(values, scale, torch.float32)
    for row in range(0, N, BLOCK):
        for column in range(0, K, BLOCK):
            at = slice(row, row + BLOCK), slice(column, column + BLOCK)
            largest = weight[at].abs().max()
            assert scale[row // BLOCK, column // BLOCK] == pytest.approx((largest / 448).item(), rel=1e-6)
            # Half of the last of 3 bits, or half the distance of the subnormals.
            allowed = torch.maximum(weight[at].abs() * 2**-4, largest / 448 * 2**-10) * (1 + 1e-5)
            assert ((back[at] - weight[at]).abs() <= allowed).all()


def test_blocks_do_not_disturb_each_other() -> None:
    weight = torch.zeros(200, 300)
    weight[:128, :128] = 1e-30
    weight[128:, 256:] = 1e30
    weight[5, 200] = 2.0**-149
    values, scale = to_blocks(weight)
    expected = weight.clone()
    expected[5, 200] = 0.0  # Too small for any scale that is a normal number.
    assert torch.allclose(from_blocks(values, scale, torch.float32), expected, rtol=1e-6, atol=0)
    assert scale.min() > 0


def test_a_quantised_model_is_smaller_and_near_to_the_trained_one() -> None:
    torch.manual_seed(5)
    model: Any = nn.Sequential(Linear(300, 200), nn.GELU(), Linear(200, 40, bias=False), nn.Linear(40, 8))
    x = torch.randn(16, 300)
    wanted, weight = model(x).detach(), model[0].weight.detach()
    report = quantise(model, PrecisionConfig(backend="block", min_features=64))
    assert [type(each) for each in model] == [BlockLinear, nn.GELU, Linear, nn.Linear]
    assert list(report.skipped) == ["2"]
    loss = report.modules["0"]
    assert (loss.bytes_before, loss.bytes_after) == (300 * 200 * 4, 300 * 200 + 2 * 3 * 4)
    back = from_blocks(model[0].weight, model[0].weight_scale_inv, torch.float32)
    assert loss.relative_error == pytest.approx(distance(back, weight), rel=1e-4)
    assert 0.01 < loss.relative_error < 0.03
    assert report.total == loss
    assert torch.allclose(model[0](x), nn.functional.linear(x, back, model[0].bias))
    assert 1e-3 < distance(model(x), wanted) < 0.05
    low = model[0](x.bfloat16())
    assert low.dtype == torch.bfloat16
    assert distance(low, nn.functional.linear(x, back, model[0].bias)) < 0.01


def test_the_total_weighs_all_modules_together() -> None:
    model: Any = nn.Sequential(Linear(64, 64), Linear(64, 64))
    nn.init.zeros_(model[1].weight)
    report = quantise(model, PrecisionConfig(backend="block"))
    assert report.modules["1"].relative_error == 0
    assert report.total.relative_error == report.modules["0"].relative_error > 0
    assert report.total.bytes_after == 2 * report.modules["0"].bytes_after


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_quantised_state_is_loaded_into_another_model(device: str) -> None:
    config = PrecisionConfig(backend="block")
    model = model_of()
    quantise(model, config)
    state = model.state_dict()
    assert {name: value.dtype for name, value in state.items() if name.startswith("up.")} == {
        "up.bias": torch.float32,
        "up.weight": torch.float8_e4m3fn,
        "up.weight_scale_inv": torch.float32,
    }
    with torch.device(device):
        fresh: Any = Model()
    nn.init.ones_(fresh.up.weight)
    quantise(fresh, config)
    fresh.load_state_dict(state, strict=True, assign=device == "meta")
    x = torch.randn(4, 64)
    assert torch.equal(fresh(x), model(x))


def test_a_cast_of_the_model_leaves_quantised_weights_as_they_are() -> None:
    model = model_of()
    quantise(model, PrecisionConfig(backend="block", min_features=32))
    before = {name: value.clone() for name, value in model.up.named_buffers()}
    model.bfloat16()
    assert (model.head.weight.dtype, model.up.bias.dtype) == (torch.bfloat16, torch.bfloat16)
    for name, value in model.up.named_buffers():
        assert value.dtype == before[name].dtype
        assert torch.equal(value.float(), before[name].float())
    moved = model.to_empty(device="meta")
    assert moved.up.weight.is_meta


def test_a_quantised_model_compiles_as_one_graph() -> None:
    torch.compiler.reset()
    model = model_of()
    quantise(model, PrecisionConfig(backend="block"))
    x = torch.randn(4, 64, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))


def test_what_cannot_be_quantised_is_refused_and_left_alone() -> None:
    model = model_of()
    with pytest.raises(ValueError, match="the config says emulate"):
        quantise(model, config_of("emulate"))
    with pytest.raises(ValueError, match=r"no projection for the back end block .*min_features=1000"):
        quantise(model, PrecisionConfig(backend="block", min_features=1000))
    with torch.no_grad():
        model.odd.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the weight of odd has NaN"):
        quantise(model, PrecisionConfig(backend="block"))
    assert type(model.up) is Linear
