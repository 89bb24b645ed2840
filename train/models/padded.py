"""The layout of the published trainers: every sample padded to one length, attention with a mask.

It is what packing is measured against, and a second way to the same loss. Nothing trains with it.

Shapes: B samples, L padded tokens of a sample, H actions of a chunk, D features of a head. Source: openpi,
models_pytorch/pi0_pytorch.py.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from train.models.inputs import Inputs
from train.models.packed import Arrange, KeysValues

Kind = Literal["sdpa", "eager"]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of queries and keys, as many of each sample; they attend where a mask allows it."""

    num_samples: int
    seen: torch.Tensor | None
    """bool, broadcast to [B, 1, queries, keys]; None where everything is seen."""
    attention: Kind

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        """Return [rows of q, heads, D]."""
        q, k, v = (each.unflatten(0, (self.num_samples, -1)).transpose(1, 2) for each in (q, k, v))
        seen = self.seen
        if causal:
            square = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
            seen = square if seen is None else seen & square
        if self.attention == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])
        else:
            out = _eager(q, k, v, seen)
        return out.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class PaddedJoint:
    """The layout of pi-0.5."""

    tokens: Rows
    actions: Rows

    def prefix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return what images and text gather from themselves."""
        return self.tokens.attend(q, k, v)

    def suffix(self, q: torch.Tensor, before: KeysValues, own: KeysValues) -> torch.Tensor:
        """Return what actions gather from images, text and actions of their sample."""
        shape = (self.tokens.num_samples, -1)
        k, v = (
            torch.cat([first.unflatten(0, shape), second.unflatten(0, shape)], dim=1).flatten(0, 1)
            for first, second in zip(before, own, strict=True)
        )
        return self.actions.attend(q, k, v)


@dataclass(frozen=True, kw_only=True)
class Padded:
    """Tokens of images and text of a padded batch; the same calls as ``Packed``."""

    inputs: Inputs
    attention: Kind

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each sample, padding not counted."""
        return self._valid.sum(dim=1)

    def segments(self) -> Rows:
        """Return which rows of samples see each other."""
        return self._rows(self._valid[:, None, None])

    def from_stream(self, num_rows: int) -> Rows:
        """Return which tokens a few rows of each sample see: all, padding too, as the published GR00T does."""
        del num_rows
        return self._rows(None)

    def joint(self, horizon: int) -> PaddedJoint:
        """Return the layout of pi-0.5 for H actions a sample."""
        valid_BL = self._valid
        everything = torch.cat([valid_BL, valid_BL.new_ones(len(valid_BL), horizon)], dim=1)
        return PaddedJoint(tokens=self.segments(), actions=self._rows(everything[:, None, None]))

    @property
    def _valid(self) -> torch.Tensor:
        num_samples = len(self.inputs.weight_B)
        return (self.inputs.segment_ids_T < num_samples).unflatten(0, (num_samples, -1))

    def _rows(self, seen: torch.Tensor | None) -> Rows:
        return Rows(num_samples=len(self.inputs.weight_B), seen=seen, attention=self.attention)


def padded(attention: Kind) -> Arrange:
    """Return what ``model.arrange`` may be, for inputs whose samples have L tokens each.

    ``segment_ids_T`` is B at padding, and ``positions_T`` does not count it.
    """

    def arrange(inputs: Inputs, max_tokens: int | None = None) -> Padded:
        del max_tokens
        return Padded(inputs=inputs, attention=attention)

    return arrange


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None) -> torch.Tensor:
    """Attend with all scores in memory, as openpi's PyTorch model does: softmax in float32."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
    if seen is not None:
        scores = scores + torch.where(seen, 0.0, torch.finfo(torch.float32).min).to(scores.dtype)
    return scores.float().softmax(dim=-1).to(q.dtype) @ v
