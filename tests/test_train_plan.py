"""Tests of train/plan.py."""

import json
from pathlib import Path

import numpy as np
import pytest
from training import make_released

from lake import Release
from train.packing import Budgets
from train.plan import OrderConfig, PackConfig, make_plan
from train.tokens import FAMILIES, WordTokenizer, sample_costs


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Release:
    return make_released(tmp_path_factory.mktemp("plan"))


def test_a_plan_says_what_the_metadata_say(release: Release) -> None:
    plan = make_plan(release, OrderConfig(), PackConfig())
    assert plan.sources == ("other", "toy")
    rows = release.episodes("split = 'train'").to_pylist()
    of = plan.episodes
    assert len(of.uid) == len(rows) == 4
    for at, uid in enumerate(of.uid.tolist()):
        (row,) = [row for row in rows if row["episode_uid"] == uid.decode()]
        assert of.first_row[at] == row["frames_first_row"]
        assert of.length[at] == row["num_frames"]
        assert of.fps[at] == 10
        assert (of.state_dim[at], of.action_dim[at]) == (3, 2)
        assert plan.sources[of.source[at]] == row["source"]
        assert plan.embodiments[of.embodiment[at]] == row["embodiment"]
        assert list(plan.task_lists[of.tasks[at]]) == row["tasks"]
        assert list(plan.view_lists[of.views[at]]) == row["views"]
        assert int(of.uid_key[at]) == int(row["episode_uid"][:16], 16)
        assert int(of.content[at]) == int(row["frames_sha256"][:16], 16)
        assert row["episode_uid"] in plan.name_of(at, 7)
    assert plan.first_episode.tolist() == [0, 1]
    family = FAMILIES["pi05"]
    for source, costs in zip(plan.sources, plan.stream.costs, strict=True):
        mine = [row for row in rows if row["source"] == source]
        expected = sample_costs(
            family,
            task_texts=[plan.task_lists[tasks] for tasks in of.tasks[of.source == plan.sources.index(source)]],
            num_views=np.array([len(row["views"]) for row in mine]),
            state_dim=3,
            tokenizer=WordTokenizer(),
        )
        assert costs.images.tolist() == expected.images.tolist()
        assert sorted(costs.tokens.tolist()) == sorted(expected.tokens.tolist())


def test_past_views_cost_as_others_do(release: Release) -> None:
    once, thrice = (make_plan(release, OrderConfig(), PackConfig(), times=times) for times in (1, 3))
    for one, three in zip(once.stream.costs, thrice.stream.costs, strict=True):
        assert (three.images == 3 * one.images).all()
        assert (three.tokens == one.tokens + 256 * 2 * one.images).all()


def test_sources_come_by_weight_or_by_size(release: Release) -> None:
    by_size = make_plan(release, OrderConfig(), PackConfig()).stream.order.shares()
    frames = {"toy": 12 + 13 + 14, "other": 12}
    assert by_size == pytest.approx({name: n / 51 for name, n in frames.items()}, abs=1e-6)
    even = make_plan(release, OrderConfig(temperature=1e9), PackConfig()).stream.order.shares()
    assert even == pytest.approx({"toy": 0.5, "other": 0.5}, abs=1e-6)
    given = make_plan(release, OrderConfig(weights={"toy": 1, "other": 3}), PackConfig()).stream.order.shares()
    assert given == pytest.approx({"toy": 0.25, "other": 0.75}, abs=1e-6)
    assert make_plan(release, OrderConfig(weights={"toy": 1}), PackConfig()).sources == ("toy",)


def test_a_condition_chooses_episodes(release: Release) -> None:
    plan = make_plan(release, OrderConfig(where="num_frames > 12"), PackConfig())
    assert sorted(plan.episodes.length.tolist()) == [13, 14]
    with pytest.raises(ValueError, match="cannot understand where='num_framez > 12'"):
        make_plan(release, OrderConfig(where="num_framez > 12"), PackConfig())
    with pytest.raises(ValueError, match="has no episode where num_frames > 99"):
        make_plan(release, OrderConfig(where="num_frames > 99"), PackConfig())


