"""The certificate pair by pair: what is certain to be recalled, by what margin, and how much rounding that survives.

A target token with p > 0.5 cannot be beaten by any other. Its margin is how far its logit lies above that of the best
other token; greedy decoding gives the target as long as no margin is overcome by how a server rounds. In float32 that
takes p within a hair of 0.5. In 16 bits margins move by tenths: there it is measured (`measure_rounding`), and a pair
is certain only where its margins are larger.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pml.corpus import Example
from pml.decoding import CachedRows, of_one_prompt_length, plain_decoding, tokens_at_once, whole_distribution
from pml.positions import max_positions
from pml.served import decoded_together, padded

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
"""Target tokens on which rounding is measured at most: each is a step of decoding."""

TOGETHER = 8
"""Pairs that are decoded together for that."""


@dataclass(frozen=True)
class PairCertificate:
    """What can be said of one pair under teacher forcing.

    Attributes:
        example: The pair.
        verdict: `certain` where every target token has p > 0.5 and a margin that rounding cannot overcome, as far as
            that is known; `right` where every one is the argmax; else `failing`.
        position: The first wrong target token where it fails, otherwise the one with the smallest margin; from 0.
        margin: Logit of the token there minus that of the best other token; negative where it fails.
        probability: Probability of the token there.
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
    """By how much each target token's logit exceeds that of the best other token, and which token that is.

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
    scores = logits.float()
    own = scores.gather(1, targets[:, None])[:, 0]
    others = scores.scatter(1, targets[:, None], float("-inf"))
    best, rivals = others.max(dim=1)
    return own - best, rivals


class Rounding(NamedTuple):
    """How far margins move between teacher forcing and decoding token by token.

    Attributes:
        logits: The largest difference seen.
        tokens: On how many target tokens.
    """

    logits: float
    tokens: int


def certify(model: Any, examples: Iterable[Example]) -> list[PairCertificate]:
    """Certify pairs one by one under teacher forcing, with no allowance for rounding.

    Args:
        model: A causal LM, adapter and all, in evaluation mode.
        examples: What it is to recall.
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
    # A margin that is not a number wins nothing.
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
    """The same certificates, where a pair is certain only if no margin of its tokens is overcome by rounding.

    Args:
        certificates: What `certify` gave.
        logits: How far rounding moves a margin at most, see `measure_rounding`.
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
    """How far margins move when target tokens go one by one through the cache of a model, alone and with others.

    The pairs with the smallest margins come first, since what is certain hangs on them.

    Args:
        model: A causal LM, adapter and all, in evaluation mode. It may be another one than that which the margins are
            of: the same in another dtype, for example.
        examples: Pairs.
        margins: (tokens,) of each pair, as known under teacher forcing.
        most_tokens: Target tokens that are decoded at most.
    """
    order = sorted(range(len(examples)), key=lambda i: float(margins[i].min()))
    known = dict(zip((e.example_id for e in examples), margins, strict=True))
    chosen, left = list[Example](), most_tokens
    for example in (examples[i] for i in order):
        if left <= 0:
            break
        chosen.append(replace(example, target_ids=example.target_ids[:left]))
        left -= len(example.target_ids)
    batches = list(of_one_prompt_length(chosen, TOGETHER))
    # What is decoded alone is rounded otherwise on some devices.
    batches += [[example] for example in chosen[:1]]
    largest = 0.0
    for batch in batches:
        for example, decoded in zip(batch, _margins_one_by_one(model, batch), strict=True):
            before = known[example.example_id][: len(decoded)].to(decoded.device)
            # Margins that are not numbers survive no rounding.
            largest = max(largest, float((decoded - before).abs().nan_to_num(nan=math.inf).max()))
    return Rounding(largest, most_tokens - max(left, 0))


def greedy_answers(
    model: Any, examples: Sequence[Example], *, batch_size: int = 1, use_cache: bool = True
) -> list[tuple[int, ...]]:
    """What transformers' own greedy decoding gives for each example, as many ids as its target has.

    Args:
        model: A causal LM of transformers, adapter and all, in evaluation mode.
        examples: What it is asked for.
        batch_size: Prompts decoded together, padded on the left as servers do it.
        use_cache: Whether keys and values are kept from token to token.
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
                # Decoding goes on to the longest target; what comes after a shorter one is cut off.
                eos_token_id=None,
                pad_token_id=0,
                **plain_decoding(model),
            )
        rows = out[:, ids.shape[1] :].tolist()
        for i, row, e in zip(chosen, rows, batch, strict=True):
            answers[i] = tuple(row[: len(e.target_ids)])
    return answers


def log_probability(model: Any, example: Example, temperature: float = 1.0) -> float:
    """Natural logarithm of the probability that a sample at some temperature is the whole target.

    Args:
        model: A causal LM, adapter and all, in evaluation mode.
        example: The pair.
        temperature: What logits are divided by.
    """
    total, start = 0.0, 0
    for logits in _forced(model, example):
        targets = torch.tensor(example.target_ids[start : start + len(logits)], device=logits.device)
        scores = (logits / temperature).log_softmax(dim=-1)
        total += float(scores.gather(1, targets[:, None]).cpu().double().sum())
        start += len(logits)
    return total


def sampled_exactly(model: Any, example: Example, samples: int, temperature: float = 1.0) -> float:
    """Share of samples that are the whole target, by transformers' own sampling from the whole distribution.

    Args:
        model: A causal LM of transformers, adapter and all, in evaluation mode.
        example: The pair.
        samples: How many are drawn; PyTorch's generator decides which.
        temperature: What logits are divided by.
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
    """Logits (tokens, vocabulary) in float32 that predict an example's target tokens, piece by piece."""
    ids = torch.tensor([example.prompt_ids + example.target_ids], device=model.device)
    reader, read, done, tokens = CachedRows(model), 0, 0, len(example.target_ids)
    start = len(example.prompt_ids)
    while done < tokens:
        together = tokens_at_once(model, 1)
        end = min(done + (together if reader.several else 1), tokens)
        yield reader.read(ids[:, read : start + end - 1], end - done)[0]
        read, done = start + end - 1, end


@torch.no_grad()
def _margins_one_by_one(model: Any, batch: Sequence[Example]) -> list[Tensor]:
    """Margins (tokens,) of the target tokens of prompts of one length, token by token through the cache."""
    lengths = [len(e.target_ids) for e in batch]
    targets = torch.tensor([e.target_ids + (0,) * (max(lengths) - n) for e, n in zip(batch, lengths, strict=True)])
    targets = targets.to(model.device)
    step, reader, margins = torch.tensor([e.prompt_ids for e in batch], device=model.device), CachedRows(model), []
    for t in range(max(lengths)):
        margins.append(token_margins(reader.read(step)[:, -1], targets[:, t])[0])
        step = targets[:, t : t + 1]
    return [row[:n] for row, n in zip(torch.stack(margins, dim=1), lengths, strict=True)]
