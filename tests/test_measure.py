"""Steps that are timed are those that would train: the same loss whatever the layout, compiled or not."""

from dataclasses import replace

import pytest
from goldens import config_of

from train.made import Lengths
from train.measure import Variant, Work, device_name, matmul_flops, measure, parameters_of
from train.models.config import CONFIGS
from train.packing import Budgets

LENGTHS = ((Lengths(views=1, text=9), Lengths(views=3, text=4)), (Lengths(views=2, text=6),))


def work(family: str, *, frozen: tuple[str, ...] = ()) -> Work:
    return Work(
        config=replace(config_of(family), compute="float32"),
        packs=LENGTHS,
        budgets=Budgets(tokens=40, images=5, samples=3),
        padded_to=Lengths(views=3, text=12) if family == "pi05" else None,
        frozen=frozen,
    )


def test_packed_and_padded_steps_have_the_same_loss() -> None:
    packed = measure(work("pi05"), Variant(), device="cpu", repeats=2)
    assert len(packed.seconds) == 2
    assert min(packed.seconds) > 0
    assert packed.peak_bytes > 50 << 20
    assert packed.micro_steps == 2
    for variant in (
        Variant(layout="padded", attention="sdpa"),
        Variant(layout="padded", attention="eager", again=True),
        Variant(again=True),
    ):
        timing = measure(work("pi05"), variant, device="cpu", repeats=2)
        assert timing.loss == pytest.approx(packed.loss, rel=1e-4)
    rounded = measure(work("pi05"), Variant(precision="emulate"), device="cpu", repeats=2)
    assert rounded.loss == pytest.approx(packed.loss, rel=2e-2)
    assert rounded.loss != packed.loss


def test_frozen_parts_are_not_trained_in_it() -> None:
    whole = measure(work("groot_n15"), Variant(), device="cpu", repeats=1)
    some = measure(work("groot_n15", frozen=("vision", "language")), Variant(), device="cpu", repeats=1)
    assert some.loss != whole.loss
    with pytest.raises(ValueError, match="parts"):
        measure(work("groot_n15", frozen=("head",)), Variant(), device="cpu", repeats=1)


def test_a_precision_that_cannot_be_had_is_an_error() -> None:
    with pytest.raises(ValueError, match="Transformer Engine"):
        measure(work("pi05"), Variant(precision="te"), device="cpu", repeats=1)


def test_devices_and_products() -> None:
    assert device_name("cpu").kind == "cpu"
    assert matmul_flops("cpu", "float32") > 1e8


def test_parameters_are_counted_by_part() -> None:
    found = parameters_of(CONFIGS["groot_n15"], frozen=("language",))
    assert found["all"] == pytest.approx(2.398e9, rel=1e-3)
    assert found["trained"] == found["all"] - found["language"]
