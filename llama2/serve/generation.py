"""One call from its prompts to text: samples drawn by a worker, as text that is certain."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from llama2.errors import UserError
from llama2.generate.request import make_requests
from llama2.generate.sampling import Sampling
from llama2.serve.constrained import FailsafeGrammar
from llama2.serve.detokenizer import Detokenizer, TextDelta, TextToken
from llama2.serve.errors import invalid
from llama2.serve.metrics import Metrics
from llama2.serve.models import ChatModel
from llama2.serve.safety import SafetyVerdict
from llama2.serve.schema import ChatRequest, CompletionRequest
from llama2.serve.worker import SampleStream, TokenDelta

FinishReason = Literal["stop", "length", "content_filter"]
_SAMPLING = {
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
}
"""fields that a request and `Sampling` have in common"""


@dataclass
class SampleEvent:
    """More of one sample: text, perhaps its end, and the verdict of the safety model."""

    index: int
    text: TextDelta = field(default_factory=TextDelta)
    finish: FinishReason | None = None
    verdict: SafetyVerdict | None = None
    stop: TextToken | None = None
    """the stop id that ended it"""

    def add(self, other: SampleEvent) -> None:
        """Append what follows."""
        self.text.add(other.text)
        self.finish = other.finish or self.finish
        self.verdict = other.verdict or self.verdict
        self.stop = other.stop or self.stop


Events = AsyncGenerator[list[SampleEvent], None]


class Generation:
    """`n` samples of each prompt as text, perhaps none. `begin` has them drawn, `close` cancels
    those that still run.

    `strip` is for answers: white space at their ends is removed; `begun` is the beginning of one
    that is gone on with. `report_tokens` reports every token, not only the text. ApiError for more
    samples than the server takes. A generation may be made in any thread; everything else is the
    event loop's.
    """

    stream: SampleStream

    def __init__(
        self,
        model: ChatModel,
        metrics: Metrics,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        n: int,
        stops: Sequence[str],
        report_tokens: bool,
        strip: bool = False,
        begun: str = "",
    ) -> None:
        self.model, self.prompts, self.n, self.begun = model, prompts, n, begun
        self._metrics, self._by_token = metrics, report_tokens or bool(stops)
        self._began = time.monotonic()
        self._newest: float | None = None  # when the newest token came

        if model.worker.limit < len(prompts) * n:
            raise invalid(
                f"n: {len(prompts) * n} samples are more than the {model.worker.limit} that this "
                "server takes at a time",
                "n",
            )

        self._requests = make_requests(prompts, sampling, n)
        self._drawn = [0] * len(self._requests)
        self._detokenizers = []
        for request in self._requests:
            before = () if strip and not begun.strip() else request.prompt
            self._detokenizers.append(Detokenizer(model.tokenizer, stops, before, strip, begun))

    def begin(self, seconds: float) -> Generation:
        """Have the samples drawn, in at most `seconds`. ApiError if there is no room for them."""
        self.stream = self.model.worker.submit(self._requests, seconds)
        return self

    def close(self) -> None:
        """Cancel the samples that still run."""
        self.stream.close()

    @property
    def choices(self) -> int:
        """Return how many choices the response has: without samples, one for each prompt."""
        return len(self.prompts) * max(1, self.n)

    async def events(self) -> Events:
        """Yield text as it becomes certain; the last event of each sample says how it finished."""
        async for deltas in self.stream.deltas():
            events = [event for delta in deltas if (event := self._event(delta)) is not None]
            self._measure(deltas)
            if events:
                yield events

    def usage(self) -> dict[str, object]:
        """Return OpenAI's count of the tokens so far. A prompt counts once, however many samples it
        has."""
        prompt, completion, cached = sum(map(len, self.prompts)), sum(self._drawn), 0
        for begin in range(0, len(self._requests), max(1, self.n)):
            samples = self._requests[begin : begin + self.n]
            cached += min(request.cached for request in samples)

        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def _event(self, delta: TokenDelta) -> SampleEvent | None:
        """Return what new tokens make certain, if anything."""
        detokenizer = self._detokenizers[delta.sample]
        event = SampleEvent(delta.sample, self._decode(delta, detokenizer))
        if detokenizer.stopped:
            self.stream.cancel(delta.sample)
            event.finish = "stop"
            return event

        if delta.finish is None:
            return event if event.text else None

        grammar = self._requests[delta.sample].sampling.grammar
        if isinstance(grammar, FailsafeGrammar) and grammar.error:
            raise grammar.error

        event.finish = "length" if delta.finish == "length" else "stop"
        stop = None
        if delta.finish == "stop":
            self._drawn[delta.sample] += 1
            stop = detokenizer.end(*delta.steps[-1])

        event.text.add(detokenizer.close())
        event.stop = None if detokenizer.stopped else stop
        return event

    def _decode(self, delta: TokenDelta, detokenizer: Detokenizer) -> TextDelta:
        """Return the text of new tokens, up to a stop string: what was drawn behind it does not
        count."""
        steps = delta.steps[:-1] if delta.finish == "stop" else delta.steps  # a stop id has no text
        if not self._by_token:
            self._drawn[delta.sample] += len(steps)
            return detokenizer.push_text([token for token, _, _ in steps])

        text = TextDelta()
        for step in steps:
            text.add(detokenizer.push(*step))
            self._drawn[delta.sample] += 1
            if detokenizer.stopped:
                break

        return text

    def _measure(self, deltas: Sequence[TokenDelta]) -> None:
        counts = [len(delta.steps) for delta in deltas]
        name, now = self.model.name, time.monotonic()
        if self._newest is None:
            self._metrics.first_token(name, now - self._began)
            self._metrics.prompt(name, self.usage())
        elif sum(counts):
            self._metrics.between(name, now - self._newest, max(counts))

        self._newest = now
        self._metrics.tokens(name, sum(counts))


async def collect(events: AsyncIterator[list[SampleEvent]], count: int) -> list[SampleEvent]:
    """Return each of `count` samples as one event, once all are finished."""
    samples = [SampleEvent(index) for index in range(count)]
    async for batch in events:
        for event in batch:
            samples[event.index].add(event)

    return samples


def make_sampling(model: ChatModel, request: ChatRequest | CompletionRequest) -> Sampling:
    """Return the sampling that a request asks for; OpenAI's defaults are the model's own
    distribution. ApiError for a token that the model does not have."""
    size = model.tokenizer.vocab_size
    bias = [(int(token), value) for token, value in (request.logit_bias or {}).items()]
    end = [] if request.ignore_eos else model.ends
    stop = (*end, *(request.stop_token_ids or ()))
    tokens = {"logit_bias": [token for token, _ in bias], "stop_token_ids": stop}
    for name, ids in tokens.items():
        for token in ids:
            if token >= size:
                raise invalid(f"{name}: there is no token {token}; the model has {size}", name)

    settings = request.model_dump(include=_SAMPLING, exclude_none=True)
    if request.top_k == -1:  # vLLM's word for all
        settings["top_k"] = 0

    if request.top_p == 0:  # the smallest nucleus there is
        settings |= {"temperature": 0.0, "top_p": 1.0}

    limit = model.context if request.token_limit is None else request.token_limit
    try:
        return Sampling(
            **settings,
            max_tokens=max(1, limit),
            stop=tuple(dict.fromkeys(stop)),
            seed=secrets.randbits(63) if request.seed in (None, -1) else request.seed,
            logit_bias=tuple(bias),
            top_logprobs=min(request.alternatives or 0, size),
        )
    except UserError as error:
        raise invalid(str(error)) from None


def check_prompts(model: ChatModel, prompts: Sequence[Sequence[int]], param: str) -> None:
    """Raise ApiError for a prompt that leaves no room for an answer, is empty or holds ids that the
    model does not know. `param` is the field that the prompts come from."""
    try:
        model.engine.check(prompts)
    except UserError as error:
        long = any(len(prompt) >= model.context for prompt in prompts)
        code = "context_length_exceeded" if long else None
        raise invalid(f"{param}: {error}", param, code) from None
