"""The section about target tokens: learning curves, phases, first failures, targets one by one, and stubborn tokens.

Histories are read one at a time. Of each, only curves and first positions are kept; one history per method, the
example, is kept whole.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pml.corpus_file import CORPUS_NAME, read_targets
from pml.errors import InputError
from pml.escape import shortened
from pml.figures import Curves, first_failure_figure, learning_figure, phases_figure
from pml.last_seen import TokenStates
from pml.records import Record
from pml.report.parts import Panel, Section, draw, spans
from pml.stubborn import stubborn_table, visible_text
from pml.tables import TextTable, count, show_percent
from pml.token_history import HISTORY_NAME, History, read_history
from pml.token_results import FirstPositions, TokenResults, first_positions, rank_correlation, read_tokens

__all__ = ["curves_of", "training_part"]

THRESHOLD = 0.5
# Stands for probabilities that float32 rounds to 0: a loss of about 100 nats.
SMALLEST = 1e-44
MOST_TARGETS, MOST_TOKENS, MOST_LETTERS = 12, 5, 60
LAST_SCORED = "Between the first and the last look, each token counts as training last scored it."


class Example(NamedTuple):
    """The run of a method whose tokens are shown one by one."""

    record: Record
    folder: Path
    history: History


def training_part(anchor: str, of: str, methods: Mapping[str, Mapping[Path, Record]]) -> Section:
    """Read the histories of finished runs and make the section about their target tokens.

    Args:
        anchor: Prefix of the figures' names.
        of: Whose tokens they are, for the figures' alternative texts.
        methods: Finished runs by the short name of their method and by run folder.
    """
    examples: dict[str, Example] = {}
    curves: dict[Path, Curves] = {}
    kept: dict[Path, str] = {}
    failures, steps = [], []
    common = _common_places(methods)
    unread: dict[Path, str] = {}
    for method, runs in methods.items():
        for path, record in sorted(runs.items(), key=lambda run: _as_example(run[1], common), reverse=True):
            at_look = None
            try:
                # Without a history there may still be the final tokens, in another file.
                history = read_history(path) if (path / HISTORY_NAME).is_file() else None
                if history is not None:
                    examples.setdefault(method, Example(record, path, history))
                    curves[path], at_look = curves_of(history), _first_positions(history)
                    kept[path] = _tokens_kept(history, record)
            except InputError as error:
                unread[path] = str(error)
            try:
                failures.append(at_look[1] if at_look else first_positions(read_tokens(path)))
            except InputError as error:
                unread.setdefault(path, str(error))
            steps += [at_look[0]] if at_look else []
    sample = _sample(kept.values())
    missing = f"Per-token results cannot be read for {count(len(unread), 'run')}; the first error: "
    return Section(
        "Target tokens",
        warnings=[f"{missing}{next(iter(unread.values()))}."] if unread else [],
        panels=[
            *_phase_panel(anchor, of, examples, curves),
            *_learning_panel(anchor, of, methods, curves, sample),
            *_first_failure_panel(anchor, of, failures, steps, sample),
        ],
        tables=[*_target_tables(examples), *_stubborn_tables(examples)],
    )


def _place(record: Record) -> tuple[str, int, int]:
    """Corpus, rank and seed: runs of several methods can be shown side by side if they agree in these."""
    return record.corpus_hash, record.rank, record.seed


def _common_places(methods: Mapping[str, Mapping[Path, Record]]) -> set[tuple[str, int, int]]:
    """Places at which every method that has histories has a run with one."""
    places = (
        {_place(record) for path, record in runs.items() if (path / HISTORY_NAME).is_file()}
        for runs in methods.values()
    )
    found = [of_method for of_method in places if of_method]
    return set.intersection(*found) if found else set()


def _as_example(record: Record, common: set[tuple[str, int, int]]) -> tuple[bool, int, int, int]:
    """Sort key of a method's runs: the example is the largest at a common place, by length and then by rank."""
    return _place(record) in common, record.target_tokens, record.rank, -record.seed


def _labels(examples: Mapping[str, Example]) -> dict[str, str]:
    """A name for each method's example, with rank and length if these differ."""
    sizes = {(run.record.rank, run.record.target_tokens) for run in examples.values()}
    return {method: _label(method, run) if len(sizes) > 1 else method for method, run in examples.items()}


def _label(method: str, run: Example) -> str:
    return f"{method}, rank {run.record.rank:,}, {run.record.target_tokens:,} tokens"


def _tokens_kept(history: History, record: Record) -> str:
    """How many target tokens a history has, of how many; empty if it has all."""
    kept, every = len(history.token_id), record.target_tokens
    return f"{kept:,} of {every:,}" if kept < every else ""


