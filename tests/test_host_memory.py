"""Memory that a process may still take, within the limits of made-up control groups."""

from pathlib import Path

import psutil
import pytest

from pml.host_memory import available_bytes


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    class Memory:
        available = 1000

    monkeypatch.setattr(psutil, "virtual_memory", Memory)


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


def available(tmp_path: Path, membership: str) -> int:
    (tmp_path / "membership").write_text(membership)
    return available_bytes(tmp_path / "groups", tmp_path / "membership")


@pytest.mark.parametrize(
    ("limit", "used", "left"),
    [
        ("700", 400, 300 + 50),
        ("5000", 400, 1000),  # More than the machine has.
        ("max", 400, 1000),
        ("300", 400, 0),  # The limit was lowered.
    ],
)
def test_a_container_has_what_its_limit_leaves_and_no_more_than_the_machine(
    limit: str, used: int, left: int, tmp_path: Path
) -> None:
    # Of the memory in use, 50 bytes are cached files that can be dropped.
    stat = "anon 200\nfile 90\ninactive_file 50"
    write(tmp_path / "groups", memory__max=limit, memory__current=used, memory__stat=stat)
    assert available(tmp_path, "0::/\n") == left
    # The group has another path outside the container.
    assert available(tmp_path, "0::/docker/abc\n") == left


@pytest.mark.parametrize(
    ("job", "step", "left"), [(600, 500, 100), (450, 500, 50), ("max", 600, 200), (450, "max", 50)]
)
def test_of_nested_groups_the_one_that_leaves_least_counts(
    job: object, step: object, left: int, tmp_path: Path
) -> None:
    write(tmp_path / "groups", memory__stat="inactive_file 0")
    for name, limit in (("job_1", job), ("job_1/step_0", step)):
        write(tmp_path / "groups" / name, memory__max=limit, memory__current=400, memory__stat="inactive_file 0")
    write(tmp_path / "groups/job_2", memory__max=1, memory__current=1, memory__stat="inactive_file 0")
    assert available(tmp_path, "0::/job_1/step_0\n") == left


def test_limits_of_the_first_version_of_control_groups_count_too(tmp_path: Path) -> None:
    stat = "inactive_file 10\ntotal_inactive_file 30"
    for name, limit in (("", 2**63 - 4096), ("slurm", 900), ("slurm/job_3", 650)):
        folder = tmp_path / "groups/memory" / name
        write(folder, memory__limit_in_bytes=limit, memory__usage_in_bytes=600, memory__stat=stat)
    membership = "5:cpu,cpuacct:/\n4:memory:/slurm/job_3\n1:name=systemd:/a:b\n0::/\n"
    assert available(tmp_path, membership) == 50 + 30


def test_without_control_groups_the_memory_of_the_machine_is_available(tmp_path: Path) -> None:
    assert available_bytes(tmp_path / "none", tmp_path / "missing") == 1000
