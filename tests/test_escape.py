"""Text from data never reaches a terminal as a control sequence."""

import json
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from pml.cli import main
from pml.commands._console import make_console
from pml.escape import one_line, say, say_json, visible
from tests.simulated_runs import write_simulated_grid

EVIL = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\x08‮"
CONTROL_CHARACTERS = set("\x1b\x07\x9b\r\x08‮")


def test_control_characters_are_escaped_and_printable_unicode_is_kept() -> None:
    assert visible("a\x1b[2J\tb\nc\x9b\udce9") == "a\\x1b[2J\tb\nc\\x9b\\udce9"
    assert one_line("a\nb\x1b\u2028\x85") == "a\\nb\\x1b\\u2028\\x85"
    assert one_line("東京\u3000都 1\xa0234") == "東京\u3000都 1\xa0234"
    assert visible("Zoë 👩‍🚀 日本語") == "Zoë 👩‍🚀 日本語"


def test_printed_text_has_no_control_characters_and_printed_json_keeps_its_content(
    capsys: pytest.CaptureFixture[str],
) -> None:
    say(EVIL)
    say_json({"query": EVIL, "other": "é"})
    out = capsys.readouterr().out
    assert not CONTROL_CHARACTERS & set(out)
    assert json.loads(out.partition("\n")[2]) == {"query": EVIL, "other": "é"}
    assert "é" in out


def test_a_console_escapes_text_and_ignores_its_markup_but_keeps_its_own_colours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    console = make_console(force_terminal=True, color_system="standard", width=200, height=25)
    table = Table(title=f"title {EVIL}", caption=EVIL)
    table.add_column(f"name {EVIL}")
    table.add_row(f"[bold]cell[/bold] [/nothing] :warning: {EVIL}")
    console.print(table, f"line {EVIL}", Text(f"red {EVIL}", "red"))
    out = capsys.readouterr().out
    assert "\x1b[31mred " in out
    assert "[bold]cell[/bold] [/nothing] :warning: \\x1b]0;owned\\x07\\x1b[2J" in out
    # The only escape sequences left are rich's own colours and styles.
    assert not {"\x07", "\x9b", "\x08", "‮", "\r"} & set(out)
    assert "\x1b]" not in out
    assert "\x1b[2J" not in out


NAME = "run \x1b[2J\x9b [/red]"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Finished runs whose folder and corpus have names with control characters."""
    folder, corpus = tmp_path_factory.mktemp("evil") / NAME, f"corpus {EVIL} [bold]"
    write_simulated_grid(folder, (1, 2, 4), (128, 256), (0,), ("sft", "memft"), corpus=corpus)
    return folder


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (2, ["recall", "none" + EVIL]),
        (0, ["law", NAME, "--where.method", "sft", "--details"]),
        (2, ["law", NAME]),
        (0, ["compare", NAME]),
        (0, ["report", NAME, "--out", "out" + EVIL]),
        (2, ["plan", "none" + EVIL, "--length", "5"]),
        (2, ["certify", NAME]),
        (2, ["fit", "--config", EVIL + ".yaml"]),
        (2, ["nothing" + EVIL]),
        (2, ["sweep", EVIL]),
        (2, ["data", EVIL]),
        (2, ["fit", f"--model={EVIL}"]),
        (2, ["law", NAME, f"--{EVIL}"]),
    ],
    ids=lambda value: " ".join(map(ascii, value))[:40] if isinstance(value, list) else "",
)
def test_commands_print_no_control_characters_from_names_and_arguments(
    code: int, arguments: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The name has a slash in it.
    monkeypatch.chdir(runs.parent.parent)
    capsys.readouterr()
    assert main(arguments) == code
    out, err = capsys.readouterr()
    assert out + err
    assert not CONTROL_CHARACTERS & set(out + err)


def test_commands_print_no_control_characters_from_queries_and_targets(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pairs = [{"query": f"{n} {EVIL} [bold]", "target": f"{EVIL} {n} [/bold]"} for n in range(3)]
    Path("evil.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    model = ["--model=SFT", f"--model.backbone={tiny_backbone_folder}", "--model.adapter.block=1"]
    made = ["fit", *model, "--data=Facts", "--data.path=evil.jsonl", "--trainer.max_epochs=1"]
    made += ["--trainer.callbacks=[]", "--trainer.callbacks+=callbacks.RunRecord"]
    name = "evil\x1b[2J"
    assert main([*made, "--trainer.accelerator=cpu", f"--trainer.logger.name={name}"]) == 0
    run = f"runs/{name}/version_0"
    certify = ["certify", run, "--dtypes=float32"]
    for command in (["recall", run], ["recall", run, "--json"]):
        assert main(command) == 0, command
    # After one epoch nothing is certain.
    for command in (certify, [*certify, "--json"]):
        assert main(command) == 1, command
    assert main(["data", f"{run}/config.yaml"]) == 0
    assert main(["validate", run]) == 0
    out, err = capsys.readouterr()
    assert "owned" in out
    assert not CONTROL_CHARACTERS & set(out + err)
