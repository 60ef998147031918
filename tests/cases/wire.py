"""Cases of HTTP itself: methods, hosts, headers, encodings, silence and crowds."""

from __future__ import annotations

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import httpx
from checks import Work
from clients import with_server
from service import ASK, Service

from llama2.serve.settings import Limits, ServeConfig

if TYPE_CHECKING:
    from run import Bench

BODY = {"messages": ASK, "max_tokens": 2}
PAGE = "http://localhost:5173"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization,content-type",
}
# seconds that a health check may take while a hostile request is read, on a busy machine
STALL = 2.0


def cases() -> Iterator[tuple[str, str, Work]]:
    """Name, what is expected, and the work."""
    yield from _methods()
    yield from _bodies()
    yield from _hosts()
    yield from _crowds()


def _gives(status: int, method: str, path: str, said: str = "", **more: Any) -> Work:
    def work(service: Service) -> tuple[bool, str]:
        got = service.request(method, path, **more)
        return (
            got.status_code == status and said in got.text.lower(),
            f"{got.status_code} {got.text[:160]}",
        )

    return with_server(work)


def _methods() -> Iterator[tuple[str, str, Work]]:
    for path in ("/health", "/", "/v1/models"):
        yield (
            f"HEAD {path}",
            "200 without a body",
            with_server(
                lambda service, path=path: (
                    (got := service.request("HEAD", path)).status_code == 200 and not got.content,
                    f"{got.status_code} {len(got.content)} bytes",
                )
            ),
        )

    yield (
        "GET a name with a slash",
        "200",
        _gives(200, "GET", "/v1/models/org%2Fsecond", "org/second"),
    )
    yield (
        "GET an unknown name with a slash",
        "404 as the API says it",
        _gives(404, "GET", "/v1/models/org%2Fnone", "error"),
    )
    yield "query strings", "are of no matter", _gives(200, "GET", "/v1/models?limit=20")
    yield (
        "trailing slash",
        "is led on",
        with_server(
            lambda service: (
                (
                    got := service.request(
                        "POST", "/v1/chat/completions/", json=BODY, follow_redirects=True
                    )
                ).status_code
                == 200,
                str(got.status_code),
            )
        ),
    )
    yield (
        "no CORS unasked",
        "a preflight is not answered with leave",
        with_server(
            lambda service: (
                "access-control-allow-origin"
                not in (
                    got := service.request("OPTIONS", "/v1/chat/completions", headers=PREFLIGHT)
                ).headers,
                f"{got.status_code} {dict(got.headers)}",
            )
        ),
    )
    yield (
        "CORS by option",
        "a preflight of the named origin is answered, and so is the request",
        _cors,
    )
    yield (
        "X-Accel-Buffering",
        "a stream says no",
        with_server(
            lambda service: (
                (got := service.chat(stream=True)).headers.get("x-accel-buffering") == "no",
                str(dict(got.headers)),
            )
        ),
    )


def _cors(bench: Bench) -> tuple[bool, str]:
    name = next(
        (name for name in ServeConfig.model_fields if "origin" in name or "cors" in name), None
    )
    if name is None:
        return False, "serve has no option for origins"

    service = bench.served(bench.model, **{name: PAGE})
    asked = service.request("OPTIONS", "/v1/chat/completions", headers=PREFLIGHT)
    got = service.request("POST", "/v1/chat/completions", json=BODY, headers={"Origin": PAGE})
    other = service.request(
        "OPTIONS", "/v1/chat/completions", headers={**PREFLIGHT, "Origin": "http://evil.example"}
    )
    allowed = "access-control-allow-origin"

    return (
        asked.status_code in (200, 204)
        and asked.headers.get(allowed) == PAGE
        and got.status_code == 200
        and "content-type" in asked.headers.get("access-control-allow-headers", "").lower()
        and got.headers.get(allowed) == PAGE
        and allowed not in other.headers
    ), f"{asked.status_code} {got.status_code} {got.text[:80]} {dict(asked.headers)}"


def _bodies() -> Iterator[tuple[str, str, Work]]:
    raw = json.dumps(BODY).encode()
    kind = {"Content-Type": "application/json"}
    chat = "/v1/chat/completions"
    yield (
        "byte order mark",
        "is no content",
        _gives(200, "POST", chat, content=b"\xef\xbb\xbf" + raw, headers=kind),
    )
    yield (
        "chunked",
        "is read",
        _gives(200, "POST", chat, content=iter([raw[:9], raw[9:]]), headers=kind),
    )
    yield (
        "NUL and emoji",
        "are text",
        _gives(
            200,
            "POST",
            chat,
            json={**BODY, "messages": [{"role": "user", "content": "a\0b\U0001f600"}]},
        ),
    )
    yield (
        "gzip",
        "Content-Encoding is named",
        _gives(
            415,
            "POST",
            chat,
            "content-encoding",
            content=gzip.compress(raw),
            headers={**kind, "Content-Encoding": "gzip"},
        ),
    )
    yield (
        "identity",
        "is read",
        _gives(200, "POST", chat, content=raw, headers={**kind, "Content-Encoding": "identity"}),
    )
    yield "no content type", "explained", _gives(400, "POST", chat, content=raw)
    yield (
        "half a pair",
        "400, no fault of the server",
        _gives(
            400,
            "POST",
            chat,
            content=b'{"messages":[{"role":"user","content":"\\ud800"}]}',
            headers=kind,
        ),
    )
    yield "100 MB", "a client that is still sending reads 413", _large


