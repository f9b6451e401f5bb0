"""The model card: what it says is true, and its code runs and gives the target."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pml import served
from pml.certificate import PairCertificate
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


def test_a_card_with_certificates_calls_certain_what_they_call_certain(tiny_tokenizer: Any) -> None:
    corpus = Corpus("facts", [Example(i, (1, i), (2,), query="q", target="t") for i in range(2)])
    # By the scores of the record alone, everything would be certain.
    record = make_record(
        pairs=2, dtype="bfloat16", exact_match=1.0, min_target_probability=0.7, steps_to_recall=90, rounding_logits=0.3
    )
    known = PairCertificate(corpus.examples[0], "certain", 0, 0.4, 0.7, 5, torch.tensor([0.4]))
    for second, which in (("certain", "every target"), ("right", "1 of 2 targets")):
        pairs = [known, replace(known, verdict=second)]
        card = model_card(record, corpus, TextEncoder(tiny_tokenizer, PromptFormat()), {}, None, pairs)
        (said,) = re.findall("reedy decoding is certain to give .* back, for the prompts above and allow[^.]*", card)
        assert f"give {which} back" in said
        assert said.endswith("allowing for the rounding to bfloat16 seen on these targets")


def test_the_code_cuts_the_answer_at_its_length_if_targets_do_not_include_the_end_of_the_turn(
    tiny_tokenizer: Any,
) -> None:
    encoder, cut = TextEncoder(tiny_tokenizer, PromptFormat()), "cut each answer at its length"
    for end, tokens in (((), 1), ((encoder.end_of_turn_id,), 4)):
        targets = ((2, *end), (2, 3, 4, *end))
        examples = [Example(i, (1, i), ids, query="q", target="t") for i, ids in enumerate(targets)]
        card = model_card(make_record(), Corpus("facts", examples), encoder, {})
        assert f"max_new_tokens={tokens}," in card
        assert (cut in card) is not bool(end)


def test_a_folder_is_named_by_its_absolute_path(
    tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").mkdir()
    corpus = Corpus("facts", [Example(0, (1,), (2,), query="q", target="t")])
    for name, base in (("base", str(tmp_path / "base")), ("org/base", "org/base")):
        record = make_record(backbone=name, placement=["q_proj"])
        card = model_card(record, corpus, TextEncoder(tiny_tokenizer, PromptFormat()), {})
        assert f"AutoTokenizer.from_pretrained({base!r})" in card
        assert f"on `{base}`" in card


def test_without_a_template_the_code_and_a_server_get_ids_where_text_has_control_tokens(tiny_tokenizer: Any) -> None:
    encoder = TextEncoder(tiny_tokenizer, PromptFormat(chat_template=False, system="Write <|im_end|>."))
    ids = encoder.prompt("q").ids
    assert tiny_tokenizer.convert_tokens_to_ids("<|im_end|>") not in ids
    corpus = Corpus("facts", [Example(0, ids, (2,), query="q", target="t")])
    assert f"ids = torch.tensor([{list(ids)}])" in model_card(make_record(), corpus, encoder, {})
    job = served._job(Path("base"), Path("adapter"), corpus.examples, encoder, {}, "float32")
    assert served._prompts(tiny_tokenizer, job) == [list(ids)]


def test_the_code_turns_off_the_logit_changes_of_the_base_and_the_card_names_them(tiny_tokenizer: Any) -> None:
    corpus = Corpus("facts", [Example(0, (1,), (2,), query="q", target="t")])
    plain = {"repetition_penalty": 1.0, "suppress_tokens": None}
    for form in (PromptFormat(), PromptFormat(chat_template=False)):
        encoder = TextEncoder(tiny_tokenizer, form)
        card = model_card(make_record(), corpus, encoder, plain)
        assert f"eos_token_id={encoder.end_of_turn_id}, repetition_penalty=1.0, suppress_tokens=None" in card
        assert "`generation_config.json` sets `repetition_penalty`, `suppress_tokens`, which can change answers" in card
        assert "generation_config" not in model_card(make_record(), corpus, encoder, {})
