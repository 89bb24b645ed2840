"""Attention equals a dense masked softmax in float64, whatever the packing, and leaves nothing behind the segments."""

import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.attention import varlen

from train import attention
from train import attention_kernels as kernels
from train import attention_reference as reference
from train.attention import backend_for, varlen_attn
from train.attention_pack import Pack, checked, empty_outputs

Tensors = tuple[torch.Tensor, ...]

any_speed = settings(deadline=None, max_examples=50)
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


def assert_close(found: Tensors, wanted: Tensors, tolerance: float) -> None:
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert one.shape == other.shape
        if other.numel():
            error = float((one.detach().double() - other).abs().max())
            assert error <= tolerance * max(1.0, float(other.abs().max())), name


# The reference.


@any_speed
@given(case=cases)
@example(case=Case(lengths=[(0, 0)], behind=3))
@example(case=Case(lengths=[(5, 0), (0, 5)], heads=(8, 1), causal=True))
@example(case=Case(lengths=[(9, 3), (3, 9)] * 2, causal=True, unused=2, behind=1))
def test_it_equals_a_dense_softmax_and_what_lies_behind_is_zero(case: Case) -> None:
    tensors = case.tensors()
    found = computed(case, tensors)
    # Where all cancels, as the gradient of a lone key does, the noise of large products remains.
    assert_close(found, expected(case, tensors), 1e-4)
    for each, at in zip(found, (0, 0, 1, 1), strict=True):
        assert not each[case.cu(at)[-1] :].any(), "and not NaN, which is what the rows there hold"


@pytest.mark.parametrize("heads", [(2, 1), (2, 2)])
def test_causal_segments_that_are_computed_in_blocks(heads: tuple[int, int]) -> None:
    case = Case(lengths=[(300, 300), (270, 340), (400, 265), (20, 20)], heads=heads, causal=True, behind=2)
    assert max(queries for queries, _ in case.lengths) > 2 * reference._BLOCK
    tensors = case.tensors()
    assert_close(computed(case, tensors), expected(case, tensors), 2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1.2e-2), (torch.float16, 1.5e-3)])
