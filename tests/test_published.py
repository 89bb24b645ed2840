"""Tests of train/published.py on checkpoints of a toy model."""

import json
import re
import shutil
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import TOY, Toy, check_round_trip, loaded, toy_tensors, without, write_one, write_sharded
from safetensors.torch import load_file, save_file

from lake.errors import CheckpointError
from train.published import INDEX, WHOLE, KeyMap, load_into, open_published, shapes_of


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
    some = published.read()
    before = weakref.ref(next(some)[1])
    assert before() is None, "what was read before is not kept"
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
    ("names", "message"),
    [
        (
            ["x.e", "e.x"],
            """is a checkpoint of another model: this one's tensors have names such as e (plain) or model.e (wrapped), \
and none of the 2 there is one of them; those begin with e.x, x.e; give one of this model""",
        ),
        (["e", "model.e"], "mixes the layouts plain and wrapped, of which 1 names each are known; get it again"),
        (["e", "q", "model.s", "model.e", "x"], "mixes the layouts plain and wrapped, of which 2 names each"),
    ],
)
def test_a_checkpoint_of_no_layout_or_of_two_is_refused(names: list[str], message: str, tmp_path: Path) -> None:
    path = write_one(tmp_path / "in", {name: torch.zeros(6, 4) for name in names})
    with pytest.raises(CheckpointError, match=re.escape(f"{path} {message}")):
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
    model = Toy(TOY)
    model.up = torch.nn.Parameter(model.up.to("meta"))
    published = open_published(write_one(tmp_path / "in", toy_tensors()), TOY)
    with pytest.raises(
        ValueError, match=r"^up are on the meta device, without memory; call the model's to_empty first"
    ):
        load_into(model, published)
    assert model.embed.isnan().all(), "nothing was loaded"
    model.to("meta")
    assert shapes_of(model) == TOY.parameter_shapes
    with pytest.raises(ValueError, match=r"^embed, .*scale are on the meta device"):
        load_into(model, published)


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
