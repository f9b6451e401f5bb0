"""On every causal LM architecture of transformers, training computes the losses that plain transformers computes.

The architectures in `BY_DEFAULT` are always tested; the others, marked slow, with `pytest -m "slow or not slow"`. Each
gets a tiny model from `tests.tiny_architectures`, which is trained for a few steps and compared with plain transformers
and PEFT.
"""

import re

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pml.adapter import MLP_NAMES, AdapterConfig
from pml.backbone import Backbone
from pml.corpus import Example, collate
from pml.cut_trial import in_float32
from pml.errors import InputError
from pml.modules import SFT
from tests.tiny_architectures import BLOCKS, tiny_model

# Matrices this small gain nothing from threads, which on a busy machine wait longer than they compute.
torch.set_num_threads(1)


def names(text: str) -> list[str]:
    return text.split()


BLOCK = 2
EXAMPLES = [
    Example(0, tuple(range(5, 12)), tuple(range(40, 52))),
    Example(1, (9, 8), (7,)),
    Example(2, tuple(range(100, 103)), tuple(range(120, 129))),
]

BY_DEFAULT = names("""
    bamba bart bert-generation biogpt bloom codegen cohere cohere2 cpmant deepseek_v3 falcon falcon_h1 gemma gemma2
    gemma3_text glm glm4 gpt2 gpt_neo gpt_neox gpt_oss gptj granite granitemoe helium hrm_text jamba lfm2 llama
    llama4_text mamba mistral mixtral mpt nemotron olmo olmo2 opt persimmon phi phi3 qwen2 qwen2_moe qwen3 qwen3_5_text
    qwen3_moe qwen3_next reformer rwkv smollm3 stablelm starcoder2 xglm xlnet
""")

ANOTHER_NETWORK = "has an encoder or another network beside the text model"
OF_ANOTHER_MODEL = "is the drafting part of another model, whose states it takes in"
SKIPPED = {
    **dict.fromkeys(
        names("""
        blt emu3 fuyu git got_ocr2 mllama moss_transcribe_diarize musicgen musicgen_melody phi4_multimodal
        """),
        ANOTHER_NETWORK,
    ),
    **dict.fromkeys(["gemma4_assistant", "gemma4_unified_assistant"], OF_ANOTHER_MODEL),
    **{
        whole: f"{ANOTHER_NETWORK}, which is {text}"
        for whole, text in {
            "dots3_note": "dots3_note_text",
            "gemma3": "gemma3_text",
            "gemma3n": "gemma3n_text",
            "gemma4": "gemma4_text",
            "gemma4_unified": "gemma4_unified_text",
            "llama4": "llama4_text",
            "qwen3_5": "qwen3_5_text",
            "qwen3_5_moe": "qwen3_5_moe_text",
            "qwen4_exp": "qwen4_exp_text",
        }.items()
    },
}
"""Architectures that are not tested, and why."""

NOT_CAUSAL = "changes a token's logits when later tokens change; expected a causal model"
REFUSED = {
    "cpmant": NOT_CAUSAL,
    "hrm_text": "HrmTextForCausalLM has no list of 32 decoder blocks in 'model'; expected a decoder-only model",
    "prophetnet": NOT_CAUSAL,
    "reformer": "hides its blocks from autograd, so an adapter in them gets no gradient; use another backbone",
    "xlnet": NOT_CAUSAL,
}
"""Architectures that cannot be trained, and the error that users see."""

REFUSED_IN_BFLOAT16 = {
    "inkling2_text": "Inkling2ForCausalLM does not run here on token ids alone (RuntimeError: expected m1 and m2",
}

WHOLE = set(
    # Positions are added to the input embeddings, or a norm is applied to them.
    names("""
    bart bigbird_pegasus biogpt blenderbot blenderbot-small bloom ctrl gpt-sw3 gpt2 gpt_bigcode gpt_neo marian mbart
    modernbert-decoder mvp nanochat openai-gpt opt pegasus plbart trocr whisper xglm xlm
    """)
    # Logits are capped or scaled, or the head is more than one linear layer.
    + names("""
    beam bert bert-generation big_bird camembert cohere cohere2 cohere2_moe data2vec-text electra ernie gemma2
    gemma3n_text inkling2_text inkling_text megatron-bert minicpm3 recurrent_gemma rembert roberta roberta-prelayernorm
    roc_bert roformer vaultgemma xlm-roberta xlm-roberta-xl xlstm xmod
    """)
    # Blocks pass on more than one state, or also read states from below other blocks.
    + names("deepseek_v4 gemma4_text hy_v4 qwen4_exp_text zamba zamba2 zaya")
)
"""Architectures that run as a whole in every step, without a cut above the frozen layers."""

WHOLE_IN_BFLOAT16 = {"falcon_mamba", "mamba", "mamba2"}
"""Architectures that also run as a whole in bfloat16: their final hidden states are float32, cast for the LM head."""


