"""Where attention is computed and how must not change it: shared keys repeated, documents masked or
told by bounds."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from test_model import assert_close, build, gradients, tokens
from torch import Tensor
from torch.nn.attention import varlen as theirs

from llama2.devices import Precision
from llama2.kernels import fused
from llama2.model import attention, llama
from llama2.model.attention import explicit_attention
from llama2.model.sizes import SIZES
from llama2.stages.common.memory import Tower, activations, repeat_bytes
from llama2.stages.common.training import Training

DOCUMENTS = ((7, 1, 12), (20,))  # lengths, row by row


def one_by_one(
    q_NHE: Tensor, k_NKE: Tensor, v_NKE: Tensor, bounds_C: Tensor, longest: int
) -> Tensor:
    """What a kernel for documents computes, in plain products: each document alone, causal."""
    assert bounds_C.dtype == torch.int32
    found = []
    for begin, end in pairwise(bounds_C.tolist()):
        assert 0 < end - begin <= longest
        q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (q_NHE, k_NKE, v_NKE))
        bias = torch.full((end - begin, end - begin), float("-inf"), device=q.device).triu(1)
        found.append(explicit_attention(q, k, v, bias[None, None].to(q.dtype))[0].transpose(0, 1))

    return torch.cat(found)


@pytest.fixture
def on_bounds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A CPU that has a kernel for documents, as a GPU has."""
    attention.kernel_for.cache_clear()
    monkeypatch.setattr(attention, "DEVICES", ("cpu",))
    monkeypatch.setattr(attention, "KINDS", (torch.float32,))
    monkeypatch.setattr(attention, "_varlen", lambda repeated: one_by_one)
    yield
    attention.kernel_for.cache_clear()


def packed() -> tuple[Tensor, Tensor]:
    ids_BT = torch.stack(
        [
            torch.cat([torch.full((length,), number) for number, length in enumerate(row)])
            for row in DOCUMENTS
        ]
    )
    return tokens(*ids_BT.shape), ids_BT


def results(kv_heads: int) -> tuple[Tensor, dict[str, Tensor]]:
    model, (tokens_BT, documents_BT) = build(kv_heads), packed()
    logp_BT = model(tokens_BT, targets_BT=tokens_BT.roll(-1, 1), documents_BT=documents_BT)
    return logp_BT.detach(), gradients(model, logp_BT.sum())


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_bounds_of_documents_equal_masks(monkeypatch, request, kv_heads) -> None:
    monkeypatch.setattr(fused, "supports", lambda x: False)
    masked = results(kv_heads)
    request.getfixturevalue("on_bounds")
    bounded = results(kv_heads)
    assert (masked[0] - bounded[0]).abs().max() < 1e-4
    assert_close(bounded[1], masked[1], 1e-4)


def test_bounds_begin_with_each_document_and_each_row(on_bounds) -> None:
    found = attention.documents_of(packed()[1], torch.float32, 16)
    assert found is not None
    assert found.bounds_C.tolist() == [0, 7, 8, 20, 40]
    assert found.longest == 20


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_keys_repeated_for_their_heads_equal_shared_keys(monkeypatch, kv_heads, masked) -> None:
    monkeypatch.setattr(fused, "supports", lambda x: False)
    monkeypatch.setattr(llama, "EXPLICIT_LENGTH", 0)
    model, (tokens_BT, documents_BT) = build(kv_heads), packed()
    found = []

    for takes in (True, False):
        monkeypatch.setattr(attention, "takes_shared_keys", lambda *_, takes=takes: takes)
        logp_BT = model(
            tokens_BT, targets_BT=tokens_BT, documents_BT=documents_BT if masked else None
        )
        found.append((logp_BT.detach(), gradients(model, logp_BT.sum())))

    assert (found[0][0] - found[1][0]).abs().max() < 1e-5
    assert_close(found[1][1], found[0][1], 1e-5)


def test_only_flash_attention_shares_keys_on_a_gpu() -> None:
    half, whole = (
        torch.empty(1, 2, 3, 8, dtype=kind, device="meta")
        for kind in (torch.bfloat16, torch.float32)
    )
    bias = torch.empty(1, 1, 3, 3, device="meta")
    assert attention.takes_shared_keys(half, None)
    assert not attention.takes_shared_keys(half, bias)
    assert not attention.takes_shared_keys(whole, None)
    assert attention.takes_shared_keys(torch.empty(1, 2, 3, 8), torch.empty(1, 1, 3, 3))


