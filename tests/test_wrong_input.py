"""Tables of wrong input: each case gives one line on stderr and exit code 2, before anything is written."""

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pml.cli import main
from tests import fits  # limits torch to one thread
from tests.record_factory import make_record

assert fits.torch.get_num_threads() == 1

# Configuration files: content and expected message -----------------------------------------------------------------

CONFIGS: dict[str, tuple[bytes, str]] = {
    "a key twice": (
        b"model: {class_path: SFT}\ndata: {class_path: RandomTokens}\nmodel: {class_path: MemFT}\n",
        "config.yaml:3: the key 'model' appears twice, on lines 1 and 3; keep one",
    ),
    "a nested key twice": (
        b"trainer:\n  max_epochs: 5\n  accelerator: cpu\n  max_epochs: 7\n",
        "config.yaml:4: the key 'max_epochs' appears twice, on lines 2 and 4",
    ),
    "a form feed": (b"trainer:\f\n  max_epochs: 5\n", "config.yaml:1: has the character U+000C, which YAML does not"),
    "two numbers without end": (b"a: .nan\nb: .inf\n", "error: config.yaml:1: .nan is not a finite number; expected"),
    "a key twice on a line": (b"trainer: {max_epochs: 5, max_epochs: 6}\n", "config.yaml:1: the key 'max_epochs'"),
    "a key twice in a list": (
        b"trainer:\n  callbacks:\n  - class_path: RunRecord\n    class_path: StopWhenRecalled\n",
        "config.yaml:4: the key 'class_path' appears twice, on lines 3 and 4",
    ),
    "Latin-1": (
        "model:\n  # caf\xe9\n".encode("latin-1"),
        "config.yaml:2: not UTF-8 text; expected YAML, saved as UTF-8",
    ),
    "UTF-16": ("model: {}\n".encode("utf-16"), "config.yaml:1: not UTF-8 text"),
    "a picture": (b"\x89PNG\r\n\x1a\n\x00\x00", "config.yaml:1: not UTF-8 text"),
    "a NUL": (b"model: {}\ndata: a\x00b\n", "config.yaml:2: has the character U+0000"),
    "an escape": (b"model: '\x1b[2J'\n", "config.yaml:1: has the character U+001B"),
    "a tab": (b"trainer:\n\tmax_epochs: 3\n", "config.yaml:2: not YAML: found character '\\t' that cannot start"),
    "an open bracket": (b"trainer: {max_epochs: 3\n", "config.yaml:2: not YAML: expected ',' or '}'"),
    "an open quote": (b"model: 'SFT\n", "config.yaml:2: not YAML: found unexpected end of stream"),
    "two colons": (b"trainer: max_epochs: 3\n", "config.yaml:1: not YAML: mapping values are not allowed here"),
    "a wrong indent": (b"trainer:\n  max_epochs: 3\n max_steps: 4\n", "config.yaml:3: not YAML: "),
    "an unknown anchor": (b"trainer: *none\n", "config.yaml:1: not YAML: found undefined alias 'none'"),
    "Python objects": (b"trainer: !!python/object/apply:os.getcwd []\n", "not YAML: could not determine a constructor"),
    "a list": (b"- model\n- data\n", "config.yaml: expected keys with values, such as `trainer: {max_epochs: 5}`"),
    "a word": (b"SFT\n", "config.yaml: expected keys with values"),
    "a number": (b"5\n", "config.yaml: expected keys with values"),
    "two documents": (b"trainer: {}\n---\ntrainer: {}\n", "config.yaml:2: not YAML: but found another document"),
    "not a number": (b"model:\n  init_args:\n    learning_rate: .nan\n", "config.yaml:3: .nan is not a finite number"),
    "infinity": (b"trainer: {gradient_clip_val: .inf}\n", "config.yaml:1: .inf is not a finite number"),
    "minus infinity": (b"trainer: {gradient_clip_val: -.INF}\n", "config.yaml:1: -.INF is not a finite number"),
    "too large a number": (b"model: {init_args: {learning_rate: 1.0e+999}}\n", "1.0e+999 is not a finite number"),
    "a thousand brackets": (b"model: " + b"[" * 1000 + b"]" * 1000 + b"\n", "config.yaml"),
    "nothing": (b"", "config.yaml: empty; expected keys with values"),
    "only a comment": (b"# nothing\n", "config.yaml: empty; expected keys with values"),
    "an unknown key": (b"trainre: {max_epochs: 3}\n", "trainre"),
    "a key without its value": (b"model:\ndata:\n", "data"),
    "a number for a name": (b"model: 7\ndata: {class_path: RandomTokens}\n", "model"),
}

