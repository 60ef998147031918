"""An open batch: a request's result depends on itself alone, whoever joins, leaves or shares what
was read (fp32)."""

from dataclasses import replace

import pytest
import torch
from test_engine import CONFIG, make_model, prompts

from llama2.generate import session as module
from llama2.generate.engine import Engine
from llama2.generate.generator import Completion
from llama2.generate.request import SampleRequest
from llama2.generate.sampling import Sampling
from llama2.generate.session import Session
from llama2.model.llama import Llama

PLAIN = Sampling(max_tokens=12, seed=7, stop=(3, 4))


@pytest.fixture(scope="module")
def model() -> Llama:
    return make_model()


def engine(model: Llama, slots: int = 4) -> Engine:
    return Engine(model, slots=slots, precision="fp32")


def alone(model: Llama, request: SampleRequest) -> Completion:
    """The same request through `generate`, by itself."""
    row = engine(model).generate(
        [request.prompt], replace(request.sampling, n=request.sample + 1), [request.index]
    )[0]
    return row[request.sample]


def assert_as_alone(model: Llama, requests: list[SampleRequest]) -> None:
    for request in requests:
        expected = alone(model, request)
        assert (tuple(request.tokens), request.finish) == (expected.tokens, expected.finish)
        assert request.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


def finish(session: Session) -> None:
    while not session.idle:
        session.step()

    assert session.running == session.waiting == 0


def serve_twenty(session: Session, ways: list[Sampling]) -> list[SampleRequest]:
    """Requests that come between steps, sampled in these ways in turn."""
    requests = [
        SampleRequest(tuple(prompt), ways[index % len(ways)], index)
        for index, prompt in enumerate(prompts(20))
    ]
    for index, request in enumerate(requests):
        session.submit(request)
        for _ in range(index % 3):
            session.step()

    finish(session)
    return requests


WAYS = [
    PLAIN,
    replace(PLAIN, temperature=0),
    replace(PLAIN, top_p=0.7, seed=3),
    replace(PLAIN, top_k=5, max_tokens=5),
    replace(PLAIN, min_p=0.1),
    replace(PLAIN, presence_penalty=1.5, frequency_penalty=0.5),
    replace(PLAIN, repetition_penalty=1.7, temperature=0.5),
    replace(PLAIN, logit_bias=((5, 8.0), (7, -100.0))),
]


@pytest.mark.parametrize("slots", [1, 3, 16])
def test_requests_that_come_at_any_time_equal_requests_alone(model: Llama, slots: int) -> None:
    assert_as_alone(model, serve_twenty(engine(model, slots).open(), WAYS))


