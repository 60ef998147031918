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

import numpy as np
import torch
from torch import Tensor

from llama2.errors import UserError
from llama2.generate.model_runner import ModelRunner
from llama2.generate.request import Prompt, SampleRequest
from llama2.generate.sampling import UNIFORMS, Sampling, change_logits, draw, draw_uniforms

COMPACT = 4  # the live rows move together when one in so many is free


@dataclass
class _Rows:
    """The state of each slot, on the device, so that a step neither loops nor waits."""

    drawn_N: Tensor
    """tokens drawn"""
    limits_N: Tensor
    """the most to draw"""
    before_N: Tensor
    """prompt tokens less one: the newest token is at position `before` + `drawn`"""
    newest_N: Tensor
    alive_N: Tensor
    tokens_NM: Tensor
    logprobs_NM: Tensor
    uniforms_NMU: Tensor
    seen_NV: Tensor | None = None
    """the tokens of prompt or answer, once penalties need it"""
    counts_NV: Tensor | None = None
    """how often each token stands in the answer"""

    @classmethod
    def allocate(cls, slots: int, width: int, device: torch.device) -> _Rows:
        """Return empty rows with room for `width` new tokens each."""
        zeros_N = torch.zeros(slots, dtype=torch.long, device=device)
        return cls(
            drawn_N=zeros_N,
            limits_N=zeros_N.clone(),
            before_N=zeros_N.clone(),
            newest_N=zeros_N.clone(),
            alive_N=torch.zeros_like(zeros_N, dtype=torch.bool),
            tokens_NM=torch.zeros(slots, width, dtype=torch.long, device=device),
            logprobs_NM=torch.zeros(slots, width, device=device),
            uniforms_NMU=torch.zeros(slots, width, UNIFORMS, device=device),
        )

    def move(self, sources_S: Tensor, targets_S: Tensor) -> None:
        """Copy the state of some slots to others."""
        for tensor in vars(self).values():
            if tensor is not None:
                tensor[targets_S] = tensor[sources_S]

    def count_tokens(self, slot: int, prompt: Prompt, vocab_size: int) -> None:
        """Begin to keep account of the tokens of a slot."""
        if self.seen_NV is None or self.counts_NV is None:
            shape, device = (len(self.drawn_N), vocab_size), self.drawn_N.device
            self.seen_NV = torch.zeros(shape, dtype=torch.bool, device=device)
            self.counts_NV = torch.zeros(shape, dtype=torch.int32, device=device)

        self.seen_NV[slot] = False
        self.counts_NV[slot] = 0
        self.seen_NV[slot, list(prompt)] = True


