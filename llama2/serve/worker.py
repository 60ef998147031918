"""One thread for each model. It alone touches the model; coroutines hand it requests and hear of
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
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, TypeVar

from llama2 import cpu_tuning
from llama2.errors import UserError
from llama2.generate.batch import Finish, Request
from llama2.generate.engine import BEGIN, TEST_TOKENS, Engine
from llama2.generate.sampling import Sampling
from llama2.generate.session import Session
from llama2.serve import errors
from llama2.terminal_text import say

R = TypeVar("R")
Alternatives = tuple[tuple[int, float], ...]
# seconds from one piece of news to the next for each sample that runs: telling costs a tenth of
# that
PACE = 0.002


@dataclass(frozen=True)
class Drawn:
    """New tokens of one sample of a ticket, and how it ended if it did."""

    sample: int
    tokens: Sequence[int]
    logprobs: Sequence[float]
    alternatives: Sequence[Alternatives]
    finish: Finish | None


class Ticket:
    """The samples of one call while they are drawn. A context: whatever still runs at its end is
    cancelled."""

    def __init__(self, worker: Worker, requests: Sequence[Request], seconds: float) -> None:
        self.requests = requests
        self._worker = worker
        self._open = set(range(len(requests)))
        self._seen = [0] * len(requests)
        self._news: dict[int, tuple[int, Finish | None]] = {}
        self._error: Exception | None = None
        self._event = asyncio.Event()
        self._alarm = asyncio.get_running_loop().call_later(
            seconds, self.fail, errors.too_slow(seconds)
        )
        self.began = time.monotonic()

    async def updates(self) -> AsyncIterator[list[Drawn]]:
        """New tokens as they come, several at a time for a reader that is slow. Raises what made
        the ticket fail."""
        while True:
            if self._error is not None:
                raise self._error

            if self._news:
                news, self._news = self._news, {}
                yield [
                    self._drawn(sample, count, finish) for sample, (count, finish) in news.items()
                ]
            elif self._open:
                await self._event.wait()
                self._event.clear()
            else:
                return

    def _drawn(self, sample: int, count: int, finish: Finish | None) -> Drawn:
        request, begin = self.requests[sample], self._seen[sample]
        self._seen[sample] = count
        return Drawn(
            sample,
            request.tokens[begin:count],
            request.logprobs[begin:count],
            request.alternatives[begin:count],
            finish,
        )

    def tell(self, sample: int, count: int, finish: Finish | None) -> None:
        """The sample has `count` tokens by now."""
        if sample not in self._open:
            return  # cancelled while the news was under way

        self._news[sample] = count, finish
        if finish is not None:
            self._leave(sample)

        self._event.set()

    def fail(self, error: Exception) -> None:
        """End everything with `error`."""
        self._error = self._error or error
        self.close()
        self._event.set()

    def cancel(self, sample: int) -> None:
        """Draw no more of a sample: its slot is free before the next step."""
        if sample in self._open:
            self._leave(sample)
            self._news.pop(sample, None)
            self._worker.cancel(self.requests[sample])

    def _leave(self, sample: int) -> None:
        self._open.discard(sample)
        self._worker.left(self)

    def close(self) -> None:
        """Cancel whatever still runs."""
        for sample in tuple(self._open):
            self.cancel(sample)

        self._alarm.cancel()
        self._worker.forget(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


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
        self.admitted = 0  # samples and calls that were taken and have not ended
        self._session: Session | None = None
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._owners: dict[Request, tuple[Ticket, int]] = {}  # the thread's own
        # those with tokens that nobody has heard of, in the order of drawing
        self._untold: dict[Request, None] = {}
        self._told = 0.0
        self._tickets: set[Ticket] = set()  # the event loop's own, like what follows
        self._calls: set[asyncio.Future[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._seconds = 1.0  # what a sample took, on average of late
        self._ready: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=f"model {name}", daemon=True)

    # ---- the event loop's side ----

    def start(self) -> None:
        """Start the thread and wait for its self-test, a short greedy answer; raises what that
        raised."""
        self._thread.start()
        error = self._ready.get()
        if error is not None:
            raise error

    def stop(self, seconds: float = 5) -> None:
        """End the thread after the step it is in."""
        self._commands.put(None)
        self._thread.join(seconds)

    @property
    def alive(self) -> bool:
        return self.error is None and self._thread.is_alive()

    @property
    def running(self) -> int:
        """Samples that have a slot."""
        return min(self.admitted, self.slots)

    @property
    def waiting(self) -> int:
        """Samples that wait for one."""
        return self.admitted - self.running

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values are kept."""
        return self._session.cached_tokens if self._session else 0

    def submit(self, requests: Sequence[Request], seconds: float = 600) -> Ticket:
        """Have samples drawn, in at most `seconds`. ApiError if there is no room for them, or if
        the thread is dead."""
        self._admit(len(requests))
        ticket = Ticket(self, requests, seconds)
        self._tickets.add(ticket)

        for sample, request in enumerate(requests):
            self._commands.put(partial(self._enter, request, ticket, sample))

        return ticket

    async def call(self, work: Callable[[], R]) -> R:
        """The result of `work`, done by the thread between two steps."""
        self._admit(1)
        future: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._calls.add(future)
        self._commands.put(partial(self._carry_out, work, future))

        try:
            return await future
        finally:
            self._calls.discard(future)
            self.admitted -= 1

    def cancel(self, request: Request) -> None:
        """Used by tickets."""
        self._commands.put(partial(self._exit, request))

    def left(self, ticket: Ticket) -> None:
        """Used by tickets: one of the samples has ended."""
        self.admitted -= 1
        self._seconds += 0.1 * (time.monotonic() - ticket.began - self._seconds)

    def forget(self, ticket: Ticket) -> None:
        """Used by tickets: none of its samples runs."""
        self._tickets.discard(ticket)

    def fail_all(self, error: Exception) -> None:
        """End everything that runs or waits."""
        for ticket in tuple(self._tickets):
            ticket.fail(error)

        for future in tuple(self._calls):
            if not future.done():
                future.set_exception(error)

    def _admit(self, count: int) -> None:
        if not self.alive:
            raise errors.broken(self.name)
        if self.admitted + count > self.limit:
            raise errors.overloaded(1 + int(self._seconds * self.waiting / self.slots))

        self._loop = asyncio.get_running_loop()
        self.admitted += count

    # ---- the thread's side ----

    def _work(self) -> None:
        try:
            if self.engine is not None:
                self._session = self.engine.open()
                self._test(self._session)

            self._ready.put(None)
            while self._obey():
                if self._session is not None and (self._session.running or self._session.waiting):
                    self._tell(self._session.step())
        except BaseException as error:
            self._die(error)

    def _test(self, session: Session) -> None:
        """One short greedy answer: a model that cannot give it is not served."""
        request = Request((BEGIN,), Sampling(temperature=0, max_tokens=TEST_TOKENS))
        session.submit(request)
        try:
            while request.finish is None:
                session.step()
        except UserError as error:
            raise UserError(f"{self.name}: {error.cause}", error.cure) from None

    def _obey(self) -> bool:
        """Carry out the commands that have come, waiting for one if nothing runs; False when told
        to end."""
        idle = self._session is None or not (self._session.running or self._session.waiting)
        if idle and self._commands.empty():
            cpu_tuning.release_threads()

        while True:
            try:
                command = self._commands.get(block=idle)
            except queue.Empty:
                return True

            if command is None:
                return False

            command()
            idle = False

    def _enter(self, request: Request, ticket: Ticket, sample: int) -> None:
        assert self._session is not None
        self._session.submit(request)
        self._owners[request] = ticket, sample

    def _exit(self, request: Request) -> None:
        assert self._session is not None
        if self._owners.pop(request, None):
            self._session.cancel(request)

    def _carry_out(self, work: Callable[[], R], future: asyncio.Future[R]) -> None:
        try:
            result = work()
        except Exception as error:
            self._later(_settle, future, None, error)
        else:
            self._later(_settle, future, result, None)

    def _tell(self, requests: Sequence[Request]) -> None:
        """One call into the loop for a whole step. First and last tokens are told at once, others
        at a pace."""
        now = time.monotonic()
        self._untold.update(dict.fromkeys(requests))
        if due := now - self._told >= PACE * len(self._owners):
            self._told = now

        news = []
        for request in tuple(self._untold) if due else requests:
            if not due and request.finish is None and len(request.tokens) > 1:
                continue

            del self._untold[request]
            owner = self._owners.get(request)
            if owner is not None:
                news.append((*owner, len(request.tokens), request.finish))
                if request.finish is not None:
                    del self._owners[request]

        if news:
            self._later(_tell_all, news)

    def _later(self, what: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(what, *arguments)

    def _die(self, error: BaseException) -> None:
        self.error = error
        if self._loop is None:
            self._ready.put(error)
            return

        if not isinstance(error, UserError):
            traceback.print_exception(error)

        say(f"llama2: the model '{self.name}' has failed: {error}")
        self._later(self.fail_all, errors.interrupted(self.name))


def _tell_all(news: Sequence[tuple[Ticket, int, int, Finish | None]]) -> None:
    for ticket, sample, count, finish in news:
        ticket.tell(sample, count, finish)


def _settle(future: asyncio.Future[R], result: R, error: Exception | None) -> None:
    if future.done():
        return  # the caller has gone

    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(result)
