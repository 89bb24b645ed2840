"""Random changes to the pictures of samples, keyed, so that a sample gets the same ones wherever it is made.

Where a picture moves, it is resampled once: laying it on its slot, cropping and rotating are one affine warp, in that
order from the picture to the slot. Colours are changed before, so bars beside a padded picture stay black, as they
are when a policy is served.

N is the number of pictures; a change is float64 [7], in the order of ``PARAMETERS``.

Source: the ranges and their order are those of openpi's preprocess_observation, for pi-0 and pi-0.5; grey is the luma
of ITU-R BT.601.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from train.geometry import Mode, affine_of, decode, fit_into, lay, place_of, scratch, shrunk, sides_of, size_of
from train.keyed import Words, key_of, mix

VERSION = 1
"""Of the arithmetic here: another one makes other pictures."""

PARAMETERS = ("side", "left", "top", "radians", "brightness", "contrast", "saturation")
"""Of a change: the part of the slot that is kept, in sides of the slot; how far it is turned; three factors."""

Changes = npt.NDArray[np.float64]

SAME: Changes = np.array([1, 0, 0, 0, 1, 1, 1], np.float64)
"""The change that leaves a picture as it is."""
SAME.flags.writeable = False

_GREY = (0.299, 0.587, 0.114)
_SAME_COLOURS, _ONLY_GREY = np.eye(3), np.array([_GREY] * 3)
_STREAMS = mix(key_of("augment"), np.arange(6, dtype=np.uint64))


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """How far the pictures of samples are changed at random; with all numbers zero, not at all."""

    crop: float = 0.95
    """Side of the part that is kept, relative to the whole, at a random place; 0 or 1 keeps all."""
    rotate_deg: float = 5.0
    """Largest angle, either way."""
    brightness: float = 0.3
    """Largest change of the factor to all colours."""
    contrast: float = 0.4
    """Largest change of the factor to distances from the picture's mean grey."""
    saturation: float = 0.5
    """Largest change of the factor to distances from each pixel's own grey."""
    still_views: tuple[str, ...] = ("wrist", "hand")
    """Parts of names of views, in any case, that are neither cropped nor rotated: their camera moves with the arm."""

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: a number outside of its range.
        """
        for name, most in (("crop", 1), ("rotate_deg", 180), ("brightness", 1), ("contrast", 1), ("saturation", 1)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ValueError(f"augmentation: {name} is {value}; it must lie between 0 and {most}")


def is_still(config: Augmentation, view: str) -> bool:
    """Return whether a view is neither cropped nor rotated."""
    return any(part.casefold() in view.casefold() for part in config.still_views)


def draw(config: Augmentation, keys: Words, *, still: bool | npt.NDArray[np.bool_]) -> Changes:
    """Draw a change for each key; equal keys draw equal changes, save that still pictures do not move.

    Each parameter has random numbers of its own, so that setting one to zero changes none of the others.

    Args:
        keys: uint64 [N], one for each picture, or one for pictures that are to change alike.
        still: for all, or [N]; see ``is_still``.

    Returns:
        float64 [N, 7].
    """
    words = mix(np.asarray(keys, np.uint64)[:, None], _STREAMS)
    uniform = (words >> np.uint64(11)) * 2.0**-53
    either_way = 2 * uniform - 1
    changes = np.tile(SAME, (len(words), 1))
    side = config.crop or 1.0
    moved = np.column_stack(
        [np.full(len(words), side), uniform[:, :2] * (1 - side), either_way[:, 2] * math.radians(config.rotate_deg)]
    )
    changes[:, :4] = np.where(np.broadcast_to(still, len(words))[:, None], SAME[:4], moved)
    changes[:, 4:] += either_way[:, 3:] * (config.brightness, config.contrast, config.saturation)
    return changes


def augment_into(data: bytes, change: Changes, out: np.ndarray, mode: Mode) -> None:
    """Decode a JPEG file and lay it, changed, into a slot; see ``fit_into``.

    Raises:
        ValueError: not a JPEG file, a cut or damaged one, an unknown mode, or not a slot.
    """
    if (change == SAME).all():
        fit_into(data, out, mode)
    else:
        apply(decode(data), change, out, mode)


def apply(image: np.ndarray, change: Changes, out: np.ndarray, mode: Mode) -> None:
    """Lay a picture, uint8 [H, W, 3], changed, on a slot; what lies outside of the picture is black.

    Raises:
        ValueError: not such a picture, an unknown mode, or not a slot.
    """
    side, left, top, radians, brightness, contrast, saturation = change.tolist()
    size = size_of(out)
    height, width = sides_of(image)
    place = place_of(mode, height, width, size)
    image = shrunk(image, place)
    if (brightness, contrast, saturation) != (1, 1, 1):
        mean_grey = sum(part * mean for part, mean in zip(_GREY, cv2.mean(image)[:3], strict=True))
        matrix = colour_matrix(mean_grey, brightness, contrast, saturation)
        image = cv2.transform(image, matrix, dst=scratch("colour", *image.shape[:2]))
    if (side, radians) == (1, 0):
        lay(image, place, out)
        return
    warp = affine_of(place, *image.shape[:2]) @ _movement(size, side, (left, top), radians)
    cv2.warpAffine(image, warp, (size, size), dst=out, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def colour_matrix(mean_grey: float, brightness: float, contrast: float, saturation: float) -> npt.NDArray[np.float32]:
    """Return the affine map of colours that changes brightness, then contrast, then saturation, float32 [3, 4].

    Nothing is clipped in between. Contrast does not move the mean grey, nor saturation any grey.
    """
    matrix = np.empty((3, 4), np.float32)
    matrix[:, :3] = brightness * contrast * (saturation * _SAME_COLOURS + (1 - saturation) * _ONLY_GREY)
    matrix[:, 3] = brightness * (1 - contrast) * mean_grey
    return matrix


def _movement(size: int, side: float, corner: tuple[float, float], radians: float) -> npt.NDArray[np.float64]:
    """Return the map from a pixel of the slot to one of the unmoved slot: turned about the middle, then cropped."""
    cosine, sine, middle = side * math.cos(radians), side * math.sin(radians), (size - 1) / 2
    centre_x, centre_y = (part * size + side * size / 2 - 0.5 for part in corner)
    return np.array(
        [
            [cosine, -sine, centre_x - (cosine - sine) * middle],
            [sine, cosine, centre_y - (sine + cosine) * middle],
            [0, 0, 1],
        ]
    )
