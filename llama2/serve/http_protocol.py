"""One client's connection: what becomes of those that say nothing, say too much, or are too many.

uvicorn reads and writes HTTP. It waits for ever for a request's head, refuses everybody once all
connections are taken, and closes before a client has sent what it is sending, which the client's
system then reports in place of the answer.
"""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from llama2.serve.errors import ApiError
from llama2.serve.middleware import Traffic
from llama2.serve.settings import Limits

READ = 8192
"""bytes taken from a socket at a time: as many tiny chunks as that holds are parsed before others
get their turn"""
LINGER_SECONDS, LINGER_BYTES = 10, 256 << 20
"""what is still read, unseen, from a client that has had its answer"""


class Connection(H11Protocol):
    """uvicorn's, with a time limit for heads, room for who asks next, and answers that arrive."""

    def __init__(self, *arguments: Any, traffic: Traffic, limits: Limits, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self._traffic, self._limits = traffic, limits
        self._alarm: asyncio.TimerHandle | None = None
        self._heard = False  # whether a part of a head has come
        self.since = self.loop.time()  # when something last happened

    @property
    def answering(self) -> bool:
        """Whether a request is on its way through the application."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        transport.max_size = READ  # type: ignore[attr-defined]
        super().connection_made(Patient(transport, self))  # type: ignore[arg-type]
        self._watch()

        if len(self.connections) > self._limits.connections:
            self._make_room()

        self._traffic.connections = len(self.connections)

    def connection_lost(self, exc: Exception | None) -> None:
        self._rest()
        super().connection_lost(exc)
        self._traffic.connections = len(self.connections)

    def data_received(self, data: bytes) -> None:
        self.since, self._heard = self.loop.time(), True
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        self.since, self._heard = self.loop.time(), False
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._watch()  # the rest of a body that nobody reads

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is no HTTP/1.1 request that can be read"))

    def _make_room(self) -> None:
        """Close the connection that has waited for its client the longest."""
        idle = [
            each
            for each in self.connections
            if isinstance(each, Connection) and each is not self and not each.answering
        ]
        if idle:
            longest = min(idle, key=lambda each: each.since)
            longest.transport.close()
            self.connections.discard(longest)

    def _watch(self) -> None:
        """A client that is not being answered has so long to say what it wants."""
        if self.answering:
            self._rest()
        elif self._alarm is None:
            self._alarm = self.loop.call_later(self._limits.head_seconds, self._too_slow)

    def _rest(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _too_slow(self) -> None:
        self._alarm = None
        if self.answering or self.transport.is_closing():
            return

        if self._heard and self.conn.our_state is h11.IDLE:
            self._refuse(
                ApiError(
                    408, "the head of the request came too slowly", kind="timeout", code="timeout"
                )
            )
        else:
            self.transport.close()

    def _refuse(self, error: ApiError) -> None:
        """Answer what has not become a request, and close."""
        body = json.dumps(error.body()).encode()
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Connection", "close"),
        ]
        for event in (
            h11.Response(
                status_code=error.status, headers=headers, reason=HTTPStatus(error.status).phrase
            ),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")

        self.transport.close()


class Patient:
    """A transport that lets its client finish before it closes: bytes that nobody has read would
    turn the close into a reset, which takes the answer away."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport, self._connection, self._leaving = transport, connection, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        return self._leaving or self._transport.is_closing()

    def close(self) -> None:
        sending = self._connection.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if not sending or self.is_closing():
            self._transport.close()
            return

        self._leaving = True
        self._transport.set_protocol(_Lingering(self._transport, self._connection))
        self._transport.write_eof()
        self._transport.resume_reading()


class _Lingering(asyncio.Protocol):
    """Reads what still comes, for a while, and forgets it."""

    def __init__(self, transport: asyncio.Transport, connection: Connection) -> None:
        self._transport, self._connection, self._left = transport, connection, LINGER_BYTES
        self._alarm = connection.loop.call_later(LINGER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        self._left -= len(data)
        if self._left < 0:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._alarm.cancel()
        self._connection.connection_lost(exc)
