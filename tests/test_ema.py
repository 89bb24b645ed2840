"""Tests of train/ema.py."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from train.ema import DECAYS, Ema, copy_tensors, decay_at


def model_of(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    model[1].requires_grad_(requires_grad=False)
    return model


def move(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(each, second[name]) for name, each in first.items())


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_is_that_of_a_loop_in_float64(warmup: bool) -> None:
    model = model_of()
    ema = Ema(model, decay=0.9, warmup=warmup)
    expected = {name: each.double() for name, each in weights(model).items() if not name.startswith("1.")}
    for step in range(60):
        move(model, step)
        ema.update(step)
        decay = min(0.9, (1 + step) / (10 + step)) if warmup else 0.9
        for name, average in expected.items():
            expected[name] = decay * average + (1 - decay) * model.get_parameter(name).detach().double()
    average = ema.state_dict()
    assert average.keys() == expected.keys(), "what is frozen is not averaged"
    for name, each in average.items():
        torch.testing.assert_close(each.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_an_average_starts_at_the_weights_and_does_not_share_them() -> None:
    model = model_of()
    ema = Ema(model)
    start = {name: each.clone() for name, each in ema.state_dict().items()}
    assert same(start, {name: each for name, each in weights(model).items() if not name.startswith("1.")})
    assert not any(each.requires_grad for each in ema.state_dict().values())
    move(model, 0)
    assert same(dict(ema.state_dict()), start)


def test_an_average_without_warm_up_needs_no_step() -> None:
    model = model_of()
    ema = Ema(model, decay=0.75)
    before = model.get_parameter("0.bias").detach().clone()
    move(model, 0)
    ema.update()
    torch.testing.assert_close(
        ema.state_dict()["0.bias"], 0.75 * before + 0.25 * model.get_parameter("0.bias").detach()
    )


def test_an_average_of_bfloat16_is_float32() -> None:
    model = model_of().to(torch.bfloat16)
    ema = Ema(model, decay=0.999)
    before = ema.state_dict()["0.bias"].clone()
    move(model, 0)
    ema.update()
    average = ema.state_dict()["0.bias"]
    assert average.dtype == torch.float32
    expected = 0.999 * before.double() + 0.001 * model.get_parameter("0.bias").detach().double()
    torch.testing.assert_close(average.double(), expected, rtol=1e-6, atol=1e-7)
    kept = weights(model)
    with ema.swap():
        assert torch.equal(model.get_parameter("0.bias"), average.to(torch.bfloat16))
    assert same(weights(model), kept)


@given(decay=st.floats(0, 0.9999), step=st.integers(0, 10**6))
def test_a_warm_up_keeps_more_at_each_step_up_to_the_decay(decay: float, step: int) -> None:
    assert 0 <= decay_at(decay, step) <= decay_at(decay, step + 1) <= decay
    assert decay_at(decay, 10**9) == decay


def test_a_warm_up_starts_at_a_tenth() -> None:
    assert decay_at(0.999, 0) == 0.1
    assert decay_at(0.999, 8) == 0.5
    model = model_of()
    with pytest.raises(ValueError, match="needs the step"):
        Ema(model, warmup=True).update()


def test_a_swap_shows_the_average_and_restores_every_bit() -> None:
    model = model_of()
    ema = Ema(model, decay=0.5)
    move(model, 0)
    ema.update()
    live, average = weights(model), {name: each.clone() for name, each in ema.state_dict().items()}
    with ema.swap():
        inside = weights(model)
        assert same({name: inside[name] for name in average}, average)
        assert torch.equal(inside["1.weight"], live["1.weight"])
        assert not torch.equal(inside["0.weight"], live["0.weight"])
        assert model[0].weight.requires_grad
        move(model, 1)
    restored = weights(model)
    assert same({name: restored[name] for name in average}, {name: live[name] for name in average})
    assert same(dict(ema.state_dict()), average)


def test_a_swap_restores_after_an_error_and_may_be_nested() -> None:
    model = model_of()
    ema = Ema(model, decay=0.5)
    move(model, 0)
    ema.update()
    live, average = weights(model), {name: each.clone() for name, each in ema.state_dict().items()}
    with ema.swap(), ema.swap():
        ema.update()
    assert same(weights(model), live)
    with pytest.raises(KeyError), ema.swap(), ema.swap():
        raise KeyError
    assert same(weights(model), live)
    assert same(dict(ema.state_dict()), average)


def test_a_state_goes_to_a_fresh_average() -> None:
    model = model_of()
    ema = Ema(model, decay=0.5)
    move(model, 0)
    ema.update()
    other = model_of(seed=1)
    before = weights(other)
    fresh = Ema(other, decay=0.5)
    fresh.load_state_dict(ema.state_dict())
    assert same(dict(fresh.state_dict()), dict(ema.state_dict()))
    assert same(weights(other), before)
    fresh.update()
    assert not same(dict(fresh.state_dict()), dict(ema.state_dict())), "the loaded average is a copy"


def test_a_state_of_other_parts_or_sizes_is_refused() -> None:
    ema = Ema(model_of())
    before = {name: each.clone() for name, each in ema.state_dict().items()}
    state = {name: torch.zeros_like(each) for name, each in before.items()}
    with pytest.raises(ValueError, match=r"1 tensors are missing \['0.bias'\] and 0 are unknown"):
        ema.load_state_dict({name: each for name, each in state.items() if name != "0.bias"})
    with pytest.raises(ValueError, match=r"0 tensors are missing \[\] and 1 are unknown \['1.bias'\]"):
        ema.load_state_dict(state | {"1.bias": torch.zeros(8)})
    with pytest.raises(ValueError, match=r"2.bias has the shape \(5,\) where \(4,\) is needed"):
        ema.load_state_dict(state | {"2.bias": torch.zeros(5)})
    assert same(dict(ema.state_dict()), before), "nothing is copied of a state that is refused"


def test_tensors_are_copied_and_cast() -> None:
    into = {"a": torch.zeros(3)}
    copy_tensors({"a": torch.ones(3, dtype=torch.float64)}, into=into)
    assert torch.equal(into["a"], torch.ones(3))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=f"decay is {decay}"):
        Ema(model_of(), decay=decay)


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter to average"):
        Ema(model_of().requires_grad_(requires_grad=False))
    with pytest.raises(ValueError, match=r"0.weight has no weights yet"):
        Ema(model_of().to("meta"))


def test_decays_are_the_published_ones() -> None:
    assert DECAYS == {"pi05": 0.99, "pi05_libero": 0.999}


@pytest.mark.parametrize("reshard", [False, True])
@pytest.mark.usefixtures("group")
def test_a_sharded_model_is_averaged_shard_by_shard(reshard: bool) -> None:
    whole, sharded = model_of().requires_grad_(), model_of().requires_grad_()
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded:
        fully_shard(layer, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(sharded, mesh=mesh, reshard_after_forward=reshard)
    x = torch.randn(5, 8)
    outputs = []
    for model in (whole, sharded):
        ema = Ema(model, decay=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
        with torch.no_grad():
            # Weights that FSDP gathered for one of these are not those of the next.
            before = model(x)
            with ema.swap():
                inside = model(x)
            after = model(x)
        assert torch.equal(before, after)
        assert not torch.allclose(before, inside)
        outputs.append(inside)
        averages = {name: each.clone() for name, each in ema.state_dict().items()}
        ema.load_state_dict({name: each * 0 for name, each in averages.items()})
        assert not any(bool((each != 0).any()) for each in ema.state_dict().values())
        if model is sharded:
            assert all(isinstance(each, DTensor) for each in averages.values())
    torch.testing.assert_close(outputs[0], outputs[1])