@pytest.mark.parametrize("heads", HEADS)
def test_half_precision_rounds_inputs_and_outputs_only(
    heads: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    case = Case(lengths=[(60, 60), (60, 60), (9, 40)], heads=heads, dim=64, behind=3)
    tensors = case.tensors(dtype)
    found, wanted = computed(case, tensors), expected(case, tensors)
    assert all(each.dtype == dtype for each in found)
    assert_close(found, wanted, tolerance)
    # The output is the exact one, rounded once.
    rounded = torch.finfo(dtype).eps / 2 * wanted[0].abs() + 1e-6
    assert ((found[0].double() - wanted[0]).abs() <= rounded).all()


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_are_those_of_finite_differences(causal: bool) -> None:
    case = Case(lengths=[(2, 3), (3, 2)], heads=(2, 1), dim=2, causal=causal, behind=1)
    pack = case.pack()
    q, k, v = (each.requires_grad_() for each in case.tensors(torch.float64, behind=2.0)[:3])
    assert torch.autograd.gradcheck(lambda q, k, v: varlen_attn(q, k, v, *pack[:4], causal=causal), (q, k, v))


def test_slices_of_a_fused_projection_are_taken_as_they_are() -> None:
    case = Case(lengths=[(7, 7), (7, 7), (5, 5)], heads=(4, 2), behind=2)
    q, k, v, grad_out = case.tensors()
    fused = torch.cat((q, k, v), 1).requires_grad_()
    q_part, k_part, v_part = fused.split((4, 2, 2), 1)
    out = varlen_attn(q_part, k_part, v_part, *case.pack()[:4])
    # A gradient whose rows are all the same memory, as that of a sum is.
    grad_out = grad_out[:1].expand_as(out)
    (grad,) = torch.autograd.grad(out, fused, grad_out)
    assert out.is_contiguous()
    assert_close((out, *grad.split((4, 2, 2), 1)), expected(case, (q, k, v, grad_out)), 2e-5)


@any_speed
@given(case=cases)
@example(case=Case(lengths=[(300, 310), (300, 280), (1, 1)], causal=True))
def test_runs_hold_each_pair_once_and_join_what_is_alike(case: Case) -> None:
    pack = case.pack()
    cu_q, cu_k = case.cu(0), case.cu(1)
    pairs = torch.zeros((cu_q[-1], cu_k[-1]), dtype=torch.int64)
    runs = reference._runs(cu_q, cu_k, num_heads=case.heads[0], causal=case.causal)
    for run in runs:
        within = torch.ones((run.i, run.j), dtype=torch.bool)
        if case.causal:
            within &= reference._hidden(run, torch.zeros(()))[:, 0] == 0
        assert within.any(1).all(), "every query sees a key"
        for at in range(run.n):
            q_start, k_start = run.q_start + at * run.i, run.k_start + at * run.j
            pairs[q_start : q_start + run.i, k_start : k_start + run.j] += within
    assert torch.equal(pairs, seen(cu_q, cu_k, (cu_q[-1], cu_k[-1]), causal=pack.causal).long())
    assert not any(one.followed_by(other) for one, other in itertools.pairwise(runs))


def test_runs_stay_small_enough_for_a_cache() -> None:
    cu = list(range(0, 200 * 41, 200))
    runs = reference._runs(cu, cu, num_heads=8, causal=False)
    assert [each.n for each in runs] == [3] * 13 + [1]
    assert all(each.n * 8 * each.i * each.j <= reference._MERGED for each in runs)


# The operator.


def test_the_operators_pass_the_checks_of_torch() -> None:
    case = Case(lengths=[(5, 8), (0, 2), (6, 6)], heads=(4, 2), causal=True, behind=1)
    q, k, v, grad_out = case.tensors(behind=3.0)
    pack = case.pack()
    out, lse = attention._forward_op(q, k, v, *pack)
    torch.testing.assert_close(lse, dense(q, k, v, pack)[1])
    torch.library.opcheck(attention._backward_op, (grad_out, q, k, v, out, lse, *pack))
    leaves = tuple(each.requires_grad_() for each in (q, k, v))
    torch.library.opcheck(attention._forward_op, (*leaves, *pack))


def packings() -> list[Case]:
    """Return cases whose tensors have the same sizes."""
    return [
        Case(lengths=[(5, 8), (7, 4), (12, 12)], causal=True, unused=2, behind=4, seed=1),
        Case(lengths=[(20, 20)], causal=True, unused=4, behind=8, seed=2),
        Case(lengths=[(4, 4), (4, 4), (8, 8), (0, 0), (8, 8)], causal=True, behind=4, seed=3),
    ]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_one_graph_serves_every_packing_of_the_same_sizes(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor) -> torch.Tensor:
        return varlen_attn(q, k, v, cu_q, cu_k, 24, 24, causal=True)

    compiled = torch.compile(step, backend=counter, fullgraph=True)
    for case in packings():
        *qkv, grad_out = case.tensors(behind=7.0)
        pack = case.pack()
        results = []
        for each in (step, compiled):
            q, k, v = (x.clone().requires_grad_() for x in qkv)
            out = each(q, k, v, pack.cu_q, pack.cu_k)
            results.append((out.detach(), *torch.autograd.grad(out, (q, k, v), grad_out)))
        assert_close(results[1], results[0], 1e-6)
    assert counter.frame_count == 1


# What is refused.


def test_what_does_not_fit_is_refused() -> None:
    q, k, v, _ = Case(lengths=[(4, 6)]).tensors()
    cu = torch.tensor([0, 4], dtype=torch.int32)
    pack = {"cu_q": cu, "cu_k": cu, "max_q": 4, "max_k": 6}
    bad: list[tuple[dict[str, Any], str]] = [
        ({"q": q[0]}, r"q \(4, 16\), k \(6, 2, 16\) and v \(6, 2, 16\) do not fit; give q \[Tq, Hq, D\]"),
        ({"v": v[:5]}, r"k \(6, 2, 16\) and v \(5, 2, 16\) do not fit"),
        ({"q": q[..., :8]}, r"q \(4, 4, 8\), k \(6, 2, 16\)"),
        ({"q": q[:, :3]}, "give q a multiple of the heads of k and v"),
        ({"k": k[:, :0], "v": v[:, :0]}, "give q a multiple of the heads of k and v"),
        ({"v": v.double()}, "v is torch.float64; give one floating type"),
        ({"q": q.int(), "k": k.int(), "v": v.int()}, "q is torch.int32, .* give one floating type"),
        ({"v": v.to("meta")}, "v on meta; give one device"),
        ({"cu_q": cu[None]}, r"cu_q \(1, 2\) and cu_k \(2,\) do not fit"),
        ({"cu_k": cu.repeat(2)}, r"cu_q \(2,\) and cu_k \(4,\) do not fit"),
        ({"cu_q": cu[:1], "cu_k": cu[:1]}, r"give \[S \+ 1\] for both"),
        ({"cu_k": cu.long()}, "cu_k is torch.int64; give int32"),
        ({"cu_k": cu.to("meta")}, "cu_k on meta; put them on cpu"),
        ({"max_q": -1}, "max_q is -1 and max_k is 6"),
        ({"scale": 0.0}, "scale is 0.0; give one above 0"),
    ]
    good: dict[str, Any] = {"q": q, "k": k, "v": v, **pack}
    assert varlen_attn(**good).shape == q.shape
    for changed, message in bad:
        with pytest.raises(ValueError, match=message):
            varlen_attn(**(good | changed))


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([1, 4], r"cu_q is \[1, 4\]; it has to begin with 0"),
        ([0, 3, 2], r"cu_q is \[0, 3, 2\]; .* never to decrease"),
        ([0, 3, 8], "cu_q ends at 8, but there are 7 rows"),
        ([0, 6, 7], "cu_q has a segment of 6 rows, but the maximum is 5"),
    ],
)
def test_segments_that_are_none_are_refused(cu: list[int], message: str) -> None:
    segments = torch.tensor(cu, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        checked(segments, rows=7, longest=5, what="cu_q")
    x = torch.zeros(7, 1, 8)
    with pytest.raises(ValueError, match=message):
        varlen_attn(x, x, x, segments, torch.zeros_like(segments), 5, 5)
    with pytest.raises(ValueError, match=message.replace("cu_q", "cu_k")):
        varlen_attn(x, x, x, torch.zeros_like(segments), segments, 5, 5)


def test_segments_are_returned_as_integers() -> None:
    assert checked(torch.tensor([0, 2, 2, 7]), rows=7, longest=5) == [0, 2, 2, 7]


# The choice of a back end.


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    monkeypatch.delenv("ROBOLAKE_ATTENTION", raising=False)
    attention._module.cache_clear()
    yield monkeypatch
    attention._module.cache_clear()


def test_the_environment_chooses_the_back_end(choose: pytest.MonkeyPatch) -> None:
    assert [backend_for(each) for each in (CUDA, CPU, torch.device("mps"))] == ["torch", "reference", "reference"]
    assert backend_for(CUDA, torch.float32) == "reference"
    for choice, of_cuda in (("auto", "torch"), ("torch", "torch"), ("reference", "reference")):
        choose.setenv("ROBOLAKE_ATTENTION", choice)
        assert [backend_for(CUDA, torch.float16), backend_for(CPU)] == [of_cuda, "reference"]


def test_a_choice_that_cannot_be_had_is_refused(choose: pytest.MonkeyPatch) -> None:
    choose.setenv("ROBOLAKE_ATTENTION", "xformers")
    x, cu = torch.zeros(1, 1, 8), torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(ValueError, match="'xformers'; give one of auto, torch, flash_attn, reference"):
        varlen_attn(x, x, x, cu, cu, 1, 1)
    choose.setenv("ROBOLAKE_ATTENTION", "flash_attn")
    choose.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match=r"needs flash_attn\.flash_attn_interface; install it"):
        backend_for(CUDA)
    choose.setenv("ROBOLAKE_ATTENTION", "torch")
    with pytest.raises(ValueError, match=r"takes float16 and bfloat16, not torch\.float32"):
        backend_for(CUDA, torch.float32)


