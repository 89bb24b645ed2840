"""The reference outputs of tests/data/goldens, and their samples as packs for our models."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from train.made import Sample, packed_inputs
from train.models.build import build
from train.models.config import GrootConfig, ModelConfig, Pi05Config, VisionConfig
from train.models.groot import Groot
from train.models.inputs import Inputs
from train.models.keys import key_map
from train.models.pi05 import Pi05
from train.packing import Budgets

FOLDER = Path(__file__).parent / "data" / "goldens"
FILES = {"pi05": FOLDER / "pi05_tiny.safetensors", "groot_n15": FOLDER / "groot_tiny.safetensors"}
FAMILIES = tuple(FILES)


@cache
def tensors(family: str) -> dict[str, torch.Tensor]:
    with safe_open(FILES[family], "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def under(family: str, prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): each for name, each in tensors(family).items() if name.startswith(prefix)}


@cache
def config_of(family: str) -> ModelConfig:
    with safe_open(FILES[family], "pt") as file:
        c = json.loads(file.metadata()["config"])
    vision = VisionConfig(
        width=c["vis"],
        layers=c["vis_layers"],
        heads=c["vis_heads"],
        mlp=c["vis_mlp"],
        image_size=c["img"],
        patch=c["patch"],
    )
    common: dict[str, Any] = {
        "vision": vision,
        "width": c["width"],
        "mlp": c["mlp"],
        "heads": c["heads"],
        "kv_heads": c["kv"],
        "head_dim": c["hd"],
        "vocab": c["vocab"],
        "horizon": c["horizon"],
        "action_dim": c["adim"],
        "compute": "float32",
    }
    if family == "pi05":
        return Pi05Config(**common, layers=c["depth"], expert_width=c["expert_width"], expert_mlp=c["expert_mlp"])
    return GrootConfig(
        **common,
        layers=c["select"],
        vl_layers=c["vlsa_layers"],
        vl_heads=c["vlsa_heads"],
        dit_width=c["emb"],
        dit_layers=c["dit_layers"],
        dit_heads=c["dit_heads"],
        hidden=c["hidden"],
        state_dim=c["sdim"],
        future_tokens=c["fut"],
        positions=64,
        categories=c["ncat"],
        dropout=0,
    )


def golden_model(family: str) -> Pi05 | Groot:
    """Return a model with the golden's weights."""
    model, weights = build(config_of(family)), under(family, "weights/")
    parameters = dict(model.named_parameters())
    names = key_map(model).parameters
    assert names.keys() == parameters.keys()
    with torch.no_grad():
        for name, theirs in names.items():
            parts = [weights[each].reshape(len(weights[each]), *parameters[name].shape[1:]) for each in theirs]
            parameters[name].copy_(torch.cat(parts))
    return model


def golden_grads(family: str) -> dict[str, torch.Tensor]:
    """Return the golden's gradients by the names of our parameters."""
    model, grads = build(config_of(family)), under(family, "grads/")
    shapes = {name: each.shape for name, each in model.named_parameters()}
    return {
        name: torch.cat([grads[each].reshape(len(grads[each]), *shapes[name][1:]) for each in theirs])
        for name, theirs in key_map(model).parameters.items()
    }


def golden_samples(family: str) -> list[Sample]:
    """Return the golden's three samples."""
    return _pi05() if family == "pi05" else _groot()


def _pi05() -> list[Sample]:
    given, samples = under("pi05", "inputs/"), []
    per_view = config_of("pi05").vision.tokens
    for at in range(3):
        views = [given[f"image_{n}"][at] for n in range(3) if given[f"image_mask_{n}"][at]]
        ids = given["tokens"][at][given["token_mask"][at]]
        samples.append(
            Sample(
                images=torch.stack(views).permute(0, 2, 3, 1),
                ids=torch.cat([torch.full((per_view * len(views),), -1), ids]),
                action=given["actions"][at],
                noise=given["noise"][at],
                time=float(given["time"][at]),
                weight=torch.ones_like(given["actions"][at]),
            )
        )
    return samples


def _groot() -> list[Sample]:
    given, samples = under("groot_n15", "inputs/"), []
    with safe_open(FILES["groot_n15"], "pt") as file:
        image_token = json.loads(file.metadata()["config"])["img_tok"]
    for at in range(3):
        ids = given[f"{at}/input_ids"]
        samples.append(
            Sample(
                images=given[f"{at}/pixel_values"].permute(0, 2, 3, 1),
                ids=torch.where(ids == image_token, -1, ids),
                action=given[f"{at}/actions"][0],
                noise=given[f"{at}/noise"][0],
                time=float(given[f"{at}/time"]),
                weight=given[f"{at}/action_mask"][0].float(),
                state=given[f"{at}/state"][0, 0],
                category=int(given[f"{at}/embodiment_id"]),
            )
        )
    return samples


def pack_inputs(config: ModelConfig, samples: Sequence[Sample], budgets: Budgets | None = None) -> Inputs:
    """Return the inputs of one pack of samples; without budgets, with a little room left."""
    tokens, images = sum(len(each.ids) for each in samples), sum(len(each.images) for each in samples)
    return packed_inputs(
        config, samples, budgets or Budgets(tokens=tokens + 3, images=images + 1, samples=len(samples) + 1)
    )
