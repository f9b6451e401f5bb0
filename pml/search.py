"""Search for the best settings of every cell of a grid: many candidates on a small budget, the best on larger ones.

Successive halving (Jamieson and Talwalkar, arXiv 1502.07943): every candidate runs a full schedule with the first
budget, the best run anew with the next, and one runs with the last. If that one diverges, the next best takes its
place. Each run is complete and has its own record, so a search is as seeded, resumable and inspectable as a sweep.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic

from pml.content import Content
from pml.grid import Cell, Grid, expand, read_grid, resolve
from pml.records import write_json
from pml.sweep import Outcome, claims_of, run_cells, set_failures_aside

__all__ = ["SEARCH_NAME", "Candidate", "CellResult", "SearchGrid", "budgets", "read_search", "run_search"]

SEARCH_NAME = "search.json"
EPOCHS = "trainer.max_epochs"

Setting = dict[str, Any]


class SearchGrid(Grid):
    """Content of a search file: a grid, and the settings to try for each of its cells.

    Attributes:
        search: Maps keys of `pml fit` to lists of values to try; every combination is a candidate.
        epochs: Budgets in epochs, ascending; the last is the one meant for the final runs of the grid.
    """

    search: dict[str, list[Any]] = pydantic.Field(min_length=1)
    epochs: list[int] = pydantic.Field(min_length=2)

    @pydantic.model_validator(mode="after")
    def _fits_together(self) -> "SearchGrid":
        if sorted(set(self.epochs)) != self.epochs or self.epochs[0] < 1:
            raise ValueError(f"epochs is {self.epochs}; expected numbers from 1, ascending")
        if empty := [key for key, values in self.search.items() if not values]:
            raise ValueError(f"search key {empty[0]} has no values")
        if twice := [key for key in (*self.search, EPOCHS) if any(key in part for part in self.grid)]:
            raise ValueError(f"{twice[0]} is in the grid too; the search sets it, so take it out of the grid")
        return self


class Candidate(Content):
    """One candidate of one cell.

    Attributes:
        settings: Its settings.
        final_loss: Its final loss in nats by budget in epochs, for those that it has run; None if the run failed or
            diverged.
        failed: Folders of the runs that failed, by budget: such a candidate was not compared fairly.
    """

    settings: Setting
    final_loss: dict[int, float | None]
    failed: dict[int, Path] = pydantic.Field(default_factory=dict)

    def order(self, epochs: int) -> float:
        """Sort key: the final loss with this budget, infinite if that run failed, diverged or does not exist."""
        loss = self.final_loss.get(epochs)
        return math.inf if loss is None else loss


class CellResult(Content):
    """Result of a search for one cell.

    Attributes:
        cell: Settings of the cell.
        chosen: The best settings; None if their run with the last budget failed or diverged.
        failed: Whether that run failed.
        at_the_edge: Keys whose chosen value is the smallest or largest number tried: a better one may lie beyond.
        folder: Folder of that run.
        candidates: All candidates, best first.
    """

    cell: Setting
    chosen: Setting | None
    failed: bool
    at_the_edge: list[str]
    folder: Path
    candidates: list[Candidate]


class SearchResult(Content):
    """The content of `search.json`."""

    schema_version: Literal[1] = 1
    epochs: list[int]
    search: dict[str, list[Any]]
    cells: list[CellResult]


def read_search(path: Path) -> SearchGrid:
    """Read and check a search file.

    Raises:
        InputError: See `pml.grid.read_grid`.
    """
    return read_grid(path, SearchGrid)


def budgets(candidates: int, epochs: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs of the number of candidates and their budget: from all to one, falling by a constant factor.

    Example:
        >>> budgets(4, [50, 100, 200])
        [(4, 50), (2, 100), (1, 200)]
    """
    last = len(epochs) - 1
    # `round` takes off float error before `ceil`: 8 ** (1 - 1 / 3) is 4.000000000000001.
    return [(math.ceil(round(candidates ** (1 - k / last), 9)), budget) for k, budget in enumerate(epochs)]


def run_search(
    grid: SearchGrid,
    start: Callable[[str, list[Cell]], Callable[[Outcome], None]] = lambda *_: lambda _: None,
    retry_failed: bool = False,
) -> list[CellResult]:
    """Run what has no record yet, choose the best settings for each cell, and write them to `search.json` in `out`.

    If the best candidate diverges with the last budget, the next best runs with it. Runs with the last budget are in
    `out/best`, ready for `pml law`: one per cell, plus those that diverged. The others are in `out/N-epochs`.

    Args:
        grid: The search.
        start: Called before each budget's runs with their folder and cells; returns a callback for each outcome.
        retry_failed: Run those again that have failed before.

    Raises:
        InputError: Before anything runs, if `pml fit` would refuse a cell or a candidate.
    """
    search = _Search(grid, start, retry_failed)
    for count, epochs in budgets(len(search.tried), grid.epochs):
        search.run_best(count, epochs)
    while search.replace_diverged():
        pass
    choices = search.choices()
    content = SearchResult(epochs=grid.epochs, search=grid.search, cells=choices)
    write_json(grid.out / SEARCH_NAME, content.model_dump(mode="json"))
    return choices


