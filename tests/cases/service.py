"""A real server, `llama2 serve` in a process of its own, and the clients that cases talk to it
with."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import openai

ASK = [{"role": "user", "content": "how is tea"}]


class Service:
    """Starts at once. `url` is None if the server ended before it listened; `said` tells why."""

    def __init__(
        self,
        log: Path,
        paths: Sequence[Path | str],
        flags: Mapping[str, str],
        environment: Mapping[str, str],
        seconds: float = 120,
    ) -> None:
        self.log = log
        words = [
            word
            for name, value in flags.items()
            for word in (f"--{name.replace('_', '-')}", *value.split())
        ]
        with open(log, "wb") as file:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "llama2.cli",
                    "serve",
                    *map(str, paths),
                    "--port",
                    "0",
                    "--precision",
                    "fp32",
                    *words,
                ],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=dict(environment),
                cwd=log.parent,
            )

        self.url: str | None = None
        end = time.monotonic() + seconds
        while self.url is None and self.process.poll() is None and time.monotonic() < end:
            found = re.search(r"serving .* at (http://\S+)", self.said)
            if found and self._listens(found[1]):
                self.url = found[1]

            time.sleep(0.05)

    @staticmethod
    def _listens(url: str) -> bool:
        try:
            return httpx.get(f"{url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    @property
    def said(self) -> str:
        return self.log.read_text("utf-8", "replace")

    @property
    def refusal(self) -> str:
        """The one line with which it ended, "" if it runs."""
        lines = [line for line in self.said.splitlines() if line.startswith("llama2: error: ")]
        return lines[-1] if self.url is None and lines and self.process.poll() == 2 else ""

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def request(self, method: str, path: str, **more: Any) -> httpx.Response:
        assert self.url, self.said[-500:]
        return httpx.request(method, f"{self.url}{path}", timeout=120, **more)

    def post(self, path: str, body: Any) -> httpx.Response:
        return self.request("POST", path, json=body)

    def chat(self, **body: Any) -> httpx.Response:
        return self.post(
            "/v1/chat/completions", {"messages": ASK, "max_tokens": 4, "temperature": 0, **body}
        )

    def complete(self, **body: Any) -> httpx.Response:
        return self.post(
            "/v1/completions", {"prompt": "how is tea", "max_tokens": 4, "temperature": 0, **body}
        )

    def client(self) -> openai.OpenAI:
        assert self.url, self.said[-500:]
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def connect(self) -> socket.socket:
        assert self.url, self.said[-500:]
        host, _, port = self.url.removeprefix("http://").rpartition(":")
        return socket.create_connection((host, int(port)), 30)
