"""Turn pictures into small RGB images, the same way for ingestion, training and serving.

Images are uint8 arrays in RGB order of shape [H, W, 3]. Both ways here, from a decoded video frame and from an RGB
image, go through one swscale call with the same flags: area averaging, because it shrinks without aliasing, and
accurate, bit-exact arithmetic, so that every processor gives the same bytes.

From a video frame this is what PyAV's own ``reformat`` with area interpolation gives, to the bit. Its shortcut from
4:2:0 to RGB is one to two and a half grey levels of 255 darker than exact arithmetic; swscale's full chroma
interpolation is exact and costs half as much time again. The fast way was taken, since it is also what other readers
of the same videos see.
"""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.reformatter import VideoReformatter


def fitted_size(width: int, height: int, longer_side: int) -> tuple[int, int]:
    """Return (width, height) in pixels, shrunk so that the longer side is at most ``longer_side``.

    The aspect is kept to the nearest pixel, nothing is enlarged, and no side falls below 1.

    Raises:
        ValueError: a side below 1.
    """
    if min(width, height, longer_side) < 1:
        raise ValueError(f"cannot fit {width} x {height} into {longer_side}: every side must be at least 1 pixel")
    longest = max(width, height)
    if longest <= longer_side:
        return width, height
    fitted = [max(1, (2 * side * longer_side + longest) // (2 * longest)) for side in (width, height)]
    return fitted[0], fitted[1]


def rgb_of_frame(frame: "VideoFrame", longer_side: int, reformatter: "VideoReformatter | None" = None) -> np.ndarray:
    """Convert a decoded video frame to RGB and shrink it, in one pass over its pixels.

    Args:
        longer_side: in pixels; the result's longer side is at most this.
        reformatter: pass the same one for the frames of one video: it keeps its tables.

    Returns:
        uint8 [H, W, 3].
    """
    from av.video.reformatter import Interpolation, VideoReformatter

    flags = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
    if frame.format.is_rgb:  # Here swscale's exact chroma is the faster way, too.
        flags |= Interpolation.FULL_CHR_H_INT | Interpolation.FULL_CHR_H_INP
    width, height = fitted_size(frame.width, frame.height, longer_side)
    scaler = VideoReformatter() if reformatter is None else reformatter
    small = scaler.reformat(frame, width, height, "rgb24", interpolation=flags, threads=1)
    return np.ascontiguousarray(small.to_ndarray())


def resize_rgb(rgb: np.ndarray, longer_side: int) -> np.ndarray:
    """Shrink an RGB image by area averaging.

    Args:
        rgb: uint8 [H, W, 3].
        longer_side: in pixels; the result's longer side is at most this.

    Returns:
        uint8 [H', W', 3]; ``rgb`` itself where it is small enough.

    Raises:
        ValueError: not such an array.
    """
    from av import VideoFrame

    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"an image must be uint8 [H, W, 3], not {rgb.dtype} {list(rgb.shape)}")
    height, width = rgb.shape[:2]
    if fitted_size(width, height, longer_side) == (width, height):
        return rgb
    return rgb_of_frame(VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24"), longer_side)


def encode_jpeg(rgb: np.ndarray, quality: int = 90) -> bytes:
    """Encode an RGB image as a JPEG file with 4:2:0 chroma.

    Args:
        rgb: uint8 [H, W, 3].
        quality: 1 to 100.

    Raises:
        ValueError: not such an array.
    """
    import simplejpeg

    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"an image must be uint8 [H, W, 3], not {rgb.dtype} {list(rgb.shape)}")
    image = np.ascontiguousarray(rgb)
    return simplejpeg.encode_jpeg(image, quality=quality, colorspace="RGB", colorsubsampling="420", fastdct=False)


def decode_jpeg(data: bytes, out: np.ndarray | None = None) -> np.ndarray:
    """Decode a JPEG file.

    Args:
        out: where to, uint8 [H, W, 3] of the file's own size; None takes new memory.

    Returns:
        uint8 [H, W, 3] in RGB order, whatever the file's colour space.

    Raises:
        ValueError: not a JPEG file, or a damaged one.
    """
    import simplejpeg

    # strict: a cut file is an error, where libjpeg alone warns and leaves the rest of the picture grey.
    return simplejpeg.decode_jpeg(data, colorspace="RGB", fastdct=False, fastupsample=False, buffer=out, strict=True)
