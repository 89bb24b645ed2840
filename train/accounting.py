"""Floating-point operations of training and sampling, counted for useful tokens alone; hence MFU.

A multiplication with an addition counts as two operations, as hardware vendors count. Norms, activations and softmax
count nothing. Padding, unused rows and activations computed again count nothing either: a step that spends time on
them has a lower MFU.
"""

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from train.models.config import GrootConfig, ModelConfig, Pi05Config, VisionConfig

PEAK_FLOPS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "A100": 312e12,
    "B200": 2250e12,
}
"""Of dense bfloat16 products, by words of a device's name; the first that fits counts. Source: NVIDIA's data sheets."""


_BEFORE = ("vision", "language", "vl")
_UPSTREAM: dict[str, dict[str, tuple[str, ...]]] = {
    "pi05": {
        "vision": (),
        "connector": ("vision",),
        "language": ("vision", "connector"),
        "expert": ("vision", "connector", "language"),
    },
    "groot_n15": {
        "vision": (),
        "language": ("vision",),
        "vl": ("vision", "language"),
        "projector": (*_BEFORE, "dit"),
        "dit": (*_BEFORE, "projector"),
    },
}
"""What feeds each part; the projector's encoders come before the diffusion transformer, its decoder behind it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """What one part of a model computes in a forward pass."""

    linear: float
    """Operations of products with weights."""
    attention: float = 0.0
    """Operations of attention."""
    remembered: float = 0.0
    """Of the linear ones, those on images and text alone, which sampling does once."""

    @property
    def total(self) -> float:
        """Operations."""
        return self.linear + self.attention


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """The lengths of a sample, which is all that its operations depend on."""

    tokens: int
    """Of images and text together."""
    images: int


def forward_flops(config: ModelConfig, sample: Sample) -> dict[str, Part]:
    """Return the operations of one sample's forward pass in training, by part, in the order of computation."""
    if isinstance(config, Pi05Config):
        return _pi05_prefix(config, sample) | {"expert": _pi05_expert(config, sample)}
    return _groot_vl(config, sample) | _groot_head(config, sample)


def sampling_flops(config: ModelConfig, sample: Sample, *, steps: int | None = None) -> float:
    """Return the operations of sampling one action chunk: images and text once, the action stream at each step."""
    steps = steps or config.sampling_steps
    repeated = ("expert", "projector", "dit")
    total = 0.0
    for name, part in forward_flops(config, sample).items():
        once = part.remembered if name in repeated else part.total
        total += once + steps * (part.total - once)
    return total


def step_flops(config: ModelConfig, samples: Iterable[Sample], *, frozen: Collection[str] = ()) -> float:
    """Return the operations of a forward and a backward pass over some samples.

    A backward pass costs a forward pass for what it carries to the inputs, and another for the weights' gradients. A
    frozen part saves the second, and where nothing before it is trained, the first too.

    Args:
        frozen: names of parts, as ``model.parts()`` has them.

    Raises:
        ValueError: a part that the model does not have.
    """
    upstream = _UPSTREAM[config.family]
    if unknown := sorted(set(frozen) - upstream.keys()):
        raise ValueError(f"parts {unknown} to freeze are not among those of {config.family}: {sorted(upstream)}")
    trained = {name: name not in frozen for name in upstream}
    carried = {name: trained[name] or any(trained[each] for each in upstream[name]) for name in upstream}
    total = 0.0
    for sample in samples:
        for name, part in forward_flops(config, sample).items():
            # Attention has no weights: its backward pass computes gradients of queries, keys and values.
            total += part.linear * (1 + trained[name] + carried[name]) + part.attention * (1 + 2 * carried[name])
    return total


def mfu(flops: float, seconds: float, *, peak: float, devices: int = 1) -> float:
    """Return the share of some devices' peak that useful operations reached."""
    return flops / (seconds * devices * peak)


