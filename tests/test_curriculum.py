"""Which examples an epoch trains on, and how they are divided among batches and ranks."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pml.corpus import PADDING_EXAMPLE
from pml.curriculum import CorpusBatchSampler, PrefixRatio, active_examples
from pml.errors import InputError

SHAPES = {
    "total": st.integers(1, 40),
    "batch_size": st.integers(1, 7),
    "world_size": st.integers(1, 4),
    "shuffle": st.booleans(),
    "epoch": st.integers(0, 5),
}


def batches_of_all_ranks(
    total: int, batch_size: int, world_size: int, epoch: int = 0, **options: Any
) -> list[list[list[int]]]:
    """Batches by rank."""
    ranks = []
    for rank in range(world_size):
        sampler = CorpusBatchSampler(total, batch_size, rank=rank, world_size=world_size, **options)
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        ranks.append(batches)
    return ranks


def global_batches(ranks: list[list[list[int]]]) -> list[list[int]]:
    """Global batches put together from the ranks' slices, without padding examples."""
    return [
        [i for part in parts for i in part if i != PADDING_EXAMPLE.example_id] for parts in zip(*ranks, strict=True)
    ]


def test_active_examples_match_those_of_the_published_code(shared_folder: Path) -> None:
    cases = json.loads((shared_folder / "golden" / "curriculum.json").read_text())
    assert cases
    for case in cases:
        settings = {k: v for k, v in case.items() if k != "epochs"}
        for epoch, expected in case["epochs"].items():
            assert active_examples(**settings, epoch=int(epoch)) == expected


@pytest.mark.parametrize(
    ("total", "batch_size", "ratio", "drop_last", "expected"),
    [
        (100, 10, 0.25, True, 20),  # rounded down to whole batches
        (100, 10, 0.05, True, 10),  # at least one batch
        (25, 10, 1.0, True, 20),  # the remainder fills no batch
        (25, 10, 1.0, False, 25),  # the remainder is a smaller batch
        (25, 10, 0.99, False, 20),
        (7, 10, 0.5, False, 7),  # one batch is the whole corpus
    ],
)
def test_the_active_share_is_rounded_down_to_whole_batches(
    total: int, batch_size: int, ratio: float, drop_last: bool, expected: int
) -> None:
    active = active_examples(total, batch_size, [ratio], [1], epoch=0, seed=0, drop_last=drop_last)
    assert len(active) == len(set(active)) == expected


def test_a_stage_ends_at_its_boundary_and_the_last_ratio_stays_in_force() -> None:
    curriculum = PrefixRatio(ratios=[0.25, 0.5, 0.75], boundaries=[2, 3, 5])
    assert [curriculum.ratio(epoch) for epoch in range(7)] == [0.25, 0.25, 0.5, 0.75, 0.75, 0.75, 0.75]


