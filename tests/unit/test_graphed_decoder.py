"""Which steps are recorded as graphs, in what shapes, and what happens where that cannot be."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from llama2 import devices
from llama2.errors import UserError
from llama2.generate import cpu_decoder, graphed_decoder
from llama2.generate.engine import Engine
from llama2.generate.graphed_decoder import (
    EAGER_STEPS,
    GraphedDecoder,
    find_decoder,
    list_tensors,
    round_columns,
    round_rows,
    supports,
)
from llama2.generate.sampling import Sampling
from llama2.model.cache import KVCache
from llama2.model.llama import Llama, LlamaConfig

CONFIG = LlamaConfig(40, 16, 24, 2, 2, 1, 256)
FIND_RECORDER = devices.find_recorder  # which the tests replace
GREEDY = Sampling(temperature=0, max_tokens=EAGER_STEPS + 8)


def build(seed: int = 0) -> Llama:
    return Llama(CONFIG, seed).requires_grad_(False)


def make_cache(slots: int = 4) -> KVCache:
    return KVCache(2, slots, 1, 256, 8, dtype=torch.float32, device=torch.device("cpu"))


class Rerun:
    """Records nothing: the work itself is what does it again."""

    made = 0

    def __call__(self, work):
        Rerun.made += 1
        return work


class Failing(Rerun):
    """As where a kernel cannot be recorded."""

    def __call__(self, work):
        super().__call__(work)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch):
    monkeypatch.setattr(graphed_decoder, "failures", [])
    monkeypatch.setattr(cpu_decoder, "supports", lambda model: False)
    monkeypatch.setattr(devices, "find_recorder", lambda device: Rerun)
    monkeypatch.setattr(Rerun, "made", 0)


# --- shapes ---
def test_few_shapes_of_rows() -> None:
    assert [round_rows(live, 64) for live in range(1, 18)] == [
        1,
        2,
        4,
        4,
        *[8] * 4,
        *[16] * 8,
        24,
    ]
    assert [round_rows(live, 11) for live in (1, 8, 9, 11)] == [1, 8, 11, 11]
    assert [round_rows(live, 3) for live in (1, 2, 3)] == [1, 2, 3]


def test_few_shapes_of_columns() -> None:
    assert sorted({round_columns(longest, 4096) for longest in range(1, 4097)}) == [
        *(128, 256, 384, 512, 640, 768, 896, 1024),
        *(1280, 1536, 1792, 2048, 2560, 3072, 3584, 4096),
    ]
    assert [round_columns(longest, 200) for longest in (1, 128, 129, 200, 300)] == [
        *(128, 128, 200, 200, 200)
    ]
    assert all(longest <= round_columns(longest, 9000) for longest in range(1, 9001))


# --- stepping aside ---
def test_steps_of_the_plain_network_are_recorded() -> None:
    assert supports(build(), make_cache())
    assert supports(build().requires_grad_(True), make_cache())


def test_a_cpu_records_nothing(monkeypatch) -> None:
    assert FIND_RECORDER(torch.device("cpu")) is None
    monkeypatch.setattr(devices, "find_recorder", FIND_RECORDER)
    assert find_decoder(build(), make_cache(), 4, None) is None


class Wrapper(nn.Module):
    """What an adapter does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 2 * self.inner(x)


class Special(torch.Tensor):
    """What a sharded or a quantized weight is."""


def wrap(model: Llama) -> None:
    model.model.layers[0].mlp.down_proj = Wrapper(model.model.layers[0].mlp.down_proj)


def hook(model: Llama) -> None:
    model.model.layers[1].register_forward_hook(lambda *_: None)


def compile_part(model: Llama) -> None:
    model.model.layers[0]._compiled_call_impl = lambda *_: None


def specialise(model: Llama) -> None:
    weight = model.model.norm.weight
    model.model.norm.weight = nn.Parameter(weight.as_subclass(Special), requires_grad=False)


def move(model: Llama) -> None:
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.to("meta"), requires_grad=False)


@pytest.mark.parametrize("change", [wrap, hook, compile_part, specialise, move, Llama.double])
def test_other_networks_step_aside(change) -> None:
    model = build()
    change(model)
    assert not supports(model, make_cache())
    assert find_decoder(model, make_cache(), 4, None) is None


def test_the_environment_turns_it_off(monkeypatch) -> None:
    monkeypatch.setenv("LLAMA2_CUDA_GRAPHS", "0")
    Engine(build(), slots=2, precision="fp32").generate([[5, 6]], GREEDY)
    assert not Rerun.made
    monkeypatch.setenv("LLAMA2_CUDA_GRAPHS", "perhaps")
    with pytest.raises(UserError, match="LLAMA2_CUDA_GRAPHS=perhaps: it says neither yes nor no"):
        supports(build(), make_cache())