class _Search:
    """Candidates of each cell, best first, and the outcome of the best one's latest run."""

    def __init__(
        self, grid: SearchGrid, start: Callable[[str, list[Cell]], Callable[[Outcome], None]], retry_failed: bool
    ) -> None:
        self.grid, self._start, self._retry_failed = grid, start, retry_failed
        self.cells, self.tried = expand(grid.grid), expand([grid.search])
        self.standing = [[Candidate(settings=settings, final_loss={}) for settings in self.tried] for _ in self.cells]
        self.outcomes: list[Outcome] = []

    def run_best(self, count: int, epochs: int) -> None:
        """Run the best candidates of each cell with a budget, and sort them by how they did."""
        chosen = [(i, candidate) for i, found in enumerate(self.standing) for candidate in found[:count]]
        self.outcomes = self._run(chosen, epochs)
        for found in self.standing:
            # Only candidates that ran with this budget are compared; the others keep their order behind them.
            found[:count] = sorted(found[:count], key=lambda candidate: candidate.order(epochs))

    def replace_diverged(self) -> bool:
        """Run the next best candidate with the last budget where the best diverged; whether there was one to run.

        A candidate that did well on smaller budgets may diverge with the last one; the next best may not.
        """
        last = self.grid.epochs[-1]
        behind = [
            (i, other)
            for i, (found, outcome) in enumerate(zip(self.standing, self.outcomes, strict=True))
            if outcome.diverged and (other := _next_best(found, last)) is not None
        ]
        for (i, other), outcome in zip(behind, self._run(behind, last) if behind else [], strict=True):
            if not outcome.diverged:
                self.outcomes[i] = outcome
                self.standing[i].remove(other)
                self.standing[i].insert(0, other)
        return bool(behind)

    def choices(self) -> list[CellResult]:
        """The result for each cell, after the runs with the last budget."""
        choices = []
        for cell, candidates, outcome in zip(self.cells, self.standing, self.outcomes, strict=True):
            chosen = candidates[0].settings if outcome.record is not None and not outcome.diverged else None
            choices.append(
                CellResult(
                    cell=cell,
                    chosen=chosen,
                    failed=outcome.record is None,
                    at_the_edge=_at_the_edge(self.grid.search, chosen) if chosen is not None else [],
                    folder=outcome.cell.folder,
                    candidates=candidates,
                )
            )
        return choices

    def _run(self, chosen: list[tuple[int, Candidate]], epochs: int) -> list[Outcome]:
        """Run candidates with one budget and note their final losses."""
        folder = self.grid.out / ("best" if epochs == self.grid.epochs[-1] else f"{epochs}-epochs")
        settings = [self.cells[i] | candidate.settings for i, candidate in chosen]
        runs = resolve(_grid_of_budget(self.grid, settings, epochs, folder))
        if self._retry_failed:
            set_failures_aside(runs, claims_of(runs))
        outcomes = run_cells(runs, self._start(str(folder), runs))
        for (_, candidate), outcome in zip(chosen, outcomes, strict=True):
            candidate.final_loss[epochs] = outcome.record.final_loss if outcome.record is not None else None
            if outcome.record is None:
                candidate.failed[epochs] = outcome.cell.folder
        return outcomes


def _grid_of_budget(grid: SearchGrid, settings: list[Setting], epochs: int, out: Path) -> Grid:
    one_value = [{key: [value] for key, value in (setting | {EPOCHS: epochs}).items()} for setting in settings]
    return Grid(base=grid.base, out=out, grid=one_value)


def _next_best(found: Sequence[Candidate], last: int) -> Candidate | None:
    """The best candidate that has not run with the last budget and never failed or diverged; None if there is none."""
    return next((c for c in found if last not in c.final_loss and None not in c.final_loss.values()), None)


def _at_the_edge(search: dict[str, list[Any]], chosen: Setting) -> list[str]:
    """Keys whose chosen number is the smallest or the largest of those tried."""
    found = []
    for key, values in search.items():
        try:
            # YAML reads 1e-3 as text.
            numbers = [float(value) for value in values if not isinstance(value, bool)]
        except (TypeError, ValueError):
            continue
        if len(numbers) == len(values) > 1 and float(chosen[key]) in (min(numbers), max(numbers)):
            found.append(key)
    return found
