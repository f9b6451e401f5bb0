"""Known targets read together give what transformers' own greedy decoding gives token by token."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import pml.decoding
from pml.backbone import Backbone
from pml.certificate import greedy_answers
from pml.corpus import Example
from pml.decoding import LEAVES_LOGITS_ALONE, CachedRows, generate_greedily, greedy_tokens, plain_decoding
from tests.tiny_architectures import tiny_model

PROMPTS = [(5, 6, 7, 8), (200, 3, 9), (1, 1, 1, 1), (40, 41, 42, 43), (9, 8, 7), (11, 12, 13, 14, 15)]
LENGTHS = [12, 7, 20, 1, 9, 16]
WRONG_AT: list[list[int]] = [[], [0], [13], [], [4, 6], [15]]
"""Positions at which each target is not what the model says."""


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tokens of two rows at a time, with the tiny vocabulary."""
    monkeypatch.setitem(pml.decoding.LOGITS_BYTES, "cpu", 4 * 2 * 3 * 259)


def answers_of(model: Any) -> list[tuple[int, ...]]:
    """What transformers' `generate` gives, each prompt by itself, whatever it says."""
    asked = [Example(i, prompt, (0,) * n) for i, (prompt, n) in enumerate(zip(PROMPTS, LENGTHS, strict=True))]
    return greedy_answers(model, asked)


def half_known(answers: list[tuple[int, ...]]) -> list[Example]:
    """Targets that are what the model says, except where `WRONG_AT` says so."""
    targets = [
        tuple((token + 1) % 259 if t in wrong else token for t, token in enumerate(answer))
        for answer, wrong in zip(answers, WRONG_AT, strict=True)
    ]
    return [Example(i, prompt, target) for i, (prompt, target) in enumerate(zip(PROMPTS, targets, strict=True))]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox"])
def test_every_token_is_that_of_generate_whatever_is_read_together(
    architecture: str, make_tiny_backbone: Callable[[str], Backbone], few_at_once: None
) -> None:
    model = make_tiny_backbone(architecture).model
    answers = answers_of(model)
    examples = half_known(answers)
    for batch_size in (1, 2, 64):
        assert greedy_tokens(model, examples, batch_size) == dict(enumerate(answers))
    # Servers pad prompts on the left.
    assert greedy_answers(model, examples, batch_size=3) == answers


@pytest.mark.parametrize("architecture", ["mamba", "qwen3_next", "jamba", "lfm2", "rwkv", "gpt_oss"])
def test_models_that_keep_a_state_or_no_cache_are_decoded_too(architecture: str, few_at_once: None) -> None:
    model = tiny_model(architecture).eval()
    answers = []
    for prompt, tokens in zip(PROMPTS, LENGTHS, strict=True):
        ids = [token % 100 for token in prompt]
        for _ in range(tokens):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(tuple(ids[-tokens:]))
    examples = [
        Example(e.example_id, tuple(token % 100 for token in e.prompt_ids), e.target_ids) for e in half_known(answers)
    ]
    assert greedy_tokens(model, examples) == dict(enumerate(answers))


def test_decoding_goes_on_after_an_end_token_as_generate_does_without_one(tiny_backbone: Backbone) -> None:
    model = tiny_backbone.model
    (answer,) = greedy_answers(model, [Example(0, PROMPTS[0], (0,) * 12)])
    end = answer[5]
    ids = torch.tensor([PROMPTS[0]])
    stopped = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=12,
        eos_token_id=end,
        pad_token_id=0,
    )
    stopped = tuple(stopped[0, ids.shape[1] :].tolist())
    assert stopped[-1] == end and len(stopped) < 12
    # A target that ends there, and one that goes on.
    for target in (stopped, answer):
        assert greedy_tokens(model, [Example(0, PROMPTS[0], target)]) == {0: target}


def test_an_answer_may_end_with_its_first_wrong_token(tiny_backbone: Backbone, few_at_once: None) -> None:
    answers = answers_of(tiny_backbone.model)
    cut = [answer[: wrong[0] + 1] if wrong else answer for answer, wrong in zip(answers, WRONG_AT, strict=True)]
    asked = half_known(answers)
    assert greedy_tokens(tiny_backbone.model, asked, to_the_end=False) == dict(enumerate(cut))


def test_a_short_target_that_is_wrong_late_and_a_long_one_that_is_wrong_early_are_decoded_together(
    tiny_backbone: Backbone,
) -> None:
    prompts = [(5, 6, 7, 8), (40, 41, 42, 43)]
    asked = [Example(i, prompt, (0,) * n) for i, (prompt, n) in enumerate(zip(prompts, (6, 12), strict=True))]
    answers = greedy_answers(tiny_backbone.model, asked)
    targets = [
        tuple((token + 1) % 259 if t == wrong else token for t, token in enumerate(answer))
        for answer, wrong in zip(answers, (5, 1), strict=True)
    ]
    examples = [Example(i, prompt, target) for i, (prompt, target) in enumerate(zip(prompts, targets, strict=True))]
    assert greedy_tokens(tiny_backbone.model, examples) == dict(enumerate(answers))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """Shapes of what is read."""
    shapes: list[tuple[int, ...]] = []
    read = CachedRows.read

    def counting(self: CachedRows, ids: torch.Tensor, last: int = 1) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return read(self, ids, last)

    monkeypatch.setattr(CachedRows, "read", counting)
    yield shapes


