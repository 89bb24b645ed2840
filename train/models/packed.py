"""Where the samples of a pack lie, as attention and embeddings need it.

Nothing is computed behind the last sample but what a matrix product of fixed size computes anyway: the tail belongs to
no segment, so attention gives zeros there.

Shapes: T tokens, B samples, I images, P tokens of an image, H actions of a chunk, N features, K heads of keys, D
features of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from train.attention import varlen_attn
from train.models.blocks import Embedding
from train.models.inputs import Inputs

KeysValues = tuple[torch.Tensor, torch.Tensor]
"""Of one layer, keys rotated: [T, K, D] each."""


class Attention(Protocol):
    """Rows of queries, rows of keys, and which see which."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        """Return [rows of q, heads, D]."""
        ...


class Layout(Protocol):
    """How tokens, and the actions that attend to them, lie in pi-0.5."""

    def prefix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return what images and text gather from themselves: [T, heads, D]."""
        ...

    def suffix(self, q: torch.Tensor, before: KeysValues, own: KeysValues) -> torch.Tensor:
        """Return what actions gather from images, text and actions of their sample: [B H, heads, D]."""
        ...


class Pack(Protocol):
    """Samples laid side by side, somehow: packed, or padded as the published trainers do."""

    @property
    def inputs(self) -> Inputs:
        """What the model takes."""
        ...

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of images and text of each sample, padding not counted."""
        ...

    def segments(self) -> Attention:
        """Return the attention of samples to themselves."""
        ...

    def from_stream(self, num_rows: int) -> Attention:
        """Return the attention of a few rows of each sample [B x rows] to its images and text."""
        ...

    def joint(self, horizon: int) -> Layout:
        """Return the layout of pi-0.5 for H actions a sample."""
        ...


Arrange = Callable[[Inputs, int | None], Pack]
"""Lays the samples of some inputs, of which none has more tokens than a number."""


@dataclass(frozen=True, kw_only=True)
class Segments:
    """Which rows of queries attend to which rows of keys."""

    cu_q: torch.Tensor
    """int32 [segments + 1]."""
    cu_k: torch.Tensor
    """int32 [segments + 1]."""
    max_q: int
    """No segment has more queries."""
    max_k: int
    """No segment has more keys."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = False) -> torch.Tensor:
        """Return [rows of q, heads, D]; rows outside segments are zero."""
        return varlen_attn(q, k, v, self.cu_q, self.cu_k, self.max_q, self.max_k, causal=causal)


@dataclass(frozen=True, kw_only=True)
class JointLayout:
    """The layout of pi-0.5: images and text [T], then actions [B x H] that attend to both."""

    tokens: Segments
    actions: Segments
    """Queries are actions; keys are the images, text and actions of each sample, one sample after another."""
    rows: torch.Tensor
    """int64 [T + B H]: where each token, then each action, stands among those keys."""

    def prefix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return what images and text gather from themselves: [T, heads, D]."""
        return self.tokens.attend(q, k, v)

    def suffix(self, q: torch.Tensor, before: KeysValues, own: KeysValues) -> torch.Tensor:
        """Return what actions gather from images, text and actions of their sample: [B H, heads, D]."""
        k, v = (self._joined(first, second) for first, second in zip(before, own, strict=True))
        return self.actions.attend(q, k, v)

    def _joined(self, before_TKD: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        both = torch.cat([before_TKD, own])
        # Every row is written once, so neither this nor its gradient adds anything up.
        return torch.empty_like(both).index_copy(0, self.rows, both)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """Tokens of images and text of a pack."""

    inputs: Inputs
    cu_B1: torch.Tensor
    """int32 [B + 1]: where samples begin; behind the last one, where it ends."""
    max_tokens: int
    """No sample has more."""

    @property
    def lengths(self) -> torch.Tensor:
        """int32: tokens of each sample; 0 where unused."""
        return self.cu_B1.diff()

    def segments(self) -> Segments:
        """Return the segments of attention of samples to themselves."""
        return Segments(cu_q=self.cu_B1, cu_k=self.cu_B1, max_q=self.max_tokens, max_k=self.max_tokens)

    def from_stream(self, num_rows: int) -> Segments:
        """Return the segments in which a few rows of each sample [B x rows] attend to its images and text."""
        rows_B1 = num_rows * torch.arange(len(self.cu_B1), device=self.cu_B1.device, dtype=torch.int32)
        return Segments(cu_q=rows_B1, cu_k=self.cu_B1, max_q=num_rows, max_k=self.max_tokens)

    def joint(self, horizon: int) -> JointLayout:
        """Return the layout of pi-0.5 for H actions a sample."""
        segment_ids_T = self.inputs.segment_ids_T
        device, num_samples = segment_ids_T.device, len(self.cu_B1) - 1
        actions = torch.arange(num_samples * horizon, device=device)
        own = self.cu_B1[1:].repeat_interleave(horizon) + actions
        tokens_T = torch.arange(len(segment_ids_T), device=device) + horizon * segment_ids_T
        stream = self.from_stream(horizon)
        joined = Segments(
            cu_q=stream.cu_q, cu_k=self.cu_B1 + stream.cu_q, max_q=horizon, max_k=self.max_tokens + horizon
        )
        return JointLayout(tokens=self.segments(), actions=joined, rows=torch.cat([tokens_T, own]).long())


def packed(inputs: Inputs, max_tokens: int | None = None) -> Packed:
    """Return where the samples of a pack lie.

    Args:
        max_tokens: the most tokens of a sample; None takes the budget.
    """
    num_tokens, num_samples = len(inputs.token_ids_T), len(inputs.weight_B)
    used = (inputs.segment_ids_T < num_samples).sum().to(torch.int32)
    return Packed(
        inputs=inputs,
        cu_B1=torch.minimum(inputs.cu_seqlens[: num_samples + 1], used),
        max_tokens=max_tokens or num_tokens,
    )


def embed(inputs: Inputs, table: Embedding, features_IPN: torch.Tensor, *, scale: float = 1) -> torch.Tensor:
    """Return tokens [T, N], text from a table and images from their features, in the features' type.

    Args:
        scale: of text.
    """
    ids_T = inputs.token_ids_T
    is_text_T = (ids_T >= 0) & (inputs.segment_ids_T < len(inputs.weight_B))
    text_TN = table(ids_T.clamp(min=0)).to(features_IPN.dtype) * scale
    # Unused images land in a row of their own, which is cut off.
    text_TN = torch.cat([text_TN * is_text_T[:, None], text_TN.new_zeros(1, text_TN.shape[1])])
    within = torch.arange(features_IPN.shape[1], device=ids_T.device)
    rows = (inputs.image_starts_I[:, None] + within).clamp(max=len(ids_T)).flatten()
    return text_TN.index_copy(0, rows, features_IPN.flatten(0, 1))[:-1]
