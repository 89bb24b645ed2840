"""What a run reads: a release, a mixture of its sources and a model's budgets, planned from metadata alone."""

import hashlib
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from lake import Release
from lake.tables import uid_array
from train.lanes import Costs, Stream
from train.order import SourceFrames, is_validation, mixture, one_pass, weights_by_size
from train.packing import Budgets, Kind, budgets_for
from train.tokens import FAMILIES, Family, Tokenizer, WordTokenizer, load_tokenizer, sample_costs

Ints = npt.NDArray[np.int64]

_COLUMNS = (
    "source",
    "episode_uid",
    "embodiment",
    "tasks",
    "views",
    "num_frames",
    "fps",
    "state_dim",
    "action_dim",
    "split",
    "frames_first_row",
    "frames_sha256",
)
_VALIDATION_SPLITS = ("val", "valid", "validation")
_JOINT = "\x1f"


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderConfig:
    """Which samples a stream holds, and in which order. All of it is in a cursor's fingerprint."""

    weights: dict[str, float] = field(default_factory=dict[str, float])
    """Share of the samples by source, relative to each other; empty takes every source by its size."""
    temperature: float = 1.0
    """Without weights: shares go by frames to the power of 1 / temperature; more than 1 evens them out."""
    where: str | None = None
    """SQL condition on the columns of ``episodes``."""
    split: Literal["train", "validation"] = "train"
    """Validation is what the source says, and ``validation_fraction`` of the rest."""
    validation_fraction: float = 0.0
    """Of the episodes that the source calls train, by their uid: none changes sides as a lake grows."""
    one_pass: bool = False
    """Every frame exactly once, and then the end; weights only tell which sources take part."""
    lanes: int = 8
    """Packs of a step over all ranks: the global batch, whatever the number of ranks."""
    seed: int = 0
    """Of the order and of everything random."""
    block_frames: int = 32
    """Frames that are read in one range."""
    window_blocks: int = 128
    """Blocks that are shuffled into each other."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PackConfig:
    """How large packs are, and for which model."""

    family: Literal["pi05", "groot_n15"] = "pi05"
    """The model whose samples these are."""
    tokenizer: str | None = None
    """Path of the published tokenizer.json; None takes the small one that ships, whose ids fit no published weights."""
    vocab: int = 32_768
    """Ids of the small tokenizer are below it; it does not matter where a published one is given."""
    tokens: int = 16_384
    """Of views and text in a pack."""
    images: int = 0
    """In a pack; 0 takes what the mixture needs on average."""
    samples: int = 0
    """In a pack; 0 likewise."""
    views: tuple[str, ...] = ()
    """Names of the views to use, in this order; an episode may lack some. Empty takes all."""


@dataclass(frozen=True, kw_only=True)
class Episodes:
    """The episodes of a plan, source after source; arrays are [E]."""

    uid: npt.NDArray[np.bytes_]
    uid_key: npt.NDArray[np.uint64]
    """The uid's first 64 bits."""
    content: npt.NDArray[np.uint64]
    """The first 64 bits of the checksum of its frames."""
    source: Ints
    """Index into the plan's sources."""
    embodiment: Ints
    """Index into the plan's embodiments."""
    first_row: Ints
    """Row id of frame 0."""
    length: Ints
    fps: npt.NDArray[np.float64]
    state_dim: Ints
    action_dim: Ints
    tasks: Ints
    """Index into the plan's task lists."""
    views: Ints
    """Index into the plan's view lists."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything about a stream that metadata tell; nothing here is of the size of the frames."""

    release: Release
    family: Family
    tokenizer: Tokenizer
    sources: tuple[str, ...]
    embodiments: tuple[str, ...]
    task_lists: tuple[tuple[str, ...], ...]
    view_lists: tuple[tuple[str, ...], ...]
    """Names of the stored views."""
    view_picks: tuple[tuple[int, ...], ...]
    """Which of the stored views are used, in order."""
    episodes: Episodes
    first_episode: Ints
    """Index of each source's first episode [S]."""
    stream: Stream

    @property
    def budgets(self) -> Budgets:
        """Of a pack."""
        return self.stream.budgets

    def name_of(self, episode: int, frame: int) -> str:
        """Return what to call a sample in messages."""
        source = self.sources[int(self.episodes.source[episode])]
        return f"frame {frame} of episode {self.episodes.uid[episode].decode()} of source {source}"