def test_only_inference_in_the_types_of_the_weights() -> None:
    graphs = GraphedDecoder(make_cache(), 4, 40, Rerun)
    assert not graphs.takes(4)
    with torch.inference_mode():
        assert graphs.takes(4)
        assert not graphs.takes(5), "these rows may hold what others keep"
        with torch.autocast("cpu", torch.bfloat16):
            assert not graphs.takes(4)


def test_a_hook_between_two_calls_takes_effect() -> None:
    model = build()
    engine = Engine(model, slots=2, precision="fp32")
    before = engine.generate([[5, 6]], GREEDY)
    assert Rerun.made == 1
    handle = model.model.layers[0].mlp.register_forward_hook(lambda module, inputs, out: 30 * out)
    hooked = engine.generate([[5, 6]], GREEDY)
    assert hooked != before
    assert Rerun.made == 1
    handle.remove()
    assert engine.generate([[5, 6]], GREEDY) == before


# --- where it fails ---
def test_a_failure_is_told_once_and_changes_no_answer(monkeypatch, capsys) -> None:
    monkeypatch.setenv("LLAMA2_CUDA_GRAPHS", "0")
    prompts = [[5, 6], [7, 8, 9]]
    expected = Engine(build(), slots=2, precision="fp32").generate(prompts, GREEDY)
    monkeypatch.delenv("LLAMA2_CUDA_GRAPHS")
    monkeypatch.setattr(devices, "find_recorder", lambda device: Failing)
    for _ in range(2):
        engine = Engine(build(), slots=2, precision="fp32")
        for _ in range(2):
            answers = engine.generate(prompts, GREEDY)
            assert [row[0].tokens for row in answers] == [row[0].tokens for row in expected]

    assert Rerun.made == 1
    assert capsys.readouterr().err == (
        "decoding is slower than it could be: its steps cannot be recorded as CUDA graphs "
        "(RuntimeError: operation not permitted when stream is capturing)\n"
    )
    assert not supports(build(), make_cache())


def test_a_recorder_that_cannot_be_made_is_no_fault(monkeypatch, capsys) -> None:
    def refuse():
        raise RuntimeError("no stream")

    monkeypatch.setattr(devices, "find_recorder", lambda device: refuse)
    Engine(build(), slots=2, precision="fp32").generate([[5, 6]], GREEDY)
    assert "(RuntimeError: no stream)" in capsys.readouterr().err


def test_a_graph_that_cannot_be_launched_is_replaced_by_its_work(monkeypatch, capsys) -> None:
    """Nor is any other launched from then on: what failed is the device's."""

    class Stuck(Rerun):
        def __call__(self, work):
            super().__call__(work)
            launches = iter(range(2))

            def launch() -> None:
                if next(launches, None) is None:
                    raise RuntimeError("Offset increment outside graph capture")

                work()

            return launch

    monkeypatch.setenv("LLAMA2_CUDA_GRAPHS", "0")
    expected = Engine(build(), slots=1, precision="fp32").generate([[5, 6]], GREEDY)
    monkeypatch.delenv("LLAMA2_CUDA_GRAPHS")
    other = GraphedDecoder(make_cache(), 4, 40, Rerun)
    for _ in range(EAGER_STEPS + 1):
        decode(other, build())

    monkeypatch.setattr(devices, "find_recorder", lambda device: Stuck)
    answers = Engine(build(), slots=1, precision="fp32").generate([[5, 6]], GREEDY)
    assert answers[0][0].tokens == expected[0][0].tokens
    assert capsys.readouterr().err.count("Offset increment") == 1
    monkeypatch.setattr(other, "_graphs", {(1, 128): lambda: pytest.fail("it was launched")})
    decode(other, build())


# --- graphs come and go ---
def decode(graphs: GraphedDecoder, model: Llama, live: int = 1, longest: int = 1) -> None:
    with torch.inference_mode():
        tokens = torch.full((live,), 5)
        graphs(model, list_tensors(model), tokens, torch.full((live,), longest - 1), longest)


