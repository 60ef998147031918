"""Samples drawn for a server: requests join and leave between steps (A.2.1 measures with such
batches).

Memory is bounded: some rows of the cache are decoded, others keep what was read before. A new
request takes over the longest beginning that a kept or a running row shares with its prompt
(earlier turns of a chat, a common system prompt, other samples of the same prompt); what is left is
read a chunk at a time, so that a long prompt never stalls the others for longer.

Not thread safe: one thread drives a session.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llama2 import devices
from llama2.generate.prefix_cache import PrefixCache
from llama2.generate.request import Prompt, SampleRequest
from llama2.generate.slots import Slots

CHUNK_TOKENS = {devices.CPU: 512}  # of prompts read between two steps of the others
LARGE_CHUNK_TOKENS = 2048  # on other devices


@dataclass(eq=False)
class _PendingPrompt:
    """A prompt that is read into `slot`, where `done` of its tokens are; `requests` ask with it."""

    prompt: Prompt
    slot: int
    done: int
    requests: dict[int, SampleRequest] = field(default_factory=dict)  # by slot


class Session:
    """Serves requests until nobody has any; see `submit`, `cancel` and `step`."""

    def __init__(self, slots: Slots, prefixes: PrefixCache) -> None:
        self._slots, self._prefixes = slots, prefixes
        self._chunk = CHUNK_TOKENS.get(slots.runner.device.type, LARGE_CHUNK_TOKENS)
        self._queue: deque[SampleRequest] = deque()
        self._pending: dict[Prompt, _PendingPrompt] = {}  # the first is read first

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return len(self._busy_slots())

    @property
    def idle(self) -> bool:
        """There is nothing to do until the next `submit`."""
        return not (self._queue or self._pending or self._slots.requests)

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values lie in the cache, running or kept."""
        running = self._slots.requests.values()
        tokens = sum(len(request.prompt) + len(request.tokens) for request in running)
        return tokens + self._prefixes.tokens

    def submit(self, request: SampleRequest) -> None:
        """Queue a request. Its prompt has been checked (`Engine.check`)."""
        self._queue.append(request)

    @torch.inference_mode()
    def cancel(self, request: SampleRequest) -> None:
        """Give its slot to others; what was drawn stays. A finished request is left alone."""
        if request.finish is not None:
            return

        request.finish = "cancelled"
        self._queue = deque(other for other in self._queue if other is not request)
        for slot, other in tuple(self._slots.requests.items()):
            if other is request:
                self._slots.release(slot)

        for pending in self._pending.values():
            others = pending.requests.items()
            pending.requests = {slot: other for slot, other in others if other is not request}

        self._pending = {prompt: each for prompt, each in self._pending.items() if each.requests}

    @torch.inference_mode()
    def step(self) -> list[SampleRequest]:
        """Read one chunk of prompts, then draw one token for every running request; returns the
        requests that got one.

        [] if there is nothing to do, or only prompts were read.
        """
        self._slots.decode()
        self._admit()
        self._read_prompts()
        if not self._slots.live:
            return []

        self._slots.draw()
        given = self._slots.collect_newest()
        for slot, request in given.items():
            if request.finish is not None:
                self._prefixes.keep(slot, request.read_tokens)

        if not (self._queue or self._pending):
            self._slots.compact()

        return list(given.values())

    def _busy_slots(self) -> set[int]:
        """Return the slots of running requests and of prompts that are being read."""
        busy = set(self._slots.requests)
        for pending in self._pending.values():
            busy |= {pending.slot, *pending.requests}

        return busy

    def _admit(self) -> None:
        """Give free slots to waiting requests, the lowest first; those that ask the same share one
        reading."""
        if not self._queue:
            return

        busy = self._busy_slots()
        free = [slot for slot in range(self._slots.count) if slot not in busy]
        for slot in free[: len(self._queue)]:
            request = self._queue.popleft()
            request.cached = len(request.prompt)
            if request.prompt not in self._pending:
                request.cached = self._share_prefix(request.prompt, slot)
                pending = _PendingPrompt(request.prompt, slot, request.cached)
                self._pending[request.prompt] = pending

            self._pending[request.prompt].requests[slot] = request
            self._slots.reserve(slot)

    def _share_prefix(self, prompt: Prompt, slot: int) -> int:
        """Copy into `slot` the longest beginning of a prompt that lies in the cache; returns its
        length."""
        row, length = self._prefixes.longest_prefix(prompt, self._slots.requests)
        if length:
            self._slots.runner.copy([row], [slot], length)

        return length

    def _read_prompts(self) -> None:
        """Read one chunk of prompts, those first that came first; rows whose prompt has been read
        become live."""
        budget = self._chunk
        while self._pending and budget > 0:
            budget -= self._read_several(budget) or self._read_part(budget)

    def _read_several(self, budget: int) -> int:
        """Read the first prompts together, if two or more fit into `budget` tokens from their
        beginnings; returns how many tokens were read."""
        several: dict[Prompt, int] = {}
        for prompt, pending in self._pending.items():
            if pending.done or pending.slot not in pending.requests or len(prompt) > budget:
                break

            several[prompt] = pending.slot
            budget -= len(prompt)

        if len(several) < 2:
            return 0

        for prompt, logits_V in self._slots.runner.prefill(several).items():
            self._start(self._pending[prompt], logits_V)

        return sum(map(len, several))

    def _read_part(self, budget: int) -> int:
        """Read at most `budget` more tokens of the first prompt; returns how many."""
        pending = next(iter(self._pending.values()))
        tokens = pending.prompt[pending.done : pending.done + budget]
        logits_V = self._slots.runner.extend(pending.slot, pending.done, tokens)
        pending.done += len(tokens)
        if pending.done == len(pending.prompt):
            self._start(pending, logits_V)

        return len(tokens)

    def _start(self, pending: _PendingPrompt, logits_V: Tensor) -> None:
        """Make the requests of a prompt that has been read live rows."""
        del self._pending[pending.prompt]
        others = [slot for slot in pending.requests if slot != pending.slot]
        if others:
            sources = [pending.slot] * len(others)
            self._slots.runner.copy(sources, others, len(pending.prompt))

        self._slots.assign(pending.requests, logits_V.expand(len(pending.requests), -1))