@pytest.mark.parametrize("broken", ["raises", "forgets the bounds", "sees what follows"])
def test_a_kernel_that_does_not_agree_is_not_used(monkeypatch, capsys, on_bounds, broken) -> None:
    def kernel(q, k, v, bounds_C, longest):
        if broken == "raises":
            raise RuntimeError("no kernel image is available\nfor this device")
        if broken == "forgets the bounds":
            return one_by_one(q, k, v, bounds_C[[0, -1]], longest)

        return one_by_one(
            q.flip(0), k.flip(0), v.flip(0), (bounds_C[-1] - bounds_C).flip(0), longest
        ).flip(0)

    monkeypatch.setattr(attention, "_varlen", lambda repeated: kernel)
    assert attention.kernel_for(torch.device("cpu"), torch.float32, 16) is None
    heard = capsys.readouterr().err
    assert heard.startswith("packed rows are masked")
    assert heard.count("\n") == 1
    model, (tokens_BT, documents_BT) = build(), packed()
    alone = model(tokens_BT[:1, :7])
    assert (model(tokens_BT, documents_BT=documents_BT)[:1, :7] - alone).abs().max() < 1e-4


def test_a_kernel_that_wants_keys_repeated_gets_them(monkeypatch, on_bounds) -> None:
    def needs_equal_heads(q, k, v, bounds_C, longest):
        if q.shape[1] != k.shape[1]:
            raise ValueError("the heads differ in number")

        return one_by_one(q, k, v, bounds_C, longest)

    def varlen(repeated):
        def attend(q, k, v, *rest):
            k, v = (
                x.repeat_interleave(q.shape[1] // x.shape[1], 1) if repeated else x for x in (k, v)
            )
            return needs_equal_heads(q, k, v, *rest)

        return attend

    monkeypatch.setattr(attention, "_varlen", varlen)
    kernel = attention.kernel_for(torch.device("cpu"), torch.float32, 16)
    assert kernel is not None
    q, kv = torch.randn(6, 4, 16), torch.randn(6, 2, 16)
    bounds_C = torch.tensor([0, 2, 6], dtype=torch.int32)
    assert torch.allclose(
        kernel(q, kv, kv, bounds_C, 6), one_by_one(q, kv, kv, bounds_C, 6), atol=1e-6
    )


def test_pytorch_has_the_kernel_we_ask_for(monkeypatch) -> None:
    """Its name and parameters; only a GPU can run it."""
    heard = []
    monkeypatch.setattr(theirs, "varlen_attn", _recorder(theirs.varlen_attn, heard))
    q, kv = torch.empty(6, 4, 16, device="meta"), torch.empty(6, 2, 16, device="meta")

    for repeated, heads in ((False, 2), (True, 4)):
        attention._varlen(repeated)(q, kv, kv, torch.tensor([0, 2, 6], dtype=torch.int32), 6)
        arguments = heard.pop().arguments
        assert arguments["key"].shape == arguments["value"].shape == (6, heads, 16)
        assert arguments.get("window_size", (-1, 0)) == (-1, 0)
        assert arguments.get("is_causal", True)
        assert arguments["max_q"] == arguments["max_k"] == 6


def _recorder(function, heard):
    @functools.wraps(function)
    def record(*arguments, **named):
        heard.append(inspect.signature(function).bind(*arguments, **named))
        return arguments[0]

    return record


# the tracer's own doing
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
# so is this
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_compiled_model_knows_the_bounds(monkeypatch, on_bounds) -> None:
    monkeypatch.setattr(fused, "supports", lambda x: False)
    model, (tokens_BT, documents_BT) = build(), packed()
    expected_BT = model(tokens_BT, documents_BT=documents_BT, targets_BT=tokens_BT)
    expected = gradients(model, expected_BT.sum())
    monkeypatch.setattr(attention, "_find_documents", attention._find_documents)  # put back behind
    attention.leave_documents_uncompiled()
    compiled = torch.compile(model, backend="aot_eager")

    for documents in (documents_BT, documents_BT.flip(0), documents_BT):
        found_BT = compiled(tokens_BT, documents_BT=documents, targets_BT=tokens_BT)

    assert (found_BT - expected_BT).abs().max() < 1e-4
    assert_close(gradients(model, found_BT.sum()), expected, 1e-4)


def test_the_plan_reckons_with_masks_and_repeated_keys_where_they_exist() -> None:
    """On a GPU packed rows need a mask in fp32 alone, and there keys that heads share are
    repeated."""
    shape, tokens = SIZES["1b"], 2 * 4096

    def kept(precision: Precision, packed: bool) -> float:
        return activations([Tower(shape)], Training(precision=precision), 2, 4096, packed, False)

    assert kept("bf16", True) == kept("bf16", False)
    assert kept("fp32", True) - kept("fp32", False) == 5 * tokens * 4096
    assert repeat_bytes(shape, 4) == 2 * 4 * 64 * (32 - 4)
    assert repeat_bytes(SIZES["7b"], 4) == 0
