"""Claims: one worker at a time holds a cell, and the claim of a dead worker becomes free."""

import errno
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pml import claims
from pml.claims import Claims

HOLD = """
import sys, time
from pathlib import Path
from pml import claims
claims.LEASE_SECONDS = float(sys.argv[2])
own = claims.Claims(Path(sys.argv[1]))
print(own.take("cell"), flush=True)
time.sleep(60)
"""


def other_worker(folder: Path, lease: float = 120.0) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(lease)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "True\n"
    return process


def test_a_claim_belongs_to_one_worker_until_it_is_released(tmp_path: Path) -> None:
    first, second = Claims(tmp_path / "claims"), Claims(tmp_path / "claims")
    assert first.take("cell")
    assert not second.take("cell")
    assert second.take("another")
    first.release("cell")
    assert second.take("cell")
    second.release("cell")
    second.release("another")
    assert list((tmp_path / "claims").iterdir()) == []


def test_the_holder_of_a_claim_is_its_host_and_process_unless_that_is_known_to_have_ended(tmp_path: Path) -> None:
    own = Claims(tmp_path)
    assert own.holder("cell") is None
    with other_worker(tmp_path) as process:
        assert (own.holder("cell") or "").endswith(f", process {process.pid}")
        process.kill()
        process.wait()
    assert own.holder("cell") is None
    # A process on another host may be alive, whatever its id stands for here.
    lock = tmp_path / "cell.lock"
    lock.write_text(re.sub(r"(?m)^host=.*$", "host=elsewhere", lock.read_text()))
    assert own.holder("cell") == f"elsewhere, process {process.pid}"


def test_a_claim_that_is_still_being_written_is_held(tmp_path: Path) -> None:
    # Its process id is not written yet.
    (tmp_path / "cell.lock").write_text(f"host={socket.gethostname()}\npid=\n")
    assert Claims(tmp_path).holder("cell") == f"{socket.gethostname()}, process "


def test_the_claim_of_a_killed_process_is_free_at_once_on_the_same_host(tmp_path: Path) -> None:
    own = Claims(tmp_path)
    with other_worker(tmp_path) as process:
        assert not own.take("cell")
        process.kill()
        process.wait()
    # The first call may only find that the process is gone; the next one takes the claim.
    assert own.take("cell") or own.take("cell")
    own.release("cell")


def test_a_worker_that_loses_its_claim_exits_at_once(tmp_path: Path) -> None:
    with other_worker(tmp_path, lease=1.0) as process:
        (tmp_path / "cell.lock").unlink()
        _, said = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "cell: this worker has lost its claim" in said


def test_a_claim_without_a_heartbeat_expires(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A claim left behind by a worker on another host: nobody here can tell whether its process is alive.
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.3)
    first, second = Claims(tmp_path), Claims(tmp_path)
    assert first.take("cell")
    marker = tmp_path / "cell.lock"
    lines = [line if not line.startswith("host=") else "host=elsewhere" for line in marker.read_text().splitlines()]
    first.release("cell")
    marker.write_text("\n".join(lines) + "\n")
    marker.chmod(0o644)
    assert (
        second.holder(
            "cell",
        )
        is not None
    )
    assert not second.take("cell")
    time.sleep(0.5)
    assert second.take("cell") or second.take("cell")
    second.release("cell")


@pytest.fixture
def nfs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that cannot exchange two names, as NFS and SMB cannot; claims last for 0.3 seconds."""
    monkeypatch.setattr("filelock._soft.exchange_names", lambda *_: False)
    monkeypatch.setattr(claims, "LEASE_SECONDS", 0.3)


@pytest.mark.usefixtures("nfs")
@pytest.mark.parametrize("host", ["here", "elsewhere"])
def test_the_claim_of_a_dead_worker_expires_on_nfs_too(host: str, tmp_path: Path) -> None:
    own = Claims(tmp_path)
    with other_worker(tmp_path, lease=0.3) as process:
        process.kill()
        process.wait()
    lock = tmp_path / "cell.lock"
    if host == "elsewhere":
        lock.write_text(re.sub(r"(?m)^host=.*$", "host=elsewhere", lock.read_text()))
    assert not own.take("cell")
    time.sleep(0.5)
    assert own.take("cell") or own.take("cell")
    assert f"pid={os.getpid()}\n" in lock.read_text()
    own.release("cell")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("nfs")
def test_the_claim_of_a_living_worker_does_not_expire_on_nfs(tmp_path: Path) -> None:
    own = Claims(tmp_path)
    with other_worker(tmp_path, lease=0.3) as process:
        ends = time.monotonic() + 1
        while time.monotonic() < ends:
            assert not own.take("cell")
            time.sleep(0.05)
        process.kill()


@pytest.mark.usefixtures("nfs")
def test_a_claim_that_another_worker_takes_just_before_it_is_removed_is_put_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = Claims(tmp_path), Claims(tmp_path)
    assert first.take("cell")
    marker = claims._marker
    dead = (b"a dead worker's", 0, 0)
    # What the second worker reads at the path is out of date; what it has moved aside is not.
    monkeypatch.setattr(claims, "_marker", lambda path: dead if path.name == "cell.lock" else marker(path))
    before = (tmp_path / "cell.lock").read_text()
    assert not second.take("cell")
    time.sleep(0.5)
    assert not second.take("cell")
    assert (tmp_path / "cell.lock").read_text() == before
    first.release("cell")
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_cannot_be_read_has_no_known_holder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: Any, **__: Any) -> str:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(Path, "read_text", stale)
    assert Claims(tmp_path).holder("cell") is None