# Options of a fit, and expected message ----------------------------------------------------------------------------

OPTIONS: dict[str, str] = {
    # The trainer.
    "--trainer.max_epochs=0": "trainer.max_epochs is 0, so nothing would be trained; expected at least 1 epoch, or -1",
    "--trainer.max_epochs=-2": "trainer.max_epochs is -2; expected at least 1 epoch, or -1 for no limit",
    "--trainer.max_epochs=many": "trainer.max_epochs: expected an int",
    "--trainer.max_epochs=1.5": "trainer.max_epochs: expected an int",
    "--trainer.max_steps=0": "trainer.max_steps is 0, so nothing would be trained",
    "--trainer.max_steps=-7": "trainer.max_steps is -7; expected at least 1 step, or -1 for no limit",
    "--trainer.min_epochs=9": "trainer.min_epochs is 9, above trainer.max_epochs, 2; lower it",
    "--trainer.min_epochs=-1": "trainer.min_epochs is -1; expected at least 0",
    "--trainer.min_steps=-1": "trainer.min_steps is -1; expected at least 0",
    "--trainer.limit_train_batches=0": "trainer.limit_train_batches is 0, so nothing would be trained",
    "--trainer.limit_train_batches=0.0": "trainer.limit_train_batches is 0.0, so nothing would be trained",
    "--trainer.limit_train_batches=-3": "trainer.limit_train_batches is -3; expected a number of batches, at least 1",
    "--trainer.limit_train_batches=1.5": "trainer.limit_train_batches is 1.5; expected a number of batches",
    "--trainer.limit_val_batches=-1": "trainer.limit_val_batches is -1; expected a number of batches, or a share",
    "--trainer.limit_test_batches=2.5": "trainer.limit_test_batches is 2.5; expected a number of batches, or a share",
    "--trainer.overfit_batches=1": "trainer.overfit_batches is 1; a corpus is memorised as a whole",
    "--trainer.overfit_batches=0.5": "trainer.overfit_batches is 0.5; a corpus is memorised as a whole",
    "--trainer.max_time=00:00:00:00": "trainer.max_time is 00:00:00:00, so nothing would be trained",
    "--trainer.max_time=soon": "trainer.max_time is 'soon'; expected days:hours:minutes:seconds",
    "--trainer.max_time=10:00": "trainer.max_time is '10:00'; expected days:hours:minutes:seconds",
    "--trainer.max_time={minutes: 0}": "so nothing would be trained; expected a time above 0",
    "--trainer.max_time={fortnights: 1}": "expected one like {minutes: 30}",
    "--trainer.accumulate_grad_batches=0": "trainer.accumulate_grad_batches is 0; expected at least 1",
    "--trainer.accumulate_grad_batches=-2": "trainer.accumulate_grad_batches is -2; expected at least 1",
    "--trainer.gradient_clip_val=-1": "trainer.gradient_clip_val is -1; expected a number above 0, or null",
    "--trainer.gradient_clip_val=nan": "trainer.gradient_clip_val: expected an int; expected a float",
    "--trainer.gradient_clip_algorithm=hard": (
        "`gradient_clip_algorithm` hard is invalid. Allowed algorithms: ['value', 'norm']."
    ),
    "--trainer.check_val_every_n_epoch=0": "trainer.check_val_every_n_epoch is 0; expected at least 1",
    "--trainer.log_every_n_steps=-1": "trainer.log_every_n_steps is -1; expected at least 0",
    "--trainer.num_sanity_val_steps=-2": "trainer.num_sanity_val_steps is -2; expected at least -1",
    "--trainer.num_nodes=0": "trainer.num_nodes is 0; expected at least 1",
    "--trainer.devices=0": "trainer.devices is 0; expected at least 1 device, or auto",
    "--trainer.devices=none": "`devices` selected with `CPUAccelerator` should be an int > 0.",
    "--trainer.accelerator=abacus": "You selected an invalid accelerator name: `accelerator='abacus'`.",
    "--trainer.strategy=hope": (
        "You selected an invalid strategy name: `strategy='hope'`. It must be either a string or an instance"
    ),
    "--trainer.strategy=fsdp": "trainer.strategy is fsdp, which shards weights that are frozen here; take",
    "--trainer.strategy=fsdp_cpu_offload": "trainer.strategy is fsdp_cpu_offload, which shards weights",
    "--trainer.strategy=deepspeed": "or --trainer.strategy ddp",
    "--trainer.strategy=deepspeed_stage_3": "trainer.strategy is deepspeed_stage_3, which shards weights",
    "--trainer.strategy=lightning.pytorch.strategies.FSDPStrategy": "FSDPStrategy, which shards weights",
    "--trainer.strategy=lightning.pytorch.strategies.ModelParallelStrategy": "which shards weights",
    "--trainer.precision=bf16-true": "trainer.precision is bf16-true; expected 32-true, since",
    "--trainer.precision=16-true": "for 16-bit frozen weights give --model.dtype bfloat16",
    "--trainer.precision=64-true": "trainer.precision is 64-true",
    "--trainer.precision=64": "trainer.precision is 64",
    "--trainer.precision=8": "trainer.precision: expected one of 64, 32, 16; expected one of transformer-engine,",
    "--trainer.profiler=guess": (
        "When passing string value for the `profiler` parameter of `Trainer`, it can only be one of"
    ),
    "--trainer.logger=7": (
        "trainer.logger: no class 7 fits here; expected a class of pml or of Lightning by its name, or your"
    ),
    "--trainer.callbacks+=Nobody": (
        "trainer.callbacks: no class Nobody fits here; expected a class of pml or of Lightning by its name,"
    ),
    "--trainer.callbacks=RunRecrd": (
        "trainer.callbacks: no class RunRecrd fits here; expected a class of pml or of Lightning by its"
    ),
    "--trainer.fast_dev_run=-1": "trainer.fast_dev_run is -1; expected at least 0",
    "--trainer.max_epoch=3": "unrecognized arguments: --trainer.max_epoch=3",
    "--trainer.val_check_interval=-0.5": (
        "You have passed invalid value -0.5 for val_check_interval, it has to be in [0.0, 1.0] or an int."
    ),
    # The method.
    "--model.learning_rate=null": "model.learning_rate is null, which SFT does not take; leave it out for the default",
    "--data.seed=null": "data.seed is null, which RandomTokens does not take; leave it out for the default",
    "--data.shuffle=null": "data.shuffle is null, which RandomTokens does not take",
    "--model.learning_rate=0": "learning_rate is 0.0; expected a number above 0",
    "--model.learning_rate=-1": "learning_rate is -1.0; expected a number above 0",
    "--model.learning_rate=nan": "model.learning_rate: expected a float, got nan",
    "--model.learning_rate=inf": "model.learning_rate: expected a float, got inf",
    "--model.learning_rate=fast": "model.learning_rate: expected a float, got fast",
    "--model.weight_decay=-0.1": "weight_decay is -0.1; expected a number, at least 0",
    "--model.weight_decay=nan": "model.weight_decay: expected a float, got nan",
    "--model.betas=[0.9,1.0]": "betas are [0.9, 1.0]; expected two numbers from 0 to below 1",
    "--model.betas=[-0.1,0.9]": "betas are [-0.1, 0.9]; expected two numbers from 0 to below 1",
    "--model.betas=[0.9]": "model.betas: expected a tuple with 2 elements, got [0.9]",
    "--model.betas=[0.9,0.99,0.999]": "model.betas: expected a tuple with 2 elements, got [0.9, 0.99, 0.999]",
    "--model.schedule=cosine": "model.schedule: expected one of linear, constant, got cosine",
    "--model.warmup_steps=-5": "warmup_steps is -5; expected a number of steps, or 0 for none",
    "--model.warmup_steps=1.5": "model.warmup_steps: expected an int, got 1.5",
    "--model.adapter.rank=0": "adapter.rank is 0; expected at least 1",
    "--model.adapter.rank=-4": "adapter.rank is -4; expected at least 1",
    "--model.adapter.rank=four": "model.adapter.rank: expected an int, got four",
    "--model.adapter.rank=33": "adapter.rank is 33; above the width 32",
    "--model.adapter.alpha=0": "adapter.alpha is 0.0; expected a number above 0",
    "--model.adapter.alpha=-2": "adapter.alpha is -2.0; expected a number above 0",
    "--model.adapter.alpha=nan": "model.adapter.alpha: expected a float",
    "--model.adapter.dropout=1": "adapter.dropout is 1.0; expected a probability in [0, 1)",
    "--model.adapter.dropout=-0.1": "adapter.dropout is -0.1; expected a probability in [0, 1)",
    "--model.adapter.block=4": "adapter.block is 4; this backbone has blocks 0 to 3",
    "--model.adapter.block=1.5": "adapter.block is 1.5; expected a fraction of the depth between 0 and 1",
    "--model.adapter.block=[]": "adapter.block is an empty list; expected at least one block",
    "--model.adapter.block=[0,9]": "adapter.block is 9; this backbone has blocks 0 to 3",
    "--model.adapter.init=zeros": "model.adapter.init: expected one of published, peft, got zeros",
    "--model.adapter.placement=mlp": "adapter.placement is 'mlp'; expected 'mlp_block' or a list of target modules",
    "--model.adapter.placement=[]": "adapter.placement is an empty list",
    "--model.adapter.placement=[nowhere]": "adapter.placement names 'nowhere', which block 3 lacks",
    "--model.adapter=null0": (
        "model.adapter: no class null0 fits here; expected a class of pml or of Lightning by its name, or"
    ),
    "--model.backbone=": (
        "backbone '' is neither an existing folder nor a hub id; expected 'smollm2-135m', a folder with a"
    ),
    "--model.backbone=nobody/nothing": "backbone 'nobody/nothing' is not a folder here",
    "--model.backbone=../../../..": (
        "backbone '../../../..': no config.json in ../../../..; expected a model saved by save_pretrained"
    ),
    "--model.dtype=int8": "backbone dtype is 'int8'; expected one of float32, bfloat16, float16",
    "--model.compile=maybe": "model.compile: expected one of auto, always, never, got maybe",
    "--model.frozen_prefix.place=moon": "model.frozen_prefix.place: expected one of auto, device, host, disk, got moon",
    "--model.frozen_prefix.budget_gib=0": "frozen_prefix.budget_gib is 0.0; expected a number of GiB above 0",
    "--model.frozen_prefix.budget_gib=-1": "frozen_prefix.budget_gib is -1.0; expected a number of GiB above 0",
    "--model.seed=99999999999999999999": "seed is 99999999999999999999; expected a number that fits into 64 bits",
    "--model.rnak=3": "Option 'rnak' is not accepted",
    "--model=Nobody": (
        "model: no class Nobody fits here; expected a class of pml or of Lightning by its name, or your own"
    ),
    "--model=pml.modules.Memorizer": (
        "model: Problem with given class_path 'pml.modules.Memorizer': module 'pml.modules' has no attribute"
    ),
    "--model=json.decoder": "model: Import path does not correspond to a subclass of Memorization",
    # The corpus.
    "--data.template_kwargs.thinking=off": "expected a mapping: --data.template_kwargs '{thinking: off}', with text",
    "--data.length=0": "length is 0; expected at least 1 token per target",
    "--data.length=-3": "length is -3; expected at least 1 token per target",
    "--data.length=long": "data.length: expected an int, got long",
    "--data.count=0": "count is 0",
    "--data.batch_size=0": "batch_size is 0; expected at least 1, or null for the whole corpus",
    "--data.batch_size=-8": "batch_size is -8; expected at least 1",
    "--data.batch_size=2.5": "data.batch_size: expected an int",
    "--data.seed=99999999999999999999": "seed is 99999999999999999999; expected a number that fits into 64 bits",
    "--data.shuffle=perhaps": "data.shuffle: expected a bool, got perhaps",
    "--data.template_date=yesterday": "template_date is 'yesterday'; expected a day such as 2024-07-26",
    "--data.count=-1": "count is -1",
    "--trainer.limit_predict_batches=-1": "trainer.limit_predict_batches is -1; expected a number of",
    "--data=Nobody": (
        "data: no class Nobody fits here; expected a class of pml or of Lightning by its name, or your own"
    ),
    "--data=SFT": "data: no class SFT fits here; expected a class of pml or of Lightning by its name, or your own as",
    # The rest.
    "--seed_everything=-1": "seed_everything is -1; expected a number from 0 to 4294967295",
    "--seed_everything=4294967296": "seed_everything is 4294967296; expected a number from 0 to 4294967295",
    "--seed_everything=lucky": "seed_everything: expected a bool; expected an int",
    "--config=none.yaml": "none.yaml: cannot be read (No such file or directory)",
    "--config=.": ".: cannot be read (Is a directory)",
    f"--config={'long/' * 2000}": "cannot be read (File name too long)",
    "--ckpt_path=none.ckpt": "ckpt_path is none.ckpt; expected an existing checkpoint file",
    "--ckpt_path=.": "ckpt_path is .; expected an existing checkpoint file",
    "--ckpt_path=last": "ckpt_path is last, but no run is given",
    "--ckpt_path=best": "ckpt_path is best; expected `last`, the newest checkpoint, or a checkpoint file",
    f"--ckpt_path={'x' * 5000}": "File name too long",
    "--surprise": "unrecognized arguments: --surprise",
    "surprise": "unrecognized arguments: surprise",
}

