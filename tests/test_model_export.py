"""Tests of train/model_export.py on checkpoints of a toy model."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import (
    TOY,
    check_round_trip,
    contents,
    loaded,
    toy_tensors,
    without,
    write_one,
    write_sharded,
)
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from support import ROOT

from lake.errors import CheckpointError
from train.model_export import PASSTHROUGH, RECORD, Form, export, save_passthrough
from train.published import INDEX, WHOLE, open_published
from train.tensorfile import TensorWriter


def test_a_file_under_another_name_with_a_header_of_another_writer_comes_back(tmp_path: Path) -> None:
    tensors, at, header = toy_tensors(torch.bfloat16), 0, {}
    for name, tensor in reversed(tensors.items()):
        header[name] = {"data_offsets": [at, at + tensor.nbytes], "shape": list(tensor.shape), "dtype": "BF16"}
        at += tensor.nbytes
    header["__metadata__"] = {"by": "h\u00e4nd", "at": "home"}
    (tmp_path / "in").mkdir()
    with TensorWriter(tmp_path / "in" / "pi.safetensors", (json.dumps(header, indent=1) + "  ").encode()) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)
    before = contents(tmp_path / "in")
    parameters = loaded(tmp_path / "in" / "pi.safetensors", TOY, tmp_path / "kept")
    export(parameters.__getitem__, key_map=TOY, out=tmp_path / "out", passthrough=tmp_path / "kept")
    assert contents(tmp_path / "out") == before


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_tensors_of_any_dtypes_in_any_files_come_back(data: st.DataObject) -> None:
    floats = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
    tensors = {name: tensor.to(data.draw(floats)) for name, tensor in toy_tensors().items()}
    head = data.draw(st.sampled_from([{}, {"head": tensors["e"].clone()}, {"head": tensors["e"].half() + 1}]))
    tensors = dict(data.draw(st.permutations(list((tensors | head).items()))))
    prefix = data.draw(st.sampled_from(["", "model."]))
    with tempfile.TemporaryDirectory() as folder:
        write = data.draw(st.sampled_from([write_one, write_sharded]))
        check_round_trip(write(Path(folder, "published"), tensors, prefix), TOY)


@pytest.mark.parametrize(
    ("names", "embed", "rest"),
    [
        ({"e": 0.0}, 0.0, []),
        ({"head": 1.0}, 1.0, []),
        ({"other_head": 1.0}, 1.0, []),
        ({"e": 0.0, "head": 0.0, "other_head": 0.0}, 0.0, []),
        ({"e": 0.0, "head": -0.0, "other_head": 0.0}, 0.0, ["head"]),
        ({"e": 0.0, "head": 1.0, "other_head": 1.0}, 0.0, ["head", "other_head"]),
        ({"head": 1.0, "other_head": 2.0}, 1.0, ["other_head"]),
    ],
)
def test_a_tied_tensor_is_found_under_either_name(
    names: dict[str, float], embed: float, rest: list[str], tmp_path: Path
) -> None:
    tensors = without(toy_tensors(), "e") | {name: torch.full((6, 4), value) for name, value in names.items()}
    path = write_one(tmp_path / "in", tensors)
    assert sorted(open_published(path, TOY).passthrough) == [*rest, "unused.x"]
    parameters = loaded(path, TOY, tmp_path / "kept")
    assert (parameters["embed"] == embed).all()
    # What is tied follows the parameter, what is not stays.
    parameters["embed"] = torch.full((6, 4), 5.0)
    export(parameters.__getitem__, key_map=TOY, out=tmp_path / "out", passthrough=tmp_path / "kept")
    exported = load_file(tmp_path / "out" / WHOLE)
    assert {name: exported[name][0, 0].item() for name in names} == {
        n: v if n in rest else 5.0 for n, v in names.items()
    }


def test_what_is_kept_again_is_kept_anew(tmp_path: Path) -> None:
    first = open_published(write_sharded(tmp_path / "first", toy_tensors(), "model."), TOY)
    other = open_published(write_one(tmp_path / "other", toy_tensors() | {"unused.y": torch.ones(2).half()}), TOY)
    for published in (first, other):
        save_passthrough(published, tmp_path / "deep" / "kept")
    assert sorted(each.name for each in (tmp_path / "deep" / "kept").iterdir()) == [PASSTHROUGH, RECORD]
    kept = load_file(tmp_path / "deep" / "kept" / PASSTHROUGH)
    assert {name: tensor.dtype for name, tensor in kept.items()} == {
        "unused.x": torch.float32,
        "unused.y": torch.float16,
    }
    record = json.loads((tmp_path / "deep" / "kept" / RECORD).read_text())
    assert (record["layout"], record["index"], list(record["files"])) == ("plain", None, [WHOLE])


def test_a_changed_parameter_changes_only_its_own_bytes(tmp_path: Path) -> None:
    path = write_sharded(tmp_path / "in", toy_tensors(torch.bfloat16))
    parameters = loaded(path, TOY, tmp_path / "kept")
    parameters["qkv"] = parameters["qkv"].detach().clone()
    parameters["qkv"][4:6] += 100.3
    calls: list[str] = []
    export(
        lambda name: calls.append(name) or parameters[name],
        key_map=TOY,
        out=tmp_path / "out",
        passthrough=tmp_path / "kept",
    )
    assert calls == list(TOY.parameters)
    before, after = (load_file(f / "model-00001-of-00002.safetensors") for f in (path, tmp_path / "out"))
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["k"]
    assert torch.equal(after["k"], (before["k"].float() + 100.3).bfloat16())
    untouched = "model-00002-of-00002.safetensors"
    assert (path / untouched).read_bytes() == (tmp_path / "out" / untouched).read_bytes()


@pytest.mark.parametrize("write", [write_one, write_sharded])
def test_a_checkpoint_is_exported_in_another_layout(write: Callable[..., Path], tmp_path: Path) -> None:
    tensors = toy_tensors() | {"head": toy_tensors()["e"], "other_head": torch.zeros(1)}
    theirs = write(tmp_path / "theirs", tensors, "model.")
    parameters = loaded(write(tmp_path / "in", tensors), TOY, tmp_path / "kept")
    export(
        parameters.__getitem__,
        key_map=TOY,
        out=tmp_path / "out",
        passthrough=tmp_path / "kept",
        form=Form(layout="wrapped"),
    )
    published = open_published(tmp_path / "out", TOY)
    assert (published.layout, sorted(published.passthrough)) == ("wrapped", ["model.other_head", "model.unused.x"])
    for file in theirs.glob("*.safetensors"):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()
    if published.index is not None:
        before, after = json.loads((theirs / INDEX).read_text()), json.loads(published.index)
        assert after["weight_map"] == before["weight_map"]
        assert after["metadata"]["total_size"] == before["metadata"]["total_size"]


def test_the_names_of_shared_tensors_in_the_metadata_get_the_other_prefix(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name, tensor in toy_tensors().items():
                if "." not in name:
                    self.register_parameter(name, torch.nn.Parameter(tensor))
            self.head = self.e

    (tmp_path / "in").mkdir()
    save_model(Tied(), str(tmp_path / "in" / WHOLE), metadata={"format": "pt"})
    parameters = loaded(tmp_path / "in", TOY, tmp_path / "kept")
    export(
        parameters.__getitem__,
        key_map=TOY,
        out=tmp_path / "out",
        passthrough=tmp_path / "kept",
        form=Form(layout="wrapped"),
    )
    with safe_open(tmp_path / "in" / WHOLE, "pt") as before, safe_open(tmp_path / "out" / WHOLE, "pt") as after:
        assert before.metadata() == {"format": "pt", "head": "e"}
        assert after.metadata() == {"format": "pt", "model.head": "model.e"}


def test_all_parameters_but_not_the_rest_are_exported_in_another_dtype(tmp_path: Path) -> None:
    tensors = toy_tensors() | {"head": toy_tensors()["e"]}
    parameters = loaded(write_one(tmp_path / "in", tensors, metadata={"format": "pt"}), TOY, tmp_path / "kept")
    export(
        parameters.__getitem__,
        key_map=TOY,
        out=tmp_path / "out",
        passthrough=tmp_path / "kept",
        form=Form(dtype="BF16"),
    )
    expected = {name: tensor if "unused" in name else tensor.bfloat16() for name, tensor in tensors.items()}
    write_one(tmp_path / "expected", expected, metadata={"format": "pt"})
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    # The dtype that it has already changes nothing.
    export(
        parameters.__getitem__,
        key_map=TOY,
        out=tmp_path / "same",
        passthrough=tmp_path / "kept",
        form=Form(dtype="F32"),
    )
    assert contents(tmp_path / "same") == contents(tmp_path / "in")


@pytest.mark.parametrize("limit", [1, 64, 130, 200, 10_000])
def test_tensors_are_divided_among_files_as_hugging_face_does(limit: int, tmp_path: Path) -> None:
    tensors = toy_tensors()
    parameters = loaded(write_sharded(tmp_path / "in", tensors), TOY, tmp_path / "kept")
    export(
        parameters.__getitem__,
        key_map=TOY,
        out=tmp_path / "out",
        passthrough=tmp_path / "kept",
        form=Form(max_shard_bytes=limit),
    )
    order = [name for file in sorted((tmp_path / "in").glob("*.safetensors")) for name in sorted(load_file(file))]
    split = split_torch_state_dict_into_shards(
        {name: tensors[name].clone() for name in order},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=limit,
    )
    files = {path.name: sorted(load_file(path)) for path in (tmp_path / "out").glob("*.safetensors")}
    assert files == {file: sorted(names) for file, names in split.filename_to_tensors.items()}
    assert (tmp_path / "out" / INDEX).exists() == split.is_sharded
    if split.is_sharded:
        content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        assert (tmp_path / "out" / INDEX).read_text() == json.dumps(content, indent=2, sort_keys=True) + "\n"
    again = loaded(tmp_path / "out", TOY)
    assert all(torch.equal(again[name], parameters[name]) for name in again)


@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_a_model_that_was_never_imported_is_exported(dtype: str | None, tmp_path: Path) -> None:
    tensors = without(toy_tensors(), "unused.x")
    parameters = loaded(write_one(tmp_path / "in", tensors), TOY)
    if dtype is not None:
        tensors = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    export(parameters.__getitem__, key_map=TOY, out=tmp_path / "out", form=Form(layout="wrapped", dtype=dtype))
    write_one(tmp_path / "expected", tensors, "model.", {"format": "pt"})
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    form = Form(layout="plain", dtype=dtype, max_shard_bytes=100)
    export(parameters.__getitem__, key_map=TOY, out=tmp_path / "deep" / "shards", form=form)
    assert open_published(tmp_path / "deep" / "shards", TOY).layout == "plain"
    assert len(list((tmp_path / "deep" / "shards").iterdir())) > 3
    again = loaded(tmp_path / "deep" / "shards", TOY)
    assert all(torch.equal(again[name], parameters[name]) for name in again)


def test_an_export_needs_a_layout_and_a_place(tmp_path: Path) -> None:
    parameters = {name: torch.zeros(shape) for name, shape in TOY.parameter_shapes.items()}
    for form in (Form(), Form(layout="openpi")):
        with pytest.raises(ValueError, match=r"layout=.*: give one of plain, wrapped"):
            export(parameters.__getitem__, key_map=TOY, out=tmp_path / "out", form=form)
    with pytest.raises(ValueError, match="is already there; give another folder"):
        export(parameters.__getitem__, key_map=TOY, out=tmp_path, form=Form(layout="plain"))
    for dtype in ("bfloat16", "I8", "F8_E8M0"):
        with pytest.raises(ValueError, match=f"dtype='{dtype}': give one of F64, F32, BF16"):
            Form(dtype=dtype)
    with pytest.raises(ValueError, match="max_shard_bytes=0: give 1 or more"):
        Form(max_shard_bytes=0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(4, 8), r"qkv is \[4, 8\], and \[8, 4\] in the key map"),
        (torch.zeros(8, 4, dtype=torch.int64), "q is torch.int64"),
        (torch.full((8, 4), 1e300, dtype=torch.float64), "q has numbers that torch.float32 cannot hold"),
    ],
)
def test_an_export_that_fails_leaves_nothing(bad: torch.Tensor, message: str, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def tensors(name: str) -> torch.Tensor:
        assert not out.exists()
        return bad if name == "qkv" else torch.zeros(TOY.parameter_shapes[name])

    with pytest.raises(ValueError, match=message):
        export(tensors, key_map=TOY, out=out, form=Form(layout="plain"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda kept, _: (kept / RECORD).unlink(), "has no published.json; give the folder that save_passthrough"),
        (lambda kept, _: (kept / PASSTHROUGH).unlink(), "there is no file .*passthrough.safetensors"),
        (lambda kept, _: (kept / RECORD).write_text("{"), "published.json is not JSON"),
        (lambda kept, record: rewrite(kept, record | {"version": 2}), "of the version 2 and the layout 'plain'"),
        (lambda kept, record: rewrite(kept, record | {"layout": "gone"}), "the layout 'gone'; .* plain, wrapped"),
        (lambda kept, record: rewrite(kept, record | {"layout": []}), "the layout \\[\\]; .* plain, wrapped"),
        (lambda kept, record: rewrite(kept, record | {"files": []}), "does not have the headers or the index"),
        (lambda kept, record: rewrite(kept, record | {"index": {}}), "does not have the headers or the index"),
        (lambda kept, record: rewrite(kept, record | {"files": {"../x": "{}"}}), "names the file '../x'"),
        (
            lambda kept, record: rewrite(kept, record | {"files": {"x": "{"}}),
            "the header of .*published.json, x is not",
        ),
        (lambda kept, record: rewrite(kept, record | {"files": {}}), r"missing \(8\): e, q, k"),
        (
            lambda kept, _: save_file({"unused.x": torch.zeros(3), "unused.y": torch.zeros(3)}, kept / PASSTHROUGH),
            r"passthrough\.safetensors does not hold what .*published\.json says: unused\.y differ",
        ),
        (
            lambda kept, _: save_file({"unused.x": torch.zeros(3).half()}, kept / PASSTHROUGH),
            r"passthrough\.safetensors does not hold what .*published\.json says: unused\.x differ",
        ),
        (lambda kept, _: save_file({}, kept / PASSTHROUGH), r"says: unused\.x differ; import the checkpoint again"),
    ],
)
def test_what_was_kept_and_is_damaged_is_not_exported(
    damage: Callable[[Path, dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    parameters = loaded(write_one(tmp_path / "in", toy_tensors()), TOY, kept)
    damage(kept, json.loads((kept / RECORD).read_text()))
    with pytest.raises(CheckpointError, match=message):
        export(parameters.__getitem__, key_map=TOY, out=tmp_path / "out", passthrough=kept)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in", "kept"]


def rewrite(kept: Path, record: dict[str, Any]) -> None:
    (kept / RECORD).write_text(json.dumps(record))


SHARDED = """
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoints import TOY, Toy, toy_tensors
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from train.model_export import Form, export
from train.published import load_into, open_published

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
limit = timedelta(seconds=90)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
model, published = Toy(TOY, torch.bfloat16), open_published(folder / "in", TOY)
# FSDP does not divide scalars.
scale = model.scale
del model.scale
fully_shard(model)
model.scale = scale
try:
    load_into(model, published)
