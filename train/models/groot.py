"""GR00T N1.5 on packs of samples.

Shapes: T tokens of images and text, B samples, H actions of a chunk, A and D dimensions of action and state, R tokens
of the action stream, N features. Source: Isaac-GR00T n1.5, model/action_head/flow_matching_action_head.py.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from train.models.blocks import (
    CategoryLinear,
    Embedding,
    ExactLinear,
    Groups,
    LayerNorm,
    RmsNorm,
    group,
    log_spaced,
    rotary,
    sinusoids,
    wide,
)
from train.models.checkpointing import Run, plainly
from train.models.config import GrootConfig
from train.models.dit import Dit, Dropout, Vl, VlBlock
from train.models.flow import Loss, squared_error
from train.models.inputs import Inputs, row_seeds
from train.models.packed import Arrange, Pack, embed, packed
from train.models.qwen3 import THETA, Qwen3Layer
from train.models.siglip import Siglip

_TIME_STEPS = 1000


class CategoryMlp(nn.Module):
    """Two projections with weights for each category."""

    def __init__(self, categories: int, size: int, hidden: int, out: int) -> None:
        super().__init__()
        self.layer1 = CategoryLinear(categories, size, hidden)
        self.layer2 = CategoryLinear(categories, hidden, out)

    def forward(self, x_BRN: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Return [B, R, out], samples sorted as they came."""
        return self.layer2(F.relu(self.layer1(x_BRN, groups)), groups)


class ActionEncoder(nn.Module):
    """Noisy actions and the time to tokens."""

    def __init__(self, categories: int, size: int, width: int) -> None:
        super().__init__()
        self.layer1 = CategoryLinear(categories, size, width)
        self.layer2 = CategoryLinear(categories, 2 * width, width)
        self.layer3 = CategoryLinear(categories, width, width)

    def forward(self, x_BHA: torch.Tensor, step_B: torch.Tensor, groups: Groups) -> torch.Tensor:
        """Return [B, H, N], samples sorted as they came."""
        x_BHN = self.layer1(x_BHA, groups)
        half = x_BHN.shape[-1] // 2
        time_BHN = sinusoids(step_B, log_spaced(half, half, step_B.device)).to(x_BHN.dtype)[:, None].expand(x_BHN.shape)
        return self.layer3(F.silu(self.layer2(torch.cat([x_BHN, time_BHN], dim=-1), groups)), groups)


