"""Adapters from elsewhere: loaded if their weights match their configuration, refused in one line if not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from pml.adapter import AdapterConfig, attach_adapter, detach_adapter, load_adapter, lora_layers
from pml.backbone import Backbone
from pml.errors import InputError
from tests.tiny_architectures import tiny_model


@pytest.fixture
def saved(tiny_backbone: Backbone, tmp_path: Path) -> Path:
    """An adapter of rank 3 and alpha 6 on `down_proj` of block 1, as in a run's folder."""
    model = attach_adapter(tiny_backbone, AdapterConfig(rank=3, block=1, placement=["down_proj"], alpha=6))
    for layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight)
    model.save_pretrained(str(tmp_path / "adapter"))
    detach_adapter(model)
    return tmp_path / "adapter"


def edited(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reweighted(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / "adapter_model.safetensors")
    change(weights)
    save_file(weights, folder / "adapter_model.safetensors")


def test_an_adapter_made_with_peft_loads_and_gives_the_same_logits(tiny_backbone: Backbone, tmp_path: Path) -> None:
    ids = torch.tensor([[5, 9, 60, 3]])
    config = LoraConfig(r=4, target_modules="all-linear", use_dora=True, use_rslora=True, task_type="CAUSAL_LM")
    model: Any = get_peft_model(tiny_backbone.model, config)
    for layer in lora_layers(model):
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    expected = model.eval()(ids).logits
    model.save_pretrained(str(tmp_path))
    detach_adapter(model)
    loaded = load_adapter(tiny_backbone, tmp_path)
    torch.testing.assert_close(loaded(ids).logits, expected)
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_head_or_embeddings_loads_only_if_the_base_weights_saved_with_it_match(
    target: str, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    ids = torch.tensor([[5, 9, 60, 3]])
    model: Any = get_peft_model(tiny_backbone.model, LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    expected = model.eval()(ids).logits
    model.save_pretrained(str(tmp_path), save_embedding_layers=True)  # as PEFT decides by itself for these layers
    detach_adapter(model)
    loaded = load_adapter(tiny_backbone, tmp_path)
    torch.testing.assert_close(loaded(ids).logits, expected)
    detach_adapter(loaded)

    def change(weights: dict[str, torch.Tensor]) -> None:
        (name,) = (name for name in weights if "base_layer" in name)
        weights[name] += 0.1

    reweighted(tmp_path, change)
    with pytest.raises(InputError, match=f"the adapter was trained on another (model.)?{target} than this backbone's"):
        load_adapter(tiny_backbone, tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set, so it holds whole layers beside the adapter"),
        (
            {"init_lora_weights": "pissa_niter_4"},
            "init_lora_weights is pissa_niter_4, which changes the base's weights",
        ),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config is set, so it holds an update that needs the base's weights"),
        ({"bias": "all"}, "bias is 'all'; expected 'none'"),
        ({"peft_type": None}, "the adapter is None; expected LORA"),
        ({"r": 5}, r"lora_A.weight has shape \(3, 64\), and its configuration on this backbone asks for \(5, 64\)"),
        (
            {"target_modules": ["model.layers.1.mlp.down_proj", "model.layers.1.mlp.up_proj"]},
            "2 of the 4 weights that its configuration asks for are missing, such as .*up_proj.lora_A.weight",
        ),
        ({"target_modules": ["nowhere"]}, "the adapter does not fit tiny-llama: "),
        ({"target_modules": "(("}, "the adapter does not fit tiny-llama: missing "),
        ({"target_modules": 7}, "target_modules is 7 in adapter_config.json; expected what PEFT writes"),
        ({"rank_pattern": [1]}, r"rank_pattern is \[1\] in adapter_config.json"),
        ({"r": "four"}, "r is 'four' in adapter_config.json"),
        ({"r": -1}, "r is -1 in adapter_config.json"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan in adapter_config.json"),
        ({"alpha_pattern": {"down_proj": float("nan")}}, "alpha_pattern is {'down_proj': nan} in adapter_config.json"),
    ],
)
def test_a_configuration_that_is_not_plain_lora_or_does_not_match_its_weights_is_refused(
    saved: Path, tiny_backbone: Backbone, changes: dict[str, Any], said: str
) -> None:
    edited(saved, **changes)
    with pytest.raises(InputError, match=said) as caught:
        load_adapter(tiny_backbone, saved)
    assert "\n" not in str(caught.value)
    assert next(lora_layers(tiny_backbone.model), None) is None  # the backbone is left without an adapter


def _drop(weights: dict[str, torch.Tensor]) -> None:
    del weights[next(name for name in weights if "lora_B" in name)]


def _add(weights: dict[str, torch.Tensor]) -> None:
    weights["base_model.model.lm_head.weight"] = torch.zeros(2, 2)


def _break(weights: dict[str, torch.Tensor]) -> None:
    next(iter(weights.values()))[0, 0] = float("nan")


def _round(weights: dict[str, torch.Tensor]) -> None:
    weights.update({name: tensor.to(torch.int32) for name, tensor in weights.items()})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_drop, "1 of the 2 weights that its configuration asks for are missing, such as .*lora_B.weight"),
        (_add, "1 weights have no place in what its configuration asks for, such as base_model.model.lm_head.weight"),
        (_break, "lora_A.weight has values that are not finite numbers"),
        (_round, r"lora_A.weight is torch.int32; expected a floating-point type"),
    ],
)
def test_missing_surplus_non_finite_and_integer_weights_are_refused(
    saved: Path, tiny_backbone: Backbone, change: Any, said: str
) -> None:
    reweighted(saved, change)
    with pytest.raises(InputError, match=said):
        load_adapter(tiny_backbone, saved)
    assert next(lora_layers(tiny_backbone.model), None) is None


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"rank": 4}, "the adapter has rank 3, but the record of its run 4; one of them was replaced"),
        ({"block": [2]}, r"the adapter has blocks \[1\], but the record of its run \[2\]"),
        ({"method_settings": {"alpha": None}}, "the adapter has alpha 6, but the record of its run 3"),
        ({}, None),
    ],
)
def test_an_adapter_that_contradicts_the_record_of_its_run_is_refused(
    saved: Path, tiny_backbone: Backbone, record: dict[str, Any], said: str | None
) -> None:
    fields = {"rank": 3, "block": [1], "method_settings": {"alpha": 6}, **record}
    (saved.parent / "record.json").write_text(json.dumps(fields))
    if said is None:
        load_adapter(tiny_backbone, saved)
        return
    with pytest.raises(InputError, match=said):
        load_adapter(tiny_backbone, saved)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("architecture", ["bert", "xlm", "xlnet", "gpt2"])