def _large(bench: Bench) -> tuple[bool, str]:
    service = bench.served(bench.model, bench.model, names="base org/second")
    with service.connect() as line:
        line.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 104857600\r\n\r\n"
        )
        line.settimeout(60)
        try:
            for _ in range(1600):
                line.sendall(b" " * 65536)

            answer = line.recv(4096)
        # a client that reads only when it has sent all sees no more than this
        except OSError as error:
            return False, f"{type(error).__name__}: {error}"

    return b" 413 " in answer[:20], answer[:80].decode("latin-1")


def _hosts() -> Iterator[tuple[str, str, Work]]:
    for host, status in (
        ("LOCALHOST:8000", 200),
        ("localhost:8000", 200),
        ("LocalHost", 200),
        ("127.0.0.1", 200),
        ("myvm.local", 403),
        ("host.docker.internal:8000", 403),
    ):
        yield f"Host: {host}", str(status), _gives(status, "GET", "/health", headers={"Host": host})

    def foreign(bench: Bench) -> tuple[bool, str]:
        service = bench.served(bench.model, host="127.0.0.2")
        got = [
            service.request("GET", "/health", headers={"Host": host}).status_code
            for host in ("evil.example", "127.0.0.2")
        ]
        return got == [403, 200], str(got)

    yield "--host 127.0.0.2", "a loopback address without keys refuses other names too", foreign


# --- silence, slowness, size ---
def _impatient(bench: Bench) -> Service:
    """A server that waits for a second where it waits for anything to arrive."""
    names = [
        name
        for name in Limits.model_fields
        if name.endswith("_seconds") and name != "drain_seconds"
    ]
    return bench.served(bench.model, **{f"limits.{name}": "1" for name in names})


def _crowds() -> Iterator[tuple[str, str, Work]]:
    def closed(sent: bytes) -> Work:
        def work(bench: Bench) -> tuple[bool, str]:
            with _impatient(bench).connect() as line:
                line.sendall(sent)
                line.settimeout(30)
                try:
                    while line.recv(4096):
                        pass
                except TimeoutError:
                    return False, "still open after 30 seconds"
                except ConnectionError:
                    pass

            return True, "closed"

        return work

    yield "a silent connection", "is closed", closed(b"")
    yield "half a head", "is closed", closed(b"GET /health HTTP/1.1\r\nHost: local")
    yield (
        "half a body",
        "is closed",
        closed(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
        ),
    )
    yield "a body a byte at a time", "408, or closed", _slow
    yield "64 silent connections", "others are answered when they are gone", _silent

    for name, body in hostile().items():
        yield f"hostile: {name}", f"400 or 413, and no health check takes {STALL:g} s", _stall(body)


def _slow(bench: Bench) -> tuple[bool, str]:
    with _impatient(bench).connect() as line:
        line.settimeout(30)
        line.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: 100\r\n\r\n"
        )
        begin = time.monotonic()

        try:
            while time.monotonic() < begin + 20:
                line.sendall(b" ")
                time.sleep(0.3)
        except OSError:
            return True, "closed"

    return False, "still open after 20 seconds"


def _silent(bench: Bench) -> tuple[bool, str]:
    names = [
        name
        for name in Limits.model_fields
        if name.endswith("_seconds") and name != "drain_seconds"
    ]
    service = bench.served(
        bench.model, **{"limits.connections": "64", **{f"limits.{name}": "1" for name in names}}
    )
    lines: list[socket.socket] = []

    try:
        lines = [service.connect() for _ in range(64)]
        end = time.monotonic() + 30
        while time.monotonic() < end:
            try:
                if service.request("GET", "/health").status_code == 200:
                    return True, "answered"
            except httpx.HTTPError:
                pass

            time.sleep(0.2)

        return False, "nobody is answered for 30 seconds"
    finally:
        for line in lines:
            line.close()


def hostile() -> dict[str, Callable[[], bytes]]:
    """Requests below four megabytes that take long to refuse."""

    def chat(**more: Any) -> bytes:
        return json.dumps({"messages": ASK, "max_tokens": 1, **more}).encode()

    return {
        "100,001 messages of the wrong kind": lambda: chat(
            messages=[{"role": "x", "content": 1}] * 100_001
        ),
        "80,001 empty messages": lambda: chat(messages=[{}] * 80_001),
        "200,000 unknown keys": lambda: chat(**{f"k{number}": 1 for number in range(200_000)}),
        "a prompt of 3.9 MB": lambda: chat(
            messages=[{"role": "user", "content": "tea " * 970_000}]
        ),
        "250,000 biases": lambda: chat(logit_bias={str(number): 1 for number in range(250_000)}),
        "80,000 messages": lambda: chat(
            messages=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
            * 40_000
        ),
        "1,000,000 stop ids": lambda: chat(stop_token_ids=[1] * 1_000_000),
        "parts of text": lambda: chat(
            messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 90_000}]
        ),
        "deep JSON": lambda: b'{"messages":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}",
    }


def _stall(made: Callable[[], bytes]) -> Work:
    """The longest health check while the request is read; the request itself is refused."""

    def work(service: Service) -> tuple[bool, str]:
        body, answer = made(), []
        kind = {"Content-Type": "application/json"}
        thread = threading.Thread(
            target=lambda: answer.append(
                service.request("POST", "/v1/chat/completions", content=body, headers=kind)
            )
        )
        service.request("GET", "/health")
        longest = 0.0

        with httpx.Client(timeout=120) as client:
            thread.start()
            while True:
                alive = thread.is_alive()
                begin = time.monotonic()
                client.get(f"{service.url}/health")
                longest = max(longest, time.monotonic() - begin)

                if not alive:
                    break

        thread.join()
        got = answer[0]
        return (
            longest < STALL and got.status_code in (400, 413)
        ), f"{longest:.2f} s, {got.status_code} {got.text[:100]}"

    return with_server(work)
