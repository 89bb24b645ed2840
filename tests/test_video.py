import io
import struct
import tempfile
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from math import inf, nan
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from videos import FPS, concatenate, decode_all, make_video, reason_of, same

from ingest.video import decode_clip, packets, read_clip
from lake.errors import EpisodeError

LENGTHS = (25, 12, 20)
STARTS = (0, 25, 37)
TOTAL = sum(LENGTHS)
CASES = [
    ("av1", 2, 0),
    ("av1", 250, 0),
    ("h264", 2, 0),
    ("h264", 10, 3),
    ("hevc", 10, 3),
    ("hevc", 250, 0),
    ("mpeg4", 10, 3),
    ("mpeg4", 250, 0),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def joined(request, tmp_path_factory):
    """Three episodes in files of their own, and the same in one file."""
    codec, gop, b_frames = request.param
    folder = tmp_path_factory.mktemp("joined")
    pieces = [
        make_video(folder / f"{i}.mp4", codec, num_frames=n, gop=gop, b_frames=b_frames, seed=i)
        for i, n in enumerate(LENGTHS)
    ]
    frames = [image for piece in pieces for image in decode_all(piece)]
    whole = concatenate(pieces, folder / "whole.mp4")
    return SimpleNamespace(codec=codec, pieces=pieces, whole=whole, frames=frames, dest=folder / "clip.mp4")


@pytest.fixture(scope="module")
def fragile(tmp_path_factory) -> bytes:
    return make_video(tmp_path_factory.mktemp("fragile") / "video.mp4", "h264", b_frames=3).read_bytes()


def test_a_whole_file_is_one_clip(joined):
    clip = read_clip(joined.pieces[0], dest=joined.dest)
    payloads = list(packets(joined.pieces[0]))
    assert (clip.codec, clip.width, clip.height) == (joined.codec, 64, 48)
    assert (clip.num_lead_frames, clip.num_frames) == (0, LENGTHS[0])
    assert clip.num_bytes == sum(map(len, payloads))
    assert list(packets(joined.dest)) == payloads
    assert same(decode_clip(joined.dest, clip=clip, longer_side=224), joined.frames[: LENGTHS[0]])


def test_an_episode_has_one_digest_alone_and_in_a_joined_file(joined):
    digests = set()
    for piece, start, length in zip(joined.pieces, STARTS, LENGTHS, strict=True):
        clip = read_clip(joined.whole, start_s=start / FPS, end_s=(start + length) / FPS, fps=FPS)
        assert clip.num_frames == length
        assert clip.packets_sha256 == read_clip(piece).packets_sha256
        digests.add(clip.packets_sha256)
    assert len(digests) == len(LENGTHS)


@settings(max_examples=30, deadline=None)
@given(st.tuples(st.integers(0, TOTAL), st.integers(0, TOTAL)).filter(lambda pair: pair[0] != pair[1]).map(sorted))
def test_any_slice_gives_its_own_frames(joined, pair):
    start, end = pair
    clip = read_clip(joined.whole, start_s=start / FPS, end_s=end / FPS, fps=FPS, dest=joined.dest)
    assert clip.num_frames == end - start
    assert same(decode_clip(joined.dest, clip=clip, longer_side=224), joined.frames[start:end])
    assert read_clip(joined.whole, start_s=start / FPS, end_s=end / FPS) == clip


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_slice_has_one_digest_alone_and_in_a_joined_file(joined, data):
    number = data.draw(st.integers(0, len(LENGTHS) - 1))
    start = data.draw(st.integers(0, LENGTHS[number] - 1))
    end = data.draw(st.integers(start + 1, LENGTHS[number]))
    alone = read_clip(joined.pieces[number], start_s=start / FPS, end_s=end / FPS, fps=FPS)
    first = STARTS[number]
    within = read_clip(joined.whole, start_s=(first + start) / FPS, end_s=(first + end) / FPS, fps=FPS)
    assert (within.packets_sha256, within.num_frames) == (alone.packets_sha256, end - start)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(0.01, TOTAL / FPS), min_size=1, max_size=4, unique=True).map(sorted))
