"""The report page: what it says, that it is self-contained, and that nothing in a record can break it."""

import base64
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from record_factory import make_record
from simulated_runs import write_diverged_run, write_history, write_simulated_grid, write_simulated_run

from pml.cli import main
from pml.errors import InputError
from pml.figures import Curves
from pml.records import Record, read_records, write_record
from pml.report import PAGE_NAME, Report, make_report, write_report
from pml.report.studies import _recall_panels
from pml.report.training import Example, _phase_panel, curves_of, training_part
from pml.token_history import History

VOID = {"meta", "img", "br", "hr", "link", "input"}
HOSTILE = """<script>alert(1)</script><img src=x onerror=alert(2)>"' {{ 7 * 7 }} {% x %} & $x^{2$ javascript:alert(3)"""


class Page(HTMLParser):
    """A parsed page: its elements with their attributes, and its text; parsing asserts that tags nest properly."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", " ".join(data.split())))

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def said(self, tag: str) -> list[str]:
        return [text for name, text in self.texts if name == tag]

    @property
    def text(self) -> str:
        return " ".join(text for tag, text in self.texts if tag != "style")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a grid of both methods on random tokens, with histories."""
    folder = tmp_path_factory.mktemp("runs")
    write_simulated_grid(folder, ranks=(1, 2, 4), lengths=(128, 256), methods=("sft", "memft"), pairs=4)
    for run in folder.iterdir():
        write_history(run)
    return folder


@pytest.fixture(scope="module")
def report(runs: Path) -> Report:
    return make_report(read_records([runs]), title="A grid")


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(report.html)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Record]:
    """Two runs, too few for a law."""
    folder = tmp_path_factory.mktemp("small")
    return read_records([write_simulated_grid(folder, ranks=(1, 2), lengths=(64,), seeds=(0,))])


@pytest.fixture(scope="module")
def small_report(small: dict[Path, Record]) -> Report:
    return make_report(small)