def _sample(kept: Iterable[str]) -> str:
    """A remark about histories that have only some of the target tokens, from what `_tokens_kept` says of each."""
    found = list(dict.fromkeys(filter(None, kept)))
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return f" A sample of the target tokens was kept: {', '.join(found[:3])}{more}." if found else ""


def curves_of(history: History) -> Curves:
    """Shares and mean loss at each look, over the tokens scored by then."""
    known = ~np.isnan(history.probability)
    tokens = known.sum(axis=1).clip(1)
    certain = history.correct & (history.probability > THRESHOLD)
    losses = -np.log(np.where(known, history.probability, 1.0).clip(SMALLEST))
    return Curves(
        step=history.step,
        certain=(certain & known).sum(axis=1) / tokens,
        right=(history.correct & ~certain & known).sum(axis=1) / tokens,
        loss=losses.sum(axis=1) / tokens,
    )


def _first_positions(history: History) -> tuple[int, FirstPositions] | None:
    """Step and first positions of the last look at which at least half of the targets had a wrong token.

    Only looks that have scored every token count. If none fits, the first of them is taken; None if there is none.
    """
    found = None
    for look in range(len(history.step) - 1, -1, -1):
        probability = history.probability[look].astype(np.float64)
        if np.isnan(probability).any():
            continue
        losses = -np.log(probability.clip(SMALLEST))
        tokens = TokenResults(history.example_id, history.position, losses, history.correct[look])
        found = int(history.step[look]), first_positions(tokens)
        if 2 * (found[1].failure < found[1].length).sum() >= len(found[1].length):
            break
    return found


def _phase_panel(anchor: str, of: str, examples: Mapping[str, Example], curves: Mapping[Path, Curves]) -> list[Panel]:
    runs = {_label(method, run): curves[run.folder] for method, run in examples.items()}
    ends = "; ".join(f"{name}: {show_percent(run.certain[-1])} % certain at the end" for name, run in runs.items())
    sample = _sample(_tokens_kept(run.history, run.record) for run in examples.values())
    return draw(
        f"{anchor}-phases",
        "From wrong to certain",
        "Certain: p > 0.5, so that greedy decoding cannot miss the token. Right: the most probable token even so. "
        f"{LAST_SCORED}{sample}",
        f"{of}: shares of target tokens that are wrong, right and certain over optimiser steps. {ends}.",
        phases_figure(runs),
    )


def _learning_panel(
    anchor: str, of: str, methods: Mapping[str, Mapping[Path, Record]], curves: Mapping[Path, Curves], sample: str
) -> list[Panel]:
    ranks = {record.rank for runs in methods.values() for record in runs.values()}
    by_rank = len(methods) == 1 and len(ranks) > 1
    groups: dict[str, list[Curves]] = {}
    for method, runs in methods.items():
        for path, record in sorted(runs.items(), key=lambda item: item[1].rank):
            if path in curves:
                groups.setdefault(f"{record.rank:,}" if by_rank else method, []).append(curves[path])
    return draw(
        f"{anchor}-learning",
        "Learning curves",
        f"Mean loss, in nats per target token, and the share of certain tokens; {count(len(curves), 'run')}.{sample}",
        f"{of}: loss and share of certain tokens over optimiser steps of {count(len(curves), 'run')}.",
        learning_figure(groups, "LoRA rank" if by_rank else "method"),
    )


def _first_failure_panel(
    anchor: str, of: str, failures: list[FirstPositions], steps: list[int], sample: str
) -> list[Panel]:
    if not failures:
        return []
    positions = FirstPositions(*(np.concatenate(column) for column in zip(*failures, strict=True)))
    found = rank_correlation(positions)
    if found is None:
        return []
    rho, remarks = "\N{GREEK SMALL LETTER RHO}", ""
    if steps:
        remarks += f" Each run at the last look at which half of its targets had a wrong token (step {spans(steps)})."
        remarks += f" {LAST_SCORED}"
    if found.unfailing:
        alone = "" if found.rho_of_failing is None else f"; without them {rho} is {found.rho_of_failing:.3f}"
        remarks += f" {count(found.unfailing, 'target')} without a wrong token count as failing at the end{alone}."
    return draw(
        f"{anchor}-first-failure",
        "Where targets first fail",
        f"First wrong token against first token with p <= 0.5, {count(found.targets, 'target')}; "
        f"{rho}: Spearman's rank correlation. No point can lie below the line, so part of the correlation is there "
        f"by construction; the paper reports 0.908.{remarks}{sample}",
        f"{of}: first wrong token against first token with p <= 0.5: Spearman's rho {found.rho:.3f} over "
        f"{count(found.targets, 'target')}.",
        first_failure_figure(positions, found),
    )


