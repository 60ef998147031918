"""A real server at a free port, in a thread of the test's own process."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from llama2.config import build
from llama2.serve import lifecycle, models
from llama2.serve.models import Models
from llama2.serve.settings import ServeConfig


@dataclass
class Served:
    """A running server: where it is, what it serves, and the object that runs it."""

    url: str
    models: Models
    server: lifecycle.DrainingServer

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    @property
    def worker(self) -> Any:
        return next(iter(self.models.values())).worker

    def post(self, path: str, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.url}/v1/{path}", json=body, timeout=60)

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.url.removeprefix("http://").partition(":")
        return host, int(port)


@contextmanager
def serving(
    *paths: Path, keys: Sequence[str] = (), judge: Path | None = None, **values: Any
) -> Iterator[Served]:
    """Serve checkpoints until the block ends. Answers are computed in fp32 unless asked
    otherwise."""
    config = build(
        ServeConfig, {"checkpoints": [str(path) for path in paths], "precision": "fp32", **values}
    )
    loaded = models.load(config)
    safe = models.load_judge(judge, config, loaded) if judge else None
    server = lifecycle.build(loaded, safe, config, keys)

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()

        try:
            wait_for(lambda: server.started)
            yield Served(url, loaded, server)
        finally:
            server.should_exit = True
            thread.join(100)
            for model in (*loaded.values(), *((safe,) if safe else ())):
                model.worker.stop()


class Pace:
    """Steps that take a while; after `STEPS` of them the model waits until it is told to go on.

    So an answer is being drawn for as long as a test needs, however slow the machine is.
    """

    STEPS = 60

    def __init__(self) -> None:
        self.taken, self._told = 0, threading.Event()

    def step(self, step: Callable[[], Any]) -> Any:
        time.sleep(0.02)
        self.taken += 1
        if self.taken > self.STEPS:
            self._told.wait(60)

        return step()

    def go_on(self) -> None:
        self._told.set()


def paced(served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pace]:
    """How fast the models of a server draw until a test ends."""
    pace = Pace()
    for session in (
        model.worker._session for model in served.models.values() if model.kind == "chat"
    ):
        monkeypatch.setattr(session, "step", partial(pace.step, session.step))

    yield pace
    pace.go_on()


def wait_for(condition: Any, seconds: float = 100) -> None:
    """Until it holds; an error if it does not in time. Only what fails waits so long: machines may
    be busy."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.005)
