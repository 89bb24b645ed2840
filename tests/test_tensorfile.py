"""Tests of train/tensorfile.py; the safetensors library is the oracle in both directions."""

import json
import math
import resource
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lake.errors import CheckpointError
from train.tensorfile import (
    DTYPES,
    PIECE_BYTES,
    TensorWriter,
    listed,
    make_header,
    open_tensors,
    parse_header,
    parse_json,
    sync_folder,
    write_whole,
)

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda name: name != "__metadata__")
SPECS = st.dictionaries(NAMES, st.tuples(st.sampled_from(list(DTYPES)), SHAPES), max_size=8)
# With several keys the library's order is that of a hash table, and from none it makes a header that is no JSON.
METADATA = st.none() | st.dictionaries(NAMES, st.text(st.characters(exclude_categories=["Cs"])), min_size=1, max_size=1)


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    """Return random bytes as a tensor, with NaN and all else that there is."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * DTYPES[dtype].itemsize
    most = 2 if dtype == "BOOL" else 256
    return torch.randint(0, most, (size,), dtype=torch.uint8, generator=generator).view(DTYPES[dtype]).reshape(shape)


def tensors_of(specs: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, torch.Tensor]:
    return {name: random_tensor(*spec, seed=at) for at, (name, spec) in enumerate(specs.items())}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def write(path: Path, tensors: dict[str, torch.Tensor], header: bytes) -> None:
    with TensorWriter(path, header) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def assemble(path: Path, header: object, data: bytes = b"") -> Path:
    """Write a file with any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)
    return path


def entry(*offsets: int, dtype: str = "U8", shape: tuple[int, ...] | None = None) -> dict[str, Any]:
    shape = (offsets[1] - offsets[0],) if shape is None else shape
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@settings(deadline=None)
@given(specs=SPECS, metadata=METADATA)
def test_a_file_is_the_one_that_the_library_writes(
    specs: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    tensors = tensors_of(specs)
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "theirs")
        write(ours, tensors, make_header(specs, metadata=metadata))
        save_file(tensors, theirs, metadata)
        assert ours.read_bytes() == theirs.read_bytes()


