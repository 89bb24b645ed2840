"""Tests of train/models/keys.py: the real models' checkpoints, as published, through import, training and export."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
import torch
from checkpoints import Tensors, check_round_trip, contents, loaded, without, write_one, write_sharded
from goldens import FAMILIES, config_of, golden_model, golden_samples, pack_inputs, under
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from lake.errors import CheckpointError
from train.model_export import PASSTHROUGH, RECORD, Form, export
from train.models.build import build
from train.models.config import CONFIGS
from train.models.keys import key_map
from train.published import WHOLE, KeyMap, load_into, open_published
from train.tensorfile import make_header

PREFIXES = {
    ("pi05", "openpi"): "",
    ("pi05", "lerobot"): "model.",
    ("groot_n15", "nvidia"): "",
    ("groot_n15", "lerobot"): "_groot_model.",
}
LAYOUTS = pytest.mark.parametrize(("family", "layout"), list(PREFIXES))

LANGUAGE = {"pi05": "paligemma_with_expert.paligemma", "groot_n15": "backbone.eagle_model.language_model"}
HEAD = {family: f"{LANGUAGE[family]}.lm_head.weight" for family in FAMILIES}
EMBEDDING = {
    "pi05": f"{LANGUAGE['pi05']}.model.language_model.embed_tokens.weight",
    "groot_n15": f"{LANGUAGE['groot_n15']}.model.embed_tokens.weight",
}
POOLING = {
    "pi05": "paligemma_with_expert.paligemma.model.vision_tower.vision_model.head",
    "groot_n15": "backbone.eagle_model.vision_model.vision_model.head",
}
LAST = "paligemma_with_expert.paligemma.model.language_model.layers.2"
UNUSED = {
    "pi05": [
        "paligemma_with_expert.gemma_expert.lm_head.weight",
        "paligemma_with_expert.paligemma.model.language_model.norm.weight",
        f"{LAST}.mlp.down_proj.weight",
        f"{LAST}.mlp.gate_proj.weight",
        f"{LAST}.mlp.up_proj.weight",
        f"{LAST}.post_attention_layernorm.weight",
        f"{LAST}.self_attn.o_proj.weight",
        f"{LAST}.self_attn.q_proj.weight",
    ],
    "groot_n15": [
        f"{POOLING['groot_n15']}.{part}"
        for part in (
            "attention.in_proj_bias",
            "attention.in_proj_weight",
            "attention.out_proj.bias",
            "attention.out_proj.weight",
            "layernorm.bias",
            "layernorm.weight",
            "mlp.fc1.bias",
            "mlp.fc1.weight",
            "mlp.fc2.bias",
            "mlp.fc2.weight",
            "probe",
        )
    ],
}

STORED: dict[str, Callable[[str, Tensors], Tensors]] = {
    "both": lambda _, tensors: tensors,
    "lm_head": lambda family, tensors: without(tensors, EMBEDDING[family]),
    "embed_tokens": lambda family, tensors: without(tensors, HEAD[family]),
    "untied": lambda family, tensors: tensors | {HEAD[family]: tensors[HEAD[family]] + 1},
}
"""What a checkpoint has of the embedding and of the head that is tied to it."""


@cache
def names_of(family: str) -> KeyMap:
    return key_map(build(config_of(family)))


@cache
def weights(family: str, dtype: torch.dtype) -> Tensors:
    return {name: tensor.to(dtype) for name, tensor in under(family, "weights/").items()}


@cache
def reference(family: str, dtype: torch.dtype) -> tuple[Tensors, float]:
    """Return (parameters, loss) of the golden's model, of which the weights are rounded to a dtype."""
    model = golden_model(family).to(dtype).float()
    return {name: each.detach() for name, each in model.named_parameters()}, loss_of(family, model)


@torch.no_grad()
def loss_of(family: str, model: torch.nn.Module) -> float:
    """Return the loss of the golden's smallest sample."""
    return model(pack_inputs(config_of(family), golden_samples(family)[:1])).mean.item()


def golden_loss(family: str) -> float:
    outputs = under(family, "outputs/")
    return outputs["loss"][0].mean().item() if family == "pi05" else outputs["0/loss"].item()


def write(folder: Path, family: str, layout: str, tensors: Tensors) -> Path:
    """Write a checkpoint as it is published: NVIDIA's in two files with an index, the others in one."""
    prefix = PREFIXES[family, layout]
    return write_sharded(folder, tensors, prefix) if layout == "nvidia" else write_one(folder, tensors, prefix)


