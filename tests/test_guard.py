import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pml.adapter import (
    AdapterConfig,
    adapter_parameters,
    adapter_state,
    attach_adapter,
    detach_adapter,
    load_adapter,
    lora_layers,
)
from pml.backbone import Backbone, load_backbone
from pml.certificate import certify
from pml.corpus import collate
from pml.errors import InputError
from pml.guard import GuardConfig, GuardedA, free_directions, input_moments
from pml.modules import SFT
from tests.tiny_runs import Ids, make_trainer, uneven

PLACEMENTS: list[Any] = ["mlp_block", ["down_proj"], ["q_proj", "o_proj", "down_proj"]]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PML_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "ordinary.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    return str(path)


def guarded(text: str | None = None, **settings: Any) -> AdapterConfig:
    return AdapterConfig(**{"rank": 2, "block": 2, "guard": GuardConfig(directions=12, text=text), **settings})


def test_free_directions_are_orthogonal_to_the_largest_principal_directions() -> None:
    # Inputs (3, 4, 0) and (0, 0, 2): principal directions (.6, .8, 0) with 25 and (0, 0, 1) with 4.
    moment = torch.tensor([[9.0, 12.0, 0.0], [12.0, 16.0, 0.0], [0.0, 0.0, 4.0]])
    plane = free_directions(moment, variance=0.8)  # 25 / 29 is .86
    assert plane.shape == (3, 2)
    torch.testing.assert_close(torch.tensor([0.6, 0.8, 0.0]) @ plane, torch.zeros(2))
    line = free_directions(moment, variance=0.9)
    torch.testing.assert_close(line.abs(), torch.tensor([[0.8], [0.6], [0.0]]))
    torch.testing.assert_close(free_directions(moment, 0.5, directions=2).abs(), line.abs())
    torch.testing.assert_close(plane.T @ plane, torch.eye(2))
    # Guarding as many directions as there are, or more, leaves none.
    for directions in (3, 4):
        assert free_directions(moment, 0.5, directions=directions).shape == (3, 0)


def test_the_mean_of_the_inputs_is_guarded_too() -> None:
    # Every input is (2, 0): with the mean subtracted, there would be no principal direction at all.
    free = free_directions(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), variance=0.5)
    torch.testing.assert_close(free.abs(), torch.tensor([[0.0], [1.0]]))


def test_a_guarded_a_acts_as_a_linear_layer_with_the_weight_that_it_saves() -> None:
    basis = torch.tensor([[1.0, 0.0], [0.0, 0.6], [0.0, 0.8]])
    a = GuardedA(torch.tensor([[1.0, 2.0, 3.0]]), basis)
    # (1, 2, 3) Q = (1, 3.6); times Q^T it is (1, 2.16, 2.88).
    torch.testing.assert_close(a.weight, torch.tensor([[1.0, 2.16, 2.88]]))
    x = torch.tensor([[1.0, 1.0, 1.0]])
    torch.testing.assert_close(a(x), torch.tensor([[6.04]]))
    assert a.state_dict().keys() == {"weight"}
    other = GuardedA(torch.zeros(1, 3), basis)
    other.load_state_dict(a.state_dict())
    torch.testing.assert_close(other.weight, a.weight)
    with pytest.raises(RuntimeError, match="weight"):
        other.load_state_dict({})


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_trained_adapter_stays_orthogonal_to_the_guarded_directions_of_ordinary_text(
    tiny_backbone_folder: Path, text: str, tmp_path: Path, placement: Any
) -> None:
    module = SFT(
        backbone=str(tiny_backbone_folder), adapter=guarded(text, placement=placement), seed=1, weight_decay=0.1
    )
    trainer = make_trainer(tmp_path, max_epochs=10)
    trainer.fit(module, datamodule=Ids(uneven(4), batch_size=2))
    layers = dict(module.backbone.model.named_modules())
    names = [name for name, layer in layers.items() if layer in list(lora_layers(module.model))]
    assert len(names) == (1 if isinstance(placement, str) else len(placement))
    moments = input_moments(module.backbone, names, GuardConfig(text=text))
    for name in names:
        a, b = layers[name].lora_A["default"].weight, layers[name].lora_B["default"].weight
        assert b.abs().max() > 0.01
        top = torch.linalg.eigh(moments[name]).eigenvectors[:, -12:]
        assert (a @ top).norm() / a.norm() < 1e-5


