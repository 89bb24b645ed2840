"""Tests of train/lora.py."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from train.lora import LoraConfig, LoraLinear, add_lora, load_lora_state_dict, lora_state_dict, merge_lora
from train.models.blocks import GatedMlp, Linear
from train.models.checkpointing import MODES
from train.optimizer import OptimizerConfig, make_optimizer

HEADS, KV_HEADS, SIZE = 4, 1, 8
CONFIG = LoraConfig(rank=2, rank_by_part={r"^expert\.": 3})
NAMES = [f"{part}.0.{name}" for part in ("prefix", "expert") for name in ("qkv", "out", "mlp.gate_up", "mlp.down")]


class Layer(nn.Module):
    """Attention without the attention, behind a norm; then a perceptron with a gate."""

    def __init__(self) -> None:
        super().__init__()
        width = HEADS * SIZE
        self.norm = nn.LayerNorm(width)
        self.qkv = Linear(width, (HEADS + 2 * KV_HEADS) * SIZE, bias=False)
        self.out = Linear(width, width)
        self.mlp = GatedMlp(width, 48, "gelu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x)).split((HEADS * SIZE, KV_HEADS * SIZE, KV_HEADS * SIZE), dim=-1)
        return x + self.mlp(self.out(q * (k * v).repeat_interleave(HEADS, dim=-1)))


class Model(nn.Module):
    """Two parts, and small projections before and behind."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.enter = nn.Linear(5, HEADS * SIZE)
        self.prefix, self.expert = nn.ModuleList([Layer()]), nn.ModuleList([Layer()])
        self.leave = nn.Linear(HEADS * SIZE, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(self.expert[0](self.prefix[0](self.enter(x))))


def x_of(rows: int = 6) -> torch.Tensor:
    return torch.randn(rows, 5, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = make_optimizer(model, OptimizerConfig(schedule="constant", peak_lr=1e-2, warmup_steps=0))
    for _ in range(steps):
        optimizer.zero_grad()
        model(x_of()).square().mean().backward()
        optimizer.step()


def adapted(model: nn.Module, name: str) -> LoraLinear:
    module = model.get_submodule(name)
    assert isinstance(module, LoraLinear)
    return module


def gradient(model: nn.Module, name: str) -> torch.Tensor:
    given = model.get_parameter(name).grad
    assert given is not None
    return given


def test_adapters_change_nothing_at_first() -> None:
    model, weights = Model(), Model().state_dict()
    before = model(x_of())
    qkv = model.get_parameter("prefix.0.qkv.weight")
    assert add_lora(model, CONFIG) == NAMES
    assert torch.equal(model(x_of()), before)
    base = adapted(model, "prefix.0.qkv").base
    assert isinstance(base, Linear), "another precision finds it"
    assert base.weight is qkv
    state = {key.replace(".base.", "."): value for key, value in model.state_dict().items() if "lora_" not in key}
    assert state.keys() == weights.keys()
    assert all(torch.equal(state[key], value) for key, value in weights.items())


def test_adapters_have_the_shapes_of_the_fused_projections() -> None:
    model = Model()
    add_lora(model, CONFIG)
    state = {name: tuple(each.shape) for name, each in lora_state_dict(model).items()}
    assert state["prefix.0.qkv.lora_a"] == (2, 32)
    assert state["prefix.0.qkv.lora_b"] == (48, 2)
    assert state["expert.0.mlp.gate_up.lora_a"] == (3, 32)
    assert state["expert.0.mlp.gate_up.lora_b"] == (96, 3)
    assert len(state) == 2 * len(NAMES)
    assert all(each.dtype == torch.float32 for each in lora_state_dict(model).values())


@pytest.mark.parametrize("freeze_others", [True, False])
def test_only_adapters_learn(freeze_others: bool) -> None:
    model = Model()
    add_lora(model, replace(CONFIG, freeze_others=freeze_others))
    train(model, steps=1)
    learnt = {name for name, each in model.named_parameters() if each.grad is not None}
    adapters = set(lora_state_dict(model))
    others = {name for name, _ in model.named_parameters() if name.startswith(("enter", "leave")) or ".norm." in name}
    assert learnt == (adapters if freeze_others else adapters | others)
    # B was 0, so A has no gradient yet; from the next step on it has.
    assert not bool(gradient(model, "expert.0.out.lora_a").any())
    train(model, steps=1)
    assert all(bool(gradient(model, name).any()) for name in adapters)


def test_targets_and_ranks_go_by_name() -> None:
    model = Model()
    config = LoraConfig(rank=4, rank_by_part={r"\.qkv$": 2, "expert": 8}, targets=(r"\.qkv$", r"^expert\..*\.down$"))
    assert add_lora(model, config) == ["prefix.0.qkv", "expert.0.qkv", "expert.0.mlp.down"]
    ranks = {name: len(each) for name, each in lora_state_dict(model).items() if name.endswith("lora_a")}
    assert ranks == {"prefix.0.qkv.lora_a": 2, "expert.0.qkv.lora_a": 2, "expert.0.mlp.down.lora_a": 8}
    assert type(model.get_submodule("prefix.0.out")) is Linear


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (LoraConfig(rank=16), 1.0),
        (LoraConfig(rank=16, alpha=8.0), 0.5),
        (LoraConfig(rank=16, alpha=8.0, rank_by_part={"qkv": 32}), 0.25),
        (LoraConfig(rank=16, rslora=True), 4.0),
        (LoraConfig(rank=16, alpha=8.0, rslora=True), 2.0),
    ],
)
def test_an_adapter_counts_by_its_scale(config: LoraConfig, scale: float) -> None:
    assert config.scale_of("prefix.0.qkv") == scale
    assert config.rank_of("prefix.0.qkv") == config.rank_by_part.get("qkv", 16)
    linear = Linear(6, 4)
    model = nn.ModuleDict({"qkv": linear})
    add_lora(model, config)
    module = adapted(model, "qkv")
    nn.init.normal_(module.lora_b)
    x = torch.randn(3, 6)
    weight = linear.weight.double() + scale * module.lora_b.double() @ module.lora_a.double()
    expected = x.double() @ weight.T + linear.bias.double()
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_a_merged_model_computes_the_same_under_the_published_names() -> None:
    model = Model()
    names = model.state_dict().keys()
    add_lora(model, replace(CONFIG, alpha=1.0))
    train(model)
    before, qkv = model(x_of()), adapted(model, "prefix.0.qkv").base
    frozen = qkv.weight.clone()
    assert merge_lora(model) == NAMES
    torch.testing.assert_close(model(x_of()), before, rtol=1e-6, atol=1e-6)
    assert model.state_dict().keys() == names
    assert model.get_submodule("prefix.0.qkv") is qkv
    assert not torch.equal(qkv.weight, frozen)
    assert not qkv.weight.requires_grad
    assert merge_lora(model) == []


