"""Attention within segments by plain matrix products, exactly, on any device.

Shapes: Tq, Tk rows of queries and keys, Hq, Hkv heads, G = Hq / Hkv, D features of a head; of a run, N segments of I
queries and J keys each.
"""

import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch

from train.attention_pack import Pack, Tensors, bounds, empty_outputs

_BLOCK = 128
"""Queries of a causal segment that are computed at once: keys that none of them sees cost nothing."""

_MERGED = 1 << 20
"""Scores that merged segments may have: as many as fit in a processor's cache."""

_FUSED = 64
"""Features of a head up to which torch's fused kernel for CPUs is faster than plain products."""


class _Run(NamedTuple):
    """N neighbouring segments of equal lengths, or a part of the queries of a causal one."""

    q_start: int
    k_start: int
    n: int
    i: int
    j: int

    def followed_by(self, other: "_Run") -> bool:
        """Return whether the other's segments are as long as these, and begin where these end."""
        end = (self.q_start + self.n * self.i, self.k_start + self.n * self.j)
        return (self.i, self.j, *end) == (other.i, other.j, other.q_start, other.k_start)


def _runs(cu_q: list[int], cu_k: list[int], *, num_heads: int, causal: bool) -> list[_Run]:
    """Return what can be computed at once; every query of a run sees a key."""
    runs: list[_Run] = []
    for piece in _pieces(cu_q, cu_k, causal=causal):
        last = runs[-1] if runs else None
        if last and last.followed_by(piece) and (last.n + 1) * num_heads * last.i * last.j <= _MERGED:
            runs[-1] = last._replace(n=last.n + 1)
        else:
            runs.append(piece)
    return runs


def _pieces(cu_q: list[int], cu_k: list[int], *, causal: bool) -> Iterator[_Run]:
    for (q_start, q_end), (k_start, k_end) in zip(itertools.pairwise(cu_q), itertools.pairwise(cu_k), strict=True):
        num_keys = k_end - k_start
        # The first queries of a causal segment with fewer keys see none.
        first = max(q_start, q_end - num_keys) if causal else q_start
        if first == q_end or not num_keys:
            continue
        # A block of queries, with the keys that its last one sees, is a causal segment by itself.
        step = _BLOCK if causal and q_end - first > 2 * _BLOCK else q_end - first
        for start in range(first, q_end, step):
            end = min(start + step, q_end)
            yield _Run(start, k_start, 1, end - start, num_keys - (q_end - end))


def _rows(x: torch.Tensor, num_kv: int, run: _Run, *, keys: bool = False) -> torch.Tensor:
    """Return a run's rows of queries or keys, out of [T, Hkv * G, D], as [N, Hkv, I or J, G, D], without a copy."""
    start, length = (run.k_start, run.j) if keys else (run.q_start, run.i)
    return x[start : start + run.n * length].unflatten(0, (run.n, length)).unflatten(2, (num_kv, -1)).transpose(1, 2)


def _matrices(rows: torch.Tensor) -> torch.Tensor:
    """Return [N, Hkv, I, G, D] as [N * Hkv, I * G, D]: the heads of a group are rows of one product."""
    return rows.flatten(0, 1).flatten(1, 2)


def _hidden(run: _Run, like: torch.Tensor) -> torch.Tensor:
    """Return what hides keys from the queries before them [I, 1, J]: minus infinity, elsewhere 0."""
    return like.new_full((run.i, run.j), -math.inf).triu_(run.j - run.i + 1)[:, None]


def _scores(q_run: torch.Tensor, k_run: torch.Tensor, run: _Run, pack: Pack) -> torch.Tensor:
    """Return scaled products [N * Hkv, I * G, J], minus infinity where a key comes after its query."""
    scores = torch.baddbmm(q_run.new_empty(()), q_run, k_run.mT, beta=0, alpha=pack.scale)
    if pack.causal:
        scores.unflatten(1, (run.i, -1)).add_(_hidden(run, scores))
    return scores


def _is_fused(q: torch.Tensor, pack: Pack) -> bool:
    return q.device.type == "cpu" and q.shape[2] <= _FUSED and not pack.causal


def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack) -> Tensors:
    """Return (out, lse): zeros and infinity where a query sees no key."""
    num_kv, out_type = k.shape[1], q.dtype
    _, lse = empty_outputs(q)
    q, k, v = (each.to(lse.dtype) for each in (q, k, v))
    out = q.new_zeros(q.shape)
    lse_view = lse.fill_(math.inf).T[:, :, None]
    for run in _runs(*bounds(q, k, pack), num_heads=q.shape[1], causal=pack.causal):
        q_run = _matrices(_rows(q, num_kv, run))
        k_run, v_run = (_matrices(_rows(each, num_kv, run, keys=True)) for each in (k, v))
        if _is_fused(q, pack):
            each = (x[:, None] for x in (q_run, k_run, v_run))
            found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*each, scale=pack.scale)  # noqa: SLF001 (what returns lse)
        else:
            scores = _scores(q_run, k_run, run, pack)
            largest = scores.amax(-1, keepdim=True)
            weights = scores.sub_(largest).exp_()
            total = weights.sum(-1, keepdim=True)
            found = torch.bmm(weights, v_run).div_(total), largest + total.log()
        for into, values in zip((out, lse_view), found, strict=True):
            rows = _rows(into, num_kv, run)
            rows.copy_(values.reshape(rows.shape))
    return out.to(out_type), lse


def backward(grad_out: torch.Tensor, qkv: Tensors, out: torch.Tensor, lse: torch.Tensor, pack: Pack) -> Tensors:
    """Return the gradients of q, k and v: compute the probabilities once more, then follow the chain rule.

    Source: FlashAttention-2 (Dao, 2023), algorithm 2, one tile a segment.
    """
    num_kv = qkv[1].shape[1]
    q, k, v, grad_out, out = (each.to(lse.dtype) for each in (*qkv, grad_out, out))
    dq, dk, dv = (each.new_zeros(each.shape) for each in (q, k, v))
    lse_view = lse.T[:, :, None]
    for run in _runs(*bounds(q, k, pack), num_heads=q.shape[1], causal=pack.causal):
        q_run, grad_run, out_run, lse_run = (
            _matrices(_rows(each, num_kv, run)) for each in (q, grad_out, out, lse_view)
        )
        k_run, v_run = (_matrices(_rows(each, num_kv, run, keys=True)) for each in (k, v))
        if _is_fused(q, pack):
            each = (x[:, None] for x in (grad_run, q_run, k_run, v_run, out_run))
            call = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward  # noqa: SLF001 (of the forward)
            grads = call(*each, lse_run.mT, 0.0, False, scale=pack.scale)  # noqa: FBT003 (torch's order)
        else:
            weights = _scores(q_run, k_run, run, pack).sub_(lse_run).exp_()
            along = (grad_run * out_run).sum(-1, keepdim=True)
            grad_scores = torch.bmm(grad_run, v_run.mT).sub_(along).mul_(weights).mul_(pack.scale)
            grads = (
                torch.bmm(grad_scores, k_run),
                torch.bmm(grad_scores.mT, q_run),
                torch.bmm(weights.mT, grad_run),
            )
        for into, values, keys in zip((dq, dk, dv), grads, (False, True, True), strict=True):
            rows = _rows(into, num_kv, run, keys=keys)
            rows.add_(values.reshape(rows.shape))
    return tuple(each.to(qkv[0].dtype) for each in (dq, dk, dv))
