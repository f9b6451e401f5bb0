"""Reading known targets many tokens at a time gives the same as greedy decoding by transformers, token by token."""

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
"""Positions at which each target differs from the model's answer."""


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits reading to three tokens of two rows at a time, for the tiny vocabulary."""
    monkeypatch.setitem(pml.decoding.LOGITS_BYTES, "cpu", 4 * 2 * 3 * 259)


def answers_of(model: Any) -> list[tuple[int, ...]]:
    """Greedy answers of transformers' `generate`, decoded one prompt at a time."""
    asked = [Example(i, prompt, (0,) * n) for i, (prompt, n) in enumerate(zip(PROMPTS, LENGTHS, strict=True))]
    return greedy_answers(model, asked)


def half_known(answers: list[tuple[int, ...]]) -> list[Example]:
    """Examples whose targets are the model's answers, except at the positions in `WRONG_AT`."""
    targets = [
        tuple((token + 1) % 259 if t in wrong else token for t, token in enumerate(answer))
        for answer, wrong in zip(answers, WRONG_AT, strict=True)
    ]
    return [Example(i, prompt, target) for i, (prompt, target) in enumerate(zip(PROMPTS, targets, strict=True))]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gpt2", "gpt_neox"])
def test_greedy_tokens_equal_those_of_generate_at_every_batch_size(
    architecture: str, make_tiny_backbone: Callable[[str], Backbone], few_at_once: None
) -> None:
    model = make_tiny_backbone(architecture).model
    answers = answers_of(model)
    examples = half_known(answers)
    for batch_size in (1, 2, 64):
        assert greedy_tokens(model, examples, batch_size) == dict(enumerate(answers))
    # Padding prompts on the left, as servers do, gives the same.
    assert greedy_answers(model, examples, batch_size=3) == answers


@pytest.mark.parametrize("architecture", ["mamba", "qwen3_next", "jamba", "lfm2", "rwkv", "gpt_oss"])
def test_models_with_a_recurrent_state_or_without_a_cache_are_decoded_too(architecture: str, few_at_once: None) -> None:
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


def test_decoding_continues_after_an_end_token(tiny_backbone: Backbone) -> None:
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
    # One target ends with the end token, the other goes on.
    for target in (stopped, answer):
        assert greedy_tokens(model, [Example(0, PROMPTS[0], target)]) == {0: target}


def test_decoding_can_stop_at_the_first_wrong_token(tiny_backbone: Backbone, few_at_once: None) -> None:
    answers = answers_of(tiny_backbone.model)
    cut = [answer[: wrong[0] + 1] if wrong else answer for answer, wrong in zip(answers, WRONG_AT, strict=True)]
    asked = half_known(answers)
    assert greedy_tokens(tiny_backbone.model, asked, to_the_end=False) == dict(enumerate(cut))


def test_a_short_target_that_fails_late_is_decoded_with_a_long_one_that_fails_early(
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
    """Shapes of the token ids in each read."""
    shapes: list[tuple[int, ...]] = []
    read = CachedRows.read

    def counting(self: CachedRows, ids: torch.Tensor, last: int = 1) -> torch.Tensor:
        shapes.append(tuple(ids.shape))
        return read(self, ids, last)

    monkeypatch.setattr(CachedRows, "read", counting)
    yield shapes


def test_a_recalled_target_is_read_at_once_and_a_wrong_one_decoded_from_its_first_error(
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


def test_rows_whose_targets_are_finished_are_not_read_further(
    tiny_backbone: Backbone, reads: list[tuple[int, ...]], few_at_once: None
) -> None:
    answers = [answer for answer, prompt in zip(answers_of(tiny_backbone.model), PROMPTS, strict=True)]
    long, short = answers[2], answers[0][:2]
    reads.clear()
    asked = [Example(0, PROMPTS[2], long), Example(1, PROMPTS[0], short)]
    assert greedy_tokens(tiny_backbone.model, asked) == {0: long, 1: short}
    assert reads[0] == (2, 4 + 2)
    assert [rows for rows, _ in reads[1:]] == [1] * (len(reads) - 1)
    # A single row may have twice as many tokens at a time as two rows.
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


def test_a_logit_margin_within_rounding_is_decided_token_by_token() -> None:
    asked = [Example(0, (1,), (2, 2, 2))]
    # In float32, a margin of 1e-5 at 10 may be rounding, and one of 1e-2 may not.
    assert greedy_tokens(Wavering(1e-5), asked) == {0: (3, 3, 3)}
    assert greedy_tokens(Wavering(1e-2), asked) == {0: (2, 2, 2)}
    # Rounding depends on the magnitude of the logits, not on their sign.
    assert greedy_tokens(Wavering(1e-5, logit=-10.0), asked) == {0: (3, 3, 3)}
    # The two best logits may be near 0 where others are not.
    assert greedy_tokens(Wavering(1e-5, logit=0.0), asked) == {0: (3, 3, 3)}
    # In bfloat16, a margin of 0.25 at 10 may be rounding, and one of 1 may not.
    assert greedy_tokens(Wavering(0.25, dtype=torch.bfloat16), asked) == {0: (3, 3, 3)}
    assert greedy_tokens(Wavering(1.0, dtype=torch.bfloat16), asked) == {0: (2, 2, 2)}


def test_decoding_does_not_stop_at_a_token_that_is_wrong_within_rounding() -> None:
    # Read together, token 2 wins by a hair; decoded one by one, the answer is the target.
    asked = [Example(0, (1,), (3, 3, 3))]
    assert greedy_tokens(Wavering(1e-5), asked, to_the_end=False) == {0: (3, 3, 3)}
    assert greedy_tokens(Wavering(1e-2), asked, to_the_end=False) == {0: (2,)}


def test_greedy_decoding_resolves_a_tie_to_the_lowest_token_id() -> None:
    assert generate_greedily(Wavering(0.0), torch.tensor([[0]]), 2).tolist() == [[2, 2]]


def test_generation_settings_of_a_base_model_that_alter_logits_are_turned_off(
    make_tiny_backbone: Callable[[str], Backbone],
) -> None:
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


def test_every_generation_setting_that_is_turned_off_exists_in_transformers() -> None:
    assert LEAVES_LOGITS_ALONE.keys() <= vars(GenerationConfig()).keys()
