"""Certify each pair as certain, right or failing, with margins in logits.

RUN is a run folder with backbone, corpus and adapter. For an adapter trained elsewhere, give --adapter and --data (a
file of pairs) instead, and --backbone unless the adapter names its base model. An adapter that lies in a run is
certified in the dtype of that run, any other in the first of --dtypes.

A pair is certain if every target token has p > 0.5 and a margin in logits above the measured rounding, which is how far
margins move, in the dtype of the run, when tokens are decoded one by one with the KV cache. It is right if every target
token beats all others, but not with certainty, and failing if some token does not. transformers' own greedy decoding
then decodes the least certain pairs: in each of --dtypes, alone and in batches, with and without the cache. The exit
code is 0 if every pair is certain and none of them fails to come back in the dtype of the run, else 1.
"""

import logging
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonargparse

from pml.commands._console import make_console, one_line
from pml.commands._facts import add_adapter_arguments, base_of, check_adapter_arguments, read_facts, record_of
from pml.errors import InputError
from pml.escape import say, say_json, shortened

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pml.certificate import PairCertificate, Rounding
    from pml.corpus import Example
    from pml.encoding import TextEncoder

__all__ = ["configure", "run"]

log = logging.getLogger(__name__)

BATCH = 8
SHORT = 34
"""Characters of a query or token that a table shows."""


@dataclass(frozen=True)
class CertifyRequest:
    """An adapter and the pairs to certify."""

    backbone: str
    dtype: str
    adapter: Path
    examples: "Sequence[Example]"
    encoder: "TextEncoder"


@dataclass(frozen=True)
class Decoding:
    """Result of one way of decoding: `exact` of `pairs` pairs came back; `missed` are certain and did not."""

    dtype: str
    batch_size: int
    cache: bool
    pairs: int
    exact: int
    missed: int


@dataclass
class CertifyResult:
    """What was measured.

    Attributes:
        certificates: One for each pair, in the dtype of the run.
        rounding: Rounding in each dtype.
        decodings: Result of each way of decoding.
        turned_off: Settings of the base model's `generation_config` that could change greedy answers.
    """

    certificates: "list[PairCertificate]" = field(default_factory=list)
    rounding: "dict[str, Rounding]" = field(default_factory=dict)
    decodings: list[Decoding] = field(default_factory=list)
    turned_off: list[str] = field(default_factory=list)


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run", type=Path | None, nargs="?", metavar="RUN", help="run folder")
    add_adapter_arguments(parser)
    parser.add_argument("--limit", type=int | None, help="certify only this many pairs, the first ones")
    parser.add_argument("--show", type=int, default=20, help="number of pairs to print, the least certain first")
    parser.add_argument(
        "--tokens",
        type=int,
        default=1024,
        help="maximum number of target tokens to decode, the least certain pairs first",
    )
    parser.add_argument(
        "--dtypes",
        type=str,
        nargs="+",
        default=["float32", "bfloat16"],
        help="dtypes to decode in; 16-bit ones take minutes on a CPU without instructions for them",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON: pairs (verdict, position, margin in logits), decodings, rounding",
    )


def run(args: jsonargparse.Namespace) -> int:
    """Certify, decode and print; 0 if every pair is certain and came back where it was decoded, else 1."""
    # Imported here so that --help does not wait seconds for it.
    import torch

    from pml.backbone import DTYPES
    from pml.devices import free_memory
    from pml.tables import count

    check_adapter_arguments(args)
    if unknown := [name for name in args.dtypes if name not in DTYPES]:
        raise InputError(f"--dtypes has {unknown[0]!r}; expected some of {', '.join(DTYPES)}")
    for name, what in (("limit", "pair"), ("show", "pair"), ("tokens", "token")):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} is {getattr(args, name)}; expected at least 1 {what}")
    asked = _run_to_certify(args) if args.run is not None else _adapter_to_certify(args)
    found = CertifyResult()
    for dtype in dict.fromkeys([asked.dtype, *args.dtypes]):
        free_memory()  # that of the model before it
        try:
            _measure(asked, found, dtype, args.tokens if dtype in args.dtypes else None)
        except torch.OutOfMemoryError:
            if dtype == asked.dtype:
                raise
            log.warning("the model does not fit into memory in %s; the rest holds without it", dtype)
    missed = max((way.missed for way in found.decodings if way.dtype == asked.dtype), default=0)
    if args.json:
        say_json(_plain(asked, found))
    else:
        _print(asked, found, args.show)
    if missed:
        rounding = "its rounding is larger elsewhere than where it was measured, or " * (asked.dtype != "float32")
        log.warning(
            "%s did not come back from transformers' greedy decoding in %s: %ssomething in the base model changes its "
            "answers; compare its generation_config.json with transformers' defaults",
            *(count(missed, "certain pair"), asked.dtype, rounding),
        )
    return 0 if not missed and all(known.verdict == "certain" for known in found.certificates) else 1


