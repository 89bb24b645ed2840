"""From the rows of a window to packs of samples: pictures, states, action chunks, text.

Shapes are those of train/batch.py; N is the number of rows of a window, E that of a plan's episodes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from lake.errors import BadSampleError
from train.augment import Augmentation, augment_into, draw, is_still
from train.batch import Batch, Pictures, Sizes, empty
from train.blocks import Block, BlockKey, BlockReader
from train.geometry import Mode, fit_into
from train.keyed import key_of, mix
from train.lanes import Pack
from train.normalise import Normaliser, Scheme
from train.packing import layout
from train.plan import Plan
from train.segments import SegmentWriter
from train.statistics import Actions, Statistics
from train.tokens import state_bins

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """What a sample is made of."""

    horizon: int = 0
    """Actions of a chunk; 0 takes the model's own number."""
    past_frames: tuple[int, ...] = ()
    """Also the state of so many frames before, for each number."""
    past_s: tuple[float, ...] = ()
    """Also the state of so many seconds before, to the nearest frame of the episode."""
    past_views: bool = False
    """Whether past times have their views, too."""
    normalise: Scheme | Literal["auto"] = "auto"
    """Of states and actions; auto takes the model's own: quantile for pi05, min_max for groot_n15."""
    relative_dims: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    """By embodiment: dimensions of the action that are relative to the state; needs statistics of such actions."""
    geometry: Mode = "pad"
    """How a view is laid into the model's square: all of it on black, stretched, or its middle."""
    image_size: int = 224
    """Side of that square in pixels."""
    resolution: int | None = None
    """Read the table of frames derived at this resolution; None reads the one ingested."""
    state_dim: int = 0
    """Width to which states are padded; 0 takes the model's own: 32 for pi05, 64 for groot_n15."""
    action_dim: int = 0
    """Width to which actions are padded; 0 takes 32."""
    on_bad_picture: Literal["raise", "leave_out"] = "raise"
    """What becomes of a sample whose picture cannot be decoded: an error that names it, or a weight of 0."""

    def __post_init__(self) -> None:
        """Raise ValueError where a past lies in the future."""
        if any(each <= 0 for each in (*self.past_frames, *self.past_s)):
            raise ValueError(f"past_frames={self.past_frames} and past_s={self.past_s} count backwards: give positives")

    @property
    def times(self) -> int:
        """How many times a state is given for."""
        return 1 + len(self.past_frames) + len(self.past_s)


@dataclass(frozen=True, kw_only=True)
class Window:
    """The rows of a window, decoded but for its pictures."""

    packs: list[Pack]
    blocks: list[Block]
    base: Ints
    """Row of each slot's frame 0; negative where the block begins further on [K]."""
    state_ND: Floats
    action_NA: Floats
    task_N: Ints


