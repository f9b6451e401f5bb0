"""Ask a trained adapter for what it was trained on, by greedy decoding, and compare with what it should say.

ADAPTER is a run's folder (or one with runs below it): backbone, corpus and adapter are taken from there. With --prompt
the adapter answers a text of your own.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jsonargparse

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
    from pml.records import RECORD_NAME, read_records

    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit is {args.limit}; expected at least 1 example")
    if args.show < 0 or args.tokens < 1:
        raise InputError(f"--show is {args.show}, --tokens is {args.tokens}; expected at least 0 and 1")
    folder = args.adapter.parent if args.adapter.name in ("adapter", RECORD_NAME) else args.adapter
    records = read_records([folder])
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

    from pml.corpus import encode_prompt, end_of_turn_id
    from pml.recall import generate_greedily, greedy_recall
    from pml.runs import open_run

    module, corpus = open_run(folder)
    tokenizer = module.tokenizer
    try:
        if args.prompt is not None:
            asked = {key: corpus.settings[key] for key in ("chat_template", "system") if key in corpus.settings}
            prompt = torch.tensor([encode_prompt(tokenizer, args.prompt, **asked)], device=module.device)
            with torch.no_grad():
                answer = generate_greedily(module.model, prompt, args.tokens)[0].tolist()
            end = end_of_turn_id(tokenizer)
            answer = answer[: answer.index(end)] if end in answer else answer
            return {
                "run": str(folder),
                "prompt": args.prompt,
                "answer": tokenizer.decode(answer, skip_special_tokens=True),
            }
        generated = greedy_recall(module, corpus.examples[: args.limit])
        tokens = sum(len(g.example.target_ids) for g in generated)
        return {
            "run": str(folder),
            "exact_match": sum(g.exact for g in generated) / len(generated),
            "token_accuracy": sum(g.right_tokens for g in generated) / tokens,
            "examples": [
                {
                    "query": _query(tokenizer, g.example.prompt_ids),
                    "target": tokenizer.decode(list(g.example.target_ids), skip_special_tokens=True),
                    "generated": tokenizer.decode(list(g.token_ids), skip_special_tokens=True),
                    "exact": g.exact,
                }
                for g in generated
            ],
        }
    finally:
        module.release()


def _query(tokenizer: Any, prompt_ids: tuple[int, ...]) -> str:
    """The user's words in a prompt, without the turns of the chat template around them."""
    text = tokenizer.decode(prompt_ids, skip_special_tokens=False)
    turns = [turn for turn in _split_at(text, tokenizer.all_special_tokens) if turn.strip()]
    return (turns[-2] if len(turns) > 1 else text).strip().removeprefix("user").strip()


def _split_at(text: str, marks: list[str]) -> list[str]:
    for mark in marks:
        text = text.replace(mark, "\0")
    return text.split("\0")


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
    line = text.replace("\n", "\\n")
    return line if len(line) <= 90 else f"{line[:87]}..."
