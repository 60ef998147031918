"""Who may ask, how much at a time, and what every answer carries."""

import gzip
import json
import socket
import time

import httpx
import pytest
from servers import serving, wait_for

ASK = {"messages": [{"role": "user", "content": "Name a colour."}], "max_tokens": 2}


@pytest.fixture(scope="module")
def served(policy):
    with serving(policy, slots=2, limits={"body_bytes": 2000}) as running:
        yield running


@pytest.fixture(scope="module")
def hasty(policy):
    with serving(policy, slots=2, limits={"body_seconds": 0.5, "seconds": 0.5}) as running:
        yield running


def test_keys(policy, capsys):
    with serving(policy, keys=("first", "second")) as served:
        for key in ("first", "second"):
            assert len(served.client(key).models.list().data) == 1

        for headers in (
            {},
            {"Authorization": "Bearer third"},
            {"Authorization": "Basic first"},
            {"Authorization": "Bearer"},
            {"Authorization": "Bearer f\u00e4".encode("latin-1")},
        ):
            answer = httpx.post(f"{served.url}/v1/chat/completions", json=ASK, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"

        for target in ("//v1/models", "/v1/models/", "HTTP://localhost//v1/models"):
            assert get(served, target).startswith(b"HTTP/1.1 401 ")

        assert httpx.get(f"{served.url}/health").status_code == 200

    assert "first" not in capsys.readouterr().err


def test_other_names_of_this_machine_are_refused(served):
    """A page elsewhere whose name is made to resolve to 127.0.0.1 must not reach a server without
    keys."""
    for host, status in (
        ("evil.example", 403),
        ("localhost:80", 200),
        ("[::1]:80", 200),
        ("127.0.0.1.evil", 403),
    ):
        assert httpx.get(f"{served.url}/v1/models", headers={"Host": host}).status_code == status


def test_any_name_of_loopback_is_answered(served):
    for host in ("LOCALHOST:80", "localhost.:80", "127.0.0.2", "[::1]"):
        assert httpx.get(f"{served.url}/v1/models", headers={"Host": host}).status_code == 200


def test_a_server_at_another_address_of_loopback_is_as_careful(policy):
    with serving(policy, host="127.0.0.2") as served:
        assert (
            httpx.get(f"{served.url}/v1/models", headers={"Host": "evil.example"}).status_code
            == 403
        )


def test_a_page_elsewhere_cannot_send_a_form(served):
    answer = httpx.post(
        f"{served.url}/v1/chat/completions",
        content=json.dumps(ASK),
        headers={"Content-Type": "text/plain"},
    )
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


def raw(served, head, body=b"", wait=60.0):
    with socket.create_connection(served.address, wait) as link:
        link.sendall(
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n{head}\r\n\r\n".encode()
            + body
        )
        heard = b""
        while part := link.recv(4096):
            heard += part
            if b"\r\n\r\n" in heard and heard.endswith(b"}"):
                break

    return heard


def test_large_requests_are_refused_early(served):
    assert raw(served, "Content-Type: application/json\r\nContent-Length: 999999999").startswith(
        b"HTTP/1.1 413 "
    )
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    assert raw(
        served, "Content-Type: application/json\r\nTransfer-Encoding: chunked", 2 * chunk
    ).startswith(b"HTTP/1.1 413 ")


def test_slow_requests_are_given_up(hasty):
    assert raw(hasty, "Content-Type: application/json\r\nContent-Length: 100", b"{").startswith(
        b"HTTP/1.1 408 "
    )


def test_long_answers_are_given_up(hasty, monkeypatch):
    step = hasty.worker._session.step
    monkeypatch.setattr(hasty.worker._session, "step", lambda: (time.sleep(0.05), step())[1])
    asked = {**ASK, "max_tokens": 200, "logit_bias": {"2": -100}}
    answer = hasty.post("chat/completions", **asked)
    assert answer.status_code == 408
    assert "ask for fewer tokens" in answer.json()["error"]["message"]
    lines = hasty.post("chat/completions", **asked, stream=True).text.strip().split("\n\n")
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
    wait_for(lambda: hasty.worker._session.running == 0)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"1",
        b'"x"',
        b"\xff\xfe",
        b'{"messages": [{"role": "user", "content": "\xff"}]}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"\\ud800": 1}',
        b"[" * 1500,
        b'{"a":' * 300,
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": 1e400}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 500 + b"}",
    ],
)
def test_malformed_bodies(served, body):
    answer = httpx.post(
        f"{served.url}/v1/chat/completions",
        content=body,
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "kind", "said"),
    [
        (
            b'{"messages": [{"role": "user", "content": "\xff"}]}',
            "application/json",
            "not UTF-8: byte 44",
        ),
        (
            b'{"messages": [{"role": "user", "content": "x"}]}',
            "application/x-www-form-urlencoded",
            "'Content-Type:",
        ),
    ],
)
def test_what_is_wrong_with_a_body_is_said(served, content, kind, said):
    answer = httpx.post(
        f"{served.url}/v1/chat/completions", content=content, headers={"Content-Type": kind}
    )
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_a_packed_body_is_refused_by_name(served):
    answer = httpx.post(
        f"{served.url}/v1/chat/completions",
        content=gzip.compress(json.dumps(ASK).encode()),
        headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
    )
    assert answer.status_code == 415
    assert "Content-Encoding: gzip" in answer.json()["error"]["message"]
    assert answer.headers["accept-encoding"] == "identity"
    plain = httpx.post(
        f"{served.url}/v1/chat/completions", json=ASK, headers={"Content-Encoding": "identity"}
    )
    assert plain.status_code == 200