@pytest.mark.parametrize(
    ("ratios", "boundaries", "message"),
    [
        ([0.5, 1.0], [10], "2 ratios and 1 boundaries"),
        ([], [], "at least one"),
        ([0.0, 1.0], [1, 2], r"\[0\.0, 1\.0\].*\(0, 1\]"),
        ([0.5, 1.5], [1, 2], r"\[0\.5, 1\.5\].*\(0, 1\]"),
        ([0.5, 1.0], [20, 20], r"\[20, 20\].*increasing"),
        ([1.0], [0], r"\[0\].*from 1 on"),
    ],
)
def test_a_curriculum_with_invalid_ratios_or_boundaries_is_refused(
    ratios: list[float], boundaries: list[int], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        PrefixRatio(ratios, boundaries)


def test_without_shuffling_batches_follow_the_order_of_the_corpus() -> None:
    assert list(CorpusBatchSampler(5, 2, shuffle=False)) == [[0, 1], [2, 3], [4]]
    assert list(CorpusBatchSampler(5, 2, shuffle=False, drop_last=True)) == [[0, 1], [2, 3]]


def test_a_rank_takes_its_slice_of_each_global_batch_or_a_padding_example_if_it_is_empty() -> None:
    assert batches_of_all_ranks(9, 2, 3, shuffle=False) == [
        [[0, 1], [6, 7]],
        [[2, 3], [8]],
        [[4, 5], [-1]],
    ]


@settings(deadline=None)
@given(**SHAPES)
def test_each_example_is_in_exactly_one_batch_of_one_rank(
    total: int, batch_size: int, world_size: int, shuffle: bool, epoch: int
) -> None:
    ranks = batches_of_all_ranks(total, batch_size, world_size, epoch, shuffle=shuffle)
    assert sorted(i for batch in global_batches(ranks) for i in batch) == list(range(total))


@settings(deadline=None)
@given(**SHAPES, drop_last=st.booleans(), curriculum=st.sampled_from([None, PrefixRatio([0.3, 0.6, 1.0], [1, 2, 3])]))
def test_all_ranks_get_equally_many_batches_and_together_make_those_of_one_rank(
    total: int,
    batch_size: int,
    world_size: int,
    shuffle: bool,
    epoch: int,
    drop_last: bool,
    curriculum: PrefixRatio | None,
) -> None:
    options = {
        "shuffle": shuffle,
        "curriculum": curriculum,
        "drop_last": drop_last and total >= batch_size * world_size,
    }
    ranks = batches_of_all_ranks(total, batch_size, world_size, epoch, **options)
    assert len({len(batches) for batches in ranks}) == 1
    assert global_batches(ranks) == batches_of_all_ranks(total, batch_size * world_size, 1, epoch, **options)[0]


@settings(deadline=None)
@given(**SHAPES, drop_last=st.booleans(), curriculum=st.sampled_from([None, PrefixRatio([0.3, 0.6, 1.0], [1, 2, 3])]))
def test_accumulated_micro_batches_together_make_those_of_one_large_batch(
    total: int,
    batch_size: int,
    world_size: int,
    shuffle: bool,
    epoch: int,
    drop_last: bool,
    curriculum: PrefixRatio | None,
) -> None:
    accumulate, per_step = 3, batch_size * world_size * 3
    options = {"shuffle": shuffle, "curriculum": curriculum, "drop_last": drop_last and total >= per_step}
    small = global_batches(batches_of_all_ranks(total, batch_size, world_size, epoch, accumulate=accumulate, **options))
    steps = [list(chain(*small[first : first + accumulate])) for first in range(0, len(small), accumulate)]
    assert steps == batches_of_all_ranks(total, per_step, 1, epoch, **options)[0]


def test_shuffling_gives_each_epoch_its_own_order_which_the_seed_determines() -> None:
    def order(seed: int, epoch: int) -> list[list[int]]:
        return batches_of_all_ranks(20, 4, 1, epoch, seed=seed)[0]

    assert order(0, 3) == order(0, 3)
    assert order(0, 3) != order(0, 4)
    assert order(0, 3) != order(100, 3)


def test_the_epoch_may_be_set_after_the_iterator_is_made() -> None:
    sampler = CorpusBatchSampler(20, 4)
    batches = iter(sampler)
    sampler.set_epoch(7)
    assert list(batches) == batches_of_all_ranks(20, 4, 1, epoch=7)[0]


def test_a_curriculum_grows_by_whole_batches_in_the_published_order() -> None:
    curriculum = PrefixRatio([0.5, 1.0], [1, 2])
    sampler = CorpusBatchSampler(10, 2, seed=42, shuffle=False, curriculum=curriculum)
    order = active_examples(10, 2, [1.0], [1], epoch=0, seed=42)
    assert [len(sampler), list(sampler)] == [2, [order[:2], order[2:4]]]
    sampler.set_epoch(1)
    assert [len(sampler), list(chain(*sampler))] == [5, order]
    assert [sampler.batches_in_epoch(epoch) for epoch in range(3)] == [2, 5, 5]


def test_a_shuffled_curriculum_trains_on_the_same_active_examples_in_another_order() -> None:
    curriculum = PrefixRatio([0.5, 1.0], [10, 20])
    fixed, first, second = (
        list(chain(*batches_of_all_ranks(40, 4, 1, epoch, curriculum=curriculum, shuffle=shuffle)[0]))
        for epoch, shuffle in [(0, False), (1, True), (2, True)]
    )
    assert set(first) == set(second) == set(fixed)
    assert first != second


def test_drop_last_is_refused_if_it_leaves_no_batch() -> None:
    with pytest.raises(InputError, match=r"3 examples, a step over 2 rank\(s\) takes 4"):
        CorpusBatchSampler(3, 2, drop_last=True, world_size=2)


def test_a_batch_size_of_zero_is_refused() -> None:
    with pytest.raises(InputError, match="batch_size is 0"):
        CorpusBatchSampler(3, 0)


@pytest.mark.parametrize(("drawn", "batch_size", "refused"), [(2, 8, True), (2, 1, True), (4, 1, False), (4, 8, False)])
def test_whether_an_epoch_had_ended_is_judged_by_its_own_number_of_batches(
    drawn: int, batch_size: int, refused: bool
) -> None:
    left = CorpusBatchSampler(8, 2)
    batches = iter(left)
    for _ in range(drawn):
        next(batches)
    state, other = left.state_dict(), CorpusBatchSampler(8, batch_size)
    if refused:
        with pytest.raises(
            InputError, match="2 batches into an epoch that was batched otherwise: batch_size was 2, is"
        ):
            other.load_state_dict(state)
    else:
        other.load_state_dict(state)


def test_a_checkpoint_within_an_epoch_can_be_loaded_only_with_its_own_curriculum() -> None:
    def sampler(ratio: float) -> CorpusBatchSampler:
        return CorpusBatchSampler(8, 2, curriculum=PrefixRatio(ratios=[ratio], boundaries=[3]))

    begun = sampler(0.5)
    next(iter(begun))
    state = begun.state_dict()
    sampler(0.5).load_state_dict(state)
    with pytest.raises(InputError, match="curriculum was "):
        sampler(1.0).load_state_dict(state)
