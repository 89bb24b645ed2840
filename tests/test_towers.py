"""Each tower equals the implementation of transformers with the same weights."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GemmaConfig, GemmaModel, Qwen3Config, Qwen3Model, SiglipVisionConfig, SiglipVisionModel

from train.models.blocks import rotary
from train.models.config import CONFIGS, GrootConfig, Pi05Config, VisionConfig
from train.models.gemma import THETA as GEMMA_THETA
from train.models.gemma import PrefixLayer
from train.models.packed import Segments
from train.models.qwen3 import THETA as QWEN_THETA
from train.models.qwen3 import Qwen3Layer
from train.models.siglip import Siglip

LENGTHS = (7, 1, 12)
VISION = VisionConfig(width=48, layers=2, heads=4, mlp=96, image_size=28, patch=7)
PI05 = Pi05Config(vision=VISION, width=64, layers=3, mlp=96, heads=4, kv_heads=1, head_dim=16, vocab=50)
GROOT = GrootConfig(vision=VISION, width=64, layers=2, mlp=96, heads=4, kv_heads=2, head_dim=16, vocab=50)


def randomised(model: Any) -> Any:
    """Return a model all of whose weights are random; norms too, which begin at what a mistake would not show."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.3)
    return model.eval()


def fill(module: nn.Module, theirs: Mapping[str, torch.Tensor], names: dict[str, tuple[str, ...]]) -> None:
    """Copy weights into a module; several names are the parts of one."""
    weights = dict(module.named_parameters())
    assert weights.keys() == names.keys()
    with torch.no_grad():
        for name, parts in names.items():
            whole = torch.cat([theirs[each] for each in parts])
            weights[name].copy_(whole.reshape(weights[name].shape))


def decoder_names(layer: str) -> dict[str, tuple[str, ...]]:
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    return {
        "norm1.weight": (f"{layer}.input_layernorm.weight",),
        "norm2.weight": (f"{layer}.post_attention_layernorm.weight",),
        "qkv.weight": tuple(f"{attention}.{part}_proj.weight" for part in "qkv"),
        "out.weight": (f"{attention}.o_proj.weight",),
        "mlp.gate_up.weight": (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"),
        "mlp.down.weight": (f"{mlp}.down_proj.weight",),
    }


def packed_rows() -> tuple[Segments, torch.Tensor]:
    """Return segments of some lengths with three rows behind them, and positions."""
    cu = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    positions = torch.cat([*[torch.arange(each) for each in LENGTHS], torch.arange(3)])
    return Segments(cu_q=cu, cu_k=cu, max_q=16, max_k=16), positions


@pytest.fixture(scope="module")
def inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, length, 64, generator=generator) for length in LENGTHS]


