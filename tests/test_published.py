"""Tests of train/published.py on real checkpoints of tiny models, in every layout in which they are published."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file, save_model
from support import ROOT

from lake.errors import CheckpointError
from train.published import (
    INDEX,
    PASSTHROUGH,
    RECORD,
    WHOLE,
    Form,
    KeyMap,
    export,
    load_into,
    open_published,
    save_passthrough,
    shapes_of,
)
from train.tensorfile import TensorWriter

Tensors = dict[str, torch.Tensor]
FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "qkv_proj": ("q_proj", "k_proj", "v_proj"), "up": ("gate_proj", "up_proj")}


@dataclass(frozen=True, kw_only=True)
class Family:
    """What there is of one published model."""

    golden: str
    layouts: tuple[tuple[str, str], ...]
    embedding: str
    head: str
    unused: tuple[str, ...]


FAMILIES = {
    "pi05": Family(
        golden="pi05_tiny",
        layouts=(("openpi", ""), ("lerobot", "model.")),
        embedding="paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight",
        head="paligemma_with_expert.paligemma.lm_head.weight",
        unused=("paligemma_with_expert.gemma_expert.lm_head.*", "*.language_model.layers.2.mlp.*"),
    ),
    "groot": Family(
        golden="groot_tiny",
        layouts=(("nvidia", ""), ("lerobot", "_groot_model.")),
        embedding="backbone.eagle_model.language_model.model.embed_tokens.weight",
        head="backbone.eagle_model.language_model.lm_head.weight",
        unused=("backbone.eagle_model.vision_model.vision_model.head.*",),
    ),
}

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


def mixed(tensors: Tensors, family: Family) -> Tensors:
    """Return tensors of different dtypes, also within what is fused, and numbers that are no parameters."""
    dtypes = {"q_proj": torch.float16, "up_proj": torch.float32, "norm": torch.float32, "to_k": torch.float64}
    extra = family.unused[0].replace("*", "extra")
    return {
        name: tensor.to(next((dtype for part, dtype in dtypes.items() if part in name), torch.bfloat16))
        for name, tensor in tensors.items()
    } | {f"{extra}.{dtype}": torch.arange(3).to(dtype) for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn)}


KINDS: dict[str, Callable[[Tensors, Family], Tensors]] = {
    "tied": lambda tensors, _: tensors,
    "without_embed_tokens": lambda tensors, family: without(tensors, family.embedding),
    "without_lm_head": lambda tensors, family: without(tensors, family.head),
    "untied": lambda tensors, family: tensors | {family.head: tensors[family.head] + 1},
    "bf16": lambda tensors, _: {name: tensor.bfloat16() for name, tensor in tensors.items()},
    "mixed": mixed,
}


def without(named: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in named.items() if name not in names}


@cache
def weights_of(family: Family) -> Tensors:
    golden = load_file(ROOT / "tests" / "data" / "goldens" / f"{family.golden}.safetensors")
    return {name.removeprefix("weights/"): tensor for name, tensor in golden.items() if name.startswith("weights/")}


@cache
def key_map_of(family: Family) -> KeyMap:
    """Return a map in which queries, keys, values and gates are fused, and the patch embedding is a matrix."""
    left = {
        name: tuple(tensor.shape)
        for name, tensor in weights_of(family).items()
        if name != family.head and not any(fnmatchcase(name, pattern) for pattern in family.unused)
    }
    shapes = dict(left)
    parameters: dict[str, tuple[str, ...]] = {}
    for fused, parts in FUSED.items():
        for first in [name for name in left if f".{parts[0]}." in name]:
            names = tuple(first.replace(parts[0], part) for part in parts)
            # Where the keys of an attention are of wider tokens they are not fused.
            if len({shapes[name][1:] for name in names}) == 1:
                parameters[first.replace(parts[0], fused)] = names
                left = without(left, *names)
    parameters |= {name: (name,) for name in left}
    made = {name: (sum(shapes[part][0] for part in parts), *shapes[parts[0]][1:]) for name, parts in parameters.items()}
    made |= {name: (shape[0], 588) for name, shape in made.items() if len(shape) == 4}
    return KeyMap(
        # A module takes no dot in a name.
        parameters={name.replace(".", "/"): parts for name, parts in parameters.items()},
        parameter_shapes={name.replace(".", "/"): shape for name, shape in made.items()},
        # Those of gates are equal shares, and so not named.
        shapes={
            name: shape
            for name, shape in shapes.items()
            if len(shape) == 4 or (".self_attn." in name and name not in left)
        },
        aliases={family.embedding: (family.head,)},
        unused=family.unused,
        layouts=dict(family.layouts),
    )


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


def loaded(path: Path, key_map: KeyMap, kept: Path | None = None, dtype: torch.dtype = torch.float32) -> Tensors:
    """Return the parameters of a model that a checkpoint was loaded into."""
    published = open_published(path, key_map)
    model = Toy(key_map, dtype)
    load_into(model, published)
    if kept is not None:
        save_passthrough(published, kept)
    return dict(model.named_parameters())


def check_round_trip(path: Path, key_map: KeyMap, dtype: torch.dtype = torch.float32) -> Tensors:
    """Import a checkpoint, delete it, and export it again."""
    kept, out = path.parent / "kept", path.parent / "out"
    parameters = loaded(path, key_map, kept, dtype)
    before = contents(path)
    shutil.rmtree(path)
    export(parameters.__getitem__, key_map=key_map, out=out, passthrough=kept)
    after = contents(out)
    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == []
    return parameters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_published_file_comes_back_byte_by_byte(family: Family, layout: int, kind: str, tmp_path: Path) -> None:
    tensors = KINDS[kind](weights_of(family), family)
    path = write_one(tmp_path / "published", tensors, family.layouts[layout][1], {"format": "pt"})
    key_map = key_map_of(family)
    parameters = check_round_trip(path, key_map, torch.float64 if kind == "mixed" else torch.float32)
    tensors = {family.embedding: weights_of(family)[family.embedding]} | tensors
    for name, parts in key_map.parameters.items():
        expected = torch.cat([tensors[part].to(parameters[name].dtype) for part in parts])
        assert torch.equal(parameters[name], expected.reshape(key_map.parameter_shapes[name])), name
    assert json.loads((tmp_path / "kept" / RECORD).read_text())["layout"] == family.layouts[layout][0]
    kept = load_file(tmp_path / "kept" / PASSTHROUGH).keys()
    assert (family.layouts[layout][1] + family.head in kept) == (kind == "untied")
    assert len(kept) == {"pi05": 4, "groot": 11}[family.golden.removesuffix("_tiny")] + {"untied": 1, "mixed": 3}.get(
        kind, 0
    )


@pytest.mark.parametrize("layout", [0, 1])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_published_shards_and_their_index_come_back_byte_by_byte(family: Family, layout: int, tmp_path: Path) -> None:
    path = write_sharded(tmp_path / "published", mixed(weights_of(family), family), family.layouts[layout][1])
    assert len(list(path.iterdir())) == 3
    check_round_trip(path, key_map_of(family), torch.float64)


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


def test_parameters_are_read_one_by_one_as_they_are_in_the_file(tmp_path: Path) -> None:
    tensors = toy_tensors()
    tensors |= {"q": tensors["q"].half(), "k": tensors["k"].bfloat16(), "v": tensors["v"].half()}
    tensors |= {"gate": tensors["gate"].bfloat16(), "up": tensors["up"].bfloat16(), "s": tensors["s"].double()}
    published = open_published(write_sharded(tmp_path / "in", tensors), TOY)
    read = published.read()
    assert isinstance(read, Iterator)
    found = dict(read)
    assert list(found) == list(TOY.parameters)
    dtypes = {name: tensor.dtype for name, tensor in found.items()}
    assert dtypes == dict.fromkeys(TOY.parameters, torch.float32) | {"up": torch.bfloat16, "scale": torch.float64}
    assert torch.equal(found["qkv"], torch.cat([tensors[each].float() for each in "qkv"]))
    assert torch.equal(found["up"], torch.cat([tensors["gate"], tensors["up"]]))
    assert torch.equal(found["patch"], tensors["p"].reshape(4, 12))
    assert torch.equal(found["scale"], tensors["s"].reshape(()))
    assert [name for name, _ in published.read(["scale", "embed"])] == ["scale", "embed"]
    with pytest.raises(ValueError, match="no parameter 'k'; there are embed, qkv"):
        list(published.read(["k"]))
    shutil.copy(tmp_path / "in" / INDEX, tmp_path / "in" / "model-00001-of-00002.safetensors")
    with pytest.raises(CheckpointError, match=r"model-00001-of-00002\.safetensors ends within"):
        list(published.read())


def test_parts_of_dtypes_that_do_not_mix_are_read_as_the_narrowest_that_holds_them(tmp_path: Path) -> None:
    tensors = toy_tensors()
    tensors |= {"q": tensors["q"].to(torch.float8_e5m2), "gate": tensors["gate"].double()}
    published = open_published(write_one(tmp_path / "in", tensors), TOY)
    found = dict(published.read(["qkv", "up"]))
    assert (found["qkv"].dtype, found["up"].dtype) == (torch.float32, torch.float64)
    assert torch.equal(found["qkv"][:4], tensors["q"].float())


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


def test_a_head_of_another_dtype_or_shape_than_the_embedding_is_not_tied(tmp_path: Path) -> None:
    tensors = toy_tensors() | {"head": toy_tensors()["e"].double(), "other_head": torch.zeros(2)}
    path = write_one(tmp_path / "in", tensors)
    assert sorted(open_published(path, TOY).passthrough) == ["head", "other_head", "unused.x"]
    check_round_trip(path, TOY)


def test_all_that_is_wrong_is_named_at_once(tmp_path: Path) -> None:
    tensors = without(toy_tensors(), "e", "gate") | {
        "k": torch.zeros(3, 4),
        "p": torch.zeros(4, 12),
        "v": torch.zeros(2, 4, dtype=torch.int8),
        "strange": torch.zeros(1),
    }
    path = write_one(tmp_path / "in", tensors, "model.") / WHOLE
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b'"model.s":{"dtype":"F32"', b'"model.s":{"dtype":"F33"'))
    with pytest.raises(CheckpointError) as caught:
        open_published(path, TOY)
    message = str(caught.value)
    assert message.startswith(f"{path} is not a checkpoint of this model in the layout 'wrapped': ")
    for expected in (
        "damaged (1): model.s has the unknown dtype 'F33'",
        "missing (2): model.e, model.gate;",
        "misshapen (2): model.k is [3, 4] and not [2, 4], model.p is [4, 12] and not [4, 3, 2, 2];",
        "not floating (1): model.v is I8;",
        "not known (1): model.strange;",
        "give one of this model, or the configuration",
    ):
        assert expected in message


def test_names_beyond_the_first_20_are_counted(tmp_path: Path) -> None:
    extra = {f"extra{at:02}": torch.zeros(1) for at in range(23)}
    path = write_one(tmp_path / "in", toy_tensors() | extra)
    with pytest.raises(CheckpointError, match=r"not known \(23\): extra00, .*, extra19 and 3 more; give"):
        open_published(path, TOY)


def test_a_name_of_another_layout_is_not_known(tmp_path: Path) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in toy_tensors().items()}
    tensors["q"] = tensors.pop("model.q")
    path = write_one(tmp_path / "in", tensors)
    with pytest.raises(CheckpointError, match=r"'wrapped': missing \(1\): model\.q; not known \(1\): q;"):
        open_published(path, TOY)


@pytest.mark.parametrize(
    ("names", "counts"),
    [(["other.e", "e.other"], "'plain': 0, 'wrapped': 0"), (["e", "model.e"], "'plain': 1, 'wrapped': 1")],
)
def test_a_checkpoint_of_no_layout_or_of_two_is_refused(names: list[str], counts: str, tmp_path: Path) -> None:
    path = write_one(tmp_path / "in", {name: torch.zeros(6, 4) for name in names})
    looked = r"looked for names such as e \(plain\), model\.e \(wrapped\), and of 2 names"
    with pytest.raises(CheckpointError, match=rf"{looked} .*{counts}.* it has {min(names)}"):
        open_published(path, TOY)


def test_a_folder_has_either_a_file_or_an_index(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"is to have one of .*, and has neither"):
        open_published(tmp_path, TOY)
    path = write_sharded(tmp_path / "in", toy_tensors())
    save_file(toy_tensors(), path / WHOLE)
    with pytest.raises(CheckpointError, match=r"is to have one of .*, and has both"):
        open_published(path, TOY)
    assert open_published(str(path / WHOLE), TOY).index is None


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", ".", "a\\b", "a\0b", 3, None, ["x"]]
)
def test_an_index_that_names_files_elsewhere_is_refused(name: Any, tmp_path: Path) -> None:
    path = write_sharded(tmp_path / "in", toy_tensors())
    save_file(toy_tensors(), tmp_path / WHOLE)
    index = json.loads((path / INDEX).read_text())
    index["weight_map"]["q"] = name
    (path / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"index\.json names the file .*, which is not one beside it"):
        open_published(path, TOY)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": []}', '{"weight_map": {}}', "[]", "{", '{"a": 1, "a": 1}'])
def test_an_index_that_says_nothing_is_refused(text: str, tmp_path: Path) -> None:
    path = write_sharded(tmp_path / "in", toy_tensors())
    (path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json"):
        open_published(path, TOY)


def test_an_index_has_to_agree_with_its_files(tmp_path: Path) -> None:
    path = write_sharded(tmp_path / "in", toy_tensors())
    one, two = (f"model-0000{at}-of-00002.safetensors" for at in (1, 2))
    index = json.loads((path / INDEX).read_text())
    assert (index["weight_map"]["q"], index["weight_map"]["k"], index["weight_map"]["v"]) == (two, one, two)
    del index["weight_map"]["q"]
    index["weight_map"] |= {"k": two, "unused.more": one}
    (path / INDEX).write_text(json.dumps(index))
    # One tensor is in both files.
    save_file(load_file(path / one) | {"v": torch.zeros(2, 4)}, path / one)
    with pytest.raises(CheckpointError) as caught:
        open_published(path, TOY)
    assert f"in the index, not in the file (2): k ({two}), unused.more ({one});" in str(caught.value)
    assert f"in the file, not in the index (3): k ({one}), q ({two}), v ({one});" in str(caught.value)


def test_files_that_are_gone_or_cut_off_are_all_named(tmp_path: Path) -> None:
    path = write_sharded(tmp_path / "in", toy_tensors())
    one, two = sorted(path.glob("*.safetensors"))
    one.write_bytes(one.read_bytes()[:-1])
    two.unlink()
    with pytest.raises(CheckpointError, match=rf"{one} was cut off in .*; there is no file {two}"):
        open_published(path, TOY)
    one.write_bytes(b"\xff" * 100)
    with pytest.raises(CheckpointError, match="it is no safetensors file, or was cut off"):
        open_published(one, TOY)


def test_a_checkpoint_is_loaded_into_any_parameters_in_place(tmp_path: Path) -> None:
    path = write_one(tmp_path / "in", toy_tensors(torch.bfloat16))
    model = Toy(TOY, torch.float64)
    model.qkv = torch.nn.Parameter(torch.zeros(4, 8, dtype=torch.float16).t())
    model.embed = torch.nn.Parameter(torch.zeros(6, 4), requires_grad=False)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    published = open_published(path, TOY)
    load_into(model, published)
    after = dict(model.named_parameters())
    assert {name: parameter.data_ptr() for name, parameter in after.items()} == before
    assert {name: parameter.dtype for name, parameter in after.items()} == {
        "embed": torch.float32,
        "qkv": torch.float16,
        "patch": torch.float64,
        "up": torch.float64,
        "scale": torch.float64,
    }
    for name, tensor in published.read():
        assert torch.equal(after[name], tensor.to(after[name].dtype)), name


def test_a_parameter_larger_than_a_piece_is_loaded_whole(tmp_path: Path) -> None:
    key_map = KeyMap(
        parameters={"w": ("a", "b")},
        parameter_shapes={"w": (2300, 4096)},
        shapes={"a": (2200, 4096), "b": (100, 4096)},
        layouts={"x": ""},
    )
    tensors = {"a": torch.randn(2200, 4096), "b": torch.randn(100, 4096)}
    parameters = loaded(write_one(tmp_path / "in", tensors), key_map)
    assert torch.equal(parameters["w"], torch.cat([tensors["a"], tensors["b"]]))


@pytest.mark.parametrize("change", [{"more": (2,)}, {"embed": None}, {"embed": (4, 6)}])
def test_a_model_that_is_not_that_of_the_key_map_is_our_own_mistake(change: dict[str, Any], tmp_path: Path) -> None:
    published = open_published(write_one(tmp_path / "in", toy_tensors()), TOY)
    shapes = {name: shape for name, shape in (dict(TOY.parameter_shapes) | change).items() if shape}
    model = torch.nn.Module()
    for name, shape in (shapes | {"scale": ()}).items():
        model.register_parameter(name, torch.nn.Parameter(torch.zeros(shape)))
    with pytest.raises(AssertionError, match=f"not of this model, they differ in {next(iter(change))}"):
        load_into(model, published)


def test_a_model_on_the_meta_device_has_shapes_but_cannot_be_loaded(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = Toy(TOY)
    assert shapes_of(model) == TOY.parameter_shapes
    with pytest.raises(AssertionError, match="embed is on the meta device; call to_empty"):
        load_into(model, open_published(write_one(tmp_path / "in", toy_tensors()), TOY))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": dict(TOY.parameters) | {"more": ("q",)}}, "once: q are there again"),
        ({"aliases": {"e": ("q",)}}, "once: q are there again"),
        ({"aliases": {"x": ("y",)}}, "of published names: x are not"),
        ({"shapes": dict(TOY.shapes) | {"head": (6, 4)}}, "of published names: head are not"),
        ({"parameter_shapes": without(TOY.parameter_shapes, "up")}, "of the same names; up are of one"),
        ({"layouts": {}}, "give one or more, with different prefixes"),
        ({"layouts": {"a": "x.", "b": "x."}}, "give one or more, with different prefixes"),
        ({"shapes": dict(TOY.shapes) | {"q": (3, 4)}}, r"qkv \(8, 4\) is not made of the rows of .*'q': \(3, 4\)"),
        ({"shapes": without(TOY.shapes, "q", "k", "v")}, r"qkv \(8, 4\) is not made of the rows"),
        ({"shapes": dict(TOY.shapes) | {"q": (3, 6), "k": (14,), "v": (0, 4)}}, "qkv .* is not made of the rows"),
        ({"shapes": dict(TOY.shapes) | {"q": (18,), "k": (6,), "v": (8,)}}, "qkv .* is not made of the rows"),
        ({"parameter_shapes": dict(TOY.parameter_shapes) | {"up": ()}}, "up .* is not made of the rows"),
    ],
)
def test_a_key_map_that_contradicts_itself_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TOY, **change)


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
        (lambda kept, record: rewrite(kept, record | {"files": []}), "import the checkpoint again"),
        (lambda kept, record: rewrite(kept, record | {"files": {"../x": "{}"}}), "names the file '../x'"),
        (
            lambda kept, record: rewrite(kept, record | {"files": {"x": "{"}}),
            "the header of .*published.json, x is not",
        ),
        (lambda kept, record: rewrite(kept, record | {"files": {}}), r"missing \(8\): e, q, k"),
        (
            lambda kept, _: save_file({"unused.x": torch.zeros(3), "unused.y": torch.zeros(3)}, kept / PASSTHROUGH),
            r"not so in passthrough\.safetensors \(1\): unused\.y",
        ),
        (
            lambda kept, _: save_file({"unused.x": torch.zeros(3).half()}, kept / PASSTHROUGH),
            r"not so in passthrough\.safetensors \(1\): unused\.x",
        ),
        (lambda kept, _: save_file({}, kept / PASSTHROUGH), r"not so in passthrough\.safetensors \(1\): unused\.x"),
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
import json, os, re, sys, torch
from pathlib import Path
from train.published import Form, KeyMap, export, load_into, open_published
from train.tensorfile import TensorWriter, make_header

def status(what):
    return int(re.search(what + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

def growth(do):
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    do()
    return status("VmHWM") - before

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
