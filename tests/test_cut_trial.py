"""A cut that omits something is rejected in every dtype, however little that changes; a sound one is kept."""

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GraniteConfig, LlamaConfig, PretrainedConfig

import pml.cut_trial
import pml.frozen_layers
from pml.adapter import AdapterConfig, attach_adapter
from pml.backbone import Backbone
from pml.corpus import Example, collate
from pml.cut_trial import _float32_fits, find_mismatch, in_float32, narrow_windows
from pml.frozen_layers import FrozenLayers
from pml.modules import SFT

IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": 160}
SIZES: dict[str, Any] = {
    **IDS,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
WAYS = ["float32", "bfloat16", "bfloat16 for want of room"]


def backbone_of(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> Backbone:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
    return Backbone(model, None, "tiny", "tiny")  # type: ignore[arg-type]


def prefix_on(backbone: Backbone, block: int = 2) -> FrozenLayers:
    return FrozenLayers(backbone, attach_adapter(backbone, AdapterConfig(rank=3, block=block)))


@pytest.fixture(params=WAYS)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """The dtype of a backbone, with and without room for a float32 copy."""
    if request.param.endswith("room"):
        monkeypatch.setattr(pml.cut_trial, "_free_memory", lambda device: 0)
    return torch.float32 if request.param == "float32" else torch.bfloat16


def test_a_position_embedding_added_twice_is_detected_however_small_it_is(dtype: torch.dtype) -> None:
    backbone = backbone_of(GPT2Config(**IDS, n_embd=64, n_layer=8, n_head=4, n_positions=64), dtype)
    with torch.no_grad():
        backbone.model.transformer.wpe.weight.mul_(0.1)
    assert prefix_on(backbone, block=5).cut == "whole"


@pytest.mark.parametrize("multiplier", [0.22, 0.8])
def test_a_residual_multiplier_that_scales_the_adapter_update_is_detected(
    multiplier: float, dtype: torch.dtype
) -> None:
    prefix = prefix_on(backbone_of(GraniteConfig(**SIZES, residual_multiplier=multiplier), dtype))
    assert prefix.cut == "before_block"


def test_an_embedding_multiplier_that_also_scales_the_kept_states_is_detected(dtype: torch.dtype) -> None:
    assert prefix_on(backbone_of(GraniteConfig(**SIZES, embedding_multiplier=1.05), dtype)).cut == "whole"


def test_a_norm_on_the_mlp_output_is_detected(
    dtype: torch.dtype, make_tiny_backbone: Callable[[str], Backbone]
) -> None:
    backbone = make_tiny_backbone("gemma3")
    backbone.model.to(dtype)
    assert prefix_on(backbone).cut == "before_block"


def test_a_mask_meant_for_another_block_is_detected_despite_a_window_longer_than_the_trial(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma2Config(
        **SIZES, sliding_window=4096, layer_types=kinds, final_logit_softcapping=None, query_pre_attn_scalar=8
    )
    assert prefix_on(backbone_of(config, dtype)).cut == "before_block"
    with_blocks = pml.frozen_layers.with_blocks

    def forgetful(backbone: Backbone, blocks: slice) -> nn.Module:
        decoder: Any = with_blocks(backbone, blocks)
        decoder.config.layer_types = kinds[: len(decoder.layers)]
        return decoder

    monkeypatch.setattr(pml.frozen_layers, "with_blocks", forgetful)
    assert prefix_on(backbone_of(config, dtype)).cut == "whole"


@pytest.mark.parametrize("block", [0, 5, 20])
def test_a_sound_cut_of_a_deep_model_is_kept_despite_rounding(block: int, dtype: torch.dtype) -> None:
    backbone = backbone_of(LlamaConfig(**SIZES | {"num_hidden_layers": 24}), dtype)
    assert prefix_on(backbone, block).cut == "after_block"


def test_a_sound_cut_is_kept_inside_autocast(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert prefix_on(backbone_of(LlamaConfig(**SIZES), dtype)).cut == "after_block"


def test_the_initial_loss_of_a_gpt2_model_equals_that_of_plain_transformers(dtype: torch.dtype) -> None:
    backbone = backbone_of(GPT2Config(**IDS, n_embd=64, n_layer=8, n_head=4, n_positions=64), dtype)
    example = Example(0, tuple(range(5, 12)), tuple(range(40, 52)))
    batch = collate([example])
    with torch.no_grad():
        logits = backbone.model(input_ids=batch["input_ids"]).logits.float()
    expected = nn.functional.cross_entropy(logits[0, 6:-1], batch["labels"][0, 7:])
    module = SFT(adapter=AdapterConfig(rank=3, block=5), seed=1)
    module._backbone = backbone
    module.configure_model()
    scores = module.score(batch)
    ours = scores.losses[scores.mask].mean()
    # In bfloat16, products of other shapes are rounded differently.
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4 if dtype == torch.float32 else 2e-3)


def test_a_model_that_fails_in_its_own_dtype_is_refused_though_it_runs_in_float32(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backbone = backbone_of(LlamaConfig(**SIZES), torch.bfloat16)
    monkeypatch.setattr(backbone.model.model.layers[3].mlp, "forward", in_float32_only)
    with caplog.at_level(logging.WARNING), pytest.raises(Exception, match="does not run here"):
        prefix_on(backbone)


def in_float32_only(states: torch.Tensor) -> torch.Tensor:
    if states.dtype != torch.float32:
        raise RuntimeError("not implemented for 'BFloat16'")
    return states


class Wrong:
    """A sound cut, one method of which gives wrong states."""

    def __init__(self, cut: FrozenLayers, **answers: Callable[..., torch.Tensor]) -> None:
        self.whole, self.below, self.at_cut, self.above = cut.whole, cut.below, cut.at_cut, cut.above
        vars(self).update(answers)


def test_a_padded_batch_that_differs_from_its_single_rows_is_detected(dtype: torch.dtype) -> None:
    cut = prefix_on(backbone_of(LlamaConfig(**SIZES), dtype))
    assert find_mismatch(cut, cut.model) is None
    # Each row by itself stays right.
    wrong = Wrong(cut, above=lambda kept, steps: cut.above(kept, steps) * (1.0 if len(kept) == 1 else 1.25))
    assert "hidden states of a padded batch differ by " in (find_mismatch(wrong, cut.model) or "")


def test_nan_states_are_detected(dtype: torch.dtype) -> None:
    cut = prefix_on(backbone_of(LlamaConfig(**SIZES), dtype))

    def below(input_ids: torch.Tensor, adapted: bool = False) -> tuple[torch.Tensor, ...]:
        return tuple(states * (math.nan if adapted else 1.0) for states in cut.below(input_ids, adapted))

    assert "the adapter's update reaches the cut changed" in (find_mismatch(Wrong(cut, below=below), cut.model) or "")
    # With bfloat16 weights and room for a float32 copy, an earlier check finds that the states are not finite.
    lone = Wrong(cut, above=lambda kept, steps: cut.above(kept, steps) * (math.nan if len(kept) == 1 else 1.0))
    found = find_mismatch(lone, cut.model) or ""
    assert "differ by nan" in found if dtype == torch.float32 else "nan" in found or "not finite" in found


def test_states_that_overflow_in_the_dtype_of_the_weights_but_not_in_float32_are_detected() -> None:
    cut = prefix_on(backbone_of(LlamaConfig(**SIZES), torch.bfloat16))

    def above(kept: Any, steps: int) -> torch.Tensor:
        states = cut.above(kept, steps)
        return states if states.dtype == torch.float32 else states * math.inf

    assert find_mismatch(Wrong(cut, above=above), cut.model) == "hidden states are not finite in torch.bfloat16"


@pytest.mark.parametrize(("room", "fits"), [(1.01, True), (0.99, False)])
def test_float32_weights_fit_if_they_take_at_most_four_fifths_of_the_free_memory(
    room: float, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = backbone_of(LlamaConfig(**SIZES), torch.bfloat16).model
    # Four bytes per weight; the buffers of the rotary embedding are float32 already.
    needed = 4 * sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(pml.cut_trial, "_free_memory", lambda device: room * needed / 0.8)
    assert _float32_fits(model) is fits


def test_weights_cast_to_float32_return_to_their_original_memory_and_values() -> None:
    backbone = backbone_of(LlamaConfig(**SIZES, tie_word_embeddings=True), torch.bfloat16)
    model: Any = backbone.model
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    with in_float32(model):
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.weight
    for name, tensor in model.state_dict().items():
        pointer, values = before[name]
        assert tensor.dtype == torch.bfloat16
        assert tensor.data_ptr() == pointer
        assert torch.equal(tensor, values)


def test_the_trial_restores_the_adapter_and_the_configuration() -> None:
    config = Gemma2Config(**SIZES, sliding_window=4096, final_logit_softcapping=None)
    backbone = backbone_of(config, torch.bfloat16)
    model = attach_adapter(backbone, AdapterConfig(rank=3, block=2))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    prefix = FrozenLayers(backbone, model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert backbone.model.config.sliding_window == prefix._suffix.config.sliding_window == 4096  # type: ignore[union-attr]


def test_sliding_windows_are_narrowed_temporarily_and_none_is_added() -> None:
    config = Gemma2Config(**SIZES, sliding_window=4096)
    with narrow_windows(config):
        assert config.sliding_window == 4
    assert config.sliding_window == 4096
    with narrow_windows(plain := LlamaConfig(**SIZES)):
        assert not hasattr(plain, "sliding_window")