@settings(deadline=None)
@given(specs=SPECS, metadata=METADATA)
def test_a_file_of_the_library_is_read_as_it_was_written(
    specs: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None
) -> None:
    tensors = tensors_of(specs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "theirs")
        save_file(tensors, path, metadata)
        file = open_tensors(path)
        assert file.header.metadata == (metadata or {})
        assert file.header.tensors.keys() == tensors.keys()
        for name, tensor in tensors.items():
            read = file.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert bytes_of(read) == bytes_of(tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_tensor_may_lie_in_memory_as_it_likes(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {
        "strided": torch.arange(10).to(dtype)[::3],
        "expanded": torch.ones(1, dtype=dtype).expand(3, 4),
        "transposed": torch.arange(6).to(dtype).reshape(2, 3).t(),
    }
    write(tmp_path / "file", tensors, make_header({name: ("F32", tuple(t.shape)) for name, t in tensors.items()}))
    again = load_file(tmp_path / "file")
    assert all(torch.equal(again[name], tensor.float()) for name, tensor in tensors.items())


def test_the_library_reads_what_is_written_in_any_order_under_any_header(tmp_path: Path) -> None:
    specs: dict[str, tuple[str, tuple[int, ...]]] = {"b": ("F32", (3, 2)), "a": ("BF16", (5,)), "c": ("U8", ())}
    tensors = tensors_of(specs)
    # Not as the library would: spaces, narrow dtypes first, JSON in another order than the data, no alignment.
    header = json.dumps(
        {
            "a": entry(1, 11, dtype="BF16", shape=(5,)),
            "c": entry(0, 1, shape=()),
            "b": entry(11, 35, dtype="F32", shape=(3, 2)),
            "__metadata__": {"format": "pt"},
        },
        indent=3,
    ).encode()
    write(tmp_path / "file", dict(reversed(tensors.items())), header)
    assert list(parse_header(header, where="it").tensors) == ["c", "a", "b"]
    assert (tmp_path / "file").read_bytes() == len(header).to_bytes(8, "little") + header + b"".join(
        bytes_of(tensors[name]) for name in "cab"
    )
    again = load_file(tmp_path / "file")
    assert {name: bytes_of(tensor) for name, tensor in again.items()} == {n: bytes_of(t) for n, t in tensors.items()}
    with safe_open(tmp_path / "file", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_rows_and_numbers_of_a_tensor_are_read_alone(tmp_path: Path) -> None:
    tensor = torch.arange(24.0).reshape(4, 3, 2)
    save_file({"x": tensor, "one": torch.tensor(7, dtype=torch.int16), "none": torch.zeros(0, 3)}, tmp_path / "file")
    file = open_tensors(tmp_path / "file")
    assert torch.equal(file.read("x", start=1, stop=3), tensor[1:3])
    assert torch.equal(file.read("x", start=3), tensor[3:])
    assert torch.equal(file.read("x", stop=1), tensor[:1])
    assert file.read("x", start=2, stop=2).shape == (0, 3, 2)
    assert torch.equal(file.read_flat("x", start=5, stop=11), torch.arange(5.0, 11.0))
    assert file.read("one").item() == 7
    assert file.read("none").shape == (0, 3)
    for rows in ({"start": 3, "stop": 5}, {"start": -1}, {"start": 3, "stop": 2}):
        with pytest.raises(ValueError, match=r"x of .* has the shape \[4, 3, 2\]; it has no rows"):
            file.read("x", **rows)
    with pytest.raises(ValueError, match="has no rows 0 to 1"):
        file.read("one", stop=1)
    with pytest.raises(ValueError, match=r"x of .* has 24 numbers; it has none 20 to 25"):
        file.read_flat("x", start=20, stop=25)
    with pytest.raises(ValueError, match=r"no tensor 'y'; it has .*x"):
        file.read("y")


def test_a_tensor_of_several_pieces_is_rounded_and_written_whole(tmp_path: Path) -> None:
    tensor = torch.randn(2, PIECE_BYTES // 4 + 5).t()
    assert not tensor.is_contiguous()
    write(tmp_path / "file", {"x": torch.nn.Parameter(tensor)}, make_header({"x": ("BF16", tuple(tensor.shape))}))
    assert torch.equal(load_file(tmp_path / "file")["x"], tensor.bfloat16())


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "F32"])
def test_what_a_narrower_dtype_holds_comes_back_from_a_wider_one(dtype: str, wide: torch.dtype, tmp_path: Path) -> None:
    narrow = random_tensor(dtype, (300,))
    narrow = narrow[narrow.double().isfinite()]
    write(tmp_path / "file", {"x": narrow.to(wide)}, make_header({"x": (dtype, tuple(narrow.shape))}))
    assert bytes_of(open_tensors(tmp_path / "file").read("x")) == bytes_of(narrow)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        ("F16", torch.tensor([1.0, 1e5])),
        ("F16", torch.tensor([1.0, -1e5]).bfloat16()),
        ("BF16", torch.tensor([1.0, 3.4e38])),
        ("F32", torch.tensor([1.0, 1e300], dtype=torch.float64)),
        ("F8_E4M3", torch.tensor([1.0, 1e3])),
        ("F8_E4M3", torch.tensor([1.0, torch.inf])),
        ("F8_E4M3", torch.tensor([1.0, 1e3]).to(torch.float8_e5m2)),
        ("F8_E5M2", torch.tensor([1.0, -1e5])),
        ("F8_E4M3FNUZ", torch.tensor([1.0, 300])),
    ],
)
def test_numbers_that_a_dtype_cannot_hold_are_refused(dtype: str, wide: torch.Tensor, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"x has numbers that .* cannot hold"),
        TensorWriter(tmp_path / "file", make_header({"x": (dtype, (2,))})) as writer,
    ):
        writer.write("x", wide)
    assert list(tmp_path.iterdir()) == []


