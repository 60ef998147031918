"""A server among clients that vanish, crowd, send nonsense, and an operator who stops it."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from servers import paced, serving, wait_for

ROOT = Path(__file__).parents[2]
ASK = [{"role": "user", "content": "Name a colour."}]
LONG = {"messages": ASK, "max_tokens": 200, "logit_bias": {"2": -100}}


@pytest.fixture(scope="module")
def served(policy, scorers):
    with serving(policy, scorers[0], slots=4, limits={"waiting": 8}) as running:
        yield running


@pytest.fixture
def slow(served, monkeypatch):
    """Every step takes a while, so that there is time to do something during an answer."""
    step = served.worker._session.step
    monkeypatch.setattr(served.worker._session, "step", lambda: (time.sleep(0.01), step())[1])


@pytest.fixture
def pace(served, monkeypatch):
    yield from paced(served, monkeypatch)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_frees_its_slot(served, pace, stream):
    body = json.dumps({**LONG, "stream": stream, "n": 4}).encode()
    with socket.create_connection(served.address, 60) as link:
        link.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        wait_for(lambda: served.worker.admitted == 4)
        assert not stream or link.recv(100).startswith(b"HTTP/1.1 200 ")

    wait_for(lambda: served.worker.admitted == 0)
    pace.go_on()
    wait_for(lambda: served.worker._session.running == 0)
    assert pace.taken <= pace.STEPS + 1  # the answer would take two hundred
    assert served.post("chat/completions", messages=ASK, max_tokens=2).status_code == 200


def test_ten_times_too_many_are_told_to_come_back(served, slow):
    async def crowd():
        async with httpx.AsyncClient(
            timeout=60, limits=httpx.Limits(max_connections=200)
        ) as client:
            asked = {**LONG, "max_tokens": 10}
            return await asyncio.gather(
                *(client.post(f"{served.url}/v1/chat/completions", json=asked) for _ in range(120))
            )

    answers = asyncio.run(crowd())
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= 12
    refused = next(answer for answer in answers if answer.status_code == 429)
    assert int(refused.headers["Retry-After"]) >= 1
    assert refused.json()["error"]["code"] == "overloaded"
    assert served.post("chat/completions", messages=ASK, max_tokens=2).status_code == 200
    assert served.worker.admitted == 0


@pytest.fixture(scope="module")
def brief(policy, scorers):
    """Answers are short, so that many can be asked for."""
    with serving(policy, scorers[0], slots=4, capacity=40, limits={"waiting": 8}) as running:
        yield running


def test_requests_made_from_the_schema(brief):
    """Whatever the OpenAPI document allows, and things near it, is answered or refused, never
    fatal."""
    served = brief
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library's own
        import schemathesis

    document = httpx.get(f"{served.url}/openapi.json").json()
    seen = []
    for found in schemathesis.openapi.from_dict(document).get_all_operations():
        operation = found.ok()

        @settings(
            max_examples=40,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy())
        def answered(case):
            arguments = case.as_transport_kwargs(base_url=served.url)
            arguments.pop("cookies", None)
            answer = client.request(**arguments)
            assert answer.status_code < 500 or answer.status_code == 503, (arguments, answer.text)

            if answer.status_code >= 400:
                assert answer.json()["error"]["message"]

            seen.append(answer.status_code)

        with httpx.Client(timeout=30) as client:
            answered()

    assert {200, 400, 404} <= set(seen)
    assert served.post("chat/completions", messages=ASK, max_tokens=2).status_code == 200


def test_a_schema_that_cannot_be_followed_ends_nothing_but_its_own_answer(served, slow):
    """Sixty objects with thirty fields each are more than the parser keeps in mind at once."""
    kinds = [
        {
            "type": "object",
            "properties": {f"k{kind}{field}": {"type": "integer"} for field in range(30)},
        }
        for kind in range(60)
    ]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"anyOf": kinds}}}
    with ThreadPoolExecutor() as pool:
        other = pool.submit(served.post, "chat/completions", **{**LONG, "max_tokens": 60})
        for stream in (False, True):
            answer = served.post(
                "chat/completions", messages=ASK, response_format=form, stream=stream
            )
            said = answer.text.strip().split("\n\n")[-1].removeprefix("data: ")
            assert json.loads(said)["error"]["param"] == "response_format"
            assert "cannot be followed any further" in said
            assert answer.status_code == (200 if stream else 400)

        assert other.result().json()["usage"]["completion_tokens"] == 60

    wait_for(lambda: served.worker.admitted == 0)
    assert served.post("chat/completions", messages=ASK, max_tokens=2).status_code == 200


def test_a_model_that_fails(policy, capsys):
    with serving(policy, slots=2) as served:
        step, taken = served.worker._session.step, itertools.count()

        def fail():
            if next(taken) == 30:
                raise RuntimeError("out of memory")

            time.sleep(0.01)
            return step()

        served.worker._session.step = fail
        with httpx.stream(
            "POST", f"{served.url}/v1/chat/completions", json={**LONG, "stream": True}, timeout=100
        ) as answer:
            lines = answer.read().decode().strip().split("\n\n")

        assert len(lines) > 2
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == "server_error"
        assert httpx.get(f"{served.url}/health").json() == {
            "status": "failed",
            "failed": ["policy"],
        }
        assert httpx.get(f"{served.url}/health").status_code == 503
        assert served.post("chat/completions", messages=ASK).status_code == 503

    assert "out of memory" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_server_that_is_told_to_stop(policy, tmp_path, number):
    """As users start it: ready when it says so; what runs is finished, what is new refused, and it
    leaves with 0."""
    log = tmp_path / "log"
    environment = {
        **os.environ,
        "LLAMA2_API_KEYS": "a,b",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    with log.open("w") as sink:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "llama2.cli",
                "serve",
                str(policy),
                "--port",
                "0",
                "--slots",
                "1",
                "--limits.drain-seconds",
                "60",
            ],
            stderr=sink,
            env=environment,
        )

    try:
        wait_for(lambda: "serving policy at " in log.read_text() or process.poll() is not None, 60)
        url = re.search(r"at (http://\S+)", log.read_text())[1]
        headers = {"Authorization": "Bearer b"}

        with httpx.Client(headers=headers, timeout=60, base_url=url) as client:
            wait_for(lambda: is_up(client))
            body = {**LONG, "n": 6, "stream": True}
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                heard = answer.iter_text()
                next(heard)
                process.send_signal(number)
                wait_for(lambda: client.get("/health").status_code == 503)
                refused = client.post("/v1/chat/completions", json={"messages": ASK})
                assert (refused.status_code, refused.json()["error"]["code"]) == (
                    503,
                    "shutting_down",
                )
                rest = "".join(heard)

        assert rest.endswith("data: [DONE]\n\n")
        assert rest.count('"finish_reason":"length"') == 6
        assert process.wait(100) == 0
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def is_up(client):
    try:
        return client.get("/health").status_code == 200
    except httpx.TransportError:
        return False