class Groot(nn.Module):
    """The model: a loss in training, actions in sampling."""

    def __init__(self, config: GrootConfig, *, max_tokens: int | None = None) -> None:
        """Make a model with weights that hold anything: import them, or ``train.models.initial.initialise`` it.

        Args:
            max_tokens: the most tokens of images and text of a sample, where it is known to be below the budget.
        """
        super().__init__()
        self.config, self.max_tokens = config, max_tokens
        self.run: Run = plainly
        self.arrange: Arrange = packed
        width, dit_width, categories = config.width, config.dit_width, config.categories
        self.vision = Siglip(config.vision)
        self.connector = ExactLinear(config.vision.width, width)
        self.embed = Embedding(config.vocab, width)
        self.language = nn.ModuleList([Qwen3Layer(config) for _ in range(config.layers)])
        self.norm = RmsNorm(width)
        self.vl_norm = LayerNorm(width)
        self.vl = nn.ModuleList([VlBlock(width, config.vl_heads) for _ in range(config.vl_layers)])
        self.state_encoder = CategoryMlp(categories, config.state_dim, config.hidden, dit_width)
        self.action_encoder = ActionEncoder(categories, config.action_dim, dit_width)
        self.position = Embedding(config.positions, dit_width)
        self.future = Embedding(config.future_tokens, dit_width)
        self.dit = Dit(dit_width, heads=config.dit_heads, layers=config.dit_layers, other=width, out=config.hidden)
        self.action_decoder = CategoryMlp(categories, config.hidden, config.hidden, config.action_dim)

    def parts(self) -> dict[str, list[nn.Module]]:
        """Return what can be frozen, by name, in the order of computation."""
        return {
            "vision": [self.vision, self.connector],
            "language": [self.embed, *self.language, self.norm],
            "vl": [self.vl_norm, *self.vl],
            "projector": [self.state_encoder, self.action_encoder, self.position, self.action_decoder],
            "dit": [self.future, self.dit],
        }

    def forward(self, inputs: Inputs) -> Loss:
        """Return the loss of a pack."""
        pack = self.arrange(inputs, self.max_tokens)
        vl_TN = self.attend(pack, self.backbone(pack))
        # Time runs from noise at 0 to data at 1.
        mix_B11 = inputs.time_B[:, None, None]
        noisy_BHA = (1 - mix_B11) * inputs.noise_BHA + mix_B11 * inputs.action_BHA
        step_B = (inputs.time_B * _TIME_STEPS).long()
        vl = [(vl_TN, pack.from_stream(self.config.action_tokens))] * self.config.dit_layers
        velocity_BHA = self.velocity(noisy_BHA, step_B, (pack, vl))
        return squared_error(velocity_BHA, inputs.action_BHA - inputs.noise_BHA, inputs.weight_BHA)

    @torch.no_grad()
    def sample(self, inputs: Inputs, *, steps: int | None = None) -> torch.Tensor:
        """Return actions [B, H, A], normalised; images and text are read once, as are their keys and values.

        Args:
            inputs: with the noise to begin at; actions and time are not read.
            steps: from noise to actions; None takes the model's.
        """
        steps = steps or self.config.sampling_steps
        pack = self.arrange(inputs, self.max_tokens)
        vl_TN = self.attend(pack, self.backbone(pack))
        vl = self.dit.remember((vl_TN, pack.from_stream(self.config.action_tokens)))
        actions_BHA = inputs.noise_BHA
        for step in range(steps):
            step_B = torch.full_like(inputs.category_B, int(step / steps * _TIME_STEPS))
            actions_BHA = actions_BHA + self.velocity(actions_BHA, step_B, (pack, vl)) / steps
        return actions_BHA

    def backbone(self, pack: Pack) -> torch.Tensor:
        """Return what the vision-language model makes of images and text: [T, N]."""
        images_IPN = self.connector(self.vision(pack.inputs.images_ISSC, self._dtype))
        x_TN = embed(pack.inputs, self.embed, images_IPN)
        turns = rotary(pack.inputs.positions_T, self.config.head_dim, THETA)
        segments = pack.segments()
        for layer in self.language:
            x_TN = self.run(layer, x_TN, turns, segments)
        return self.norm(x_TN)

    def attend(self, pack: Pack, features_TN: torch.Tensor) -> torch.Tensor:
        """Return what the action head's self-attention makes of the backbone's features: [T, N]."""
        x_TN, segments = self.vl_norm(features_TN), pack.segments()
        inputs = pack.inputs
        seeds_T = self._seeds(inputs.seed_B, inputs.segment_ids_T, inputs.positions_T, self.vl)
        for at, block in enumerate(self.vl):
            drop = None if seeds_T is None else Dropout(seeds=seeds_T[at], probability=self.config.dropout)
            x_TN = self.run(block, x_TN, segments, drop)
        return x_TN

    def velocity(
        self, noisy_BHA: torch.Tensor, step_B: torch.Tensor, context: tuple[Pack, Sequence[Vl]]
    ) -> torch.Tensor:
        """Return the predicted velocity, towards data: float32 [B, H, A]."""
        pack, vl = context
        config, inputs = self.config, pack.inputs
        groups = group(inputs.category_B, config.categories)
        order_B, inverse_B = groups.order_B, groups.inverse_B
        state_B1N = self.state_encoder(inputs.state_BD[order_B][:, None].to(self._dtype), groups)[inverse_B]
        action_BHN = self.action_encoder(noisy_BHA[order_B].to(self._dtype), step_B[order_B], groups)[inverse_B]
        action_BHN = action_BHN + self.position.weight[: config.horizon].to(self._dtype)
        future_BFN = self.future.weight.to(self._dtype).expand(len(step_B), -1, -1)
        x_BRN = torch.cat([state_B1N, future_BFN, action_BHN], dim=1)
        samples_BR = torch.arange(len(step_B), device=step_B.device)[:, None].expand(x_BRN.shape[:2])
        rows_BR = torch.arange(x_BRN.shape[1], device=step_B.device).expand(x_BRN.shape[:2])
        seeds_BR = self._seeds(inputs.seed_B, samples_BR, rows_BR, self.dit.blocks)
        drop = None if seeds_BR is None else (seeds_BR, config.dropout)
        x_BRN = self.dit(x_BRN, step_B, vl, drop)
        # Only actions are decoded.
        actions_BHN = x_BRN[:, -config.horizon :]
        return wide(self.action_decoder(actions_BHN[order_B], groups)[inverse_B])

    def _seeds(
        self, seed_B: torch.Tensor, samples: torch.Tensor, rows: torch.Tensor, blocks: nn.ModuleList
    ) -> list[torch.Tensor] | None:
        """Return the seeds of rows in each block for dropout in training; None where the blocks are frozen."""
        is_trained = any(weight.requires_grad for weight in blocks.parameters())
        if not (self.training and is_trained and self.config.dropout):
            return None
        first = 0 if blocks is self.vl else len(self.vl)
        return [row_seeds(seed_B, samples, rows, salt=first + at) for at in range(len(blocks))]

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.config.compute)
