"""Safetensors files, read or written a piece at a time.

The safetensors library writes only dictionaries that are whole in memory, in an order of its own, and it reads through
a memory map, whose pages count as resident. So neither can a checkpoint larger than memory be written with it, nor can
a file be given back byte by byte. The format is small: 8 bytes with the length of a header, the header, which is JSON
with the place of each tensor, then the tensors, without gaps. All numbers are little-endian, as is the machine.

Source: the format's description in the README of huggingface/safetensors.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

import torch

from lake.errors import CheckpointError

DTYPES = {
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F32": torch.float32,
    "U32": torch.uint32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What a file calls a dtype, in the order in which the library writes tensors."""

FLOATS = tuple(name for name, dtype in DTYPES.items() if dtype.is_floating_point and name != "F8_E8M0")
"""Those between which numbers are rounded. F8_E8M0 has neither zero nor negative numbers."""

MAX_HEADER_BYTES = 100_000_000
"""A longer header is taken for damage, as the library does."""

PIECE_BYTES = 4 << 20
"""What is read, converted or written at a time."""

_LISTED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One tensor, as a header describes it."""

    dtype: str
    """A key of ``DTYPES``."""
    shape: tuple[int, ...]
    start: int
    """Of its bytes, counted from the end of the header."""
    end: int

    @property
    def num_elements(self) -> int:
        """Return how many numbers it has."""
        return math.prod(self.shape)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Header:
    """What a file holds, and where."""

    raw: bytes
    """As it is in the file, with its padding but without the 8 bytes of its length."""
    tensors: Mapping[str, Entry]
    """In the order of their bytes."""
    metadata: Mapping[str, str]

    @property
    def data_bytes(self) -> int:
        """Return the size of all tensors."""
        return max((entry.end for entry in self.tensors.values()), default=0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TensorFile:
    """A file whose header was read and found to be sound."""

    path: Path
    header: Header

    def read(self, name: str, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return a tensor, or its rows from ``start`` to before ``stop`` [stop - start, ...].

        Raises:
            ValueError: no such tensor, or no such rows.
            CheckpointError: the file became shorter since it was opened.
        """
        shape = self._entry(name).shape
        if stop is None and not start:
            return self.read_flat(name).view(shape)
        stop = shape[0] if stop is None and shape else stop
        if stop is None or not shape or not 0 <= start <= stop <= shape[0]:
            raise ValueError(f"{name} of {self.path} has the shape {list(shape)}; it has no rows {start} to {stop}")
        row = math.prod(shape[1:])
        return self.read_flat(name, start=start * row, stop=stop * row).view(stop - start, *shape[1:])

    def read_flat(self, name: str, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return the numbers of a tensor from ``start`` to before ``stop``, whatever its shape [stop - start].

        Raises:
            ValueError: no such tensor, or not as many numbers.
            CheckpointError: the file became shorter since it was opened.
        """
        entry = self._entry(name)
        stop = entry.num_elements if stop is None else stop
        if not 0 <= start <= stop <= entry.num_elements:
            raise ValueError(f"{name} of {self.path} has {entry.num_elements} numbers; it has none {start} to {stop}")
        flat = torch.empty(stop - start, dtype=DTYPES[entry.dtype], device="cpu")
        left = _memory_of(flat)
        with self.path.open("rb", buffering=0) as file:
            file.seek(8 + len(self.header.raw) + entry.start + start * flat.itemsize)
            while left:
                got = file.readinto(left)
                if not got:
                    raise CheckpointError(f"{self.path} ends within {name}; it was changed while it was read")
                left = left[got:]
        return flat

    def _entry(self, name: str) -> Entry:
        if name not in self.header.tensors:
            raise ValueError(f"{self.path} has no tensor {name!r}; it has {listed(list(self.header.tensors))}")
        return self.header.tensors[name]


class TensorWriter(AbstractContextManager["TensorWriter"]):
    """Writes a file whose header is known, and gives it its name when the last tensor is on disk.

    Tensors may come in any order, each once. Where the block is left by an error nothing remains.

    Args:
        path: of the file; one that is there is replaced at the end.
        header: without the 8 bytes of its length, as ``make_header`` returns it or as another file has it.

    Raises:
        CheckpointError: an unsound header.
        ValueError: when the block ends, tensors that were not written.
    """

    def __init__(self, path: Path, header: bytes) -> None:
        self.header = parse_header(header, where=str(path))
        self._path = path
        self._partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
        self._file: FileIO | None = None
        self._left = dict(self.header.tensors)

    def __enter__(self) -> Self:
        self._file = FileIO(self._partial, "xb")
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, from any device; floating numbers are rounded to the dtype of the header.

        Raises:
            ValueError: no such tensor is left to write, it has another shape, its dtype is not rounded, or it has
                numbers beyond the header's dtype.
        """
        entry = self._left.get(name)
        if entry is None:
            raise ValueError(f"{name} is not to be written to {self._path}, or was already; {len(self._left)} are left")
        dtype = DTYPES[entry.dtype]
        is_rounded = entry.dtype in FLOATS and tensor.dtype.is_floating_point
        if tuple(tensor.shape) != entry.shape or not (is_rounded or tensor.dtype == dtype):
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}, and {self._path} is to hold "
                f"{entry.dtype} {list(entry.shape)}; give it so"
            )
        at = 8 + len(self.header.raw) + entry.start
        for piece in tensor.detach().reshape(-1).split(max(1, PIECE_BYTES // tensor.itemsize)):
            memory = _memory_of(self._rounded(name, piece.cpu(), dtype))
            self._put(at, memory)
            at += len(memory)
        del self._left[name]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        try:
            if kind is None:
                if self._left:
                    raise ValueError(f"{self._path} lacks {listed(list(self._left))}; write each tensor")
                # Last, as an error on entering the block would leave what was begun.
                self._put(0, memoryview(len(self.header.raw).to_bytes(8, "little") + self.header.raw))
                os.fsync(self._file.fileno())
                self._partial.replace(self._path)
                sync_folder(self._path.parent)
        finally:
            self._file.close()
            self._partial.unlink(missing_ok=True)

    def _rounded(self, name: str, piece: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        rounded = piece.to(dtype).contiguous()
        if piece.dtype != dtype and _have_lost(piece, rounded):
            raise ValueError(f"{name} has numbers that {dtype} cannot hold; write {self._path} with a wider dtype")
        return rounded

    def _put(self, at: int, memory: memoryview) -> None:
        assert self._file is not None
        self._file.seek(at)
        while memory:
            memory = memory[self._file.write(memory) :]


def open_tensors(path: Path, *, problems: list[str] | None = None) -> TensorFile:
    """Return a file of which the header, its size and the places of its tensors are sound.

    Args:
        problems: takes what is wrong with single tensors, which otherwise is an error.

    Raises:
        CheckpointError: there is no such file, or it is damaged.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}; give that of a checkpoint")
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            raise CheckpointError(
                f"{path} of {size} bytes has a header of {length}, which are more than it has, more than "
                f"{MAX_HEADER_BYTES}, or none; it is no safetensors file, or was cut off"
            )
        raw = file.read(length)
    found: list[str] = []
    header = parse_header(raw, where=str(path), problems=None if problems is None else found)
    extent = 8 + length + header.data_bytes
    if size < extent:
        cut = next(name for name, entry in header.tensors.items() if 8 + length + entry.end > size)
        raise CheckpointError(f"{path} was cut off in {cut}: it has {size} of {extent} bytes; get it again")
    # Where a tensor's place is not known, it may be there.
    if size > extent and not found:
        raise CheckpointError(f"{path} has {size - extent} bytes behind its last tensor; get it again")
    if problems is not None:
        problems += found
    return TensorFile(path=path, header=header)


def parse_header(raw: bytes, *, where: str, problems: list[str] | None = None) -> Header:
    """Return what a header says.

    Args:
        raw: without the 8 bytes of its length.
        where: it is from, for messages.
        problems: takes what is wrong with single tensors, which otherwise is an error.

    Raises:
        CheckpointError: no header, or one that cannot be true.
    """
    loaded = parse_json(raw, where=f"the header of {where}")
    metadata = loaded.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{where} has __metadata__ that does not map strings to strings; get the file again")
    found: list[str] = []
    entries: dict[str, Entry] = {}
    for name, value in loaded.items():
        entry = _entry_of(value)
        if isinstance(entry, Entry):
            entries[name] = entry
            found += _wrong_with(name, entry)
        else:
            found.append(f"{name} has {entry}")
    at = 0
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    for name, entry in ordered.items():
        if entry.start != at:
            what = "overlaps the tensor before it" if entry.start < at else "has a gap before it"
            found.append(f"{name} {what}: it begins at byte {entry.start}, and {at} was to be")
        at = max(at, entry.end)
    if problems is not None:
        problems += [f"{each} in {where}" for each in found]
    elif found:
        raise CheckpointError(f"{where} is damaged, or of a newer format: {listed(found)}; get it again")
    return Header(raw=raw, tensors=ordered, metadata=metadata)


def make_header(
    tensors: Mapping[str, tuple[str, Sequence[int]]], *, metadata: Mapping[str, str] | None = None
) -> bytes:
    """Return the header that the library would write, without the 8 bytes of its length.

    Tensors are ordered by dtype, wide ones first, then by name. Spaces make the data begin at a multiple of 8 bytes.

    Args:
        tensors: (dtype as a file calls it, shape) of each name.

    Raises:
        ValueError: no such dtype.
    """
    content: dict[str, object] = {} if metadata is None else {"__metadata__": dict(sorted(metadata.items()))}
    order = {dtype: at for at, dtype in enumerate(DTYPES)}
    at = 0
    for name, (dtype, _) in tensors.items():
        if dtype not in DTYPES:
            raise ValueError(f"{name} has the dtype {dtype!r}; there are {', '.join(DTYPES)}")
    for name, (dtype, shape) in sorted(tensors.items(), key=lambda item: (order[item[1][0]], item[0])):
        end = at + math.prod(shape) * DTYPES[dtype].itemsize
        content[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    raw = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    return raw + b" " * (-len(raw) % 8)


def parse_json(raw: bytes, *, where: str) -> dict[str, object]:
    """Return a JSON object in which no key is there twice.

    Raises:
        CheckpointError: it is none.
    """
    try:
        loaded = json.loads(raw.decode(), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not JSON in UTF-8, or has a key twice ({error}); get it again") from error
    if not isinstance(loaded, dict):
        raise CheckpointError(f"{where} is {type(loaded).__name__} and not an object of JSON; get it again")
    return loaded


def listed(names: Sequence[str]) -> str:
    """Return the first 20 of some names, and how many others there are."""
    rest = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + rest


def write_whole(path: Path, data: bytes) -> None:
    """Write a small file that appears under its name when it is on disk."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a crash."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _entry_of(value: object) -> Entry | str:
    """Return what a header says of one tensor, or what is wrong with it."""
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        return "other fields than dtype, shape and data_offsets"
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    can_be = isinstance(dtype, str) and _are_sizes(shape) and _can_be_held(shape) and _are_sizes(offsets)
    if not can_be or len(offsets) != 2:
        return f"a dtype, shape or data_offsets that cannot be: {dtype!r}, {shape!r}, {offsets!r}"[:200]
    return Entry(dtype=dtype, shape=tuple(shape), start=offsets[0], end=offsets[1])


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(each) is int and 0 <= each < 1 << 63 for each in values)


def _can_be_held(shape: list[int]) -> bool:
    # Also of a tensor without elements the other dimensions have to be such that torch can hold it.
    return len(shape) <= 64 and math.prod(max(1, each) for each in shape) < 1 << 63


def _wrong_with(name: str, entry: Entry) -> list[str]:
    if entry.dtype not in DTYPES:
        return [f"{name} has the unknown dtype {entry.dtype!r}"]
    size = entry.num_elements * DTYPES[entry.dtype].itemsize
    if entry.end - entry.start != size:
        return [f"{name} has {entry.end - entry.start} bytes, and {entry.dtype} {list(entry.shape)} needs {size}"]
    return []


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content = dict(pairs)
    if len(content) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"{name!r} is there twice")
    return content


def _have_lost(numbers: torch.Tensor, rounded: torch.Tensor) -> bool:
    """Return whether numbers were too large for the dtype they were rounded to."""
    limit = torch.finfo(rounded.dtype).max
    if torch.finfo(numbers.dtype).max <= limit:
        return False
    # torch asks nothing of 8 bits.
    numbers, rounded = (each if each.itemsize > 1 else each.float() for each in (numbers, rounded))
    # Nearly always this says enough, in a tenth of the time.
    if not numbers.numel() or max(map(abs, torch.stack(torch.aminmax(numbers)).tolist())) <= limit:
        return False
    # NaN is NaN before and after. What is too large becomes infinity, NaN or the largest number, by the dtype.
    finite = numbers.isfinite()
    return bool(((numbers.abs() > limit) & finite).any()) or not torch.equal(finite, rounded.isfinite())


def _memory_of(flat: torch.Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data
