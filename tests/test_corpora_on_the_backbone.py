"""Synthetic corpora through `pml fit` on the default backbone: the figures in the record are correct."""

import itertools
import math
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from pml.backbone import Backbone
from pml.cli import main
from pml.decoding import generate_greedily
from pml.encoding import TextEncoder
from pml.records import Record, read_record
from pml.runs import open_run

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def fit(config: str, *arguments: str) -> Record:
    """Fit a reduced version of a shipped configuration in the working directory."""
    small = ["--data.chat_template=false", "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=0"]
    # A high block makes steps short, and a high learning rate makes them few; only what the tests read is measured.
    small += ["--model.adapter.block=25", "--model.adapter.rank=16", "--model.learning_rate=0.1"]
    small += ["--trainer.callbacks=[]"]
    for name in ("VerbatimRecall", "StopWhenRecalled", "Generalization", "RunRecord"):
        small += [f"--trainer.callbacks+={name}"]
    assert main(["fit", f"--config={CONFIGS / config}", "--trainer.accelerator=cpu", *small, *arguments]) == 0
    return read_record(Path("runs") / Path(config).stem / "version_0" / "record.json")


@pytest.mark.slow
@pytest.mark.backbone
def test_a_linear_rule_is_memorised_and_its_held_out_points_are_measured(
    default_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    record = fit("linear_rule.yaml", "--data.size=3", "--trainer.max_epochs=150")
    assert (record.corpus, record.pairs) == ("linear_rule", 7)
    assert record.generated_exact_match == record.exact_match == 1

    # The adapter, loaded again and prompted with every point of the grid.
    module, data = open_run(Path("runs/linear_rule/version_0"))
    corpus = data.corpus
    queries = {module.tokenizer.decode(list(e.prompt_ids)) for e in corpus.examples}
    end = TextEncoder(module.tokenizer).end_of_turn_id
    right = {}
    for x, y in itertools.product(range(3), repeat=2):
        query = f"f({x}, {y}) ="
        with torch.no_grad():
            said = generate_greedily(module.model, torch.tensor([module.tokenizer(query)["input_ids"]]), 6)[0].tolist()
        value = [*module.tokenizer(str(3 * x + 5 * y + 7))["input_ids"], end]
        right[query] = said[: len(value)] == value
    assert all(right[query] for query in queries)
    held_out = [query for query in right if query not in queries]
    figures = record.corpus_figures
    assert len(held_out) == figures["held_out_pairs"] == 2
    assert figures["held_out_generated_exact_match"] == sum(right[query] for query in held_out) / 2
    assert figures["held_out_exact_match"] == figures["held_out_generated_exact_match"]


@pytest.mark.slow
@pytest.mark.backbone
def test_the_stored_bits_of_biographies_count_each_fact_once(
    default_backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--data.people=2", "--data.attributes=[birth_city, employer, badge_number]", "--trainer.max_epochs=40"]
    record = fit("biographies.yaml", *options)
    # The first of two people has one phrasing per fact, the second two: three facts with one prompt, three with two.
    assert (record.corpus, record.pairs) == ("biographies", 9)
    # 64 cities, 32 employers, and two numbers of 900,000.
    bits = 2 * 6 + 2 * 5 + math.log2(900_000 * 899_999)
    assert record.corpus_entropy_bits == pytest.approx(bits)
    assert record.corpus_figures["bits_per_person"] == pytest.approx(bits / 2)
    assert record.exact_match == record.corpus_figures["people_exact_match"] == 1
    assert record.corpus_figures["exact_match_employer"] == 1

    tokens = pq.read_table("runs/biographies/version_0/tokens.parquet").to_pydict()
    missing = [0.0] * 9
    for example, loss in zip(tokens["example_id"], tokens["loss"], strict=True):
        missing[example] += loss
    once = sum(missing[:3]) + sum(missing[3:]) / 2
    assert record.memorized_bits == pytest.approx(bits - once / math.log(2), rel=1e-6)
    assert 0.5 * bits < record.memorized_bits <= bits