def read(folder: Path) -> Tensors:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stored", STORED)
@LAYOUTS
def test_a_checkpoint_gives_the_golden_loss_and_comes_back_byte_by_byte(
    family: str, layout: str, stored: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, prefix = build(config_of(family)), PREFIXES[family, layout]
    path = write(tmp_path / "in", family, layout, STORED[stored](family, weights(family, dtype)))
    check_round_trip(path, key_map(model), model)
    parameters, loss = reference(family, dtype)
    assert same(dict(model.named_parameters()), parameters)
    assert loss_of(family, model) == loss
    assert loss == pytest.approx(golden_loss(family), abs=1e-5 if dtype == torch.float32 else 2e-3)
    kept = load_file(tmp_path / "kept" / PASSTHROUGH)
    assert sorted(kept) == sorted(prefix + each for each in [*UNUSED[family], *[HEAD[family]] * (stored == "untied")])
    assert json.loads((tmp_path / "kept" / RECORD).read_text())["layout"] == layout


@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_model_does_not_use_has_no_gradient_in_the_goldens(family: str) -> None:
    grads = under(family, "grads/")
    dead = {name for name in under(family, "weights/") if name not in grads or not grads[name].any()}
    assert dead == {*UNUSED[family], HEAD[family]}


@LAYOUTS
def test_tensors_of_different_dtypes_come_back_byte_by_byte(family: str, layout: str, tmp_path: Path) -> None:
    dtypes = {"q_proj": torch.float16, "up_proj": torch.float32, "norm": torch.float32, "to_k": torch.float64}
    tensors = {
        name: tensor.to(next((dtype for part, dtype in dtypes.items() if part in name), torch.bfloat16))
        for name, tensor in weights(family, torch.float32).items()
    } | {
        f"{POOLING[family]}.{dtype}": torch.arange(3).to(dtype)
        for dtype in (torch.int64, torch.bool, torch.float8_e4m3fn)
    }
    path = write(tmp_path / "in", family, layout, tensors)
    # Float64 holds the others.
    check_round_trip(path, names_of(family), build(config_of(family)).double())


def test_the_names_that_time_had_in_pi0_are_those_of_pi05(tmp_path: Path) -> None:
    tensors = weights("pi05", torch.float32)
    older = {re.sub(r"^time_mlp_", "action_time_mlp_", name): tensor for name, tensor in tensors.items()}
    assert len(older.keys() - tensors.keys()) == 4
    model = build(config_of("pi05"))
    check_round_trip(write_one(tmp_path / "in", older), key_map(model), model)
    assert same(dict(model.named_parameters()), reference("pi05", torch.float32)[0])


TRAINED = {"pi05": {"expert"}, "groot_n15": {"projector", "dit"}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("parts", ["some", "all"])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_changes_what_is_trained_in_an_export_and_nothing_else(
    family: str, parts: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, names = build(config_of(family)), names_of(family)
    path = write_one(tmp_path / "in", weights(family, dtype), PREFIXES[family, "lerobot"])
    parameters = loaded(path, names, tmp_path / "kept", model)
    for part, modules in model.parts().items():
        for module in modules:
            module.requires_grad_(parts == "all" or part in TRAINED[family])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model(pack_inputs(config_of(family), golden_samples(family)[:1])).mean.backward()
    optimizer.step()
    # Masters are float32, so only float32 holds what became of them.
    form = Form(dtype="F32")
    export(parameters.__getitem__, key_map=names, out=tmp_path / "out", passthrough=tmp_path / "kept", form=form)
    before, after = read(path), read(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    trained = {each for name, weight in parameters.items() if weight.requires_grad for each in names.parameters[name]}
    trained |= {HEAD[family]} if parts == "all" else set()
    assert changed == {PREFIXES[family, "lerobot"] + name for name in trained}
    again = build(config_of(family))
    loaded(tmp_path / "out", names, model=again)
    loss = loss_of(family, model)
    assert loss_of(family, again) == loss != reference(family, dtype)[1]


@LAYOUTS
def test_a_checkpoint_goes_to_the_other_layout_and_back(family: str, layout: str, tmp_path: Path) -> None:
    names = names_of(family)
    other = next(each for each in names.layouts if each != layout)
    first = write(tmp_path / "first", family, layout, weights(family, torch.bfloat16))
    total = sum(tensor.nbytes for tensor in weights(family, torch.bfloat16).values())
    there, back = (
        # As they are published: NVIDIA's in two files.
        Form(layout=to, max_shard_bytes=total * 2 // 3 if to == "nvidia" else 2 * total)
        for to in (other, layout)
    )
    export(
        loaded(first, names, tmp_path / "kept", build(config_of(family))).__getitem__,
        key_map=names,
        out=tmp_path / "second",
        passthrough=tmp_path / "kept",
        form=there,
    )
    assert same(
        read(tmp_path / "second"),
        {PREFIXES[family, other] + name: tensor for name, tensor in weights(family, torch.bfloat16).items()},
    )
    assert open_published(tmp_path / "second", names).layout == other
    assert len(contents(tmp_path / "second")) == (3 if other == "nvidia" else 1)
    export(
        loaded(tmp_path / "second", names, tmp_path / "kept", build(config_of(family))).__getitem__,
        key_map=names,
        out=tmp_path / "third",
        passthrough=tmp_path / "kept",
        form=back,
    )
    assert same(read(tmp_path / "third"), read(first))
    if layout != "nvidia":
        # The index of another writer is not remembered.
        assert contents(tmp_path / "third") == contents(first)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_imported_to_bfloat16_to_be_served(family: str, stored: torch.dtype, tmp_path: Path) -> None:
    config = replace(config_of(family), compute="bfloat16")
    model = build(config).to(torch.bfloat16).eval()
    path = write(tmp_path / "in", family, next(iter(names_of(family).layouts)), weights(family, stored))
    load_into(model, open_published(path, key_map(model)))
    rounded = {name: each.bfloat16() for name, each in reference(family, torch.bfloat16)[0].items()}
    assert same(dict(model.named_parameters()), rounded)
    actions = model.sample(pack_inputs(config, golden_samples(family)[:1]))[:1]
    wanted = under(family, "outputs/")["sampled_actions" if family == "pi05" else "0/sampled_actions"][:1]
    assert (actions - wanted).norm() < 0.005 * wanted.norm()


# ------------------------------------------------------------------------------------------------------- refused


@LAYOUTS
def test_all_that_is_wrong_with_a_checkpoint_is_named(family: str, layout: str, tmp_path: Path) -> None:
    names, prefix = names_of(family), PREFIXES[family, layout]
    tensors = weights(family, torch.float32)
    used = sorted(names.published_shapes())
    gone, bad = used[5], used[-7]
    changed = without(tensors, gone, HEAD[family], EMBEDDING[family]) | {
        bad: tensors[bad].flatten()[1:],
        "state_proj.weight": torch.zeros(2),
    }
    path = write(tmp_path / "in", family, layout, changed)
    with pytest.raises(CheckpointError) as caught:
        open_published(path, names)
    message = str(caught.value)
    assert message.startswith(f"{path} is not a checkpoint of this model in the layout {layout!r}: ")
    missing = re.search(r"missing \(2\): (.*?);", message)
    assert missing is not None
    assert set(missing[1].split(", ")) == {prefix + EMBEDDING[family], prefix + gone}
    shape = list(tensors[bad].shape)
    assert f"misshapen (1): {prefix}{bad} is [{tensors[bad].numel() - 1}] and not {shape}; " in message
    assert f"not known (1): {prefix}state_proj.weight; " in message


@settings(deadline=None, max_examples=15)
@given(data=st.data())
def test_a_checkpoint_without_any_one_tensor_is_refused_where_the_model_uses_it(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    family, layout = data.draw(st.sampled_from(list(PREFIXES)))
    tensors = weights(family, torch.bfloat16)
    name = data.draw(st.sampled_from(sorted(tensors)))
    folder = tmp_path_factory.mktemp("data")
    path = write(folder / "in", family, layout, without(tensors, name))
    if name in {*UNUSED[family], HEAD[family], EMBEDDING[family]}:
        assert not open_published(path, names_of(family)).home.keys() & {PREFIXES[family, layout] + name}
    else:
        message = re.escape(f"missing (1): {PREFIXES[family, layout]}{name}; give")
        with pytest.raises(CheckpointError, match=message):
            open_published(path, names_of(family))
    shutil.rmtree(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_another_size_is_refused(family: str, tmp_path: Path) -> None:
    config = config_of(family)
    path = write_one(tmp_path / "in", weights(family, torch.float32))
    fewer = key_map(build(replace(config, layers=config.layers - 1)))
    layer = f"language_model.{'model.' if family == 'groot_n15' else ''}layers.{config.layers - 1}"
    with pytest.raises(CheckpointError, match=rf"not known .*{layer}\..* the configuration that the checkpoint was"):
        open_published(path, fewer)
    wider = key_map(build(replace(config, mlp=config.mlp + 8)))
    with pytest.raises(CheckpointError, match=r"misshapen .*mlp\.gate_proj\.weight is .* the configuration that"):
        open_published(path, wider)


@LAYOUTS
def test_a_checkpoint_of_the_other_model_is_refused(family: str, layout: str, tmp_path: Path) -> None:
    path = write(tmp_path / "in", family, layout, weights(family, torch.float32))
    other = next(each for each in FAMILIES if each != family)
    looked = {
        "pi05": "action_in_proj.bias (openpi) or model.action_in_proj.bias (lerobot)",
        "groot_n15": "action_head.action_decoder.layer1.W (nvidia) or "
        "_groot_model.action_head.action_decoder.layer1.W (lerobot)",
    }
    first = {"pi05": "action_in_proj.bias", "groot_n15": "action_head.action_decoder.layer1.W"}
    message = (
        f"{path} is a checkpoint of another model: this one's tensors have names such as {looked[other]}, and none of "
        f"the {len(weights(family, torch.float32))} there is one of them; those begin with "
        f"{PREFIXES[family, layout]}{first[family]}, "
    )
    with pytest.raises(CheckpointError, match=re.escape(message)):
        open_published(path, names_of(other))


# ---------------------------------------------------------------------------------------------- published sizes


def published_rest(family: str) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what is in the published checkpoints and not used."""
    config = CONFIGS[family]
    if family == "groot_n15":
        width, mlp = config.vision.width, config.vision.mlp
        small = dict.fromkeys(
            ["attention.out_proj.bias", "layernorm.bias", "layernorm.weight", "mlp.fc2.bias"], (width,)
        )
        shapes = small | {
            "attention.in_proj_bias": (3 * width,),
            "attention.in_proj_weight": (3 * width, width),
            "attention.out_proj.weight": (width, width),
            "mlp.fc1.bias": (mlp,),
            "mlp.fc1.weight": (mlp, width),
            "mlp.fc2.weight": (width, mlp),
            "probe": (1, 1, width),
        }
        return {f"{POOLING[family]}.{name}": shape for name, shape in shapes.items()}
    width, mlp, heads = config.width, config.mlp, config.heads * config.head_dim
    gemma = "paligemma_with_expert.paligemma.model.language_model"
    return {
        "paligemma_with_expert.gemma_expert.lm_head.weight": (config.vocab, 1024),
        f"{gemma}.norm.weight": (width,),
        f"{gemma}.layers.17.post_attention_layernorm.weight": (width,),
        f"{gemma}.layers.17.self_attn.q_proj.weight": (heads, width),
        f"{gemma}.layers.17.self_attn.o_proj.weight": (width, heads),
        f"{gemma}.layers.17.mlp.gate_proj.weight": (mlp, width),
        f"{gemma}.layers.17.mlp.up_proj.weight": (mlp, width),
        f"{gemma}.layers.17.mlp.down_proj.weight": (width, mlp),
    }


@LAYOUTS
def test_a_checkpoint_of_the_published_size_is_accounted_for(family: str, layout: str, tmp_path: Path) -> None:
    model = build(CONFIGS[family], device="meta")
    names, rest = key_map(model), published_rest(family)
    assert sorted(re.sub(r"layers\.17", "layers.2", name) for name in rest) == sorted(UNUSED[family])
    shapes = {name: shape for name, shape in names.published_shapes().items() if name != EMBEDDING[family]}
    shapes |= rest | {HEAD[family]: names.published_shapes()[EMBEDDING[family]]}
    header = make_header({PREFIXES[family, layout] + name: ("BF16", shape) for name, shape in shapes.items()})
    total = sum(math.prod(shape) for shape in shapes.values())
    with (tmp_path / WHOLE).open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        # Only the header takes room on disk.
        file.truncate(8 + len(header) + 2 * total)
    published = open_published(tmp_path, names)
    assert published.layout == layout
    assert {name.removeprefix(PREFIXES[family, layout]) for name in published.passthrough} == rest.keys()
    unused = sum(math.prod(shape) for shape in rest.values())
    assert total - unused == sum(parameter.numel() for parameter in model.parameters())
    millions = {"pi05": 3353.4 + 263.3, "groot_n15": 2413.5}
    assert total / 1e6 == pytest.approx(millions[family], rel=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_pattern_of_what_is_unused_matches_what_is_used(family: str) -> None:
    names = names_of(family)
    for name in {*names.known()} - {HEAD[family]}:
        assert not any(fnmatchcase(name, pattern) for pattern in names.unused), name
