"""Tests of train/optimizer.py."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from train.models.blocks import LayerNorm, Linear, RmsNorm
from train.optimizer import (
    PRESETS,
    OptimizerConfig,
    clip_gradients,
    learning_rate,
    make_optimizer,
    set_learning_rate,
)

RELAXED = settings(deadline=None)
SHORT = OptimizerConfig(peak_lr=1e-2, final_lr=1e-3, warmup_steps=3, decay_steps=12, weight_decay=0.1)
CONFIGS = st.builds(
    lambda schedule, warmup, rest, final: OptimizerConfig(
        schedule=schedule, peak_lr=2e-4, final_lr=2e-4 * final, warmup_steps=warmup, decay_steps=warmup + rest
    ),
    st.sampled_from(["openpi_cosine", "hf_cosine", "constant"]),
    st.integers(0, 300),
    st.integers(1, 1000),
    st.floats(0, 1),
)


class Tiny(nn.Module):
    """One of each: a projection, both norms, a table, a bare parameter, and something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(6, 4)
        self.norm = LayerNorm(4)
        self.up = Linear(4, 8)
        self.rms = RmsNorm(8)
        self.query = nn.Parameter(torch.empty(8))
        self.frozen = Linear(8, 8)
        torch.manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter)
        self.frozen.requires_grad_(requires_grad=False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.frozen(self.rms(self.up(self.norm(self.table(rows)))) * self.query)


def give_gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_pi05_has_the_learning_rates_of_openpi() -> None:
    rates = {step: learning_rate(PRESETS["pi05"], step) for step in (0, 1, 500, 999, 1000, 8250, 15_500, 30_000, 10**6)}
    first = 2.5e-5 / 1001
    assert rates == pytest.approx(
        {
            0: first,
            1: 2.5e-5 * 2000 / (1000 * 1001),  # first + (peak - first) / 1000, with first = peak / 1001
            500: (2.5e-5 + first) / 2,
            999: 2.5e-5 - (2.5e-5 - first) / 1000,
            1000: 2.5e-5,
            8250: 2.5e-6 + 2.25e-5 * 0.8535533905932737,  # a quarter of the 29,000: (1 + sqrt(1/2)) / 2
            15_500: 1.375e-5,  # half of them
            30_000: 2.5e-6,
            10**6: 2.5e-6,
        },
        rel=1e-12,
    )


def test_pi05_on_libero_stays_at_its_peak() -> None:
    preset = PRESETS["pi05_libero"]
    assert [learning_rate(preset, step) for step in (10_000, 300_000, 2_000_000)] == pytest.approx([5e-5] * 3)
    assert learning_rate(preset, 0) == pytest.approx(5e-5 / 10_001)


def test_groot_has_the_learning_rates_of_transformers() -> None:
    from transformers.optimization import get_cosine_schedule_with_warmup

    config = PRESETS["groot_n15"]
    assert config.num_warmup_steps == 500
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.peak_lr)
    published = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=500, num_training_steps=10_000)
    rates = []
    for _ in range(10_000):
        rates.append(published.get_last_lr()[0])
        optimizer.step()
        published.step()
    assert [learning_rate(config, step) for step in range(10_000)] == pytest.approx(rates, rel=1e-9, abs=1e-16)
    assert rates[0] == 0
    assert rates[250] == pytest.approx(5e-5)
    assert learning_rate(config, 10_000) == learning_rate(config, 12_345) == 0


def test_a_constant_rate_warms_up_and_stays() -> None:
    config = replace(SHORT, schedule="constant")
    assert [learning_rate(config, step) for step in range(5)] == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2])
    assert learning_rate(config, 10**9) == 1e-2
    assert learning_rate(replace(config, warmup_steps=0), 0) == 1e-2


@RELAXED
@given(config=CONFIGS)
def test_rates_rise_to_the_peak_and_then_never_rise(config: OptimizerConfig) -> None:
    warmup = config.num_warmup_steps
    rates = [learning_rate(config, step) for step in range(config.decay_steps + 5)]
    up, down = rates[: warmup + 1], rates[warmup:]
    assert all(low < high for low, high in pairwise(up))
    assert all(high >= low for high, low in pairwise(down))
    assert up[-1] == pytest.approx(config.peak_lr)
    assert max(rates) <= config.peak_lr * (1 + 1e-12)
    assert min(down) >= (config.peak_lr if config.schedule == "constant" else config.final_lr) * (1 - 1e-12)
    if config.schedule != "constant":
        assert rates[config.decay_steps :] == pytest.approx([config.final_lr] * 5)


