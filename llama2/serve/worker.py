"""One thread for each model. It alone touches the model; coroutines hand it samples to draw and get
every token.

Everything a coroutine sees is counted on the event loop's side, so no lock is needed: the thread
gets commands through a queue, and answers with one call into the loop for each step of the batch. A
cancelled sample has left its slot before the next step. Should the thread die, whatever runs fails
at once and nothing new is taken.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from llama2 import cpu_tuning
from llama2.errors import UserError
from llama2.generate.engine import Engine
from llama2.generate.request import Finish, SampleRequest
from llama2.generate.session import Session
from llama2.serve import errors
from llama2.serve.detokenizer import Alternatives
from llama2.terminal_text import say

R = TypeVar("R")
# seconds between two reports for each sample that runs: a report costs a tenth of that
PACE = 0.002


@dataclass(frozen=True)
class TokenDelta:
    """New tokens of one sample of a stream, and how it ended if it did."""

    sample: int
    steps: Sequence[tuple[int, float, Alternatives]]
    """each token, its log-probability, and its alternatives where they were asked for"""
    finish: Finish | None


class SampleStream:
    """The samples of one call while they are drawn; `close` cancels those that still run."""

    def __init__(self, worker: Worker, requests: Sequence[SampleRequest], seconds: float) -> None:
        self.requests = requests
        self.running = set(range(len(requests)))
        self._worker = worker
        self._began = time.monotonic()
        self._reported = [0] * len(requests)  # tokens of each sample that were given out
        self._progress: dict[int, tuple[int, Finish | None]] = {}  # by sample: tokens so far
        self._error: Exception | None = None
        self._changed = asyncio.Event()
        error = errors.timeout_error(
            f"the request took longer than the {seconds:g} s that are allowed; ask for fewer tokens"
        )
        self._alarm = asyncio.get_running_loop().call_later(seconds, self.fail, error)

    async def deltas(self) -> AsyncIterator[list[TokenDelta]]:
        """Yield new tokens as they come, several at a time for a reader that is slow. Raises what
        made the stream fail."""
        while True:
            if self._error is not None:
                raise self._error

            if self._progress:
                progress, self._progress = self._progress, {}
                yield [self._delta(sample, *state) for sample, state in progress.items()]
            elif self.running:
                await self._changed.wait()
                self._changed.clear()
            else:
                return

    def _delta(self, sample: int, count: int, finish: Finish | None) -> TokenDelta:
        request = self.requests[sample]
        new = slice(self._reported[sample], count)
        self._reported[sample] = count
        tokens, logprobs = request.tokens[new], request.logprobs[new]
        alternatives = request.alternatives[new] or [()] * len(tokens)
        return TokenDelta(sample, list(zip(tokens, logprobs, alternatives, strict=True)), finish)

    def update(self, sample: int, count: int, finish: Finish | None) -> None:
        """Note that a sample has `count` tokens by now."""
        if sample not in self.running:
            return  # cancelled while the report was under way

        self._progress[sample] = count, finish
        if finish is not None:
            self._release(sample)

        self._changed.set()

    def fail(self, error: Exception) -> None:
        """End everything with `error`."""
        self._error = self._error or error
        self.close()
        self._changed.set()

    def cancel(self, sample: int) -> None:
        """Draw no more of a sample: its slot is free before the next step."""
        if sample in self.running:
            self._release(sample)
            self._progress.pop(sample, None)
            self._worker.cancel(self.requests[sample])

    def _release(self, sample: int) -> None:
        self.running.discard(sample)
        elapsed = time.monotonic() - self._began
        self._worker.seconds += 0.1 * (elapsed - self._worker.seconds)

    def close(self) -> None:
        """Cancel whatever still runs."""
        for sample in tuple(self.running):
            self.cancel(sample)

        self._alarm.cancel()
        self._worker.streams.discard(self)


class Worker:
    """The thread of one model. `engine` is None for a reward model, for which it only carries out
    calls.

    `slots` samples run at a time, `waiting` more may queue for them; beyond that, clients are asked
    to come back.
    """

    def __init__(self, name: str, engine: Engine | None = None, waiting: int = 64) -> None:
        self.name, self.engine = name, engine
        self.slots = engine.slots if engine else 1
        self.limit = self.slots + waiting
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name=f"model {name}", daemon=True)
        self._started: Future[None] = Future()
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()

        # the event loop's own
        self.streams: set[SampleStream] = set()
        self.seconds = 1.0  # duration of a sample, averaged over the last ones
        self._calls: set[asyncio.Future[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

        # the thread's own
        self._session: Session | None = None
        self._owners: dict[SampleRequest, tuple[SampleStream, int]] = {}
        self._unreported: dict[SampleRequest, None] = {}  # with new tokens, in the order of drawing
        self._reported_at = 0.0

    # --- the event loop's side ----

    def start(self) -> None:
        """Start the thread and wait for its self-test, a short greedy answer; raises what that
        raised."""
        self._thread.start()
        self._started.result()

    def stop(self, seconds: float = 5) -> None:
        """End the thread after the step it is in."""
        self._commands.put(None)
        self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        """Return whether the model answers."""
        return self.error is None and self._thread.is_alive()

    @property
    def admitted(self) -> int:
        """Return how many samples and calls were taken and have not ended."""
        return len(self._calls) + sum(len(stream.running) for stream in self.streams)

    @property
    def running(self) -> int:
        """Return how many samples have a slot."""
        return min(self.admitted, self.slots)

    @property
    def waiting(self) -> int:
        """Return how many samples wait for a slot."""
        return self.admitted - self.running

    @property
    def cached_tokens(self) -> int:
        """Return of how many tokens keys and values are kept."""
        return self._session.cached_tokens if self._session else 0

    def submit(self, requests: Sequence[SampleRequest], seconds: float = 600) -> SampleStream:
        """Have samples drawn, in at most `seconds`. ApiError if there is no room for them, or if
        the thread is dead."""
        self._admit(len(requests))
        stream = SampleStream(self, requests, seconds)
        self.streams.add(stream)

        for sample, request in enumerate(requests):
            self._commands.put(partial(self._begin, request, stream, sample))

        return stream

    async def call(self, work: Callable[[], R]) -> R:
        """Return the result of `work`, done by the thread between two steps."""
        self._admit(1)
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._calls.add(future)
        self._commands.put(partial(self._carry_out, work, future))

        try:
            return await future
        finally:
            self._calls.discard(future)

    def cancel(self, request: SampleRequest) -> None:
        """Draw no more of a sample: its slot is free before the next step."""
        self._commands.put(partial(self._cancel, request))

    def fail_all(self, error: Exception) -> None:
        """End everything that runs or waits."""
        for stream in tuple(self.streams):
            stream.fail(error)

        for future in tuple(self._calls):
            _settle(future, None, error)

    def _admit(self, count: int) -> None:
        if not self.alive:
            raise errors.broken(self.name)
        if self.admitted + count > self.limit:
            raise errors.overload_error(1 + int(self.seconds * self.waiting / self.slots))

        self._loop = asyncio.get_running_loop()

    # --- the thread's side ----

    def _run(self) -> None:
        try:
            if self.engine is not None:
                self.engine.test(self.name)
                self._session = self.engine.open()

            self._started.set_result(None)
            while self._run_commands():
                if self._session is not None and not self._idle:
                    self._report(self._session.step())
        except BaseException as error:
            self._die(error)

    @property
    def _idle(self) -> bool:
        return self._session is None or self._session.idle

    def _run_commands(self) -> bool:
        """Carry out the commands that have come, waiting for one if nothing runs; return False
        when the thread is to end."""
        wait = self._idle
        if wait and self._commands.empty():
            cpu_tuning.release_threads()

        while True:
            try:
                command = self._commands.get(block=wait)
            except queue.Empty:
                return True

            if command is None:
                return False

            command()
            wait = False

    def _begin(self, request: SampleRequest, stream: SampleStream, sample: int) -> None:
        assert self._session is not None
        self._session.submit(request)
        self._owners[request] = stream, sample

    def _cancel(self, request: SampleRequest) -> None:
        assert self._session is not None
        if self._owners.pop(request, None):
            self._session.cancel(request)

    def _carry_out(self, work: Callable[[], R], future: asyncio.Future[R]) -> None:
        try:
            result = work()
        except Exception as error:
            self._post(_settle, future, None, error)
        else:
            self._post(_settle, future, result, None)

    def _report(self, requests: Sequence[SampleRequest]) -> None:
        """Report a step with one call into the loop: first and last tokens at once, others at a
        pace."""
        now = time.monotonic()
        self._unreported.update(dict.fromkeys(requests))
        due = now - self._reported_at >= PACE * len(self._owners)
        if due:
            self._reported_at = now

        updates = []
        for request in tuple(self._unreported) if due else requests:
            if not due and request.finish is None and len(request.tokens) > 1:
                continue

            del self._unreported[request]
            owner = self._owners.get(request)
            if owner is not None:
                updates.append((*owner, len(request.tokens), request.finish))
                if request.finish is not None:
                    del self._owners[request]

        if updates:
            self._post(_update_all, updates)

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        """Have the event loop call a function."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def _die(self, error: BaseException) -> None:
        self.error = error
        if not self._started.done():
            self._started.set_exception(error)
            return

        if not isinstance(error, UserError):
            traceback.print_exception(error)

        say(f"llama2: the model '{self.name}' has failed: {error}")
        if self._loop is not None:
            self._post(self.fail_all, errors.interrupt_error(self.name))


def _update_all(updates: Sequence[tuple[SampleStream, int, int, Finish | None]]) -> None:
    for stream, sample, count, finish in updates:
        stream.update(sample, count, finish)


def _settle(future: asyncio.Future[R], result: R, error: Exception | None) -> None:
    if future.done():
        return  # the caller has gone

    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
