"""When passes are captured and replayed; `tests/accelerator/test_gpu.py` tests what only a GPU can show."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pml.cuda_graphs
import pml.frozen_layers
from pml.adapter import AdapterConfig, adapter_parameters
from pml.cuda_graphs import Decoder, ReplayedDecoder
from pml.guard import GuardConfig
from tests.fits import module_on
from tests.tiny_runs import Ids, make_trainer, uneven

SCALE = torch.nn.Parameter(torch.tensor([2.0, 3.0]))


def scaled(states: Tensor, parameters: Mapping[str, Tensor]) -> Tensor:
    return states * parameters.get("scale", SCALE)


class Recording:
    """Stands in for graphs: runs the decoder, into memory that each call overwrites as graphs do."""

    made: list["Recording"]

    def __init__(self, decoder: Decoder, states: Tensor, parameters: Mapping[str, Tensor]) -> None:
        self._decoder, self._parameters = decoder, parameters
        self._states = states.detach().clone().requires_grad_(states.requires_grad)
        self._out = torch.empty_like(states)
        self.replays = 0
        Recording.made.append(self)

    def forward(self, states: Tensor) -> Tensor:
        self.replays += 1
        with torch.no_grad():
            self._states.copy_(states)
            self._out.copy_(self._decoder(self._states, self._parameters))
        return self._out.detach()

    def backward(self, gradient: Tensor) -> tuple[Tensor | None, ...]:
        with torch.enable_grad():
            wanted = [*([self._states] if self._states.requires_grad else []), *self._parameters.values()]
            gradients = torch.autograd.grad(self._decoder(self._states, self._parameters), wanted, gradient)
        return gradients if self._states.requires_grad else (None, *gradients)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    Recording.made = []
    SCALE.grad = None


def decoder() -> ReplayedDecoder:
    return ReplayedDecoder(scaled, {"scale": SCALE}, Recording)


def states(batch: int = 1, value: float = 1.0, needs_grad: bool = True) -> Tensor:
    return torch.full((batch, 3, 2), value, requires_grad=needs_grad)


def test_a_recurring_shape_is_captured_once_and_replayed_from_then_on() -> None:
    replayed = decoder()
    for value in (1.0, 2.0, 3.0, 4.0, 5.0):
        inputs = states(value=value)
        replayed(inputs).sum().backward()
        assert inputs.grad is not None
        assert torch.equal(inputs.grad, SCALE.detach().expand(1, 3, 2))
    # The gradient of a factor is the sum of its states over three positions.
    assert SCALE.grad is not None
    assert SCALE.grad.tolist() == [3 * 15.0, 3 * 15.0]
    (passes,) = Recording.made
    # Once to be compared with the third pass, then in place of the fourth and fifth.
    assert passes.replays == 3


def test_shapes_that_occur_only_twice_are_never_captured() -> None:
    replayed = decoder()
    for batch in range(1, 6):
        for _ in range(2):
            replayed(states(batch)).sum().backward()
    assert Recording.made == []


def test_captures_are_limited_in_number_and_in_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pml.cuda_graphs, "MOST_GRAPHS", 2)
    monkeypatch.setattr(pml.cuda_graphs, "MOST_TOKENS", 12)
    replayed = decoder()
    for batch in (5, 1, 2, 3):
        for _ in range(4):
            replayed(states(batch)).sum().backward()
    assert len(Recording.made) == 2


def test_a_pass_runs_plain_while_the_backward_pass_of_a_replay_is_outstanding() -> None:
    replayed = decoder()
    for _ in range(3):
        replayed(states()).sum().backward()
    SCALE.grad = None
    first, second = replayed(states(value=5.0)), replayed(states(value=7.0))
    (passes,) = Recording.made
    assert passes.replays == 2
    (first.sum() + second.sum()).backward()
    assert SCALE.grad is not None
    assert SCALE.grad.tolist() == [3 * 12.0, 3 * 12.0]
    replayed(states(value=1.0)).sum().backward()
    assert passes.replays == 3


def test_states_with_and_without_gradients_are_captured_separately() -> None:
    replayed = decoder()
    for needs_grad in (True, False):
        for _ in range(4):
            replayed(states(needs_grad=needs_grad)).sum().backward()
    assert [passes.replays for passes in Recording.made] == [2, 2]


def test_a_decoder_that_cannot_be_captured_runs_plain(caplog: pytest.LogCaptureFixture) -> None:
    def refuse(*_: object) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing\nand a long trace")

    replayed = ReplayedDecoder(scaled, {"scale": SCALE}, refuse)
    with caplog.at_level("INFO"):
        for _ in range(5):
            assert torch.equal(replayed(states()), scaled(states(), {}))
    assert caplog.text.count("not replayed as CUDA graphs: operation not permitted when stream is capturing") == 1


class OtherStates(Recording):
    def forward(self, states: Tensor) -> Tensor:
        return 1.01 * super().forward(states)


class OtherGradients(Recording):
    def backward(self, gradient: Tensor) -> tuple[Tensor | None, ...]:
        by_states, by_scale = super().backward(gradient)
        assert by_scale is not None
        return by_states, 1.01 * by_scale


@pytest.mark.parametrize("wrong", [OtherStates, OtherGradients])
def test_replays_that_differ_from_plain_passes_are_not_used(
    wrong: type[Recording], caplog: pytest.LogCaptureFixture
) -> None:
    replayed = ReplayedDecoder(scaled, {"scale": SCALE}, wrong)
    for _ in range(5):
        inputs = states()
        outputs = replayed(inputs)
        assert torch.equal(outputs, scaled(inputs, {}))
        outputs.sum().backward()
    assert SCALE.grad is not None
    assert SCALE.grad.tolist() == [15.0, 15.0]
    assert caplog.text.count("a replayed step differs by 1.0e-02") == 1


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(rank=2, block=2),
        AdapterConfig(rank=2, block=1, placement=["q_proj", "o_proj", "gate_proj", "down_proj"]),
        AdapterConfig(rank=2, block=1, placement=["up_proj"], guard=GuardConfig(directions=8)),
    ],
    ids=["mlp_block", "linear layers", "guarded"],
)
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_fit_with_replayed_steps_ends_with_the_weights_of_a_plain_fit(
    accumulated: int,
    adapter: AdapterConfig,
    tiny_backbone_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PML_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(pml.frozen_layers, "ReplayedDecoder", partial(ReplayedDecoder, capture=Recording))
    weights = []
    for has_graphs in (False, True):
        monkeypatch.setattr(pml.frozen_layers, "has_graphs", lambda _, answer=has_graphs: answer)
        module = module_on(tiny_backbone_folder, adapter=adapter)
        trainer = make_trainer(tmp_path, max_epochs=8, accumulate_grad_batches=accumulated)
        trainer.fit(module, datamodule=Ids(uneven(6), batch_size=3))
        weights.append({name: values.clone() for name, values in adapter_parameters(module.model).items()})
    assert Recording.made
    assert all(passes.replays > 1 for passes in Recording.made)
    torch.testing.assert_close(weights[1], weights[0])
