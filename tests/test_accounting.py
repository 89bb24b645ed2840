"""Tests of train/accounting.py."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from train.accounting import Part, Sample, forward_flops, mfu, peak_flops, sampling_flops, step_flops
from train.freezing import PRESETS, freeze
from train.made import Lengths, packed_inputs, random_sample
from train.models.build import build
from train.models.checkpointing import checkpoint_activations
from train.models.config import CONFIGS, GrootConfig, ModelConfig, Pi05Config, VisionConfig
from train.models.groot import Groot
from train.models.inputs import Inputs
from train.models.pi05 import Pi05
from train.packing import Budgets

RELAXED = settings(deadline=None, max_examples=30)
VISION = VisionConfig(width=32, layers=3, heads=4, mlp=64, image_size=16, patch=4)
SMALL: dict[str, ModelConfig] = {
    "pi05": Pi05Config(
        vision=VISION,
        width=64,
        layers=3,
        mlp=192,
        expert_width=48,
        expert_mlp=96,
        heads=4,
        kv_heads=2,
        head_dim=24,
        vocab=100,
        horizon=7,
        action_dim=8,
        compute="float32",
    ),
    "groot_n15": GrootConfig(
        vision=VISION,
        width=64,
        layers=2,
        mlp=160,
        heads=6,
        kv_heads=2,
        head_dim=16,
        vocab=100,
        vl_layers=2,
        vl_heads=4,
        dit_width=48,
        dit_layers=5,
        dit_heads=4,
        hidden=40,
        state_dim=24,
        action_dim=8,
        horizon=6,
        future_tokens=5,
        positions=20,
        categories=3,
        compute="float32",
    ),
}
"""Sizes of which no two are equal, where that can be."""

CASES = (Lengths(views=1, text=9), Lengths(views=3, text=0), Lengths(views=0, text=14), Lengths(views=2, text=5))

FROZEN = [(family, parts) for family, presets in PRESETS.items() for parts in presets.values()]
FROZEN += [("groot_n15", ("vision", "language", "vl")), ("groot_n15", ("vl",)), ("pi05", ("language",))]


def samples_of(config: ModelConfig, cases: Sequence[Lengths]) -> list[Sample]:
    return [Sample(tokens=each.tokens(config), images=each.views) for each in cases]


def inputs_for(config: ModelConfig, cases: Sequence[Lengths]) -> Inputs:
    """Return the inputs of a pack that is full in all its budgets."""
    tokens, images = sum(each.tokens(config) for each in cases), sum(each.views for each in cases)
    samples = [random_sample(config, each, seed=at) for at, each in enumerate(cases)]
    return packed_inputs(config, samples, Budgets(tokens=tokens, images=images, samples=len(samples)))


@dataclass(frozen=True, kw_only=True)
class Counted:
    """What torch's counter saw."""

    linear: int
    """mm, addmm and bmm, which are the products with weights."""
    attention: int
    """Products of queries and keys, and of weights and values, or their gradients; scores computed again are not."""

    @property
    def total(self) -> int:
        return self.linear + self.attention


