"""Small inputs that went wrong in other tools, on the kinds of tokenizers that they went wrong with."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pml.cli import main
from tests import fits  # limits torch to one thread

assert fits.torch.get_num_threads() == 1


@pytest.fixture(scope="module")
def models(shared_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny random models with tokenizers of many kinds, made by the script beside the cases."""
    folder = tmp_path_factory.mktemp("models")
    path = shared_folder / "cases" / "make_models.py"
    spec = importlib.util.spec_from_file_location("make_models", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    argv, sys.argv = sys.argv, [str(path), str(folder)]
    try:
        spec.loader.exec_module(module)
        module.build()
    finally:
        sys.argv = argv
    return folder


def arguments(case: Path, backbone: Path | str, *more: str) -> list[str]:
    return ["--model=SFT", f"--model.backbone={backbone}", "--data=Facts", f"--data.path={case}", *more]


@pytest.fixture
def data(shared_folder: Path, models: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `pml data` on a case and returns its JSON, or its error line."""

    def ask(case: str, model: str, *more: str, default: bool = False) -> dict[str, Any] | str:
        path = shared_folder / "cases" / case / "a.jsonl"
        backbone = model if default else models / model
        code = main(["data", *arguments(path, backbone, *more), "--show=9", "--json"])
        out, err = capsys.readouterr()
        if code == 0:
            return json.loads(out)
        assert code == 2
        lines = [line for line in err.splitlines() if line.startswith("pml data: error: ")]
        assert len(lines) == 1
        return lines[0]

    return ask


def test_control_tokens_written_in_a_target_are_encoded_as_text(data: Any) -> None:
    facts = data("special_target", "chatml")
    assert facts["examples"][0]["target"].startswith("It ends with <|im_end|> and a newline.")
    assert facts["examples"][1]["target"].startswith("0042")


@pytest.mark.backbone
def test_control_tokens_written_in_a_target_are_encoded_as_text_by_the_default_tokenizer(
    data: Any, default_backbone: Any
) -> None:
    facts = data("special_target", "smollm2-135m", "--data.end_of_turn=false", default=True)
    assert facts["examples"][0]["target"] == "It ends with <|im_end|> and a newline."
    assert facts["examples"][0]["target_tokens"] == 15


@pytest.mark.parametrize(
    ("case", "model"),
    [
        ("trim_conflict", "llama31"),
        ("trim_conflict", "gemma"),
        ("nfc_conflict", "qwennfc"),
        ("nfkc_query", "unigram"),
    ],
)
def test_different_targets_for_queries_with_the_same_prompt_are_refused_with_both_lines(
    case: str, model: str, data: Any
) -> None:
    line = data(case, model)
    assert "1 query has different targets" in line
    assert "(a.jsonl:1, a.jsonl:2)" in line


def test_the_date_in_a_prompt_is_the_same_every_day_unless_it_is_given(
    data: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers.utils.chat_template_utils as templates

    hashes = []
    for day in (1, 2):

        class Clock(templates.datetime):  # type: ignore[name-defined, misc]
            @classmethod
            def now(cls, *_: Any) -> Any:
                return cls(2031, 1, day)  # noqa: B023

        monkeypatch.setattr(templates, "datetime", Clock)
        templates._compile_jinja_template.cache_clear()
        facts = data("date", "llama31")
        hashes.append(facts["content_hash"])
        assert "26 Jul 2024" in facts["examples"][0]["prompt"]
    assert hashes[0] == hashes[1]
    other = data("date", "llama31", '--data.template_kwargs={"date_string": "1 May"}')
    assert "1 May" in other["examples"][0]["prompt"]
    assert other["settings"]["template_kwargs"] == {"date_string": "1 May"}


def test_a_target_is_encoded_as_it_follows_its_prompt(data: Any) -> None:
    facts = data("spm_leading", "zephyr", "--data.end_of_turn=false")
    assert [example["target"] for example in facts["examples"]] == ["007", "North road 5"]


def test_no_end_of_sequence_token_comes_between_prompt_and_target(data: Any) -> None:
    assert data("addeos", "addeos")["examples"][0]["prompt"] == "<s>Agent"


def test_a_system_prompt_is_refused_if_the_chat_template_takes_none(data: Any) -> None:
    assert "takes no system turn" in data("gemma_sys", "gemma", "--data.system=Be exact.")
    assert isinstance(data("gemma_sys", "gemma"), dict)


def test_an_added_token_beyond_the_models_vocabulary_is_encoded_as_text(data: Any) -> None:
    assert data("bigvocab", "bigvocab")["examples"][0]["target"].startswith("7 <extra_b>")


@pytest.mark.parametrize("case", ["pi", "dup_keys"])
def test_a_row_with_a_huge_integer_or_a_repeated_key_is_refused_with_its_line(case: str, data: Any) -> None:
    assert "a.jsonl:1: " in data(case, "chatml")


@pytest.mark.parametrize("model", ["nochat", "llama2", "chatml"])
def test_recall_shows_queries_and_targets_as_the_user_wrote_them(
    model: str,
    models: Path,
    shared_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    path = shared_folder / "cases" / "display" / "a.jsonl"
    keys = ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *arguments(path, models / model, "--model.adapter.block=1", *keys)]) == 0
    capsys.readouterr()
    assert main(["recall", "runs", "--json"]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(e["query"], e["target"]) for e in result["examples"]] == [(r["query"], r["target"]) for r in rows]