except ValueError as error:
    assert str(error).startswith("embed, qkv, patch, up are sharded; load first"), error
else:
    raise AssertionError("sharded parameters were loaded")
parameters = dict(model.named_parameters())
for name, tensor in published.read():
    parameter = parameters[name]
    if name != "scale":
        tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.detach().copy_(tensor)
assert parameters["embed"].to_local().tolist() == toy_tensors()["e"][3 * rank : 3 * rank + 3].tolist()
form, refused = Form(layout="wrapped"), False
try:
    export(parameters.__getitem__, key_map=TOY, out=folder / f"refused{rank}", form=form)
except ValueError as error:
    refused = "embed is sharded; give what its full_tensor returns" in str(error)
assert refused

def whole(name):
    return parameters[name].full_tensor() if name != "scale" else parameters[name]

if rank == 0:
    export(whole, key_map=TOY, out=folder / "out", form=form)
else:
    for name in TOY.parameters:
        whole(name)
dist.destroy_process_group()
"""


def test_a_sharded_model_is_loaded_and_exported_as_its_docstrings_say(tmp_path: Path) -> None:
    tensors = without(toy_tensors(), "unused.x")
    write_one(tmp_path / "in", tensors)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    ranks = [
        subprocess.Popen([sys.executable, "-c", SHARDED, tmp_path, str(rank)], stderr=subprocess.PIPE, env=environment)
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=120)[1].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    write_one(tmp_path / "expected", tensors, "model.", {"format": "pt"})
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")
    assert sorted(each.name for each in tmp_path.iterdir() if each.is_dir()) == ["expected", "in", "out"]


@pytest.fixture(scope="module")
def large() -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder where a process of its own wrote, loaded and exported 400 MB, then died in the middle of an export."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", SCRIPT, folder]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 9, done.stderr
        yield Path(folder), json.loads(done.stdout)


SCRIPT = """
import json, os, sys, torch
from pathlib import Path
from train.memory import forget_peak, own_memory_mib
from train.model_export import Form, export
from train.published import KeyMap, load_into, open_published
from train.tensorfile import TensorWriter, make_header

