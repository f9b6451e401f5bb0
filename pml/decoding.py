"""Greedy decoding at the speed of reading known text.

A known target need not be decoded token by token. One forward pass over it gives the argmax at every position, and by
causality greedy decoding gives the same tokens up to the first argmax that differs. Only the tokens after that have to
be decoded.

Tokens that are read together round differently from tokens read one by one. So an argmax that beats the next best token
by no more than rounding (`DOUBT`) is not trusted: from there on, decoding goes token by token, as in transformers'
`generate`, and decides. Where two tokens are that close, a server that batches differently may decide differently.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pml.corpus import Example
from pml.token_loss import is_argmax, target_and_best_rival

__all__ = [
    "CachedRows",
    "batches_by_prompt_length",
    "generate_greedily",
    "greedy_tokens",
    "plain_decoding",
    "tokens_at_once",
    "whole_distribution",
]

LOGITS_BYTES = {"cpu": 64 * 2**20}
LOGITS_BYTES_ELSEWHERE = 512 * 2**20
"""Most bytes of float32 logits held at a time, by device type."""

DOUBT = {torch.float32: 64, torch.float64: 64}
DOUBT_IN_16_BITS = 8
"""Margins up to this many machine epsilons of the logits are not trusted. On the default backbone, reading together
moves margins by up to 19 epsilons in float32, where long sums accumulate error, and by up to 4 in bfloat16."""

LEAVES_LOGITS_ALONE: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "min_length": 0,
    "min_new_tokens": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "guidance_scale": None,
    "watermarking_config": None,
    "penalty_alpha": None,
    "dola_layers": None,
    "prompt_lookup_num_tokens": None,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "stop_strings": None,
    "max_time": None,
}
"""Settings of `generate` that alter, fork or end greedy decoding early, at the values that leave it plain."""

WHOLE_DISTRIBUTION: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Settings of `generate` that truncate the sampling distribution, at the values that leave it whole."""


def plain_decoding(model: Any) -> dict[str, Any]:
    """Arguments of `generate` that turn off what the model's own `generation_config` does to logits; often empty.

    Some base models ship a repetition penalty, for example, which `generate` and many servers apply to greedy decoding
    too. A certificate is about the plain logits, so it holds only without such settings.

    Args:
        model: A causal LM of transformers, with or without an adapter.
    """
    return _turned_off(model, LEAVES_LOGITS_ALONE)


def whole_distribution(model: Any) -> dict[str, Any]:
    """Arguments that make `generate` sample from the whole distribution, whatever the base model ships."""
    # Without a setting, `generate` uses a top_k of 50.
    return {"top_k": 0, **_turned_off(model, WHOLE_DISTRIBUTION)}


def _turned_off(model: Any, neutral: Mapping[str, Any]) -> dict[str, Any]:
    config = getattr(model, "generation_config", None)
    return {name: plain for name, plain in neutral.items() if getattr(config, name, None) not in (None, plain)}


class CachedRows:
    """Reads rows of token ids through a causal LM's KV cache, each call continuing where the last one ended.

    Args:
        model: A causal LM of transformers with its adapter, in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._cache: Any = None
        self._ids: Tensor | None = None

    @property
    def can_read_several(self) -> bool:
        """Whether several tokens can be read in the next call with the same result as one by one.

        This holds for the first call, and while all layers cache keys and values. Layers that keep a recurrent state
        (state-space models, linear attention) may be able to advance it by only one token.
        """
        if self._cache is None:
            return self._ids is None
        layers = getattr(self._cache, "layers", (None,))
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)

    def read(self, ids: Tensor, last: int = 1) -> Tensor:
        """Read the next tokens of each row.

        Args:
            ids: (B, n) the tokens that follow those read before. All rows are equally long, without padding or mask.
            last: Number of final positions to return logits for.

        Returns:
            (B, last, vocabulary) float32 logits.
        """
        if self._ids is not None:
            ids = self._ids = torch.cat([self._ids, ids], dim=1)
        out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=last)
        self._cache = getattr(out, "past_key_values", None)
        if self._cache is None:
            # The model returns no KV cache, so every call reads all tokens again.
            self._ids = ids
        return out.logits[:, -last:].float()

    def keep(self, rows: Tensor) -> None:
        """Keep only the rows with these indices; requires `can_read_several`."""
        self._cache.batch_select_indices(rows)


def tokens_at_once(model: Any, rows: int) -> int:
    """Number of tokens of each row to read together so that their logits fit the memory limit."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return max(1, LOGITS_BYTES.get(model.device.type, LOGITS_BYTES_ELSEWHERE) // (4 * rows * vocabulary))


def batches_by_prompt_length(examples: Sequence[Example], batch_size: int) -> Iterator[list[Example]]:
    """Yield batches of examples with equally long prompts, so none are padded, and with targets of similar length."""
    groups: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        groups[len(example.prompt_ids)].append(example)
    for group in groups.values():
        group.sort(key=lambda e: len(e.target_ids))
        yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))


def generate_greedily(model: nn.Module, prompt_ids: Tensor, tokens: int) -> Tensor:
    """Greedy decoding with the KV cache; ties go to the lowest id.

    Args:
        model: A causal LM with its adapter.
        prompt_ids: (B, P) prompts of equal length, without padding or mask.
        tokens: Number of tokens to generate; generation does not stop early.

    Returns:
        (B, tokens) generated ids.
    """
    generated = prompt_ids.new_empty(len(prompt_ids), tokens)
    rows, step = CachedRows(model), prompt_ids
    for t in range(tokens):
        generated[:, t] = rows.read(step)[:, -1].argmax(dim=-1)
        step = generated[:, t : t + 1]
    return generated


