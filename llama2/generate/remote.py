"""Completions from a server that speaks OpenAI's `/v1/completions`, in the place of the engine.

So a large policy samples on vLLM, or on `llama2 serve`, while reward models score here. Prompts are
sent as token ids, one request a sample, each with a seed made of the caller's seed, the number of
the prompt and the number of the sample: a job that is resumed asks for the same. vLLM and `llama2
serve` send back token ids and log-probabilities (`return_token_ids`, `logprobs`), llama.cpp's
server a list of both. If a server sends only text, that is encoded again, which may give other ids
than were drawn, and the log-probabilities are NaN. A grammar is sent as the JSON Schema it was made
of.

Networks fail: requests are repeated after a pause that doubles, one that fails for good takes no
finished one with it, and finished ones are in the journal before the next is asked for.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from llama2 import json_files
from llama2.config import Config as Section
from llama2.errors import UserError, did_you_mean
from llama2.generate.completion_journal import Append, CompletionJournal
from llama2.generate.completions_api import (
    COMPLETIONS,
    MODELS,
    NEUTRAL,
    Choice,
    CompletionsClient,
    Reply,
    RequestFailed,
)
from llama2.generate.generator import Completion, Progress, Tokens, check_prompts
from llama2.generate.grammar import JsonGrammar
from llama2.generate.sampling import Sampling
from llama2.hashing import hash_content, hash_number
from llama2.model.llama import Llama
from llama2.tokenizer.tokenizer import Tokenizer

MAX_FAILURES = 32  # in a row: after so many the rest is not asked for


class Server(Section):
    """A server to sample on instead of here: vLLM, `llama2 serve`, or another of the kind."""

    incidental: ClassVar[frozenset[str]] = frozenset(
        {"url", "key_env", "concurrency", "timeout", "retries"}
    )
    takes_weights: ClassVar[bool] = False  # the API of completions has no call for it

    url: str = Field(pattern=r"^https?://[^/]")
    """http://host:8000; it must serve the very model that is named as the policy"""
    model: str | None = None
    """the name of that model there; needed if there are several"""
    key_env: str | None = None
    """the environment variable that holds its key, if it wants one"""
    concurrency: int = Field(64, gt=0)
    """requests under way at a time, from each rank"""
    timeout: float = Field(600.0, gt=0)
    """seconds that one answer may take"""
    retries: int = Field(5, ge=0)
    """how often a request that fails is repeated"""


@dataclass(frozen=True)
class _CompletionRequest:
    """A request for one sample of prompt `number`. `key` depends on all that is asked."""

    key: str
    number: int
    prompt: tuple[int, ...]
    body: dict[str, Any]


@dataclass
class _Status:
    """The progress of all requests of one call."""

    done: int
    total: int
    failures: list[tuple[_CompletionRequest, str]] = field(default_factory=list)
    in_a_row: int = 0


