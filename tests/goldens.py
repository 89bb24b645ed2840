"""The reference outputs of tests/data/goldens, and their samples as packs for our models."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from train.models.config import GrootConfig, ModelConfig, Pi05Config, VisionConfig
from train.models.groot import Groot
from train.models.inputs import Inputs
from train.models.keys import key_map
from train.models.pi05 import Pi05
from train.packing import Budgets, layout

FOLDER = Path(__file__).parent / "data" / "goldens"
FILES = {"pi05": FOLDER / "pi05_tiny.safetensors", "groot_n15": FOLDER / "groot_tiny.safetensors"}
FAMILIES = tuple(FILES)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample of a golden, or a made one."""

    images: torch.Tensor
    """[views, 3, S, S], only those that are there."""
    ids: torch.Tensor
    """Text; -1 where a token of an image stands."""
    action: torch.Tensor
    noise: torch.Tensor
    time: float
    """As the models scale it."""
    weight: torch.Tensor
    """Of each element in the loss."""
    state: torch.Tensor | None = None
    category: int = 0


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
        return Pi05Config(
            **common, layers=c["depth"], expert_width=c["expert_width"], expert_mlp=c["expert_mlp"]
        )
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


def make(config: ModelConfig, **options: Any) -> Pi05 | Groot:
    """Return an empty model of a configuration."""
    return Pi05(config, **options) if isinstance(config, Pi05Config) else Groot(config, **options)


def golden_model(family: str) -> Pi05 | Groot:
    """Return a model with the golden's weights."""
    model, weights = make(config_of(family)), under(family, "weights/")
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
    model, grads = make(config_of(family)), under(family, "grads/")
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
                images=torch.stack(views),
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
                images=given[f"{at}/pixel_values"],
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
    per_view = config.vision.tokens
    lengths = np.array([len(each.ids) for each in samples], np.int64)
    num_images = sum(len(each.images) for each in samples)
    budgets = budgets or Budgets(tokens=int(lengths.sum()) + 3, images=num_images + 1, samples=len(samples) + 1)
    laid = layout(lengths, budgets)
    side, num_samples = config.vision.image_size, budgets.samples
    images = torch.zeros(budgets.images, side, side, 3)
    starts = torch.full((budgets.images,), budgets.tokens, dtype=torch.int32)
    ids = torch.zeros(budgets.tokens, dtype=torch.int32)
    shape = (num_samples, config.horizon, config.action_dim)
    action, noise, weight = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    time, category = torch.zeros(num_samples), torch.zeros(num_samples, dtype=torch.int64)
    state = torch.zeros(num_samples, getattr(config, "state_dim", 0))
    used = 0
    for at, each in enumerate(samples):
        first = int(laid.cu_seqlens[at])
        ids[first : first + len(each.ids)] = each.ids
        places = torch.nonzero(each.ids < 0)[:, 0]
        for view in range(len(each.images)):
            images[used] = each.images[view].permute(1, 2, 0)
            starts[used] = first + int(places[view * per_view])
            used += 1
        action[at], noise[at], weight[at] = each.action, each.noise, each.weight
        time[at], category[at] = each.time, each.category
        if each.state is not None:
            state[at] = each.state
    counted = torch.zeros(num_samples)
    counted[: len(samples)] = 1
    return Inputs(
        images_ISSC=images,
        image_starts_I=starts,
        token_ids_T=ids,
        positions_T=torch.from_numpy(laid.positions),
        segment_ids_T=torch.from_numpy(laid.segment_ids),
        cu_seqlens=torch.from_numpy(laid.cu_seqlens),
        state_BD=state,
        action_BHA=action,
        weight_BHA=weight,
        weight_B=counted,
        category_B=category,
        seed_B=torch.arange(num_samples),
        noise_BHA=noise,
        time_B=time,
    )

