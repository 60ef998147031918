"""The engine over a network: the completions of here, whatever the server does, and none asked for
twice."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
from completions_server import serving

from llama2.errors import UserError
from llama2.formats import checkpoint
from llama2.generate.completions_api import _is_loopback, _read_message
from llama2.generate.engine import Engine
from llama2.generate.remote import RemoteEngine, Server, connect
from llama2.generate.sampling import Sampling

PROMPTS = [[1, 300 + 7 * row, *range(340 + row, 350 + 5 * row)] for row in range(6)]
GREEDY = Sampling(temperature=0, max_tokens=3, stop=(2,))
RANDOM = Sampling(max_tokens=9, n=2, stop=(2,), seed=5)


@pytest.fixture(scope="module")
def engine(policy):
    return Engine(checkpoint.load(policy).eval(), precision="fp32")


@pytest.fixture
def server(engine, tokenizer):
    with serving(engine, tokenizer) as state:
        yield state


@pytest.fixture
def remote(server, tokenizer, tmp_path):
    def make(**settings):
        settings = {"context": 256, "pause": 0.01, "state": tmp_path / "journal", **settings}
        return RemoteEngine(server.url, "tiny", tokenizer=tokenizer, **settings)

    return make


def tokens(rows):
    return [[(one.tokens, one.finish) for one in row] for row in rows]


@pytest.fixture
def proxy(monkeypatch):
    """An environment that names proxies, as networks of companies do; nothing listens there."""

    def name(**proxies):
        for each in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"):
            monkeypatch.delenv(each, raising=False)
            monkeypatch.delenv(each.lower(), raising=False)

        for each, value in proxies.items():
            monkeypatch.setenv(each, value)

    return name


@pytest.mark.parametrize(
    "proxies",
    [
        {"HTTP_PROXY": "http://127.0.0.1:9"},
        {"ALL_PROXY": "socks5://127.0.0.1:9"},
        {"http_proxy": "nonsense://x"},
    ],
)
def test_a_server_of_this_machine_is_reached_without_a_proxy(proxies, proxy, remote, engine):
    proxy(**proxies)
    there = remote(retries=0)
    assert tokens(there.generate(PROMPTS[:1], GREEDY)) == tokens(
        engine.generate(PROMPTS[:1], GREEDY)
    )


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("127.9.0.1", True),
        ("::1", True),
        ("localhost.", True),
        ("10.0.0.1", False),
        ("localhost.example.org", False),
        ("::2", False),
        ("example.org", False),
    ],
)
def test_what_is_this_machine(host, expected):
    assert _is_loopback(host) is expected


def test_a_proxy_that_cannot_be_used_is_named(proxy, tokenizer, tmp_path):
    proxy(ALL_PROXY="nonsense://x")
    there = RemoteEngine(
        "http://far.invalid:1", "tiny", tokenizer=tokenizer, context=256, state=tmp_path, retries=0
    )
    with pytest.raises(
        UserError, match=r"http://far.invalid:1: the proxy .* cannot be used: .*nonsense.*ALL_PROXY"
    ):
        there.list_models()


def test_an_address_that_is_none_is_named(tokenizer, tmp_path):
    there = RemoteEngine(
        "http://x:abc", "tiny", tokenizer=tokenizer, context=256, state=tmp_path, retries=0
    )
    with pytest.raises(
        UserError, match=r"http://x:abc: this is not the address .*write http://HOST:PORT"
    ):
        there.list_models()


def test_greedy_completions_are_those_of_the_engine_here(remote, engine):
    here, there = engine.generate(PROMPTS, GREEDY), remote().generate(PROMPTS, GREEDY)
    assert tokens(there) == tokens(here)
    assert [one.prompt for row in there for one in row] == [tuple(prompt) for prompt in PROMPTS]
    assert {one.finish for row in here for one in row} == {"stop", "length"}

    for mine, its in zip(
        (one for row in there for one in row), (one for row in here for one in row)
    ):
        assert mine.logprobs == pytest.approx(its.logprobs, abs=1e-5)

    assert list(remote().stream(PROMPTS[0], GREEDY)) == list(here[0][0].tokens)


def test_samples_of_a_share_are_those_of_the_whole(remote, server):
    whole = remote(state=None).generate(PROMPTS, RANDOM)
    assert len({body["seed"] for body in server.asked}) == len(PROMPTS) * RANDOM.n
    assert any(first.tokens != second.tokens for first, second in whole)
    share = remote(state=None).generate(PROMPTS[1::2], RANDOM, range(1, 6, 2))
    assert tokens(share) == tokens(whole[1::2])


@pytest.mark.parametrize("misdeed", ["busy", "broken", "garbage", "empty", "aborted", "dropped"])
def test_a_request_that_fails_is_repeated(remote, server, engine, misdeed):
    server.plan.extend([misdeed] * 7)
    begin = time.monotonic()
    assert tokens(remote().generate(PROMPTS, GREEDY)) == tokens(engine.generate(PROMPTS, GREEDY))
    assert len(server.asked) == len(PROMPTS) + 7
    assert set(server.answered.values()) == {1}

    if misdeed == "busy":
        assert time.monotonic() - begin > 0.3  # as Retry-After wanted


def test_a_slow_answer_is_given_up_and_asked_for_again(remote, server, engine):
    server.plan.extend(["slow", "", "slow"])
    assert tokens(remote(timeout=3.0).generate(PROMPTS, GREEDY)) == tokens(
        engine.generate(PROMPTS, GREEDY)
    )
    assert len(server.asked) == len(PROMPTS) + 2


def test_one_that_always_fails_takes_no_other_with_it(remote, server, engine):
    server.poisoned = tuple(PROMPTS[2])
    with pytest.raises(
        UserError, match="2 of 12 completions failed, of 1 prompts; the first is number 3"
    ) as error:
        remote(retries=2).generate(PROMPTS, RANDOM)

    assert "HTTP 500: this one never (2)" in str(error.value)
    assert "the 10 that are finished will not be asked for again" in str(error.value)
    assert sum(body["prompt"] == PROMPTS[2] for body in server.asked) == 2 * 3
    server.poisoned = None
    asked = len(server.asked)
    rows = remote().generate(PROMPTS, RANDOM)
    assert [body["prompt"] for body in server.asked[asked:]] == [PROMPTS[2]] * 2
    assert tokens(rows) == tokens(remote(state=None).generate(PROMPTS, RANDOM))


def test_a_killed_job_goes_on_where_it_was(remote, server, tmp_path):
    whole = remote(state=None).generate(PROMPTS, RANDOM)
    server.answered.clear()

    class Killed(BaseException):
        pass

    def die(done, total):
        assert total == 12
        if done == 5:
            raise Killed

    with pytest.raises(Killed):
        remote(concurrency=1, progress=die).generate(PROMPTS, RANDOM)

    file = tmp_path / "journal/0.jsonl"
    assert len(file.read_bytes().splitlines()) == 5
    with open(file, "ab") as cut:  # the kill came in the middle of a line
        cut.write(b'{"key":"0123","tokens":[4,')

    seen = []
    rows = remote(progress=lambda done, total: seen.append((done, total))).generate(PROMPTS, RANDOM)
    assert rows == whole
    assert seen == [(done, 12) for done in range(6, 13)]
    assert set(server.answered.values()) == {1}
    assert sum(server.answered.values()) == 12
    asked = len(server.asked)
    lines = file.read_bytes().splitlines(keepends=True)
    # the disk errs
    file.write_bytes(b"".join([lines[0].replace(b'"tokens":[', b'"tokens":[7', 1), *lines[1:]]))
    assert remote().generate(PROMPTS, RANDOM) == whole
    assert len(server.asked) == asked + 1
    asked = len(server.asked)
    assert remote().generate(PROMPTS, RANDOM) == whole
    assert remote().generate(PROMPTS[1:2], RANDOM, [1]) == whole[1:2]
    assert len(server.asked) == asked
    (file.rename(file.with_name("7.jsonl")))  # written by another rank
    assert remote().generate(PROMPTS, RANDOM) == whole
    assert len(server.asked) == asked
    remote().generate(PROMPTS[:1], Sampling(max_tokens=9, seed=6))  # something else is asked for
    assert len(server.asked) == asked + 1


def test_what_a_filter_keeps_back_is_not_asked_for_again(remote, server):
    server.plan.append("filtered")
    with pytest.raises(UserError, match=r"1 of 6 completions failed.* is 'content_filter'"):
        remote().generate(PROMPTS, GREEDY)

    assert len(server.asked) == 6


def test_a_server_that_is_gone_is_not_asked_for_every_prompt(remote, server):
    server.plan.extend(["broken"] * 1000)
    with pytest.raises(UserError, match="100 of 100 completions failed") as error:
        remote(retries=0, concurrency=4).generate([PROMPTS[0]] * 100, GREEDY)

    assert "HTTP 500: oh no" in str(error.value)
    assert "not sent" in str(error.value)
    assert len(server.asked) < 40


def test_requests_under_way_are_bounded(remote, server):
    server.delay = 0.05
    remote(concurrency=3).generate(PROMPTS, RANDOM)
    assert server.most_at_once == 3


def test_ids_may_come_as_names_of_tokens(remote, server, engine):
    server.ids = "names"
    assert tokens(remote().generate(PROMPTS, GREEDY)) == tokens(engine.generate(PROMPTS, GREEDY))


def test_the_stop_id_may_be_left_out(remote, server, engine):
    server.stop_id = False
    rows = remote().generate(PROMPTS, GREEDY)
    assert tokens(rows) == tokens(engine.generate(PROMPTS, GREEDY))
    ended = next(one for row in rows for one in row if one.finish == "stop")
    assert math.isnan(ended.logprobs[-1])
    assert not any(map(math.isnan, ended.logprobs[:-1]))
    assert len(ended.logprobs) == len(ended.tokens)


def test_text_alone_is_encoded_again(remote, server, engine, tokenizer):
    server.ids = "no"
    here = engine.generate(PROMPTS, GREEDY)
    for _ in range(2):  # the second time from the journal
        for (mine,), (its,) in zip(remote().generate(PROMPTS, GREEDY), here):
            assert tokenizer.decode(mine.tokens) == tokenizer.decode(its.tokens)
            assert mine.finish == its.finish
            assert all(map(math.isnan, mine.logprobs))
            assert len(mine.logprobs) == len(mine.tokens)

    assert len(server.asked) == len(PROMPTS)
    assert tokenizer.decode(remote().stream(PROMPTS[0], GREEDY)) == tokenizer.decode(
        here[0][0].tokens
    )


def test_a_field_that_is_refused_is_left_out(remote, server, engine):
    server.unknown = ("stop_token_ids", "return_tokens_as_token_ids")
    there = remote()
    assert tokens(there.generate(PROMPTS, GREEDY)) == tokens(engine.generate(PROMPTS, GREEDY))
    asked = len(server.asked)
    there.generate(PROMPTS, RANDOM)
    assert len(server.asked) == asked + 12
    assert list(remote().stream(PROMPTS[0], GREEDY)) == list(engine.stream(PROMPTS[0], GREEDY))


def test_what_every_request_would_meet_is_an_error_at_once(remote, server, tokenizer):
    server.key = "secret"
    with pytest.raises(UserError, match="HTTP 401: wrong key"):
        remote().generate(PROMPTS, RANDOM)

    with pytest.raises(UserError, match="HTTP 401: wrong key"):
        list(remote().stream(PROMPTS[0], RANDOM))

    assert remote(key="secret").generate(PROMPTS[:1], GREEDY)
    small = RemoteEngine(server.url, "tiny", tokenizer=tokenizer, context=8)
    for prompts, said in (
        ([[]], "empty"),
        ([[1] * 8], "8 tokens, 1 more than leave room"),
        ([[1], [1, 99999]], "prompt 2 of 2 has token ids"),
    ):
        with pytest.raises(UserError, match=said):
            small.generate(prompts, GREEDY)

    with pytest.raises(UserError, match="grammar"):
        remote().generate(PROMPTS, Sampling(grammar=object()))  # type: ignore[arg-type]


def test_connecting(server, tokenizer, monkeypatch):
    engine = connect(Server(url=server.url + "/v1/"), tokenizer, 1000)
    assert (engine.url, engine.model, engine.context) == (server.url, "tiny", 256)
    assert connect(Server(url=server.url, model="tiny"), tokenizer, 100).context == 100

    with pytest.raises(UserError, match="does not serve 'tinny'; did you mean 'tiny'"):
        connect(Server(url=server.url, model="tinny"), tokenizer, 100)

    with pytest.raises(UserError, match="SERVER_KEY is not set"):
        connect(Server(url=server.url, key_env="SERVER_KEY"), tokenizer, 100)

    monkeypatch.setenv("SERVER_KEY", "secret")
    server.key = "secret"
    assert connect(Server(url=server.url, key_env="SERVER_KEY"), tokenizer, 256).generate(
        PROMPTS[:1], GREEDY
    )

    with pytest.raises(UserError, match="connection"):
        connect(Server(url="http://127.0.0.1:9", retries=0), tokenizer, 100)


def test_a_server_takes_no_weights(remote, server):
    with pytest.raises(UserError, match="cannot take new weights"):
        remote().update(None)


def test_a_model_with_other_tokens_is_refused(remote, server):
    remote_engine = remote()
    server._choice = lambda body: {"text": "", "finish_reason": "stop", "token_ids": [31999]}
    with pytest.raises(UserError, match="token ids outside of our 420"):
        remote_engine.generate(PROMPTS, GREEDY)


def test_a_server_ends_answers_where_the_sampling_says(remote, server, tokenizer):
    """A server stops at all ends of its model, which are not all asked for here."""
    several = tokenizer.with_chat_template(None)
    several.stops = (tokenizer.eos, 300)
    for stop, ignored in (((2,), True), ((2, 300), False), ((300, 2, 5), False), ((), True)):
        asking = remote(state=None)
        asking.tokenizer = several
        asking.generate(PROMPTS[:1], replace(GREEDY, stop=stop))
        assert server.asked[-1].get("ignore_eos", False) is ignored
        assert server.asked[-1]["stop_token_ids"] == list(stop)


def test_what_a_server_says_in_json_that_is_nested_without_end_is_told_as_text():
    text = '{"error": ' + "[" * 100_000
    assert _read_message(text) == text[:200]
    assert _read_message('{"error": {"message": "no \\u001b[2J\\nroom"}}') == "no \x1b[2J room"
