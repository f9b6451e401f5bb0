"""`pml data` describes the corpus that a run would memorise, and loads no more than it needs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from data_modules import Biographies, LinearRule, PhoneBook
from pml import backbone
from pml.cli import main
from pml.commands.data import _bins, _print_examples, split_arguments
from pml.corpus import Example
from pml.records import read_record
from tests import fits  # one thread

assert fits.torch.get_num_threads() == 1

Ask = Callable[..., str]


@pytest.fixture
def ask(tiny_backbone_folder: Path, capsys: pytest.CaptureFixture[str]) -> Ask:
    """Runs `pml data` on the tiny backbone and returns what it prints."""

    def run(*arguments: str) -> str:
        code = main(["data", "--model=SFT", f"--model.backbone={tiny_backbone_folder}", *arguments])
        out, err = capsys.readouterr()
        # Only loading the model logs how it will run.
        assert (code, err if "--loss" not in arguments else "") == (0, "")
        return out

    return run


def test_the_printed_numbers_are_those_of_the_corpus(ask: Ask, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    said = json.loads(ask("--data=Biographies", "--data.people=3", "--data.templates=2", "--json", "--show=2"))
    data = Biographies(people=3, templates=2)
    corpus = data.build(tiny_tokenizer, 259)
    assert data.held_out is not None
    lengths = [len(e.target_ids) for e in corpus.examples]
    assert said["corpus"] == "biographies"
    assert said["content_hash"] == corpus.content_hash
    assert (said["pairs"], said["facts"]) == (48, 24)
    assert said["target_tokens"] == corpus.target_tokens == sum(lengths)
    assert said["prompt_tokens"] == sum(len(e.prompt_ids) for e in corpus.examples)
    assert said["longest_example_tokens"] == corpus.longest
    assert said["entropy_bits"] == corpus.entropy_bits
    assert said["settings"] == corpus.settings
    assert said["tokens_per_target"]["min"] == min(lengths)
    assert said["tokens_per_target"]["max"] == max(lengths)
    assert said["tokens_per_target"]["mean"] == pytest.approx(sum(lengths) / 48)
    assert said["tokens_per_target"]["counts"] == {str(n): lengths.count(n) for n in sorted(set(lengths))}
    assert (said["held_out_pairs"], said["held_out_target_tokens"]) == (24, data.held_out.target_tokens)
    assert [e["target_tokens"] for e in said["examples"]] == lengths[:2]
    assert said["examples"][0]["prompt"] == tiny_tokenizer.decode(list(corpus.examples[0].prompt_ids))
    assert "initial_loss" not in said


def test_targets_are_printed_between_marks(ask: Ask) -> None:
    out = ask("--data=LinearRule", "--data.size=2", "--data.held_out_share=0.25", "--data.chat_template=false")
    lines = [line.rstrip() for line in out.splitlines()]
    for line in (
        "linear_rule",
        "  pairs            3",
        "  information      unknown",
        "  held out         1 pair, 3 target tokens",
        "examples, targets in ⟦ ⟧:",
    ):
        assert line in lines
    values = {"f(0, 0) =": 7, "f(0, 1) =": 12, "f(1, 0) =": 10, "f(1, 1) =": 15}
    shown = [line.split(": ", 1)[1] for line in lines if "⟦" in line and not line.startswith("examples")]
    assert len(shown) == 3
    assert all(shown_line in {f"{q}⟦{v}<|im_end|>⟧" for q, v in values.items()} for shown_line in shown)


def test_information_is_printed_in_total_and_per_token(ask: Ask) -> None:
    out = ask("--data=RandomTokens", "--data.length=10", "--data.count=3")
    # Each token is one of 256 ordinary ones: 8 bits.
    assert "  information      240.0 bits, 8.00 a token" in out.splitlines()


def test_random_replacement_tokens_are_printed_between_their_own_marks(
    tiny_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tuple(tiny_tokenizer("abcdefg\nh")["input_ids"])
    _print_examples(tiny_tokenizer, [Example(4, tuple(tiny_tokenizer("say:")["input_ids"]), target, (1, 2, 6))])
    assert capsys.readouterr().out.splitlines() == [
        "examples, targets in ⟦ ⟧, tokens put in at random in ⟨ ⟩:",
        "  4: say:⟦a⟨bc⟩def⟨g⟩\\nh⟧",
    ]


def test_a_long_target_is_truncated_and_its_control_characters_are_escaped(
    tiny_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tuple(tiny_tokenizer("\x1b[31m" + "x" * 1195)["input_ids"])
    _print_examples(tiny_tokenizer, [Example(0, (65,), target)])
    shown = capsys.readouterr().out.splitlines()[1]
    assert shown.endswith(f"⟦\\x1b[31m{'x' * 59}… 1,136 tokens more⟧")
    assert shown.isprintable()


def test_many_target_lengths_are_binned_into_ranges_that_cover_them_all() -> None:
    assert list(_bins({3: 2, 9: 1})) == [("3", 2), ("9", 1)]
    counts = {length: length % 3 + 1 for length in range(10, 50)}
    ranges = list(_bins(counts))
    assert len(ranges) <= 12
    assert ranges[0] == ("10 to 13", 2 + 3 + 1 + 2)
    assert ranges[-1][0] == "46 to 49"
    assert sum(count for _, count in ranges) == sum(counts.values())


def test_weights_are_loaded_only_to_measure_the_loss(ask: Ask, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(backbone, "_load_model", refuse)
    assert "phonebook" in ask("--data=PhoneBook")
    with pytest.raises(AssertionError, match="weights were loaded"):
        ask("--data=PhoneBook", "--loss")


def test_the_loss_is_that_of_the_frozen_model(ask: Ask, tiny_backbone_folder: Path) -> None:
    said = json.loads(ask("--data=PhoneBook", "--data.pairs=4", "--loss", "--json"))
    model = AutoModelForCausalLM.from_pretrained(tiny_backbone_folder, dtype=torch.float32)
    tokenizer = backbone.load_tokenizer(str(tiny_backbone_folder))
    losses = []
    for example in PhoneBook(pairs=4).build(tokenizer, 259).examples:
        ids = torch.tensor([example.prompt_ids + example.target_ids])
        labels = ids.clone()
        labels[0, : len(example.prompt_ids)] = -100
        losses.append(model(input_ids=ids, labels=labels).loss.item())
    # The targets have equal lengths, so the mean of their means is the mean over all tokens.
    assert said["initial_loss"] == pytest.approx(sum(losses) / 4, rel=1e-5)


def test_the_described_corpus_is_that_of_a_fit_with_the_same_arguments(
    tiny_backbone_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(
        f"model: {{class_path: SFT, init_args: {{backbone: {tiny_backbone_folder}}}}}\n"
        "data: {class_path: LinearRule, init_args: {size: 3}}\ntrainer: {max_epochs: 1, accelerator: cpu}\n"
    )
    assert main(["data", "run.yaml", "--data.size", "4", "--json", "--loss"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]
    assert main(["fit", "--config=run.yaml", "--data.size=4", "--trainer.enable_progress_bar=false"]) == 0
    record = read_record(tmp_path / "runs/fit/version_0/record.json")
    assert said["content_hash"] == record.corpus_hash
    assert said["initial_loss"] == pytest.approx(record.initial_loss, rel=1e-6)
    assert said["pairs"] == record.pairs == 13
    assert record.corpus_figures["held_out_pairs"] == said["held_out_pairs"] == 3


@pytest.mark.parametrize(
    ("arguments", "own", "keys"),
    [
        (["a.yaml", "--data.pairs", "5", "--json"], ["a.yaml", "--json"], ["--data.pairs", "5"]),
        (["--data.pairs=5", "a.yaml", "b.yaml"], ["a.yaml", "b.yaml"], ["--data.pairs=5"]),
        (["--show", "2", "--model", "SFT", "--loss"], ["--show", "2", "--loss"], ["--model", "SFT"]),
        (["--show=2", "--data.seed", "-1", "a.yaml"], ["--show=2", "a.yaml"], ["--data.seed", "-1"]),
        (["-h"], ["-h"], []),
    ],
)
def test_keys_of_a_fit_are_separated_from_the_arguments_of_the_command(
    arguments: list[str], own: list[str], keys: list[str]
) -> None:
    assert split_arguments(arguments) == (own, keys)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "none.yaml: cannot be read (No such file or directory)"),
        (["--data=PhoneBook", "--model=SFT", "--data.pairs=0"], "pairs is 0; expected at least 1"),
        (["--data=PhoneBook", "--model=SFT", "--jsno"], "unrecognized arguments: --jsno"),
        (["--data=PhoneBook", "--model=SFT", "--show=-1"], "--show is -1; expected 0 or more examples"),
        (["--data=PhoneBook", "--model=SFT", "--model.backbone=nobody/nothing"], "backbone 'nobody/nothing' is no"),
        (["--data=lightning.LightningDataModule", "--model=SFT"], "data is a LightningDataModule; expected a corpus"),
        ([], "required: data, model"),
    ],
)
def test_wrong_input_gives_a_one_line_error_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main(["data", *arguments])
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert (code, out) == (2, "")
    assert line.startswith("pml data: error: ")
    assert message in line


@pytest.mark.parametrize("kind", [Biographies, LinearRule, PhoneBook])
def test_every_printed_example_is_one_line(kind: type, ask: Ask) -> None:
    out = ask(f"--data={kind.__name__}", "--show=4")
    assert sum("⟧" in line for line in out.splitlines()) == 1 + 4