def greedy_tokens(
    model: Any, examples: Sequence[Example], batch_size: int = 64, to_the_end: bool = True
) -> dict[int, tuple[int, ...]]:
    """Greedy answer to each example, by example id: as many tokens as its target has.

    The tokens are those of `model.generate(do_sample=False, eos_token_id=None, **plain_decoding(model))`.

    Args:
        model: A causal LM of transformers with its adapter, in evaluation mode.
        examples: The pairs to ask for, with distinct ids.
        batch_size: Prompts read or decoded together.
        to_the_end: Also decode what follows a wrong token; otherwise an answer may end with it.
    """
    answers: dict[int, tuple[int, ...]] = {}
    unfinished: dict[int, list[tuple[int, Example]]] = defaultdict(list)
    for batch in batches_by_prompt_length(examples, batch_size):
        for example, (right, wrong) in zip(batch, _matching_prefix(model, batch), strict=True):
            answers[example.example_id] = example.target_ids[:right]
            if right == len(example.target_ids):
                continue
            if wrong is None or to_the_end:
                unfinished[len(example.prompt_ids)].append((right, example))
            else:
                answers[example.example_id] += (wrong,)
    for group in unfinished.values():
        group.sort(key=lambda entry: entry[0])
        for start in range(0, len(group), batch_size):
            answers |= _decoded(model, group[start : start + batch_size])
    return answers


@torch.no_grad()
def _matching_prefix(model: Any, batch: Sequence[Example]) -> list[tuple[int, int | None]]:
    """For each example, the number of leading target tokens that greedy decoding gives, and the wrong token after them.

    The wrong token is None if the whole target is right, or if decoding has to decide, because a margin is too small or
    the model cannot read several tokens at once.
    """
    start = len(batch[0].prompt_ids)
    lengths = torch.tensor([len(e.target_ids) for e in batch], device=model.device)
    longest = int(lengths.max())
    # The zeros after a shorter target are harmless, since no earlier position sees them.
    ids = torch.tensor([e.prompt_ids + e.target_ids + (0,) * (longest - len(e.target_ids)) for e in batch])
    ids = ids.to(model.device)
    matching, wrong = torch.zeros_like(lengths), torch.full_like(lengths, -1)
    # The rows that are right so far, the target tokens compared, and the tokens read, prompt included.
    rows, compared, read = torch.arange(len(batch), device=model.device), 0, 0
    reader = CachedRows(model)
    doubt = DOUBT.get(model.dtype, DOUBT_IN_16_BITS) * torch.finfo(model.dtype).eps
    while len(rows) and reader.can_read_several:
        end = min(compared + tokens_at_once(model, len(rows)), longest)
        logits = reader.read(ids[rows, read : start + end - 1], end - compared)
        right, trusted, rival = _argmax_is(ids[rows, start + compared : start + end], logits, doubt)
        in_target = torch.arange(compared, end, device=model.device) < lengths[rows, None]
        stops = in_target & ~(right & trusted)
        first = stops.int().argmax(dim=1, keepdim=True)
        stopped = stops.any(dim=1)
        matching[rows] = torch.where(stopped, compared + first.squeeze(1), lengths[rows].clamp(max=end))
        known_wrong = (trusted & ~right).gather(1, first) & stopped[:, None]
        wrong[rows] = torch.where(known_wrong, rival.gather(1, first), -1).squeeze(1)
        compared, read = end, start + end - 1
        unfinished = (~stopped & (lengths[rows] > compared)).nonzero().squeeze(1)
        if 0 < len(unfinished) < len(rows) and reader.can_read_several:
            reader.keep(unfinished)
        rows = rows[unfinished]
    return [(n, None if token < 0 else token) for n, token in zip(matching.tolist(), wrong.tolist(), strict=True)]


def _argmax_is(targets: Tensor, logits: Tensor, doubt: float) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each target token is the argmax, whether its margin is beyond rounding, and its best rival, all (B, n).

    Args:
        targets: (B, n) token ids.
        logits: (B, n, vocabulary) in float32.
        doubt: Share of the largest logit that rounding can move a margin by.
    """
    own, other, rival = (t.squeeze(-1) for t in target_and_best_rival(logits, targets[..., None]))
    # Rounding goes by the largest logit of the row: the two compared may both be near 0.
    largest = torch.maximum(logits.amax(-1), -logits.amin(-1))
    return is_argmax(own - other, rival, targets), (own - other).abs() > doubt * largest, rival


@torch.no_grad()
def _decoded(model: Any, entries: Sequence[tuple[int, Example]]) -> dict[int, tuple[int, ...]]:
    """Decode the answers of examples with equally long prompts, sorted by the number of tokens known to be right."""
    known = entries[0][0]
    prompts = torch.tensor([e.prompt_ids + e.target_ids[:known] for _, e in entries], device=model.device)
    rows = generate_greedily(model, prompts, max(len(e.target_ids) for _, e in entries) - known).tolist()
    return {
        e.example_id: (e.target_ids[:known] + tuple(row))[: len(e.target_ids)]
        for (_, e), row in zip(entries, rows, strict=True)
    }
