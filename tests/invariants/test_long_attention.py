"""Attention of long rows computes what PyTorch's operations do, forwards and backwards, and a row's
result depends on nothing beside it."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from llama2 import devices
from llama2.devices import Precision
from llama2.kernels import fused, install, long_attention
from llama2.kernels.fused import View
from llama2.model import llama
from llama2.model.llama import Llama, LlamaConfig
from llama2.model.positions import document_starts, rotary_tables

pytestmark = pytest.mark.skipif(
    not shutil.which("g++") and not shutil.which("clang++"), reason="no compiler"
)
HEADS, KV_HEADS, SIZE = 4, 2, 24
KINDS = [torch.float32, torch.bfloat16]


def draw(kind: torch.dtype, rows: int, length: int) -> tuple[Tensor, View]:
    """Products of queries, keys and values, and the view of rows without documents."""
    products = torch.randn(rows * length, (HEADS + 2 * KV_HEADS) * SIZE).to(kind)
    return products, (*rotary_tables(torch.arange(length)[None], SIZE, 1e4), None, None)


def results(products: Tensor, rows: int, view: View) -> tuple[Tensor, Tensor]:
    """Heads [B, T, H · E], and the gradient of the products [B, T, P]."""
    out, log_sums = long_attention.attend(products, rows, HEADS, SIZE, view)
    grad = torch.linspace(-1, 1, out.shape[1])[None, :, None].expand_as(out).to(out.dtype)
    grads = long_attention.differentiate(grad, products, out, log_sums, SIZE, view)
    return out, grads.view(rows, -1, products.shape[1])


@pytest.mark.parametrize(("heads", "kv_heads", "size"), [(4, 4, 16), (6, 2, 64), (4, 1, 10)])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-5), ("bf16", 0.03)])
@pytest.mark.parametrize("rows", ["plain", "documents", "branches"])
def test_it_equals_pytorch(
    monkeypatch: pytest.MonkeyPatch,
    heads: int,
    kv_heads: int,
    size: int,
    precision: Precision,
    tolerance: float,
    rows: str,
) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr(llama, "EXPLICIT_LENGTH", 100)
    model = install(Llama(LlamaConfig(71, heads * size, 88, 2, heads, kv_heads, 512), 3))
    tokens_BT = torch.randint(0, 71, (3, 205))  # three blocks and a ragged one
    marks = {"documents_BT": (torch.rand(3, 205) < 0.03).cumsum(1)}
    if rows == "branches":  # a prompt of 80 tokens and two answers to it
        marks = {"branches_BT": ((torch.arange(205) >= 80) * 1 + (torch.arange(205) >= 150))}
        marks["branches_BT"] = marks["branches_BT"].expand(3, -1).contiguous()

    calls: list[int] = []

    def measure() -> list[Tensor]:
        model.zero_grad()
        with devices.autocast(torch.device("cpu"), precision):
            hidden_BTD = model.model(tokens_BT, **({} if rows == "plain" else marks)).float()

        (hidden_BTD * torch.linspace(-1, 1, 205)[:, None]).sum().backward()
        weights = [weight for weight in model.parameters() if weight.grad is not None]
        return [hidden_BTD.detach(), *(weight.grad.clone() for weight in weights)]

    attend = long_attention.attend
    monkeypatch.setattr(
        long_attention, "attend", lambda *given: (calls.append(1), attend(*given))[1]
    )
    own = measure()
    assert len(calls) == 2  # one a layer
    monkeypatch.setattr(fused, "supports", lambda x: False)

    for found, expected in zip(own, measure(), strict=True):
        assert (found - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_does_not_depend_on_other_rows_threads_or_what_follows(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    products, view = draw(kind, 3, 150)
    out, grads = results(products, 3, view)
    for row in range(3):
        alone, alone_grads = results(products.view(3, 150, -1)[row], 1, view)
        assert torch.equal(alone[0], out[row])
        assert torch.equal(alone_grads[0], grads[row])

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        for found, expected in zip(results(products, 3, view), (out, grads), strict=True):
            assert torch.equal(found, expected)
    finally:
        torch.set_num_threads(before)

    shorter = products.view(3, 150, -1)[:, :70].reshape(210, -1).contiguous()
    begun, _ = long_attention.attend(
        shorter, 3, HEADS, SIZE, (*(table[:, :70].contiguous() for table in view[:2]), None, None)
    )
    assert torch.equal(begun, out[:, :70])


@pytest.mark.parametrize("kind", KINDS)
def test_documents_do_not_see_each_other(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    products, (cos, sin, *_) = draw(kind, 1, 200)
    documents_1T = (torch.arange(200) >= 90).long()[None]
    view = (cos, sin, document_starts(documents_1T), None)
    out, grads = results(products, 1, view)
    other = products.clone()
    other[:90] = torch.randn_like(other[:90])
    changed, changed_grads = results(other, 1, view)

    assert torch.equal(changed[:, 90:], out[:, 90:])
    assert torch.equal(changed_grads[:, 90:], grads[:, 90:])
    assert not torch.equal(changed[:, :90], out[:, :90])


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_a_number_stays_so_where_it_is_seen(kind: torch.dtype) -> None:
    torch.manual_seed(0)
    products, view = draw(kind, 2, 130)
    products[75, 0] = float("nan")  # a query of the first row
    out, _ = long_attention.attend(products, 2, HEADS, SIZE, view)
    lost = out.isnan().any(-1)
    assert lost[0].nonzero().flatten().tolist() == [75]
    assert not lost[1].any()


def test_large_scores_do_not_overflow() -> None:
    torch.manual_seed(0)
    products, view = draw(torch.float32, 1, 300)
    out, grads = results(products * 300, 1, view)
    assert out.isfinite().all()
    assert grads.isfinite().all()
