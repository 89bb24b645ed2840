"""Tests of train/models/inputs.py."""

import math
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train.batch import Batch, Sizes, empty, to_torch
from train.keyed import key_of, mix
from train.models.config import CONFIGS, GrootConfig, ModelConfig, Pi05Config
from train.models.inputs import Inputs, _mix, check_sizes, dropout, inputs_of, normals, row_seeds, uniforms
from train.packing import Budgets, layout

RELAXED = settings(deadline=None)
WORDS = st.integers(0, 2**64 - 1)
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK = 2**64 - 1

PI05 = replace(CONFIGS["pi05_tiny"], horizon=4, action_dim=6)
GROOT = replace(CONFIGS["groot_n15_tiny"], horizon=4, action_dim=6, state_dim=5)
assert isinstance(PI05, Pi05Config)
assert isinstance(GROOT, GrootConfig)


def signed(words: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(words, np.uint64).view(np.int64).copy())


def bits(tensor: torch.Tensor) -> np.ndarray[Any, np.dtype[np.uint64]]:
    return tensor.numpy().view(np.uint64)


def batch_of(keys: list[int], **changed: int) -> Batch:
    """Return a batch with a sample for each key, an unused row, one row that was left out, and a tail."""
    num_samples, num_dims = len(keys), [6, 2, 4, 3]
    sizes = {"image_size": 64, "times": 2, "state_dim": 5, "action_dim": 6, "horizon": 4} | changed
    budgets = Budgets(tokens=600, images=2, samples=num_samples + 1)
    batch = empty(Sizes(budgets=budgets, **sizes))
    laid = layout(np.array([260, 10, 270, 8][:num_samples], np.int64), budgets)
    batch.cu_seqlens[:], batch.positions_T[:] = laid.cu_seqlens, laid.positions
    batch.segment_ids_T[:] = laid.segment_ids
    batch.image_starts_I[:] = (0, 270)
    batch.token_ids_T[:256], batch.token_ids_T[270:526] = -1, -1
    batch.key_B[:num_samples] = np.array(keys, np.uint64).view(np.int64)
    batch.weight_B[:num_samples] = 1
    for at in range(num_samples):
        batch.action_dim_B[at] = num_dims[at]
        batch.action_BHA[at, :, : num_dims[at]] = at + 1
        batch.state_BPD[at] = [[9] * sizes["state_dim"], [at] * sizes["state_dim"]]
        batch.action_valid_BH[at, : 4 - at] = True
        batch.embodiment_B[at] = at % 3
    # Its picture could not be decoded.
    batch.weight_B[num_samples - 1] = 0
    return to_torch(replace(batch, num_samples=num_samples))


def nothing(*, samples: int) -> Batch:
    """Return a batch without samples."""
    budgets = Budgets(tokens=9, images=1, samples=samples)
    return to_torch(empty(Sizes(budgets=budgets, image_size=64, times=1, state_dim=5, action_dim=6, horizon=4)))


KEYS = [key_of("sample", at) for at in range(4)]


# ------------------------------------------------------------------------------------------------- keyed numbers


@RELAXED
@given(keys=st.lists(WORDS, min_size=1, max_size=5), counters=st.lists(WORDS, min_size=1, max_size=5))
def test_the_hash_on_a_device_is_the_one_of_keyed(keys: list[int], counters: list[int]) -> None:
    key, counter = np.array(keys, np.uint64)[:, None], np.array(counters, np.uint64)
    assert np.array_equal(bits(_mix(signed(key), signed(counter))), mix(key, counter.copy()))


def test_uniforms_are_the_first_bits_of_that_hash() -> None:
    keys = np.array([0, 1, 2**63, 2**64 - 1, key_of("x")], np.uint64)
    found = uniforms(signed(keys), (3, 4), stream=7)
    words = mix(mix(keys, np.array([7], np.uint64))[:, None], np.arange(12, dtype=np.uint64))
    wanted = ((words >> np.uint64(41)).astype(np.float64) + 0.5) / 2**23
    assert found.shape == (5, 3, 4)
    assert found.dtype == torch.float32
    assert np.array_equal(found.flatten(1).double().numpy(), wanted)


def undone(word: int) -> int:
    """Return what the finish of the hash takes to a word."""
    for shift, factor in ((31, SECOND), (27, FIRST), (30, 1)):
        wanted, word = word, 0
        for _ in range(3):
            word = wanted ^ (word >> shift)
        word = word * pow(factor, -1, 2**64) & MASK
    return word


def key_with(first: int, stream: int) -> int:
    """Return the key whose first word in a stream is a given one."""
    counters = [int(mix(0, np.array([at], np.uint64))[0]) for at in (0, stream)]
    # With a key of 0 the inner hash is finished twice.
    inner = [undone(each) for each in counters]
    return undone(undone(first) ^ inner[0]) ^ inner[1]


