"""Measure how many bits a trainable parameter stores on your backbone, for `pml plan PAIRS`.

Trains adapters of rank 1 on more pairs of random tokens than they can store, with the learning rate, guard and KL
penalty of `pml memorize`. Prints the mean with its 95 % interval; --out writes a file for `pml plan PAIRS --constants
FILE`.
"""

from pathlib import Path

import jsonargparse

from pml.escape import say, say_json

__all__ = ["configure", "run"]


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--backbone", type=str, default="smollm2-135m", help="smollm2-135m, a folder or a hub id")
    parser.add_argument(
        "--placement", type=str | list[str] | None, help="mlp_block, or linear layers of a block; default: all of them"
    )
    parser.add_argument(
        "--block",
        type=int | float | list[int],
        default=2 / 3,
        help="index of a block, list of indices, or fraction of the depth",
    )
    parser.add_argument("--guard", type=bool, default=True, help="train the adapters with the guard")
    parser.add_argument("--kl_penalty", type=bool, default=True, help="train the adapters with the KL penalty")
    parser.add_argument("--texts", type=int, default=3, help="number of sets of random pairs; each trains one adapter")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps per set")
    parser.add_argument("--learning_rate", type=float, default=0.03, help="peak learning rate of AdamW")
    parser.add_argument("--out", type=Path | None, help="file of constants to write, or to add this one to")
    parser.add_argument("--json", action="store_true", help="print JSON: bits_per_parameter, low, high")


def run(args: jsonargparse.Namespace) -> int:
    """Measure, print, and write to `--out` if given; 0."""
    # Imported here so that --help does not wait seconds for it.
    from pml.calibration import calibrate
    from pml.guard import GuardConfig
    from pml.kl_penalty import KlPenaltyConfig
    from pml.lightning_cli import prepare
    from pml.records import write_json
    from pml.storage_constants import CONSTANTS_VERSION, ConstantsFile, read_constants_file

    prepare()
    if args.out is not None and args.out.exists():
        # Refuse a file that cannot be added to before measuring for minutes.
        read_constants_file(args.out)
    constant = calibrate(
        args.backbone,
        args.placement,
        args.block,
        GuardConfig() if args.guard else None,
        KlPenaltyConfig() if args.kl_penalty else None,
        texts=args.texts,
        steps=args.steps,
        learning_rate=args.learning_rate,
        on_text=None if args.json else lambda text, bits: say(f"text {text}: {bits:.3f} bits a parameter"),
    )
    if args.json:
        say_json(constant.model_dump(mode="json"))
    else:
        say(f"{constant.bits_per_parameter:.3f} bits a parameter ({constant.low:.3f} to {constant.high:.3f})")
    if args.out is not None:
        # Read again, since another calibration may have written to it meanwhile.
        known = read_constants_file(args.out).constants if args.out.exists() else []
        same = ("placement", "guarded", "source")
        others = [other for other in known if any(getattr(other, name) != getattr(constant, name) for name in same)]
        content = ConstantsFile(version=CONSTANTS_VERSION, constants=[constant, *others])
        write_json(args.out, content.model_dump(mode="json"))
        if not args.json:
            say(f"{args.out}: pml plan PAIRS --constants {args.out}")
    return 0
