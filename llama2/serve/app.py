"""The application: routes, what errors look like, health, metrics and pages."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp

import llama2
from llama2.serve import errors
from llama2.serve.cors import Cors, listens_here
from llama2.serve.errors import ApiError
from llama2.serve.metrics import CONTENT_TYPE, Metrics
from llama2.serve.middleware import Guard, Keys, Traffic
from llama2.serve.models import Models, RewardModel
from llama2.serve.routes import Service, routes
from llama2.serve.safety import Gate
from llama2.serve.schema import KINDS
from llama2.serve.settings import ServeConfig
from llama2.serve.streaming import GONE, Gone

WEB = Path(__file__).parent / "web"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}


def application(
    models: Models,
    judge: RewardModel | None,
    config: ServeConfig,
    keys: Sequence[str],
    traffic: Traffic,
    web: Path = WEB,
) -> ASGIApp:
    """Everything a server answers, behind its guard."""
    metrics = Metrics()
    workers = [model.worker for model in (*models, *((judge,) if judge else ()))]
    metrics.watch(workers)
    gate = Gate(judge, config.safety.threshold, config.safety.refusal) if judge else None
    app = FastAPI(
        title="llama2",
        version=llama2.__version__,
        docs_url=None,
        redoc_url=None,
        description="OpenAI's interface to Llama 2 models, and a score for reward models.",
    )
    app.include_router(routes(Service(models, gate, metrics, config.limits.seconds)))
    _errors(app)
    _pages(app, web)

    @app.get("/health", tags=["operation"])
    async def health() -> JSONResponse:
        """200 while every model answers; 503 when one has failed, or while the server shuts
        down."""
        failed = [worker.name for worker in workers if not worker.alive]
        status = "failed" if failed else "draining" if traffic.draining else "ok"
        return JSONResponse({"status": status, "failed": failed}, 200 if status == "ok" else 503)

    @app.get("/metrics", tags=["operation"])
    async def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    app.openapi()  # made once, and before anybody waits for it
    return Guard(
        app,
        config.limits,
        Keys.of(keys),
        traffic,
        metrics,
        Cors(config.cors),
        listens_here(config.host),
    )


def _pages(app: FastAPI, web: Path) -> None:
    """Serve the chat page and its files, which are read once."""
    files = {
        path.name: (path.read_bytes(), _TYPES[path.suffix])
        for path in sorted(web.glob("*"))
        if path.suffix in _TYPES
    }

    def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)

        content, kind = files[name]
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return file("index.html")

    @app.get("/web/{name}", include_in_schema=False)
    async def asset(name: str) -> Response:
        return file(name)


def _instead(path: str) -> str:
    """What to ask instead of a path that is not there; "" where nobody looks for an interface."""
    own = [*KINDS, "/v1/models"]
    if meant := next((each for each in own if path.endswith(each) or f"/v1{path}" == each), None):
        return f"; ask {meant}: a client's base URL ends in /v1"

    return f"; this server has {', '.join(own)}" if path.startswith(("/v1", "/api")) else ""


def _errors(app: FastAPI) -> None:
    """Every failure is an OpenAI error object."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def elsewhere(request: Request, error: HTTPException) -> JSONResponse:
        path = request.url.path[:100]
        message = f"{request.method} {path}: {error.detail}{_instead(path) if error.status_code == 404 else ''}"
        headers = dict(error.headers or {})

        if "GET" in (methods := headers.get("allow", headers.get("Allow", ""))).split(", "):
            headers = {"Allow": f"{methods}, HEAD"}

        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, headers)

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return Response(status_code=GONE)

    @app.exception_handler(Exception)
    async def defect(request: Request, error: Exception) -> JSONResponse:
        body: dict[str, Any] = ApiError(
            500, "the server has a defect; its log says more", kind=errors.SERVER
        ).body()
        return JSONResponse(body, 500)