def test_nan_and_infinity_are_written_as_they_are(tmp_path: Path) -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf")])
    write(tmp_path / "file", {"x": x}, make_header({"x": ("F16", (3,))}))
    assert load_file(tmp_path / "file")["x"].isnan().tolist() == [True, False, False]
    assert load_file(tmp_path / "file")["x"][1:].tolist() == [float("inf"), -float("inf")]


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(2, dtype=torch.int32), torch.zeros(1, 2)])
def test_a_tensor_that_is_not_the_one_of_the_header_is_refused(tensor: torch.Tensor, tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match=r"x is torch\..* is to hold F32 \[2\]"),
        TensorWriter(tmp_path / "file", make_header({"x": ("F32", (2,))})) as writer,
    ):
        writer.write("x", tensor)
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_another_kind_are_not_rounded(tmp_path: Path) -> None:
    for dtype, tensor in (
        ("I8", torch.zeros(2)),
        ("F8_E8M0", torch.zeros(2)),
        ("I64", torch.zeros(2, dtype=torch.int32)),
    ):
        with (
            pytest.raises(ValueError, match="is to hold"),
            TensorWriter(tmp_path / "file", make_header({"x": (dtype, (2,))})) as writer,
        ):
            writer.write("x", tensor)


def test_a_file_has_its_name_only_when_it_is_whole(tmp_path: Path) -> None:
    path, header = tmp_path / "file", make_header({"x": ("F32", (2,)), "y": ("F32", (2,))})
    path.write_bytes(b"before")
    with (
        pytest.raises(ValueError, match="file lacks y; write each tensor"),
        TensorWriter(path, header) as writer,
    ):
        writer.write("x", torch.zeros(2))
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_bytes() == b"before"
    with TensorWriter(path, header) as writer:
        for name in ("y", "x"):
            writer.write(name, torch.ones(2))
            with pytest.raises(ValueError, match=f"{name} is not to be written .*, or was already"):
                writer.write(name, torch.ones(2))
        assert path.read_bytes() == b"before"
    assert load_file(path).keys() == {"x", "y"}
    with pytest.raises(KeyboardInterrupt), TensorWriter(tmp_path / "other", header) as writer:
        raise KeyboardInterrupt
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_file_that_finds_no_room_for_its_header_leaves_nothing(tmp_path: Path) -> None:
    header = make_header({"x": ("U8", (1,))}, metadata={"long": "x" * 9000})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"), TensorWriter(tmp_path / "file", header) as writer:
            writer.write("x", torch.zeros(1, dtype=torch.uint8))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 7, 8, 20, -1, -40])
def test_a_file_that_was_cut_off_is_refused(keep: int, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    save_file({"a": torch.zeros(4), "b": torch.zeros(4)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors .*(cut off in (a|b): it has|was cut off)"):
        open_tensors(path)


def test_the_tensor_in_which_a_file_was_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.zeros(4)}, path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match=r"cut off in b: it has .* of .* bytes"):
        open_tensors(path)


def test_a_file_that_became_shorter_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    save_file({"a": torch.zeros(4)}, path)
    file = open_tensors(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="file ends within a"):
        file.read("a")


def test_a_file_with_more_bytes_or_none_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no file .*nothing"):
        open_tensors(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match="has 3 bytes behind its last tensor"):
        open_tensors(assemble(tmp_path / "more", {"x": entry(0, 4)}, b"1234567"))


def test_a_file_of_many_gigabytes_is_opened_and_read(tmp_path: Path) -> None:
    size = (5 << 30) + 4
    header = json.dumps({"x": entry(0, size), "y": entry(size, size + 2)}).encode()
    with (tmp_path / "file").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        # What was never written takes no room on disk.
        file.seek(size, 1)
        file.write(b"ab")
    opened = open_tensors(tmp_path / "file")
    assert opened.header.data_bytes == size + 2
    assert bytes(opened.read("y").tolist()) == b"ab"
    assert opened.read("x", start=size - 2).tolist() == [0, 0]


def test_a_header_longer_than_the_library_takes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)
    with pytest.raises(CheckpointError, match=r"has a header of 100000001, .* more than 100000000"):
        open_tensors(tmp_path / "file")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{'x': 1}", "is not JSON"),
        (b'{"x": "\xff"}', "is not JSON in UTF-8"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "is list and not an object"),
        (b'{"x": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0], "shape": [0]}}', "'shape' is there twice"),
        (b'{"x": {}, "y": {}, "x": {}}', "has a key twice .*'x'"),
        ({"__metadata__": {"a": 1}}, "__metadata__ that does not map strings to strings"),
        ({"__metadata__": []}, "__metadata__ that does not map strings to strings"),
        ({"x": []}, "x has other fields than"),
        ({"x": entry(0, 1) | {"more": 1}}, "x has other fields than"),
        ({"x": entry(0, 4, shape=(-2, -2))}, "x has a dtype, shape or data_offsets that cannot be"),
        ({"x": entry(0, 1) | {"shape": [True]}}, "x has a dtype, shape or"),
        ({"x": entry(0, 1) | {"shape": [1.0]}}, "x has a dtype, shape or"),
        ({"x": entry(0, 0, shape=(0, 1 << 62, 4))}, "x has a dtype, shape or"),
        ({"x": entry(0, 1) | {"data_offsets": [0, 1, 2]}}, "x has a dtype, shape or"),
        ({"x": entry(0, 1) | {"dtype": 1}}, "x has a dtype, shape or"),
        ({"x": entry(0, 1, dtype="F4")}, "x has the unknown dtype 'F4'"),
        ({"x": entry(0, 3, dtype="F32", shape=(1,))}, r"x has 3 bytes, and F32 \[1\] needs 4"),
        ({"x": entry(3, 0, shape=(3,))}, "x has -3 bytes"),
        ({"x": entry(0, 3), "y": entry(2, 4)}, "y overlaps the tensor before it: it begins at byte 2, and 3"),
        ({"x": entry(0, 3), "y": entry(4, 6)}, "y has a gap before it: it begins at byte 4, and 3"),
        ({"x": entry(1, 3)}, "x has a gap before it"),
    ],
)
def test_a_header_that_cannot_be_true_is_refused(header: object, message: str, tmp_path: Path) -> None:
    path = assemble(tmp_path / "bad.safetensors", header, b"123456")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_tensors(path)
    assert "bad.safetensors" in str(caught.value)


