"""Tests of train/augment.py."""

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import ROOT

from lake.images import decode_jpeg, encode_jpeg
from train.augment import PARAMETERS, SAME, Augmentation, apply, augment_into, colour_matrix, draw, is_still
from train.geometry import Mode, fit, fit_into, place_of
from train.keyed import key_of, mix

MODES: list[Mode] = ["pad", "squash", "crop"]
SIZES = [(168, 224), (224, 126), (224, 224), (97, 223), (48, 64)]
OFF = Augmentation(crop=0, rotate_deg=0, brightness=0, contrast=0, saturation=0)
WORD = st.integers(0, 2**64 - 1)
GREY = np.array([0.299, 0.587, 0.114])


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return smooth blobs of all colours, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3)).astype(np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def keys_of(number: int) -> np.ndarray:
    return mix(key_of("test"), np.arange(number, dtype=np.uint64))


def changed(image: np.ndarray, change: np.ndarray, mode: Mode = "pad", size: int = 224) -> np.ndarray:
    slot = np.full((size, size, 3), 77, np.uint8)
    apply(image, change, slot, mode)
    return slot


def change_of(**parameters: float) -> np.ndarray:
    change = SAME.copy()
    for name, value in parameters.items():
        change[PARAMETERS.index(name)] = value
    return change


def warped(image: np.ndarray, change: np.ndarray, mode: Mode, size: int) -> np.ndarray:
    """Crop, turn and lay in the plain way: for each pixel of the slot, look where it comes from; black outside."""
    height, width = image.shape[:2]
    place = place_of(mode, height, width, size)
    side, left, top, radians = change[:4]
    y, x = np.mgrid[:size, :size] + 0.5
    y, x = y - size / 2, x - size / 2
    x, y = math.cos(radians) * x - math.sin(radians) * y, math.sin(radians) * x + math.cos(radians) * y
    y, x = (y + size / 2) * side + top * size, (x + size / 2) * side + left * size
    y, x = (y - place.top) * height / place.height - 0.5, (x - place.left) * width / place.width - 0.5
    framed = np.pad(image.astype(float), ((1, 1), (1, 1), (0, 0)))
    y, x = np.clip(y + 1, 0, height + 0.999), np.clip(x + 1, 0, width + 0.999)
    i, j = y.astype(int), x.astype(int)
    v, u = (y - i)[..., None], (x - j)[..., None]
    upper = framed[i, j] * (1 - u) + framed[i, j + 1] * u
    lower = framed[i + 1, j] * (1 - u) + framed[i + 1, j + 1] * u
    return upper * (1 - v) + lower * v


def coloured(image: np.ndarray, brightness: float, contrast: float, saturation: float) -> np.ndarray:
    """Change colours in the plain way, a step at a time."""
    changing = image * brightness
    mean = (changing @ GREY).mean()
    changing = mean + contrast * (changing - mean)
    grey = (changing @ GREY)[..., None]
    return np.clip(grey + saturation * (changing - grey), 0, 255)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [64, 224, 256])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_no_change_gives_exactly_the_picture_of_the_geometry(mode: Mode, size: int, height: int, width: int) -> None:
    data = encode_jpeg(picture(height, width))
    image = decode_jpeg(data)
    plain, slot = np.zeros((size, size, 3), np.uint8), np.full((size, size, 3), 9, np.uint8)
    fit(image, plain, mode)
    assert np.array_equal(changed(image, SAME, mode, size), plain)
    augment_into(data, SAME, slot, mode)
    assert np.array_equal(slot, plain)


def test_an_augmentation_of_zeros_or_of_a_whole_crop_changes_nothing() -> None:
    for config in (OFF, Augmentation(crop=1, rotate_deg=0, brightness=0, contrast=0, saturation=0)):
        assert np.array_equal(draw(config, keys_of(100), still=False), np.tile(SAME, (100, 1)))
        assert np.array_equal(draw(config, keys_of(100), still=True), np.tile(SAME, (100, 1)))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [64, 224, 256])
