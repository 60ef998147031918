"""The state of one `generate` call: which sequence sits in which slot, and one decoding step for all of them.

A step costs the same few operations however many slots are live; Python loops over sequences only when they enter and
leave. On a CPU that decides: at the demo's size such overhead would be most of a step.

Shapes: N slots, B live rows (always the first B slots), M the most new tokens, U uniform numbers a token, V vocabulary,
P prompts read together, T their longest, S rows changed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama2.errors import UserError
from llama2.generate.sampling import UNIFORMS, Sampling, draw, uniforms
from llama2.model.cache import KVCache
from llama2.model.llama import Llama

PREFILL_TOKENS = 4096  # padded tokens of one forward pass over prompts
COLUMNS = 16  # the number of columns read is a multiple of this, so that kernels meet few shapes
REFILL = 8  # the queue moves up when one slot in so many is free: a prefill has a fixed cost to spread
COMPACT = 4  # with no queue left, the live rows close ranks when one in so many has finished

Prompt = tuple[int, ...]


@dataclass(eq=False)
class Request:
    """One sample to draw: its prompt, the two numbers that name its randomness, and the most tokens it may have."""

    prompt: Prompt
    index: int
    sample: int
    limit: int
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()


@dataclass(frozen=True)
class _Prefilled:
    """A prompt read into a slot, whose samples do not all have slots yet."""

    prompt: Prompt
    slot: int
    logits_V: Tensor


@dataclass
class _Rows:
    """What is known of each slot. On the device, so that a step neither loops nor waits."""

    steps_N: Tensor  # tokens drawn
    limits_N: Tensor  # the most to draw
    before_N: Tensor  # prompt tokens less one: the position of the newest token is before + steps
    alive_N: Tensor
    newest_N: Tensor
    tokens_NM: Tensor
    logprobs_NM: Tensor
    uniforms_NMU: Tensor

    @classmethod
    def empty(cls, slots: int, most: int, device: torch.device) -> _Rows:
        # What is still drawn for a finished row, until it leaves, lands in the place behind its last token.
        width = most + 1
        whole_N = torch.zeros(slots, dtype=torch.long, device=device)
        return cls(
            steps_N=whole_N, limits_N=whole_N.clone(), before_N=whole_N.clone(), newest_N=whole_N.clone(),
            alive_N=torch.zeros_like(whole_N, dtype=torch.bool),
            tokens_NM=torch.zeros(slots, width, dtype=torch.long, device=device),
            logprobs_NM=torch.zeros(slots, width, device=device),
            uniforms_NMU=torch.zeros(slots, width, UNIFORMS, device=device),
        )

    def move(self, sources_S: Tensor, targets_S: Tensor) -> None:
        for tensor in vars(self).values():
            tensor[targets_S] = tensor[sources_S]


class Batch:
    """Draws `requests` in the first `slots` slots of `cache`: `step` until it returns False, then read the requests."""

    def __init__(
        self, model: Llama, cache: KVCache, slots: int, requests: Sequence[Request], sampling: Sampling
    ) -> None:
        self.cache = cache
        self._model, self._slots, self._sampling = model, slots, sampling
        self._device = model.head_weight.device
        # Longest first: rows of similar length are live together, and short ones fill the end. Samples of one prompt
        # are neighbours, so at most one prompt waits half served.
        self._queue = deque(sorted(requests, key=lambda request: (-len(request.prompt), request.prompt)))
        self._half_served: _Prefilled | None = None
        self._seats: list[Request | None] = [None] * slots
        self._most = max(request.limit for request in requests)
        self._live = 0  # B
        self._time = 0  # steps made
        # Asking a GPU whether a row has finished makes it wait; asking a CPU is free.
        self._check_every = 8 if self._device.type == "cuda" else 1
        with torch.inference_mode():
            self._rows = _Rows.empty(slots, self._most, self._device)
            self._index_N = torch.arange(slots, device=self._device)
            self._stops_V = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=self._device)
            self._stops_V[list(sampling.stop)] = True
            self._logits_BV = torch.empty(0, model.config.vocab_size, device=self._device)
        self._reach_N = np.zeros(slots, dtype=np.int64)  # tokens of a row less the time: known without the device

    @torch.inference_mode()
    def step(self) -> bool:
        """Draw one token for every live row; False, drawing none, when every request has its result."""
        free = self._leave()
        if self._live:
            self._read_newest()
        if self._queue and free:
            self._enter(free)
        if not self._live:
            return False
        b, rows = slice(0, self._live), self._rows
        index_B, steps_B, alive_B = self._index_N[b], rows.steps_N[b], rows.alive_N[b]
        tokens_B, logprobs_B = draw(self._logits_BV, rows.uniforms_NMU[index_B, steps_B], self._sampling)
        rows.newest_N[b] = tokens_B
        rows.tokens_NM[index_B, steps_B] = tokens_B
        rows.logprobs_NM[index_B, steps_B] = logprobs_B
        steps_B += alive_B
        alive_B &= ~self._stops_V[tokens_B]
        alive_B &= steps_B < rows.limits_N[b]
        self._time += 1
        return True

    def newest(self) -> int:
        """The token that the first row drew last."""
        return int(self._rows.newest_N[0])

    def _leave(self) -> list[int]:
        """Hand out the results of finished rows, if enough have finished; returns the slots that are free."""
        if not self._time:
            return list(range(self._slots))
        if self._time % self._check_every:
            return []
        alive = int(self._rows.alive_N[: self._live].sum())
        finished = self._live - alive
        if alive and finished * (REFILL if self._queue else COMPACT) < self._live:
            return []
        free = (~self._rows.alive_N[: self._live]).nonzero().squeeze(1).tolist()
        self._hand_out([slot for slot in free if self._seats[slot] is not None])
        if not self._queue:
            self._close_ranks(free, alive)
        return free

    def _hand_out(self, slots: list[int]) -> None:
        if not slots:
            return
        slots_S = torch.tensor(slots, device=self._device)
        counts = self._rows.steps_N[slots_S].tolist()
        tokens = self._rows.tokens_NM[slots_S, : max(counts)].tolist()
        logprobs = self._rows.logprobs_NM[slots_S, : max(counts)].tolist()
        for row, (slot, count) in enumerate(zip(slots, counts)):
            request = self._seats[slot]
            assert request is not None
            request.tokens, request.logprobs = tuple(tokens[row][:count]), tuple(logprobs[row][:count])
            if not np.isfinite(request.logprobs).all():
                raise UserError("the model's log-probabilities are not finite",
                                "its weights are damaged: go back to an earlier checkpoint")
            self._seats[slot] = None

    def _close_ranks(self, free: list[int], alive: int) -> None:
        """Move the last live rows into the gaps before them, so that the first `alive` slots are the live ones."""
        gaps = [slot for slot in free if slot < alive]
        taken = set(free)
        movers = [slot for slot in range(alive, self._live) if slot not in taken]
        if gaps:
            sources_S, targets_S = (torch.tensor(slots, device=self._device) for slots in (movers, gaps))
            self.cache.copy(sources_S, targets_S, self._columns())
            self._rows.move(sources_S, targets_S)
            self._reach_N[gaps] = self._reach_N[movers]
            for source, target in zip(movers, gaps):
                self._seats[target], self._seats[source] = self._seats[source], None
        self._live = alive

    def _columns(self) -> int:
        longest = int(self._reach_N[: self._live].max()) + self._time
        return min(-(-longest // COLUMNS) * COLUMNS, self.cache.capacity)

    def _read_newest(self) -> None:
        """One forward pass over the newest token of each live row."""
        rows, b = self._rows, slice(0, self._live)
        positions_B = rows.before_N[b] + rows.steps_N[b]
        self.cache.decode(positions_B, self._columns())
        logits_B1V = self._model(rows.newest_N[b, None], positions_BT=positions_B[:, None], cache=self.cache)
        self._logits_BV = logits_B1V[:, 0]

    def _enter(self, free: list[int]) -> None:
        """Seat the head of the queue in free slots: prefill new prompts once, copy them to their further samples."""
        half_served = self._half_served
        if half_served is not None and half_served.slot in free:  # its own prompt must be the one to go there
            free = [half_served.slot, *(slot for slot in free if slot != half_served.slot)]
        seated = [(slot, self._queue.popleft()) for slot in free[: len(self._queue)]]
        homes: dict[Prompt, int] = {}  # the slot that holds each prompt
        new: dict[Prompt, int] = {}
        for slot, request in seated:
            if half_served is not None and request.prompt == half_served.prompt:
                homes[request.prompt] = half_served.slot
            elif request.prompt not in homes:
                homes[request.prompt] = new[request.prompt] = slot
        logits = self._prefill(new)
        if half_served is not None:
            logits[half_served.prompt] = half_served.logits_V
        copies = [(homes[request.prompt], slot) for slot, request in seated if homes[request.prompt] != slot]
        if copies:
            sources_S, targets_S = (torch.tensor(side, device=self._device) for side in zip(*copies))
            self.cache.copy(sources_S, targets_S, max(len(prompt) for prompt in homes))
        last = seated[-1][1].prompt
        more = bool(self._queue) and self._queue[0].prompt == last
        self._half_served = _Prefilled(last, homes[last], logits[last]) if more else None
        self._seat(seated, torch.stack([logits[request.prompt] for _, request in seated]))

    def _seat(self, seated: Sequence[tuple[int, Request]], logits_SV: Tensor) -> None:
        slots, requests = zip(*seated)
        slots_S, rows = torch.tensor(slots, device=self._device), self._rows
        rows.steps_N[slots_S] = 0
        rows.limits_N[slots_S] = torch.tensor([request.limit for request in requests], device=self._device)
        rows.before_N[slots_S] = torch.tensor([len(request.prompt) - 1 for request in requests], device=self._device)
        rows.alive_N[slots_S] = True
        if self._sampling.temperature > 0:
            streams = [(request.index, request.sample) for request in requests]
            numbers_SMU = torch.from_numpy(uniforms(self._sampling.seed, streams, self._most))
            rows.uniforms_NMU[slots_S, : self._most] = numbers_SMU.to(self._device)
        for slot, request in seated:
            self._seats[slot] = request
            self._reach_N[slot] = len(request.prompt) - self._time
        kept_BV, self._live = self._logits_BV, max(self._live, max(slots) + 1)
        self._logits_BV = logits_SV.new_empty(self._live, logits_SV.shape[1])
        self._logits_BV[: len(kept_BV)] = kept_BV
        self._logits_BV[slots_S] = logits_SV

    def _prefill(self, prompts: dict[Prompt, int]) -> dict[Prompt, Tensor]:
        """Read each prompt into its slot; returns the logits_V (fp32) behind its last token."""
        logits: dict[Prompt, Tensor] = {}
        for part in _parts(list(prompts)):
            lengths_P = torch.tensor([len(prompt) for prompt in part], device=self._device)
            width = len(part[0])
            tokens_PT = torch.tensor([(*prompt, *(0,) * (width - len(prompt))) for prompt in part])
            self.cache.prefill(torch.tensor([prompts[prompt] for prompt in part], device=self._device), width)
            hidden_PTD = self._model(tokens_PT.to(self._device), cache=self.cache, head=False)
            last_PD = hidden_PTD[self._index_N[: len(part)], lengths_P - 1]
            logits.update(zip(part, self._model.logits(last_PD)))
        return logits


def _parts(prompts: list[Prompt]) -> Iterator[list[Prompt]]:
    """Prompts, longest first, in parts of at most PREFILL_TOKENS padded tokens (or of one prompt)."""
    start = 0
    while start < len(prompts):
        rows = max(1, PREFILL_TOKENS // len(prompts[start]))
        yield prompts[start : start + rows]
        start += rows