def test_the_ratio_of_warm_up_is_rounded_up() -> None:
    config = replace(SHORT, warmup_steps=0, warmup_ratio=0.1, decay_steps=101)
    assert config.num_warmup_steps == 11
    assert SHORT.num_warmup_steps == 3


def test_there_is_no_step_before_the_first() -> None:
    with pytest.raises(ValueError, match="step -1 has no learning rate"):
        learning_rate(SHORT, -1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "linear"}, "schedule is 'linear'; give one of openpi_cosine"),
        ({"decay": "some"}, "decay is 'some'; give one of all"),
        ({"peak_lr": 0.0, "final_lr": 0.0}, "peak_lr is 0.0"),
        ({"peak_lr": math.nan}, "peak_lr is nan"),
        ({"final_lr": 1.0}, "final_lr 1.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"warmup_ratio": 0.5}, "warmup_ratio 0.5"),
        ({"warmup_steps": 0, "warmup_ratio": 1.0}, "warmup_ratio 1.0"),
        ({"warmup_steps": 12}, "12 steps of warm-up leave none of 12 decay_steps"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"eps": 0.0}, "eps 0.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"clip_norm": 0.0}, "clip_norm 0.0"),
        ({"clip_norm": math.nan}, "clip_norm nan"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SHORT, **settings)


@pytest.mark.parametrize("name", ["pi05", "pi05_libero", "groot_n15"])
def test_presets_are_the_published_numbers(name: str) -> None:
    preset = PRESETS[name]
    betas, weight_decay, decay = {
        "pi05": ((0.9, 0.95), 1e-10, "all"),
        "pi05_libero": ((0.9, 0.95), 1e-10, "all"),
        "groot_n15": ((0.95, 0.999), 1e-5, "no_biases_or_norms"),
    }[name]
    assert (preset.betas, preset.weight_decay, preset.decay) == (betas, weight_decay, decay)
    assert (preset.eps, preset.clip_norm, preset.allow_low_precision) == (1e-8, 1.0, False)


@pytest.mark.parametrize("decay", ["all", "no_biases_or_norms"])
def test_steps_are_those_of_adamw_in_float64(decay: str) -> None:
    model = Tiny()
    config = replace(SHORT, decay=decay)
    optimizer = make_optimizer(model, config)
    assert optimizer.defaults["fused"] is True
    spared = set() if decay == "all" else {"norm.weight", "norm.bias", "up.bias", "rms.weight"}
    expected = {name: each.detach().double() for name, each in model.named_parameters() if each.requires_grad}
    first = {name: torch.zeros_like(each) for name, each in expected.items()}
    second = {name: torch.zeros_like(each) for name, each in expected.items()}
    frozen = model.frozen.weight.clone()
    for step in range(20):
        give_gradients(model, step)
        set_learning_rate(optimizer, learning_rate(config, step))
        optimizer.step()
        lr = learning_rate(config, step)
        for name, parameter in model.named_parameters():
            if name not in expected:
                continue
            assert parameter.grad is not None
            gradient = parameter.grad.double()
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.95 * second[name] + 0.05 * gradient**2
            moment = first[name] / (1 - 0.9 ** (step + 1))
            spread = (second[name] / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8
            shrunk = expected[name] * (1 - lr * (0.0 if name in spared else 0.1))
            expected[name] = shrunk - lr * moment / spread
    for name, weights in expected.items():
        torch.testing.assert_close(model.get_parameter(name).double(), weights, rtol=2e-6, atol=2e-6)
    assert torch.equal(model.frozen.weight, frozen)
    assert model.frozen.weight not in optimizer.state


def test_what_does_not_decay_is_what_transformers_spares() -> None:
    from transformers.trainer_pt_utils import get_parameter_names

    model = Tiny()
    decayed = set(get_parameter_names(model, [nn.LayerNorm, RmsNorm], ["bias"]))
    optimizer = make_optimizer(model, PRESETS["groot_n15"])
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {group["weight_decay"]: {names[id(each)] for each in group["params"]} for group in optimizer.param_groups}
    assert groups == {
        1e-5: {name for name in decayed if not name.startswith("frozen")},
        0.0: {"norm.weight", "norm.bias", "up.bias", "rms.weight"},
    }


def test_in_openpi_everything_decays() -> None:
    (group,) = make_optimizer(Tiny(), PRESETS["pi05"]).param_groups
    assert group["weight_decay"] == 1e-10
    assert len(group["params"]) == 7


def test_an_optimizer_starts_at_the_first_rate() -> None:
    optimizer = make_optimizer(Tiny(), replace(SHORT, decay="no_biases_or_norms"))
    assert [float(group["lr"]) for group in optimizer.param_groups] == pytest.approx([1e-2 / 4] * 2)
    set_learning_rate(optimizer, 0.5)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.5, 0.5]


def test_a_rate_can_be_set_in_an_optimizer_that_was_loaded() -> None:
    first, second = (make_optimizer(Tiny(), replace(SHORT, decay="no_biases_or_norms")) for _ in range(2))
    set_learning_rate(first, 0.25)
    second.load_state_dict(first.state_dict())
    set_learning_rate(second, 0.125)
    assert [float(group["lr"]) for group in first.param_groups] == [0.25, 0.25]
    assert [float(group["lr"]) for group in second.param_groups] == [0.125, 0.125]


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")  # torch's own
def test_another_rate_compiles_nothing_anew() -> None:
    model = Tiny()
    optimizer = make_optimizer(model, SHORT)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    step = torch.compile(optimizer.step, backend=keep)
    counts = []
    for number in range(4):
        give_gradients(model, number)
        set_learning_rate(optimizer, learning_rate(SHORT, number))
        step()
        counts.append(len(graphs))
    assert len(set(counts)) == 1


def test_nothing_to_train_is_refused() -> None:
    model = Tiny().requires_grad_(requires_grad=False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer(model, SHORT)


def test_masters_of_low_precision_are_refused_unless_allowed() -> None:
    model = Tiny()
    model.frozen.to(torch.bfloat16)
    make_optimizer(model, SHORT)
    model.up.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"up.weight \(torch.bfloat16\) and 1 others are trainable but not float32"):
        make_optimizer(model, SHORT)
    optimizer = make_optimizer(model, replace(SHORT, allow_low_precision=True))
    assert model.up.weight in set(optimizer.param_groups[0]["params"])


def test_large_gradients_are_scaled_to_the_norm() -> None:
    model = Tiny()
    give_gradients(model, 0)
    gradients = [each.grad.double().clone() for each in model.parameters() if each.grad is not None]
    expected = math.sqrt(sum(float(each.square().sum()) for each in gradients))
    assert expected > 1
    norm = clip_gradients(model.parameters(), 1.0)
    assert float(norm) == pytest.approx(expected, rel=1e-6)
    clipped = [each.grad for each in model.parameters() if each.grad is not None]
    for after, before in zip(clipped, gradients, strict=True):
        torch.testing.assert_close(after.double(), before / expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("max_norm", [1e6, math.inf])
def test_small_gradients_are_left(max_norm: float) -> None:
    model = Tiny()
    give_gradients(model, 0)
    before = [each.grad.clone() for each in model.parameters() if each.grad is not None]
    clip_gradients(model.parameters(), max_norm)
    after = [each.grad for each in model.parameters() if each.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_a_sharded_model_steps_as_a_whole_one(tmp_path: Path) -> None:
    whole, sharded = Tiny(), Tiny()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        norms = []
        for model in (whole, sharded):
            optimizer = make_optimizer(model, SHORT)
            for _ in range(3):
                model(torch.arange(6)).square().sum().backward()
                norms.append(clip_gradients(model.parameters(), SHORT.clip_norm))
                optimizer.step()
                optimizer.zero_grad()
        assert not any(isinstance(norm, DTensor) for norm in norms)
        torch.testing.assert_close(norms[:3], norms[3:])
        for name, parameter in sharded.named_parameters():
            assert isinstance(parameter, DTensor)
            torch.testing.assert_close(parameter.full_tensor(), whole.get_parameter(name))
    finally:
        dist.destroy_process_group()
