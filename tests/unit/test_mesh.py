"""The settings of the device: fp32 products stay exact, and the ceiling of MFU is measured without
side effects."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llama2 import mesh
from llama2.errors import UserError

PRODUCTS: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = PRODUCTS.fp32_precision
    yield
    PRODUCTS.fp32_precision = before


def tune(monkeypatch: pytest.MonkeyPatch, *, machine: str = "x86_64", amx: bool = False) -> str:
    """The setting of products after tuning such a CPU."""
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(mesh, "has_amx", lambda: amx)
    mesh.tune_cpu.__wrapped__()

    return str(PRODUCTS.fp32_precision)


def test_products_are_exact_whatever_the_processor_says_of_itself(monkeypatch) -> None:
    """A processor with AMX that hides it would round, one without does not: measured, so right on
    both."""
    tune(monkeypatch)
    assert mesh.exact_products()


def test_products_that_come_out_rounded_are_not_used(monkeypatch) -> None:
    before = PRODUCTS.fp32_precision
    monkeypatch.setattr(mesh, "exact_products", lambda: False)
    assert tune(monkeypatch) == before
    monkeypatch.setattr(mesh, "exact_products", lambda: True)
    assert tune(monkeypatch) == "bf16"


@pytest.mark.parametrize(
    ("machine", "amx"), [("aarch64", False), ("arm64", False), ("x86_64", True)]
)
def test_processors_that_multiply_bf16_are_left_alone(monkeypatch, machine, amx) -> None:
    before = PRODUCTS.fp32_precision
    monkeypatch.setattr(mesh, "exact_products", lambda: True)
    assert tune(monkeypatch, machine=machine, amx=amx) == before


def test_rounding_to_bf16_is_noticed(monkeypatch) -> None:
    product = torch.Tensor.__matmul__

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (
            product(a, b)
            if a.dtype == torch.float64
            else product(a.bfloat16().float(), b.bfloat16().float())
        )

    assert mesh.exact_products()
    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    assert not mesh.exact_products()


def test_the_peak_is_the_best_of_many_products_and_draws_nothing(monkeypatch) -> None:
    before = torch.get_rng_state()
    monkeypatch.setattr(mesh, "PEAK_SECONDS", 0.05)
    seconds = iter([0.5, 0.01, 0.2])
    monkeypatch.setattr(mesh, "_seconds", lambda work: next(seconds, 0.3))
    assert mesh.peak_flops.__wrapped__("fp32") == pytest.approx(2 * 1024**3 / 0.01)
    assert torch.equal(torch.get_rng_state(), before)


def test_more_ranks_than_gpus_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(mesh, "device", lambda: torch.device("cuda", 1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("WORLD_SIZE", "2")

    with pytest.raises(UserError, match="this machine has 1 GPUs, and rank 1"):
        mesh.init()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"WORLD_SIZE": "two"},
            "WORLD_SIZE=two: the number of ranks is wanted; unset it, or start with torchrun",
        ),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: the number of ranks is wanted"),
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            "WORLD_SIZE=2, but MASTER_ADDR and MASTER_PORT is not set; start",
        ),
        ({"LLAMA2_DEVICE": "gpu"}, "LLAMA2_DEVICE=gpu: it may be cpu and nothing else; unset it"),
    ],
)
def test_an_environment_that_cannot_be_meant_is_one_line(
    tmp_path, monkeypatch, one_line, given, message
) -> None:
    for name, value in given.items():
        monkeypatch.setenv(name, value)

    assert one_line("world", "--out", tmp_path / "w", "--scale", "0.001").startswith(message)
    assert not (tmp_path / "w").exists()


def test_a_dry_run_reckons_with_the_ranks_of_the_environment(monkeypatch, one_line) -> None:
    monkeypatch.setenv("WORLD_SIZE", "x")
    assert one_line("world", "--out", "w", "--dry-run").startswith(
        "WORLD_SIZE=x: the number of ranks is wanted"
    )
