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
import inspect
import itertools
import math
import os
from collections.abc import Callable, Container, Iterator
from functools import cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

_BLOCK = 128
"""Queries of a long causal segment that are computed at once; keys behind all of them cost nothing."""

_MERGED = 1 << 20
"""Scores that merged segments may have, so that they stay in a processor's cache."""

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
        return _reference_forward(q, k, v, pack)
    if os.environ.get("ROBOLAKE_CHECK") == "1":
        _bounds(q, k, pack)
    if _is_empty(q, k, pack):
        out, lse = _empty_outputs(q)
        return out.zero_(), lse.fill_(math.inf)
    out, lse = BACKENDS[name].forward(_dense(q), _dense(k), _dense(v), _widened(pack))
    return _fill_behind(out, pack.cu_q, 0), _fill_behind(lse.T, pack.cu_q, math.inf).T.contiguous()


def _backward(grad_out: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *options: Any) -> Tensors:
    """Return the gradients of q, k and v."""
    out, lse, *rest = options
    pack = Pack(*rest)
    name = backend_for(q.device, q.dtype)
    if name == "reference":
        return _reference_backward(grad_out, (q, k, v), out, lse, pack)
    if _is_empty(q, k, pack):
        return tuple(each.zero_() for each in _empty_grads(q, k, v))
    grads = BACKENDS[name].backward(_dense(grad_out), tuple(map(_dense, (q, k, v))), out, lse, _widened(pack))
    cus = (pack.cu_q, pack.cu_k, pack.cu_k)
    return tuple(_fill_behind(grad, cu, 0) for grad, cu in zip(grads, cus, strict=True))


def _is_empty(q: torch.Tensor, k: torch.Tensor, pack: Pack) -> bool:
    return not (q.numel() and k.numel() and pack.max_q and pack.max_k)


def _empty_outputs(q: torch.Tensor, *_: Any) -> Tensors:
    sums = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=sums)


def _empty_grads(*tensors: torch.Tensor) -> Tensors:
    return tuple(each.new_empty(each.shape) for each in tensors)


_OPTIONS = "Tensor cu_q, Tensor cu_k, SymInt max_q, SymInt max_k, bool causal, float scale"
_FORWARD = f"(Tensor q, Tensor k, Tensor v, {_OPTIONS}) -> (Tensor, Tensor)"
_BACKWARD = (
    f"(Tensor grad_out, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_OPTIONS}) -> (Tensor, Tensor, Tensor)"
)
_forward_op = torch.library.custom_op("robolake::varlen_attn", _forward, mutates_args=(), schema=_FORWARD)
_backward_op = torch.library.custom_op("robolake::varlen_attn_backward", _backward, mutates_args=(), schema=_BACKWARD)
_forward_op.register_fake(_empty_outputs)
_backward_op.register_fake(lambda _, q, k, v, *__: _empty_grads(q, k, v))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
    q, k, v, cu_q, cu_k, *ctx.options = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, out, lse, cu_q, cu_k)


def _differentiate(ctx: Any, grad_out: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return (*_backward_op(grad_out, *ctx.saved_tensors, *ctx.options), *[None] * len(Pack._fields))


_forward_op.register_autograd(_differentiate, setup_context=_save)


# The reference.


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


def _bounds(q: torch.Tensor, k: torch.Tensor, pack: Pack) -> tuple[list[int], list[int]]:
    return (
        checked(pack.cu_q, rows=q.shape[0], longest=pack.max_q, what="cu_q"),
        checked(pack.cu_k, rows=k.shape[0], longest=pack.max_k, what="cu_k"),
    )


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


def _reference_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack) -> Tensors:
    num_kv, out_type = k.shape[1], q.dtype
    _, lse = _empty_outputs(q)
    q, k, v = (each.to(lse.dtype) for each in (q, k, v))
    out = q.new_zeros(q.shape)
    lse_view = lse.fill_(math.inf).T[:, :, None]
    for run in _runs(*_bounds(q, k, pack), num_heads=q.shape[1], causal=pack.causal):
        q_run = _matrices(_rows(q, num_kv, run))
        k_run, v_run = (_matrices(_rows(each, num_kv, run, keys=True)) for each in (k, v))
        scores = _scores(q_run, k_run, run, pack)
        largest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        for into, values in ((out, torch.bmm(weights, v_run).div_(total)), (lse_view, largest + total.log())):
            rows = _rows(into, num_kv, run)
            rows.copy_(values.view(rows.shape))
    return out.to(out_type), lse


def _reference_backward(
    grad_out: torch.Tensor, qkv: Tensors, out: torch.Tensor, lse: torch.Tensor, pack: Pack
) -> Tensors:
    """Compute the probabilities once more, then follow the chain rule.

    Source: FlashAttention-2 (Dao, 2023), algorithm 2, one tile a segment.
    """
    num_kv = qkv[1].shape[1]
    q, k, v, grad_out, out = (each.to(lse.dtype) for each in (*qkv, grad_out, out))
    dq, dk, dv = (each.new_zeros(each.shape) for each in (q, k, v))
    lse_view = lse.T[:, :, None]
    for run in _runs(*_bounds(q, k, pack), num_heads=q.shape[1], causal=pack.causal):
        q_run, grad_run, out_run, lse_run = (
            _matrices(_rows(each, num_kv, run)) for each in (q, grad_out, out, lse_view)
        )
        k_run, v_run = (_matrices(_rows(each, num_kv, run, keys=True)) for each in (k, v))
        weights = _scores(q_run, k_run, run, pack).sub_(lse_run).exp_()
        along = (grad_run * out_run).sum(-1, keepdim=True)
        grad_scores = torch.bmm(grad_run, v_run.mT).sub_(along).mul_(weights).mul_(pack.scale)
        for into, values, keys in (
            (dq, torch.bmm(grad_scores, k_run), False),
            (dk, torch.bmm(grad_scores.mT, q_run), True),
            (dv, torch.bmm(weights.mT, grad_run), True),
        ):
            rows = _rows(into, num_kv, run, keys=keys)
            rows.add_(values.view(rows.shape))
    return tuple(each.to(qkv[0].dtype) for each in (dq, dk, dv))


