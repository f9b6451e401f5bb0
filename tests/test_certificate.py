"""The certificate pair by pair: hand-worked margins, verdicts that decoding confirms, and the command."""

import gc
import json
import math
import shutil
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from transformers import GenerationConfig

import pml.decoding
from callbacks import StopWhenRecalled
from pml.adapter import AdapterConfig
from pml.backbone import Backbone, load_backbone
from pml.certificate import (
    allow_for_rounding,
    certify,
    greedy_answers,
    log_probability,
    measure_rounding,
    sampled_exactly,
    token_margins,
)
from pml.cli import main
from pml.commands._facts import base_of
from pml.corpus import Example
from pml.decoding import plain_decoding
from pml.default_backbone import DEFAULT_HUB_ID
from pml.evaluating import evaluating
from pml.modules import SFT, MemFT, Memorization
from tests.fits import module_on, save_sharpened
from tests.tiny_architectures import tiny_model
from tests.tiny_runs import Ids, make_trainer, uneven


def test_a_margin_is_the_distance_to_the_best_other_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.5], [4.0, 1.0, 0.0]])
    margins, rivals = token_margins(logits, torch.tensor([1, 2]))
    assert margins.tolist() == [0.5, -4.0]
    assert rivals.tolist() == [2, 0]


def test_margins_are_float32_whatever_the_dtype_of_the_logits() -> None:
    margins, _ = token_margins(torch.tensor([[1.0, 3.0]], dtype=torch.bfloat16), torch.tensor([1]))
    assert margins.dtype == torch.float32


class Fixed(torch.nn.Module):
    """A model whose logits depend only on the last token."""

    def __init__(self, table: dict[int, list[float]]) -> None:
        super().__init__()
        self.table = table
        self.device = torch.device("cpu")
        text = type("Text", (), {"vocab_size": 4})
        self.config = type("Config", (), {"get_text_config": lambda _: text})()

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.tensor([[self.table[i] for i in row] for row in input_ids.tolist()])
        return type("Output", (), {"logits": logits, "past_key_values": None})


def test_a_verdict_is_decided_by_the_wrong_token_or_else_by_the_smallest_margin() -> None:
    even = [0.0, 0.1, 0.0, 0.0]  # token 1 is the argmax with p = 0.27
    model = Fixed({0: [0.0, 9.0, 0.0, 0.0], 1: even, 2: [5.0, 0.0, 0.0, 4.0], 3: [0.0, 0.0, 7.0, 0.0]})
    certain, right, failing = certify(
        model, [Example(0, (0,), (1,)), Example(1, (0,), (1, 1)), Example(2, (3,), (2, 3, 2))]
    )
    assert (certain.verdict, certain.position, certain.margin) == ("certain", 0, 9.0)
    assert certain.probability == pytest.approx(math.exp(9) / (math.exp(9) + 3))
    assert (right.verdict, right.position) == ("right", 1)
    assert right.margin == pytest.approx(0.1)
    # The position is that of the wrong token, not of the first or last.
    assert (failing.verdict, failing.position, failing.margin, failing.rival) == ("failing", 1, -1.0, 0)
    assert failing.margins.tolist() == [7.0, -1.0, 7.0]


def test_a_pair_whose_token_has_exactly_p_one_half_is_right_but_not_certain() -> None:
    # One token has half the probability, and two others a quarter each.
    model = Fixed({0: [0.0, math.log(2), 0.0, -math.inf]})
    (known,) = certify(model, [Example(0, (0,), (1,))])
    assert (known.verdict, known.probability) == ("right", 0.5)
    assert known.margin == pytest.approx(math.log(2))


def test_a_pair_is_certain_only_if_its_margins_exceed_the_rounding() -> None:
    model = Fixed({0: [0.0, 9.0, 0.0, 0.0], 1: [0.0, 0.0, 2.5, 0.0], 2: [0.0, 0.0, 0.0, 0.0]})
    examples = [Example(0, (0,), (1,)), Example(1, (0,), (1, 2)), Example(2, (0,), (2,))]
    certificates = certify(model, examples)
    assert [known.verdict for known in certificates] == ["certain", "certain", "failing"]
    for rounding, verdict in ((0.0, "certain"), (2.4, "certain"), (2.5, "right")):
        allowed = allow_for_rounding(certificates, rounding)
        assert [known.verdict for known in allowed] == ["certain", verdict, "failing"]
        assert [known.margin for known in allowed] == [known.margin for known in certificates]


