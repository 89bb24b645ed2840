"""Normalised values come back, constants stay constants, and statistics of another representation are refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from lakes import add, make_sources
from support import Made, make_v21

from lake import Lake, Release
from lake.sketch import sketch
from train import statistics
from train.normalise import (
    EPSILON,
    NARROW,
    Affine,
    Normaliser,
    RepresentationMismatchError,
    Scheme,
    absolute,
    affine_of,
    relative,
)
from train.statistics import Actions, FeatureStats, Statistics, StatisticsMissingError

any_speed = settings(deadline=None)
SCALING: list[Scheme] = ["mean_std", "min_max", "quantile"]
SCHEMES: list[Scheme] = [*SCALING, "none"]
ULP = float(np.finfo(np.float32).eps)

numbers = st.floats(-1e6, 1e6, width=32)
features = hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(0, 4)), elements=numbers)
schemes = st.sampled_from(SCHEMES)


def stats_of(values_TD: np.ndarray) -> FeatureStats:
    return statistics._of_sketch(sketch(values_TD))


def statistics_of(values: dict[tuple[str, str, str], np.ndarray], actions: Actions | None = None) -> Statistics:
    found = {key: stats_of(values_TD) for key, values_TD in values.items()}
    return Statistics(features=found, actions=actions or Actions(), release_id="r")


def mixture(actions: Actions | None = None) -> Statistics:
    """Return statistics of three embodiments: of 3 and 2 dimensions, of 5 and 4, and of no state and 3."""
    rng = np.random.default_rng(0)
    shapes = {("a", "small", "state"): 3, ("a", "small", "action"): 2, ("b", "big", "state"): 5}
    shapes |= {("b", "big", "action"): 4, ("c", "blind", "action"): 3}
    return statistics_of({key: rng.normal(3, 2, (50, dim)) for key, dim in shapes.items()}, actions)


def normaliser(statistics: Statistics, **changed: object) -> Normaliser:
    chosen = {"state_scheme": "quantile", "action_scheme": "min_max", "actions": statistics.actions}
    return Normaliser(statistics=statistics, **(chosen | changed))  # type: ignore[arg-type]


# Affines.


@any_speed
@given(features, schemes)
@example(np.full((3, 1), 0.1, np.float32), "quantile")
@example(np.array([[1000.0], [1000.01]], np.float32), "min_max")
def test_what_is_normalised_comes_back(values_TD: np.ndarray, scheme: Scheme) -> None:
    stats = stats_of(values_TD)
    affine = affine_of(stats, scheme)
    there_TD = affine.apply(values_TD)
    back_TD = affine.invert(there_TD)
    assert there_TD.dtype == back_TD.dtype == affine.scale.dtype == affine.offset.dtype == np.float32
    assert np.isfinite(there_TD).all()
    magnitude_D = np.abs(values_TD).max(axis=0).astype(np.float64)
    # A dimension taken for constant loses what it spreads over: its noise, or under mean_std what is rare as well.
    noise_D = NARROW * np.maximum(1, magnitude_D)
    rare_D = np.abs(values_TD - affine.offset).max(axis=0)
    lost_D = np.where(affine.scale == 0, rare_D if scheme == "mean_std" else noise_D, 0.0)
    assert (np.abs(back_TD - values_TD) <= 8 * ULP * magnitude_D + lost_D + 1e-37).all()


@any_speed
@given(features, hnp.arrays(np.float32, 4, elements=st.floats(-1, 1, width=32)), st.sampled_from(SCALING))
def test_what_a_policy_gives_comes_back_as_it_was(values_TD: np.ndarray, y: np.ndarray, scheme: Scheme) -> None:
    affine = affine_of(stats_of(values_TD), scheme)
    y_D = y[: values_TD.shape[1]]
    again_D = affine.apply(affine.invert(y_D))
    # Digits of y are lost where the offset is large beside the spread; of a constant dimension, all.
    bound_D = 8 * ULP * (1 + np.abs(affine.offset) * affine.scale)
    assert (np.abs(again_D - np.where(affine.scale == 0, 0, y_D)) <= bound_D).all()


@any_speed
@given(hnp.arrays(np.float32, (200, 3), elements=st.floats(-100, 100, width=32)), st.sampled_from(SCALING))
def test_schemes_are_their_formulas(values_TD: np.ndarray, scheme: Scheme) -> None:
    stats = stats_of(values_TD)
    affine, x_TD = affine_of(stats, scheme), values_TD.astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        expected_TD = {
            "mean_std": (x_TD - stats.mean) / (stats.std + EPSILON),
            "min_max": 2 * (x_TD - stats.min) / (stats.max - stats.min) - 1,
            "quantile": (x_TD - stats.q01) / (stats.q99 - stats.q01 + EPSILON) * 2 - 1,
        }[scheme]
    spread_D = {"mean_std": stats.std, "min_max": stats.max - stats.min, "quantile": stats.q99 - stats.q01}[scheme]
    moves_D = spread_D > np.maximum(1e-3, 0.04 * np.abs(values_TD).max(axis=0))
    found_TD = affine.apply(values_TD)
    bound_TD = 8 * ULP * (1 + np.abs(expected_TD) + np.abs(affine.offset * affine.scale))
    assert (np.abs(found_TD - expected_TD) <= bound_TD)[:, moves_D].all()


def test_schemes_take_their_marks_to_the_ends() -> None:
    values_TD = np.linspace([-2, 90], [6, 100], 101)
    stats = stats_of(values_TD)
    np.testing.assert_allclose(affine_of(stats, "min_max").apply([stats.min, stats.max]), [[-1, -1], [1, 1]], atol=1e-4)
    marks = affine_of(stats, "quantile").apply([stats.q01, stats.q99])
    np.testing.assert_allclose(marks, [[-1, -1], [1, 1]], atol=1e-4)
    assert affine_of(stats, "quantile").apply(stats.max).max() > 1.01  # Nothing is clipped.
    scaled = affine_of(stats, "mean_std").apply(values_TD)
    np.testing.assert_allclose([scaled.mean(axis=0), scaled.std(axis=0)], [[0, 0], [1, 1]], atol=1e-3)
    np.testing.assert_array_equal(affine_of(stats, "none").apply(values_TD), values_TD.astype(np.float32))


@pytest.mark.parametrize("scheme", SCALING)
@pytest.mark.parametrize("constant", [0.0, 0.1, -3.7e8, 1e-30])
def test_a_constant_becomes_zero_and_comes_back_exactly(scheme: Scheme, constant: float) -> None:
    values_TD = np.full((50, 2), constant, np.float32)
    values_TD[:, 1] = np.linspace(0, 1, 50)
    affine = affine_of(stats_of(values_TD), scheme)
    assert affine.scale[1] != 0
    for given_D in (values_TD[0], values_TD[0] + 5, np.array([np.nan, 0.5]), np.array([np.inf, 0.5])):
        assert affine.apply(given_D)[0] == 0
        assert affine.invert(given_D)[0] == np.float32(constant)


@pytest.mark.parametrize("scheme", SCALING)
def test_the_noise_of_a_still_joint_is_not_blown_up(scheme: Scheme) -> None:
    rng = np.random.default_rng(0)
    values_TD = (np.array([0.0, 1000.0]) + rng.uniform(-1, 1, (100, 2)) * [1e-7, 1e-4]).astype(np.float32)
    assert (values_TD.min(axis=0) < values_TD.max(axis=0)).all()
    np.testing.assert_array_equal(affine_of(stats_of(values_TD), scheme).apply(values_TD), np.zeros((100, 2)))


@pytest.mark.parametrize("scheme", SCALING)
def test_small_moves_around_a_large_value_keep_their_digits(scheme: Scheme) -> None:
    values_TD = np.linspace(1000, 1000.5, 257, dtype=np.float32)[:, None]
    assert len(np.unique(affine_of(stats_of(values_TD), scheme).apply(values_TD))) == 257


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_a_gripper_that_seldom_closes_is_scaled_by_its_extremes(noise: float) -> None:
    values_TD = np.random.default_rng(0).uniform(-noise, noise, (1000, 2))
    values_TD[:5, 0] = 0.04
    values_TD[:, 1] = np.linspace(0, 1, 1000)
    stats = stats_of(values_TD)
    assert stats.q99[0] <= noise < stats.max[0]
    np.testing.assert_allclose(affine_of(stats, "quantile").apply([[0, 0], [0.04, 0]])[:, 0], [-1, 1], atol=1e-5)


def test_a_deviation_of_next_to_nothing_is_none() -> None:
    values_TD = np.zeros((10_000, 1), np.float32)
    values_TD[3] = 5e-5
    stats = stats_of(values_TD)
    assert 0 < stats.std[0] < NARROW < stats.max[0]
    np.testing.assert_array_equal(affine_of(stats, "mean_std").apply(values_TD), np.zeros((10_000, 1)))


def test_quantiles_that_the_sketch_cannot_tell_apart_are_not_trusted() -> None:
    values_TD = np.linspace([2048, 100], [2050, 103], 1000)
    stats = stats_of(values_TD)
    assert np.abs(stats.q99 - np.quantile(values_TD, 0.99, axis=0))[1] > 0.03
    np.testing.assert_allclose(affine_of(stats, "quantile").apply([stats.min, stats.max]), [[-1] * 2, [1] * 2])


def test_quantiles_pass_over_outliers_however_large() -> None:
    values_TD = np.linspace(-0.25, 0.25, 1000)[:, None]
    values_TD[0], values_TD[-1] = -1e6, 1e6
    found = affine_of(stats_of(values_TD), "quantile").apply([[-0.25], [0.25]])
    np.testing.assert_allclose(found, [[-1], [1]], atol=0.05)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_nan_stays_in_its_own_dimension(scheme: Scheme) -> None:
    affine = affine_of(stats_of(np.random.default_rng(0).normal(size=(20, 3))), scheme)
    given_D = np.array([1.0, np.nan, 2.0], np.float32)
    for found_D in (affine.apply(given_D), affine.invert(given_D)):
        np.testing.assert_array_equal(np.isnan(found_D), [False, True, False])


def test_arguments_are_left_alone() -> None:
    affine = affine_of(stats_of(np.arange(6.0).reshape(3, 2)), "min_max")
    given_D = np.array([1.0, 2.0], np.float32)
    affine.apply(given_D)
    affine.invert(given_D)
    np.testing.assert_array_equal(given_D, [1.0, 2.0])


@any_speed
@given(st.integers(0, 3), st.integers(0, 3), st.integers(0, 4))
def test_any_leading_shape_is_taken(batch: int, horizon: int, dim: int) -> None:
    affine = affine_of(stats_of(np.random.default_rng(0).normal(size=(9, dim))), "mean_std")
    x_BHD = np.random.default_rng(1).normal(size=(batch, horizon, dim))
    assert affine.apply(x_BHD).shape == affine.invert(x_BHD).shape == x_BHD.shape
    for at in np.ndindex(batch, horizon):
        np.testing.assert_array_equal(affine.apply(x_BHD)[at], affine.apply(x_BHD[at]))


@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (1,)])
def test_another_number_of_dimensions_is_refused(shape: tuple[int, ...]) -> None:
    affine = affine_of(stats_of(np.arange(6.0).reshape(3, 2)), "min_max")
    for method in (affine.apply, affine.invert):
        with pytest.raises(ValueError, match="statistics of 2 dimensions; give the feature before it is padded"):
            method(np.zeros(shape))


@pytest.mark.parametrize("scheme", SCALING)
@pytest.mark.parametrize(("low", "high"), [(1e50, 1e50), (-1e50, 1e50), (-1e308, 1e308), (1e20, 1e80)])
def test_what_float32_cannot_hold_is_refused(scheme: Scheme, low: float, high: float) -> None:
    low_D, high_D = np.array([low]), np.array([high])
    middle_D, std_D = low_D / 2 + high_D / 2, high_D / 2 - low_D / 2
    stats = FeatureStats(count=2, mean=middle_D, std=std_D, min=low_D, max=high_D, q01=low_D, q99=high_D)
    with pytest.raises(ValueError, match="beyond what float32 can hold; rescale the feature"):
        affine_of(stats, scheme)


def test_an_unknown_scheme_is_refused() -> None:
    says = "no scheme 'minmax' of normalisation; there are mean_std, min_max, quantile, none"
    with pytest.raises(ValueError, match=says):
        affine_of(stats_of(np.zeros((1, 1))), "minmax")  # type: ignore[arg-type]
    for name in ("state_scheme", "action_scheme"):
        with pytest.raises(ValueError, match=says):
            normaliser(mixture(), **{name: "minmax"})


# Relative actions.


@st.composite
def chunks(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[int]]:
    lead = draw(st.sampled_from([(), (3,), (2, 2)]))
    num_action, num_state = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    small = st.floats(-100, 100, width=32)
    action = draw(hnp.arrays(np.float32, (*lead, draw(st.integers(1, 4)), num_action), elements=small))
    state = draw(hnp.arrays(np.float32, (*lead, num_state), elements=small))
    return action, state, draw(st.lists(st.integers(0, min(num_action, num_state) - 1), unique=True))


@any_speed
@given(chunks())
def test_relative_actions_are_differences_and_come_back(case: tuple[np.ndarray, np.ndarray, list[int]]) -> None:
    action, state, dims = case
    before = action.copy()
    found = relative(action, state, dims)
    for at in np.ndindex(action.shape):
        base = state[(*at[:-2], at[-1])] if at[-1] in dims else np.float32(0)
        assert found[at] == action[at] - base
    np.testing.assert_allclose(absolute(found, state, tuple(dims)), action, atol=1e-4)
    np.testing.assert_array_equal(action, before)


@pytest.mark.parametrize(
    ("action", "state", "dims", "says"),
    [
        ((2, 4, 3), (3, 3), (0,), r"actions of the shape \(2, 4, 3\) and states of \(3, 3\) do not belong together"),
        ((3,), (3,), (0,), "do not belong together"),
        ((4, 3), (2,), (2,), "at least 0 and less than 2, which state and action both have"),
        ((4, 2), (3,), (2,), "less than 2"),
        ((4, 2), (3,), (-1,), "at least 0"),
        ((4, 2), (3,), (1, 1), "each is once there"),
    ],
)
def test_chunks_that_do_not_fit_are_refused(
    action: tuple[int, ...], state: tuple[int, ...], dims: tuple[int, ...], says: str
) -> None:
    for function in (relative, absolute):
        with pytest.raises(ValueError, match=says):
            function(np.zeros(action), np.zeros(state), dims)


# Normalisers.


def test_each_feature_has_its_own_scheme() -> None:
    statistics = mixture()
    made = normaliser(statistics)
    for source, embodiment in (("a", "small"), ("b", "big")):
        state = affine_of(statistics.get(source, embodiment, "state"), "quantile")
        action = affine_of(statistics.get(source, embodiment, "action"), "min_max")
        for found, expected in ((made.state(source, embodiment), state), (made.action(source, embodiment), action)):
            np.testing.assert_array_equal(found.scale, expected.scale)
            np.testing.assert_array_equal(found.offset, expected.offset)
    assert made.state("a", "small") is made.state("a", "small")


def test_tables_normalise_a_mixture_as_each_affine_would() -> None:
    made, rng = normaliser(mixture()), np.random.default_rng(0)
    keys = [("b", "big"), ("c", "blind"), ("a", "small")]
    key_B = np.array([2, 0, 0, 1, 2])
    for tables, one in ((made.state_tables, made.state), (made.action_tables, made.action)):
        scale_KD, offset_KD = tables(keys, 6)
        assert scale_KD.shape == offset_KD.shape == (3, 6)
        assert scale_KD.dtype == offset_KD.dtype == np.float32
        x_BD, expected_BD = np.zeros((2, 5, 6), np.float32)
        for row, key in enumerate(key_B):
            affine = one(*keys[key])
            width = len(affine.scale)
            x_BD[row, :width] = rng.normal(size=width)
            expected_BD[row, :width] = affine.apply(x_BD[row, :width])
        np.testing.assert_array_equal((x_BD - offset_KD[key_B]) * scale_KD[key_B], expected_BD)
    assert np.count_nonzero(made.action_tables(keys, 6)[0], axis=1).tolist() == [4, 3, 2]


def test_a_table_that_is_too_narrow_is_refused() -> None:
    with pytest.raises(ValueError, match="b/big/state has 5 dimensions, which the model's 4 cannot hold"):
        normaliser(mixture()).state_tables([("b", "big")], 4)
    assert normaliser(mixture()).action_tables([("b", "big")], 4)[0].shape == (1, 4)


def test_a_source_without_states_has_states_of_no_dimensions() -> None:
    made = normaliser(mixture())
    assert made.state("c", "blind").apply(np.zeros((7, 0))).shape == (7, 0)
    np.testing.assert_array_equal(made.state_tables([("c", "blind")], 4), np.zeros((2, 1, 4)))


def test_a_source_without_statistics_is_refused() -> None:
    made = normaliser(mixture())
    for call in (made.state, made.action):
        with pytest.raises(StatisticsMissingError, match="no statistics of a/big/"):
            call("a", "big")
    with pytest.raises(StatisticsMissingError, match="no statistics of d/small/state"):
        made.state_tables([("a", "small"), ("d", "small")], 8)


ARM = Actions(relative_dims={"small": (0,), "big": (0, 2)}, horizon=8)


@pytest.mark.parametrize(
    ("of", "wanted", "says"),
    [
        (
            Actions(),
            ARM,
            r"of_relative_actions\(release, relative_dims={'big': \(0, 2\), 'small': \(0,\)}, horizon=8\)",
        ),
        (
            ARM,
            Actions(),
            r"are relative in big \[0, 2\], small \[0\] over 8 actions, .* Statistics.of_release\(release\)",
        ),
        (ARM, Actions(relative_dims=ARM.relative_dims, horizon=16), "horizon=16"),
        (ARM, Actions(relative_dims={"small": (0,), "big": (0, 1)}, horizon=8), r"\(0, 1\)"),
        (ARM, Actions(relative_dims={"small": (0,)}, horizon=8), "relative_dims={'small'"),
    ],
)
def test_statistics_of_other_actions_are_refused_with_the_remedy(of: Actions, wanted: Actions, says: str) -> None:
    with pytest.raises(RepresentationMismatchError, match=says) as caught:
        normaliser(mixture(of), actions=wanted)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), str(again)) == (RepresentationMismatchError, str(caught.value))
    # Actions that are not scaled need no statistics.
    assert normaliser(mixture(of), actions=wanted, action_scheme="none").actions == wanted


def test_statistics_of_the_wanted_actions_are_taken() -> None:
    same = Actions(relative_dims={"big": [2, 0], "small": [0]}, horizon=8)
    assert normaliser(mixture(ARM), actions=same).action("b", "big").scale.shape == (4,)
    assert normaliser(mixture()).actions == Actions()


def test_a_table_of_relative_dimensions_does_as_relative_does() -> None:
    made, rng = normaliser(mixture(ARM)), np.random.default_rng(0)
    table = made.relative_table(["blind", "big", "small"], 4)
    np.testing.assert_array_equal(table, [[0, 0, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0]])
    key_B, action_BHA, state_BA = np.array([1, 2, 0]), rng.normal(size=(3, 8, 4)), rng.normal(size=(3, 4))
    found = action_BHA - (table[key_B] * state_BA)[:, None]
    for row, embodiment in enumerate(["big", "small", "blind"]):
        expected = relative(action_BHA[row], state_BA[row], ARM.dims(embodiment))
        np.testing.assert_allclose(found[row], expected, atol=1e-6)
    with pytest.raises(ValueError, match="dimension 2 of 'big' is relative, beyond the model's 2"):
        made.relative_table(["big"], 2)


def test_a_normaliser_survives_pickling() -> None:
    made = normaliser(mixture(ARM))
    for before in (made.action_tables([("b", "big")], 4), None):
        again = pickle.loads(pickle.dumps(made))
        assert again.actions == ARM
        np.testing.assert_array_equal(again.action_tables([("b", "big")], 4), made.action_tables([("b", "big")], 4))
        assert before is None or again.statistics.to_json() == made.statistics.to_json()


def test_statistics_that_were_stored_normalise_alike() -> None:
    made = normaliser(mixture(ARM))
    stored = normaliser(Statistics.from_json(made.statistics.to_json()))
    for key in (("a", "small"), ("b", "big")):
        for one, other in ((made.state(*key), stored.state(*key)), (made.action(*key), stored.action(*key))):
            np.testing.assert_array_equal([one.scale, one.offset], [other.scale, other.offset])


# With a lake.


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    root = make_sources(tmp_path_factory.mktemp("sources"))
    make_v21(root / "held", [Made(seed=50)], robot_type="held", splits={"val": "0:1"})
    lake = Lake.create(str(tmp_path_factory.mktemp("normalise") / "lake"))
    for name in ("toy", "other", "held"):
        add(lake, Path(root / name))
    return lake.make_release()


def arrays(release: Release, uid: str) -> tuple[np.ndarray, np.ndarray]:
    frames = release.frames(episodes=[uid], columns=["state", "action"])
    return tuple(np.array(frames.column(name).to_pylist(), np.float32) for name in ("state", "action"))  # type: ignore[return-value]


def test_training_frames_fill_the_range_exactly(release: Release) -> None:
    made = normaliser(Statistics.of_release(release), state_scheme="min_max")
    for source, embodiment in (("toy", "toy"), ("other", "arm")):
        uids = release.episodes(f"source = '{source}' AND split = 'train'", ["episode_uid"]).column(0).to_pylist()
        states, actions = (np.concatenate(parts) for parts in zip(*(arrays(release, uid) for uid in uids), strict=True))
        found = ((made.state(source, embodiment), states), (made.action(source, embodiment), actions))
        for affine, values in found:
            scaled = affine.apply(values)
            np.testing.assert_allclose(scaled.min(axis=0), -1, atol=1e-6)
            np.testing.assert_allclose(scaled.max(axis=0), 1, atol=1e-6)


def test_relative_chunks_of_the_lake_fill_the_range_of_their_own_statistics(release: Release) -> None:
    wanted = Actions(relative_dims={"toy": (0, 1)}, horizon=4)
    relative_statistics = Statistics.of_relative_actions(
        release, relative_dims=wanted.relative_dims, horizon=4, where="source = 'toy'"
    )
    affine = normaliser(relative_statistics, actions=wanted).action("toy", "toy")
    rows = []
    for uid in release.episodes("source = 'toy'", ["episode_uid"]).column(0).to_pylist():
        state, action = arrays(release, uid)
        rows += [relative(action[t : t + 4], state[t], wanted.dims("toy")) for t in range(len(action))]
    scaled = affine.apply(np.concatenate(rows))
    np.testing.assert_allclose(scaled.min(axis=0), -1, atol=1e-6)
    np.testing.assert_allclose(scaled.max(axis=0), 1, atol=1e-6)
    with pytest.raises(RepresentationMismatchError, match="of_relative_actions"):
        normaliser(Statistics.of_release(release), actions=wanted)


def test_a_source_with_validation_episodes_alone_has_no_normalisation(release: Release) -> None:
    with pytest.raises(StatisticsMissingError, match=r"no statistics of held/held/state .* the training split alone"):
        normaliser(Statistics.of_release(release)).state("held", "held")


def test_an_affine_is_data() -> None:
    affine = pickle.loads(pickle.dumps(Affine(scale=np.ones(1, np.float32), offset=np.zeros(1, np.float32))))
    assert affine.apply([2.0]) == [2.0]