def test_head_is_get_without_a_body(served):
    for path in ("/", "/health", "/v1/models", "/openapi.json"):
        head, get = httpx.head(f"{served.url}{path}"), httpx.get(f"{served.url}{path}")
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-type"] == get.headers["content-type"]
        assert int(head.headers["content-length"]) == len(get.content)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v1/models", {"GET", "HEAD"}),
        ("DELETE", "/v1/models/policy", {"GET", "HEAD"}),
        ("GET", "/v1/chat/completions", {"POST"}),
        ("HEAD", "/v1/completions", {"POST"}),
        ("PUT", "/", {"GET", "HEAD"}),
        ("OPTIONS", "/v1/chat/completions", {"POST"}),
    ],
)
def test_a_wrong_method_is_told_the_right_ones(served, method, path, allowed):
    answer = httpx.request(method, f"{served.url}{path}")
    assert answer.status_code == 405
    assert set(answer.headers["allow"].split(", ")) == allowed
    assert method == "HEAD" or answer.json()["error"]["message"].startswith(f"{method} {path}: ")


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/v1/models/", 200),
        ("/v1/models//", 200),
        ("/health/", 200),
        ("/v1/models?limit=20", 200),
        ("//v1/models", 200),
        ("/v1", 404),
        ("/models", 404),
        ("*", 404),
        ("/v1/models/none", 404),
    ],
)
def test_targets(served, target, status):
    heard = get(served, target)
    assert heard.startswith(b"HTTP/1.1 %d " % status)
    assert status == 200 or b'{"error":{' in heard


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/models", "ask /v1/models: a client's base URL ends in /v1"),
        ("/chat/completions", "ask /v1/chat/completions: "),
        ("/v1/v1/chat/completions", "ask /v1/chat/completions: "),
        (
            "/v1/embeddings",
            "this server has /v1/chat/completions, /v1/completions, /v1/score, /v1/models",
        ),
        ("/v1/responses", "this server has /v1/chat/completions, "),
        ("/v1", "this server has /v1/chat/completions, "),
        ("/api/chat", "this server has /v1/chat/completions, "),
        ("/robots.txt", "GET /robots.txt: Not Found"),
    ],
)
def test_what_is_not_there_has_something_in_its_place(served, path, said):
    for answer in (
        httpx.get(f"{served.url}{path}"),
        httpx.post(f"{served.url}{path}", json={"input": "a"}),
    ):
        assert answer.status_code == 404
        error = answer.json()["error"]
        assert said.removeprefix("GET ") in error["message"]
        assert error["type"] == "invalid_request_error"


def test_a_target_may_be_a_whole_address_and_then_names_the_host(served):
    port = served.address[1]
    assert get(served, f"http://localhost:{port}/v1/models").startswith(b"HTTP/1.1 200 ")
    assert get(served, "HTTP://localhost").startswith(b"HTTP/1.1 200 ")
    assert get(served, "http://evil.example/v1/models").startswith(b"HTTP/1.1 403 ")


def get(served, target):
    with socket.create_connection(served.address, 10) as link:
        link.sendall(
            f"GET {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
        )
        heard = b""
        while part := link.recv(65536):
            heard += part

    return heard


