"""Who may ask, how much at a time, and what every answer carries."""

import json
import socket
import time

import httpx
import pytest
from servers import serving, wait_for

ASK = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 2}


@pytest.fixture(scope="module")
def served(policy):
    with serving(policy, slots=2, limits={"body_bytes": 2000, "body_seconds": 0.3, "seconds": 0.5}) as running:
        yield running


def test_keys(policy, capsys):
    with serving(policy, keys=("first", "second")) as served:
        for key in ("first", "second"):
            assert len(served.client(key).models.list().data) == 1
        for headers in ({}, {"Authorization": "Bearer third"}, {"Authorization": "Basic first"},
                        {"Authorization": "Bearer"}, {"Authorization": "Bearer f\u00e4".encode("latin-1")}):
            answer = httpx.post(f"{served.url}/v1/chat/completions", json=ASK, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{served.url}/health").status_code == 200
    assert "first" not in capsys.readouterr().err


def test_other_names_of_this_machine_are_refused(served):
    """A page elsewhere whose name is made to resolve to 127.0.0.1 must not reach a server without keys."""
    for host, status in (("evil.example", 403), ("localhost:80", 200), ("[::1]:80", 200), ("127.0.0.1.evil", 403)):
        assert httpx.get(f"{served.url}/v1/models", headers={"Host": host}).status_code == status


def test_a_page_elsewhere_cannot_send_a_form(served):
    answer = httpx.post(f"{served.url}/v1/chat/completions", content=json.dumps(ASK),
                        headers={"Content-Type": "text/plain"})
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


def raw(served, head, body=b"", wait=5.0):
    with socket.create_connection(served.address, wait) as link:
        link.sendall(f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode() + body)
        heard = b""
        while part := link.recv(4096):
            heard += part
            if b"\r\n\r\n" in heard and heard.endswith(b"}"):
                break
    return heard


def test_large_requests_are_refused_early(served):
    assert raw(served, "Content-Type: application/json\r\nContent-Length: 999999999").startswith(b"HTTP/1.1 413 ")
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    assert raw(served, "Content-Type: application/json\r\nTransfer-Encoding: chunked", 2 * chunk).startswith(
        b"HTTP/1.1 413 ")


def test_slow_requests_are_given_up(served):
    begin = time.monotonic()
    assert raw(served, "Content-Type: application/json\r\nContent-Length: 100", b"{").startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - begin < 3


def test_long_answers_are_given_up(served, monkeypatch):
    step = served.worker._session.step
    monkeypatch.setattr(served.worker._session, "step", lambda: (time.sleep(0.05), step())[1])
    asked = {**ASK, "max_tokens": 200, "logit_bias": {"2": -100}}
    answer = served.post("chat/completions", **asked)
    assert answer.status_code == 408
    assert "ask for fewer tokens" in answer.json()["error"]["message"]
    lines = served.post("chat/completions", **asked, stream=True).text.strip().split("\n\n")
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    wait_for(lambda: served.worker._session.running == 0)


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"\xff\xfe", b'{"messages": [{"role": "user", "content": "\xff"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"\\ud800": 1}', b"[" * 1500, b'{"a":' * 300,
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "x"}], "seed": 1e400}',
    b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 500 + b"}",
])
def test_malformed_bodies(served, body):
    answer = httpx.post(f"{served.url}/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(("content", "kind", "said"), [
    (b'{"messages": [{"role": "user", "content": "\xff"}]}', "application/json", "not UTF-8: byte 44"),
    (b'{"messages": [{"role": "user", "content": "x"}]}', "application/x-www-form-urlencoded", "'Content-Type:"),
])
def test_what_is_wrong_with_a_body_is_said(served, content, kind, said):
    answer = httpx.post(f"{served.url}/v1/chat/completions", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_not_http_at_all(served):
    with socket.create_connection(served.address, 5) as link:
        link.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert link.recv(100).startswith(b"HTTP/1.1 400")
    assert served.post("chat/completions", **ASK).status_code == 200


def test_what_every_answer_carries(served):
    for path in ("/", "/docs", "/openapi.json", "/health", "/nowhere"):
        headers = httpx.get(f"{served.url}{path}").headers
        assert headers["content-security-policy"].startswith("default-src 'self';")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-request-id"]
        assert "server" not in headers


def test_the_log_tells_what_happened_and_nothing_that_was_said(served, capsys):
    served.post("chat/completions", messages=[{"role": "user", "content": "secret"}], max_tokens=2)
    said = [json.loads(line) for line in capsys.readouterr().err.splitlines() if line.startswith("{")]
    line = next(line for line in said if line["method"] == "POST")  # a line of an earlier request may come late
    assert {"time", "id", "client", "ms"} < line.keys()
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (line["model"], line["completion_tokens"]) == ("policy", 2)
    assert "secret" not in json.dumps(line)


def test_pages(served):
    docs = httpx.get(f"{served.url}/docs").text
    assert "POST /v1/chat/completions" in docs
    assert "repetition_penalty" in docs
    assert "://" not in docs
    assert "<script" not in docs
    for name in ("..%2fapp.py", "%2e%2e/app.py", "app.py", "nothing.js"):
        assert httpx.get(f"{served.url}/web/{name}").status_code == 404