def cases() -> list[object]:
    marks = {True: [], False: [pytest.mark.slow]}
    return [
        pytest.param(name, marks=marks[name in BY_DEFAULT])
        for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        if name not in SKIPPED
    ]


def linear_layers(block: nn.Module) -> list[str]:
    """Names of a block's linear layers, except those whose weights a state-space mixer reads without calling them."""
    names = [
        name
        for name, module in block.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and not re.fullmatch(r"mixer\.out_proj", name)
    ]
    return sorted({name.rsplit(".", 1)[-1] for name in names})


def module_on(model: PreTrainedModel, name: str) -> SFT:
    """A module with a new adapter in one block: in parallel to its MLP if it has one, else on its linear layers."""
    backbone = Backbone(model, None, name, name)  # type: ignore[arg-type]
    block = backbone.blocks[BLOCK]
    has_mlp = any(isinstance(getattr(block, name, None), nn.Module) for name in MLP_NAMES)
    placement = "mlp_block" if has_mlp else linear_layers(block)
    module = SFT(adapter=AdapterConfig(rank=3, block=BLOCK, placement=placement), seed=3)
    module._backbone = backbone
    module.configure_model()
    return module


def ours(module: SFT) -> torch.Tensor:
    scores = module.score(collate(EXAMPLES))
    return scores.losses[scores.mask]


@torch.no_grad()
def plain(model: nn.Module) -> torch.Tensor:
    """The same losses from the model alone, one example at a time."""
    losses = []
    for example in EXAMPLES:
        ids = torch.tensor([[*example.prompt_ids, *example.target_ids]])
        logits = model(input_ids=ids).logits.float()
        first = len(example.prompt_ids)
        losses.append(nn.functional.cross_entropy(logits[0, first - 1 : -1], ids[0, first:], reduction="none"))
    return torch.cat(losses)


def train(module: SFT, steps: int) -> None:
    optimizer = torch.optim.AdamW([p for p in module.model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0)
    for _ in range(steps):
        loss = ours(module).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def size(values: torch.Tensor) -> float:
    return float(values.pow(2).mean().sqrt())


@pytest.mark.parametrize("name", cases())
def test_losses_equal_those_of_plain_transformers_before_and_after_training(name: str) -> None:
    """Losses equal those of plain transformers, or the architecture is refused with the error in `REFUSED`."""
    model = tiny_model(name)
    if name in REFUSED:
        with pytest.raises(InputError) as refusal:
            ours(module_on(model, name))
        assert REFUSED[name] in str(refusal.value)
        assert "\n" not in str(refusal.value)
        return
    untouched = plain(model)
    module = module_on(model, name)
    before = ours(module).detach()
    torch.testing.assert_close(before, untouched, rtol=0, atol=1e-4)
    train(module, steps=5)
    after = ours(module).detach()
    assert after.mean() < before.mean()
    torch.testing.assert_close(after, plain(module.model), rtol=0, atol=1e-4)
    assert (module.frozen_layers.cut == "whole") is (name in WHOLE)


@pytest.mark.parametrize("name", [case for case in cases() if case.values[0] not in REFUSED])  # type: ignore[attr-defined]
def test_bfloat16_losses_equal_those_of_plain_transformers_up_to_rounding(name: str) -> None:
    """Losses differ by rounding only, or the architecture is refused with the error in `REFUSED_IN_BFLOAT16`."""
    model = tiny_model(name, torch.bfloat16)
    if name in REFUSED_IN_BFLOAT16:
        with pytest.raises(InputError) as refusal:
            ours(module_on(model, name))
        assert REFUSED_IN_BFLOAT16[name] in str(refusal.value)
        return
    untouched = plain(model)
    module = module_on(model, name)
    for steps in (0, 5):
        train(module, steps)
        rounded = plain(module.model)
        if steps == 0:
            torch.testing.assert_close(rounded, untouched, rtol=0, atol=0)
        with in_float32(module.model):
            exact = plain(module.model)
        # Rounding moves each of the two away from the exact losses, so they may differ by twice as much.
        assert size(ours(module).detach() - rounded) <= 2 * size(rounded - exact) + 1e-4
    assert (module.frozen_layers.cut == "whole") is (name in WHOLE | WHOLE_IN_BFLOAT16)


def test_every_architecture_listed_here_is_known_to_transformers() -> None:
    known = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    named = set(BY_DEFAULT) | SKIPPED.keys() | REFUSED.keys() | REFUSED_IN_BFLOAT16.keys() | WHOLE | WHOLE_IN_BFLOAT16
    assert named <= known
    assert BLOCKS > BLOCK


def test_a_bert_model_without_is_decoder_is_refused() -> None:
    model = tiny_model("bert", is_decoder=False)
    with pytest.raises(
        InputError, match=r"BertLMHeadModel changes a token's logits .* is_decoder: true in config.json"
    ):
        ours(module_on(model, "bert"))
