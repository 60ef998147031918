"""Samples drawn side by side: which sequence sits in which slot, and one decoding step for all of
them.

A step costs the same few operations however many slots are live; Python loops over sequences only
when they enter and leave. On a CPU that decides: at the demo's size such overhead would be most of
a step.

Shapes: N slots, B live rows (always the first B slots), M the most new tokens, U uniform numbers a
token, V vocabulary, P prompts read together, T their longest, S rows changed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from llama2 import devices
from llama2.errors import UserError
from llama2.generate.cpu_decoder import CpuDecoder
from llama2.generate.sampling import UNIFORMS, Sampling, change, draw, uniforms
from llama2.model.cache import KVCache
from llama2.model.llama import Llama

PREFILL_TOKENS = 4096  # padded tokens of one forward pass over prompts
# of prompts that the decoder reads in one call; longer ones, and more than FEW_TOKENS at once, are
READ_TOKENS = 256
FEW_TOKENS = 1024  # quicker in PyTorch's large products
COLUMNS = 16  # the number of columns read is a multiple of this, so that kernels meet few shapes
# the queue moves up when one slot in so many is free: a prefill has a fixed cost to spread
REFILL = 8
COMPACT = 4  # with no queue left, the live rows close ranks when one in so many has finished

Prompt = tuple[int, ...]
Finish = Literal["stop", "length", "cancelled"]


@dataclass(eq=False)
class Request:
    """One sample to draw, and what is drawn of it so far. (prompt index, sample index) names its
    random numbers."""

    prompt: Prompt
    sampling: Sampling
    index: int = 0
    sample: int = 0
    limit: int = 0
    """the most new tokens; what submits it sets it"""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    """of `tokens`, under the model itself"""
    alternatives: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    """the likeliest tokens and their log-probabilities at each place, if `sampling.top_logprobs`
    asks for them"""
    finish: Finish | None = None
    """"stop": the last token is a stop id; None while it runs"""
    cached: int = 0
    """tokens of the prompt that were read before, with another request"""

    @cached_property
    def way(self) -> Sampling:
        """What two requests must have in common to be drawn together."""
        return replace(self.sampling, n=1, max_tokens=1, seed=0)


@dataclass(frozen=True)
class _Prefilled:
    """A prompt read into a slot, whose samples do not all have slots yet."""

    prompt: Prompt
    slot: int
    logits_V: Tensor


@dataclass(frozen=True)
class _Group:
    """Live rows drawn in one way."""

    sampling: Sampling
    rows: Tensor | slice
    # in the order of the rows; not filled in where all rows are drawn alike
    requests: tuple[Request, ...]
    stops_V: Tensor


@dataclass
class _Rows:
    """What is known of each slot. On the device, so that a step neither loops nor waits."""

    # tokens of prompt or answer; only if penalties need it
    seen_NV: Tensor | None = field(default=None, init=False)
    # how often each stands in the answer
    counts_NV: Tensor | None = field(default=None, init=False)

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
        # What is still drawn for a finished row, until it leaves, lands in the place behind its
        # last token.
        width = most + 1
        whole_N = torch.zeros(slots, dtype=torch.long, device=device)
        return cls(
            steps_N=whole_N,
            limits_N=whole_N.clone(),
            before_N=whole_N.clone(),
            newest_N=whole_N.clone(),
            alive_N=torch.zeros_like(whole_N, dtype=torch.bool),
            tokens_NM=torch.zeros(slots, width, dtype=torch.long, device=device),
            logprobs_NM=torch.zeros(slots, width, device=device),
            uniforms_NMU=torch.zeros(slots, width, UNIFORMS, device=device),
        )

    def move(self, sources_S: Tensor, targets_S: Tensor) -> None:
        for tensor in vars(self).values():
            if tensor is not None:
                tensor[targets_S] = tensor[sources_S]

    def watch(self, slot: int, prompt: Prompt, vocabulary: int) -> None:
        """From now on know which tokens stand in this slot."""
        if self.seen_NV is None or self.counts_NV is None:
            shape, device = (len(self.steps_N), vocabulary), self.steps_N.device
            self.seen_NV = torch.zeros(shape, dtype=torch.bool, device=device)
            self.counts_NV = torch.zeros(shape, dtype=torch.int32, device=device)

        self.seen_NV[slot] = False
        self.counts_NV[slot] = 0
        self.seen_NV[slot, list(prompt)] = True


class Batch:
    """Draws `requests` in the first `slots` slots of `cache`: `step` until it returns False, then
    read the requests."""

    def __init__(
        self,
        model: Llama,
        cache: KVCache,
        slots: int,
        requests: Sequence[Request],
        most: int | None = None,
        decoder: CpuDecoder | None = None,
    ) -> None:
        self.cache = cache
        self._model, self._slots, self._decoder = model, slots, decoder
        self._device = model.device
        # Longest first: rows of similar length are live together, and short ones fill the end.
        # Samples of one prompt are neighbours, so at most one prompt waits half served.
        self._queue = deque(
            sorted(requests, key=lambda request: (-len(request.prompt), request.prompt))
        )
        self._half_served: _Prefilled | None = None
        self._seats: list[Request | None] = [None] * slots
        self._groups: list[_Group] | None = None  # None: who sits where has changed
        self._most = most or max(request.limit for request in requests)
        self._live = 0  # B
        self._time = 0  # steps made
        # Asking a GPU whether a row has finished makes it wait; asking a CPU is free.
        self._check_every = 8 if devices.is_gpu(self._device) else 1

        with torch.inference_mode():
            self._rows = _Rows.empty(slots, self._most, self._device)
            self._index_N = torch.arange(slots, device=self._device)
            self._logits_BV = torch.empty(0, model.config.vocab_size, device=self._device)

        # tokens of a row less the time: known without the device
        self._reach_N = np.zeros(slots, dtype=np.int64)

    @torch.inference_mode()
    def step(self) -> bool:
        """Draw one token for every live row; False, drawing none, when every request has its
        result."""
        free = self._leave()
        if self._live:
            self._read_newest()

        if self._queue and free:
            self._enter(free)

        if not self._live:
            return False

        self._draw()
        return True

    @property
    def left(self) -> int:
        """Requests that have no result yet; some of them may just have come to their end."""
        return len(self._queue) + self._live

    def _draw(self) -> None:
        """The next token of every live row."""
        for group in self._grouped():
            b, rows = group.rows, self._rows
            index_B, steps_B, alive_B = (
                self._index_N[: self._live][b],
                rows.steps_N[: self._live][b],
                rows.alive_N[b],
            )
            logits_BV = self._logits_BV[b]
            changed_BV = None if group.sampling.plain else self._changed(group, logits_BV)
            tokens_B, logprobs_B = draw(
                logits_BV, rows.uniforms_NMU[index_B, steps_B], group.sampling, changed_BV
            )
            rows.newest_N[index_B] = tokens_B
            rows.tokens_NM[index_B, steps_B] = tokens_B
            rows.logprobs_NM[index_B, steps_B] = logprobs_B

            if group.sampling.penalised:
                assert rows.seen_NV is not None
                assert rows.counts_NV is not None
                rows.seen_NV[index_B, tokens_B] = True
                rows.counts_NV[index_B, tokens_B] += 1

            steps_B = steps_B + alive_B
            rows.steps_N[index_B] = steps_B
            rows.alive_N[index_B] = (
                alive_B & ~group.stops_V[tokens_B] & (steps_B < rows.limits_N[index_B])
            )
            self._report(group, logits_BV, tokens_B)

        self._time += 1

    def _changed(self, group: _Group, logits_BV: Tensor) -> Tensor:
        """The group's logits under bias, penalties and grammar."""
        rows, b = self._rows, group.rows
        allowed_BV = None
        if group.sampling.grammar is not None:
            masks = [
                request.sampling.grammar.mask()
                for request in group.requests
                if request.sampling.grammar
            ]
            allowed_BV = torch.stack(masks).to(self._device)

        seen_BV, counts_BV = (
            None if table is None else table[: self._live][b]
            for table in (rows.seen_NV, rows.counts_NV)
        )
        return change(logits_BV, group.sampling, seen_BV, counts_BV, allowed_BV)

    def _report(self, group: _Group, logits_BV: Tensor, tokens_B: Tensor) -> None:
        """What a request wants to know of each token besides the token itself."""
        if group.sampling.top_logprobs:
            found = (
                logits_BV.float()
                .log_softmax(-1)
                .topk(min(group.sampling.top_logprobs, logits_BV.shape[1]), -1)
            )
            for request, ids, values in zip(
                group.requests, found.indices.tolist(), found.values.tolist()
            ):
                if request.finish is None:
                    request.alternatives.append(tuple(zip(ids, values)))

        if group.sampling.grammar is not None:
            for request, token in zip(group.requests, tokens_B.tolist()):
                if request.sampling.grammar is not None and token not in request.sampling.stop:
                    request.sampling.grammar.accept(token)

    def _grouped(self) -> list[_Group]:
        """The live rows by how they are drawn. All alike, as in rollouts, are one slice."""
        if self._groups is None:
            members: dict[Sampling, list[int]] = {}
            for slot, request in enumerate(self._seats[: self._live]):
                if request is not None:
                    members.setdefault(request.way, []).append(slot)

            self._groups = [
                self._group(way, slots, alone=len(members) == 1) for way, slots in members.items()
            ]

        return self._groups

    def _group(self, way: Sampling, slots: list[int], alone: bool) -> _Group:
        stops_V = torch.zeros(self._model.config.vocab_size, dtype=torch.bool, device=self._device)
        stops_V[list(way.stop)] = True
        requests = tuple(request for slot in slots if (request := self._seats[slot]) is not None)
        simple = alone and way.plain and not way.top_logprobs

        return _Group(
            way,
            slice(self._live) if simple else torch.tensor(slots, device=self._device),
            requests,
            stops_V,
        )

    def newest(self) -> int:
        """The token that the first row drew last."""
        return int(self._rows.newest_N[0])

    def _leave(self) -> list[int]:
        """Hand out the results of finished rows, if enough have finished; returns the slots that
        are free."""
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
            request.tokens, request.logprobs = tokens[row][:count], logprobs[row][:count]
            del request.alternatives[count:]
            _check(request.logprobs)
            request.finish = "stop" if request.tokens[-1] in request.sampling.stop else "length"
            self._seats[slot] = None

        self._groups = None

    def _close_ranks(self, free: list[int], alive: int) -> None:
        """Move the last live rows into the gaps before them, so that the first `alive` slots are
        the live ones."""
        gaps = [slot for slot in free if slot < alive]
        taken = set(free)
        movers = [slot for slot in range(alive, self._live) if slot not in taken]

        if gaps:
            sources_S, targets_S = (
                torch.tensor(slots, device=self._device) for slots in (movers, gaps)
            )
            self.cache.copy(sources_S, targets_S, self._columns())
            self._rows.move(sources_S, targets_S)
            self._reach_N[gaps] = self._reach_N[movers]

            for source, target in zip(movers, gaps):
                self._seats[target], self._seats[source] = self._seats[source], None

        self._live, self._groups = alive, None

    def _columns(self) -> int:
        longest = int(self._reach_N[: self._live].max()) + self._time
        return min(-(-longest // COLUMNS) * COLUMNS, self.cache.capacity)

    def _read_newest(self) -> None:
        """One forward pass over the newest token of each live row."""
        rows, b = self._rows, slice(0, self._live)
        positions_B = rows.before_N[b] + rows.steps_N[b]
        if self._decoder is not None:
            self._logits_BV = self._decoder(rows.newest_N[b], positions_B, self.cache)
            return

        self.cache.decode(positions_B, self._columns())
        logits_B1V = self._model(
            rows.newest_N[b, None], positions_BT=positions_B[:, None], cache=self.cache
        )
        self._logits_BV = logits_B1V[:, 0]

    def _enter(self, free: list[int]) -> None:
        """Seat the head of the queue in free slots: prefill new prompts once, copy them to their
        further samples."""
        half_served = self._half_served
        # its own prompt must be the one to go there
        if half_served is not None and half_served.slot in free:
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

        copies = [
            (homes[request.prompt], slot)
            for slot, request in seated
            if homes[request.prompt] != slot
        ]
        if copies:
            sources_S, targets_S = (
                torch.tensor(side, device=self._device) for side in zip(*copies)
            )
            self.cache.copy(sources_S, targets_S, max(len(prompt) for prompt in homes))

        last = seated[-1][1].prompt
        more = bool(self._queue) and self._queue[0].prompt == last
        self._half_served = _Prefilled(last, homes[last], logits[last]) if more else None
        self._seat(seated, torch.stack([logits[request.prompt] for _, request in seated]))

    def _seat(self, seated: Sequence[tuple[int, Request]], logits_SV: Tensor) -> None:
        slots, requests = zip(*seated)
        slots_S, rows = torch.tensor(slots, device=self._device), self._rows
        rows.steps_N[slots_S] = 0
        rows.limits_N[slots_S] = torch.tensor(
            [request.limit for request in requests], device=self._device
        )
        rows.before_N[slots_S] = torch.tensor(
            [len(request.prompt) - 1 for request in requests], device=self._device
        )
        rows.alive_N[slots_S] = True
        self._randomise(slots, requests)

        for slot, request in seated:
            self._seats[slot] = request
            self._reach_N[slot] = len(request.prompt) - self._time
            if request.sampling.penalised:
                rows.watch(slot, request.prompt, self._model.config.vocab_size)

        self._groups = None
        kept_BV, self._live = self._logits_BV[: self._live], max(self._live, max(slots) + 1)
        self._logits_BV = logits_SV.new_empty(self._live, logits_SV.shape[1])
        self._logits_BV[: len(kept_BV)] = kept_BV
        self._logits_BV[slots_S] = logits_SV

    def _randomise(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        """Each row's random numbers, for as many tokens as it may have."""
        for seed in {
            request.sampling.seed for request in requests if request.sampling.temperature > 0
        }:
            mine = [
                (slot, request)
                for slot, request in zip(slots, requests)
                if request.sampling.seed == seed
            ]
            most = max(request.limit for _, request in mine)
            numbers_SMU = uniforms(
                seed, [(request.index, request.sample) for _, request in mine], most
            )
            slots_S = torch.tensor([slot for slot, _ in mine], device=self._device)
            self._rows.uniforms_NMU[slots_S, :most] = torch.from_numpy(numbers_SMU).to(self._device)

    def _prefill(self, prompts: dict[Prompt, int]) -> dict[Prompt, Tensor]:
        """Read each prompt into its slot; returns the logits_V (fp32) behind its last token."""
        logits: dict[Prompt, Tensor] = {}
        few = self._decoder is not None and sum(map(len, prompts)) <= FEW_TOKENS
        short = [prompt for prompt in prompts if few and len(prompt) <= READ_TOKENS]

        for part in _parts(short, READ_TOKENS):
            logits.update(zip(part, self._read([(prompts[prompt], 0, prompt) for prompt in part])))

        for part in _parts([prompt for prompt in prompts if prompt not in logits], PREFILL_TOKENS):
            lengths_P = torch.tensor([len(prompt) for prompt in part], device=self._device)
            width = len(part[0])
            tokens_PT = torch.tensor([(*prompt, *(0,) * (width - len(prompt))) for prompt in part])
            self.cache.prefill(
                torch.tensor([prompts[prompt] for prompt in part], device=self._device), width
            )
            hidden_PTD = self._model(tokens_PT.to(self._device), cache=self.cache, head=False)
            last_PD = hidden_PTD[self._index_N[: len(part)], lengths_P - 1]
            logits.update(zip(part, self._model.logits(last_PD)))

        return logits

    def _read(self, pieces: Sequence[tuple[int, int, Prompt]]) -> Tensor:
        """Read pieces of prompts, (slot, begin, tokens), by the decoder; logits_PV behind the last
        token of each."""
        assert self._decoder is not None
        lengths_P = torch.tensor([len(tokens) for _, _, tokens in pieces])
        tokens_B = torch.tensor([token for _, _, tokens in pieces for token in tokens])
        slots_B = torch.tensor([slot for slot, _, _ in pieces]).repeat_interleave(lengths_P)
        positions_B = torch.cat(
            [torch.arange(begin, begin + len(tokens)) for _, begin, tokens in pieces]
        )

        return self._decoder.read(
            tokens_B, slots_B, positions_B, lengths_P.cumsum(0) - 1, self.cache
        )


def _check(logprobs: Sequence[float]) -> None:
    if not np.isfinite(logprobs).all():
        raise UserError(
            "the model's log-probabilities are not finite",
            "its weights are damaged: go back to an earlier checkpoint",
        )


def _parts(prompts: list[Prompt], tokens: int) -> Iterator[list[Prompt]]:
    """Prompts, longest first, in parts of at most `tokens` padded tokens (or of one prompt)."""
    start = 0
    while start < len(prompts):
        rows = max(1, tokens // len(prompts[start]))
        yield prompts[start : start + rows]
        start += rows