# The kernels for CUDA. An adapter hands over what the installed version has a parameter for, and nothing else. The
# operator sees to it that rows are dense, and fills what no kernel writes.


def _torch_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack) -> Tensors:
    """Call the flash attention inside torch, 2.11 or newer."""
    from torch.nn.attention import SDPBackend, sdpa_kernel, varlen

    taken = _parameters(varlen.varlen_attn)
    if "enable_gqa" not in taken:
        k, v = (_expanded(each, q.shape[1]) for each in (k, v))
    options = _torch_options(taken, pack, grouped=q.shape[1] != k.shape[1])
    # Newer versions may prefer cuDNN, whose sums of exponentials the backward below does not take.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        aux = varlen.AuxRequest(lse=True)
        out, lse = varlen.varlen_attn(q, k, v, pack.cu_q, pack.cu_k, pack.max_q, pack.max_k, return_aux=aux, **options)
    return out, lse


def _torch_options(taken: Container[str], pack: Pack, *, grouped: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"scale": pack.scale}
    if pack.causal:
        options |= {"window_size": (-1, 0)} if "window_size" in taken else {"is_causal": True}
    if "enable_gqa" in taken:
        options["enable_gqa"] = grouped
    return options


def _torch_backward(grad_out: torch.Tensor, qkv: Tensors, out: torch.Tensor, lse: torch.Tensor, pack: Pack) -> Tensors:
    """Call what torch registers as the backward of its own operator."""
    from torch.nn.attention import varlen

    q, k, v = qkv
    if "enable_gqa" not in _parameters(varlen.varlen_attn):
        k, v = (_expanded(each, q.shape[1]) for each in (k, v))
    values = {"grad_out": grad_out, "query": q, "key": k, "value": v, "out": out, "lse": lse}
    # The state is that of a dropout that there is not.
    values["rng_state"] = torch.zeros(2, dtype=torch.uint64, device=q.device)
    values |= _torch_segments(pack)
    call = torch.ops.torch_attn._varlen_attn_backward.default  # noqa: SLF001 (there is no public one)
    dq, dk, dv = call(**_accepted(call, values))
    return dq, _summed(dk, qkv[1].shape[1]), _summed(dv, qkv[1].shape[1])


def _torch_segments(pack: Pack) -> dict[str, Any]:
    return {
        "cu_seq_q": pack.cu_q,
        "cu_seq_k": pack.cu_k,
        "max_q": pack.max_q,
        "max_k": pack.max_k,
        "is_causal": pack.causal,
        "scale": pack.scale,
        "window_size": [-1, 0 if pack.causal else -1],
    }


def _flash_attn_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack) -> Tensors:
    """Call the forward of flash-attn 2.8 or newer."""
    call = importlib.import_module(_FLASH_ATTN)._flash_attn_varlen_forward  # noqa: SLF001 (what returns lse)
    values = {"q": q, "k": k, "v": v, "return_softmax": False} | _flash_attn_segments(pack)
    return call(**_accepted(call, values))[:2]


def _flash_attn_backward(
    grad_out: torch.Tensor, qkv: Tensors, out: torch.Tensor, lse: torch.Tensor, pack: Pack
) -> Tensors:
    """Call the backward of flash-attn 2.8 or newer."""
    call = importlib.import_module(_FLASH_ATTN)._flash_attn_varlen_backward  # noqa: SLF001 (there is no public one)
    grads = _empty_grads(*qkv)
    values = dict(zip(("q", "k", "v", "dq", "dk", "dv"), (*qkv, *grads), strict=True))
    values |= {"dout": grad_out, "out": out, "softmax_lse": lse}
    call(**_accepted(call, values | _flash_attn_segments(pack)))
    return grads


def _flash_attn_segments(pack: Pack) -> dict[str, Any]:
    return {
        "cu_seqlens_q": pack.cu_q,
        "cu_seqlens_k": pack.cu_k,
        "max_seqlen_q": pack.max_q,
        "max_seqlen_k": pack.max_k,
        "dropout_p": 0.0,
        "softmax_scale": pack.scale,
        "causal": pack.causal,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _accepted(call: Callable[..., Any], values: dict[str, Any]) -> dict[str, Any]:
    taken = _parameters(call)
    return {name: each for name, each in values.items() if name in taken}


@cache
def _parameters(call: Any) -> frozenset[str]:
    """Return the names of the parameters of a function or of an operator."""
    schema = getattr(getattr(call, "_opoverload", call), "_schema", None)
    return (
        frozenset(each.name for each in schema.arguments) if schema else frozenset(inspect.signature(call).parameters)
    )


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


def _expanded(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.repeat_interleave(num_heads // x.shape[1], 1)


def _summed(grad: torch.Tensor, num_kv: int) -> torch.Tensor:
    """Return the gradient of what was expanded."""
    if grad.shape[1] == num_kv:
        return grad
    return grad.unflatten(1, (num_kv, -1)).sum(2, dtype=torch.float32).to(grad.dtype)


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


_FLASH_ATTN = "flash_attn.flash_attn_interface"
BACKENDS = {
    "torch": Backend("torch.nn.attention.varlen", _torch_forward, _torch_backward),
    "flash_attn": Backend(_FLASH_ATTN, _flash_attn_forward, _flash_attn_backward),
    "reference": Backend("torch", _reference_forward, _reference_backward),
}
