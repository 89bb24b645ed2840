"""The published names of the models' tensors, as openpi, LeRobot and NVIDIA store them."""

from train.models.config import GrootConfig, Pi05Config, VisionConfig
from train.models.groot import Groot
from train.models.pi05 import Pi05
from train.published import KeyMap, shapes_of

_Names = dict[str, tuple[str, ...]]
_Shapes = dict[str, tuple[int, ...]]

_HEAD = "vision_model.head.*"
"""SigLIP's pooling head, which neither model uses."""


def key_map(model: Pi05 | Groot) -> KeyMap:
    """Return the published names of a model's tensors."""
    if isinstance(model, Pi05):
        return _pi05(model.config, shapes_of(model))
    return _groot(model.config, shapes_of(model))


def _pi05(config: Pi05Config, parameter_shapes: _Shapes) -> KeyMap:
    top = "paligemma_with_expert"
    gemma, expert = f"{top}.paligemma.model.language_model", f"{top}.gemma_expert.model"
    vision = f"{top}.paligemma.model.vision_tower.vision_model"
    names = _vision("vision", vision, config.vision) | _whole(
        {
            "connector": f"{top}.paligemma.model.multi_modal_projector.linear",
            "norm.dense": f"{expert}.norm.dense",
            "action_in": "action_in_proj",
            "action_out": "action_out_proj",
            "time_in": "time_mlp_in",
            "time_out": "time_mlp_out",
        }
    )
    names["embed.weight"] = (f"{gemma}.embed_tokens.weight",)
    last = config.layers - 1
    for at in range(config.layers):
        theirs = f"{gemma}.layers.{at}"
        if at < last:
            names |= _decoder(f"language.{at}", theirs)
            names[f"language.{at}.norm1.weight"] = (f"{theirs}.input_layernorm.weight",)
            names[f"language.{at}.norm2.weight"] = (f"{theirs}.post_attention_layernorm.weight",)
        theirs = f"{expert}.layers.{at}"
        names |= _decoder(f"expert.{at}", theirs)
        names |= _whole(
            {
                f"expert.{at}.norm1.dense": f"{theirs}.input_layernorm.dense",
                f"expert.{at}.norm2.dense": f"{theirs}.post_attention_layernorm.dense",
            }
        )
    theirs = f"{gemma}.layers.{last}"
    names["last.norm1.weight"] = (f"{theirs}.input_layernorm.weight",)
    names["last.kv.weight"] = tuple(f"{theirs}.self_attn.{part}_proj.weight" for part in "kv")
    unused = ("self_attn.q_proj", "self_attn.o_proj", "mlp.*", "post_attention_layernorm")
    # openpi's own names of the time's perceptron, in checkpoints that began as pi-0.
    older = {f"time_mlp_{way}.{kind}": (f"action_time_mlp_{way}.{kind}",) for way in ("in", "out") for kind in _KINDS}
    return KeyMap(
        parameters=names,
        parameter_shapes=parameter_shapes,
        shapes=_patches(vision, config.vision)
        | _heads([f"{gemma}.layers.{at}" for at in range(last)], config, config.width)
        | _heads([f"{expert}.layers.{at}" for at in range(config.layers)], config, config.expert_width),
        aliases={f"{gemma}.embed_tokens.weight": (f"{top}.paligemma.lm_head.weight",)} | older,
        unused=(
            *(f"{theirs}.{part}.weight" for part in unused),
            f"{gemma}.norm.weight",
            f"{top}.paligemma.lm_head.weight",
            f"{top}.gemma_expert.lm_head.weight",
            f"{top}.gemma_expert.model.embed_tokens.weight",
            f"{top}.paligemma.model.vision_tower.{_HEAD}",
        ),
        layouts={"openpi": "", "lerobot": "model."},
    )


