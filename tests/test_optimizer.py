"""A step without weight leaves parameters and optimiser state unchanged, whether or not AdamW is fused."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from pml.optimizer import make_adamw, skip_step_without_weight


@pytest.mark.parametrize("one_kernel", [False, True])
def test_a_step_without_weight_is_counted_and_changes_no_parameter_and_no_optimiser_state(
    one_kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fused kernel of a CPU stands in for that of a GPU.
    monkeypatch.setattr("pml.optimizer.FUSED", ("cpu",) if one_kernel else ())
    parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make_adamw([parameter], 0.1, (0.9, 0.999), 0.5)
    skipped: torch.Tensor | int = 0
    seen = []
    for budget in (3.0, 0.0, 0.0, 2.0):
        parameter.grad = torch.tensor([1.0, -1.0]) * (budget > 0)
        skipped = skipped + skip_step_without_weight(optimizer, torch.tensor(budget))
        optimizer.step()
        state = optimizer.state[parameter]
        seen.append([parameter.tolist(), state["exp_avg"].tolist(), float(state["step"])])
    assert int(skipped) == 2
    assert seen[0] == seen[1] == seen[2]
    # Weight decay first, by 1 - 0.1 * 0.5 = 0.95; then AdamW's first step is as large as the learning rate.
    torch.testing.assert_close(torch.tensor(seen[0][0]), torch.tensor([0.95 - 0.1, -1.9 + 0.1]))
    assert seen[3][2] == 2
    assert seen[3][0] != seen[0][0]


def test_adamw_is_not_fused_on_a_cpu() -> None:
    optimizer = make_adamw([nn.Parameter(torch.ones(2))], 0.1, (0.9, 0.999), 0.0)
    assert optimizer.param_groups[0]["fused"] is None


@pytest.mark.parametrize(("kind", "fused"), [("cuda", True), ("xpu", True), ("mps", None)])
def test_adamw_is_fused_where_its_kernel_can_skip_a_step(
    kind: str, fused: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Made(torch.optim.AdamW):
        def __init__(self, parameters: Any, **settings: Any) -> None:
            super().__init__([torch.ones(1)], lr=settings["lr"])
            self.asked = settings

    monkeypatch.setattr(torch.optim, "AdamW", Made)
    on_device: Any = SimpleNamespace(device=torch.device(kind))
    made: Any = make_adamw([on_device], 0.1, (0.9, 0.999), 0.0)
    assert made.asked["fused"] is fused


@pytest.mark.parametrize("before", ["cpu", "cuda"])
def test_a_state_from_another_type_of_device_leaves_the_kernel_as_it_is(
    before: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The fused kernel of a CPU stands in for that of a GPU.
    def stepped(one_kernel: bool) -> torch.optim.AdamW:
        monkeypatch.setattr("pml.optimizer.FUSED", ("cpu",) if one_kernel else ())
        parameter = nn.Parameter(torch.tensor([1.0, -2.0]))
        optimizer = make_adamw([parameter], 0.1, (0.9, 0.999), 0.0)
        parameter.grad = torch.tensor([1.0, -1.0])
        optimizer.step()
        return optimizer

    saved, resumed = stepped(before == "cuda"), stepped(before == "cpu")
    state = saved.state_dict()
    resumed.load_state_dict(state)
    assert resumed.param_groups[0]["fused"] is (True if before == "cpu" else None)
    assert state["param_groups"][0]["fused"] is (True if before == "cuda" else None)
    resumed.step()
