"""The published checkpoints of a model, from which its parameters are read, or to which they are given back.

A published checkpoint is one safetensors file, or several with an index. Its tensors have other names than our
parameters, some are parts of one of ours, and some a model does not use. A ``KeyMap`` says which is which; every tensor
has to be accounted for. What the model does not use is kept beside its parameters, with the headers of the files, so
that ``export`` gives the files back byte by byte where no parameter changed.
"""

import json
import math
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path

import torch

from lake.errors import CheckpointError
from train.tensorfile import (
    DTYPES,
    FLOATS,
    PIECE_BYTES,
    Entry,
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

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""What a folder holds: one file, or an index of several."""

PASSTHROUGH, RECORD = "passthrough.safetensors", "published.json"
"""What is kept of a checkpoint beside its parameters."""

Problems = defaultdict[str, list[str]]
"""What is wrong with which tensors."""

Parts = Mapping[str, tuple[tuple[str, ...], ...]]
"""Of each parameter, of each of its parts: the names of the tensor in the files; those after the first are tied."""

Specs = dict[str, tuple[str, tuple[int, ...]]]
"""Dtype, as a file calls it, and shape of tensors."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class KeyMap:
    """What the parameters of one model are called in published checkpoints; names there are without their prefix."""

    parameters: Mapping[str, tuple[str, ...]]
    """Published names of each parameter. Several are its parts, one after the other along its rows."""
    parameter_shapes: Mapping[str, tuple[int, ...]]
    """Of each parameter, as ``shapes_of`` returns them."""
    layouts: Mapping[str, str]
    """Prefix of all published names, by the name of a layout."""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Of published tensors; those that are not named have the shape of their parameter, of which parts have equal
    shares of the rows. Another shape holds the same numbers in the same order."""
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Other names that a published tensor may have, instead or besides. What equals the tensor is tied to it, what
    differs is not used."""
    unused: tuple[str, ...] = ()
    """Patterns of published names that the model does not use, as fnmatch has them."""

    def __post_init__(self) -> None:
        """Raise ValueError where the parts contradict each other."""
        counts = Counter(chain(*self.parameters.values(), *self.aliases.values()))
        repeated = sorted(name for name, count in counts.items() if count > 1)
        unknown = sorted({*self.aliases, *self.shapes} - set(chain(*self.parameters.values())))
        if repeated or unknown:
            raise ValueError(
                f"published names are each of one parameter, or an alias, once: {listed(repeated)} "
                f"are there again; aliases and shapes are of published names: {listed(unknown)} are not"
            )
        if self.parameters.keys() != self.parameter_shapes.keys():
            different = sorted(self.parameters.keys() ^ self.parameter_shapes.keys())
            raise ValueError(f"parameters and parameter_shapes are of the same names; {listed(different)} are of one")
        if not self.layouts or len(set(self.layouts.values())) < len(self.layouts):
            raise ValueError(f"layouts={dict(self.layouts)}: give one or more, with different prefixes")
        shapes = self.published_shapes()
        for parameter, parts in self.parameters.items():
            shape, given = self.parameter_shapes[parameter], [shapes[name] for name in parts]
            row = math.prod(shape[1:])
            sizes = [math.prod(each) for each in given]
            if not row or sum(sizes) != math.prod(shape) or any(not size or size % row for size in sizes):
                raise ValueError(
                    f"{parameter} {shape} is not made of the rows of {dict(zip(parts, given, strict=True))}"
                )

    def published_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of each published tensor that parameters are made of."""
        found: dict[str, tuple[int, ...]] = {}
        for parameter, parts in self.parameters.items():
            shape = self.parameter_shapes[parameter]
            share = shape if len(parts) == 1 or not shape else (shape[0] // len(parts), *shape[1:])
            found |= {name: self.shapes.get(name, share) for name in parts}
        return found


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Published:
    """A published checkpoint in which every tensor is accounted for; the parameters are still in its files."""

    key_map: KeyMap
    layout: str
    """One of the key map's."""
    files: tuple[TensorFile, ...]
    home: Mapping[str, TensorFile]
    """File of each of their tensors."""
    index: bytes | None
    """As it is in its file; None where all tensors are in one file."""
    parts: Parts
    passthrough: tuple[str, ...]
    """Names in the files of tensors that the model does not use."""

    def read(self, names: Iterable[str] | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of each parameter, or of some, on the CPU; only one is in memory.

        Its dtype is that of the file. Where parts differ in it, it is the narrowest of F32 and F64 that holds them.

        Raises:
            ValueError: no such parameter.
            CheckpointError: a file became shorter since the checkpoint was opened.
        """
        for name in self.key_map.parameters if names is None else names:
            if name not in self.parts:
                raise ValueError(f"no parameter {name!r}; there are {listed(list(self.parts))}")
            dtypes = {self.home[part[0]].header.tensors[part[0]].dtype for part in self.parts[name]}
            dtype = dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
            tensor = torch.empty(self.key_map.parameter_shapes[name], dtype=DTYPES[dtype], device="cpu")
            _fill(self, name, tensor)
            yield name, tensor


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


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter; the model may be on the meta device."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def open_published(path: str | Path, key_map: KeyMap) -> Published:
    """Return a checkpoint in which every tensor is accounted for.

    Only headers are read, and tensors that have an alias beside them.

    Args:
        path: a safetensors file, or a folder with ``model.safetensors`` or with ``model.safetensors.index.json``.

    Raises:
        CheckpointError: it is damaged, incomplete, or of another model; all that is wrong is named.
    """
    paths, index, places = _found(Path(path))
    files: list[TensorFile] = []
    unreadable: list[str] = []
    problems: Problems = defaultdict(list)
    for each in paths:
        try:
            files.append(open_tensors(each, problems=problems["damaged"]))
        except CheckpointError as error:
            # All bad files are to be named at once.
            unreadable.append(str(error))
    if unreadable:
        raise CheckpointError("; ".join(unreadable))
    home = {name: file for file in files for name in file.header.tensors}
    if index is not None:
        there = {(name, file.path.name) for file in files for name in file.header.tensors}
        problems["in the index, not in the file"] += [f"{n} ({f})" for n, f in sorted(places.items() - there)]
        problems["in the file, not in the index"] += [f"{n} ({f})" for n, f in sorted(there - places.items())]
    layout = _layout_of(home, key_map, where=Path(path))
    parts, passthrough = _roles(
        _entries(file.header for file in files),
        key_map=key_map,
        layout=layout,
        # Where something is wrong it does not matter, and tensors may not be readable.
        is_tied=lambda one, other: not any(problems.values()) and _are_same((home[one], one), (home[other], other)),
        problems=problems,
    )
    _check(problems, where=Path(path), layout=layout)
    return Published(
        key_map=key_map,
        layout=layout,
        files=tuple(files),
        home=home,
        index=index,
        parts=parts,
        passthrough=passthrough,
    )


def load_into(model: torch.nn.Module, published: Published) -> None:
    """Copy a checkpoint into the parameters of a model, some rows at a time, whatever their dtype and device.

    Raises:
        CheckpointError: a file became shorter since the checkpoint was opened.
    """
    parameters, shapes = dict(model.named_parameters()), published.key_map.parameter_shapes
    different = sorted(name for name, _ in shapes.items() ^ shapes_of(model).items())
    assert not different, f"the key map is not of this model, they differ in {listed(different)}"
    for name, parameter in parameters.items():
        assert not parameter.is_meta, f"{name} is on the meta device; call to_empty first"
        _fill(published, name, parameter.detach())


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
        tensors: returns a parameter, of any floating dtype, on any device. It is called once for each, in the order
            of the key map.
        out: folder that is not there yet.
        passthrough: folder that ``save_passthrough`` wrote; None for a model that was not imported.

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
                value, shape = tensors(parameter), key_map.parameter_shapes[parameter]
                if tuple(value.shape) != shape:
                    raise ValueError(f"{parameter} is {list(value.shape)}, and {list(shape)} in the key map")
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
    if version != VERSION or layout not in key_map.layouts or not isinstance(files, dict):
        raise CheckpointError(
            f"{where} is of the version {version!r} and the layout {layout!r}; this robolake exports version "
            f"{VERSION} and the layouts {', '.join(key_map.layouts)}; import the checkpoint again"
        )
    for file in files:
        _check_file_name(file, where=where)
    headers = {file: parse_header(str(raw).encode(), where=f"{where}, {file}") for file, raw in files.items()}
    entries, kept = _entries(headers.values()), open_tensors(folder / PASSTHROUGH)
    problems: Problems = defaultdict(list)
    parts, passthrough = _roles(
        entries,
        key_map=key_map,
        layout=str(layout),
        is_tied=lambda _, other: other not in kept.header.tensors,
        problems=problems,
    )
    needed = {name: (entries[name].dtype, entries[name].shape) for name in passthrough}
    there = {name: (entry.dtype, entry.shape) for name, entry in kept.header.tensors.items()}
    problems[f"not so in {PASSTHROUGH}"] += sorted({name for name, _ in needed.items() ^ there.items()})
    _check(problems, where=where, layout=str(layout))
    return _Source(
        layout=str(layout),
        index=None if index is None else str(index).encode(),
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
    entries = _entries(source.headers.values())
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
    known = {*chain(*key_map.parameters.values()), *chain(*key_map.aliases.values())}
    swaps = {old + name: new + name for name in known}
    metadata = {swaps.get(key, key): swaps.get(value, value) for key, value in metadata.items()}
    return _Plan(
        headers={file: make_header(group, metadata=metadata or None) for file, group in groups.items()},
        index=_index_of(groups) if is_indexed else None,
        names=names,
    )


def _divided(specs: Specs, limit: int) -> dict[str, Specs]:
    """Return tensors by files of at most so many bytes, as Hugging Face divides and calls them."""
    groups: list[Specs] = []
    begun: Specs = {}
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


def _index_of(groups: Mapping[str, Specs]) -> bytes:
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


def _fill(published: Published, name: str, target: torch.Tensor) -> None:
    """Copy the parts of one parameter into a tensor of its shape, which need not be contiguous."""
    rows = target.unsqueeze(0) if target.ndim == 0 else target
    size = math.prod(rows.shape[1:])
    at = 0
    for stored, *_ in published.parts[name]:
        file = published.home[stored]
        entry = file.header.tensors[stored]
        num_rows = entry.num_elements // size
        step = max(1, PIECE_BYTES // (size * DTYPES[entry.dtype].itemsize))
        for start in range(0, num_rows, step):
            stop = min(num_rows, start + step)
            piece = file.read_flat(stored, start=start * size, stop=stop * size)
            rows[at + start : at + stop].copy_(piece.view(stop - start, *rows.shape[1:]))
        at += num_rows


def _found(path: Path) -> tuple[list[Path], bytes | None, dict[str, str]]:
    """Return (files, index, file of each tensor by that index) of a checkpoint."""
    if path.is_file():
        return [path], None, {}
    there = [name for name in (WHOLE, INDEX) if (path / name).is_file()]
    if len(there) != 1:
        raise CheckpointError(
            f"{path} is no file, and as a folder it is to have one of {WHOLE} and {INDEX}, and has "
            f"{'both' if there else 'neither'}; give the file, or another folder"
        )
    if there == [WHOLE]:
        return [path / WHOLE], None, {}
    where, raw = path / INDEX, (path / INDEX).read_bytes()
    places = parse_json(raw, where=str(where)).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{where} has no weight_map that says which file a tensor is in; get it again")
    for file in places.values():
        _check_file_name(file, where=where)
    return [path / file for file in sorted(set(places.values()))], raw, places


def _check_file_name(name: object, *, where: Path) -> None:
    # What came from elsewhere must not make us read or write outside of its folder.
    if not isinstance(name, str) or name in ("", ".", "..") or any(each in name for each in "/\\\0"):
        raise CheckpointError(f"{where} names the file {name!r}, which is not one beside it; do not trust it")


def _entries(headers: Iterable[Header]) -> dict[str, Entry]:
    return dict(chain(*(header.tensors.items() for header in headers)))


def _layout_of(names: Iterable[str], key_map: KeyMap, *, where: Path) -> str:
    """Return the layout under which most names are known."""
    names = list(names)
    known = {*chain(*key_map.parameters.values()), *chain(*key_map.aliases.values())}
    counts = {
        layout: sum(name.startswith(prefix) and name.removeprefix(prefix) in known for name in names)
        for layout, prefix in key_map.layouts.items()
    }
    most = max(counts.values())
    likely = [layout for layout, count in counts.items() if count == most]
    if not most or len(likely) > 1:
        looked = ", ".join(f"{prefix}{min(known)} ({layout})" for layout, prefix in key_map.layouts.items())
        raise CheckpointError(
            f"{where} is of no layout, or of several: looked for names such as {looked}, and of {len(names)} names "
            f"{counts} are known; it has {listed(sorted(names))}; give a checkpoint of this model"
        )
    return likely[0]


def _roles(
    entries: Mapping[str, Entry],
    *,
    key_map: KeyMap,
    layout: str,
    is_tied: Callable[[str, str], bool],
    problems: Problems,
) -> tuple[Parts, tuple[str, ...]]:
    """Return (where parameters are stored, names that are not used), and what is wrong."""
    prefix, shapes = key_map.layouts[layout], key_map.published_shapes()
    parts: dict[str, tuple[tuple[str, ...], ...]] = {}
    left = dict.fromkeys(entries)
    for parameter, names in key_map.parameters.items():
        stored: list[tuple[str, ...]] = []
        for name in names:
            either = [prefix + each for each in (name, *key_map.aliases.get(name, ())) if prefix + each in entries]
            if not either:
                problems["missing"].append(prefix + name)
                continue
            first = entries[either[0]]
            if first.shape != shapes[name]:
                problems["misshapen"].append(f"{either[0]} is {list(first.shape)} and not {list(shapes[name])}")
            if first.dtype in DTYPES and first.dtype not in FLOATS:
                problems["not floating"].append(f"{either[0]} is {first.dtype}")
            stored.append((either[0], *(other for other in either[1:] if is_tied(either[0], other))))
        parts[parameter] = tuple(stored)
        for name in chain(*stored):
            del left[name]
    patterns = [*chain(*key_map.aliases.values()), *key_map.unused]
    for name in left:
        plain = name.removeprefix(prefix)
        if not name.startswith(prefix) or not any(fnmatchcase(plain, pattern) for pattern in patterns):
            problems["not known"].append(name)
    return parts, tuple(left)


def _check(problems: Problems, *, where: Path, layout: str) -> None:
    found = [f"{what} ({len(each)}): {listed(each)}" for what, each in problems.items() if each]
    if found:
        raise CheckpointError(
            f"{where} is not a checkpoint of this model in the layout {layout!r}: {'; '.join(found)}; "
            "give one of this model, or the configuration that the checkpoint was made with"
        )


def _are_same(one: tuple[TensorFile, str], other: tuple[TensorFile, str]) -> bool:
    """Return whether two tensors have the same bytes."""
    (file, name), (other_file, other_name) = one, other
    entry, other_entry = file.header.tensors[name], other_file.header.tensors[other_name]
    if (entry.dtype, entry.shape) != (other_entry.dtype, other_entry.shape):
        return False
    step = PIECE_BYTES // DTYPES[entry.dtype].itemsize
    for start in range(0, entry.num_elements, step):
        stop = min(entry.num_elements, start + step)
        pieces = (f.read_flat(n, start=start, stop=stop).view(torch.uint8) for f, n in (one, other))
        if not torch.equal(*pieces):
            return False
    return True
