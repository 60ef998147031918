"""The hand-written kernels compute what PyTorch's operations do, forwards and backwards, row by
row."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from torch import Tensor

from llama2 import devices
from llama2.devices import Precision
from llama2.kernels import build, fused, install
from llama2.kernels.products import KINDS
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.scorer import Scorer

needs_compiler = pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("clang++"), reason="no compiler"
)


@pytest.fixture
def forget() -> None:
    """`library` looks again, now and after the test."""
    build.forget()
    yield
    build.forget()


def measure(model: torch.nn.Module, batch: dict[str, Tensor], precision: Precision) -> list[Tensor]:
    """Results and gradients of one pass, the loss a weighted sum of all log-probabilities."""
    model.zero_grad()
    weights_BT = torch.linspace(-1, 1, batch["tokens_BT"].numel()).view_as(batch["tokens_BT"])
    with devices.autocast(torch.device("cpu"), precision):
        if isinstance(model, Scorer):
            found = [model(batch["tokens_BT"])]
        else:
            found = list(
                model(
                    batch["tokens_BT"],
                    targets_BT=batch["targets_BT"],
                    entropy=True,
                    documents_BT=batch.get("documents_BT"),
                )
            )

    (found[0] * weights_BT).sum().backward()
    return [
        *(each.detach() for each in found),
        *(parameter.grad.clone() for parameter in model.parameters()),
    ]


@needs_compiler
@pytest.mark.parametrize("kind", [Llama, Scorer])
@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 16), (6, 2, 24), (4, 1, 10)])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-5), ("bf16", 0.03)])
@pytest.mark.parametrize("packed", [False, True])
def test_kernels_equal_pytorch(
    monkeypatch: pytest.MonkeyPatch,
    kind: type,
    heads: int,
    kv_heads: int,
    size: int,
    precision: Precision,
    tolerance: float,
    packed: bool,
) -> None:
    if packed and kind is Scorer:
        pytest.skip("rewards are not read from packed rows")

    torch.manual_seed(0)
    model = install(kind(LlamaConfig(71, heads * size, 88, 2, heads, kv_heads, 512), 3))
    length = fused.BLOCK + 45  # two blocks of queries, the second ragged
    batch = {
        "tokens_BT": torch.randint(0, 71, (3, length)),
        "targets_BT": torch.randint(0, 71, (3, length)),
    }

    if packed:
        batch["documents_BT"] = (torch.rand(3, length) < 0.03).cumsum(1)

    assert fused.supports(torch.zeros(1))
    own = measure(model, batch, precision)
    monkeypatch.setattr(fused, "supports", lambda x: False)

    for found, expected in zip(own, measure(model, batch, precision), strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()


@needs_compiler
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_its_neighbours(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(37, 50), torch.rand(50)
    gate, up = torch.randn(90, 50), torch.randn(90, 50)
    logits, targets = torch.randn(37, 91).to(kind), torch.randint(0, 91, (37,))

    def results(rows: slice) -> list[Tensor]:
        q = logits[rows].clone()
        marks = fused.likelihood(q, targets[rows], True)
        y = torch.cat((x[rows] @ gate.t(), x[rows] @ up.t()), 1).to(kind)
        product = y.new_empty(len(y), 90)
        fused._call(f"swiglu_{KINDS[kind]}", len(y), 90, 180, y, y[:, 90:], product)

        return [
            q,
            *(mark for mark in marks if mark is not None),
            product,
            fused.normalise(x[rows], None, weight, 1e-5, kind)[1],
        ]

    whole = results(slice(None))
    for rows in (slice(0, 1), slice(5, 24), slice(24, 37)):
        for part, one in zip(results(rows), whole, strict=True):
            if one.shape[-1] != 90:  # the product before it may round otherwise in another shape
                assert torch.equal(part, one[rows])


@needs_compiler
def test_what_is_not_a_number_stays_so() -> None:
    logits = torch.randn(2, 40, dtype=torch.bfloat16)
    logits[1, 7] = float("nan")
    logp, _, _ = fused.likelihood(logits, torch.tensor([3, 3]), False)
    assert logp[0].isfinite()
    assert logp[1].isnan()
    x = torch.randn(3, 16)
    x[1, 2] = float("nan")
    normed = fused.normalise(x, None, torch.ones(16), 1e-5, torch.bfloat16)[1]
    assert normed.isnan().any(1).tolist() == [False, True, False]


@needs_compiler
def test_the_exponential_is_exact_to_the_last_bits() -> None:
    logits = torch.linspace(-79.0, 0.0, 4001)[None].clone()
    expected = logits.double().exp()
    fused.likelihood(logits, torch.tensor([0]), False)
    error = (logits.double()[0, 1:] / expected[0, 1:] - 1).abs().max()
    assert error < 2e-7


@needs_compiler
@pytest.mark.parametrize("change", [slice(0, -1), slice(1, None)])
def test_a_struct_that_is_not_that_of_cpp_is_not_called(change: slice) -> None:
    class Norm(build.Struct):
        _fields_ = fused.Norm._fields_[change]

    library = build.Library("fused", Norm)
    with pytest.raises(RuntimeError, match=r"Norm has \d+ bytes in Python and 72 in fused.cpp"):
        library("norm_fp32_fp32", Norm())


@needs_compiler
def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.library("fused") is not None
    [path] = (tmp_path / "llama2").iterdir()
    stamp = path.stat().st_mtime_ns
    build.library.cache_clear()
    assert build.library("fused") is not None
    assert [each.stat().st_mtime_ns for each in (tmp_path / "llama2").iterdir()] == [stamp]


def test_without_a_compiler_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], forget: None
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    assert build.library("fused") is None
    assert not fused.supports(torch.zeros(1))
    assert "install g++" in capsys.readouterr().err


def test_a_compiler_that_fails_is_no_failure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    forget: None,
) -> None:
    broken = tmp_path / "c++"
    broken.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo 1.0 && exit\necho no such instruction >&2\nexit 1\n'
    )
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert build.library("fused") is None
    assert "no such instruction" in capsys.readouterr().err
    assert not any(path.suffix == ".so" for path in (tmp_path / "cache").rglob("*"))


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, forget: None) -> None:
    monkeypatch.setenv("LLAMA2_NATIVE", "0")
    assert build.library("fused") is None
    assert os.environ["LLAMA2_NATIVE"] == "0"
