"""Attention within the segments of a pack, as one operator that has a back end for each kind of device.

No mask is built and no segment is padded: queries see the keys of their own segment only. The operator is opaque to
``torch.compile``, so that one graph serves every packing of the same sizes.

What every back end keeps: rows of queries behind the last segment give zeros and have zero gradients, as have rows of
keys and values behind the last segment; none of them is read. A query that sees no key gives zeros.

| name       | device | what runs                                                                               |
|------------|--------|-----------------------------------------------------------------------------------------|
| torch      | CUDA   | the flash attention inside torch; float16 or bfloat16                                   |
| flash_attn | CUDA   | the flash-attn package; float16 or bfloat16                                             |
| reference  | any    | products of matrices in float32, segment by segment; waits until ``cu_seqlens`` is read |

The kernels for CUDA were not executed by our tests, which have no GPU: a stand-in runs below torch's own functions.

Shapes: Tq, Tk rows of queries and keys, S segments, Hq, Hkv heads, G = Hq / Hkv of them in a group, D features of a
head. Of a run: N segments, of I queries and J keys each.
"""

import importlib
import math
import os
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

from train import attention_kernels as kernels
from train import attention_reference as reference
from train.attention_pack import Pack, Tensors, bounds, empty_grads, empty_outputs


def varlen_attn(  # noqa: PLR0913, PLR0917 (what the kernels take, in their order)
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    causal: bool = False,
    scale: float | None = None,
) -> torch.Tensor:
    """Return softmax(scale * q k') v of each segment [Tq, Hq, D], in the type of q.

    ``backend_for`` says what runs. The reference checks the values of ``cu_q`` and ``cu_k``; the others do so with
    ``ROBOLAKE_CHECK=1`` in the environment, and then wait for the device.

    Args:
        q: queries [Tq, Hq, D].
        k: keys [Tk, Hkv, D]; each of their heads serves Hq / Hkv neighbouring heads of queries.
        v: values [Tk, Hkv, D].
        cu_q: where segments of queries begin, int32 [S + 1]; rows from ``cu_q[-1]`` on belong to none.
        cu_k: where the keys of the same segments begin, int32 [S + 1].
        max_q: queries of the longest segment, or more.
        max_k: keys of the longest segment, or more.
        causal: the last query of a segment sees all its keys, the one before all but one, and so on.
        scale: None means 1 / sqrt(D).

    Raises:
        ValueError: shapes, types or segments that do not fit together, or a back end that there is not.
    """
    _check_shapes(q, k, v)
    _check_segments(cu_q, cu_k, q.device)
    if max_q < 0 or max_k < 0:
        raise ValueError(f"max_q is {max_q} and max_k is {max_k}; give the lengths of the longest segments")
    if scale is None:
        scale = q.shape[2] ** -0.5
    elif not scale > 0:
        raise ValueError(f"scale is {scale}; give one above 0, or None for 1 / sqrt(D)")
    return _forward_op(q, k, v, cu_q, cu_k, max_q, max_k, causal, scale)[0]


def backend_for(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """Return the name of the back end that serves a device and a type.

    On CUDA ``ROBOLAKE_ATTENTION`` chooses: a name, or ``auto``, the default, for the first that is installed and takes
    the type. Other devices have the reference only.

    Raises:
        ValueError: no such choice, or it is not installed, or it does not take the type.
    """
    choice = os.environ.get("ROBOLAKE_ATTENTION", "auto")
    if choice not in ("auto", *BACKENDS):
        raise ValueError(f"ROBOLAKE_ATTENTION is {choice!r}; give one of auto, {', '.join(BACKENDS)}")
    if device.type != "cuda" or choice == "reference":
        return "reference"
    half = dtype in (torch.float16, torch.bfloat16)
    if choice == "auto":
        return next((name for name, each in BACKENDS.items() if half and _module(each.module)), "reference")
    if not half:
        raise ValueError(f"ROBOLAKE_ATTENTION={choice} takes float16 and bfloat16, not {dtype}; cast, or set auto")
    if not _module(BACKENDS[choice].module):
        raise ValueError(f"ROBOLAKE_ATTENTION={choice} needs {BACKENDS[choice].module}; install it, or set auto")
    return choice


def _check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    if q.dim() != 3 or k.dim() != 3 or k.shape != v.shape or q.shape[2] != k.shape[2]:
        raise ValueError(f"{shapes} do not fit; give q [Tq, Hq, D], and k and v [Tk, Hkv, D]")
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes} do not fit; give q a multiple of the heads of k and v")
    if not q.is_floating_point() or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q is {q.dtype}, k is {k.dtype}, v is {v.dtype}; give one floating type")
    if not q.device == k.device == v.device:
        raise ValueError(f"q is on {q.device}, k on {k.device}, v on {v.device}; give one device")


