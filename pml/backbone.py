"""A frozen causal language model and its tokenizer: the default one, a folder, or a model on the hub."""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from pml.default_backbone import (
    DEFAULT_BACKBONE,
    default_manifest,
    fetch_default,
    hash_model,
    name_for_transformers,
    quiet_transformers,
)
from pml.errors import InputError, first_line
from pml.positions import max_positions
from pml.streamed_blocks import StreamedBlocks, free

__all__ = [
    "DTYPES",
    "Backbone",
    "backbone_facts",
    "backbones_are_shared",
    "load_backbone",
    "load_config",
    "load_tokenizer",
    "shared_backbones",
]

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

ACCEPTED = (
    f"expected {DEFAULT_BACKBONE!r}, a folder with a saved model, or a hub id such as "
    "'HuggingFaceTB/SmolLM2-360M-Instruct'"
)

_TOKENIZER_PATTERNS = ["*.json", "*.jinja", "*.model", "*.txt"]
_WEIGHT_PATTERNS = ["*.safetensors"]
# Subfolders hold other formats of the same model; "consolidated" files repeat the same weights.
_NEVER_PATTERNS = ["*/*", "consolidated*"]


@dataclass
class Backbone:
    """A causal language model that never changes, and its tokenizer.

    Making one freezes the model: no parameter requires a gradient, and dropout is off.

    Attributes:
        model: The causal language model.
        tokenizer: Its tokenizer.
        name: The name it was loaded by: `smollm2-135m`, a folder or a hub id.
        content_hash: Hash of its configuration and weights.
        blocks_path: Dotted path within `model` of the list of decoder blocks, such as `model.layers`.
        kept_states: Frozen states kept by `pml.frozen_layers`, keyed by the cut and where they are stored.
        free_directions: Directions that guards leave free, kept by `pml.guard`, which takes long to find them.
        streamed: The lower blocks while their weights are on the host and visit the device one block at a time.

    Raises:
        InputError: If the model has no list of decoder blocks.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    content_hash: str
    blocks_path: str = field(init=False)
    kept_states: dict[Any, Any] = field(init=False, repr=False, compare=False, default_factory=dict)
    free_directions: dict[Any, Any] = field(init=False, repr=False, compare=False, default_factory=dict)
    streamed: StreamedBlocks | None = field(init=False, repr=False, compare=False, default=None)
    _released: int = field(init=False, repr=False, compare=False, default=0)

    def __post_init__(self) -> None:
        self.model.requires_grad_(False).eval()
        self.blocks_path = _find_blocks(self.model)

    @property
    def released(self) -> bool:
        """Whether the weights of the lower blocks have been freed."""
        return self._released > 0

    def release(self, blocks: int) -> None:
        """Free the weights of the lowest blocks, and the input embeddings where the head does not share them."""
        if blocks <= self._released:
            return
        self._stop_streaming(None)
        self._released = blocks
        for parameter in self._lower_parameters().values():
            free(parameter)
        # On the CPU, weights share one mapping of their file, which stays in memory while any of them is in use.
        for parameter in self.model.parameters():
            if parameter.device.type == "cpu" and not parameter.requires_grad:
                parameter.data = parameter.data.clone()
        log.info("the weights of the lowest %d of %d blocks are freed", self._released, len(self.blocks))

    def restore(self) -> None:
        """Bring all weights back to the model's device: streamed ones from the host, freed ones from the files."""
        self._stop_streaming(self.model.device)
        self._load_released(self.model.device)

    def stream(self, blocks: int) -> None:
        """Keep the weights of the lowest blocks on the host; each block is on the device only while it runs."""
        if self.streamed is not None and len(self.streamed) == blocks:
            return
        self._stop_streaming(torch.device("cpu"))
        self._load_released(torch.device("cpu"))
        self.streamed = StreamedBlocks(self.blocks[:blocks], lambda: self.model.device)  # type: ignore[arg-type]

    def _stop_streaming(self, device: torch.device | None) -> None:
        if self.streamed is not None:
            self.streamed.end(device)
            self.streamed = None

    def _load_released(self, device: torch.device) -> None:
        """Load freed blocks to a device and freed embeddings to the model's device; do nothing if none were freed."""
        if not self.released:
            return
        log.info("loading the lowest %d blocks of %s again", self._released, self.name)
        # Tensors made under inference_mode, as in a validation, cannot be used in training later.
        with torch.inference_mode(False):
            fresh = dict(_load_model(self.name, _resolve(self.name), self.model.dtype).named_parameters())
            for name, parameter in self._lower_parameters().items():
                to = device if name.startswith(f"{self.blocks_path}.") else self.model.device
                parameter.data = fresh[name.replace(".base_layer.", ".")].data.to(to)
        self._released = 0

    def _lower_parameters(self) -> dict[str, nn.Parameter]:
        """Frozen parameters by name that nothing above the lowest `_released` blocks uses."""
        lower = {
            f"{self.blocks_path}.{index}.{name}": parameter
            for index, block in enumerate(self.blocks[: self._released])
            for name, parameter in block.named_parameters()
            if "lora_" not in name
        }
        embeddings, head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        (weight,) = embeddings.parameters()
        if any(parameter is weight for parameter in head.parameters()):
            return lower
        return lower | {name: p for name, p in self.model.named_parameters() if p is weight}

    @property
    def decoder(self) -> nn.Module:
        """The module that turns token ids into hidden states; it holds the blocks."""
        return self.model.get_submodule(self.blocks_path.rpartition(".")[0])

    @property
    def blocks(self) -> nn.ModuleList:
        """The decoder blocks, from the lowest up."""
        blocks = self.model.get_submodule(self.blocks_path)
        assert isinstance(blocks, nn.ModuleList)
        return blocks

    @property
    def config(self) -> PretrainedConfig:
        """Configuration of the text model, even where that is part of a larger model."""
        return self.model.config.get_text_config()

    @property
    def hidden_size(self) -> int:
        """d, the width of the residual stream."""
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        """Number of token ids that the model has logits for."""
        return int(self.config.vocab_size)

    @property
    def max_positions(self) -> int | None:
        """Longest sequence, in tokens, that a certificate can cover; see `pml.positions`."""
        return max_positions(self.config)