def peak_flops(device_name: str) -> float | None:
    """Return the operations per second that a device could do in bfloat16, or None where it is not known."""
    return next((peak for name, peak in PEAK_FLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


def _vision(config: VisionConfig, images: int, out: int) -> tuple[Part, Part]:
    """Return the operations of (tower, connector)."""
    tokens = images * config.tokens
    weights = config.layers * (4 * config.width**2 + 2 * config.width * config.mlp) + 3 * config.patch**2 * config.width
    attention = config.layers * 4 * images * config.tokens**2 * config.width
    return Part(linear=2.0 * weights * tokens, attention=attention), Part(linear=2.0 * config.width * out * tokens)


def _pi05_prefix(config: Pi05Config, sample: Sample) -> dict[str, Part]:
    vision, connector = _vision(config.vision, sample.images, config.width)
    tokens, heads = sample.tokens, config.heads * config.head_dim
    keys = 2 * config.kv_heads * config.head_dim
    layer = config.width * (2 * heads + keys + 3 * config.mlp)
    # Of the last layer, keys and values alone.
    weights = (config.layers - 1) * layer + config.width * keys
    attention = (config.layers - 1) * 4.0 * tokens**2 * heads
    return {
        "vision": vision,
        "connector": connector,
        "language": Part(linear=2.0 * weights * tokens, attention=attention),
    }


def _pi05_expert(config: Pi05Config, sample: Sample) -> Part:
    heads, width = config.heads * config.head_dim, config.expert_width
    keys = 2 * config.kv_heads * config.head_dim
    layer = width * (2 * heads + keys + 3 * config.expert_mlp)
    # Norms depend on the time alone: once a sample.
    condition = (2 * config.layers + 1) * 3 * width**2 + 2 * width**2
    linear = config.horizon * (config.layers * layer + 2 * config.action_dim * width) + condition
    seen = sample.tokens + config.horizon
    return Part(linear=2.0 * linear, attention=config.layers * 4.0 * config.horizon * seen * heads)


def _groot_vl(config: GrootConfig, sample: Sample) -> dict[str, Part]:
    vision, connector = _vision(config.vision, sample.images, config.width)
    tokens, heads, width = sample.tokens, config.heads * config.head_dim, config.width
    layer = width * (2 * heads + 2 * config.kv_heads * config.head_dim + 3 * config.mlp)
    # Causal: half of all pairs.
    language = Part(
        linear=2.0 * config.layers * layer * tokens, attention=config.layers * 2.0 * tokens * (tokens + 1) * heads
    )
    vl = Part(
        linear=2.0 * config.vl_layers * 12 * width**2 * tokens, attention=config.vl_layers * 4.0 * tokens**2 * width
    )
    both = Part(linear=vision.linear + connector.linear, attention=vision.attention)
    return {"vision": both, "language": language, "vl": vl}


def _groot_head(config: GrootConfig, sample: Sample) -> dict[str, Part]:
    size, rows, hidden = config.dit_width, config.action_tokens, config.hidden
    state = config.state_dim * hidden + hidden * size
    actions = config.horizon * (config.action_dim * size + 3 * size**2)
    decoder = config.horizon * (hidden**2 + hidden * config.action_dim)
    crossing = (config.dit_layers + 1) // 2
    within = config.dit_layers - crossing
    per_row = crossing * 10 * size**2 + within * 12 * size**2 + size * hidden
    per_token = crossing * 2 * config.width * size
    per_sample = (config.dit_layers + 1) * 2 * size**2 + 256 * size + size**2
    pairs = crossing * rows * sample.tokens + within * rows**2
    return {
        "projector": Part(linear=2.0 * (state + actions + decoder)),
        "dit": Part(
            linear=2.0 * (per_row * rows + per_token * sample.tokens + per_sample),
            attention=4.0 * pairs * size,
            remembered=2.0 * per_token * sample.tokens,
        ),
    }
