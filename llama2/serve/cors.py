"""Which names a server answers to, and which pages of other sites may read what it says (CORS)."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers

ANY = "*"
ORIGIN = re.compile(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?")
_NAMES = re.compile(r"[A-Za-z0-9_, -]{1,1000}")  # of headers that a page wants to send
_EXPOSED = "X-Request-Id, Retry-After"


def is_loopback(name: str) -> bool:
    """Whether a name or an address, perhaps in brackets, is one of this machine that no other
    machine can use."""
    name = name.lower().removesuffix(".")
    if name.startswith("[") and name.endswith("]"):
        name = name[1:-1]

    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name == "localhost"


def listens_here(host: str) -> bool:
    """Whether a server at `host` can be reached from this machine alone."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return False

    return all(is_loopback(str(address[0])) for *_, address in found)


def host_name(host: str) -> str:
    """A Host header without its port."""
    name, colon, port = host.rpartition(":")
    return (
        name
        if colon and port.isdigit() and (":" not in name or name.endswith("]"))
        else host.removesuffix(":")
    )


@dataclass(frozen=True)
class Cors:
    """The sites whose pages may ask; `origins` are as browsers write them, or "*" for all. Nobody
    by default."""

    origins: Sequence[str] = ()

    def __post_init__(self) -> None:
        for origin in self.origins:
            if origin != ANY and not ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"'{origin}' is no origin: write it as browsers do, for example http://localhost:5173"
                )

    def headers(self, asked: Headers) -> dict[str, str]:
        """What tells a browser that a page may read the answer."""
        if not self.origins:
            return {}

        origin, open_to_all = asked.get("origin", ""), ANY in self.origins
        if not origin or not (open_to_all or origin.lower() in map(str.lower, self.origins)):
            return {"Vary": "Origin"}

        return {
            "Access-Control-Allow-Origin": ANY if open_to_all else origin,
            "Vary": "Origin",
            "Access-Control-Expose-Headers": _EXPOSED,
        }

    def preflight(self, asked: Headers) -> dict[str, str] | None:
        """The answer to a browser that asks before it sends a page's request; None if it is nothing
        of the kind."""
        if (
            "access-control-request-method" not in asked
            or "Access-Control-Allow-Origin" not in self.headers(asked)
        ):
            return None

        wanted = asked.get("access-control-request-headers", "")
        allowed = {
            "Access-Control-Allow-Methods": "GET, HEAD, POST",
            "Access-Control-Max-Age": "600",
            "Access-Control-Allow-Headers": wanted
            if _NAMES.fullmatch(wanted)
            else "Authorization, Content-Type",
        }
        if asked.get("access-control-request-private-network") == "true":
            allowed["Access-Control-Allow-Private-Network"] = "true"

        return allowed
