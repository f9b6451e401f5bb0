"""The model card of an adapter: what it holds, how to load and query it, and what is certain."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pml.certificate import PairCertificate
from pml.corpus import Corpus, Example
from pml.default_backbone import DEFAULT_BACKBONE, name_for_transformers
from pml.encoding import TextEncoder
from pml.measures import CERTAIN
from pml.records import Record

__all__ = ["model_card"]

SHOWN_QUERIES = 20
LONGEST = 120
"""Most characters of a query that the card shows."""

DEQUANTISED = (
    "It was trained on weights that were quantised to 4 bits (Q4_1) and written out as float32 again. On the original "
    "weights the loss differs, and the certificate above does not hold until it is made anew: `pml certify --adapter "
    "FOLDER --data PAIRS --backbone FOLDER_OF_THE_BASE`."
)

PEFT_LOADS = """```python
import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

model = AutoPeftModelForCausalLM.from_pretrained("PATH_TO_THIS_FOLDER", dtype=torch.{dtype})
tokenizer = AutoTokenizer.from_pretrained({base!r})
{ask}
```"""

PML_LOADS = """The adapter runs in parallel with a whole MLP, for which PEFT has no layer; load it with `pml`:

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from pml.adapter import load_adapter

base = AutoModelForCausalLM.from_pretrained({base!r}, dtype=torch.{dtype})
model = load_adapter(base, "PATH_TO_THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained({base!r})
{ask}
```"""

ASK_TEMPLATE = """ids = tokenizer.apply_chat_template(
    {turns},
    add_generation_prompt=True, sanitize_control_tokens=True, return_tensors="pt", return_dict=True,{variables}
)
out = model.generate(**ids, do_sample=False, max_new_tokens={tokens}, eos_token_id={end}{plain})
answer = out[0, ids["input_ids"].shape[1]:].tolist()
{show}"""

ASK_PLAIN = """ids = torch.tensor([{ids}])
out = model.generate(
    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens={tokens}, eos_token_id={end}{plain}
)
answer = out[0, ids.shape[1]:].tolist()
{show}"""

ENCODED = '[*{before}, *tokenizer({text!r}, add_special_tokens=False)["input_ids"]]'

SHOW = "print(tokenizer.decode(answer, skip_special_tokens=True))"
SHOW_UP_TO_THE_END = """answer = answer[:answer.index({end})] if {end} in answer else answer  # not marked as special
print(tokenizer.decode(answer, skip_special_tokens=True))"""


def model_card(
    record: Record,
    corpus: Corpus,
    encoder: TextEncoder,
    plain: Mapping[str, Any],
    served: Sequence[str] | None = None,
    certificates: Sequence[PairCertificate] | None = None,
) -> str:
    """A model card in Markdown, with the YAML header that model hubs read.

    Args:
        record: Record of the run that made the adapter.
        corpus: The memorised corpus; the card shows some of its queries and none of its targets.
        encoder: Encoder that turned the run's text into token ids.
        plain: Arguments of `generate` that turn off the base's changes to logits, see `pml.decoding.plain_decoding`.
        served: Answers of a process with only transformers and PEFT, see `pml.served`; None if there was none.
        certificates: Certificates of all pairs, if they were made; they decide what the card calls certain.
    """
    base = name_for_transformers(record.backbone)
    default = record.backbone == DEFAULT_BACKBONE
    header = {"base_model": base, "library_name": "peft", "pipeline_tag": "text-generation", "tags": ["lora", "pml"]}
    loads = PEFT_LOADS if isinstance(record.placement, list) else PML_LOADS
    parts = [
        f"---\n{''.join(f'{key}: {json.dumps(value)}' + chr(10) for key, value in header.items())}---\n",
        "# A LoRA adapter that holds a corpus word for word\n",
        f"It answers {record.pairs:,} quer{'y' if record.pairs == 1 else 'ies'} of `{record.corpus}` "
        f"({record.target_tokens:,} target tokens) on `{base}`, at rank {record.rank} in block "
        f"{', '.join(map(str, record.block))} ({_placement(record)}; {record.effective_parameters:,} parameters), "
        f"trained with {record.method} for {record.optimizer_steps:,} steps.\n",
        "## What it knows\n",
        _queries(corpus) + "\n",
        "## Load it and ask\n",
        loads.format(base=base, dtype=record.dtype, ask=_ask(corpus, encoder, plain)) + "\n",
        _format(corpus, encoder, plain) + "\n",
        "## What is certain\n",
        _certificate(record, certificates) + _served(corpus, served) + "\n",
        *(["## What it costs\n", _harm(record) + "\n"] if record.harm else []),
        "## The base\n",
        f"`{base}`"
        + (f", under the Apache License 2.0. {DEQUANTISED}" if default else "; its licence applies.")
        + "\n",
    ]
    return "\n".join(parts)


def _queries(corpus: Corpus) -> str:
    shown = [f"- `{' '.join(example.query.replace('`', chr(39)).split())[:LONGEST]}`" for example in corpus.examples]
    more = len(shown) - SHOWN_QUERIES
    return "\n".join([*shown[:SHOWN_QUERIES], *([f"- and {more:,} more"] if more > 0 else [])])


def _served(corpus: Corpus, served: Sequence[str] | None) -> str:
    if served is None:
        return ""
    whole = sum(answer == example.target for answer, example in zip(served, corpus.examples, strict=True))
    return (
        f" In a separate process with only transformers and PEFT, it returned {whole:,} of {len(corpus):,} targets "
        "byte for byte."
    )


def _harm(record: Record) -> str:
    rows = [
        f"| {kind} | {found['loss_before']:.3f} | {found['loss_after']:.3f} |"
        for kind, found in record.harm.items()
        if found["loss_before"] is not None and found["loss_after"] is not None
    ]
    guarded = " The adapter was guarded: it cannot read the directions that ordinary text uses most." * (
        "guard" in record.method_settings
    )
    if "kl_penalty" in record.method_settings:
        guarded += " A KL penalty kept training close to the base model's predictions on other such text."
    return "\n".join(
        [
            f"Loss on ordinary text that it was not trained on, in nats per token.{guarded}\n",
            "| text | base | with the adapter |\n|---|---|---|",
            *rows,
        ]
    )


def _placement(record: Record) -> str:
    return "beside the whole MLP" if isinstance(record.placement, str) else ", ".join(record.placement)


def _ask(corpus: Corpus, encoder: TextEncoder, plain: Mapping[str, Any]) -> str:
    first = corpus.examples[0]
    arguments = "".join(f", {name}={value!r}" for name, value in plain.items())
    # An answer ends by itself, or has to be cut at its length.
    asked = corpus.examples if _ends(first, encoder) else [first]
    tokens = max(len(example.target_ids) for example in asked)
    end = encoder.end_of_turn_id
    show = SHOW_UP_TO_THE_END.format(end=end) if encoder.end_is_text else SHOW
    rest = {"tokens": tokens, "end": end, "plain": arguments, "show": show}
    if encoder.template is None:
        text = encoder.plain_request(first.query, first.prompt_ids)
        encoded = ENCODED.format(before=list(encoder.put_before), text=text)
        return ASK_PLAIN.format(ids=encoded if isinstance(text, str) else text, **rest)
    variables = "".join(f" {key}={value!r}," for key, value in encoder.form.template_kwargs.items())
    if encoder.template.shows_date:
        dates = "".join(f".replace({call!r}, {day!r})" for call, day in encoder.template.fixed_dates.items())
        variables += f"\n    chat_template=tokenizer.get_chat_template(){dates},"
    return ASK_TEMPLATE.format(turns=encoder.template.turns(first.query), variables=variables, **rest)


def _ends(example: Example, encoder: TextEncoder) -> bool:
    """Whether the end of the turn is part of the target."""
    return example.target_ids[-1] == encoder.end_of_turn_id


def _format(corpus: Corpus, encoder: TextEncoder, plain: Mapping[str, Any]) -> str:
    lines = []
    if encoder.template is None:
        lines.append("The query is given as it is, without a chat template.")
    else:
        lines.append("The query is one user turn of the base's chat template.")
        if encoder.form.system is not None:
            lines.append(f"The system prompt is {encoder.form.system!r}.")
        if encoder.form.template_kwargs:
            lines.append(f"Template variables: `{json.dumps(dict(encoder.form.template_kwargs))}`.")
        if encoder.template.shows_date:
            lines.append(f"The template writes the date; training used {encoder.form.template_date}, as the call does.")
    if not _ends(corpus.examples[0], encoder):
        lines.append("Targets do not include the end of the turn: cut each answer at its length.")
    if plain:
        lines.append(
            f"The base's `generation_config.json` sets {', '.join(f'`{name}`' for name in plain)}, which can change "
            "answers even without sampling. The call above turns that off; a server must do the same."
        )
    return " ".join(lines)


def _certificate(record: Record, certificates: Sequence[PairCertificate] | None) -> str:
    right = f"{round(record.exact_match * record.pairs):,} come back whole under teacher forcing"
    if record.generated_exact_match is not None:
        right += f" and {round(record.generated_exact_match * record.pairs):,} by greedy decoding"
    lines = [f"Of {record.pairs:,} targets {right} ({record.dtype})."]
    if record.min_target_probability is not None:
        lines.append(f"The least certain target token has probability {record.min_target_probability:.3f}.")
    verdict = _verdict(record) if certificates is None else _verdict_of(certificates, record.dtype)
    return " ".join([*lines, verdict, "Sampling, other prompts and other dtypes are not covered."])


def _verdict(record: Record) -> str:
    if record.exact_match < 1 or not (record.min_target_probability or 0.0) > CERTAIN:
        return "Some target tokens lie at or below 0.5: what comes back there is not certain."
    above = "Every target token lies above 0.5, where no other token can beat it"
    if record.dtype == "float32":
        return (
            f"{above}: greedy decoding is certain to give every target back, for the prompts above and up to rounding."
        )
    # Margins were checked against rounding only if the fit ended because they exceed it.
    if record.steps_to_recall is None or record.rounding_logits is None:
        return (
            f"{above} except by rounding, which in {record.dtype} is large: `pml certify` says which pairs are certain."
        )
    return (
        f"{above}, and no rounding to {record.dtype} seen on these targets (up to {record.rounding_logits:.2g} in "
        "logits) overcomes its margin: greedy decoding is certain to give every target back, for the prompts above."
    )


def _verdict_of(certificates: Sequence[PairCertificate], dtype: str) -> str:
    certain = sum(known.verdict == "certain" for known in certificates)
    which = "every target" if certain == len(certificates) else f"{certain:,} of {len(certificates):,} targets"
    allowing = "up to rounding" if dtype == "float32" else f"allowing for the rounding to {dtype} seen on these targets"
    return f"Greedy decoding is certain to give {which} back, for the prompts above and {allowing}."
