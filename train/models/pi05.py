"""pi-0.5 on packs of samples.

Shapes: T tokens of images and text, B samples, H actions of a chunk, A dimensions of an action, N features. Source:
openpi, models_pytorch/pi0_pytorch.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from train.models.blocks import AdaRmsNorm, Embedding, ExactLinear, Rotary, rotary, sinusoids, wide
from train.models.checkpointing import Run, plainly
from train.models.config import Pi05Config
from train.models.flow import Loss, squared_error
from train.models.gemma import THETA, ExpertLayer, LastPrefixLayer, PrefixLayer
from train.models.inputs import Inputs
from train.models.packed import Arrange, KeysValues, Layout, Pack, embed, packed
from train.models.siglip import Siglip

_MIN_PERIOD, _MAX_PERIOD = 4e-3, 4.0


class Pi05(nn.Module):
    """The model: a loss in training, actions in sampling."""

    def __init__(self, config: Pi05Config, *, max_tokens: int | None = None) -> None:
        """Make a model with weights that hold anything: import them, or ``train.models.initial.initialise`` it.

        Args:
            max_tokens: the most tokens of images and text of a sample, where it is known to be below the budget.
        """
        super().__init__()
        self.config, self.max_tokens = config, max_tokens
        self.run: Run = plainly
        self.arrange: Arrange = packed
        self.vision = Siglip(config.vision)
        self.connector = ExactLinear(config.vision.width, config.width)
        self.embed = Embedding(config.vocab, config.width)
        self.language = nn.ModuleList([PrefixLayer(config) for _ in range(config.layers - 1)])
        self.last = LastPrefixLayer(config)
        self.action_in = ExactLinear(config.action_dim, config.expert_width)
        self.time_in = ExactLinear(config.expert_width, config.expert_width)
        self.time_out = ExactLinear(config.expert_width, config.expert_width)
        self.expert = nn.ModuleList([ExpertLayer(config) for _ in range(config.layers)])
        self.norm = AdaRmsNorm(config.expert_width, config.expert_width)
        self.action_out = ExactLinear(config.expert_width, config.action_dim)

    def parts(self) -> dict[str, list[nn.Module]]:
        """Return what can be frozen, by name, in the order of computation."""
        return {
            "vision": [self.vision],
            "connector": [self.connector],
            "language": [self.embed, *self.language, self.last],
            "expert": [self.action_in, self.time_in, self.time_out, *self.expert, self.norm, self.action_out],
        }

    def forward(self, inputs: Inputs) -> Loss:
        """Return the loss of a pack."""
        pack = self.arrange(inputs, self.max_tokens)
        layout = pack.joint(self.config.horizon)
        memory = self.remember(pack, layout)
        # Time runs from data at 0 to noise at 1.
        mix_B11 = inputs.time_B[:, None, None]
        noisy_BHA = mix_B11 * inputs.noise_BHA + (1 - mix_B11) * inputs.action_BHA
        velocity_BHA = self.velocity(noisy_BHA, inputs.time_B, (pack, layout, memory))
        return squared_error(velocity_BHA, inputs.noise_BHA - inputs.action_BHA, inputs.weight_BHA)

    @torch.no_grad()
    def sample(self, inputs: Inputs, *, steps: int | None = None) -> torch.Tensor:
        """Return actions [B, H, A], normalised; images and text are read once.

        Args:
            inputs: with the noise to begin at; actions and time are not read.
            steps: from noise to actions; None takes the model's.
        """
        steps = steps or self.config.sampling_steps
        pack = self.arrange(inputs, self.max_tokens)
        layout = pack.joint(self.config.horizon)
        memory = self.remember(pack, layout)
        actions_BHA = inputs.noise_BHA
        for step in range(steps):
            time_B = torch.full_like(inputs.time_B, 1 - step / steps)
            actions_BHA = actions_BHA - self.velocity(actions_BHA, time_B, (pack, layout, memory)) / steps
        return actions_BHA

    def remember(self, pack: Pack, layout: Layout) -> list[KeysValues]:
        """Return the keys and values of images and text, layer by layer."""
        images_IPN = self.connector(self.vision(pack.inputs.images_ISSC, self._dtype))
        x_TN = embed(pack.inputs, self.embed, images_IPN, scale=math.sqrt(self.config.width))
        turns = rotary(pack.inputs.positions_T, self.config.head_dim, THETA)
        memory: list[KeysValues] = []
        for layer in self.language:
            x_TN, keys_values = self.run(layer, x_TN, turns, layout)
            memory.append(keys_values)
        return [*memory, self.last(x_TN, turns)]

    def velocity(
        self, noisy_BHA: torch.Tensor, time_B: torch.Tensor, context: tuple[Pack, Layout, list[KeysValues]]
    ) -> torch.Tensor:
        """Return the predicted velocity, towards noise: float32 [B, H, A]."""
        pack, layout, memory = context
        condition_BN = self._condition(time_B)
        x_BHN = self.action_in(noisy_BHA).to(self._dtype)
        turns = self._turns(pack)
        for layer, before in zip(self.expert, memory, strict=True):
            x_BHN = self.run(layer, x_BHN, condition_BN, turns, before, layout)
        x_BHN, _ = self.norm(x_BHN, condition_BN)
        return self.action_out(wide(x_BHN))

    def _turns(self, pack: Pack) -> Rotary:
        """Return the rotations of actions, whose positions go on behind text."""
        steps_H = torch.arange(self.config.horizon, device=pack.lengths.device)
        return rotary((pack.lengths[:, None] + steps_H).flatten(), self.config.head_dim, THETA)

    def _condition(self, time_B: torch.Tensor) -> torch.Tensor:
        fraction = torch.linspace(0, 1, self.config.expert_width // 2, device=time_B.device, dtype=torch.float64)
        periods = _MIN_PERIOD * (_MAX_PERIOD / _MIN_PERIOD) ** fraction
        features_BN = sinusoids(time_B, 2 * torch.pi / periods).to(time_B.dtype)
        return F.silu(self.time_out(F.silu(self.time_in(features_BN))))

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.config.compute)
