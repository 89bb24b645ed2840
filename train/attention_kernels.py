"""Attention within segments by the kernels for CUDA: torch's own, or those of the flash-attn package.

An adapter hands over what the installed version has a parameter for, and nothing else. The operator sees to it that
rows are dense, and fills what no kernel writes. None of this has run on a GPU.
"""

import importlib
import inspect
from collections.abc import Callable, Container
from functools import cache
from typing import Any

import torch

from train.attention_pack import Pack, Tensors, empty_grads

FLASH_ATTN = "flash_attn.flash_attn_interface"
"""Where that package has what returns sums of exponentials."""


def torch_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack) -> Tensors:
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


def torch_backward(grad_out: torch.Tensor, qkv: Tensors, out: torch.Tensor, lse: torch.Tensor, pack: Pack) -> Tensors:
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


def flash_attn_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack) -> Tensors:
    """Call the forward of flash-attn 2.8 or newer."""
    call = importlib.import_module(FLASH_ATTN)._flash_attn_varlen_forward  # noqa: SLF001 (what returns lse)
    values = {"q": q, "k": k, "v": v, "return_softmax": False} | _flash_attn_segments(pack)
    return call(**_accepted(call, values))[:2]


def flash_attn_backward(
    grad_out: torch.Tensor, qkv: Tensors, out: torch.Tensor, lse: torch.Tensor, pack: Pack
) -> Tensors:
    """Call the backward of flash-attn 2.8 or newer."""
    call = importlib.import_module(FLASH_ATTN)._flash_attn_varlen_backward  # noqa: SLF001 (there is no public one)
    grads = empty_grads(*qkv)
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


def _expanded(x: torch.Tensor, num_heads: int) -> torch.Tensor:
    return x.repeat_interleave(num_heads // x.shape[1], 1)


def _summed(grad: torch.Tensor, num_kv: int) -> torch.Tensor:
    """Return the gradient of what was expanded."""
    if grad.shape[1] == num_kv:
        return grad
    return grad.unflatten(1, (num_kv, -1)).sum(2, dtype=torch.float32).to(grad.dtype)
