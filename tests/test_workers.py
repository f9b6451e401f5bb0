"""Several workers on one grid: every cell is finished even if a worker dies, and the command reports on each cell."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import yaml

from pml.claims import FOLDER_NAME
from pml.cli import main
from pml.commands.sweep import watch
from pml.grid import Cell, read_grid, resolve
from pml.records import read_record
from pml.stopping import Stopped
from pml.workers import ClusterWorkers, LocalWorkers, _cores, _Sweep, worker_environments


@pytest.fixture
def grid(tiny_backbone_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three cells of a few steps on eight random tokens each; the working directory is `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    run = {
        "model": {"class_path": "MemFT", "init_args": {"backbone": str(tiny_backbone_folder), "adapter": {"block": 1}}},
        "data": {"class_path": "RandomTokens", "init_args": {"length": 8}},
        "trainer": {
            "max_epochs": 20,
            "accelerator": "cpu",
            "limit_val_batches": 0,
            "callbacks": [{"class_path": "callbacks.RunRecord"}],
        },
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(run))
    return write_grid(ranks=[1, 2, 3])


def write_grid(ranks: list[int]) -> Path:
    path = Path.cwd() / "grid.yaml"
    grid = {"base": "base.yaml", "out": "out", "grid": {"model.init_args.adapter.rank": ranks}}
    path.write_text(yaml.safe_dump(grid))
    return path


def cells_of(grid: Path) -> list[Cell]:
    return resolve(read_grid(grid))


def assert_each_cell_was_run_once(cells: list[Cell]) -> None:
    for cell in cells:
        assert read_record(cell.folder / "record.json").status == "finished"
        assert not (cell.folder / "progress.txt").exists()
    assert list((Path("out") / FOLDER_NAME).iterdir()) == []


def test_workers_share_the_cores_or_are_assigned_devices_in_turn() -> None:
    assert worker_environments(3, cores=8, devices=0) == [{"OMP_NUM_THREADS": "2"}] * 3
    assert worker_environments(4, cores=2, devices=0) == [{"OMP_NUM_THREADS": "1"}] * 4
    shared = worker_environments(3, cores=8, devices=2)
    assert [worker["CUDA_VISIBLE_DEVICES"] for worker in shared] == ["0", "1", "0"]


def test_two_workers_finish_every_cell_and_the_command_reports_each_once(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sweep", str(grid), "--workers", "2"]) == 0
    cells = cells_of(grid)
    assert_each_cell_was_run_once(cells)
    assert not list(Path("out").glob("*.unfinished-*"))
    said = capsys.readouterr().err
    assert all(said.count(f"] {cell.name}: loss ") == 1 for cell in cells)


TWO_SWEEPS = """
import json, os, sys
import pml.sweep  # once for both
from pml.cli import main
from pml.commands.sweep import watch

def start():
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(main(["sweep", sys.argv[1]]))
    return pid

