"""Samples put together by hand, packed or padded: what speed is measured on, with no lake at hand.

Shapes: S side of an image, H actions of a chunk, A and D dimensions of action and state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from train.models.config import GrootConfig, ModelConfig
from train.models.inputs import Inputs
from train.packing import Budgets, layout


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One sample."""

    images: torch.Tensor
    """uint8, or floats in [-1, 1]: [views, S, S, 3]."""
    ids: torch.Tensor
    """Of text; -1 where a token of an image stands [tokens]."""
    action: torch.Tensor
    """float32 [H, A]."""
    noise: torch.Tensor
    """float32 [H, A]."""
    time: float
    """As the model counts it."""
    weight: torch.Tensor
    """float32: of each element in the loss [H, A]."""
    state: torch.Tensor | None = None
    """float32 [D]."""
    category: int = 0
    """Embodiment, as the model numbers them."""


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """What the cost of a sample depends on."""

    views: int
    text: int
    """Tokens."""

    def tokens(self, config: ModelConfig) -> int:
        """Return tokens of images and text."""
        return self.views * config.vision.tokens + self.text


def random_sample(config: ModelConfig, lengths: Lengths, *, seed: int) -> Sample:
    """Return a sample of some lengths whose contents are random; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    side, shape = config.vision.image_size, (config.horizon, config.action_dim)
    ids = torch.randint(0, config.vocab, (lengths.text,), generator=generator)
    return Sample(
        images=torch.randint(0, 256, (lengths.views, side, side, 3), generator=generator, dtype=torch.uint8),
        ids=torch.cat([torch.full((lengths.views * config.vision.tokens,), -1), ids]),
        action=torch.randn(shape, generator=generator),
        noise=torch.randn(shape, generator=generator),
        time=0.05 + 0.9 * torch.rand((), generator=generator).item(),
        weight=torch.ones(shape),
        state=torch.randn(config.state_dim, generator=generator) if isinstance(config, GrootConfig) else None,
        category=seed % config.categories if isinstance(config, GrootConfig) else 0,
    )


def packed_inputs(config: ModelConfig, samples: Sequence[Sample], budgets: Budgets) -> Inputs:
    """Return one pack of samples.

    Raises:
        ValueError: they exceed the budgets.
    """
    laid = layout(np.array([len(each.ids) for each in samples], np.int64), budgets)
    ids = torch.zeros(budgets.tokens, dtype=torch.int32)
    starts: list[int] = []
    for first, each in zip(laid.cu_seqlens.tolist(), samples, strict=False):
        ids[first : first + len(each.ids)] = each.ids
        starts += (first + _image_starts(each.ids, config.vision.tokens)).tolist()
    return _inputs(
        config,
        samples,
        budgets,
        {
            "images_ISSC": _images(config, [each.images for each in samples], budgets.images),
            "image_starts_I": _filled(starts, budgets.images, budgets.tokens),
            "token_ids_T": ids,
            "positions_T": torch.from_numpy(laid.positions),
            "segment_ids_T": torch.from_numpy(laid.segment_ids),
            "cu_seqlens": torch.from_numpy(laid.cu_seqlens),
        },
    )


def padded_inputs(config: ModelConfig, samples: Sequence[Sample], *, to: Lengths | None = None) -> Inputs:
    """Return a batch of samples, each padded to as many tokens, for ``train.models.padded``.

    Args:
        to: views, computed like any other, and text that each is padded to; None pads behind each to the longest.

    Raises:
        ValueError: a sample has more.
    """
    per_view, num_samples = config.vision.tokens, len(samples)
    length = max(len(each.ids) for each in samples) if to is None else to.tokens(config)
    ids = torch.zeros(num_samples, length, dtype=torch.int32)
    valid = torch.zeros(num_samples, length, dtype=torch.bool)
    images, starts = [], []
    for row, each in enumerate(samples):
        if to is None:
            place = torch.arange(len(each.ids))
            own = _image_starts(each.ids, per_view)
            images.append(each.images)
        else:
            # Images first, those that are missing too, text behind them: as openpi lays samples out.
            is_text = each.ids >= 0
            if len(each.images) > to.views or int(is_text.sum()) > to.text:
                raise ValueError(f"a sample has more than {to.views} views or {to.text} tokens of text")
            place = torch.where(is_text, to.views * per_view + is_text.cumsum(0) - 1, (~is_text).cumsum(0) - 1)
            own = per_view * torch.arange(to.views)
            images.append(_images(config, [each.images], to.views))
            ids[row, : to.views * per_view] = -1
        ids[row, place] = each.ids.to(torch.int32)
        valid[row, place] = True
        starts += (row * length + own).tolist()
    budgets = Budgets(tokens=num_samples * length, images=len(starts), samples=num_samples)
    positions = (valid.cumsum(1) - 1).clamp(min=0)
    owner = torch.where(valid, torch.arange(num_samples)[:, None], num_samples)
    return _inputs(
        config,
        samples,
        budgets,
        {
            "images_ISSC": torch.cat(images),
            "image_starts_I": torch.tensor(starts, dtype=torch.int32),
            "token_ids_T": ids.flatten(),
            "positions_T": positions.flatten().to(torch.int32),
            "segment_ids_T": owner.flatten().to(torch.int32),
            "cu_seqlens": (length * torch.arange(num_samples + 2)).clamp(max=num_samples * length).to(torch.int32),
        },
    )


def _inputs(config: ModelConfig, samples: Sequence[Sample], budgets: Budgets, laid: dict[str, torch.Tensor]) -> Inputs:
    shape = (budgets.samples, config.horizon, config.action_dim)
    action, noise, weight = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    state = torch.zeros(budgets.samples, config.state_dim if isinstance(config, GrootConfig) else 0)
    for at, each in enumerate(samples):
        action[at], noise[at], weight[at] = each.action, each.noise, each.weight
        if each.state is not None:
            state[at] = each.state
    return Inputs(
        **laid,
        state_BD=state,
        action_BHA=action,
        weight_BHA=weight,
        weight_B=_filled([1.0] * len(samples), budgets.samples, 0.0),
        category_B=_filled([each.category for each in samples], budgets.samples, 0).long(),
        seed_B=torch.arange(budgets.samples),
        noise_BHA=noise,
        time_B=_filled([each.time for each in samples], budgets.samples, 0.0),
    )


def _image_starts(ids: torch.Tensor, per_view: int) -> torch.Tensor:
    """Return the first token of each image."""
    return torch.nonzero(ids < 0)[::per_view, 0]


def _images(config: ModelConfig, images: Sequence[torch.Tensor], count: int) -> torch.Tensor:
    """Return images one after another, with black ones behind them."""
    side = config.vision.image_size
    found = torch.cat([*images, torch.zeros(0, side, side, 3, dtype=images[0].dtype if images else torch.uint8)])
    return torch.cat([found, found.new_zeros(count - len(found), side, side, 3)])


def _filled(values: Sequence[float], count: int, rest: float) -> torch.Tensor:
    dtype = torch.float32 if isinstance(rest, float) else torch.int32
    return torch.tensor([*values, *[rest] * (count - len(values))], dtype=dtype)
