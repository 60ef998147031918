"""The endpoints under /v1: a checked request in, an answer or a stream of it out."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from llama2.errors import UserError
from llama2.generate.rewards import to_probability
from llama2.records import Message, Messages
from llama2.serve import errors
from llama2.serve.chat_message import to_messages
from llama2.serve.constrained import constrain
from llama2.serve.detokenizer import Alternatives, Detokenizer, TextDelta
from llama2.serve.generation import (
    Events,
    Generation,
    SampleEvent,
    check_prompts,
    collect,
    make_sampling,
)
from llama2.serve.metrics import Metrics
from llama2.serve.middleware import LOG
from llama2.serve.models import ChatModel, Models, RewardModel
from llama2.serve.offload import offload
from llama2.serve.request_body import BodyRoute
from llama2.serve.responses import ChatWriter, CompletionWriter, ResponseWriter, encode_event
from llama2.serve.safety import SafetyGate
from llama2.serve.schema import ChatRequest, CompletionRequest, ScoreRequest
from llama2.serve.streaming import EventStream, cancel_on_disconnect
from llama2.tokenizer.template import encode_answered, encode_begun, encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer

MOST_TOKENS = 256  # in one event of a stream
SHARE = 10  # a token's work, in characters read
FAILURES: dict[int | str, dict[str, Any]] = {
    400: {"description": "a field is wrong; `param` names it"},
    401: {"description": "the API key is missing or wrong"},
    404: {"description": "there is no such model"},
    408: {"description": "it took too long"},
    413: {"description": "the request is too large"},
    429: {"description": "the server is busy; Retry-After says when to come back"},
    503: {"description": "the server shuts down"},
}


@dataclass(frozen=True)
class Service:
    """The work of the endpoints. `seconds`: the longest that a call may take."""

    models: Models
    gate: SafetyGate | None
    metrics: Metrics
    seconds: float

    async def list_models(self) -> JSONResponse:
        """List the models of this server."""
        data = [_describe(model) for model in self.models.values()]
        return JSONResponse({"object": "list", "data": data})

    async def describe_model(self, name: str) -> JSONResponse:
        """Describe one model."""
        return JSONResponse(_describe(self.models.get_model(name)))

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        model, messages = self.models.find(ChatModel, body.model), to_messages(body.messages)
        size = check_length(model, [message.content for message in messages], "messages")
        prompt, begun, write = messages, "", encode_prompt
        if body.continue_final_message:
            prompt, begun, write = messages[:-1], messages[-1].content, encode_begun

        ids = [await offload(size, _write_chat, write, model.tokenizer, messages)]
        check_prompts(model, ids, "messages")
        writer = ChatWriter(model, body)
        generation = await self._begin(
            model, body, ids, body.n or 1, writer.reports_tokens, strip=True, begun=begun
        )
        events = self._judge(generation, lambda _: prompt)
        return await self._answer(request, generation, events, writer, bool(body.stream))

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Go on with texts."""
        model = self.models.find(ChatModel, body.model)
        texts = [prompt for prompt in body.prompts if isinstance(prompt, str)]
        size = sum(check_length(model, [text], "prompt") for text in texts)
        ids = await offload(size, _encode, model.tokenizer, body.prompts)
        check_prompts(model, ids, "prompt")

        def conversation(index: int) -> Messages:
            """Return a prompt as the gate reads it."""
            return (Message("user", model.tokenizer.decode(ids[index])),)

        writer = CompletionWriter(model, body)
        echoes = await self._echo(model, body, ids) if body.echo else []
        n = 0 if body.token_limit == 0 else body.n or 1
        generation = await self._begin(model, body, ids, n, writer.reports_tokens)
        events = _prepend(echoes, n, self._judge(generation, conversation))
        return await self._answer(request, generation, events, writer, bool(body.stream))

    async def score(self, body: ScoreRequest, request: Request) -> Response:
        """Score the answer at the end of a conversation: a reward model's score and its sigmoid."""
        model, messages = self.models.find(RewardModel, body.model), to_messages(body.messages)
        size = check_length(model, [message.content for message in messages], "messages")
        ids = await offload(size, _write_chat, encode_answered, model.tokenizer, messages)

        if len(ids) > model.context:
            raise errors.invalid(
                f"messages: the conversation has {len(ids)} tokens, {len(ids) - model.context} "
                f"more than the context of {model.context}; shorten it",
                "messages",
                "context_length_exceeded",
            )

        score = await cancel_on_disconnect(request.receive, model.score(ids))
        usage = {"prompt_tokens": len(ids), "completion_tokens": 0, "total_tokens": len(ids)}
        _log(request, model, usage)

        return JSONResponse(
            {
                "object": "score",
                "model": model.name,
                "score": score,
                "probability": to_probability(score),
                "usage": usage,
            }
        )

    async def _begin(
        self,
        model: ChatModel,
        body: ChatRequest | CompletionRequest,
        prompts: Sequence[Sequence[int]],
        n: int,
        report_tokens: bool,
        strip: bool = False,
        begun: str = "",
    ) -> Generation:
        """Have `n` samples of each checked prompt drawn as a request asks."""
        sampling = await constrain(make_sampling(model, body), body, model.tokenizer)
        make = partial(
            Generation,
            model,
            self.metrics,
            prompts,
            sampling,
            n=n,
            stops=body.stops,
            report_tokens=report_tokens,
            strip=strip,
            begun=begun,
        )
        generation = await offload(n * sum(map(len, prompts)), make)
        return generation.begin(self.seconds)

    async def _answer(
        self,
        request: Request,
        generation: Generation,
        events: Events,
        writer: ResponseWriter,
        stream: bool,
    ) -> Response:
        def close() -> None:
            """End the stream."""
            generation.close()
            _log(request, generation.model, generation.usage())

        if stream:
            return EventStream(_stream(generation, events, writer), close)

        with closing(generation):
            work = collect(events, generation.choices)
            samples = await cancel_on_disconnect(request.receive, work)

        usage = generation.usage()
        _log(request, generation.model, usage)
        size = sum(cost(sample.text) for sample in samples)
        content = await offload(size, _render, writer, samples, usage)
        return Response(content, media_type="application/json")

    async def _judge(
        self, generation: Generation, conversation: Callable[[int], Messages]
    ) -> Events:
        """Yield the events of a generation; behind a gate, those of each whole answer after its
        verdict. `conversation` returns the prompt of an index."""
        if self.gate is None:
            async for events in generation.events():
                yield events

            return

        count = len(generation.prompts) * generation.n
        for sample in await collect(generation.events(), count):
            prompt = conversation(sample.index // generation.n)
            sample.verdict = await self.gate.judge(prompt, generation.begun + sample.text.text)
            if sample.verdict.replaced:
                # without its tokens, which would tell the answer
                refusal = TextDelta(self.gate.refusal)
                yield [SampleEvent(sample.index, refusal, "content_filter", sample.verdict)]
            else:
                yield [sample]

    async def _echo(
        self, model: ChatModel, body: CompletionRequest, prompts: Sequence[Sequence[int]]
    ) -> list[TextDelta]:
        """Return each prompt as the beginning of its completion, with log-probabilities if they
        are wanted."""
        echoes = []
        for ids in prompts:
            logprobs: list[tuple[float, Alternatives]] = []
            if body.logprobs is not None:
                logprobs = await model.prompt_logprobs(ids, body.logprobs)

            echoes.append(await offload(SHARE * len(ids), _decode, model.tokenizer, ids, logprobs))

        return echoes


def routes(service: Service) -> APIRouter:
    """Return the endpoints of a service."""
    router = APIRouter(tags=["v1"], route_class=BodyRoute)
    router.get("/v1/models")(service.list_models)
    router.get("/v1/models/{name:path}", responses={404: FAILURES[404]})(service.describe_model)
    router.post("/v1/chat/completions", responses=FAILURES)(service.chat)
    router.post("/v1/completions", responses=FAILURES)(service.complete)
    router.post("/v1/score", responses=FAILURES)(service.score)

    return router


async def _stream(
    generation: Generation, events: Events, writer: ResponseWriter
) -> AsyncGenerator[bytes, None]:
    """Yield the server-sent events of a stream. An error after the first byte is an event too."""
    try:
        yield writer.begin(generation.choices, generation.usage())
        async for batch in events:
            size = sum(cost(event.text) for event in batch)
            yield await offload(size, _write, writer, batch, generation.usage())

        yield writer.end(generation.usage())
    except errors.ApiError as error:
        yield encode_event(error.body())
    except Exception as error:
        traceback.print_exception(error, file=sys.stderr)
        yield encode_event(errors.defect().body())


async def _prepend(echoes: Sequence[TextDelta], n: int, events: Events) -> Events:
    """Yield events with the prompts in front. Without samples (n = 0) the prompts are all there
    is."""
    samples = max(1, n)
    for index, echo in enumerate(echoes):
        *first, last = _split(echo)
        for sample in range(index * samples, (index + 1) * samples):
            for part in first:
                yield [SampleEvent(sample, part)]

            yield [SampleEvent(sample, last, None if n else "length")]

    async for batch in events:
        yield batch


def cost(text: TextDelta) -> int:
    """Return how long it takes to write a text as JSON, in characters that could be read
    meanwhile."""
    tokens = sum(1 + len(token.alternatives) for token in text.tokens)
    return len(text.text) // SHARE + SHARE * tokens


def check_length(model: ChatModel | RewardModel, texts: Sequence[str], param: str) -> int:
    """Return the characters of `texts`; ApiError if they are too many for the context, whatever
    their tokens are.

    Encoding a text takes a thousand times as long as counting its letters.
    """
    size = sum(map(len, texts))
    if size > model.context * model.longest_token:
        tokens = -(-size // model.longest_token)
        raise errors.invalid(
            f"{param}: the prompt has {size} characters, at least {tokens} tokens, more than leave "
            f"room for an answer in the context of {model.context}; shorten it",
            param,
            "context_length_exceeded",
        )

    return size


def _write_chat(
    encode: Callable[[Tokenizer, Messages], list[int]], tokenizer: Tokenizer, messages: Messages
) -> list[int]:
    """Return the ids of a conversation; ApiError for one that the model's format cannot hold."""
    try:
        return encode(tokenizer, messages)
    except UserError as error:
        # without the path of a file of the server's
        cause = error.cause.removeprefix(f"{tokenizer.template_place}: ")
        raise errors.invalid(f"messages: {cause}; {error.cure}", "messages") from None


def _encode(tokenizer: Tokenizer, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    """Return the ids of each prompt; those of a text begin with BOS if the tokenizer adds it."""
    ids = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids.append(tokenizer.encode_raw(prompt))
        else:
            ids.append(prompt)

    return ids


def _decode(
    tokenizer: Tokenizer, ids: Sequence[int], logprobs: Sequence[tuple[float, Alternatives]]
) -> TextDelta:
    """Return a prompt as text; `logprobs` are those of each token but the first, or none."""
    detokenizer, text = Detokenizer(tokenizer), TextDelta()
    for index, token in enumerate(ids):
        logprob, alternatives = logprobs[index - 1] if logprobs and index else (None, ())
        text.add(detokenizer.push(token, logprob, alternatives))

    text.add(detokenizer.close())
    return text


def _split(text: TextDelta) -> list[TextDelta]:
    """Return a text in parts that are written as JSON in little time."""
    starts = range(MOST_TOKENS, len(text.tokens), MOST_TOKENS)
    cuts = [text.tokens[start].offset for start in starts]
    spans = pairwise([0, *cuts, len(text.text)])

    return [
        TextDelta(text.text[begin:end], text.tokens[start : start + MOST_TOKENS])
        for start, (begin, end) in zip((0, *starts), spans, strict=True)
    ]


def _write(writer: ResponseWriter, events: Sequence[SampleEvent], usage: dict[str, Any]) -> bytes:
    return b"".join([writer.event(event, usage) for event in events])


def _render(writer: ResponseWriter, samples: Sequence[SampleEvent], usage: dict[str, Any]) -> bytes:
    """Return an answer as JSON, written a value at a time: `json.dumps` would hold up other threads
    until its end."""
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return "".join(encoder.iterencode(writer.answer(samples, usage))).encode()


def _log(request: Request, model: ChatModel | RewardModel, usage: Mapping[str, object]) -> None:
    """Add the model and the tokens to the request's line of the log."""
    counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens")}
    request.scope[LOG].update(model=model.name, **counts)


def _describe(model: ChatModel | RewardModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "llama2",
        "llama2": {"kind": model.kind, "context": model.context},
    }
