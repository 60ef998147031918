"""Steps that are recorded as graphs give the samples of steps that are not, and harm no row of the
cache. On a CPU a tape of PyTorch's operations stands for the graph: it does them again on the same
tensors, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_engine import CONFIG, PLAIN, assert_same, make_model, prompts
from test_session import finish, serve_twenty
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llama2 import devices
from llama2.generate import cpu_decoder, graphed_decoder
from llama2.generate.engine import Engine
from llama2.generate.graphed_decoder import COLUMNS, EAGER_STEPS, GraphedDecoder, list_tensors
from llama2.generate.request import SampleRequest
from llama2.kernels import fused, install, modules
from llama2.model.cache import KVCache
from llama2.model.llama import Llama
from llama2.model.positions import rotary_tables, rotate
from llama2.model.rope import RopeScaling

GREEDY = replace(PLAIN, temperature=0)
LONG = replace(PLAIN, max_tokens=40)


class Tape(TorchDispatchMode):
    """Operations, with the tensors that they read and made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        made = function(*args, **(kwargs or {}))
        self.calls.append((function, args, kwargs or {}, made))
        return made

    def play(self) -> None:
        """Do them again: what each made goes where it was."""
        for function, args, kwargs, made in self.calls:
            for old, new in zip(tree_leaves(made), tree_leaves(function(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorder:
    """In the place of a GPU's."""

    made = 0
    played = 0

    def __call__(self, work: devices.Work) -> devices.Work:
        work()
        tape = Tape()
        with tape:
            work()

        Recorder.made += 1

        def play() -> None:
            Recorder.played += 1
            tape.play()

        return play


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No code but PyTorch's, which a tape sees."""
    monkeypatch.setattr(cpu_decoder, "supports", lambda model: False)
    monkeypatch.setattr(fused, "supports", lambda x: False)
    monkeypatch.setattr(modules, "is_decoding", lambda x: x.shape[1] == 1)
    monkeypatch.setattr(devices, "find_recorder", lambda device: Recorder)
    monkeypatch.setattr(graphed_decoder, "failures", [])
    monkeypatch.setattr(Recorder, "made", 0)
    monkeypatch.setattr(Recorder, "played", 0)


@pytest.fixture
def plainly(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Call something while steps may not be recorded."""

    def call(function: Callable[..., Any], *args: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setenv("LLAMA2_CUDA_GRAPHS", "0")
            made = Recorder.made, Recorder.played
            result = function(*args)
            assert (Recorder.made, Recorder.played) == made
            return result

    return call


@pytest.fixture(scope="module")
def model() -> Llama:
    return make_model()


def engine(model: Llama, slots: int = 4) -> Engine:
    return Engine(model, slots=slots, precision="fp32")


@pytest.mark.parametrize("slots", [1, 3, 7, 64])
@pytest.mark.parametrize(
    "sampling",
    [
        replace(GREEDY, max_tokens=40),
        LONG,
        replace(LONG, n=3, stop=tuple(range(3, 9))),
        replace(LONG, top_p=0.8, presence_penalty=0.5, max_tokens=20),
    ],
    ids=["greedy", "drawn", "shared prompts that stop", "penalties"],
)
def test_samples_are_those_of_plain_steps(model: Llama, plainly, slots: int, sampling) -> None:
    """Ragged prompts, rows that end, slots that are filled again."""
    expected = plainly(engine(model, slots).generate, prompts(11), sampling)
    used = engine(model, slots)
    assert_same(used.generate(prompts(11), sampling), expected)
    assert Recorder.played > 10
    assert_same(used.generate(prompts(11), sampling), expected)


def test_when_a_step_is_recorded_does_not_matter(model: Llama) -> None:
    """To the bit: steps that are not recorded have the same shapes."""
    used = engine(model)
    first = used.generate(prompts(5), LONG)
    made = Recorder.made
    assert made
    assert used.generate(prompts(5), LONG) == first
    assert engine(model).generate(prompts(5), LONG) == first


def test_a_shape_is_recorded_when_it_was_wanted_often_enough(model: Llama) -> None:
    used = engine(model, 1)
    used.generate([[5, 6]], replace(LONG, max_tokens=EAGER_STEPS + 1))
    assert (Recorder.made, Recorder.played) == (0, 0)
    used.generate([[5, 6]], replace(LONG, max_tokens=4))
    assert (Recorder.made, Recorder.played) == (1, 3), "graphs outlive a call, as the cache does"
    list(used.stream([5, 6], replace(LONG, max_tokens=4)))
    assert (Recorder.made, Recorder.played) == (1, 6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("frozen", [True, False])
def test_graphs_read_the_weights_of_the_moment(plainly, precision, frozen) -> None:
    """Values changed in place, with the graphs of before; then weights at other places."""
    model, other = make_model(3).requires_grad_(not frozen), make_model(4)
    used = Engine(model, slots=4, precision=precision)
    used.generate(prompts(4), LONG)
    made = Recorder.made

    with torch.no_grad():
        for own, new in zip(model.parameters(), other.parameters()):
            own.copy_(new)

    after = used.generate(prompts(4), LONG)
    assert Recorder.made == made
    plain = Engine(other, slots=4, precision=precision)
    if precision == "fp32":
        assert_same(after, plainly(plain.generate, prompts(4), LONG))

    third = make_model(5)
    for own, new in zip(model.parameters(), third.parameters()):
        own.data = new.data.clone()

    moved = used.generate(prompts(4), LONG)
    assert (Recorder.made > made) == (precision == "fp32"), "a copy stays where it is"
    used.update(make_model(5))
    assert used.generate(prompts(4), LONG) == moved
    if precision == "fp32":
        assert_same(moved, plainly(engine(third).generate, prompts(4), LONG))


def test_weights_moved_within_a_call_are_noticed(model: Llama, plainly) -> None:
    """A stream goes on with what the model is by then, as without graphs."""

    def draw() -> list[int]:
        model = make_model(3).requires_grad_(False)
        stream = engine(model, 1).stream([5, 6, 7], LONG)
        tokens = [next(stream) for _ in range(EAGER_STEPS + 6)]
        for own, new in zip(model.parameters(), make_model(4).parameters()):
            own.data = new.data.clone()

        return [*tokens, *stream]

    assert draw() == plainly(draw)
    assert Recorder.made == 2


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_fewer_kernels_compute_the_same(monkeypatch, kv_heads: int) -> None:
    """Norms in one, queries and keys rotated together."""
    model = make_model(config=replace(CONFIG, num_key_value_heads=kv_heads))
    fewer = engine(model).generate(prompts(5), LONG)
    calls = []
    monkeypatch.setattr(modules, "is_decoding", lambda x: bool(calls.append(x)))
    assert_same(fewer, engine(model).generate(prompts(5), LONG))
    assert calls


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_queries_and_keys_are_rotated_to_the_bit(kind: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    q, k = (torch.randn(3, 1, heads, 16, generator=random).to(kind) for heads in (6, 2))
    tables = rotary_tables(torch.tensor([[3], [70], [900]]), 16, 1e4)
    together = modules.rotate_together(q, k, *tables)
    assert torch.equal(together[0], rotate(q, *tables))
    assert torch.equal(together[1], rotate(k, *tables))


def decode(graphs: GraphedDecoder, model: Llama, positions: list[int]) -> torch.Tensor:
    tokens = torch.arange(3, 3 + len(positions))
    with torch.inference_mode():
        return graphs(
            model, list_tensors(model), tokens, torch.tensor(positions), max(positions) + 1
        ).clone()


def make_cache(slots: int, capacity: int = CONFIG.max_position_embeddings) -> KVCache:
    cache = KVCache(
        CONFIG.num_hidden_layers,
        slots,
        CONFIG.num_key_value_heads,
        capacity,
        CONFIG.head_dim,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.data_LPNCKD.normal_(generator=torch.Generator().manual_seed(0))
    return cache


@pytest.mark.parametrize("recorded", [False, True])
def test_padding_writes_to_the_last_column_alone(model: Llama, recorded: bool) -> None:
    cache = make_cache(12)
    graphs = GraphedDecoder(cache, 8, CONFIG.vocab_size, Recorder)
    for _ in range((EAGER_STEPS + 1) * recorded):
        decode(graphs, model, [1, 2, 3, 4, 5, 6])

    assert Recorder.made == recorded
    before = cache.data_LPNCKD.clone()
    decode(graphs, model, [7, 12, 9, 14, 30])
    changed_NC = (cache.data_LPNCKD != before).any(0).any(0).any(-1).any(-1)
    live = {(row, column) for row, column in enumerate([7, 12, 9, 14, 30])}
    padded = {(row, cache.capacity - 1) for row in (5, 6, 7)}
    assert set(map(tuple, changed_NC.nonzero().tolist())) <= live | padded
    assert live <= set(map(tuple, changed_NC.nonzero().tolist()))


def test_wider_steps_give_the_logits_of_exact_ones(model: Llama) -> None:
    """Masked columns have weight 0, and rows do not see one another."""
    capacity = 2 * COLUMNS
    cache, exact = make_cache(8, capacity), make_cache(8, capacity)
    graphs = GraphedDecoder(cache, 8, CONFIG.vocab_size, Recorder)
    for step in range(EAGER_STEPS + 4):
        positions = [step, 20 + step, 40, 11]
        with torch.inference_mode():
            exact.decode(torch.tensor(positions), max(positions) + 1)
            expected = model(
                torch.arange(3, 7)[:, None],
                positions_BT=torch.tensor(positions)[:, None],
                cache=exact,
            )[:, 0]

        torch.testing.assert_close(decode(graphs, model, positions), expected, rtol=1e-5, atol=1e-5)

    assert Recorder.made == 1


def test_rows_keep_their_own_whatever_ran_before(model: Llama) -> None:
    """Fewer rows, then more: nothing stays of the tokens of before."""
    graphs = GraphedDecoder(make_cache(8), 8, CONFIG.vocab_size, Recorder)
    first = decode(graphs, model, [5, 6, 7, 8, 9])
    for positions in ([5], [5, 6, 7, 8, 9, 10, 11, 12], [5, 6], [5, 6, 7, 8, 9]):
        logits = decode(graphs, model, positions)

    torch.testing.assert_close(logits, first, rtol=1e-5, atol=1e-5)


def test_kept_prefixes_are_not_written_to(model: Llama, plainly) -> None:
    """Even one that fills its row to the last token that is read."""
    used = engine(model, 3)
    session = used.open(kept=6)
    whole = SampleRequest(tuple(prompts(1, longest=1)[0] * 40), replace(GREEDY, max_tokens=99))
    session.submit(whole)
    finish(session)
    assert len(whole.read_tokens) == CONFIG.max_position_embeddings - 1
    cache = session._slots.runner.cache
    kept = cache.data_LPNCKD[:, :, 3:, :-1].clone()
    requests = [
        SampleRequest(tuple(prompt), replace(LONG, stop=()), index)
        for index, prompt in enumerate(prompts(5, longest=8))
    ]

    for request in requests:
        session.submit(request)
        session.step()

    while session.running == 3:
        session.step()

    kept_rows = session._prefixes._kept
    row = next(row for row, tokens in kept_rows.items() if tokens == whole.read_tokens)
    assert torch.equal(cache.data_LPNCKD[:, :, row, :-1], kept[:, :, row - 3])
    finish(session)
    assert Recorder.played
    again = SampleRequest((*whole.read_tokens[:50], 7), LONG, 9)
    session.submit(again)
    finish(session)
    assert again.cached == 50
    (alone,) = plainly(engine(model).generate, [again.prompt], LONG, [9])
    assert (tuple(again.tokens), again.finish) == (alone[0].tokens, alone[0].finish)


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_a_session_answers_as_plain_steps_do(model: Llama, plainly, slots: int) -> None:
    ways = [LONG, replace(GREEDY, max_tokens=30), replace(LONG, top_p=0.7)]

    def serve() -> list[SampleRequest]:
        return serve_twenty(engine(model, slots).open(), ways)

    for request, expected in zip(serve(), plainly(serve)):
        assert (request.tokens, request.finish) == (expected.tokens, expected.finish)
        assert request.logprobs == pytest.approx(expected.logprobs, abs=1e-5)

    assert Recorder.played


SCALINGS = [
    None,
    RopeScaling("linear", 2.0),
    RopeScaling("dynamic", 2.0, 32),
    RopeScaling("llama3", 2.0, 32),
    RopeScaling("yarn", 2.0, 32),
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda s: s.rope_type if s else "none")
@pytest.mark.parametrize("biased", [False, True])
def test_a_step_neither_waits_nor_reads_from_the_host(
    monkeypatch: pytest.MonkeyPatch, scaling, biased: bool
) -> None:
    """What a GPU cannot record: every tensor is made on the device, and none is asked for its
    value."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # meta has none
    shape = replace(CONFIG, rope_scaling=scaling, attention_bias=biased, tie_word_embeddings=biased)
    with torch.device("meta"):
        model = install(Llama(shape))
        cache = KVCache(2, 4, 2, 64, 8, dtype=torch.float32, device=torch.device("meta"))
        graphs = GraphedDecoder(cache, 4, shape.vocab_size, Recorder)

    tape = Tape()
    with torch.inference_mode(), tape:
        graphs._step(model, 4, 64)

    assert len(tape.calls) > 50
    for function, _, _, made in tape.calls:
        assert all(one.device.type == "meta" for one in tree_leaves(made)), function
        assert "_local_scalar_dense" not in str(function)
        assert "nonzero" not in str(function)


@pytest.mark.parametrize("scaling", SCALINGS[1:], ids=lambda s: s.rope_type)
def test_scaled_positions_are_recorded_too(plainly, scaling: RopeScaling) -> None:
    model = make_model(config=replace(CONFIG, rope_scaling=scaling))
    used = replace(GREEDY, max_tokens=44, stop=())
    expected = plainly(engine(model).generate, prompts(4), used)
    assert_same(engine(model).generate(prompts(4), used), expected)
    assert Recorder.played > 20