def test_slices_that_adjoin_share_and_lose_no_frame(joined, cuts):
    bounds = [0.0, *cuts, None]
    counts = []
    for start_s, end_s in pairwise(bounds):
        with suppress(EpisodeError):  # No frame begins there.
            counts.append(read_clip(joined.whole, start_s=start_s, end_s=end_s, fps=FPS).num_frames)
    assert sum(counts) == TOTAL


def test_an_open_end_reaches_the_last_frame(joined):
    clip = read_clip(joined.whole, start_s=STARTS[2] / FPS, dest=joined.dest)
    assert clip.num_frames == LENGTHS[2]
    assert same(decode_clip(joined.dest, clip=clip, longer_side=224), joined.frames[STARTS[2] :])


def test_the_mp4_is_the_same_bytes_each_time_and_starts_at_zero(joined, tmp_path):
    for number in range(2):
        read_clip(joined.whole, start_s=15 / FPS, end_s=31 / FPS, dest=tmp_path / f"{number}.mp4")
    first, second = ((tmp_path / f"{number}.mp4").read_bytes() for number in range(2))
    assert first == second
    assert b"elst" not in first
    assert b"Lavf" not in first  # No version of FFmpeg.
    assert first.index(b"moov") < first.index(b"mdat")
    with av.open(io.BytesIO(first)) as container:
        stream = container.streams.video[0]
        assert stream.start_time == 0
        begin = next(container.demux(stream))
        assert begin.is_keyframe
        assert begin.pts == 0


def test_another_size_comes_from_the_stored_mp4(joined):
    clip = read_clip(joined.whole, start_s=STARTS[1] / FPS, end_s=STARTS[2] / FPS, dest=joined.dest)
    small = list(decode_clip(joined.dest, clip=clip, longer_side=32))
    assert {image.shape for image in small} == {(24, 32, 3)}
    assert {image.dtype for image in small} == {np.dtype(np.uint8)}
    assert same(small, decode_all(joined.whole, 32)[STARTS[1] : STARTS[2]])


def test_a_file_object_gives_what_its_path_gives(joined):
    expected = read_clip(joined.whole, start_s=0.5, end_s=1.0)
    with joined.whole.open("rb") as file:
        assert read_clip(file, start_s=0.5, end_s=1.0, dest=joined.dest) == expected
        assert not file.closed
    assert read_clip(str(joined.whole), start_s=0.5, end_s=1.0) == expected
    stored = io.BytesIO(joined.dest.read_bytes())
    assert same(decode_clip(stored, clip=expected, longer_side=224), joined.frames[15:30])


@pytest.mark.parametrize("codec", ["h264", "mpeg4"])
@pytest.mark.parametrize(
    ("rate", "time_base"),
    [(FPS, Fraction(1, 30)), (Fraction(30_000, 1001), Fraction(1001, 30_000)), (50, Fraction(1, 1000)), (15, None)],
)
def test_any_time_base_will_do(tmp_path, codec, rate, time_base):
    step = 1 if time_base is None else int(1 / (rate * time_base))
    path = make_video(
        tmp_path / "video.mp4",
        codec,
        b_frames=2,
        rate=Fraction(rate),
        time_base=time_base or 1 / Fraction(rate),
        times=range(0, 20 * step, step),
    )
    clip = read_clip(path, start_s=float(7 / Fraction(rate)), end_s=float(16 / Fraction(rate)), dest=tmp_path / "c.mp4")
    assert clip.num_frames == 9
    assert same(decode_clip(tmp_path / "c.mp4", clip=clip, longer_side=224), decode_all(path)[7:16])
    with av.open(str(tmp_path / "c.mp4")) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(float(rate), rel=0.02)


def test_frames_are_chosen_by_the_times_they_carry(tmp_path):
    times = [0, 1, 2, 5, 6, 7, 8, 20, 21, 22, 23, 24]
    path = make_video(tmp_path / "gaps.mp4", "h264", num_frames=len(times), times=times, gop=4)
    clip = read_clip(path, start_s=5 / FPS, end_s=22 / FPS, fps=FPS, dest=tmp_path / "c.mp4")
    assert clip.num_frames == 6
    assert same(decode_clip(tmp_path / "c.mp4", clip=clip, longer_side=224), decode_all(path)[3:9])
    for start in range(25):
        clip = read_clip(path, start_s=start / FPS, fps=FPS)
        assert clip.num_frames == sum(time >= start for time in times)