def test_rounding_is_the_largest_change_of_a_margin_and_small_margins_are_measured_first() -> None:
    model = Fixed({0: [0.0, 9.0, 0.0, 0.0], 1: [0.0, 0.0, 2.5, 0.0], 2: [0.0, 0.0, 0.0, 4.0]})
    examples = [Example(0, (0,), (1,)), Example(1, (0,), (1, 2, 3))]
    forced = [torch.tensor([9.5]), torch.tensor([8.75, 2.5, 4.0])]
    assert measure_rounding(model, examples, forced) == (0.5, 4)
    assert measure_rounding(model, examples, forced, most_tokens=3) == (0.25, 3)
    assert measure_rounding(model, examples, [*forced[:1], torch.tensor([9.0, 2.0, 4.0])], most_tokens=1) == (0.0, 1)


class Alone(Fixed):
    """A model that lowers the logit of token 1 by a half in a batch of one row."""

    def forward(self, input_ids: torch.Tensor, **more: Any) -> Any:
        out = super().forward(input_ids, **more)
        out.logits[..., 1] -= 0.5 * (len(input_ids) == 1)
        return out


def test_rounding_includes_that_of_a_row_decoded_alone() -> None:
    examples, margins = [Example(i, (0,), (1,)) for i in range(2)], [torch.tensor([9.0])] * 2
    assert measure_rounding(Alone({0: [0.0, 9.0, 0.0, 0.0]}), examples, margins) == (0.5, 2)


@pytest.mark.parametrize("architecture", ["llama", "jamba"])
def test_a_long_target_has_the_same_certificate_in_chunks_as_in_one_forward_pass(
    architecture: str, make_tiny_backbone: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three tokens at a time; a model with a recurrent state can continue from it by only one token.
    model: Any = make_tiny_backbone("llama").model if architecture == "llama" else tiny_model(architecture).eval()
    monkeypatch.setitem(pml.decoding.LOGITS_BYTES, "cpu", 4 * 3 * model.config.vocab_size)
    example = Example(0, (5, 6, 7), (9, 8, 7, 16, 15, 14, 3, 2))
    targets = torch.tensor(example.target_ids)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([example.prompt_ids + example.target_ids])).logits[0, 2:-1].float()
    (known,) = certify(model, [example])
    torch.testing.assert_close(known.margins, token_margins(logits, targets)[0], rtol=1e-4, atol=1e-4)
    log_p = (logits / 0.7).log_softmax(-1)[range(8), targets]
    assert log_probability(model, example, 0.7) == pytest.approx(float(log_p.sum()), rel=1e-4)
    # The position counts from the start of the target, not of a chunk.
    wrong = int((known.margins <= 0).nonzero()[0])
    assert (known.position, known.rival) == (wrong, int(token_margins(logits, targets)[1][wrong]))
    assert known.probability == pytest.approx(float(logits.softmax(-1)[wrong, targets[wrong]]), rel=1e-4)


