"""One module names kinds of devices, and the ceiling of MFU is measured without side effects."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import llama2
from llama2 import devices

PACKAGE = Path(llama2.__file__).parent


def kinds_named(source: str) -> set[str]:
    """The kinds of devices that a module's texts name, its docstrings and comments aside."""
    texts = (node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Constant))
    return {text for text in texts if isinstance(text, str) and text.split(":")[0] in devices.FUSED}


def test_one_module_names_kinds_of_devices() -> None:
    named = {path.name: kinds_named(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}
    groups = named.pop("cpu_tuning.py")  # of the kernel: they are called so
    assert groups == {"cpu"}
    assert [name for name, kinds in named.items() if kinds] == ["devices.py"]


def test_a_module_that_names_one_is_noticed() -> None:
    assert kinds_named('x.to("cuda:1" if y else "cpu")') == {"cuda:1", "cpu"}


def test_tensors_devices_and_names_are_told_apart() -> None:
    for where in (torch.zeros(1), torch.device("cpu"), "cpu"):
        assert devices.is_cpu(where)
        assert not devices.is_gpu(where)

    for where in (torch.device("cuda", 1), "cuda"):
        assert devices.is_gpu(where)
        assert not devices.is_cpu(where)

    assert not devices.is_cpu(torch.device("meta"))


def test_the_peak_is_the_best_of_many_products_and_draws_nothing(monkeypatch) -> None:
    before = torch.get_rng_state()
    monkeypatch.setattr(devices, "PEAK_SECONDS", 0.05)
    seconds = iter([0.5, 0.01, 0.2])
    monkeypatch.setattr(devices, "_seconds", lambda device, work: next(seconds, 0.3))
    assert devices.measure_peak.__wrapped__(torch.device("cpu"), "fp32") == pytest.approx(
        2 * 1024**3 / 0.01
    )
    assert torch.equal(torch.get_rng_state(), before)
