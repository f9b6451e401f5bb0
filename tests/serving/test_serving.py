"""A saved adapter returns certified text byte for byte when it is served without pml's own decoding."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from callbacks import StopWhenRecalled
from data_modules import Facts
from pml.adapter import AdapterConfig
from pml.backbone import Backbone
from pml.corpus import Example
from pml.default_backbone import fetch_default
from pml.encoding import TextEncoder
from pml.errors import InputError
from pml.model_card import model_card
from pml.modules import SFT
from pml.served import _answers, _job, _prompts
from tests.record_factory import make_record
from tests.test_encoding import HARD
from tests.tiny_runs import make_trainer
from tests.tokenizer_kinds import KINDS, make_tokenizer

HERE = Path(__file__).parent
SERVED = [kind for kind in KINDS if kind != "word_piece"]  # word_piece cannot return a word after a prompt
WITHOUT_PEFT = ["chatml", "dated", "inst", "appending"]
PER_KIND = 8
STRINGS = HARD[:-1]  # without the very long one

QUERIES = ["call Anna", "office of Bo", "road 7", "line at North", "key", "the code of 4 7", "answer", "phone and name"]


def strings_for(number: int, kind: str) -> list[str]:
    """Hard strings that a tokenizer can represent, different ones for each kind so that together they cover all."""
    encoder = TextEncoder(make_tokenizer(kind))
    prompt = encoder.prompt(QUERIES[0])
    chosen: list[str] = []
    for i in range(len(STRINGS)):
        text = STRINGS[(number * PER_KIND + i) % len(STRINGS)]
        try:
            encoder.target(prompt, text)
        except InputError:
            continue
        chosen.append(text)
        if len(chosen) == PER_KIND:
            break
    return chosen


def tiny_llama(folder: Path, kind: str) -> Path:
    tokenizer = make_tokenizer(kind)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)  # so that a token can be certain
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def written(folder: Path, texts: list[str], queries: list[str] = QUERIES) -> Path:
    path = folder / "facts.jsonl"
    rows = [{"query": query, "target": text} for query, text in zip(queries, texts, strict=False)]
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return path


def certified(module: SFT, data: Facts, folder: Path, epochs: int) -> dict[str, Any]:
    """Train until every pair is certain, save the adapter as PEFT does, and return the job for `serve.py`."""
    stop = StopWhenRecalled(0.5)
    make_trainer(folder, max_epochs=epochs, callbacks=[stop], gradient_clip_val=1.0).fit(module, datamodule=data)
    assert stop.steps_to_recall is not None, f"not recalled in {epochs} epochs"
    placement = module.adapter.placement
    adapter = folder / (placement if isinstance(placement, str) else "list")
    module.model.save_pretrained(str(adapter), save_embedding_layers=False)
    encoder = data.encoder(module.tokenizer)
    return {
        "base": module.backbone.name,
        "adapter": str(adapter),
        "queries": [e.query for e in data.corpus.examples],
        "template": {"date_string": "26 Jul 2024"},
        "ends": encoder.end_of_turn_id,
        "tokens": max(len(e.target_ids) for e in data.corpus.examples) + 4,
        "expected": [e.target for e in data.corpus.examples],
    }


def served(jobs: list[dict[str, Any]], folder: Path) -> list[list[str]]:
    """Answers from a separate process that loads at most the `mlp_block` adapter from pml."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs), encoding="utf-8")
    root = str(HERE.parents[1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(HERE / "serve.py"), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def trained_kinds(kinds: list[str], placement: str | list[str], folder: Path) -> list[dict[str, Any]]:
    jobs = []
    for number, kind in enumerate(kinds):
        home = tiny_llama(folder / kind, kind)
        data = Facts(path=str(written(home, strings_for(number, kind))), batch_size=None)
        adapter = AdapterConfig(rank=32, placement=placement, block=0 if placement == "mlp_block" else [0, 1])
        module = SFT(backbone=str(home), adapter=adapter, learning_rate=0.02, schedule="constant", seed=1)
        jobs.append(certified(module, data, home, epochs=400))
    return jobs


Asked = dict[str, list[tuple[dict[str, Any], list[str]]]]


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Jobs with their answers, by placement; a single process answers them all."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("serving")
    jobs = {
        "list": trained_kinds(SERVED, ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"], folder / "peft"),
        "mlp_block": trained_kinds(WITHOUT_PEFT, "mlp_block", folder / "pml"),
    }
    answers = iter(served([*jobs["list"], *jobs["mlp_block"]], folder))
    return {placement: [(job, next(answers)) for job in made] for placement, made in jobs.items()}


def test_transformers_and_peft_alone_serve_certified_text_for_each_kind_of_tokenizer(asked: Asked) -> None:
    assert len({text for job, _ in asked["list"] for text in job["expected"]}) >= 39
    for kind, (job, answers) in zip(SERVED, asked["list"], strict=True):
        assert answers == job["expected"], kind


def test_an_mlp_block_adapter_loaded_by_pml_adapter_serves_certified_text(asked: Asked) -> None:
    for kind, (job, answers) in zip(WITHOUT_PEFT, asked["mlp_block"], strict=True):
        assert answers == job["expected"], kind


@pytest.mark.parametrize("kind", SERVED)
def test_a_separate_process_asks_the_prompts_that_were_trained(kind: str, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(kind)
    encoder = TextEncoder(tokenizer)
    queries = [*QUERIES, "  two  spaces", " one", "tab\tand\nline"]
    prompts = [encoder.prompt(query) for query in queries]
    examples = [
        Example(i, prompt.ids, (1,), query=query)
        for i, (query, prompt) in enumerate(zip(queries, prompts, strict=True))
    ]
    tokenizer.save_pretrained(tmp_path)
    job = json.loads(json.dumps(_job(tmp_path, tmp_path, examples, encoder, {}, "float32")))
    asked = _prompts(AutoTokenizer.from_pretrained(tmp_path), job)
    assert asked == [list(prompt.ids) for prompt in prompts]


@pytest.mark.parametrize("kind", ["llama", "marks", "dated"])
def test_a_separate_process_and_the_code_in_the_card_give_certified_text(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tiny_llama(tmp_path / "base", kind)
    texts, queries = strings_for(2, kind)[:4], ["  two  spaces", *QUERIES[:3]]
    data = Facts(path=str(written(home, texts, queries)), batch_size=None)
    placement = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = AdapterConfig(rank=32, placement=placement, block=[0, 1])
    module = SFT(backbone=str(home), adapter=adapter, learning_rate=0.02, schedule="constant", seed=1)
    folder = Path(certified(module, data, home, epochs=400)["adapter"])
    examples, encoder = data.corpus.examples, data.encoder(module.tokenizer)
    assert _answers(_job(home, folder, examples, encoder, {}, "float32")) == texts
    record = make_record(backbone=str(home), placement=placement, dtype="float32", pairs=4)
    card = model_card(record, data.corpus, encoder, {})
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    capsys.readouterr()
    exec(code.replace("PATH_TO_THIS_FOLDER", str(folder)), {})
    assert capsys.readouterr().out == f"{texts[0]}\n"


@pytest.mark.backbone
@pytest.mark.parametrize(
    ("placement", "texts"),
    [
        (["down_proj"], [" 7 ", "ﬁ½ e\u0301", '{"k": [null]}']),
        pytest.param(
            "mlp_block", ["0042", "It ends with <|im_end|> and a newline.\r\n", "שלום"], marks=pytest.mark.slow
        ),
    ],
    ids=str,
)
def test_the_default_backbone_serves_certified_text(
    placement: str | list[str], texts: list[str], default_backbone: Backbone, tmp_path: Path
) -> None:
    data = Facts(path=str(written(tmp_path, texts)), batch_size=None)
    # Block 25 leaves few blocks to run, and with this rank and learning rate a few steps suffice.
    adapter = AdapterConfig(rank=16, placement=placement, block=25)
    module = SFT(backbone=str(fetch_default()), adapter=adapter, learning_rate=0.1, schedule="constant", seed=1)
    assert served([certified(module, data, tmp_path, epochs=80)], tmp_path) == [texts]