def make_plan(
    release: Release, order: OrderConfig, packs: PackConfig, *, times: int = 1, resolution: int | None = None
) -> Plan:
    """Plan a stream of packs from a release's metadata.

    Args:
        times: how often a sample shows each view: at its own frame, and at past ones.
        resolution: of a derived table of frames, which has rows of its own.

    Raises:
        ValueError: an unknown source, weights that sum to zero, a condition that cannot be parsed, no episode left, or
            a view that no episode has.
    """
    family = FAMILIES[packs.family]
    tokenizer = WordTokenizer(vocab_size=packs.vocab) if packs.tokenizer is None else load_tokenizer(packs.tokenizer)
    table = _chosen(release, order)
    tasks, task_lists = _lists(table.column("tasks"))
    views, view_lists = _lists(table.column("views"))
    view_picks = tuple(_picks(names, packs.views) for names in view_lists)
    if packs.views and not any(view_picks):
        raise ValueError(f"no episode has any of the views {', '.join(packs.views)}; there are {_known(view_lists)}")
    embodiment, embodiments = _codes(table.column("embodiment"))
    source, sources = _codes(table.column("source"))
    uid = uid_array(table.column("episode_uid"))
    episodes = Episodes(
        uid=uid,
        uid_key=_keys_of(uid),
        content=_keys_of(uid_array(table.column("frames_sha256"))),
        source=source,
        embodiment=embodiment,
        first_row=release.first_rows(table.column("episode_uid").to_pylist(), resolution=resolution)
        if resolution is not None
        else _ints(table.column("frames_first_row")),
        length=_ints(table.column("num_frames")),
        fps=table.column("fps").to_numpy().astype(np.float64),
        state_dim=_ints(table.column("state_dim")),
        action_dim=_ints(table.column("action_dim")),
        tasks=tasks,
        views=views,
    )
    num_images = np.array([len(picks) for picks in view_picks], np.int64)[views] * times
    tokens = _tokens(family, tokenizer, episodes, task_lists, num_images)
    ends = np.searchsorted(source, np.arange(len(sources) + 1))
    parts = [slice(int(first), int(end)) for first, end in itertools.pairwise(ends)]
    weights = _weights(order, sources, [int(episodes.length[part].sum()) for part in parts])
    frames = [
        SourceFrames(name=name, lengths=episodes.length[part], weight=weight)
        for name, part, weight in zip(sources, parts, weights, strict=True)
    ]
    options = {"seed": order.seed, "block_frames": order.block_frames, "window_blocks": order.window_blocks}
    made = one_pass(frames, **options) if order.one_pass else mixture(frames, **options)
    stream = Stream(
        order=made,
        costs=tuple(Costs(tokens=tokens[part], images=num_images[part]) for part in parts),
        budgets=_budgets(packs, made.shares(), sources, episodes, (tokens, num_images)),
        num_lanes=order.lanes,
        salt=_salt(release, order, packs, uid),
    )
    return Plan(
        release=release,
        family=family,
        tokenizer=tokenizer,
        sources=sources,
        embodiments=embodiments,
        task_lists=task_lists,
        view_lists=view_lists,
        view_picks=view_picks,
        episodes=episodes,
        first_episode=ends[:-1].astype(np.int64),
        stream=stream,
    )


def _chosen(release: Release, order: OrderConfig) -> pa.Table:
    """Return the episodes of the split, of the sources that take part, source after source."""
    table = release.episodes(order.where, list(_COLUMNS))
    source, known = _codes(table.column("source"))
    where = order.where or "true"
    if not known:
        raise ValueError(f"release {release.name} has no episode where {where}")
    unknown = sorted(order.weights.keys() - set(known))
    if unknown:
        raise ValueError(
            f"weights name {', '.join(unknown)}, which release {release.name} has not, or not where {where}; it has "
            f"{', '.join(known)}"
        )
    split, says = _codes(table.column("split"))
    is_train = np.isin(split, [at for at, name in enumerate(says) if name == "train"])
    is_held = np.isin(split, [at for at, name in enumerate(says) if name in _VALIDATION_SPLITS])
    drawn = is_validation(_keys_of(uid_array(table.column("episode_uid"))), order.validation_fraction)
    chosen = is_train & ~drawn if order.split == "train" else is_held | (is_train & drawn)
    # A pass takes sources whole; a weight of zero leaves one out there, too.
    wanted = [name for name, weight in order.weights.items() if weight or not order.one_pass] or known
    chosen &= np.isin(source, [at for at, name in enumerate(known) if name in wanted])
    if not chosen.any():
        raise ValueError(
            f"no episode of {', '.join(sorted(wanted))} is in the {order.split} split; give a validation_fraction, or "
            "another condition"
        )
    found = table.filter(pa.array(chosen))
    gone = sorted(set(wanted) - set(_codes(found.column("source"))[1])) if order.weights else []
    if gone:
        raise ValueError(f"no episode of {', '.join(gone)} is in the {order.split} split; leave it out of the weights")
    return found


