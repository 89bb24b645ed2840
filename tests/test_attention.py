"""Attention equals a dense masked softmax in float64, whatever the packing, and leaves nothing behind the segments."""

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import varlen

from train import attention
from train.attention import BACKENDS, Pack, backend_for, checked, varlen_attn

Tensors = tuple[torch.Tensor, ...]

any_speed = settings(deadline=None, max_examples=60)
HEADS = [(8, 1), (4, 2), (4, 4)]
FEATURES = [48, 64, 72, 128, 256]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

lengths = st.lists(st.tuples(st.integers(0, 14), st.integers(0, 14)), min_size=1, max_size=6)
# Of a few lengths only, neighbours are often equal.
alike = st.lists(st.tuples(st.sampled_from([0, 3, 9]), st.sampled_from([0, 3, 9])), min_size=1, max_size=12)


@dataclass(frozen=True, kw_only=True)
class Case:
    lengths: list[tuple[int, int]]
    """Of each segment: queries, keys."""
    heads: tuple[int, int] = (4, 2)
    dim: int = 16
    causal: bool = False
    scale: float | None = None
    unused: int = 0
    """Entries of cu that repeat the last."""
    behind: int = 0
    """Rows of q, k and v that no segment has."""
    seed: int = 0

    def cu(self, at: int) -> list[int]:
        ends = list(itertools.accumulate(each[at] for each in self.lengths))
        return [0, *ends, *[ends[-1]] * self.unused]

    def pack(self) -> Pack:
        cu_q, cu_k = (torch.tensor(self.cu(at), dtype=torch.int32) for at in (0, 1))
        max_q, max_k = (max(each[at] for each in self.lengths) for at in (0, 1))
        return Pack(cu_q, cu_k, max_q, max_k, self.causal, self.scale or self.dim**-0.5)

    def tensors(self, dtype: torch.dtype = torch.float32, *, behind: float = math.nan) -> Tensors:
        """Return q, k, v and a gradient of the output, whose rows behind the segments hold ``behind``."""
        generator = torch.Generator().manual_seed(self.seed)
        made = []
        for at, num_heads in ((0, self.heads[0]), (1, self.heads[1]), (1, self.heads[1]), (0, self.heads[0])):
            rows = sum(each[at] for each in self.lengths)
            x = torch.randn(rows + self.behind, num_heads, self.dim, generator=generator, dtype=torch.float64)
            x[rows:] = behind
            made.append(x.to(dtype))
        return tuple(made)


cases = st.builds(
    Case,
    lengths=lengths | alike,
    heads=st.sampled_from(HEADS),
    dim=st.sampled_from(FEATURES),
    causal=st.booleans(),
    scale=st.sampled_from([None, 0.3]),
    unused=st.integers(0, 3),
    behind=st.integers(0, 4),
    seed=st.integers(0, 1000),
)


def seen(cu_q: list[int], cu_k: list[int], shape: tuple[int, int], *, causal: bool) -> torch.Tensor:
    """Return which query sees which key [Tq, Tk]."""
    mask = torch.zeros(shape, dtype=torch.bool)
    for (a, b), (c, d) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        for query in range(a, b):
            mask[query, c : max(c, d - (b - 1 - query)) if causal else d] = True
    return mask


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack) -> Tensors:
    """Return (out, lse [Hq, Tq]) of one softmax over all the keys; a query that sees none gives zeros."""
    mask = seen(pack.cu_q.tolist(), pack.cu_k.tolist(), (len(q), len(k)), causal=pack.causal)
    k, v = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v))
    scores = (torch.einsum("qhd,khd->hqk", q, k) * pack.scale).masked_fill(~mask, -1e30)
    weights = scores.softmax(-1) * mask
    lse = scores.logsumexp(-1).masked_fill(~mask.any(-1), math.inf)
    return torch.einsum("hqk,khd->qhd", weights, v), lse


def expected(case: Case, tensors: Tensors) -> Tensors:
    """Return the output and the gradients of q, k and v, in float64."""
    q, k, v, grad_out = (each.double().nan_to_num(0.0).requires_grad_() for each in tensors)
    out, _ = dense(q, k, v, case.pack())
    return out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)


def computed(case: Case, tensors: Tensors) -> Tensors:
    q, k, v = (each.detach().clone().requires_grad_() for each in tensors[:3])
    pack = case.pack()
    out = varlen_attn(q, k, v, *pack[:4], causal=case.causal, scale=case.scale)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), tensors[3])


def assert_close(found: Tensors, wanted: Tensors, rtol: float) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max(initial := torch.tensor(0.0)) if False else True
        error = float((a.double() - b).abs().amax()) if b.numel() else 0.0
        assert error <= rtol * (1 + float(b.abs().amax()) if b.numel() else 1), (name, error)
