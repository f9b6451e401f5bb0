"""A split model computes what the whole model computes, or a warning says that it cannot be split."""

import logging
from collections.abc import Callable

import pytest
import torch

from pml.adapter import AdapterConfig, attach_adapter, detach_adapter, lora_layers
from pml.backbone import Backbone
from pml.corpus import Example, collate
from pml.cpu import tune_cpu
from pml.frozen_layers import FrozenLayers, content_keys
from pml.modules import SFT
from pml.state_store import CacheConfig

EXAMPLES = [
    Example(0, tuple(range(5, 12)), tuple(range(40, 52))),
    Example(1, (9, 8), (7,)),
    Example(2, tuple(range(100, 103)), tuple(range(200, 209))),
]
PLACEMENTS = {
    "mlp_block": AdapterConfig(rank=3, block=2),
    "one block": AdapterConfig(rank=3, block=2, placement=["down_proj"]),
    "two blocks": AdapterConfig(rank=3, block=[1, 3], placement=["down_proj"]),
    "two mlp blocks": AdapterConfig(rank=3, block=[1, 3]),
    "lowest block": AdapterConfig(rank=3, block=0),
    "highest block": AdapterConfig(rank=3, block=3),
}
NEOX_PLACEMENTS = {
    "mlp_block": AdapterConfig(rank=3, block=2),
    "two blocks": AdapterConfig(rank=3, block=[1, 3], placement=["dense_4h_to_h"]),
}
CASES = [
    (architecture, name)
    for architecture in ("llama", "qwen3", "gemma3", "gpt_neox")
    for name in (NEOX_PLACEMENTS if architecture == "gpt_neox" else PLACEMENTS)
]


def make_module(backbone: Backbone, config: AdapterConfig, *, split: bool) -> SFT:
    """An SFT module with a random B, so that the adapter changes the output."""
    module = SFT(adapter=config, frozen_prefix=CacheConfig(enabled=split), seed=3)
    module._backbone = backbone
    module.configure_model()
    generator = torch.Generator().manual_seed(4)
    for layer in lora_layers(module.model):
        for linear in layer.lora_B.values():
            linear.weight.data.normal_(generator=generator)
    return module


def losses_and_gradients(module: SFT) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    scores = module.score(collate(EXAMPLES))
    (scores.losses.sum() / scores.mask.sum()).backward()
    return scores.losses.detach(), {n: p.grad.clone() for n, p in module.model.named_parameters() if p.grad is not None}


