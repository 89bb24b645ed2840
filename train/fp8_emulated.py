"""Products in emulated FP8: operands rounded to eight bits, then multiplied in float32 on any device.

The numbers are those of torchao's recipes, so a test on a CPU shows what training in FP8 would do to a model. Nothing
becomes faster.

Shapes: M rows, K features in, N features out.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch

from train.models.blocks import Linear

Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]
"""``tensorwise`` is the fastest, ``rowwise_with_gw_hp`` the most exact: gradients of weights stay in high precision."""

SMALLEST = 1e-12
"""What a tensor of zeros is scaled by the largest value of."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Casts:
    """How the operands of the three products of a projection are rounded; inputs and weights always to e4m3."""

    grad_dtype: torch.dtype
    """Of the gradient of the output."""
    rowwise: bool
    """One scale for each vector that is summed over, rather than one for the tensor."""
    rowwise_weight_for_grad: bool
    """The same, of the weight in the product that gives the gradient of the input."""
    exact_grad_weight: bool
    """Do not round the operands of the gradient of the weight."""


_CASTS: dict[str, _Casts] = {
    "tensorwise": _Casts(
        grad_dtype=torch.float8_e5m2, rowwise=False, rowwise_weight_for_grad=False, exact_grad_weight=False
    ),
    "rowwise": _Casts(
        grad_dtype=torch.float8_e4m3fn, rowwise=True, rowwise_weight_for_grad=True, exact_grad_weight=False
    ),
    "rowwise_with_gw_hp": _Casts(
        grad_dtype=torch.float8_e4m3fn, rowwise=True, rowwise_weight_for_grad=False, exact_grad_weight=True
    ),
}


def rounded(x: torch.Tensor, dtype: torch.dtype, *, dim: int | None = None, power_of_2: bool = False) -> torch.Tensor:
    """Return x as FP8 would hold it, in float32; zeros stay zeros, and NaN or infinity makes NaN.

    Source: torchao.float8, float8_utils.py, whose scale is computed in float64 and applied in float32.

    Args:
        x: of any shape and type.
        dtype: an FP8 type of torch.
        dim: over which one scale holds; None for one scale in all.
        power_of_2: round scales down to powers of two, which then lose nothing by themselves.
    """
    top = torch.finfo(dtype).max
    largest = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = (top / largest.double().clamp(min=SMALLEST)).float()
    if power_of_2:
        scale = torch.exp2(torch.floor(torch.log2(scale)))
    return (x.float() * scale).clamp(-top, top).to(dtype).float() / scale


@torch.compiler.allow_in_graph
class _Product(torch.autograd.Function):
    """x weight^T, with the gradients that a recipe gives."""

    @staticmethod
    def forward(ctx: Any, x_MK: torch.Tensor, weight_NK: torch.Tensor, recipe: str) -> torch.Tensor:
        casts = _CASTS[recipe]
        ctx.save_for_backward(x_MK, weight_NK)
        ctx.recipe = recipe
        dim = 1 if casts.rowwise else None
        x, weight = (
            rounded(each, torch.float8_e4m3fn, dim=dim, power_of_2=casts.rowwise) for each in (x_MK, weight_NK)
        )
        return (x @ weight.t()).to(x_MK.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        (grad_MN,) = grads
        x_MK, weight_NK = ctx.saved_tensors
        casts = _CASTS[ctx.recipe]
        grad_x, grad_weight = None, None
        if ctx.needs_input_grad[0]:
            grad = rounded(grad_MN, casts.grad_dtype, dim=1 if casts.rowwise else None, power_of_2=casts.rowwise)
            dim = 0 if casts.rowwise_weight_for_grad else None
            weight = rounded(weight_NK, torch.float8_e4m3fn, dim=dim, power_of_2=casts.rowwise)
            grad_x = (grad @ weight).to(grad_MN.dtype)
        if ctx.needs_input_grad[1]:
            grad, x = grad_MN, x_MK
            if not casts.exact_grad_weight:
                dim = 0 if casts.rowwise else None
                grad = rounded(grad_MN, casts.grad_dtype, dim=dim, power_of_2=casts.rowwise)
                x = rounded(x_MK, torch.float8_e4m3fn, dim=dim, power_of_2=casts.rowwise)
            # Through the type of the activations, as a product of a GPU would leave it.
            grad_weight = (grad.t() @ x).to(grad_MN.dtype).to(weight_NK.dtype)
        return grad_x, grad_weight, None


class EmulatedLinear(Linear):
    """A large projection whose three products are those of FP8."""

    recipe: Recipe = "tensorwise"

    @classmethod
    def of(cls, module: Linear, recipe: Recipe) -> "EmulatedLinear":
        """Return a projection with the parameters of another, the same objects."""
        with torch.device("meta"):
            made = cls(module.in_features, module.out_features, bias=False)
        made.weight, made.bias, made.recipe = module.weight, module.bias, recipe
        return made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project [..., in] to [..., out], in the type of x."""
        y = _Product.apply(x.reshape(-1, self.in_features), self.weight, self.recipe)
        y = y.reshape(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias.to(y.dtype)
