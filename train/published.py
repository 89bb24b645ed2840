"""Published checkpoints, from which a model's parameters are read.

A published checkpoint is one safetensors file, or several with an index. Its tensors have other names than our
parameters, some are parts of one of ours, some a model does not use. A ``KeyMap`` says which is which; every tensor
has to be accounted for. ``train.model_export`` writes such checkpoints.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from lake.errors import CheckpointError
from train.tensorfile import DTYPES, FLOATS, PIECE_BYTES, Entry, Header, TensorFile, listed, open_tensors, parse_json

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""What a folder holds: one file, or an index of several."""

Problems = defaultdict[str, list[str]]
"""What is wrong with which tensors."""

Parts = Mapping[str, tuple[tuple[str, ...], ...]]
"""Of each parameter, of each of its parts: the names of the tensor in the files; those after the first are tied."""


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

    def known(self) -> set[str]:
        """Return all published names that a parameter, or a part of one, may have."""
        return {*chain(*self.parameters.values()), *chain(*self.aliases.values())}

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
        """Yield (name, tensor) of each parameter, or of some, on the CPU; each is read when it is asked for.

        Its dtype is that of the file. Where parts differ in it, it is the narrowest of F32 and F64 that holds them.

        Raises:
            ValueError: no such parameter.
            CheckpointError: a file became shorter since the checkpoint was opened.
        """
        for name in self.key_map.parameters if names is None else names:
            if name not in self.parts:
                raise ValueError(f"no parameter {name!r}; there are {listed(list(self.parts))}")
            # A name for it here would keep it in memory beside the next one.
            yield name, _whole(self, name)


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
    parts, passthrough = account(
        entries_of(file.header for file in files),
        key_map=key_map,
        layout=layout,
        # Where something is wrong it does not matter, and tensors may not be readable.
        is_tied=lambda one, other: not any(problems.values()) and _are_same((home[one], one), (home[other], other)),
        problems=problems,
        where=Path(path),
    )
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

    A model that FSDP has sharded is loaded from ``Published.read`` instead: on each rank, for one parameter after the
    other, ``distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)`` gives the
    rank's shard without communication, and ``parameter.detach().copy_`` takes it.

    Raises:
        ValueError: a parameter is sharded, or on the meta device.
        CheckpointError: a file became shorter since the checkpoint was opened.
    """
    parameters, shapes = dict(model.named_parameters()), published.key_map.parameter_shapes
    different = sorted(name for name, _ in shapes.items() ^ shapes_of(model).items())
    assert not different, f"the key map is not of this model, they differ in {listed(different)}"
    sharded = [name for name, parameter in parameters.items() if isinstance(parameter, DTensor)]
    if sharded:
        raise ValueError(f"{listed(sharded)} are sharded; load first, or copy shards of what Published.read yields")
    empty = [name for name, parameter in parameters.items() if parameter.is_meta]
    if empty:
        raise ValueError(f"{listed(empty)} are on the meta device, without memory; call the model's to_empty first")
    for name, parameter in parameters.items():
        _fill(published, name, parameter.detach())


def account(
    entries: Mapping[str, Entry],
    *,
    key_map: KeyMap,
    layout: str,
    is_tied: Callable[[str, str], bool],
    where: Path,
    problems: Problems | None = None,
) -> tuple[Parts, tuple[str, ...]]:
    """Return (where parameters are stored, names that are not used) of a checkpoint's tensors.

    Args:
        is_tied: whether the second of two names is tied to the first.
        where: they are, for messages.
        problems: those that are known already.

    Raises:
        CheckpointError: a tensor is missing, misshapen or not known, or there were problems already.
    """
    problems = defaultdict(list) if problems is None else problems
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
    _check(problems, where=where, layout=layout)
    return parts, tuple(left)


def check_file_name(name: object, *, where: Path) -> None:
    """Raise CheckpointError where what a file calls another one is not a name beside it."""
    # What came from elsewhere must not make us read or write outside of its folder.
    if not isinstance(name, str) or name in ("", ".", "..") or any(each in name for each in "/\\\0"):
        raise CheckpointError(f"{where} names the file {name!r}, which is not one beside it; do not trust it")


def entries_of(headers: Iterable[Header]) -> dict[str, Entry]:
    """Return the tensors of several files."""
    return dict(chain(*(header.tensors.items() for header in headers)))


def _whole(published: Published, name: str) -> torch.Tensor:
    """Return one parameter."""
    dtypes = {published.home[part[0]].header.tensors[part[0]].dtype for part in published.parts[name]}
    dtype = dtypes.pop() if len(dtypes) == 1 else "F64" if "F64" in dtypes else "F32"
    tensor = torch.empty(published.key_map.parameter_shapes[name], dtype=DTYPES[dtype], device="cpu")
    _fill(published, name, tensor)
    return tensor


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
        check_file_name(file, where=where)
    return [path / file for file in sorted(set(places.values()))], raw, places


def _layout_of(names: Iterable[str], key_map: KeyMap, *, where: Path) -> str:
    """Return the layout under which most names are known."""
    names, known = sorted(names), key_map.known()
    counts = {
        layout: sum(name.startswith(prefix) and name.removeprefix(prefix) in known for name in names)
        for layout, prefix in key_map.layouts.items()
    }
    most = max(counts.values())
    if not most:
        looked = " or ".join(f"{prefix}{min(known)} ({layout})" for layout, prefix in key_map.layouts.items())
        raise CheckpointError(
            f"{where} is a checkpoint of another model: this one's tensors have names such as {looked}, and none of "
            f"the {len(names)} there is one of them; those begin with {', '.join(names[:3])}; give one of this model"
        )
    likely = [layout for layout, count in counts.items() if count == most]
    if len(likely) > 1:
        raise CheckpointError(
            f"{where} mixes the layouts {' and '.join(likely)}, of which {most} names each are known; get it again"
        )
    return likely[0]


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
