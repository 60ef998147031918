"""The server around the application: uvicorn, and what happens when it is told to stop."""

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
from llama2.serve.connection import Connection
from llama2.serve.guard import Traffic
from llama2.serve.models import Models, RewardModel
from llama2.serve.settings import Limits, ServeConfig

_OTHER_FILES = 128  # that a process has open besides its connections
_TURN_SECONDS = 0.001  # an answer needs the interpreter back several times
_TIDY_SECONDS = 60
_FAREWELL_SECONDS = 2  # for requests that were just ended to tell their clients


class Server(uvicorn.Server):
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
        self._tidied = time.monotonic()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say so once clients can connect: who waits for that line may ask at once."""
        await super().startup(sockets)
        if self._greeting:
            print(self._greeting, file=sys.stderr, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._traffic.draining:
            self.should_exit = True  # told twice

        self._traffic.draining = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C, which uvicorn knows, and a terminal that is closed."""
        with super().capture_signals():
            ours = (
                threading.current_thread() is threading.main_thread()
                and signal.SIGHUP in interrupts.list_stop_signals()
            )
            if ours:
                signal.signal(signal.SIGHUP, self._hang_up)

            try:
                yield
            finally:
                if ours:
                    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def _hang_up(self, number: int, frame: FrameType | None) -> None:
        interrupts.let_go_of_terminal(number)
        self.handle_exit(number, frame)

    async def on_tick(self, counter: int) -> bool:
        if not self._traffic.active and time.monotonic() - self._tidied > _TIDY_SECONDS:
            gc.collect()
            self._tidied = time.monotonic()

        if self._traffic.draining:
            now = time.monotonic()
            self._deadline = self._deadline or now + self._drain_seconds
            self.should_exit = self.should_exit or not self._traffic.active or now > self._deadline

            if self.should_exit:
                for model in self._models:
                    model.worker.fail_all(errors.draining())

        return await super().on_tick(counter)


def server(
    models: Models,
    judge: RewardModel | None,
    config: ServeConfig,
    keys: Sequence[str],
    greeting: str = "",
) -> Server:
    """Ready to serve at a socket; `greeting` is printed when it does."""
    traffic = Traffic()
    app = application(models, judge, config, keys, traffic)
    settings = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        lifespan="off",
        ws="none",
        http=partial(Connection, traffic=traffic, limits=config.limits),  # type: ignore[arg-type]
        loop="asyncio",
        proxy_headers=False,
        timeout_keep_alive=config.limits.idle_seconds,  # type: ignore[arg-type]
        timeout_graceful_shutdown=_FAREWELL_SECONDS,
    )

    return Server(settings, traffic, models, config.limits.drain_seconds, greeting)


def serve(
    listener: socket.socket,
    models: Models,
    judge: RewardModel | None,
    config: ServeConfig,
    keys: Sequence[str],
    greeting: str,
) -> None:
    """Serve at a bound socket until told to stop; then end the workers."""
    config = config.model_copy(update={"limits": _affordable(config.limits)})
    ready = server(models, judge, config, keys, greeting)
    _share_time()

    try:
        ready.run(sockets=[listener])
    finally:
        for model in (*models, *((judge,) if judge else ())):
            model.worker.stop()


def _share_time() -> None:
    """Let no thread keep the event loop waiting: a turn is short, and a collection of garbage does
    not look at what was there before the first request, nor at all that lives (`on_tick` does that
    when nobody waits)."""
    sys.setswitchinterval(_TURN_SECONDS)
    gc.collect()
    gc.freeze()
    gc.set_threshold(5000, 10, 1000)


def _affordable(limits: Limits) -> Limits:
    """The limits with no more connections than the system lets this process open, which is raised
    if it may be."""
    wanted = limits.connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted and soft != resource.RLIM_INFINITY:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))

    most = limits.connections if soft == resource.RLIM_INFINITY else max(1, soft - _OTHER_FILES)
    return limits.model_copy(update={"connections": min(limits.connections, most)})