def _find_blocks(model: PreTrainedModel) -> str:
    """Dotted path of the decoder blocks: the topmost list as long as the configuration's number of layers."""
    config = model.config.get_text_config()
    # A block may hold two attention layers, both of which the configuration counts as hidden layers.
    depths = {getattr(config, name) for name in ("num_hidden_layers", "num_layers") if hasattr(config, name)}
    # Some models have no attribute named by their base_model_prefix.
    base = f"{model.base_model_prefix}." if hasattr(model, model.base_model_prefix) else ""
    paths = []
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) in depths and path.startswith(base):
            # An image encoder may be as deep as the text model, but its configuration has another type.
            owner = model.get_submodule(path.rpartition(".")[0])
            paths.append((type(getattr(owner, "config", None)) is not type(config), path.count("."), path))
    if not paths:
        raise InputError(
            f"{type(model).__name__} has no list of {' or '.join(map(str, sorted(depths))) or '?'} decoder blocks"
            f"{f' in {base[:-1]!r}' if base else ''}; expected a decoder-only model, such as Llama, Qwen, GPT-NeoX or "
            "GPT-2"
        )
    return min(paths)[2]


_shared: dict[tuple[str, ...], Any] | None = None


@contextlib.contextmanager
def shared_backbones() -> Iterator[None]:
    """Load each name and dtype once within this context; every caller gets the same object.

    This is for many runs in one process. A caller that changes the model, for example by an adapter, must undo the
    change; the model stays on the device it was moved to. Leaving the outermost context drops the models.
    """
    global _shared
    outer = _shared
    _shared = {} if outer is None else outer
    try:
        yield
    finally:
        _shared = outer


def backbones_are_shared() -> bool:
    """Whether a `shared_backbones` context is open."""
    return _shared is not None


