"""A pack as arrays of static sizes: what a training step takes.

Shapes: T tokens, I images and B samples of the budgets, S side of an image in pixels, P times of a state, D and A
dimensions of state and action, H actions of a chunk. What is not used holds zeros, or what is said at the field.
"""

import sys
import threading
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from train.packing import Budgets

if TYPE_CHECKING:
    import torch

Array = Any
"""A numpy array, or after ``to_torch`` a tensor."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a batch's arrays."""

    budgets: Budgets
    image_size: int
    times: int
    state_dim: int
    action_dim: int
    horizon: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One pack."""

    images_ISSC: Array
    """uint8 RGB; to [-1, 1] by x / 127.5 - 1 on the device, which takes a quarter of the bytes of floats."""
    image_starts_I: Array
    """int32: first token of each image; T where unused."""
    image_samples_I: Array
    """int32: sample of each image; B where unused."""
    token_ids_T: Array
    """int32: ids of text; -1 where a token of an image stands, 0 behind the last sample."""
    positions_T: Array
    """int32: within the segment."""
    segment_ids_T: Array
    """int32: sample of each token; B behind the last one."""
    cu_seqlens: Array
    """int32 [B + 2]: where segments begin. The tail is a segment of its own; entries behind it repeat T."""
    state_BPD: Array
    """float32, normalised; the last time is the sample's own, those before it are past."""
    state_valid_BP: Array
    """bool: whether the episode had begun."""
    action_BHA: Array
    """float32, normalised; behind the end of the episode the last action is repeated."""
    action_valid_BH: Array
    """bool: whether the action lies within the episode."""
    state_dim_B: Array
    """int64: dimensions that are not padding."""
    action_dim_B: Array
    """int64."""
    embodiment_B: Array
    """int64: index into ``loader.plan.embodiments``."""
    weight_B: Array
    """float32: 1 for a sample, 0 for an unused row or a sample that was left out."""
    key_B: Array
    """int64: for counter-based randomness, the bits of a 64-bit key of (seed, source epoch, episode, frame)."""
    source_B: Array
    """int64: index into ``loader.plan.sources``; -1 where unused."""
    epoch_B: Array
    """int64: of the source."""
    episode_B: Array
    """int64: index among the source's episodes."""
    frame_B: Array
    """int64: index within the episode."""
    num_samples: int
    num_tokens: int
    num_images: int
    left_out: tuple[str, ...] = ()
    """Names of samples that have a weight of 0 because a picture could not be decoded."""
    step: int = 0
    lane: int | None = None
    """None where the rank had no lane left; a lane that has ended gives packs without samples."""

    def arrays(self) -> dict[str, Array]:
        """Return the arrays by name."""
        return {name: getattr(self, name) for name in ARRAYS}


ARRAYS = tuple(each.name for each in fields(Batch) if each.type == "Array" or each.type is Array)


class Pictures:
    """Memory for the images of packs, used again as soon as nobody holds the pack or a part of it.

    Fresh memory of this size is mapped and zeroed page by page, which takes a tenth of the time of decoding into it.
    """

    def __init__(self, sizes: Sizes) -> None:
        self._shape = (sizes.budgets.images, sizes.image_size, sizes.image_size, 3)
        self._held: list[npt.NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def take(self) -> npt.NDArray[np.uint8]:
        """Return an array [I, S, S, 3] that holds anything."""
        with self._lock:
            for at in range(len(self._held)):
                # One reference is the list's, one the argument's; tensors and views have more.
                if sys.getrefcount(self._held[at]) == 2:
                    return self._held[at]
            self._held.append(np.zeros(self._shape, np.uint8))
            return self._held[-1]


def empty(sizes: Sizes, images: npt.NDArray[np.uint8] | None = None) -> Batch:
    """Return a batch without samples: all its rows have a weight of 0.

    Args:
        images: where to put them; None takes new memory, all zero.
    """
    num_tokens, num_images, num_samples = sizes.budgets.tokens, sizes.budgets.images, sizes.budgets.samples
    side, horizon = sizes.image_size, sizes.horizon

    def ints(*shape: int, of: int = 0, dtype: npt.DTypeLike = np.int32) -> npt.NDArray[Any]:
        return np.full(shape, of, dtype)

    cu_seqlens = ints(num_samples + 2, of=num_tokens)
    cu_seqlens[0] = 0
    return Batch(
        images_ISSC=np.zeros((num_images, side, side, 3), np.uint8) if images is None else images,
        image_starts_I=ints(num_images, of=num_tokens),
        image_samples_I=ints(num_images, of=num_samples),
        token_ids_T=ints(num_tokens),
        positions_T=np.arange(num_tokens, dtype=np.int32),
        segment_ids_T=ints(num_tokens, of=num_samples),
        cu_seqlens=cu_seqlens,
        state_BPD=np.zeros((num_samples, sizes.times, sizes.state_dim), np.float32),
        state_valid_BP=np.zeros((num_samples, sizes.times), bool),
        action_BHA=np.zeros((num_samples, horizon, sizes.action_dim), np.float32),
        action_valid_BH=np.zeros((num_samples, horizon), bool),
        state_dim_B=ints(num_samples, dtype=np.int64),
        action_dim_B=ints(num_samples, dtype=np.int64),
        embodiment_B=ints(num_samples, dtype=np.int64),
        weight_B=np.zeros(num_samples, np.float32),
        key_B=ints(num_samples, dtype=np.int64),
        source_B=ints(num_samples, of=-1, dtype=np.int64),
        epoch_B=ints(num_samples, dtype=np.int64),
        episode_B=ints(num_samples, dtype=np.int64),
        frame_B=ints(num_samples, dtype=np.int64),
        num_samples=0,
        num_tokens=0,
        num_images=0,
    )


def to_torch(batch: Batch, *, pin: bool = False) -> Batch:
    """Return the batch with tensors in place of arrays; they share memory unless they are pinned.

    Args:
        pin: put them into pinned memory, from which a GPU copies without waiting.
    """
    import torch

    def tensor(array: npt.NDArray[Any]) -> "torch.Tensor":
        # What came through Ray's object store cannot be written to, and torch has no such tensors.
        made = torch.from_numpy(array if array.flags.writeable else array.copy())
        return made.pin_memory() if pin else made

    others = {each.name: getattr(batch, each.name) for each in fields(Batch) if each.name not in ARRAYS}
    return Batch(**{name: tensor(array) for name, array in batch.arrays().items()}, **others)
