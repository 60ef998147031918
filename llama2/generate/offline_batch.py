"""A list of samples drawn to its end, with as many side by side as there are slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from llama2 import devices
from llama2.generate.request import Prompt, SampleRequest
from llama2.generate.slots import COMPACT, Slots

# the queue moves up when one slot in so many is free: a prefill has a fixed cost to spread
REFILL = 8


class OfflineBatch:
    """Draws `requests` in `slots`: `step` until it returns False, then read the requests."""

    def __init__(self, slots: Slots, requests: Sequence[SampleRequest]) -> None:
        # Longest first: rows of similar length are live together, and short ones fill the end.
        # Samples of one prompt are neighbours, so at most one prompt has samples in the queue.
        self._queue = deque(
            sorted(requests, key=lambda request: (-len(request.prompt), request.prompt))
        )
        self._slots = slots
        # the prompt that has been read and has samples in the queue: its slot and last logits_V
        self._shared: dict[Prompt, tuple[int, Tensor]] = {}
        # Asking a GPU whether a row has finished makes it wait; asking a CPU is free.
        self._check_every = 8 if devices.is_gpu(slots.runner.device) else 1

    @property
    def unfinished(self) -> int:
        """Requests that have no result yet; some of them may just have come to their end."""
        return len(self._queue) + self._slots.live

    @torch.inference_mode()
    def step(self) -> bool:
        """Draw one token for every live row; False, drawing none, when every request has its
        result."""
        free = self._collect()
        self._slots.decode()

        if self._queue and free:
            self._refill(free)

        if not self._slots.live:
            return False

        self._slots.draw()
        return True

    def _collect(self) -> list[int]:
        """Return the free slots, after taking the results of rows that have ended; none before
        there are enough of them."""
        slots = self._slots
        if not slots.steps:
            return list(range(slots.count))

        if slots.steps % self._check_every:
            return []

        free = slots.find_ended()
        share = REFILL if self._queue else COMPACT
        if len(free) < slots.live and len(free) * share < slots.live:
            return []

        ended = [slot for slot in free if slot in slots.requests]
        if ended:
            slots.collect_all(ended)

        if not self._queue:
            slots.compact()

        return free

    def _refill(self, free: list[int]) -> None:
        """Give free slots to the head of the queue: each prompt is read once, and copied to its
        further samples."""
        homes = {prompt: slot for prompt, (slot, _) in self._shared.items()}
        logits = {prompt: logits_V for prompt, (_, logits_V) in self._shared.items()}
        shared = set(homes.values())
        free.sort(key=lambda slot: slot not in shared)  # no other prompt may go there

        requests = {slot: self._queue.popleft() for slot in free[: len(self._queue)]}
        for slot, request in requests.items():
            homes.setdefault(request.prompt, slot)

        new = {prompt: slot for prompt, slot in homes.items() if prompt not in logits}
        logits |= self._slots.runner.prefill(new)
        self._copy_prompts(requests, homes)
        logits_SV = torch.stack([logits[request.prompt] for request in requests.values()])
        self._slots.assign(requests, logits_SV)

        self._shared = {}
        if self._queue and self._queue[0].prompt == request.prompt:
            self._shared[request.prompt] = homes[request.prompt], logits[request.prompt]

    def _copy_prompts(self, requests: dict[int, SampleRequest], homes: dict[Prompt, int]) -> None:
        """Copy each prompt from the slot that holds it to the slots of its other samples."""
        sources = {slot: homes[request.prompt] for slot, request in requests.items()}
        copies = {target: source for target, source in sources.items() if target != source}
        if copies:
            longest = max(len(prompt) for prompt in homes)
            self._slots.runner.copy(list(copies.values()), list(copies), longest)
