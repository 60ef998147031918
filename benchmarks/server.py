"""The server under load: tokens a second through HTTP, and their ratio to the engine alone at that
batch in this run.

    python benchmarks/server.py [--size T] [--clients 16] [--seconds 20] [--threads N]
    python benchmarks/server.py --startup [--size S]
    python benchmarks/server.py --abuse [5000]

A model of random weights is served by a process of its own, as users start it; as many streaming
clients as it has slots ask again and again. The engine alone then draws the same batch in the same
process settings. `--abuse` sends requests made from the OpenAPI document, and damaged ones, and
counts what it gets: nothing but 503 may be above 499.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import torch
from common import HERE, SIZES, spread

from llama2 import cpu_tuning
from llama2.formats import checkpoint
from llama2.generate.engine import Engine
from llama2.generate.sampling import Sampling
from llama2.microworld.build import write
from llama2.model.llama import Llama
from llama2.records import Prompt, read
from llama2.tokenizer import sentencepiece_model
from llama2.tokenizer.tokenizer import FILE, Tokenizer
from llama2.tokenizer.train import train

PROMPT, NEW = 64, 128  # tokens
ENDLESS = {"2": -100}  # no answer ends early


@dataclass
class Heard:
    """What the clients saw."""

    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    statuses: collections.Counter[int] = field(default_factory=collections.Counter)
    errors: collections.Counter[str] = field(default_factory=collections.Counter)


def make(size: str, directory: Path, **shape: int) -> Path:
    """A checkpoint of a size, but for what `shape` says, with a tokenizer of as many items: a small
    one is trained, words are made up."""
    write(directory / "world", scale=0.02, seed=0)
    texts = [
        message.content
        for prompt in read(Prompt, directory / "world/prompts-train.jsonl")
        for message in prompt.messages
    ]
    config = replace(SIZES[size].config, **shape)
    train(texts, 420, directory / "small")
    known = sentencepiece_model.load(directory / "small" / FILE)
    words = (
        sentencepiece_model.VocabularyItem(f"{sentencepiece_model.SPACE}w{number}", -number)
        for number in range(len(known.items), config.vocab_size)
    )
    Tokenizer(sentencepiece_model.build(replace(known, items=[*known.items, *words]))).save(
        directory / "model"
    )
    checkpoint.save(Llama(config), directory / "model")

    return directory / "model"


@contextmanager
def server(model: Path, slots: int, threads: int, *flags: str) -> Iterator[tuple[str, int]]:
    """`llama2 serve` in a process; its address and process id."""
    with tempfile.NamedTemporaryFile("r+", encoding="utf-8") as log:
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE.parent),
            "OMP_NUM_THREADS": str(threads),
        }
        command = [
            sys.executable,
            "-m",
            "llama2.cli",
            "serve",
            str(model),
            "--port",
            "0",
            "--slots",
            str(slots),
        ]
        process = subprocess.Popen([*command, *flags], stderr=log, env=environment)

        try:
            while not (
                found := re.search(r" at (http://\S+)", Path(log.name).read_text(encoding="utf-8"))
            ):
                if process.poll() is not None:
                    sys.exit(Path(log.name).read_text(encoding="utf-8"))

                time.sleep(0.05)

            yield found[1], process.pid
        finally:
            process.terminate()
            process.wait(20)


async def client(url: str, number: int, until: float, heard: Heard) -> None:
    """One client that asks, reads and asks again, over one connection.

    It takes bytes from the socket and looks for the end of the answer: the server shares the cores
    with its clients, and an HTTP library with a JSON parser would take more of them for each chunk
    than the server does.
    """
    generator = random.Random(number)
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=1 << 22)

    while time.monotonic() < until:
        body = json.dumps(
            {
                "prompt": [1, *(generator.randrange(3, 400) for _ in range(PROMPT - 1))],
                "max_tokens": NEW,
                "logit_bias": ENDLESS,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
        ).encode()
        begin = latest = time.monotonic()
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(body) + body
        )
        head = await reader.readuntil(b"\r\n\r\n")
        heard.statuses[int(head[9:12])] += 1

        if b"chunked" not in head:
            heard.errors["no stream"] += 1
            break

        end = b""
        while not end.endswith(b"0\r\n\r\n"):
            data = await reader.read(1 << 16)
            now, end = time.monotonic(), (end + data)[-1000:]
            if not data:
                heard.errors["connection lost"] += 1
                return

            (heard.first if latest == begin else heard.between).append(now - latest)
            latest = now

        if not (tokens := re.search(rb'"completion_tokens":(\d+)', end)):
            heard.errors["no usage"] += 1
            continue

        if latest <= until:
            heard.tokens += int(tokens[1])
        else:  # of the last answer, what came in time
            heard.tokens += round(int(tokens[1]) * (until - begin) / (latest - begin))

    writer.close()


async def load(url: str, clients: int, seconds: float) -> Heard:
    """What the clients heard in these seconds."""
    heard, begin = Heard(), time.monotonic()
    await asyncio.gather(
        *(client(url, number, begin + seconds, heard) for number in range(clients))
    )
    return heard


def alone(model: Path, rows: int, seconds: float) -> float:
    """Tokens a second of the engine without a server, drawing the same."""
    cpu_tuning.tune()
    engine = Engine(
        checkpoint.load(model, dtype=torch.bfloat16).eval().requires_grad_(False), slots=rows
    )
    generator = random.Random(0)
    prompts = [[1, *(generator.randrange(3, 400) for _ in range(PROMPT - 1))] for _ in range(rows)]
    sampling = Sampling(max_tokens=NEW, logit_bias=((2, -100.0),))
    engine.generate(prompts, sampling)
    count, begin = 0, time.monotonic()

    while time.monotonic() < begin + seconds:
        count += sum(len(each.tokens) for row in engine.generate(prompts, sampling) for each in row)

    return count / (time.monotonic() - begin)


def resident(process: int) -> float:
    """Its memory in MiB."""
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure(size: str, clients: int, seconds: float, threads: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        model = make(size, Path(directory))
        with server(model, clients, threads) as (url, process):
            asyncio.run(load(url, clients, min(30, seconds / 4)))
            before = resident(process)
            heard = asyncio.run(load(url, clients, seconds))
            growth = resident(process) - before

        torch.set_num_threads(threads)
        offline = alone(model, clients, min(seconds, 10))

    served = heard.tokens / seconds
    print(
        f"{size} {clients} clients, {threads} threads: {served:,.0f} tokens/s  engine alone {offline:,.0f}  "
        f"ratio {served / offline:.2f}"
    )
    for name, values in (("first token", heard.first), ("between tokens", heard.between)):
        cuts = statistics.quantiles(values, n=20)
        print(f"{name}: p50 {1000 * cuts[9]:.1f} ms, p95 {1000 * cuts[18]:.1f} ms")

    print(
        f"answers {dict(heard.statuses)}, errors {dict(heard.errors)}, memory grew by {growth:.1f} MiB"
    )


def startup(size: str, threads: int, repeats: int = 3) -> None:
    """Seconds from a command to its first answer, files in memory."""
    with tempfile.TemporaryDirectory() as directory:
        model = make(size, Path(directory))
        served, said = [], []
        for _ in range(repeats + 1):
            begin = time.monotonic()
            with server(model, 8, threads) as (url, _):
                httpx.post(
                    f"{url}/v1/completions", json={"prompt": "Hello", "max_tokens": 8}
                ).raise_for_status()
                served.append(time.monotonic() - begin)

            begin = time.monotonic()
            command = [sys.executable, "-m", "llama2.cli", "chat", str(model), "--max-tokens", "8"]
            subprocess.run(
                command,
                input="Hello\n",
                text=True,
                encoding="utf-8",
                capture_output=True,
                check=True,
                env={**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": str(threads)},
            )
            said.append(time.monotonic() - begin)

        for name, seconds in (
            ("serve, first answer", served[1:]),
            ("chat, one answer and the end", said[1:]),
        ):
            print(f"{size} {name}: {spread(seconds, '.1f')} s")


def abuse(count: int, threads: int) -> None:
    """Requests made from the schema, and damaged ones; exits with 1 if one of them is fatal."""
    with tempfile.TemporaryDirectory() as directory:
        model = make("T", Path(directory))
        with (
            server(model, 8, threads, "--capacity", "48") as (url, process),
            httpx.Client(timeout=60) as http,
        ):
            before, statuses = resident(process), collections.Counter[int]()
            for request in requests(http, url, count):
                answer = http.send(request)
                statuses[answer.status_code] += 1
                if answer.status_code >= 500 and answer.status_code != 503:
                    sys.exit(
                        f"{answer.status_code} for {request.method} {request.url} {request.content!r}"
                    )

            healthy = http.get(f"{url}/health").json()["status"]
            print(
                f"{sum(statuses.values())} requests: {dict(sorted(statuses.items()))}, then {healthy}; "
                f"memory grew by {resident(process) - before:.1f} MiB"
            )


def requests(http: httpx.Client, url: str, count: int) -> Iterator[httpx.Request]:
    """`count` requests: about half as the OpenAPI document describes them, the rest damaged."""
    from hypothesis import HealthCheck, Phase, given, settings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import schemathesis

    operations = [
        found.ok()
        for found in schemathesis.openapi.from_dict(
            http.get(f"{url}/openapi.json").json()
        ).get_all_operations()
    ]
    made: list[httpx.Request] = []
    each = -(-count // (2 * sum(operation.method.upper() == "POST" for operation in operations)))

    for operation in operations:

        @settings(
            max_examples=each,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy())
        def collect(case: object) -> None:
            arguments = case.as_transport_kwargs(base_url=url)  # type: ignore[attr-defined]
            arguments.pop("cookies", None)
            made.append(http.build_request(**arguments))

        collect()

    generator = random.Random(0)
    good = json.dumps(
        {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 2}
    ).encode()
    yield from made

    for _ in range(count - len(made)):
        body = bytearray(generator.choice(made).content or good)
        for _ in range(generator.randrange(1, 4)):
            place = generator.randrange(len(body) + 1)
            body[place : place + generator.randrange(4)] = generator.randbytes(
                generator.randrange(4)
            )

        path = generator.choice(("chat/completions", "completions", "score"))
        yield http.build_request(
            "POST",
            f"{url}/v1/{path}",
            content=bytes(body),
            headers={"Content-Type": "application/json"},
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="T", choices=list(SIZES))
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--startup", action="store_true")
    parser.add_argument("--abuse", type=int, nargs="?", const=5000)
    arguments = parser.parse_args()

    if arguments.abuse:
        abuse(arguments.abuse, arguments.threads)
    elif arguments.startup:
        startup(arguments.size, arguments.threads)
    else:
        measure(arguments.size, arguments.clients, arguments.seconds, arguments.threads)


if __name__ == "__main__":
    main()
