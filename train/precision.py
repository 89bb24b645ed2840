"""Choice of the arithmetic of a model's large projections: the type of the activations, or FP8 by one of four ways.

Only ``train.models.blocks.Linear`` is ever replaced. Embeddings, norms, projections of single embodiments, of actions,
of time and of conditions are other classes, and stay in high precision.

Order: build the model, ``apply_precision``, shard it, compile it, make the optimizer. Then around every forward:
``with precision_context(config): ...``.

Shapes: M rows, K features in, N features out.
"""

import importlib
import logging
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from train.fp8_emulated import EmulatedLinear, Recipe
from train.models.blocks import Linear

Backend = Literal["none", "emulate", "torchao", "te", "block"]
"""``torchao`` and ``te`` train with the FP8 units of a GPU, ``emulate`` computes the same numbers anywhere, ``block``
is for inference, by ``train.fp8_inference.quantise``."""

ALIGN = 16
"""Rows and columns of an FP8 product are multiples of it."""

CAPABILITY = (8, 9)
"""Compute capability from which on a GPU multiplies FP8: Ada, Hopper and what came after."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionConfig:
    """How the large projections of a model are computed."""

    backend: Backend = "none"
    """What computes them: none, emulate, torchao, te (Transformer Engine); block is for inference only."""
    recipe: Recipe = "tensorwise"
    """What one scale holds for: a tensor, a row, or a row with the gradients of weights in high precision."""
    float8_all_gather: bool = False
    """Let FSDP gather the weights in FP8, half the bytes; of torchao's tensorwise recipe only. It wraps the weights, so
    they are other parameters from then on."""
    min_features: int | None = None
    """Convert from this number of features in and out on, rather than by the rule of the recipe."""

    def __post_init__(self) -> None:
        """Raise ValueError where the fields do not go together."""
        if self.backend not in get_args(Backend):
            raise ValueError(f"no back end {self.backend!r} of precision; there are {', '.join(get_args(Backend))}")
        if self.recipe not in get_args(Recipe):
            raise ValueError(f"no FP8 recipe {self.recipe!r}; there are {', '.join(get_args(Recipe))}")
        if self.recipe != "tensorwise" and self.backend in ("te", "block"):
            raise ValueError(f"the back end {self.backend} has no recipe {self.recipe!r}; leave it at tensorwise")
        if self.float8_all_gather and (self.backend, self.recipe) != ("torchao", "tensorwise"):
            raise ValueError(
                f"float8_all_gather is of torchao's tensorwise recipe, and this is {self.recipe} of {self.backend}; "
                "turn it off, or choose those"
            )
        if self.min_features is not None and self.min_features < 1:
            raise ValueError(f"min_features={self.min_features}; give 1 or more, or None for the rule of the recipe")


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """What ``apply_precision`` did to a model's large projections."""

    converted: tuple[str, ...]
    """Names of the modules that were replaced."""
    skipped: Mapping[str, str]
    """Why, by the name of each module that was not."""


def eligible(K: int, N: int, *, recipe: Recipe = "tensorwise", min_features: int | None = None) -> bool:
    """Return whether a projection of K features to N gains by FP8.

    K and N have to be multiples of 16. Beyond that

    tensorwise: not where K <= 4096 and N <= 1024, as keys and values of few heads
    rowwise:    not where N <= 2048, or K <= 1024, or N <= 4096 and K <= 2048
    rowwise_with_gw_hp: as rowwise

    Source: torchao.float8, the automatic filters, measured on H100.

    Args:
        K: features in.
        N: features out.
        recipe: whose rule.
        min_features: the least of both, rather than that rule.
    """
    return not _reason(K, N, rule=recipe, min_features=min_features)


