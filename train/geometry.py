"""Laying stored pictures into the square image slots of a pack.

The lake keeps pictures without bars and small; what becomes of their sides is the model's choice, made at load:

- ``pad`` keeps all of the picture and its aspect, centred on black;
- ``squash`` stretches it over the slot;
- ``crop`` keeps the aspect and fills the slot, losing the ends of the longer side.

All three shrink by area averaging, and enlarge linearly where a picture is smaller than its slot, padding too: the
published models were trained on pictures enlarged in this way.

A slot is uint8 [S, S, 3] in RGB order, contiguous. Coordinates are those of pixels' centres: the first pixel is at 0.
"""

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import cv2
import numpy as np
import numpy.typing as npt
import simplejpeg

from lake.images import decode_jpeg

Mode = Literal["pad", "squash", "crop"]

_MOST_PIXELS = 4096 * 4096

# OpenCV would split every call among threads of its own, beside those that call it: one per core, on every core. It
# has one setting for the whole process. 1 and not 0, which would turn its pool off for good.
cv2.setNumThreads(1)

_thread = threading.local()


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a resized picture lies on a slot, in pixels of the slot; what is outside of the slot is cropped."""

    left: int
    """Negative where columns are cropped."""
    top: int
    """Negative where rows are cropped."""
    width: int
    height: int


@lru_cache(maxsize=1024)
def place_of(mode: Mode, height: int, width: int, size: int) -> Place:
    """Return where a picture comes to lie on a slot.

    Source: for ``pad``, resize_with_pad of openpi, which rounds sides and margins down.

    Raises:
        ValueError: an unknown mode, or a side below 1.
    """
    if mode not in get_args(Mode):
        raise ValueError(f"there is no image geometry {mode!r}; choose one of {', '.join(get_args(Mode))}")
    if min(height, width, size) < 1:
        raise ValueError(f"cannot lay {width} x {height} on a slot of {size}: every side must be at least 1 pixel")
    if mode == "squash":
        return Place(left=0, top=0, width=size, height=size)
    side = max(height, width) if mode == "pad" else min(height, width)
    wide, high = (max(1, each * size // side) for each in (width, height))
    left, top = (size - wide) // 2, (size - high) // 2
    return Place(left=left, top=top, width=wide, height=high)


def transform_of(mode: Mode, height: int, width: int, size: int) -> npt.NDArray[np.float32]:
    """Return the affine map from a pixel of the slot to one of the picture, float32 [2, 3].

    Raises:
        ValueError: an unknown mode, or a side below 1.
    """
    return affine_of(place_of(mode, height, width, size), height, width)


def affine_of(place: Place, height: int, width: int) -> npt.NDArray[np.float32]:
    """Return the affine map from a pixel of the slot to one of a picture that was laid there, float32 [2, 3]."""
    across, down = width / place.width, height / place.height
    shift_x, shift_y = (0.5 - place.left) * across - 0.5, (0.5 - place.top) * down - 0.5
    return np.array([[across, 0, shift_x], [0, down, shift_y]], np.float32)


def fit_into(data: bytes, out: np.ndarray, mode: Mode) -> None:
    """Decode a JPEG file into a slot, straight to where it belongs if it needs no resizing.

    After an error the slot holds anything.

    Raises:
        ValueError: not a JPEG file, a cut or damaged one, an unknown mode, or not a slot.
    """
    size = size_of(out)
    height, width = _header(data)
    place = place_of(mode, height, width, size)
    if place.width == width == size and place.height == height <= size:
        _blacken(out, place)
        decode_jpeg(data, out[place.top : place.top + height])
    else:
        lay(decode(data), place, out)


def fit(image: np.ndarray, out: np.ndarray, mode: Mode) -> None:
    """Lay a picture, uint8 [H, W, 3], on a slot.

    Raises:
        ValueError: not such a picture, an unknown mode, or not a slot.
    """
    height, width = sides_of(image)
    lay(image, place_of(mode, height, width, size_of(out)), out)


def lay(image: np.ndarray, place: Place, out: np.ndarray) -> None:
    """Resize a picture, lay it on a slot, and blacken the rest."""
    _blacken(out, place)
    top, left = max(0, place.top), max(0, place.left)
    seen = out[top : place.top + place.height, left : place.left + place.width]
    image = shrunk(image, place)
    if image.shape[:2] != (place.height, place.width):
        whole = seen.shape[:2] == (place.height, place.width)
        large = seen if whole else scratch("resize", place.height, place.width)
        cv2.resize(image, (place.width, place.height), dst=large, interpolation=cv2.INTER_LINEAR)
        if whole:
            return
        image = large
    top, left = top - place.top, left - place.left
    np.copyto(seen, image[top : top + seen.shape[0], left : left + seen.shape[1]])


def shrunk(image: np.ndarray, place: Place) -> np.ndarray:
    """Return a picture, shrunk along each side that its place shortens; itself where there is none.

    A linear warp sees two pixels to a side, so it would alias if it had to shrink.
    """
    height, width = image.shape[:2]
    if width <= place.width and height <= place.height:
        return image
    sides = min(width, place.width), min(height, place.height)
    return cv2.resize(image, sides, interpolation=cv2.INTER_AREA)


def sides_of(image: np.ndarray) -> tuple[int, int]:
    """Return the height and width of a picture, in pixels.

    Raises:
        ValueError: not uint8 [H, W, 3].
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"a picture must be uint8 [H, W, 3], not {image.dtype} {list(image.shape)}")
    return image.shape[0], image.shape[1]


def size_of(out: np.ndarray) -> int:
    """Return the side of a slot, in pixels.

    Raises:
        ValueError: not a slot.
    """
    if out.dtype != np.uint8 or out.ndim != 3 or out.shape != (len(out), len(out), 3) or not out.flags.c_contiguous:
        layout = "contiguous" if out.flags.c_contiguous else "not contiguous"
        raise ValueError(f"a slot must be uint8 [S, S, 3], contiguous, not {out.dtype} {list(out.shape)}, {layout}")
    return len(out)


def decode(data: bytes) -> np.ndarray:
    """Decode a JPEG file to uint8 [H, W, 3] in memory of this thread, which its next call overwrites.

    Raises:
        ValueError: not a JPEG file, or a cut or damaged one.
    """
    image = scratch("decode", *_header(data))
    decode_jpeg(data, image)
    return image


def scratch(use: str, height: int, width: int) -> np.ndarray:
    """Return memory of this thread for an image, uint8 [H, W, 3]; the next call for the same use gives it again.

    Fresh memory of this size costs more than the work done in it, since every page of it has to be mapped and zeroed.
    """
    num_bytes = height * width * 3
    held = _thread.__dict__.get(use)
    if held is None or len(held) < num_bytes:
        held = np.empty(num_bytes, np.uint8)
        _thread.__dict__[use] = held
    return held[:num_bytes].reshape(height, width, 3)


def _header(data: bytes) -> tuple[int, int]:
    header = simplejpeg.decode_jpeg_header(data)
    height, width = int(header[0]), int(header[1])
    if height * width > _MOST_PIXELS:
        raise ValueError(f"a JPEG header says {width} x {height} pixels, more than any picture here: it is damaged")
    return height, width


def _blacken(out: np.ndarray, place: Place) -> None:
    size = len(out)
    if place.top > 0 or place.top + place.height < size:
        out[: max(0, place.top)] = 0
        out[place.top + place.height :] = 0
    if place.left > 0 or place.left + place.width < size:
        out[:, : max(0, place.left)] = 0
        out[:, place.left + place.width :] = 0
