"""Tests of ingest/video_writer.py."""

import os
from collections.abc import Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from ingest.video_writer import VideoJoiner, encode_video, sample_frames, scan_video, start_encoding


def moving_picture(num_frames: int, *, size: tuple[int, int] = (64, 96), phase: int = 0) -> list[np.ndarray]:
    y, x = np.mgrid[: size[0], : size[1]]
    pictures = [
        np.stack([x * 2 + n, y * 3 - n, np.full_like(x, 4 * n)], axis=-1) for n in range(phase, phase + num_frames)
    ]
    return [np.clip(np.abs(picture % 510 - 255), 0, 255).astype(np.uint8) for picture in pictures]


def encode_with_b_frames(frames: list[np.ndarray], path: Path, *, fps: int = 30) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, options={"bf": "3", "g": "12", "sc_threshold": "0"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def packets(path: Path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(video=0) if packet.dts is not None]


def decoded(path: Path) -> tuple[list[float], list[np.ndarray]]:
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return [frame.time for frame in frames], [frame.to_ndarray(format="rgb24") for frame in frames]


def remux(source: Path, dest: Path, *, skip: int = 0, shift: int = 0) -> None:
    """Copy a video without its first packets, or shown earlier by some frames."""
    with av.open(str(source)) as old, av.open(str(dest), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0], opaque=True)
        kept = [packet for packet in old.demux(video=0) if packet.dts is not None][skip:]
        for packet in kept:
            packet.stream = stream
            packet.pts -= shift * packet.duration
            packet.dts -= shift * packet.duration
            new.mux(packet)


def policies() -> set[int]:
    """Return those of this process's threads; some libraries have threads of other polite policies."""
    return {os.sched_getscheduler(int(thread.name)) for thread in Path("/proc/self/task").iterdir()}


