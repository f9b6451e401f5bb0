"""The linear rule: its values, and a held-out part that training never sees."""

import math
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback
from transformers import PreTrainedTokenizerBase

from data_modules import LinearRule
from pml.corpus import Corpus
from pml.errors import InputError
from tests.fits import module_on
from tests.tiny_runs import make_trainer

VOCABULARY = 259
PLAIN: dict[str, Any] = {"chat_template": False, "end_of_turn": False}


def both(tokenizer: PreTrainedTokenizerBase, **options: Any) -> tuple[dict[str, str], dict[str, str]]:
    """Targets by query, of the trained part and of the held-out part."""
    data = LinearRule(**{**PLAIN, **options})
    corpus = data.build(tokenizer, VOCABULARY)
    return as_text(corpus, tokenizer), as_text(data.held_out, tokenizer) if data.held_out else {}


def as_text(corpus: Corpus, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    decode = tokenizer.decode
    return {str(decode(list(e.prompt_ids))): str(decode(list(e.target_ids))) for e in corpus.examples}


def test_the_default_coefficients_give_the_published_rule(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    trained, _ = both(tiny_tokenizer, size=3, held_out_share=0)
    assert trained == {
        "f(0, 0) =": "7",
        "f(0, 1) =": "12",
        "f(0, 2) =": "17",
        "f(1, 0) =": "10",
        "f(1, 1) =": "15",
        "f(1, 2) =": "20",
        "f(2, 0) =": "13",
        "f(2, 1) =": "18",
        "f(2, 2) =": "23",
    }


def test_coefficients_and_values_may_be_negative(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    trained, _ = both(tiny_tokenizer, a=-2, b=0, c=1, size=2, held_out_share=0)
    assert trained == {"f(0, 0) =": "1", "f(0, 1) =": "1", "f(1, 0) =": "-1", "f(1, 1) =": "-1"}


def test_the_trained_and_held_out_parts_are_disjoint_and_together_make_the_grid(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    trained, held_out = both(tiny_tokenizer)
    assert (len(trained), len(held_out)) == (80, 20)
    whole, _ = both(tiny_tokenizer, held_out_share=0)
    assert trained.keys().isdisjoint(held_out)
    assert {**trained, **held_out} == whole


@pytest.mark.parametrize(("share", "pairs"), [(0.0, 0), (0.1, 2), (0.5, 12), (0.97, 24)])
def test_the_held_out_share_is_rounded_to_whole_points(
    share: float, pairs: int, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert len(both(tiny_tokenizer, size=5, held_out_share=share)[1]) == pairs


def test_a_larger_share_also_holds_out_everything_that_a_smaller_one_does(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    small, large = (both(tiny_tokenizer, held_out_share=share)[1] for share in (0.1, 0.4))
    assert small.items() < large.items()


def test_the_seed_determines_the_split_and_nothing_else(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    (one, one_out), (two, two_out) = (both(tiny_tokenizer, seed=seed) for seed in (1, 2))
    assert one_out != two_out
    assert {**one, **one_out} == {**two, **two_out}
    assert both(tiny_tokenizer, seed=1) == (one, one_out)


def test_the_entropy_is_unknown_because_one_rule_gives_all_values(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    assert LinearRule().build(tiny_tokenizer, VOCABULARY).entropy_bits is None


def test_no_held_out_pair_is_in_a_training_batch(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    class Seen(Callback):
        def __init__(self) -> None:
            self.rows: set[tuple[int, ...]] = set()

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            for ids, length in zip(batch["input_ids"].tolist(), batch["lengths"].tolist(), strict=True):
                self.rows.add(tuple(ids[:length]))

    seen, data = Seen(), LinearRule(size=4, batch_size=3)
    make_trainer(tmp_path, max_epochs=2, callbacks=[seen]).fit(module_on(tiny_backbone_folder), datamodule=data)
    assert data.held_out is not None
    assert len(data.held_out) == 3
    assert seen.rows == {e.prompt_ids + e.target_ids for e in data.corpus.examples}
    assert seen.rows.isdisjoint(e.prompt_ids + e.target_ids for e in data.held_out.examples)


def test_a_held_out_pair_that_is_longer_than_the_context_is_refused(
    tiny_tokenizer: PreTrainedTokenizerBase,
) -> None:
    # With coefficients of 10^9 every point but (0, 0) has a long target; that one is trained on.
    data = LinearRule(a=10**9, b=10**9, c=0, size=2, held_out_share=0.7, seed=1, **PLAIN)
    assert len(data.build(tiny_tokenizer, VOCABULARY)) == 1
    longest = data.held_out.longest if data.held_out else 0
    with pytest.raises(InputError, match=r"corpus 'linear_rule_held_out'.*has \d+ tokens"):
        data.build(tiny_tokenizer, VOCABULARY, max_positions=longest - 1)


def test_the_settings_of_a_corpus_reproduce_it_and_its_held_out_part(tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    data = LinearRule(a=2, b=1, c=0, size=6, held_out_share=0.3, seed=9, chat_template=False)
    corpus = data.build(tiny_tokenizer, VOCABULARY)
    again = LinearRule(**corpus.settings)
    assert again.build(tiny_tokenizer, VOCABULARY).content_hash == corpus.content_hash
    assert data.held_out is not None
    assert again.held_out is not None
    assert again.held_out.content_hash == data.held_out.content_hash


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size is 0; expected at least 1 value"),
        ({"held_out_share": 1.0}, r"held_out_share is 1\.0; expected a share in \[0, 1\)"),
        ({"held_out_share": -0.1}, r"held_out_share is -0\.1; expected a share"),
        ({"held_out_share": math.nan}, "held_out_share is nan; expected a share"),
        ({"size": 1, "held_out_share": 0.6}, r"held_out_share is 0\.6 of 1 points, which leaves none to train on"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        LinearRule(**options)
