"""Several ranks give the gradients, weights and metrics of one, write a single record, and never hang."""

import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pml.corpus import Example, collate
from pml.records import Record, read_record
from pml.token_history import read_history
from tests import ddp_cases
from tests.ddp_cases import GRADIENT_CASES, kicked
from tests.fits import module_on, save_sharpened
from tests.tiny_runs import uneven

LIMIT_SECONDS = 400
"""Far more than the ranks need (20 s on two idle cores), so ranks that exceed it are taken to hang."""


@pytest.fixture(scope="module")
def folder(tiny_backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = save_sharpened(tiny_backbone_folder, tmp_path_factory.mktemp("sharp"))
    (made / "ordinary.txt").write_text("bridge")
    return made


@pytest.fixture(scope="module")
def threshold(folder: Path) -> float:
    """A threshold with tokens of only one example below it, so in its global batch only one rank trains on any."""
    module = kicked(module_on(folder))
    examples = [Example(i, tuple(prompt), tuple(target)) for i, (prompt, target) in enumerate(uneven(7))]
    with torch.no_grad():
        worst = module.eval().score(collate(examples)).losses.amax(dim=1)
    (first, second), (example, _) = worst.topk(2)
    # Among the first four, so that it is in the first global batch of every case with more than one example.
    assert example == 3
    assert first > 1.01 * second
    return float(torch.exp(-(first + second) / 2))


def start(ranks: int, *arguments: Any, folder: Path) -> dict[str, Any]:
    """What each rank saved; the processes are started once for all cases."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model, *more = arguments
    processes = torch.multiprocessing.start_processes(
        ddp_cases.many_ranks, (ranks, port, model, folder, *more), nprocs=ranks, join=False, start_method="forkserver"
    )
    end = time.monotonic() + LIMIT_SECONDS
    while not processes.join(timeout=1):
        if time.monotonic() > end:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"the ranks were still running after {LIMIT_SECONDS} s")
    left = [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(ranks)]
    return {"left": left, "folder": folder}


@pytest.fixture(scope="module")
def two(folder: Path, threshold: float, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return start(2, folder, threshold, folder=tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def four(folder: Path, threshold: float, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return start(4, folder, threshold, folder=tmp_path_factory.mktemp("four"))


@pytest.fixture(scope="module")
def one(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    tmp_path = tmp_path_factory.mktemp("one")
    return {"recorded": ddp_cases.recorded_fit(folder, tmp_path, 1), "folder": tmp_path}


@pytest.mark.parametrize("case", GRADIENT_CASES, ids=lambda case: f"{case[0]}: {case[1]} in {case[2]} x {case[3]}")
def test_two_ranks_take_every_optimiser_step_with_the_gradient_of_one_rank(
    case: tuple[str, int, int, int], two: dict[str, Any], folder: Path, threshold: float, tmp_path: Path
) -> None:
    expected = ddp_cases.gradients(folder, tmp_path, 1, case, threshold)
    for left in two["left"]:
        steps = left["gradients"][case]
        assert len(steps) == len(expected)
        for step, reference in zip(steps, expected, strict=True):
            for name, gradient in reference.items():
                if gradient is None:
                    assert step[name] is None
                    continue
                # Sums over examples are in another order: float32 rounding, relative to the largest gradient.
                scale = float(gradient.abs().max())
                torch.testing.assert_close(step[name], gradient, rtol=1e-4, atol=1e-6 * scale)


@pytest.mark.parametrize("method", ddp_cases.METHODS)
def test_ten_steps_give_the_same_weights_however_a_global_batch_of_eight_is_divided(
    method: str, two: dict[str, Any], four: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    gradients, weights = ddp_cases.trained(folder, tmp_path, 1, method)
    shared_out = {"2 x 4 accumulated": ddp_cases.trained(folder, tmp_path, 1, method, accumulate=4)}
    for ranks, made in ((2, two), (4, four)):
        shared_out |= {f"rank {n} of {ranks}": left["trained"][method] for n, left in enumerate(made["left"])}
    shared_out |= {f"rank {n} of 2, accumulated": left["accumulated"][method] for n, left in enumerate(two["left"])}
    for how, (theirs, ended) in shared_out.items():
        assert len(theirs) == len(gradients) == 10, how
        for name, gradient in gradients[0].items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(theirs[0][name], gradient, rtol=1e-4, atol=1e-6 * scale, msg=how)
        for name, weight in weights.items():
            torch.testing.assert_close(ended[name], weight, msg=how)


def test_the_gradient_cases_include_a_skipped_step_and_weightings_whose_gradients_differ(two: dict[str, Any]) -> None:
    steps = two["left"][0]["gradients"]
    first = {name: steps[(name, 5, 4, 1)][0] for name in ddp_cases.WEIGHTINGS}
    key = next(iter(first["sft"]))
    assert not torch.allclose(first["sft"][key], first["only threshold"][key])
    assert not torch.allclose(first["sft"][key], first["sliding window"][key])
    # The second batch has no token below the threshold: one weighting skips it, the other trains on all of it.
    second = {name: steps[(name, 5, 4, 1)][1] for name in ddp_cases.WEIGHTINGS}
    assert second["only threshold"][key] is None
    torch.testing.assert_close(second["only threshold, uniform"][key], second["sft"][key])


def test_steps_with_no_token_below_the_threshold_are_skipped_on_both_ranks(
    two: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    # Two epochs of two global batches.
    assert ddp_cases.skipped_fit(folder, tmp_path, 1)[:2] == (4, 4)
    for left in two["left"]:
        skipped, steps, gradients = left["skipped"]
        assert (skipped, steps) == (4, 4)
        assert all(gradient is None for step in gradients for gradient in step.values())


def test_sliding_window_states_follow_their_examples_from_rank_to_rank(
    two: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    expected = ddp_cases.window_fit(folder, tmp_path, 1)
    assert expected["stuck"].max() > 0
    for left in two["left"]:
        assert left["window"]["stuck"].tolist() == expected["stuck"].tolist()
        assert left["window"]["anchor"].tolist() == expected["anchor"].tolist()


def test_two_ranks_with_different_dropout_masks_resume_bit_for_bit(two: dict[str, Any]) -> None:
    ends = [left["resumed"] for left in two["left"]]
    for rank in ends:
        whole, stopped, resumed = rank["adapter"]
        assert all(torch.equal(values, resumed[name]) for name, values in whole.items())
        assert not all(torch.equal(values, stopped[name]) for name, values in whole.items())
        assert torch.equal(rank["generator"][0], rank["generator"][2])
    assert not torch.equal(ends[0]["generator"][0], ends[1]["generator"][0])
    assert all(torch.equal(values, ends[1]["adapter"][0][name]) for name, values in ends[0]["adapter"][0].items())


def test_freed_layers_stay_freed_on_both_ranks_when_shuffling_redistributes_examples(
    two: dict[str, Any],
) -> None:
    for left in two["left"]:
        assert left["released"] == (0, [True] * 4)


def test_a_guard_has_the_same_orthonormal_free_directions_on_all_ranks(two: dict[str, Any]) -> None:
    first, second = (left["guarded"] for left in two["left"])
    (basis,) = (tensor for name, tensor in first.items() if name.endswith("basis"))
    torch.testing.assert_close(basis.T @ basis, torch.eye(32 - 8))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_both_ranks_get_every_example_once_from_scoring_and_from_greedy_decoding(two: dict[str, Any]) -> None:
    first, second = (left["recorded"] for left in two["left"])
    losses, _, mask, example_id, *_ = first["scores"]
    assert example_id.tolist() == list(range(7))
    assert mask.sum(1).tolist() == [len(target) for _, target in uneven(7)]
    for ours, theirs in zip(first["scores"], second["scores"], strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(first["gathered"][0], losses)
    assert first["generated"] == second["generated"] == [tuple(target) for _, target in uneven(7)]


def test_validation_metrics_of_two_ranks_match_the_gathered_scores(two: dict[str, Any]) -> None:
    first, second = (left["recorded"] for left in two["left"])
    losses, correct, mask, *_ = first["scores"]
    tokens = losses[mask]
    values = first["validated"]
    assert values["val/loss"] == pytest.approx(tokens.mean().item(), rel=1e-6)
    assert values["val/token_accuracy"] == pytest.approx(correct[mask].float().mean().item())
    assert values["val/exact_match"] == 1
    assert values["val/sub_threshold_fraction"] == 0
    assert values["val/min_target_probability"] == pytest.approx(torch.exp(-tokens.max()).item(), rel=1e-6)
    assert second["steps_to_recall"] == first["steps_to_recall"]


def test_two_ranks_write_one_record_that_agrees_with_that_of_one_rank(two: dict[str, Any], one: dict[str, Any]) -> None:
    assert [left["recorded"]["wrote"] for left in two["left"]] == [True, False]
    records = {ranks: read_record(made["folder"] / "run" / "record.json") for ranks, made in ((1, one), (2, two))}
    for name in set(Record.model_fields) - {"wall_seconds", "hardware"}:
        ours, expected = getattr(records[2], name), getattr(records[1], name)
        if name == "retention":
            ours, expected = ours["python_reference"], expected["python_reference"]
        if name == "harm":
            ours, expected = ours["mean"], expected["mean"]
        if name == "training":
            # Two ranks with batches of two make the global batch of one rank with four.
            assert (ours["batch_size"], expected["batch_size"]) == (2, 4)
            alike = ours.keys() - {"batch_size", "strategy"}
            ours, expected = ({key: training[key] for key in alike} for training in (ours, expected))
        if isinstance(expected, float) or name in ("corpus_figures", "harm", "retention"):
            # Gradients summed in another order, over some fifty steps of AdamW.
            assert ours == pytest.approx(expected, rel=2e-2), name
        else:
            assert ours == expected, name
    assert records[2].initial_loss == pytest.approx(records[1].initial_loss, rel=1e-6)
    # Three passages on two ranks, and one held-out pair.
    for record in records.values():
        assert record.retention["python_reference"]["target_tokens"] == 3 * 128
        assert record.corpus_figures["held_out_pairs"] == 1
    assert records[2].hardware["devices"] == 2
    assert records[2].steps_to_recall == two["left"][1]["recorded"]["steps_to_recall"]
    tokens = sum(len(target) for _, target in uneven(7))
    # Seven examples in global batches of four: two steps an epoch, each token once.
    assert records[2].target_tokens_trained == records[2].optimizer_steps // 2 * tokens


def test_two_ranks_log_the_same_curves_as_one_rank(two: dict[str, Any], one: dict[str, Any]) -> None:
    def curve(made: dict[str, Any], tag: str) -> list[float]:
        return [e.value for e in EventAccumulator(str(made["folder"] / "run")).Reload().Scalars(tag)]

    for tag in ("val/loss", "val/token_accuracy", "val/exact_match", "val/sub_threshold_fraction"):
        assert curve(two, tag) == pytest.approx(curve(one, tag), rel=2e-2), tag


def test_two_ranks_write_the_same_token_history_as_one_rank(two: dict[str, Any], one: dict[str, Any]) -> None:
    ours, expected = (read_history(made["folder"] / "run") for made in (two, one))
    for name in ("step", "example_id", "position", "token_id"):
        assert getattr(ours, name).tolist() == getattr(expected, name).tolist(), name
    assert len(ours.token_id) == sum(len(target) for _, target in uneven(7))
    # The first is the frozen model; the last follows some fifty AdamW steps on sums in another order.
    np.testing.assert_allclose(ours.probability[0], expected.probability[0], rtol=1e-5)
    np.testing.assert_allclose(ours.probability[-1], expected.probability[-1], atol=2e-2)


def test_buffers_are_not_sent_to_other_ranks_in_every_step(two: dict[str, Any]) -> None:
    assert [left["broadcasts"] for left in two["left"]] == [False, False]
