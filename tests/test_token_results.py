"""Per-token results: reading them, and the first sub-threshold and first wrong position of each target."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from pml.errors import InputError
from pml.token_results import TOKENS_NAME, FirstPositions, first_positions, rank_correlation, read_tokens

ROWS = {
    "example_id": [1, 1, 0, 0, 0],
    "position": [1, 0, 0, 1, 2],
    "token_id": [5, 6, 7, 8, 9],
    "loss": [0.1, 0.2, 0.3, 0.9, 3.0],
    "correct": [True, True, True, True, False],
}


def write(folder: Path, **columns: object) -> Path:
    pq.write_table(pa.table({**ROWS, **columns}), folder / TOKENS_NAME)
    return folder


def test_tokens_are_sorted_by_example_and_position(tmp_path: Path) -> None:
    tokens = read_tokens(write(tmp_path))
    assert tokens.example_id.tolist() == [0, 0, 0, 1, 1]
    assert tokens.position.tolist() == [0, 1, 2, 0, 1]
    np.testing.assert_allclose(tokens.loss, [0.3, 0.9, 3.0, 0.2, 0.1])
    assert tokens.correct.tolist() == [True, True, False, True, True]


def test_first_positions_equal_the_target_length_if_no_token_is_sub_threshold_or_wrong(tmp_path: Path) -> None:
    first = first_positions(read_tokens(write(tmp_path)))
    # ln 2 = 0.693: token 1 of example 0 is the first below p = 0.5, though correct; token 2 is the first wrong one.
    assert first.sub_threshold.tolist() == [1, 2]
    assert first.failure.tolist() == [2, 2]
    assert first.length.tolist() == [3, 2]


def test_the_first_sub_threshold_position_depends_on_the_threshold(tmp_path: Path) -> None:
    # p = 0.8 is a loss of 0.223 nats.
    assert first_positions(read_tokens(write(tmp_path)), threshold=0.8).sub_threshold.tolist() == [0, 2]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"loss": [0.1, 0.2, 0.3, float("nan"), 3.0]}, "a finite loss"),
        ({"loss": [0.1, 0.2, 0.3, None, 3.0]}, "a finite loss"),
        ({"loss": [0.1, 0.2, 0.3, -1.0, 3.0]}, "a finite loss"),
        ({"correct": [True, None, True, True, True]}, "a verdict for every token"),
        ({"example_id": [1, None, 0, 0, 0]}, "a verdict for every token"),
        ({"loss": ["a"] * 5}, "expected the columns example_id, position, loss, correct"),
    ],
)
def test_columns_with_missing_or_invalid_values_are_refused(
    columns: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        read_tokens(write(tmp_path, **columns))


def test_a_missing_malformed_or_empty_tokens_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; a run writes it"):
        read_tokens(tmp_path)
    pq.write_table(pa.table({"loss": [0.1]}), tmp_path / TOKENS_NAME)
    with pytest.raises(InputError, match="expected the columns"):
        read_tokens(tmp_path)
    pq.write_table(pa.table(ROWS).slice(0, 0), tmp_path / TOKENS_NAME)
    with pytest.raises(InputError, match="a finite loss"):
        read_tokens(tmp_path)
    (tmp_path / TOKENS_NAME).write_bytes(b"text")
    with pytest.raises(InputError, match=r"not a Parquet file that can be read|expected the columns"):
        read_tokens(tmp_path)


def places(*pairs: tuple[int, int], length: int = 9) -> FirstPositions:
    below, failure = (np.array(column) for column in zip(*pairs, strict=True))
    return FirstPositions(below, failure, np.full(len(below), length))


def test_the_rank_correlation_is_spearmans_rho_over_targets_that_can_fail() -> None:
    found = rank_correlation(places((0, 1), (1, 1), (2, 6), (5, 5), (3, 9), (9, 9), (9, 9)))
    assert found is not None
    assert (found.targets, found.unfailing) == (5, 1)
    assert found.rho == pytest.approx(stats.spearmanr([0, 1, 2, 5, 3], [1, 1, 6, 5, 9]).statistic)
    assert found.rho_of_failing == pytest.approx(stats.spearmanr([0, 1, 2, 5], [1, 1, 6, 5]).statistic)


def test_the_rank_correlation_is_1_if_failures_follow_the_order_of_sub_threshold_tokens() -> None:
    found = rank_correlation(places((0, 2), (1, 3), (2, 8)))
    assert found is not None
    assert (found.rho, found.rho_of_failing) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize(
    "pairs", [((0, 1), (1, 2)), ((1, 2), (1, 3), (1, 4)), ((0, 5), (1, 5), (2, 5)), ((9, 9), (9, 9), (9, 9))]
)
def test_too_few_targets_or_equal_positions_have_no_rank_correlation(pairs: tuple[tuple[int, int], ...]) -> None:
    assert rank_correlation(places(*pairs)) is None