def _check_segments(cu_q: torch.Tensor, cu_k: torch.Tensor, device: torch.device) -> None:
    if cu_q.dim() != 1 or cu_q.shape != cu_k.shape or cu_q.shape[0] < 2:
        raise ValueError(f"cu_q {tuple(cu_q.shape)} and cu_k {tuple(cu_k.shape)} do not fit; give [S + 1] for both")
    if not cu_q.dtype == cu_k.dtype == torch.int32:
        raise ValueError(f"cu_q is {cu_q.dtype}, cu_k is {cu_k.dtype}; give int32")
    if not cu_q.device == cu_k.device == device:
        raise ValueError(f"cu_q is on {cu_q.device}, cu_k on {cu_k.device}; put them on {device}, as q is")


# The operator. Its backward is one as well, so that torch.compile looks into neither.


def _forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> Tensors:
    """Return out [Tq, Hq, D], then the logarithms of the sums of exponentials [Hq, Tq], infinite where none is seen."""
    pack = Pack(*options)
    name = backend_for(q.device, q.dtype)
    if name == "reference":
        return reference.forward(q, k, v, pack)
    if os.environ.get("ROBOLAKE_CHECK") == "1":
        bounds(q, k, pack)
    if _is_empty(q, k, pack):
        out, lse = empty_outputs(q)
        return out.zero_(), lse.fill_(math.inf)
    out, lse = BACKENDS[name].forward(_dense(q), _dense(k), _dense(v), _widened(pack))
    return _fill_behind(out, pack.cu_q, 0), _fill_behind(lse.T, pack.cu_q, math.inf).T.contiguous()


def _backward(grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> Tensors:
    """Return the gradients of q, k and v."""
    out, lse, *rest = options
    pack = Pack(*rest)
    name = backend_for(q.device, q.dtype)
    if name == "reference":
        return reference.backward(grad_out, (q, k, v), out, lse, pack)
    if _is_empty(q, k, pack):
        return tuple(each.zero_() for each in empty_grads(q, k, v))
    grads = BACKENDS[name].backward(_dense(grad_out), tuple(map(_dense, (q, k, v))), out, lse, _widened(pack))
    cus = (pack.cu_q, pack.cu_k, pack.cu_k)
    return tuple(_fill_behind(grad, cu, 0) for grad, cu in zip(grads, cus, strict=True))


def _is_empty(q: torch.Tensor, k: torch.Tensor, pack: Pack) -> bool:
    return not (q.numel() and k.numel() and pack.max_q and pack.max_k)


_OPTIONS = "Tensor cu_q, Tensor cu_k, SymInt max_q, SymInt max_k, bool causal, float scale"
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
_forward_op = torch.library.custom_op("robolake::varlen_attn", _forward, mutates_args=(), schema=_FORWARD)
_backward_op = torch.library.custom_op("robolake::varlen_attn_backward", _backward, mutates_args=(), schema=_BACKWARD)
_forward_op.register_fake(empty_outputs)
_backward_op.register_fake(lambda _, q, k, v, *__: empty_grads(q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    q, k, v, cu_q, cu_k, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)


def _differentiate(ctx: Any, grad_out: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*_backward_op(grad_out, *ctx.saved_tensors, *ctx.options), *[None] * len(Pack._fields))


_forward_op.register_autograd(_differentiate, setup_context=_save)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Return the same with the features of a head next to each other, as kernels want them."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _widened(pack: Pack) -> Pack:
    """Return the same with a larger limit: kernels take a limit of one query for decoding, without empty segments.

    Source: flash-attention, issue 1537.
    """
    return pack._replace(max_q=max(2, pack.max_q))


def _fill_behind(x: torch.Tensor, cu: torch.Tensor, value: float) -> torch.Tensor:
    """Fill the rows [T, ...] behind the last segment, which kernels leave as they find them."""
    behind = torch.arange(x.shape[0], device=x.device) >= cu.select(0, -1)
    return x.masked_fill_(behind.view(-1, *[1] * (x.dim() - 1)), value)


@cache
def _module(name: str) -> ModuleType | None:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


class Backend(NamedTuple):
    """What computes attention."""

    module: str
    """Has to be installed."""
    forward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Pack], Tensors]
    """(q, k, v, pack) to (out, lse)."""
    backward: Callable[[torch.Tensor, Tensors, torch.Tensor, torch.Tensor, Pack], Tensors]
    """(gradient of out, (q, k, v), out, lse, pack) to the gradients of q, k and v."""


BACKENDS = {
    "torch": Backend("torch.nn.attention.varlen", kernels.torch_forward, kernels.torch_backward),
    "flash_attn": Backend(kernels.FLASH_ATTN, kernels.flash_attn_forward, kernels.flash_attn_backward),
    "reference": Backend("torch", reference.forward, reference.backward),
}
