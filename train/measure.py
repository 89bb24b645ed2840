"""Time training steps of a model: seconds, memory."""

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from train.freezing import freeze
from train.made import Lengths, packed_inputs, padded_inputs, random_sample
from train.memory import forget_peak, own_memory_mib
from train.models.build import build
from train.models.checkpointing import checkpoint_activations
from train.models.compiling import compile_layers
from train.models.config import ModelConfig
from train.models.groot import Groot
from train.models.inputs import Inputs
from train.models.padded import padded
from train.models.pi05 import Pi05
from train.optimizer import OptimizerConfig, make_optimizer
from train.packing import Budgets
from train.precision import PrecisionConfig, apply_precision, precision_context


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One way to run the same samples."""

    layout: Literal["packed", "padded"] = "packed"
    attention: Literal["varlen", "sdpa", "eager"] = "varlen"
    """Padded samples have one of the latter two."""
    compiled: bool = False
    """Layer by layer."""
    precision: str = "none"
    """Back end of FP8."""
    again: bool = False
    """Whether layers are computed again in the backward pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The samples of one step."""

    config: ModelConfig
    packs: tuple[tuple[Lengths, ...], ...]
    """Samples of each pack."""
    budgets: Budgets
    padded_to: Lengths | None
    """What the published layout pads each sample to; None pads to the longest, and leaves missing images out."""
    frozen: tuple[str, ...] = ()
    """Parts that are not trained."""

    @property
    def lengths(self) -> list[Lengths]:
        """Of all samples."""
        return [each for pack in self.packs for each in pack]


@dataclass(frozen=True, kw_only=True, slots=True)
class Timing:
    """What one variant took."""

    first_s: float
    """Of the first step, with compilation."""
    seconds: tuple[float, ...]
    """Of each later step: forward and backward passes over all samples, and one update."""
    peak_bytes: int
    """Of the device's memory; on a CPU, of the process's."""
    micro_steps: int
    """Forward and backward passes a step."""
    loss: float
    """Of the last step; that of the first tells little, as gates of residuals begin at zero."""


def measure(work: Work, variant: Variant, *, device: str, repeats: int) -> Timing:
    """Train some steps from nothing and return what they took.

    Raises:
        ValueError: the precision cannot be had on this machine.
    """
    _reset(device)
    model, precision = _model(work, variant, device)
    batches = [each.to(device) for each in _batches(work, variant)]
    optimizer = make_optimizer(model, OptimizerConfig(schedule="constant", warmup_steps=0, peak_lr=1e-3))
    weight = sum(float(each.weight_BHA.sum()) for each in batches)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=device)
        for inputs in batches:
            with precision_context(precision):
                loss = model(inputs)
            (loss.total / weight).backward()
            total += loss.total.detach()
        optimizer.step()
        return total.item() / weight

    steps = [_timed(step, device) for _ in range(1 + repeats)]
    return Timing(
        first_s=steps[0][0],
        seconds=tuple(seconds for seconds, _ in steps[1:]),
        peak_bytes=_peak_bytes(device),
        micro_steps=len(batches),
        loss=steps[-1][1],
    )


def _model(work: Work, variant: Variant, device: str) -> tuple[Pi05 | Groot, PrecisionConfig]:
    longest = max(each.tokens(work.config) for each in work.lengths)
    model = build(work.config, device=device, seed=0, max_tokens=longest)
    freeze(model, work.frozen)
    if variant.layout == "padded":
        assert variant.attention != "varlen"
        model.arrange = padded(variant.attention)
    checkpoint_activations(model, "layers" if variant.again else "none")
    is_tiny = work.config.width < 1024
    precision = PrecisionConfig(backend=variant.precision, min_features=16 if is_tiny else None)  # type: ignore[arg-type]
    if variant.precision != "none":
        apply_precision(model, precision)
    if variant.compiled:
        torch.compiler.reset()
        compile_layers(model)
    return model, precision


def _batches(work: Work, variant: Variant) -> list[Inputs]:
    samples = iter(range(len(work.lengths)))
    packs = [[random_sample(work.config, each, seed=next(samples)) for each in pack] for pack in work.packs]
    if variant.layout == "packed":
        return [packed_inputs(work.config, pack, work.budgets) for pack in packs]
    flat = [sample for pack in packs for sample in pack]
    lengths = work.lengths if work.padded_to is None else [work.padded_to]
    size = max(1, work.budgets.tokens // max(each.tokens(work.config) for each in lengths))
    return [
        padded_inputs(work.config, flat[first : first + size], to=work.padded_to) for first in range(0, len(flat), size)
    ]


def _timed(step: Callable[[], float], device: str) -> tuple[float, float]:
    begin = time.perf_counter()
    result = step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, result


def _reset(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        forget_peak()


def _peak_bytes(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else int(own_memory_mib("VmHWM") * 2**20)


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Where steps run."""

    kind: str
    """cpu or cuda."""
    name: str
    """As its vendor calls it."""


def device_name(wanted: str) -> Device:
    """Return the device that is asked for, or with auto a GPU where there is one.

    Raises:
        ValueError: it is not there.
    """
    has_gpu = torch.cuda.is_available()
    if wanted == "cuda" and not has_gpu:
        raise ValueError("there is no CUDA device on this machine; take device cpu, with a tiny model")
    if wanted == "cpu" or not has_gpu:
        return Device(kind="cpu", name="cpu")
    return Device(kind="cuda", name=torch.cuda.get_device_name())


def matmul_flops(device: str, dtype: str) -> float:
    """Return the operations per second of a large product alone, the best of ten."""
    size = 8192 if device == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in range(2))

    def product() -> float:
        torch.mm(left, right)
        return 0.0

    return 2 * size**3 / min(_timed(product, device)[0] for _ in range(10))


def parameters_of(config: ModelConfig, frozen: Sequence[str] = ()) -> dict[str, int]:
    """Return how many parameters each part of a model has, how many all have, how many of these are trained."""
    model = build(config, device="meta")
    parts = {
        name: sum(weight.numel() for module in modules for weight in module.parameters())
        for name, modules in model.parts().items()
    }
    return parts | {"all": sum(parts.values()), "trained": sum(parts[name] for name in parts if name not in frozen)}