def _weights(order: OrderConfig, sources: Sequence[str], num_frames: Sequence[int]) -> list[float]:
    if not order.weights:
        return weights_by_size(num_frames, temperature=order.temperature)
    return [order.weights[name] for name in sources]


def _tokens(
    family: Family, tokenizer: Tokenizer, episodes: Episodes, task_lists: tuple[tuple[str, ...], ...], num_images: Ints
) -> Ints:
    """Return the tokens kept for a sample of each episode; alike episodes are counted once [E]."""
    shape = (len(task_lists), int(num_images.max()) + 1, int(episodes.state_dim.max()) + 1)
    kinds = np.ravel_multi_index((episodes.tasks, num_images, episodes.state_dim), shape)
    unique, inverse = np.unique(kinds, return_inverse=True)
    tasks, images, dims = np.unravel_index(unique, shape)
    costs = sample_costs(
        family,
        task_texts=[task_lists[at] for at in tasks],
        num_views=images,
        state_dim=dims,
        tokenizer=tokenizer,
    )
    return costs.tokens[inverse]


def _budgets(
    packs: PackConfig, shares: dict[str, float], sources: Sequence[str], episodes: Episodes, costs: tuple[Ints, Ints]
) -> Budgets:
    """Return the budgets that were asked for, or those in which the mixture fits best."""
    tokens, num_images = costs
    kinds: list[Kind] = []
    for at, name in enumerate(sources):
        mine = episodes.source == at
        frames = max(1, int(episodes.length[mine].sum()))
        for images in np.unique(num_images[mine]):
            alike = mine & (num_images == images)
            count = int(episodes.length[alike].sum())
            if count and shares[name]:
                mean = float((tokens[alike] * episodes.length[alike]).sum() / count)
                kinds.append(Kind(share=shares[name] * count / frames, tokens=mean, images=int(images)))
    best = budgets_for(kinds, tokens=packs.tokens)
    return Budgets(tokens=packs.tokens, images=packs.images or best.images, samples=packs.samples or best.samples)


def _salt(release: Release, order: OrderConfig, packs: PackConfig, uid: npt.NDArray[np.bytes_]) -> str:
    """Name what lengths and costs do not tell: which release and episodes they are of, which views and tokenizer."""
    tokenizer = "" if packs.tokenizer is None else hashlib.sha256(Path(packs.tokenizer).read_bytes()).hexdigest()
    parts = (release.id, order.split, order.where, packs.family, packs.views, tokenizer)
    digest = hashlib.sha256(json.dumps(parts).encode())
    digest.update(np.ascontiguousarray(uid).tobytes())
    return digest.hexdigest()


def _keys_of(uid: npt.NDArray[np.bytes_]) -> npt.NDArray[np.uint64]:
    """Return the number that the first 16 hexadecimal digits of each text write [E]."""
    codes = np.ascontiguousarray(uid).view(np.uint8).reshape(len(uid), -1)[:, :16]
    digits = np.where(codes >= ord("a"), codes - ord("a") + 10, codes - ord("0")).astype(np.uint8)
    packed = (digits[:, 0::2] << 4) | digits[:, 1::2]
    return np.ascontiguousarray(packed).view(">u8").reshape(-1).astype(np.uint64)


def _lists(column: pa.ChunkedArray) -> tuple[Ints, tuple[tuple[str, ...], ...]]:
    """Return the code of each list of strings, and the lists: few differ."""
    joined = pc.binary_join(column.combine_chunks(), _JOINT)  # type: ignore[attr-defined]
    codes, texts = _codes(pc.fill_null(joined, ""))
    return codes, tuple(tuple(text.split(_JOINT)) if text else () for text in texts)


def _codes(column: pa.ChunkedArray | pa.Array) -> tuple[Ints, tuple[str, ...]]:
    """Return the code of each string, and the strings, sorted: they do not depend on the order of rows."""
    values = sorted({value or "" for value in pc.unique(column).to_pylist()})  # type: ignore[attr-defined]
    codes = pc.index_in(pc.fill_null(column, ""), pa.array(values, pa.string()))  # type: ignore[attr-defined]
    return codes.to_numpy(zero_copy_only=False).astype(np.int64), tuple(values)


def _picks(names: Sequence[str], wanted: Sequence[str]) -> tuple[int, ...]:
    if not wanted:
        return tuple(range(len(names)))
    return tuple(names.index(name) for name in wanted if name in names)


def _known(view_lists: Sequence[Sequence[str]]) -> str:
    return ", ".join(sorted({name for names in view_lists for name in names})) or "none"


def _ints(column: pa.ChunkedArray) -> Ints:
    return pc.fill_null(column, 0).to_numpy().astype(np.int64)