def test_several_frames_in_one_slot_are_all_taken(tmp_path):
    times = [4 * at for at in range(8)] + [32, 33, 34, 35] + [4 * at for at in range(9, 17)]
    path = make_video(
        tmp_path / "dense.mp4", "mpeg4", num_frames=len(times), times=times, gop=1, time_base=Fraction(1, 120)
    )
    for start in range(17):
        clip = read_clip(path, start_s=start / FPS, fps=FPS)
        assert clip.num_frames == sum(time >= 4 * start - 2 for time in times)


def test_sound_is_left_out(tmp_path):
    path = make_video(tmp_path / "loud.mp4", "h264", audio=True)
    clip = read_clip(path, dest=tmp_path / "c.mp4")
    with av.open(str(path)) as container:
        assert len(container.streams) == 2
        assert list(packets(tmp_path / "c.mp4")) == [
            bytes(packet) for packet in container.demux(video=0) if packet.size
        ]
    with av.open(str(tmp_path / "c.mp4")) as container:
        assert [stream.type for stream in container.streams] == ["video"]
    assert same(decode_clip(tmp_path / "c.mp4", clip=clip, longer_side=224), decode_all(path))


def test_frames_cut_by_an_edit_list_only_lead_in(tmp_path):
    path = make_video(tmp_path / "video.mp4", "h264", gop=250)
    with av.open(str(path)) as source, av.open(str(tmp_path / "cut.mp4"), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0], opaque=True)
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                shift = int(5 / FPS / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                output.mux(packet)
    clip = read_clip(tmp_path / "cut.mp4", dest=tmp_path / "c.mp4")
    assert (clip.num_lead_frames, clip.num_frames) == (5, 15)
    assert same(decode_clip(tmp_path / "c.mp4", clip=clip, longer_side=224), decode_all(path)[5:])


def test_a_late_episode_of_a_long_file_is_found_without_reading_the_file(tmp_path):
    path = make_video(tmp_path / "long.mp4", "mpeg4", num_frames=300, gop=50, size=(320, 240), options={"b": "40M"})

    class Counting(io.FileIO):
        num_read = 0

        def read(self, size=-1):
            data = super().read(size)
            self.num_read += len(data)
            return data

    assert path.stat().st_size > 2 << 20
    num_read = set()
    for start_s in (250 / FPS, 8.333333, 8.333334):
        with Counting(path) as file:
            clip = read_clip(file, start_s=start_s, end_s=260 / FPS)
            assert (clip.num_lead_frames, clip.num_frames) == (0, 10)
            num_read.add(file.num_read)
    assert len(num_read) == 1
    assert max(num_read) < path.stat().st_size // 3


def test_a_file_that_begins_off_a_keyframe_is_undecodable(tmp_path):
    path = make_video(tmp_path / "video.mp4", "mpeg4", gop=10)
    with av.open(str(path)) as source, av.open(str(tmp_path / "late.mp4"), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0], opaque=True)
        for number, packet in enumerate(source.demux(source.streams.video[0])):
            if number and packet.size:
                packet.stream = stream
                output.mux(packet)
    assert reason_of(read_clip, tmp_path / "late.mp4", start_s=5 / FPS) == "video-undecodable"
    assert reason_of(read_clip, tmp_path / "late.mp4") == "video-undecodable"
    clip = read_clip(tmp_path / "late.mp4", start_s=9 / FPS, dest=tmp_path / "c.mp4")
    assert same(decode_clip(tmp_path / "c.mp4", clip=clip, longer_side=224), decode_all(path)[10:])


def test_a_file_cut_inside_an_open_gop_is_undecodable_as_a_whole(tmp_path):
    path = make_video(tmp_path / "video.mp4", "mpeg4", gop=10, b_frames=3)
    with (
        av.open(str(path)) as source,
        av.open(str(tmp_path / "late.mp4"), "w", container_options={"use_editlist": "0"}) as output,
    ):
        stream = output.add_stream_from_template(source.streams.video[0], opaque=True)
        keys = 0
        for packet in source.demux(source.streams.video[0]):
            keys += packet.is_keyframe
            if keys > 1 and packet.size:
                packet.stream = stream
                output.mux(packet)
    assert reason_of(read_clip, tmp_path / "late.mp4") == "video-undecodable"
    clip = read_clip(tmp_path / "late.mp4", start_s=1 / FPS, dest=tmp_path / "c.mp4")
    assert (clip.num_lead_frames, clip.num_frames) == (1, 7)
    assert same(decode_clip(tmp_path / "c.mp4", clip=clip, longer_side=224), decode_all(path)[13:])


