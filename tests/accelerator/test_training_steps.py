"""A training step keeps its tensors on the accelerator and never makes the host wait for it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import pml.convergence
import pml.metrics
from callbacks import StopWhenRecalled, TokenThresholds
from pml.adapter import AdapterConfig
from pml.backbone import Backbone
from pml.convergence import LossHistory
from pml.devices import widest_float
from pml.modules import SFT, MemFT, Memorization
from pml.weighting import ExpectedRecall, FallingThreshold, OnlyThreshold, SlidingWindow, WholeTargets
from tests.accelerator.stand_in import Waits, fit, pretend_that_adamw_is_one_kernel
from tests.conftest import tiny_config
from tests.tiny_runs import Ids, uneven

METHODS: dict[str, Callable[..., Memorization]] = {
    "SFT": SFT,
    "OnlyThreshold": lambda **k: MemFT(weighting=OnlyThreshold(position_decay=2.0), **k),
    "OnlyThreshold, uniform": lambda **k: MemFT(weighting=OnlyThreshold(when_memorized="uniform"), **k),
    "FallingThreshold": lambda **k: MemFT(weighting=FallingThreshold(), **k),
    "WholeTargets": lambda **k: MemFT(weighting=WholeTargets(), **k),
    "ExpectedRecall": lambda **k: MemFT(weighting=ExpectedRecall(), **k),
    "SlidingWindow": lambda **k: MemFT(weighting=SlidingWindow(), **k),
}


def module_on(backbone: Backbone, method: str = "SFT", **settings: Any) -> Memorization:
    module = METHODS[method](adapter=AdapterConfig(rank=2, block=1, dropout=0.1), seed=1, **settings)
    module._backbone = backbone
    return module


@pytest.fixture(autouse=True)
def _one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_that_adamw_is_one_kernel(monkeypatch)


@pytest.mark.parametrize("method", METHODS)
def test_a_training_step_never_waits_for_the_device(method: str, tiny_backbone: Backbone, tmp_path: Path) -> None:
    seen = fit(module_on(tiny_backbone, method), Ids(uneven(4), batch_size=4), tmp_path)
    assert seen.waits == {}
    # With `deterministic: true`, PyTorch refuses a floating-point cumsum on a GPU.
    assert seen.float_running_sums == 0


@pytest.mark.parametrize("method", ["SFT", "WholeTargets"])
def test_callbacks_wait_for_the_device_once_per_epoch_to_decide_whether_to_stop(
    method: str, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    callbacks = [TokenThresholds(looks=2), StopWhenRecalled()]
    seen = fit(module_on(tiny_backbone, method), Ids(uneven(4), batch_size=4), tmp_path, callbacks=callbacks)
    assert len(seen.waits) == 1
    ((where, times),) = seen.waits.items()
    assert where.startswith("copy to the host at stop_when_recalled.py")
    assert times == 3


def test_the_operations_of_a_step_do_not_depend_on_the_number_of_target_tokens(
    make_tiny_backbone: Callable[[str], Backbone], tmp_path: Path
) -> None:
    operations = []
    for tokens in (8, 600):
        target = [i % 250 for i in range(tokens)]
        data = Ids([(target[:4], target), (target[:3], target[:5])], batch_size=2)
        seen = fit(module_on(make_tiny_backbone("llama")), data, tmp_path)
        operations.append(seen.operations)
    assert operations[0] == operations[1]


def test_another_block_adds_only_the_operations_of_its_forward_and_backward_pass(
    tiny_tokenizer: Any, tmp_path: Path
) -> None:
    operations = {}
    for blocks in (4, 5):
        config = tiny_config("llama", tiny_tokenizer)
        config.num_hidden_layers = blocks
        model = AutoModelForCausalLM.from_config(config)
        backbone = Backbone(model, tiny_tokenizer, "tiny", "hash")
        seen = fit(module_on(backbone), Ids(uneven(4), batch_size=4), tmp_path, steps=1)
        operations[blocks] = seen.operations.total()
    assert operations[5] - operations[4] == operations_of_a_block(model)


def operations_of_a_block(model: Any) -> int:
    block, width = model.model.layers[2].to("meta"), model.config.hidden_size
    states = torch.randn(4, 11, width, device="meta", requires_grad=True)
    position = torch.arange(11, device="meta")[None]
    angles = model.model.rotary_emb.to("meta")(states, position)
    counts = Waits()
    gradient = torch.empty_like(states)
    with counts:
        out = block(states, attention_mask=None, position_ids=position, position_embeddings=angles, use_cache=False)
        torch.autograd.grad(out, states, gradient)
    return counts.operations.total()


def test_float64_is_not_used_on_a_device_that_lacks_it(
    tiny_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert widest_float(torch.device("mps")) == torch.float32
    for module in (pml.metrics, pml.convergence):
        monkeypatch.setattr(module, "widest_float", lambda device: torch.float32)
    callbacks = [TokenThresholds(looks=2), StopWhenRecalled()]
    seen = fit(module_on(tiny_backbone), Ids(uneven(4), batch_size=4), tmp_path, callbacks=callbacks)
    assert torch.float64 not in seen.dtypes
    assert torch.float32 in seen.dtypes
    history = LossHistory()
    history.add(torch.ones(()), torch.ones((), dtype=torch.long))
    assert history.sums().dtype == torch.float32
