"""Decode greedily what an adapter was trained on, and compare it with the targets.

RUN is a run folder with backbone, corpus and adapter, or a folder with runs below it. For an adapter trained elsewhere,
give --adapter and --data (a file of pairs) instead; the backbone is loaded in float32, or for an adapter that lies in a
run in the dtype of that run. With --prompt the adapter answers a text of your own. --sample also draws samples, and
compares their exact match with the one that the token probabilities predict.
"""

import math
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import jsonargparse

from pml.commands._console import make_console, one_line
from pml.commands._facts import add_adapter_arguments, check_adapter_arguments, open_adapter
from pml.errors import InputError
from pml.escape import say, say_json, shortened

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["configure", "run"]

TOGETHER = 16
"""Examples decoded together, before their answers are shown."""

LONGEST = 160
"""Maximum number of characters of a text that are shown."""


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "run", type=Path | None, nargs="?", metavar="RUN", help="run folder, or folder with run folders below it"
    )
    add_adapter_arguments(parser)
    parser.add_argument("--show", type=int, default=5, help="number of examples to print; all are decoded and counted")
    parser.add_argument("--limit", type=int | None, help="decode only this many examples, the first ones")
    parser.add_argument("--prompt", type=str, help="answer this text instead of the queries of the corpus")
    parser.add_argument("--tokens", type=int, default=64, help="maximum length of the answer to --prompt, in tokens")
    parser.add_argument("--sample", type=int, default=0, help="number of samples to draw for each example")
    parser.add_argument("--temperature", type=float, default=1.0, help="temperature of the samples")
    parser.add_argument(
        "--json", action="store_true", help="print JSON: exact_match and token_accuracy (shares), examples"
    )


def run(args: jsonargparse.Namespace) -> int:
    """Decode and print; 0."""
    # Imported here so that --help does not wait seconds for it.
    from pml.backbone import shared_backbones
    from pml.records import read_records
    from pml.run_folder import run_folder

    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit is {args.limit}; expected at least 1 example")
    if args.show < 0 or args.tokens < 1 or args.sample < 0:
        raise InputError(
            f"--show is {args.show}, --tokens is {args.tokens}, --sample is {args.sample}; expected at least 0, 1 and 0"
        )
    if not args.temperature > 0 or math.isinf(args.temperature):
        raise InputError(f"--temperature is {args.temperature}; expected a number above 0")
    check_adapter_arguments(args)
    records = {} if args.run is None else read_records([run_folder(args.run)])
    for folder, record in records.items():
        if record.status == "diverged":
            say(f"note: {folder} diverged: its final loss is not a finite number, so it is left out", to=sys.stderr)
    folders = [folder for folder, record in records.items() if record.status != "diverged"]
    if records and not folders:
        raise InputError(f"{args.run}: diverged, so it recalls nothing; lower its learning rate and train again")
    with shared_backbones():
        results = [_ask(folder, args) for folder in (folders if args.adapter is None else [args.adapter])]
    if args.json:
        say_json(results)
    return 0


def _ask(folder: Path, args: jsonargparse.Namespace) -> dict[str, Any]:
    from pml.runs import open_run

    module, data = open_run(folder) if args.adapter is None else open_adapter(args)
    encoder = data.encoder(module.tokenizer)
    try:
        if not args.json:
            say(folder)
        return (_answer if args.prompt is not None else _recall)(folder, module, data, encoder, args)
    finally:
        module.release()


def _answer(folder: Path, module: Any, data: Any, encoder: Any, args: jsonargparse.Namespace) -> dict[str, Any]:
    import torch

    from pml.decoding import generate_greedily

    ids, limit = encoder.prompt(args.prompt).ids, module.max_positions
    if limit is not None and len(ids) >= limit:
        raise InputError(f"--prompt has {len(ids)} tokens, and the model takes {limit}; shorten it")
    prompt = torch.tensor([ids], device=module.device)
    tokens = args.tokens if limit is None else min(args.tokens, limit - len(ids))
    encoder.warn_of_changes("--prompt")
    with torch.no_grad():
        answer = encoder.answer(generate_greedily(module.model, prompt, tokens)[0].tolist())
    if not args.json:
        say(f"  {one_line(answer)}")
    return {"run": str(folder), "prompt": args.prompt, "answer": answer}


