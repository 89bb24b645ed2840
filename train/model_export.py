"""Published checkpoints, to which a trained model's parameters are given back.

What a model does not use of a published checkpoint is kept beside its parameters, with the headers of the files, so
that an export gives the files back byte by byte where no parameter changed.
"""

import json
import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from lake.errors import CheckpointError
from train.published import INDEX, WHOLE, KeyMap, Parts, Published, account, check_file_name, entries_of
from train.tensorfile import (
    DTYPES,
    FLOATS,
    Header,
    TensorFile,
    TensorWriter,
    listed,
    make_header,
    open_tensors,
    parse_header,
    parse_json,
    sync_folder,
    write_whole,
)

VERSION = 1
"""Of ``published.json``."""

PASSTHROUGH, RECORD = "passthrough.safetensors", "published.json"
"""What is kept of a checkpoint beside its parameters."""

_Specs = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype, as a file calls it, and shape of tensors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Form:
    """How an export is written."""

    layout: str | None = None
    """One of the key map's; that of the imported checkpoint by default."""
    dtype: str | None = None
    """Of all parameters, as safetensors calls it (BF16, F32); each its own in the imported checkpoint by default, F32
    where there is none. What the model does not use keeps its dtype."""
    max_shard_bytes: int | None = None
    """Tensors are divided among files of at most so many bytes, unless a single one has more; as the imported
    checkpoint has them by default, in one file where there is none."""

    def __post_init__(self) -> None:
        """Raise ValueError where it cannot be."""
        if self.dtype not in (None, *FLOATS):
            raise ValueError(f"dtype={self.dtype!r}: give one of {', '.join(FLOATS)}")
        if self.max_shard_bytes is not None and self.max_shard_bytes < 1:
            raise ValueError(f"max_shard_bytes={self.max_shard_bytes}: give 1 or more")


AS_IMPORTED = Form()
"""The form of the imported checkpoint."""


def save_passthrough(published: Published, folder: Path) -> None:
    """Write what an export needs beside the parameters; after that the checkpoint's own files are not needed.

    Raises:
        CheckpointError: a file became shorter since the checkpoint was opened.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A record is never beside tensors of another checkpoint.
    (folder / RECORD).unlink(missing_ok=True)
    home = published.home
    entries = {name: home[name].header.tensors[name] for name in published.passthrough}
    header = make_header({name: (entry.dtype, entry.shape) for name, entry in entries.items()})
    with TensorWriter(folder / PASSTHROUGH, header) as writer:
        for name in writer.header.tensors:
            writer.write(name, home[name].read(name))
    record = {
        "version": VERSION,
        "layout": published.layout,
        "index": None if published.index is None else published.index.decode(),
        "files": {file.path.name: file.header.raw.decode() for file in published.files},
    }
    write_whole(folder / RECORD, json.dumps(record, indent=2).encode())


def export(
    tensors: Callable[[str], torch.Tensor],
    *,
    key_map: KeyMap,
    out: Path,
    passthrough: Path | None = None,
    form: Form = AS_IMPORTED,
) -> None:
    """Write a published checkpoint, which appears under its name when it is whole.

    It has the files, headers and dtypes of the imported one, but for what another form changes.

    Args:
        tensors: returns a whole parameter, of any floating dtype, on any device. It is called once for each, in the
            order of the key map, so that other ranks can follow where parameters are sharded.
        out: folder that is not there yet.
        passthrough: folder that ``save_passthrough`` wrote; None for a model that was not imported, whose checkpoint
            then lacks what the model does not use.

    Raises:
        ValueError: there is something at ``out``, no such layout, or a parameter is not what is to be written.
        CheckpointError: what was kept is damaged, or of another model.
    """
    if out.exists():
        raise ValueError(f"{out} is already there; give another folder, or delete it")
    source = _unimported(key_map, form) if passthrough is None else _imported(key_map, passthrough)
    plan = _planned(source, key_map, form)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as partial:
        whole = Path(partial) / out.name
        whole.mkdir()
        with ExitStack() as stack:
            writers: dict[str, TensorWriter] = {}
            for file, header in plan.headers.items():
                writer = stack.enter_context(TensorWriter(whole / file, header))
                writers |= dict.fromkeys(writer.header.tensors, writer)
            for parameter, parts in source.parts.items():
                value = _checked(tensors(parameter), parameter, key_map)
                _write_parts(value, [[plan.names[name] for name in part] for part in parts], writers)
            for name in source.passthrough:
                assert source.kept is not None
                writers[plan.names[name]].write(plan.names[name], source.kept.read(name))
        if plan.index is not None:
            write_whole(whole / INDEX, plan.index)
        whole.rename(out)
        sync_folder(out.parent)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Source:
    """The checkpoint that an export is made after."""

    layout: str
    index: bytes | None
    headers: Mapping[str, Header]
    """By the name of the file."""
    parts: Parts
    passthrough: tuple[str, ...] = ()
    kept: TensorFile | None = None
    """Has the tensors of ``passthrough``."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Plan:
    """What an export writes."""

    headers: Mapping[str, bytes]
    """By the name of the file."""
    index: bytes | None
    names: Mapping[str, str]
    """Of the tensors, by their names in the source."""