def test_moments_are_those_of_the_inputs_of_the_adapted_layer(tiny_backbone: Backbone, text: str) -> None:
    model = attach_adapter(tiny_backbone, guarded(text, placement=["down_proj"]))
    (layer,) = lora_layers(model)
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    ids = list((Path(text).read_text(encoding="utf-8")[:640]).encode())[:129]
    tokens = [tiny_backbone.tokenizer.encode(bytes([i]).decode(), add_special_tokens=False)[0] for i in ids]
    pieces = -(-len(Path(text).read_text(encoding="utf-8")) // 640)
    assert pieces == 3
    with torch.no_grad():
        model(input_ids=torch.tensor([tokens]))
    one = seen[0].T @ seen[0]
    total = input_moments(tiny_backbone, ["model.layers.2.mlp.down_proj"], GuardConfig(text=text))
    (moment,) = total.values()
    # The text repeats itself, so each of the three passages contributes about as much as the first.
    assert moment.trace() / one.trace() == pytest.approx(3, rel=0.2)
    shares = torch.linalg.eigvalsh(moment - one)
    assert shares.min() > -1e-3 * shares.max()


def test_the_dropout_of_a_fit_does_not_depend_on_whether_the_moments_are_cached(
    text: str, tiny_backbone_folder: Path, tmp_path: Path
) -> None:
    ends = []
    for _ in range(2):
        torch.manual_seed(3)
        adapter = guarded(text, placement=["q_proj", "up_proj"], dropout=0.3)
        module = SFT(backbone=str(tiny_backbone_folder), adapter=adapter, seed=1)
        make_trainer(tmp_path, max_epochs=2).fit(module, datamodule=Ids(uneven(3)))
        ends.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
        module.release()
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())


