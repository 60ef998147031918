"""How long one client's request keeps all others waiting: `llama2 serve` under requests made to
stop it.

    python benchmarks/stall.py [--size T] [--rounds 5] [--only WORDS] [--threads 1]

A model of random weights is served by a process of its own, as users start it. A second process
asks /health over one connection again and again while this one sends a hostile request, and reports
its longest answer. The same is done with no request at all. A busy machine makes every wait longer,
so a wait counts as no more than the processor time that the server used during it, and of the
rounds the least counts. All requests are below the limit of size.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Event
from pathlib import Path

from server import make, server

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
TARGET = 0.05  # seconds
CONTEXT = 4096  # tokens, Llama 2's
Request = tuple[str, bytes]


def requests(context: int) -> Iterator[tuple[str, Callable[[], Request]]]:
    """Each by name, and how it is made."""

    def case(name: str, path: str, **body: object) -> tuple[str, Callable[[], Request]]:
        return name, lambda: (path, json.dumps(body).encode())

    def raw(name: str, content: Callable[[], bytes]) -> tuple[str, Callable[[], Request]]:
        return name, lambda: (CHAT, content())

    def form(**schema: object) -> dict[str, object]:
        return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}

    yield case(
        "100,001 messages of wrong type", CHAT, messages=[{"role": "x", "content": 1}] * 100_001
    )
    yield case("80,001 empty messages", CHAT, messages=[{}] * 80_001)
    yield case("13,000 empty messages", CHAT, messages=[{}] * 13_000)
    yield case("4,096 messages of wrong type", CHAT, messages=[{"role": "x", "content": 1}] * 4096)
    yield case("4,095 messages", CHAT, messages=[*[USER, ANSWER] * 2047, USER], max_tokens=1)
    yield case("200,000 unknown keys", CHAT, **{f"k{key}": 1 for key in range(200_000)})
    yield case("13,000 unknown keys", CHAT, **{f"k{key}": 1 for key in range(13_000)})
    yield case(
        "unknown keys in a message",
        CHAT,
        messages=[{**USER, **{f"k{key}": 1 for key in range(13_000)}}],
    )
    yield case("a key of 3.9 MB", CHAT, **{"k" * 3_900_000: 1})
    yield case("a role of 3.9 MB", CHAT, messages=[{"role": "x" * 3_900_000, "content": "a"}])
    yield case("a model called 3.9 MB", CHAT, messages=[USER], model="m" * 3_900_000)
    yield case(
        "a message of 3.9 MB", CHAT, messages=[{"role": "user", "content": "word " * 780_000}]
    )
    yield case(
        "a message without spaces", CHAT, messages=[{"role": "user", "content": "a" * 3_900_000}]
    )
    yield case(
        "a message that just fits no more",
        CHAT,
        messages=[{"role": "user", "content": "a" * 16 * context}],
    )
    yield case(
        "6,500 text parts",
        CHAT,
        messages=[{"role": "user", "content": [{"type": "text", "text": "a"}] * 6500}],
    )
    yield case("a prompt of 3.9 MB", TEXT, prompt="word " * 780_000)
    yield case("a prompt of quotes", TEXT, prompt='"' * 1_900_000)
    yield case("a prompt of letters beyond ASCII", TEXT, prompt="\u00e9" * 600_000)
    yield case("128 long prompts", TEXT, prompt=["word " * 6000] * 128)
    yield case("128 prompts that fit", TEXT, prompt=["word " * (context // 4)] * 128, max_tokens=1)
    yield case("1,000,000 ids", TEXT, prompt=[1] * 1_000_000)
    yield case("250,000 ids", TEXT, prompt=[1] * 250_000)
    yield case("250,000 ids and a word", TEXT, prompt=[*[1] * 250_000, "x"])
    yield case(
        "lists of ids, echoed", TEXT, prompt=[[5] * (context - 1)] * 128, echo=True, max_tokens=0
    )
    told = {"prompt": [[5] * (context - 1)] * 4, "echo": True, "max_tokens": 0, "logprobs": 20}
    yield case("echo with log-probabilities", TEXT, **told)
    yield case("the same in a stream", TEXT, **told, stream=True)
    yield case("64 samples of a long prompt", TEXT, prompt=[5] * (context - 8), n=64, max_tokens=4)
    yield case("39,000 empty lists", TEXT, prompt=[[]] * 39_000)
    yield case(
        "250,000 biases", TEXT, prompt="a", logit_bias={str(token): 1 for token in range(250_000)}
    )
    yield case(
        "13,000 biases that are no numbers",
        TEXT,
        prompt="a",
        logit_bias={str(token): "x" for token in range(13_000)},
    )
    yield case(
        "400 biases",
        TEXT,
        prompt="a",
        logit_bias={str(token): 1 for token in range(400)},
        max_tokens=2,
    )
    yield case("39,000 stops", TEXT, prompt="a", stop=["a"] * 39_000)
    yield case("250,000 stops that are no text", TEXT, prompt="a", stop=[1] * 250_000)
    yield case("250,000 stop ids", TEXT, prompt="a", stop_token_ids=[1] * 250_000)
    yield case(
        "a schema of 19,000 words",
        CHAT,
        messages=[USER],
        max_tokens=4,
        response_format=form(enum=[f"w{word}" for word in range(19_000)]),
    )
    yield case(
        "a schema of 6,000 keys",
        CHAT,
        messages=[USER],
        max_tokens=4,
        response_format=form(
            type="object", properties={f"k{key}": {"type": "integer"} for key in range(6000)}
        ),
    )
    yield case(
        "a schema of one long pattern",
        CHAT,
        messages=[USER],
        max_tokens=4,
        response_format=form(type="string", pattern="^(" + "a?" * 500 + "){500}$"),
    )
    yield case(
        "a schema of lengths",
        CHAT,
        messages=[USER],
        max_tokens=4,
        response_format=form(type="string", minLength=10**6, maxLength=10**7),
    )
    yield raw("3.9 MB of brackets", lambda: b"[" * 3_900_000)
    yield raw("700,000 objects, one in the other", lambda: b'{"a":' * 700_000)
    yield raw("3.9 MB of quotes", lambda: b'"' * 3_900_000)
    yield raw("3.9 MB of commas", lambda: b"," * 3_900_000)
    yield raw("3.9 MB of backslashes", lambda: b'{"a":"' + b"\\" * 3_900_000)
    yield raw("3.9 MB of digits", lambda: b'{"seed":' + b"9" * 3_900_000 + b"}")
    yield raw("3.9 MB of spaces", lambda: b" " * 3_900_000 + b"{}")
    yield raw("3.9 MB that are not UTF-8", lambda: b'"' + "\u00e9".encode() * 1_900_000 + b"\xff")


def used(process: int) -> float:
    """The processor time of all threads of a process so far, in seconds."""
    total = 0
    for thread in Path(f"/proc/{process}/task").iterdir():
        with suppress(OSError):  # it has ended
            total += int((thread / "schedstat").read_text(encoding="utf-8").split()[0])

    return total / 1e9


def poll(address: tuple[str, int], process: int, ready: Connection, stop: Event) -> None:
    """Ask /health until told to stop; send the longest that an answer took, in seconds."""
    with socket.create_connection(address) as link:
        link.settimeout(120)
        longest, first = 0.0, True
        while not stop.is_set():
            begin, busy = time.perf_counter(), used(process)
            link.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            heard = b""

            while not heard.endswith(b"}"):
                heard += link.recv(4096)

            if not first:
                longest = max(longest, min(time.perf_counter() - begin, used(process) - busy))

            if first:
                first = False
                ready.send(0.0)

            time.sleep(0.001)

        ready.send(longest)


def stalled(address: tuple[str, int], process: int, request: Request | None) -> tuple[float, bytes]:
    """The longest answer of /health while a request is answered, in seconds, and what that request
    got."""
    near, far = multiprocessing.Pipe()
    stop = multiprocessing.Event()
    poller = multiprocessing.Process(target=poll, args=(address, process, far, stop))
    poller.start()
    near.recv()
    status = b""

    if request is None:
        time.sleep(0.5)
    else:
        path, body = request
        with socket.create_connection(address) as link:
            link.settimeout(120)
            link.sendall(
                f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            while part := link.recv(1 << 16):
                status = status or part[9:12]

    stop.set()
    longest: float = near.recv()
    poller.join()

    return longest, status


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="T")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="requests with these words in their names")
    given = parser.parse_args()
    slow = 0

    with tempfile.TemporaryDirectory() as directory:
        model = make(given.size, Path(directory), max_position_embeddings=CONTEXT)
        with server(model, 16, given.threads) as (url, process):
            host, port = url.removeprefix("http://").split(":")
            address = host, int(port)
            idle = min(stalled(address, process, None)[0] for _ in range(given.rounds))
            print(f"{'nothing':45} {1000 * idle:8.1f} ms")

            for name, made in requests(CONTEXT):
                if given.only in name:
                    request = made()
                    found = [stalled(address, process, request) for _ in range(given.rounds)]
                    least = min(longest for longest, _ in found)
                    slow += least > TARGET
                    print(
                        f"{name:45} {1000 * least:8.1f} ms  {found[0][1].decode()}"
                        f"{'  SLOW' if least > TARGET else ''}",
                        flush=True,
                    )

    print(f"{slow} above {1000 * TARGET:.0f} ms")


if __name__ == "__main__":
    main()
