"""Workers of a sweep: processes of this machine, or jobs of a cluster, that each run `pml sweep` on the same grid."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from pml.errors import InputError

__all__ = ["ClusterWorkers", "LocalWorkers", "Workers", "worker_environments"]

FOLDER_NAME = ".workers"


class Workers(Protocol):
    """What a sweep watches."""

    def running(self) -> int:
        """How many have not ended yet."""

    def stop(self) -> None:
        """Have them save what they run, and end."""

    def failures(self) -> list[str]:
        """What has become of those that ended as they should not have, in a line each."""


def worker_environments(count: int, cores: int, devices: int, visible: str | None = None) -> list[dict[str, str]]:
    """What each worker's environment holds besides this process's own: a device, or its share of the cores.

    Args:
        count: Workers.
        cores: Cores that this process may use.
        devices: CUDA devices that it sees.
        visible: Its CUDA_VISIBLE_DEVICES.

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
    """Cores that this process may use; those of the machine where the system does not say."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class LocalWorkers:
    """Processes of this machine, one per device, or with a share of the CPU's cores each.

    Args:
        grid: The grid file.
        count: How many.
        out: The grid's folder; what each worker prints goes into a file there.
    """

    def __init__(self, grid: Path, count: int, out: Path) -> None:
        logs = out / FOLDER_NAME
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = [logs / f"{os.getpid()}-{worker}.log" for worker in range(count)]
        environments = worker_environments(
            count, _cores(), torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
        )
        self._processes = []
        for log, environment in zip(self._logs, environments, strict=True):
            with log.open("wb") as file:
                self._processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "pml", "sweep", str(grid)],
                        env={**os.environ, **environment},
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=file,
                        # Ctrl-C in a terminal reaches all of a group; workers are told once, by `stop`.
                        start_new_session=True,
                    )
                )

    def running(self) -> int:
        return sum(process.poll() is None for process in self._processes)

    def stop(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self._processes:
            process.wait()

    def failures(self) -> list[str]:
        # 1 says that a cell failed, which is seen at the cell.
        ended = [(process.poll(), log) for process, log in zip(self._processes, self._logs, strict=True)]
        return [f"a worker ended with exit code {code} (see {log})" for code, log in ended if code not in (None, 0, 1)]


class ClusterWorkers:
    """Jobs that submitit submits: to Slurm, or for a trial as processes of this machine.

    A job that is preempted is submitted again and goes on; cells go on from their checkpoints.

    Args:
        grid: The grid file, on a file system that the jobs see.
        count: How many jobs, as one array.
        out: The grid's folder; submitit keeps its files there.
        cluster: `slurm` or `local`.
        options: What submitit's executor is told, such as `slurm_partition`, `timeout_min` or `gpus_per_node`.

    Raises:
        InputError: If submitit is not installed, or refuses the options.
    """

    def __init__(self, grid: Path, count: int, out: Path, cluster: str, options: Mapping[str, Any]) -> None:
        try:
            import submitit
        except ImportError as error:
            raise InputError("--cluster needs submitit, which is not installed: pip install 'pml[cluster]'") from error
        try:
            executor = submitit.AutoExecutor(folder=out / FOLDER_NAME, cluster=cluster)
            executor.update_parameters(**{"timeout_min": 24 * 60, **options})
            self._jobs = executor.map_array(_Sweep(), [str(grid.resolve())] * count)
        except (RuntimeError, TypeError, ValueError, NameError, OSError) as error:
            raise InputError(f"--cluster {cluster}: submitit says: {' '.join(str(error).split())}") from error

    def running(self) -> int:
        return sum(not job.done() for job in self._jobs)

    def stop(self) -> None:
        for job in self._jobs:
            job.cancel()

    def failures(self) -> list[str]:
        ended = [(job, _trouble(job)) for job in self._jobs if job.done() and job.state != "CANCELLED"]
        return [f"job {job.job_id} {trouble} (see {job.paths.stderr})" for job, trouble in ended if trouble]


def _trouble(job: Any) -> str:
    """How a job that is done has ended, where it should not have ended so; empty otherwise."""
    if job.exception() is not None:
        return f"ended as {job.state}"
    # A job that ran to its end may have run a sweep that did not; 1 says that a cell failed, which is seen at the cell.
    codes = [code for code in job.results() if code not in (0, 1)]
    return f"ended with exit code {codes[0]}" if codes else ""


class _Sweep:
    """What a job does."""

    def __call__(self, grid: str) -> int:
        return subprocess.run([sys.executable, "-m", "pml", "sweep", grid], check=False).returncode

    def checkpoint(self, grid: str) -> Any:
        """Called by submitit where a job is preempted: what to submit in its place."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, grid)
