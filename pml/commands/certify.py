"""Certify pair by pair what an adapter is certain to recall, recalls, or fails at, with margins in logits.

RUN is a run's folder: backbone, corpus and adapter are taken from there. For an adapter that somebody else trained,
give --adapter, --data (a file of pairs) and --backbone instead. The pairs are also decoded by transformers' own greedy
decoding: in each of --dtypes, alone and in batches, with and without the cache. The exit code is 0 if every pair is
certain, else 1.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse

from pml.commands._console import make_console, one_line
from pml.commands._facts import add_adapter_arguments, base_of, check_adapter_arguments, read_facts
from pml.errors import InputError
from pml.escape import say, say_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pml.certificate import PairCertificate
    from pml.corpus import Example
    from pml.encoding import TextEncoder

__all__ = ["configure", "run"]

BATCH = 8
SHORT = 34
"""Characters of a query or token that a table shows."""


@dataclass(frozen=True)
class Asked:
    """An adapter and what it is asked for."""

    backbone: str
    dtype: str
    adapter: Path
    examples: "Sequence[Example]"
    encoder: "TextEncoder"


@dataclass(frozen=True)
class Decoding:
    """How one way of decoding went: `exact` is the number of pairs that came back whole."""

    dtype: str
    batch_size: int
    cache: bool
    exact: int


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run", type=Path | None, nargs="?", metavar="RUN", help="run folder")
    add_adapter_arguments(parser)
    parser.add_argument("--limit", type=int | None, help="certify only the first so many pairs")
    parser.add_argument("--show", type=int, default=20, help="pairs to print, the least certain first")
    parser.add_argument("--dtypes", type=list[str], default=["float32", "bfloat16"], help="dtypes to decode in")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON: pairs (verdict, position, margin in logits), decodings, rounding",
    )


def run(args: jsonargparse.Namespace) -> int:
    """Certify, decode, and print."""
    # Imported here because it takes seconds, which --help need not wait for.
    from pml.adapter import load_adapter
    from pml.backbone import DTYPES, load_backbone
    from pml.certificate import certify, largest_difference

    check_adapter_arguments(args)
    if unknown := [name for name in args.dtypes if name not in DTYPES]:
        raise InputError(f"--dtypes has {unknown[0]!r}; expected some of {', '.join(DTYPES)}")
    for name in ("limit", "show"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; expected at least 1 pair")
    asked = _run_to_certify(args) if args.run is not None else _adapter_to_certify(args)
    certificates: list[PairCertificate] = []
    rounding: dict[str, float] = {}
    decodings: list[Decoding] = []
    for dtype in dict.fromkeys([asked.dtype, *args.dtypes]):
        model = load_adapter(load_backbone(asked.backbone, dtype), asked.adapter).eval()
        # The certificate is of the dtype that was trained in; others are held against it.
        certificates = certificates or certify(model, asked.examples)
        if dtype in args.dtypes:
            rounding[dtype] = largest_difference(model, certificates)
            decodings += _decoded(model, asked.examples, dtype)
    if args.json:
        say_json(_plain(asked, certificates, rounding, decodings))
    else:
        _print(asked, certificates, rounding, decodings, args.show)
    return 0 if all(known.verdict == "certain" for known in certificates) else 1


def _run_to_certify(args: jsonargparse.Namespace) -> Asked:
    from pml.run_folder import run_folder
    from pml.runs import open_run

    folder = run_folder(args.run)
    module, data = open_run(folder)
    encoder = data.encoder(module.tokenizer)
    name, dtype, examples = module.backbone.name, module.dtype_name, data.corpus.examples[: args.limit]
    module.release()
    return Asked(name, dtype, folder / "adapter", examples, encoder)


def _adapter_to_certify(args: jsonargparse.Namespace) -> Asked:
    backbone = args.backbone or base_of(args.adapter)
    _, corpus, encoder = read_facts(args.data, backbone)
    return Asked(backbone, "float32", args.adapter, corpus.examples[: args.limit], encoder)


def _decoded(model: Any, examples: "Sequence[Example]", dtype: str) -> Iterator[Decoding]:
    from pml.certificate import greedy_answers

    for batch_size in (1, BATCH):
        for cache in (True, False):
            answers = greedy_answers(model, examples, batch_size=batch_size, use_cache=cache)
            exact = sum(answer == example.target_ids for answer, example in zip(answers, examples, strict=True))
            yield Decoding(dtype, batch_size, cache, exact)


def _print(
    asked: Asked,
    certificates: "Sequence[PairCertificate]",
    rounding: dict[str, float],
    decodings: "Sequence[Decoding]",
    show: int,
) -> None:
    from rich import box
    from rich.table import Table

    counts = Counter(known.verdict for known in certificates)
    say(
        f"{asked.adapter}: of {len(certificates)} pairs {counts['certain']} are certain, {counts['right']} right but "
        f"not certain, {counts['failing']} failing ({asked.dtype}, teacher forcing)"
    )
    console = make_console()
    table = Table("pair", "query", "verdict", "at token", "p", "margin", "next best", box=box.SIMPLE_HEAD)
    ranked = sorted(certificates, key=lambda known: known.margin)
    for known in ranked[:show]:
        example = known.example
        table.add_row(
            str(example.example_id),
            _short(example.query),
            known.verdict,
            f"{known.position + 1} of {len(example.target_ids)}",
            f"{known.probability:.3f}",
            f"{known.margin:+.2f}",
            _short(f"{asked.encoder.decode([known.rival])!r}"),
        )
    console.print(table)
    if len(ranked) > show:
        say(f"{len(ranked) - show} more pairs, with larger margins (--show)")
    ways = Table(
        "decoded in", "prompts", "cache", "came back", "margins move by", "certain beyond that", box=box.SIMPLE_HEAD
    )
    for way in decodings:
        moved = rounding[way.dtype]
        beyond = sum(float(known.margins.min()) > moved for known in certificates)
        ways.add_row(
            way.dtype,
            "one by one" if way.batch_size == 1 else f"{way.batch_size} together",
            "with" if way.cache else "without",
            f"{way.exact} of {len(certificates)}",
            f"up to {moved:.2g}",
            str(beyond),
        )
    console.print(ways)
    sys.stdout.flush()


def _short(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= SHORT else f"{line[: SHORT - 3]}..."


def _plain(
    asked: Asked,
    certificates: "Sequence[PairCertificate]",
    rounding: dict[str, float],
    decodings: "Sequence[Decoding]",
) -> dict[str, Any]:
    return {
        "adapter": str(asked.adapter),
        "backbone": asked.backbone,
        "dtype": asked.dtype,
        "pairs": [
            {
                "example_id": known.example.example_id,
                "query": known.example.query,
                "source": known.example.source,
                "verdict": known.verdict,
                "position": known.position,
                "target_tokens": len(known.example.target_ids),
                "probability": known.probability,
                "margin": known.margin,
                "next_best": asked.encoder.decode([known.rival]),
                "smallest_margin": float(known.margins.min()),
            }
            for known in certificates
        ],
        "margins_move_by": rounding,
        "decodings": [vars(way) for way in decodings],
    }
