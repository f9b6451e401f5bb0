"""Show what a run would memorise, before you spend hours on it.

Takes the arguments of `pml fit`: configuration files without --config, and keys that override them, such as
--data.pairs 50. Prints pairs, tokens, information in bits if known, and examples as the model sees them. Without --loss
it loads only the backbone's tokenizer and configuration.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import jsonargparse

from pml.commands._console import one_line
from pml.errors import InputError
from pml.escape import say, say_json

if TYPE_CHECKING:
    from pml.corpus import Corpus, Example
    from pml.modules import Memorization

__all__ = ["configure", "run", "split_arguments"]

OWN_FLAGS = ("--loss", "--json", "--help", "-h")
OWN_VALUES = ("--show",)
SHOWN_TOKENS = 64
MOST_ROWS = 12


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "configs",
        type=Path,
        nargs="*",
        default=[],
        metavar="CONFIG",
        help="configuration files of pml fit; later ones override earlier ones",
    )
    parser.add_argument(
        "--loss", action="store_true", help="load the model and measure its loss, in nats per target token"
    )
    parser.add_argument("--show", type=int, default=3, help="number of examples to print")
    parser.add_argument(
        "--json",
        action="store_true",
        help="print JSON: pairs, target_tokens, prompt_tokens, entropy_bits, tokens_per_target and the rest",
    )


def split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split arguments into the command's own and the keys of `pml fit`, each with their values."""
    own: list[str] = []
    keys: list[str] = []
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, _ = argument.partition("=")
        of_the_run = name.startswith("--") and name not in (*OWN_FLAGS, *OWN_VALUES)
        part = keys if of_the_run else own
        part.append(argument)
        takes_value = name in OWN_VALUES or of_the_run
        if takes_value and not equals and rest and not rest[0].startswith("--"):
            part.append(rest.pop(0))
    return own, keys


def run(args: jsonargparse.Namespace, keys: Sequence[str] = ()) -> int:
    """Make the corpus and print what it holds; 0.

    Args:
        args: The command's own arguments, see `configure`.
        keys: Arguments of `pml fit` that override the configuration files.
    """
    if args.show < 0:
        raise InputError(f"--show is {args.show}; expected 0 or more examples")
    # Imported here so that --help does not wait seconds for it.
    from pml.backbone import load_config, load_tokenizer
    from pml.lightning_cli import make_run
    from pml.positions import max_positions

    files = [argument for path in args.configs for argument in ("--config", str(path))]
    module, data = make_run([*files, *keys])
    if not hasattr(data, "build"):
        raise InputError(f"data is a {type(data).__name__}; expected a corpus, such as data_modules.PhoneBook")
    tokenizer, config = load_tokenizer(module.backbone_name), load_config(module.backbone_name)
    corpus = data.build(tokenizer, int(config.vocab_size), max_positions(config))
    facts = _facts(corpus, getattr(data, "held_out", None), module.backbone_name)
    if args.loss:
        facts["initial_loss"] = _frozen_loss(module, corpus)
    if args.json:
        shown = [_plain(tokenizer, example) for example in corpus.examples[: args.show]]
        say_json({**facts, "examples": shown})
    else:
        _print(facts, corpus)
        _print_examples(tokenizer, corpus.examples[: args.show])
    return 0


def _facts(corpus: "Corpus", held_out: "Corpus | None", backbone: str) -> dict[str, Any]:
    lengths = [len(example.target_ids) for example in corpus.examples]
    return {
        "corpus": corpus.name,
        "backbone": backbone,
        "content_hash": corpus.content_hash,
        "settings": corpus.settings,
        "pairs": len(corpus),
        "facts": len(corpus) if corpus.fact_ids is None else len(set(corpus.fact_ids)),
        "target_tokens": corpus.target_tokens,
        "prompt_tokens": sum(len(example.prompt_ids) for example in corpus.examples),
        "longest_example_tokens": corpus.longest,
        "replaced_tokens": sum(len(example.replaced) for example in corpus.examples),
        "entropy_bits": corpus.entropy_bits,
        "tokens_per_target": {
            "min": min(lengths),
            "median": median(lengths),
            "mean": fmean(lengths),
            "max": max(lengths),
            "counts": dict(sorted(Counter(lengths).items())),
        },
        "held_out_pairs": 0 if held_out is None else len(held_out),
        "held_out_target_tokens": 0 if held_out is None else held_out.target_tokens,
    }