def _measure(asked: CertifyRequest, found: CertifyResult, dtype: str, tokens: int | None) -> None:
    """Add what is found in one dtype; the run's own comes first. `tokens` is the most to decode, None for nothing."""
    from pml.adapter import load_adapter
    from pml.backbone import load_backbone
    from pml.certificate import allow_for_rounding, certify, measure_rounding
    from pml.decoding import plain_decoding
    from pml.devices import best_device

    model = load_adapter(load_backbone(asked.backbone, dtype), asked.adapter).eval().to(best_device())
    # Rounding in other dtypes is measured against the margins in the run's own.
    found.certificates = found.certificates or certify(model, asked.examples)
    found.turned_off = list(plain_decoding(model))
    margins = [known.margins for known in found.certificates]
    found.rounding[dtype] = measure_rounding(model, asked.examples, margins)
    if dtype == asked.dtype:
        found.certificates = allow_for_rounding(found.certificates, found.rounding[dtype].logits)
    if tokens is not None:
        found.decodings += _decoded(model, _least_certain(found.certificates, tokens), dtype)


def _run_to_certify(args: jsonargparse.Namespace) -> CertifyRequest:
    from pml.run_folder import run_folder
    from pml.runs import open_run

    folder = run_folder(args.run)
    module, data = open_run(folder)
    encoder = data.encoder(module.tokenizer)
    name, dtype, examples = module.backbone.name, module.dtype_name, data.corpus.examples[: args.limit]
    module.release()
    return CertifyRequest(name, dtype, folder / "adapter", examples, encoder)


def _adapter_to_certify(args: jsonargparse.Namespace) -> CertifyRequest:
    backbone = args.backbone or base_of(args.adapter)
    _, corpus, encoder = read_facts(args.data, backbone, args)
    record = record_of(args.adapter)
    dtype = record.dtype if record is not None else args.dtypes[0]
    return CertifyRequest(backbone, dtype, args.adapter, corpus.examples[: args.limit], encoder)


def _least_certain(certificates: "Sequence[PairCertificate]", tokens: int) -> "list[PairCertificate]":
    """The pairs with the smallest margins, at least one, of at most `tokens` target tokens together."""
    ranked = sorted(certificates, key=lambda known: known.margin)
    total = list(accumulate(len(known.example.target_ids) for known in ranked))
    return ranked[: max(1, bisect_right(total, tokens))]


def _decoded(model: Any, pairs: "Sequence[PairCertificate]", dtype: str) -> Iterator[Decoding]:
    from pml.certificate import greedy_answers

    examples = [known.example for known in pairs]
    for batch_size in (1, BATCH):
        for cache in (True, False):
            answers = greedy_answers(model, examples, batch_size=batch_size, use_cache=cache)
            came_back = [answer == example.target_ids for answer, example in zip(answers, examples, strict=True)]
            lost = (known for known, right in zip(pairs, came_back, strict=True) if not right)
            missed = sum(known.verdict == "certain" for known in lost)
            yield Decoding(dtype, batch_size, cache, len(examples), sum(came_back), missed)


def _print(asked: CertifyRequest, found: CertifyResult, show: int) -> None:
    from pml.tables import TextTable, rich_table

    certificates, rounding = found.certificates, found.rounding
    certain = [known for known in certificates if known.verdict == "certain"]
    counts = Counter(known.verdict for known in certificates)
    say(
        f"{asked.adapter}: of {len(certificates)} pairs {counts['certain']} are certain, {counts['right']} right but "
        f"not certain, {counts['failing']} failing ({asked.dtype}; rounding moves margins by up to "
        f"{rounding[asked.dtype].logits:.2g} logits, measured on {rounding[asked.dtype].tokens} tokens)"
    )
    if found.turned_off:
        say(
            f"the base model's generation_config sets {', '.join(found.turned_off)}, which can change answers; pml "
            "turns this off, and a server has to turn it off as well"
        )
    console = make_console()
    pairs = [
        (
            str(known.example.example_id),
            shortened(one_line(known.example.query), SHORT),
            known.verdict,
            f"{known.position + 1} of {len(known.example.target_ids)}",
            f"{known.probability:.3f}",
            f"{known.margin:+.2f}",
            shortened(one_line(f"{asked.encoder.decode([known.rival])!r}"), SHORT),
        )
        for known in sorted(certificates, key=lambda known: known.margin)[:show]
    ]
    of_pair = ("pair", "query", "verdict", "at token", "p", "margin", "next best")
    console.print(rich_table(TextTable("", of_pair, pairs, words=range(7))))
    if len(certificates) > show:
        say(f"{len(certificates) - show} more pairs, with larger margins (--show)")
    ways = [
        (
            way.dtype,
            "one by one" if way.batch_size == 1 else f"{way.batch_size} together",
            "with" if way.cache else "without",
            f"{way.exact} of {way.pairs}",
            f"up to {rounding[way.dtype].logits:.2g}",
            str(sum(known.margin > rounding[way.dtype].logits for known in certain)),
        )
        for way in found.decodings
    ]
    of_way = ("decoded in", "prompts", "cache", "came back", "margins move by", "certain beyond that")
    console.print(rich_table(TextTable("", of_way, ways, words=range(6))))
    sys.stdout.flush()


def _plain(asked: CertifyRequest, found: CertifyResult) -> dict[str, Any]:
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
            for known in found.certificates
        ],
        "margins_move_by": {dtype: seen.logits for dtype, seen in found.rounding.items()},
        "margins_measured_on_tokens": {dtype: seen.tokens for dtype, seen in found.rounding.items()},
        "decodings": [vars(way) for way in found.decodings],
        "generation_config_turned_off": found.turned_off,
    }
