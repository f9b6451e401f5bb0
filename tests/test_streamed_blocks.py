"""Frozen blocks that are streamed to the device one at a time."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from callbacks import RunRecord
from pml.adapter import AdapterConfig, attach_adapter
from pml.backbone import Backbone, load_backbone
from pml.cli import main
from pml.corpus import Example, collate
from pml.frozen_layers import FrozenLayers, move_backbone
from pml.modules import SFT
from pml.recall import score_examples
from pml.records import read_record
from pml.state_store import CacheConfig
from pml.states_below import states_below, streamed_states, with_blocks
from tests.fits import module_on
from tests.tiny_runs import Ids, make_trainer, uneven

IDS = torch.arange(5)[None]


def resident(backbone: Backbone) -> set[int]:
    """Indices of the blocks whose weights are on the model's device."""
    return {i for i, block in enumerate(backbone.blocks) if any(p.numel() for p in block.parameters())}


class Visits(Callback):
    """Records, until the first step, the resident blocks whenever one runs and the moves of streamed blocks."""

    def __init__(self) -> None:
        self.seen: list[set[int]] = []
        self.moves: list[int] = []
        self._hooks: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        for block in pl_module.backbone.blocks:
            self._hooks.append(
                block.register_forward_hook(lambda *_: self.seen.append(resident(pl_module.backbone)), prepend=True)
            )

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.streamed = pl_module.backbone.streamed
        _ = pl_module.frozen_layers
        self.moves.append(self.streamed.moves)

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.moves.append(self.streamed.moves)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        for hook in self._hooks:
            hook.remove()


def test_streaming_changes_neither_the_logits_nor_the_weights(tiny_backbone: Backbone) -> None:
    backbone = tiny_backbone
    expected = backbone.model(input_ids=IDS).logits
    weights = {name: p.clone() for name, p in backbone.model.named_parameters()}
    backbone.stream(3)
    assert resident(backbone) == {3}
    assert torch.equal(backbone.model(input_ids=IDS).logits, expected)
    assert resident(backbone) == {3}
    backbone.restore()
    assert resident(backbone) == {0, 1, 2, 3}
    assert all(torch.equal(p, weights[name]) for name, p in backbone.model.named_parameters())
    assert torch.equal(backbone.model(input_ids=IDS).logits, expected)


def test_another_number_of_blocks_can_be_streamed_even_after_blocks_were_released(tiny_backbone_folder: Path) -> None:
    backbone = load_backbone(str(tiny_backbone_folder))
    expected = backbone.model(input_ids=IDS).logits
    for blocks, left in ((2, {2, 3}), (1, {1, 2, 3}), (3, {3})):
        backbone.stream(blocks)
        assert resident(backbone) == left
        assert torch.equal(backbone.model(input_ids=IDS).logits, expected)
    backbone.release(3)
    backbone.stream(2)
    assert (resident(backbone), backbone.released) == ({2, 3}, False)
    assert torch.equal(backbone.model(input_ids=IDS).logits, expected)