def _imported(key_map: KeyMap, folder: Path) -> _Source:
    """Return the checkpoint of which ``save_passthrough`` kept the rest in a folder."""
    where = folder / RECORD
    if not where.is_file():
        raise CheckpointError(f"{folder} has no {RECORD}; give the folder that save_passthrough wrote")
    record = parse_json(where.read_bytes(), where=str(where))
    version, layout, files, index = (record.get(key) for key in ("version", "layout", "files", "index"))
    if version != VERSION or not isinstance(layout, str) or layout not in key_map.layouts:
        raise CheckpointError(
            f"{where} is of the version {version!r} and the layout {layout!r}; this robolake exports version "
            f"{VERSION} and the layouts {', '.join(key_map.layouts)}; import the checkpoint again"
        )
    if not isinstance(files, dict) or not isinstance(index, str | None):
        raise CheckpointError(f"{where} does not have the headers or the index of files; import the checkpoint again")
    for file in files:
        check_file_name(file, where=where)
    headers = {file: parse_header(str(raw).encode(), where=f"{where}, {file}") for file, raw in files.items()}
    entries, kept = entries_of(headers.values()), open_tensors(folder / PASSTHROUGH)
    parts, passthrough = account(
        entries,
        key_map=key_map,
        layout=layout,
        is_tied=lambda _, other: other not in kept.header.tensors,
        where=where,
    )
    needed = {name: (entries[name].dtype, entries[name].shape) for name in passthrough}
    there = {name: (entry.dtype, entry.shape) for name, entry in kept.header.tensors.items()}
    if needed != there:
        different = sorted({name for name, _ in needed.items() ^ there.items()})
        raise CheckpointError(
            f"{kept.path} does not hold what {where} says: {listed(different)} differ; import the checkpoint again"
        )
    return _Source(
        layout=layout,
        index=None if index is None else index.encode(),
        headers=headers,
        parts=parts,
        passthrough=passthrough,
        kept=kept,
    )


def _unimported(key_map: KeyMap, form: Form) -> _Source:
    """Return a checkpoint of nothing but the parameters."""
    layout = _known(key_map, form.layout)
    prefix = key_map.layouts[layout]
    specs = {prefix + name: (form.dtype or "F32", shape) for name, shape in key_map.published_shapes().items()}
    # Hugging Face's readers want to be told the format.
    header = parse_header(make_header(specs, metadata={"format": "pt"}), where="the export")
    parts = {name: tuple((prefix + part,) for part in each) for name, each in key_map.parameters.items()}
    return _Source(layout=layout, index=None, headers={WHOLE: header}, parts=parts)