def test_the_block_in_the_record_is_checked_whatever_the_model_calls_its_blocks(
    architecture: str, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    backbone = Backbone(tiny_model(architecture), tiny_backbone.tokenizer, architecture, "hash")
    leaf = next(name for name, m in backbone.blocks[2].named_modules() if isinstance(m, (torch.nn.Linear, Conv1D)))
    model = attach_adapter(backbone, AdapterConfig(rank=2, block=2, placement=[leaf]))
    model.save_pretrained(str(tmp_path / "adapter"))
    detach_adapter(model)
    for block, said in ((2, None), (1, r"the adapter has blocks \[2\], but the record of its run \[1\]")):
        record = {"rank": 2, "block": [block], "method_settings": {}}
        (tmp_path / "record.json").write_text(json.dumps(record))
        if said is None:
            detach_adapter(load_adapter(backbone, tmp_path / "adapter"))
            continue
        with pytest.raises(InputError, match=said):
            load_adapter(backbone, tmp_path / "adapter")


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
        PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    ],
    ids=["IA3", "PREFIX_TUNING"],
)
def test_an_adapter_that_is_not_lora_is_refused(
    config: Any, tiny_backbone: Backbone, make_tiny_backbone: Any, tmp_path: Path
) -> None:
    other: Any = get_peft_model(make_tiny_backbone("llama").model, config)
    other.save_pretrained(str(tmp_path))
    with pytest.raises(InputError, match=f"the adapter is {config.peft_type.value}; expected LORA"):
        load_adapter(tiny_backbone, tmp_path)


def test_damaged_files_are_refused(saved: Path, tiny_backbone: Backbone) -> None:
    (saved / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="the adapter cannot be read"):
        load_adapter(tiny_backbone, saved)
    (saved / "adapter_config.json").write_text("[]")
    with pytest.raises(InputError, match=r"adapter_config\.json is not the configuration of a PEFT adapter"):
        load_adapter(tiny_backbone, saved)