def load_backbone(name: str = DEFAULT_BACKBONE, dtype: str = "float32") -> Backbone:
    """Load a frozen causal language model and its tokenizer onto the CPU.

    Only safetensors weights are read, and code that comes with a model is never run.

    Args:
        name: `smollm2-135m` (downloaded on first use), a folder written by `save_pretrained`, or a hub id.
        dtype: Floating-point type of the weights: float32, bfloat16 or float16.

    Raises:
        InputError: If the name or dtype is not one of these, the hub cannot be reached, or the files are not a complete
            causal language model.
    """
    if dtype not in DTYPES:
        raise InputError(f"backbone dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
    if _shared is not None and (name, dtype) in _shared:
        return _shared[name, dtype]
    folder = _resolve(name)
    _check_files(name, folder)
    # The tokenizer comes first: it loads quickly, so it fails quickly.
    tokenizer = load_tokenizer(name)
    backbone = Backbone(_load_model(name, folder, DTYPES[dtype]), tokenizer, name, _content_hash(name, folder))
    if _shared is not None:
        _shared[name, dtype] = backbone
    return backbone


def load_tokenizer(name: str = DEFAULT_BACKBONE) -> PreTrainedTokenizerBase:
    """Load only the tokenizer of a backbone; for a hub id, no weights are downloaded.

    Raises:
        InputError: If `load_backbone` does not accept the name, or there is no tokenizer.
    """
    if _shared is not None and (name,) in _shared:
        return _shared[(name,)]
    # Otherwise every worker process of a data loader warns about its parent's threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = _resolve(name, weights=False)
    with quiet_transformers(), _as_input_error(f"backbone {name!r} has no tokenizer that can be loaded"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if _shared is not None:
        _shared[(name,)] = tokenizer
    return tokenizer


def load_config(name: str = DEFAULT_BACKBONE) -> PretrainedConfig:
    """Load only the configuration of a backbone's text model; for a hub id, no weights are downloaded.

    Raises:
        InputError: If `load_backbone` does not accept the name, or there is no configuration.
    """
    folder = _resolve(name, weights=False)
    with quiet_transformers(), _as_input_error(f"backbone {name!r} has no configuration that can be loaded"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return config.get_text_config()


def backbone_facts(name: str = DEFAULT_BACKBONE) -> dict[str, Any]:
    """Name, hash and sizes of a backbone, without loading its weights; downloads it first if necessary.

    Returns:
        `name`, `path` of its folder, `content_hash`, `hidden_size`, and sizes `parameters`, `blocks`, `vocabulary`.

    Raises:
        InputError: See `load_backbone`.
    """
    folder = _resolve(name)
    _check_files(name, folder)
    with quiet_transformers(), _as_input_error(f"backbone {name!r} cannot be loaded"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        # Tensors on the meta device take no memory, so the parameters of a model of any size can be counted.
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    text = config.get_text_config()
    return {
        "name": name,
        "path": str(folder.resolve()),
        "content_hash": _content_hash(name, folder),
        "parameters": sum(p.numel() for p in model.parameters()),
        "blocks": len(model.get_submodule(_find_blocks(model))),
        "hidden_size": text.hidden_size,
        "vocabulary": text.vocab_size,
    }


def _resolve(name: str, weights: bool = True) -> Path:
    """Folder of the model called `name`, downloaded first if necessary."""
    if name == DEFAULT_BACKBONE:
        return fetch_default()
    # `Path.expanduser` raises for an unknown user.
    folder = Path(os.path.expanduser(name))
    if name and folder.is_dir():
        return folder
    try:
        # Without a network, asking for a snapshot fails at once; asking for single files retries for a long time.
        patterns = _TOKENIZER_PATTERNS + (_WEIGHT_PATTERNS if weights else [])
        return Path(snapshot_download(name, allow_patterns=patterns, ignore_patterns=_NEVER_PATTERNS))
    except HFValidationError as error:
        raise InputError(f"backbone {name!r} is neither an existing folder nor a hub id; {ACCEPTED}") from error
    except GatedRepoError as error:
        raise InputError(
            f"backbone {name!r} is gated: accept its terms on the hub and log in with `hf auth login`, or name another"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"backbone {name!r} is not a folder here, and the hub has no public model of that name; {ACCEPTED}"
        ) from error
    except Exception as error:  # the transport errors that the hub's client lets through share no base class
        raise InputError(
            f"backbone {name!r} is not a folder here, and the hub cannot be reached to look for it there "
            f"({first_line(error)}); {ACCEPTED}; without a network only the first two work"
        ) from error


def _check_files(name: str, folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise InputError(f"backbone {name!r}: no config.json in {folder}; expected a model saved by save_pretrained")
    if not any(folder.glob("*.safetensors")):
        raise InputError(f"backbone {name!r}: no *.safetensors in {folder}; weights in other formats are not read")


def _load_model(name: str, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    with quiet_transformers(), _as_input_error(f"backbone {name!r} cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        # transformers draws missing weights at random and continues, which would make every measurement meaningless.
        raise InputError(
            f"backbone {name!r} lacks {len(missing)} of the weights of {type(model).__name__}, such as {missing[0]}; "
            "expected a complete causal language model"
        )
    # An adapter trained on this model names its base by this: an id that loads here and elsewhere.
    model.name_or_path = model.config._name_or_path = name_for_transformers(name)
    return model


def _content_hash(name: str, folder: Path) -> str:
    """SHA-256 over configuration and weights; the default backbone's is read from its manifest."""
    if name == DEFAULT_BACKBONE and (manifest := default_manifest(folder)):
        return manifest["content_hash"]
    return hash_model(folder)


@contextlib.contextmanager
def _as_input_error(what: str) -> Iterator[None]:
    """Turn any error of transformers or safetensors on a bad folder into one line; the errors share no base class."""
    try:
        yield
    except Exception as error:
        raise InputError(
            f"{what}: {first_line(error)} (expected a causal language model that transformers knows; code that "
            "comes with a model is never run)"
        ) from error