# Tables --------------------------------------------------------------------------------------------------------------


def _target_tables(examples: Mapping[str, Example]) -> Iterator[TextTable]:
    """Tables of targets one by one, the weakest first; methods on one corpus stand side by side."""
    by_corpus: dict[str, dict[str, Example]] = {}
    for method, run in examples.items():
        by_corpus.setdefault(run.record.corpus_hash, {})[method] = run
    for of_corpus in by_corpus.values():
        labels = _labels(of_corpus)
        runs = {labels[method]: run for method, run in of_corpus.items()}
        _, folder, history = next(iter(runs.values()))
        ids, starts, lengths = np.unique(history.example_id, return_index=True, return_counts=True)
        if len(ids) < 2:
            continue
        weakest = np.min([np.fmin.reduceat(run.history.probability[-1], starts) for run in runs.values()], axis=0)
        order = np.argsort(weakest, kind="stable")[:MOST_TARGETS]
        try:
            texts = read_targets(folder / CORPUS_NAME, [int(i) for i in ids[order]])
        except InputError:
            texts = {}
        rows = []
        for i in order:
            name = visible_text(texts.get(int(ids[i]), f"number {ids[i]}"))
            states = [_target_state(run.history, slice(starts[i], starts[i] + lengths[i])) for run in runs.values()]
            rows.append((shortened(name, MOST_LETTERS), *chain.from_iterable(states)))
        yield TextTable(
            f"Targets, the {len(order)} weakest of {len(ids):,}" if len(order) < len(ids) else "Targets",
            ("target", *chain.from_iterable((method, "margin") for method in runs)),
            rows,
            words=(0, *range(1, 2 * len(runs) + 1, 2)),
            note="At the end of the run. Margin: by how much the logit of the weakest token exceeds that of the best "
            f"other one.{_sample(_tokens_kept(run.history, run.record) for run in runs.values())}",
            small=True,
        )


def _target_state(history: History, tokens: slice) -> tuple[str, str]:
    right, probability = history.correct[-1, tokens], history.probability[-1, tokens]
    margins = history.margin[-1, tokens]
    margin = "-" if np.isnan(margins).all() else f"{np.nanmin(margins):+.2f}"
    if not right.all():
        return f"fails at token {int(np.argmin(right)) + 1} of {len(right)}", margin
    return "certain" if (probability > THRESHOLD).all() else "right", margin


def _stubborn_tables(examples: Mapping[str, Example]) -> Iterator[TextTable]:
    """One table of the most stubborn tokens of all methods."""
    rows, labels = [], _labels(examples)
    sample = _sample(_tokens_kept(run.history, run.record) for run in examples.values())
    for method, (record, _, history) in examples.items():
        _, starts = np.unique(history.example_id, return_index=True)
        last = TokenStates(
            probability=history.probability[-1],
            correct=history.correct[-1],
            margin=history.margin[-1],
            rival=np.full(len(history.token_id), -1, np.int32),
            first_right=_first_right(history, starts),
        )
        targets = [part.tolist() for part in np.split(history.token_id, starts[1:])]
        table = stubborn_table(last, targets, _text_of(record.backbone), MOST_TOKENS)
        # The pair number is dropped: a history of a long corpus keeps only some pairs and numbers those.
        rows += [(labels[method], *row[1:]) for row in table.rows]
    if rows:
        columns, note = (
            ("method", *table.columns[1:]),
            f"The tokens with the smallest probability p at the end of the run.{sample}",
        )
        yield replace(table, columns=columns, rows=rows, words=(0, 1), note=note).without_empty_columns()


def _first_right(history: History, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Step of the first look at which each target was right at every token; -1 if there was none."""
    whole = np.logical_and.reduceat(history.correct, starts, axis=1)
    return np.where(whole.any(axis=0), history.step[whole.argmax(axis=0)], -1)


@cache
def _text_of(backbone: str) -> Callable[[Sequence[int]], str]:
    """A decoder of token ids if the tokenizer is on this machine, else one that shows ids: a page downloads nothing."""
    # Imported here because they take seconds.
    from pml.backbone import load_tokenizer
    from pml.default_backbone import DEFAULT_BACKBONE, cache_folder

    folder = cache_folder() / DEFAULT_BACKBONE if backbone == DEFAULT_BACKBONE else Path(backbone)
    try:
        # A hub id is no folder, and a name too long for a path raises OSError.
        tokenizer = load_tokenizer(str(folder)) if folder.is_dir() else None
    except (InputError, OSError):
        tokenizer = None
    if tokenizer is None:
        return lambda ids: " ".join(map(str, ids))
    return lambda ids: str(tokenizer.decode(list(ids)))
