"""Weights and losses of a global batch, worked by hand, also across a checkpoint between two of its micro-batches."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pml.global_batch import GlobalBatch

CPU = torch.device("cpu")


def parameter(gradient: float) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(1))
    made.grad = torch.tensor([gradient])
    return made


def add(batch: GlobalBatch, weight: float, loss: float, trained: list[nn.Parameter]) -> Tensor:
    """Adds a micro-batch of one token."""
    return batch.add(torch.tensor([[weight]]), torch.tensor([[loss]]), torch.tensor([[True]]), trained)


def restored(batch: GlobalBatch) -> GlobalBatch:
    """The global batch as restored from a checkpoint."""
    state: dict[str, Any] = batch.state_dict()
    other = GlobalBatch(batch.uniform_when_memorized)
    other.load_state_dict(state, CPU)
    return other


@pytest.mark.parametrize("checkpoint", [False, True])
def test_gradients_are_divided_by_the_sum_of_weights_over_all_micro_batches(checkpoint: bool) -> None:
    batch, trained = GlobalBatch(), [parameter(14.0), nn.Parameter(torch.zeros(1))]
    assert not batch.is_open
    add(batch, 3.0, 2.0, trained)
    batch = restored(batch) if checkpoint else batch
    assert batch.is_open
    add(batch, 4.0, 5.0, trained)
    budget, loss = batch.close(trained)
    # 3 * 2 + 4 * 5 over a weight of 7.
    assert (float(budget), float(loss)) == (7.0, pytest.approx(26 / 7))
    assert trained[0].grad is not None and trained[0].grad.tolist() == [2.0]
    assert trained[1].grad is None
    assert not batch.is_open


@pytest.mark.parametrize("checkpoint", [False, True])
def test_the_first_token_with_weight_discards_the_gradients_of_memorised_micro_batches(checkpoint: bool) -> None:
    batch, trained = GlobalBatch(uniform_when_memorized=True), [parameter(7.0)]
    assert add(batch, 0.0, 9.0, trained).tolist() == [[1.0]]
    batch = restored(batch) if checkpoint else batch
    assert add(batch, 2.0, 3.0, trained).tolist() == [[2.0]]
    assert trained[0].grad is not None and trained[0].grad.tolist() == [0.0]
    # A later micro-batch that is memorised adds nothing.
    assert add(batch, 0.0, 8.0, trained).tolist() == [[0.0]]
    budget, loss = batch.close(trained)
    assert (float(budget), float(loss)) == (2.0, 3.0)


def test_closing_a_global_batch_resets_its_state() -> None:
    batch, trained = GlobalBatch(uniform_when_memorized=True), [parameter(0.0)]
    add(batch, 2.0, 3.0, trained)
    batch.close(trained)
    # All tokens are memorised, so the loss is the plain mean.
    assert add(batch, 0.0, 9.0, trained).tolist() == [[1.0]]
    assert float(batch.close(trained)[1]) == 9.0


@pytest.mark.parametrize("ranks", [1, 4])
def test_a_global_batch_without_weight_has_zero_loss_and_keeps_zero_gradients(
    ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pml.global_batch.several_ranks", lambda: ranks > 1)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: ranks)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda _: None)
    batch, trained = GlobalBatch(), [parameter(0.0)]
    add(batch, 0.0, 9.0, trained)
    budget, loss = batch.close(trained)
    assert (float(budget), float(loss)) == (0.0, 0.0)
    assert trained[0].grad is not None and trained[0].grad.tolist() == [0.0]
