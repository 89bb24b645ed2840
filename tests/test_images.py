import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import simplejpeg
from hypothesis import given
from hypothesis import strategies as st

from lake.images import decode_jpeg, encode_jpeg, fitted_size, resize_rgb, rgb_of_frame

sides = st.integers(1, 5000)


def _texture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Return a smooth random RGB image of ordinary saturation, uint8 [H, W, 3]."""
    rng, cells = np.random.default_rng(seed), (height // 8 + 2, width // 8 + 2)
    coarse = rng.uniform(0, 255, (*cells, 1)) * 0.7 + rng.uniform(0, 255, (*cells, 3)) * 0.3
    rows, columns = np.arange(height) / 8, np.arange(width) / 8
    i, j = rows.astype(int), columns.astype(int)
    u, v = (rows - i)[:, None, None], (columns - j)[None, :, None]
    top = coarse[i][:, j] * (1 - v) + coarse[i][:, j + 1] * v
    bottom = coarse[i + 1][:, j] * (1 - v) + coarse[i + 1][:, j + 1] * v
    return (top * (1 - u) + bottom * u).round().astype(np.uint8)


def _video_frames(path: str, num_frames: int = 4) -> list[av.VideoFrame]:
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "18"})
        stream.width, stream.height, stream.pix_fmt = 640, 480, "yuv420p"
        for at in range(num_frames):
            image = np.roll(_texture(480, 640), 5 * at, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(path) as container:
        return list(container.decode(video=0))


def _mean_error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


@pytest.mark.parametrize(
    ("size", "longer_side", "fitted"),
    [
        ((640, 480), 224, (224, 168)),
        ((480, 640), 224, (168, 224)),
        ((1280, 720), 224, (224, 126)),
        ((224, 224), 224, (224, 224)),
        ((64, 48), 224, (64, 48)),
        ((5000, 1), 224, (224, 1)),
        ((3, 2), 2, (2, 1)),
        ((4, 3), 2, (2, 2)),
    ],
)
def test_fitted_size_of_known_sizes(size, longer_side, fitted):
    assert fitted_size(*size, longer_side) == fitted


@given(sides, sides, sides)
def test_fitted_size_keeps_the_aspect_and_never_enlarges(width, height, longer_side):
    fitted_width, fitted_height = fitted_size(width, height, longer_side)
    assert max(fitted_width, fitted_height) == min(longer_side, max(width, height))
    assert 1 <= fitted_width <= width
    assert 1 <= fitted_height <= height
    scale = max(fitted_width, fitted_height) / max(width, height)
    assert abs(fitted_width - width * scale) <= 0.5 or fitted_width == 1
    assert abs(fitted_height - height * scale) <= 0.5 or fitted_height == 1


@pytest.mark.parametrize("sides", [(0, 4, 4), (4, 0, 4), (4, 4, 0), (-1, 4, 4)])
def test_fitted_size_refuses_sides_below_one(sides):
    with pytest.raises(ValueError, match="at least 1 pixel"):
        fitted_size(*sides)


def test_resize_averages_areas():
    image = np.random.default_rng(0).integers(0, 256, (96, 128, 3), dtype=np.uint8)
    areas = image.reshape(24, 4, 32, 4, 3).mean(axis=(1, 3))
    small = resize_rgb(image, 32)
    assert small.shape == (24, 32, 3)
    assert small.dtype == np.uint8
    assert np.abs(small - areas).max() <= 1.5


@pytest.mark.parametrize("size", [(7, 5), (5, 7), (101, 33), (1, 300), (300, 1), (2, 2)])
def test_resize_takes_odd_and_tiny_sizes(size):
    image = _texture(*size)
    height, width = size
    small = resize_rgb(image, 4)
    assert small.shape[1::-1] == fitted_size(width, height, 4)


def test_resize_returns_a_small_enough_image_itself():
    image = _texture(48, 64)
    assert resize_rgb(image, 64) is image


def test_resize_takes_views_of_arrays():
    image = _texture(96, 128)
    assert np.array_equal(resize_rgb(image[:, ::-1], 32), resize_rgb(image[:, ::-1].copy(), 32))


def test_resize_gives_the_same_bytes_again():
    image = _texture(480, 640)
    assert resize_rgb(image, 224).tobytes() == resize_rgb(image.copy(), 224).tobytes()


@pytest.mark.parametrize("image", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((3, 4, 4), np.uint8)])
def test_resize_and_encode_refuse_what_is_no_image(image):
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        resize_rgb(image, 2)
    with pytest.raises(ValueError, match=r"uint8 \[H, W, 3\]"):
        encode_jpeg(image)


def test_a_video_frame_and_its_rgb_image_shrink_to_the_same_picture(tmp_path):
    for frame in _video_frames(str(tmp_path / "video.mp4")):
        fused = rgb_of_frame(frame, 224)
        by_rgb = resize_rgb(rgb_of_frame(frame, 640), 224)
        assert fused.shape == by_rgb.shape == (168, 224, 3)
        assert _mean_error(fused, by_rgb) < 3


def test_a_video_frame_shrinks_as_pyav_itself_shrinks_it(tmp_path):
    for frame in _video_frames(str(tmp_path / "video.mp4")):
        expected = frame.reformat(224, 168, format="rgb24", interpolation="AREA").to_ndarray()
        assert np.array_equal(rgb_of_frame(frame, 224), expected)


@pytest.mark.parametrize("longer_side", [640, 224])
def test_conversion_from_yuv_darkens_by_less_than_three_levels(longer_side):
    rng = np.random.default_rng(0)
    luma, blue, red = rng.integers(80, 180, (480, 640)), rng.integers(110, 146), rng.integers(110, 146)
    yuv = np.concatenate([luma.ravel(), np.full(320 * 240, blue), np.full(320 * 240, red)])
    frame = av.VideoFrame.from_ndarray(yuv.astype(np.uint8).reshape(720, 640), format="yuv420p")
    y, u, v = (luma.mean() - 16) * 255 / 219, (blue - 128) * 255 / 224, (red - 128) * 255 / 224
    expected = [y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u]  # BT.601
    darker = np.array(expected) - rgb_of_frame(frame, longer_side).mean(axis=(0, 1))
    assert (darker > -0.3).all()
    assert (darker < 3.0).all()


def test_a_shared_reformatter_changes_nothing(tmp_path):
    shared = av.video.reformatter.VideoReformatter()
    for frame in _video_frames(str(tmp_path / "video.mp4")):
        assert np.array_equal(rgb_of_frame(frame, 224, shared), rgb_of_frame(frame, 224))


def test_jpeg_comes_back_nearly_the_same():
    image = _texture(168, 224)
    data = encode_jpeg(image)
    assert simplejpeg.decode_jpeg_header(data) == (168, 224, "YCbCr", "420")
    assert decode_jpeg(data).shape == (168, 224, 3)
    assert _mean_error(decode_jpeg(data), image) < 4


def test_jpeg_keeps_red_red():
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 0] = 250
    assert np.abs(decode_jpeg(encode_jpeg(image)).astype(int) - image).max() <= 3


def test_jpeg_quality_is_ninety_unless_told():
    image = _texture(168, 224)
    assert encode_jpeg(image) == encode_jpeg(image, 90)
    assert len(encode_jpeg(image, 50)) < len(encode_jpeg(image, 90)) < len(encode_jpeg(image, 98))


def test_jpeg_of_a_view_is_that_of_its_copy():
    image = _texture(64, 64)
    assert encode_jpeg(image[::2]) == encode_jpeg(image[::2].copy())


def test_a_grey_jpeg_decodes_to_rgb():
    grey = _texture(32, 32)[..., :1].copy()
    rgb = decode_jpeg(simplejpeg.encode_jpeg(grey, colorspace="GRAY", colorsubsampling="Gray"))
    assert rgb.shape == (32, 32, 3)
    assert np.array_equal(rgb[..., 0], rgb[..., 2])


def test_a_cut_or_foreign_jpeg_is_a_value_error():
    data = encode_jpeg(_texture(64, 64))
    for bad in (b"", b"no jpeg", data[:20], data[: len(data) // 2]):
        with pytest.raises(ValueError, match=r"(?i)jpeg"):
            decode_jpeg(bad)


def test_importing_images_loads_no_codec():
    code = "import sys, lake.images; assert not {'av', 'simplejpeg', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
