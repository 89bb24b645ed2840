"""Sources that are refused as a whole, with a message that says why, and odd ones that are understood."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from damage import (
    EPISODES,
    INFO,
    LFS,
    LISTED,
    LISTED_V3,
    NUM_FRAMES,
    TASKS,
    TASKS_V3,
    TIMES,
    Damage,
    both,
    edit_lines,
    every_file,
    every_video,
    lines,
    make_v30,
    nothing,
    opened,
    place,
    rename,
    set_feature,
    set_info,
    text,
    with_column,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import ingest, make_v21

from ingest.files import open_files
from ingest.task import digest_episode
from jobs.ingest import Config, run
from jobs.ingest import main as ingest_main
from lake import Lake
from lake.errors import (
    EpisodeError,
    LakeTooNewError,
    SourceError,
    SourceMetadataError,
    SourceNotFoundError,
    SourceVersionError,
    StoreUnreachableError,
)


def template(key: str, value: str) -> Damage:
    return set_info(**{key: value})


Refusal = tuple[str, type[SourceError], str, Damage, tuple[str, ...]]
META = SourceMetadataError
OUT = "leads out of the source"
REFUSED_V21: list[Refusal] = [
    ("info.json of no bytes", META, r"toy: meta/info\.json is empty", text(INFO, ""), ()),
    ("info.json of blanks", META, r"meta/info\.json is empty", text(INFO, " \n\t "), ()),
    ("info.json cut", META, r"meta/info\.json is not valid JSON: .*line 1", text(INFO, '{"fps": 10,'), ()),
    ("info.json of no UTF-8", META, r"meta/info\.json is not valid JSON: 'utf-8'", text(INFO, b'{"a": "\xff"}'), ()),
    ("info.json of great depth", META, r"meta/info\.json is not valid JSON: max", text(INFO, "[" * 100_000), ()),
    ("info.json is a list", META, r"meta/info\.json holds a list, expected an object", text(INFO, "[]"), ()),
    ("info.json is null", META, r"meta/info\.json holds a NoneType", text(INFO, "null"), ()),
    ("info.json is an LFS pointer", META, r"info\.json is a Git LFS pointer; run `git lfs pull`", text(INFO, LFS), ()),
    ("no info.json", META, r"meta/info\.json is missing", lambda root: (root / INFO).unlink(), ()),
    ("no meta", META, r"meta/info\.json is missing", lambda root: shutil.rmtree(root / "meta"), ()),
    ("nothing but videos", META, r"no known format\. A LeRobot dataset has meta/info\.json", (
        lambda root: (shutil.rmtree(root / "meta"), shutil.rmtree(root / "data"))
    ), ()),
    ("no episodes.jsonl", META, r"meta/episodes\.jsonl is missing", lambda root: (root / LISTED).unlink(), ()),
    ("episodes.jsonl of no bytes", META, r"episodes\.jsonl lists no episode", text(LISTED, ""), ()),
    ("episodes.jsonl is an LFS pointer", META, r"episodes\.jsonl is a Git LFS pointer", text(LISTED, LFS), ()),
    ("episodes.jsonl breaks off", META, r"episodes\.jsonl line 2 is not valid JSON", (
        text(LISTED, '{"episode_index": 0, "length": 12}\n{"episode')
    ), ()),
    ("episodes.jsonl holds lists", META, r"episodes\.jsonl line 1 holds a list", lines(LISTED, [0, 12]), ()),
    ("episode without an index", META, "episode_index is None in {'length': 12}", lines(LISTED, {"length": 12}), ()),
    ("episode index of text", META, "episode_index is '0'", lines(LISTED, {"episode_index": "0"}), ()),
    ("episode twice", META, "lists episode 0 twice", lines(LISTED, {"episode_index": 0}, {"episode_index": 0}), ()),
    ("negative episode", META, "lists episode -1 ", lines(LISTED, {"episode_index": -1}), ()),
    ("episode beyond all numbers", META, "or too large", lines(LISTED, {"episode_index": 10**30}), ()),
    ("tasks.jsonl is not JSON", META, r"tasks\.jsonl line 1 is not valid JSON", text(TASKS, "push"), ()),
    ("task index of text", META, r"tasks\.jsonl: task_index is 'a'", lines(TASKS, {"task_index": "a"}), ()),
    ("version 1.6", SourceVersionError, r"LeRobot v1\.6 is not supported; v2\.0, v2\.1, v3\.0 are\. Convert it", (
        set_info(codebase_version="v1.6")
    ), ()),
    ("version 4.0", SourceVersionError, r"LeRobot v4\.0 is not supported", set_info(codebase_version="v4.0"), ()),
    ("no version", SourceVersionError, "is not supported", set_info(codebase_version=None), ()),
    ("version 3.0 in name only", META, "meta/episodes holds no parquet", set_info(codebase_version="v3.0"), ()),
    *((f"fps {fps}", META, f"has fps={fps!r}, expected a positive number", set_info(fps=fps), ())
      for fps in (0, -10, True, "10", None)),
    ("features is a list", META, "has no `features`", set_info(features=[]), ()),
    ("feature of text", META, "has no `features`", set_info(features={"action": "float32"}), ()),
    ("no features", META, "no action among .*--map action=FEATURE", set_info(features={}), ()),
    ("splits is a list", META, r"splits=\['train'\]", set_info(splits=["train"]), ()),
    ("chunks_size of text", META, "chunks_size='1000'", set_info(chunks_size="1000"), ()),
    ("no data_path", META, "has no data_path", set_info(data_path=None), ()),
    ("no video_path", META, "has no video_path", set_info(video_path=""), ()),
    ("data above the source", META, OUT, template("data_path", "../../etc/passwd"), ()),
    ("data beside the source", META, OUT, template("data_path", "data/../../{episode_index}.parquet"), ()),
    ("data at an absolute path", META, OUT, template("data_path", "/etc/passwd"), ()),
    ("data at an address", META, OUT, template("data_path", "http://127.0.0.1:9/{episode_index}"), ()),
    ("data with a backslash", META, OUT, template("data_path", "..\\x/{episode_index}"), ()),
    ("data with a NUL", META, OUT, template("data_path", "data\0/{episode_index}"), ()),
    ("videos above the source", META, OUT, template("video_path", "videos/../../../{video_key}/x"), ()),
    ("feature above the source", META, OUT, set_feature("../../../../x", dtype="video"), ()),
    *((f"template {value}", META, r"uses \{.*\} in a way that is not known", template("data_path", value), ())
      for value in ("{episode_index:999999999d}", "{episode_index.__class__}", "{episode_index[0]}", "{0}", "{HOME}",
                    "{episode_index!r}", "{episode_index:{file_index}}")),
    ("template left open", META, "is no path template", template("data_path", "{episode_index"), ()),
    ("view in the template of data", META, "cannot be filled: 'video_key'", template("data_path", "{video_key}"), ()),
    ("view as a number", META, "cannot be filled: ", template("video_path", "{video_key:03d}"), ()),
    ("two states", META, "both observation.state and state could be the state; say --map state=FEATURE", (
        set_feature("state", dtype="float32", shape=[3])
    ), ()),
    ("two actions", META, "both action and actions could be the action; say --map action=FEATURE", (
        set_feature("actions", dtype="float32", shape=[2])
    ), ()),
    ("single images", META, "holds single images.*--map ignore=observation.images.still", (
        set_feature("observation.images.still", dtype="image")
    ), ()),
    ("map of a feature that is not there", META, r"--map names \['qpos'\], which the source lacks; it has \['action'", (
        nothing
    ), ("state=qpos",)),
    ("map ignores a feature that is not there", META, r"--map names \['x'\]", nothing, ("ignore=x",)),
    ("map ignores the action", META, "no action among", nothing, ("ignore=action",)),
    ("two views of one name", META, r"two views have one name in .*--map view.NAME=FEATURE", (
        set_feature("observation.images.wrist", dtype="video")
    ), ("view.top=observation.images.wrist",)),
]  # fmt: skip
REFUSED_V30: list[Refusal] = [
    ("no meta/episodes", META, "meta/episodes holds no parquet", lambda r: shutil.rmtree(r / "meta/episodes"), ()),
    ("episodes of no bytes", META, r"file-000\.parquet is empty", text(LISTED_V3, ""), ()),
    ("episodes are an LFS pointer", META, r"file-000\.parquet is a Git LFS pointer", text(LISTED_V3, LFS), ()),
    ("episodes of nonsense", META, r"file-000\.parquet is damaged", text(LISTED_V3, "nonsense" * 9), ()),
    ("episodes without lengths", META, r"file-000\.parquet lacks length", (
        lambda root: pq.write_table(pq.read_table(root / LISTED_V3).drop_columns(["length"]), root / LISTED_V3)
    ), ()),
    ("file index of text", META, r"data/file_index holds string, expected numbers", (
        lambda root: pq.write_table(
            with_column(pq.read_table(root / LISTED_V3), "data/file_index", ["../../x"] * 3), root / LISTED_V3
        )
    ), ()),
    ("no episodes", META, "lists no episode", (
        lambda root: pq.write_table(pq.read_table(root / LISTED_V3).slice(0, 0), root / LISTED_V3)
    ), ()),
    ("episode twice", META, "lists episode 0 twice", place("episode_index", 0), ()),
    ("episode without an index", META, "without episode_index", place("episode_index", None), ()),
    ("tasks of nonsense", META, r"meta/tasks\.parquet is damaged", text(TASKS_V3, "nonsense" * 9), ()),
    ("tasks without texts", META, r"tasks\.parquet has \['x'\], expected task_index and task", (
        lambda root: pq.write_table(pa.table({"x": [1]}), root / TASKS_V3)
    ), ()),
    ("data above the source", META, OUT, template("data_path", "../../{chunk_index}"), ()),
]  # fmt: skip


def check_refused(root: Path, error: type[SourceError], says: str, feature_map: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        opened(root, *feature_map)
    assert type(caught.value) is error
    assert str(caught.value).startswith(str(root)), "a message says which source"
    assert re.search(says, str(caught.value)), caught.value


@pytest.mark.parametrize(
    ("name", "error", "says", "damage", "feature_map"), REFUSED_V21, ids=[case[0] for case in REFUSED_V21]
)
def test_a_source_of_v21_is_refused(
    tmp_path: Path, name: str, error: type[SourceError], says: str, damage: Damage, feature_map: tuple[str, ...]
) -> None:
    source = make_v21(tmp_path / "toy", EPISODES)
    damage(source)
    check_refused(source, error, says, feature_map)


@pytest.mark.parametrize(
    ("name", "error", "says", "damage", "feature_map"), REFUSED_V30, ids=[case[0] for case in REFUSED_V30]
)
def test_a_source_of_v30_is_refused(
    tmp_path: Path, name: str, error: type[SourceError], says: str, damage: Damage, feature_map: tuple[str, ...]
) -> None:
    source = make_v30(tmp_path / "toy")
    damage(source)
    check_refused(source, error, says, feature_map)


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("", "URI is empty"),
        ("/nowhere/toy", "/nowhere/toy: nothing is there"),
        ("nowhere://toy", "no file system for nowhere://"),
        ("gs://bucket/toy", "the file system for gs:// is not installed: .*gcsfs"),
    ],
)
def test_a_source_that_is_not_there_is_refused(uri: str, says: str) -> None:
    with pytest.raises(SourceNotFoundError, match=says):
        open_files(uri)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_v21(tmp_path_factory.mktemp("fuzz") / "toy", EPISODES[:1], splits={"train": "0:1"})


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=9), inner, max_size=3)),
    max_leaves=5,
)
places = st.sampled_from(
    [
        ("codebase_version",), ("robot_type",), ("fps",), ("features",), ("splits",), ("chunks_size",),
        ("data_path",), ("video_path",), ("total_episodes",), ("splits", "train"), ("features", "new"),
        *(("features", name, key) for name in ("action", "observation.state", "observation.images.top", "timestamp")
          for key in ("dtype", "shape", "names", "info", "video_info")),
    ]
)  # fmt: skip


@settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(where=places, value=json_values)
def test_whatever_stands_in_info_json_is_read_or_refused(toy: Path, where: tuple[str, ...], value: Any) -> None:
    kept = (toy / INFO).read_text()
    info = json.loads(kept)
    part = info
    for key in where[:-1]:
        part = part.setdefault(key, {})
    part[where[-1]] = value
    (toy / INFO).write_text(json.dumps(info))
    try:
        source, refs = opened(toy)
        for ref in refs:
            digest_episode(source, ref)
    except (SourceError, EpisodeError):
        pass  # Anything else fails the test.
    finally:
        (toy / INFO).write_text(kept)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"resolution": 15}, "resolution=15 is less than 16"),
        ({"max_bad_fraction": 1.5}, r"max_bad_fraction=1\.5 is not between 0 and 1"),
        ({"limit": 0}, "limit=0 takes no episode"),
        ({"map": ("stat=qpos",)}, r"--map 'stat=qpos': write state=F"),
        ({"lake": "gs://bucket/lake"}, r"a lake lives at a path, file:// or s3://, not gs://"),
        ({"lake": "s3://"}, "no bucket in 's3://'"),
        ({"lake": ""}, "URI is empty"),
    ],
)
def test_a_config_that_makes_no_sense_is_a_value_error(tmp_path: Path, config: dict[str, Any], says: str) -> None:
    source = make_v21(tmp_path / "toy", EPISODES)
    with pytest.raises(ValueError, match=says):
        run(Config(**({"source": str(source), "lake": str(tmp_path / "lake")} | config)))
    assert not (tmp_path / "lake").exists()


def test_a_lake_of_a_newer_robolake_is_left_alone(tmp_path: Path) -> None:
    source = make_v21(tmp_path / "toy", EPISODES)
    lake = Lake.create(str(tmp_path / "lake"))
    (tmp_path / "lake/lake.json").write_text('{"format_version": 99}')
    with pytest.raises(LakeTooNewError, match=r"has format 99; this robolake reads up to \d+\. Upgrade robolake"):
        ingest(source, lake.uri)


def test_the_command_line_says_what_is_wrong_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_v21(tmp_path / "toy", EPISODES, fps=0)
    monkeypatch.setattr("sys.argv", ["ingest", "--source", str(source), "--lake", str(tmp_path / "lake")])
    with pytest.raises(SystemExit) as caught:
        ingest_main()
    assert caught.value.code == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == (f"SourceMetadataError: {source}: meta/info.json has fps=0, expected a positive number\n")


@pytest.fixture
def fresh_s3(bucket: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let a test change the AWS environment: s3fs keeps clients by their arguments, not by their environment."""
    import s3fs

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    yield bucket
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "Could not connect"),
        ("AWS_SECRET_ACCESS_KEY", "wrong" * 8, "Forbidden"),
        ("AWS_ACCESS_KEY_ID", "nobody", "Forbidden|InvalidAccessKeyId"),
    ],
)
def test_a_source_whose_store_does_not_answer_is_refused(
    fresh_s3: str, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SourceNotFoundError, match=says) as caught:
        open_files(f"{fresh_s3}/toy")
    assert str(caught.value).startswith(f"{fresh_s3}/toy: ")
    assert "check the URI, the endpoint and the AWS_* environment" in str(caught.value)
    assert "wrong" not in str(caught.value), "no secret in a message"


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("AWS_ENDPOINT_URL", "http://127.0.0.1:9", "does not answer"),
        ("AWS_SECRET_ACCESS_KEY", "wrong" * 8, "access denied; check the AWS_"),
        ("AWS_ACCESS_KEY_ID", "nobody", "access denied; check the AWS_"),
    ],
)
@pytest.mark.parametrize("make", [Lake, Lake.create], ids=["open", "create"])
def test_a_lake_whose_store_does_not_answer_is_refused(
    fresh_s3: str, monkeypatch: pytest.MonkeyPatch, make: Callable[[str], Lake], variable: str, value: str, says: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(StoreUnreachableError, match=says) as caught:
        make(f"{fresh_s3}/lake")
    assert str(caught.value).startswith(f"{fresh_s3}/lake: ")
    assert "wrong" not in str(caught.value), "no secret in a message"


def test_a_bucket_that_is_not_there_is_refused(fresh_s3: str) -> None:
    with pytest.raises(SourceNotFoundError, match="s3://no-such-bucket/toy: nothing is there"):
        open_files("s3://no-such-bucket/toy")


# Metadata that is odd or wrong but understood.


TOP = "observation.images.top"
ODD: list[tuple[str, Damage, tuple[str, ...], dict[str, Any]]] = [
    ("as made", nothing, (), {"views": ["top"], "state_names": ["x", "y", "z"], "fps": 10.0, "split": "train"}),
    ("wrong codec in the metadata", set_feature(TOP, info={"video.codec": "av1"}), (), {"views": ["top"]}),
    ("another codec than the metadata says", both(set_feature(TOP, info={"video.codec": "h264"}), every_video("mpeg4")),
     (), {"views": ["top"]}),
    ("video_info in place of info", set_feature(TOP, video_info={"video.fps": 30.0}), (), {"views": ["top"]}),
    ("info that is no object", set_feature(TOP, info="h264"), (), {"views": ["top"]}),
    ("a depth map beside the view", set_feature(f"{TOP}_depth", dtype="video", info={"video.is_depth_map": True}), (),
     {"views": ["top"], "unmapped": [f"{TOP}_depth"]}),
    ("shape with the channels first", set_feature(TOP, shape=[3, 48, 64]), (), {"views": ["top"]}),
    ("nested names", set_feature("action", names={"arm": {"left": ["a"], "right": ["b"]}}), (),
     {"action_names": ["a", "b"]}),
    ("names by number", set_feature("action", names={"b": 1, "a": 0}), (), {"action_names": ["a", "b"]}),
    ("too few names", set_feature("action", names=["a"]), (), {"action_names": []}),
    ("no names", set_feature("action", names=None), (), {"action_names": []}),
    ("no shape", set_feature("action", shape=None), (), {"action_dim": 2}),
    ("templates with the keys of v3.0", set_info(
        data_path="data/chunk-{chunk_index:03d}/episode_{file_index:06d}.parquet",
        video_path="videos/chunk-{chunk_index:03d}/{video_key}/episode_{file_index:06d}.mp4",
    ), (), {"views": ["top"]}),
    ("state and actions", rename(**{"observation.state": "state", "action": "actions"}), (),
     {"state_dim": 3, "action_dim": 2}),
    ("names of its own", rename(**{"observation.state": "qpos", "action": "ctrl"}), ("state=qpos", "action=ctrl"),
     {"state_dim": 3, "action_dim": 2, "unmapped": []}),
    ("a state of two features", set_feature("observation.speed", dtype="float32", shape=[2]),
     ("state=observation.state+action",), {"state_dim": 5, "unmapped": ["observation.speed"]}),
    ("two states, and a map", both(
        set_feature("state", dtype="float32", shape=[3]),
        every_file(lambda t: t.append_column("state", t.column("observation.state"))),
    ), ("state=observation.state",), {"state_dim": 3, "unmapped": ["state"]}),
    ("two states, and one ignored", set_feature("state", dtype="float32", shape=[3]), ("ignore=state",),
     {"state_dim": 3}),
    ("single images, ignored", set_feature("observation.images.still", dtype="image"),
     ("ignore=observation.images.still",), {"views": ["top"]}),
    ("no state", both(every_file(lambda t: t.drop_columns(["observation.state"])), set_info(features={
        "action": {"dtype": "float32", "shape": [2]}, TOP: {"dtype": "video", "shape": [48, 64, 3]},
    })), (), {"state_dim": 0}),
    ("a view by another name", nothing, (f"view.front={TOP}",), {"views": ["front"]}),
    ("no view at all", nothing, (f"ignore={TOP}",), {"views": []}),
    ("no index columns", every_file(lambda t: t.drop_columns(["index", "episode_index"])), (), {"num_frames": 12}),
    ("no time column", every_file(lambda t: t.drop_columns(["timestamp"])), (), {"num_frames": 12}),
    ("neither time nor number", every_file(lambda t: t.drop_columns(["timestamp", "frame_index"])), (),
     {"num_frames": 12}),
    ("no task column", every_file(lambda t: t.drop_columns(["task_index"])), (), {"tasks": ["push the button"]}),
    ("no tasks.jsonl", lambda root: (root / TASKS).unlink(), (), {"tasks": ["push the button"]}),
    ("tasks that are no text", both(
        lambda root: (root / TASKS).unlink(),
        lambda root: edit_lines(root, LISTED, lambda records: [record.update(tasks=[5]) for record in records]),
    ), (), {"tasks": ["5"]}),
    ("time in float64 since 1970", every_file(
        lambda t: with_column(t, "timestamp", [1_700_000_000 + time for time in TIMES])
    ), (), {"num_frames": 12}),
    ("numbers of other types", every_file(
        lambda t: with_column(t, "action", pa.array([[1, 2]] * NUM_FRAMES, pa.large_list(pa.int16())))
    ), (), {"action_dim": 2}),
    ("columns in single lists", every_file(
        lambda t: with_column(with_column(t, "timestamp", [[x] for x in TIMES]), "task_index", [[0]] * NUM_FRAMES)
    ), (), {"tasks": ["push the button"]}),
    ("lengths missing", lambda root: edit_lines(root, LISTED, lambda r: [x.pop("length") for x in r]), (),
     {"num_frames": 12}),
    ("version 2.0", set_info(codebase_version="v2.0"), (), {"source_format": "lerobot-v2.0"}),
    ("version without a v", set_info(codebase_version="2.1"), (), {"source_format": "lerobot-v2.1"}),
    ("totals that are wrong", set_info(total_episodes="many", total_frames=-1), (), {"num_frames": 12}),
    ("no robot", set_info(robot_type=None), (), {"embodiment": "unknown"}),
    ("splits", set_info(splits={"train": "0:0", "val": "0:3", "odd": "x"}), (), {"split": "val"}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "oddity", "feature_map", "expected"), ODD, ids=[case[0] for case in ODD])
@pytest.mark.usefixtures("ray")
def test_odd_metadata_is_understood(
    tmp_path: Path, name: str, oddity: Damage, feature_map: tuple[str, ...], expected: dict[str, Any]
) -> None:
    source = make_v21(tmp_path / "toy", EPISODES)
    oddity(source)
    result = ingest(source, tmp_path / "lake", map=feature_map)
    lake = Lake(result["lake"])
    assert lake.quarantine().to_pylist() == []
    assert (result["committed"], result["quarantined"]) == (3, 0)
    for row in lake.release().episodes(columns=list(expected)).to_pylist():
        assert row == expected
    assert lake.release().frames().num_rows == 3 * NUM_FRAMES
    assert list(lake.verify()) == []


@pytest.mark.usefixtures("ray")
def test_what_a_video_says_of_itself_counts(tmp_path: Path) -> None:
    source = make_v21(tmp_path / "toy", EPISODES)
    both(set_feature(TOP, info={"video.codec": "h264", "video.height": 1}), every_video("mpeg4"))(source)
    release = Lake(ingest(source, tmp_path / "lake")["lake"]).release()
    uid = release.episodes(columns=["episode_uid"]).column(0)[0].as_py()
    [(video, _)] = release.open_videos(uid)
    assert (video["codec"], video["height"], video["width"], video["num_frames"]) == ("mpeg4", 48, 64, NUM_FRAMES)


@pytest.mark.usefixtures("ray")
def test_times_keep_the_precision_of_their_source(tmp_path: Path) -> None:
    source = make_v21(tmp_path / "toy", EPISODES)
    times = [1_700_000_000 + time for time in TIMES]
    every_file(lambda table: with_column(table, "timestamp", times))(source)
    release = Lake(ingest(source, tmp_path / "lake")["lake"]).release()
    uid = release.episodes(columns=["episode_uid"]).column(0)[0].as_py()
    assert release.frames(episodes=[uid], columns=["timestamp_s"]).column(0).to_pylist() == times


@pytest.mark.usefixtures("ray")
def test_a_back_end_that_cannot_decode_a_codec_is_named(tmp_path: Path) -> None:
    source = make_v21(tmp_path / "toy", EPISODES)
    every_video("mpeg4")(source)
    with pytest.raises(ValueError, match=r"^decord cannot be trusted with mpeg4; take pyav or torchcodec$"):
        ingest(source, tmp_path / "lake", backend="decord")
    assert Lake(str(tmp_path / "lake")).releases() == []
