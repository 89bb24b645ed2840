"""What a model takes of a batch: tensors only, so that one compiled graph serves every pack.

Noise, time and dropout are drawn from each sample's own key, so a sample gets the same ones in whatever pack, on
whatever rank and device it is computed.

Shapes: T, I, B budgets of tokens, images and samples; S side of an image; D and A dimensions of state and action; H
actions of a chunk.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch

from train import keyed
from train.batch import Batch
from train.models.config import ModelConfig, Pi05Config

_NOISE_STREAM, _TIME_STREAM, _DROPOUT_STREAM = 1, 2, 3
_BETA_ALPHA = 1.5


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """One pack, ready for a model."""

    images_ISSC: torch.Tensor
    """uint8 RGB, or floats in [-1, 1]."""
    image_starts_I: torch.Tensor
    """int32: first token of each image; T where unused."""
    token_ids_T: torch.Tensor
    """int32: -1 where a token of an image stands."""
    positions_T: torch.Tensor
    """int32: within the segment."""
    segment_ids_T: torch.Tensor
    """int32: sample of each token; B behind the last one."""
    cu_seqlens: torch.Tensor
    """int32 [B + 2]."""
    state_BD: torch.Tensor
    """float32, normalised."""
    action_BHA: torch.Tensor
    """float32, normalised."""
    weight_BHA: torch.Tensor
    """float32: of each element in the loss; 0 for what does not count."""
    weight_B: torch.Tensor
    """float32: 1 for a sample."""
    category_B: torch.Tensor
    """int64: embodiment, as the model numbers them."""
    seed_B: torch.Tensor
    """int64: for dropout, 32 bits of each sample's key."""
    noise_BHA: torch.Tensor
    """float32, from a normal distribution."""
    time_B: torch.Tensor
    """float32: between noise and data, as the model counts it."""

    def to(self, device: torch.device | str) -> "Inputs":
        """Return the inputs on a device, copied without waiting where the memory is pinned."""
        return Inputs(**{each.name: getattr(self, each.name).to(device, non_blocking=True) for each in fields(self)})


def inputs_of(batch: Batch, config: ModelConfig, *, categories: tuple[int, ...] | None = None, draw: int = 0) -> Inputs:
    """Return what a model takes of a batch of tensors, on their device.

    Args:
        categories: the model's number of each embodiment of the plan; None takes the plan's own numbers.
        draw: for other noise of the same samples, as in several validation passes.

    Raises:
        ValueError: the batch does not fit the model.
    """
    check_sizes(batch, config)
    key_B = batch.key_B
    shape = (len(key_B), config.horizon, config.action_dim)
    dims = torch.arange(config.action_dim, device=key_B.device)
    real_B1A = (dims < batch.action_dim_B[:, None])[:, None]
    counts = batch.weight_B[:, None, None].expand(shape)
    if not isinstance(config, Pi05Config) or config.loss_dims == "real":
        counts = counts * real_B1A
    if config.loss_actions == "valid":
        counts = counts * batch.action_valid_BH[:, :, None]
    category_B = batch.embodiment_B
    if categories is not None:
        _check_categories(categories, config)
        category_B = torch.tensor(categories, device=key_B.device)[category_B]
    return Inputs(
        images_ISSC=batch.images_ISSC,
        image_starts_I=batch.image_starts_I,
        token_ids_T=batch.token_ids_T,
        positions_T=batch.positions_T,
        segment_ids_T=batch.segment_ids_T,
        cu_seqlens=batch.cu_seqlens,
        state_BD=batch.state_BPD[:, -1],
        action_BHA=batch.action_BHA,
        weight_BHA=counts.float().contiguous(),
        weight_B=batch.weight_B,
        category_B=category_B,
        seed_B=_bits(key_B, _DROPOUT_STREAM + 4 * draw) & 0xFFFFFFFF,
        noise_BHA=normals(key_B, shape[1:], stream=_NOISE_STREAM + 4 * draw),
        time_B=_times(uniforms(key_B, (1,), stream=_TIME_STREAM + 4 * draw)[:, 0], config),
    )


