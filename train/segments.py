"""The token ids of a sample: its views, instruction and state, in the order of a model's text."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from train.tokens import Family, Tokenizer, WordTokenizer, pieces

Ids = npt.NDArray[np.int32]
Ints = npt.NDArray[np.int64]

IMAGE_ID = -1
"""In place of an id where a token of an image stands."""
_FIRST_BIN, _NUM_BINS = -1, 257
_MOST_FRAMES = 1 << 13
"""Tasks that are remembered; some kilobytes each."""


class SegmentWriter:
    """Writes the segments of one model's samples; it remembers the tasks that it has seen."""

    def __init__(self, family: Family, tokenizer: Tokenizer) -> None:
        self._family = family
        self._tokenizer = tokenizer
        self._frames: dict[tuple[str, int], _Frame] = {}
        # Where no token spans a digit and its neighbour, a state's tokens are those of its bins, side by side.
        self._bins = self._encode_bins() if isinstance(tokenizer, WordTokenizer) else None

    def parts(
        self, tasks: Sequence[str], num_views: Sequence[int], bins_BD: Ints, dims: Sequence[int]
    ) -> tuple[list[tuple[Ids, ...]], list[Ids]]:
        """Return, for each sample, the pieces of its token ids, and where its images begin within it.

        Args:
            tasks: instruction of each sample [B].
            num_views: of each sample [B].
            bins_BD: of its state, padded; models whose text has no state pass over them.
            dims: of its state, without padding [B].
        """
        frames = [self._frame(*each) for each in zip(tasks, num_views, strict=True)]
        starts = [frame.starts for frame in frames]
        if not self._family.has_state_text:
            return [(frame.head, frame.before) for frame in frames], starts
        if self._bins is None:
            texts = [" ".join(map(str, bins[:dim])) for bins, dim in zip(bins_BD.tolist(), dims, strict=True)]
            ids = [self._encode(f.texts[0] + text + f.texts[1]) for f, text in zip(frames, texts, strict=True)]
            return [(frame.head, each) for frame, each in zip(frames, ids, strict=True)], starts
        states = self._states(bins_BD, np.asarray(dims))
        return [(f.head, f.before, state, f.after) for f, state in zip(frames, states, strict=True)], starts

    def _states(self, bins_BD: Ints, dims: Ints) -> list[Ids]:
        """Return the ids of each state's bins with spaces between."""
        assert self._bins is not None
        ids, lengths = self._bins
        rows = bins_BD - _FIRST_BIN
        dim = np.arange(rows.shape[1])
        length = np.where(dim < dims[:, None], lengths[rows] - (dim == dims[:, None] - 1), 0)  # No space at the end.
        keep = np.arange(ids.shape[1]) < length[:, :, None]
        flat, ends = ids[rows][keep], np.cumsum(length.sum(axis=1)).tolist()
        return [flat[first:end] for first, end in pairwise((0, *ends))]

    def _frame(self, task: str, num_views: int) -> "_Frame":
        found = self._frames.get((task, num_views))
        if found is None:
            heads, before, after = pieces(self._family, task=task, num_views=num_views)
            view = np.full(self._family.tokens_per_view, IMAGE_ID, np.int32)
            encoded = [self._encode(head) for head in heads]
            starts = np.cumsum([len(each) for each in encoded], dtype=np.int64) + len(view) * np.arange(num_views)
            found = _Frame(
                head=np.concatenate([view[:0], *(part for each in encoded for part in (each, view))]),
                starts=starts.astype(np.int32),
                before=self._encode(before),
                after=self._encode(after),
                texts=(before, after),
            )
            if len(self._frames) >= _MOST_FRAMES:
                self._frames.clear()
            self._frames[task, num_views] = found
        return found

    def _encode_bins(self) -> tuple[Ids, Ints]:
        """Return the ids of each bin with a space behind it, padded, and how many there are."""
        encoded = [self._tokenizer.encode(f"{_FIRST_BIN + at} ") for at in range(_NUM_BINS)]
        lengths = np.array([len(each) for each in encoded])
        ids = np.zeros((_NUM_BINS, lengths.max()), np.int32)
        for row, each in zip(ids, encoded, strict=True):
            row[: len(each)] = each
        return ids, lengths

    def _encode(self, text: str) -> Ids:
        return np.array(self._tokenizer.encode(text), np.int32)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Frame:
    """What the segments of a task and a number of views have in common."""

    head: Ids
    """Up to the last view, with it."""
    starts: Ids
    """Where views begin."""
    before: Ids
    """From there to the state."""
    after: Ids
    """Behind the state."""
    texts: tuple[str, str]
    """What ``before`` and ``after`` are the ids of."""
