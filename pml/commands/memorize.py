"""Train an adapter that recalls every target of a file word for word, and measure the harm to other text.

PAIRS is a file of queries and targets (.jsonl, .csv, .parquet, .yaml). The rank is planned from the surprisal of the
targets, and doubled if it is not enough. Training stops once the probability of every target token exceeds --margin, in
16 bits by more than rounding; a guard and a KL penalty keep the model as it was on other text. Then a process with
transformers and PEFT alone decodes every pair (not with --placement mlp_block, which PEFT cannot load). DIR gets
adapter/ (with a model card), record.json and the other files of a run. The exit code is 0 if every pair is certain and
came back, else 1, and the others are listed. Harm is the rise of the loss on other text, in nats per token.
"""

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse

from pml.commands._console import make_console, one_line
from pml.commands._facts import COLUMNS, add_column_arguments
from pml.escape import say, say_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pml.corpus import Corpus
    from pml.epoch_progress import Progress
    from pml.memorizing import Memorized
    from pml.storage import RankPlan

__all__ = ["configure", "run"]

SHOWN = 20
"""Maximum number of failed pairs that are listed."""


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "pairs", type=Path, metavar="PAIRS", help="file of queries and targets, as data_modules.Facts reads it"
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="folder for the adapter, its record and its pairs"
    )
    parser.add_argument("--backbone", type=str, default="smollm2-135m", help="smollm2-135m, a folder or a hub id")
    parser.add_argument(
        "--dtype", type=str, default="float32", help="dtype of the frozen weights: float32, bfloat16 or float16"
    )
    parser.add_argument(
        "--rank",
        type=int | None,
        help="LoRA rank to start from, doubled if need be; default: the planned rank, at least 8",
    )
    parser.add_argument(
        "--placement",
        type=str | list[str] | None,
        help="linear layers of a block, or mlp_block, which plain PEFT cannot load; default: all linear layers",
    )
    parser.add_argument(
        "--block",
        type=int | float | list[int],
        default=2 / 3,
        help="index of a block, list of indices, or fraction of the depth",
    )
    parser.add_argument(
        "--guard", type=bool, default=True, help="keep the adapter from reading what ordinary text uses"
    )
    parser.add_argument(
        "--kl_weight", type=float, default=16.0, help="weight of the KL penalty on ordinary text; 0: no penalty"
    )
    parser.add_argument("--learning_rate", type=float, default=0.03, help="peak learning rate of AdamW")
    parser.add_argument(
        "--margin",
        type=float,
        default=0.6,
        help="probability that every target token has to exceed; above 0.5 a token is certain",
    )
    add_column_arguments(parser)
    parser.add_argument("--seed", type=int, default=42, help="seed of the adapter and of the order of the pairs")
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that is not empty")
    parser.add_argument(
        "--json", action="store_true", help="print JSON: pairs (certain, served), rank, steps, harm in nats per token"
    )


def run(args: jsonargparse.Namespace) -> int:
    """Memorise and print the result; 0 if every pair is certain and came back, else 1."""
    # Imported here so that --help does not wait seconds for it.
    from pml.guard import GuardConfig
    from pml.kl_penalty import KlPenaltyConfig
    from pml.lightning_cli import prepare
    from pml.memorizing import memorize

    prepare()
    names = (
        "backbone",
        "dtype",
        "rank",
        "placement",
        "block",
        "learning_rate",
        "margin",
        "seed",
        *(column for column in COLUMNS if args[column] is not None),
    )
    with _Shown(quiet=args.json) as shown:
        made = memorize(
            args.pairs,
            args.out,
            overwrite=args.overwrite,
            guard=GuardConfig() if args.guard else None,
            kl_penalty=KlPenaltyConfig(weight=args.kl_weight) if args.kl_weight else None,
            on_plan=shown.plan,
            on_progress=shown.progress,
            **{name: args[name] for name in names},
        )
    if args.json:
        say_json(_plain(made))
    else:
        _print(made)
    return 1 if made.failed else 0


