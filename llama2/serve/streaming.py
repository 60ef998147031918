"""The client at the other end: answers that stop being made when it goes away, and streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager, aclosing
from typing import TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

R = TypeVar("R")
GONE = 499  # nginx's status for a client that closed the connection


class Gone(Exception):
    """The client has closed the connection."""


async def unless_gone(receive: Receive, work: Awaitable[R]) -> R:
    """The result of `work`; if the client goes away before, `work` is cancelled and Gone raised."""
    task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_leaving(receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()

        raise Gone
    finally:
        for each in (task, leaving):
            each.cancel()

        await asyncio.gather(task, leaving, return_exceptions=True)


async def _leaving(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Server-sent events. `held` is left when the stream ends, or the client goes; `end` is called
    last."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        held: AbstractContextManager[object],
        end: Callable[[], None],
    ) -> None:
        super().__init__(
            media_type="text/event-stream",
            headers={
                # proxies pass each event on as it comes
                "Cache-Control": "no-cache",
                "X-Accel-Buffering": "no",
            },
        )
        del self.headers["content-length"]
        self._events, self._held, self._end = events, held, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._held:
                await unless_gone(receive, self._send(send))
        except Gone:
            pass
        finally:
            self._end()

    async def _send(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        async with aclosing(self._events) as events:
            async for body in events:
                await send({"type": "http.response.body", "body": body, "more_body": True})

        await send({"type": "http.response.body", "body": b"", "more_body": False})
