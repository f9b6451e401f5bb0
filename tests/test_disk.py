"""On a full or read-only disk, a command ends with one line and exit code 2, and all files on the disk are whole."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from lightning.pytorch import Trainer

import callbacks
from pml import claims
from pml.atomic import whole_file
from pml.checkpoints import newest_checkpoint, read_checkpoint
from pml.cli import main
from pml.grid import read_grid, resolve
from pml.records import read_record
from pml.saved_adapter import read_saved_adapter
from pml.state_store import CacheConfig, StateStore
from tests import fits  # one thread
from tests.simulated_runs import write_simulated_grid

assert fits.torch.get_num_threads() == 1

MENDED = "PML_TEST_DISK_IS_MENDED"
BEFORE, MIDDLE, LAST = STEPS = (-1, 5, 9)


def fill_disk(pages: int) -> None:
    """Fill the disk of the working directory, except for some pages."""
    place = os.statvfs(".")
    Path("filler").write_bytes(bytes(max(0, place.f_bavail - pages) * place.f_bsize))


def make_read_only() -> None:
    mount("--bind", "runs", "runs")
    mount("-o", "remount,bind,ro", "runs")


class Disk(callbacks.StopWhenRecalled):
    """Fills the disk or makes `runs` read-only, at one step or before the first, unless the fit has been resumed."""

    def __init__(self, step: int = 5, pages: int = 0, read_only: bool = False) -> None:
        super().__init__()
        self.step, self.pages, self.read_only = step, pages, read_only

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        self._spoil(BEFORE, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, *_: Any) -> None:
        self._spoil(trainer.global_step, pl_module)

    def _spoil(self, step: int, module: Any) -> None:
        if step == self.step and not module.resumed and MENDED not in os.environ:
            make_read_only() if self.read_only else fill_disk(self.pages)


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


def unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", "--recursive", str(folder)], check=False, capture_output=True)


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of 2 MiB as the working directory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder))
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"needs to mount a small disk, which is not allowed here: {error}")
    monkeypatch.chdir(folder)
    yield folder
    monkeypatch.undo()
    unmount(folder)


@pytest.fixture
def arguments(tiny_backbone_folder: Path) -> list[str]:
    made = ["fit", "--model=SFT", f"--model.backbone={tiny_backbone_folder}", "--model.adapter.block=1"]
    made += ["--data=RandomTokens", "--data.length=8", "--trainer.max_epochs=10", "--trainer.accelerator=cpu"]
    # Only callbacks that write files.
    made += ["--trainer.callbacks=[]", "--trainer.callbacks+=TokenThresholds", "--trainer.callbacks+=RunRecord"]
    return [*made, "--model.compile=never", "--model.schedule=constant"]


def disk(step: int, **more: Any) -> list[str]:
    name = "--trainer.callbacks+=tests.test_disk.Disk"
    settings = {"step": step, **more}
    # A checkpoint after every step or, if the last step is to fail, only one at the end, after the record.
    minutes = 5 if step == LAST else 1e-9
    checkpoints = ["--trainer.callbacks+=pml.checkpoints.Checkpoints", f"--trainer.callbacks.minutes={minutes}"]
    return [name, *(f"--trainer.callbacks.{key}={value}" for key, value in settings.items()), *checkpoints]


RUN = Path("runs/fit/version_0")


def last_line(capsys: pytest.CaptureFixture[str], command: str = "fit") -> str:
    """Return the last line on stderr, which must be the only error there."""
    *before, last = capsys.readouterr().err.splitlines()
    assert last.startswith(f"pml {command}: error: ")
    assert not [line for line in before if "Error" in line or "error:" in line]
    return last


def assert_whole(run: Path) -> None:
    """Assert that every file of a run can be read and that no partial file is left."""
    for path in run.rglob("*"):
        assert not path.name.startswith("."), path
        if path.suffix == ".parquet":
            pq.read_table(path)
        if path.suffix == ".ckpt":
            read_checkpoint(path)
    if (run / "adapter").exists():
        read_saved_adapter(run / "adapter")
    if (run / "config.yaml").exists():
        assert yaml.safe_load((run / "config.yaml").read_text())
    if (run / "record.json").exists():
        assert read_record(run / "record.json").status == "finished"
        assert (run / "adapter").exists()
        assert (run / "tokens.parquet").exists()


@pytest.mark.parametrize("step", STEPS)
def test_a_fit_on_a_full_disk_ends_with_one_line_and_resumes_if_it_has_a_checkpoint(
    step: int, small_disk: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *disk(step)]) == 2
    assert "No space left on device" in (last := last_line(capsys))
    assert_whole(RUN)
    Path("filler").unlink()
    if step == MIDDLE:
        assert last.endswith(f"go on with: pml fit --config {RUN}/config.yaml --ckpt_path last")
        assert read_checkpoint(newest_checkpoint(RUN))["global_step"] == MIDDLE
        assert main(["fit", f"--config={RUN}/config.yaml", "--ckpt_path=last"]) == 0
        (record,) = map(read_record, Path("runs").rglob("record.json"))
        assert (record.optimizer_steps, record.resumed) == (10, 1)
    else:
        assert last.endswith("there is no checkpoint to go on from yet")


@pytest.mark.parametrize("step", STEPS)
def test_a_fit_in_a_folder_that_becomes_read_only_ends_with_one_line_and_whole_files(
    step: int, small_disk: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs").mkdir()
    assert main([*arguments, *disk(step, read_only=True)]) == 2
    assert "Read-only file system" in last_line(capsys)
    assert_whole(RUN)


def test_the_error_of_a_read_only_disk_names_the_file_and_not_its_temporary_copy(small_disk: Path) -> None:
    Path("runs").mkdir()
    make_read_only()
    with pytest.raises(OSError, match="Read-only") as refused, whole_file(Path("runs/record.json")):
        pass
    assert refused.value.filename == "runs/record.json"


def test_files_that_still_fit_on_the_disk_at_the_end_of_a_fit_are_whole(small_disk: Path, arguments: list[str]) -> None:
    codes, left = [], []
    for pages in (3, 14, 40):
        run = Path("runs", f"p{pages}", "version_0")
        codes.append(main([*arguments, *disk(LAST, pages=pages), f"--trainer.logger.name=p{pages}"]))
        assert_whole(run)
        left.append(what_is_left(run))
        Path("filler").unlink()
    assert codes == [2, 2, 0]
    assert left == [set(), {"adapter", "record.json"}, {"adapter", "record.json"}]


def what_is_left(run: Path) -> set[str]:
    return {"adapter", "record.json"} & {path.name for path in run.iterdir()}


@pytest.fixture
def fails_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """A function that makes the nth call of fsync, counted from 1, fail as on a full disk; needs no disk of its own."""
    fsync = os.fsync

    def prepare(number: int) -> None:
        count = iter(range(1, 1000))

        def full(file: int) -> None:
            if next(count) == number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            fsync(file)

        monkeypatch.setattr("os.fsync", full)

    return prepare


def test_a_disk_full_at_any_file_leaves_whole_files_and_never_a_record_without_an_adapter(
    fails_at: Callable[[int], None],
    arguments: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, number, left = 2, 0, []
    while code:
        number += 1
        fails_at(number)
        code = main([*arguments, f"--trainer.logger.name=n{number}"])
        if code:
            assert "No space left on device; mend that" in last_line(capsys)
        assert_whole(Path(f"runs/n{number}/version_0"))
        left.append(what_is_left(Path(f"runs/n{number}/version_0")))
    # Nine files: configuration, corpus, history, adapter (three), tokens, record and checkpoint; then all succeed.
    assert number == 10
    assert left[0] == set()
    assert {"adapter"} in left
    assert {"record.json"} not in left
    assert left[-1] == {"adapter", "record.json"}


@pytest.fixture
def grid(tiny_backbone_folder: Path) -> Callable[..., list[Any]]:
    """A function that writes a grid of three cells, the second of which fills the disk or makes it read-only."""

    def write(**spoil: Any) -> list[Any]:
        init = {"backbone": str(tiny_backbone_folder), "adapter": {"rank": 2, "block": 1}}
        base = {
            "model": {"class_path": "SFT", "init_args": init},
            "data": {"class_path": "RandomTokens", "init_args": {"length": 8}},
            "trainer": {"max_epochs": 10, "accelerator": "cpu", "limit_val_batches": 0},
        }
        Path("base.yaml").write_text(yaml.safe_dump(base))
        record = {"class_path": "callbacks.RunRecord"}
        spoiling = [{"class_path": "tests.test_disk.Disk", "init_args": spoil}, record]
        cells: list[dict[str, Any]] = [
            {"model.init_args.adapter.rank": [rank], "trainer.callbacks": [spoiling if rank == 3 else [record]]}
            for rank in (2, 3, 4)
        ]
        Path("grid.yaml").write_text(yaml.safe_dump({"base": "base.yaml", "out": "runs", "grid": cells}))
        return resolve(read_grid(Path("grid.yaml")))

    return write


@pytest.mark.parametrize("read_only", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_sweep_on_a_failing_disk_stops_keeps_finished_cells_and_can_be_run_again(
    read_only: bool,
    small_disk: Path,
    grid: Callable[..., list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Both sweeps run in this process, so the claim that the first could not release has to expire.
    monkeypatch.setattr(claims, "LEASE_SECONDS", 3.0)
    first, second, third = grid(read_only=read_only)
    assert main(["sweep", "grid.yaml"]) == 2
    last = last_line(capsys, "sweep")
    assert last.endswith("finished cells are kept; fix the disk, then run the same command again")
    assert first.record is not None
    assert second.record is None
    assert second.error is None
    assert not third.folder.exists()
    if read_only:
        subprocess.run(["umount", "runs"], check=True)
    else:
        Path("filler").unlink()
    monkeypatch.setenv(MENDED, "1")
    assert main(["sweep", "grid.yaml"]) == 0
    assert all(cell.record is not None for cell in (first, second, third))


@pytest.mark.usefixtures("no_figures", "no_profiles")
@pytest.mark.parametrize("command", ["law grid --out out", "report grid --out out"])
@pytest.mark.parametrize("read_only", [False, True])
def test_a_command_that_cannot_write_its_output_ends_with_one_line_and_leaves_no_file(
    command: str, read_only: bool, small_disk: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_simulated_grid(tmp_path / "grid", ranks=(1, 2, 4), lengths=(128, 256), seeds=(0,))
    Path("grid").symlink_to(tmp_path / "grid")
    if read_only:
        mount("-o", "remount,ro", str(small_disk))
    else:
        fill_disk(1)
    assert main(command.split()) == 2
    assert ("Read-only file system" if read_only else "No space left on device") in last_line(
        capsys, command.split()[0]
    )
    assert not Path("out").exists() or not [path for path in Path("out").rglob("*") if path.is_file()]


def test_a_frozen_layer_cache_on_a_full_disk_stops_using_it_and_warns_once(
    small_disk: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fill_disk(1)
    store = StateStore(CacheConfig(place="disk"), fits.torch.device("cpu"), small_disk)
    for number in range(3):
        store.put(bytes([number]), (fits.torch.zeros(100),))
    assert len(store) == 0
    assert caplog.text.count("the frozen-layer cache stops using the disk (No space left on device)") == 1


@pytest.mark.usefixtures("no_profiles")
def test_output_redirected_to_a_full_disk_is_an_error_of_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_simulated_grid(tmp_path / "grid", ranks=(1, 2, 4), lengths=(128, 256), seeds=(0,))
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["law", str(tmp_path / "grid")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "pml law: error: No space left on device; expected room to write; completed files are unchanged"
