"""The endpoints under /v1: a checked request in, an answer or a stream of it out."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from llama2.generate.rewards import probability
from llama2.records import Message, Messages
from llama2.serve import errors
from llama2.serve.constrained import shaped
from llama2.serve.detokenizer import Decoder, Part
from llama2.serve.errors import ApiError
from llama2.serve.generation import (
    Asked,
    Event,
    Generation,
    Whole,
    check_prompts,
    collected,
    sampling_of,
)
from llama2.serve.metrics import Metrics
from llama2.serve.middleware import LOG
from llama2.serve.models import ChatModel, Models, RewardModel
from llama2.serve.offload import offload
from llama2.serve.request_body import BodyRoute
from llama2.serve.responses import ChatFormat, Format, TextFormat, Wanted, sse
from llama2.serve.safety import Gate
from llama2.serve.schema import ChatRequest, CompletionRequest, ScoreRequest, StreamOptions
from llama2.serve.streaming import EventStream, unless_gone
from llama2.serve.worker import Alternatives
from llama2.tokenizer.template import encode_begun, encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer

MOST_TOKENS = 256  # in one event of a stream
SHARE = 10  # a token's work, in characters read
Events = AsyncGenerator[list[Event], None]


@dataclass(frozen=True)
class Service:
    """What the endpoints work with. `seconds`: the longest that a call may take."""

    models: Models
    gate: Gate | None
    metrics: Metrics
    seconds: float

    async def chat(self, asked: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        model, conversation = self.models.chat(asked.model), asked.conversation()
        size = refuse_longer(model, [each.content for each in conversation], "messages")
        encode = encode_begun if asked.continue_final_message else encode_prompt
        ids = await offload(size, encode, model.tokenizer, conversation)
        sampling = sampling_of(asked, model, asked.most or model.context, asked.top_logprobs or 0)
        check_prompts(model, [ids], "messages")  # which is cheaper than a grammar
        sampling = await shaped(sampling, asked, model.tokenizer)
        prompt, begun = conversation, ""

        if asked.continue_final_message:
            prompt, begun = conversation[:-1], conversation[-1].content

        wanted = _wanted(asked, bool(asked.logprobs))
        generation = await self._begun(
            model,
            Asked(
                [ids],
                sampling,
                asked.n or 1,
                asked.stops,
                True,
                "messages",
                pieces=wanted.tokens,
                begun=begun,
            ),
        )
        events = self._judged(generation, lambda _: prompt)
        objects = ChatFormat(model.name, model.tokenizer, wanted)

        return await self._answer(request, generation, events, objects, bool(asked.stream))

    async def complete(self, asked: CompletionRequest, request: Request) -> Response:
        """Go on with texts."""
        model = self.models.chat(asked.model)
        size = sum(
            refuse_longer(model, [text], "prompt")
            for text in asked.prompts()
            if isinstance(text, str)
        )
        prompts = await offload(size, _encoded, model.tokenizer, asked.prompts())
        most = model.context if asked.most is None else asked.most
        n = (asked.n or 1) if most else 0
        sampling = sampling_of(asked, model, most, asked.logprobs or 0)
        check_prompts(model, prompts, "prompt")
        sampling = await shaped(sampling, asked, model.tokenizer)
        echoes = await self._echoes(model, asked, prompts) if asked.echo else []
        wanted = _wanted(asked, asked.logprobs is not None, bool(asked.return_token_ids))
        generation = await self._begun(
            model, Asked(prompts, sampling, n, asked.stops, False, "prompt", pieces=wanted.tokens)
        )
        events = self._judged(
            generation, lambda index: (Message("user", model.tokenizer.decode(prompts[index])),)
        )
        objects = TextFormat(model.name, model.tokenizer, wanted)

        return await self._answer(
            request, generation, _echoed(echoes, n, events), objects, bool(asked.stream)
        )

    async def score(self, asked: ScoreRequest, request: Request) -> Response:
        """Judge an answer."""
        model, conversation = self.models.reward(asked.model), asked.conversation()
        size = refuse_longer(model, [each.content for each in conversation], "messages")
        ids = await offload(size, model.encode, conversation)

        if len(ids) > model.context:
            raise errors.invalid(
                f"messages: the conversation has {len(ids)} tokens, {len(ids) - model.context} more "
                f"than the context of {model.context}; shorten it",
                "messages",
                "context_length_exceeded",
            )

        found = await unless_gone(request.receive, model.score(ids))
        usage = {"prompt_tokens": len(ids), "completion_tokens": 0, "total_tokens": len(ids)}
        _log(request, model, usage)

        return JSONResponse(
            {
                "object": "score",
                "model": model.name,
                "score": found,
                "probability": probability(found),
                "usage": usage,
            }
        )

    async def _begun(self, model: ChatModel, asked: Asked) -> Generation:
        """What is asked, on its way."""
        size = asked.n * sum(map(len, asked.prompts))
        return (await offload(size, Generation, model, asked, self.seconds, self.metrics)).begin()

    async def _answer(
        self,
        request: Request,
        generation: Generation,
        events: Events,
        objects: Format,
        stream: bool,
    ) -> Response:
        count = len(generation.asked.prompts) * max(1, generation.asked.n)
        if stream:
            return EventStream(
                _chunks(generation, events, objects, count),
                generation,
                lambda: _log(request, generation.model, generation.usage()),
            )

        with generation:
            wholes = await unless_gone(request.receive, collected(events, count))

        usage = generation.usage()
        _log(request, generation.model, usage)
        size = sum(cost(whole.part) for whole in wholes)

        return Response(
            await offload(size, _rendered, objects, wholes, usage), media_type="application/json"
        )

    async def _judged(
        self, generation: Generation, conversation: Callable[[int], Messages]
    ) -> Events:
        """The events of a generation; behind a gate, those of each whole answer after its
        verdict."""
        if self.gate is None:
            async for events in generation.events():
                yield events

            return

        count, n = len(generation.ticket.requests), max(1, generation.asked.n)
        for index, whole in enumerate(await collected(generation.events(), count)):
            verdict = await self.gate.judge(
                conversation(index // n), generation.asked.begun + whole.part.text
            )
            if verdict.replaced:  # its tokens would tell what is not to be told
                yield [Event(index, Part(self.gate.refusal), "content_filter", verdict)]
            else:
                yield [Event(index, whole.part, whole.finish, verdict, whole.stop)]

    async def _echoes(
        self, model: ChatModel, asked: CompletionRequest, prompts: Sequence[Sequence[int]]
    ) -> list[Part]:
        """Each prompt as the beginning of its completion, with log-probabilities if they are
        wanted."""
        parts = []
        for ids in prompts:
            found = (
                await model.prompt_logprobs(ids, asked.logprobs)
                if asked.logprobs is not None
                else []
            )
            parts.append(await offload(SHARE * len(ids), _echo, model.tokenizer, ids, found))

        return parts


def routes(service: Service) -> APIRouter:
    """The endpoints of a service."""
    router = APIRouter(tags=["v1"], route_class=BodyRoute)
    replies: dict[int | str, dict[str, Any]] = {
        status: {"description": text}
        for status, text in (
            (400, "a field is wrong; `param` names it"),
            (401, "the API key is missing or wrong"),
            (404, "there is no such model"),
            (408, "it took too long"),
            (413, "the request is too large"),
            (429, "the server is busy; Retry-After says when to come back"),
            (503, "the server shuts down"),
        )
    }

    @router.get("/v1/models")
    async def models() -> JSONResponse:
        """The models of this server."""
        return JSONResponse(
            {"object": "list", "data": [_described(model) for model in service.models]}
        )

    @router.get("/v1/models/{name:path}", responses={404: replies[404]})
    async def model(name: str) -> JSONResponse:
        """One of them."""
        return JSONResponse(_described(service.models.named(name)))

    @router.post("/v1/chat/completions", responses=replies)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """The answer to a conversation."""
        return await service.chat(asked, request)

    @router.post("/v1/completions", responses=replies)
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        """What may follow a text."""
        return await service.complete(asked, request)

    @router.post("/v1/score", responses=replies)
    async def score(asked: ScoreRequest, request: Request) -> Response:
        """What a reward model thinks of the answer at the end of a conversation: its score and the
        sigmoid of it."""
        return await service.score(asked, request)

    return router


async def _chunks(
    generation: Generation, events: Events, objects: Format, count: int
) -> AsyncGenerator[bytes, None]:
    """The server-sent events of a stream. What fails after the first byte is told in the stream."""
    try:
        yield objects.opening(count, generation.usage())
        async for some in events:
            usage = generation.usage()
            yield await offload(
                sum(cost(event.part) for event in some), _events, objects, some, usage
            )

        yield objects.closing(generation.usage())
    except ApiError as error:
        yield sse(error.body())
    except Exception as error:
        traceback.print_exception(error, file=sys.stderr)
        yield sse(
            ApiError(500, "the server has a defect; its log says more", kind=errors.SERVER).body()
        )


async def _echoed(echoes: Sequence[Part], n: int, events: Events) -> Events:
    """Events with the prompts in front. Without samples (n = 0) the prompts are all there is."""
    for index, part in enumerate(echoes):
        *first, last = _split(part)
        for sample in range(index * max(1, n), (index + 1) * max(1, n)):
            for each in first:
                yield [Event(sample, Part(each.text, list(each.pieces)))]

            yield [Event(sample, Part(last.text, list(last.pieces)), None if n else "length")]

    async for some in events:
        yield some


def cost(part: Part) -> int:
    """How long it takes to write a part as JSON, in characters as long as those of a page to
    read."""
    return len(part.text) // SHARE + SHARE * sum(
        1 + len(piece.alternatives) for piece in part.pieces
    )


def refuse_longer(model: ChatModel | RewardModel, texts: Sequence[str], param: str) -> int:
    """The characters of `texts`; ApiError if they are too many for the context, whatever their
    tokens are.

    Encoding a text takes a thousand times as long as counting its letters.
    """
    size = sum(map(len, texts))
    if size > model.context * model.longest:
        raise errors.invalid(
            f"{param}: the prompt has {size} characters, at least {-(-size // model.longest)} tokens, "
            f"more than leave room for an answer in the context of {model.context}; shorten it",
            param,
            "context_length_exceeded",
        )

    return size


def _echo(
    tokenizer: Tokenizer, ids: Sequence[int], found: Sequence[tuple[float, Alternatives]]
) -> Part:
    """A prompt as it is shown, with what was `found` of each token but the first."""
    decoder, part = Decoder(tokenizer), Part()
    for place, token in enumerate(ids):
        logprob, alternatives = found[place - 1] if found and place else (None, ())
        part.add(decoder.push(token, logprob, alternatives))

    part.add(decoder.close())
    return part


def _split(part: Part) -> list[Part]:
    """A part in pieces that are written as JSON in little time."""
    places = range(MOST_TOKENS, len(part.pieces), MOST_TOKENS)
    cuts = [part.pieces[place].offset for place in places]
    texts = [part.text[begin:end] for begin, end in pairwise([0, *cuts, len(part.text)])]

    return [
        Part(text, part.pieces[place : place + MOST_TOKENS])
        for text, place in zip(texts, (0, *places), strict=True)
    ]


def _events(objects: Format, events: Sequence[Event], usage: dict[str, Any]) -> bytes:
    return b"".join([objects.event(event, usage) for event in events])


def _rendered(objects: Format, wholes: Sequence[Whole], usage: dict[str, Any]) -> bytes:
    """An answer as JSON, written a value at a time: `json.dumps` would hold up other threads until
    its end."""
    writer = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return "".join(writer.iterencode(objects.answer(wholes, usage))).encode()


def _encoded(tokenizer: Tokenizer, prompts: Sequence[str | list[int]]) -> list[list[int]]:
    return [
        [tokenizer.bos, *tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
        for prompt in prompts
    ]


def _wanted(asked: ChatRequest | CompletionRequest, logprobs: bool, ids: bool = False) -> Wanted:
    """What a client wants to hear of besides the text."""
    options = asked.stream_options or StreamOptions()
    return Wanted(
        logprobs,
        ids,
        bool(asked.return_tokens_as_token_ids),
        bool(options.include_usage),
        bool(options.include_usage and options.continuous_usage_stats),
        bool(options.include_obfuscation),
    )


def _log(request: Request, model: ChatModel | RewardModel, usage: dict[str, Any]) -> None:
    """What the line of a request says besides its path and status."""
    request.scope[LOG].update(
        model=model.name,
        prompt_tokens=usage["prompt_tokens"],
        completion_tokens=usage["completion_tokens"],
    )


def _described(model: ChatModel | RewardModel) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "llama2",
        "llama2": {"kind": model.kind, "context": model.context},
    }