class RemoteEngine:
    """A `Generator` over `url`: samples of `model` there, whose tokenizer is `tokenizer`.

    context: the most tokens of prompt and completion together. retries: how often a failed request
    is repeated, after `pause` seconds, twice as many, and so on. timeout: seconds for one request.
    concurrency: requests at a time. state: the directory of the journal, in
    which `rank` has a file of its own. progress: called after each completion.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        tokenizer: Tokenizer,
        context: int,
        key: str | None = None,
        retries: int = 5,
        timeout: float = 600.0,
        concurrency: int = 64,
        pause: float = 1.0,
        state: Path | None = None,
        rank: int = 0,
        progress: Progress | None = None,
    ) -> None:
        self._client = CompletionsClient(
            url, key, retries=retries, timeout=timeout, concurrency=concurrency, pause=pause
        )
        self.url, self.model = self._client.url, model
        self.context, self.tokenizer, self.progress = context, tokenizer, progress
        self._rank, self._journal = rank, CompletionJournal(state, rank)

    def generate(
        self, prompts: Sequence[Tokens], sampling: Sampling, indices: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Return `sampling.n` completions of each prompt, as `Generator.generate`; those in the
        journal are not asked for.

        `indices` names the prompts to the seeds. UserError for a prompt that leaves no room, and,
        once all others have their completions, if some have none.
        """
        self.check(prompts)
        names = range(len(prompts)) if indices is None else indices
        requests = [
            self._make_request(prompt, sampling, name, sample)
            for prompt, name in zip(prompts, names, strict=True)
            for sample in range(sampling.n)
        ]
        done = self._journal.find({request.key: request.prompt for request in requests})
        missing = [request for request in requests if request.key not in done]
        if missing:
            status = _Status(len(requests) - len(missing), len(requests))
            with self._journal.open() as append:
                asyncio.run(self._send_all(missing, sampling, done, append, status))

            if status.failures:
                raise self._describe_failures(status)

        row = [done[request.key] for request in requests]
        return [row[start : start + sampling.n] for start in range(0, len(row), sampling.n)]

    def keep_in(self, state: Path) -> None:
        """Keep the journal in this directory from now on."""
        self._journal = CompletionJournal(state, self._rank)

    def check(self, prompts: Sequence[Tokens]) -> None:
        """Raise the UserError that `generate` would raise for these prompts."""
        check_prompts(prompts, self.context, self.tokenizer.vocab_size)

    def update(self, weights: Llama) -> None:
        """UserError: the API of completions has no call that takes weights."""
        raise UserError(
            f"{self.url}: this server cannot take new weights",
            "sample here, without sample.server, where the policy is trained",
        )

    def stream(self, prompt: Tokens, sampling: Sampling) -> Iterator[int]:
        """Yield the tokens of one completion, each as it comes; nothing is repeated or kept.
        UserError if it breaks off."""
        self.check([prompt])
        text, count = "", 0
        try:
            for choice in self._client.stream(self._make_request(prompt, sampling, 0, 0).body):
                text += choice.text
                for token in choice.ids() or ():
                    count += 1
                    yield token
                    if token in sampling.stop:
                        return
        except RequestFailed as failure:
            raise UserError(f"{self.url}: {failure.reason}", "ask again") from None

        if not count:
            yield from self._encode(text)

    def list_models(self) -> dict[str, int | None]:
        """Return the language models served, each with the longest sequence it takes, where the
        server says so."""

        async def ask() -> Any:
            async with self._client.connect() as connections:
                return await self._client.retry(
                    MODELS, lambda: self._client.request(connections, "GET", MODELS)
                )

        try:
            rows = [(row, row.get("llama2") or {}) for row in asyncio.run(ask())["data"]]
            return {
                str(row["id"]): row.get("max_model_len") or details.get("context")
                for row, details in rows
                if details.get("kind") != "reward"
            }
        except RequestFailed as failure:
            raise UserError(
                f"{self.url}: {failure.reason}", "start the server, or correct the address"
            ) from None
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{self.url}: it does not list its models", "this is not a completions server"
            ) from None

    # --- requests ---

    def _make_request(
        self, prompt: Tokens, sampling: Sampling, number: int, sample: int
    ) -> _CompletionRequest:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt),
            "n": 1,
            "logprobs": 1,
            "max_tokens": min(sampling.max_tokens, self.context - len(prompt)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed_sample(sampling.seed, number, sample),
            "stop_token_ids": list(sampling.stop),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **{name: getattr(sampling, name) for name in NEUTRAL},
        }
        if sampling.grammar is not None:
            body["response_format"] = self._make_response_format(sampling.grammar)

        # else a server stops at each of them
        if not set(self.tokenizer.stops) <= set(sampling.stop):
            body["ignore_eos"] = True

        if sampling.logit_bias:
            body["logit_bias"] = {str(token): value for token, value in sampling.logit_bias}

        key = hash_content(json.dumps(body, sort_keys=True))[:32]
        return _CompletionRequest(key, number, tuple(prompt), body)

    def _make_response_format(self, grammar: object) -> dict[str, Any]:
        """Return the form of an answer as OpenAI's chats have it; vLLM and `llama2 serve` know it
        here too."""
        if not isinstance(grammar, JsonGrammar):
            raise UserError(
                f"{self.url}: only a JSON Schema can be sent to a server as a grammar",
                "make it with json_grammar, or sample here",
            )

        if grammar.schema is None:
            return {"type": "json_object"}

        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": grammar.schema}}

    async def _send_all(
        self,
        requests: Sequence[_CompletionRequest],
        sampling: Sampling,
        done: dict[str, Completion],
        append: Append,
        status: _Status,
    ) -> None:
        """Fill `done`, and write down each completion; `status` says what failed."""
        queue = iter(requests)

        async def work(connections: Any) -> None:
            for request in queue:  # one iterator for all workers
                if status.in_a_row >= MAX_FAILURES:
                    status.failures.append((request, "not sent, as no request succeeded any more"))
                    continue

                try:
                    done[request.key] = await self._complete(connections, request, sampling)
                except RequestFailed as failure:
                    status.failures.append((request, failure.reason))
                    status.in_a_row += 1
                    continue

                append(request.key, done[request.key])
                status.done += 1
                status.in_a_row = 0
                if self.progress:
                    self.progress(status.done, status.total)

        async with self._client.connect() as connections:
            count = min(self._client.concurrency, len(requests))
            # not a TaskGroup: it would wrap what a worker raises
            workers = [asyncio.ensure_future(work(connections)) for _ in range(count)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()

                await asyncio.gather(*workers, return_exceptions=True)

    async def _complete(
        self, connections: Any, request: _CompletionRequest, sampling: Sampling
    ) -> Completion:
        async def attempt() -> Completion:
            reply = await self._client.request(connections, "POST", COMPLETIONS, request.body)
            try:
                return self._read(Reply.model_validate(reply).choice(), request, sampling)
            except ValueError:
                raise RequestFailed("an answer of an unexpected form") from None

        return await self._client.retry(request.key, attempt)

    # --- replies ---

    def _read(self, choice: Choice, request: _CompletionRequest, sampling: Sampling) -> Completion:
        """Return a completion as an engine here would give it. RequestFailed, or ValueError, for
        what cannot be one."""
        if choice.finish_reason not in ("stop", "length"):
            # a filter would act again
            wait = None if choice.finish_reason == "content_filter" else 0.0
            raise RequestFailed(f"finish_reason is '{choice.finish_reason}'", wait)

        ids = choice.ids()
        tokens = self._encode(choice.text) if ids is None else ids
        values = choice.logprobs.token_logprobs if choice.logprobs and ids is not None else []
        values = values[: len(tokens)]
        if any(not 0 <= token < self.tokenizer.vocab_size for token in tokens):
            raise UserError(
                f"{self.url}: '{self.model}' gives token ids outside of our "
                f"{self.tokenizer.vocab_size}",
                "it must be the model that is named as the policy, with the same tokenizer",
            )

        stops = [index for index, token in enumerate(tokens) if token in sampling.stop]
        if stops:
            tokens = tokens[: stops[0] + 1]
        elif choice.finish_reason == "stop" and sampling.stop:  # the server leaves out the stop id
            tokens = [*tokens, _find_stop_id(choice, sampling)]

        if not tokens:
            raise ValueError("no tokens")

        finish: Literal["stop", "length"] = "stop" if tokens[-1] in sampling.stop else "length"
        if sampling.grammar is not None and finish == "stop":
            self._check_json(tokens)

        # a stop id that was left out has no log-probability
        values = [*values[: len(tokens)], *[None] * (len(tokens) - len(values))]
        logprobs = (math.nan if value is None else value for value in values)
        return Completion(request.prompt, tuple(tokens), tuple(logprobs), finish)

    def _check_json(self, tokens: Sequence[int]) -> None:
        """RequestFailed if a server has ignored `response_format`, which it may without notice."""
        try:
            json_files.parse(self.tokenizer.decode(tokens))
        except ValueError:
            raise RequestFailed(
                "the answer is not JSON, as if the server did not know response_format", wait=None
            ) from None

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text.removeprefix(" "))

    def _describe_failures(self, status: _Status) -> UserError:
        numbers = {request.number for request, _ in status.failures}
        reasons = Counter(reason for _, reason in status.failures).most_common()
        text = "; ".join(f"{reason} ({count})" for reason, count in reasons[:3])
        others = f"; and {len(reasons) - 3} other reasons" if len(reasons) > 3 else ""
        cure = "check the server, and run the same command again"
        if self._journal.is_kept:
            cure += f": the {status.done} that are finished will not be asked for again"

        return UserError(
            f"{self.url}: {len(status.failures)} of {status.total} completions failed, of "
            f"{len(numbers)} prompts; the first is number {min(numbers) + 1}: {text}{others}",
            cure,
        )