def test_a_target_that_is_recalled_is_read_and_one_that_is_not_is_decoded_from_there(
    tiny_backbone: Backbone, reads: list[tuple[int, ...]]
) -> None:
    prompt = PROMPTS[0]
    (answer,) = greedy_answers(tiny_backbone.model, [Example(0, prompt, (0,) * 60)])
    greedy_tokens(tiny_backbone.model, [Example(0, prompt, answer)])
    assert reads == [(1, 63)]
    reads.clear()
    wrong = (*answer[:50], (answer[50] + 1) % 259, *answer[51:])
    greedy_tokens(tiny_backbone.model, [Example(0, prompt, wrong)])
    assert reads == [(1, 63), (1, 54), *[(1, 1)] * 9]


def test_rows_that_are_decided_are_read_no_further(
    tiny_backbone: Backbone, reads: list[tuple[int, ...]], few_at_once: None
) -> None:
    answers = [answer for answer, prompt in zip(answers_of(tiny_backbone.model), PROMPTS, strict=True)]
    long, short = answers[2], answers[0][:2]
    reads.clear()
    asked = [Example(0, PROMPTS[2], long), Example(1, PROMPTS[0], short)]
    assert greedy_tokens(tiny_backbone.model, asked) == {0: long, 1: short}
    assert reads[0] == (2, 4 + 2)
    assert [rows for rows, _ in reads[1:]] == [1] * (len(reads) - 1)
    # Alone, a row has twice the room.
    assert [columns for _, columns in reads[1:]] == [6, 6, 5]


class Wavering(torch.nn.Module):
    """Prefers token 2 by a hair when it reads several tokens, and token 3 by a hair when it reads one."""

    def __init__(self, hair: float, logit: float = 10.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.hair, self.logit = hair, logit
        self.device, self.dtype = torch.device("cpu"), dtype
        text = type("Text", (), {"vocab_size": 6})
        self.config = type("Config", (), {"get_text_config": lambda _: text})()

    def forward(self, input_ids: torch.Tensor, past_key_values: Any, **_: Any) -> Any:
        logits = torch.full((*input_ids.shape, 6), self.logit - 10)
        logits[..., 2:4] = self.logit
        logits[..., 2 if input_ids.shape[1] > 1 else 3] += self.hair
        layers = [pml.decoding.DynamicLayer()]
        return type("Out", (), {"past_key_values": type("Cache", (), {"layers": layers}), "logits": logits})


def test_a_tie_within_rounding_is_decided_token_by_token() -> None:
    asked = [Example(0, (1,), (2, 2, 2))]
    # 1e-5 of 10 is within what float32 may round away; 1e-2 is not.
    assert greedy_tokens(Wavering(1e-5), asked) == {0: (3, 3, 3)}
    assert greedy_tokens(Wavering(1e-2), asked) == {0: (2, 2, 2)}
    # Rounding goes by the size of the logits, whatever their sign.
    assert greedy_tokens(Wavering(1e-5, logit=-10.0), asked) == {0: (3, 3, 3)}
    # In bfloat16 0.25 of 10 may be rounding, and 1 may not.
    assert greedy_tokens(Wavering(0.25, dtype=torch.bfloat16), asked) == {0: (3, 3, 3)}
    assert greedy_tokens(Wavering(1.0, dtype=torch.bfloat16), asked) == {0: (2, 2, 2)}


def test_an_answer_does_not_end_with_a_token_that_is_wrong_by_no_more_than_rounding() -> None:
    # Read together, token 2 wins by a hair; one by one the target comes back.
    asked = [Example(0, (1,), (3, 3, 3))]
    assert greedy_tokens(Wavering(1e-5), asked, to_the_end=False) == {0: (3, 3, 3)}
    assert greedy_tokens(Wavering(1e-2), asked, to_the_end=False) == {0: (2,)}


def test_ties_go_to_the_lowest_id() -> None:
    assert generate_greedily(Wavering(0.0), torch.tensor([[0]]), 2).tolist() == [[2, 2]]


def test_what_a_base_does_to_logits_is_turned_off(make_tiny_backbone: Callable[[str], Backbone]) -> None:
    model = make_tiny_backbone("llama").model
    assert plain_decoding(model) == {}
    plain = answers_of(model)
    model.generation_config.repetition_penalty = 1.3
    model.generation_config.no_repeat_ngram_size = 1
    model.generation_config.suppress_tokens = [plain[0][0]]
    assert plain_decoding(model) == {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "suppress_tokens": None}
    assert answers_of(model) == plain
    prompt, tokens = torch.tensor([PROMPTS[0]]), LENGTHS[0]
    out = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=tokens
    )
    assert tuple(out[0, len(PROMPTS[0]) :].tolist()) != plain[0]


def test_the_settings_that_are_turned_off_are_settings_of_transformers() -> None:
    assert LEAVES_LOGITS_ALONE.keys() <= vars(GenerationConfig()).keys()
