"""The cores of a process are those of its container, and fp32 products stay exact."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llama2 import cpu_tuning

PRODUCTS: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


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

    assert cpu_tuning.count_cores() == expected


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = PRODUCTS.fp32_precision
    yield
    PRODUCTS.fp32_precision = before


def tune(monkeypatch: pytest.MonkeyPatch, *, machine: str = "x86_64", amx: bool = False) -> str:
    """The setting of products after tuning such a CPU."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(cpu_tuning, "has_amx", lambda: amx)
    cpu_tuning.tune.__wrapped__()

    return str(PRODUCTS.fp32_precision)


def test_products_are_exact_whatever_the_processor_says_of_itself(monkeypatch) -> None:
    """A processor with AMX that hides it would round, one without does not: measured, so right on
    both."""
    tune(monkeypatch)
    assert cpu_tuning.has_exact_products()


def test_products_that_come_out_rounded_are_not_used(monkeypatch) -> None:
    before = PRODUCTS.fp32_precision
    monkeypatch.setattr(cpu_tuning, "has_exact_products", lambda: False)
    assert tune(monkeypatch) == before
    monkeypatch.setattr(cpu_tuning, "has_exact_products", lambda: True)
    assert tune(monkeypatch) == "bf16"


@pytest.mark.parametrize(
    ("machine", "amx"), [("aarch64", False), ("arm64", False), ("x86_64", True)]
)
def test_processors_that_multiply_bf16_are_left_alone(monkeypatch, machine, amx) -> None:
    before = PRODUCTS.fp32_precision
    monkeypatch.setattr(cpu_tuning, "has_exact_products", lambda: True)
    assert tune(monkeypatch, machine=machine, amx=amx) == before


def test_rounding_to_bf16_is_noticed(monkeypatch) -> None:
    product = torch.Tensor.__matmul__

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (
            product(a, b)
            if a.dtype == torch.float64
            else product(a.bfloat16().float(), b.bfloat16().float())
        )

    assert cpu_tuning.has_exact_products()
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not cpu_tuning.has_exact_products()
