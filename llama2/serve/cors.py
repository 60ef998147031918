"""The names that a server answers to, and the sites whose pages may read its answers (CORS).

Starlette's middleware for CORS stays unused: it compares origins by case, and would refuse
preflights in another form than this server's errors.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers

from llama2.errors import UserError

ANY = "*"
ORIGIN = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_NAMES = re.compile(r"[A-Za-z0-9_, -]{1,1000}")  # of headers that a page wants to send
_EXPOSED = "X-Request-Id, Retry-After"


def is_loopback(name: str) -> bool:
    """Return whether a name or an address, perhaps in brackets, is one of this machine that no
    other machine can use."""
    name = name.lower().removesuffix(".")
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]

    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def listens_here(host: str) -> bool:
    """Return whether a server at `host` can be reached from this machine alone."""
    try:
        addresses = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False

    return all(is_loopback(str(address[0])) for *_, address in addresses)


def host_name(host: str) -> str:
    """Return a header `Host` without its port."""
    name, colon, port = host.rpartition(":")
    if colon and port.isdigit() and (":" not in name or name.endswith("]")):
        return name

    return host.removesuffix(":")


@dataclass(frozen=True)
class Cors:
    """The sites whose pages may ask; `origins` are as browsers write them, or "*" for all.
    UserError for another form."""

    origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        for origin in self.origins:
            if origin != ANY and not ORIGIN.fullmatch(origin):
                raise UserError(
                    f"--cors: '{origin}' is no origin: write it as browsers do, for example "
                    "http://localhost:5173",
                    "give scheme, host and port",
                )

    def headers(self, request: Headers) -> dict[str, str]:
        """Return the headers that let a browser's page read the answer."""
        if not self.origins:
            return {}

        origin = request.get("origin", "")
        allowed = ANY in self.origins or origin.lower() in map(str.lower, self.origins)
        if not origin or not allowed:
            return {"Vary": "Origin"}

        return {
            "Access-Control-Allow-Origin": ANY if ANY in self.origins else origin,
            "Vary": "Origin",
            "Access-Control-Expose-Headers": _EXPOSED,
        }

    def preflight(self, request: Headers) -> dict[str, str] | None:
        """Return the answer to a browser that asks before it sends a page's request; None if this
        is no such question, or the page may not ask."""
        asks = "access-control-request-method" in request
        if not asks or "Access-Control-Allow-Origin" not in self.headers(request):
            return None

        names = request.get("access-control-request-headers", "")
        if not _NAMES.fullmatch(names):
            names = "Authorization, Content-Type"

        answer = {
            "Access-Control-Allow-Methods": "GET, HEAD, POST",
            "Access-Control-Max-Age": "600",
            "Access-Control-Allow-Headers": names,
        }
        if request.get("access-control-request-private-network") == "true":
            answer["Access-Control-Allow-Private-Network"] = "true"

        return answer