def test_a_merge_keeps_the_type_of_the_weights() -> None:
    model = Model()
    model.prefix.to(torch.bfloat16)
    weight = model.get_parameter("prefix.0.out.weight").clone()
    add_lora(model, CONFIG)
    module = adapted(model, "prefix.0.out")
    nn.init.normal_(module.lora_b)
    merge_lora(model)
    exact = weight.float() + module.lora_b @ module.lora_a
    assert torch.equal(model.get_parameter("prefix.0.out.weight"), exact.to(torch.bfloat16))


def test_adapters_compute_in_the_type_of_what_comes_in() -> None:
    model = Model()
    add_lora(model, CONFIG)
    module = adapted(model, "expert.0.out")
    nn.init.normal_(module.lora_b)
    x = torch.randn(4, 32)
    narrow = module(x.to(torch.bfloat16))
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), module(x), rtol=0.05, atol=0.05)


def test_adapters_go_to_a_fresh_model() -> None:
    model = Model()
    add_lora(model, CONFIG)
    train(model)
    fresh = Model()
    add_lora(fresh, replace(CONFIG, seed=1))
    assert not torch.equal(fresh(x_of()), model(x_of()))
    load_lora_state_dict(fresh, lora_state_dict(model))
    assert torch.equal(fresh(x_of()), model(x_of()))
    state = {name: each.clone() for name, each in lora_state_dict(model).items()}
    train(fresh)
    assert all(torch.equal(each, state[name]) for name, each in lora_state_dict(model).items())


def test_adapters_of_another_rank_or_of_other_targets_are_refused() -> None:
    model, other, fewer = Model(), Model(), Model()
    add_lora(model, CONFIG)
    add_lora(other, replace(CONFIG, rank=4))
    add_lora(fewer, LoraConfig(rank=2, targets=("qkv",)))
    with pytest.raises(ValueError, match=r"lora_a has the shape \(2, 32\) where \(4, 32\) is needed"):
        load_lora_state_dict(other, lora_state_dict(model))
    with pytest.raises(ValueError, match="12 are unknown"):
        load_lora_state_dict(fewer, lora_state_dict(model))
    for call in (lora_state_dict, lambda model: load_lora_state_dict(model, {})):
        with pytest.raises(ValueError, match="has no adapters; add them first"):
            call(Model())


