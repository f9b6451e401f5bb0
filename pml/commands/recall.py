"""Ask a trained adapter for what it was trained on, by greedy decoding, and compare with what it should say.

ADAPTER is a run's folder (or one with runs below it): backbone, corpus and adapter are taken from there. With --prompt
the adapter answers a text of your own.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jsonargparse

from pml.commands._console import one_line
from pml.errors import InputError

__all__ = ["configure", "run"]


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="run folder, or folder with run folders below it")
    parser.add_argument("--show", type=int, default=5, help="examples to print; all are asked and counted")
    parser.add_argument("--limit", type=int | None, help="ask only for the first so many examples of the corpus")
    parser.add_argument("--prompt", type=str | None, help="answer this text instead of asking for the corpus")
    parser.add_argument("--tokens", type=int, default=64, help="longest answer to --prompt, in tokens")
    parser.add_argument(
        "--json", action="store_true", help="print JSON: exact_match and token_accuracy (shares), examples"
    )


def run(args: jsonargparse.Namespace) -> int:
    """Ask and print."""
    # Imported here because it takes seconds, which --help need not wait for.
    from pml.backbone import shared_backbones
    from pml.records import read_records
    from pml.run_folder import run_folder

    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit is {args.limit}; expected at least 1 example")
    if args.show < 0 or args.tokens < 1:
        raise InputError(f"--show is {args.show}, --tokens is {args.tokens}; expected at least 0 and 1")
    records = read_records([run_folder(args.adapter)])
    for folder, record in records.items():
        if record.status == "diverged":
            print(
                f"note: {folder} diverged: its final loss is not a finite number, so its answers mean nothing",
                file=sys.stderr,
            )
    with shared_backbones():
        results = [_ask(folder, args) for folder in records]
    if args.json:
        print(json.dumps(results, indent=2, ensure_ascii=False))
    else:
        for result in results:
            _print(result, args.show)
    return 0


def _ask(folder: Path, args: jsonargparse.Namespace) -> dict[str, Any]:
    import torch

    from pml.recall import generate_greedily, greedy_recall
    from pml.runs import open_run

    module, data = open_run(folder)
    encoder = data.encoder(module.tokenizer)
    try:
        if args.prompt is not None:
            prompt = torch.tensor([encoder.prompt(args.prompt).ids], device=module.device)
            encoder.warn_of_changes("--prompt")
            with torch.no_grad():
                answer = generate_greedily(module.model, prompt, args.tokens)[0].tolist()
            return {"run": str(folder), "prompt": args.prompt, "answer": encoder.answer(answer)}
        generated = greedy_recall(module, data.corpus.examples[: args.limit])
        tokens = sum(len(g.example.target_ids) for g in generated)
        return {
            "run": str(folder),
            "exact_match": sum(g.exact for g in generated) / len(generated),
            "token_accuracy": sum(g.right_tokens for g in generated) / tokens,
            "examples": [
                {
                    "query": g.example.query,
                    "target": g.example.target
                    if g.example.target is not None
                    else encoder.answer(g.example.target_ids),
                    "generated": encoder.answer(g.token_ids),
                    "exact": g.exact,
                }
                for g in generated
            ],
        }
    finally:
        module.release()


def _print(result: dict[str, Any], show: int) -> None:
    print(result["run"])
    if "answer" in result:
        print(f"  {result['answer']}")
        return
    print(f"  greedy decoding: exact match {result['exact_match']:.4f}, token accuracy {result['token_accuracy']:.4f}")
    for example in result["examples"][:show]:
        mark = "=" if example["exact"] else "!"
        print(f"  {mark} {_short(example['query'])}\n      true     {_short(example['target'])}")
        print(f"      recalled {_short(example['generated'])}")


def _short(text: str) -> str:
    line = one_line(text)
    return line if len(line) <= 90 else f"{line[:87]}..."
