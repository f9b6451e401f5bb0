"""What is chosen on a CPU is as accurate as float32, and measured before it is chosen."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pml.cpu
from pml.cpu import ACCURATE, tune_cpu


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Choose anew, and leave PyTorch's setting as it was."""
    mkldnn: Any = torch.backends.mkldnn
    before = mkldnn.matmul.fp32_precision
    tune_cpu.cache_clear()
    yield
    tune_cpu.cache_clear()
    mkldnn.matmul.fp32_precision = before


def relative_error() -> float:
    a, b = torch.randn(96, 512), torch.randn(512, 384)
    exact = a.double() @ b.double()
    return (((a @ b).double() - exact).norm() / exact.norm()).item()


@pytest.mark.usefixtures("fresh_choice")
def test_products_are_float32_accurate_whatever_was_chosen() -> None:
    choice = tune_cpu()
    assert relative_error() <= ACCURATE
    if choice.onednn:
        assert choice.error <= ACCURATE
        assert choice.speedup > 1


@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize(("speedup", "error"), [(3.0, 2e-3), (0.9, 3e-7)])
def test_products_that_are_inaccurate_or_slow_are_not_chosen(
    speedup: float, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pml.cpu, "_measure_onednn", lambda: (speedup, error))
    assert not tune_cpu().onednn
    mkldnn: Any = torch.backends.mkldnn
    assert mkldnn.matmul.fp32_precision == "none"


@pytest.mark.usefixtures("fresh_choice")
def test_a_fast_and_accurate_product_is_chosen_once_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(pml.cpu, "_measure_onednn", lambda: calls.append(1) or (2.0, 3e-7))
    assert tune_cpu().onednn
    tune_cpu()
    assert calls == [1]


@pytest.mark.usefixtures("fresh_choice")
def test_the_choice_and_its_reason_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pml.cpu, "_measure_onednn", lambda: (1.5, 3.7e-7))
    with caplog.at_level("INFO"):
        tune_cpu()
    assert "float32 products: oneDNN (oneDNN 1.50 times as fast as the default, relative error 3.7e-07)" in caplog.text