def test_siglip_is_that_of_transformers() -> None:
    theirs = randomised(
        SiglipVisionModel(
            SiglipVisionConfig(
                hidden_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=96,
                image_size=28,
                patch_size=7,
                vision_use_head=False,
            )
        )
    )
    state = {name.removeprefix("vision_model."): each for name, each in theirs.state_dict().items()}
    ours = Siglip(VISION)
    whole = {"patch": "embeddings.patch_embedding", "norm": "post_layernorm"}
    names = {f"{mine}.{kind}": (f"{its}.{kind}",) for mine, its in whole.items() for kind in ("weight", "bias")}
    names["position.weight"] = ("embeddings.position_embedding.weight",)
    for at in range(2):
        layer = f"encoder.layers.{at}"
        whole = {
            "norm1": f"{layer}.layer_norm1",
            "norm2": f"{layer}.layer_norm2",
            "out": f"{layer}.self_attn.out_proj",
            "fc1": f"{layer}.mlp.fc1",
            "fc2": f"{layer}.mlp.fc2",
        }
        for kind in ("weight", "bias"):
            names |= {f"layers.{at}.{mine}.{kind}": (f"{its}.{kind}",) for mine, its in whole.items()}
            names[f"layers.{at}.qkv.{kind}"] = tuple(f"{layer}.self_attn.{part}_proj.{kind}" for part in "qkv")
    fill(ours, state, names)
    images = torch.rand(3, 28, 28, 3, generator=torch.Generator().manual_seed(2)) * 2 - 1
    wanted = theirs(pixel_values=images.permute(0, 3, 1, 2)).last_hidden_state
    assert (ours(images, torch.float32) - wanted).abs().max() < 1e-5 * wanted.abs().max()
    pixels = torch.randint(0, 256, (1, 28, 28, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    wanted = theirs(pixel_values=(pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5).last_hidden_state
    assert (ours(pixels, torch.float32) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_gemma_is_that_of_transformers_on_each_segment(inputs: list[torch.Tensor]) -> None:
    theirs = randomised(
        GemmaModel(
            GemmaConfig(
                vocab_size=50,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=1,
                head_dim=16,
                attn_implementation="eager",
            )
        )
    )
    segments, positions = packed_rows()

    class Layout:
        def prefix(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return segments.attend(q, k, v)

    x = torch.cat([*[each[0] for each in inputs], torch.randn(3, 64)])
    for at in range(2):
        layer = PrefixLayer(PI05)
        fill(layer, theirs.state_dict(), decoder_names(f"layers.{at}"))
        x, (keys, _) = layer(x, rotary(positions, 16, GEMMA_THETA), Layout())
        assert keys.shape == (len(positions), 1, 16)
    # Their model norms what comes out; a mask of zeros hides nothing.
    masks = [torch.zeros(1, 1, each.shape[1], each.shape[1]) for each in inputs]
    pairs = zip(inputs, masks, strict=True)
    wanted = torch.cat([theirs(inputs_embeds=each, attention_mask=mask).last_hidden_state[0] for each, mask in pairs])
    ours = x[: len(wanted)]
    ours = ours * torch.rsqrt(ours.square().mean(-1, keepdim=True) + 1e-6) * (1 + theirs.norm.weight)
    assert (ours - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_qwen3_is_that_of_transformers_on_each_segment(inputs: list[torch.Tensor]) -> None:
    theirs = randomised(
        Qwen3Model(
            Qwen3Config(
                vocab_size=50,
                hidden_size=64,
                intermediate_size=96,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=16,
                rope_parameters={"rope_type": "default", "rope_theta": QWEN_THETA},
                attn_implementation="eager",
            )
        )
    )
    segments, positions = packed_rows()
    x = torch.cat([*[each[0] for each in inputs], torch.randn(3, 64)])
    for at in range(2):
        layer = Qwen3Layer(GROOT)
        heads = {f"{part}_norm.weight": (f"layers.{at}.self_attn.{part}_norm.weight",) for part in "qk"}
        fill(layer, theirs.state_dict(), decoder_names(f"layers.{at}") | heads)
        x = layer(x, rotary(positions, 16, QWEN_THETA), segments)
    wanted = torch.cat([theirs(inputs_embeds=each).last_hidden_state[0] for each in inputs])
    ours = x[: len(wanted)]
    ours = ours * torch.rsqrt(ours.square().mean(-1, keepdim=True) + 1e-6) * theirs.norm.weight
    assert (ours - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_published_sizes_are_those_that_transformers_counts() -> None:
    def count(model: nn.Module) -> int:
        return sum(weight.numel() for weight in model.parameters())

    vision = SiglipVisionConfig(
        hidden_size=1152,
        num_hidden_layers=27,
        num_attention_heads=16,
        intermediate_size=4304,
        image_size=224,
        patch_size=14,
        vision_use_head=False,
    )
    qwen = Qwen3Config(
        vocab_size=151_680,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    )
    config = CONFIGS["groot_n15"]
    with torch.device("meta"):
        assert count(Siglip(config.vision)) == count(SiglipVisionModel(vision))
        language = sum(count(Qwen3Layer(config)) for _ in range(12)) + 151_680 * 2048 + 2048
        assert language == count(Qwen3Model(qwen))