def selected(model: nn.Module, config: PrecisionConfig) -> tuple[dict[str, Linear], dict[str, str]]:
    """Return (large projections to convert, why the others are not), by the names of the modules.

    Raises:
        ValueError: nothing is to be converted, or the model was sharded before.
    """
    chosen: dict[str, Linear] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is not Linear:
            continue
        sharded = isinstance(module.weight, DTensor)
        if sharded:
            raise ValueError(f"{name} is sharded already; choose its precision before fully_shard")
        rule = "block" if config.backend == "block" else config.recipe
        reason = _reason(module.in_features, module.out_features, rule=rule, min_features=config.min_features)
        if reason:
            skipped[name] = reason
        else:
            chosen[name] = module
    if not chosen:
        found = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(
            f"no projection for the back end {config.backend}"
            + (f" ({found})" if found else ", the model has none, or its precision was chosen before")
            + "; build the model anew, lower min_features, or take the back end none"
        )
    if "" in chosen:
        raise ValueError("the model is itself one projection, which cannot be replaced in place; wrap it in a module")
    return chosen, skipped


def apply_precision(model: nn.Module, config: PrecisionConfig) -> Applied:
    """Replace the large projections of a model in place, with the same parameters under the same names.

    Of torchao and Transformer Engine nothing here was run on a GPU: torchao ran on CPUs, where it multiplies FP8 by
    ``torch._scaled_mm`` too, and of Transformer Engine none of the kernels; only that its modules are made and called
    as its source wants it was tested.

    A model with torchao is to be compiled: that fuses the casts, and drops the gradients of frozen weights, which it
    computes otherwise. Modules of Transformer Engine may break the compiler's graph, so compile without ``fullgraph``.

    Raises:
        ValueError: nothing to convert, a package that is missing, or a GPU that cannot.
    """
    if config.backend == "none":
        return Applied(converted=(), skipped={})
    if config.backend == "block":
        raise ValueError("the back end block is for inference; call train.fp8_inference.quantise")
    chosen, skipped = selected(model, config)
    for name, module in chosen.items():
        _check_device(name, module.weight.device, config)
    training = {name: module.training for name, module in chosen.items()}
    made = _MAKERS[config.backend](model, chosen, config)
    for name, module in chosen.items():
        model.set_submodule(name, made[id(module)].train(training[name]))
    return Applied(converted=tuple(chosen), skipped=skipped)


def precision_context(config: PrecisionConfig) -> AbstractContextManager[Any]:
    """Return what is to be held around a forward; it does something for Transformer Engine only.

    Raises:
        ValueError: Transformer Engine is missing.
    """
    if config.backend != "te":
        return nullcontext()
    te = _transformer_engine()
    recipes = importlib.import_module("transformer_engine.common.recipe")
    return te.autocast(enabled=True, recipe=recipes.Float8CurrentScaling())


def refresh_scales(model: nn.Module, config: PrecisionConfig) -> None:
    """Compute the scales of all sharded weights by one reduction; call it after a step of the optimizer.

    Without it every weight has a reduction of its own; once called, it is to be called after every step. It does
    nothing unless FSDP gathers in FP8.
    """
    if config.float8_all_gather:
        with _quiet():
            from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp
        precompute_float8_dynamic_scale_for_fsdp(model)


def plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return a model's state without what modules keep besides tensors, as those of Transformer Engine do.

    What ``apply_precision`` makes keeps nothing of that kind; this is for models with other such modules.
    """
    return {name: value for name, value in model.state_dict().items() if not name.endswith("_extra_state")}


def _reason(K: int, N: int, *, rule: str, min_features: int | None) -> str:
    """Return why a projection is not converted; empty where it is. The rule is a recipe's, or of the back end block."""
    if rule != "block" and (K % ALIGN or N % ALIGN):
        return f"K={K} and N={N} are not both multiples of {ALIGN}"
    if min_features is not None:
        return "" if min(K, N) >= min_features else f"K={K} or N={N} is less than min_features={min_features}"
    small = {
        "block": False,
        "tensorwise": K <= 4096 and N <= 1024,
        "rowwise": N <= 2048 or K <= 1024 or (N <= 4096 and K <= 2048),
    }
    return f"K={K} and N={N} are too small to gain by {rule}" if small[rule.removesuffix("_with_gw_hp")] else ""


