"""Which parts of a model are trained."""

from collections.abc import Collection

from train.models.groot import Groot
from train.models.pi05 import Pi05

PRESETS: dict[str, dict[str, tuple[str, ...]]] = {
    "pi05": {
        "none": (),
        "vision": ("vision",),
        "expert_only": ("vision", "connector", "language"),
    },
    "groot_n15": {
        "none": (),
        "published": ("language",),
        "vlm": ("vision", "language"),
    },
}
"""The parts that published trainers freeze, by family and name.

| family    | name        | who does so                                                                              |
|-----------|-------------|------------------------------------------------------------------------------------------|
| pi05      | none        | openpi, and LeRobot by default                                                           |
| pi05      | vision      | LeRobot's freeze_vision_encoder: the tower, not the connector behind it                  |
| pi05      | expert_only | LeRobot's train_expert_only: all but the expert, the projections of actions and the time |
| groot_n15 | none        | nobody's default; NVIDIA's tune_llm and tune_visual, both true                           |
| groot_n15 | published   | NVIDIA's released config.json and loader: tune_llm false, tune_visual true               |
| groot_n15 | vlm         | NVIDIA's text on N1.5, and LeRobot by default: tune_llm false, tune_visual false         |

Source: LeRobot 0.4.4, policies/pi05/configuration_pi05.py and policies/groot; Isaac-GR00T n1.5, model/gr00t_n1.py.
"""


def freeze(model: Pi05 | Groot, parts: Collection[str]) -> None:
    """Stop training some parts of a model; others stay as they are.

    Call it before sharding, compilation and the optimizer. What lies before the first trained part then keeps nothing
    for the backward pass, and dropout in a frozen part is off.

    Args:
        parts: names of ``model.parts()``, or one of ``PRESETS``.

    Raises:
        ValueError: a part that the model does not have; then nothing is frozen.
    """
    known = model.parts()
    if unknown := sorted(set(parts) - known.keys()):
        raise ValueError(f"parts {unknown} to freeze are not among those of {model.config.family}: {list(known)}")
    for name in parts:
        for module in known[name]:
            module.requires_grad_(requires_grad=False)


def frozen_parts(model: Pi05 | Groot) -> tuple[str, ...]:
    """Return the parts of which no weight is trained, in the order of computation.

    They are what ``train.accounting.step_flops`` takes. A frozen part that has adapters is trained.
    """
    return tuple(
        name
        for name, modules in model.parts().items()
        if not any(weight.requires_grad for module in modules for weight in module.parameters())
    )