def test_a_torch_without_varlen_attention_leaves_the_next(choose: pytest.MonkeyPatch) -> None:
    choose.setitem(sys.modules, "torch.nn.attention.varlen", None)
    choose.setitem(sys.modules, "flash_attn", None)
    assert backend_for(CUDA) == "reference"
    attention._module.cache_clear()
    install_flash_attn(choose)
    assert backend_for(CUDA) == "flash_attn"


# The kernels for CUDA, without one: what they would compute is computed densely, below the functions that call them.


def kernel_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pack: Pack) -> Tensors:
    """Return (out, lse) as a kernel does, which writes nothing behind the segments."""
    check_kernel(pack, q, k, v)
    out, lse = dense(q.double().nan_to_num(0.0), k.double().nan_to_num(0.0), v.double().nan_to_num(0.0), pack)
    out[pack.cu_q[-1] :] = math.nan
    lse[:, pack.cu_q[-1] :] = math.nan
    return out.to(q.dtype), lse.float()


def kernel_backward(grad_out: torch.Tensor, qkv: Tensors, out: torch.Tensor, lse: torch.Tensor, pack: Pack) -> Tensors:
    check_kernel(pack, grad_out, *qkv)
    q, k, v, grad_out = (each.double().nan_to_num(0.0) for each in (*qkv, grad_out))
    group = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(group, 1) for each in (k, v))
    mask = seen(pack.cu_q.tolist(), pack.cu_k.tolist(), (len(q), len(k)), causal=pack.causal)
    weights = (torch.einsum("qhd,khd->hqk", q, k) * pack.scale - lse[:, :, None]).exp() * mask
    along = (grad_out * out).sum(-1).T[:, :, None]
    grad_scores = weights * (torch.einsum("qhd,khd->hqk", grad_out, v) - along) * pack.scale
    dq = torch.einsum("hqk,khd->qhd", grad_scores, k)
    dk, dv = (
        torch.einsum("hqk,qhd->khd", each, of).unflatten(1, (-1, group)).sum(2)
        for each, of in ((grad_scores, q), (weights, grad_out))
    )
    for each, cu in ((dq, pack.cu_q), (dk, pack.cu_k), (dv, pack.cu_k)):
        each[cu[-1] :] = math.nan
    return tuple(each.to(qkv[0].dtype) for each in (dq, dk, dv))


