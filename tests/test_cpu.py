"""CPU optimisations are measured before they are chosen, and are as accurate as float32."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import pml.cpu
from pml.cpu import ACCURATE, CpuConfig, attention, tune_cpu


def precision() -> str:
    mkldnn: Any = torch.backends.mkldnn
    return mkldnn.matmul.fp32_precision


def plain_attention(tokens: int, device: str = "cpu") -> bool:
    """Whether fused attention is off for sequences of this length."""
    with attention(tokens, torch.device(device)):
        return not torch.backends.cuda.flash_sdp_enabled()


@pytest.fixture
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Discard earlier choices, and restore PyTorch's settings afterwards."""
    mkldnn: Any = torch.backends.mkldnn
    before = mkldnn.matmul.fp32_precision
    monkeypatch.setattr(pml.cpu, "_plain_attention", False)
    pml.cpu._measured_onednn.cache_clear()
    yield
    pml.cpu._measured_onednn.cache_clear()
    mkldnn.matmul.fp32_precision = before


def relative_error() -> float:
    a, b = torch.randn(96, 512), torch.randn(512, 384)
    exact = a.double() @ b.double()
    return (((a @ b).double() - exact).norm() / exact.norm()).item()


@pytest.mark.usefixtures("fresh_choice")
def test_matrix_products_have_float32_accuracy_whatever_was_chosen() -> None:
    choice = tune_cpu()
    assert relative_error() <= ACCURATE
    if choice.onednn:
        assert choice.error is not None
        assert choice.error <= ACCURATE
        assert choice.speedup is not None
        assert choice.speedup > 1


@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize(("speedup", "error"), [(3.0, 2e-3), (0.9, 3e-7)])
def test_onednn_is_not_chosen_if_it_is_inaccurate_or_slow(
    speedup: float, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pml.cpu, "_measure_onednn", lambda: (speedup, error))
    assert not tune_cpu().onednn
    assert precision() == "none"


@pytest.mark.usefixtures("fresh_choice")
def test_onednn_is_chosen_if_fast_and_accurate_and_is_measured_once_per_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []
    monkeypatch.setattr(pml.cpu, "_measure_onednn", lambda: calls.append(1) or (2.0, 3e-7))
    assert tune_cpu().onednn
    tune_cpu()
    assert calls == [1]


@pytest.mark.usefixtures("fresh_choice")
@pytest.mark.parametrize(
    ("speedup", "error", "before", "now"),
    [(2.0, 3e-7, False, False), (0.5, 3e-7, True, True), (2.0, 2e-3, True, False), (2.0, 3e-7, None, True)],
)
def test_a_resumed_fit_keeps_its_choice_of_product_unless_onednn_is_inaccurate_here(
    speedup: float, error: float, before: bool | None, now: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pml.cpu, "_measure_onednn", lambda: (speedup, error))
    assert tune_cpu(onednn=before).onednn is now


@pytest.mark.usefixtures("fresh_choice")
def test_the_choice_and_its_reason_are_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pml.cpu, "_measure_onednn", lambda: (1.5, 3.7e-7))
    with caplog.at_level("INFO"):
        tune_cpu()
    assert "float32 products: oneDNN (oneDNN 1.50 times as fast as the default, relative error 3.7e-07)" in caplog.text


@pytest.mark.usefixtures("fresh_choice")
def test_each_optimisation_can_be_turned_off_separately(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pml.cpu, "_measure_onednn", lambda: (2.0, 3e-7))
    kept: list[int] = []
    monkeypatch.setattr(pml.cpu, "_keep_buffers", lambda: bool(kept.append(1)) or True)

    choice = tune_cpu(CpuConfig(products=False))
    assert (choice.onednn, choice.speedup, precision()) == (False, None, "none")
    assert choice.keeps_buffers
    assert plain_attention(100)

    choice = tune_cpu(CpuConfig(attention=False))
    assert choice.onednn
    assert precision() == "bf16"
    assert not plain_attention(100)

    kept.clear()
    assert not tune_cpu(CpuConfig(buffers=False)).keeps_buffers
    assert not kept


@pytest.mark.usefixtures("fresh_choice")
def test_plain_attention_is_used_only_for_short_sequences_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pml.cpu, "_measure_onednn", lambda: (1.0, 3e-7))
    assert not plain_attention(100)
    tune_cpu()
    assert plain_attention(pml.cpu.SHORT_TOKENS)
    assert not plain_attention(pml.cpu.SHORT_TOKENS + 1)
    assert not plain_attention(100, "cuda")
