"""Weights of a trained model in FP8, one scale for each block of 128 by 128, for inference.

Shapes: K features in, N features out, R and C blocks of rows and columns.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import nan, sqrt

import torch
from torch import nn

from train.models.blocks import Linear
from train.precision import PrecisionConfig, selected

BLOCK = 128

_DTYPE = torch.float8_e4m3fn


@dataclass(frozen=True, kw_only=True, slots=True)
class Loss:
    """What FP8 does to one weight."""

    error: float
    """Frobenius norm of what was lost; NaN of a weight on the meta device."""
    norm: float
    """Frobenius norm of the weight."""
    bytes_before: int
    bytes_after: int
    """With the scales."""

    @property
    def relative_error(self) -> float:
        """Return the share that was lost; 0 of a weight of zeros."""
        return self.error / self.norm if self.norm else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantisationReport:
    """What ``quantise`` did to a model."""

    modules: Mapping[str, Loss]
    """By the names of the modules that were replaced."""
    skipped: Mapping[str, str]
    """Why, by the name of each large projection that was not."""

    @property
    def total(self) -> Loss:
        """Return the loss of all weights together."""
        losses = self.modules.values()
        return Loss(
            error=sqrt(sum(each.error**2 for each in losses)),
            norm=sqrt(sum(each.norm**2 for each in losses)),
            bytes_before=sum(each.bytes_before for each in losses),
            bytes_after=sum(each.bytes_after for each in losses),
        )


def to_blocks(weight_NK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (weight in e4m3 [N, K], what each block is to be multiplied by, in float32 [R, C]).

    Blocks at the edges are smaller. The largest value of a block becomes 448, the largest of e4m3. So no value errs by
    more than 1/16 of itself, or 1/1024 of 1/448 of the block's largest where that is more.
    """
    N, K = weight_NK.shape
    rows, columns = -(-N // BLOCK), -(-K // BLOCK)
    padded = nn.functional.pad(weight_NK.float(), (0, columns * BLOCK - K, 0, rows * BLOCK - N))
    largest_RC = padded.abs().reshape(rows, BLOCK, columns, BLOCK).amax((1, 3))
    # A block of zeros, too, is divided by something.
    scale_RC = (largest_RC / torch.finfo(_DTYPE).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (weight_NK.float() / _spread(scale_RC, N, K)).to(_DTYPE), scale_RC


def from_blocks(weight_NK: torch.Tensor, scale_RC: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the weight that ``to_blocks`` rounded [N, K]."""
    N, K = weight_NK.shape
    return (weight_NK.float() * _spread(scale_RC, N, K)).to(dtype)


class BlockLinear(nn.Module):
    """A large projection whose weight is held in FP8, and multiplied in the type of the activations.

    It halves the memory of bfloat16, and is not faster: the weight is made whole again for each product. A GPU could
    multiply in FP8: on Hopper with CUDA 12.9 ``torch.nn.functional.scaled_mm`` takes weights in blocks of 128 by 128,
    which these are, with activations rounded in blocks of 1 by 128, at up to twice the rate of bfloat16 and without
    the whole weight in memory. That also rounds the activations, so it is another model, to be evaluated anew.

    Source: the names and the layout of weight and scales are those of DeepSeek-V3's checkpoints.
    """

    weight: torch.Tensor
    weight_scale_inv: torch.Tensor

    def __init__(self, module: Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = module.in_features, module.out_features
        weight, scale = to_blocks(module.weight.detach())
        self.register_buffer("weight", weight)
        self.register_buffer("weight_scale_inv", scale)
        self.bias = module.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project [..., in] to [..., out], in the type of x."""
        weight = from_blocks(self.weight, self.weight_scale_inv, x.dtype)
        return nn.functional.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:  # noqa: FBT001, FBT002 -- torch's signature
        before = {name: getattr(self, name) for name in ("weight", "weight_scale_inv")}
        super()._apply(fn, recurse)
        # ``model.bfloat16()`` is meant for the weights that are not rounded yet.
        for name, buffer in before.items():
            after = getattr(self, name)
            if after.dtype != buffer.dtype:
                setattr(self, name, buffer.to(after.device))
        return self


def quantise(model: nn.Module, config: PrecisionConfig) -> QuantisationReport:
    """Replace the weights of the large projections of a trained model by FP8, in place.

    The projections are those of a model as it is built, in high precision: load the state of one that was trained in
    FP8 into a new model. A quantised model's state is loaded into another that ``quantise`` was applied to.

    Args:
        config: of the back end block. All large projections are converted, or those of ``min_features`` or more.

    Raises:
        ValueError: another back end, nothing to convert, or a weight that is not finite.
    """
    if config.backend != "block":
        raise ValueError(
            f"quantise is the back end block, and the config says {config.backend}; training has the others"
        )
    chosen, skipped = selected(model, config)
    for name, module in chosen.items():
        if not module.weight.is_meta and not bool(torch.isfinite(module.weight).all()):
            raise ValueError(f"the weight of {name} has NaN or infinities; take a checkpoint from before it diverged")
    made: dict[int, BlockLinear] = {}
    losses: dict[str, Loss] = {}
    for name, module in chosen.items():
        if id(module) not in made:
            made[id(module)] = BlockLinear(module)
            losses[name] = _loss(module.weight.detach(), made[id(module)])
        model.set_submodule(name, made[id(module)].train(module.training))
    return QuantisationReport(modules=losses, skipped=skipped)


def _loss(weight_NK: torch.Tensor, made: BlockLinear) -> Loss:
    error, norm = nan, nan
    if not weight_NK.is_meta:
        before = weight_NK.float()
        lost = from_blocks(made.weight, made.weight_scale_inv, torch.float32) - before
        error, norm = (float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in (lost, before))
    return Loss(
        error=error,
        norm=norm,
        bytes_before=weight_NK.nbytes,
        bytes_after=made.weight.nbytes + made.weight_scale_inv.nbytes,
    )


def _spread(scale_RC: torch.Tensor, N: int, K: int) -> torch.Tensor:
    """Return the scale of each value [N, K]."""
    return scale_RC.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]
