import torch

from pml.convergence import MOST_SEGMENTS, LossHistory


def history_of(losses, tokens=4):
    history = LossHistory()
    for loss in losses:
        history.add(torch.tensor(loss * tokens), torch.tensor(tokens))
    return history


def late_drop(history):
    return LossHistory.late_drop(history.sums(), history.steps)


def test_the_sums_are_on_the_device_of_the_losses_before_any_step_is_added() -> None:
    # A backend such as NCCL only adds up tensors on its own device.
    assert LossHistory("meta").sums().device.type == "meta"


def test_the_late_drop_compares_the_last_two_tenths_of_the_steps():
    # 20 steps: the tenths are steps 17 and 18, with mean 3.5, and 19 and 20, with mean 2.25.
    assert late_drop(history_of([9.0] * 16 + [4.0, 3.0, 2.5, 2.0])) == 3.5 - 2.25


def test_steps_are_weighted_by_their_number_of_target_tokens():
    history = history_of([5.0] * 18)
    history.add(torch.tensor(3.0), torch.tensor(3))  # a loss of 1 over 3 tokens
    history.add(torch.tensor(9.0), torch.tensor(1))  # a loss of 9 over 1 token
    assert late_drop(history) == 5.0 - (3.0 + 9.0) / 4


def test_there_is_no_late_drop_with_fewer_than_twenty_steps():
    assert late_drop(history_of([1.0] * 19)) is None


def test_there_is_no_late_drop_if_a_tenth_has_no_target_tokens():
    history = history_of([1.0] * 18)
    for _ in range(2):
        history.add(torch.tensor(0.0), torch.tensor(0))
    assert late_drop(history) is None


def test_a_long_fit_keeps_a_bounded_number_of_segments_and_the_same_late_drop():
    steps = 5 * MOST_SEGMENTS
    losses = torch.linspace(10.0, 0.0, steps).tolist()
    history = history_of(losses)
    assert len(history.sums()) <= MOST_SEGMENTS
    # A straight line falls by a tenth of its height from tenth to tenth; a segment may hold up to 8 of the steps.
    assert abs(late_drop(history) - 1.0) < 0.01


def test_the_sums_of_several_ddp_processes_can_be_added():
    first, second = history_of([4.0] * 18 + [2.0, 2.0], tokens=1), history_of([8.0] * 18 + [2.0, 2.0], tokens=3)
    together = LossHistory.late_drop(first.sums() + second.sums(), first.steps)
    assert together == (4.0 * 1 + 8.0 * 3) / 4 - 2.0
