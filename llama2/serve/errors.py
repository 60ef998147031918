"""What a client is told when a request fails: OpenAI's error object, with the field at fault in
`param`."""

from __future__ import annotations

from typing import Any

LONGEST = 2000
"""characters of a message, which may quote the request"""
INVALID, SERVER = "invalid_request_error", "server_error"


class ApiError(Exception):
    """A request that is refused or fails: HTTP `status`, one sentence, the field at fault and a
    code for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code = status, message[:LONGEST], kind, code
        self.param = param and param[:LONGEST]
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The JSON that goes to the client."""
        return {
            "error": {
                "message": _writable(self.message),
                "type": self.kind,
                "param": None if self.param is None else _writable(self.param),
                "code": self.code,
            }
        }


def _writable(text: str) -> str:
    """Without halves of surrogate pairs, which a client may send as an escape in JSON and UTF-8
    cannot hold."""
    return text.encode("utf-8", "replace").decode()


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Something in the request is to be mended by who wrote it."""
    return ApiError(400, message, param=param, code=code)


def overloaded(seconds: int) -> ApiError:
    """All slots and all places of the queue are taken; `seconds` is a guess at when one is free."""
    return ApiError(
        429,
        f"the server is busy; try again in {seconds} s",
        kind="rate_limit_error",
        code="overloaded",
        headers={"Retry-After": str(seconds)},
    )


def crowded() -> ApiError:
    """All connections are taken, and all of them are being answered."""
    return ApiError(
        503,
        "there are too many connections; try again",
        kind=SERVER,
        code="overloaded",
        headers={"Retry-After": "1", "Connection": "close"},
    )


def draining() -> ApiError:
    """The server finishes what runs and takes nothing new."""
    return ApiError(
        503,
        "the server is shutting down",
        kind=SERVER,
        code="shutting_down",
        headers={"Retry-After": "30", "Connection": "close"},
    )


def broken(name: str) -> ApiError:
    """The thread that owns a model has died: nothing will be answered until the server is started
    again."""
    return ApiError(
        503,
        f"the model '{name}' has failed; the server must be started again",
        kind=SERVER,
        code="model_failed",
    )


def interrupted(name: str) -> ApiError:
    """The same, for a request that was being answered."""
    return ApiError(
        500, f"the model '{name}' failed while it answered", kind=SERVER, code="model_failed"
    )


def too_slow(seconds: float) -> ApiError:
    """The request did not end in the time that a request may take."""
    return ApiError(
        408,
        f"the request took longer than the {seconds:g} s that are allowed; ask for fewer tokens",
        kind="timeout",
        code="timeout",
    )