def _check_device(name: str, device: torch.device, config: PrecisionConfig) -> None:
    """Raise ValueError where a device has no units for FP8; meta tensors may go anywhere later."""
    if device.type in ("cpu", "meta") or config.backend == "emulate":
        return
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if capability is None or capability < CAPABILITY:
        raise ValueError(
            f"{name} is on {device}, which does not multiply FP8: its compute capability is {capability}, and "
            f"{config.backend} needs CUDA's {CAPABILITY} or more; take the back end emulate or none"
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torchao's import from reporting extensions for GPUs that it cannot load, none of which is used here."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _emulated(_model: nn.Module, chosen: dict[str, Linear], config: PrecisionConfig) -> dict[int, nn.Module]:
    """Return what replaces each projection, by its id, so that one in two places stays one."""
    return {id(module): EmulatedLinear.of(module, config.recipe) for module in chosen.values()}


def _by_torchao(model: nn.Module, chosen: dict[str, Linear], config: PrecisionConfig) -> dict[int, nn.Module]:
    try:
        with _quiet():
            from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ValueError(
            "the back end torchao needs torchao 0.18; pip install 'robolake[train]', or take the back end emulate"
        ) from error
    recipe = replace(
        Float8LinearConfig.from_recipe_name(config.recipe),
        enable_fsdp_float8_all_gather=config.float8_all_gather,
        # The number of tokens of some parts is no multiple of 16, and the gradient of a weight sums over it. Where it
        # is one, compilation removes the padding.
        pad_inner_dim=True,
    )
    convert_to_float8_training(model, config=recipe, module_filter_fn=lambda _, name: name in chosen)
    made: dict[int, nn.Module] = {}
    for name, module in chosen.items():
        replaced = model.get_submodule(name)
        if replaced is not module:
            made[id(module)] = replaced
    return made


def _by_transformer_engine(
    _model: nn.Module, chosen: dict[str, Linear], _config: PrecisionConfig
) -> dict[int, nn.Module]:
    made_of = _te_linear(_transformer_engine())
    return {id(module): made_of(module) for module in chosen.values()}


def _transformer_engine() -> Any:
    try:
        return importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError) as error:
        raise ValueError(
            f"the back end te needs Transformer Engine, which does not load ({error}); on a machine with CUDA "
            "pip install --no-build-isolation 'robolake[gpu]', or take the back end torchao"
        ) from error


def _te_linear(te: Any) -> Any:
    """Return what makes a projection of Transformer Engine out of one of ours."""

    class TeLinear(te.Linear):
        """A projection of Transformer Engine that takes any number of rows, and masters wider than the activations."""

        # Scaling by current values keeps no state, so that checkpoints need hold none.
        get_extra_state = nn.Module.get_extra_state
        set_extra_state = nn.Module.set_extra_state

        def __init__(self, module: Linear) -> None:
            has_bias = module.bias is not None
            dtype = module.weight.dtype
            super().__init__(module.in_features, module.out_features, bias=has_bias, params_dtype=dtype, device="meta")
            self.weight = module.weight
            if has_bias:
                self.bias = module.bias

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Project [..., in] to [..., out], in the type of x."""
            x_MK = x.reshape(-1, x.shape[-1])
            num_rows = x_MK.shape[0]
            padded = nn.functional.pad(x_MK, (0, 0, 0, -num_rows % ALIGN)) if num_rows % ALIGN else x_MK
            # Outside autocast it refuses weights of another type than the input's.
            with torch.autocast(x.device.type, dtype=x.dtype, enabled=x.dtype != self.weight.dtype):
                y_MN = super().forward(padded)
            return y_MN[:num_rows].reshape(*x.shape[:-1], y_MN.shape[-1])

    return TeLinear


_MAKERS = {"emulate": _emulated, "torchao": _by_torchao, "te": _by_transformer_engine}
