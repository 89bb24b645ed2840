"""Tests of ingest/features.py."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingest.features import BOOKKEEPING, Features, choose_features, declared_dim, dimension_names, parse_map
from lake.errors import SourceMetadataError

URI = "/data/toy"
NUMBERS: dict[str, Any] = {"dtype": "float32", "shape": [2]}
VIDEO: dict[str, Any] = {"dtype": "video", "shape": [48, 64, 3]}


def chosen(names: dict[str, dict[str, Any]], *entries: str) -> Features:
    return choose_features(names, parse_map(entries), URI)


# The map.


def test_a_map_is_read_by_target() -> None:
    entries = ["state=a+b", "action=c", "view.left wrist=d=e", "ignore=f+g"]
    assert parse_map(entries) == {"state": "a+b", "action": "c", "view.left wrist": "d=e", "ignore": "f+g"}
    assert parse_map([]) == {}


@pytest.mark.parametrize("entry", ["", "state", "state=", "=a", "states=a", "view=a", "view.=a", "view.x=", "reward=a"])
def test_an_entry_of_another_form_is_named_with_the_forms_there_are(entry: str) -> None:
    with pytest.raises(ValueError, match=r"write state=F, action=F, view\.NAME=F or ignore=F") as caught:
        parse_map([entry])
    assert repr(entry) in str(caught.value)


@pytest.mark.parametrize("target", ["state", "action", "ignore", "view.top"])
def test_a_target_is_named_once(target: str) -> None:
    with pytest.raises(ValueError, match=rf"--map names {target} twice; join features with '\+'"):
        parse_map([f"{target}=a", f"{target}=b"])


# The choice.


@pytest.mark.parametrize("state", ["observation.state", "state"])
@pytest.mark.parametrize("action", ["action", "actions"])
def test_state_and_action_are_found_by_name(state: str, action: str) -> None:
    features = chosen({state: NUMBERS, action: NUMBERS, "reward": NUMBERS})
    assert features == Features(state=(state,), action=(action,), views=(), unmapped=("reward",))


def test_there_may_be_no_state_but_there_must_be_an_action() -> None:
    assert chosen({"action": NUMBERS}).state == ()
    with pytest.raises(SourceMetadataError, match=rf"^{URI}: no action among \['state'\]; name it with --map action="):
        chosen({"state": NUMBERS})


@pytest.mark.parametrize(
    ("kind", "names"), [("state", ("observation.state", "state")), ("action", ("action", "actions"))]
)
def test_two_that_fit_are_settled_by_a_map(kind: str, names: tuple[str, str]) -> None:
    features = {"action": NUMBERS} | dict.fromkeys(names, NUMBERS)
    with pytest.raises(
        SourceMetadataError, match=f"both {names[0]} and {names[1]} could be the {kind}; say --map {kind}="
    ):
        chosen(features)
    assert getattr(chosen(features, f"{kind}={names[1]}"), kind) == (names[1],)
    assert getattr(chosen(features, f"ignore={names[1]}"), kind) == (names[0],)
    assert getattr(chosen(features, f"{kind}={names[1]}+{names[0]}"), kind) == (names[1], names[0])


def test_a_map_names_only_what_there_is() -> None:
    with pytest.raises(
        SourceMetadataError, match=r"--map names \['a', 'b'\], which the source lacks; it has \['action'\]"
    ):
        chosen({"action": NUMBERS}, "state=b+action", "ignore=a")


def test_views_are_named_without_their_prefix_and_ordered_by_feature() -> None:
    names = ("observation.images.top", "observation.image.side", "images.front", "observation.rear", "left", "images.")
    features = chosen({"action": NUMBERS} | dict.fromkeys(names, VIDEO))
    assert features.views == (
        ("images.", "images."),
        ("front", "images.front"),
        ("left", "left"),
        ("side", "observation.image.side"),
        ("top", "observation.images.top"),
        ("rear", "observation.rear"),
    )


def test_views_that_would_share_a_name_keep_their_features_names() -> None:
    names = ("observation.images.top", "images.top", "observation.images.wrist")
    features = chosen({"action": NUMBERS} | dict.fromkeys(names, VIDEO))
    assert features.views == (
        ("images.top", "images.top"),
        ("observation.images.top", "observation.images.top"),
        ("wrist", "observation.images.wrist"),
    )


def test_a_map_names_views_and_two_of_one_name_are_refused() -> None:
    features = {"action": NUMBERS, "observation.images.a": VIDEO, "observation.images.b": VIDEO}
    assert chosen(features, "view.left=observation.images.a").views == (
        ("left", "observation.images.a"),
        ("b", "observation.images.b"),
    )
    with pytest.raises(
        SourceMetadataError, match=r"two views have one name in \['b', 'b'\]; name them with --map view"
    ):
        chosen(features, "view.b=observation.images.a")


def test_what_is_ignored_is_neither_view_nor_refused() -> None:
    features = {"action": NUMBERS, "observation.images.a": VIDEO, "still": {"dtype": "image"}}
    with pytest.raises(SourceMetadataError, match=r"feature still holds single images, .*--map ignore=still"):
        chosen(features)
    ignoring = chosen(features, "ignore=still+observation.images.a")
    assert (ignoring.views, ignoring.unmapped) == ((), ("observation.images.a", "still"))


@pytest.mark.parametrize("key", ["info", "video_info"])
def test_a_depth_map_is_no_view(key: str) -> None:
    depth = VIDEO | {key: {"video.is_depth_map": True}}
    features = chosen({"action": NUMBERS, "observation.images.depth": depth, "observation.images.top": VIDEO})
    assert (features.views, features.unmapped) == ((("top", "observation.images.top"),), ("observation.images.depth",))
    assert chosen({"action": NUMBERS, "top": VIDEO | {key: {"video.is_depth_map": False}}}).views == (("top", "top"),)
    assert chosen({"action": NUMBERS, "top": VIDEO | {key: "no object"}}).views == (("top", "top"),)


def test_bookkeeping_is_not_counted_as_left_out() -> None:
    features = chosen({"action": NUMBERS, "reward": NUMBERS} | dict.fromkeys(BOOKKEEPING, NUMBERS))
    assert features.unmapped == ("reward",)


@given(st.permutations(["action", "observation.state", "images.a", "observation.images.b", "index", "reward"]))
def test_the_order_of_the_metadata_does_not_matter(names: list[str]) -> None:
    features = {name: VIDEO if "images" in name else NUMBERS for name in names}
    assert chosen(features) == chosen(dict(sorted(features.items())))


# Dimensions.


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["x", "y"], ("x", "y")),
        ({"motors": ["x", "y"]}, ("x", "y")),
        ({"left": ["x"], "right": ["y"]}, ("x", "y")),
        ({"arm": {"left": ["x"], "right": {"hand": ["y"]}}}, ("x", "y")),
        ([["x", "y"]], ("x", "y")),
        ({"y": 1, "x": 0}, ("x", "y")),
        ([1, 2], ("1", "2")),
        (("x", "y"), ("x", "y")),
        (["x"], ()),
        (["x", "y", "z"], ()),
        (None, ()),
        ("xy", ()),
        ({}, ()),
    ],
)
def test_names_are_flattened_and_kept_only_if_there_is_one_for_each(names: object, expected: tuple[str, ...]) -> None:
    assert dimension_names({"state": NUMBERS | {"names": names}}, ["state"]) == expected


def test_names_of_joined_features_follow_one_another() -> None:
    features = {"a": NUMBERS | {"names": ["x", "y"]}, "b": {"shape": [1], "names": ["z"]}, "c": NUMBERS}
    assert dimension_names(features, ["b", "a"]) == ("z", "x", "y")
    assert dimension_names(features, ["a", "c"]) == ()
    assert dimension_names(features, []) == ()


@pytest.mark.parametrize(
    ("shape", "dim"),
    [
        ([3], 3),
        ((2, 3), 6),
        ([], 1),
        ([0], 0),
        ([3, -1], None),
        (["3"], None),
        ([2.0], None),
        ("3", None),
        (None, None),
    ],
)
def test_the_declared_size_is_the_product_of_the_shape(shape: object, dim: int | None) -> None:
    assert declared_dim({"shape": shape}) == dim
    assert declared_dim({}) is None