MEMFT: dict[str, str] = {
    "--model.weighting=Nothing": "Nothing",
    "--model.weighting=OnlyThreshold --model.weighting.threshold=0": "threshold is 0.0; expected a probability",
    "--model.weighting=OnlyThreshold --model.weighting.threshold=1.5": "threshold is 1.5; expected a probability",
    "--model.weighting=OnlyThreshold --model.weighting.threshold=nan": "threshold: expected a float, got nan",
    "--model.weighting=SlidingWindow --model.weighting.window=0": "SlidingWindow: window is 0; expected",
    "--model.weighting=SlidingWindow --model.weighting.tau=-1": "SlidingWindow: tau is -1.0; expected a number above 0",
    "--model.curriculum.ratios=[0.5]": "curriculum has 1 ratios and 5 boundaries; expected as many",
    "--model.curriculum.ratios=[0,1,1,1,1]": "expected shares of the corpus in (0, 1]",
    "--model.curriculum.boundaries=[5,4,3,2,1]": "expected increasing epochs, from 1 on",
}

CHECKPOINTS: dict[str, str] = {
    "empty.ckpt": "empty.ckpt: damaged, or not a checkpoint; expected one written by `pml fit`",
    "text.ckpt": "text.ckpt: damaged, or not a checkpoint",
    "cut.ckpt": "cut.ckpt: damaged, or not a checkpoint",
    "pickle.ckpt": "pickle.ckpt: damaged, or not a checkpoint",
    "zip.ckpt": "zip.ckpt: cannot be read as a checkpoint",
    "code.ckpt": "code.ckpt: holds more than tensors and plain Python, which is never read since it could run code",
    "tensor.ckpt": "tensor.ckpt: not a checkpoint of pml",
    "other.ckpt": "other.ckpt: not a checkpoint of pml",
}

