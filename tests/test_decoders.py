import io
from dataclasses import replace

import av
import fsspec
import numpy as np
import pytest
from videos import ENCODERS, FPS, decode_all, make_video, reason_of, same

from ingest.decoders import CODECS, DECODERS, DEFAULT_BACKEND, backend_for
from ingest.video import Clip, decode_clip, read_clip
from lake.errors import EpisodeError
from lake.images import resize_rgb


@pytest.mark.parametrize("backend", ["torchcodec", "decord"])
@pytest.mark.parametrize(("codec", "b_frames"), [("av1", 0), ("h264", 0), ("h264", 3), ("hevc", 3), ("mpeg4", 0)])
def test_other_back_ends_give_nearly_the_same_frames(tmp_path, codec, b_frames, backend):
    pytest.importorskip(backend)
    path = make_video(tmp_path / "video.mp4", codec, num_frames=40, b_frames=b_frames)
    clip = read_clip(path, start_s=15 / FPS, end_s=31 / FPS, dest=tmp_path / "c.mp4")
    if backend == "decord" and codec in ("av1", "mpeg4"):
        with pytest.raises(ValueError, match="take pyav or torchcodec"):
            decode_clip(tmp_path / "c.mp4", clip=clip, longer_side=16, backend=backend)
        return
    images = list(decode_clip(tmp_path / "c.mp4", clip=clip, longer_side=16, backend=backend))
    expected = [resize_rgb(image, 16) for image in decode_all(path)[15:31]]
    assert len(images) == len(expected)
    assert max(np.abs(a.astype(int) - b).mean() for a, b in zip(images, expected, strict=True)) < 10
    with pytest.raises(EpisodeError, match="video-truncated"):
        list(decode_clip(tmp_path / "c.mp4", clip=replace(clip, num_frames=40), longer_side=16, backend=backend))


def test_a_file_that_is_no_video_fails_alike_on_every_back_end(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_bytes(b"no video at all, but long enough to be read")
    for backend in DECODERS:
        if backend != "pyav":
            pytest.importorskip(backend)
        images = decode_clip(path, clip=Clip("h264", 64, 48, 0, 1, 1, ""), longer_side=32, backend=backend)
        assert reason_of(list, images) == "video-undecodable"


def test_every_codec_has_a_default_back_end():
    assert set(DEFAULT_BACKEND) == set(CODECS)
    assert set(DEFAULT_BACKEND.values()) <= set(DECODERS)
    assert [backend_for(codec) for codec in CODECS] == list(DEFAULT_BACKEND.values())


def test_an_unknown_back_end_is_a_value_error(tmp_path):
    with pytest.raises(ValueError, match="there is no back end 'opencv'"):
        decode_clip(tmp_path / "video.mp4", clip=Clip("h264", 64, 48, 0, 1, 1, ""), longer_side=32, backend="opencv")


def test_a_remote_file_object_will_do(tmp_path):
    path = make_video(tmp_path / "video.mp4", "h264")
    memory = fsspec.filesystem("memory")
    memory.pipe_file("/test_video/video.mp4", path.read_bytes())
    with memory.open("/test_video/video.mp4", "rb") as file:
        assert read_clip(file) == read_clip(path)
    memory.rm("/test_video", recursive=True)


def test_an_error_of_the_store_is_not_the_episodes_fault(tmp_path):
    class Failing(io.BytesIO):
        num_left = 3

        def read(self, size=-1):
            self.num_left -= 1
            if self.num_left < 0:
                raise ConnectionResetError("the store went away")
            return super().read(size)

    file = Failing(make_video(tmp_path / "video.mp4", "mpeg4").read_bytes())
    with pytest.raises(ConnectionResetError, match="the store went away"):
        read_clip(file)


@pytest.mark.parametrize("movflags", ["faststart", "frag_keyframe", ""])
@pytest.mark.parametrize("codec", ["av1", "h264"])
def test_a_file_cut_at_any_byte_is_truncated(tmp_path, codec, movflags):
    path = make_video(tmp_path / "video.mp4", codec, container_options={"movflags": movflags} if movflags else None)
    whole = path.read_bytes()
    # Between fragments, a cut file is a shorter whole one; behind the last, only their index is lost.
    between = {at - 4 for at in range(len(whole)) if whole.startswith((b"moof", b"mfra"), at)}
    last = max(between, default=len(whole))
    # So it is within the zeros that the next fragment's length begins with: some writers leave zeros at the end.
    between |= {at + n for at in between for n in range(1, 4) if not any(whole[at : at + n])}
    cuts = {*(at + 5 for at in between), *range(1, len(whole), 61), *range(max(1, len(whole) - 40), len(whole))}
    for cut in sorted(cut for cut in cuts - between if cut < last):
        reason = reason_of(read_clip, io.BytesIO(whole[:cut]), dest=tmp_path / "c.mp4")
        assert reason == "video-truncated", cut
        assert not (tmp_path / "c.mp4").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "video-empty"),
        (b"\0", "video-truncated"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", "lfs-pointer"),
        (b"<html><body>403 Forbidden, not a video</body></html>", "video-undecodable"),
        (bytes(4096), "video-undecodable"),
        (b"\x1a\x45\xdf\xa3" + bytes(100), "video-undecodable"),
        (b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nvideo.mp4\n#EXT-X-ENDLIST\n", "video-undecodable"),
        (b"ffconcat version 1.0\nfile 'video.mp4'\n", "video-undecodable"),
        (np.random.default_rng(0).bytes(4096), "video-undecodable"),
    ],
)
def test_what_is_no_video_is_told_apart(tmp_path, content, reason):
    make_video(tmp_path / "video.mp4", "h264")
    path = tmp_path / "bad.mp4"
    path.write_bytes(content)
    assert reason_of(read_clip, path, dest=tmp_path / "c.mp4") == reason
    assert not (tmp_path / "c.mp4").exists()


