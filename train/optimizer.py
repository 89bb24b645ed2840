"""AdamW with the settings and learning rates of the published trainers.

Steps count from 0: the first update is made with ``learning_rate(config, 0)``.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn
from torch.distributed.tensor import DTensor

Schedule = Literal["openpi_cosine", "hf_cosine", "constant"]
Decay = Literal["all", "no_biases_or_norms"]


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW and its learning rate; what is not given is as openpi has it for pi-0.5."""

    schedule: Schedule = "openpi_cosine"
    """How the learning rate moves. openpi_cosine: up from peak_lr / (warm-up steps + 1), then down along a cosine.
    hf_cosine: up from 0, then down along a cosine. constant: up as in openpi_cosine, then the peak for ever."""
    peak_lr: float = 2.5e-5
    """Learning rate at the end of the warm-up."""
    final_lr: float = 2.5e-6
    """Learning rate from decay_steps on."""
    warmup_steps: int = 1000
    """Steps before the peak; 0 where warmup_ratio says it."""
    warmup_ratio: float = 0.0
    """Steps before the peak as a share of decay_steps, rounded up; 0 where warmup_steps says it."""
    decay_steps: int = 30_000
    """Step at which the cosine ends, counted from the start of the run, so the warm-up is a part of it."""
    betas: tuple[float, float] = (0.9, 0.95)
    """How much of the averages of the gradient, then of its square, is kept at each step."""
    eps: float = 1e-8
    """Added to the root of the average square."""
    weight_decay: float = 1e-10
    """Share of a weight that is taken off per unit of learning rate."""
    decay: Decay = "all"
    """Which parameters decay. all: every one, as in openpi. no_biases_or_norms: neither biases nor weights of norms, as
    in the trainer of Hugging Face."""
    clip_norm: float = 1.0
    """Norm to which larger gradients are scaled; inf to leave them."""
    allow_low_precision: bool = False
    """Whether trainable parameters may be other than float32, in which small updates are lost."""

    def __post_init__(self) -> None:
        """Raise ValueError where the settings contradict one another, or themselves."""
        for name, given, known in (
            ("schedule", self.schedule, get_args(Schedule)),
            ("decay", self.decay, get_args(Decay)),
        ):
            if given not in known:
                raise ValueError(f"{name} is {given!r}; give one of {', '.join(known)}")
        if not 0 <= self.final_lr <= self.peak_lr < math.inf or not self.peak_lr > 0:
            raise ValueError(
                f"peak_lr is {self.peak_lr} and final_lr {self.final_lr}; give a peak above 0, and a final rate from 0 "
                "up to the peak"
            )
        if self.warmup_steps < 0 or not 0 <= self.warmup_ratio < 1 or (self.warmup_steps and self.warmup_ratio):
            raise ValueError(
                f"warmup_steps is {self.warmup_steps} and warmup_ratio {self.warmup_ratio}; give 0 or more steps, or 0 "
                "steps with a ratio below 1"
            )
        if self.schedule != "constant" and self.num_warmup_steps >= self.decay_steps:
            raise ValueError(
                f"{self.num_warmup_steps} steps of warm-up leave none of {self.decay_steps} decay_steps to the "
                "cosine; shorten the warm-up, or raise decay_steps"
            )
        if not all(0 <= beta < 1 for beta in self.betas) or not 0 < self.eps < math.inf:
            raise ValueError(f"betas {self.betas} and eps {self.eps}; give betas of 0 or more and below 1, eps above 0")
        if not 0 <= self.weight_decay < math.inf or not self.clip_norm > 0:
            raise ValueError(
                f"weight_decay is {self.weight_decay} and clip_norm {self.clip_norm}; give a decay of 0 or more, and a "
                "norm above 0"
            )

    @property
    def num_warmup_steps(self) -> int:
        """How many steps come before the peak."""
        return self.warmup_steps or math.ceil(self.decay_steps * self.warmup_ratio)


