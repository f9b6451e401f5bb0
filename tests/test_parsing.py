"""Text in a configuration or on the command line is the same text in the run."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from pml.errors import InputError
from pml.lightning_cli import parse_run

TEXTS = ["# Role: clerk", "Answer: yes", "- one item", "? why", "&a", "---", "a: b: c", "yes", "3", "0123", "12:30"]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(("corpus", "key"), [("RandomTokens", "system"), ("RandomTokens", "prompt"), ("Facts", "path")])
def test_text_on_the_command_line_stays_text(text: str, corpus: str, key: str) -> None:
    config = parse_run(["--model=SFT", f"--data={corpus}", f"--data.{key}={text}"])

    assert config.data.init_args[key] == text


@pytest.mark.parametrize("text", TEXTS)
def test_quoted_text_in_a_file_stays_text(text: str, tmp_path: Path) -> None:
    init_args = {"system": text, "template_kwargs": {"role": text, "roles": [text], "of": {"a": [{"b": text}]}}}

    assert of_file(tmp_path, init_args) == init_args


@pytest.mark.parametrize("text", ["1e-3", "12e5"])
def test_text_that_looks_like_a_number_stays_text_when_saved(text: str, tmp_path: Path) -> None:
    parse_run(["--model=SFT", "--data=RandomTokens"])  # makes YAML quote such text

    assert of_file(tmp_path, {"system": text, "template_kwargs": {"v": [text]}}) == {
        "system": text,
        "template_kwargs": {"v": [text]},
    }


def test_template_kwargs_keep_their_types(tmp_path: Path) -> None:
    variables = {"on": True, "count": 3, "share": 0.5, "none": None, "name": "null", "version": "1.0", "off": "off"}

    assert of_file(tmp_path, {"template_kwargs": variables}) == {"template_kwargs": variables}


def test_lists_and_mappings_on_the_command_line_are_parsed_from_brackets_and_braces() -> None:
    config = parse_run(
        ["--model=SFT", "--data=RandomTokens", '--data.template_kwargs={a: "off", b: [1, 2]}', "--trainer.devices=[0]"]
    )

    assert config.data.init_args.template_kwargs == {"a": "off", "b": [1, 2]}
    assert config.trainer.devices == [0]


def test_a_list_where_text_is_expected_is_refused() -> None:
    with pytest.raises(InputError, match=r"data\.prompt: expected a str, got \['x'\]"):
        parse_run(["--model=SFT", "--data=RandomTokens", "--data.prompt=[x]"])


def of_file(folder: Path, init_args: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a corpus after parsing a configuration file that contains them."""
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"model": "SFT", "data": {"class_path": "RandomTokens", "init_args": init_args}}))
    parsed = parse_run(["--config", str(path)]).data.init_args.as_dict()
    return {name: parsed[name] for name in init_args}