def test_all_that_is_wrong_with_tensors_is_named_or_handed_over(tmp_path: Path) -> None:
    header = {f"t{at:02}": entry(at, at + 1, dtype="F4") for at in range(25)} | {"fine": entry(25, 26)}
    path = assemble(tmp_path / "file", header, bytes(26))
    with pytest.raises(CheckpointError, match=r"t00 has the unknown dtype 'F4', t01 .* t19 .* and 5 more; get it"):
        open_tensors(path)
    problems: list[str] = []
    file = open_tensors(path, problems=problems)
    assert len(problems) == 25
    assert problems[3] == f"t03 has the unknown dtype 'F4' in {path}"
    assert file.read("fine").tolist() == [0]
    # The bytes behind the last tensor may be those of one whose place is not known.
    open_tensors(assemble(tmp_path / "more", {"x": entry(0, 1), "y": []}, b"12"), problems=problems)
    assert problems[25] == f"y has other fields than dtype, shape and data_offsets in {tmp_path / 'more'}"


def test_a_header_of_an_unknown_dtype_is_not_made() -> None:
    with pytest.raises(ValueError, match="x has the dtype 'F4'; there are U64"):
        make_header({"x": ("F4", (1,))})


def test_the_data_begin_at_a_multiple_of_8_bytes() -> None:
    for length in range(1, 20):
        assert len(make_header({"x" * length: ("U8", (1,))})) % 8 == 0
    assert make_header({}) == b"{}      "


def test_names_beyond_the_first_20_are_counted() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed([str(at) for at in range(21)]) == ", ".join(str(at) for at in range(20)) + " and 1 more"


def test_small_files_are_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for data in (b"before", b"after"):
        write_whole(path, data)
        assert path.read_bytes() == data
    path.unlink()
    path.mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(path, b"after")
    assert [each.name for each in tmp_path.iterdir()] == ["file"]


def test_a_folder_that_is_not_there_cannot_be_synced(tmp_path: Path) -> None:
    sync_folder(tmp_path)
    with pytest.raises(FileNotFoundError):
        sync_folder(tmp_path / "nothing")


def test_json_with_a_key_twice_is_refused() -> None:
    assert parse_json(b'{"a": {"b": 1}, "b": 2}', where="it") == {"a": {"b": 1}, "b": 2}
    with pytest.raises(CheckpointError, match=r"it is not JSON in UTF-8, or has a key twice .'b' is there twice"):
        parse_json(b'{"a": {"b": 1, "b": 1}}', where="it")
