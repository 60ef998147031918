"""A batch that stays open: requests join and leave between steps, as a server needs (A.2.1 measures
with such batches).

Memory is bounded: `slots` rows of the cache are decoded, as many again keep what was read before. A
new request takes over the longest beginning that a kept or a running row shares with its prompt
(earlier turns of a chat, a common system prompt, other samples of the same prompt); what is left is
read a chunk at a time, so that a long prompt never stalls the others for longer. Kept rows are
given up in the order in which they were last useful.

Not thread safe: one thread drives a session. B live rows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from llama2 import devices
from llama2.generate.batch import COMPACT, READ_TOKENS, Batch, Prompt, Request, _check
from llama2.generate.cpu_decoder import CpuDecoder
from llama2.model.cache import KVCache
from llama2.model.llama import Llama

CHUNK_TOKENS = {devices.CPU: 512}  # of prompts read between two steps of the others
LARGE_CHUNK_TOKENS = 2048  # on other devices
# of a new token and one before it: attention to more is quicker in PyTorch
READ_PAIRS = 2 * READ_TOKENS**2
WORTH_SHARING = 16  # tokens: below, copying saves nothing


@dataclass(eq=False)
class _Reading:
    """A prompt on its way into `slot`; `done` of its tokens are there. All `requests` ask with this
    prompt."""

    slot: int
    done: int
    requests: list[tuple[int, Request]] = field(default_factory=list)  # with their slots

    @property
    def prompt(self) -> Prompt:
        return self.requests[0][1].prompt


class Session(Batch):
    """Serves requests until nobody has any; see `submit`, `cancel` and `step`."""

    def __init__(
        self, model: Llama, cache: KVCache, slots: int, decoder: CpuDecoder | None = None
    ) -> None:
        super().__init__(model, cache, slots, (), cache.capacity, decoder)
        self.slots = slots
        self._chunk = CHUNK_TOKENS.get(self._device.type, LARGE_CHUNK_TOKENS)
        self._readings: deque[_Reading] = deque()
        self._taken: set[int] = set()  # slots of running requests and of prompts being read
        self._kept: dict[int, Prompt] = {}  # row -> its tokens; the least recently useful first

    @property
    def waiting(self) -> int:
        """Requests without a slot."""
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests with a slot."""
        return len(self._taken)

    @property
    def cached_tokens(self) -> int:
        """Tokens whose keys and values lie in the cache, running or kept."""
        running = sum(
            len(request.prompt) + len(request.tokens)
            for request in self._seats
            if request is not None
        )
        return running + sum(map(len, self._kept.values()))

    def submit(self, request: Request) -> None:
        """Queue a request. Its prompt has been checked (`Engine.check`)."""
        request.limit = min(request.sampling.max_tokens, self.cache.capacity - len(request.prompt))
        self._queue.append(request)

    @torch.inference_mode()
    def cancel(self, request: Request) -> None:
        """Give its slot to others; what was drawn stays. A finished request is left alone."""
        if request.finish is not None:
            return

        request.finish = "cancelled"
        if request in self._queue:
            self._queue.remove(request)
        elif request in self._seats:
            self._free(self._seats.index(request))
        # A prompt that is being read is dropped when its turn comes.

    @torch.inference_mode()
    def step(self) -> list[Request]:  # type: ignore[override]
        """One step; the requests that got a token in it. [] if there is nothing to do, or only
        prompts were read."""
        if self._live:
            self._read_newest()

        self._admit()
        self._read_prompts()
        if not self._live:
            return []

        self._draw()
        return self._read_out()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do until the next `submit`."""
        return not (self._queue or self._taken)

    # ---- prompts ----

    def _admit(self) -> None:
        """Give free slots to waiting requests, the lowest first, and join those that ask the
        same."""
        free = iter([slot for slot in range(self._slots) if slot not in self._taken])
        while self._queue and (slot := next(free, None)) is not None:
            request = self._queue.popleft()
            self._taken.add(slot)
            reading = next((each for each in self._readings if each.prompt == request.prompt), None)

            if reading is None:
                reading = _Reading(slot, self._share(request.prompt, slot))
                self._readings.append(reading)

            request.cached = reading.done if slot == reading.slot else len(request.prompt)
            reading.requests.append((slot, request))
            # Until the prompt is read, what is drawn for this row, if it is among the live ones,
            # lands out of the way.
            self._rows.steps_N[slot], self._rows.before_N[slot] = 0, self.cache.capacity - 1
            self._rows.alive_N[slot] = False

    def _share(self, prompt: Prompt, slot: int) -> int:
        """Copy into `slot` the longest beginning of the prompt that lies in the cache; its
        length."""
        head = prompt[:WORTH_SHARING]
        rows = {row: tokens for row, tokens in self._kept.items() if tokens[:WORTH_SHARING] == head}
        for other, request in enumerate(self._seats):
            if (
                request is not None
                and request.prompt[:WORTH_SHARING] == head[: len(request.prompt)]
            ):
                rows[other] = (*request.prompt, *request.tokens[:-1])

        lengths = {
            row: min(_common(prompt, tokens), len(prompt) - 1) for row, tokens in rows.items()
        }
        source = max(lengths, key=lambda row: lengths[row], default=None)
        if source is None or lengths[source] < WORTH_SHARING:
            return 0

        if source in self._kept:
            self._kept[source] = self._kept.pop(source)  # useful just now

        self._copy([source], [slot], lengths[source])
        return lengths[source]

    def _read_prompts(self) -> None:
        """Read one chunk of prompts, those first that came first; rows whose prompt is whole become
        live."""
        budget = self._chunk
        while self._readings and budget > 0:
            reading = self._readings[0]
            self._taken -= {
                slot for slot, request in reading.requests if request.finish is not None
            }
            reading.requests = [
                (slot, request) for slot, request in reading.requests if request.finish is None
            ]

            if not reading.requests:
                self._readings.popleft()
                continue

            self._taken.add(reading.slot)  # it may be read for others than who asked first
            several = self._short(budget)
            if len(several) > 1:
                for _ in several:
                    self._readings.popleft()

                logits = self._prefill({each.prompt: each.slot for each in several})
                for each in several:
                    self._begin(each, logits[each.prompt])

                budget -= sum(len(each.prompt) for each in several)
                continue

            width = min(budget, len(reading.prompt) - reading.done)
            logits_V = self._extend(reading, width)
            budget -= width

            if reading.done == len(reading.prompt):
                self._readings.popleft()
                self._begin(reading, logits_V)

    def _short(self, budget: int) -> list[_Reading]:
        """The first prompts that can be read together: whole, from their beginning."""
        found = []
        for reading in self._readings:
            budget -= len(reading.prompt)
            whole = reading.done == 0 and reading.requests[0][0] == reading.slot
            if budget < 0 or not whole or any(request.finish for _, request in reading.requests):
                break

            found.append(reading)

        return sorted(found, key=lambda each: -len(each.prompt))

    def _extend(self, reading: _Reading, width: int) -> Tensor:
        """Read the next `width` tokens of a prompt; the logits_V behind the last."""
        begin, prompt = reading.done, reading.prompt
        if (
            self._decoder is not None
            and width <= READ_TOKENS
            and width * (begin + width) <= READ_PAIRS
        ):
            reading.done += width
            return self._read([(reading.slot, begin, prompt[begin : begin + width])])[0]

        self.cache.extend(reading.slot, begin, width)
        tokens_1T = torch.tensor([prompt[begin : begin + width]], device=self._device)
        positions_1T = torch.arange(begin, begin + width, device=self._device)[None]
        hidden_1TD = self._model(tokens_1T, positions_BT=positions_1T, cache=self.cache, head=False)
        reading.done += width

        return self._model.logits(hidden_1TD[0, -1])

    def _begin(self, reading: _Reading, logits_V: Tensor) -> None:
        """The requests of a prompt that has been read become live rows."""
        others = [slot for slot, _ in reading.requests if slot != reading.slot]
        if others:
            self._copy([reading.slot] * len(others), others, len(reading.prompt))

        if reading.slot not in [slot for slot, _ in reading.requests]:
            self._taken.discard(reading.slot)  # who asked first has gone

        self._seat(
            [(slot, request) for slot, request in reading.requests],
            logits_V.expand(len(reading.requests), -1),
        )

    # ---- answers ----

    def _read_out(self) -> list[Request]:
        """Hand every live request its new token; the slots of those that end become free."""
        live = slice(self._live)
        tokens, alive = self._rows.newest_N[live].tolist(), self._rows.alive_N[live].tolist()
        steps_B = self._rows.steps_N[live]
        logprobs = (
            self._rows.logprobs_NM[live]
            .gather(1, (steps_B - 1).clamp(min=0)[:, None])
            .squeeze(1)
            .tolist()
        )
        touched = []

        for slot, request in enumerate(self._seats[: self._live]):
            if request is None:
                continue

            request.tokens.append(tokens[slot])
            request.logprobs.append(logprobs[slot])
            touched.append(request)

            if not alive[slot]:
                request.finish = "stop" if tokens[slot] in request.sampling.stop else "length"
                self._keep(slot, request)
                self._free(slot)

        _check([request.logprobs[-1] for request in touched])
        self._narrow()
        return touched

    def _free(self, slot: int) -> None:
        self._seats[slot], self._groups = None, None
        self._rows.alive_N[slot] = False
        self._taken.discard(slot)

    def _narrow(self) -> None:
        """Close ranks when many live rows are idle and nobody waits for them."""
        if self._queue or self._readings:
            return

        idle = [slot for slot, request in enumerate(self._seats[: self._live]) if request is None]
        running = self._live - len(idle)
        if idle and (not running or len(idle) * COMPACT >= self._live):
            self._close_ranks(idle, running)
            self._taken = {slot for slot, request in enumerate(self._seats) if request is not None}

    def _keep(self, slot: int, request: Request) -> None:
        """Keep what a finished request has read and written (its last token has no keys yet)."""
        tokens = (*request.prompt, *request.tokens[:-1])
        if len(tokens) < WORTH_SHARING:
            return

        head, room = tokens[:WORTH_SHARING], range(self._slots, self.cache.slots)
        inside = [
            row
            for row, kept in self._kept.items()
            if kept[:WORTH_SHARING] == head and kept == tokens[: len(kept)]
        ]
        free = [row for row in room if row not in self._kept]
        row = inside[0] if inside else free[0] if free else next(iter(self._kept), None)

        if row is None:
            return

        self._kept.pop(row, None)
        self._kept[row] = tokens
        self._copy([slot], [row], len(tokens))

    def _copy(self, sources: Sequence[int], targets: Sequence[int], columns: int) -> None:
        sources_S, targets_S = (
            torch.tensor(rows, device=self._device) for rows in (sources, targets)
        )
        self.cache.copy(sources_S, targets_S, columns)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens two sequences share from their beginning."""
    length = min(len(a), len(b))
    different = np.flatnonzero(np.array(a[:length]) != np.array(b[:length]))
    return int(different[0]) if len(different) else length
