"""The life of a server: uvicorn around the application, and a stop that drains it first."""

from __future__ import annotations

import gc
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType

import uvicorn

from llama2 import interrupts
from llama2.serve import errors
from llama2.serve.app import application
from llama2.serve.http_protocol import HttpProtocol
from llama2.serve.middleware import Traffic
from llama2.serve.models import Models, RewardModel
from llama2.serve.settings import Limits, ServeConfig

_OTHER_FILES = 128  # that a process has open besides its connections
_SWITCH_SECONDS = 0.001  # an answer needs the interpreter back several times
_COLLECT_SECONDS = 60
_SHUTDOWN_SECONDS = 2  # for requests that were just ended to tell their clients


class DrainingServer(uvicorn.Server):
    """Drains before it stops: new requests are refused, running ones go on until the deadline."""

    def __init__(
        self,
        config: uvicorn.Config,
        traffic: Traffic,
        models: Models,
        drain_seconds: float,
        greeting: str = "",
    ) -> None:
        super().__init__(config)
        self._greeting = greeting
        self._traffic, self._models, self._drain_seconds = traffic, models, drain_seconds
        self._deadline: float | None = None
        self._collected = time.monotonic()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Open the port, and greet once clients can connect: who waits for that line may ask at
        once."""
        await super().startup(sockets)
        if self._greeting:
            print(self._greeting, file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, stop at the second."""
        if self._traffic.draining:
            self.should_exit = True

        self._traffic.draining = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle SIGTERM and Ctrl-C, which uvicorn knows, and a terminal that is closed."""
        with super().capture_signals():
            handles_hang_up = (
                threading.current_thread() is threading.main_thread()
                and signal.SIGHUP in interrupts.list_stop_signals()
            )
            if handles_hang_up:
                signal.signal(signal.SIGHUP, self._hang_up)

            try:
                yield
            finally:
                if handles_hang_up:
                    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        interrupts.let_go_of_terminal(number)
        self.handle_exit(number, frame)

    async def on_tick(self, counter: int) -> bool:
        """Collect garbage when nobody waits, and end a drained server; called ten times a
        second."""
        now = time.monotonic()
        if not self._traffic.active and now - self._collected > _COLLECT_SECONDS:
            gc.collect()
            self._collected = now

        if self._traffic.draining:
            self._deadline = self._deadline or now + self._drain_seconds
            self.should_exit = self.should_exit or not self._traffic.active or now > self._deadline

            if self.should_exit:
                for model in self._models.values():
                    model.worker.fail_all(errors.drain_error())

        return await super().on_tick(counter)


def build(
    models: Models,
    judge: RewardModel | None,
    config: ServeConfig,
    keys: Sequence[str],
    greeting: str = "",
) -> DrainingServer:
    """Return a server that is ready to serve at a socket; `greeting` is printed when it does."""
    traffic = Traffic()
    settings = uvicorn.Config(
        application(models, judge, config, keys, traffic),
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        http=partial(HttpProtocol, traffic=traffic, limits=config.limits),  # type: ignore[arg-type]
        loop="asyncio",
        proxy_headers=False,
        timeout_keep_alive=config.limits.idle_seconds,  # type: ignore[arg-type]
        timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
    )

    return DrainingServer(settings, traffic, models, config.limits.drain_seconds, greeting)


def serve(
    listener: socket.socket,
    models: Models,
    judge: RewardModel | None,
    config: ServeConfig,
    keys: Sequence[str],
    greeting: str,
) -> None:
    """Serve at a bound socket until a signal; then end the workers."""
    config = config.model_copy(update={"limits": _fit_to_system(config.limits)})
    server = build(models, judge, config, keys, greeting)
    _shorten_pauses()

    try:
        server.run(sockets=[listener])
    finally:
        for model in (*models.values(), *filter(None, [judge])):
            model.worker.stop()


def _shorten_pauses() -> None:
    """Let no thread keep the event loop waiting.

    A turn is short. A collection of garbage does not look at objects from before the first request,
    nor at all others: `on_tick` does that when nobody waits.
    """
    sys.setswitchinterval(_SWITCH_SECONDS)
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 10, 1000)


def _fit_to_system(limits: Limits) -> Limits:
    """Return limits with no more connections than the system lets this process open. The system's
    limit is raised if it may be."""
    needed = limits.connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return limits

    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    most = max(1, soft - _OTHER_FILES)
    return limits.model_copy(update={"connections": min(limits.connections, most)})
