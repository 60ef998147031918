"""One call on its way: the samples of its prompts, drawn by a worker, as text that is certain."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal

from llama2.errors import UserError
from llama2.generate.batch import Request
from llama2.generate.sampling import Sampling
from llama2.serve import errors
from llama2.serve.constrained import Shape
from llama2.serve.detokenizer import Decoder, Part, Piece
from llama2.serve.metrics import Metrics
from llama2.serve.models import ChatModel
from llama2.serve.safety import Verdict
from llama2.serve.schema import Sampled
from llama2.serve.worker import Alternatives, Drawn, Ticket

Reason = Literal["stop", "length", "content_filter"]


@dataclass(frozen=True)
class Event:
    """News of one sample: more text, perhaps its end, and what the safety model thought of it."""

    index: int
    part: Part
    finish: Reason | None = None
    verdict: Verdict | None = None
    stop: Piece | None = None
    """the stop id that ended it"""


@dataclass
class _Sample:
    decoder: Decoder
    drawn: int = 0


@dataclass(frozen=True)
class Asked:
    """What is to be drawn: `n` samples of each prompt, perhaps none (`param` is what the client
    calls a prompt)."""

    prompts: Sequence[Sequence[int]]
    sampling: Sampling
    n: int
    stops: tuple[str, ...]
    strip: bool
    """answers are stripped; continuations are what stands behind their prompt"""
    param: str
    pieces: bool = True
    """tokens are reported one by one, not only their text"""
    begun: str = ""
    """the beginning of the answer that is gone on with"""


class Generation:
    """Draws what is asked, from `begin` on. A context: its samples are cancelled when it ends.
    ApiError if they cannot be drawn. It may be made in any thread; everything else is the event
    loop's."""

    ticket: Ticket

    def __init__(self, model: ChatModel, asked: Asked, seconds: float, metrics: Metrics) -> None:
        self.model, self.asked, self._seconds = model, asked, seconds
        self._metrics, self._began, self._first, self._newest = metrics, time.monotonic(), True, 0.0
        check_prompts(model, asked.prompts, asked.param)

        if model.worker.limit < len(asked.prompts) * asked.n:
            raise errors.invalid(
                f"n: {len(asked.prompts) * asked.n} samples are more than the {model.worker.limit} "
                "that this server takes at a time",
                "n",
            )

        requests = [
            Request(
                tuple(prompt),
                _own(_within(asked.sampling, model.context - len(prompt))),
                index,
                sample,
            )
            for index, prompt in enumerate(asked.prompts)
            for sample in range(asked.n)
        ]
        alone = asked.strip and not asked.begun.strip()  # a text of its own
        self._samples = [
            _Sample(
                Decoder(
                    model.tokenizer,
                    asked.stops,
                    () if alone else request.prompt,
                    asked.strip,
                    asked.begun,
                )
            )
            for request in requests
        ]
        self._requests = requests

    def begin(self) -> Generation:
        """Have the samples drawn. ApiError if there is no room for them."""
        self.ticket = self.model.worker.submit(self._requests, self._seconds)
        return self

    async def events(self) -> AsyncGenerator[list[Event], None]:
        """What becomes certain, as it does; the last event of each sample says how it finished."""
        async for news in self.ticket.updates():
            events = [event for drawn in news if (event := self._take(drawn))]
            self._measure(news)
            if events:
                yield events

    def usage(self) -> dict[str, object]:
        """OpenAI's account of the tokens so far. A prompt counts once, however many samples it
        has."""
        n, requests = self.asked.n, self.ticket.requests
        prompt, completion = (
            sum(map(len, self.asked.prompts)),
            sum(sample.drawn for sample in self._samples),
        )
        cached = sum(
            min(request.cached for request in requests[begin : begin + n])
            for begin in range(0, len(requests), max(1, n))
        )

        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _take(self, drawn: Drawn) -> Event | None:
        sample, stop = self._samples[drawn.sample], None
        sample.drawn += len(drawn.tokens)
        count = len(drawn.tokens) - (drawn.finish == "stop")  # a stop id has no text

        if self.asked.pieces or self.asked.stops:
            part = self._pushed(drawn, count)
            if sample.decoder.stopped:
                self.ticket.cancel(drawn.sample)
                return Event(drawn.sample, part, "stop")
        else:
            part = sample.decoder.push_text(drawn.tokens[:count])

        if drawn.finish is None:
            return Event(drawn.sample, part) if part else None

        if count < len(drawn.tokens):
            stop = sample.decoder.silent(
                drawn.tokens[count], drawn.logprobs[count], _at(drawn.alternatives, count)
            )

        grammar = self.ticket.requests[drawn.sample].sampling.grammar
        if isinstance(grammar, Shape) and grammar.error:
            raise grammar.error

        part.add(sample.decoder.close())
        finish: Reason = "length" if drawn.finish == "length" else "stop"
        return Event(drawn.sample, part, finish, stop=None if sample.decoder.stopped else stop)

    def _pushed(self, drawn: Drawn, count: int) -> Part:
        """The first `count` tokens, up to a stop string; what was drawn behind it does not
        count."""
        sample, part = self._samples[drawn.sample], Part()
        for place, token in enumerate(drawn.tokens[:count]):
            part.add(
                sample.decoder.push(token, drawn.logprobs[place], _at(drawn.alternatives, place))
            )
            if sample.decoder.stopped:
                sample.drawn -= len(drawn.tokens) - place - 1
                break

        return part

    def _measure(self, news: Sequence[Drawn]) -> None:
        now, count = time.monotonic(), sum(len(drawn.tokens) for drawn in news)
        if self._first:
            self._metrics.first_token(self.model.name, now - self._began)
            self._metrics.prompt(self.model.name, self.usage())
            self._first = False
        elif count:
            self._metrics.between(
                self.model.name, now - self._newest, max(len(drawn.tokens) for drawn in news)
            )

        self._newest = now
        self._metrics.tokens(self.model.name, count)

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.ticket.close()


