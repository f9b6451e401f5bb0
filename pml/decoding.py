"""Greedy decoding, as fast as known text is read.

A target that is known need not be decoded token by token: a model that reads it gives the argmax at every position
at once, and by causality greedy decoding gives the same tokens up to the first argmax that is another. Only from there
on is there anything to decode.

Tokens that are read together are rounded otherwise than one by one. So an argmax that beats the next best token by no
more than rounding (`DOUBT`) is not believed: decoding goes on token by token from there, as transformers' `generate`
does, and that decides. Where two tokens are as close as that, a server that batches otherwise may decide otherwise.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from pml.corpus import Example
from pml.token_loss import against_the_rest, is_argmax

__all__ = [
    "CachedRows",
    "generate_greedily",
    "greedy_tokens",
    "of_one_prompt_length",
    "plain_decoding",
    "tokens_at_once",
    "whole_distribution",
]

LOGITS_BYTES = {"cpu": 64 * 2**20}
LOGITS_BYTES_ELSEWHERE = 512 * 2**20
"""Size of the float32 logits that are held at a time, by kind of device."""

DOUBT = {torch.float32: 64, torch.float64: 64}
DOUBT_IN_16_BITS = 8
"""Margins up to so many machine epsilons of the logits are not believed. Measured on the default backbone, reading
together moves margins by up to 19 in float32, where sums of many terms add up, and by up to 4 in bfloat16."""

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
"""Settings of `generate` by which greedy decoding is not the plain one to its end, at the values where it is."""

WHOLE_DISTRIBUTION: dict[str, Any] = {
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "top_h": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Settings of `generate` that cut the distribution which is sampled from, at the values where they do not."""


def plain_decoding(model: Any) -> dict[str, Any]:
    """Arguments of `generate` that turn off what the model's own `generation_config` does to logits; often none.

    Some bases ship a penalty on repetition, for example, which `generate` and many servers apply to greedy decoding
    too. A certificate is of the logits, and so holds without it.

    Args:
        model: A causal LM of transformers, with an adapter or without.
    """
    return _turned_off(model, LEAVES_LOGITS_ALONE)


def whole_distribution(model: Any) -> dict[str, Any]:
    """Arguments of `generate` by which it samples from the whole distribution, whatever the base ships."""
    # Where nothing is said, `generate` takes 50.
    return {"top_k": 0, **_turned_off(model, WHOLE_DISTRIBUTION)}


def _turned_off(model: Any, neutral: Mapping[str, Any]) -> dict[str, Any]:
    config = getattr(model, "generation_config", None)
    return {name: plain for name, plain in neutral.items() if getattr(config, name, None) not in (None, plain)}


class CachedRows:
    """Rows of token ids that a causal LM reads on and on, through its KV cache.

    Args:
        model: A causal LM of transformers, adapter and all, in evaluation mode.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._cache: Any = None
        self._ids: Tensor | None = None

    @property
    def several(self) -> bool:
        """Whether tokens that are read together see what they would see one by one.

        So it is at first, and where all layers keep keys and values. Layers that keep a state (state-space models,
        linear attention) may go on from it by one token only.
        """
        if self._cache is None:
            return self._ids is None
        layers = getattr(self._cache, "layers", (None,))
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)

    def read(self, ids: Tensor, last: int = 1) -> Tensor:
        """Read on.

        Args:
            ids: (B, n) what follows on what was read before. All rows are as long, so nothing is padded or masked.
            last: At how many of these positions logits are wanted, the last ones.

        Returns:
            (B, last, vocabulary) float32 logits.
        """
        if self._ids is not None:
            ids = self._ids = torch.cat([self._ids, ids], dim=1)
        out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=last)
        self._cache = getattr(out, "past_key_values", None)
        if self._cache is None:
            # Some models keep their state elsewhere, or none; they read everything again.
            self._ids = ids
        return out.logits[:, -last:].float()

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows alone, given by their indices; where tokens can be read together."""
        self._cache.batch_select_indices(rows)


