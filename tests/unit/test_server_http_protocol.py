"""Connections that say nothing, say too much, or are too many."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest
from servers import Served, serving, wait_for

HEAD = (
    b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
)
ASK = json.dumps({"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}).encode()


@pytest.fixture(scope="module")
def hasty(policy: Path) -> Iterator[Served]:
    with serving(
        policy, slots=2, limits={"head_seconds": 1.0, "body_bytes": 2000, "idle_seconds": 2.0}
    ) as running:
        yield running


@pytest.fixture(scope="module")
def narrow(policy: Path) -> Iterator[Served]:
    with serving(policy, slots=2, limits={"connections": 8}) as running:
        yield running


def heard(link: socket.socket) -> bytes:
    link.settimeout(100)
    whole = b""
    while part := link.recv(65536):
        whole += part

    return whole


def error(answer: bytes) -> dict[str, str]:
    found: dict[str, str] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return found


def test_a_connection_that_sends_nothing_is_closed(hasty: Served) -> None:
    with socket.create_connection(hasty.address) as link:
        assert heard(link) == b""


@pytest.mark.parametrize("begun", [b"G", b"GET /health HTTP/1.1\r\nHost: local", HEAD])
def test_half_a_head_is_told_that_it_is_too_slow(hasty: Served, begun: bytes) -> None:
    with socket.create_connection(hasty.address) as link:
        link.sendall(begun)
        answer = heard(link)

    assert answer.startswith(b"HTTP/1.1 408 ")
    assert error(answer)["code"] == "timeout"


def test_a_head_that_comes_drop_by_drop_has_no_more_time(hasty: Served) -> None:
    with socket.create_connection(hasty.address) as link:
        dropping = threading.Event()

        def drop() -> None:
            for number in range(1000):
                if dropping.wait(0.02):
                    return

                try:
                    link.sendall(b"GET /health HTTP/1.1\r\n" if not number else b"X-Drop: 1\r\n")
                except OSError:
                    return

        thread = threading.Thread(target=drop)
        thread.start()
        link.settimeout(15)  # the drops would take twenty
        assert link.recv(100).startswith(b"HTTP/1.1 408 ")
        dropping.set()
        thread.join()


def test_half_a_head_after_an_answer_is_closed_too(hasty: Served) -> None:
    with socket.create_connection(hasty.address) as link:
        link.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert link.recv(65536).startswith(b"HTTP/1.1 200 ")
        link.sendall(b"GET ")
        assert b"HTTP/1.1 408 " in heard(link)


def test_a_connection_that_waits_for_another_request_is_closed_in_time(hasty: Served) -> None:
    with socket.create_connection(hasty.address) as link:
        link.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert heard(link).count(b"HTTP/1.1 200 ") == 1


def test_silence_before_a_request_within_the_time_is_no_fault(hasty: Served) -> None:
    with httpx.Client() as client:
        for _ in range(3):
            assert client.get(f"{hasty.url}/health").status_code == 200
            time.sleep(0.05)


def test_an_answer_reaches_a_client_that_still_sends(hasty: Served) -> None:
    """A close with unread bytes would be a reset, which takes the answer away."""
    for head in (b"Content-Length: 30000000\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"):
        with socket.create_connection(hasty.address) as link:
            link.sendall(HEAD + head)
            for _ in range(300):
                link.sendall(
                    (b"186a0\r\n" if b"chunked" in head else b"")
                    + b" " * 100_000
                    + (b"\r\n" if b"chunked" in head else b"")
                )

            answer = heard(link)

        assert answer.startswith(b"HTTP/1.1 413 ")
        assert error(answer)["code"] == "request_too_large"


def test_what_is_not_http_is_refused_in_the_shape_of_all_errors(hasty: Served) -> None:
    with socket.create_connection(hasty.address) as link:
        link.sendall(b"\x16\x03\x01 nonsense\r\n\r\n" + b"x" * 200_000)
        answer = heard(link)

    assert answer.startswith(b"HTTP/1.1 400 ")
    assert error(answer)["type"] == "invalid_request_error"


def test_silent_connections_make_room(narrow: Served) -> None:
    with ExitStack() as held:
        links = [held.enter_context(socket.create_connection(narrow.address)) for _ in range(30)]
        for link in links[::2]:
            link.sendall(b"GET /health HTTP/1.1\r\nX-")

        for _ in range(3):
            assert httpx.get(f"{narrow.url}/health").status_code == 200
            assert narrow.post("chat/completions", **json.loads(ASK)).status_code == 200

        assert narrow.server.server_state.connections
        wait_for(lambda: len(narrow.server.server_state.connections) <= 9)


def test_health_is_told_where_every_connection_is_busy(narrow: Served) -> None:
    with ExitStack() as held:
        for number in range(9):
            link = held.enter_context(socket.create_connection(narrow.address))
            link.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
            wait_for(lambda number=number: narrow.server._traffic.active == min(number + 1, 8))

        assert httpx.get(f"{narrow.url}/health").status_code == 200
        assert httpx.get(f"{narrow.url}/metrics").status_code == 200
        refused = httpx.get(f"{narrow.url}/v1/models")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "overloaded"
        assert refused.headers["retry-after"] == "1"

    wait_for(lambda: narrow.server._traffic.active == 0)
    assert httpx.get(f"{narrow.url}/v1/models").status_code == 200


def test_nothing_is_left_of_connections(narrow: Served) -> None:
    wait_for(lambda: not narrow.server.server_state.connections)
    assert narrow.server._traffic.connections == 0