def test_moments_are_computed_once_and_cached_on_disk(
    tiny_backbone: Backbone, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, config = ["model.layers.1.mlp"], GuardConfig(text=text)
    first = input_moments(tiny_backbone, names, config)
    (file,) = (tmp_path / "cache" / "guard").iterdir()
    assert file.suffix == ".safetensors"
    with monkeypatch.context() as patch:
        patch.setattr("pml.guard._computed", lambda *_: pytest.fail("computed again"))
        torch.testing.assert_close(input_moments(tiny_backbone, names, config), first)
    file.write_bytes(b"broken")
    torch.testing.assert_close(input_moments(tiny_backbone, names, config), first)
    Path(text).write_text("Another text.", encoding="utf-8")
    assert not torch.equal(input_moments(tiny_backbone, names, config)[names[0]], first[names[0]])
    assert len(list((tmp_path / "cache" / "guard").iterdir())) == 2


def test_moments_that_are_not_finite_are_refused_and_not_cached(
    tiny_backbone: Backbone, text: str, tmp_path: Path
) -> None:
    names, config = ["model.layers.1.mlp"], GuardConfig(text=text)
    tiny_backbone.model.get_input_embeddings().weight.fill_(torch.inf)
    for _ in range(2):
        with pytest.raises(InputError, match=r"'tiny-llama' gives states that are not finite in float32; take a"):
            input_moments(tiny_backbone, names, config)
    assert not (tmp_path / "cache" / "guard").exists()


def test_moments_are_cached_separately_for_each_content_hash_and_dtype(
    tiny_backbone: Backbone, text: str, tmp_path: Path
) -> None:
    for change in (
        lambda: None,
        lambda: setattr(tiny_backbone, "content_hash", "of other weights"),
        lambda: tiny_backbone.model.bfloat16(),
    ):
        change()
        input_moments(tiny_backbone, ["model.layers.1.mlp"], GuardConfig(text=text))
    assert len(list((tmp_path / "cache" / "guard").iterdir())) == 3


def test_a_backbone_with_released_lower_blocks_gives_the_moments_of_the_whole_one(
    tiny_backbone_folder: Path, text: str, tmp_path: Path
) -> None:
    names, config = ["model.layers.1.mlp"], GuardConfig(text=text)
    whole = input_moments(load_backbone(str(tiny_backbone_folder)), names, config)
    shutil.rmtree(tmp_path / "cache")
    freed = load_backbone(str(tiny_backbone_folder))
    freed.release(2)
    torch.testing.assert_close(input_moments(freed, names, config), whole)


def test_blocks_above_the_highest_guarded_layer_are_not_run(tiny_backbone: Backbone, text: str) -> None:
    ran: list[int] = []
    for i, block in enumerate(tiny_backbone.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    input_moments(tiny_backbone, ["model.layers.0.mlp", "model.layers.1.mlp"], GuardConfig(text=text))
    assert set(ran) == {0, 1}


def test_the_packaged_text_spans_all_input_directions_of_a_layer(tiny_backbone: Backbone) -> None:
    moment = input_moments(tiny_backbone, ["model.layers.0.mlp"], GuardConfig())
    assert torch.linalg.matrix_rank(moment["model.layers.0.mlp"]) == 32


def test_directions_are_found_once_for_layers_with_the_same_inputs_and_for_later_adapters(
    tiny_backbone: Backbone, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[int] = []

    def counted(moment: torch.Tensor, *rest: Any) -> torch.Tensor:
        found.append(len(moment))
        return free_directions(moment, *rest)

    monkeypatch.setattr("pml.guard.free_directions", counted)
    layers = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    first = attach_adapter(tiny_backbone, guarded(text, placement=layers))
    # The inputs of attention, of the MLP and of its last layer.
    assert found == [32, 32, 64]
    bases = {name: basis.clone() for name, basis in first.named_buffers() if name.endswith("basis")}
    assert len(bases) == 6
    for name, basis in first.named_buffers():
        if name in bases:
            basis.zero_()  # As loading a checkpoint overwrites it.
    detach_adapter(first)
    again = attach_adapter(tiny_backbone, guarded(text, placement=layers))
    assert found == [32, 32, 64]
    assert all(torch.equal(basis, bases[name]) for name, basis in again.named_buffers() if name in bases)
    detach_adapter(again)
    attach_adapter(tiny_backbone, guarded(text, placement=["down_proj"], guard=GuardConfig(directions=9, text=text)))
    assert found == [32, 32, 64, 64]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_guarded_adapter_is_saved_as_an_ordinary_lora(
    tiny_backbone_folder: Path, text: str, tmp_path: Path, placement: Any
) -> None:
    module = SFT(backbone=str(tiny_backbone_folder), adapter=guarded(text, placement=placement), seed=1)
    data = Ids(uneven(4), batch_size=2)
    make_trainer(tmp_path, max_epochs=5).fit(module, datamodule=data)
    module.model.save_pretrained(str(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {name.rsplit(".", 2)[-2] for name in saved} == {"lora_A", "lora_B"}
    plain = AutoModelForCausalLM.from_pretrained(tiny_backbone_folder)
    if isinstance(placement, list):
        loaded = PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))
    else:
        loaded = load_adapter(plain, tmp_path / "adapter")
    before, after = (certify(model.eval(), data.examples) for model in (module.model, loaded))
    assert [known.verdict for known in after] == [known.verdict for known in before]
    for known, other in zip(before, after, strict=True):
        torch.testing.assert_close(known.margins, other.margins, rtol=1e-4, atol=1e-4)  # C Q^T was rounded once more
    merged = module.model.merge_and_unload() if isinstance(placement, list) else None
    if merged is not None:
        ids = torch.tensor([data.examples[0].prompt_ids])
        torch.testing.assert_close(merged(ids).logits, loaded(ids).logits, rtol=1e-3, atol=1e-3)  # merging rounds


def test_a_resumed_guarded_fit_equals_an_uninterrupted_one_even_if_the_text_has_changed(
    tiny_backbone_folder: Path, text: str, tmp_path: Path
) -> None:
    def run(epochs: int, checkpoint: str | None = None) -> tuple[SFT, str]:
        module = SFT(backbone=str(tiny_backbone_folder), adapter=guarded(text), seed=1, schedule="constant")
        save = ModelCheckpoint(tmp_path / str(epochs), filename="end")
        trainer = make_trainer(tmp_path, max_epochs=epochs, enable_checkpointing=True, callbacks=[save])
        trainer.fit(module, datamodule=Ids(uneven(6), batch_size=2), ckpt_path=checkpoint, weights_only=True)
        return module, save.best_model_path

    whole, _ = run(6)
    _, stopped = run(3)
    # Other text gives other directions, but AdamW's moments in the checkpoint only fit the original ones.
    Path(text).write_text("Something else entirely, and at some length. " * 9, encoding="utf-8")
    resumed, _ = run(6, stopped)
    assert {"coordinates", "basis"} <= {name.rsplit(".", 1)[-1] for name in adapter_state(whole.model)}
    for name, tensor in adapter_state(whole.model).items():
        assert torch.equal(adapter_state(resumed.model)[name], tensor)
    loaded = SFT.load_from_checkpoint(stopped, weights_only=True)
    assert loaded.adapter.guard == GuardConfig(directions=12, text=text)
    loaded.eval().score(collate(Ids(uneven(2)).examples))


def test_only_b_and_the_free_coordinates_of_a_are_trained(tiny_backbone: Backbone, text: str) -> None:
    model = attach_adapter(tiny_backbone, guarded(text))
    assert sum(p.numel() for p in adapter_parameters(model).values()) == 2 * (32 - 12) + 2 * 32
    assert {n for n, p in model.named_parameters() if p.requires_grad} == adapter_parameters(model).keys()


def test_a_guard_with_too_few_free_directions_is_refused_and_the_backbone_stays_usable(
    tiny_backbone: Backbone, text: str
) -> None:
    with pytest.raises(InputError, match=r"leaves 1 of 32 directions of model\.layers\.2\.mlp free, and the rank is 2"):
        attach_adapter(tiny_backbone, guarded(text, guard=GuardConfig(directions=31, text=text)))
    # Two free directions are enough for rank 2.
    attach_adapter(tiny_backbone, guarded(text, guard=GuardConfig(directions=30, text=text)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"variance": 1.0}, "variance is 1.0; expected a share between 0 and 1"),
        ({"variance": 0.0}, "variance is 0.0; expected a share between 0 and 1"),
        ({"directions": 0}, "directions is 0; expected at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        GuardConfig(**settings)


def test_text_that_is_missing_empty_or_not_utf8_is_refused(tiny_backbone: Backbone, tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text("  \n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    for path, said in ((tmp_path / "none.txt", "cannot be read"), (binary, "cannot be read"), (empty, "no text in it")):
        with pytest.raises(InputError, match=said):
            attach_adapter(tiny_backbone, guarded(str(path)))