@pytest.fixture(scope="module")
def reports(small_report: Report) -> tuple[Report, Report]:
    """Two reports that differ only in their title."""
    return small_report, replace(small_report, html=small_report.html.replace("What the adapters remember", "Another"))


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of one run per method, with a history, on four targets of 16 tokens."""
    folder = tmp_path_factory.mktemp("tokens")
    for method in ("sft", "memft"):
        write_history(write_simulated_run(folder / method, 4, 64, method=method, pairs=4))
    return Page(make_report(read_records([folder])).html)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """The report of records with hostile content wherever they hold text."""
    folder = tmp_path_factory.mktemp("hostile")
    names = ("backbone", "backbone_hash", "dtype", "init", "corpus", "corpus_hash", "git_commit", "placement")
    fields: dict[str, Any] = dict.fromkeys(names, HOSTILE)
    fields |= {"versions": {HOSTILE: HOSTILE}, "hardware": {HOSTILE: HOSTILE}}
    fields |= {"corpus_settings": {HOSTILE: HOSTILE}, "retention": {HOSTILE: {"loss_before": 1.0}}}
    write_simulated_grid(
        folder, ranks=(1, 2, 4), lengths=(128, 256), seeds=(0,), method_settings={HOSTILE: HOSTILE}, **fields
    )
    write_history(write_simulated_run(folder / "<b>other", 1, 64, **fields, method_settings={"weighting": HOSTILE}))
    with pytest.MonkeyPatch.context() as patch:  # the fixture `no_profiles`, for the whole module
        patch.setattr("pml.law.fit.profile_intervals", lambda *_: {})
        return make_report(read_records([folder]), title=HOSTILE)


class TestPage:
    def test_the_page_has_a_heading_for_each_section_with_the_laws_first(self, page: Page) -> None:
        assert page.said("h1") == page.said("title") == ["A grid"]
        assert page.said("h2") == ["Laws side by side", "Random tokens"]
        laws = ["The law: SFT", "The law: MemFT OnlyThreshold"]
        assert page.said("h3") == [*laws, "Methods", "Recall by rank", "Target tokens", "Runs"]

    def test_the_page_needs_no_network_and_runs_no_code(self, page: Page, report: Report) -> None:
        for tag, attributes in page.elements:
            assert tag not in ("script", "iframe", "object", "embed", "link", "base", "form")
            assert not [name for name in attributes if name.startswith("on") or name in ("srcset", "style")]
            assert attributes.get("src", "data:").startswith("data:image/svg+xml;base64,") or "src" not in attributes
            assert attributes.get("href", "#").startswith("#")
        (policy,) = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
        assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
        style = report.html.partition("<style>")[2].partition("</style>")[0]
        assert "url(" not in style
        assert "@import" not in style

    def test_the_ids_of_elements_are_unique(self, page: Page) -> None:
        places = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
        assert len(places) == len(set(places))

    def test_every_figure_has_a_text_description_of_its_own(self, page: Page) -> None:
        images = page.all("img")
        # Five per law, three of recall and three of tokens; the runs have no results of greedy decoding.
        assert len(images) == 2 * 5 + 3 + 3
        assert all(len(image["alt"]) > 40 for image in images)
        assert len({image["alt"] for image in images}) == len(images)

    def test_images_are_svg_drawings_that_load_nothing(self, page: Page) -> None:
        for image in page.all("img"):
            drawing = base64.b64decode(image["src"].partition(",")[2])
            root = ElementTree.fromstring(drawing)
            assert root.tag == "{http://www.w3.org/2000/svg}svg"
            links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
            assert all(link.startswith(("#", "data:")) for link in links)

    def test_every_figure_is_also_available_as_png(self, page: Page, report: Report) -> None:
        named = [attributes["data-png"] for attributes in page.all("figure") if "data-png" in attributes]
        assert sorted(named) == sorted(report.figures)
        assert all(content.startswith(b"\x89PNG\r\n") for content in report.figures.values())

    def test_the_page_is_laid_out_for_phones_and_for_print(self, page: Page, report: Report) -> None:
        assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
        assert "@media print" in report.html
        # A table may be wider than the screen, so each lies in a region that scrolls, also by keyboard.
        assert len([a for a in page.all("div") if a.get("class") == "scroll" and a.get("tabindex") == "0"]) == len(
            page.all("table")
        )
        # On a phone, the name of its column precedes each value.
        assert all(cell["data-label"] for cell in page.all("td"))

    def test_each_method_has_its_own_law_with_its_symbols_explained(self, page: Page, report: Report) -> None:
        assert report.html.count('<p class="equation">') == 3  # the laws side by side, and one for each method
        assert report.html.count("<i>L</i>: loss reduction in nats per target token; ") == 2
        assert page.text.count("95 %, profile") == 2
        assert page.text.count("Forms of the law") == page.text.count("From loss to recall") == 2

    def test_methods_are_compared_with_intervals_and_a_verdict(self, page: Page) -> None:
        assert "MemFT OnlyThreshold against SFT" in page.text
        assert "95 % interval" in page.said("th")
        assert "MemFT OnlyThreshold against SFT:" in page.text

    @pytest.mark.usefixtures("no_figures")
    def test_methods_whose_runs_stop_at_recall_are_compared_by_their_steps_to_recall(self, tmp_path: Path) -> None:
        for seed, steps in enumerate(((150, 100), (160, 90), (170, 80), (300, 70))):
            for method, needed in zip(("sft", "memft"), steps, strict=True):
                recalled: dict[str, Any] = {"optimizer_steps": needed, "steps_to_recall": needed}
                if needed == 300:
                    recalled |= {"steps_to_recall": None, "sub_threshold_fraction": 0.1}
                write_simulated_run(tmp_path / f"{method}-{seed}", 4, 64, seed, method, **recalled)
        text = Page(make_report(read_records([tmp_path])).html).text
        assert "steps to all certain 160.0 90.0 -70.0" in text
        assert "better in steps to all certain (-70.0 steps; 95 % interval" in text
        assert "(budgets differ: 150 and 100 optimiser steps" in text
        assert "Methods are not compared" not in text

    def test_every_run_is_listed_by_name(self, page: Page, runs: Path) -> None:
        assert all(path.name in page.text for path in runs.iterdir())

    def test_bits_per_parameter_are_those_of_the_record(self, tmp_path: Path) -> None:
        for rank in (1, 2):
            stored = {"memorized_bits": 709.632 * rank, "bits_per_parameter": 0.616}
            write_simulated_run(tmp_path / str(rank), rank, 64, corpus_settings={"templates": 3}, **stored)
        assert Page(make_report(read_records([tmp_path])).html).text.count("0.616") == 2

    def test_settings_that_differ_are_listed_apart_from_those_that_all_runs_share(self, page: Page) -> None:
        text = page.text
        shared, differing = text.index("Settings of all runs"), text.index("Settings in which runs differ")
        assert shared < text.index("method: learning_rate 0.2") < differing
        assert "pml.weighting.OnlyThreshold (12 runs); pml.weighting.Uniform (12 runs)" in text[differing:]

    def test_the_same_runs_give_the_same_page(self, small: dict[Path, Record], small_report: Report) -> None:
        assert make_report(small) == small_report


@pytest.mark.usefixtures("no_profiles")
class TestIncompleteData:
    def test_the_page_of_runs_that_form_no_grid_does_not_mention_a_law(self, small_report: Report) -> None:
        page = Page(small_report.html)
        assert "law" not in page.text.lower().partition("provenance")[0]
        assert page.said("h3") == ["Recall by rank", "Runs"]

    def test_runs_of_a_single_rank_have_no_figures(self, tmp_path: Path) -> None:
        write_simulated_run(tmp_path / "a", 4, 64)
        write_simulated_run(tmp_path / "b", 4, 64, method="memft")
        page = Page(make_report(read_records([tmp_path])).html)
        assert page.all("img") == []
        assert page.said("h3") == ["Methods", "Runs"]

    def test_the_page_says_that_a_grid_is_too_small_for_a_law(self, tmp_path: Path) -> None:
        write_simulated_grid(tmp_path, ranks=(1, 2), lengths=(64, 128), seeds=(0,), corpus_entropy_bits=None)
        text = Page(make_report(read_records([tmp_path])).html).text
        assert "SFT: no law (4 of 4 runs (none left out) can be used" in text

    def test_runs_without_per_token_results_are_counted(self) -> None:
        report = make_report({Path("gone/a"): make_record(), Path("gone/b"): make_record(rank=8)})
        assert (
            "Per-token results cannot be read for 2 runs; the first error: gone/b/tokens.parquet: no such file"
            in Page(report.html).text
        )
        assert not [name for name in report.figures if "first-failure" in name]

    @pytest.mark.usefixtures("no_figures")
    def test_the_recall_model_names_a_run_left_out_for_damaged_per_token_results(self, tmp_path: Path) -> None:
        write_simulated_grid(tmp_path)
        damaged = sorted(tmp_path.rglob("tokens.parquet"))[0]
        damaged.write_bytes(b"no table")
        text = Page(make_report(read_records([tmp_path])).html).text
        assert f"the recall model leaves out a run: {damaged.as_posix()}: " in text

    def test_captions_of_recall_say_how_many_runs_a_point_has_and_how_they_differ(self) -> None:
        def caption(*records: Record) -> str:
            return _recall_panels("a", {"SFT": [*records, make_record(rank=8)]})[0].caption.partition("tokens. ")[2]

        one, other = (make_record(rank=2, seed=seed, token_accuracy=0.1 * seed) for seed in (0, 1))
        assert caption(one) == "One run per point."
        means = "Means over up to 2 runs; bars reach from the lowest to the highest."
        assert caption(one, other) == means
        faster = one.model_copy(update={"method_settings": {**one.method_settings, "learning_rate": 7.0}})
        assert caption(one, faster) == f"{means} Runs also differ in learning_rate."

    def test_an_interrupted_run_is_listed_and_not_counted_as_finished(self, tmp_path: Path) -> None:
        write_simulated_run(tmp_path / "cut", 4, 64, status="interrupted")
        text = Page(make_report(read_records([tmp_path])).html).text
        assert "1 run, 0 of them finished" in text
        assert "interrupted" in text

    def test_a_diverged_run_has_gaps_in_the_tables_and_is_not_counted_as_finished(self, tmp_path: Path) -> None:
        write_simulated_run(tmp_path / "kept", 4, 64)
        write_diverged_run(
            tmp_path / "lost", 4, 64, seed=1, retention={"prose": {"loss_before": 3.5, "loss_after": None}}
        )
        text = Page(make_report(read_records([tmp_path])).html).text
        assert "2 runs, 1 of them finished" in text
        assert "64 4 1 13.60 - 0.0 0.0 0.0 - diverged" in text.partition("Every run")[2]
        assert "lost diverged 1 200" in text
        assert "prose 3.500 -" in text
        assert " nan " not in text

    def test_diverged_runs_alone_have_a_page(self, tmp_path: Path) -> None:
        write_diverged_run(tmp_path / "lost", 4, 64)
        text = Page(make_report(read_records([tmp_path])).html).text
        assert "1 run, 0 of them finished" in text
        assert "diverged" in text

    @pytest.mark.usefixtures("no_figures")
    def test_runs_that_differ_in_more_than_rank_length_and_seed_are_pointed_out(self, tmp_path: Path) -> None:
        for rate in (0.1, 0.2):
            settings = {"weighting": "x", "learning_rate": rate}
            write_simulated_grid(
                tmp_path / str(rate), ranks=(1, 2, 4), lengths=(128, 256), seeds=(0,), method_settings=settings
            )
        records = read_records([tmp_path])
        assert (
            "differ in more than rank, length and seed: method_settings.learning_rate (0.1, 0.2)"
            in Page(make_report(records).html).text
        )
        split = Page(make_report(records, by=["method_settings.learning_rate"]).html)
        assert "differ in more than" not in split.text
        assert len([heading for heading in split.said("h2") if heading.startswith("Random tokens")]) == 2
        # Links to both studies.
        assert [link["href"] for link in split.all("a")] == ["#s1", "#s2"]
        assert {"s1", "s2"} <= {section["id"] for section in split.all("section")}

    def test_a_report_without_runs_is_refused(self) -> None:
        with pytest.raises(InputError, match="no record: expected at least one run"):
            make_report({})


class TestTokens:
    def test_phases_curves_and_first_failures_are_drawn(self, tokens: Page) -> None:
        assert [image["alt"].split(":")[0] for image in tokens.all("img")] == ["Random tokens"] * 3
        assert "From wrong to certain" in tokens.text
        assert "Spearman's rho 1.000 over 6 targets" in tokens.all("img")[2]["alt"]
        assert "the share of certain tokens; 2 runs." in tokens.text

    def test_targets_of_both_methods_are_listed_side_by_side_with_state_and_margin(self, tokens: Page) -> None:
        rows = tokens.text.partition("best other one.")[2].partition("The most stubborn")[0]
        assert rows.split()[:5] == ["target", "SFT", "margin", "MemFT", "margin"]
        assert "number 0 fails at token 2 of 16 -1.50 fails at token 2 of 16 -1.50" in rows
        assert "number 2 fails at token 4 of 16 -1.50 fails at token 4 of 16 -1.50" in rows
        assert "number 3 certain +2.00 certain +2.00" in rows

    def test_the_most_stubborn_tokens_are_listed_by_method_with_their_positions(self, tokens: Page) -> None:
        rows = tokens.text.partition("pair right from step")[2].partition("Every run")[0]
        assert rows.split()[0] == "SFT"
        assert "2 of 16 0.05 -1.50 never" in rows
        assert "wins instead" not in tokens.text  # a history does not record the rival token
        assert rows.count("MemFT") == rows.count("SFT") == 5

    def test_a_damaged_history_is_named_and_that_of_the_next_run_is_shown_instead(self, tmp_path: Path) -> None:
        write_history(write_simulated_run(tmp_path / "whole", 2, 64, pairs=4))
        damaged = write_simulated_run(tmp_path / "damaged", 4, 64, pairs=4)
        (damaged / "history.parquet").write_bytes(b"junk")
        page = Page(make_report(read_records([tmp_path])).html)
        assert "Per-token results cannot be read for 1 run; the first error:" in page.text
        assert "damaged/history.parquet" in page.text
        assert "number 2 fails at token 4 of 16" in page.text

    def test_every_figure_and_table_from_a_part_of_the_tokens_says_so(self, tmp_path: Path) -> None:
        write_history(write_simulated_run(tmp_path, 4, 64, pairs=4, target_tokens=640))
        text = Page(make_report(read_records([tmp_path])).html).text
        # Phases, learning curves, first failures, targets and stubborn tokens.
        assert text.count("A sample of the target tokens was kept: 64 of 640.") == 5

    def test_a_single_target_of_which_the_beginning_was_kept_is_a_sample_too(self, tmp_path: Path) -> None:
        write_history(write_simulated_run(tmp_path, 4, 64, target_tokens=640))
        section = training_part("a", "A text", {"SFT": read_records([tmp_path])})
        assert [table.title for table in section.tables] == ["The most stubborn tokens"]
        assert "kept: 64 of 640." in section.tables[0].note
        assert [panel.title for panel in section.panels] == ["From wrong to certain", "Learning curves"]
        assert all("kept: 64 of 640." in panel.caption for panel in section.panels)

    def test_figures_of_looks_during_training_say_when_tokens_were_scored(self, tokens: Page) -> None:
        said = "Between the first and the last look, each token counts as training last scored it."
        captions = tokens.said("figcaption")
        assert sum(said in caption for caption in captions) == 2
        assert any(said in caption and "First wrong token against" in caption for caption in captions)

    def test_methods_stand_side_by_side_at_the_largest_rank_that_all_have(self, tmp_path: Path) -> None:
        for method, ranks in (("sft", (2, 4)), ("memft", (1, 2))):
            for rank in ranks:
                write_history(write_simulated_run(tmp_path / f"{method}-{rank}", rank, 64, method=method, pairs=4))
        records = read_records([tmp_path])
        runs = {name: {p: r for p, r in records.items() if r.method == name} for name in ("sft", "memft")}
        section = training_part("a", "A text", runs)
        assert section.tables[0].columns == ("target", "sft", "margin", "memft", "margin")
        assert all(f"{method}, rank 2, 64 tokens" in section.panels[0].alt for method in runs)
        # Without a common rank, each name says which it is.
        apart = {name: {p: r for p, r in of.items() if r.rank in (1, 4)} for name, of in runs.items()}
        targets, stubborn = training_part("a", "A text", apart).tables
        named = ["sft, rank 4, 64 tokens", "memft, rank 1, 64 tokens"]
        assert targets.columns == ("target", named[0], "margin", named[1], "margin")
        assert list(dict.fromkeys(row[0] for row in stubborn.rows)) == named

    def test_alternative_text_says_100_percent_only_of_all_tokens(self) -> None:
        share = np.array([0.0, 0.9996])
        curves = Curves(np.array([0, 10]), share, np.zeros(2), np.ones(2))
        history = History(*(np.zeros(1, np.int64),) * 4, *(np.zeros((1, 1)),) * 3)  # type: ignore[arg-type]
        run = Example(make_record(target_tokens=1), Path("a"), history)
        (panel,) = _phase_panel("a", "A text", {"SFT": run}, {Path("a"): curves})
        assert "rank 4, 1 tokens: >99.9 % certain at the end." in panel.alt

    def test_curves_agree_with_values_worked_out_by_hand(self) -> None:
        probability = np.array([[0.1, 0.2, np.nan, 0.4], [0.9, 0.4, 0.6, 0.1]], np.float32)
        correct = np.array([[False, False, False, True], [True, True, True, False]])
        places = np.arange(4)
        found = curves_of(History(np.array([0, 7]), places * 0, places, places, probability, probability, correct))
        assert found.step.tolist() == [0, 7]
        # At first one of the three scored tokens is right; then two of four are certain and one is only right.
        assert found.certain.tolist() == [0, 0.5]
        assert found.right.tolist() == pytest.approx([1 / 3, 0.25])
        expected = [-np.log([0.1, 0.2, 0.4]).mean(), -np.log([0.9, 0.4, 0.6, 0.1]).mean()]
        assert found.loss.tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.usefixtures("no_profiles")
class TestOptionalMeasurements:
    def test_side_effects_and_kinds_of_tokens_have_tables(self, tmp_path: Path) -> None:
        kind = {"target_tokens": 12.0, "initial_loss": 9.0, "final_loss": 1.25, "token_accuracy": 0.5}
        write_simulated_run(
            tmp_path / "a",
            4,
            64,
            retention={"prose": {"target_tokens": 100.0, "loss_before": 3.5, "loss_after": 4.75}},
            by_kind={"random": kind},
        )
        text = Page(make_report(read_records([tmp_path])).html).text
        assert "prose 3.500 4.750" in text
        assert "random 12 9.000 1.250 50.0" in text

    def test_harm_to_ordinary_text_is_listed_beside_retention(self) -> None:
        harm = {
            kind: {"loss_before": before, "loss_after": before + 0.25}
            for kind, before in (("prose", 3.0), ("code", 1.5), ("chat", 2.5), ("mean", 2.0))
        }
        text = Page(make_report({Path("a"): make_record(harm=harm)}).html).text
        assert "ordinary text, prose 3.000 3.250" in text
        assert "ordinary text, mean 2.000 2.250" in text

    def test_the_steps_until_all_is_certain_say_which_probability_was_asked_for(self) -> None:
        records = {
            Path("a"): make_record(steps_to_recall=73, recall_margin=0.9),
            Path("b"): make_record(steps_to_recall=75),
        }
        text = Page(make_report(records).html).text
        assert "73 (p > 0.9) " in text
        assert "75 (p" not in text


class TestHostileRecords:
    def test_values_of_a_record_appear_only_as_text(self, hostile: Report) -> None:
        page = Page(hostile.html)
        allowed = {"data-png", "class", "id", "alt", "src", "aria-label", "tabindex", "role", "scope", "href", "lang"}
        allowed |= {"name", "content", "charset", "http-equiv", "data-label"}
        assert {name for _, attributes in page.elements for name in attributes} <= allowed
        assert "script" not in {tag for tag, _ in page.elements}
        assert all(image["src"].startswith("data:image/svg+xml;base64,") for image in page.all("img"))
        assert page.said("h1") == [" ".join(HOSTILE.split())]
        # Shown literally, never evaluated.
        assert "{{ 7 * 7 }}" in page.text
        assert page.text.count("<script>alert(1)</script>") > 10

    def test_figure_file_names_contain_no_text_from_records(self, hostile: Report) -> None:
        assert hostile.figures
        assert all(name.replace("-", "").removesuffix(".png").isalnum() for name in hostile.figures)


@pytest.mark.usefixtures("no_profiles")
class TestWriting:
    def test_page_and_figures_are_written(self, reports: tuple[Report, Report], tmp_path: Path) -> None:
        path = write_report(reports[0], tmp_path / "new")
        assert path == tmp_path / "new" / PAGE_NAME
        assert path.read_text(encoding="utf-8") == reports[0].html
        written = {file.name: file.read_bytes() for file in (tmp_path / "new" / "figures").iterdir()}
        assert written == reports[0].figures

    def test_another_report_is_replaced_only_on_request(self, reports: tuple[Report, Report], tmp_path: Path) -> None:
        write_report(reports[0], tmp_path)
        write_report(reports[0], tmp_path)
        with pytest.raises(InputError, match="holds another report; give another --out, or --overwrite"):
            write_report(reports[1], tmp_path)
        assert (tmp_path / PAGE_NAME).read_text(encoding="utf-8") == reports[0].html
        write_report(reports[1], tmp_path, overwrite=True)
        assert (tmp_path / PAGE_NAME).read_text(encoding="utf-8") == reports[1].html

    def test_overwriting_removes_figures_of_the_old_report_and_keeps_other_files(
        self, reports: tuple[Report, Report], tmp_path: Path
    ) -> None:
        write_report(reports[0], tmp_path)
        mine = tmp_path / "figures" / "mine.png"
        mine.write_bytes(b"mine")
        first = sorted(reports[1].figures)[0]
        fewer = Report(
            reports[1].html.replace(f'data-png="{first}"', ""),
            {name: content for name, content in reports[1].figures.items() if name != first},
        )
        write_report(fewer, tmp_path, overwrite=True)
        assert not (tmp_path / "figures" / first).exists()
        assert mine.read_bytes() == b"mine"

    def test_overwriting_a_foreign_page_removes_no_figure_that_it_names(
        self, reports: tuple[Report, Report], tmp_path: Path
    ) -> None:
        (tmp_path / "figures").mkdir()
        theirs = tmp_path / "figures" / "theirs.png"
        theirs.write_bytes(b"theirs")
        (tmp_path / PAGE_NAME).write_text('<figure data-png="theirs.png">')
        write_report(reports[0], tmp_path, overwrite=True)
        assert theirs.exists()

    def test_an_output_folder_that_cannot_be_created_is_refused(
        self, reports: tuple[Report, Report], tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(InputError, match=r"--out .*file.* cannot be written"):
            write_report(reports[0], tmp_path / "file")


@pytest.mark.usefixtures("no_profiles")
class TestCommand:
    def test_the_command_says_what_it_wrote_and_refuses_to_replace_another_report(
        self, small: dict[Path, Record], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder = str(next(iter(small)).parent)
        assert main(["report", folder, "--out", str(tmp_path), "--title", "Mine & yours"]) == 0
        out = capsys.readouterr().out
        assert out.startswith(f"written: {tmp_path / PAGE_NAME} (")
        assert "Mine &amp; yours" in (tmp_path / PAGE_NAME).read_text(encoding="utf-8")
        assert main(["report", folder, "--out", str(tmp_path)]) == 2
        assert "holds another report" in capsys.readouterr().err

    def test_the_options_where_and_by_reach_the_report(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        write_record(tmp_path / "a", make_record(corpus="one"))
        write_record(tmp_path / "b", make_record(corpus="two"))
        out = tmp_path / "out"
        assert main(["report", str(tmp_path), "--out", str(out), "--where.corpus", "one"]) == 0
        assert Page((out / PAGE_NAME).read_text(encoding="utf-8")).text.count("1 run:") == 1
        assert main(["report", str(tmp_path), "--out", str(out), "--by", "colour"]) == 2
        assert "no run has a value for 'colour'" in capsys.readouterr().err
