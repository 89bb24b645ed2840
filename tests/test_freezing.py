"""Tests of train/freezing.py."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from goldens import FAMILIES, config_of, golden_model, golden_samples, pack_inputs
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from train.freezing import PRESETS, freeze, frozen_parts
from train.lora import LoraConfig, add_lora
from train.models.build import build
from train.models.checkpointing import MODES, checkpoint_activations
from train.models.config import Pi05Config
from train.models.groot import Groot
from train.models.initial import initialise

CASES = [(family, name) for family, presets in PRESETS.items() for name in presets]


def modules_of(model: Any, parts: Iterable[str]) -> list[nn.Module]:
    return [module for part in parts for module in model.parts()[part]]


def frozen(family: str, parts: Iterable[str]) -> Any:
    model = golden_model(family)
    freeze(model, tuple(parts))
    return model


def outputs_with_history(model: Any, modules: Iterable[nn.Module]) -> tuple[list[str], int]:
    """Run a model, and return (which of those modules, and of all in them, gave outputs with a graph, of how many)."""
    names = {module: name for name, module in model.named_modules()}
    found: list[str] = []
    ran: set[nn.Module] = set()

    def look(module: nn.Module, _: Any, output: Any) -> None:
        ran.add(module)
        if any(each.requires_grad or each.grad_fn is not None for each in tree_leaves(output)):
            found.append(names[module])

    inner = {each for module in modules for each in module.modules()}
    handles = [module.register_forward_hook(look) for module in inner]
    model(pack_inputs(model.config, golden_samples(model.config.family)))
    for handle in handles:
        handle.remove()
    return found, len(ran)


def saved_bytes(model: Any) -> int:
    """Return how much a forward pass keeps for the backward pass, parameters aside."""
    seen: dict[int, int] = {each.untyped_storage().data_ptr(): 0 for each in model.parameters()}
    kept: list[torch.Tensor] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen.setdefault(storage.data_ptr(), storage.nbytes())
        # Else another tensor might get the same memory.
        kept.append(tensor)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(pack_inputs(model.config, golden_samples(model.config.family))).mean
    assert loss.requires_grad
    return sum(seen.values())


@pytest.mark.parametrize(("family", "preset"), CASES)
def test_a_preset_freezes_its_parts_and_trains_the_others(family: str, preset: str) -> None:
    parts = PRESETS[family][preset]
    model, whole = frozen(family, parts), golden_model(family)
    assert frozen_parts(model) == parts
    inputs = pack_inputs(model.config, golden_samples(family))
    losses = [each(inputs).mean for each in (model, whole)]
    assert losses[0] == losses[1]
    for loss in losses:
        loss.backward()
    stopped = {id(weight) for module in modules_of(model, parts) for weight in module.parameters()}
    for name, weight in model.named_parameters():
        if id(weight) in stopped:
            assert weight.grad is None, name
        else:
            wanted = whole.get_parameter(name).grad
            assert weight.grad is not None, name
            assert wanted is not None
            assert torch.equal(weight.grad, wanted), name


def test_the_presets_are_what_was_published() -> None:
    """NVIDIA's tune_visual trains the tower with its connector, LeRobot's freeze_vision_encoder leaves that out."""
    assert PRESETS == {
        "pi05": {"none": (), "vision": ("vision",), "expert_only": ("vision", "connector", "language")},
        "groot_n15": {"none": (), "published": ("language",), "vlm": ("vision", "language")},
    }
    expert_only = frozen("pi05", PRESETS["pi05"]["expert_only"])
    trained = {name.split(".")[0] for name, weight in expert_only.named_parameters() if weight.requires_grad}
    assert trained == {"action_in", "time_in", "time_out", "expert", "norm", "action_out"}
    published = frozen("groot_n15", PRESETS["groot_n15"]["published"])
    stopped = {name.split(".")[0] for name, weight in published.named_parameters() if not weight.requires_grad}
    assert stopped == {"embed", "language", "norm"}


@pytest.mark.parametrize("family", FAMILIES)
def test_freezing_adds_up_and_can_be_repeated(family: str) -> None:
    model = golden_model(family)
    assert frozen_parts(model) == ()
    freeze(model, ["language"])
    freeze(model, ["vision", "language"])
    assert frozen_parts(model) == ("vision", "language")
    freeze(model, model.parts())
    assert frozen_parts(model) == tuple(model.parts())
    assert not any(weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_part_of_which_something_is_trained_is_not_frozen(family: str) -> None:
    model = frozen(family, ["vision", "language"])
    model.embed.weight.requires_grad_(requires_grad=True)
    assert frozen_parts(model) == ("vision",)


def test_a_frozen_part_with_adapters_is_trained() -> None:
    model = golden_model("pi05")
    add_lora(model, LoraConfig(rank=2, targets=("^language",)))
    assert frozen_parts(model) == ("vision", "connector", "expert")


@pytest.mark.parametrize(
    ("family", "known"),
    [
        ("pi05", "['vision', 'connector', 'language', 'expert']"),
        ("groot_n15", "['vision', 'language', 'vl', 'projector', 'dit']"),
    ],
)
def test_an_unknown_part_is_refused_with_the_known_ones_and_nothing_is_frozen(family: str, known: str) -> None:
    model = golden_model(family)
    with pytest.raises(ValueError, match=r"parts \['head', 'llm'\] to freeze are not among") as caught:
        freeze(model, ["vision", "llm", "head"])
    assert f"{family}: {known}" in str(caught.value)
    assert frozen_parts(model) == ()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("family", "preset"), [("pi05", "expert_only"), ("pi05", "vision"), ("groot_n15", "vlm")])
def test_nothing_before_the_first_trained_part_has_a_graph(family: str, preset: str, mode: str) -> None:
    parts = PRESETS[family][preset]
    model = frozen(family, parts)
    checkpoint_activations(model, mode)
    found, ran = outputs_with_history(model, modules_of(model, parts))
    assert not found
    # The same look finds graphs where everything is trained.
    whole = golden_model(family)
    found, same = outputs_with_history(whole, modules_of(whole, parts))
    assert len(found) == same == ran > 10


def test_gradients_pass_through_a_frozen_language_model_to_vision() -> None:
    model = frozen("groot_n15", PRESETS["groot_n15"]["published"])
    assert isinstance(model, Groot)
    assert outputs_with_history(model, [model.norm]) == (["norm"], 1)
    model(pack_inputs(model.config, golden_samples("groot_n15"))).mean.backward()
    found = model.vision.patch.weight.grad
    assert found is not None
    assert found.abs().max() > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_frozen_keeps_nothing_for_the_backward_pass(family: str) -> None:
    whole = saved_bytes(golden_model(family))
    kept = {name: saved_bytes(frozen(family, parts)) for name, parts in PRESETS[family].items()}
    assert kept["none"] == whole
    config = config_of(family)
    if isinstance(config, Pi05Config):
        assert kept["expert_only"] < kept["vision"] < whole
        least, deeper = "expert_only", replace(config, vision=replace(config.vision, layers=6))
    else:
        assert kept["vlm"] < kept["published"] < whole
        least, deeper = "vlm", replace(config, layers=6, vision=replace(config.vision, layers=6))
    model = build(deeper)
    initialise(model)
    assert saved_bytes(model) > whole
    freeze(model, PRESETS[family][least])
    assert saved_bytes(model) == kept[least]


def test_dropout_of_a_frozen_part_is_off() -> None:
    model = build(replace(config_of("groot_n15"), dropout=0.3))
    model.load_state_dict(golden_model("groot_n15").state_dict())
    inputs = pack_inputs(model.config, golden_samples("groot_n15"))
    plain = golden_model("groot_n15")(inputs).total
    assert model(inputs).total != plain
    freeze(model, ["vl"])
    partly = model(inputs).total
    assert partly != plain
    freeze(model, ["dit"])
    assert model(inputs).total == plain
    assert partly != model(inputs).total