def tokens_at_once(model: Any, rows: int) -> int:
    """How many tokens of each row to read together, so that their logits stay small."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    return max(1, LOGITS_BYTES.get(model.device.type, LOGITS_BYTES_ELSEWHERE) // (4 * rows * vocabulary))


def of_one_prompt_length(examples: Sequence[Example], batch_size: int) -> Iterator[list[Example]]:
    """Batches of examples whose prompts are equally long, so that nothing is padded; similar targets together."""
    groups: dict[int, list[Example]] = defaultdict(list)
    for example in examples:
        groups[len(example.prompt_ids)].append(example)
    for group in groups.values():
        group.sort(key=lambda e: len(e.target_ids))
        yield from (group[start : start + batch_size] for start in range(0, len(group), batch_size))


def generate_greedily(model: nn.Module, prompt_ids: Tensor, tokens: int) -> Tensor:
    """Greedy decoding with the KV cache, ties to the lowest id.

    Args:
        model: A causal LM, adapter and all.
        prompt_ids: (B, P) prompts of one length, so that nothing is padded and nothing masked.
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
    """What greedy decoding gives for each example, by example id: as many tokens as its target has.

    They are those of `model.generate(do_sample=False, eos_token_id=None, **plain_decoding(model))`.

    Args:
        model: A causal LM of transformers, adapter and all, in evaluation mode.
        examples: What to ask for; their ids differ.
        batch_size: Prompts read or decoded together.
        to_the_end: Decode what follows on a wrong token too; otherwise an answer may end with it.
    """
    answers: dict[int, tuple[int, ...]] = {}
    unfinished: dict[int, list[tuple[int, Example]]] = defaultdict(list)
    for batch in of_one_prompt_length(examples, batch_size):
        for example, (right, wrong) in zip(batch, _right_tokens(model, batch), strict=True):
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
def _right_tokens(model: Any, batch: Sequence[Example]) -> list[tuple[int, int | None]]:
    """For each example the number of its first tokens that greedy decoding gives, and the wrong one that comes next.

    The wrong token is None where the target comes to its end, or where decoding has to decide: a tie is too close, or
    the model cannot read on in this way.
    """
    doubt = DOUBT.get(model.dtype, DOUBT_IN_16_BITS) * torch.finfo(model.dtype).eps
    device, start = model.device, len(batch[0].prompt_ids)
    lengths = torch.tensor([len(e.target_ids) for e in batch], device=device)
    longest = int(lengths.max())
    # What stands after a shorter target is read for nothing: nothing before it sees it.
    ids = torch.tensor([e.prompt_ids + e.target_ids + (0,) * (longest - len(e.target_ids)) for e in batch])
    ids = ids.to(device)
    found, wrong = torch.zeros_like(lengths), torch.full_like(lengths, -1)
    going, reader, read, done = torch.arange(len(batch), device=device), CachedRows(model), 0, 0
    while len(going) and reader.several:
        end = min(done + tokens_at_once(model, len(going)), longest)
        logits = reader.read(ids[going, read : start + end - 1], end - done)
        targets = ids[going, start + done : start + end]
        own, other, rival = (t.squeeze(-1) for t in against_the_rest(logits, targets[..., None]))
        certain = (own - other).abs() > doubt * torch.maximum(own.abs(), other.abs())
        right = is_argmax(own - other, rival, targets)
        here = torch.arange(done, end, device=device) < lengths[going, None]
        stops = here & ~(right & certain)
        first = stops.int().argmax(dim=1, keepdim=True)
        stopped = stops.any(dim=1)
        found[going] = torch.where(stopped, done + first.squeeze(1), lengths[going].clamp(max=end))
        known = (certain & ~right).gather(1, first) & stopped[:, None]
        wrong[going] = torch.where(known, rival.gather(1, first), -1).squeeze(1)
        read, done = start + end - 1, end
        still = (~stopped & (lengths[going] > done)).nonzero().squeeze(1)
        if 0 < len(still) < len(going) and reader.several:
            reader.keep(still)
        going = going[still]
    return [(n, None if token < 0 else token) for n, token in zip(found.tolist(), wrong.tolist(), strict=True)]


@torch.no_grad()
def _decoded(model: Any, entries: Sequence[tuple[int, Example]]) -> dict[int, tuple[int, ...]]:
    """Answers to prompts of one length of which so many first tokens are known to be right; sorted by that number."""
    known = entries[0][0]
    prompts = torch.tensor([e.prompt_ids + e.target_ids[:known] for _, e in entries], device=model.device)
    rows = generate_greedily(model, prompts, max(len(e.target_ids) for _, e in entries) - known).tolist()
    return {
        e.example_id: (e.target_ids[:known] + tuple(row))[: len(e.target_ids)]
        for (_, e), row in zip(entries, rows, strict=True)
    }
