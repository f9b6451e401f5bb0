"""Ask a fitted law what rank a text needs, or what a rank will do: loss in nats per target token, recall, megabytes.

    pml plan LAW.json --length 512                          the smallest rank that recalls it all
    pml plan LAW.json --length 512 --loss-reduction 6       the smallest rank that lowers the loss by 6 nats per token
    pml plan LAW.json --length 512 --rank 8                 what rank 8 does
    pml plan LAW.json --length 512 --initial-loss 13.1      given the frozen model's loss on this text

Answers have 95 % intervals, and say where the question lies outside what was measured.
"""

import json
from pathlib import Path

import jsonargparse

from pml.errors import InputError

__all__ = ["configure", "run"]


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("law", type=Path, metavar="LAW.json", help="what pml law --out wrote, or the folder it is in")
    parser.add_argument(
        "--length", type=int, required=True, help="target tokens of the corpus, summed over its targets"
    )
    parser.add_argument(
        "--pairs", type=int | None, help="number of targets; by default they are as long as in the law's runs"
    )
    parser.add_argument("--recall", type=float | None, help="share of the targets to recall word for word; default 1.0")
    parser.add_argument(
        "--probability",
        type=float | None,
        help="how likely a run must be to reach --recall; default 0.5, the median run",
    )
    parser.add_argument(
        "--loss-reduction", type=float | None, help="ask for this loss reduction, in nats per target token, instead"
    )
    parser.add_argument("--rank", type=int | None, help="ask what this rank does instead")
    parser.add_argument(
        "--initial-loss",
        type=float | None,
        help="the frozen model's loss on this text, in nats per target token, as pml data CONFIG --loss prints it; "
        "without it the intervals allow for the differences between the law's texts, if there are 4 or more",
    )
    parser.add_argument("--json", action="store_true", help="print the answer as JSON, and nothing else")


def run(args: jsonargparse.Namespace) -> int:
    """Ask, and print the answer; the exit code is 1 where no rank will do.

    Raises:
        InputError: If the law cannot be read or the question makes no sense.
    """
    # Imported here because it takes seconds, which --help need not wait for.
    from pml.law import LAW_NAME, read_law
    from pml.plan import outcome_of_rank, rank_for_loss_reduction, rank_for_recall

    asked = [name for name in ("recall", "loss_reduction", "rank") if args[name] is not None]
    if len(asked) > 1:
        given = " and ".join(f"--{name.replace('_', '-')}" for name in asked)
        raise InputError(f"{given}: expected one question at a time; leave out all but one")
    if args.probability is not None and asked not in ([], ["recall"]):
        raise InputError(
            f"--probability and --{asked[0].replace('_', '-')}: a probability belongs to --recall; leave one out"
        )
    law = read_law(args.law / LAW_NAME if args.law.is_dir() else args.law)
    text = {"pairs": args.pairs, "initial_loss": args.initial_loss}
    if args.rank is not None:
        plan = outcome_of_rank(law, args.rank, args.length, **text)
    elif args.loss_reduction is not None:
        plan = rank_for_loss_reduction(law, args.length, args.loss_reduction, **text)
    else:
        share = 1.0 if args.recall is None else args.recall
        probability = 0.5 if args.probability is None else args.probability
        plan = rank_for_recall(law, args.length, share, probability=probability, **text)
    if args.json:
        print(json.dumps(plan.to_json(), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        for line in plan.lines():
            print(line)
    return 0 if plan.rank is not None else 1
