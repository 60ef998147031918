"""Errors as clients get them: OpenAI's error object, with the field at fault in `param`."""

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
        """Return the JSON object for the client."""
        error = {
            "message": _replace_surrogates(self.message),
            "type": self.kind,
            "param": self.param and _replace_surrogates(self.param),
            "code": self.code,
        }
        return {"error": error}


def _replace_surrogates(text: str) -> str:
    """Replace halves of surrogate pairs: JSON can hold them as escapes, UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return the error for a request that its author can correct."""
    return ApiError(400, message, param=param, code=code)


def overload_error(seconds: int) -> ApiError:
    """Return the error for a full queue; `seconds` estimates when a slot is free."""
    return ApiError(
        429,
        f"the server is busy; try again in {seconds} s",
        kind="rate_limit_error",
        code="overloaded",
        headers={"Retry-After": str(seconds)},
    )


def crowd_error() -> ApiError:
    """Return the error for a connection too many, while all others are being answered."""
    return ApiError(
        503,
        "there are too many connections; try again",
        kind=SERVER,
        code="overloaded",
        headers={"Retry-After": "1", "Connection": "close"},
    )


def drain_error() -> ApiError:
    """Return the error for a server that finishes what runs and takes nothing new."""
    return ApiError(
        503,
        "the server is shutting down",
        kind=SERVER,
        code="shutting_down",
        headers={"Retry-After": "30", "Connection": "close"},
    )


def broken(name: str) -> ApiError:
    """Return the error for a model whose thread has died."""
    return ApiError(
        503,
        f"the model '{name}' has failed; the server must be started again",
        kind=SERVER,
        code="model_failed",
    )


def interrupt_error(name: str) -> ApiError:
    """Return the error for a request whose model died while it answered."""
    return ApiError(
        500, f"the model '{name}' failed while it answered", kind=SERVER, code="model_failed"
    )


def defect() -> ApiError:
    """Return the error for a defect of the server."""
    return ApiError(500, "the server has a defect; its log says more", kind=SERVER)


def timeout_error(message: str, headers: dict[str, str] | None = None) -> ApiError:
    """Return the error for a request that was sent or answered too slowly."""
    return ApiError(408, message, kind="timeout", code="timeout", headers=headers)
