"""Only fits long enough to pay for it are compiled, and compiling does not change their result."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPast

import pml.compiled
from callbacks import StopWhenRecalled
from pml.compiled import ACCELERATOR_BATCHES, CompiledDecoder, FitSize, reason_not_to_compile, warmup_batches
from tests.fits import module_on
from tests.tiny_runs import Ids, make_trainer, uneven

CPU = torch.device("cpu")


class Doubling(torch.nn.Module):
    def forward(self, inputs_embeds: torch.Tensor, use_cache: bool) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(last_hidden_state=2 * inputs_embeds)


@pytest.fixture
def with_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pml.compiled.shutil, "which", lambda name: f"/usr/bin/{name}")


# 100 million weights times 300 tokens: by CPU_WORK, compiling pays off after 1000 batches.
LONG = FitSize(batches=1000, lengths=[300], work=3e10)


@pytest.mark.usefixtures("with_compiler")
def test_a_long_fit_with_equally_long_examples_is_compiled_from_the_start() -> None:
    for fit in (LONG, replace(LONG, batches=math.inf, lengths=[97, 97]), replace(LONG, seconds=700.0)):
        assert reason_not_to_compile("auto", fit, CPU) is None
        assert warmup_batches(fit, CPU) == 0


@pytest.mark.usefixtures("with_compiler")
@pytest.mark.parametrize(
    ("mode", "changes", "reason"),
    [
        ("never", {}, "turned off"),
        ("auto", {"batches": 200}, "200 batches are too few to earn it back, 1000 would do"),
        # As many batches with a millionth of the work would be 84 s of compiling for a fit of 2 s.
        ("auto", {"work": 3e4}, "1000 batches are too few to earn it back, 1000000000 would do"),
        ("auto", {"work": 0.0}, "no block lies above the adapter"),
        ("auto", {"seconds": 60.0}, "a limit of 60 s is too short to earn it back"),
        ("auto", {"may_end_early": True}, "1000 batches are too few to earn it back, 2000 would do"),
        ("auto", {"lengths": [9, 8]}, "the examples are of different lengths, and each shape is compiled anew"),
    ],
)
def test_a_fit_that_is_not_compiled_says_why(mode: Any, changes: dict[str, Any], reason: str) -> None:
    assert reason_not_to_compile(mode, replace(LONG, **changes), CPU) == reason


@pytest.mark.usefixtures("with_compiler")
def test_a_fit_that_may_end_early_is_compiled_after_the_break_even_number_of_batches() -> None:
    fit = replace(LONG, batches=2000, may_end_early=True)
    assert reason_not_to_compile("auto", fit, CPU) is None
    assert warmup_batches(fit, CPU) == 1000


def test_on_an_accelerator_only_the_number_of_batches_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pml.compiled.importlib.util, "find_spec", lambda name: object())
    cuda, tiny = torch.device("cuda"), replace(LONG, batches=ACCELERATOR_BATCHES, work=1.0)
    assert reason_not_to_compile("auto", tiny, cuda) is None
    reason = f"1000 batches are too few to earn it back, {ACCELERATOR_BATCHES} would do"
    assert reason_not_to_compile("auto", LONG, cuda) == reason


def test_without_a_cpp_compiler_nothing_is_compiled_even_in_mode_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pml.compiled.shutil, "which", lambda name: None)
    assert "there is no C++ compiler" in (reason_not_to_compile("always", LONG, CPU) or "")


@pytest.mark.usefixtures("with_compiler")
def test_mode_always_ignores_whether_compiling_pays_off() -> None:
    assert reason_not_to_compile("always", FitSize(1, [9, 8], 1.0, 1.0, True), CPU) is None


@pytest.mark.usefixtures("with_compiler")
def test_a_fit_is_compiled_at_the_step_that_follows_from_its_work(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_on(tiny_backbone_folder)
    module.configure_model()
    data = Ids([(range(4), range(3))] * 1, batch_size=1)
    # One block lies above the adapter, and a batch has 7 tokens: compiling pays off after 3 batches, and a fit that may
    # end early waits for as many first.
    assert module.frozen_layers.weights_above == 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    monkeypatch.setattr(pml.compiled, "CPU_WORK", 3 * 7 * module.frozen_layers.weights_above)
    compiled: list[int] = []
    monkeypatch.setattr(module.frozen_layers, "compile", lambda: compiled.append(module.trainer.global_step))
    for stops in ([], [StopWhenRecalled(margin=0.999)]):
        make_trainer(tmp_path, max_epochs=6, callbacks=stops).fit(module, datamodule=data)
    assert compiled == [0, 3]


def test_a_failing_compiler_is_logged_once_and_the_blocks_run_uncompiled(
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
        "the blocks above the adapter cannot be compiled (RuntimeError: no such target); they run uncompiled"
    ]


def test_compiled_blocks_are_not_used_if_their_states_differ(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: lambda **inputs: 1.01 * function(**inputs))
    decoder = CompiledDecoder(Doubling(), tolerance=1e-4)
    for _ in range(2):
        assert torch.equal(decoder(inputs_embeds=torch.ones(1, 2, 3)), torch.full((1, 2, 3), 2.0))
    assert "the compiled blocks differ by 1.0e-02" in caplog.text


def test_compiled_blocks_are_used_if_their_states_differ_by_rounding_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: lambda **inputs: 1.02 * function(**inputs))
    decoder = CompiledDecoder(Doubling(), tolerance=1e-4)
    for _ in range(2):
        assert (decoder(inputs_embeds=torch.ones(1, 2, 3, dtype=torch.bfloat16)) > 2.0).all()


def test_the_trial_runs_without_dropout_and_leaves_the_random_state_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: lambda **inputs: function(**inputs))
    decoder = CompiledDecoder(torch.nn.ModuleList([Doubling(), torch.nn.Dropout(0.5)]), tolerance=1e-4)
    double, dropout = decoder.decoder
    monkeypatch.setattr(
        decoder, "_plain", lambda **inputs: dropout(double(**inputs, use_cache=False).last_hidden_state)
    )
    ones = torch.ones(1, 2, 300)
    torch.manual_seed(0)
    states = decoder(inputs_embeds=ones)
    assert decoder._call not in (decoder._plain, decoder._first_call)
    assert dropout.training
    torch.manual_seed(0)
    assert torch.equal(states, torch.nn.functional.dropout(2 * ones, 0.5))


@pytest.mark.usefixtures("with_compiler")
def test_a_compiled_fit_reaches_the_weights_of_an_uncompiled_one(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Graphs are traced and differentiated as usual, but not turned into C++, which would take half a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    ends = {}
    for mode in ("never", "always"):
        module = module_on(tiny_backbone_folder, compile=mode)
        # Two shapes: a batch of two examples and one of a single example.
        make_trainer(tmp_path, max_epochs=4).fit(module, datamodule=Ids(uneven(3), batch_size=2))
        ends[mode] = module.state_dict()
        compiled = module.frozen_layers._compiled
        assert (compiled is not None) is (mode == "always")
        assert compiled is None or compiled._call not in (compiled._plain, compiled._first_call)
    for name, weight in ends["never"].items():
        # AdamW divides by the size of the gradient, so rounding in a tiny gradient can move a weight by a whole step.
        torch.testing.assert_close(ends["always"][name], weight, rtol=1e-3, atol=1e-4)
