"""The server around the application: uvicorn, and what happens when it is told to stop."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Sequence
from types import FrameType

import uvicorn

from llama2.serve import errors
from llama2.serve.app import application
from llama2.serve.guard import LOOPBACK, Traffic
from llama2.serve.models import Models, RewardModel
from llama2.serve.settings import ServeConfig

_FAREWELL_SECONDS = 2  # for requests that were just ended to tell their clients


class Server(uvicorn.Server):
    """Drains before it stops: new requests are refused, running ones go on until the deadline."""

    def __init__(self, config: uvicorn.Config, traffic: Traffic, models: Models, drain_seconds: float,
                 greeting: str = "") -> None:
        super().__init__(config)
        self._greeting = greeting
        self._traffic, self._models, self._drain_seconds = traffic, models, drain_seconds
        self._deadline: float | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say so once clients can connect: who waits for that line may ask at once."""
        await super().startup(sockets)
        if self._greeting:
            print(self._greeting, file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._traffic.draining:
            self.should_exit = True  # told twice
        self._traffic.draining = True

    async def on_tick(self, counter: int) -> bool:
        if self._traffic.draining:
            now = time.monotonic()
            self._deadline = self._deadline or now + self._drain_seconds
            self.should_exit = self.should_exit or not self._traffic.active or now > self._deadline
            if self.should_exit:
                for model in self._models:
                    model.worker.fail_all(errors.draining())
        return await super().on_tick(counter)


def server(models: Models, judge: RewardModel | None, config: ServeConfig, keys: Sequence[str], greeting: str = ""
           ) -> Server:
    """Ready to serve at a socket; `greeting` is printed when it does."""
    traffic = Traffic()
    app = application(models, judge, config, keys, traffic)
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, lifespan="off", ws="none", http="h11",
        loop="asyncio", proxy_headers=False, limit_concurrency=config.limits.connections, timeout_keep_alive=60,
        timeout_graceful_shutdown=_FAREWELL_SECONDS)
    return Server(settings, traffic, models, config.limits.drain_seconds, greeting)


def serve(listener: socket.socket, models: Models, judge: RewardModel | None, config: ServeConfig,
          keys: Sequence[str], greeting: str) -> None:
    """Serve at a bound socket until told to stop; then end the workers."""
    try:
        server(models, judge, config, keys, greeting).run(sockets=[listener])
    finally:
        for model in (*models, *((judge,) if judge else ())):
            model.worker.stop()


__all__ = ["LOOPBACK", "Server", "serve", "server"]