def _groot(config: GrootConfig, parameter_shapes: _Shapes) -> KeyMap:
    eagle, head = "backbone.eagle_model", "action_head"
    vision, language = f"{eagle}.vision_model.vision_model", f"{eagle}.language_model"
    dit = f"{head}.model"
    names = _vision("vision", vision, config.vision) | _whole(
        {
            "connector": f"{eagle}.mlp1.0",
            "vl_norm": f"{head}.vlln",
            "dit.time.fc1": f"{dit}.timestep_encoder.timestep_embedder.linear_1",
            "dit.time.fc2": f"{dit}.timestep_encoder.timestep_embedder.linear_2",
            "dit.modulation": f"{dit}.proj_out_1",
            "dit.out": f"{dit}.proj_out_2",
        }
    )
    names |= {
        "embed.weight": (f"{language}.model.embed_tokens.weight",),
        "norm.weight": (f"{language}.model.norm.weight",),
        "position.weight": (f"{head}.position_embedding.weight",),
        "future.weight": (f"{head}.future_tokens.weight",),
    }
    for at in range(config.layers):
        ours, theirs = f"language.{at}", f"{language}.model.layers.{at}"
        names |= _decoder(ours, theirs)
        names[f"{ours}.q_norm.weight"] = (f"{theirs}.self_attn.q_norm.weight",)
        names[f"{ours}.k_norm.weight"] = (f"{theirs}.self_attn.k_norm.weight",)
        names[f"{ours}.norm1.weight"] = (f"{theirs}.input_layernorm.weight",)
        names[f"{ours}.norm2.weight"] = (f"{theirs}.post_attention_layernorm.weight",)
    for at in range(config.vl_layers):
        ours, theirs = f"vl.{at}", f"{head}.vl_self_attention.transformer_blocks.{at}"
        names |= _block(ours, theirs) | _fused(f"{ours}.qkv", [f"{theirs}.attn1.to_{part}" for part in "qkv"])
        names |= _whole({f"{ours}.norm1": f"{theirs}.norm1", f"{ours}.norm2": f"{theirs}.norm3"})
    for at in range(config.dit_layers):
        ours, theirs = f"dit.blocks.{at}", f"{dit}.transformer_blocks.{at}"
        names |= _block(ours, theirs) | _whole({f"{ours}.modulation": f"{theirs}.norm1.linear"})
        if at % 2:
            names |= _fused(f"{ours}.qkv", [f"{theirs}.attn1.to_{part}" for part in "qkv"])
        else:
            names |= _whole({f"{ours}.q": f"{theirs}.attn1.to_q"})
            names |= _fused(f"{ours}.kv", [f"{theirs}.attn1.to_{part}" for part in "kv"])
    for ours, theirs in {
        **{f"state_encoder.layer{n}": f"state_encoder.layer{n}" for n in (1, 2)},
        **{f"action_encoder.layer{n}": f"action_encoder.W{n}" for n in (1, 2, 3)},
        **{f"action_decoder.layer{n}": f"action_decoder.layer{n}" for n in (1, 2)},
    }.items():
        names |= {f"{ours}.weight": (f"{head}.{theirs}.W",), f"{ours}.bias": (f"{head}.{theirs}.b",)}
    return KeyMap(
        parameters=names,
        parameter_shapes=parameter_shapes,
        shapes=_patches(vision, config.vision)
        | _heads([f"{language}.model.layers.{at}" for at in range(config.layers)], config, config.width),
        aliases={f"{language}.model.embed_tokens.weight": (f"{language}.lm_head.weight",)},
        unused=(f"{language}.lm_head.weight", f"{eagle}.vision_model.{_HEAD}"),
        layouts={"nvidia": "", "lerobot": "_groot_model."},
    )


_KINDS = ("weight", "bias")


def _whole(modules: dict[str, str]) -> _Names:
    """Return the names of modules that have a weight and a bias, by ours."""
    return {f"{ours}.{kind}": (f"{theirs}.{kind}",) for ours, theirs in modules.items() for kind in _KINDS}


def _fused(ours: str, theirs: list[str]) -> _Names:
    return {f"{ours}.{kind}": tuple(f"{each}.{kind}" for each in theirs) for kind in _KINDS}


def _heads(layers: list[str], config: Pi05Config | GrootConfig, width: int) -> _Shapes:
    """Return the shapes of queries, keys and values, of which there are different numbers."""
    heads = {"q": config.heads, "k": config.kv_heads, "v": config.kv_heads}
    return {
        f"{layer}.self_attn.{part}_proj.weight": (count * config.head_dim, width)
        for layer in layers
        for part, count in heads.items()
    }


def _patches(theirs: str, config: VisionConfig) -> _Shapes:
    return {f"{theirs}.embeddings.patch_embedding.weight": (config.width, 3, config.patch, config.patch)}


def _vision(ours: str, theirs: str, config: VisionConfig) -> _Names:
    names = _whole(
        {f"{ours}.patch": f"{theirs}.embeddings.patch_embedding", f"{ours}.norm": f"{theirs}.post_layernorm"}
    )
    names[f"{ours}.position.weight"] = (f"{theirs}.embeddings.position_embedding.weight",)
    for at in range(config.layers):
        mine, its = f"{ours}.layers.{at}", f"{theirs}.encoder.layers.{at}"
        names |= _fused(f"{mine}.qkv", [f"{its}.self_attn.{part}_proj" for part in "qkv"])
        names |= _whole(
            {
                f"{mine}.out": f"{its}.self_attn.out_proj",
                f"{mine}.norm1": f"{its}.layer_norm1",
                f"{mine}.norm2": f"{its}.layer_norm2",
                f"{mine}.fc1": f"{its}.mlp.fc1",
                f"{mine}.fc2": f"{its}.mlp.fc2",
            }
        )
    return names


def _decoder(ours: str, theirs: str) -> _Names:
    """Return the names of the projections of a layer of Gemma or Qwen."""
    return {
        f"{ours}.qkv.weight": tuple(f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv"),
        f"{ours}.out.weight": (f"{theirs}.self_attn.o_proj.weight",),
        f"{ours}.mlp.gate_up.weight": tuple(f"{theirs}.mlp.{part}_proj.weight" for part in ("gate", "up")),
        f"{ours}.mlp.down.weight": (f"{theirs}.mlp.down_proj.weight",),
    }


def _block(ours: str, theirs: str) -> _Names:
    """Return the names that all blocks of the action head have."""
    return _whole(
        {
            f"{ours}.out": f"{theirs}.attn1.to_out.0",
            f"{ours}.ff.fc1": f"{theirs}.ff.net.0.proj",
            f"{ours}.ff.fc2": f"{theirs}.ff.net.2",
        }
    )
