"""The certificate pair by pair: what is certain to be recalled, by what margin, and how much rounding it survives.

No other token can beat a target token with p > 0.5. Its margin is its logit minus that of the best other token. Greedy
decoding returns the target unless a server's rounding exceeds one of its margins. In float32 that is possible only
within a hair of p = 0.5. In 16 bits margins move by tenths, so rounding is measured (`measure_rounding`), and a pair is
certain only if its margins are larger.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pml.corpus import Example
from pml.decoding import CachedRows, batches_by_prompt_length, plain_decoding, tokens_at_once, whole_distribution
from pml.positions import max_positions
from pml.served import decoded_together, padded
from pml.token_loss import target_and_best_rival

__all__ = [
    "PairCertificate",
    "Rounding",
    "allow_for_rounding",
    "certify",
    "greedy_answers",
    "log_probability",
    "measure_rounding",
    "sampled_exactly",
    "token_margins",
]

Verdict = Literal["certain", "right", "failing"]

MEASURED_TOKENS = 1024
"""Most target tokens on which rounding is measured; each costs one decoding step."""

TOGETHER = 8
"""Pairs that are decoded together to measure rounding."""


@dataclass(frozen=True)
class PairCertificate:
    """Verdict on one pair under teacher forcing.

    Attributes:
        example: The pair.
        verdict: `certain` if every target token has p > 0.5 and a margin above the rounding allowed for, if any;
            `right` if every target token beats all others; else `failing`.
        position: Index of the first wrong target token if the pair fails, else of the one with the smallest margin.
        margin: Logit of the target token there minus that of the best other token; not above 0 if the pair fails.
        probability: Probability of the target token there.
        rival: Id of the best other token there.
        margins: (tokens,) margin of every target token.
    """

    example: Example
    verdict: Verdict
    position: int
    margin: float
    probability: float
    rival: int
    margins: Tensor


def token_margins(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logit of each target token minus that of the best other token, and the id of that other token.

    Args:
        logits: (tokens, vocabulary).
        targets: (tokens,) ids.

    Returns:
        Margins (tokens,) in float32, and ids (tokens,).

    Example:
        >>> margins, rivals = token_margins(torch.tensor([[1.0, 3.0, 2.5]]), torch.tensor([1]))
        >>> margins.tolist(), rivals.tolist()
        ([0.5], [2])
    """
    own, best, rivals = target_and_best_rival(logits.float(), targets[:, None])
    return (own - best)[:, 0], rivals[:, 0]


class Rounding(NamedTuple):
    """How far margins move between teacher forcing and decoding token by token.

    Attributes:
        logits: Largest change of a margin, in logits.
        tokens: Number of target tokens that were measured.
    """

    logits: float
    tokens: int


def certify(model: Any, examples: Iterable[Example]) -> list[PairCertificate]:
    """Certify pairs one by one under teacher forcing, with no allowance for rounding.

    Args:
        model: A causal LM with its adapter, in evaluation mode.
        examples: The pairs to certify.
    """
    return [_certify(model, example) for example in examples]


def _certify(model: Any, example: Example) -> PairCertificate:
    targets = torch.tensor(example.target_ids, device=model.device)
    pieces, start = [], 0
    for logits in _forced(model, example):
        here = targets[start : start + len(logits)]
        log_p = logits.log_softmax(dim=-1).gather(1, here[:, None])[:, 0]
        pieces.append((*token_margins(logits, here), log_p.exp()))
        start += len(logits)
    margins, rivals, probabilities = (torch.cat(column).cpu() for column in zip(*pieces, strict=True))
    # A NaN margin counts as wrong.
    wrong = (~(margins > 0)).nonzero()
    position = int(wrong[0] if len(wrong) else margins.argmin())
    certain = bool((probabilities > 0.5).all())
    return PairCertificate(
        example=example,
        verdict="failing" if len(wrong) else "certain" if certain else "right",
        position=position,
        margin=float(margins[position]),
        probability=float(probabilities[position]),
        rival=int(rivals[position]),
        margins=margins,
    )


def allow_for_rounding(certificates: Iterable[PairCertificate], logits: float) -> list[PairCertificate]:
    """The same certificates, but with `certain` lowered to `right` where rounding can overcome a margin.

    Args:
        certificates: Certificates from `certify`.
        logits: The most that rounding moves a margin, see `measure_rounding`.
    """
    return [
        replace(known, verdict="right")
        if known.verdict == "certain" and not float(known.margins.min()) > logits
        else known
        for known in certificates
    ]


