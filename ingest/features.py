"""Which features of a source become state, action and views: by name, or by a map."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from lake.errors import SourceMetadataError

STATE_NAMES = ("observation.state", "state")
ACTION_NAMES = ("action", "actions")
BOOKKEEPING = ("timestamp", "frame_index", "episode_index", "index", "task_index", "next.success")
_VIEW_PREFIXES = ("observation.images.", "observation.image.", "observation.", "images.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Features:
    """What is taken from a source, under which name."""

    state: tuple[str, ...]
    """Features that are joined, in this order, into the state; empty where there is none."""
    action: tuple[str, ...]
    views: tuple[tuple[str, str], ...]
    """(name of the view, name of the feature), ordered by the name of the feature."""
    unmapped: tuple[str, ...]
    """Features that the lake does not take over."""


def parse_map(entries: Sequence[str]) -> dict[str, str]:
    """Read ``--map`` entries.

    ``state=a`` or ``state=a+b`` names the features that make the state, ``action=``
    likewise; ``view.NAME=feature`` names a view; ``ignore=a+b`` leaves features out.

    Raises:
        ValueError: an entry is none of these.
    """
    parsed: dict[str, str] = {}
    for entry in entries:
        target, equals, feature = entry.partition("=")
        known = target in ("state", "action", "ignore") or (target.startswith("view.") and len(target) > len("view."))
        if not equals or not feature or not known:
            raise ValueError(
                f"--map {entry!r}: write state=F, action=F, view.NAME=F or ignore=F; join features with '+'"
            )
        if target in parsed:
            raise ValueError(f"--map names {target} twice; join features with '+'")
        if target.startswith("view.") and feature in (parsed[other] for other in parsed if other.startswith("view.")):
            raise ValueError(f"--map gives {feature} two names of a view")
        parsed[target] = feature
    return parsed


def choose_features(features: Mapping[str, Mapping[str, Any]], feature_map: Mapping[str, str], uri: str) -> Features:
    """Choose state, action and views among a source's declared features.

    Args:
        features: declarations by name, each with its ``dtype``.

    Raises:
        SourceMetadataError: nothing fits, or more than one does; a map settles it.
    """
    named = {part for value in feature_map.values() for part in value.split("+")}
    missing = sorted(named - features.keys())
    if missing:
        raise SourceMetadataError(f"{uri}: --map names {missing}, which the source lacks; it has {sorted(features)}")
    ignored = set(feature_map.get("ignore", "").split("+"))
    state = _vector("state", STATE_NAMES, features, feature_map, uri)
    action = _vector("action", ACTION_NAMES, features, feature_map, uri)
    if not action:
        raise SourceMetadataError(f"{uri}: no action among {sorted(features)}; name it with --map action=FEATURE")
    chosen = {value: target[len("view.") :] for target, value in feature_map.items() if target.startswith("view.")}
    videos = [key for key, spec in features.items() if _is_video(key, spec, uri, ignored)]
    views = [(chosen.get(key) or _view_name(key, videos), key) for key in sorted({*videos, *chosen} - ignored)]
    names = [name for name, _ in views]
    if len(set(names)) != len(names):
        raise SourceMetadataError(f"{uri}: two views have one name in {names}; name them with --map view.NAME=FEATURE")
    taken = {*state, *action, *(key for _, key in views), *BOOKKEEPING}
    return Features(state=state, action=action, views=tuple(views), unmapped=tuple(sorted(features.keys() - taken)))


def dimension_names(features: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the dimensions of joined features, or none unless there is one for each."""
    names: list[str] = []
    for key in keys:
        flat = _flatten(features[key].get("names"))
        if len(flat) != declared_dim(features[key]):
            return ()
        names += flat
    return tuple(names)


def declared_dim(spec: Mapping[str, Any]) -> int | None:
    """Return the number of values that a feature's declared shape holds; None where it does not say."""
    shape: Any = spec.get("shape")
    if not isinstance(shape, list | tuple):
        return None
    sizes = cast("Sequence[Any]", shape)
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        return None
    return math.prod(sizes)


def _vector(
    kind: str,
    names: tuple[str, ...],
    features: Mapping[str, Mapping[str, Any]],
    feature_map: Mapping[str, str],
    uri: str,
) -> tuple[str, ...]:
    if kind in feature_map:
        return tuple(feature_map[kind].split("+"))
    ignored = feature_map.get("ignore", "").split("+")
    found = [name for name in names if name in features and name not in ignored]
    if len(found) > 1:
        raise SourceMetadataError(f"{uri}: both {' and '.join(found)} could be the {kind}; say --map {kind}=FEATURE")
    return tuple(found)


def _is_video(key: str, spec: Mapping[str, Any], uri: str, ignored: set[str]) -> bool:
    if key in ignored:
        return False
    if spec.get("dtype") == "image":
        raise SourceMetadataError(
            f"{uri}: feature {key} holds single images, which are not read yet; leave it out with --map ignore={key}"
        )
    info: Any = spec.get("info") or spec.get("video_info")
    is_depth = isinstance(info, Mapping) and bool(cast("Mapping[str, Any]", info).get("video.is_depth_map"))
    return spec.get("dtype") == "video" and not is_depth


def _view_name(key: str, videos: Sequence[str]) -> str:
    short = _short(key)
    return short if [_short(other) for other in videos].count(short) == 1 else key


def _short(key: str) -> str:
    for prefix in _VIEW_PREFIXES:
        if key.startswith(prefix) and len(key) > len(prefix):
            return key[len(prefix) :]
    return key


def _flatten(names: Any) -> list[str]:
    """Return names that real metadata nests in lists and dicts."""
    if isinstance(names, Mapping):
        by_name = cast("Mapping[str, Any]", names)
        if all(isinstance(value, int) for value in by_name.values()):
            return sorted(by_name, key=lambda name: int(by_name[name]))
        return _flatten(list(by_name.values()))
    if isinstance(names, list | tuple):
        return [flat for name in cast("Sequence[Any]", names) for flat in _flatten(name)]
    return [] if names is None else [str(names)]
