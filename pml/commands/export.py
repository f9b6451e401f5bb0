"""Write a run's model as a plain transformers folder, with the adapter merged into the weights.

RUN is a run folder; loading the result needs no PEFT. The merged model is checked before it is written: it has to
return every target that greedy decoding recalls with the adapter. Its generation_config.json decodes greedily and ends
answers where the chat template does. The paper's placement, parallel to a whole MLP (mlp_block), corresponds to no
single weight matrix and cannot be merged.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonargparse

from pml.errors import InputError
from pml.escape import say

__all__ = ["configure", "run"]

REFINEMENTS = (
    "early_stopping",
    "length_penalty",
    "output_scores",
    "output_logits",
    "output_attentions",
    "output_hidden_states",
)
"""Generation settings that transformers refuses to save without the setting that they refine."""


def configure(parser: jsonargparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write; must not exist yet")
    parser.add_argument(
        "--merge", action="store_true", help="required; the unmerged adapter is already in the run folder"
    )


def run(args: jsonargparse.Namespace) -> int:
    """Merge, check and write; 0 if every recalled target still comes back, else 1, and nothing is written."""
    # Imported here so that --help does not wait seconds for it.
    from pml.certificate import greedy_answers
    from pml.decoding import plain_decoding
    from pml.default_backbone import quiet_transformers
    from pml.run_folder import run_folder
    from pml.runs import open_run

    if not args.merge:
        raise InputError("--merge is missing; the unmerged adapter is already in the run folder, as PEFT saves it")
    if args.out.exists():
        raise InputError(f"--out {args.out} exists; expected a folder that does not exist yet")
    folder = run_folder(args.run)
    module, data = open_run(folder)
    if module.adapter.placement == "mlp_block":
        raise InputError(
            f"{folder}: the adapter runs parallel to a whole MLP (mlp_block), so there is no weight to merge it "
            "into; train with a list of layers, such as --model.adapter.placement [down_proj], or serve it with "
            "pml.adapter.load_adapter"
        )
    examples = data.corpus.examples
    before = greedy_answers(module.model, examples)
    merged = module.model.merge_and_unload()
    after = greedy_answers(merged, examples)
    recalled = [a == e.target_ids for a, e in zip(before, examples, strict=True)]
    lost = [e for was, now, e in zip(recalled, after, examples, strict=True) if was and now != e.target_ids]
    if lost:
        say(
            f"{len(lost)} of {sum(recalled)} recalled targets do not come back from the merged weights, such as that "
            f"of {lost[0].query!r}: their margins do not survive rounding to {module.dtype_name}; nothing is written"
        )
        return 1
    turned_off, encoder = plain_decoding(merged), data.encoder(module.tokenizer)
    _decode_as_certified(merged.generation_config, turned_off, encoder.end_of_turn_id)
    dated = encoder.template is not None and encoder.template.shows_date
    if dated:
        module.tokenizer.chat_template = encoder.template.options_elsewhere["chat_template"]
    partial = args.out.with_name(f".{args.out.name}.{os.getpid()}")
    try:
        with quiet_transformers():
            merged.save_pretrained(partial)
            module.tokenizer.save_pretrained(partial)
        partial.rename(args.out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    if turned_off:
        say(f"its generation_config.json omits the base model's {', '.join(turned_off)}, which change greedy answers")
    if dated:
        say(f"its chat template writes {encoder.form.template_date}, the date of training, in place of today's")
    say(f"{args.out}: {sum(recalled)} of {len(examples)} targets come back from it, as from the adapter")
    return 0


def _decode_as_certified(config: Any, turned_off: Mapping[str, Any], end: int | None) -> None:
    """Make greedy decoding that stops at the end of the turn the default of whatever serves the folder."""
    from pml.decoding import WHOLE_DISTRIBUTION

    # transformers refuses to save settings of sampling beside greedy decoding.
    unset = dict.fromkeys((*REFINEMENTS, "temperature", *WHOLE_DISTRIBUTION))
    for name, value in {**unset, "do_sample": False, **turned_off}.items():
        setattr(config, name, value)
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if end is not None and end not in ends:
        config.eos_token_id = [*(known for known in ends if known is not None), end]