def check_kernel(pack: Pack, *tensors: torch.Tensor) -> None:
    """Fail where a kernel would give a wrong result, or none."""
    for cu, longest in ((pack.cu_q, pack.max_q), (pack.cu_k, pack.max_k)):
        assert cu.dtype == torch.int32
        assert int(cu.diff().max()) <= longest
    assert pack.max_q > 1, "flash-attention takes 1 for decoding"
    assert pack.max_k > 0
    assert all(each.numel() for each in tensors)
    assert all(each.stride(-1) == 1 for each in tensors)


@pytest.fixture
def torch_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Put the dense kernels where torch has none for a CPU."""

    def forward(*arguments: Any, scale: float, window_size_left: int, window_size_right: int, **_: Any) -> Tensors:
        q, k, v, cu_q, cu_k, max_q, max_k, dropout_p, causal, return_debug_mask = arguments
        assert (dropout_p, return_debug_mask, window_size_left) == (0, False, -1)
        assert window_size_right == (0 if causal else -1)
        out, lse = kernel_forward(q, k, v, Pack(cu_q, cu_k, max_q, max_k, causal, scale))
        return out, lse, torch.zeros(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def backward(*arguments: Any, scale: float, window_size_left: int, window_size_right: int) -> Tensors:
        grad_out, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, dropout_p, causal, _, _ = arguments
        assert (dropout_p, window_size_left, window_size_right) == (0, -1, 0 if causal else -1)
        return kernel_backward(grad_out, (q, k, v), out, lse, Pack(cu_q, cu_k, max_q, max_k, causal, scale))

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    monkeypatch.setattr(attention, "backend_for", lambda *_: "torch")
    yield monkeypatch
    library._destroy()


KERNEL_CASES = [
    Case(lengths=[(5, 8), (0, 3), (4, 0), (7, 7)], heads=heads, causal=causal, scale=scale, unused=2, behind=3)
    for heads, causal, scale in ((HEADS[0], True, 0.3), (HEADS[1], False, None), (HEADS[2], True, None))
] + [
    Case(lengths=[(1, 2), (0, 1), (1, 1)], heads=(8, 1), behind=1),
    Case(lengths=[(0, 3)], behind=2),
    Case(lengths=[(3, 0)], behind=2),
    Case(lengths=[(3, 0)]),
    Case(lengths=[(0, 3)]),
]


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_the_adapter_of_torch(case: Case, torch_kernels: pytest.MonkeyPatch) -> None:
    tensors = case.tensors()
    assert_close(computed(case, tensors), expected(case, tensors), 2e-5)


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_the_adapter_of_a_torch_that_does_not_group_heads(case: Case, torch_kernels: pytest.MonkeyPatch) -> None:
    """The public function of torch 2.11, where a group's heads are not asked for; its operator is the same."""
    newer = varlen.varlen_attn

    def older(*arguments: Any, return_aux: Any, scale: float | None, window_size: tuple[int, int] = (-1, -1)) -> Any:
        return newer(*arguments, return_aux=return_aux, scale=scale, window_size=window_size)

    torch_kernels.setattr(varlen, "varlen_attn", older)
    tensors = case.tensors()
    assert_close(computed(case, tensors), expected(case, tensors), 2e-5)


def test_transposed_tensors_reach_a_kernel_in_rows(torch_kernels: pytest.MonkeyPatch) -> None:
    case = Case(lengths=[(5, 8), (7, 4)], behind=1)
    tensors = case.tensors()
    turned = tuple(each.mT.contiguous().mT for each in tensors)
    assert turned[0].stride(-1) != 1
    pack = case.pack()
    q, k, v = (each.requires_grad_() for each in turned[:3])
    out = varlen_attn(q, k, v, *pack[:4])
    assert_close((out, *torch.autograd.grad(out, (q, k, v), turned[3])), expected(case, tensors), 2e-5)