@pytest.mark.parametrize("chunk", [3, 512])
def test_a_prompt_read_in_chunks_equals_a_prompt_read_at_once(
    model: Llama, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", {"cpu": chunk})
    session = engine(model).open()
    running = SampleRequest((5, 6, 7), replace(PLAIN, stop=(), max_tokens=40))
    session.submit(running)
    session.step()
    long = SampleRequest(tuple(prompts(1, seed=4, longest=1)[0] * 30), PLAIN, 1)
    session.submit(long)
    steps = 0

    while not long.tokens:
        session.step()
        steps += 1

    assert (steps > 5) == (chunk == 3)
    assert len(running.tokens) == steps + 1, "a long prompt does not stall the others"
    finish(session)
    assert_as_alone(model, [running, long])


def test_what_was_read_is_not_read_again(model: Llama) -> None:
    session = engine(model).open()
    first = SampleRequest(tuple(range(5, 35)), PLAIN)
    session.submit(first)
    finish(session)
    turn = SampleRequest((*first.prompt, *first.tokens, 50, 51), PLAIN, 1)
    same = SampleRequest(first.prompt, PLAIN, 2)
    other = SampleRequest((90, *first.prompt), PLAIN, 3)

    for request in (turn, same, other):
        session.submit(request)

    finish(session)
    assert (first.cached, turn.cached, same.cached, other.cached) == (
        0,
        29 + len(first.tokens),
        29,
        0,
    )
    assert_as_alone(model, [first, turn, same, other])


def test_samples_of_one_prompt_share_its_reading(model: Llama) -> None:
    session = engine(model, 8).open()
    requests = [
        SampleRequest(tuple(range(5, 30)), replace(PLAIN, n=6), 0, sample) for sample in range(6)
    ]
    for request in requests:
        session.submit(request)

    finish(session)
    assert [request.cached for request in requests] == [0] + [25] * 5
    assert_as_alone(model, requests)


def test_kept_rows_are_given_up_in_the_order_of_their_use(model: Llama) -> None:
    session = engine(model, 1).open(kept=2)
    talks = [tuple(range(start, start + 20)) for start in (5, 30, 60)]
    for talk in (talks[0], talks[1], talks[0], talks[2], talks[0], talks[1]):
        session.submit(SampleRequest(talk, PLAIN))
        finish(session)

    again = [SampleRequest(talk, PLAIN) for talk in (talks[1], talks[0], talks[2])]
    for request in again:
        session.submit(request)
        finish(session)

    assert [request.cached > 0 for request in again] == [True, True, False]
    assert_as_alone(model, again)


def test_a_cancelled_request_frees_its_slot_and_disturbs_nobody(model: Llama) -> None:
    session = engine(model, 2).open()
    requests = [
        SampleRequest(tuple(prompt), replace(PLAIN, stop=()), index)
        for index, prompt in enumerate(prompts(5))
    ]
    for request in requests:
        session.submit(request)

    session.step()
    session.cancel(requests[0])  # running
    session.cancel(requests[4])  # waiting
    session.cancel(requests[4])
    finish(session)
    assert [request.finish for request in requests] == [
        "cancelled",
        "length",
        "length",
        "length",
        "cancelled",
    ]
    assert len(requests[0].tokens) == 1
    assert_as_alone(model, requests[1:4])


def test_a_prompt_cancelled_while_it_is_read(model: Llama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", {"cpu": 4})
    session = engine(model, 3).open()
    twins = [SampleRequest(tuple(range(5, 30)), PLAIN, 0, sample) for sample in range(2)]

    for request in twins:
        session.submit(request)

    session.step()
    session.cancel(twins[0])
    finish(session)
    assert twins[0].tokens == []
    assert_as_alone(model, twins[1:])


def test_a_prompt_that_nobody_waits_for_any_more_leaves_no_slot(
    model: Llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK_TOKENS", {"cpu": 4})
    session = engine(model, 3).open()
    twins = [SampleRequest(tuple(range(5, 30)), PLAIN, 0, sample) for sample in range(2)]
    for request in twins:
        session.submit(request)

    for request in twins:
        session.step()
        session.cancel(request)

    assert session.running == 0
    assert session.idle


def test_alternatives_hold_the_likeliest_tokens(model: Llama) -> None:
    session = engine(model).open()
    request = SampleRequest((5, 6, 7), replace(PLAIN, top_logprobs=4, temperature=0))
    session.submit(request)
    session.submit(SampleRequest((8, 9), PLAIN, 1))
    finish(session)
    assert len(request.alternatives) == len(request.tokens)

    for token, logprob, found in zip(
        request.tokens, request.logprobs, request.alternatives, strict=True
    ):
        assert len(found) == 4
        assert found[0][0] == token, "greedy takes the likeliest"
        assert found[0][1] == pytest.approx(logprob, abs=1e-5)
        assert [value for _, value in found] == sorted((value for _, value in found), reverse=True)


class Only:
    """Lets through three tokens in turn, then token 3, which ends the answer."""

    def __init__(self) -> None:
        self.seen: list[int] = []

    def mask(self) -> torch.Tensor:
        allowed = torch.zeros(CONFIG.vocab_size, dtype=torch.bool)
        allowed[{0: [10, 11], 1: [20], 2: [30, 31, 32]}.get(len(self.seen), [3])] = True
        return allowed

    def accept(self, token: int) -> None:
        self.seen.append(token)

    def fresh(self) -> "Only":
        return Only()


def test_a_grammar_decides_what_may_follow(model: Llama) -> None:
    results = engine(model).generate(prompts(3), replace(PLAIN, n=4, grammar=Only()))
    session = engine(model).open()
    requests = [
        SampleRequest(tuple(prompts(3)[0]), replace(PLAIN, grammar=Only()), 0, sample)
        for sample in range(2)
    ]

    for request in [*requests, SampleRequest((5, 6), PLAIN, 5)]:
        session.submit(request)

    finish(session)
    for tokens in [each.tokens for row in results for each in row] + [
        tuple(request.tokens) for request in requests
    ]:
        assert len(tokens) == 4
        assert (tokens[0] in (10, 11), tokens[1], tokens[2] in (30, 31, 32), tokens[3]) == (
            True,
            20,
            True,
            3,
        )

    assert [tuple(request.tokens) for request in requests] == [
        each.tokens for each in results[0][:2]
    ]


def test_memory_in_use_is_reported(model: Llama) -> None:
    session = engine(model, 2).open()
    for index in range(3):
        session.submit(SampleRequest(tuple(range(5, 25)), replace(PLAIN, stop=()), index))

    assert (session.waiting, session.running, session.cached_tokens) == (3, 0, 0)
    session.step()
    assert (session.waiting, session.running) == (1, 2)
    assert session.cached_tokens == 42
    finish(session)
    assert session.cached_tokens > 0


def test_all_rows_may_end_in_the_same_step(model: Llama) -> None:
    session = engine(model).open()
    together = [
        SampleRequest(tuple(prompts(1)[0]), replace(PLAIN, max_tokens=3, stop=()), 0, sample)
        for sample in range(3)
    ]
    for request in together:
        session.submit(request)

    finish(session)
    last = SampleRequest(tuple(prompts(2)[1]), PLAIN, 1)
    session.submit(last)
    finish(session)
    assert_as_alone(model, [*together, last])
