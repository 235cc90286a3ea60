"""How many processors there are to use: affinity, and a container's quota."""

from __future__ import annotations

import pytest

from stca.runtime import machine
from stca.runtime.machine import memory, processors


@pytest.fixture
def four(monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1, 5, 9}, raising=False)


def write(root, files):
    """A tree of files as Linux shows it."""
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(
    ("quota", "expected"),
    [
        ("max 100000\n", 4),
        ("50000 100000\n", 1),
        ("100000 100000\n", 1),
        ("100001 100000\n", 2),
        ("350000 100000\n", 4),
        ("99999999 100000\n", 4),
        *((text, 4) for text in ("", "none", "1", "100 0", "-5 100000", "0 100000", "é")),
    ],
)
def test_processors(four, tmp_path, quota, expected):
    assert processors(write(tmp_path, {"sys/fs/cgroup/cpu.max": quota})) == expected


@pytest.mark.parametrize(
    ("file", "limit"), [("memory.max", "4096"), ("memory.max", "max"), ("memory/memory.limit_in_bytes", "4096\n")]
)
def test_memory_is_the_machines_or_a_containers(tmp_path, file, limit):
    whole = memory(tmp_path / "none")
    assert whole > 1 << 20
    limited = memory(write(tmp_path, {f"sys/fs/cgroup/{file}": limit}))
    assert limited == (whole if limit == "max" else 4096)


V1 = "4:memory:/a/b\n3:cpu,cpuacct:/a/b\n1:name=systemd:/\n"
PERIOD = {"sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000\n"}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        # Version 2: the process's own group, one around it, and the tighter of both.
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "200000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "200000 100000"}, 2),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/cpu.max": "100000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "300000 100000",
            },
            1,
        ),
        # Of another's group, and of a path that is the host's: the container's own is at the root.
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/b/cpu.max": "100000 100000"}, 4),
        ({"proc/self/cgroup": "0::/host/7f\n", "sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        # Version 1.
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "250000\n", **PERIOD}, 3),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1\n", **PERIOD}, 4),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "100000\n"}, 4),
        (
            {
                "proc/self/cgroup": "2:cpu:/host/7f\n0::/\n",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        ({"proc/self/cgroup": "cpu\n::\n\n1:cpu\n"}, 4),
    ],
)
def test_quotas_of_control_groups(four, tmp_path, files, expected):
    assert processors(write(tmp_path, files)) == expected


def test_without_a_quota_or_affinity(four, tmp_path, monkeypatch):
    assert processors(tmp_path) == 4
    monkeypatch.delattr(machine.os, "sched_getaffinity")
    monkeypatch.setattr(machine.os, "cpu_count", lambda: None)
    assert processors(tmp_path) == 1
