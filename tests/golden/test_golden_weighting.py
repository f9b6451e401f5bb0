"""Token losses, weights, losses and gradients equal the published code's on random inputs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pml.token_scores import TokenScores
from pml.weighting import OnlyThreshold, SlidingWindow, Uniform, Weighting, weighted_mean

OT_CASES = [f"ot_{n:02}" for n in range(10)] + ["ot_all_memorized_sft", "ot_all_memorized_zero"]
SW_CASES = ["sw_00", "sw_01"]


def scores_of(logits: Tensor, labels: Tensor) -> TokenScores:
    """Token scores in the published layout: column t predicts the label at t + 1, and every column is kept."""
    targets = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), targets, reduction="none")
    mask = targets != -100
    return TokenScores(losses, (logits[:, :-1].argmax(-1) == targets) & mask, mask, torch.arange(len(labels)))


def check(case: Any, suffix: str, weighting: Weighting, labels: Tensor) -> TokenScores:
    logits = torch.tensor(case[f"logits{suffix}"]).requires_grad_()
    scores = scores_of(logits, labels)
    weights = weighting.weights(scores)
    torch.testing.assert_close(weights, torch.tensor(case[f"weights{suffix}"]))
    if weighting.when_memorized == "uniform" and not weights.any():
        weights = Uniform().weights(scores)
    loss = weighted_mean(scores.losses, weights)
    loss.backward()
    torch.testing.assert_close(loss.item(), case[f"loss{suffix}"].item(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(logits.grad, torch.tensor(case[f"grad{suffix}"]))
    plain = weighted_mean(scores.losses, Uniform().weights(scores))
    torch.testing.assert_close(plain.item(), case[f"sft{suffix}"].item(), rtol=1e-6, atol=1e-7)
    return scores


@pytest.mark.parametrize("name", OT_CASES)
def test_only_threshold_equals_the_published_code(name: str, shared_folder: Path) -> None:
    case = np.load(shared_folder / "golden" / f"{name}.npz")
    weighting = OnlyThreshold(
        threshold=case["threshold"].item(),
        position_decay=case["position_decay"].item() if case["position_weight"] else None,
        when_memorized={"sft": "uniform", "zero": "skip"}[case["on_all_memorized"].item()],
    )
    scores = check(case, "", weighting, torch.tensor(case["labels"]))
    torch.testing.assert_close(scores.losses, torch.tensor(case["token_losses"]))
    assert int((weighting.weights(scores) > 0).sum()) == case["active"].item()


@pytest.mark.parametrize("name", SW_CASES)
def test_sliding_window_equals_the_published_code_step_by_step(name: str, shared_folder: Path) -> None:
    case = np.load(shared_folder / "golden" / f"{name}.npz")
    weighting = SlidingWindow(**{k: case[k].item() for k in ("threshold", "scale", "window", "tau", "floor")})
    labels = torch.tensor(case["labels"])
    weighting.prepare(len(labels), torch.device("cpu"))
    for step in range(case["steps"].item()):
        scores = check(case, f"_{step}", weighting, labels)
        # For an example without errors, the published code sets the anchor to 0.
        assert weighting.anchors(scores).clamp(min=0).tolist() == case[f"anchors_{step}"].tolist()
        assert weighting.state_dict()["stuck"].tolist() == case[f"patience_{step}"].tolist()
        growth = weighting.growth_factor(weighting.state_dict()["stuck"])
        assert growth.tolist() == case[f"expansion_{step}"].tolist()