@dataclass
class Whole:
    """A finished sample."""

    part: Part = field(default_factory=Part)
    finish: Reason = "length"
    verdict: Verdict | None = None
    stop: Piece | None = None


async def collected(events: AsyncIterator[list[Event]], count: int) -> list[Whole]:
    """All of it, once it is finished."""
    wholes = [Whole() for _ in range(count)]
    async for some in events:
        for event in some:
            whole = wholes[event.index]
            whole.part.add(event.part)
            whole.finish, whole.verdict = (
                event.finish or whole.finish,
                event.verdict or whole.verdict,
            )
            whole.stop = event.stop or whole.stop

    return wholes


def sampling_of(asked: Sampled, model: ChatModel, max_tokens: int, top_logprobs: int) -> Sampling:
    """The sampling that a request asks for; OpenAI's defaults are the model's own distribution."""
    bias = tuple((int(token), value) for token, value in (asked.logit_bias or {}).items())
    size = model.tokenizer.vocab_size
    if outside := [token for token, _ in bias if token >= size]:
        raise errors.invalid(
            f"logit_bias: there is no token {outside[0]}; the model has {size}", "logit_bias"
        )

    stop = (*(() if asked.ignore_eos else model.tokenizer.stops), *(asked.stop_token_ids or ()))
    if outside := [token for token in stop if token >= size]:
        raise errors.invalid(
            f"stop_token_ids: there is no token {outside[0]}; the model has {size}",
            "stop_token_ids",
        )

    given = {
        name: value
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        )
        if (value := getattr(asked, name)) is not None
    }
    if asked.top_k == -1:  # vLLM's word for all
        given["top_k"] = 0

    if asked.top_p == 0:  # the smallest nucleus there is
        given |= {"temperature": 0.0, "top_p": 1.0}

    seed = secrets.randbits(63) if asked.seed in (None, -1) else asked.seed
    try:
        return Sampling(
            **given,
            max_tokens=max(1, max_tokens),
            stop=tuple(dict.fromkeys(stop)),
            seed=seed,
            logit_bias=bias,
            top_logprobs=min(top_logprobs, size),
        )
    except UserError as error:
        raise errors.invalid(str(error)) from None


def _at(alternatives: Sequence[Alternatives], place: int) -> Alternatives:
    return alternatives[place] if place < len(alternatives) else ()


def check_prompts(model: ChatModel, prompts: Sequence[Sequence[int]], param: str) -> None:
    """ApiError for a prompt that leaves no room for an answer, is empty or holds ids that the model
    does not know."""
    try:
        model.engine.check(prompts)
    except UserError as error:
        long = any(len(prompt) >= model.context for prompt in prompts)
        raise errors.invalid(
            f"{param}: {error}", param, "context_length_exceeded" if long else None
        ) from None


def _within(sampling: Sampling, room: int) -> Sampling:
    return replace(sampling, max_tokens=min(sampling.max_tokens, room))


def _own(sampling: Sampling) -> Sampling:
    """A grammar remembers what was drawn, so each sample has its own."""
    return (
        sampling
        if sampling.grammar is None
        else replace(sampling, grammar=sampling.grammar.fresh())
    )
