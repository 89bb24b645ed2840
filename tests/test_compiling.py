"""Layers that are alike share one graph, whatever is packed."""

from dataclasses import replace

import pytest
import torch
from goldens import FAMILIES, config_of, golden_model, golden_samples, make, pack_inputs
from torch._dynamo.utils import counters

from train.models.compiling import compile_layers, layers_of
from train.packing import Budgets


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo looks at it itself
@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_for_each_kind_of_layer_serves_every_packing(family: str) -> None:
    config, samples = config_of(family), golden_samples(family)
    if family == "groot_n15":
        config = replace(config, dropout=0.2)
    budgets = Budgets(tokens=80, images=8, samples=4)
    packs = [pack_inputs(config, [samples[at] for at in part], budgets) for part in ([0, 1, 2], [2, 1], [1], [])]
    eager, model = make(config), make(config)
    eager.load_state_dict(golden_model(family).state_dict())
    model.load_state_dict(eager.state_dict())
    torch.compiler.reset()
    counters.clear()
    compile_layers(model, backend="aot_eager")
    for inputs in packs:
        found, wanted = model(inputs), eager(inputs)
        assert torch.allclose(found.sample_B, wanted.sample_B, rtol=1e-5)
        for each, loss in ((model, found), (eager, wanted)):
            each.zero_grad()
            loss.total.backward()
        for (name, one), other in zip(model.named_parameters(), eager.parameters(), strict=True):
            assert torch.allclose(one.grad, other.grad, rtol=1e-4, atol=1e-5), name
    # Of pi-0.5: images, text, its last layer, actions. Of GR00T: images, text, self-attention, two kinds of DiT blocks.
    assert counters["stats"]["unique_graphs"] == {"pi05": 4, "groot_n15": 5}[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_hold_nearly_all_weights(family: str) -> None:
    model = make(config_of(family))
    within = {id(weight) for layer in layers_of(model) for weight in layer.parameters()}
    outside = {name.split(".")[0] for name, weight in model.named_parameters() if id(weight) not in within}
    assert outside <= {
        *("vision", "connector", "embed", "norm", "vl_norm", "position", "future", "dit"),
        *("action_in", "action_out", "time_in", "time_out", "state_encoder", "action_encoder", "action_decoder"),
    }
    assert len(list(layers_of(model))) == {"pi05": 2 + 2 + 1 + 3, "groot_n15": 2 + 3 + 2 + 4}[family]
