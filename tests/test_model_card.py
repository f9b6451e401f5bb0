"""The model card: what it says is true, and its code runs and gives the target."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from pml.cli import main
from pml.corpus import Corpus, Example
from pml.encoding import PromptFormat, TextEncoder
from pml.model_card import model_card
from pml.records import read_record
from tests.fits import save_sharpened
from tests.record_factory import make_record


def trained(backbone: Path, tmp_path: Path, *more: str) -> Path:
    rows = [{"query": f"code {i}?", "target": code} for i, code in enumerate(("007", "415"))]
    (tmp_path / "f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = ["fit", "--model=SFT", f"--model.backbone={backbone}", "--model.adapter.block=2"]
    arguments += ["--model.adapter.rank=16", "--model.learning_rate=0.02", "--data=Facts", "--data.path=f.jsonl"]
    arguments += ["--trainer.max_epochs=300", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    assert main([*arguments, *more]) == 0
    return tmp_path / "runs/fit/version_0"


@pytest.mark.parametrize(
    "more",
    [
        ["--model.adapter.placement=[q_proj,v_proj,gate_proj,up_proj,down_proj]"],
        ["--data.system=Be exact.", '--data.template_kwargs={"x": 1}'],
        ["--data.chat_template=false"],
    ],
    ids=["list", "system and variables", "no template"],
)
def test_the_code_in_the_card_gives_the_first_target(
    more: list[str],
    tiny_backbone_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = save_sharpened(tiny_backbone_folder, tmp_path / "sharp")
    folder = trained(backbone, tmp_path, *more) / "adapter"
    text = (folder / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == str(backbone)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    code = code.replace("PATH_TO_THIS_FOLDER", str(folder))
    if "--data.system=Be exact." in more:
        assert "Be exact." in text and '{"x": 1}' in text
    capsys.readouterr()
    exec(code, {})
    assert capsys.readouterr().out == "007\n"
    assert "greedy decoding is certain to give every target back" in text


def test_the_card_of_an_uncertain_adapter_promises_no_recall(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = trained(tiny_backbone_folder, tmp_path, "--trainer.max_epochs=1")
    text = (folder / "adapter" / "README.md").read_text()
    record = read_record(folder / "record.json")
    assert f"Of 2 targets {round(record.exact_match * 2)} come back whole" in text
    assert "what comes back there is not certain" in text
    assert "007" not in text  # the card shows no target


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"dtype": "float32"}, "greedy decoding is certain to give every target back, for the prompts above and up to"),
        (
            {"steps_to_recall": 90, "rounding_logits": 0.3125},
            "no rounding to bfloat16 seen on these targets (up to 0.31",
        ),
        (
            {"steps_to_recall": 90},
            "by rounding, which in bfloat16 is large: `pml certify` says which pairs are certain",
        ),
        ({"rounding_logits": 0.3125}, "`pml certify` says which pairs are certain"),
        ({"min_target_probability": 0.5}, "Some target tokens lie at or below 0.5"),
        ({"min_target_probability": None}, "Some target tokens lie at or below 0.5"),
        ({}, 'AutoPeftModelForCausalLM.from_pretrained("PATH_TO_THIS_FOLDER", dtype=torch.bfloat16)'),
    ],
)
def test_what_a_card_calls_certain_depends_on_dtype_rounding_and_probability(
    fields: dict[str, Any], said: str, tiny_tokenizer: Any
) -> None:
    known = {
        "placement": ["q_proj"],
        "dtype": "bfloat16",
        "exact_match": 1.0,
        "sub_threshold_fraction": 0.0,
        "min_target_probability": 0.7,
    }
    corpus = Corpus("facts", [Example(0, (1,), (2,), query="q", target="t")])
    card = model_card(make_record(**{**known, **fields}), corpus, TextEncoder(tiny_tokenizer, PromptFormat()), {})
    assert said in card


def test_the_code_turns_off_the_logit_changes_of_the_base_and_the_card_names_them(tiny_tokenizer: Any) -> None:
    corpus = Corpus("facts", [Example(0, (1,), (2,), query="q", target="t")])
    plain = {"repetition_penalty": 1.0, "suppress_tokens": None}
    for form in (PromptFormat(), PromptFormat(chat_template=False)):
        encoder = TextEncoder(tiny_tokenizer, form)
        card = model_card(make_record(), corpus, encoder, plain)
        assert f"eos_token_id={encoder.end_of_turn_id}, repetition_penalty=1.0, suppress_tokens=None" in card
        assert "`generation_config.json` sets `repetition_penalty`, `suppress_tokens`, which can change answers" in card
        assert "generation_config" not in model_card(make_record(), corpus, encoder, {})
