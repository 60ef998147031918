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
from llama2.errors import UserError, explain_missing_extra
from llama2.ranks import join
from llama2.serve import models
from llama2.serve.settings import ServeConfig as Config

POSITIONAL = "checkpoints"
_EXTRA = ("fastapi", "starlette", "uvicorn", "prometheus_client")


def run(config: Config) -> None:
    """Serve until told to stop."""
    try:
        from llama2.serve import cors, lifecycle
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise

        raise explain_missing_extra(error.name or "fastapi", "serve") from None

    names = ", ".join(config.model_names)
    keys = config.api_keys or tuple(filter(None, os.environ.get("LLAMA2_API_KEYS", "").split(",")))
    cors.Cors(config.cors)  # which checks them, before anything is loaded
    if cors.ANY in config.cors and not keys:
        raise UserError(
            "--cors '*' without API keys lets every page that you visit use the models",
            "name the origins, or set LLAMA2_API_KEYS",
        )

    with _bind(config.host, config.port) as listener:
        join()
        served, judge = models.load(config), None
        if config.safety.model is not None:
            judge = models.load_judge(config.safety.model, config, served)

        address, port = listener.getsockname()[:2]
        if not keys and not cors.is_loopback(address):
            print(
                "llama2: anybody who reaches this address may use it: set LLAMA2_API_KEYS",
                file=sys.stderr,
            )

        host = f"[{address}]" if ":" in address else address
        greeting = f"llama2: serving {names} at http://{host}:{port}"
        cpu_tuning.release_threads()  # the models' own threads do all the work from here on
        lifecycle.serve(listener, served, judge, config, keys, greeting)


def _bind(host: str, port: int) -> socket.socket:
    """Return a socket that holds the address but does not listen yet."""
    with ExitStack() as closing:
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, kind, protocol, _, address = addresses[0]
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
