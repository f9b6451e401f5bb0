"""Backbones: which names are accepted, what loading them returns, and downloads from the hub."""

import dataclasses
import http.server
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from pml import backbone as module
from pml.backbone import (
    Backbone,
    backbone_facts,
    load_backbone,
    load_config,
    load_tokenizer,
    shared_backbones,
)
from pml.default_backbone import hash_model
from pml.encoding import PromptFormat, TextEncoder
from pml.errors import InputError
from tests.test_default_backbone import run_fetch

ARCHITECTURES = {
    "llama": "model.layers",
    "qwen3": "model.layers",
    "gpt_neox": "gpt_neox.layers",
    "gemma3": "model.layers",
    "gpt2": "transformer.h",
}


# What loading returns


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_decoder_blocks_are_found_in_every_architecture(
    architecture: str, make_tiny_backbone: Callable[[str], Backbone]
) -> None:
    backbone = make_tiny_backbone(architecture)
    assert backbone.blocks_path == ARCHITECTURES[architecture]
    assert backbone.blocks is backbone.model.get_submodule(ARCHITECTURES[architecture])
    assert backbone.decoder is getattr(backbone.model, backbone.model.base_model_prefix)
    assert len(backbone.blocks) == 4
    assert (backbone.hidden_size, backbone.vocab_size, backbone.max_positions) == (32, 259, 1024)


def test_decoder_blocks_are_found_beside_an_image_encoder_of_the_same_depth(
    make_tiny_backbone: Callable[[str], Backbone],
) -> None:
    model = make_tiny_backbone("llama").model
    text = model.model
    encoder = nn.Module()
    encoder.config = transformers.CLIPVisionConfig()
    encoder.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(4))
    model.model = nn.ModuleDict({"encoder": encoder, "language_model": text})
    assert module._find_blocks(model) == "model.language_model.layers"


def test_a_model_without_decoder_blocks_is_refused(tiny_backbone: Backbone) -> None:
    tiny_backbone.model.model.layers = tiny_backbone.model.model.layers[:3]
    with pytest.raises(InputError, match=r"LlamaForCausalLM has no list of 4 decoder blocks in 'model'; expected a"):
        dataclasses.replace(tiny_backbone)


def test_max_positions_is_none_if_the_configuration_states_no_limit(tiny_backbone: Backbone) -> None:
    tiny_backbone.model.config = transformers.BloomConfig()
    assert tiny_backbone.max_positions is None


