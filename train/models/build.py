"""Build a model from its configuration."""

import torch

from train.models.config import CONFIGS, GrootConfig, ModelConfig
from train.models.groot import Groot
from train.models.initial import initialise
from train.models.pi05 import Pi05


def config_named(name: str) -> ModelConfig:
    """Return a configuration by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in CONFIGS:
        raise ValueError(f"no model is called {name!r}; there are {', '.join(CONFIGS)}")
    return CONFIGS[name]


def build(
    config: ModelConfig,
    *,
    device: torch.device | str = "cpu",
    seed: int | None = None,
    max_tokens: int | None = None,
) -> Pi05 | Groot:
    """Return a model in float32.

    Args:
        device: meta makes one without memory, to count or to shard.
        seed: of new weights; None leaves memory as it is, for published weights to be read into.
        max_tokens: the most tokens of images and text of a sample, where it is known to be below the budget.
    """
    with torch.device("meta"):
        kind = Groot if isinstance(config, GrootConfig) else Pi05
        model = kind(config, max_tokens=max_tokens)  # type: ignore[arg-type]
    if torch.device(device).type == "meta":
        return model
    model.to_empty(device=device)
    if seed is not None:
        initialise(model, seed=seed)
    return model