@pytest.mark.parametrize("word", [0, MASK, 1 << 63, 12345])
def test_the_least_and_the_largest_word_give_neither_0_nor_1(word: int) -> None:
    found = uniforms(signed([key_with(word, 5)]), (1,), stream=5).double().item()
    assert found == ((word >> 41) + 0.5) / 2**23
    assert 0 < found < 1


def largest_gap(uniform: torch.Tensor) -> float:
    """Return the distance of a sample's distribution to the uniform one, times the square root of its size."""
    ordered = uniform.flatten().double().sort().values
    size = len(ordered)
    steps = torch.arange(1, size + 1, dtype=torch.float64) / size
    return max((steps - ordered).max().item(), (ordered - steps + 1 / size).max().item()) * math.sqrt(size)


def correlation(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the correlation of two samples, times the square root of their size: of a normal distribution of 1."""
    pairs = torch.stack([first.flatten(), second.flatten()]).double()
    return torch.corrcoef(pairs)[0, 1].item() * math.sqrt(pairs.shape[1])


NEIGHBOURS = {
    "counting": torch.arange(500),
    "negative": torch.arange(-250, 250),
    "high": torch.arange(500) << 50,
    "hashes": signed(mix(3, np.arange(500, dtype=np.uint64))),
}


@pytest.mark.parametrize("keys", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_uniforms_are_uniform_and_those_of_neighbouring_keys_independent(keys: torch.Tensor) -> None:
    found = uniforms(keys, (200,), stream=1)
    size = found.numel()
    assert 0 < found.min() < 1e-4
    assert 1 - 1e-4 < found.max() < 1
    assert abs(found.double().mean() - 0.5) < 4 / math.sqrt(12 * size)
    assert found.double().var() == pytest.approx(1 / 12, abs=4 * math.sqrt(1 / 180 / size))
    assert largest_gap(found) < 1.95, "of one in a thousand samples it is larger"
    for each in (found[1:], found[:, 1:], uniforms(keys, (200,), stream=2)):
        like = found[: each.shape[0], : each.shape[1]]
        assert abs(correlation(like, each)) < 4
        assert abs(correlation((like - 0.5).abs(), (each - 0.5).abs())) < 4
    # Each key's own numbers are spread as well.
    assert abs(found.mean(1) - 0.5).max() < 5 / math.sqrt(12 * 200)


@pytest.mark.parametrize("keys", NEIGHBOURS.values(), ids=NEIGHBOURS)
def test_normals_are_normal(keys: torch.Tensor) -> None:
    found = normals(keys, (10, 20), stream=1)
    assert found.shape == (500, 10, 20)
    assert found.dtype == torch.float32
    x = found.double()
    size = x.numel()
    # Of a normal distribution, moments and their variances.
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert x.pow(power).mean() == pytest.approx(moment, abs=4 * math.sqrt(variance / size))
    assert largest_gap(torch.special.ndtr(x)) < 1.95
    assert 4 < x.abs().max() < 6
    for each in (x[1:], x[:, 1:], x[:, :, 1:]):
        like = x[: each.shape[0], : each.shape[1], : each.shape[2]]
        assert abs(correlation(like, each)) < 4
        assert abs(correlation(like**2, each**2)) < 4


@pytest.mark.parametrize("config", [PI05, GROOT], ids=["pi05", "groot"])
def test_times_are_of_a_beta_distribution_near_noise(config: ModelConfig) -> None:
    size = 4000
    time_B = inputs_of(replace(nothing(samples=size), key_B=torch.arange(size)), config).time_B
    assert time_B.dtype == torch.float32
    # pi-0.5 has noise at 1, GR00T at 0, and what it makes of the distribution passes 0 by a thousandth.
    is_pi05 = isinstance(config, Pi05Config)
    low, high = (0.001, 1) if is_pi05 else (-0.001 / 0.999, 1)
    assert low - 1e-6 <= time_B.min() <= time_B.max() <= high
    assert time_B.max() > 0.999 if is_pi05 else time_B.min() < 0
    # Beta(1.5, 1) has the distribution function x ** 1.5.
    beta_B = (time_B.double() - 0.001) / 0.999 if is_pi05 else 0.999 - 0.999 * time_B.double()
    assert beta_B.mean() == pytest.approx(0.6, abs=4 * math.sqrt(0.6 * 0.4 / 3.5 / size))
    assert largest_gap(beta_B.clamp(min=0) ** 1.5) < 1.95


# ---------------------------------------------------------------------------------------------- inputs of a batch


@pytest.mark.parametrize("config", [PI05, GROOT], ids=["pi05", "groot"])
def test_a_key_has_its_numbers_wherever_its_sample_lies(config: ModelConfig) -> None:
    first = inputs_of(batch_of(KEYS), config)
    order = [2, 0, 3]
    other = inputs_of(batch_of([KEYS[at] for at in order]), config)
    for name in ("noise_BHA", "time_B", "seed_B"):
        a, b = getattr(first, name), getattr(other, name)
        assert torch.equal(a[order], b[:3])
        assert len({tuple(np.atleast_1d(each.numpy()).ravel().tolist()) for each in a}) == len(a)
    assert first.noise_BHA.shape == (5, 4, 6)
    assert ((first.seed_B >= 0) & (first.seed_B < 2**32)).all()


@pytest.mark.parametrize("config", [PI05, GROOT], ids=["pi05", "groot"])
def test_another_draw_has_other_numbers_and_the_same_again(config: ModelConfig) -> None:
    batch = batch_of(KEYS)
    drawn = [inputs_of(batch, config, draw=at) for at in (0, 1, 2, 1)]
    for name in ("noise_BHA", "time_B", "seed_B"):
        first, second, third, again = (getattr(each, name) for each in drawn)
        assert torch.equal(second, again)
        for a, b in ((first, second), (second, third), (first, third)):
            assert (a != b).all()
    assert torch.equal(drawn[0].noise_BHA, inputs_of(batch, config).noise_BHA)
    # No stream of one draw is another stream of another.
    spread = torch.stack([normals(batch.key_B, (4, 6), stream=at) for at in range(1, 12)])
    for each in drawn[:3]:
        assert sum(bool(torch.equal(each.noise_BHA, other)) for other in spread) == 1


def test_what_the_batch_has_is_passed_on() -> None:
    batch = batch_of(KEYS)
    found = inputs_of(batch, GROOT)
    same = ("images_ISSC", "image_starts_I", "token_ids_T", "positions_T", "segment_ids_T", "cu_seqlens", "action_BHA")
    for name in (*same, "weight_B"):
        assert torch.equal(getattr(found, name), getattr(batch, name))
    assert found.images_ISSC.dtype == torch.uint8
    assert torch.equal(found.state_BD, batch.state_BPD[:, 1]), "the sample's own time is the last"
    assert found.state_BD[1, 0] == 1
    assert torch.equal(found.category_B, batch.embodiment_B)


def test_inputs_move_to_a_device_whole() -> None:
    found = inputs_of(batch_of(KEYS), GROOT)
    moved = found.to("meta")
    for each in fields(Inputs):
        before, after = getattr(found, each.name), getattr(moved, each.name)
        assert after.is_meta
        assert (after.dtype, after.shape) == (before.dtype, before.shape)


def test_categories_are_the_models_numbers() -> None:
    batch = batch_of(KEYS)
    assert batch.embodiment_B.tolist() == [0, 1, 2, 0, 0]
    assert inputs_of(batch, GROOT, categories=(31, 0, 7)).category_B.tolist() == [31, 0, 7, 31, 31]
    for wrong in (32, -1):
        with pytest.raises(ValueError, match=rf"categories \[{wrong}\] are not among the model's 0 ... 31"):
            inputs_of(batch, GROOT, categories=(31, 0, wrong))
    assert inputs_of(batch, PI05, categories=(40, 0, 7)).category_B[0] == 40, "pi-0.5 has none"


WEIGHTS = {
    "pi05": (PI05, False, False),
    "pi05, real dimensions": (replace(PI05, loss_dims="real"), True, False),
    "pi05, valid actions": (replace(PI05, loss_actions="valid"), False, True),
    "pi05, both": (replace(PI05, loss_dims="real", loss_actions="valid"), True, True),
    "groot": (GROOT, True, False),
    "groot, valid actions": (replace(GROOT, loss_actions="valid"), True, True),
}
"""Configuration, whether only real dimensions count, whether only valid actions do."""


@pytest.mark.parametrize(("config", "real", "valid"), WEIGHTS.values(), ids=WEIGHTS)
def test_what_counts_in_the_loss(config: ModelConfig, real: bool, valid: bool) -> None:
    found = inputs_of(batch_of(KEYS), config).weight_BHA
    wanted = torch.zeros(5, 4, 6)
    # The fourth sample was left out, the fifth row is unused.
    for sample, dims in enumerate((6, 2, 4)):
        wanted[sample, : 4 - sample if valid else 4, : dims if real else 6] = 1
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)
    assert found.is_contiguous()


def test_a_batch_without_samples_counts_nothing() -> None:
    batch = nothing(samples=2)
    for config in (PI05, GROOT):
        found = inputs_of(batch, config)
        assert not found.weight_BHA.any()
        assert found.noise_BHA.isfinite().all()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"horizon": 5}, "horizon is 5, the model's 4"),
        ({"action_dim": 8}, "action_dim is 8, the model's 6"),
        ({"image_size": 32}, "image_size is 32, the model's 64"),
        ({"state_dim": 7}, "state_dim is 7, the model's 5"),
    ],
)
def test_a_batch_of_other_sizes_is_refused(changed: dict[str, int], message: str) -> None:
    batch = batch_of(KEYS[:2], **changed)
    for call in (check_sizes, inputs_of):
        with pytest.raises(ValueError, match=f"does not fit the model: {message}. Give the loader the model's sizes"):
            call(batch, GROOT)
    if "state_dim" in changed:
        # pi-0.5 reads states as text.
        check_sizes(batch, PI05)
    else:
        with pytest.raises(ValueError, match=message):
            check_sizes(batch, PI05)


def test_all_sizes_that_are_wrong_are_named() -> None:
    with pytest.raises(ValueError, match="horizon is 5, the model's 4; action_dim is 8, the model's 6"):
        check_sizes(batch_of(KEYS[:2], horizon=5, action_dim=8), GROOT)
    check_sizes(batch_of(KEYS[:2]), GROOT)


# ------------------------------------------------------------------------------------------------------- dropout


ROWS, FEATURES = 400, 256


def kept(seeds: torch.Tensor, *, salt: int = 0, probability: float = 0.5) -> torch.Tensor:
    """Return what is kept of FEATURES features of some rows, as 0 and 1."""
    return (dropout(torch.ones(*seeds.shape, FEATURES), seeds, salt, probability) != 0).float()


def rows_of(seed: int, *, salt: int = 0) -> torch.Tensor:
    samples = torch.zeros(ROWS, dtype=torch.int32)
    return row_seeds(torch.tensor([seed]), samples, torch.arange(ROWS), salt=salt)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.2, 0.36, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_its_share_and_the_mean(probability: float, dtype: torch.dtype) -> None:
    x = torch.full((ROWS, FEATURES), 3.0, dtype=dtype, requires_grad=True)
    dropped = dropout(x, rows_of(5), 2, probability)
    dropped.sum().backward()
    found = dropped.detach()
    assert found.dtype == dtype
    is_kept = found != 0
    sigma = math.sqrt(probability * (1 - probability) / is_kept.numel())
    assert is_kept.double().mean() == pytest.approx(1 - probability, abs=4 * sigma + 1e-12)
    assert torch.equal(found[is_kept].unique(), (x * (1 / (1 - probability))).detach().unique())
    assert found.double().mean() == pytest.approx(3, abs=3 * 4 * sigma / (1 - probability) + 0.01)
    assert x.grad is not None
    assert torch.equal(x.grad != 0, is_kept)


def test_shares_are_even_over_rows_and_features() -> None:
    found = kept(rows_of(5))
    assert (found.mean(0) - 0.5).abs().max() < 5 / 2 / math.sqrt(ROWS)
    assert (found.mean(1) - 0.5).abs().max() < 5 / 2 / math.sqrt(FEATURES)


def test_rows_places_layers_and_samples_are_independent() -> None:
    base = kept(rows_of(5))
    others = {
        "rows": (base[1:], base[:-1]),
        "rows, two apart": (base[2:], base[:-2]),
        "features": (base[:, 1:], base[:, :-1]),
        "diagonal": (base[1:, 1:], base[:-1, :-1]),
        **{f"places {salt}": (kept(rows_of(5), salt=salt), base) for salt in (1, 2, 3, 4)},
        **{f"layers {salt}": (kept(rows_of(5, salt=salt)), base) for salt in (1, 2, 16, 17)},
        **{f"samples {seed}": (kept(rows_of(seed)), base) for seed in (4, 6, 5 + (1 << 31), 5 ^ (1 << 16))},
    }
    found = {name: correlation(*pair) for name, pair in others.items()}
    assert {name: each for name, each in found.items() if abs(each) >= 4} == {}


def test_dropout_depends_on_sample_and_position_alone() -> None:
    seed_B = torch.tensor([7, 8, 9])
    samples, positions = torch.tensor([0, 0, 0, 2, 2, 3], dtype=torch.int32), torch.tensor([0, 1, 2, 0, 1, 0])
    first = row_seeds(seed_B, samples, positions, salt=3)
    assert ((first >= 0) & (first < 2**32)).all()
    assert first.dtype == torch.int64
    # The same samples in another pack, at other places.
    other = row_seeds(torch.tensor([9, 7]), torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([0, 1, 0, 1, 2, 0]), salt=3)
    assert torch.equal(other, first[[3, 4, 0, 1, 2, 5]]), "rows of no sample come last"
    assert len(set(first.tolist())) == 6
    whole, part = kept(first), kept(first[3:5])
    assert torch.equal(whole[3:5], part)
    in_rows = kept(first.unflatten(0, (2, 3)))
    assert torch.equal(in_rows.flatten(0, 1), whole)