def test_a_model_loaded_from_a_folder_is_the_saved_one_frozen_and_in_eval_mode(
    tiny_backbone_folder: Path, tiny_backbone: Backbone
) -> None:
    loaded = load_backbone(str(tiny_backbone_folder))
    assert loaded.name == loaded.model.name_or_path == str(tiny_backbone_folder)
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not any(m.training for m in loaded.model.modules())
    assert loaded.model.config._attn_implementation == "sdpa"
    expected = dict(tiny_backbone.model.named_parameters())
    assert expected.keys() == dict(loaded.model.named_parameters()).keys()
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_a_model_in_a_relative_folder_names_itself_by_its_absolute_path(
    tiny_backbone_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_backbone_folder.parent)
    loaded = load_backbone("tiny-llama")
    assert (loaded.name, loaded.model.name_or_path) == ("tiny-llama", str(tiny_backbone_folder.resolve()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_have_the_requested_dtype(dtype: torch.dtype, tiny_backbone_folder: Path) -> None:
    backbone = load_backbone(str(tiny_backbone_folder), str(dtype).removeprefix("torch."))
    assert {p.dtype for p in backbone.model.parameters()} == {dtype}


def test_a_tokenizer_loaded_from_a_folder_has_the_saved_chat_template_and_token_ids(
    tiny_backbone_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast
) -> None:
    tokenizer = load_tokenizer(str(tiny_backbone_folder))
    prompt = TextEncoder(tokenizer).prompt("Zoë?\n").ids
    assert prompt == TextEncoder(tiny_tokenizer).prompt("Zoë?\n").ids
    assert tokenizer.decode(prompt) == "<|im_start|>user\nZoë?\n<|im_end|>\n<|im_start|>assistant\n"


def test_a_configuration_loaded_alone_is_that_of_the_model_and_a_missing_one_is_refused(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    backbone = load_backbone(str(tiny_backbone_folder))
    config = load_config(str(tiny_backbone_folder))
    assert (config.vocab_size, config.max_position_embeddings) == (backbone.vocab_size, backbone.max_positions)
    with pytest.raises(InputError, match="has no configuration that can be loaded"):
        load_config(str(tmp_path))


def test_the_content_hash_covers_only_configuration_and_weights(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_backbone_folder, copy)
    (copy / "README.md").write_text("not part of the model")
    original = load_backbone(str(tiny_backbone_folder)).content_hash
    assert load_backbone(str(copy)).content_hash == original

    expected = "".join(
        f"{name} {sha256((copy / name).read_bytes()).hexdigest()}\n" for name in ("config.json", "model.safetensors")
    )
    assert original == sha256(expected.encode()).hexdigest()

    with (copy / "config.json").open("a") as file:
        file.write("\n")
    assert load_backbone(str(copy)).content_hash != original


def test_loading_is_silent_and_restores_the_logging_settings_of_the_user(
    tiny_backbone_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    logging = transformers.utils.logging
    logging.set_verbosity_info()
    try:
        load_backbone(str(tiny_backbone_folder))
        assert logging.get_verbosity() == logging.INFO
        assert logging.is_progress_bar_enabled()
        assert not huggingface_hub.utils.are_progress_bars_disabled()
    finally:
        logging.set_verbosity_warning()
    assert capfd.readouterr() == ("", "")


# Sharing


def test_shared_backbones_are_loaded_once_per_name_and_dtype(tiny_backbone_folder: Path) -> None:
    name = str(tiny_backbone_folder)
    with shared_backbones():
        first = load_backbone(name)
        with shared_backbones():
            assert load_backbone(name) is first
        assert load_backbone(name) is first, "an inner context that ends lets go of nothing"
        assert load_tokenizer(name) is first.tokenizer
        assert load_backbone(name, "bfloat16") is not first
    assert load_backbone(name) is not first


def test_a_backbone_loaded_before_sharing_is_not_shared(tiny_backbone_folder: Path) -> None:
    before = load_backbone(str(tiny_backbone_folder))
    with shared_backbones():
        assert load_backbone(str(tiny_backbone_folder)) is not before


# Invalid input


def test_the_error_for_an_unknown_dtype_lists_the_accepted_ones() -> None:
    with pytest.raises(InputError, match=r"dtype is 'float8'; expected one of float32, bfloat16, float16"):
        load_backbone("anything", "float8")


@pytest.mark.parametrize("name", ["", "no such thing", "./missing/folder/here", "a/b/c"])
def test_the_error_for_a_name_that_is_neither_folder_nor_hub_id_says_what_is_accepted(name: str) -> None:
    with pytest.raises(InputError) as caught:
        load_backbone(name)
    assert str(caught.value) == (
        f"backbone {name!r} is neither an existing folder nor a hub id; expected 'smollm2-135m', a folder with a "
        "saved model, or a hub id such as 'HuggingFaceTB/SmolLM2-360M-Instruct'"
    )


def test_an_unknown_name_fails_at_once_without_a_hub_and_says_what_works_offline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")  # no server listens there
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        load_backbone("smolm2-135m")
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert message.startswith("backbone 'smolm2-135m' is not a folder here, and the hub cannot be reached")
    assert "ConnectError" in message
    assert "expected 'smollm2-135m', a folder with a saved model, or a hub id" in message
    assert message.endswith("without a network only the first two work")
    assert "\n" not in message


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json in .*; expected a model saved by save_pretrained"):
        load_backbone(str(tmp_path))


@pytest.fixture
def folder_copy(tiny_backbone_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_backbone_folder, tmp_path / "model"))


def test_pickled_weights_are_refused(folder_copy: Path, tiny_backbone: Backbone) -> None:
    (folder_copy / "model.safetensors").unlink()
    torch.save(tiny_backbone.model.state_dict(), folder_copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no \*\.safetensors in .*; weights in other formats are not read"):
        load_backbone(str(folder_copy))


def test_missing_weights_are_refused_and_not_initialised_at_random(folder_copy: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights: dict[str, Tensor] = load_file(folder_copy / "model.safetensors")
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, folder_copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks 1 of the weights of LlamaForCausalLM, such as model\.layers\.2\.mlp"):
        load_backbone(str(folder_copy))


def test_truncated_weights_give_a_one_line_error(folder_copy: Path) -> None:
    weights = folder_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"^backbone '.*' cannot be loaded: .*expected a causal language model.*$"):
        load_backbone(str(folder_copy))


def test_a_model_with_custom_code_is_refused_without_running_the_code(folder_copy: Path) -> None:
    config = json.loads((folder_copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder_copy / "config.json").write_text(json.dumps(config))
    (folder_copy / "mine.py").write_text(f"open({str(folder_copy / 'was_run')!r}, 'w')")
    with pytest.raises(InputError, match="code that comes with a model is never run"):
        load_backbone(str(folder_copy))
    assert not (folder_copy / "was_run").exists()


def test_a_folder_without_a_tokenizer_is_refused(folder_copy: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder_copy / name).unlink()
    with pytest.raises(InputError, match="has no tokenizer that can be loaded"):
        load_tokenizer(str(folder_copy))


# The hub


class FakeHub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download needs: it serves `someone/tiny` and denies access to `someone/gated`."""

    folder: Path
    served: list[str]
    commit = "0123456789" * 4

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), "X-Repo-Commit": self.commit, **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        files = sorted(file for file in self.folder.rglob("*") if file.is_file())
        if "someone/gated" in path:
            self.answer(b"", 403, X_Error_Code="GatedRepo")
        elif "someone/tiny" not in path:
            self.answer(b"", 404, X_Error_Code="RepoNotFound")
        elif path.startswith("/api/models/someone/tiny/revision/"):
            self.answer(json.dumps({"id": "someone/tiny", "sha": self.commit, "siblings": []}).encode())
        elif path.startswith("/api/models/someone/tiny/tree/"):
            names = [(str(file.relative_to(self.folder)), file.stat().st_size) for file in files]
            rows = [{"type": "file", "path": n, "size": s, "oid": sha256(n.encode()).hexdigest()} for n, s in names]
            self.answer(json.dumps(rows).encode())
        else:
            name = path.partition(f"/resolve/{self.commit}/")[2]
            if self.command == "GET":
                self.served.append(name)
            self.answer((self.folder / name).read_bytes(), ETag=f'"{sha256(name.encode()).hexdigest()}"')


@pytest.fixture
def hub(tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FakeHub]]:
    FakeHub.folder, FakeHub.served = tmp_path / "on_the_hub", []
    shutil.copytree(tiny_backbone_folder, FakeHub.folder)
    (FakeHub.folder / "pytorch_model.bin").write_bytes(b"the same weights in another format")
    (FakeHub.folder / "onnx").mkdir()
    (FakeHub.folder / "onnx" / "config.json").write_text("{}")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeHub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    constants = huggingface_hub.constants
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
    yield FakeHub
    server.shutdown()
    server.server_close()


def test_only_the_files_needed_are_downloaded_from_the_hub_and_each_only_once(
    hub: type[FakeHub], tiny_backbone_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_tokenizer("someone/tiny")
    assert "tokenizer.json" in hub.served
    assert "model.safetensors" not in hub.served, "a tokenizer needs no weights"
    backbone = load_backbone("someone/tiny")
    assert backbone.name == backbone.model.name_or_path == "someone/tiny"
    assert backbone.content_hash == load_backbone(str(tiny_backbone_folder)).content_hash
    assert sorted(hub.served) == sorted(path.name for path in tiny_backbone_folder.iterdir())

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert load_backbone("someone/tiny").content_hash == backbone.content_hash


def test_the_error_for_a_name_unknown_to_the_hub_says_what_is_accepted(hub: type[FakeHub]) -> None:
    with pytest.raises(
        InputError, match=r"'no/such' is not a folder here, and the hub has no public model.*expected 'smo"
    ):
        load_backbone("no/such")


def test_the_error_for_a_gated_model_says_how_to_get_access(hub: type[FakeHub]) -> None:
    with pytest.raises(InputError, match=r"'someone/gated' is gated: accept its terms on the hub and log in with"):
        load_backbone("someone/gated")


# pml fetch


def test_fetch_prints_the_facts_of_a_saved_backbone_as_json(
    tiny_backbone_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = load_backbone(str(tiny_backbone_folder))
    assert run_fetch(str(tiny_backbone_folder), "--json") == 0
    assert json.loads(capsys.readouterr().out) == {
        "name": str(tiny_backbone_folder),
        "path": str(tiny_backbone_folder),
        "content_hash": backbone.content_hash,
        "parameters": sum(p.numel() for p in backbone.model.parameters()),
        "blocks": 4,
        "hidden_size": 32,
        "vocabulary": 259,
    }


# The real default backbone


@pytest.mark.backbone
def test_the_default_backbone_is_smollm2_135m(default_backbone: Backbone) -> None:
    facts = backbone_facts()
    assert (facts["parameters"], facts["blocks"], facts["hidden_size"]) == (134_515_008, 30, 576)
    assert facts["vocabulary"] == default_backbone.vocab_size == len(default_backbone.tokenizer) == 49_152
    assert (len(default_backbone.blocks), default_backbone.hidden_size) == (30, 576)
    assert default_backbone.blocks_path == "model.layers"
    assert default_backbone.max_positions == 8192
    assert default_backbone.model.dtype == torch.float32
    assert facts["content_hash"] == default_backbone.content_hash == hash_model(Path(facts["path"]))


@pytest.mark.backbone
def test_the_default_tokenizer_gives_the_published_token_ids(default_backbone: Backbone, shared_folder: Path) -> None:
    golden = json.loads((shared_folder / "golden" / "lc64.json").read_text())
    tokenizer = default_backbone.tokenizer
    target = tokenizer.decode(golden["target_ids"])
    assert tokenizer(target)["input_ids"] == golden["target_ids"]
    query = "Please output the content of the vector memory injected into the activations."
    prompt = TextEncoder(tokenizer, PromptFormat(system="You are a helpful assistant.")).prompt(query).ids
    # The published prompt leaves out the very first token, <|im_start|>.
    assert list(prompt[1:]) == golden["prompt_ids"]


@pytest.mark.backbone
def test_the_default_backbone_has_the_published_initial_loss(default_backbone: Backbone, shared_folder: Path) -> None:
    golden = json.loads((shared_folder / "golden" / "lc64.json").read_text())
    ids = torch.tensor([golden["prompt_ids"] + golden["target_ids"]])
    with torch.inference_mode():
        logits = default_backbone.model(ids).logits[0, len(golden["prompt_ids"]) - 1 : -1]
    loss = cross_entropy(logits, torch.tensor(golden["target_ids"])).item()
    assert round(loss, 4) == 8.4777
