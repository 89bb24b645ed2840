"""Training in FP8 follows training in bfloat16, on real frames from a lake."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import G1
from tiny_training import FloatProducts, g1_release, mean_loss, train_model, training_packs, validation_packs

from lake import Release
from train import fp8_emulated
from train.models.build import build, config_named
from train.models.config import ModelConfig, Pi05Config
from train.models.inputs import Inputs
from train.optimizer import OptimizerConfig
from train.precision import PrecisionConfig, apply_precision

STEPS, FEW, LAST = 200, 80, 20
OPTIMIZER = OptimizerConfig(peak_lr=5e-4, final_lr=5e-5, warmup_steps=10, decay_steps=STEPS)
EMULATE = PrecisionConfig(backend="emulate", min_features=64)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return g1_release(tmp_path_factory.mktemp("g1"), G1)


def trained(
    config: ModelConfig, precision: PrecisionConfig, packs: list[Inputs], steps: int
) -> tuple[Any, list[float]]:
    """Return a model after some steps of a schedule of 200, and the loss of each."""
    model = build(config, seed=0)
    if precision.backend != "none":
        applied = apply_precision(model, precision)
        assert len(applied.converted) > 20
    with FloatProducts():
        return model, train_model(model, packs[:steps], OPTIMIZER, precision)


def mean(losses: list[float], end: int) -> float:
    return sum(losses[end - LAST : end]) / LAST


def scaled_by(power: int) -> Callable[..., torch.Tensor]:
    """Return a rounding to FP8 whose scales are a power of two off: numbers vanish, or are cut off."""

    def rounded(x: torch.Tensor, dtype: torch.dtype, **_: object) -> torch.Tensor:
        top = torch.finfo(dtype).max
        scale = (top * 2.0**power / x.abs().amax().double().clamp(min=1e-12)).float()
        return (x.float() * scale).clamp(-top, top).to(dtype).float() / scale

    return rounded


def test_200_steps_of_pi05_end_within_two_per_cent(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_named("pi05_tiny")
    assert isinstance(config, Pi05Config)
    config = replace(config, mlp=256, loss_dims="real")
    packs, held_out = training_packs(release, config, STEPS), validation_packs(release, config)
    assert all(pack.weight_B.sum() for pack in packs)
    model, losses = trained(config, PrecisionConfig(), packs, STEPS)
    rounded_model, rounded = trained(config, EMULATE, packs, STEPS)
    assert mean(losses, STEPS) < 0.5 * mean(losses, LAST), "it has learned"
    assert rounded != losses
    assert mean(rounded, STEPS) == pytest.approx(mean(losses, STEPS), rel=0.02)
    assert mean_loss(rounded_model, held_out) == pytest.approx(mean_loss(model, held_out), rel=0.02)
    # The comparison tells a rounding that does harm.
    monkeypatch.setattr(fp8_emulated, "rounded", scaled_by(-20))
    _, harmed = trained(config, EMULATE, packs, FEW)
    assert mean(harmed, FEW) > 1.05 * mean(losses, FEW)
    assert mean(rounded, FEW) == pytest.approx(mean(losses, FEW), rel=0.02)


def test_steps_of_groot_stay_within_two_per_cent(release: Release) -> None:
    config = replace(config_named("groot_n15_tiny"), compute="float32")
    packs = training_packs(release, config, FEW)
    _, losses = trained(config, PrecisionConfig(), packs, FEW)
    _, rounded = trained(config, EMULATE, packs, FEW)
    assert mean(losses, FEW) < 0.95 * mean(losses, LAST)
    assert rounded != losses
    assert mean(rounded, FEW) == pytest.approx(mean(losses, FEW), rel=0.02)


def test_torchao_gives_the_gradients_of_emulation(release: Release) -> None:
    config = replace(config_named("pi05_tiny"), compute="float32")
    pack = training_packs(release, config, 1)[0]
    found = {}
    for backend in ("none", "emulate", "torchao"):
        model = build(config, seed=0)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            # Gates of residuals begin at zero, and then no layer of actions would matter.
            for name, weight in model.named_parameters():
                if ".dense." in name:
                    weight.normal_(std=0.2, generator=generator)
        if backend != "none":
            apply_precision(model, replace(EMULATE, backend=backend))
        model(pack).mean.backward()
        found[backend] = torch.cat([weight.grad.flatten() for weight in model.parameters()])

    def apart(one: str, other: str) -> float:
        return ((found[one] - found[other]).norm() / found[other].norm()).item()

    assert apart("torchao", "emulate") < 0.5 * apart("emulate", "none") < 0.1