@pytest.fixture(scope="module")
def folder(tiny_backbone_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_sharpened(tiny_backbone_folder, tmp_path_factory.mktemp("sharp"))


@pytest.mark.parametrize(("epochs", "stop"), [(12, None), (300, 0.5)], ids=["partly", "recalled"])
def test_verdicts_agree_with_greedy_decoding_pair_by_pair(
    epochs: int, stop: float | None, folder: Path, tmp_path: Path
) -> None:
    module = module_on(folder)
    data = Ids(uneven(8))
    watch = [StopWhenRecalled(stop)] if stop is not None else []
    make_trainer(tmp_path, max_epochs=epochs, callbacks=watch, gradient_clip_val=1.0).fit(module, datamodule=data)
    model = module.eval().model
    certificates = certify(model, data.corpus.examples)
    verdicts = {known.verdict for known in certificates}
    assert verdicts == {"certain"} if stop else "failing" in verdicts
    moved, tokens = measure_rounding(model, data.corpus.examples, [known.margins for known in certificates])
    assert 0 <= moved < 1e-3
    assert tokens == data.corpus.target_tokens
    for batch_size in (1, 3):
        for cache in (True, False):
            answers = greedy_answers(model, data.corpus.examples, batch_size=batch_size, use_cache=cache)
            for known, answer in zip(certificates, answers, strict=True):
                if abs(known.margin) > moved:
                    assert (answer == known.example.target_ids) is (known.verdict != "failing")
                    if known.verdict == "failing":
                        assert answer[: known.position] == known.example.target_ids[: known.position]
                        assert answer[known.position] == known.rival
    module.release()


def test_the_share_of_samples_that_equal_the_target_matches_its_probability(folder: Path, tmp_path: Path) -> None:
    module = module_on(folder)
    data = Ids([((1, 2, 3), (5, 6))])
    make_trainer(tmp_path, max_epochs=8, gradient_clip_val=1.0).fit(module, datamodule=data)
    (example,) = data.corpus.examples
    model = module.eval().model
    logits = model(input_ids=torch.tensor([[1, 2, 3, 5]])).logits[0, 2:].double()
    for temperature in (1.0, 0.7):
        expected = (logits / temperature).log_softmax(dim=-1)[[0, 1], [5, 6]].sum().item()
        assert log_probability(model, example, temperature) == pytest.approx(expected, rel=1e-4)
        p, n = math.exp(expected), 400
        share = sampled_exactly(model, example, n, temperature)
        assert abs(share - p) < 4 * math.sqrt(p * (1 - p) / n) + 1e-9  # four standard errors
        assert 0.02 < p < 0.98  # otherwise hardly any share could be wrong
    module.release()


@pytest.mark.parametrize(
    "setting",
    [{"min_p": 0.9}, {"typical_p": 0.1}, {"epsilon_cutoff": 0.5}, {"eta_cutoff": 0.5}, {"top_k": 1}, {"top_p": 0.1}],
    ids=str,
)
def test_sampling_ignores_the_truncation_settings_that_the_base_model_ships(
    setting: dict[str, Any], tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_backbone.model
    logits = model(input_ids=torch.tensor([[1, 2, 3]])).logits[0, -1]
    third = int(logits.topk(3).indices[-1])  # which every such setting cuts off
    monkeypatch.setattr(model, "generation_config", GenerationConfig(**setting))
    p, n = float(logits.softmax(-1)[third]), 4000
    share = sampled_exactly(model, Example(0, (1, 2, 3), (third,)), n)
    assert 0 < abs(share - p) < 4 * math.sqrt(p * (1 - p) / n)  # four standard errors


@pytest.mark.parametrize(
    "setting",
    [
        {"encoder_repetition_penalty": 3.0},
        {"stop_strings": ["a"]},
        {"return_dict_in_generate": True},
        {"num_beams": 2, "num_return_sequences": 2},
        {"max_time": 1e-9},
    ],
    ids=str,
)
def test_greedy_answers_ignore_the_generation_settings_that_the_base_model_ships(
    setting: dict[str, Any], tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [Example(i, (1, 2 + i), (3,) * 5) for i in range(2)]
    before = greedy_answers(tiny_backbone.model, examples)
    monkeypatch.setattr(tiny_backbone.model, "generation_config", GenerationConfig(**setting))
    assert greedy_answers(tiny_backbone.model, examples) == before
    assert plain_decoding(tiny_backbone.model).keys() == setting.keys()


def fit(backbone: Path, *more: str) -> int:
    arguments = ["fit", "--model=SFT", f"--model.backbone={backbone}", "--model.adapter.block=2"]
    arguments += ["--model.adapter.rank=16", "--model.learning_rate=0.02", "--data=Facts", "--data.path=f.jsonl"]
    arguments += ["--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    return main([*arguments, *more])


@pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path` was renamed")
def test_certify_takes_a_run_or_an_adapter_with_data_and_recall_takes_the_same_adapter(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"query": f"code {i}?", "target": code} for i, code in enumerate(("007", "415", "900"))]
    Path("f.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert fit(folder, "--trainer.max_epochs=300") == 0
    capsys.readouterr()
    run = "runs/fit/version_0"
    assert main(["certify", run, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [pair["verdict"] for pair in result["pairs"]] == ["certain"] * 3
    assert [pair["query"] for pair in result["pairs"]] == ["code 0?", "code 1?", "code 2?"]
    ways = [(way["dtype"], way["batch_size"], way["cache"]) for way in result["decodings"]]
    assert ways == [(d, b, c) for d in ("float32", "bfloat16") for b in (1, 8) for c in (True, False)]
    assert all(way["exact"] == 3 for way in result["decodings"] if way["dtype"] == "float32")
    assert result["margins_move_by"]["float32"] < 1e-3 < result["margins_move_by"]["bfloat16"]
    assert result["margins_measured_on_tokens"] == {"float32": 12, "bfloat16": 12}

    # An adapter that lies in a run's folder has the base of that run.
    Path("adapter_config.json").write_text(Path(run, "adapter/adapter_config.json").read_text())
    asked = ["certify", f"--adapter={run}/adapter", "--data=f.jsonl", "--dtypes=float32"]
    assert main(asked) == 0
    Path(run, "adapter/adapter_config.json").write_text(
        json.dumps({**json.loads(Path("adapter_config.json").read_text()), "base_model_name_or_path": "org/gone"})
    )
    assert main(asked) == 0
    capsys.readouterr()
    # Certain pairs have to come back when they are decoded.
    with monkeypatch.context() as patch:
        patch.setattr("pml.certificate.greedy_answers", lambda model, examples, **_: [()] * len(examples))
        assert main(asked) == 1
    out, err = capsys.readouterr()
    assert "of 3 pairs 3 are certain" in out and "0 of 3" in out
    assert "3 certain pairs did not come back from transformers' greedy decoding in float32: something in the" in err

    Path("other.jsonl").write_text(json.dumps({"query": "code 0?", "target": "123"}))
    asked = ["certify", f"--adapter={run}/adapter", "--data=other.jsonl", f"--backbone={folder}"]
    assert main([*asked, "--dtypes=float32"]) == 1
    out = capsys.readouterr().out
    assert "of 1 pairs 0 are certain, 0 right but not certain, 1 failing" in out
    assert "came back" in out
    assert "0 of 1" in out
    # `recall` takes the same arguments.
    assert main(["recall", *asked[1:]]) == 0
    out = capsys.readouterr().out
    assert "true     123" in out and "recalled 007" in out
    assert "greedy decoding: exact match 0.0000" in out
    assert main(["recall", *asked[1:], "--prompt=code 1?", "--json"]) == 0
    (answered,) = json.loads(capsys.readouterr().out)
    assert answered["answer"].startswith("415")


def test_an_adapter_is_certified_in_the_dtype_of_its_run_or_in_the_first_of_dtypes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.jsonl").write_text(json.dumps({"question": "code?", "target": "007"}))
    named = ["--data=f.jsonl", "--query_column=question"]
    assert fit(folder, "--trainer.max_epochs=1", "--model.dtype=bfloat16", "--data.query_column=question") == 0
    run = Path("runs/fit/version_0")
    shutil.copytree(run / "adapter", "elsewhere")
    models: list[weakref.ref[Any]] = []
    dtypes: list[str] = []

    def load(name: str, dtype: str) -> Backbone:
        # The one before it is freed.
        assert not any(model() for model in models)
        loaded = load_backbone(name, dtype)
        models.append(weakref.ref(loaded.model))
        dtypes.append(dtype)
        return loaded

    monkeypatch.setattr("pml.backbone.load_backbone", load)
    for adapter, first in ((run / "adapter", "bfloat16"), (Path("elsewhere"), "float32")):
        capsys.readouterr()
        dtypes.clear()
        main(["certify", f"--adapter={adapter}", *named, "--dtypes", "float32", "bfloat16", "--json"])
        result = json.loads(capsys.readouterr().out)
        assert (result["dtype"], dtypes[0], len(dtypes)) == (first, first, 2)
    monkeypatch.setattr("pml.memorization.load_backbone", load)
    for adapter, dtype in ((run / "adapter", "bfloat16"), (Path("elsewhere"), "float32")):
        gc.collect()
        assert main(["recall", f"--adapter={adapter}", *named]) == 0
        assert dtypes[-1] == dtype


def test_certify_keeps_what_it_found_if_the_model_does_not_fit_in_another_dtype(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("f.jsonl").write_text(json.dumps({"query": "code?", "target": "007"}))
    assert fit(folder, "--trainer.max_epochs=1") == 0

    def load(name: str, dtype: str) -> Backbone:
        if dtype == "bfloat16":
            raise torch.OutOfMemoryError
        return load_backbone(name, dtype)

    monkeypatch.setattr("pml.backbone.load_backbone", load)
    capsys.readouterr()
    assert main(["certify", "runs/fit/version_0", "--json"]) == 1  # not trained enough
    result = json.loads(capsys.readouterr().out)
    assert {way["dtype"] for way in result["decodings"]} == {"float32"}
    assert result["margins_move_by"].keys() == {"float32"}
    assert "the model does not fit into memory in bfloat16; the rest holds without it" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected either the folder of a run, or --adapter with --data"),
        (["run", "--data=pairs.jsonl"], "--data is only for --adapter; a run has its own, so leave it out"),
        (["run", "--query_column=q"], "--query_column is only for --adapter; a run has its own, so leave it out"),
        (["run", "--adapter=a"], "expected either the folder of a run"),
        (["--adapter=a"], "--adapter needs --data"),
        (["--adapter=a", "--data=f.jsonl"], "a: no such folder; expected an adapter saved by PEFT"),
        (["run", "--dtypes=int8"], "--dtypes has 'int8'; expected some of float32, bfloat16, float16"),
        (["run", "--limit=0"], "--limit is 0; expected at least 1 pair"),
        (["run"], "config.yaml: no such file"),
    ],
)
def test_invalid_arguments_are_reported_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["certify", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pml certify: error: ")
    assert message in line


def test_the_default_base_of_an_adapter_from_elsewhere_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": DEFAULT_HUB_ID}))
    assert base_of(tmp_path) == "smollm2-135m"
    assert f"the 4-bit weights of {DEFAULT_HUB_ID} from the package index" in caplog.text
    assert f"give --backbone {DEFAULT_HUB_ID}" in caplog.text


@pytest.mark.parametrize("command", ["certify", "recall"])
def test_an_adapter_of_a_pinned_revision_needs_that_revision_as_its_backbone(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    config = {"peft_type": "LORA", "base_model_name_or_path": "org/base", "revision": "v2"}
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    Path("f.jsonl").write_text(json.dumps({"query": "code?", "target": "007"}))
    assert main([command, "--adapter=a", "--data=f.jsonl"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a: its base model is revision v2 of org/base" in line
    assert "`hf download org/base --revision v2 --local-dir FOLDER` and give --backbone FOLDER" in line


ADAPTERS = [
    (SFT, "mlp_block", 16, "float32"),
    (MemFT, ["down_proj"], 8, "float32"),
    (MemFT, "mlp_block", 16, "bfloat16"),
    (SFT, ["q_proj", "v_proj", "down_proj"], 8, "bfloat16"),
]


class Look(Callback):
    """Compares certificates with generation every tenth epoch, so half-trained states are included."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples
        self.seen: Counter[tuple[str, bool]] = Counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch % 10 == 9:
            with evaluating(pl_module):
                self.look(pl_module.model)

    def look(self, model: Any) -> None:
        certificates = certify(model, self.examples)
        rounding = measure_rounding(model, self.examples, [known.margins for known in certificates]).logits
        certificates = allow_for_rounding(certificates, rounding)
        for batch_size in (1, 3):
            answers = greedy_answers(model, self.examples, batch_size=batch_size)
            for known, answer in zip(certificates, answers, strict=True):
                exact = answer == known.example.target_ids
                self.seen[known.verdict, exact] += 1
                if known.verdict == "certain":
                    assert exact
                # Generation is predictable only if all margins up to the deciding one exceed the rounding.
                elif float(known.margins[: known.position + 1].abs().min()) > rounding:
                    # Rounding may still decide which of two wrong tokens wins, so only the position is compared.
                    pairs = enumerate(zip(answer, known.example.target_ids, strict=True))
                    wrong = next((t for t, (given, target) in pairs if given != target), None)
                    assert wrong == (known.position if known.verdict == "failing" else None)


@pytest.mark.parametrize(("method", "placement", "rank", "dtype"), ADAPTERS)
def test_generation_confirms_the_certificates_of_trained_and_half_trained_adapters(
    method: type[Memorization], placement: str | list[str], rank: int, dtype: str, folder: Path, tmp_path: Path
) -> None:
    adapter = AdapterConfig(rank=rank, placement=placement, block=2)
    module, data = module_on(folder, method, adapter=adapter, dtype=dtype), Ids(uneven(6))
    look = Look(data.examples)
    make_trainer(tmp_path, max_epochs=60, callbacks=[look], gradient_clip_val=1.0).fit(module, datamodule=data)
    # Otherwise nothing was compared.
    assert look.seen["certain", True] > 0
    assert look.seen["failing", False] > 0
    assert look.seen["certain", False] == 0


def test_nan_logits_certify_nothing() -> None:
    broken = [math.nan] * 4
    model = Fixed({0: [0.0, 9.0, 0.0, 0.0], 1: broken})
    (known,) = certify(model, [Example(0, (0,), (1, 2))])
    assert (known.verdict, known.position) == ("failing", 1)
    finite = Example(0, (0,), (1,))
    (good,) = certify(model, [finite])
    rounding = measure_rounding(Fixed({0: broken}), [finite], [good.margins])
    assert rounding.logits == math.inf
    assert allow_for_rounding([good], rounding.logits)[0].verdict == "right"