def measure_rounding(
    model: Any, examples: Sequence[Example], margins: Sequence[Tensor], most_tokens: int = MEASURED_TOKENS
) -> Rounding:
    """Measure how far margins move when target tokens go one by one through the KV cache, alone and in batches.

    Pairs with the smallest margins come first, since rounding overturns their verdicts first.

    Args:
        model: A causal LM with its adapter, in evaluation mode. It may differ from the model that gave the margins, for
            example in dtype.
        examples: The pairs.
        margins: (tokens,) for each pair, from teacher forcing.
        most_tokens: Limit on the number of target tokens to decode.
    """
    order = sorted(range(len(examples)), key=lambda i: float(margins[i].nan_to_num(nan=-math.inf).min()))
    known = dict(zip((e.example_id for e in examples), margins, strict=True))
    chosen, left = list[Example](), most_tokens
    for example in (examples[i] for i in order):
        if left <= 0:
            break
        chosen.append(replace(example, target_ids=example.target_ids[:left]))
        left -= len(example.target_ids)
    batches = list(batches_by_prompt_length(chosen, TOGETHER))
    # Some devices round differently when they decode a single row.
    batches += [[example] for example in chosen[:1]]
    largest = 0.0
    for batch in batches:
        for example, decoded in zip(batch, _margins_one_by_one(model, batch), strict=True):
            before = known[example.example_id][: len(decoded)].to(decoded.device)
            # A NaN margin counts as infinite rounding.
            largest = max(largest, float((decoded - before).abs().nan_to_num(nan=math.inf).max()))
    return Rounding(largest, most_tokens - max(left, 0))


def greedy_answers(
    model: Any, examples: Sequence[Example], *, batch_size: int = 1, use_cache: bool = True
) -> list[tuple[int, ...]]:
    """Ids that transformers' own greedy decoding gives for each example, as many as its target has.

    Args:
        model: A causal LM of transformers with its adapter, in evaluation mode.
        examples: The pairs to ask for.
        batch_size: Prompts decoded together, padded on the left as servers do.
        use_cache: Whether to use the KV cache.
    """
    answers: list[tuple[int, ...]] = [()] * len(examples)
    limit = max_positions(model.config.get_text_config())
    sizes = [(len(e.prompt_ids), len(e.target_ids)) for e in examples]
    for chosen in decoded_together(sizes, batch_size, limit):
        batch = [examples[i] for i in chosen]
        ids, mask = map(torch.tensor, padded([e.prompt_ids for e in batch]))
        with torch.no_grad():
            out = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                do_sample=False,
                max_new_tokens=max(len(e.target_ids) for e in batch),
                use_cache=use_cache,
                # Decoding runs to the end of the longest target; shorter answers are cut below.
                eos_token_id=None,
                pad_token_id=0,
                **plain_decoding(model),
            )
        rows = out[:, ids.shape[1] :].tolist()
        for i, row, e in zip(chosen, rows, batch, strict=True):
            answers[i] = tuple(row[: len(e.target_ids)])
    return answers


def log_probability(model: Any, example: Example, temperature: float = 1.0) -> float:
    """Log probability, in nats, that a sample at some temperature is the whole target.

    Args:
        model: A causal LM with its adapter, in evaluation mode.
        example: The pair.
        temperature: Divisor of the logits.
    """
    total, start = 0.0, 0
    for logits in _forced(model, example):
        targets = torch.tensor(example.target_ids[start : start + len(logits)], device=logits.device)
        scores = (logits / temperature).log_softmax(dim=-1)
        total += float(scores.gather(1, targets[:, None]).cpu().double().sum())
        start += len(logits)
    return total


def sampled_exactly(model: Any, example: Example, samples: int, temperature: float = 1.0) -> float:
    """Share of samples that equal the whole target, drawn by transformers from the whole distribution.

    Args:
        model: A causal LM of transformers with its adapter, in evaluation mode.
        example: The pair.
        samples: Number of samples; PyTorch's global generator draws them.
        temperature: Divisor of the logits.
    """
    ids = torch.tensor([example.prompt_ids], device=model.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=temperature,
            max_new_tokens=len(example.target_ids),
            eos_token_id=None,
            pad_token_id=0,
            **plain_decoding(model) | whole_distribution(model) | {"num_return_sequences": samples},
        )
    rows = out[:, ids.shape[1] :].tolist()
    return sum(tuple(row) == example.target_ids for row in rows) / samples


@torch.no_grad()
def _forced(model: Any, example: Example) -> Iterator[Tensor]:
    """Yield float32 logits (tokens, vocabulary) that predict an example's target tokens, a chunk at a time."""
    ids = torch.tensor([example.prompt_ids + example.target_ids], device=model.device)
    reader, read, done, tokens = CachedRows(model), 0, 0, len(example.target_ids)
    start = len(example.prompt_ids)
    while done < tokens:
        together = tokens_at_once(model, 1)
        end = min(done + (together if reader.can_read_several else 1), tokens)
        yield reader.read(ids[:, read : start + end - 1], end - done)[0]
        read, done = start + end - 1, end


@torch.no_grad()
def _margins_one_by_one(model: Any, batch: Sequence[Example]) -> list[Tensor]:
    """Margins (tokens,) of each target, one token at a time through the KV cache; all prompts are equally long."""
    lengths = [len(e.target_ids) for e in batch]
    targets = torch.tensor([e.target_ids + (0,) * (max(lengths) - n) for e, n in zip(batch, lengths, strict=True)])
    targets = targets.to(model.device)
    step, reader, margins = torch.tensor([e.prompt_ids for e in batch], device=model.device), CachedRows(model), []
    for t in range(max(lengths)):
        margins.append(token_margins(reader.read(step)[:, -1], targets[:, t])[0])
        step = targets[:, t : t + 1]
    return [row[:n] for row, n in zip(torch.stack(margins, dim=1), lengths, strict=True)]
