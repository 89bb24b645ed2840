"""Flow matching: the loss that both models train on.

Shapes: B samples, H actions of a chunk, A dimensions of an action. Source: Lipman et al., Flow Matching for
Generative Modeling, 2023.
"""

from dataclasses import dataclass

import torch

from train.models.blocks import wide


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The loss of one pack, as sums: packs hold different numbers of samples, so means of them would not add up."""

    total: torch.Tensor
    """float32: weighted sum of squared errors."""
    weight: torch.Tensor
    """float32: sum of the weights. Divide by its sum over all packs and ranks of a step."""
    sample_B: torch.Tensor
    """float32: mean of each sample; 0 where unused."""

    @property
    def mean(self) -> torch.Tensor:
        """Of this pack alone."""
        return self.total / self.weight.clamp(min=1)


def squared_error(predicted_BHA: torch.Tensor, target_BHA: torch.Tensor, weight_BHA: torch.Tensor) -> Loss:
    """Return the loss of predicted velocities."""
    errors = (wide(predicted_BHA) - target_BHA).square() * weight_BHA
    sums, weights = errors.sum(dim=(1, 2)), weight_BHA.sum(dim=(1, 2))
    return Loss(total=sums.sum(), weight=weights.sum(), sample_B=(sums / weights.clamp(min=1)).detach())