class Assembler:
    """Makes the packs of a plan; a pure function of (window, pack) that any process can run."""

    def __init__(
        self, plan: Plan, config: SampleConfig, normaliser: Normaliser, augmentation: Augmentation | None = None
    ) -> None:
        self.plan = plan
        self._config = config
        self._augmentation = augmentation
        family = plan.family
        self.sizes = Sizes(
            budgets=plan.budgets,
            image_size=config.image_size,
            times=config.times,
            state_dim=config.state_dim or family.state_dim,
            action_dim=config.action_dim or family.action_dim,
            horizon=config.horizon or family.horizon,
        )
        self._pictures = Pictures(self.sizes)
        self._writer = SegmentWriter(plan.family, plan.tokenizer)
        episodes = plan.episodes
        self._past_EP = _past(config, episodes.fps)
        self._shown_EP = self._past_EP if config.past_views else self._past_EP[:, -1:]
        self._still = [
            np.array([augmentation is not None and is_still(augmentation, names[at]) for at in picks], bool)
            for names, picks in zip(plan.view_lists, plan.view_picks, strict=True)
        ]
        pairs, self._pair_E = np.unique(np.stack([episodes.source, episodes.embodiment]), axis=1, return_inverse=True)
        self._pair_E = self._pair_E.reshape(-1)
        keys = [(plan.sources[source], plan.embodiments[embodiment]) for source, embodiment in pairs.T.tolist()]
        _check_widths(plan, self.sizes)
        _check_relative(plan, config)
        self._state_scale, self._state_offset = normaliser.state_tables(keys, self.sizes.state_dim)
        self._action_scale, self._action_offset = normaliser.action_tables(keys, self.sizes.action_dim)
        self._relative = normaliser.relative_table([name for _, name in keys], self.sizes.action_dim)
        seed = plan.stream.order.seed
        self._sample_key, self._augment_key = key_of(seed, "sample"), key_of(seed, "augment")

    @property
    def resolution(self) -> int | None:
        """Of the table of frames that windows are read from."""
        return self._config.resolution

    def block_keys(self, number: int) -> list[BlockKey]:
        """Return what a window needs of each of its blocks: views, and around them states and actions."""
        blocks = self.plan.stream.order.window(number)
        episode = self.plan.first_episode[blocks.source] + blocks.episode
        of = self.plan.episodes
        past = self._past_EP[episode].max(axis=1)
        shown = self._shown_EP[episode].max(axis=1)
        first, view_first = np.maximum(blocks.start - past, 0), np.maximum(blocks.start - shown, 0)
        end = np.minimum(blocks.end + self.sizes.horizon - 1, of.length[episode])
        return [
            BlockKey(uid=uid, content=content, first_row=row, views=(view, view_end), rows=(low, low_end))
            for uid, content, row, view, view_end, low, low_end in zip(
                of.uid[episode].tolist(),
                of.content[episode].tolist(),
                of.first_row[episode].tolist(),
                view_first.tolist(),
                blocks.end.tolist(),
                first.tolist(),
                end.tolist(),
                strict=True,
            )
        ]

    def read(self, number: int, reader: BlockReader) -> Window:
        """Return a window, read from the release; errors as of the reader and of ``window``."""
        return self.window(number, reader.read(self.block_keys(number)))

    def window(self, number: int, blocks: Sequence[Block]) -> Window:
        """Return a window from its blocks, in the order of ``block_keys``.

        Raises:
            BadSampleError: an episode's rows are not as its metadata say.
        """
        stream = self.plan.stream
        slots = stream.order.window(number)
        episode = self.plan.first_episode[slots.source] + slots.episode
        for at, block in zip(episode.tolist(), blocks, strict=True):
            self._check(at, block)
        lengths = np.array([len(block.task) for block in blocks])
        starts = np.cumsum(lengths) - lengths
        return Window(
            packs=stream.window(number),
            blocks=list(blocks),
            base=starts - np.array([block.first for block in blocks]),
            state_ND=_stacked([block.state for block in blocks], self.sizes.state_dim),
            action_NA=_stacked([block.action for block in blocks], self.sizes.action_dim),
            task_N=np.concatenate([block.task for block in blocks]),
        )

    def pack(self, window: Window, index: int) -> Batch:
        """Return one pack of a window.

        Raises:
            BadSampleError: a picture that cannot be decoded, or a text that takes more tokens than were kept for it.
        """
        pack = window.packs[index]
        episode = self.plan.first_episode[pack.source] + pack.episode
        batch = replace(empty(self.sizes, self._pictures.take()), num_samples=pack.num_samples)
        self._put_numbers(batch, window, pack, episode)
        num_tokens, num_images = self._put_tokens(batch, window, pack, episode)
        left_out = self._put_images(batch, window, pack, episode)
        return replace(batch, num_tokens=num_tokens, num_images=num_images, left_out=left_out)

    def _put_numbers(self, batch: Batch, window: Window, pack: Pack, episode: Ints) -> None:
        """Write states, actions and what identifies the samples."""
        of, n, pair = self.plan.episodes, pack.num_samples, self._pair_E[episode]
        base, frame = window.base[pack.slot], pack.frame
        past = frame[:, None] - self._past_EP[episode]
        state_BPD = window.state_ND[base[:, None] + np.maximum(past, 0)]
        ahead = frame[:, None] + np.arange(self.sizes.horizon)
        action_BHA = window.action_NA[base[:, None] + np.minimum(ahead, of.length[episode][:, None] - 1)]
        if self._relative.any():
            width = min(self.sizes.action_dim, self.sizes.state_dim)
            now_BA = np.zeros((n, self.sizes.action_dim), np.float32)
            now_BA[:, :width] = state_BPD[:, -1, :width]
            action_BHA = action_BHA - (now_BA * self._relative[pair])[:, None]
        batch.state_BPD[:n] = (state_BPD - self._state_offset[pair][:, None]) * self._state_scale[pair][:, None]
        batch.state_valid_BP[:n] = past >= 0
        batch.action_BHA[:n] = (action_BHA - self._action_offset[pair][:, None]) * self._action_scale[pair][:, None]
        batch.action_valid_BH[:n] = ahead < of.length[episode][:, None]
        batch.state_dim_B[:n], batch.action_dim_B[:n] = of.state_dim[episode], of.action_dim[episode]
        batch.embodiment_B[:n] = of.embodiment[episode]
        batch.weight_B[:n] = 1
        batch.key_B[:n] = self._keys(self._sample_key, pack, episode).view(np.int64)
        batch.source_B[:n], batch.epoch_B[:n] = pack.source, pack.epoch
        batch.episode_B[:n], batch.frame_B[:n] = pack.episode, frame

    def _put_tokens(self, batch: Batch, window: Window, pack: Pack, episode: Ints) -> tuple[int, int]:
        """Write the segments; return how many tokens and images there are."""
        of, plan, n = self.plan.episodes, self.plan, pack.num_samples
        task = window.task_N[window.base[pack.slot] + pack.frame]
        bins_BD = state_bins(batch.state_BPD[:n, -1])
        texts = [_text(plan.task_lists[tasks], at) for tasks, at in zip(of.tasks[episode], task.tolist(), strict=True)]
        parts, starts = self._writer.parts(texts, pack.images.tolist(), bins_BD, of.state_dim[episode].tolist())
        lengths = np.array([sum(map(len, each)) for each in parts], np.int64)
        over = np.flatnonzero(lengths > pack.tokens)
        if len(over):
            at = int(over[0])
            raise BadSampleError(
                f"{plan.name_of(int(episode[at]), int(pack.frame[at]))} has {lengths[at]} tokens, more than the "
                f"{pack.tokens[at]} that were kept for it: the tokenizer does not take digits one by one"
            )
        laid = layout(lengths, self.sizes.budgets)
        batch.cu_seqlens[:], batch.positions_T[:] = laid.cu_seqlens, laid.positions
        batch.segment_ids_T[:] = laid.segment_ids
        num_tokens, num_images = int(lengths.sum()), int(pack.images.sum())
        np.concatenate([part for each in parts for part in each], out=batch.token_ids_T[:num_tokens])
        np.concatenate(starts, out=batch.image_starts_I[:num_images])
        samples = np.repeat(np.arange(n), pack.images)
        batch.image_samples_I[:num_images] = samples
        batch.image_starts_I[:num_images] += laid.cu_seqlens[samples]
        return num_tokens, num_images

    def _put_images(self, batch: Batch, window: Window, pack: Pack, episode: Ints) -> tuple[str, ...]:
        """Decode the pictures; return the names of samples that had to be left out."""
        of, at, left_out = self.plan.episodes, 0, list[str]()
        keys = self._keys(self._augment_key, pack, episode) if self._augmentation is not None else None
        views = of.views[episode].tolist()
        frames = np.maximum(pack.frame[:, None] - self._shown_EP[episode], 0).tolist()
        for sample, (each, slot) in enumerate(zip(episode.tolist(), pack.slot.tolist(), strict=True)):
            named = self.plan.view_lists[views[sample]]
            block, picks = window.blocks[slot], self.plan.view_picks[views[sample]]
            changes = None if keys is None else self._changes(keys[sample], views[sample])
            for frame in frames[sample]:
                for nth, view in enumerate(picks):
                    try:
                        jpeg = block.jpeg(frame - block.first, view)
                        if changes is None:
                            fit_into(jpeg, batch.images_ISSC[at], self._config.geometry)
                        else:
                            augment_into(jpeg, changes[nth], batch.images_ISSC[at], self._config.geometry)
                    except (ValueError, IndexError) as error:
                        name = self.plan.name_of(each, int(pack.frame[sample]))
                        if self._config.on_bad_picture == "raise":
                            raise BadSampleError(
                                f"{name}: view {named[view]} at frame {frame} cannot be "
                                f"decoded: {error}. Verify the lake, leave the episode out by `where`, or set "
                                "on_bad_picture=leave_out"
                            ) from error
                        batch.images_ISSC[at] = 0
                        batch.weight_B[sample] = 0
                        left_out.append(name)
                    at += 1
        batch.images_ISSC[at:] = 0
        return tuple(dict.fromkeys(left_out))

    def _changes(self, key: np.uint64, views: int) -> npt.NDArray[np.float64]:
        """Return the change of each view; the same at all times of a sample."""
        assert self._augmentation is not None
        still = self._still[views]
        return draw(self._augmentation, mix(int(key), np.arange(len(still), dtype=np.uint64)), still=still)

    def _keys(self, key: int, pack: Pack, episode: Ints) -> Words:
        """Return a key of each sample that depends on what it is, never on where it is made."""
        words = mix(key, pack.epoch.astype(np.uint64))
        words = mix(words, self.plan.episodes.uid_key[episode])
        return mix(words, pack.frame.astype(np.uint64))

    def _check(self, episode: int, block: Block) -> None:
        of = self.plan.episodes
        for name, found, said in (
            ("state", block.state.shape[1], of.state_dim[episode]),
            ("action", block.action.shape[1], of.action_dim[episode]),
        ):
            if found != said:
                raise BadSampleError(
                    f"{self.plan.name_of(episode, block.first)} has a {name} of {found} dimensions, and its metadata "
                    f"say {said}; verify the lake (python -m lake verify)"
                )