def test_values_of_cu_are_checked_on_request(torch_kernels: pytest.MonkeyPatch) -> None:
    x, cu = torch.zeros(4, 1, 8), torch.tensor([0, 3, 4], dtype=torch.int32)
    torch_kernels.setenv("ROBOLAKE_CHECK", "1")
    assert not varlen_attn(x, x, x, cu, cu, 3, 3).any()
    with pytest.raises(ValueError, match="cu_k has a segment of 3 rows, but the maximum is 2"):
        varlen_attn(x, x, x, cu, cu, 3, 2)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("causal", [False, True])
def test_on_cuda_nothing_waits_for_the_device(heads: tuple[int, int], causal: bool, choose: pytest.MonkeyPatch) -> None:
    """Tensors without values cannot be read: what torch would run on a GPU has to know all sizes beforehand."""
    with FakeTensorMode():
        q = torch.empty(24, heads[0], 64, dtype=torch.bfloat16, device="cuda")
        k, v = (torch.empty(30, heads[1], 64, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        cu = torch.empty(5, dtype=torch.int32, device="cuda")
        pack = Pack(cu, cu, 24, 30, causal, 0.1)
        out, lse = attention._forward(q, k, v, *pack)
        grads = attention._backward(torch.empty_like(out), q, k, v, out, lse, *pack)
        for found, like in zip((out, lse, *grads), (*empty_outputs(q), q, k, v), strict=True):
            assert (found.shape, found.dtype, found.device) == (like.shape, like.dtype, like.device)
            assert found.is_contiguous()
        choose.setenv("ROBOLAKE_CHECK", "1")
        with pytest.raises(DataDependentOutputException):
            attention._forward(q, k, v, *pack)


def test_arguments_follow_what_torch_has_parameters_for() -> None:
    pack = Case(lengths=[(2, 2)], causal=True, scale=0.5).pack()
    newest = kernels._parameters(varlen.varlen_attn)
    assert kernels._torch_options(newest, pack, grouped=True) == {
        "scale": 0.5,
        "window_size": (-1, 0),
        "enable_gqa": True,
    }
    assert kernels._torch_options({"is_causal"}, pack, grouped=True) == {"scale": 0.5, "is_causal": True}
    assert kernels._torch_options({"is_causal"}, pack._replace(causal=False), grouped=True) == {"scale": 0.5}


# flash-attn, through operators with the signatures that 2.8.3 gives its own.


@torch.library.custom_op("robolake_tests::_flash_attn_varlen_forward", mutates_args=())
def _flash_attn_varlen_forward(  # noqa: PLR0917
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    return_softmax: bool = False,
    block_table: torch.Tensor | None = None,
    leftpad_k: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    assert (dropout_p, softcap, window_size_left, window_size_right, return_softmax) == (0, 0, -1, -1, False)
    pack = Pack(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)
    out, lse = kernel_forward(q, k, v, pack)
    return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)


@torch.library.custom_op("robolake_tests::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_varlen_backward(  # noqa: PLR0917
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    softmax_lse: torch.Tensor,
    dq: torch.Tensor | None,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: torch.Tensor | None,
    deterministic: bool,
    rng_state: torch.Tensor | None = None,
    zero_tensors: bool = False,
) -> torch.Tensor:
    assert (dropout_p, softcap, window_size_left, window_size_right, deterministic) == (0, 0, -1, -1, False)
    pack = Pack(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale)
    grads = kernel_backward(dout, (q, k, v), out, softmax_lse, pack)
    for into, grad in zip((dq, dk, dv), grads, strict=True):
        assert into is not None
        into.copy_(grad)
    return torch.empty(0)


def install_flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    vars(interface).update(
        _flash_attn_varlen_forward=_flash_attn_varlen_forward, _flash_attn_varlen_backward=_flash_attn_varlen_backward
    )
    monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, interface.__name__, interface)


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_the_adapter_of_flash_attn(case: Case, choose: pytest.MonkeyPatch) -> None:
    install_flash_attn(choose)
    choose.setenv("ROBOLAKE_ATTENTION", "flash_attn")
    assert backend_for(CUDA) == "flash_attn"
    choose.setattr(attention, "backend_for", lambda *_: "flash_attn")
    tensors = case.tensors()
    assert_close(computed(case, tensors), expected(case, tensors), 2e-5)
