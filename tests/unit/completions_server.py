"""A real server of completions in a thread, on a real engine, that misbehaves when it is told
to."""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llama2.generate.engine import Engine
from llama2.generate.sampling import Sampling
from llama2.tokenizer.tokenizer import Tokenizer

Misdeed = Callable[[dict[str, Any]], Response | None]


@dataclass
class Completions:
    """What the server was asked, and what it shall do wrong: `plan` holds a misdeed for each of the
    next requests."""

    engine: Engine
    tokenizer: Tokenizer
    url: str = ""
    plan: deque[str] = field(default_factory=deque)
    poisoned: tuple[int, ...] | None = None  # the prompt that always fails
    ids: str = "token_ids"  # how ids are sent: "token_ids", "names" or "no"
    unknown: tuple[str, ...] = ()  # fields that are refused
    stop_id: bool = True  # whether the stop id is among the tokens
    key: str = ""
    delay: float = 0.0
    asked: list[dict[str, Any]] = field(default_factory=list)
    answered: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    at_once: int = 0
    most_at_once: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    async def completions(self, request: Request) -> Response:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._respond(request)
        finally:
            self.at_once -= 1

    async def _respond(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        await asyncio.sleep(self.delay)

        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "wrong key"}}, 401)

        if refused := [name for name in self.unknown if name in body]:
            message = f"unknown parameter '{refused[0]}'; did you mean 'return_token_ids'?"
            return JSONResponse({"error": {"message": message}}, 400)

        if tuple(body["prompt"]) == self.poisoned:
            return JSONResponse({"error": {"message": "this one never"}}, 500)

        match self.plan.popleft() if self.plan else "":
            case "busy":
                return JSONResponse(
                    {"error": {"message": "slow down"}}, 429, {"Retry-After": "0.3"}
                )
            case "broken":
                return Response("oh no", 500)
            case "garbage":
                return Response('{"choices": [{"te', media_type="application/json")
            case "empty":
                return JSONResponse({"choices": []})
            case "aborted":
                return JSONResponse(
                    {"choices": [{"text": "", "finish_reason": "abort", "token_ids": []}]}
                )
            case "filtered":
                return JSONResponse(
                    {"choices": [{"text": "No.", "finish_reason": "content_filter"}]}
                )
            case "dropped":
                return StreamingResponse(_breaking_off(), media_type="application/json")
            case "slow":
                await asyncio.sleep(6.0)

        choice = await asyncio.to_thread(self._choice, body)
        self.answered[(tuple(body["prompt"]), body["seed"])] += 1
        if body.get("stream"):
            return StreamingResponse(self._events(choice), media_type="text/event-stream")

        return JSONResponse({"choices": [choice]})

    def _choice(self, body: dict[str, Any]) -> dict[str, Any]:
        sampling = Sampling(
            body["temperature"],
            body["top_p"],
            body.get("top_k", 0),
            body["max_tokens"],
            stop=tuple(body.get("stop_token_ids", (self.tokenizer.eos,))),
            seed=body["seed"],
        )
        with self._lock:
            found = self.engine.generate([body["prompt"]], sampling)[0][0]

        tokens, logprobs = list(found.tokens), list(found.logprobs)
        text = self.tokenizer.decode(token for token in tokens if token != self.tokenizer.eos)
        choice: dict[str, Any] = {"text": text, "finish_reason": found.finish, "index": 0}

        if found.finish == "stop" and not self.stop_id:
            tokens, logprobs = tokens[:-1], logprobs[:-1]

        if self.ids == "token_ids":
            choice |= {
                "token_ids": tokens,
                "logprobs": {"tokens": ["?"] * len(tokens), "token_logprobs": logprobs},
            }

        if self.ids == "names":
            choice["logprobs"] = {
                "tokens": [f"token_id:{token}" for token in tokens],
                "token_logprobs": logprobs,
            }

        return choice

    def _events(self, choice: dict[str, Any]) -> Iterator[str]:
        tokens = choice.get("token_ids")
        parts = (
            [{"text": "", "token_ids": [token]} for token in tokens]
            if tokens
            else [{"text": choice["text"]}]
        )
        for part in parts:
            yield f"data: {json.dumps({'choices': [part]})}\n\n"

        yield ": a comment\n\ndata: [DONE]\n\n"

    async def models(self, request: Request) -> Response:
        return JSONResponse(
            {
                "data": [
                    {"id": "tiny", "max_model_len": self.engine.context},
                    {"id": "judge", "llama2": {"kind": "reward", "context": 99}},
                ]
            }
        )


async def _breaking_off() -> Any:
    yield b'{"choices": '
    raise ConnectionError("the cable is out")


@contextmanager
def serving(engine: Engine, tokenizer: Tokenizer) -> Iterator[Completions]:
    """A server that runs until the block ends."""
    state = Completions(engine, tokenizer)
    app = Starlette(
        routes=[
            Route("/v1/completions", state.completions, methods=["POST"]),
            Route("/v1/models", state.models),
        ]
    )
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()

    try:
        while not server.started:
            assert thread.is_alive()

        state.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield state
    finally:
        server.should_exit = True
        thread.join()
