"""Pictures of probabilities against the threshold, painted pixel by pixel: a figure at every look would be too slow.

Colours run in two parts, oranges up to the threshold and blues above it, with a jump between them that colour-blind
readers see too. If tokens outnumber pixels, the smallest probability stands for its neighbours: one failing token ends
a recitation, so none may vanish.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from pml.token_history import History

__all__ = ["colours", "grid_image", "history_image", "pool_min", "token_grid"]

INK, PAPER = "#333333", "#FFFFFF"

Floats = npt.NDArray[np.floating]
Pixels = npt.NDArray[np.uint8]

NO_TOKEN = (226, 226, 226)
# From p = 0 to the threshold, and from just above it to p = 1.
BELOW = ((74, 20, 0), (179, 72, 0), (250, 176, 92))
ABOVE = ((146, 197, 240), (33, 113, 181), (4, 30, 90))
SHADES = 24
"""Shades in each half: few colours make small files, and nobody can tell more of them apart."""

WIDTH, HEIGHT = 480, 400
"""Largest size of the painted area, in pixels."""
LEAST_CELL = 4
LEAST_LEFT, MARGIN_TOP, MARGIN_BOTTOM, LEAST_WIDTH = 76, 26, 80, 420


def colours(probability: Floats, threshold: float = 0.5) -> Pixels:
    """(..., 3) RGB colours of probabilities; NaN is grey, and exactly the threshold counts as below.

    Args:
        probability: (...) probabilities.
        threshold: Where the colours jump.
    """
    known = ~np.isnan(probability)
    p = np.where(known, probability, 0.0)
    above = p > threshold
    share = np.where(above, (p - threshold) / (1 - threshold), p / threshold).clip(0, 1)
    shade = np.minimum((share * SHADES).astype(int), SHADES - 1)
    painted = np.where(above[..., None], _ramp(ABOVE)[shade], _ramp(BELOW)[shade])
    return np.where(known[..., None], painted, np.array(NO_TOKEN)).astype(np.uint8)


def pool_min(table: Floats, rows: int, columns: int) -> Floats:
    """The table reduced to at most this many rows and columns by the minimum of neighbours, ignoring NaN.

    Args:
        table: (R, C) numbers.
        rows: Largest number of rows.
        columns: Largest number of columns.
    """
    for axis, most in ((0, rows), (1, columns)):
        size = table.shape[axis]
        if size > most:
            table = np.fmin.reduceat(table, _starts(size, most), axis=axis)
    return table


def _starts(size: int, cells: int) -> npt.NDArray[np.int64]:
    """Where each cell begins if neighbours share one."""
    return np.arange(cells) * size // cells


def _cell_of(size: int, most: int) -> tuple[npt.NDArray[np.int64], int]:
    """(size,) the cell in which `pool_min` puts each row or column, and the number of cells."""
    cells = min(size, most)
    return np.searchsorted(_starts(size, cells), np.arange(size), side="right") - 1, cells


def token_grid(
    probability: Floats, lengths: Sequence[int], rows: int = HEIGHT // LEAST_CELL, columns: int = WIDTH // LEAST_CELL
) -> Floats:
    """Target tokens by position: one row per pair, or a single target wrapped into rows; pooled to fit.

    Args:
        probability: (tokens,) probabilities by example and position.
        lengths: Tokens of each target.
        rows: Largest number of rows.
        columns: Largest number of columns.

    Returns:
        Probabilities; NaN where a row is shorter than the others.
    """
    if len(lengths) == 1:
        flat = pool_min(probability[None], 1, rows * columns)[0]
        # A target that needs few cells is drawn twice as wide as high, and at least 8 cells wide if it has them.
        wide = min(columns, max(8, int(np.ceil(np.sqrt(2 * len(flat))))), len(flat))
        table = np.full((-(-len(flat) // wide), wide), np.nan)
        table.ravel()[: len(flat)] = flat
        return table
    # Without a table of all pairs by all positions: one long target among many pairs would make it huge.
    sizes = np.asarray(lengths)
    row, cells_down = _cell_of(len(sizes), rows)
    column, cells_across = _cell_of(int(sizes.max()), columns)
    position = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    flat = np.full(cells_down * cells_across, np.nan)
    np.fmin.at(flat, np.repeat(row, sizes) * cells_across + column[position], probability.astype(flat.dtype))
    return flat.reshape(cells_down, cells_across)


def grid_image(probability: Floats, lengths: Sequence[int], threshold: float = 0.5, title: str = "") -> Pixels:
    """(H, W, 3) picture of every target token at one look.

    Args:
        probability: (tokens,) probabilities by example and position.
        lengths: Tokens of each target.
        threshold: Where the colours jump.
        title: A line above the picture.
    """
    table = token_grid(probability, lengths)
    rows, columns = table.shape
    if len(lengths) == 1:
        pooled = len(probability) > table.size
        in_row = round(columns * max(1.0, len(probability) / table.size))
        across, right, down = f"token (rows of {in_row})", in_row - 1, ("0", str(len(probability) - 1))
    else:
        pooled = len(lengths) > rows or max(lengths) > columns
        across, right, down = "position in target", max(lengths) - 1, ("pair 0", f"pair {len(lengths) - 1}")
    return _framed(colours(table, threshold), title, across, pooled, right, down, threshold)


def history_image(history: History, threshold: float = 0.5, title: str = "") -> Pixels:
    """(H, W, 3) picture of a run: looks from top to bottom, target tokens by position from left to right.

    Args:
        history: The looks of the run.
        threshold: Where the colours jump.
        title: A line above the picture.
    """
    by_position = history.probability[:, np.lexsort((history.example_id, history.position))]
    pixels = colours(pool_min(by_position, HEIGHT // LEAST_CELL, WIDTH), threshold)
    looks, tokens = by_position.shape
    pooled, right = tokens > WIDTH or looks > HEIGHT // LEAST_CELL, int(history.position.max())
    down = (f"step {history.step[0]}", f"step {history.step[-1]}")
    return _framed(pixels, title, "position in target", pooled, right, down, threshold)


def _ramp(stops: Sequence[tuple[int, int, int]]) -> npt.NDArray[np.float64]:
    """(SHADES, 3) colours interpolated between the stops."""
    places = np.linspace(0, len(stops) - 1, SHADES)
    return np.stack([np.interp(places, range(len(stops)), channel) for channel in zip(*stops, strict=True)], axis=1)


def _framed(
    pixels: Pixels, title: str, across: str, pooled: bool, right: int, down: tuple[str, str], threshold: float
) -> Pixels:
    """The cells as squares or bars, with a title, the ends of both axes, and a colour key."""
    rows, columns = pixels.shape[:2]
    wide, high = max(1, min(24, WIDTH // columns)), max(1, min(24, HEIGHT // rows))
    body = pixels.repeat(high, axis=0).repeat(wide, axis=1)
    height, width = body.shape[:2]
    font = ImageFont.load_default(size=15)
    # Wide enough for the labels of long runs and of many pairs.
    left = max(LEAST_LEFT, *(math.ceil(font.getlength(label)) + 12 for label in down))
    picture = Image.new("RGB", (left + max(width, LEAST_WIDTH) + 16, MARGIN_TOP + height + MARGIN_BOTTOM), PAPER)
    picture.paste(Image.fromarray(body), (left, MARGIN_TOP))
    draw = ImageDraw.Draw(picture)

    def write(x: float, y: float, text: str, anchor: str) -> None:
        draw.text((x, y), text, fill=INK, font=font, anchor=anchor)

    write(left, MARGIN_TOP - 8, title, "ls")
    if rows == 1:
        write(left - 6, MARGIN_TOP + height / 2, down[0], "rm")
    else:
        write(left - 6, MARGIN_TOP, down[0], "rt")
        write(left - 6, MARGIN_TOP + height, down[1], "rb")
    below = MARGIN_TOP + height + 4
    write(left, below, f"0 … {right}  {across}{', smallest of neighbours' if pooled else ''}", "lt")
    # The key: both ramps side by side with their ends numbered.
    x, y, half = left, below + 28, 6 * SHADES
    for start, ramp in ((x, _ramp(BELOW)), (x + half + 8, _ramp(ABOVE))):
        bar = ramp.astype(np.uint8)[None].repeat(12, axis=0).repeat(6, axis=1)
        picture.paste(Image.fromarray(bar), (start, y))
    write(x, y + 15, "p = 0", "lt")
    write(x + half + 4, y + 15, f"{threshold:g}", "mt")
    write(x + 2 * half + 8, y + 15, "1", "rt")
    write(x + 2 * half + 16, y + 6, "certain", "lm")
    return np.asarray(picture)