def test_train_and_validation_share_nothing_and_leave_nothing_out(release: Release) -> None:
    for fraction in (0.0, 0.3):
        plans = [
            make_plan(release, OrderConfig(split=split, validation_fraction=fraction), PackConfig())
            for split in ("train", "validation")
        ]
        uids = [set(plan.episodes.uid.tolist()) for plan in plans]
        assert not uids[0] & uids[1]
        assert uids[0] | uids[1] == {each.encode() for each in release.episodes().column("episode_uid").to_pylist()}


def test_a_pass_leaves_out_a_source_without_weight(release: Release) -> None:
    order = OrderConfig(weights={"toy": 1, "other": 0}, one_pass=True)
    assert make_plan(release, order, PackConfig()).sources == ("toy",)


def test_a_tokenizer_is_known_by_its_contents(release: Release, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    prints = []
    for word in ("push", "pull"):
        vocab = {"[UNK]": 0, word: 1}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"}
        path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
        prints.append(make_plan(release, OrderConfig(), PackConfig(tokenizer=str(path))).stream.fingerprint)
    assert prints[0] != prints[1], "though the counts are the same"


def test_without_an_episode_of_the_split_the_error_says_so(release: Release) -> None:
    with pytest.raises(ValueError, match="no episode of toy is in the validation split; give a validation_fraction"):
        make_plan(release, OrderConfig(weights={"toy": 1}, split="validation"), PackConfig())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"toy": 1, "toyz": 1}, r"weights name toyz, which release .* has not.*it has other, toy"),
        ({"toy": 0, "other": 0}, "sum to zero"),
        ({"toy": -1}, "a weight of -1"),
    ],
)
def test_weights_that_make_no_sense_are_refused(release: Release, weights: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_plan(release, OrderConfig(weights=weights), PackConfig())


def test_a_sample_larger_than_a_pack_is_named(release: Release) -> None:
    plan = make_plan(release, OrderConfig(), PackConfig(tokens=400))
    with pytest.raises(ValueError, match=r"frame \d+ of episode \d+ of source toy has 5\d\d tokens, more than the 400"):
        [plan.stream.window(number) for number in range(40)]


def test_budgets_can_be_given(release: Release) -> None:
    plan = make_plan(release, OrderConfig(), PackConfig(tokens=4096, images=9, samples=7))
    assert plan.budgets == Budgets(tokens=4096, images=9, samples=7)
    assert make_plan(release, OrderConfig(), PackConfig(tokens=4096)).budgets.images > 9


CHANGES = [
    {"weights": {"toy": 1, "other": 2}},
    {"where": "num_frames < 14"},
    {"where": "num_frames < 1400"},
    {"validation_fraction": 0.3},
    {"one_pass": True},
    {"lanes": 4},
    {"seed": 1},
    {"block_frames": 16},
    {"window_blocks": 64},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_what_defines_the_order_is_in_the_fingerprint(release: Release, change: dict) -> None:
    fingerprint = make_plan(release, OrderConfig(), PackConfig()).stream.fingerprint
    assert make_plan(release, OrderConfig(), PackConfig()).stream.fingerprint == fingerprint
    assert make_plan(release, OrderConfig(**change), PackConfig()).stream.fingerprint != fingerprint


def test_the_model_and_the_release_are_in_the_fingerprint(release: Release, tmp_path: Path) -> None:
    fingerprint = make_plan(release, OrderConfig(), PackConfig()).stream.fingerprint
    for packs in (
        PackConfig(family="groot_n15"),
        PackConfig(tokens=8192),
        PackConfig(views=("top",)),
        PackConfig(views=("wrist", "top")),
    ):
        assert make_plan(release, OrderConfig(), packs).stream.fingerprint != fingerprint
    other = make_released(tmp_path)
    assert make_plan(other, OrderConfig(), PackConfig()).stream.fingerprint == fingerprint, "of equal contents"
    fewer = make_plan(other, OrderConfig(where="source = 'toy'"), PackConfig())
    assert (
        fewer.stream.fingerprint != make_plan(other, OrderConfig(weights={"toy": 1.0}), PackConfig()).stream.fingerprint
    )
