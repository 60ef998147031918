"""Decoding steps that a GPU launches as CUDA graphs: they compute what single kernels compute.

On a CPU the work of a step stands for its graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import pytest
import torch
from shapes import build
from test_gpu_engine import DRAWN, GREEDY, flat, prompts

from llama2 import devices
from llama2.generate import cpu_decoder, graphed_decoder
from llama2.generate.engine import Engine
from llama2.generate.generator import Completion
from llama2.generate.request import SampleRequest
from llama2.kernels import install
from llama2.kernels.modules import is_decoding, rotate_together
from llama2.model.cache import KVCache
from llama2.model.llama import Llama, RMSNorm
from llama2.model.positions import rotary_tables, rotate

LENGTH = 40
TOLERANCE = {"fp32": 1e-3, "bf16": 0.3}  # of log-probabilities, as in test_gpu_engine


@dataclass
class Count:
    """Steps that were recorded, and how often they were launched."""

    recorded: int = 0
    launched: int = 0


@pytest.fixture(autouse=True)
def graphs(monkeypatch: pytest.MonkeyPatch, on_cuda: bool) -> Count:
    count, find = Count(), devices.find_recorder

    def find_counted(device: torch.device) -> Callable[[], devices.Record]:
        make = find(device) if on_cuda else lambda: lambda work: work
        assert make is not None

        def make_counted() -> devices.Record:
            record = make()

            def record_counted(work: devices.Work) -> devices.Work:
                launch = record(work)
                count.recorded += 1

                def launch_counted() -> None:
                    count.launched += 1
                    launch()

                return launch_counted

            return record_counted

        return make_counted

    monkeypatch.setattr(devices, "find_recorder", find_counted)
    monkeypatch.setattr(graphed_decoder, "failures", [])
    if not on_cuda:
        monkeypatch.setattr(cpu_decoder, "supports", lambda model: False)

    return count


@pytest.fixture
def singly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Call something that runs single kernels."""

    def call(function: Callable[..., Any], *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setenv("LLAMA2_CUDA_GRAPHS", "0")
            return function(*args)

    return call


@pytest.fixture(params=[4, 2], ids=["mha", "gqa"])
def model(request, device) -> Llama:
    return build(request.param).to(device).requires_grad_(False).eval()


def count_alike(mine: list[Completion], theirs: list[Completion], tolerance: float) -> int:
    """Count equal answers. Up to where two part, their log-probabilities agree."""
    for one, other in zip(mine, theirs, strict=True):
        pairs = list(zip(one.tokens, other.tokens))
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
        assert one.logprobs[:shared] == pytest.approx(other.logprobs[:shared], abs=tolerance)

    return sum(one.tokens == other.tokens for one, other in zip(mine, theirs))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_fewer_kernels_compute_the_same(device, record_property, kind) -> None:
    """Those of decoding, one by one, against the network's own."""
    random = torch.Generator().manual_seed(0)
    q, k, x, update = (
        torch.randn(5, 1, *shape, generator=random).to(device, kind)
        for shape in ((6, 64), (2, 64), (384,), (384,))
    )
    tables = rotary_tables(torch.tensor([[0], [70], [255], [9], [4000]], device=device), 64, 1e4)
    norm = RMSNorm(384, 1e-5).to(device, kind)
    with torch.inference_mode():
        norm.weight.copy_(torch.rand(384, generator=random) + 0.5)
        plain = (rotate(q, *tables), rotate(k, *tables), *norm(x, update))
        ours = (*rotate_together(q, k, *tables), *install(norm)(x, update))

    assert is_decoding(x) is False  # a gradient may be wanted here
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-5 if kind == torch.float32 else 0.01, atol=1e-6
        )

    same = sum(torch.equal(mine, theirs) for mine, theirs in zip(ours, plain))
    record_property("alike to the bit", f"{same} of {len(plain)}")


