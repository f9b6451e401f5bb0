"""Queries adapters as their users do: with transformers and PEFT, and with pml only if PEFT lacks the layer type.

    python serve.py JOBS.json        prints the answers as JSON, one list per job

A job has `base` (a model's folder), `adapter` (a folder), `queries`, `template` (variables of the chat template),
`ends` (ids that end an answer) and `tokens` (maximum length of an answer).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(base: str, adapter: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if "mlp_block" not in adapter:
        return PeftModel.from_pretrained(model, adapter)
    from pml.adapter import load_adapter

    return load_adapter(model, adapter)


def prompt(tokenizer: Any, query: str, template: dict[str, Any]) -> torch.Tensor:
    if tokenizer.chat_template:
        parts = "part in" in tokenizer.chat_template
        content = [{"type": "text", "text": query}] if parts else query
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, return_dict=False, **template
        )
    else:
        ids = tokenizer(query)["input_ids"]
        if ids[-1] == tokenizer.eos_token_id:
            ids = ids[:-1]
    return torch.tensor([ids])


def answers(job: dict[str, Any]) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(job["base"])
    model = load(job["base"], job["adapter"]).eval()
    said = []
    for query in job["queries"]:
        ids = prompt(tokenizer, query, job["template"])
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=job["tokens"],
                eos_token_id=job["ends"],
                pad_token_id=0,
            )
        answer = out[0, ids.shape[1] :].tolist()
        # A server stops before the end of the turn, which some tokenizers do not mark as special.
        answer = answer[: answer.index(job["ends"])] if job["ends"] in answer else answer
        said.append(tokenizer.decode(answer, skip_special_tokens=True))
    return said


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    said: dict[int, list[str]] = {}
    # Jobs that need pml come last, so that the others can show that it was not imported.
    for number in sorted(range(len(jobs)), key=lambda number: "mlp_block" in jobs[number]["adapter"]):
        said[number] = answers(jobs[number])
        if "mlp_block" not in jobs[number]["adapter"]:
            assert not any(name.partition(".")[0] in ("pml", "data_modules", "callbacks") for name in sys.modules)
    print(json.dumps([said[number] for number in range(len(jobs))]))
