"""LoRA through PEFT: placement, initialisation, saving, and a backbone that stays unchanged."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from pml.adapter import (
    AdapterConfig,
    MlpBlockLora,
    adapter_parameters,
    attach_adapter,
    detach_adapter,
    load_adapter,
    lora_layers,
)
from pml.backbone import Backbone
from pml.errors import InputError
from pml.evaluating import evaluating
from tests.tiny_architectures import tiny_model

IDS = torch.arange(3, 15)[None]
BOTH = {"mlp_block": "mlp_block", "list": ["down_proj", "q_proj"]}


def randomise(model: PeftModel) -> None:
    for parameter in adapter_parameters(model).values():
        parameter.data.normal_()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad(), evaluating(model):
        return model(input_ids=IDS).logits


def test_an_mlp_block_adapter_adds_its_low_rank_path_to_the_output_of_the_mlp(tiny_backbone: Backbone) -> None:
    attach_adapter(tiny_backbone, AdapterConfig(rank=2, block=1))
    layer = tiny_backbone.blocks[1].mlp
    assert isinstance(layer, MlpBlockLora)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    b.data.normal_()
    x = torch.randn(1, 5, 32)
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ a.T @ b.T)


def test_an_mlp_block_adapter_has_2dr_parameters_and_only_they_are_trainable(tiny_backbone: Backbone) -> None:
    model = attach_adapter(tiny_backbone, AdapterConfig(rank=5, block=1))
    assert sum(p.numel() for p in adapter_parameters(model).values()) == 2 * 32 * 5
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == adapter_parameters(model).keys()


def test_an_mlp_that_returns_a_tuple_and_flattens_its_input_can_be_adapted(
    tiny_backbone: Backbone,
) -> None:
    class Routed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.expert = torch.nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, str]:
            return self.expert(x.reshape(-1, 32)), "router logits"

    tiny_backbone.blocks[1].mlp = Routed()
    attach_adapter(tiny_backbone, AdapterConfig(rank=2, block=1))
    layer = tiny_backbone.blocks[1].mlp
    assert isinstance(layer, MlpBlockLora)
    layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(2, 5, 32)
    output, rest = layer(x)
    assert rest == "router logits"
    delta = layer.delta(x)
    assert delta is not None
    torch.testing.assert_close(output, (layer.base_layer.expert(x) + delta).view(10, 32))


def test_a_layer_that_peft_refuses_is_named_and_the_backbone_is_left_unchanged() -> None:
    backbone = Backbone(tiny_model("mamba"), None, "tiny-mamba", "tiny-mamba")  # type: ignore[arg-type]
    names = [name for name, _ in backbone.model.named_modules()]
    with pytest.raises(InputError, match=r"adapter\.placement: .*'out_proj' is incompatible with Mamba"):
        attach_adapter(backbone, AdapterConfig(block=2, placement=["in_proj", "out_proj"]))
    assert [name for name, _ in backbone.model.named_modules()] == names
    attach_adapter(backbone, AdapterConfig(block=2, placement=["in_proj"]))


@pytest.mark.parametrize("placement", BOTH)
def test_a_fresh_adapter_leaves_the_logits_unchanged(placement: str, tiny_backbone: Backbone) -> None:
    before = logits(tiny_backbone.model)
    model = attach_adapter(tiny_backbone, AdapterConfig(placement=BOTH[placement]))
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("init", "bound"), [("published", 1 / math.sqrt(8)), ("peft", 1 / math.sqrt(32))])
def test_matrix_a_is_uniform_within_the_bounds_of_its_initialisation_and_b_is_zero(
    init: str, bound: float, tiny_backbone: Backbone
) -> None:
    attach_adapter(tiny_backbone, AdapterConfig(rank=8, init=init))  # type: ignore[arg-type]
    (layer,) = lora_layers(tiny_backbone.model)
    a = layer.lora_A["default"].weight
    assert 0.95 * bound < a.abs().max() <= bound
    # Standard deviation of a uniform distribution; 256 values estimate it to within a few per cent.
    assert a.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    assert not layer.lora_B["default"].weight.any()


def test_the_initial_adapter_depends_on_the_seed_but_not_on_earlier_random_draws(tiny_backbone: Backbone) -> None:
    weights = []
    for seed in (1, 1, 2):
        torch.rand(7)
        model = attach_adapter(tiny_backbone, AdapterConfig(), seed=seed)
        weights.append(next(iter(lora_layers(model))).lora_A["default"].weight.clone())
        detach_adapter(model)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_alpha_over_rank_scales_the_update(tiny_backbone: Backbone) -> None:
    attach_adapter(tiny_backbone, AdapterConfig(rank=4, alpha=12.0))
    (layer,) = lora_layers(tiny_backbone.model)
    assert isinstance(layer, MlpBlockLora)
    layer.lora_B["default"].weight.data.normal_()
    x = torch.randn(2, 32)
    low_rank = x @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer.delta(x), 3.0 * low_rank)


def test_dropout_of_an_mlp_block_adapter_applies_to_the_output_of_its_low_rank_path(tiny_backbone: Backbone) -> None:
    attach_adapter(tiny_backbone, AdapterConfig(rank=4, dropout=0.5))
    (layer,) = lora_layers(tiny_backbone.model)
    assert isinstance(layer, MlpBlockLora)
    layer.lora_B["default"].weight.data.normal_()
    layer.eval()
    x = torch.randn(1, 32)
    whole = layer.delta(x)
    layer.train()
    dropped = layer.delta(x)
    assert whole is not None
    assert dropped is not None
    zero = dropped == 0
    assert 4 < int(zero.sum()) < 28
    torch.testing.assert_close(dropped[~zero], 2 * whole[~zero])


@pytest.mark.parametrize("placement", BOTH)
def test_attaching_and_detaching_adapters_leaves_the_backbone_bit_for_bit_unchanged(
    placement: str, tiny_backbone: Backbone
) -> None:
    before = {name: value.clone() for name, value in tiny_backbone.model.state_dict().items()}
    reference = logits(tiny_backbone.model)
    for rank in (1, 3, 8):
        model = attach_adapter(tiny_backbone, AdapterConfig(rank=rank, placement=BOTH[placement]))
        randomise(model)
        assert not torch.equal(logits(model), reference)
        detach_adapter(model)
        after = tiny_backbone.model.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert torch.equal(logits(tiny_backbone.model), reference)
        assert not any(p.requires_grad for p in tiny_backbone.model.parameters())


@pytest.mark.parametrize("placement", BOTH)
def test_a_saved_adapter_holds_only_lora_weights_and_gives_the_same_logits_when_loaded(
    placement: str, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    model = attach_adapter(tiny_backbone, AdapterConfig(rank=3, block=1, placement=BOTH[placement]))
    randomise(model)
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert all("lora_" in name for name in saved)
    detach_adapter(model)
    loaded = load_adapter(tiny_backbone, tmp_path)
    assert torch.equal(logits(loaded), expected)


@pytest.mark.parametrize("placement", BOTH)
def test_an_adapter_on_so_many_blocks_that_peft_shortens_their_names_can_be_loaded(
    placement: str, tmp_path: Path, tiny_backbone: Backbone
) -> None:
    backbone = Backbone(tiny_model("llama", num_hidden_layers=21), tiny_backbone.tokenizer, "deep", "hash")
    model = attach_adapter(backbone, AdapterConfig(rank=2, block=list(range(21)), placement=BOTH[placement]))
    randomise(model)
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    detach_adapter(model)
    assert torch.equal(logits(load_adapter(backbone, tmp_path / "adapter")), expected)


def test_an_adapter_placed_on_a_list_of_layers_loads_in_plain_peft(tiny_backbone: Backbone, tmp_path: Path) -> None:
    model = attach_adapter(tiny_backbone, AdapterConfig(rank=3, placement=["down_proj"]))
    randomise(model)
    expected = logits(model)
    model.save_pretrained(str(tmp_path))
    detach_adapter(model)
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_backbone.model, str(tmp_path))), expected)


def test_a_bfloat16_backbone_has_a_float32_adapter(tiny_backbone: Backbone) -> None:
    tiny_backbone.model.to(torch.bfloat16)
    model = attach_adapter(tiny_backbone, AdapterConfig())
    assert {p.dtype for p in adapter_parameters(model).values()} == {torch.float32}
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("block", "indices"), [(0, [0]), (29, [29]), (2 / 3, [20]), (0.5, [15]), (0.999, [29]), ([3, 1, 3], [1, 3])]
)
def test_blocks_are_given_as_an_index_a_list_or_a_fraction_of_the_depth(
    block: int | float | list[int], indices: list[int]
) -> None:
    assert AdapterConfig(block=block).block_indices(30) == indices


@pytest.mark.parametrize("block", [[0.5], True, ["a"]])
def test_a_block_that_is_neither_an_index_nor_a_fraction_is_refused(block: Any) -> None:
    with pytest.raises(InputError, match=r"adapter\.block is .*; expected an index, a list of them, or a fraction"):
        AdapterConfig(block=block).block_indices(30)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank is 0; expected at least 1"),
        ({"rank": 33}, "rank is 33; above the width 32"),
        ({"block": 4}, "block is 4; this backbone has blocks 0 to 3"),
        ({"block": -1}, "block is -1; this backbone has blocks 0 to 3"),
        ({"block": [0, 7]}, "block is 7; this backbone has blocks 0 to 3"),
        ({"block": 1.5}, "block is 1.5; expected a fraction of the depth between 0 and 1"),
        ({"block": []}, "block is an empty list"),
        ({"placement": "down_proj"}, r"placement is 'down_proj'; expected 'mlp_block' or a list .* \[down_proj\]"),
        ({"placement": []}, "placement is an empty list"),
        ({"placement": ["w1"]}, "names 'w1', which block 3 lacks; it has .*down_proj"),
        ({"dropout": 1.0}, r"dropout is 1.0; expected a probability in \[0, 1\)"),
        ({"init": "zeros"}, "init is 'zeros'; expected 'published' or 'peft'"),
    ],
)
def test_invalid_settings_are_refused(arguments: dict, message: str, tiny_backbone: Backbone) -> None:
    with pytest.raises(InputError, match=message):
        attach_adapter(tiny_backbone, AdapterConfig(**arguments))


def test_a_second_adapter_on_top_of_the_first_is_refused(tiny_backbone: Backbone) -> None:
    attach_adapter(tiny_backbone, AdapterConfig())
    with pytest.raises(InputError, match="already carries an adapter"):
        attach_adapter(tiny_backbone, AdapterConfig())


def test_a_folder_without_an_adapter_is_refused(tiny_backbone: Backbone, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no adapter_config.json in it"):
        load_adapter(tiny_backbone, tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    (tmp_path / "adapter_model.bin").write_bytes(b"never unpickled")
    with pytest.raises(InputError, match=r"no adapter_model.safetensors in it; other formats are not read"):
        load_adapter(tiny_backbone, tmp_path)