@pytest.mark.parametrize("placement", ["mlp_block", ["q_proj"]])
def test_a_releasing_fit_loads_one_frozen_block_at_a_time_for_all_examples_together(
    placement: str | list[str], tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    module = SFT(
        backbone=str(tiny_backbone_folder),
        adapter=AdapterConfig(rank=2, block=2, placement=placement),
        frozen_prefix=CacheConfig(release=True),
    )
    watch = Visits()
    make_trainer(tmp_path, max_epochs=1, callbacks=[watch]).fit(module, datamodule=Ids(uneven(7), batch_size=2))
    assert all(len(there & {0, 1}) <= 1 for there in watch.seen)
    tried, kept = watch.moves
    # Each of the two blocks moves three times: twice for the longest example, block by block and, to compare, in one
    # pass, and once for all examples.
    assert kept - tried == 2 * 3
    assert module.backbone.released


def test_a_recorded_fit_moves_the_frozen_blocks_no_more_often(tiny_backbone_folder: Path, tmp_path: Path) -> None:
    module = module_on(tiny_backbone_folder, frozen_prefix=CacheConfig(release=True))
    watch = Visits()
    # Lightning calls the hooks of callbacks before those of the module, which also keeps all states.
    make_trainer(tmp_path, max_epochs=1, callbacks=[watch, RunRecord()]).fit(module, datamodule=Ids(uneven(7)))
    tried, kept = watch.moves
    assert kept - tried == 2 * 3
    assert read_record(tmp_path / "record.json").pairs == 7


def test_held_out_pairs_are_scored_with_three_moves_of_each_block_a_batch_and_not_kept(
    tiny_backbone_folder: Path,
) -> None:
    examples = [Example(number, tuple(prompt), tuple(target)) for number, (prompt, target) in enumerate(uneven(20))]
    losses = []
    for release in (False, True):
        module = module_on(tiny_backbone_folder, frozen_prefix=CacheConfig(release=release))
        module.configure_model()
        if release:
            module.backbone.stream(2)
        store = module.frozen_layers.store
        streamed = module.backbone.streamed
        tried = streamed.moves if streamed is not None else 0
        losses.append(score_examples(module, examples, batch_size=10).losses)
        assert len(store) == 0
        # Twice for the longest row of a batch, block by block and in one pass, and once for all its rows.
        assert streamed is None or streamed.moves - tried == 2 * 2 * 3
    assert torch.equal(*losses)


# GPT-2's decoder adds positions to any input, so its blocks cannot be run one by one.
@pytest.mark.parametrize(
    ("architecture", "moves"), [("llama", 6), ("qwen3", 6), ("gpt_neox", 6), ("gemma3", 6), ("gpt2", 2 * 2 + 2 * 5)]
)
def test_streamed_states_of_many_examples_equal_those_of_each_example_alone(
    architecture: str, moves: int, make_tiny_backbone: Callable[[str], Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone = make_tiny_backbone(architecture)
    rows = [torch.arange(n)[None] + n for n in range(2, 22, 4)]
    with torch.no_grad():
        expected = [states_below(backbone, 2, None, row) for row in rows]
        backbone.stream(2)
        kept = list(streamed_states(backbone, 2, None, rows))
        assert backbone.streamed is not None and backbone.streamed.moves == moves
        assert all(torch.equal(one, other) for (one,), (other,) in zip(kept, expected, strict=True))
        # Rows of 2, 6, 10, 14 and 18 tokens of 128 bytes give portions of three and two rows.
        monkeypatch.setattr("pml.states_below.PORTION_BYTES", 18 * 128)
        again = list(streamed_states(backbone, 2, None, rows))
    assert all(torch.equal(one, other) for (one,), (other,) in zip(again, expected, strict=True))
    assert backbone.streamed.moves == (2 * moves + 2 if architecture != "gpt2" else 2 * moves)


def test_two_examples_run_one_after_the_other_which_moves_the_blocks_less_often(tiny_backbone: Backbone) -> None:
    tiny_backbone.stream(2)
    with torch.no_grad():
        list(streamed_states(tiny_backbone, 2, None, [IDS, IDS + 1]))
    assert tiny_backbone.streamed is not None and tiny_backbone.streamed.moves == 2 * 2


def test_a_decoder_that_differs_block_by_block_is_detected_despite_rows_of_one_token(
    tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoder_with(backbone: Backbone, blocks: slice) -> Any:
        decoder: Any = with_blocks(backbone, blocks)
        if blocks.start:
            # Rotary frequencies other than the first block's, which change nothing in a row of one token.
            rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8))
            rotary.inv_freq = rotary.inv_freq / 2
            decoder._modules = {**decoder._modules, "rotary_emb": rotary}
        return decoder

    rows = [torch.arange(1)[None], torch.arange(8)[None], torch.arange(3)[None]]
    with torch.no_grad():
        expected = [states_below(tiny_backbone, 2, None, row) for row in rows]
        monkeypatch.setattr("pml.states_below.with_blocks", decoder_with)
        tiny_backbone.stream(2)
        kept = list(streamed_states(tiny_backbone, 2, None, rows))
    assert all(torch.equal(one, other) for (one,), (other,) in zip(kept, expected, strict=True))


def test_a_streamed_block_leaves_the_device_after_a_failed_forward_pass(tiny_backbone: Backbone) -> None:
    tiny_backbone.stream(3)
    hook = tiny_backbone.blocks[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tiny_backbone.model(input_ids=IDS)
    assert resident(tiny_backbone) == {3}
    hook.remove()
    tiny_backbone.restore()
    assert resident(tiny_backbone) == {0, 1, 2, 3}


def test_the_cut_of_a_bfloat16_model_is_tried_in_float32_with_or_without_streaming(
    tiny_backbone_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for release in (False, True):
        backbone = load_backbone(str(tiny_backbone_folder), "bfloat16")
        model = attach_adapter(backbone, AdapterConfig(rank=2, block=2))
        if release:
            backbone.stream(2)
        with caplog.at_level(logging.DEBUG):
            assert FrozenLayers(backbone, model, CacheConfig(release=release)).cut == "after_block"
        assert "no trial in float32" not in caplog.text
        assert backbone.model.dtype == torch.bfloat16
        assert {p.dtype for p in backbone.blocks[0].parameters()} == {torch.bfloat16}


def test_pml_fit_leaves_released_frozen_blocks_on_the_host(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[set[int]] = []

    def moving(module: Any, device: torch.device) -> None:
        move_backbone(module, device)
        moved.append(resident(module.backbone))

    monkeypatch.setattr("pml.lightning_cli.move_backbone", moving)
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--model=SFT", f"--model.backbone={tiny_backbone_folder}", "--model.adapter.block=2"]
    command += ["--model.frozen_prefix.release=true", "--data=RandomTokens", "--data.length=8"]
    command += ["--trainer.max_epochs=1", "--trainer.accelerator=cpu", "--trainer.callbacks=[]"]
    assert main(command) == 0
    assert moved == [{2, 3}]


def test_states_cached_during_validation_can_be_trained_on(tiny_backbone_folder: Path) -> None:
    module = SFT(
        backbone=str(tiny_backbone_folder),
        adapter=AdapterConfig(rank=2, block=2),
        frozen_prefix=CacheConfig(release=True),
    )
    module.configure_model()
    module.backbone.stream(2)
    frozen_layers = module.frozen_layers
    examples = [Example(number, tuple(prompt), tuple(target)) for number, (prompt, target) in enumerate(uneven(4))]
    with torch.inference_mode():
        frozen_layers.keep(examples)
    # A single example is trained on as it is cached, without a copy.
    module.score(collate(examples[:1])).losses.sum().backward()
    assert frozen_layers.filled == 5
    assert any(p.grad is not None for p in module.model.parameters())
