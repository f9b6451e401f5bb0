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
from pml.errors import InputError
from pml.modules import SFT
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
        ("always", {"linear_head": False}, "the logits are more than a linear layer of the final hidden states"),
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


class Embedded(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding.from_pretrained(torch.ones(5, 3, dtype=torch.bfloat16))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed_tokens

    def forward(
        self, input_ids: Any = None, inputs_embeds: Any = None, use_cache: bool = False
    ) -> BaseModelOutputWithPast:
        return BaseModelOutputWithPast(
            last_hidden_state=2 * (self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        )


# One rounding step of a bfloat16 is 2^-7 of its value, and eight of them are 6.25 %.
@pytest.mark.parametrize(("factor", "used"), [(1.02, True), (1.1, False)])
def test_rounding_explains_as_much_in_a_whole_decoder_that_is_given_token_ids(
    factor: float, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: lambda **inputs: factor * function(**inputs))
    decoder = CompiledDecoder(Embedded(), tolerance=1e-4)
    for _ in range(2):
        assert bool((decoder(input_ids=torch.tensor([[1, 2, 3]])) > 2.0).all()) is used


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
def test_a_fit_whose_logits_are_capped_says_that_nothing_is_compiled(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pml.frozen_layers.plain_head", lambda backbone: None)
    module = module_on(tiny_backbone_folder, compile="always")
    with caplog.at_level("INFO"):
        make_trainer(tmp_path, max_epochs=1).fit(module, datamodule=Ids(uneven(2)))
    assert "are not compiled: the logits are more than a linear layer of the final hidden states" in caplog.text
    assert module.frozen_layers._compiled is None


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(InputError, match="compile is 'maybe'; expected auto, always, never"):
        SFT(compile="maybe")  # type: ignore[arg-type]


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