def growth(do):
    forget_peak()
    before = own_memory_mib("VmRSS")
    do()
    return int((own_memory_mib("VmHWM") - before) * 2**20)

folder, shape = Path(sys.argv[1]), (8192, 4096)
names = [f"w{at}" for at in range(6)]
key_map = KeyMap(
    parameters={"w0": ("w0",), **{f"w{at}": (f"w{at}.a", f"w{at}.b") for at in range(1, 6)}},
    parameter_shapes=dict.fromkeys(names, shape),
    layouts={"x": ""},
)
shapes = key_map.published_shapes()

def write():
    with TensorWriter(folder / "model.safetensors", make_header({n: ("BF16", s) for n, s in shapes.items()})) as writer:
        for at, (name, each) in enumerate(shapes.items()):
            writer.write(name, torch.tensor(float(at)).bfloat16().expand(each))

model = torch.nn.Module()
for name in names:
    model.register_parameter(name, torch.nn.Parameter(torch.full(shape, -1.0, dtype=torch.bfloat16)))
parameters, form = dict(model.named_parameters()), Form(layout="x", dtype="F16")

def export_all():
    export(parameters.__getitem__, key_map=key_map, out=folder / "whole", form=form)

def die(name):
    return os._exit(9) if name == "w1" else parameters[name]

print(json.dumps({
    "write": growth(write),
    "load": growth(lambda: load_into(model, open_published(folder, key_map))),
    "export": growth(export_all),
    "numbers": [parameters[name][row, 7].item() for name in names for row in (0, -1)],
}), flush=True)
export(die, key_map=key_map, out=folder / "half", form=form)
"""


def test_memory_holds_a_piece_and_not_a_checkpoint(large: tuple[Path, dict[str, Any]]) -> None:
    folder, figures = large
    assert (folder / WHOLE).stat().st_size > 400e6
    assert figures["numbers"] == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    for what in ("write", "load", "export"):
        assert figures[what] < 64 << 20, what


def test_an_export_does_not_look_whole_when_its_process_died(large: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = large
    there = sorted(path.name for path in folder.iterdir())
    assert len(there) == 3
    assert there[0].startswith(".half.")
    assert there[1:] == [WHOLE, "whole"]
    assert [path.name for path in (folder / "whole").iterdir()] == [WHOLE]
    begun = [path.name for path in (folder / there[0]).rglob("*") if path.is_file()]
    assert begun
    assert WHOLE not in begun
