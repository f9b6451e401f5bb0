"""The frozen-layer cache: places, budgets, and blocks that are freed and loaded again."""

import gc
import logging
import shutil
from pathlib import Path

import psutil
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks import VerbatimRecall
from pml.adapter import AdapterConfig, attach_adapter
from pml.backbone import Backbone
from pml.corpus import Example, collate
from pml.errors import InputError
from pml.frozen_layers import FrozenLayers
from pml.modules import SFT
from pml.recall import greedy_recall
from pml.state_store import CacheConfig, StateStore
from tests.tiny_runs import Ids, make_trainer, uneven

CPU = torch.device("cpu")
KIB = 2.0**-20
"""One KiB in GiB."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("place", ["device", "host", "disk"])
def test_stored_tensors_are_returned_bit_for_bit(place: str, dtype: torch.dtype, tmp_path: Path) -> None:
    store = StateStore(CacheConfig(place=place), CPU, tmp_path)  # type: ignore[arg-type]
    kept = {bytes([i]): (torch.randn(i + 1, 5).to(dtype), torch.randn(3, 7).to(dtype)) for i in range(20)}
    for key, tensors in kept.items():
        store.put(key, tensors)
    assert len(store) == 20
    for key, tensors in kept.items():
        for ours, theirs in zip(store[key], tensors, strict=True):
            assert ours.dtype == dtype
            assert torch.equal(ours, theirs)


def test_a_stored_key_is_stored_once(tmp_path: Path) -> None:
    store = StateStore(CacheConfig(place="host"), CPU, tmp_path)
    for value in (1.0, 2.0):
        store.put(b"a", (torch.full((200,), value),))
    assert (len(store), store.bytes["host"]) == (1, 800)
    assert torch.equal(store[b"a"][0], torch.ones(200))


def test_backward_through_a_stored_tensor_works_after_more_are_appended_to_the_file(tmp_path: Path) -> None:
    store = StateStore(CacheConfig(place="disk"), CPU, tmp_path)
    store.put(b"a", (torch.ones(3),))
    weight = torch.ones(3, requires_grad=True)
    product = (store[b"a"][0] * weight).sum()
    store.put(b"b", (torch.ones(3),))
    product.backward()
    assert weight.grad is not None and weight.grad.tolist() == [1, 1, 1]


def test_the_store_keeps_a_copy_of_a_tensor(tmp_path: Path) -> None:
    store, tensor = StateStore(CacheConfig(), CPU, tmp_path), torch.ones(3)
    store.put(b"a", (tensor,))
    tensor.zero_()
    assert store[b"a"][0].tolist() == [1, 1, 1]


def test_a_closed_store_can_be_read_but_keeps_nothing_new(tmp_path: Path) -> None:
    store = StateStore(CacheConfig(), CPU, tmp_path)
    store.put(b"a", (torch.ones(3),))
    with store.closed():
        with store.closed():
            store.put(b"b", (torch.ones(3),))
            assert store[b"a"][0].tolist() == [1, 1, 1]
        # Leaving the inner context does not open it again.
        store.put(b"b", (torch.ones(3),))
    assert b"b" not in store
    assert sum(store.bytes.values()) == 12
    store.put(b"b", (torch.ones(3),))
    assert len(store) == 2


def test_tensors_beyond_the_host_budget_go_to_a_nameless_file(tmp_path: Path) -> None:
    store = StateStore(CacheConfig(budget_gib=KIB), CPU, tmp_path)
    for i in range(3):
        store.put(bytes([i]), (torch.full((200,), float(i)),))
    assert store.bytes == {"host": 800, "disk": 1600}
    assert [store[bytes([i])][0][0].item() for i in range(3)] == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_a_tensor_larger_than_a_segment_of_the_file_is_returned_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pml.state_store.SEGMENT_BYTES", 4096)
    store = StateStore(CacheConfig(place="disk"), CPU, tmp_path)
    tensors = [torch.randn(n) for n in (10, 5000, 10, 1000, 1000)]
    for i, tensor in enumerate(tensors):
        store.put(bytes([i]), (tensor,))
    assert all(torch.equal(store[bytes([i])][0], tensor) for i, tensor in enumerate(tensors))


def test_tensors_are_stored_on_disk_without_posix_fallocate_as_on_macos(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.posix_fallocate")
    monkeypatch.setattr("pml.state_store.SEGMENT_BYTES", 4096)
    store = StateStore(CacheConfig(place="disk"), CPU, tmp_path)
    tensors = [torch.randn(n) for n in (900, 900, 900)]
    for i, tensor in enumerate(tensors):
        store.put(bytes([i]), (tensor,))
    assert all(torch.equal(store[bytes([i])][0], tensor) for i, tensor in enumerate(tensors))


def test_a_fixed_place_that_is_full_keeps_no_more_and_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store = StateStore(CacheConfig(place="host", budget_gib=KIB), CPU, tmp_path)
    with caplog.at_level(logging.WARNING):
        for i in range(4):
            store.put(bytes([i]), (torch.zeros(200),))
    assert len(store) == 1
    assert b"\x01" not in store
    assert caplog.text.count("no room for more than 1 examples") == 1


def test_a_place_can_be_filled_to_exactly_its_budget(tmp_path: Path) -> None:
    store = StateStore(CacheConfig(place="host", budget_gib=KIB), CPU, tmp_path)
    for i in range(2):
        store.put(bytes([i]), (torch.zeros(128),))
    assert store.bytes == {"host": 1024}
    assert not store.full


def test_the_default_host_budget_is_half_of_the_available_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Memory:
        available = 2000

    monkeypatch.setattr(psutil, "virtual_memory", Memory)
    store = StateStore(CacheConfig(), CPU, tmp_path)
    for i in range(2):
        store.put(bytes([i]), (torch.zeros(200),))
    assert store.bytes == {"host": 800, "disk": 800}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"place": "cloud"}, "place is 'cloud'; expected auto, device, host or disk"),
        ({"budget_gib": 0}, "budget_gib is 0; expected a number of GiB above 0"),
        ({"enabled": False, "release": True}, "release needs the cache of frozen states"),
    ],
)
def test_invalid_settings_are_refused(arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CacheConfig(**arguments)


EXAMPLES = [Example(0, (1, 2, 3), (4, 5, 6)), Example(1, (7, 8), (9,))]


def make_module(folder: Path, config: CacheConfig, placement: str | list[str] = "mlp_block") -> SFT:
    module = SFT(
        backbone=str(folder), adapter=AdapterConfig(rank=2, block=2, placement=placement), seed=1, frozen_prefix=config
    )
    module.configure_model()
    return module


def test_frozen_layers_share_a_store_only_if_their_cache_settings_are_equal(tiny_backbone: Backbone) -> None:
    model = attach_adapter(tiny_backbone, AdapterConfig(rank=2, block=2))
    stores = [
        FrozenLayers(tiny_backbone, model, config).store
        for config in (CacheConfig(), CacheConfig(), CacheConfig(budget_gib=1.0), CacheConfig(place="host"))
    ]
    assert stores[0] is stores[1]
    assert len(set(map(id, stores))) == 3


def test_examples_beyond_the_budget_get_the_same_scores(tiny_backbone_folder: Path) -> None:
    batch = collate(EXAMPLES)
    small = make_module(tiny_backbone_folder, CacheConfig(place="host", budget_gib=KIB))
    whole = make_module(tiny_backbone_folder, CacheConfig())
    assert torch.equal(small.score(batch).losses, whole.score(batch).losses)
    assert torch.equal(small.score(batch).losses, whole.score(batch).losses)
    assert (small.frozen_layers.filled, whole.frozen_layers.filled) == (3, 2)


@pytest.mark.parametrize(("placement", "freed"), [("mlp_block", {0, 1, 2}), (["down_proj"], {0, 1})])
def test_scoring_needs_no_released_blocks_and_generation_loads_them_again(
    placement: str | list[str], freed: set[int], tiny_backbone_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = make_module(tiny_backbone_folder, CacheConfig(), placement)
    batch = collate(EXAMPLES)
    before, answers = module.score(batch).losses, greedy_recall(module, EXAMPLES)
    weights = {name: p.clone() for name, p in module.model.named_parameters()}
    module.frozen_layers.release()
    sizes = [sum(p.numel() for n, p in b.named_parameters() if "lora_" not in n) for b in module.backbone.blocks]
    assert {i for i, size in enumerate(sizes) if size == 0} == freed
    assert torch.equal(module.score(batch).losses, before)
    with caplog.at_level(logging.INFO):
        assert greedy_recall(module, EXAMPLES) == answers
    assert f"loading the lowest {len(freed)} blocks" in caplog.text
    assert all(torch.equal(p, weights[name]) for name, p in module.model.named_parameters())


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux lists a process's mappings")
def test_releasing_blocks_leaves_no_mapping_of_the_weights_file_in_memory(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_backbone_folder, tmp_path / "backbone")
    module = make_module(folder, CacheConfig())
    # Detached, since the autograd graph would hold weights for the backward pass.
    before = module.score(collate(EXAMPLES)).losses.detach()
    module.frozen_layers.release()
    gc.collect()
    assert str(folder) not in Path("/proc/self/maps").read_text()
    assert torch.equal(module.score(collate(EXAMPLES)).losses, before)


def test_scoring_a_new_example_loads_released_blocks_again(tiny_backbone_folder: Path) -> None:
    module, reference = (make_module(tiny_backbone_folder, CacheConfig()) for _ in range(2))
    module.score(collate(EXAMPLES[:1]))
    module.frozen_layers.release()
    assert module.backbone.released
    assert torch.equal(module.score(collate(EXAMPLES)).losses, reference.score(collate(EXAMPLES)).losses)
    assert not module.backbone.released


def test_a_forward_pass_for_full_logits_loads_released_blocks_again(tiny_backbone_folder: Path) -> None:
    module = make_module(tiny_backbone_folder, CacheConfig())
    expected = module(torch.arange(5)[None])
    module.score(collate(EXAMPLES))
    module.frozen_layers.release()
    assert torch.equal(module(torch.arange(5)[None]), expected)


class ReleasedBlocks(Callback):
    """Notes at the start of every epoch whether the weights of the lower blocks are freed."""

    def __init__(self) -> None:
        self.released: list[bool] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.released.append(pl_module.backbone.released)


def test_releasing_the_lower_blocks_does_not_change_the_result_of_a_fit(
    tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    ends = {}
    for release in (False, True):
        module = make_module(tiny_backbone_folder, CacheConfig(release=release))
        data = Ids(uneven(5), batch_size=2)
        watch = ReleasedBlocks()
        trainer = make_trainer(tmp_path, max_epochs=3, callbacks=[VerbatimRecall(), watch])
        trainer.fit(module, datamodule=data)
        ends[release] = module.state_dict()
        # The cache is filled before the first step; generation at the end loads the lower blocks again.
        assert watch.released == [release] * 3
        assert not module.backbone.released
    for name, weight in ends[False].items():
        assert torch.equal(ends[True][name], weight)


def test_a_fit_whose_states_do_not_fit_the_cache_keeps_the_lower_blocks(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make_module(tiny_backbone_folder, CacheConfig(place="host", budget_gib=KIB, release=True))
    data = Ids(uneven(5), batch_size=2)
    make_trainer(tmp_path, max_epochs=3).fit(module, datamodule=data)
    assert not module.backbone.released
    filled = module.frozen_layers.filled
    # The cache is known to be full, so the corpus is not computed again.
    module.frozen_layers.keep_and_release(data.examples)
    assert module.frozen_layers.filled == filled


@pytest.mark.parametrize("place", ["auto", "host"])
def test_processes_on_one_machine_divide_the_host_budget(place: str, tmp_path: Path) -> None:
    stores = [StateStore(CacheConfig(place=place, budget_gib=2 * KIB), CPU, tmp_path, n) for n in (1, 2)]  # type: ignore[arg-type]
    for store in stores:
        for i in range(3):
            store.put(bytes([i]), (torch.zeros(200),))
    assert [store.bytes["host"] for store in stores] == [1600, 800]
