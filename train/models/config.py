"""The sizes of the models: published ones as defaults, with tiny ones for machines without a GPU."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionConfig:
    """SigLIP, So400m/14 at 224 pixels."""

    width: int = 1152
    """Features of a patch."""
    layers: int = 27
    """Transformer layers."""
    heads: int = 16
    """Attention heads, of width / heads features each."""
    mlp: int = 4304
    """Features inside the perceptron."""
    image_size: int = 224
    """Side of the square image in pixels."""
    patch: int = 14
    """Side of a patch in pixels."""

    @property
    def tokens(self) -> int:
        """Tokens of an image."""
        return (self.image_size // self.patch) ** 2

    def __post_init__(self) -> None:
        """Raise ValueError where an image does not divide into patches, or the width into heads."""
        if self.image_size % self.patch or self.width % self.heads:
            raise ValueError(f"{self}: image_size has to be a multiple of patch, and width one of heads")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pi05Config:
    """pi-0.5: SigLIP and Gemma-2B for images and text, a Gemma-300M of its own for actions.

    Source: openpi, models_pytorch/pi0_pytorch.py and models/gemma.py.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    """Of the images."""
    width: int = 2048
    """Features of a token of images or text."""
    layers: int = 18
    """Layers of both streams."""
    mlp: int = 16_384
    """Features inside the perceptron of images and text."""
    expert_width: int = 1024
    """Features of an action token."""
    expert_mlp: int = 4096
    """Features inside the perceptron of actions."""
    heads: int = 8
    """Heads of queries, in both streams."""
    kv_heads: int = 1
    """Heads of keys and values."""
    head_dim: int = 256
    """Features of a head."""
    vocab: int = 257_152
    """Text tokens."""
    horizon: int = 50
    """Actions of a chunk."""
    action_dim: int = 32
    """Width to which actions are padded."""
    loss_dims: Literal["padded", "real"] = "padded"
    """Which dimensions of actions count: openpi averages over padding too, LeRobot over the real ones."""
    loss_actions: Literal["all", "valid"] = "all"
    """Which actions of a chunk count: the published trainers count the repeated ones behind an episode's end too."""
    sampling_steps: int = 10
    """Steps from noise to actions."""
    compute: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Type of activations; norms, positions, time and losses are float32 at least."""

    @property
    def family(self) -> str:
        """Name in ``train.tokens.FAMILIES``."""
        return "pi05"


@dataclass(frozen=True, kw_only=True, slots=True)
class GrootConfig:
    """GR00T N1.5: Eagle 2.5 (SigLIP and a Qwen3-1.7B of 12 layers) with a diffusion transformer for actions.

    Source: Isaac-GR00T n1.5, model/backbone and model/action_head/flow_matching_action_head.py.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    """Of the images."""
    width: int = 2048
    """Features of a token of images or text."""
    layers: int = 12
    """Layers of the language model that are used."""
    mlp: int = 6144
    """Features inside the language model's perceptron."""
    heads: int = 16
    """Heads of queries."""
    kv_heads: int = 8
    """Heads of keys and values."""
    head_dim: int = 128
    """Features of a head."""
    vocab: int = 151_680
    """Text tokens."""
    vl_layers: int = 4
    """Blocks of self-attention over images and text, behind the language model."""
    vl_heads: int = 32
    """Their heads."""
    dit_width: int = 1536
    """Features of a token of the action stream."""
    dit_layers: int = 16
    """Blocks of the diffusion transformer, by turns of cross-attention and self-attention."""
    dit_heads: int = 32
    """Their heads."""
    hidden: int = 1024
    """Features inside the encoder of states and the decoder of actions."""
    state_dim: int = 64
    """Width to which states are padded."""
    action_dim: int = 32
    """Width to which actions are padded."""
    horizon: int = 16
    """Actions of a chunk."""
    future_tokens: int = 32
    """Learned queries."""
    positions: int = 1024
    """Learned positions of actions, of which the first ``horizon`` are used."""
    categories: int = 32
    """Embodiments with weights of their own."""
    dropout: float = 0.2
    """In training, of the diffusion transformer and the self-attention over images and text."""
    loss_actions: Literal["all", "valid"] = "all"
    """Which actions of a chunk count; as for pi-0.5. Only real dimensions count, always."""
    sampling_steps: int = 4
    """Steps from noise to actions."""
    compute: Literal["bfloat16", "float32", "float64"] = "bfloat16"
    """Type of activations; norms, time and losses are float32 at least."""

    @property
    def family(self) -> str:
        """Name in ``train.tokens.FAMILIES``."""
        return "groot_n15"

    @property
    def action_tokens(self) -> int:
        """Tokens of the action stream: the state, learned queries, actions."""
        return 1 + self.future_tokens + self.horizon


ModelConfig = Pi05Config | GrootConfig

EMBODIMENT_CATEGORIES = {
    "so100": 2,
    "unitree_g1": 3,
    "oxe_droid": 17,
    "gr1": 24,
    "agibot_genie1": 26,
    "new_embodiment": 31,
}
"""Published categories of GR00T N1.5 by the name of the embodiment; any other robot is ``new_embodiment``."""

TINY_VISION = VisionConfig(width=64, layers=2, heads=4, mlp=128, image_size=64, patch=4)
"""As many tokens an image as the published one, from fewer pixels."""

CONFIGS: dict[str, ModelConfig] = {
    "pi05": Pi05Config(),
    "groot_n15": GrootConfig(),
    "pi05_tiny": Pi05Config(
        vision=TINY_VISION,
        width=128,
        layers=3,
        mlp=512,
        expert_width=64,
        expert_mlp=128,
        heads=4,
        head_dim=32,
        vocab=2048,
        horizon=10,
    ),
    "groot_n15_tiny": GrootConfig(
        vision=TINY_VISION,
        width=128,
        layers=2,
        mlp=256,
        heads=4,
        kv_heads=2,
        head_dim=32,
        vocab=2048,
        vl_layers=1,
        vl_heads=4,
        dit_width=96,
        dit_layers=4,
        dit_heads=4,
        hidden=64,
        future_tokens=8,
        positions=64,
    ),
}
"""By name; those that end in ``_tiny`` train in minutes on two cores."""
