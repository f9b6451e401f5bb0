"""The certificate pair by pair: what is certain to be recalled, by what margin, and how much rounding that survives.

A target token with p > 0.5 cannot be beaten by any other. Its margin is how far its logit lies above that of the best
other token; greedy decoding gives the target as long as no margin is overcome by how a server rounds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pml.corpus import Example

__all__ = [
    "PairCertificate",
    "certify",
    "greedy_answers",
    "largest_difference",
    "log_probability",
    "sampled_exactly",
    "token_margins",
]

Verdict = Literal["certain", "right", "failing"]


@dataclass(frozen=True)
class PairCertificate:
    """What can be said of one pair from a single teacher-forced pass.

    Attributes:
        example: The pair.
        verdict: `certain` where every target token has p > 0.5, `right` where every one is the argmax, else `failing`.
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


def certify(model: nn.Module, examples: Iterable[Example]) -> list[PairCertificate]:
    """Certify pairs one by one, each in a teacher-forced pass of its own.

    Args:
        model: A causal LM, adapter and all, in evaluation mode.
        examples: What it is to recall.
    """
    return [_certify(model, example) for example in examples]


def _certify(model: nn.Module, example: Example) -> PairCertificate:
    logits = _forced(model, example)
    targets = torch.tensor(example.target_ids, device=logits.device)
    margins, rivals = token_margins(logits, targets)
    probabilities = logits.float().log_softmax(dim=-1).gather(1, targets[:, None])[:, 0].exp()
    wrong = (margins <= 0).nonzero()
    position = int(wrong[0] if len(wrong) else margins.argmin())
    certain = bool((probabilities > 0.5).all())
    return PairCertificate(
        example=example,
        verdict="failing" if len(wrong) else "certain" if certain else "right",
        position=position,
        margin=float(margins[position]),
        probability=float(probabilities[position]),
        rival=int(rivals[position]),
        margins=margins.cpu(),
    )


def largest_difference(model: nn.Module, certificates: Sequence[PairCertificate]) -> float:
    """By how much a margin differs at most, in logits, when tokens go one by one through the cache of a model.

    The model may be another one than that which the certificates are of: the same in another dtype, for example.

    Args:
        model: A causal LM, adapter and all, in evaluation mode.
        certificates: What `certify` gave.
    """
    return max(
        float((_margins_through_cache(model, known.example) - known.margins).abs().max()) for known in certificates
    )


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
    answers = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        longest = max(len(e.prompt_ids) for e in batch)
        padding = [longest - len(e.prompt_ids) for e in batch]
        ids = torch.tensor([[0] * n + list(e.prompt_ids) for n, e in zip(padding, batch, strict=True)])
        mask = torch.tensor([[0] * n + [1] * (longest - n) for n in padding])
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
            )
        rows = out[:, longest:].tolist()
        answers += [tuple(row[: len(e.target_ids)]) for row, e in zip(rows, batch, strict=True)]
    return answers


def log_probability(model: nn.Module, example: Example, temperature: float = 1.0) -> float:
    """Natural logarithm of the probability that a sample at some temperature is the whole target.

    Args:
        model: A causal LM, adapter and all, in evaluation mode.
        example: The pair.
        temperature: What logits are divided by.
    """
    logits = _forced(model, example)
    targets = torch.tensor(example.target_ids, device=logits.device)
    scores = (logits.float() / temperature).log_softmax(dim=-1)
    return float(scores.gather(1, targets[:, None]).double().sum())


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
            top_k=0,
            top_p=1.0,
            num_return_sequences=samples,
            max_new_tokens=len(example.target_ids),
            eos_token_id=None,
            pad_token_id=0,
        )
    rows = out[:, ids.shape[1] :].tolist()
    return sum(tuple(row) == example.target_ids for row in rows) / samples


def _forced(model: nn.Module, example: Example) -> Tensor:
    """Logits (tokens, vocabulary) that predict an example's target tokens, in one pass."""
    device = next(model.parameters()).device
    ids = torch.tensor([example.prompt_ids + example.target_ids[:-1]], device=device)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, logits_to_keep=len(example.target_ids)).logits[0]
    return logits[-len(example.target_ids) :]


def _margins_through_cache(model: nn.Module, example: Example) -> Tensor:
    device = next(model.parameters()).device
    step, cache, margins = torch.tensor([example.prompt_ids], device=device), None, []
    with torch.no_grad():
        for token in example.target_ids:
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache, target = out.past_key_values, torch.tensor([token], device=device)
            margins.append(token_margins(out.logits[0, -1:], target)[0])
            step = target[None]
    return torch.cat(margins).cpu()
