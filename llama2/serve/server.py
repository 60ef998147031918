"""`llama2 serve CHECKPOINT ...`: models behind OpenAI's HTTP interface, on this machine alone
unless told otherwise.

The port is opened when every model has passed its self-test. The first SIGTERM, SIGHUP or Ctrl-C
refuses new requests and lets the running ones finish; a second one ends them.
"""

from __future__ import annotations

import os
import socket
import sys
from contextlib import ExitStack

from llama2 import cpu_tuning
from llama2.errors import UserError, missing_extra
from llama2.ranks import join
from llama2.serve import models
from llama2.serve.settings import ServeConfig as Config

POSITIONAL = "checkpoints"
_EXTRA = ("fastapi", "starlette", "uvicorn", "prometheus_client")


def run(config: Config) -> None:
    """Serve until told to stop."""
    try:
        from llama2.serve import http, origins
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise

        raise missing_extra(error.name or "fastapi", "serve") from None

    names = config.names or tuple(path.resolve().name for path in config.checkpoints)
    if len(names) != len(config.checkpoints):
        raise UserError(
            f"{len(config.checkpoints)} checkpoints and {len(names)} names",
            "give one name for each",
        )

    keys = config.api_keys or tuple(filter(None, os.environ.get("LLAMA2_API_KEYS", "").split(",")))
    try:
        origins.Cors(config.cors)
    except ValueError as error:
        raise UserError(f"--cors: {error}", "give scheme, host and port") from None

    if origins.ANY in config.cors and not keys:
        raise UserError(
            "--cors '*' without API keys lets every page that you visit use the models",
            "name the origins, or set LLAMA2_API_KEYS",
        )

    with _bound(config.host, config.port) as listener:
        join()
        served = models.load(
            config.checkpoints,
            names,
            slots=config.slots,
            capacity=config.capacity,
            waiting=config.limits.waiting,
            precision=config.precision,
        )
        judge = None

        if config.safety.model is not None:
            judge = models.load_judge(
                config.safety.model, served, config.limits.waiting, config.precision
            )

        address, port = listener.getsockname()[:2]
        if not keys and not origins.is_loopback(address):
            print(
                "llama2: anybody who reaches this address may use it: set LLAMA2_API_KEYS",
                file=sys.stderr,
            )

        greeting = (
            f"llama2: serving {', '.join(names)} at "
            f"http://{f'[{address}]' if ':' in address else address}:{port}"
        )
        cpu_tuning.release_threads()  # the models' own threads do all the work from here on
        http.serve(listener, served, judge, config, keys, greeting)


def _bound(host: str, port: int) -> socket.socket:
    """A socket that holds the address but does not listen yet."""
    with ExitStack() as closing:
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )[0]
            listener = closing.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError as error:
            raise UserError(
                f"cannot listen at {host}:{port} ({error.strerror})",
                "choose another --host or --port",
            ) from None

        closing.pop_all()

    return listener