@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_moved_picture_is_that_of_the_plain_way(mode: Mode, size: int, height: int, width: int) -> None:
    config = Augmentation(crop=0.9, rotate_deg=20, brightness=0, contrast=0, saturation=0)
    image = picture(height, width)
    place = place_of(mode, height, width, size)
    if place.width < width or place.height < height:  # Shrunk before it is warped.
        image = cv2.resize(image, (min(width, place.width), min(height, place.height)), interpolation=cv2.INTER_AREA)
    for change in draw(config, keys_of(5), still=False):
        errors = np.abs(changed(picture(height, width), change, mode, size) - warped(image, change, mode, size))
        # OpenCV rounds positions to a 32nd of a pixel: up to 255 / 64 levels where the picture meets black.
        assert errors.max() <= 6
        assert errors.mean() < 0.5


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_quarter_turns_are_exact(turns: int) -> None:
    image = picture(64, 64)
    slot = changed(image, change_of(radians=turns * math.pi / 2), size=64)
    assert np.array_equal(slot, np.rot90(image, turns))


def test_a_crop_shows_its_part_larger() -> None:
    image = picture(64, 64)
    slot = changed(image, change_of(side=0.5, left=0.25, top=0.5), size=64)
    part = image[32:64, 16:48].astype(float)
    pairs = slot.reshape(32, 2, 32, 2, 3).mean(axis=(1, 3))
    # The mean of the two by two pixels that one became: it itself, and an eighth of the difference to its neighbours.
    assert np.abs(pairs[:-1] - part[:-1]).max() < 8
    assert np.abs(pairs[:-1] - part[:-1]).mean() < 1.5


def test_a_small_slot_shows_no_aliases() -> None:
    fine = np.where(np.indices((224, 224)).sum(axis=0) % 2, 255, 0).astype(np.uint8)[..., None].repeat(3, axis=2)
    for change in draw(Augmentation(brightness=0, contrast=0), keys_of(5), still=False):
        for mode in MODES:
            assert changed(fine, change, mode, 64)[8:-8, 8:-8].std() < 12, "black and white squares become grey"


@given(brightness=st.floats(0, 2), contrast=st.floats(0, 2), saturation=st.floats(0, 2), seed=st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=50)
def test_colours_change_as_in_the_plain_way(brightness: float, contrast: float, saturation: float, seed: int) -> None:
    image = picture(40, 64, seed)
    change = change_of(brightness=brightness, contrast=contrast, saturation=saturation)
    slot = changed(image, change, size=64)
    assert np.abs(slot[12:52] - coloured(image, brightness, contrast, saturation)).max() <= 1.5
    assert not slot[:12].any(), "bars stay black"
    assert not slot[52:].any(), "bars stay black"


def test_colours_of_moved_pictures_change_as_those_of_still_ones() -> None:
    image = picture(64, 64)
    colours = {"brightness": 1.2, "contrast": 0.7, "saturation": 1.4}
    moved = changed(image, change_of(radians=math.pi / 2, **colours), size=64)
    assert np.array_equal(moved, np.rot90(changed(image, change_of(**colours), size=64)))


def test_saturation_keeps_greys_and_contrast_the_mean() -> None:
    matrix = colour_matrix(100.0, 1.0, 1.0, 0.3)
    assert matrix @ [50, 50, 50, 1] == pytest.approx([50, 50, 50], abs=1e-3)
    matrix = colour_matrix(100.0, 1.0, 0.3, 1.0)
    assert matrix @ [100, 100, 100, 1] == pytest.approx([100, 100, 100], abs=1e-3)
    assert matrix @ [0, 100, 200, 1] == pytest.approx([70, 100, 130], abs=1e-3)
    matrix = colour_matrix(100.0, 0.5, 1.0, 1.0)
    assert matrix @ [10, 100, 200, 1] == pytest.approx([5, 50, 100], abs=1e-3)


