"""Checkpoints that tests make, as the libraries write them, of a toy model or of any tensors."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from train.model_export import export, save_passthrough
from train.published import INDEX, WHOLE, KeyMap, load_into, open_published

Tensors = dict[str, torch.Tensor]

TOY = KeyMap(
    parameters={"embed": ("e",), "qkv": ("q", "k", "v"), "patch": ("p",), "up": ("gate", "up"), "scale": ("s",)},
    parameter_shapes={"embed": (6, 4), "qkv": (8, 4), "patch": (4, 12), "up": (6, 2), "scale": ()},
    shapes={"q": (4, 4), "k": (2, 4), "v": (2, 4), "p": (4, 3, 2, 2), "s": (1, 1)},
    aliases={"e": ("head", "other_head")},
    unused=("unused.*",),
    layouts={"plain": "", "wrapped": "model."},
)


class Toy(torch.nn.Module):
    """Has parameters of some shapes."""

    def __init__(self, key_map: KeyMap, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, shape in key_map.parameter_shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.full(shape, torch.nan, dtype=dtype)))


def without(named: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in named.items() if name not in names}


def write_one(folder: Path, tensors: Tensors, prefix: str = "", metadata: dict[str, str] | None = None) -> Path:
    folder.mkdir(parents=True)
    save_file({prefix + name: t.contiguous() for name, t in tensors.items()}, folder / WHOLE, metadata)
    return folder


def write_sharded(folder: Path, tensors: Tensors, prefix: str = "") -> Path:
    """Write two files that take turns, with the index as Hugging Face writes it."""
    folder.mkdir(parents=True)
    places = {prefix + name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({n: tensors[n.removeprefix(prefix)] for n, f in places.items() if f == file}, folder / file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    content = {"metadata": {"total_size": total, "made_by": "somebody"}, "weight_map": places}
    (folder / INDEX).write_text(json.dumps(content, indent=4) + "\n\n")
    return folder


def toy_tensors(dtype: torch.dtype = torch.float32) -> Tensors:
    """Return a checkpoint of TOY in which all numbers differ."""
    counts = iter(range(1, 1000))
    shapes = TOY.published_shapes() | {"unused.x": (3,)}
    return {
        name: torch.tensor([next(counts) for _ in range(torch.Size(shape).numel())]).reshape(shape).to(dtype)
        for name, shape in shapes.items()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded(path: Path, key_map: KeyMap, kept: Path | None = None, model: torch.nn.Module | None = None) -> Tensors:
    """Return the parameters of a model that a checkpoint was loaded into."""
    published = open_published(path, key_map)
    model = Toy(key_map) if model is None else model
    load_into(model, published)
    if kept is not None:
        save_passthrough(published, kept)
    return dict(model.named_parameters())


def check_round_trip(path: Path, key_map: KeyMap, model: torch.nn.Module | None = None) -> Tensors:
    """Import a checkpoint, delete it, export it again byte by byte, and return the parameters."""
    kept, out = path.parent / "kept", path.parent / "out"
    parameters = loaded(path, key_map, kept, model)
    before = contents(path)
    shutil.rmtree(path)
    export(parameters.__getitem__, key_map=key_map, out=out, passthrough=kept)
    after = contents(out)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == []
    return parameters
