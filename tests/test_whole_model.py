"""Trying out a whole model: how it computes its logits, and the error if it does not run."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, Gemma2Config, GraniteConfig, PretrainedConfig

import pml.frozen_layers
from pml.adapter import AdapterConfig
from pml.backbone import Backbone
from pml.errors import InputError
from pml.modules import SFT
from pml.whole_model import plain_head
from tests.test_cut_trial import SIZES

DTYPES = [torch.float32, torch.bfloat16]
SMALL = {**SIZES, "initializer_range": 0.002}
NOT_PLAIN = {
    "a cap far above small logits": Gemma2Config(**SMALL, final_logit_softcapping=30.0),
    "a divisor": GraniteConfig(**SMALL, logits_scaling=1.02),
    "a factor": CohereConfig(**{name: value for name, value in SMALL.items() if name != "head_dim"}, logit_scale=1.02),
}


def backbone_of(config: PretrainedConfig, dtype: torch.dtype) -> Backbone:
    torch.manual_seed(7)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
    return Backbone(model, None, "tiny", "tiny")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("config", NOT_PLAIN.values(), ids=NOT_PLAIN)
def test_a_cap_divisor_or_factor_on_the_logits_is_detected_however_small_its_effect(
    config: PretrainedConfig, dtype: torch.dtype
) -> None:
    assert plain_head(backbone_of(config, dtype)) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_head_is_plain_if_nothing_else_changes_the_logits(dtype: torch.dtype) -> None:
    backbone = backbone_of(Gemma2Config(**SMALL, final_logit_softcapping=None), dtype)
    assert plain_head(backbone) is backbone.model.lm_head
    with torch.autocast("cpu", torch.bfloat16):
        assert plain_head(backbone) is backbone.model.lm_head
    assert not backbone.model.lm_head._forward_hooks


def test_the_error_for_logits_that_overflow_names_the_dtype_and_not_causality() -> None:
    backbone = backbone_of(Gemma2Config(**SMALL, final_logit_softcapping=None), torch.float16)
    backbone.model.lm_head.weight.data.fill_(6e4)
    with pytest.raises(InputError) as refusal:
        plain_head(backbone)
    said = "backbone 'tiny' gives logits that are not finite in float16; take bfloat16 or float32"
    assert str(refusal.value) == said


def module_on(backbone: Backbone) -> SFT:
    module = SFT(adapter=AdapterConfig(rank=3, block=2), seed=1)
    module._backbone = backbone
    module.configure_model()
    return module


def test_the_error_for_a_model_that_does_not_run_says_in_one_line_what_is_missing(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(**_: Any) -> None:
        raise ImportError("the package `mamba_ssm` is required:\n run pip install mamba-ssm")

    monkeypatch.setattr(tiny_backbone.model.model, "forward", forward)
    with pytest.raises(InputError) as refusal:
        _ = module_on(tiny_backbone).frozen_layers
    assert str(refusal.value) == (
        "backbone tiny-llama: LlamaForCausalLM does not run here on token ids alone (ImportError: the package "
        "`mamba_ssm` is required: run pip install mamba-ssm); install what it asks for, or use another backbone"
    )


def test_an_attribute_error_inside_the_model_is_not_reported_as_missing_frozen_layers(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise AttributeError("'Odd' object has no attribute 'layers'")

    monkeypatch.setattr(pml.frozen_layers, "FrozenLayers", broken)
    with pytest.raises(
        InputError, match=r"LlamaForCausalLM is not built like a causal decoder .*no attribute 'layers'"
    ):
        _ = module_on(tiny_backbone).frozen_layers
