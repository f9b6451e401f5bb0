"""A merged model gives the same answers without PEFT, or merging is refused with the reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from pml.cli import main
from tests.conftest import CHAT_TEMPLATE
from tests.fits import save_sharpened
from tests.test_model_card import trained


def test_a_merged_model_recalls_the_targets_with_transformers_alone(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = save_sharpened(tiny_backbone_folder, tmp_path / "sharp")
    run = trained(backbone, tmp_path, "--model.adapter.placement=[q_proj,v_proj,gate_proj,up_proj,down_proj]")
    out = tmp_path / "merged"
    capsys.readouterr()
    assert main(["export", str(run), "--merge", f"--out={out}"]) == 0
    assert capsys.readouterr().out == f"{out}: 2 of 2 targets come back from it, as from the adapter\n"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert not any("lora" in name for name, _ in model.named_parameters())
    for query, target in (("code 0?", "007"), ("code 1?", "415")):
        turns = [{"role": "user", "content": query}]
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            said = model.generate(input_ids=torch.tensor([ids]), do_sample=False, max_new_tokens=9, pad_token_id=0)
        assert tokenizer.decode(said[0, len(ids) :], skip_special_tokens=True) == target

    assert main(["export", str(run), "--merge", f"--out={out}"]) == 2
    assert f"--out {out} exists; expected a folder that does not exist yet" in capsys.readouterr().err
    assert main(["export", str(run), f"--out={tmp_path / 'other'}"]) == 2
    assert "--merge is missing" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_merged_model_omits_base_generation_settings_that_change_greedy_decoding(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = save_sharpened(tiny_backbone_folder, tmp_path / "sharp")
    config = GenerationConfig(
        repetition_penalty=1.3,
        num_beams=4,
        early_stopping=True,
        length_penalty=2.0,
        suppress_tokens=[5],
        eos_token_id=2,
        do_sample=True,
        temperature=0.7,
        top_k=20,
    )
    config.save_pretrained(backbone)
    run = trained(backbone, tmp_path, "--model.adapter.placement=[down_proj]", "--trainer.max_epochs=1")
    capsys.readouterr()
    assert main(["export", str(run), "--merge", "--out=merged"]) == 0
    said = (
        "its generation_config.json omits the base model's repetition_penalty, num_beams, suppress_tokens, which change"
    )
    assert said in capsys.readouterr().out
    shipped = GenerationConfig.from_pretrained("merged")
    assert (shipped.repetition_penalty, shipped.suppress_tokens) == (1.0, None)
    # Plain `generate` decodes greedily, and ends where the template's turn does.
    assert (shipped.do_sample, shipped.temperature, shipped.top_k) == (False, None, None)
    end = AutoTokenizer.from_pretrained("merged").convert_tokens_to_ids("<|im_end|>")
    assert shipped.eos_token_id == [2, end]


def test_a_merged_model_ships_the_date_of_training_in_place_of_a_clock(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    backbone = save_sharpened(tiny_backbone_folder, tmp_path / "sharp")
    (backbone / "chat_template.jinja").write_text("{{ strftime_now('%Y') }} " + CHAT_TEMPLATE)
    run = trained(backbone, tmp_path, "--model.adapter.placement=[down_proj]", "--trainer.max_epochs=1")
    capsys.readouterr()
    assert main(["export", str(run), "--merge", "--out=merged"]) == 0
    assert "its chat template writes 2024-07-26, the date of training, in place of today's" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained("merged")
    turns = [{"role": "user", "content": "code 0?"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False).startswith("2024 <|im_start|>user")


def test_an_adapter_in_parallel_to_an_mlp_cannot_be_merged(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    run = trained(tiny_backbone_folder, tmp_path, "--trainer.max_epochs=1")
    assert main(["export", str(run), "--merge", "--out=merged"]) == 2
    assert "so there is no weight to merge it into" in capsys.readouterr().err
    assert not Path("merged").exists()
