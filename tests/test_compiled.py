"""Compiling pays only for long fits, and never changes a result."""

from functools import partial
from pathlib import Path

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

import pml.compiled
from pml.compiled import LONG_STEPS, CompiledDecoder, reason_not_to_compile
from tests.fits import module_on
from tests.tiny_runs import Ids, make_trainer, uneven

CPU = torch.device("cpu")


class Doubling(torch.nn.Module):
    def forward(self, inputs_embeds: torch.Tensor, use_cache: bool) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=2 * inputs_embeds)


@pytest.fixture
def with_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pml.compiled.shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.mark.usefixtures("with_compiler")
def test_long_fits_on_one_shape_are_compiled_by_themselves() -> None:
    assert reason_not_to_compile("auto", LONG_STEPS, [97], CPU) is None
    assert reason_not_to_compile("auto", float("inf"), [97, 97], CPU) is None


@pytest.mark.usefixtures("with_compiler")
@pytest.mark.parametrize(
    ("mode", "batches", "lengths", "reason"),
    [
        ("never", 1e6, [9], "turned off"),
        ("auto", 200, [9], "200 batches are too few to earn it back, 3000 would do"),
        ("auto", 1e6, [9, 8], "the examples are of different lengths, and each shape is compiled anew"),
    ],
)
def test_other_fits_are_not_and_say_why(mode: str, batches: float, lengths: list[int], reason: str) -> None:
    assert reason_not_to_compile(mode, batches, lengths, CPU) == reason


def test_without_a_compiler_nothing_is_compiled_even_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pml.compiled.shutil, "which", lambda name: None)
    assert "there is no C++ compiler" in (reason_not_to_compile("always", 1e6, [9], CPU) or "")


@pytest.mark.usefixtures("with_compiler")
def test_always_asks_no_more_than_whether_it_can_be_done() -> None:
    assert reason_not_to_compile("always", 1, [9, 8], CPU) is None


def test_a_compiler_that_fails_is_said_once_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(function: object) -> object:
        raise RuntimeError("no such target\nand a long trace")

    monkeypatch.setattr(torch, "compile", broken)
    decoder = CompiledDecoder(Doubling(), tolerance=1e-4)
    for _ in range(2):
        assert torch.equal(decoder(inputs_embeds=torch.ones(1, 2, 3)), torch.full((1, 2, 3), 2.0))
    warnings = [record.getMessage() for record in caplog.records]
    assert warnings == [
        "the blocks above the adapter cannot be compiled (RuntimeError: no such target); they run as they are"
    ]


def test_compiled_states_that_differ_are_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: lambda **inputs: 1.01 * function(**inputs))
    decoder = CompiledDecoder(Doubling(), tolerance=1e-4)
    for _ in range(2):
        assert torch.equal(decoder(inputs_embeds=torch.ones(1, 2, 3)), torch.full((1, 2, 3), 2.0))
    assert "the compiled blocks differ by 1.0e-02" in caplog.text


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_states_that_differ_by_rounding_are_used_in_16_bits_and_inside_autocast(
    autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: lambda **inputs: 1.02 * function(**inputs))
    decoder = CompiledDecoder(Doubling(), tolerance=1e-4)
    states = torch.ones(1, 2, 3, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(2):
            assert (decoder(inputs_embeds=states) > 2.0).all()


@pytest.mark.usefixtures("with_compiler")
def test_a_compiled_fit_ends_where_a_plain_one_does(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The graphs are traced and differentiated as always, but run without the C++ that takes half a minute to make.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    ends = {}
    for mode in ("never", "always"):
        module = module_on(tiny_backbone_folder, compile=mode)
        # Two shapes: batches of two examples and of one.
        make_trainer(tmp_path, max_epochs=4).fit(module, datamodule=Ids(uneven(3), batch_size=2))
        ends[mode] = module.state_dict()
        compiled = module.frozen_layers._compiled
        assert (compiled is not None) is (mode == "always")
        assert compiled is None or compiled._call not in (compiled._plain, compiled._first_call)
    for name, weight in ends["never"].items():
        # AdamW divides by the gradient's size, which makes rounding in tiny gradients as large as a step is wide.
        torch.testing.assert_close(ends["always"][name], weight, rtol=1e-3, atol=1e-4)
