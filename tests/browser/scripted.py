"""A server that speaks the OpenAI API as far as the chat page needs it, and says what it was told
to say.

The page's own files are served as `llama2 serve` serves them. What the model answers is scripted,
because a test needs to know it, and because injected script must come from a model that says just
that.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import llama2.serve

WEB = Path(llama2.serve.__file__).parent / "web"
POLICY = "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"


@dataclass
class Script:
    """What the server does. `texts` are answers by the last message; every other message is
    echoed."""

    models: tuple[str, ...] = ("alpha", "beta")
    texts: dict[str, str] = field(default_factory=dict)
    refusals: list[tuple[int, str, dict[str, str]]] = field(default_factory=list)
    key: str = ""
    pause: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)

    def refusal(self, request: Request) -> Response | None:
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return _error(401, "no valid API key was given")

        return None

    def answer(self, body: dict[str, Any]) -> str:
        said: str = body["messages"][-1]["content"]
        return self.texts.get(said, f"{body['model']} heard: {said}")


def _error(status: int, message: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(
        {"error": {"message": message, "type": "error", "code": None}}, status, headers
    )


async def _events(script: Script, body: dict[str, Any]) -> AsyncIterator[str]:
    text = script.answer(body)
    parts = [text[at : at + 4] for at in range(0, len(text), 4)]
    for part in parts:
        yield _event({"choices": [{"index": 0, "delta": {"content": part}, "finish_reason": None}]})
        await asyncio.sleep(script.pause)

    yield _event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    if body.get("stream_options", {}).get("include_usage"):
        yield _event(
            {
                "choices": [],
                "usage": {
                    "prompt_tokens": 9,
                    "completion_tokens": len(parts),
                    "total_tokens": 9 + len(parts),
                },
            }
        )

    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps({'object': 'chat.completion.chunk', **data})}\n\n"


def app(script: Script) -> Starlette:
    """The server that follows `script`, which may be changed while it runs."""

    async def models(request: Request) -> Response:
        return script.refusal(request) or JSONResponse(
            {"object": "list", "data": [{"id": name, "object": "model"} for name in script.models]}
        )

    async def chat(request: Request) -> Response:
        refused = script.refusal(request)
        if refused is None and script.refusals:
            refused = _error(*script.refusals.pop(0))

        if refused:
            return refused

        script.asked.append(await request.json())
        return StreamingResponse(_events(script, script.asked[-1]), media_type="text/event-stream")

    def file(request: Request) -> Response:
        return FileResponse(
            WEB / request.path_params.get("name", "index.html"),
            headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"},
        )

    return Starlette(
        routes=[
            Route("/", file),
            Route("/web/{name}", file),
            Route("/v1/models", models),
            Route("/v1/chat/completions", chat, methods=["POST"]),
        ]
    )


@contextmanager
def running(script: Script) -> Iterator[str]:
    """The address of a server that follows `script`."""
    server = uvicorn.Server(
        uvicorn.Config(
            app(script), port=0, log_level="critical", lifespan="off", timeout_graceful_shutdown=0
        )
    )
    socket = server.config.bind_socket()
    thread = threading.Thread(target=server.run, kwargs={"sockets": [socket]}, daemon=True)
    thread.start()

    try:
        yield f"http://127.0.0.1:{socket.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        socket.close()
