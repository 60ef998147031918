"""The application: routes, error objects, health, metrics and the chat page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

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
from llama2.serve.safety import SafetyGate
from llama2.serve.schema import ENDPOINTS
from llama2.serve.settings import ServeConfig
from llama2.serve.streaming import CLIENT_CLOSED, Disconnected
from llama2.serve.worker import Worker

WEB = Path(__file__).parent / "web"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


def application(
    models: Models,
    judge: RewardModel | None,
    config: ServeConfig,
    keys: Sequence[str],
    traffic: Traffic,
) -> ASGIApp:
    """Return the application of a server, behind its guard."""
    workers = [model.worker for model in models.values()]
    gate = None
    if judge is not None:
        workers.append(judge.worker)
        gate = SafetyGate(judge, config.safety.threshold, config.safety.refusal)

    metrics = Metrics()
    metrics.watch(workers)
    app = FastAPI(
        title="llama2",
        version=llama2.__version__,
        docs_url=None,  # FastAPI's own pages load scripts from elsewhere
        redoc_url=None,
        description="OpenAI's interface to Llama 2 models, and a score for reward models.",
    )
    app.include_router(routes(Service(models, gate, metrics, config.limits.seconds)))
    _add_errors(app)
    _add_operation(app, workers, metrics, traffic)
    _add_pages(app)
    app.openapi()  # made once, and before anybody waits for it

    return Guard(
        app,
        config.limits,
        Keys(keys),
        traffic,
        metrics,
        Cors(config.cors),
        listens_here(config.host),
    )


def _add_operation(
    app: FastAPI, workers: Sequence[Worker], metrics: Metrics, traffic: Traffic
) -> None:
    @app.get("/health", tags=["operation"])
    async def health() -> JSONResponse:
        """200 while every model answers; 503 when one has failed, or while the server shuts
        down."""
        failed = [worker.name for worker in workers if not worker.alive]
        status = "draining" if traffic.draining else "ok"
        status = "failed" if failed else status
        return JSONResponse({"status": status, "failed": failed}, 200 if status == "ok" else 503)

    @app.get("/metrics", tags=["operation"])
    async def prometheus() -> Response:
        """Counters for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)


def _add_pages(app: FastAPI) -> None:
    """Serve the chat page and its files, which are read once."""
    files = {
        path.name: (path.read_bytes(), _TYPES[path.suffix])
        for path in WEB.iterdir()
        if path.suffix in _TYPES
    }

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        """Return the chat page."""
        return await file("index.html")

    @app.get("/web/{name}", include_in_schema=False)
    async def file(name: str) -> Response:
        """Return a file of the chat page."""
        if name not in files:
            raise HTTPException(404)

        content, media_type = files[name]
        return Response(content, media_type=media_type, headers={"Cache-Control": "no-cache"})


def _add_errors(app: FastAPI) -> None:
    """Answer every failure with an OpenAI error object."""

    @app.exception_handler(ApiError)
    async def refuse(request: Request, error: ApiError) -> JSONResponse:
        """Answer with an error of this server."""
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def explain(request: Request, error: HTTPException) -> JSONResponse:
        """Answer a wrong path or method with the right ones."""
        path = request.url.path[:100]
        cure = _suggest(path) if error.status_code == 404 else ""
        message = f"{request.method} {path}: {error.detail}{cure}"

        headers = dict(error.headers or {})
        methods = headers.get("allow", headers.get("Allow", ""))
        if "GET" in methods.split(", "):
            headers = {"Allow": f"{methods}, HEAD"}

        return JSONResponse(ApiError(error.status_code, message).body(), error.status_code, headers)

    @app.exception_handler(Disconnected)
    async def close(request: Request, error: Disconnected) -> Response:
        """End the request of a client that has gone; nothing is sent."""
        return Response(status_code=CLIENT_CLOSED)

    @app.exception_handler(Exception)
    async def fail(request: Request, error: Exception) -> JSONResponse:
        """Answer where this server has a defect."""
        return JSONResponse(errors.defect().body(), 500)


def _suggest(path: str) -> str:
    """Return the path that was probably meant; "" where nobody looks for an interface."""
    known = [*ENDPOINTS, "/v1/models"]
    for endpoint in known:
        if path.endswith(endpoint) or f"/v1{path}" == endpoint:
            return f"; ask {endpoint}: a client's base URL ends in /v1"

    return f"; this server has {', '.join(known)}" if path.startswith(("/v1", "/api")) else ""