def test_a_slash_at_the_end_of_a_post_changes_nothing(served):
    assert httpx.post(f"{served.url}/v1/chat/completions/", json=ASK).status_code == 200


def test_a_name_with_a_slash(policy):
    with serving(policy, names=["org/second"]) as served:
        for path in ("org%2Fsecond", "org/second", "org/second/"):
            assert httpx.get(f"{served.url}/v1/models/{path}").json()["id"] == "org/second"

        assert served.client().models.retrieve("org/second").id == "org/second"


def test_pages_of_named_sites_may_ask(policy):
    with serving(policy, keys=("secret",), cors=["http://localhost:5173"]) as served:
        site = {"Origin": "http://localhost:5173"}
        asking = {
            **site,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,content-type",
        }
        before = httpx.options(f"{served.url}/v1/chat/completions", headers=asking)
        assert before.status_code == 204
        assert before.headers["access-control-allow-origin"] == site["Origin"]
        assert before.headers["access-control-allow-headers"] == "authorization,content-type"
        assert "POST" in before.headers["access-control-allow-methods"]
        answer = httpx.post(
            f"{served.url}/v1/chat/completions",
            json=ASK,
            headers={**site, "Authorization": "Bearer secret"},
        )
        refused = httpx.post(f"{served.url}/v1/chat/completions", json=ASK, headers=site)
        assert (answer.status_code, refused.status_code) == (200, 401)  # and a page may read why

        for each in (answer, refused):
            assert each.headers["access-control-allow-origin"] == site["Origin"]
            assert "X-Request-Id" in each.headers["access-control-expose-headers"]
            assert each.headers["vary"] == "Origin"

        other = {**asking, "Origin": "https://evil.example"}
        assert httpx.options(f"{served.url}/v1/chat/completions", headers=other).status_code == 401
        assert (
            "access-control-allow-origin"
            not in httpx.get(f"{served.url}/health", headers=other).headers
        )


@pytest.mark.parametrize(
    ("origins", "cause"),
    [
        (("*",), "--cors '*' without API keys"),
        (("localhost:5173",), "--cors: 'localhost:5173' is no origin"),
    ],
)
def test_origins_that_are_refused_at_the_start(policy, one_line, monkeypatch, origins, cause):
    monkeypatch.delenv("LLAMA2_API_KEYS", raising=False)
    assert one_line("serve", policy, "--port", 0, "--cors", *origins).startswith(cause)


def test_streams_are_not_held_back_by_proxies(served):
    headers = served.post("chat/completions", **ASK, stream=True).headers
    assert (headers["x-accel-buffering"], headers["cache-control"]) == ("no", "no-cache")


def test_not_http_at_all(served):
    with socket.create_connection(served.address, 5) as link:
        link.sendall(b"\x16\x03\x01 nonsense\r\n\r\n")
        assert link.recv(100).startswith(b"HTTP/1.1 400")

    assert served.post("chat/completions", **ASK).status_code == 200


def test_what_every_answer_carries(served):
    for path in ("/", "/openapi.json", "/health", "/nowhere"):
        headers = httpx.get(f"{served.url}{path}").headers
        assert headers["content-security-policy"].startswith("default-src 'self';")
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-request-id"]
        assert "server" not in headers


def test_the_log_tells_what_happened_and_nothing_that_was_said(served, capsys):
    served.post("chat/completions", messages=[{"role": "user", "content": "secret"}], max_tokens=2)
    lines = []

    def is_logged():  # the line comes after the answer, and one of an earlier request may be late
        lines.extend(capsys.readouterr().err.splitlines())
        return any('"POST"' in line for line in lines)

    wait_for(is_logged)
    logged = [json.loads(line) for line in lines if line.startswith("{")]
    line = next(line for line in logged if line["method"] == "POST")
    assert {"time", "id", "client", "ms"} < line.keys()
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/chat/completions", 200)
    assert (line["model"], line["completion_tokens"]) == ("policy", 2)
    assert "secret" not in json.dumps(line)


def test_pages(served):
    document = httpx.get(f"{served.url}/openapi.json").json()
    assert "post" in document["paths"]["/v1/chat/completions"]
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert fields["repetition_penalty"]["description"] == "not in OpenAI's interface"
    # FastAPI's own pages of documentation load scripts from elsewhere
    assert httpx.get(f"{served.url}/docs").status_code == 404

    for name in ("..%2fapp.py", "%2e%2e/app.py", "app.py", "nothing.js"):
        assert httpx.get(f"{served.url}/web/{name}").status_code == 404