def _frozen_loss(module: "Memorization", corpus: "Corpus") -> float:
    """Mean loss of the frozen model, in nats per target token."""
    from pml.metrics import mean_loss
    from pml.recall import score_examples

    module.configure_model()
    with module.frozen():
        return mean_loss(score_examples(module, corpus.examples)).item()


def _print(facts: dict[str, Any], corpus: "Corpus") -> None:
    from pml.commands._console import make_console
    from pml.tables import TextTable, count, rich_table

    bits, held_out = facts["entropy_bits"], facts["held_out_pairs"]
    rows = {
        "backbone": facts["backbone"],
        "pairs": f"{facts['pairs']:,}",
        "facts": f"{facts['facts']:,}, some asked in several ways" if facts["facts"] < facts["pairs"] else "",
        "target tokens": f"{facts['target_tokens']:,}",
        "put in at random": f"{facts['replaced_tokens']:,} of them" if facts["replaced_tokens"] else "",
        "prompt tokens": f"{facts['prompt_tokens']:,}",
        "longest example": f"{facts['longest_example_tokens']:,} tokens",
        "information": "unknown" if bits is None else f"{bits:,.1f} bits, {bits / corpus.target_tokens:.2f} a token",
        "held out": f"{count(held_out, 'pair')}, {facts['held_out_target_tokens']:,} target tokens" if held_out else "",
        "loss": f"{facts['initial_loss']:.4f} nats per target token, frozen model" if "initial_loss" in facts else "",
        "content hash": facts["content_hash"],
    }
    say(facts["corpus"])
    for name, value in rows.items():
        if value:
            say(f"  {name:<17}{value}")
    lengths = facts["tokens_per_target"]
    spread = ", ".join(f"{name} {lengths[name]:,g}" for name in ("min", "median", "mean", "max"))
    say(f"tokens per target: {spread}")
    targets = [(name, f"{pairs:,}") for name, pairs in _bins(lengths["counts"])]
    make_console().print(rich_table(TextTable("", ("tokens", "targets"), targets, words=())))


def _bins(counts: dict[int, int]) -> Iterator[tuple[str, int]]:
    """Target lengths with their counts; more than `MOST_ROWS` lengths are binned into ranges of equal width."""
    if len(counts) <= MOST_ROWS:
        yield from ((f"{length:,}", count) for length, count in counts.items())
        return
    first, last = min(counts), max(counts)
    width = -(-(last - first + 1) // MOST_ROWS)
    for low in range(first, last + 1, width):
        high = min(low + width - 1, last)
        count = sum(n for length, n in counts.items() if low <= length <= high)
        yield f"{low:,} to {high:,}" if high > low else f"{low:,}", count


def _print_examples(tokenizer: Any, examples: "Sequence[Example]") -> None:
    if not examples:
        return
    replaced = any(example.replaced for example in examples)
    say(f"examples, targets in ⟦ ⟧{', tokens put in at random in ⟨ ⟩' if replaced else ''}:")
    for example in examples:
        prompt = one_line(tokenizer.decode(list(example.prompt_ids)))
        target = "".join(
            f"⟨{one_line(text)}⟩" if random else one_line(text)
            for random, text in _stretches(tokenizer, example, SHOWN_TOKENS)
        )
        more = len(example.target_ids) - SHOWN_TOKENS
        say(f"  {example.example_id}: {prompt}⟦{target}{f'… {more:,} tokens more' if more > 0 else ''}⟧")


def _stretches(tokenizer: Any, example: "Example", limit: int) -> Iterator[tuple[bool, str]]:
    """Text of the first `limit` target tokens, split where tokens put in at random begin and end."""
    replaced = set(example.replaced)
    for random, places in groupby(range(min(limit, len(example.target_ids))), lambda place: place in replaced):
        yield random, tokenizer.decode([example.target_ids[place] for place in places])


def _plain(tokenizer: Any, example: "Example") -> dict[str, Any]:
    return {
        "prompt": tokenizer.decode(list(example.prompt_ids)),
        "target": tokenizer.decode(list(example.target_ids)),
        "target_tokens": len(example.target_ids),
        "replaced": list(example.replaced),
    }
