"""What a server answers: transformers and PEFT with greedy decoding, in a process that knows nothing of pml.

`serve` starts this very file as a script. It reads a job as JSON from stdin and writes the answers to stdout.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pml.corpus import Example
    from pml.encoding import TextEncoder

__all__ = ["serve"]

BATCH = 32
"""Prompts decoded together, padded on the left as servers do it."""

BEYOND = 4
"""Tokens that an answer may be too long by before it is cut off."""


def serve(
    base: Path,
    adapter: Path,
    examples: "Sequence[Example]",
    encoder: "TextEncoder",
    plain: Mapping[str, Any],
    dtype: str = "float32",
) -> list[str]:
    """The answer to each query as a server shows it, from a process of its own.

    Args:
        base: The backbone's folder.
        adapter: What `save_pretrained` wrote, of a placement that PEFT has layers for.
        examples: What it is asked for.
        encoder: How queries become prompts.
        plain: Further arguments of `generate`, see `pml.decoding.plain_decoding`.
        dtype: Floating-point type of the base's weights.

    Raises:
        RuntimeError: If that process fails, with what it said last.
    """
    import subprocess

    command = [sys.executable, "-P", __file__]
    job = json.dumps(_job(base, adapter, examples, encoder, plain, dtype))
    done = subprocess.run(command, input=job, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"transformers and PEFT do not serve {adapter}: {done.stderr.strip().splitlines()[-1:]}")
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
    """What that process is told; see `serve`."""
    template = encoder.template
    return {
        "base": str(base),
        "adapter": str(adapter),
        "dtype": dtype,
        "prompts": [template.turns(e.query) if template else encoder.decode(e.prompt_ids) for e in examples],
        "template": template.options_elsewhere if template else None,
        "end": encoder.end_of_turn_id,
        # Without an end of turn an answer goes on for ever, and is as long as its target.
        "tokens": [len(e.target_ids) + (0 if encoder.end_of_turn_id is None else BEYOND) for e in examples],
        "plain": dict(plain),
    }


def _answers(job: dict[str, Any]) -> list[str]:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job["base"], padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model: Any = AutoModelForCausalLM.from_pretrained(job["base"], dtype=getattr(torch, job["dtype"]))
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = PeftModel.from_pretrained(model, job["adapter"]).eval().to(device)
    answers = [""] * len(job["prompts"])
    # Of one length together: a batch decodes as long as its longest answer.
    order = sorted(range(len(answers)), key=lambda i: job["tokens"][i])
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        prompts = [job["prompts"][i] for i in batch]
        if job["template"] is None:
            ids = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        else:
            ids = tokenizer.apply_chat_template(
                prompts,
                add_generation_prompt=True,
                sanitize_control_tokens=True,
                return_tensors="pt",
                return_dict=True,
                padding=True,
                **job["template"],
            )
        out = model.generate(
            input_ids=ids["input_ids"].to(device),
            attention_mask=ids["attention_mask"].to(device),
            do_sample=False,
            max_new_tokens=max(job["tokens"][i] for i in batch),
            eos_token_id=job["end"],
            pad_token_id=tokenizer.pad_token_id,
            **job["plain"],
        )
        for i, row in zip(batch, out[:, ids["input_ids"].shape[1] :], strict=True):
            own = row[: job["tokens"][i]]
            answers[i] = str(tokenizer.decode(own, skip_special_tokens=True, clean_up_tokenization_spaces=False))
    return answers


if __name__ == "__main__":
    print(json.dumps(_answers(json.load(sys.stdin))))
    known = [name for name in sys.modules if name.partition(".")[0] in ("pml", "callbacks", "data_modules")]
    sys.exit(f"loaded {known}" if known else 0)