def _text(texts: Sequence[str], at: int) -> str:
    """Return the instruction of a frame; episodes without one have an empty text."""
    return texts[at] if 0 <= at < len(texts) else ""


def make_normaliser(plan: Plan, config: SampleConfig, statistics: Statistics | None = None) -> Normaliser:
    """Return what normalises the samples of a plan.

    Args:
        statistics: None takes those of the release, which are of absolute actions.

    Raises:
        RepresentationMismatchError: they are of another representation of actions than the configuration asks for.
    """
    scheme = plan.family.scheme if config.normalise == "auto" else config.normalise
    horizon = config.horizon or plan.family.horizon
    relative = {name: dims for name, dims in config.relative_dims.items() if dims}
    return Normaliser(
        statistics=Statistics.of_release(plan.release) if statistics is None else statistics,
        state_scheme=scheme,
        action_scheme=scheme,
        actions=Actions(relative_dims=relative, horizon=horizon if relative else None),
    )


def _past(config: SampleConfig, fps_E: npt.NDArray[np.float64]) -> Ints:
    """Return how many frames ago each time of a sample is, longest ago first, 0 last [E, P]."""
    frames = [np.full(len(fps_E), each, np.int64) for each in config.past_frames]
    frames += [np.maximum(np.round(each * fps_E).astype(np.int64), 1) for each in config.past_s]
    ago = np.sort(np.stack([*frames, np.zeros(len(fps_E), np.int64)], axis=1), axis=1)
    return np.ascontiguousarray(ago[:, ::-1])