@pytest.mark.skipif(not hasattr(os, "sched_setscheduler") or os.geteuid() != 0, reason="only root gets that priority")
def test_encoding_av1_gives_no_thread_real_time_priority(tmp_path: Path) -> None:
    seen = []

    def frames() -> Iterator[np.ndarray]:
        for frame in moving_picture(6):
            seen.append(policies())
            yield frame

    with av.open(str(tmp_path / "bare.mp4"), "w") as container:
        stream = container.add_stream("libsvtav1", rate=30, options={"svtav1-params": "lp=1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        start_encoding(container)
        assert not policies() & {os.SCHED_FIFO, os.SCHED_RR}
    encode_video(frames(), tmp_path / "v.mp4", fps=30, codec="av1")
    assert not set().union(*seen, policies()) & {os.SCHED_FIFO, os.SCHED_RR}


@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_an_encoded_video_shows_the_frames_at_their_times(tmp_path: Path, codec: str) -> None:
    frames = moving_picture(25)
    assert encode_video(iter(frames), tmp_path / "v.mp4", fps=40, codec=codec) == 25
    times, images = decoded(tmp_path / "v.mp4")
    assert times == [n / 40 for n in range(25)]
    for frame, image in zip(frames, images, strict=True):
        assert np.abs(frame.astype(int) - image).mean() < 8
    other = np.abs(frames[0].astype(int) - images[12]).mean()
    assert other > 24


@pytest.mark.parametrize("codec", ["h264", "av1"])
@pytest.mark.parametrize("gop", [1, 2, 10])
def test_decoding_can_begin_once_in_each_gop(tmp_path: Path, codec: str, gop: int) -> None:
    encode_video(moving_picture(30), tmp_path / "v.mp4", fps=30, codec=codec, gop=gop)
    video = scan_video(tmp_path / "v.mp4")
    assert video.keyframes == tuple(range(0, 30, gop))
    assert (video.codec, video.width, video.height, video.pix_fmt) == (codec, 96, 64, "yuv420p")
    assert video.num_bytes == sum(map(len, packets(tmp_path / "v.mp4")))
    assert video.delay == 0


def test_a_fractional_rate_is_kept(tmp_path: Path) -> None:
    encode_video(moving_picture(10), tmp_path / "v.mp4", fps=30000 / 1001)
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "no frames"),
        ([np.zeros((63, 64, 3), np.uint8)], "even sides"),
        ([np.zeros((64, 64, 3), np.float32)], "float32"),
        ([np.zeros((64, 64), np.uint8)], "give uint8"),
    ],
)
def test_frames_that_are_no_images_are_refused(tmp_path: Path, frames: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_video(frames, tmp_path / "v.mp4", fps=30)


def test_b_frames_are_stored_out_of_order(tmp_path: Path) -> None:
    encode_with_b_frames(moving_picture(30), tmp_path / "v.mp4")
    video = scan_video(tmp_path / "v.mp4")
    assert video.delay > 0
    assert sorted(video.order) == list(range(30)) != list(video.order)
    assert len({b - a for a, b in pairwise(video.pts)}) == 1


def test_a_video_that_does_not_begin_with_a_keyframe_is_refused(tmp_path: Path) -> None:
    encode_video(moving_picture(10), tmp_path / "v.mp4", fps=30, gop=4)
    remux(tmp_path / "v.mp4", tmp_path / "cut.mp4", skip=1)
    with pytest.raises(ValueError, match="does not begin with a keyframe"):
        scan_video(tmp_path / "cut.mp4")


def test_a_video_with_hidden_frames_is_refused(tmp_path: Path) -> None:
    encode_video(moving_picture(10), tmp_path / "v.mp4", fps=30)
    remux(tmp_path / "v.mp4", tmp_path / "trimmed.mp4", shift=3)
    assert len(decoded(tmp_path / "trimmed.mp4")[0]) == 7
    with pytest.raises(ValueError, match="hides frames"):
        scan_video(tmp_path / "trimmed.mp4")


def test_a_file_that_is_no_video_is_refused(tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(av.error.InvalidDataError):
        scan_video(tmp_path / "v.mp4")


@pytest.mark.parametrize("kind", ["h264", "av1", "b-frames"])
def test_joined_videos_have_the_packets_and_pictures_of_their_parts(tmp_path: Path, kind: str) -> None:
    parts = [tmp_path / f"{n}.mp4" for n in range(3)]
    for n, part in enumerate(parts):
        frames = moving_picture(20 + 7 * n, phase=40 * n)
        if kind == "b-frames":
            encode_with_b_frames(frames, part)
        else:
            encode_video(frames, part, fps=30, codec=kind, gop=5)
    joiner = VideoJoiner(tmp_path / "all.mp4", fps=30)
    starts = [joiner.append(scan_video(part)) for part in parts]
    joiner.close()
    assert starts == [0, 20, 47]
    assert packets(tmp_path / "all.mp4") == [packet for part in parts for packet in packets(part)]
    times, images = decoded(tmp_path / "all.mp4")
    assert times == pytest.approx([n / 30 for n in range(81)], abs=1e-12)
    assert np.array_equal(images, [image for part in parts for image in decoded(part)[1]])


def test_joined_frames_get_exact_times_whatever_clock_their_files_have(tmp_path: Path) -> None:
    encode_video(moving_picture(10), tmp_path / "a.mp4", fps=30)
    remux(tmp_path / "a.mp4", tmp_path / "b.mkv")  # Matroska counts whole milliseconds.
    assert decoded(tmp_path / "b.mkv")[0][:3] == [0, 0.033, 0.067]
    joiner = VideoJoiner(tmp_path / "all.mp4", fps=30)
    for name in ("b.mkv", "a.mp4", "b.mkv"):
        joiner.append(scan_video(tmp_path / name))
    joiner.close()
    with av.open(str(tmp_path / "all.mp4")) as container:
        assert container.streams.video[0].average_rate == 30
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert times == [Fraction(n, 30) for n in range(30)]


@pytest.mark.parametrize("change", [{"codec": "av1"}, {"size": (96, 64)}])
def test_videos_of_other_parameters_cannot_follow(tmp_path: Path, change: dict) -> None:
    encode_video(moving_picture(5), tmp_path / "a.mp4", fps=30)
    encode_video(
        moving_picture(5, size=change.get("size", (64, 96))),
        tmp_path / "b.mp4",
        fps=30,
        codec=change.get("codec", "h264"),
    )
    joiner = VideoJoiner(tmp_path / "all.mp4", fps=30)
    joiner.append(scan_video(tmp_path / "a.mp4"))
    other = scan_video(tmp_path / "b.mp4")
    assert not joiner.accepts(other)
    with pytest.raises(ValueError, match="differs in codec parameters"):
        joiner.append(other)
    joiner.close()
    assert len(packets(tmp_path / "all.mp4")) == 5


@pytest.mark.parametrize("gop", [1, 2, 7, 100])
def test_sampled_frames_are_those_that_were_asked_for(tmp_path: Path, gop: int) -> None:
    encode_video(moving_picture(40), tmp_path / "v.mp4", fps=30, gop=gop)
    images = decoded(tmp_path / "v.mp4")[1]
    for wanted in ([0], [39], [0, 1, 2, 13, 14, 39], [5, 6, 30], list(range(40))):
        sampled = list(sample_frames(scan_video(tmp_path / "v.mp4"), wanted))
        assert np.array_equal(sampled, [images[n] for n in wanted])


def test_sampled_frames_are_right_among_b_frames(tmp_path: Path) -> None:
    encode_with_b_frames(moving_picture(40), tmp_path / "v.mp4")
    images = decoded(tmp_path / "v.mp4")[1]
    sampled = list(sample_frames(scan_video(tmp_path / "v.mp4"), [1, 9, 25, 39]))
    assert np.array_equal(sampled, [images[n] for n in (1, 9, 25, 39)])
