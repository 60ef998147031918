"""Counters of a server, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from llama2.serve.worker import Worker

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
_STEPS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
_GAUGES: dict[str, tuple[str, Callable[[Worker], float]]] = {
    "llama2_up": ("1 while the model answers", lambda worker: worker.alive),
    "llama2_running": ("samples that have a slot", lambda worker: worker.running),
    "llama2_waiting": ("samples that wait for a slot", lambda worker: worker.waiting),
    "llama2_slots": ("samples that may run at a time", lambda worker: worker.slots),
    "llama2_cached_tokens": (
        "tokens whose keys and values are kept",
        lambda worker: worker.cached_tokens,
    ),
}


class Metrics:
    """Counters and histograms of one server, and gauges of its workers."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "llama2_requests", "requests answered", ["path", "status"], registry=self.registry
        )
        self._prompt = Counter(
            "llama2_prompt_tokens", "tokens of prompts", ["model"], registry=self.registry
        )
        self._cached = Counter(
            "llama2_prompt_tokens_cached",
            "of those, found in the cache",
            ["model"],
            registry=self.registry,
        )
        self._completion = Counter(
            "llama2_completion_tokens", "tokens drawn", ["model"], registry=self.registry
        )
        self._first = Histogram(
            "llama2_first_token_seconds",
            "from a request's arrival to its first token",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._between = Histogram(
            "llama2_between_tokens_seconds",
            "from one token of a sample to its next",
            ["model"],
            buckets=_STEPS,
            registry=self.registry,
        )

    def watch(self, workers: Iterable[Worker]) -> None:
        """Report the state of workers whenever somebody asks."""
        for name, (meaning, read) in _GAUGES.items():
            gauge = Gauge(name, meaning, ["model"], registry=self.registry)
            for worker in workers:
                gauge.labels(worker.name).set_function(partial(read, worker))

    def request(self, path: str, status: int) -> None:
        """Count a request that was answered."""
        self._requests.labels(path, str(status)).inc()

    def first_token(self, model: str, seconds: float) -> None:
        """Note how long a request waited for its first token."""
        self._first.labels(model).observe(seconds)

    def between(self, model: str, seconds: float, count: int) -> None:
        """Note that `count` tokens of a sample came `seconds` after the one before."""
        self._between.labels(model).observe(seconds / max(1, count))

    def tokens(self, model: str, count: int) -> None:
        """Count tokens drawn."""
        self._completion.labels(model).inc(count)

    def prompt(self, model: str, usage: Mapping[str, Any]) -> None:
        """Count the tokens of a prompt."""
        self._prompt.labels(model).inc(usage["prompt_tokens"])
        self._cached.labels(model).inc(usage["prompt_tokens_details"]["cached_tokens"])

    def text(self) -> bytes:
        """Return the metrics as /metrics shows them."""
        return generate_latest(self.registry)