def test_the_least_recently_used_graph_makes_room(monkeypatch) -> None:
    monkeypatch.setattr(graphed_decoder, "MOST_GRAPHS", 2)
    model, graphs = build(), GraphedDecoder(make_cache(), 4, 40, Rerun)
    for rows in (1, 2, 1, 4):
        for _ in range(EAGER_STEPS + 1):
            decode(graphs, model, rows)

    assert list(graphs._graphs) == [(1, 128), (4, 128)]
    assert Rerun.made == 3
    decode(graphs, model, 2)
    assert Rerun.made == 3, "it must be wanted as often again"


def test_weights_at_other_places_are_other_graphs() -> None:
    recorders = []

    def make() -> Rerun:
        recorders.append(Rerun())
        return recorders[-1]

    model, graphs = build(), GraphedDecoder(make_cache(), 4, 40, make)
    for longest in (1, 200):
        for _ in range(EAGER_STEPS + 1):
            decode(graphs, model, longest=longest)

    assert (len(graphs._graphs), len(recorders)) == (2, 1), "graphs share their memory"
    model.model.norm.weight.data = model.model.norm.weight.clone()
    decode(graphs, model)
    assert not graphs._graphs
    for _ in range(EAGER_STEPS):
        decode(graphs, model)

    assert (len(graphs._graphs), len(recorders)) == (1, 2)


# --- the recorder of a GPU ---
class Driver:
    """Stands for torch.cuda, and notes what it is told."""

    def __init__(self, monkeypatch, fails_at: str = "") -> None:
        self.told: list[str] = []
        self.fails_at, self.current = fails_at, "default"
        cuda = torch.cuda
        side = SimpleNamespace(wait_stream=lambda other: self.tell("side waits"))
        default = SimpleNamespace(wait_stream=lambda other: self.tell("default waits"))
        monkeypatch.setattr(devices, "_recording_stream", lambda device: side)
        monkeypatch.setattr(cuda, "get_rng_state", lambda device: torch.zeros(16))
        monkeypatch.setattr(cuda, "current_stream", lambda device: default)
        monkeypatch.setattr(cuda, "graph_pool_handle", lambda: (0, 7))
        monkeypatch.setattr(cuda, "synchronize", lambda: self.tell("waits"))
        monkeypatch.setattr(cuda, "device", lambda device: self.enter("device"))
        monkeypatch.setattr(cuda, "stream", lambda stream: self.enter("side"))
        monkeypatch.setattr(cuda, "CUDAGraph", lambda: self)
        monkeypatch.setattr(
            torch._C, "_cuda_endAllocateToPool", lambda *told: self.tell(f"end pool {told}")
        )
        monkeypatch.setattr(
            torch._C, "_cuda_releasePool", lambda *told: self.tell(f"release pool {told}")
        )

    def tell(self, words: str) -> None:
        self.told.append(words)
        if self.fails_at and words.startswith(self.fails_at):
            raise RuntimeError(f"{words} failed")

    @contextmanager
    def enter(self, name: str):
        before, self.current = self.current, name
        try:
            yield
        finally:
            self.current = before

    def capture_begin(self, pool, capture_error_mode: str) -> None:
        assert not torch.is_inference_mode_enabled()
        self.tell(f"begin {pool} {capture_error_mode}")

    def capture_end(self) -> None:
        self.tell("end")

    def replay(self) -> None:
        self.tell("replay")


def test_work_is_warmed_up_and_recorded_beside_the_stream(monkeypatch) -> None:
    driver = Driver(monkeypatch)

    def work() -> None:
        assert torch.is_inference_mode_enabled()
        driver.tell(f"work in {driver.current}")

    make = FIND_RECORDER(torch.device("cuda", 0))
    assert make is not None
    with torch.inference_mode():
        replay = make()(work)
        replay()

    assert driver.told == [
        "side waits",
        "work in side",
        "waits",
        "begin (0, 7) thread_local",
        "work in side",
        "end",
        "default waits",
        "replay",
    ]


@pytest.mark.parametrize(
    ("fails_at", "last"),
    [
        (
            "begin",
            ["begin (0, 7) thread_local", "end pool (0, (0, 7))", "release pool (0, (0, 7))"],
        ),
        ("end", ["work", "end", "end pool (0, (0, 7))"]),
        ("work", ["side waits", "work"]),
    ],
)
def test_a_recording_that_breaks_off_leaves_the_stream_and_the_allocator(
    monkeypatch, fails_at: str, last: list[str]
) -> None:
    driver = Driver(monkeypatch, fails_at)
    recorder = devices.Recorder(torch.device("cuda", 0))
    with pytest.raises(RuntimeError, match=fails_at):
        recorder(lambda: driver.tell("work"))

    assert driver.told[-len(last) :] == last
    assert driver.current == "default"
    assert not devices._recording.locked()