@dataclass(frozen=True)
class _Group:
    """Live rows that are drawn in one way."""

    sampling: Sampling
    rows: Tensor | slice
    requests: tuple[SampleRequest, ...]
    """in the order of the rows"""
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
        self.requests: list[SampleRequest | None] = [None] * count
        self.live = 0
        self.steps = 0  # draws so far
        self._groups: list[_Group] | None = None  # None: the requests have changed
        # tokens of a row less `steps`: known without asking the device
        self._reach_N = np.zeros(count, dtype=np.int64)

        with torch.inference_mode():
            self._rows = _Rows.allocate(count, max_new_tokens + 1, runner.device)
            self._index_N = torch.arange(count, device=runner.device)
            self._logits_BV = torch.empty(0, runner.vocab_size, device=runner.device)

    # --- rows come and go ---

    def assign(self, requests: dict[int, SampleRequest], logits_SV: Tensor) -> None:
        """Begin to draw for requests (by slot) whose prompts have been read, and left `logits_SV`
        behind their last tokens."""
        slots, rows = list(requests), self._rows
        slots_S = self._tensor(slots)
        limits = [request.max_new_tokens(self.context) for request in requests.values()]
        rows.drawn_N[slots_S] = 0
        rows.limits_N[slots_S] = self._tensor(limits)
        rows.before_N[slots_S] = self._tensor(
            [len(request.prompt) - 1 for request in requests.values()]
        )
        rows.alive_N[slots_S] = True
        self._draw_uniforms(slots_S, list(requests.values()), max(limits))

        for slot, request in requests.items():
            self.requests[slot] = request
            self._reach_N[slot] = len(request.prompt) - self.steps
            if request.sampling.has_penalties:
                rows.count_tokens(slot, request.prompt, self.runner.vocab_size)

        before_BV, before = self._logits_BV, self.live
        self.live = max(before, max(slots) + 1)
        self._groups = None
        self._logits_BV = logits_SV.new_empty(self.live, self.runner.vocab_size)
        self._logits_BV[:before] = before_BV[:before]
        self._logits_BV[slots_S] = logits_SV

    def reserve(self, slot: int) -> None:
        """Keep a slot for a prompt that is still being read: what is drawn for it, if it is among
        the live ones, lands out of the way."""
        self._rows.drawn_N[slot] = 0
        self._rows.before_N[slot] = self.runner.cache.capacity - 1
        self._rows.alive_N[slot] = False

    def release(self, slot: int) -> None:
        """Draw no more for the request of a slot."""
        self.requests[slot], self._groups = None, None
        self._rows.alive_N[slot] = False

    def compact(self) -> None:
        """Move the last live rows into the gaps before them, if there are enough gaps."""
        busy = [slot for slot in range(self.live) if self.requests[slot] is not None]
        free = self.live - len(busy)
        if not free or free * COMPACT < self.live:
            return

        sources = [slot for slot in busy if slot >= len(busy)]
        targets = [slot for slot in range(len(busy)) if self.requests[slot] is None]
        if targets:
            self.runner.copy(sources, targets, self._longest())
            self._rows.move(self._tensor(sources), self._tensor(targets))
            self._reach_N[targets] = self._reach_N[sources]

        for source, target in zip(sources, targets):
            self.requests[target], self.requests[source] = self.requests[source], None

        self.live, self._groups = len(busy), None

    def _draw_uniforms(
        self, slots_S: Tensor, requests: Sequence[SampleRequest], tokens: int
    ) -> None:
        """Draw the random numbers of rows, for as many tokens as the longest may have."""
        if all(request.sampling.temperature == 0 for request in requests):
            return

        streams = [(request.sampling.seed, request.index, request.sample) for request in requests]
        uniforms_SMU = torch.from_numpy(draw_uniforms(streams, tokens))
        self._rows.uniforms_NMU[slots_S, :tokens] = uniforms_SMU.to(self.runner.device)

    # --- tokens ---

    def decode(self) -> None:
        """Run the model over the newest token of each live row."""
        if not self.live:
            return

        rows, live = self._rows, slice(self.live)
        positions_B = rows.before_N[live] + rows.drawn_N[live]
        self._logits_BV = self.runner.decode(rows.newest_N[live], positions_B, self._longest())

    def draw(self) -> None:
        """Draw the next token of every live row."""
        if self._groups is None:
            self._groups = self._group_rows()

        for group in self._groups:
            self._draw_group(group)

        self.steps += 1

    def _draw_group(self, group: _Group) -> None:
        rows, sampling = self._rows, group.sampling
        index_B = self._index_N[: self.live][group.rows]
        drawn_B = rows.drawn_N[index_B]
        alive_B = rows.alive_N[index_B]
        logits_BV = self._logits_BV[group.rows]

        changed_BV = None if sampling.is_plain else self._change_logits(group, logits_BV)
        uniforms_BU = rows.uniforms_NMU[index_B, drawn_B]
        tokens_B, logprobs_B = draw(logits_BV, uniforms_BU, sampling, changed_BV)

        rows.newest_N[index_B] = tokens_B
        rows.tokens_NM[index_B, drawn_B] = tokens_B
        rows.logprobs_NM[index_B, drawn_B] = logprobs_B
        if sampling.has_penalties:
            assert rows.seen_NV is not None
            assert rows.counts_NV is not None
            rows.seen_NV[index_B, tokens_B] = True
            rows.counts_NV[index_B, tokens_B] += 1

        drawn_B = drawn_B + alive_B
        unfinished_B = ~group.stops_V[tokens_B] & (drawn_B < rows.limits_N[index_B])
        rows.drawn_N[index_B] = drawn_B
        rows.alive_N[index_B] = alive_B & unfinished_B

        if sampling.top_logprobs:
            _add_alternatives(group, logits_BV)

        if sampling.grammar is not None:
            for request, token in zip(group.requests, tokens_B.tolist()):
                if request.sampling.grammar and token not in request.sampling.stop:
                    request.sampling.grammar.accept(token)

    def _change_logits(self, group: _Group, logits_BV: Tensor) -> Tensor:
        """Return the group's logits under bias, penalties and grammar."""
        allowed_BV = seen_BV = counts_BV = None
        if group.sampling.grammar is not None:
            grammars = [request.sampling.grammar for request in group.requests]
            masks = [grammar.mask() for grammar in grammars if grammar]
            allowed_BV = torch.stack(masks).to(self.runner.device)

        rows = self._rows
        if rows.seen_NV is not None and rows.counts_NV is not None:
            seen_BV = rows.seen_NV[: self.live][group.rows]
            counts_BV = rows.counts_NV[: self.live][group.rows]

        return change_logits(logits_BV, group.sampling, seen_BV, counts_BV, allowed_BV)

    def _group_rows(self) -> list[_Group]:
        """Return the live rows by how they are drawn. All alike, as in rollouts, are one slice."""
        members: dict[Sampling, dict[int, SampleRequest]] = {}
        for slot, request in enumerate(self.requests[: self.live]):
            if request is not None:
                members.setdefault(request.draw_key, {})[slot] = request

        groups = []
        for sampling, requests in members.items():
            stops_V = torch.zeros(self.runner.vocab_size, dtype=torch.bool)
            stops_V[list(sampling.stop)] = True
            rows: Tensor | slice = slice(self.live)
            if len(members) > 1 or not sampling.is_plain or sampling.top_logprobs:
                rows = self._tensor(list(requests))

            stops_V = stops_V.to(self.runner.device)
            groups.append(_Group(sampling, rows, tuple(requests.values()), stops_V))

        return groups

    # --- results ---

    def count_alive(self) -> int:
        """Return the live rows whose samples have not ended. On a GPU this waits for the draw."""
        return int(self._rows.alive_N[: self.live].sum())

    def newest_token(self) -> int:
        """Return the token that was drawn last for the first row."""
        return int(self._rows.newest_N[0])

    def collect_ended(self) -> list[int]:
        """Give the requests that have ended all their tokens; returns the live slots that are now
        free."""
        free = (~self._rows.alive_N[: self.live]).nonzero().squeeze(1).tolist()
        ended = [slot for slot in free if self.requests[slot] is not None]
        if not ended:
            return free

        ended_S = self._tensor(ended)
        counts = self._rows.drawn_N[ended_S].tolist()
        tokens = self._rows.tokens_NM[ended_S, : max(counts)].tolist()
        logprobs = self._rows.logprobs_NM[ended_S, : max(counts)].tolist()

        for row, (slot, count) in enumerate(zip(ended, counts)):
            request = self.requests[slot]
            assert request is not None
            request.tokens, request.logprobs = tokens[row][:count], logprobs[row][:count]
            del request.alternatives[count:]
            self._end(slot, request)
            _check_finite(request.logprobs)

        return free

    def collect_newest(self) -> dict[int, SampleRequest]:
        """Give every request its newest token; returns them by slot. Those that have ended have a
        `finish`."""
        rows, live = self._rows, slice(self.live)
        last_B1 = (rows.drawn_N[live] - 1).clamp(min=0)[:, None]
        logprobs = rows.logprobs_NM[live].gather(1, last_B1)[:, 0].tolist()
        tokens, alive = rows.newest_N[live].tolist(), rows.alive_N[live].tolist()
        given = {}

        for slot, request in enumerate(self.requests[live]):
            if request is None:
                continue

            given[slot] = request
            request.tokens.append(tokens[slot])
            request.logprobs.append(logprobs[slot])
            if not alive[slot]:
                self._end(slot, request)

        _check_finite([logprobs[slot] for slot in given])
        return given

    def _end(self, slot: int, request: SampleRequest) -> None:
        request.finish = "stop" if request.tokens[-1] in request.sampling.stop else "length"
        self.requests[slot], self._groups = None, None

    def _longest(self) -> int:
        return int(self._reach_N[: self.live].max()) + self.steps

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, device=self.runner.device)


def _add_alternatives(group: _Group, logits_BV: Tensor) -> None:
    """Give each request the likeliest tokens at this position."""
    count = min(group.sampling.top_logprobs, logits_BV.shape[1])
    top = logits_BV.float().log_softmax(-1).topk(count, -1)
    for request, ids, values in zip(group.requests, top.indices.tolist(), top.values.tolist()):
        if request.finish is None:
            request.alternatives.append(tuple(zip(ids, values)))


def _check_finite(logprobs: Sequence[float]) -> None:
    if not np.isfinite(logprobs).all():
        raise UserError(
            "the model's log-probabilities are not finite",
            "its weights are damaged: go back to an earlier checkpoint",
        )