def _recall(folder: Path, module: Any, data: Any, encoder: Any, args: jsonargparse.Namespace) -> dict[str, Any]:
    console = make_console()
    asked = data.corpus.examples[: args.limit]
    examples: list[dict[str, Any]] = []
    right = 0
    for generated in _in_parts(module, asked):
        example = {
            "query": generated.example.query,
            "target": encoder.answer(generated.example.target_ids),
            "generated": encoder.answer(generated.token_ids),
            "exact": generated.exact,
        }
        if args.sample:
            example |= _sampled(module, generated.example, args)
        if not args.json and len(examples) < args.show:
            _print_example(console, example)
        examples.append(example)
        right += generated.right_tokens
    result = {
        "run": str(folder),
        "exact_match": sum(example["exact"] for example in examples) / len(examples),
        "token_accuracy": right / sum(len(example.target_ids) for example in asked),
    }
    if args.sample:
        for name in ("predicted_exact", "sampled_exact"):
            result[name] = fmean(example[name] for example in examples)
    if not args.json:
        say(
            f"  greedy decoding: exact match {result['exact_match']:.4f}, token accuracy {result['token_accuracy']:.4f}"
        )
        if args.sample:
            say(
                f"  {args.sample} samples each at temperature {args.temperature:g}: exact match "
                f"{result['sampled_exact']:.4f}, predicted {result['predicted_exact']:.4f}"
            )
    return {**result, "examples": examples}


def _in_parts(module: Any, examples: Any) -> Iterator[Any]:
    from pml.recall import greedy_recall

    for start in range(0, len(examples), TOGETHER):
        yield from greedy_recall(module, examples[start : start + TOGETHER])


def _sampled(module: Any, example: Any, args: jsonargparse.Namespace) -> dict[str, float]:
    from pml.certificate import log_probability, sampled_exactly

    return {
        "predicted_exact": math.exp(log_probability(module.model, example, args.temperature)),
        "sampled_exact": sampled_exactly(module.model, example, args.sample, args.temperature),
    }


def _print_example(console: Any, example: dict[str, Any]) -> None:
    from rich.text import Text

    mark = ("=", "green") if example["exact"] else ("!", "bold red")
    console.print(Text.assemble("  ", mark, f" {_short(example['query'])}"), soft_wrap=True)
    console.print(Text.assemble("      true     ", _short(example["target"])), soft_wrap=True)
    console.print(Text.assemble("      recalled ", _marked(example["generated"], example["target"])), soft_wrap=True)
    if not example["exact"]:
        console.print(Text(f"      {_first_difference(example['generated'], example['target'])}"), soft_wrap=True)


def _first_difference(text: str, target: str) -> str:
    if text == target:
        return "the same text from other tokens"
    same = _alike(text, target)
    expected, got = (repr(one_line(string[same : same + 12])) for string in (target, text))
    got = got if text[same:] else "the end"
    return f"first wrong at character {same + 1}: {got} in place of {expected if target[same:] else 'the end'}"


def _marked(text: str, target: str) -> "Text":
    """The recalled text, red from the first wrong character on."""
    from rich.text import Text

    same = _alike(text, target)
    return Text.assemble(_short(text[:same]), (_short(text[same:]), "red"))


def _alike(text: str, target: str) -> int:
    """Length of the common prefix of two texts, in characters."""
    return next((i for i, (a, b) in enumerate(zip(text, target, strict=False)) if a != b), min(len(text), len(target)))


def _short(text: str) -> str:
    return shortened(one_line(text), LONGEST)
