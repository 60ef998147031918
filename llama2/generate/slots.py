"""Samples drawn side by side: each has a row of a KV cache, and one draw serves them all.

A step costs the same few operations however many slots are live; Python loops over sequences only
when they come and go. On a CPU that decides: at the demo's size such overhead would be most of a
step.

Shapes: N slots, B live rows (always the first B slots), M the most new tokens, U uniform numbers a
token, V vocabulary, S rows changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llama2.errors import UserError
from llama2.generate.model_runner import ModelRunner
from llama2.generate.request import SampleRequest
from llama2.generate.sampling import UNIFORMS, Sampling, draw, draw_uniforms, penalize

COMPACT = 4  # the live rows move together when one in so many is free


class _Rows:
    """The state of each slot, on the device, so that a step neither loops nor waits."""

    def __init__(self, slots: int, width: int, vocab_size: int, device: torch.device) -> None:
        zeros_N = torch.zeros(slots, dtype=torch.long, device=device)
        zeros_NM = torch.zeros(slots, width, device=device)
        self.drawn_N = zeros_N  # tokens drawn
        self.limits_N = zeros_N.clone()  # the most to draw
        # prompt tokens less one: the newest token is at position `before` + `drawn`
        self.before_N = zeros_N.clone()
        self.newest_N = zeros_N.clone()
        self.alive_N = torch.zeros_like(zeros_N, dtype=torch.bool)
        self.tokens_NM = torch.zeros_like(zeros_NM, dtype=torch.long)
        self.logprobs_NM = zeros_NM
        self.uniforms_NMU = torch.zeros(slots, width, UNIFORMS, device=device)
        self._vocab_size = vocab_size

    @cached_property
    def seen_NV(self) -> Tensor:
        """The tokens of prompt or answer; made when penalties first need it."""
        return torch.zeros_like(self.counts_NV, dtype=torch.bool)

    @cached_property
    def counts_NV(self) -> Tensor:
        """How often each token stands in the answer."""
        shape = (len(self.drawn_N), self._vocab_size)
        return torch.zeros(shape, dtype=torch.int32, device=self.drawn_N.device)

    def move(self, sources_S: Tensor, targets_S: Tensor) -> None:
        """Copy the state of some slots to others."""
        for tensor in vars(self).values():
            if isinstance(tensor, Tensor):
                tensor[targets_S] = tensor[sources_S]


@dataclass(frozen=True)
class _Group:
    """Live rows that are drawn in one way, and their requests in the same order. Where a grammar
    says what may follow there is one row: each sample has a grammar of its own."""

    sampling: Sampling
    rows: Tensor | slice
    requests: tuple[SampleRequest, ...]
    stops_V: Tensor


class Slots:
    """Rows of a KV cache whose next tokens are drawn together.

    The first `live` rows are decoded. The row of a sample that has ended is still drawn until
    `compact` or the next `assign`: what is drawn lands behind its last token.

    count: the most rows. context: the most tokens of a row. max_new_tokens: the most that are drawn
    for it.
    """

    def __init__(self, runner: ModelRunner, count: int, context: int, max_new_tokens: int) -> None:
        self.runner, self.count, self.context = runner, count, context
        self.requests: dict[int, SampleRequest] = {}  # by slot
        self.live = 0
        self.steps = 0  # draws so far
        self._groups: list[_Group] = []  # to be made anew when the requests have changed
        # tokens of a row less `steps`: known without asking the device
        self._reach_N = np.zeros(count, dtype=np.int64)

        with torch.inference_mode():
            self._rows = _Rows(count, max_new_tokens + 1, runner.vocab_size, runner.device)
            self._index_N = torch.arange(count, device=runner.device)
            self._logits_BV = torch.empty(0, runner.vocab_size, device=runner.device)

    # --- rows come and go ---

    def assign(self, requests: dict[int, SampleRequest], logits_SV: Tensor) -> None:
        """Begin to draw for requests (by slot) whose prompts have been read, and left `logits_SV`
        behind their last tokens."""
        slots, rows = list(requests), self._rows
        slots_S = self._tensor(slots)
        limits = [request.max_new_tokens(self.context) for request in requests.values()]
        lengths = np.array([len(request.prompt) for request in requests.values()])
        rows.drawn_N[slots_S] = 0
        rows.limits_N[slots_S] = self._tensor(limits)
        rows.before_N[slots_S] = self._tensor(lengths - 1)
        rows.alive_N[slots_S] = True
        self._draw_uniforms(requests, slots_S, max(limits))
        self._reach_N[slots] = lengths - self.steps

        for slot, request in requests.items():
            if request.sampling.has_penalties:
                rows.counts_NV[slot] = 0
                rows.seen_NV[slot] = False
                rows.seen_NV[slot, list(request.prompt)] = True

        logits_BV, live = self._logits_BV[: self.live], max(self.live, max(slots) + 1)
        self._logits_BV = logits_SV.new_empty(live, self.runner.vocab_size)
        self._logits_BV[: self.live] = logits_BV
        self._logits_BV[slots_S] = logits_SV
        self.live = live
        self.requests |= requests
        self._groups.clear()

    def _draw_uniforms(
        self, requests: dict[int, SampleRequest], slots_S: Tensor, tokens: int
    ) -> None:
        """Draw the random numbers of rows, for as many tokens as the longest may have."""
        if any(request.sampling.temperature for request in requests.values()):
            streams = [request.stream for request in requests.values()]
            uniforms_SMU = self._tensor(draw_uniforms(streams, tokens))
            self._rows.uniforms_NMU[slots_S, :tokens] = uniforms_SMU

    def reserve(self, slot: int) -> None:
        """Keep a slot for a prompt that is still being read: what is drawn for it, if it is among
        the live ones, lands out of the way."""
        self._rows.drawn_N[slot] = 0
        self._rows.before_N[slot] = self.runner.cache.capacity - 1
        self._rows.alive_N[slot] = False

    def release(self, slot: int) -> None:
        """Draw no more for the request of a slot."""
        self._rows.alive_N[slot] = False
        del self.requests[slot]
        self._groups.clear()

    def compact(self) -> None:
        """Move the last live rows into the gaps before them, if there are enough gaps."""
        busy = len(self.requests)
        if busy == self.live or (self.live - busy) * COMPACT < self.live:
            return

        sources = [slot for slot in self.requests if slot >= busy]
        targets = [slot for slot in range(busy) if slot not in self.requests]
        if targets:
            self.runner.copy(sources, targets, self._longest())
            self._rows.move(self._tensor(sources), self._tensor(targets))
            self._reach_N[targets] = self._reach_N[sources]

        for source, target in zip(sources, targets):
            self.requests[target] = self.requests.pop(source)

        self.live = busy
        self._groups.clear()

    # --- tokens ---

    def decode(self) -> None:
        """Run the model over the newest token of each live row."""
        if self.live:
            rows, live = self._rows, slice(self.live)
            positions_B = rows.before_N[live] + rows.drawn_N[live]
            self._logits_BV = self.runner.decode(rows.newest_N[live], positions_B, self._longest())

    def draw(self) -> None:
        """Draw the next token of every live row."""
        self._groups = self._groups or self._group_rows()
        for group in self._groups:
            self._draw_group(group)

        self.steps += 1

    def _draw_group(self, group: _Group) -> None:
        rows, sampling = self._rows, group.sampling
        index_B = self._index_N[: self.live][group.rows]
        drawn_B = rows.drawn_N[: self.live][group.rows]
        logits_BV = self._logits_BV[group.rows]

        changed_BV = None if sampling.is_plain else self._change_logits(group, index_B, logits_BV)
        uniforms_BU = rows.uniforms_NMU[index_B, drawn_B]
        tokens_B, logprobs_B = draw(logits_BV, uniforms_BU, sampling, changed_BV)

        rows.newest_N[index_B] = tokens_B
        rows.tokens_NM[index_B, drawn_B] = tokens_B
        rows.logprobs_NM[index_B, drawn_B] = logprobs_B
        if sampling.has_penalties:
            rows.seen_NV[index_B, tokens_B] = True
            rows.counts_NV[index_B, tokens_B] += 1

        alive_B = rows.alive_N[: self.live][group.rows]
        drawn_B = drawn_B + alive_B
        rows.drawn_N[index_B] = drawn_B
        rows.alive_N[index_B] = (
            alive_B & ~group.stops_V[tokens_B] & (drawn_B < rows.limits_N[index_B])
        )
        if sampling.top_logprobs:
            _add_alternatives(group, logits_BV)

        if sampling.grammar and int(tokens_B[0]) not in sampling.stop:
            sampling.grammar.accept(int(tokens_B[0]))

    def _change_logits(self, group: _Group, index_B: Tensor, logits_BV: Tensor) -> Tensor:
        """Return the group's logits under penalties, bias and grammar."""
        sampling, rows = group.sampling, self._rows
        logits_BV = logits_BV.float().clone()
        if sampling.has_penalties:
            seen_BV, counts_BV = rows.seen_NV[index_B], rows.counts_NV[index_B]
            logits_BV = penalize(logits_BV, sampling, seen_BV, counts_BV)

        for token, bias in sampling.logit_bias:
            logits_BV[:, token] += bias

        if sampling.grammar:
            allowed_V = sampling.grammar.mask().to(logits_BV.device)
            logits_BV.masked_fill_(~allowed_V, float("-inf"))

        return logits_BV

    def _group_rows(self) -> list[_Group]:
        """Return the live rows by how they are drawn. All alike, as in rollouts, are one slice."""
        members: dict[Sampling, dict[int, SampleRequest]] = {}
        for slot, request in self.requests.items():
            members.setdefault(request.draw_key, {})[slot] = request

        groups = []
        for sampling, requests in members.items():
            stops_V = torch.zeros(self.runner.vocab_size, dtype=torch.bool)
            stops_V[list(sampling.stop)] = True
            alike = len(members) == 1 and sampling.is_plain and not sampling.top_logprobs
            rows = slice(self.live) if alike else self._tensor(list(requests))
            stops_V = stops_V.to(self.runner.device)
            groups.append(_Group(sampling, rows, tuple(requests.values()), stops_V))

        return groups

    # --- results ---

    def find_ended(self) -> list[int]:
        """Return the live slots whose samples have ended. On a GPU this waits for the draw."""
        ended_S: Tensor = (~self._rows.alive_N[: self.live]).nonzero()[:, 0]
        return ended_S.tolist()

    def newest_token(self) -> int:
        """Return the token that was drawn last for the first row."""
        return int(self._rows.newest_N[0])

    def collect_all(self, slots: Sequence[int]) -> None:
        """Give requests that have ended all their tokens, and free their slots."""
        slots_S = self._tensor(slots)
        counts = self._rows.drawn_N[slots_S].tolist()
        tokens = self._rows.tokens_NM[slots_S, : max(counts)].tolist()
        logprobs = self._rows.logprobs_NM[slots_S, : max(counts)].tolist()

        for row, (slot, count) in enumerate(zip(slots, counts)):
            request = self.requests[slot]
            request.tokens, request.logprobs = tokens[row][:count], logprobs[row][:count]
            del request.alternatives[count:]
            self._end(slot)
            _check_finite(request.logprobs)

    def collect_newest(self) -> dict[int, SampleRequest]:
        """Give every request its newest token; returns them by slot. The slots of those that have
        ended are free."""
        rows, live = self._rows, slice(self.live)
        last_B1 = (rows.drawn_N[live] - 1).clamp(min=0)[:, None]
        logprobs = rows.logprobs_NM[live].gather(1, last_B1)[:, 0].tolist()
        tokens, alive = rows.newest_N[live].tolist(), rows.alive_N[live].tolist()
        requests = dict(self.requests)

        for slot, request in requests.items():
            request.tokens.append(tokens[slot])
            request.logprobs.append(logprobs[slot])
            if not alive[slot]:
                self._end(slot)

        _check_finite([logprobs[slot] for slot in requests])
        return requests

    def _end(self, slot: int) -> None:
        request = self.requests[slot]
        request.finish = "stop" if request.tokens[-1] in request.sampling.stop else "length"
        self.release(slot)

    def _longest(self) -> int:
        return int(self._reach_N[: self.live].max()) + self.steps

    def _tensor(self, numbers: Sequence[int] | NDArray[Any]) -> Tensor:
        return torch.as_tensor(numbers, device=self.runner.device)


def _add_alternatives(group: _Group, logits_BV: Tensor) -> None:
    """Give each request the likeliest tokens at this position."""
    count = min(group.sampling.top_logprobs, logits_BV.shape[1])
    top = logits_BV.float().log_softmax(-1).topk(count, -1)
    for request, ids, values in zip(group.requests, top.indices.tolist(), top.values.tolist()):
        request.alternatives.append(tuple(zip(ids, values)))


def _check_finite(logprobs: Sequence[float]) -> None:
    if not np.isfinite(logprobs).all():
        raise UserError(
            "the model's log-probabilities are not finite",
            "its weights are damaged: go back to an earlier checkpoint",
        )
