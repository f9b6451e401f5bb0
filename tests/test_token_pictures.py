"""Pictures of tokens: the colour jumps at the threshold, and no failing token vanishes."""

from typing import Any

import numpy as np
import pytest
from PIL import ImageDraw

from pml.token_history import History
from pml.token_pictures import colours, grid_image, history_image, pool_min, token_grid


def test_colours_jump_just_above_the_threshold_and_nan_is_grey() -> None:
    shown = colours(np.array([0.0, 0.499, 0.5, 0.501, 1.0, np.nan])).astype(int)
    red, blue = shown[:, 0], shown[:, 2]
    assert (red[:3] > blue[:3]).all()
    assert (blue[3:5] > red[3:5]).all()
    # Neighbours on one side differ by at most a shade, but by far more across the threshold.
    assert abs(shown[1] - shown[2]).sum() < 20
    assert abs(shown[2] - shown[3]).sum() > 150
    assert len(set(shown[5])) == 1


def test_colours_jump_at_the_given_threshold() -> None:
    below, above = colours(np.array([0.2, 0.21]), threshold=0.2).astype(int)
    assert abs(below - above).sum() > 150


def test_pooling_keeps_the_smallest_of_neighbours_and_ignores_nan() -> None:
    table = np.array([[0.9, 0.1, 0.8, np.nan], [0.7, 0.6, np.nan, np.nan]])
    np.testing.assert_equal(pool_min(table, 2, 2), [[0.1, 0.8], [0.6, np.nan]])
    np.testing.assert_equal(pool_min(table, 1, 4), [[0.7, 0.1, 0.8, np.nan]])
    np.testing.assert_equal(pool_min(table, 9, 9), table)


def test_each_of_several_pairs_has_its_own_row() -> None:
    np.testing.assert_equal(
        token_grid(np.array([0.1, 0.2, 0.3, 0.4]), [1, 3]), [[0.1, np.nan, np.nan], [0.2, 0.3, 0.4]]
    )


@pytest.mark.parametrize(("rows", "columns"), [(99, 99), (3, 99), (99, 4), (3, 4), (1, 1)])
def test_many_pairs_are_pooled_as_their_whole_table_would_be(rows: int, columns: int) -> None:
    lengths = [5, 1, 11, 2, 7, 1, 3]
    probability = np.random.default_rng(1).random(sum(lengths)).astype(np.float32)
    probability[[3, 17]] = np.nan
    table = np.full((7, 11), np.nan)
    table[np.arange(11) < np.array(lengths)[:, None]] = probability
    np.testing.assert_equal(token_grid(probability, lengths, rows, columns), pool_min(table, rows, columns))


def test_one_long_target_among_many_pairs_needs_no_table_of_all_pairs_by_all_positions() -> None:
    lengths = [1] * 100_000 + [100_000]  # 80 GB in such a table
    grid = token_grid(np.full(200_000, 0.9, np.float32), lengths)
    assert grid.shape == (100, 120)
    assert not np.isnan(grid[-1]).any()


def test_a_single_target_is_wrapped_and_one_failing_token_in_a_million_stays_visible() -> None:
    assert token_grid(np.full(50, 0.9), [50]).shape == (5, 10)
    p = np.full(1_000_000, 0.99)
    p[123_456] = 0.01
    assert np.nanmin(token_grid(p, [len(p)])) == 0.01
    picture = grid_image(p, [len(p)])
    assert picture.shape[1] < 800
    assert picture.dtype == np.uint8


def test_the_history_orders_tokens_by_position_in_their_target() -> None:
    position, example = np.array([0, 1, 0, 1, 2]), np.array([0, 0, 1, 1, 1])
    # Both first tokens are certain and adjacent, although the history stores one target after the other.
    probability = np.where(position == 0, 1.0, 0.0).astype(np.float32)[None].repeat(2, axis=0)
    history = History(np.array([0, 9]), example, position, position, probability, probability, probability > 0.5)
    row = history_image(history)[40].astype(int)
    blue, orange = ((row == colours(np.array([p]))[0]).all(axis=1) for p in (1.0, 0.0))
    assert np.flatnonzero(blue).tolist() == list(range(76, 76 + 48))
    assert np.flatnonzero(orange).tolist() == list(range(76 + 48, 76 + 120))


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which the texts drawn into pictures are appended."""
    texts: list[str] = []
    draw_text = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, xy: tuple[float, float], content: str, **options: Any) -> None:
        texts.append(content)
        draw_text(self, xy, content, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    return texts


@pytest.mark.parametrize(("tokens", "in_row"), [(12_000, 120), (12_001, 120), (18_000, 180)])
def test_the_axis_of_a_single_long_target_gives_the_number_of_tokens_per_row(
    monkeypatch: pytest.MonkeyPatch, tokens: int, in_row: int
) -> None:
    texts = written(monkeypatch)
    grid_image(np.full(tokens, 0.9), [tokens])
    (axis,) = [text for text in texts if "rows of" in text]
    assert axis.startswith(f"0 … {in_row - 1}  token (rows of {in_row})")


@pytest.mark.parametrize("steps", [300, 1_000_000])
def test_row_labels_lie_inside_the_picture_however_many_steps_there_are(steps: int) -> None:
    probability, places = np.full((2, 40), 0.9, np.float32), np.arange(40)
    shown = history_image(
        History(np.array([0, steps]), places * 0, places, places, probability, probability, probability > 0.5)
    )
    # A label that is cut off has ink in the first column; paper is white.
    assert (shown[:, 0] == 255).all()
    assert not (shown[:, :60] == 255).all()


@pytest.mark.parametrize(("looks", "pooled"), [(100, False), (101, True)])
def test_the_axis_of_a_history_says_whether_neighbours_are_pooled(
    monkeypatch: pytest.MonkeyPatch, looks: int, pooled: bool
) -> None:
    texts, places = written(monkeypatch), np.arange(3)
    probability = np.full((looks, 3), 0.9, np.float32)
    history_image(History(np.arange(looks), places * 0, places, places, probability, probability, probability > 0.5))
    assert any("smallest of neighbours" in text for text in texts) == pooled