SAMPLINGS = {
    "greedy": replace(GREEDY, max_tokens=LENGTH),
    "drawn": replace(DRAWN, max_tokens=LENGTH),
    "several that stop": replace(DRAWN, max_tokens=LENGTH, n=3, stop=tuple(range(3, 12))),
    "nucleus": replace(DRAWN, max_tokens=LENGTH, top_p=0.8, temperature=0.7),
}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("way", SAMPLINGS)
def test_a_graph_does_what_it_recorded(
    model, graphs, monkeypatch, record_property, way, precision
) -> None:
    """Ragged prompts, rows that end, slots filled again: the same kernels one by one, on the same
    shapes, give the same answers."""
    mine = flat(Engine(model, slots=6, precision=precision).generate(prompts(), SAMPLINGS[way]))
    assert graphs.launched > 20
    assert not graphed_decoder.failures
    monkeypatch.setattr(graphed_decoder, "EAGER_STEPS", 10**9)
    recorded = graphs.recorded
    engine = Engine(model, slots=6, precision=precision)
    theirs = flat(engine.generate(prompts(), SAMPLINGS[way]))
    assert graphs.recorded == recorded
    same = sum(one == other for one, other in zip(mine, theirs))
    record_property("alike to the bit", f"{same} of {len(theirs)}")
    record_property("graphs", recorded)
    assert count_alike(mine, theirs, 1e-5) == len(theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("way", SAMPLINGS)
def test_answers_are_those_without_graphs(
    model, graphs, singly, record_property, way, precision
) -> None:
    """But for rounding, because shapes are not rounded up without them."""
    mine = flat(Engine(model, slots=6, precision=precision).generate(prompts(), SAMPLINGS[way]))
    assert graphs.launched > 20
    launched = graphs.launched
    engine = Engine(model, slots=6, precision=precision)
    theirs = flat(singly(engine.generate, prompts(), SAMPLINGS[way]))
    assert graphs.launched == launched
    same = count_alike(mine, theirs, TOLERANCE[precision])
    record_property("answers alike", f"{same} of {len(theirs)}")
    assert precision == "bf16" or same >= 0.9 * len(theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_graphs_read_weights_that_were_trained(device, graphs, singly, precision) -> None:
    """In place, by a kernel that leaves no trace: the graphs of before serve, and give what a fresh
    engine gives. Weights that moved are found where they are."""
    model = build().to(device)
    engine = Engine(model, slots=4, precision=precision)
    before = engine.generate(prompts(4), GREEDY)
    recorded = graphs.recorded
    assert recorded
    # not so much that bf16 tells little of the answers
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)

    optimizer.step()
    after = engine.generate(prompts(4), GREEDY)
    assert after != before
    assert graphs.recorded == recorded
    fresh = Engine(model, slots=4, precision=precision)
    expected = flat(singly(fresh.generate, prompts(4), GREEDY))
    count_alike(flat(after), expected, TOLERANCE[precision])

    taken = [torch.empty_like(parameter) for parameter in model.parameters()]
    for parameter, place in zip(model.parameters(), taken):
        parameter.data = place.copy_(parameter.data)

    moved = flat(engine.generate(prompts(4), GREEDY))
    assert count_alike(moved, flat(after), 1e-5) == len(moved)


def test_a_session_writes_to_no_row_that_it_keeps(model, graphs, singly, record_property) -> None:
    ways = [SAMPLINGS["greedy"], SAMPLINGS["drawn"]]

    def serve() -> list[SampleRequest]:
        session = Engine(model, slots=6, precision="fp32").open(kept=20)
        whole = SampleRequest(tuple((prompts(1)[0] * 4)[:200]), replace(GREEDY, max_tokens=999))
        session.submit(whole)
        while not session.idle:
            session.step()

        rows = session._prefixes._kept
        (row,) = rows
        data = session._slots.runner.cache.data_LPNCKD[:, :, row]
        kept = data.clone()
        requests = [
            SampleRequest(tuple(prompt), ways[index % 2], index)
            for index, prompt in enumerate(prompts())
        ]
        for request in requests:
            session.submit(request)
            session.step()

        while not session.idle:
            session.step()

        assert rows[row] == whole.read_tokens
        assert torch.equal(data, kept)
        return requests

    mine = serve()
    assert graphs.launched > 20
    theirs = singly(serve)
    same = sum(one.tokens == other.tokens for one, other in zip(mine, theirs))
    record_property("answers alike", f"{same} of {len(theirs)}")
    assert same >= 0.9 * len(theirs)


def test_graphs_share_their_memory(model, graphs, record_property, device, on_cuda) -> None:
    """More of them take next to none."""
    engine = Engine(model, slots=6, precision="fp32")
    engine.generate(prompts(6), SAMPLINGS["greedy"])
    before = torch.cuda.memory_allocated() if on_cuda else 0
    recorded = graphs.recorded
    for rows in (1, 2, 4):
        engine.generate(prompts(rows), replace(SAMPLINGS["greedy"], max_tokens=12))

    assert graphs.recorded >= recorded + 3
    more = (torch.cuda.memory_allocated() if on_cuda else 0) - before
    record_property("bytes of three more graphs", more)
    assert more < 1 << 20


def test_work_that_cannot_be_recorded_runs_as_it_is(
    model, graphs, monkeypatch, capsys, device, on_cuda
) -> None:
    """Something waits for the device in the middle of a recording. Afterwards stream and allocator
    are as before, and other work can be recorded."""
    decode, way = KVCache.decode, replace(GREEDY, max_tokens=LENGTH)
    expected = flat(Engine(model, slots=6, precision="fp32").generate(prompts(), way))
    recorded = graphs.recorded
    torch.manual_seed(7)
    numbers = torch.randn(8, device=device)
    torch.manual_seed(7)
    calls = iter(range(10**9))

    def wait(cache: KVCache, positions_B: torch.Tensor, columns: int) -> None:
        decode(cache, positions_B, columns)
        if on_cuda and torch.cuda.is_current_stream_capturing():
            positions_B.tolist()
        if not on_cuda and next(calls) == graphed_decoder.EAGER_STEPS:
            raise RuntimeError("the work itself failed once")

    with monkeypatch.context() as patch:
        patch.setattr(KVCache, "decode", wait)
        if not on_cuda:
            patch.setattr(devices, "find_recorder", lambda device: lambda: lambda work: work())

        answers = flat(Engine(model, slots=6, precision="fp32").generate(prompts(), way))
        assert count_alike(answers, expected, 1e-5) == len(expected)

    assert graphs.recorded == recorded
    assert len(graphed_decoder.failures) == 1
    assert "cannot be recorded as CUDA graphs" in capsys.readouterr().err
    devices.free_memory(device)
    assert torch.equal(torch.randn(8, device=device), numbers), "random numbers go on as they would"
    if on_cuda:
        assert torch.cuda.current_stream() == torch.cuda.default_stream()

    monkeypatch.setattr(graphed_decoder, "failures", [])
    again = flat(Engine(model, slots=6, precision="fp32").generate(prompts(), way))
    assert count_alike(again, expected, 1e-5) == len(expected)
    assert graphs.recorded > recorded