COMMANDS: dict[str, tuple[str, str]] = {
    "fti": ("pml", "unknown command 'fti'; expected one of fit, validate"),
    "fit": ("pml fit", "required: fit.data, fit.model; see --help"),
    "fit --model": ("pml fit", "model"),
    "validate none": ("pml validate", "none/config.yaml: no such file; expected the folder of a run"),
    "validate": ("pml validate", "required: validate.data, validate.model"),
    "test files": ("pml test", "files/config.yaml: no such file"),
    "predict files/own": ("pml predict", "names the class mine.Corpus, which is not pml's"),
    "validate files/own": ("pml validate", "if you trust it, add --own_classes"),
    "recall files/own": (
        "pml recall",
        "names the class mine.Corpus, which is not pml's, and importing it would run its code",
    ),
    "recall files": ("pml recall", "files/damaged/record.json: damaged, and so no evidence: loss_reduction is 1.0"),
    "recall none": ("pml recall", "none: no such file or folder"),
    "recall files/own --limit=0": ("pml recall", "--limit is 0; expected at least 1 example"),
    "recall files/own --temperature=nan": ("pml recall", "temperature: expected a float, got nan"),
    "law files/damaged": ("pml law", "damaged, and so no evidence"),
    "law none": ("pml law", "none: no such file or folder"),
    "law": ("pml law", "runs"),
    "plan none --length=5": ("pml plan", "none"),
    "plan files/text.ckpt --length=5": ("pml plan", "files/text.ckpt"),
    "sweep none.yaml": ("pml sweep", "none.yaml: cannot be read (No such file or directory)"),
    "sweep files/twice.yaml": ("pml sweep", "files/twice.yaml:3: the key 'out' appears twice, on lines 2 and 3"),
    "sweep files/nothing.yaml": ("pml sweep", "grid key trainer.max_epochs has no values"),
    "sweep files/picture.yaml": ("pml sweep", "files/picture.yaml:1: not UTF-8 text"),
    "search none.yaml": ("pml search", "none.yaml: cannot be read"),
    "compare files/damaged": ("pml compare", "damaged, and so no evidence"),
    "report none --out=x": ("pml report", "none"),
    "certify none": ("pml certify", "none"),
    "export none --merge --out=x": ("pml export", "none"),
    "data none.yaml": ("pml data", "none.yaml"),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of invalid files."""
    folder = tmp_path_factory.mktemp("wrong") / "files"
    folder.mkdir()
    torch.save({"state_dict": {}, "pml": {}, "noise": torch.ones(1000)}, folder / "cut.ckpt")
    (folder / "cut.ckpt").write_bytes((folder / "cut.ckpt").read_bytes()[:-300])
    (folder / "empty.ckpt").write_bytes(b"")
    (folder / "text.ckpt").write_text("text")
    (folder / "pickle.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    with zipfile.ZipFile(folder / "zip.ckpt", "w") as file:
        file.writestr("a.txt", "text")
    torch.save({"state_dict": {}, "pml": Path("a")}, folder / "code.ckpt")
    torch.save(torch.ones(3), folder / "tensor.ckpt")
    torch.save({"state_dict": {}}, folder / "other.ckpt")
    (folder / "twice.yaml").write_text("base: base.yaml\nout: a\nout: b\ngrid: {trainer.max_epochs: [1]}\n")
    (folder / "nothing.yaml").write_text("base: base.yaml\nout: a\ngrid: {trainer.max_epochs: []}\n")
    (folder / "picture.yaml").write_bytes(b"\x89PNG\r\n")
    content = make_record().model_dump(mode="json")
    for name, change in (("own", {}), ("damaged", {"loss_reduction": 1.0})):
        (folder / name).mkdir()
        (folder / name / "record.json").write_text(json.dumps(content | change))
    own: dict[str, Any] = {"model": {"class_path": "pml.SFT"}, "data": {"class_path": "mine.Corpus"}}
    (folder / "own" / "config.yaml").write_text(yaml.safe_dump(own))
    (folder / "own" / "mine.py").write_text("raise SystemExit('this has run')\n")
    return folder


@pytest.fixture
def refused(files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command in a folder with nothing but a link to the files, and checks how it is refused."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").symlink_to(files)

    def check(arguments: list[str], name: str, message: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        code = main(arguments)
        out, err = capsys.readouterr()
        assert (code, out) == (2, ""), err
        (line,) = err.splitlines()
        assert line.startswith(f"{name}: error: ")
        assert message in line
        assert line.isprintable()
        assert len(line) < 1000
        assert sorted(tmp_path.rglob("*")) == before

    return check


def fit(folder: Path) -> list[str]:
    arguments = ["fit", "--model=SFT", f"--model.backbone={folder}", "--data=RandomTokens", "--data.length=8"]
    return [*arguments, "--trainer.max_epochs=2", "--trainer.accelerator=cpu"]


@pytest.mark.parametrize("case", CONFIGS)
def test_an_invalid_configuration_file_is_refused_in_one_line(case: str, refused: Any, tmp_path: Path) -> None:
    content, message = CONFIGS[case]
    (tmp_path / "config.yaml").write_bytes(content)
    refused(["fit", "--config=config.yaml"], "pml fit", message)


def test_a_validation_interval_longer_than_an_epoch_is_refused(
    tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*fit(tiny_backbone_folder), "--trainer.val_check_interval=50"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("pml fit: error: `val_check_interval` (50) must be less than or equal to the number of")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option[:60])
def test_an_invalid_option_is_refused_in_one_line(option: str, refused: Any, tiny_backbone_folder: Path) -> None:
    refused([*fit(tiny_backbone_folder), option], "pml fit", OPTIONS[option])


@pytest.mark.parametrize("options", MEMFT)
def test_an_invalid_weighting_or_curriculum_is_refused_in_one_line(
    options: str, refused: Any, tiny_backbone_folder: Path
) -> None:
    method = ["--model=MemFT", f"--model.backbone={tiny_backbone_folder}"]
    refused([*fit(tiny_backbone_folder), *method, *options.split()], "pml fit", MEMFT[options])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_file_that_is_not_a_checkpoint_is_refused_in_one_line(
    name: str, refused: Any, tiny_backbone_folder: Path
) -> None:
    refused([*fit(tiny_backbone_folder), f"--ckpt_path=files/{name}"], "pml fit", CHECKPOINTS[name])


@pytest.mark.parametrize("command", COMMANDS)
def test_an_invalid_command_is_refused_in_one_line(command: str, refused: Any) -> None:
    name, message = COMMANDS[command]
    refused(command.split(), name, message)


def test_the_tables_have_at_least_200_cases() -> None:
    assert sum(map(len, (CONFIGS, OPTIONS, MEMFT, CHECKPOINTS, COMMANDS))) >= 200


def test_a_configuration_from_a_pipe_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # As a shell gives with --config <(command).
    os.mkfifo(tmp_path / "config.yaml")
    assert main(["fit", f"--config={tmp_path}/config.yaml"]) == 2
    assert "config.yaml: a pipe, which can be read only once; expected a file" in capsys.readouterr().err