def _planned(source: _Source, key_map: KeyMap, form: Form) -> _Plan:
    """Return the source's own headers, or new ones where the form changes something."""
    old = key_map.layouts[source.layout]
    new = old if form.layout is None else key_map.layouts[_known(key_map, form.layout)]
    entries = entries_of(source.headers.values())
    names = {name: new + name.removeprefix(old) for name in entries}
    dtypes = {name: entry.dtype for name, entry in entries.items()}
    if form.dtype is not None:
        dtypes |= dict.fromkeys(chain(*chain(*source.parts.values())), form.dtype)
    if form.max_shard_bytes is None and new == old and all(entries[name].dtype == dtypes[name] for name in entries):
        raw = {file: header.raw for file, header in source.headers.items()}
        return _Plan(headers=raw, index=source.index, names=names)
    groups = {
        file: {names[name]: (dtypes[name], entry.shape) for name, entry in header.tensors.items()}
        for file, header in source.headers.items()
    }
    is_indexed = source.index is not None
    metadata = {key: value for header in source.headers.values() for key, value in header.metadata.items()}
    if form.max_shard_bytes is not None:
        groups = _divided(dict(chain(*(group.items() for group in groups.values()))), form.max_shard_bytes)
        is_indexed = len(groups) > 1
    # The library notes there which names it left out since they share memory with others.
    swaps = {old + name: new + name for name in key_map.known()}
    metadata = {swaps.get(key, key): swaps.get(value, value) for key, value in metadata.items()}
    return _Plan(
        headers={file: make_header(group, metadata=metadata or None) for file, group in groups.items()},
        index=_index_of(groups) if is_indexed else None,
        names=names,
    )


def _divided(specs: _Specs, limit: int) -> dict[str, _Specs]:
    """Return tensors by files of at most so many bytes, as Hugging Face divides and calls them.

    Source: huggingface_hub, split_torch_state_dict_into_shards.
    """
    groups: list[_Specs] = []
    begun: _Specs = {}
    size = 0
    for name, spec in specs.items():
        num_bytes = _num_bytes(spec)
        if num_bytes > limit:
            groups.append({name: spec})
            continue
        if size + num_bytes > limit:
            groups.append(begun)
            begun, size = {}, 0
        begun[name] = spec
        size += num_bytes
    groups += [begun] if begun else []
    if len(groups) == 1:
        return {WHOLE: groups[0]}
    stem = WHOLE.removesuffix(".safetensors")
    return {f"{stem}-{at:05d}-of-{len(groups):05d}.safetensors": group for at, group in enumerate(groups, 1)}


def _index_of(groups: Mapping[str, _Specs]) -> bytes:
    """Return the index of several files, as Hugging Face writes it."""
    total = sum(_num_bytes(spec) for group in groups.values() for spec in group.values())
    places = {name: file for file, group in groups.items() for name in group}
    content = {"metadata": {"total_size": total}, "weight_map": places}
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def _num_bytes(spec: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = spec
    return math.prod(shape) * DTYPES[dtype].itemsize


def _known(key_map: KeyMap, layout: str | None) -> str:
    if layout not in key_map.layouts:
        raise ValueError(f"layout={layout!r}: give one of {', '.join(key_map.layouts)}")
    return str(layout)


def _checked(value: torch.Tensor, parameter: str, key_map: KeyMap) -> torch.Tensor:
    """Return a parameter that can be written."""
    is_sharded, shape = isinstance(value, DTensor), key_map.parameter_shapes[parameter]
    if is_sharded:
        raise ValueError(f"{parameter} is sharded; give what its full_tensor returns when all ranks call it")
    if tuple(value.shape) != shape:
        raise ValueError(f"{parameter} is {list(value.shape)}, and {list(shape)} in the key map")
    return value


def _write_parts(value: torch.Tensor, parts: list[list[str]], writers: Mapping[str, TensorWriter]) -> None:
    """Write one parameter under the names of its parts."""
    flat, at = value.detach().reshape(-1), 0
    for names in parts:
        stop = at
        for name in names:
            entry = writers[name].header.tensors[name]
            stop = at + entry.num_elements
            writers[name].write(name, flat[at:stop].view(entry.shape))
        at = stop