def segments(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> int:
    """Count what varlen_attn computes, from the segments themselves."""
    cu_q, cu_k, _, _, causal, _ = options
    lengths = [[end - start for start, end in pairwise(cu.tolist())] for cu in (cu_q, cu_k)]
    pairs = sum(i * (i + 1) // 2 if causal else i * j for i, j in zip(*lengths, strict=True))
    return 4 * pairs * q.shape[1] * q.shape[2]


def images(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any) -> int:
    return 4 * q.shape[:-1].numel() * k.shape[2] * q.shape[3]


def twice(forward: Callable[..., int]) -> Callable[..., int]:
    """Count a backward pass: gradients of values and of weights, then those of queries and of keys."""
    return lambda _, q, k, v, *rest: 2 * forward(q, k, v, *rest[2:])


def raw(count: Callable[..., int]) -> Callable[..., int]:
    """Have the counter hand over tensors, not their shapes."""

    def formula(*arguments: Any, out_val: Any = None, **_: Any) -> int:
        return count(*arguments)

    formula._get_raw = True
    return formula


ATEN, OURS = torch.ops.aten, torch.ops.robolake
PRODUCTS = (ATEN.mm, ATEN.addmm, ATEN.bmm)
ATTENTION = {
    OURS.varlen_attn: raw(segments),
    OURS.varlen_attn_backward: raw(twice(segments)),
    ATEN._scaled_dot_product_flash_attention_for_cpu: raw(images),
    ATEN._scaled_dot_product_flash_attention_for_cpu_backward: raw(twice(images)),
}
"""Opaque to torch's counter."""


def counted(run: Callable[[], Any]) -> Counted:
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        run()
    counts = counter.get_flop_counts()["Global"]
    assert counts.keys() <= {*PRODUCTS, *ATTENTION}
    return Counted(
        linear=sum(counts.get(each, 0) for each in PRODUCTS), attention=sum(counts.get(each, 0) for each in ATTENTION)
    )


def trained(model: Pi05 | Groot, inputs: Inputs) -> Counted:
    def step() -> None:
        model(inputs).mean.backward()

    return counted(step)


@pytest.mark.parametrize("family", SMALL)
@pytest.mark.parametrize("cases", [CASES, CASES[:1], CASES[2:3]], ids=len)
def test_a_forward_pass_computes_what_is_counted(family: str, cases: tuple[Lengths, ...]) -> None:
    config, model = SMALL[family], build(SMALL[family], seed=0)
    inputs = inputs_for(config, cases)
    found = counted(lambda: model(inputs))
    parts = [part for each in samples_of(config, cases) for part in forward_flops(config, each).values()]
    assert found.linear == sum(part.linear for part in parts)
    assert found.attention == sum(part.attention for part in parts)


@pytest.mark.parametrize("family", SMALL)
def test_each_part_computes_what_is_counted_for_it(family: str) -> None:
    """The counter tells modules apart, by what was called; each is of one part."""
    config, model = SMALL[family], build(SMALL[family], seed=0)
    inputs = inputs_for(config, CASES)
    with FlopCounterMode(display=False) as counter:
        model(inputs)
    counts = counter.get_flop_counts()
    names = {module: name for name, module in model.named_modules()}
    for part, modules in model.parts().items():
        called = [f"{type(model).__name__}.{names[module]}" for module in modules]
        found = sum(counts[name].get(each, 0) for name in called if name in counts for each in PRODUCTS)
        assert found == sum(forward_flops(config, each)[part].linear for each in samples_of(config, CASES)), part


@pytest.mark.parametrize("steps", [None, 3])
@pytest.mark.parametrize("family", SMALL)
def test_sampling_computes_what_is_counted(family: str, steps: int | None) -> None:
    config, model = SMALL[family], build(SMALL[family], seed=0)
    inputs = inputs_for(config, CASES)
    found = counted(lambda: model.sample(inputs, steps=steps))
    assert found.total == sum(sampling_flops(config, each, steps=steps) for each in samples_of(config, CASES))


@pytest.mark.parametrize(("family", "parts"), FROZEN, ids=str)
def test_a_step_computes_what_is_counted(family: str, parts: tuple[str, ...]) -> None:
    config, model = SMALL[family], build(SMALL[family], seed=0)
    freeze(model, parts)
    inputs = inputs_for(config, CASES)
    found = trained(model, inputs)
    wanted = step_flops(config, samples_of(config, CASES), frozen=parts)
    # The first products behind what is not trained need no gradient of what comes in, which the rule does not know.
    assert 0.95 * wanted <= found.total <= wanted


def test_layers_computed_again_are_not_counted() -> None:
    model = build(SMALL["pi05"], seed=0)
    checkpoint_activations(model, "layers")
    inputs = inputs_for(model.config, CASES)
    found = trained(model, inputs)
    assert found.total > 1.1 * step_flops(model.config, samples_of(model.config, CASES))


@pytest.mark.parametrize(
    ("horizon", "tokens", "images", "tera"),
    [(50, 302, 1, 4.19), (10, 532, 2, 7.44), (16, 562, 2, 7.80), (50, 840, 3, 11.83)],
)
def test_known_costs_of_pi05(horizon: int, tokens: int, images: int, tera: float) -> None:
    config = replace(CONFIGS["pi05"], horizon=horizon)
    assert step_flops(config, [Sample(tokens=tokens, images=images)]) / 1e12 == pytest.approx(tera, abs=0.006)


@pytest.mark.parametrize(
    ("frozen", "tera"),
    [(("language",), (1.99, 3.74, 5.53)), (("vision", "language"), (1.18, 2.15, 3.14)), ((), (2.35, 4.42, 6.53))],
)
def test_known_costs_of_groot(frozen: tuple[str, ...], tera: tuple[float, ...]) -> None:
    samples = [Sample(tokens=45 + 256 * views + 7 * (views - 1), images=views) for views in (1, 2, 3)]
    found = [step_flops(CONFIGS["groot_n15"], [each], frozen=frozen) / 1e12 for each in samples]
    assert found == pytest.approx(list(tera), abs=0.006)


@pytest.mark.parametrize(
    ("family", "shares"),
    [
        ("pi05", {"vision": 0.17, "connector": 0, "language": 0.82, "expert": 0.02}),
        ("groot_n15", {"vision": 0.30, "language": 0.47, "vl": 0.16, "projector": 0, "dit": 0.07}),
    ],
)
def test_known_shares_of_the_parts(family: str, shares: dict[str, float]) -> None:
    """Of two cameras; the shares are in whole per cent."""
    parts = forward_flops(CONFIGS[family], Sample(tokens=562, images=2))
    assert list(parts) == list(shares)
    total = sum(part.total for part in parts.values())
    assert {name: part.total / total for name, part in parts.items()} == pytest.approx(shares, abs=0.02)


SAMPLES = st.builds(Sample, tokens=st.integers(0, 900), images=st.integers(0, 4))


@RELAXED
@given(family=st.sampled_from(list(SMALL)), first=st.lists(SAMPLES, max_size=4), second=st.lists(SAMPLES, max_size=4))
def test_costs_of_samples_add_up(family: str, first: list[Sample], second: list[Sample]) -> None:
    config = CONFIGS[family]
    apart = step_flops(config, first) + step_flops(config, second)
    assert step_flops(config, iter(first + second)) == pytest.approx(apart, rel=1e-12)
    alone = sum(part.total for each in first for part in forward_flops(config, each).values())
    assert step_flops(config, first) == pytest.approx(3 * alone, rel=1e-12)
    assert step_flops(config, first, frozen=PARTS[family]) == pytest.approx(alone, rel=1e-12)


PARTS = {family: list(forward_flops(config, Sample(tokens=1, images=0))) for family, config in SMALL.items()}


@RELAXED
@given(data=st.data(), family=st.sampled_from(list(SMALL)), sample=SAMPLES)
def test_costs_grow_with_what_there_is_to_do(data: st.DataObject, family: str, sample: Sample) -> None:
    config = CONFIGS[family]
    more = [replace(sample, tokens=sample.tokens + 1), replace(sample, images=sample.images + 1)]
    frozen = data.draw(st.sets(st.sampled_from(PARTS[family])))
    further = frozen | data.draw(st.sets(st.sampled_from(PARTS[family])))
    cost = step_flops(config, [sample], frozen=frozen)
    for each in more:
        assert step_flops(config, [each], frozen=frozen) > cost
        assert sampling_flops(config, each) > sampling_flops(config, sample)
    assert step_flops(config, [sample], frozen=further) <= cost
    steps = data.draw(st.integers(1, 20))
    assert sampling_flops(config, sample, steps=steps + 1) > sampling_flops(config, sample, steps=steps)


def test_one_step_of_sampling_is_a_forward_pass() -> None:
    for config in SMALL.values():
        sample = Sample(tokens=40, images=2)
        parts = forward_flops(config, sample).values()
        assert sampling_flops(config, sample, steps=1) == sum(part.total for part in parts)
        assert sampling_flops(config, sample) == sampling_flops(config, sample, steps=config.sampling_steps)


@pytest.mark.parametrize("family", SMALL)
def test_the_parts_are_the_models_own(family: str) -> None:
    assert PARTS[family] == list(build(SMALL[family], seed=0).parts())
    for part in PARTS[family]:
        assert step_flops(SMALL[family], [Sample(tokens=60, images=2)], frozen=[part]) < step_flops(
            SMALL[family], [Sample(tokens=60, images=2)]
        )


def test_parts_that_the_model_does_not_have_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"parts \['dit', 'head'\] to freeze are not among those of pi05: \['connector'"
    ):
        step_flops(CONFIGS["pi05"], [], frozen=["head", "vision", "dit"])


def test_mfu_is_what_was_useful_over_what_was_possible() -> None:
    assert mfu(6e12, 2.0, peak=1e12) == 3.0
    assert mfu(6e12, 2.0, peak=1e12, devices=8) == 0.375
    assert Part(linear=3.0, attention=4.0).total == 7.0


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA GB200", None),
        ("cpu", None),
    ],
)
def test_peaks_of_devices(name: str, peak: float | None) -> None:
    assert peak_flops(name) == peak