def check_sizes(batch: Batch, config: ModelConfig) -> None:
    """Raise ValueError where a batch's arrays do not have a model's sizes."""
    horizon, action_dim = batch.action_BHA.shape[1:]
    side, state_dim = batch.images_ISSC.shape[1], batch.state_BPD.shape[2]
    pairs = [
        ("horizon", horizon, config.horizon),
        ("action_dim", action_dim, config.action_dim),
        ("image_size", side, config.vision.image_size),
    ]
    if not isinstance(config, Pi05Config):
        pairs.append(("state_dim", state_dim, config.state_dim))
    wrong = [f"{name} is {found}, the model's {wanted}" for name, found, wanted in pairs if found != wanted]
    if wrong:
        raise ValueError(f"the batch does not fit the model: {'; '.join(wrong)}. Give the loader the model's sizes")


def _check_categories(categories: tuple[int, ...], config: ModelConfig) -> None:
    if isinstance(config, Pi05Config):
        return
    if wrong := [each for each in categories if not 0 <= each < config.categories]:
        raise ValueError(
            f"categories {wrong} are not among the model's 0 ... {config.categories - 1}; map them to those"
        )


def uniforms(key_B: torch.Tensor, shape: tuple[int, ...], *, stream: int) -> torch.Tensor:
    """Return float32 numbers in (0, 1) of each key: [B, *shape]; the same on every device."""
    count = int(torch.Size(shape).numel())
    counter = torch.arange(count, device=key_B.device)
    words = _mix(_bits(key_B, stream)[:, None], counter)
    # 23 bits, at the middle of their intervals, which float32 holds exactly: neither 0 nor 1 comes out.
    return (((words >> 41) & 0x7FFFFF).float() + 0.5).mul(2.0**-23).unflatten(1, shape)


def normals(key_B: torch.Tensor, shape: tuple[int, ...], *, stream: int) -> torch.Tensor:
    """Return float32 numbers from a normal distribution of each key: [B, *shape].

    Source: Box and Muller, 1958.
    """
    first, second = uniforms(key_B, (2, *shape), stream=stream).unbind(1)
    return (-2 * first.log()).sqrt() * (2 * torch.pi * second).cos()


def _times(uniform_B: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """Return times from Beta(1.5, 1), which stays near noise: pi-0.5 counts from data, GR00T from noise."""
    beta_B = uniform_B ** (1 / _BETA_ALPHA)
    return 0.999 * beta_B + 0.001 if isinstance(config, Pi05Config) else (0.999 - beta_B) / 0.999


def dropout(x_TN: torch.Tensor, seed_T: torch.Tensor, salt: int, probability: float) -> torch.Tensor:
    """Drop elements by the seeds of their rows, the same in whatever pack a row lies.

    Args:
        seed_T: int64 of 32 bits.
        salt: of the place in the layer.
    """
    features = torch.arange(x_TN.shape[-1], device=x_TN.device) * 0x1E3779B1 + salt * 0x5BD1E995
    words = _hash32(seed_T[..., None] ^ (features & 0xFFFFFFFF))
    kept = words >= int(probability * 2**32)
    return x_TN * (kept * (1 / (1 - probability))).to(x_TN.dtype)


def row_seeds(seed_B: torch.Tensor, samples: torch.Tensor, positions: torch.Tensor, *, salt: int) -> torch.Tensor:
    """Return a seed of each row from its sample's and its position, in the shape of these: int64 of 32 bits.

    Args:
        samples: of each row; rows of none have B.
        salt: of the layer.
    """
    padded = torch.cat([seed_B, seed_B.new_zeros(1)])
    return _hash32(_hash32(padded[samples] ^ salt) ^ (positions.long() * 0x1E3779B1 & 0xFFFFFFFF))


def _hash32(words: torch.Tensor) -> torch.Tensor:
    """Return a hash of 32 bits of words of 32 bits, in int64, whose products stay below 2^63."""
    for _ in range(2):
        words = ((words ^ (words >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    return words ^ (words >> 15)


def _mix(key: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """Return ``train.keyed.mix`` of the same bits, as int64."""
    return _finish(_finish(counter * _signed(keyed.STEP) + _signed(keyed.STEP)) ^ key)


def _finish(words: torch.Tensor) -> torch.Tensor:
    words = (words ^ _shifted(words, 30)) * _signed(keyed.FIRST)
    words = (words ^ _shifted(words, 27)) * _signed(keyed.SECOND)
    return words ^ _shifted(words, 31)


def _bits(key_B: torch.Tensor, stream: int) -> torch.Tensor:
    return _mix(key_B, torch.tensor(stream, device=key_B.device))


def _shifted(words: torch.Tensor, by: int) -> torch.Tensor:
    """Shift right, with zeros from the left."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _signed(word: np.uint64) -> int:
    return int(word.astype(np.int64))
