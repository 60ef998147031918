"""The names that a server answers to, and the pages that may read its answers."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from llama2.errors import UserError
from llama2.serve.cors import Cors, host_name, is_loopback, listens_here


@pytest.mark.parametrize(
    ("header", "local"),
    [
        ("localhost", True),
        ("LOCALHOST:8000", True),
        ("localhost.:80", True),
        ("127.0.0.2:1", True),
        ("[::1]:80", True),
        ("[::1]", True),
        ("::1", True),
        ("127.0.0.1", True),
        ("localhost:", True),
        ("10.0.0.1", False),
        ("127.0.0.1.evil", False),
        ("evil.example", False),
        ("localhost.evil:80", False),
        ("[::1].evil", False),
        ("", False),
        ("localhost@evil.example", False),
        ("[2001:db8::1]:80", False),
        ("127.0.0.1:80.evil", False),
    ],
)
def test_names(header: str, local: bool) -> None:
    assert is_loopback(host_name(header)) is local


def test_where_a_server_listens() -> None:
    for host, local in (
        ("127.0.0.2", True),
        ("localhost", True),
        ("::1", True),
        ("0.0.0.0", False),
        ("::", False),
    ):
        assert listens_here(host) is local


@pytest.mark.parametrize("origin", ["localhost:5173", "http://a.example/", "null", "file://", ""])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(UserError, match="is no origin"):
        Cors([origin])


def test_who_may_read() -> None:
    cors = Cors(["http://localhost:5173", "https://chat.example"])
    assert (
        cors.headers(Headers({"origin": "https://chat.example"}))["Access-Control-Allow-Origin"]
        == "https://chat.example"
    )
    for other in (
        "https://chat.example.evil",
        "http://chat.example",
        "https://chat.example:444",
        "null",
    ):
        assert cors.headers(Headers({"origin": other})) == {"Vary": "Origin"}

    assert Cors().headers(Headers({"origin": "https://chat.example"})) == {}
    assert (
        Cors(["*"]).headers(Headers({"origin": "https://any.example"}))[
            "Access-Control-Allow-Origin"
        ]
        == "*"
    )
    asking = {"origin": "https://chat.example", "access-control-request-method": "POST"}
    allowed = cors.preflight(
        Headers({**asking, "access-control-request-headers": "authorization,x-stainless-os"})
    )
    assert allowed is not None
    assert allowed["Access-Control-Allow-Headers"] == "authorization,x-stainless-os"
    assert cors.preflight(Headers({**asking, "origin": "https://other.example"})) is None
    assert cors.preflight(Headers({"origin": "https://chat.example"})) is None