@pytest.mark.parametrize(
    ("box", "at", "value", "reason"),
    [
        (b"stco", 12, 1 << 30, "video-truncated"),  # where the frames are: behind the end
        (b"stsz", 92, 1 << 20, "video-truncated"),  # how long the last one is: longer than the file
        (b"stsz", 36, 1 << 29, "video-truncated"),
        (b"stts", 16, 0, "video-undecodable"),  # ticks from one to the next
        (b"stts", 16, 1 << 30, "video-undecodable"),
        (b"ctts", 24, (1 << 31) - 1, "video-undecodable"),  # ticks that one is shown later: FFmpeg would abort
        (b"VideoHandler", 0, 0xFFFEFDFC, None),  # no UTF-8
    ],
)
def test_an_index_that_lies_is_found_out(tmp_path, box, at, value, reason):
    path = make_video(tmp_path / "video.mp4", "h264", b_frames=3)
    whole = bytearray(path.read_bytes())
    begin = whole.index(box) + at
    whole[begin : begin + 4] = value.to_bytes(4, "big")
    for dest in (None, tmp_path / "c.mp4"):
        if reason is None:
            assert read_clip(io.BytesIO(whole), dest=dest) == read_clip(path)
        else:
            assert reason_of(read_clip, io.BytesIO(whole), dest=dest) == reason
            assert not (tmp_path / "c.mp4").exists()


@pytest.mark.parametrize("position", [-3, 1000])
def test_a_last_stretch_that_lies_behind_the_end_is_truncated(tmp_path, position):
    whole = make_video(tmp_path / "video.mp4", "h264", num_frames=40, audio=True).read_bytes()
    stco = whole.index(b"stco")
    last = stco + 8 + 4 * int.from_bytes(whole[stco + 8 : stco + 12], "big")
    moved = whole[:last] + (len(whole) + position).to_bytes(4, "big") + whole[last + 4 :]
    assert reason_of(read_clip, io.BytesIO(moved)) == "video-truncated"
    assert read_clip(io.BytesIO(moved), end_s=0.5).num_frames == 15


def test_a_frame_that_lasts_for_days_is_undecodable(tmp_path):
    whole = bytearray(make_video(tmp_path / "video.mp4", "h264", num_frames=1).read_bytes())
    begin = whole.index(b"stts") + 16
    whole[begin : begin + 4] = (1 << 30).to_bytes(4, "big")
    assert reason_of(read_clip, io.BytesIO(whole), dest=tmp_path / "c.mp4") == "video-undecodable"


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_damaged_index_never_leads_to_another_error(fragile, data):
    whole = bytearray(fragile)
    first = whole.index(b"moov")
    for _ in range(data.draw(st.integers(1, 3))):
        begin = data.draw(st.integers(first, len(whole) - 4))
        whole[begin : begin + 4] = data.draw(st.integers(0, (1 << 32) - 1)).to_bytes(4, "big")
    with suppress(EpisodeError), tempfile.TemporaryDirectory() as folder:
        dest = Path(folder) / "c.mp4"
        clip = read_clip(io.BytesIO(whole), start_s=0.2, dest=dest)
        assert sum(1 for _ in decode_clip(dest, clip=clip, longer_side=32)) == clip.num_frames


def test_frames_hidden_in_the_middle_are_undecodable(tmp_path):
    whole = make_video(tmp_path / "video.mp4", "h264", gop=250).read_bytes()
    for box in (b"moov", b"trak", b"edts", b"elst"):  # The index is the last box, so nothing else moves.
        at = whole.index(box) - 4
        whole = whole[:at] + (int.from_bytes(whole[at : at + 4], "big") + 12).to_bytes(4, "big") + whole[at + 4 :]
    at = whole.index(b"elst") + 8
    edits = struct.pack(">IIiIIiI", 2, 167, 0, 1 << 16, 333, 10 * 512, 1 << 16)  # 5 frames, and 10 from the 10th on
    path = tmp_path / "hole.mp4"
    path.write_bytes(whole[:at] + edits + whole[at + 16 :])
    assert reason_of(read_clip, path) == "video-undecodable"


