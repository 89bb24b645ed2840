"""Tests of train/geometry.py."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT

from lake.images import decode_jpeg, encode_jpeg
from train.geometry import Mode, Place, fit, fit_into, place_of, transform_of

MODES: list[Mode] = ["pad", "squash", "crop"]
MODE = st.sampled_from(MODES)
SIDE = st.integers(1, 500)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return blobs of all colours and sizes of a few pixels, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)


def weights(new: int, old: int) -> np.ndarray:
    """Return what each old pixel of a line gives to each new one, [new, old]: areas if shrunk, else linear."""
    matrix = np.zeros((new, old))
    for at in range(new):
        if new <= old:
            begin, end = at * old / new, (at + 1) * old / new
            for pixel in range(old):
                matrix[at, pixel] = max(0.0, min(end, pixel + 1) - max(begin, pixel)) * new / old
        else:
            centre = min(max((at + 0.5) * old / new - 0.5, 0), old - 1)
            low = min(int(centre), max(old - 2, 0))
            matrix[at, low] += 1 - (centre - low)
            matrix[at, min(low + 1, old - 1)] += centre - low
    return matrix


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    old_height, old_width = image.shape[:2]
    lines = np.tensordot(weights(height, old_height), image, 1)
    return np.moveaxis(np.tensordot(lines, weights(width, old_width), (1, 1)), 1, 2)


def expected(image: np.ndarray, size: int, mode: Mode) -> np.ndarray:
    """Lay a picture on a slot in the plain way, in floating point."""
    height, width = image.shape[:2]
    if mode == "squash":
        return resized(image, size, size)
    if mode == "pad":
        new = [max(1, side * size // max(height, width)) for side in (height, width)]
        slot = np.zeros((size, size, 3))
        top, left = (size - new[0]) // 2, (size - new[1]) // 2
        slot[top : top + new[0], left : left + new[1]] = resized(image, *new)
        return slot
    new = [side * size // min(height, width) for side in (height, width)]
    top, left = (new[0] - size + 1) // 2, (new[1] - size + 1) // 2
    return resized(image, *new)[top : top + size, left : left + size]


def fitted(image: np.ndarray, size: int, mode: Mode) -> np.ndarray:
    slot = noise(size, size, 3)
    fit(image, slot, mode)
    return slot


@pytest.mark.parametrize(
    ("mode", "height", "width", "size", "place"),
    [
        ("pad", 168, 224, 224, (0, 28, 224, 168)),
        ("pad", 224, 126, 224, (49, 0, 126, 224)),
        ("pad", 480, 640, 64, (0, 8, 64, 48)),
        ("pad", 24, 32, 64, (0, 8, 64, 48)),
        ("pad", 97, 223, 224, (0, 63, 224, 97)),
        ("pad", 1, 500, 10, (0, 4, 10, 1)),
        ("squash", 168, 224, 64, (0, 0, 64, 64)),
        ("crop", 168, 224, 224, (-37, 0, 298, 224)),
        ("crop", 224, 168, 84, (0, -14, 84, 112)),
        ("crop", 224, 224, 224, (0, 0, 224, 224)),
    ],
)
def test_places_of_known_sizes(mode: Mode, height: int, width: int, size: int, place: tuple[int, ...]) -> None:
    left, top, wide, high = place
    assert place_of(mode, height, width, size) == Place(left=left, top=top, width=wide, height=high)


@given(mode=MODE, height=SIDE, width=SIDE, size=SIDE)
@settings(deadline=None)
def test_places_are_centred_and_reach_the_sides(mode: Mode, height: int, width: int, size: int) -> None:
    place = place_of(mode, height, width, size)
    for begin, length in ((place.left, place.width), (place.top, place.height)):
        assert abs(begin - (size - begin - length)) <= 1
    reached = (place.width, place.height).count(size)
    if mode == "pad":
        assert reached >= 1
        assert max(place.width, place.height) == size
    elif mode == "crop":
        assert min(place.width, place.height) == size
    else:
        assert reached == 2
    if mode != "squash":
        kept = max if mode == "pad" else min
        scale = size / kept(height, width)
        assert abs(place.width - max(1, width * scale)) < 1
        assert abs(place.height - max(1, height * scale)) < 1


@given(mode=MODE, height=SIDE, width=SIDE, size=SIDE)
@settings(deadline=None)
def test_the_transform_takes_the_edges_of_the_place_to_those_of_the_picture(mode, height, width, size) -> None:
    place = place_of(mode, height, width, size)
    transform = transform_of(mode, height, width, size)
    assert transform.dtype == np.float32
    first = transform @ [place.left - 0.5, place.top - 0.5, 1]
    last = transform @ [place.left + place.width - 0.5, place.top + place.height - 0.5, 1]
    assert first == pytest.approx([-0.5, -0.5], abs=0.02)
    assert last == pytest.approx([width - 0.5, height - 0.5], abs=0.02)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [64, 160, 224, 300])
@pytest.mark.parametrize(("height", "width"), [(168, 224), (224, 126), (224, 224), (97, 223), (48, 64), (5, 3)])
def test_a_picture_is_laid_as_in_the_plain_way(mode: Mode, size: int, height: int, width: int) -> None:
    image = picture(height, width)
    # OpenCV interpolates with weights of 11 bits, and rounds between shrinking one side and enlarging the other.
    assert np.abs(fitted(image, size, mode) - expected(image, size, mode)).max() <= 1.5


def test_a_side_may_shrink_while_the_other_grows() -> None:
    image = np.where(np.arange(300) % 2, 200, 100).astype(np.uint8)[None, :, None] * np.ones((50, 1, 3), np.uint8)
    slot = fitted(image, 100, "squash")
    assert np.abs(slot - expected(image, 100, "squash")).max() <= 1.5
    assert slot.min() > 130, "averages, where single columns are 100 or 200"
    assert slot.max() < 170


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [64, 224, 230])
@pytest.mark.parametrize(("height", "width"), [(168, 224), (224, 168), (224, 224), (223, 97), (1, 1), (2, 3), (1, 224)])
def test_a_jpeg_comes_out_as_its_picture_does(mode: Mode, size: int, height: int, width: int) -> None:
    data = encode_jpeg(picture(height, width))
    slot = noise(size, size, 3)
    fit_into(data, slot, mode)
    assert np.array_equal(slot, fitted(decode_jpeg(data), size, mode))


def test_a_picture_of_the_right_size_is_not_resampled() -> None:
    data = encode_jpeg(picture(168, 224))
    slot = noise(224, 224, 3)
    fit_into(data, slot, "pad")
    assert np.array_equal(slot[28:196], decode_jpeg(data))
    assert not slot[:28].any()
    assert not slot[196:].any()
    tall = encode_jpeg(picture(224, 168))
    fit_into(tall, slot, "pad")
    assert np.array_equal(slot[:, 28:196], decode_jpeg(tall))
    assert not slot[:, :28].any()
    assert not slot[:, 196:].any()


def test_a_grey_jpeg_and_one_of_full_chroma_fill_three_channels() -> None:
    grey = simplejpeg.encode_jpeg(picture(60, 80)[..., :1].copy(), colorspace="GRAY", colorsubsampling="Gray")
    slot = noise(80, 80, 3)
    fit_into(grey, slot, "pad")
    assert np.array_equal(slot[10:70], decode_jpeg(grey))
    assert np.array_equal(slot[..., 0], slot[..., 2])
    full = simplejpeg.encode_jpeg(picture(61, 80), colorspace="RGB", colorsubsampling="444")
    fit_into(full, slot, "pad")
    assert np.array_equal(slot[9:70], decode_jpeg(full))


def test_only_its_own_slot_of_a_pack_is_written() -> None:
    pack = noise(3, 224, 224, 3)
    before = pack.copy()
    for height, width in ((168, 224), (224, 168), (48, 64)):
        for mode in MODES:
            fit_into(encode_jpeg(picture(height, width)), pack[1], mode)
            assert np.array_equal(pack[[0, 2]], before[[0, 2]])
            assert not np.array_equal(pack[1], before[1])


# A size that is decoded straight into the slot, and one that is not.
@pytest.mark.parametrize("size", [224, 64])
class TestDamage:
    def test_what_is_no_jpeg_is_an_error(self, size: int) -> None:
        slot = noise(size, size, 3)
        for data in (b"", b"\xff", b"no jpeg", bytes(1000), b"\xff\xd8\xff\xd9", encode_jpeg(picture(8, 8))[:20]):
            with pytest.raises(ValueError, match=r"(?i)jpe?g"):
                fit_into(data, slot, "pad")

    @given(part=st.floats(0, 1, exclude_max=True))
    @settings(deadline=None)
    def test_a_jpeg_cut_anywhere_is_an_error(self, size: int, part: float) -> None:
        data = encode_jpeg(picture(168, 224))
        with pytest.raises(ValueError, match=r"(?i)jpe?g"):
            fit_into(data[: int(part * len(data))], noise(size, size, 3), "pad")

    def test_a_jpeg_without_its_last_bytes_is_an_error(self, size: int) -> None:
        data = encode_jpeg(picture(168, 224))
        for cut in (1, 2, 3, 10):
            with pytest.raises(ValueError, match="Premature end"):
                fit_into(data[:-cut], noise(size, size, 3), "pad")

    def test_garbled_contents_are_an_error_or_a_picture(self, size: int) -> None:
        data = encode_jpeg(picture(168, 224))
        rng, errors = np.random.default_rng(0), 0
        for _ in range(200):
            bad = bytearray(data)
            begin = int(rng.integers(2, len(data) - 20))
            bad[begin : begin + 20] = rng.integers(0, 256, 20, dtype=np.uint8).tobytes()
            try:
                fit_into(bytes(bad), noise(size, size, 3), "pad")
            except ValueError:
                errors += 1
        assert errors > 100

    def test_a_header_of_a_huge_picture_is_an_error(self, size: int) -> None:
        data = encode_jpeg(picture(168, 224))
        sides = data.index(b"\xff\xc0") + 5
        huge = data[:sides] + b"\xff\x00\xff\x00" + data[sides + 4 :]
        with pytest.raises(ValueError, match="65280 x 65280 pixels"):
            fit_into(huge, noise(size, size, 3), "pad")

    def test_the_next_picture_is_none_the_worse(self, size: int) -> None:
        data = encode_jpeg(picture(168, 224))
        slot, good = noise(size, size, 3), noise(size, size, 3)
        fit_into(data, good, "pad")
        with pytest.raises(ValueError, match="Premature"):
            fit_into(data[:-100], slot, "pad")
        fit_into(data, slot, "pad")
        assert np.array_equal(slot, good)


@pytest.mark.parametrize(
    "slot",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 9, 3), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((8, 16, 3), np.uint8)[:, ::2],
    ],
)
def test_what_is_no_slot_is_refused(slot: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"a slot must be uint8 \[S, S, 3\], contiguous"):
        fit(picture(8, 8), slot, "pad")
    with pytest.raises(ValueError, match=r"a slot must be uint8 \[S, S, 3\], contiguous"):
        fit_into(encode_jpeg(picture(8, 8)), slot, "pad")


@pytest.mark.parametrize("image", [np.zeros((8, 8), np.uint8), np.zeros((8, 8, 3)), np.zeros((3, 8, 8), np.uint8)])
def test_what_is_no_picture_is_refused(image: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"a picture must be uint8 \[H, W, 3\]"):
        fit(image, noise(8, 8, 3), "pad")
    with pytest.raises(ValueError, match="at least 1 pixel"):
        fit(np.zeros((0, 8, 3), np.uint8), noise(8, 8, 3), "pad")


def test_unknown_modes_and_empty_sides_are_refused() -> None:
    with pytest.raises(ValueError, match="there is no image geometry 'stretch'; choose one of pad, squash, crop"):
        fit_into(encode_jpeg(picture(8, 8)), noise(8, 8, 3), "stretch")  # type: ignore[arg-type]
    for sides in ((0, 8, 8), (8, 0, 8), (8, 8, 0)):
        with pytest.raises(ValueError, match="at least 1 pixel"):
            transform_of("pad", *sides)


def test_threads_do_not_disturb_each_other() -> None:
    sizes = [(168, 224), (224, 168), (48, 64), (97, 223), (224, 224)] * 12
    files = [encode_jpeg(picture(*size, seed=seed)) for seed, size in enumerate(sizes)]

    def slot_of(number: int) -> np.ndarray:
        slot = noise(112, 112, 3)
        fit_into(files[number], slot, MODES[number % 3])
        return slot

    alone = [slot_of(number) for number in range(len(files))]
    with ThreadPoolExecutor(4) as pool:
        for slot, same in zip(pool.map(slot_of, range(len(files))), alone, strict=True):
            assert np.array_equal(slot, same)


@pytest.mark.skipif(sys.platform != "linux", reason="counts the tasks of /proc")
def test_opencv_starts_no_threads() -> None:
    code = (
        "import os, sys, cv2, numpy as np, lake.images\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "import train.geometry\n"
        "train.geometry.fit(np.zeros((600, 800, 3), np.uint8), np.zeros((2000, 2000, 3), np.uint8), 'crop')\n"
        "print(cv2.getNumThreads(), len(os.listdir('/proc/self/task')) - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "0"]
