"""Workers of a sweep: local processes or cluster jobs, each of which runs `pml sweep` on the same grid."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import torch

from pml.errors import InputError

__all__ = ["ClusterWorkers", "LocalWorkers", "Workers", "worker_environments"]

FOLDER_NAME = ".workers"


class Workers(Protocol):
    """The workers that a sweep watches.

    Attributes:
        outlive: Whether they go on where the command that started them ends without being asked to stop them: jobs of a
            cluster can be seen and stopped in other ways, processes in the background cannot.
    """

    outlive: bool

    def running(self) -> int:
        """Number of workers that have not ended yet."""

    def stop(self) -> None:
        """Make the workers save what they run and end."""

    def failures(self, all_ran: bool) -> list[str]:
        """One line for each worker that failed.

        Args:
            all_ran: Whether every cell has an outcome. Exit code 1 then means that a cell failed, which is reported for
                that cell; a worker that ended with it before had crashed.
        """


def worker_environments(count: int, cores: int, devices: int, visible: str | None = None) -> list[dict[str, str]]:
    """Environment variables to add for each worker: its device, or its share of the CPU's cores.

    Args:
        count: Number of workers.
        cores: Number of cores that this process may use.
        devices: Number of CUDA devices that this process sees.
        visible: CUDA_VISIBLE_DEVICES of this process.

    Example:
        >>> worker_environments(2, cores=4, devices=0)
        [{'OMP_NUM_THREADS': '2'}, {'OMP_NUM_THREADS': '2'}]
        >>> worker_environments(2, cores=4, devices=2, visible="4,7")
        [{'CUDA_VISIBLE_DEVICES': '4'}, {'CUDA_VISIBLE_DEVICES': '7'}]
    """
    if devices:
        names = visible.split(",") if visible else list(map(str, range(devices)))
        return [{"CUDA_VISIBLE_DEVICES": names[worker % devices]} for worker in range(count)]
    return [{"OMP_NUM_THREADS": str(max(1, cores // count))} for _ in range(count)]


def _cores() -> int:
    """Number of cores that this process may use; all of the machine's if the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalWorkers:
    """Processes of this machine, each with one device or a share of the CPU's cores.

    Args:
        grid: The grid file.
        count: Number of workers.
        out: The grid's folder; the output of each worker goes to a file in it.
    """

    outlive = False

    def __init__(self, grid: Path, count: int, out: Path) -> None:
        logs = out / FOLDER_NAME
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = [logs / f"{os.getpid()}-{worker}.log" for worker in range(count)]
        environments = worker_environments(
            count, _cores(), torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
        )
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for log, environment in zip(self._logs, environments, strict=True):
                self._processes.append(_start(grid, log, environment))
        except BaseException:
            self.stop()
            raise

    def running(self) -> int:
        return sum(process.poll() is None for process in self._processes)

    def stop(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._processes:
            process.wait()

    def failures(self, all_ran: bool) -> list[str]:
        ended = [(process.poll(), log) for process, log in zip(self._processes, self._logs, strict=True)]
        expected = (None, *_expected_codes(all_ran))
        return [f"a worker ended with exit code {code} (see {log})" for code, log in ended if code not in expected]


def _start(grid: Path, log: Path, environment: Mapping[str, str]) -> "subprocess.Popen[bytes]":
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "pml", "sweep", str(grid)],
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            # Ctrl-C in a terminal signals the whole process group; workers get one signal, from `stop`.
            start_new_session=True,
        )


def _expected_codes(all_ran: bool) -> tuple[int, ...]:
    """Exit codes of workers that have not failed themselves; see `Workers.failures`."""
    return (0, 1) if all_ran else (0,)


class ClusterWorkers:
    """Jobs that submitit submits to Slurm or, for a trial, runs as processes of this machine.

    A preempted job is submitted again, and its cells resume from their checkpoints.

    Args:
        grid: The grid file, on a file system that the jobs can read.
        count: Number of jobs, submitted as one array.
        out: The grid's folder; submitit keeps its files in it.
        cluster: `slurm` or `local`.
        options: Parameters of submitit's executor, such as `slurm_partition`, `timeout_min` or `gpus_per_node`.

    Raises:
        InputError: If submitit is not installed, or refuses the options.
    """

    outlive = True

    def __init__(self, grid: Path, count: int, out: Path, cluster: str, options: Mapping[str, Any]) -> None:
        try:
            import submitit
        except ImportError as error:
            raise InputError("--cluster needs submitit, which is not installed: pip install 'pml[cluster]'") from error
        try:
            executor = submitit.AutoExecutor(folder=out / FOLDER_NAME, cluster=cluster)
            executor.update_parameters(**{"timeout_min": 24 * 60, **options})
            self._jobs = executor.map_array(_Sweep(), [str(grid.absolute())] * count)
        except (RuntimeError, TypeError, ValueError, NameError, OSError) as error:
            raise InputError(f"--cluster {cluster}: submitit says: {' '.join(str(error).split())}") from error

    def running(self) -> int:
        return sum(not job.done() for job in self._jobs)

    def stop(self) -> None:
        for job in self._jobs:
            job.cancel()

    def failures(self, all_ran: bool) -> list[str]:
        ended = [(job, _trouble(job, all_ran)) for job in self._jobs if job.done() and not _cancelled(job)]
        return [f"job {job.job_id} {trouble} (see {job.paths.stderr})" for job, trouble in ended if trouble]


def _cancelled(job: Any) -> bool:
    # Slurm adds who did it: CANCELLED by 1000.
    return str(job.state).startswith("CANCELLED")


def _trouble(job: Any, all_ran: bool) -> str:
    """How a finished job failed; empty if it did not."""
    if job.exception() is not None:
        return f"ended as {job.state}"
    # The sweep of a completed job may have failed.
    codes = [code for code in job.results() if code not in _expected_codes(all_ran)]
    return f"ended with exit code {codes[0]}" if codes else ""


class _Sweep:
    """The task of a job: run `pml sweep`, and return its exit code. If the job is stopped, the sweep saves its cell."""

    command = (sys.executable, "-m", "pml", "sweep")

    def __call__(self, grid: str) -> int:
        # In a session of its own, so that a terminal's signals reach it once, from here. Slurm sends submitit's own
        # signal to every process of a job, and would end a sweep that does not ignore it.
        self._process = subprocess.Popen([*self.command, grid], start_new_session=True, preexec_fn=_ignore_preemption)
        try:
            self._wait()
        except BaseException:
            self._save()
            raise
        return self._process.wait()

    def checkpoint(self, grid: str) -> Any:
        """Return the job to submit in place of a preempted one; submitit calls this."""
        from submitit.helpers import DelayedSubmission

        self._save()
        return DelayedSubmission(_Sweep(), grid)

    def _save(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._process.pid, signal.SIGTERM)
        self._wait()

    def _wait(self) -> None:
        """Wait until the sweep ends. `Popen.wait` would block here: submitit saves in a handler that interrupts it."""
        with suppress(ChildProcessError):
            while os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                time.sleep(0.2)


def _ignore_preemption() -> None:
    for name in ("SIGUSR1", "SIGUSR2"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
