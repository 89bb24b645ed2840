"""Segments that attention goes by, and what its back ends have in common.

Shapes: Tq, Tk rows of queries and keys, S segments, Hq, Hkv heads, D features of a head.
"""

import itertools
from typing import NamedTuple

import torch

Tensors = tuple[torch.Tensor, ...]


class Pack(NamedTuple):
    """Which rows attend to which, and how."""

    cu_q: torch.Tensor
    """Where segments of queries begin, int32 [S + 1]."""
    cu_k: torch.Tensor
    """Where segments of keys begin, int32 [S + 1]."""
    max_q: int
    """No segment has more queries."""
    max_k: int
    """No segment has more keys."""
    causal: bool
    """Whether the last query of a segment sees all its keys, the one before all but one, and so on."""
    scale: float
    """Of products of queries and keys."""


def checked(cu: torch.Tensor, *, rows: int, longest: int, what: str = "cu") -> list[int]:
    """Return where segments begin, as integers; waits for the device.

    Args:
        cu: [S + 1]
        rows: of the tensor that is cut into segments.
        longest: rows that a segment may have.
        what: name in messages.

    Raises:
        ValueError: no 0 at first, a decrease, an end behind the last row, or too long a segment.
    """
    found: list[int] = cu.tolist()
    lengths = [end - start for start, end in itertools.pairwise(found)]
    if found[0] != 0 or min(lengths) < 0:
        raise ValueError(f"{what} is {found}; it has to begin with 0, and never to decrease")
    if found[-1] > rows:
        raise ValueError(f"{what} ends at {found[-1]}, but there are {rows} rows; end the last segment with them")
    if max(lengths) > longest:
        raise ValueError(f"{what} has a segment of {max(lengths)} rows, but the maximum is {longest}; raise that")
    return found


def bounds(q: torch.Tensor, k: torch.Tensor, pack: Pack) -> tuple[list[int], list[int]]:
    """Return where segments of queries, then of keys, begin; waits for the device.

    Raises:
        ValueError: they are no segments of these rows.
    """
    return (
        checked(pack.cu_q, rows=q.shape[0], longest=pack.max_q, what="cu_q"),
        checked(pack.cu_k, rows=k.shape[0], longest=pack.max_k, what="cu_k"),
    )


def empty_outputs(q: torch.Tensor, *_: object) -> Tensors:
    """Return memory for out [Tq, Hq, D] in the type of q, and for lse [Hq, Tq] in float32 at least."""
    sums = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=sums)


def empty_grads(*tensors: torch.Tensor) -> Tensors:
    """Return memory for the gradients of some tensors."""
    return tuple(each.new_empty(each.shape) for each in tensors)