def connect(
    server: Server,
    tokenizer: Tokenizer,
    context: int,
    *,
    state: Path | None = None,
    rank: int = 0,
    progress: Progress | None = None,
) -> RemoteEngine:
    """Return an engine on `server`, once it has confirmed that it serves the model; its own limit
    of length counts too.

    context: that of the model. UserError if it cannot be reached, or serves another model.
    """
    key = os.environ.get(server.key_env) if server.key_env else None
    if server.key_env and not key:
        raise UserError(
            f"the environment variable {server.key_env} is not set",
            "it should hold the server's key",
        )

    engine = RemoteEngine(
        server.url,
        server.model or "",
        tokenizer=tokenizer,
        context=context,
        key=key,
        state=state,
        rank=rank,
        progress=progress,
        **server.model_dump(include={"retries", "timeout", "concurrency"}),
    )
    models = engine.list_models()
    engine.model = _choose_model(server, engine.url, models)
    engine.context = min(context, models[engine.model] or context)
    return engine


def _choose_model(server: Server, url: str, models: Mapping[str, object]) -> str:
    """Return the name of the model to sample from; UserError if the server has none such."""
    if server.model is None and len(models) != 1:
        raise UserError(
            f"{url}: it serves {len(models)} models: {', '.join(models)}",
            "choose one with sample.server.model",
        )

    name = server.model or next(iter(models))
    if name not in models:
        raise UserError(f"{url}: it does not serve '{name}'", did_you_mean(name, models))

    return name


def seed_sample(seed: int, prompt: int, sample: int) -> int:
    """Return the seed sent for one sample, of 31 bits: some servers take no more."""
    return hash_number(f"{seed} {prompt} {sample}", 4) >> 1


def _find_stop_id(choice: Choice, sampling: Sampling) -> int:
    reason = choice.stop_reason
    return reason if isinstance(reason, int) and reason in sampling.stop else sampling.stop[0]