def train(module: SFT, steps: int, examples: list[Example] | None = None) -> torch.Tensor:
    """Train with plain AdamW and return the mean loss per target token at each step."""
    parameters = [p for p in module.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        scores = module.score(collate(examples or EXAMPLES))
        losses.append(scores.losses.sum() / scores.mask.sum())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    return torch.stack(losses).detach()


@pytest.mark.parametrize(("architecture", "placement"), CASES)
def test_split_and_whole_model_agree_on_losses_and_gradients_of_a_padded_batch(
    architecture: str, placement: str, make_tiny_backbone: Callable[[str], Backbone]
) -> None:
    config = (NEOX_PLACEMENTS if architecture == "gpt_neox" else PLACEMENTS)[placement]
    results = {}
    for split in (False, True):
        module = make_module(make_tiny_backbone(architecture), config, split=split)
        results[split] = losses_and_gradients(module)
        assert (module.frozen_layers.cut == "whole") is not split
    torch.testing.assert_close(results[True][0], results[False][0])
    assert results[True][1].keys() == results[False][1].keys()
    for name, gradient in results[False][1].items():
        # Sums over positions run in another order, so float32 rounding is relative to the largest gradient.
        torch.testing.assert_close(results[True][1][name], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


def test_an_mlp_block_placement_is_cut_after_its_block(tiny_backbone: Backbone) -> None:
    assert make_module(tiny_backbone, PLACEMENTS["mlp_block"], split=True).frozen_layers.cut == "after_block"


def test_a_placement_on_listed_modules_is_cut_before_its_blocks(tiny_backbone: Backbone) -> None:
    assert make_module(tiny_backbone, PLACEMENTS["two blocks"], split=True).frozen_layers.cut == "before_block"


def test_an_mlp_block_placement_is_cut_before_its_block_if_the_mlp_output_is_normalised(
    make_tiny_backbone: Callable[[str], Backbone],
) -> None:
    module = make_module(make_tiny_backbone("gemma3"), PLACEMENTS["mlp_block"], split=True)
    assert module.frozen_layers.cut == "before_block"


def test_a_decoder_that_changes_its_input_embeddings_runs_whole_with_a_warning(
    make_tiny_backbone: Callable[[str], Backbone], caplog: pytest.LogCaptureFixture
) -> None:
    module = make_module(make_tiny_backbone("gpt2"), AdapterConfig(rank=3, block=2), split=True)
    with caplog.at_level(logging.WARNING):
        assert module.frozen_layers.cut == "whole"
    assert "tiny-gpt2 cannot be split at block 2" in caplog.text
    scores = module.score(collate(EXAMPLES))
    logits = module(collate(EXAMPLES)["input_ids"])
    expected = -logits[0, 6:18].log_softmax(-1)[torch.arange(12), torch.arange(40, 52)]
    torch.testing.assert_close(scores.losses[0, :12], expected)


def test_a_second_adapter_at_the_same_block_reuses_the_kept_states(tiny_backbone: Backbone) -> None:
    batch = collate(EXAMPLES)
    first = FrozenLayers(tiny_backbone, model := attach_adapter(tiny_backbone, AdapterConfig(rank=2, block=2)))
    first.final_hidden(batch)
    first.final_hidden(batch)
    assert first.filled == 3
    detach_adapter(model)
    second = FrozenLayers(tiny_backbone, attach_adapter(tiny_backbone, AdapterConfig(rank=5, block=2)))
    second.final_hidden(batch)
    assert second.filled == 0


def test_kept_states_do_not_depend_on_the_adapter_that_filled_them(tiny_backbone: Backbone) -> None:
    module = make_module(tiny_backbone, PLACEMENTS["mlp_block"], split=True)
    module.score(collate(EXAMPLES))
    batch = collate(EXAMPLES)
    keys = content_keys(batch["input_ids"], batch["lengths"])
    trained = {key: module.frozen_layers.store[key] for key in keys}
    module.release()
    tiny_backbone.kept_states.clear()
    fresh = FrozenLayers(tiny_backbone, attach_adapter(tiny_backbone, AdapterConfig(rank=1, block=2)))
    fresh.final_hidden(collate(EXAMPLES))
    for key, kept in trained.items():
        for ours, theirs in zip(fresh.store[key], kept, strict=True):
            assert torch.equal(ours, theirs)


def test_states_kept_in_inference_mode_can_be_trained_on(tiny_backbone: Backbone) -> None:
    module = make_module(tiny_backbone, PLACEMENTS["mlp_block"], split=True)
    with torch.inference_mode():
        module.score(collate(EXAMPLES))
    assert module.frozen_layers.filled == 3
    losses_and_gradients(module)


def test_content_keys_differ_by_content_and_ignore_padding() -> None:
    short, long = Example(0, (1, 2), (3,)), Example(1, (1, 2), (3, 4, 5))
    alone, together = collate([short]), collate([short, long])
    first, second = content_keys(together["input_ids"], together["lengths"])
    assert list(content_keys(alone["input_ids"], alone["lengths"])) == [first]
    assert first != second


def test_calling_a_split_module_returns_the_logits_of_every_position(tiny_backbone: Backbone) -> None:
    module = make_module(tiny_backbone, PLACEMENTS["mlp_block"], split=True)
    batch = collate(EXAMPLES)
    scores = module.score(batch)
    logits = module(batch["input_ids"])
    assert logits.shape == (3, 19, tiny_backbone.vocab_size)
    expected = torch.nn.functional.cross_entropy(logits[2, 2:11], batch["labels"][2, 3:12], reduction="none")
    torch.testing.assert_close(scores.losses[2, :9], expected)


def test_a_bfloat16_backbone_is_split_with_the_settings_of_tune_cpu(
    make_tiny_backbone: Callable[[str], Backbone],
) -> None:
    tune_cpu()
    backbone = make_tiny_backbone("llama")
    backbone.model.to(torch.bfloat16)
    prefix = make_module(backbone, PLACEMENTS["mlp_block"], split=True).frozen_layers
    assert prefix.cut == "after_block"
    assert prefix.head is backbone.model.lm_head


def test_a_float32_adapter_trains_on_a_bfloat16_backbone(
    make_tiny_backbone: Callable[[str], Backbone],
) -> None:
    backbone = make_tiny_backbone("llama")
    backbone.model.to(torch.bfloat16)
    module = make_module(backbone, PLACEMENTS["mlp_block"], split=True)
    parameters = [p for p in module.model.parameters() if p.requires_grad]
    assert {p.dtype for p in parameters} == {torch.float32}
    losses = train(module, steps=20)
    assert losses.dtype == torch.float32
    assert losses[-1] < losses[0] - 1


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_twenty_training_steps_have_the_same_losses_split_and_whole(
    placement: str, make_tiny_backbone: Callable[[str], Backbone]
) -> None:
    losses = {}
    for split in (False, True):
        module = make_module(make_tiny_backbone("llama"), PLACEMENTS[placement], split=split)
        losses[split] = train(module, steps=20)
    # Rounding grows from step to step; a wrong gradient would change losses by tenths after a few.
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-3, atol=1e-3)


@pytest.mark.backbone
@pytest.mark.parametrize(
    "config",
    [
        pytest.param(AdapterConfig(rank=4, block=20), id="mlp_block at 20"),
        pytest.param(
            AdapterConfig(rank=4, block=[1, 3], placement=["down_proj"]),
            id="down_proj at 1 and 3",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_split_default_backbone_agrees_with_the_whole_one(
    config: AdapterConfig, default_backbone: Backbone
) -> None:
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(1000, 40_000, (60,), generator=generator).tolist()
    examples = [Example(0, tuple(ids[:12]), tuple(ids[12:40])), Example(1, tuple(ids[40:45]), tuple(ids[45:60]))]
    results, steps = {}, {}
    for split in (False, True):
        module = SFT(adapter=config, frozen_prefix=CacheConfig(enabled=split), seed=3)
        module._backbone = default_backbone
        module.configure_model()
        try:
            # Give B the size that training gives it, so that the adapter changes the output.
            generator.manual_seed(7)
            for layer in lora_layers(module.model):
                for linear in layer.lora_B.values():
                    linear.weight.data.normal_(std=0.05, generator=generator)
            assert (module.frozen_layers.cut == "whole") is not split
            scores = module.score(collate(examples))
            (scores.losses.sum() / scores.mask.sum()).backward()
            results[split] = (
                scores.losses.detach(),
                [p.grad.clone() for p in module.model.parameters() if p.requires_grad],
            )
            steps[split] = train(module, steps=5, examples=examples)
        finally:
            module.release()
    torch.testing.assert_close(results[True][0], results[False][0], rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(results[True][1], results[False][1], strict=True):
        # Sums over positions run in another order, through thirty blocks.
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    torch.testing.assert_close(steps[True], steps[False], rtol=1e-3, atol=1e-3)