pids = [start(), start()]
print(json.dumps(pids), flush=True)
# In the order in which they end: one that nobody has waited for still counts as running, and keeps its claims.
print(json.dumps({pid: os.waitstatus_to_exitcode(status) for pid, status in (os.wait() for _ in pids)}))
"""


def test_if_one_of_two_concurrent_sweeps_is_killed_the_other_finishes_every_cell(
    grid: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [sys.executable, "-c", TWO_SWEEPS, str(grid)]
    sweeps = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert sweeps.stdout is not None
    pids = json.loads(sweeps.stdout.readline())
    locks = Path("out") / FOLDER_NAME
    deadline = time.monotonic() + 120
    holders: list[int] = []
    # A lock file exists before its owner is written into it.
    while not holders and time.monotonic() < deadline:
        time.sleep(0.05)
        holders = [pid for pid in pids for lock in locks.glob("*.lock") if f"pid={pid}\n" in lock.read_text()]
    victim = holders[0]
    os.kill(victim, signal.SIGKILL)
    out, err = sweeps.communicate(timeout=300)
    assert json.loads(out) == {str(pid): -signal.SIGKILL if pid == victim else 0 for pid in pids}, err
    assert_each_cell_was_run_once(cells_of(grid))
    # Only the cell that the killed sweep had begun may have been begun twice.
    assert len(list(Path("out").glob("*.unfinished-*"))) <= 1
    assert main(["sweep", str(grid), "--status"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "3 recorded, 0 failed, 0 running, 0 to run"


def test_a_failed_cell_is_run_again_only_with_retry_failed(grid: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cell,) = cells_of(write_grid(ranks=[2]))
    cell.folder.mkdir(parents=True)
    (cell.folder / "error.txt").write_text("OutOfMemoryError: too large\n\nTraceback ...")
    assert main(["sweep", str(grid)]) == 1
    assert (
        f"failed: {cell.name}: OutOfMemoryError: too large (see {cell.folder}/error.txt; --retry_failed runs it again)"
        in (capsys.readouterr().err)
    )
    assert main(["sweep", str(grid), "--retry_failed"]) == 0
    assert read_record(cell.folder / "record.json").status == "finished"


def test_a_damaged_record_is_reported_and_its_cell_counts_as_not_done(
    grid: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cell = cells_of(grid)[0]
    cell.folder.mkdir(parents=True)
    (cell.folder / "record.json").write_text('{"schema_version": 3, "meth')
    assert cell.record is None
    assert "record.json" in caplog.text
    assert "the cell counts as not done" in caplog.text


def test_workers_can_run_as_cluster_jobs(grid: Path) -> None:
    write_grid(ranks=[2])
    assert main(["sweep", str(grid), "--cluster", "local", "--workers", "1"]) == 0
    assert_each_cell_was_run_once(cells_of(grid))
    assert list(Path("out/.workers").glob("*"))


def test_a_job_is_reported_as_failed_unless_only_a_cell_failed_or_it_was_cancelled(
    grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(number: int, state: str, code: int | None) -> Any:
        error = None if code is not None else RuntimeError("no output")
        paths = SimpleNamespace(stderr=f"{number}.err")
        found = {"done": lambda: True, "exception": lambda: error, "results": lambda: [code]}
        return SimpleNamespace(job_id=number, state=state, paths=paths, **found)

    jobs = [job(1, "COMPLETED", 0), job(2, "COMPLETED", 1), job(3, "COMPLETED", 2), job(4, "TIMEOUT", None)]
    jobs.append(job(5, "CANCELLED by 1000", None))
    monkeypatch.setattr("submitit.AutoExecutor", lambda **_: mock.Mock(**{"map_array.return_value": jobs}))
    workers = ClusterWorkers(grid, 5, Path("out"), "slurm", {})
    trouble = ["job 3 ended with exit code 2 (see 3.err)", "job 4 ended as TIMEOUT (see 4.err)"]
    assert workers.failures(all_ran=True) == trouble
    # A job whose sweep ends before every cell has run has crashed, although no cell failed.
    assert workers.failures(all_ran=False) == ["job 2 ended with exit code 1 (see 2.err)", *trouble]


class Process:
    """A worker that has ended with exit code 1, or runs until it gets a signal."""

    def __init__(self, code: int | None) -> None:
        self.code = code

    def poll(self) -> int | None:
        return self.code

    wait = poll

    def send_signal(self, signum: int) -> None:
        self.code = -signum


def test_the_log_of_a_worker_that_crashed_is_named_if_a_cell_was_not_run(
    grid: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pml.workers._start", lambda *_, **__: Process(1))
    (cell,) = cells_of(write_grid(ranks=[2]))
    assert main(["sweep", str(grid), "--workers", "1"]) == 1
    log = f"out/.workers/{os.getpid()}-0.log"
    said = capsys.readouterr().err.splitlines()
    assert said[-2:] == [f"not run: {cell.name}", f"a worker ended with exit code 1 (see {log})"]
    cell.folder.mkdir()
    (cell.folder / "error.txt").write_text("RuntimeError: too large\n")
    assert main(["sweep", str(grid), "--workers", "1"]) == 1
    assert "a worker ended" not in capsys.readouterr().err


def test_whatever_ends_the_command_stops_its_workers(grid: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workers = [Process(None), Process(None)]
    monkeypatch.setattr("pml.workers._start", mock.Mock(side_effect=workers))
    monkeypatch.setattr("pml.commands.sweep.time.sleep", mock.Mock(side_effect=OSError(errno.EIO, "no disk")))
    assert main(["sweep", str(grid), "--workers", "2"]) == 2
    assert [worker.code for worker in workers] == [-signal.SIGTERM] * 2


@pytest.mark.parametrize(("signum", "stops"), [("SIGINT", True), ("SIGTERM", True), ("SIGHUP", False)])
def test_jobs_of_a_cluster_stop_when_asked_and_outlive_a_closed_terminal(
    signum: str, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = mock.Mock(outlive=True, **{"running.return_value": 1})
    stop = Stopped(getattr(signal, signum), at_once=True)
    monkeypatch.setattr("pml.commands.sweep.time.sleep", mock.Mock(side_effect=stop))
    with pytest.raises(Stopped):
        watch([], jobs, mock.Mock(), mock.Mock())
    assert jobs.stop.called is stops
    assert ClusterWorkers.outlive
    assert not LocalWorkers.outlive


def test_a_sweep_that_is_interrupted_while_it_starts_workers_stops_those_that_run(
    grid: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Process(None)
    monkeypatch.setattr("pml.workers._start", mock.Mock(side_effect=[worker, KeyboardInterrupt]))
    with pytest.raises(KeyboardInterrupt):
        LocalWorkers(grid, 2, Path("out"))
    assert worker.code == -signal.SIGTERM


SWEEP = """
import signal, sys, time
from pathlib import Path

