"""Measure how many bits a trainable parameter stores on your backbone, for `pml plan PAIRS`.

Adapters of rank 1 are trained on pairs of random tokens, more than they hold, with the rate, guard and penalty of `pml
memorize`. What comes out is a mean with its 95 % interval, and with --out a file that `pml plan PAIRS --constants
FILE` takes.
"""

from pathlib import Path

import jsonargparse

from pml.escape import say, say_json

__all__ = ["configure", "run"]


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--backbone", type=str, default="smollm2-135m", help="smollm2-135m, a folder or a hub id")
    parser.add_argument(
        "--placement", type=str | list[str] | None, help="mlp_block, or linear layers of a block; default all of them"
    )
    parser.add_argument("--block", type=int | float | list[int], default=2 / 3, help="block, blocks or depth")
    parser.add_argument("--guard", type=bool, default=True, help="measure adapters that are guarded")
    parser.add_argument("--kl_penalty", type=bool, default=True, help="measure adapters that are trained with it")
    parser.add_argument("--texts", type=int, default=3, help="sets of random pairs, with an adapter each")
    parser.add_argument("--steps", type=int, default=300, help="optimiser steps for each set")
    parser.add_argument("--learning_rate", type=float, default=0.03, help="peak learning rate of AdamW")
    parser.add_argument("--out", type=Path | None, help="file to write or to add to")
    parser.add_argument("--json", action="store_true", help="print JSON: bits_per_parameter, low, high")


def run(args: jsonargparse.Namespace) -> int:
    """Measure, print and write."""
    # Imported here because it takes seconds, which --help need not wait for.
    from pml.calibration import calibrate
    from pml.guard import GuardConfig
    from pml.kl_penalty import KlPenaltyConfig
    from pml.lightning_cli import prepare
    from pml.records import write_json
    from pml.storage_constants import CONSTANTS_VERSION, ConstantsFile, read_constants_file

    prepare()
    if args.out is not None and args.out.exists():
        # Before it is measured for long, that there is a place for what comes out.
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
        # Another calibration may have written meanwhile.
        known = read_constants_file(args.out).constants if args.out.exists() else []
        same = ("placement", "guarded", "source")
        others = [other for other in known if any(getattr(other, name) != getattr(constant, name) for name in same)]
        content = ConstantsFile(version=CONSTANTS_VERSION, constants=[constant, *others])
        write_json(args.out, content.model_dump(mode="json"))
        if not args.json:
            say(f"{args.out}: pml plan PAIRS --constants {args.out}")
    return 0