def test_an_endless_lead_in_is_refused(tmp_path, monkeypatch):
    path = make_video(tmp_path / "video.mp4", "mpeg4", num_frames=60, gop=60)
    assert read_clip(path, start_s=1.5).num_lead_frames == 45
    monkeypatch.setattr("ingest.video.MAX_HELD_BYTES", 10_000)
    assert reason_of(read_clip, path, start_s=1.5) == "video-too-large"
    assert reason_of(read_clip, path, start_s=100.0) == "video-too-large"  # Found out before the whole is held.
    assert read_clip(path).num_frames == 60


def test_unwanted_frames_without_end_are_refused(tmp_path, monkeypatch):
    path = make_video(tmp_path / "video.mp4", "mpeg4", num_frames=60, gop=60, options={"b": "40M"})
    with av.open(str(path)) as source, av.open(str(tmp_path / "late.mp4"), "w") as output:
        stream = output.add_stream_from_template(source.streams.video[0], opaque=True)
        for number, packet in enumerate(source.demux(source.streams.video[0])):
            if packet.size:
                packet.stream = stream
                packet.pts += (number >= 5) * int(2 / packet.time_base)
                output.mux(packet)
    assert read_clip(tmp_path / "late.mp4", end_s=1.0).num_frames == 5
    sizes = [len(payload) for payload in packets(path)]
    assert sum(sizes[5:29]) > 3 * sizes[0]
    monkeypatch.setattr("ingest.video.MAX_HELD_BYTES", 3 * sizes[0])
    assert reason_of(read_clip, tmp_path / "late.mp4", end_s=1.0) == "video-too-large"


def test_a_fragmented_file_will_do_without_its_index(tmp_path):
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    path = make_video(tmp_path / "video.mp4", "h264", num_frames=60, gop=10, b_frames=3, container_options=options)
    path.write_bytes(path.read_bytes()[: path.read_bytes().index(b"mfra") - 4])
    for start, end in ((0, 13), (27, 45), (50, 60)):
        clip = read_clip(path, start_s=start / FPS, end_s=end / FPS, dest=tmp_path / "c.mp4")
        assert same(decode_clip(tmp_path / "c.mp4", clip=clip, longer_side=224), decode_all(path)[start:end])


def test_a_gap_of_hours_between_fragments_is_undecodable(tmp_path):
    options = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
    whole = bytearray(make_video(tmp_path / "video.mp4", "mpeg4", gop=10, container_options=options).read_bytes())
    begin = whole.index(b"tfdt", whole.index(b"tfdt") + 4) + 8
    whole[begin : begin + 8] = (1 << 40).to_bytes(8, "big")
    assert reason_of(read_clip, io.BytesIO(whole), dest=tmp_path / "c.mp4") == "video-undecodable"


def test_a_stretch_behind_the_end_is_truncated(tmp_path):
    path = make_video(tmp_path / "video.mp4", "h264")
    assert reason_of(read_clip, path, start_s=2.0, end_s=3.0, dest=tmp_path / "c.mp4") == "video-truncated"
    assert not (tmp_path / "c.mp4").exists()
    assert reason_of(read_clip, path, start_s=1e300) == "video-truncated"
    assert read_clip(path, start_s=0.5, end_s=3.0).num_frames == 5


@pytest.mark.parametrize(("start_s", "end_s"), [(1, 1), (1, 0.5), (-0.1, 1), (nan, 1), (0, inf)])
def test_an_empty_stretch_is_a_value_error(tmp_path, start_s, end_s):
    with pytest.raises(ValueError, match="give 0 <= start_s < end_s"):
        read_clip(tmp_path / "video.mp4", start_s=start_s, end_s=end_s)


@pytest.mark.parametrize("fps", [0, -30, nan, inf])
def test_an_impossible_frame_rate_is_a_value_error(tmp_path, fps):
    with pytest.raises(ValueError, match="give a positive number"):
        read_clip(tmp_path / "video.mp4", end_s=1.0, fps=fps)