def save(*_):
    Path(sys.argv[1], "saved").touch()
    sys.exit(143)

signal.signal(signal.SIGTERM, save)
Path(sys.argv[1], "ready").touch()
time.sleep(60)
"""


@pytest.fixture
def sweep(monkeypatch: pytest.MonkeyPatch) -> _Sweep:
    """The task of a job, with a program in place of `pml sweep` that saves something when it is asked to stop."""
    monkeypatch.setattr(_Sweep, "command", (sys.executable, "-c", SWEEP))
    return _Sweep()


def when_ready(folder: Path, act: Callable[[], None]) -> None:
    """Act once the program has started."""

    def wait() -> None:
        while not (folder / "ready").exists():
            time.sleep(0.05)
        act()

    threading.Thread(target=wait, daemon=True).start()


def test_a_job_that_is_stopped_lets_its_sweep_save_the_running_cell(sweep: _Sweep, tmp_path: Path) -> None:
    # submitit stops local jobs by SIGINT.
    when_ready(tmp_path, lambda: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        sweep(str(tmp_path))
    assert (tmp_path / "saved").exists()


def test_a_preempted_job_saves_its_cell_and_is_submitted_again(sweep: _Sweep, tmp_path: Path) -> None:
    again: list[Any] = []

    # submitit calls `checkpoint` in its handler, while the task is running; Slurm signals the task's processes too.
    def preempt(*_: Any) -> None:
        os.kill(sweep._process.pid, signal.SIGUSR2)
        again.append(sweep.checkpoint(str(tmp_path)))

    before = signal.signal(signal.SIGUSR2, preempt)
    try:
        when_ready(tmp_path, lambda: os.kill(os.getpid(), signal.SIGUSR2))
        assert sweep(str(tmp_path)) == 143
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert (tmp_path / "saved").exists()
    assert type(pickle.loads(pickle.dumps(again[0].function))) is _Sweep


def test_all_cores_are_counted_if_the_system_does_not_report_cpu_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert _cores() == 6
