"""Precision of the Trainer and dtype of the frozen weights: what is refused, and what is always float32."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from callbacks import RunRecord
from pml.adapter import adapter_parameters
from pml.errors import InputError
from pml.token_loss import token_losses
from tests.fits import module_on
from tests.tiny_runs import Ids, make_trainer, uneven

DTYPES = ("float32", "bfloat16", "float16")


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_backbone_of_any_dtype_is_split_and_recorded_and_its_adapter_is_float32(
    dtype: str, tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    module, record = module_on(tiny_backbone_folder, dtype=dtype, learning_rate=1e-3), RunRecord(tmp_path / dtype)
    make_trainer(tmp_path, max_epochs=2, callbacks=[record]).fit(module, datamodule=Ids(uneven(3), batch_size=3))
    assert module.frozen_layers.cut == "after_block"
    assert {p.dtype for p in adapter_parameters(module.model).values()} == {torch.float32}
    assert {p.dtype for n, p in module.model.named_parameters() if "lora_" not in n} == {getattr(torch, dtype)}
    assert record.record is not None
    assert (record.record.dtype, record.record.training["precision"]) == (dtype, "32-true")


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_a_trainer_precision_other_than_32_true_is_refused(
    precision: Any, tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    module = module_on(tiny_backbone_folder)
    with pytest.raises(InputError, match=f"trainer.precision is {precision}; .* give --model.dtype bfloat16"):
        make_trainer(tmp_path, precision=precision).fit(module, datamodule=Ids(uneven(3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("default", DTYPES)
@pytest.mark.parametrize("above", [None, 1.0], ids=["by vocabulary", "by rows"])
def test_losses_are_computed_in_float32_whatever_the_default_dtype(
    dtype: str, default: str, above: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    head = nn.Linear(24, 300, bias=False).to(getattr(torch, dtype)).requires_grad_(False)
    hidden = torch.randn(9, 24).to(head.weight.dtype).requires_grad_()
    targets = torch.randint(300, (9,))
    expected = token_losses(hidden, head, targets, above)
    (expected_gradient,) = torch.autograd.grad(expected.losses.sum(), hidden)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, default))
    try:
        scored = token_losses(hidden, head, targets, above)
        (gradient,) = torch.autograd.grad(scored.losses.sum(), hidden)
    finally:
        torch.set_default_dtype(before)
    assert scored.losses.dtype == scored.margin.dtype == torch.float32
    assert torch.equal(scored.losses, expected.losses)
    assert torch.equal(gradient, expected_gradient)
