"""Shared fixtures: tiny backbones made from configurations, the default backbone, and a fixed seed for every test.

Tests run offline. Those marked `backbone` need the default backbone, which `pml fetch` puts into the cache folder.

Slow imports are inside the functions that need them: the controller of pytest-xdist needs none of them, and its workers
start only after it has loaded this file.
"""

from __future__ import annotations

import multiprocessing
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

    from pml.backbone import Backbone

# huggingface_hub reads these when it is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The width of the commands' output in a pipe, whatever the terminal that runs the tests.
os.environ["COLUMNS"] = "120"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# The imports of a process take seconds, so the fork server does them once, before it forks.
multiprocessing.set_forkserver_preload(["pml.bench.steps", "tests.ddp_cases", "transformers.models.llama"])

# Large enough that predictions are far from uniform, so that tests that compare losses or argmaxes can fail.
INIT_STD = 0.2


@pytest.fixture(autouse=True)
def _seed() -> None:
    import numpy as np
    import torch

    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte, so that any text round-trips, and three special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in specials])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(architecture: str, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """Return a configuration of four blocks with hidden size 32."""
    from transformers import Gemma3TextConfig, GPT2Config, GPTNeoXConfig, LlamaConfig, Qwen3Config

    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    common: dict[str, Any] = {**ids, "pad_token_id": tokenizer.pad_token_id, "initializer_range": INIT_STD}
    common["vocab_size"] = len(tokenizer)
    if architecture == "gpt2":
        return GPT2Config(**common, n_embd=32, n_layer=4, n_head=4, n_inner=64, n_positions=1024)
    common |= {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    common["max_position_embeddings"] = 1024
    if architecture == "gpt_neox":
        return GPTNeoXConfig(**common)
    common |= {"num_key_value_heads": 2, "head_dim": 8}
    if architecture == "gemma3":
        kinds = ["sliding_attention", "full_attention"] * 2
        return Gemma3TextConfig(**common, sliding_window=8, layer_types=kinds, query_pre_attn_scalar=8)
    return {"llama": LlamaConfig, "qwen3": Qwen3Config}[architecture](**common)


@pytest.fixture(scope="session")
def make_tiny_backbone(tiny_tokenizer: PreTrainedTokenizerFast) -> Callable[[str], Backbone]:
    """A function that makes a new `llama`, `qwen3`, `gpt_neox`, `gemma3` or `gpt2` backbone with seeded weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from pml.backbone import Backbone

    def make(architecture: str) -> Backbone:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(tiny_config(architecture, tiny_tokenizer))
        return Backbone(model, tiny_tokenizer, f"tiny-{architecture}", f"hash of tiny-{architecture}")

    return make


@pytest.fixture
def tiny_backbone(make_tiny_backbone: Callable[[str], Backbone]) -> Backbone:
    """A tiny Llama that belongs to the test, which may change it."""
    return make_tiny_backbone("llama")


@pytest.fixture(scope="session")
def tiny_backbone_folder(
    make_tiny_backbone: Callable[[str], Backbone], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The tiny Llama saved in a folder, for `load_backbone` and the command line; tests must not write to it."""
    folder = tmp_path_factory.mktemp("backbones") / "tiny-llama"
    backbone = make_tiny_backbone("llama")
    backbone.model.save_pretrained(folder)
    backbone.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def shared_folder() -> Path:
    """The folder `shared/` beside the repository, with the published numbers and corpora."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no folder named shared beside the repository, which has the published numbers and corpora")
    return folder


@pytest.fixture(scope="session")
def default_backbone() -> Backbone:
    """The default backbone in float32, loaded once; tests with it are marked `backbone` and undo their changes.

    On CI, a failed download is an error; elsewhere the tests are skipped, since there may be no network.
    """
    from pml.backbone import load_backbone
    from pml.default_backbone import fetch_default
    from pml.errors import InputError

    try:
        fetch_default(progress=False)
    except InputError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))
    return load_backbone()


@pytest.fixture
def no_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fit laws without profile intervals, which take most of the time, for tests of hundreds of fits."""
    monkeypatch.setattr("pml.law.fit.profile_intervals", lambda *_: {})


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Build report pages without figures, which take most of the time, for tests of the text."""

    def draw(*_: Any) -> list[Any]:
        return []

    for part in ("studies", "law_part", "training"):
        monkeypatch.setattr(f"pml.report.{part}.draw", draw)