PRESETS: dict[str, OptimizerConfig] = {
    "pi05": OptimizerConfig(),
    "pi05_libero": OptimizerConfig(peak_lr=5e-5, final_lr=5e-5, warmup_steps=10_000, decay_steps=1_000_000),
    "groot_n15": OptimizerConfig(
        schedule="hf_cosine",
        peak_lr=1e-4,
        final_lr=0.0,
        warmup_steps=0,
        warmup_ratio=0.05,
        decay_steps=10_000,
        betas=(0.95, 0.999),
        weight_decay=1e-5,
        decay="no_biases_or_norms",
    ),
}
"""The published settings of fine-tuning.

Source: openpi, training/optimizer.py and training/config.py; Isaac-GR00T n1.5, scripts/gr00t_finetune.py.
"""


def learning_rate(config: OptimizerConfig, step: int) -> float:
    """Return the learning rate of a step, of which the first is 0.

    With a warm-up of W steps from L_0 to the peak L, decay_steps D and final_lr F:

        step < W:   L_0 + (L - L_0) step / W
        W and on:   F + (L - F) (1 + cos(pi min(1, (step - W) / (D - W)))) / 2

    Source: optax, warmup_cosine_decay_schedule, as openpi calls it; transformers, get_cosine_schedule_with_warmup, but
    that would rise again behind its last step, where this one stays.

    Raises:
        ValueError: a negative step.
    """
    if step < 0:
        raise ValueError(f"step {step} has no learning rate; steps count from 0")
    warmup, peak = config.num_warmup_steps, config.peak_lr
    if step < warmup:
        start = 0.0 if config.schedule == "hf_cosine" else peak / (warmup + 1)
        return start + (peak - start) * step / warmup
    if config.schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup) / (config.decay_steps - warmup))
    return config.final_lr + (peak - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def make_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """Return a fused AdamW over the trainable parameters, at the learning rate of step 0.

    Shard the model and freeze what is to be frozen before.

    Raises:
        ValueError: nothing is trainable, or something in another type than float32.
    """
    decayed: list[nn.Parameter] = []
    spared: list[nn.Parameter] = []
    low: list[str] = []
    exempt = set() if config.decay == "all" else _biases_and_norms(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype != torch.float32:
            low.append(f"{name} ({parameter.dtype})")
        (spared if name in exempt else decayed).append(parameter)
    if low and not config.allow_low_precision:
        raise ValueError(
            f"{low[0]} and {len(low) - 1} others are trainable but not float32, and would lose small updates; keep "
            "masters in float32, or set allow_low_precision"
        )
    if not decayed and not spared:
        raise ValueError("the model has no trainable parameter; leave some unfrozen")
    groups = [
        {"params": parameters, "weight_decay": weight_decay}
        for parameters, weight_decay in ((decayed, config.weight_decay), (spared, 0.0))
        if parameters
    ]
    # The fused kernels take a tensor on the CPU as a number, with no wait for the device; and a compiled step is not
    # compiled anew for another value, as it would be for another float.
    lr = torch.tensor(learning_rate(config, 0), dtype=torch.float32, device="cpu")
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, eps=config.eps, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of an optimizer of ``make_optimizer`` a learning rate."""
    for group in optimizer.param_groups:
        group["lr"].fill_(lr)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float) -> torch.Tensor:
    """Scale gradients to a norm where theirs is larger, and return what it was, without a wait for the device.

    The norm is that of all gradients together, on all ranks where they are sharded.
    """
    norm = nn.utils.clip_grad_norm_(list(parameters), max_norm, foreach=True)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _biases_and_norms(model: nn.Module) -> set[str]:
    """Return the names of the parameters that the trainer of Hugging Face lets not decay.

    GR00T calls the biases of its projections per embodiment ``b``, so there they decay, and here they do not.
    """
    return {
        f"{owner}.{name}" if owner else name
        for owner, module in model.named_modules()
        for name, _ in module.named_parameters(recurse=False)
        if "bias" in name or "Norm" in type(module).__name__
    }