def test_first_weights_depend_on_seed_and_name_alone() -> None:
    states = []
    for seed, global_seed in ((0, 5), (0, 6), (1, 5)):
        model = Model()
        torch.manual_seed(global_seed)
        add_lora(model, replace(CONFIG, seed=seed))
        states.append(lora_state_dict(model))
    a = "prefix.0.out.lora_a"
    assert torch.equal(states[0][a], states[1][a])
    assert not torch.equal(states[0][a], states[2][a])
    assert not torch.equal(states[0][a], states[0]["prefix.0.mlp.gate_up.lora_a"])
    bound = 1 / math.sqrt(32)
    assert float(states[0][a].abs().max()) <= bound
    assert float(states[0][a].std()) == pytest.approx(bound / math.sqrt(3), rel=0.2)
    assert not any(bool(each.any()) for name, each in states[0].items() if name.endswith("lora_b"))


def test_dropout_is_for_training_only() -> None:
    model = Model()
    add_lora(model, replace(CONFIG, dropout=0.5))
    module = adapted(model, "prefix.0.out")
    nn.init.ones_(module.lora_b)
    x = torch.ones(200, 32)
    assert torch.equal(model.eval() and module(x)[0], module(x)[1])
    model.train()
    rows = module(x)
    assert not torch.equal(rows[0], rows[1])
    torch.testing.assert_close(rows.mean(0), module.eval()(x)[0], rtol=0.2, atol=0.2)


def test_dropout_is_the_same_where_layers_are_computed_again() -> None:
    found = []
    for run in MODES.values():
        torch.manual_seed(0)
        model = Model()
        add_lora(model, replace(CONFIG, dropout=0.5))
        train(model)
        torch.manual_seed(2)
        model.zero_grad()
        run(model.expert[0], run(model.prefix[0], model.enter(x_of()))).square().mean().backward()
        found.append({name: each.grad for name, each in model.named_parameters() if each.requires_grad})
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert len(found[0]) == 2 * len(NAMES)


def test_adapters_follow_the_mode_of_the_model() -> None:
    model = Model().eval()
    add_lora(model, replace(CONFIG, dropout=0.5))
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank 0 makes no adapter"),
        ({"rank_by_part": {"qkv": -1}}, "rank -1 makes no adapter"),
        ({"alpha": 0.0}, "alpha is 0.0"),
        ({"alpha": math.nan}, "alpha is nan"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_settings_without_sense_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoraConfig(**settings)


def test_patterns_that_find_nothing_are_refused_and_change_nothing() -> None:
    model = Model()
    with pytest.raises(ValueError, match="'q_proj' is found in none of the names of 8 large projections"):
        add_lora(model, LoraConfig(targets=("qkv", "q_proj")))
    with pytest.raises(ValueError, match="'expert' is found in none of the names of 1 large projections"):
        add_lora(model, LoraConfig(targets=("prefix.0.qkv",), rank_by_part={"expert": 4}))
    assert all(each.requires_grad for each in model.parameters())
    assert not any(isinstance(module, LoraLinear) for module in model.modules())


def test_a_model_that_is_not_ready_is_refused() -> None:
    model = Model()
    add_lora(model, CONFIG)
    with pytest.raises(ValueError, match="has adapters already"):
        add_lora(model, CONFIG)
    with pytest.raises(ValueError, match=r"prefix.0.qkv is sharded or has no weights yet"):
        add_lora(Model().to("meta"), CONFIG)


def test_a_sharded_model_learns_and_merges(tmp_path: Path) -> None:
    whole, sharded = Model(), Model()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for model in (whole, sharded):
            add_lora(model, CONFIG)
            if model is sharded:
                fully_shard(model, mesh=mesh)
                with pytest.raises(ValueError, match="has adapters already"):
                    add_lora(model, CONFIG)
            train(model)
            merge_lora(model)
        weight = sharded.state_dict()["expert.0.out.weight"]
        torch.testing.assert_close(weight.full_tensor(), whole.get_parameter("expert.0.out.weight"))
        bare = Model()
        fully_shard(bare, mesh=mesh)
        with pytest.raises(ValueError, match=r"is sharded or has no weights yet"):
            add_lora(bare, CONFIG)
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own
def test_an_adapter_compiles_as_one_graph() -> None:
    model = Model()
    add_lora(model, CONFIG)
    module = adapted(model, "expert.0.qkv")
    nn.init.normal_(module.lora_b)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    gradients = []
    for each in (module, compiled):
        x = torch.randn(6, 32, generator=torch.Generator().manual_seed(2), requires_grad=True)
        module.zero_grad()
        y = each(x)
        y.square().sum().backward()
        gradients.append((y, x.grad, module.lora_a.grad, module.lora_b.grad))
    for plain, fused in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, fused)