def _stacked(parts: Sequence[Floats], width: int) -> Floats:
    """Return matrices below each other, padded with zeros [N, width]."""
    stacked = np.zeros((sum(len(part) for part in parts), width), np.float32)
    row = 0
    for part in parts:
        stacked[row : row + len(part), : part.shape[1]] = part
        row += len(part)
    return stacked


def _check_widths(plan: Plan, sizes: Sizes) -> None:
    for name, dims, width in (
        ("state", plan.episodes.state_dim, sizes.state_dim),
        ("action", plan.episodes.action_dim, sizes.action_dim),
    ):
        over = np.flatnonzero(dims > width)
        if len(over):
            raise ValueError(
                f"{plan.name_of(int(over[0]), 0)} has a {name} of {dims[over[0]]} dimensions, more than {name}_dim="
                f"{width}; raise it, or leave such episodes out by `where`"
            )


def _check_relative(plan: Plan, config: SampleConfig) -> None:
    of = plan.episodes
    for at, embodiment in enumerate(plan.embodiments):
        last = max(config.relative_dims.get(embodiment, ()), default=-1)
        over = np.flatnonzero((of.embodiment == at) & (np.minimum(of.state_dim, of.action_dim) <= last))
        if len(over):
            raise ValueError(
                f"dimension {last} of {embodiment} is to be relative, and {plan.name_of(int(over[0]), 0)} has a state "
                f"of {of.state_dim[over[0]]} dimensions and an action of {of.action_dim[over[0]]}; leave it out of "
                "relative_dims"
            )