def test_a_missing_file_is_the_callers_affair(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_clip(tmp_path / "missing.mp4")


def test_a_file_of_sound_only_has_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        sound = container.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(sound.encode(frame))
        container.mux(sound.encode(None))
    assert reason_of(read_clip, tmp_path / "sound.mp4") == "video-undecodable"


def test_the_codec_is_what_is_inside(tmp_path):
    for codec in ENCODERS:
        assert read_clip(make_video(tmp_path / "observation.images.h264.mp4", codec)).codec == codec


def test_vp9_decodes(tmp_path):
    path = make_video(tmp_path / "video.mp4", "vp9")
    clip = read_clip(path, start_s=13 / FPS, dest=tmp_path / "c.mp4")
    assert (clip.num_lead_frames, clip.num_frames) == (3, 7)
    assert same(decode_clip(tmp_path / "c.mp4", clip=clip, longer_side=224), decode_all(path)[13:])


@pytest.mark.parametrize("codec", ["mjpeg", "mpeg2video"])
def test_another_codec_is_unknown(tmp_path, codec):
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    path = make_video(tmp_path / "video.mp4", codec, pix_fmt=pix_fmt)
    assert reason_of(read_clip, path) == "unknown-codec"


def test_huge_frames_are_refused(tmp_path):
    path = make_video(tmp_path / "wide.mp4", "vp9", size=(16_400, 16), num_frames=1)
    assert reason_of(read_clip, path) == "video-too-large"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.width = stream.height = 8190
        container.mux(stream.encode(av.VideoFrame(8190, 8190, "yuv420p")))
        container.mux(stream.encode(None))
    assert reason_of(read_clip, path) == "video-too-large"


@pytest.mark.parametrize(("codec", "num_kept"), [*((codec, 0) for codec in ENCODERS), ("h264", 100), ("mpeg4", 100)])
def test_damaged_packets_are_undecodable(tmp_path, codec, num_kept):
    path = make_video(tmp_path / "video.mp4", codec, gop=5)
    clip = read_clip(path, dest=tmp_path / "c.mp4")
    damaged = bytearray((tmp_path / "c.mp4").read_bytes())
    with av.open(str(tmp_path / "c.mp4")) as container:
        key = [packet for packet in container.demux(video=0) if packet.is_keyframe and packet.size][1]
        damaged[key.pos + num_kept : key.pos + key.size] = bytes(key.size - num_kept)
    (tmp_path / "c.mp4").write_bytes(damaged)
    images = decode_clip(tmp_path / "c.mp4", clip=clip, longer_side=224)
    assert same([next(images) for _ in range(4)], decode_all(path)[:4])
    assert reason_of(list, images) == "video-undecodable"


def test_frames_of_another_size_than_promised_are_undecodable(tmp_path):
    clip = read_clip(make_video(tmp_path / "video.mp4", "h264"), dest=tmp_path / "c.mp4")
    wrong = replace(clip, width=128)
    assert reason_of(list, decode_clip(tmp_path / "c.mp4", clip=wrong, longer_side=224)) == "video-undecodable"


def test_fewer_frames_than_promised_is_truncated(tmp_path):
    clip = read_clip(make_video(tmp_path / "video.mp4", "h264"), dest=tmp_path / "c.mp4")
    images = decode_clip(tmp_path / "c.mp4", clip=replace(clip, num_frames=21), longer_side=224)
    assert len([next(images) for _ in range(20)]) == 20
    assert reason_of(list, images) == "video-truncated"


def test_a_stream_that_is_not_described_is_undecodable(tmp_path):
    whole = make_video(tmp_path / "video.mp4", "mpeg4").read_bytes()
    assert reason_of(read_clip, io.BytesIO(whole.replace(b"esds", b"free"))) == "video-undecodable"


def test_a_path_is_never_an_address(tmp_path, monkeypatch):
    make_video(tmp_path / "video.mp4", "h264")
    monkeypatch.chdir(tmp_path)
    for address in ("concat:video.mp4|video.mp4", "file:video.mp4", "http://127.0.0.1:9/video.mp4"):
        with pytest.raises(FileNotFoundError):
            read_clip(address)
