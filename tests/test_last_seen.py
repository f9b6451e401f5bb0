"""The latest scores of every target token, updated batch by batch."""

import numpy as np
import pytest
import torch

from pml.last_seen import LastSeen, margins, shares
from pml.token_scores import TokenScores


def batch(ids: list[int], p: list[list[float]], right: list[list[int]], margin: float | None = None) -> TokenScores:
    probability = torch.tensor(p)
    mask = probability > 0
    losses = -torch.log(probability.where(mask, torch.ones_like(probability)))
    known = None if margin is None else torch.full_like(losses, margin)
    rival = None if margin is None else torch.full(losses.shape, 7)
    return TokenScores(losses, torch.tensor(right).bool() & mask, mask, torch.tensor(ids), known, rival)


def test_the_latest_scores_of_each_token_are_kept_and_padding_examples_are_ignored() -> None:
    seen = LastSeen([2, 1, 3])
    seen.update(batch([2, 0], [[0.1, 0.2, 0.3], [0.9, 0.4, 0]], [[0, 0, 0], [1, 1, 0]]), step=0)
    seen.update(batch([-1, 2], [[0.5, 0.5, 0.5], [0.6, 0.7, 0.45]], [[1, 1, 1], [1, 1, 1]], margin=2.0), step=5)
    now = seen.standing()
    np.testing.assert_allclose(now.probability, [0.9, 0.4, np.nan, 0.6, 0.7, 0.45], rtol=1e-6)
    assert now.correct.tolist() == [True, True, False, True, True, True]
    np.testing.assert_allclose(now.margin, [np.nan, np.nan, np.nan, 2, 2, 2])
    assert now.rival.tolist() == [-1, -1, -1, 7, 7, 7]
    assert now.first_right.tolist() == [0, -1, 5]
    assert shares(now, [2, 1, 3]) == pytest.approx(
        {
            "certain_pairs": 0,
            "certain_tokens": 3 / 6,
            "failing_pairs": 1 / 3,
            "once_right_pairs": 2 / 3,
            "right_not_certain_pairs": 2 / 3,
            "right_not_certain_tokens": 2 / 6,
            "weakest_probability": 0.4,
            "wrong_tokens": 1 / 6,
        }
    )
    assert margins(now) == {"median": 2, "smallest": 2}


def test_the_step_of_first_recall_is_kept_when_a_pair_is_forgotten() -> None:
    seen = LastSeen([1])
    for step, right in enumerate([0, 1, 0, 1]):
        seen.update(batch([0], [[0.6]], [[right]]), step)
    assert seen.standing().first_right.tolist() == [1]


def test_a_restored_state_keeps_its_scores_and_takes_new_ones() -> None:
    first, second = LastSeen([1, 1]), LastSeen([1, 1])
    first.update(batch([0], [[0.6]], [[1]]), 3)
    second.load_state_dict(first.state_dict())
    second.update(batch([1], [[0.2]], [[0]]), 4)
    assert second.standing().first_right.tolist() == [3, -1]
    np.testing.assert_allclose(second.standing().probability, [0.6, 0.2], rtol=1e-6)


def test_scores_go_on_after_a_checkpoint_that_several_ranks_saved_in_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def gather(everyone: list[torch.Tensor], own: torch.Tensor) -> None:
        # The other rank has not scored anything yet.
        for table, values in zip(everyone, (own, torch.full_like(own, -1)), strict=True):
            table.copy_(values)

    monkeypatch.setattr("pml.last_seen.several_ranks", lambda: True)
    monkeypatch.setattr("pml.last_seen.dist.get_world_size", lambda: 2)
    monkeypatch.setattr("pml.last_seen.dist.all_gather", gather)
    monkeypatch.setattr("pml.last_seen.dist.all_reduce", lambda *_, **__: None)
    seen = LastSeen([1, 1])
    seen.update(batch([0], [[0.6]], [[1]]), 3)
    with torch.inference_mode():  # as in Lightning's validation
        seen.state_dict()
    seen.update(batch([1], [[0.2]], [[0]]), 4)
    np.testing.assert_allclose(seen.standing().probability, [0.6, 0.2], rtol=1e-6)


def test_margins_are_empty_if_none_is_known() -> None:
    assert margins(LastSeen([2]).standing()) == {}
