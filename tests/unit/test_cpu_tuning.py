"""The cores of a process are those of its container."""

import os

import pytest

from llama2 import cpu_tuning


@pytest.mark.parametrize(
    ("membership", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "max 100000\n"}, 64),
        ("0::/a/b\n", {"a/cpu.max": "150000 100000\n", "a/b/cpu.max": "max 100000\n"}, 2),
        ("0::/\n", {"cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "9900000 100000\n"}, 64),
        ("0::/\n", {"cpu.max": "damaged"}, 64),
        (
            "4:cpu,cpuacct:/d\n1:name=x:/\n",
            {"cpu/d/cpu.cfs_quota_us": "300000\n", "cpu/d/cpu.cfs_period_us": "100000\n"},
            3,
        ),
        ("4:cpu:/d\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 64),
        ("0::/../outside\n", {}, 64),
        (None, {}, 64),
    ],
)
def test_a_share_of_time_is_a_number_of_cores(tmp_path, monkeypatch, membership, files, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    monkeypatch.setattr(cpu_tuning, "ROOT", tmp_path / "groups")
    monkeypatch.setattr(cpu_tuning, "MEMBERSHIP", tmp_path / "membership")

    if membership is not None:
        (tmp_path / "membership").write_text(membership)

    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)

    assert cpu_tuning.cores() == expected