CONFIG = st.builds(
    Augmentation,
    crop=st.floats(0.1, 1),
    rotate_deg=st.floats(0, 180),
    brightness=st.floats(0, 1),
    contrast=st.floats(0, 1),
    saturation=st.floats(0, 1),
)


@given(config=CONFIG, keys=st.lists(WORD, min_size=1, max_size=50))
@settings(deadline=None)
def test_every_parameter_keeps_its_bounds(config: Augmentation, keys: list[int]) -> None:
    side, left, top, radians, *factors = draw(config, np.array(keys, np.uint64), still=False).T
    assert (side == config.crop).all()
    for corner in (left, top):
        assert (corner >= 0).all()
        assert (corner + side <= 1 + 1e-12).all()
    assert (np.abs(radians) <= math.radians(config.rotate_deg)).all()
    for factor, most in zip(factors, (config.brightness, config.contrast, config.saturation), strict=True):
        assert (np.abs(factor - 1) <= most + 1e-12).all()


def test_parameters_are_uniform_and_independent() -> None:
    changes = draw(Augmentation(), keys_of(20_000), still=False)
    assert (changes[:, 0] == 0.95).all()
    bounds = [(0, 0.05), (0, 0.05), (-math.pi / 36, math.pi / 36), (0.7, 1.3), (0.6, 1.4), (0.5, 1.5)]
    for values, (low, high) in zip(changes[:, 1:].T, bounds, strict=True):
        counts, _ = np.histogram(values, bins=10, range=(low, high))
        assert counts.sum() == len(changes)
        assert np.abs(counts - 2000).max() < 200, "of a uniform draw the standard deviation is 42"
    correlations = np.corrcoef(changes[:, 1:].T) - np.eye(6)
    assert np.abs(correlations).max() < 0.04, "of independent ones the standard deviation is 0.007"


@given(keys=st.lists(WORD, min_size=1, max_size=20, unique=True), data=st.data())
@settings(deadline=None)
def test_a_key_draws_the_same_alone_and_in_any_company(keys: list[int], data: st.DataObject) -> None:
    config, order = Augmentation(), data.draw(st.permutations(range(len(keys))))
    together = draw(config, np.array(keys, np.uint64), still=False)
    shuffled = draw(config, np.array([keys[at] for at in order], np.uint64), still=False)
    assert np.array_equal(shuffled, together[list(order)])
    alone = [draw(config, np.array([key], np.uint64), still=False)[0] for key in keys]
    assert np.array_equal(np.array(alone), together)
    assert len(np.unique(together, axis=0)) == len(keys)


def test_setting_one_parameter_to_zero_leaves_the_others() -> None:
    full = draw(Augmentation(), keys_of(50), still=False)
    for column, config in enumerate(
        [Augmentation(rotate_deg=0), Augmentation(brightness=0), Augmentation(contrast=0), Augmentation(saturation=0)],
        start=3,
    ):
        less = draw(config, keys_of(50), still=False)
        others = np.arange(7) != column
        assert (less[:, column] == SAME[column]).all()
        assert np.array_equal(less[:, others], full[:, others])


def test_still_views_change_their_colours_only() -> None:
    still = np.arange(60) % 2 == 0
    moving, mixed = draw(Augmentation(), keys_of(60), still=False), draw(Augmentation(), keys_of(60), still=still)
    assert np.array_equal(mixed[~still], moving[~still])
    assert np.array_equal(mixed[still, :4], np.tile(SAME[:4], (30, 1)))
    assert np.array_equal(mixed[:, 4:], moving[:, 4:])
    image = picture(168, 224)
    no_colour = change_of(**dict(zip(PARAMETERS[:4], mixed[0, :4].tolist(), strict=True)))
    plain = np.zeros((224, 224, 3), np.uint8)
    fit(image, plain, "pad")
    assert np.array_equal(changed(image, no_colour), plain)


