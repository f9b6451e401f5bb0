"""Predict the rank that a text needs, from its surprisal or from a law fitted to your runs.

    pml plan PAIRS.jsonl                                    the rank for these pairs; loads the backbone, trains nothing
    pml plan PAIRS.jsonl --placement mlp_block --guard false
    pml plan LAW.json --length 512                          the smallest rank that recalls everything, by a fitted law
    pml plan LAW.json --length 512 --loss_reduction 6       the smallest rank that lowers the loss by 6 nats per token
    pml plan LAW.json --length 512 --rank 8                 what rank 8 does: loss in nats per token, recall, megabytes
    pml plan LAW.json --length 512 --initial_loss 13.1      given the frozen model's loss on this text

Answers have intervals. They say what they are based on, and warn if the question lies outside the measured range.
"""

from pathlib import Path
from typing import Any

import jsonargparse

from pml.commands._facts import COLUMNS, FACT_FILES, add_column_arguments, read_facts
from pml.errors import InputError
from pml.escape import say, say_json

__all__ = ["configure", "run"]

OF_PAIRS = ("backbone", "placement", "block", "guard", "constants", *COLUMNS)
OF_LAW = ("length", "pairs", "recall", "probability", "loss_reduction", "rank", "initial_loss")


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "what",
        type=Path,
        metavar="PAIRS|LAW.json",
        help="a file of pairs, or the law.json that pml law --out wrote, or its folder",
    )
    parser.add_argument("--backbone", type=str | None, help="pairs: the backbone; default: smollm2-135m")
    parser.add_argument(
        "--placement",
        type=str | list[str] | None,
        help="pairs: mlp_block, or linear layers; default: all linear layers",
    )
    parser.add_argument(
        "--block",
        type=int | float | list[int] | None,
        help="pairs: index of a block, list of indices, or fraction of the depth",
    )
    parser.add_argument("--guard", type=bool | None, help="pairs: whether the adapter has the guard; default: true")
    parser.add_argument("--constants", type=Path | None, help="pairs: file of constants from pml calibrate --out")
    add_column_arguments(parser, "pairs: ")
    parser.add_argument("--length", type=int | None, help="law: target tokens of the corpus, summed over its targets")
    parser.add_argument(
        "--pairs", type=int | None, help="law: number of targets; default: targets as long as in the law's runs"
    )
    parser.add_argument(
        "--recall", type=float | None, help="law: share of the targets to recall word for word; default: 1.0"
    )
    parser.add_argument(
        "--probability",
        type=float | None,
        help="law: probability with which a run must reach --recall; default: 0.5, the median run",
    )
    parser.add_argument(
        "--loss_reduction",
        type=float | None,
        help="law: find the rank for this loss reduction instead, in nats per target token",
    )
    parser.add_argument("--rank", type=int | None, help="law: predict the loss and recall of this rank instead")
    parser.add_argument(
        "--initial_loss",
        type=float | None,
        help="law: the frozen model's loss on this text in nats per target token, as pml data CONFIG --loss prints it; "
        "without it, intervals include the differences between the law's texts, if there are at least 4",
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON, and nothing else")


def run(args: jsonargparse.Namespace) -> int:
    """Answer the question and print it; 0, or 1 if no rank is enough.

    Raises:
        InputError: If the pairs or the law cannot be read, or the options contradict each other.
    """
    of_pairs = args.what.suffix.lower() in FACT_FILES
    for name in OF_LAW if of_pairs else OF_PAIRS:
        if args[name] is not None:
            kind = "a fitted law" if of_pairs else "a file of pairs"
            raise InputError(f"--{name.replace('_', '-')} is only for {kind}, which {args.what} is not; leave it out")
    plan = _of_pairs(args) if of_pairs else _of_law(args)
    if args.json:
        say_json(plan.model_dump(mode="json"))
    else:
        for line in plan.lines():
            say(line)
    return 0 if plan.rank is not None else 1


def _of_pairs(args: jsonargparse.Namespace) -> Any:
    # Imported here so that --help does not wait seconds for it.
    from pml.adapter import AdapterConfig, adapter_for
    from pml.backbone import load_backbone
    from pml.default_backbone import DEFAULT_BACKBONE
    from pml.guard import GuardConfig
    from pml.storage import plan_rank
    from pml.storage_constants import read_constants

    name = args.backbone or DEFAULT_BACKBONE
    constants = read_constants(args.constants)
    facts, backbone = read_facts(args.what, name, args), load_backbone(name)
    block = args.block if args.block is not None else AdapterConfig.block
    adapter = adapter_for(backbone, args.placement, block, None if args.guard is False else GuardConfig())
    return plan_rank(backbone, facts.corpus, adapter, constants)


def _of_law(args: jsonargparse.Namespace) -> Any:
    from pml.law import LAW_NAME, read_law
    from pml.plan import outcome_of_rank, rank_for_loss_reduction, rank_for_recall

    if args.length is None:
        raise InputError("--length is missing; expected the target tokens of the corpus, such as --length 512")
    asked = [name for name in ("recall", "loss_reduction", "rank") if args[name] is not None]
    if len(asked) > 1:
        given = " and ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise InputError(f"{given}: expected one question at a time; leave out all but one")
    if args.probability is not None and asked not in ([], ["recall"]):
        raise InputError(
            f"--probability and --{asked[0].replace('_', '-')}: a probability is only for --recall; leave one out"
        )
    law = read_law(args.what / LAW_NAME if args.what.is_dir() else args.what)
    text = {"pairs": args.pairs, "initial_loss": args.initial_loss}
    if args.rank is not None:
        return outcome_of_rank(law, args.rank, args.length, **text)
    if args.loss_reduction is not None:
        return rank_for_loss_reduction(law, args.length, args.loss_reduction, **text)
    share = 1.0 if args.recall is None else args.recall
    probability = 0.5 if args.probability is None else args.probability
    return rank_for_recall(law, args.length, share, probability=probability, **text)
