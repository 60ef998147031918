"""The network on a GPU against the same network on a CPU: values, gradients, memory, compiled or
not."""

from __future__ import annotations

from copy import deepcopy
from functools import partial

import pytest
import torch
from shapes import LENGTH, batch, build, distance, moved, results

from llama2.model import attention
from llama2.model.attention import sdpa_attention
from llama2.model.llama import Attention, Context, LlamaConfig
from llama2.model.positions import rotary_tables, same_document
from llama2.model.scorer import Scorer

EXACT = 1e-4  # relative, of fp32 against fp32: other orders of summation


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_fp32_equals_the_cpu(device, record_property, kv_heads, packed) -> None:
    model, data = build(kv_heads), batch(packed)
    exact, exact_gradients = results(deepcopy(model), data, torch.device("cpu"))
    found, gradients = results(model, data, device)
    worst = max(distance(gradients[name], exact_gradients[name]) for name in exact_gradients)
    record_property("log-probabilities, relative error", f"{distance(found, exact):.1e}")
    record_property("gradients, largest relative error", f"{worst:.1e}")
    assert distance(found, exact) < EXACT
    assert worst < 10 * EXACT


@pytest.mark.parametrize("packed", [False, True], ids=["whole", "packed"])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_bf16_is_as_near_to_fp32_as_on_the_cpu(device, record_property, kv_heads, packed) -> None:
    model, data = build(kv_heads), batch(packed)
    exact, exact_gradients = results(deepcopy(model), data, torch.device("cpu"))
    rounded, rounded_gradients = results(deepcopy(model), data, torch.device("cpu"), bf16=True)
    found, gradients = results(model, data, device, bf16=True)
    mine, cpu = distance(found, exact), distance(rounded, exact)
    errors = {
        name: (
            distance(gradients[name], exact_gradients[name]),
            distance(rounded_gradients[name], exact_gradients[name]),
        )
        for name in exact_gradients
    }
    record_property(
        "log-probabilities, relative error here / on the CPU", f"{mine:.1e} / {cpu:.1e}"
    )
    assert 0 < mine < 2 * cpu

    for name, (here, there) in errors.items():
        assert here < 2 * there + 1e-3, name


def test_logits_and_entropy_equal_the_cpu(device) -> None:
    model, data = build(), batch(False)
    with torch.no_grad():
        exact = (
            deepcopy(model)(data["tokens_BT"]),
            *deepcopy(model)(data["tokens_BT"], targets_BT=data["targets_BT"], entropy=True),
        )
        model, there = model.to(device), moved(data, device)
        found = (
            model(there["tokens_BT"]),
            *model(there["tokens_BT"], targets_BT=there["targets_BT"], entropy=True),
        )

    for one, other in zip(found, exact):
        assert one.device.type == device.type
        assert distance(one.cpu(), other) < EXACT


def test_scores_equal_the_cpu(device) -> None:
    scorer, data = Scorer(build().config, 3), batch(False)
    lengths_B = torch.tensor([LENGTH, 17, 1])
    with torch.no_grad():
        scorer.score.weight.mul_(30)
        exact = (
            deepcopy(scorer)(data["tokens_BT"], lengths_B=lengths_B),
            deepcopy(scorer)(data["tokens_BT"]),
        )
        scorer = scorer.to(device)
        tokens_BT = data["tokens_BT"].to(device)
        found = scorer(tokens_BT, lengths_B=lengths_B.to(device)), scorer(tokens_BT)

    for one, other in zip(found, exact):
        assert distance(one.cpu(), other) < EXACT


@pytest.mark.parametrize("size", [64, 128])
def test_packed_rows_need_no_mask(device, on_cuda, record_property, size) -> None:
    kernel = attention.kernel_for(device, torch.bfloat16, size)
    record_property(
        "kernel for documents", "none, rows are masked" if kernel is None else kernel.__qualname__
    )
    assert (kernel is not None) == on_cuda


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("way", ["documents", "mask", "causal"])
def test_shared_keys_never_fill_the_memory_with_scores(
    device, on_cuda, record_property, kind, way
) -> None:
    """Rows of 4096 and 32 heads that share 4: scores alone would take 1 GiB in bf16, 2 GiB in fp32,
    several times."""
    length, width = (4096, 2048) if on_cuda else (96, 256)
    shape = LlamaConfig(8, width, 8, 1, 32, 4, 4096)
    module = Attention(shape, 0).to(device, kind)

    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)

    x_BTD = torch.randn(1, length, width, device=device, dtype=kind, requires_grad=True)
    documents_BT = (torch.arange(length, device=device) // (length // 4))[None]
    tables = rotary_tables(torch.arange(length, device=device)[None], shape.head_dim, 1e4)
    documents = (
        attention.documents_of(documents_BT, kind, shape.head_dim) if way == "documents" else None
    )
    attend = partial(attention.sdpa_attention, bias_B1TS=None)
    if documents is not None:
        attend = partial(attention.document_attention, documents=documents)

    if way == "mask" or (way == "documents" and documents is None):
        bias = torch.zeros(1, length, length, dtype=kind, device=device)
        bias = bias.masked_fill(~same_document(documents_BT), torch.finfo(kind).min)[:, None]
        attend = partial(attention.sdpa_attention, bias_B1TS=bias)

    _reset(on_cuda)
    module(x_BTD, Context(*tables, attend, None)).float().square().sum().backward()
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_cuda else 0.0
    record_property("peak, GiB", f"{peak:.2f}")
    assert x_BTD.grad is not None
    assert x_BTD.grad.isfinite().all()
    assert peak < (1.0 if kind == torch.bfloat16 else 2.0)


def _reset(on_cuda: bool) -> None:
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@pytest.mark.parametrize("keys", [1, 13, 64])
def test_one_query_among_idle_slots(device, keys) -> None:
    """Decoding: shared keys, a mask, and a row that sees its first column only."""
    random = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, 1, 64, generator=random)
    k, v = (torch.randn(3, 2, keys, 64, generator=random) for _ in range(2))
    seen = torch.arange(keys)[None] <= torch.tensor([keys - 1, keys // 2, 0])[:, None]
    bias = torch.zeros(3, keys).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None, None]
    exact = sdpa_attention(q, k, v, bias)
    found = sdpa_attention(*(one.to(device) for one in (q, k, v)), bias.to(device))
    assert distance(found.cpu(), exact) < EXACT


@pytest.mark.filterwarnings("ignore")
def test_compiled_equals_eager(device, on_cuda, record_property) -> None:
    if not on_cuda:
        pytest.skip("on a CPU tests/invariants/test_attention.py compiles it")

    model = build().to(device)
    data = moved(batch(), device)
    eager, expected = results(model, data, device, bf16=True)
    attention.leave_documents_uncompiled()
    compiled = torch.compile(model)
    found, gradients = results(compiled, data, device, bf16=True)
    gradients = {name.removeprefix("_orig_mod."): gradient for name, gradient in gradients.items()}
    worst = max(distance(gradients[name], expected[name]) for name in expected)
    record_property("log-probabilities, relative distance", f"{distance(found, eager):.1e}")
    assert distance(found, eager) < 0.02
    assert worst < 0.1