def test_views_on_the_arm_are_still() -> None:
    names = ["cam_left_wrist", "Wrist", "robot0_eye_in_hand_image", "observation.images.hand_right"]
    assert all(is_still(Augmentation(), name) for name in names)
    assert not any(is_still(Augmentation(), name) for name in ("top", "exterior_image_1_left", "base_0_rgb"))
    assert is_still(Augmentation(still_views=("gripper",)), "gripper_cam")
    assert not is_still(Augmentation(still_views=()), "wrist")


def test_another_process_draws_the_same() -> None:
    code = (
        "import numpy as np\nfrom train.augment import *\n"
        "print(draw(Augmentation(), np.array([7, 2**63], np.uint64), still=False).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    here = draw(Augmentation(), np.array([7, 2**63], np.uint64), still=False)
    assert done.stdout.strip() == str(here.tolist())
    # Of this very release: other numbers change what a resumed training sees, without a word.
    assert here[0].round(6).tolist() == [0.95, 0.016081, 0.042517, 0.061043, 0.751053, 0.628618, 1.041701]


def test_a_key_gives_the_same_picture_in_any_order_and_thread() -> None:
    files = [encode_jpeg(picture(*SIZES[seed % len(SIZES)], seed=seed)) for seed in range(60)]
    changes = draw(Augmentation(), keys_of(60), still=np.arange(60) % 3 == 0)

    def slot_of(number: int) -> bytes:
        slot = np.full((112, 112, 3), number, np.uint8)
        augment_into(files[number], changes[number], slot, MODES[number % 3])
        return slot.tobytes()

    alone = [slot_of(number) for number in range(60)]
    order = np.random.default_rng(0).permutation(60).tolist()
    with ThreadPoolExecutor(4) as pool:
        threaded = dict(zip(order, pool.map(slot_of, order), strict=True))
    assert [threaded[number] for number in range(60)] == alone


def test_other_keys_give_other_pictures() -> None:
    image = picture(168, 224)
    pictures = {changed(image, change).tobytes() for change in draw(Augmentation(), keys_of(30), still=False)}
    assert len(pictures) == 30


def test_the_given_picture_is_left_as_it_was() -> None:
    image = picture(168, 224)
    before = image.copy()
    for change in draw(Augmentation(), keys_of(4), still=np.arange(4) < 2):
        for mode in MODES:
            changed(image, change, mode)
    assert np.array_equal(image, before)


def test_a_jpeg_is_changed_as_its_picture_is() -> None:
    data = encode_jpeg(picture(168, 224))
    for change in draw(Augmentation(), keys_of(4), still=np.arange(4) < 2):
        slot = np.full((224, 224, 3), 5, np.uint8)
        augment_into(data, change, slot, "pad")
        assert np.array_equal(slot, changed(decode_jpeg(data), change))


def test_a_cut_jpeg_and_a_wrong_slot_are_errors() -> None:
    data, slot = encode_jpeg(picture(168, 224)), np.zeros((224, 224, 3), np.uint8)
    for change in (SAME, draw(Augmentation(), keys_of(1), still=False)[0]):
        for bad in (b"", b"no jpeg", data[:-2], data[: len(data) // 2]):
            with pytest.raises(ValueError, match=r"(?i)jpe?g"):
                augment_into(bad, change, slot, "pad")
        with pytest.raises(ValueError, match="a slot must be"):
            augment_into(data, change, slot[:, :100], "pad")
        with pytest.raises(ValueError, match="no image geometry 'fill'"):
            augment_into(data, change, slot, "fill")  # type: ignore[arg-type]
    fit_into(data, slot, "pad")


@pytest.mark.parametrize(
    "wrong", [{"crop": 1.1}, {"crop": -0.1}, {"rotate_deg": -1}, {"brightness": 2}, {"contrast": math.nan}]
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"augmentation: {next(iter(wrong))} is .*; it must lie between 0 and"):
        Augmentation(**wrong)
