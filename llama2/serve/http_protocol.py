"""The HTTP protocol of one connection, and clients that send nothing, too much, or are too many.

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

from llama2.serve.errors import ApiError, timeout_error
from llama2.serve.middleware import Traffic
from llama2.serve.settings import Limits

READ = 8192
"""bytes taken from a socket at a time: as many tiny chunks as that holds are parsed before others
get their turn"""
LINGER_SECONDS, LINGER_BYTES = 10, 256 << 20
"""limits of what is read and thrown away from a client that has had its answer"""


class HttpProtocol(H11Protocol):
    """uvicorn's, with a time limit for heads, room for who asks next, and answers that arrive."""

    def __init__(self, *arguments: Any, traffic: Traffic, limits: Limits, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self._traffic, self._limits = traffic, limits
        self._alarm: asyncio.TimerHandle | None = None
        self._receiving = False  # whether a part of a head has come
        self.since = self.loop.time()  # when something last happened

    @property
    def answering(self) -> bool:
        """Return whether a request is on its way through the application."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Count the connection, and close another one if there are too many."""
        transport.max_size = READ  # type: ignore[attr-defined]
        super().connection_made(LingeringTransport(transport, self))  # type: ignore[arg-type]
        self._start_alarm()

        if len(self.connections) > self._limits.connections:
            self._make_room()

        self._traffic.connections = len(self.connections)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_alarm()
        super().connection_lost(exc)
        self._traffic.connections = len(self.connections)

    def data_received(self, data: bytes) -> None:
        """Take what a client has sent."""
        self.since, self._receiving = self.loop.time(), True
        super().data_received(data)
        self._start_alarm()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self.since, self._receiving = self.loop.time(), False
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._start_alarm()  # the rest of a body that nobody reads

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(ApiError(400, "this is no HTTP/1.1 request that can be read"))

    def _make_room(self) -> None:
        """Close the connection that has waited for its client the longest."""
        idle = [
            other
            for other in self.connections
            if isinstance(other, HttpProtocol) and other is not self and not other.answering
        ]
        if idle:
            longest = min(idle, key=lambda other: other.since)
            longest.transport.close()
            self.connections.discard(longest)

    def _start_alarm(self) -> None:
        """Limit the time in which a client that is not being answered must send a head."""
        if self.answering:
            self._stop_alarm()
        elif self._alarm is None:
            self._alarm = self.loop.call_later(self._limits.head_seconds, self._time_out)

    def _stop_alarm(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None

    def _time_out(self) -> None:
        self._alarm = None
        if self.answering or self.transport.is_closing():
            return

        if self._receiving and self.conn.our_state is h11.IDLE:
            self._refuse(timeout_error("the head of the request came too slowly"))
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
        reason = HTTPStatus(error.status).phrase
        head = h11.Response(status_code=error.status, headers=headers, reason=reason)
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")

        self.transport.close()


class LingeringTransport:
    """A transport that lets its client finish before it closes: bytes that nobody has read would
    turn the close into a reset, which takes the answer away."""

    def __init__(self, transport: asyncio.Transport, protocol: HttpProtocol) -> None:
        self._transport, self._protocol, self._lingering = transport, protocol, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def is_closing(self) -> bool:
        """Return whether nothing more can be sent."""
        return self._lingering or self._transport.is_closing()

    def close(self) -> None:
        """Close, at once or when the client has sent what it is sending."""
        sending = self._protocol.conn.their_state in (h11.SEND_BODY, h11.ERROR)
        if not sending or self.is_closing():
            self._transport.close()
            return

        self._lingering = True
        self._transport.set_protocol(_Drain(self._transport, self._protocol))
        self._transport.write_eof()
        self._transport.resume_reading()


class _Drain(asyncio.Protocol):
    """Reads what still comes, for a while, and throws it away."""

    def __init__(self, transport: asyncio.Transport, protocol: HttpProtocol) -> None:
        self._transport, self._protocol, self._left = transport, protocol, LINGER_BYTES
        self._alarm = protocol.loop.call_later(LINGER_SECONDS, transport.abort)

    def data_received(self, data: bytes) -> None:
        """Count what is thrown away; give up on a client that sends too much."""
        self._left -= len(data)
        if self._left < 0:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Pass the end of the connection on."""
        self._alarm.cancel()
        self._protocol.connection_lost(exc)
