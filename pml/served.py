"""Answers of a plain server: greedy decoding by transformers and PEFT, in a process that does not import pml.

`serve` runs this file as a script, which reads a job as JSON from stdin and writes the answers to stdout.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pml.corpus import Example
    from pml.encoding import TextEncoder

__all__ = ["decoded_together", "padded", "serve"]

BATCH, BATCH_TOKENS = 32, 16_384
"""Most prompts decoded together, padded on the left as servers do, and their most tokens, answers included."""

BEYOND = 4
"""Tokens by which an answer may exceed its target before it is cut off."""


def serve(
    base: Path,
    adapter: Path,
    examples: "Sequence[Example]",
    encoder: "TextEncoder",
    plain: Mapping[str, Any],
    dtype: str = "float32",
) -> list[str]:
    """The answer to each query as a server shows it, computed in a separate process.

    Args:
        base: The backbone's folder.
        adapter: Folder written by `save_pretrained`, with a placement that plain PEFT can load (not `mlp_block`).
        examples: The pairs to ask for.
        encoder: Turns queries into prompts.
        plain: Further arguments of `generate`, see `pml.decoding.plain_decoding`.
        dtype: Floating-point type of the backbone's weights.

    Raises:
        InputError: If the process fails, with the last line of its stderr.
    """
    import subprocess

    from pml.errors import InputError  # only here, since the process that serves imports nothing of pml

    command = [sys.executable, "-P", __file__]
    job = json.dumps(_job(base, adapter, examples, encoder, plain, dtype))
    done = subprocess.run(command, input=job, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise InputError(f"{adapter}: transformers and PEFT cannot serve it ({last}); expected an adapter of both")
    answers: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answers


def _job(
    base: Path,
    adapter: Path,
    examples: "Sequence[Example]",
    encoder: "TextEncoder",
    plain: Mapping[str, Any],
    dtype: str,
) -> dict[str, Any]:
    """The job for the process that `serve` starts."""
    template = encoder.template
    return {
        "base": str(base),
        "adapter": str(adapter),
        "dtype": dtype,
        "prompts": [
            template.turns(e.query) if template else encoder.plain_request(e.query, e.prompt_ids) for e in examples
        ],
        "before": [] if template else list(encoder.put_before),
        "template": template.options_elsewhere if template else None,
        "end": encoder.end_of_turn_id,
        # Without an end of turn an answer never stops, so it is cut at the length of its target.
        "tokens": [len(e.target_ids) + (0 if encoder.end_of_turn_id is None else BEYOND) for e in examples],
        "plain": dict(plain),
    }


def _answers(job: dict[str, Any]) -> list[str]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    model: Any = AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, job["dtype"]))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = PeftModel.from_pretrained(model, job["adapter"]).eval().to(device)
    prompts = _prompts(tokenizer, job)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # The tokenizer's padding token may lie outside the model's embeddings.
    pad = 0 if job["end"] is None else job["end"]
    sizes = [(len(prompt), tokens) for prompt, tokens in zip(prompts, job["tokens"], strict=True)]
    answers = [""] * len(prompts)
    for batch in decoded_together(sizes, BATCH, limit, BATCH_TOKENS):
        ids, mask = map(torch.tensor, padded([prompts[i] for i in batch]))
        longest, most = ids.shape[1], max(job["tokens"][i] for i in batch)
        out = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            do_sample=False,
            max_new_tokens=most if limit is None else min(most, limit - longest),
            eos_token_id=job["end"],
            pad_token_id=pad,
            **job["plain"],
        )
        for i, row in zip(batch, out[:, longest:], strict=True):
            own = row[: job["tokens"][i]].tolist()
            # Some tokenizers do not mark the end of a turn as special, so decoding would keep it.
            own = own[: own.index(job["end"])] if job["end"] in own else own
            answers[i] = str(tokenizer.decode(own, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return answers


def _prompts(tokenizer: Any, job: dict[str, Any]) -> list[list[int]]:
    """Token ids of the prompts, from text, as a server makes them, unless they are given as ids."""
    if job["template"] is None:
        texts = [prompt for prompt in job["prompts"] if isinstance(prompt, str)]
        encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        return [[*job["before"], *next(encoded)] if isinstance(prompt, str) else prompt for prompt in job["prompts"]]
    how = {"add_generation_prompt": True, "sanitize_control_tokens": True, "return_dict": True, **job["template"]}
    encoded = tokenizer.apply_chat_template(job["prompts"], **how)
    return [list(ids) for ids in encoded["input_ids"]]


def padded(prompts: Sequence[Sequence[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts padded on the left, as servers do, and their attention mask.

    Padded by hand, since a tokenizer may have no padding token.
    """
    longest = max(map(len, prompts))
    ids = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return ids, mask


def decoded_together(
    sizes: Sequence[tuple[int, int]], most: int, limit: int | None, most_tokens: int | None = None
) -> list[list[int]]:
    """Batches of indices of pairs with answers of similar length, since a batch decodes as long as its longest answer.

    Args:
        sizes: Number of tokens in the prompt and the answer of each pair.
        most: Most pairs in a batch.
        limit: Positions of the model, if limited: a batch's longest prompt and longest answer together must fit.
        most_tokens: Most tokens in a batch of several, with every pair counted as long as the longest; None for any.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (sizes[i][1], sizes[i][0])):
        batch = batches[-1] if batches else []
        together = [sizes[j] for j in (*batch, i)]
        longest = max(prompt for prompt, _ in together) + max(answer for _, answer in together)
        fits = limit is None or longest <= limit
        small = most_tokens is None or longest * len(together) <= most_tokens
        if batch and fits and small and len(batch) < most:
            batch.append(i)
        else:
            batches.append([i])
    return batches


if __name__ == "__main__":
    print(json.dumps(_answers(json.load(sys.stdin))))
    known = [name for name in sys.modules if name.partition(".")[0] in ("pml", "callbacks", "data_modules")]
    sys.exit(f"loaded {known}" if known else 0)