class _Shown:
    """Shows training: a bar in a terminal, elsewhere a line every 15 seconds."""

    def __init__(self, quiet: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._quiet = quiet
        self._console = make_console(stderr=True)
        self._bar = None
        self._task: Any = None
        self._said = time.monotonic()
        if not quiet and self._console.is_terminal:
            columns = (TextColumn("rank {task.fields[rank]}"), BarColumn(), TextColumn("{task.description}"))
            self._bar = Progress(*columns, TextColumn("at most"), TimeRemainingColumn(), console=self._console)

    def __enter__(self) -> "_Shown":
        (self._bar or nullcontext()).__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        (self._bar or nullcontext()).__exit__(*exception)

    def plan(self, corpus: "Corpus", plan: "RankPlan | None", rank: int) -> None:
        if self._quiet:
            return
        lines = plan.lines() if plan else [f"{len(corpus):,} pairs, {corpus.target_tokens:,} target tokens"]
        for line in lines:
            say(line)
        if plan is None or plan.rank != rank:
            say(f"training begins at rank {rank}")

    def progress(self, now: "Progress") -> None:
        text = (
            f"step {now.step} of at most {now.steps}, {now.certain:.1%} of target tokens certain, loss {now.loss:.3f}"
        )
        if self._bar is not None:
            if self._task is None:
                self._task = self._bar.add_task(text, total=now.steps, rank=now.rank)
            self._bar.update(self._task, completed=now.step, total=now.steps, rank=now.rank, description=text)
        elif not self._quiet and time.monotonic() - self._said > 15:
            self._said = time.monotonic()
            say(f"rank {now.rank}: {text}", to=sys.stderr)


def _print(made: "Memorized") -> None:
    pairs, failed = len(made.certificates), made.failed
    certain = sum(known.verdict == "certain" for known in made.certificates)
    say(f"{certain} of {pairs} pairs are certain at rank {made.rank} after {made.steps} steps ({made.seconds:.0f} s)")
    if made.served is not None:
        whole = sum(a == known.example.target for a, known in zip(made.served, made.certificates, strict=True))
        say(f"{whole} of {pairs} came back byte for byte from transformers and PEFT alone")
    if made.harm is not None:
        say(f"harm: {made.harm:+.3f} nats a token on other text ({', '.join(_kinds(made))})")
    figures = made.record.corpus_figures
    if (held_out := figures.get("held_out_generated_exact_match")) is not None:
        say(f"{held_out:.1%} of {figures['held_out_pairs']:.0f} held-out wordings are answered as their facts are")
    for known in failed[:SHOWN]:
        where = f"token {known.position + 1}, p {known.probability:.3f}"
        say(f"  {known.verdict}: {one_line(known.example.query)} ({where})")
    if len(failed) > SHOWN:
        say(f"  and {len(failed) - SHOWN} more")
    say(f"adapter: {made.adapter}")


def _kinds(made: "Memorized") -> list[str]:
    kinds = ((kind, found) for kind, found in made.record.harm.items() if kind != "mean")
    losses = ((kind, found["loss_before"], found["loss_after"]) for kind, found in kinds)
    return [f"{kind} {after - before:+.3f}" for kind, before, after in losses if None not in (before, after)]  # type: ignore[operator]


def _plain(made: "Memorized") -> dict[str, Any]:
    answers: Sequence[str | None] = made.served or [None] * len(made.certificates)
    return {
        "adapter": str(made.adapter),
        "plan": made.plan.model_dump(mode="json") if made.plan is not None else None,
        "rank": made.rank,
        "steps": made.steps,
        "seconds": made.seconds,
        "harm": made.record.model_dump(mode="json")["harm"],
        "pairs": [
            {
                "query": known.example.query,
                "verdict": known.verdict,
                "margin": known.margin,
                "probability": known.probability,
                "served": None if answer is None else answer == known.example.target,
            }
            for known, answer in zip(made.certificates, answers, strict=True)
        ],
        "failed": [known.example.query for known in made.failed],
    }
