"""An engine that is somewhere else: completions from any server that speaks OpenAI's
`/v1/completions`.

So a large policy samples on vLLM, or on `llama2 serve`, while reward models score here. Prompts are
sent as token ids, one request a sample, each with a seed made of the caller's seed, the number of
the prompt and the number of the sample: a job that is resumed asks for the same. vLLM and `llama2
serve` send back token ids and log-probabilities (`return_token_ids`, `logprobs`), llama.cpp's
server a list of both. Of a server that sends text alone the text is encoded again, which may give
other ids than were drawn, and the log-probabilities are NaN. A grammar goes there as the JSON
Schema it was made of.

What a network does is expected: requests are repeated after a pause that doubles, one that fails
for good takes no finished one with it, and finished ones are in the journal before the next is
asked for.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field

from llama2 import json_files
from llama2.config import Config
from llama2.errors import UserError, did_you_mean
from llama2.generate.engine import Completion, Progress, Tokens
from llama2.generate.grammar import Grammar
from llama2.generate.journal import Journal, Keep
from llama2.generate.sampling import Sampling
from llama2.generate.wire import COMPLETIONS, MODELS, NEUTRAL, Choice, Reply, Trouble, Wire
from llama2.hashing import hash_content, hash_number
from llama2.tokenizer.tokenizer import Tokenizer

HOPELESS = 32  # so many failures without a success between them, and the rest is not asked for


class Server(Config):
    """Where answers are sampled instead of here: vLLM, `llama2 serve`, or another server of the
    kind."""

    incidental: ClassVar[frozenset[str]] = frozenset(
        {"url", "key_env", "concurrency", "timeout", "retries"}
    )

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
class _Ask:
    """One sample to ask for. `key` is the same whenever the same is asked for."""

    key: str
    number: int
    prompt: tuple[int, ...]
    body: dict[str, Any]


@dataclass
class _Tally:
    """How a round of requests goes."""

    done: int
    total: int
    failures: list[tuple[_Ask, str]] = field(default_factory=list)
    in_a_row: int = 0


class RemoteEngine:
    """The engine protocol over `url`: samples of `model` there, whose tokenizer is `tokenizer`.

    context: the most tokens of prompt and completion together. retries: how often a failed request
    is repeated, after `pause` seconds, twice as many, and so on. timeout: seconds for one request.
    concurrency: requests at a time. state: the directory of the journal,
    in which `rank` has a file of its own. progress: called after
    each completion.
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
        self._wire = Wire(
            url, key, retries=retries, timeout=timeout, concurrency=concurrency, pause=pause
        )
        self.url, self.model, self.context, self.tokenizer = (
            self._wire.url,
            model,
            context,
            tokenizer,
        )
        self.progress, self._resumable = progress, state is not None
        self._rank, self._journal = rank, Journal(state, rank)

    def generate(
        self, prompts: Sequence[Tokens], sampling: Sampling, indices: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """`sampling.n` completions of each prompt, as `Engine.generate`; those in the journal are
        not asked for.

        `indices` names the prompts to the seeds. UserError for a prompt that leaves no room, and,
        once all others have their completions, if some have none.
        """
        self.check(prompts)
        names = range(len(prompts)) if indices is None else indices
        asks = [
            self._ask(tuple(prompt), sampling, name, sample)
            for prompt, name in zip(prompts, names, strict=True)
            for sample in range(sampling.n)
        ]
        found = self._journal.find({ask.key: ask.prompt for ask in asks})
        missing = [ask for ask in asks if ask.key not in found]
        tally = _Tally(len(asks) - len(missing), len(asks))

        if missing:
            with self._journal.open() as keep:
                asyncio.run(self._ask_all(missing, sampling, found, keep, tally))

        if tally.failures:
            raise self._failed(tally)

        done = [found[ask.key] for ask in asks]
        return [done[start : start + sampling.n] for start in range(0, len(done), sampling.n)]

    def keep_in(self, state: Path) -> None:
        """From now on the journal is in this directory."""
        self._journal, self._resumable = Journal(state, self._rank), True

    def check(self, prompts: Sequence[Tokens]) -> None:
        """Raise the UserError that `generate` would raise for these prompts."""
        for index, prompt in enumerate(prompts):
            name = f"prompt {index + 1} of {len(prompts)}" if len(prompts) > 1 else "the prompt"
            if len(prompt) >= self.context:
                raise UserError(
                    f"{name} has {len(prompt)} tokens and leaves no room for an answer in the context of "
                    f"{self.context}",
                    "shorten it",
                )
            if not prompt:
                raise UserError(f"{name} is empty", "begin it with the BOS token")
            if not 0 <= min(prompt) <= max(prompt) < self.tokenizer.vocab_size:
                raise UserError(
                    f"{name} has token ids outside of the model's {self.tokenizer.vocab_size}",
                    "use the tokenizer that belongs to the checkpoint",
                )

    def stream(self, prompt: Tokens, sampling: Sampling) -> Iterator[int]:
        """The tokens of one completion, each as it comes; nothing is repeated or kept. UserError if
        it breaks off."""
        self.check([prompt])
        text, told = "", False
        try:
            for choice in self._wire.events(self._ask(tuple(prompt), sampling, 0, 0).body):
                text += choice.text
                for token in choice.ids() or ():
                    told = True
                    yield token
                    if token in sampling.stop:
                        return
        except Trouble as trouble:
            raise UserError(f"{self.url}: {trouble.reason}", "ask again") from None

        if not told:
            yield from self._encode(text)

    def models(self) -> dict[str, int | None]:
        """The language models served, each with the longest sequence it takes, where the server
        tells."""

        async def ask() -> Any:
            async with self._wire.client() as client:
                return await self._wire.patiently(
                    MODELS, lambda: self._wire.request(client, "GET", MODELS)
                )

        try:
            rows = [(row, row.get("llama2") or {}) for row in asyncio.run(ask())["data"]]
            return {
                str(row["id"]): row.get("max_model_len") or own.get("context")
                for row, own in rows
                if own.get("kind") != "reward"
            }
        except Trouble as trouble:
            raise UserError(
                f"{self.url}: {trouble.reason}", "start the server, or mend the address"
            ) from None
        except (KeyError, TypeError, AttributeError):
            raise UserError(
                f"{self.url}: it does not list its models", "this is no server of completions"
            ) from None

    # --- what is asked
    # ---------------------------------------------------------------------------------------------

    def _ask(self, prompt: tuple[int, ...], sampling: Sampling, number: int, sample: int) -> _Ask:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": list(prompt),
            "n": 1,
            "logprobs": 1,
            "max_tokens": min(sampling.max_tokens, self.context - len(prompt)),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed_of(sampling.seed, number, sample),
            "stop_token_ids": list(sampling.stop),
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            **{name: getattr(sampling, name) for name in NEUTRAL},
        }
        if sampling.grammar is not None:
            body["response_format"] = self._shape(sampling.grammar)

        # else a server stops at each of them
        if not set(self.tokenizer.stops) <= set(sampling.stop):
            body["ignore_eos"] = True

        if sampling.logit_bias:
            body["logit_bias"] = {str(token): value for token, value in sampling.logit_bias}

        key = hash_content(json.dumps(body, sort_keys=True))[:32]
        return _Ask(key, number, prompt, body)

    def _shape(self, grammar: object) -> dict[str, Any]:
        """What an answer shall be, in the words of OpenAI's chats, which vLLM and `llama2 serve`
        know here too."""
        if not isinstance(grammar, Grammar):
            raise UserError(
                f"{self.url}: a grammar can be sent to a server as a JSON Schema alone",
                "make it with json_grammar, or sample here",
            )
        if grammar.schema is None:
            return {"type": "json_object"}

        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": grammar.schema}}

    async def _ask_all(
        self,
        asks: Sequence[_Ask],
        sampling: Sampling,
        found: dict[str, Completion],
        keep: Keep,
        tally: _Tally,
    ) -> None:
        """Fill `found`, writing down each completion; `tally` tells what failed."""
        queue = iter(asks)

        async def work(client: Any) -> None:
            for ask in queue:  # one iterator for all workers
                if tally.in_a_row >= HOPELESS:
                    tally.failures.append((ask, "not asked for, as nothing came back any more"))
                    continue

                try:
                    found[ask.key] = await self._complete(client, ask, sampling)
                except Trouble as trouble:
                    tally.failures.append((ask, trouble.reason))
                    tally.in_a_row += 1
                    continue

                keep(ask.key, found[ask.key])
                tally.done, tally.in_a_row = tally.done + 1, 0
                if self.progress:
                    self.progress(tally.done, tally.total)

        async with self._wire.client() as client:
            workers = [
                asyncio.ensure_future(work(client))
                for _ in range(min(self._wire.concurrency, len(asks)))
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()

                await asyncio.gather(*workers, return_exceptions=True)

    async def _complete(self, client: Any, ask: _Ask, sampling: Sampling) -> Completion:
        async def once() -> Completion:
            reply = await self._wire.request(client, "POST", COMPLETIONS, ask.body)
            try:
                return self._read(Reply.model_validate(reply).choice(), ask, sampling)
            except ValueError:
                raise Trouble("an answer of another form than expected") from None

        return await self._wire.patiently(ask.key, once)

    # --- what comes back
    # -------------------------------------------------------------------------------------------

    def _read(self, choice: Choice, ask: _Ask, sampling: Sampling) -> Completion:
        """A completion as an engine here would give it. Trouble, or ValueError, for what cannot be
        one."""
        if choice.finish_reason not in ("stop", "length"):
            filtered = choice.finish_reason == "content_filter"  # and would be again
            raise Trouble(
                f"finish_reason is '{choice.finish_reason}'", again=None if filtered else 0.0
            )

        found = choice.ids()
        ids = self._encode(choice.text) if found is None else found
        values = choice.logprobs.token_logprobs if choice.logprobs and found is not None else []
        logprobs = [math.nan if value is None else value for value in values] + [math.nan] * (
            len(ids) - len(values)
        )

        if any(not 0 <= token < self.tokenizer.vocab_size for token in ids):
            raise UserError(
                f"{self.url}: '{self.model}' gives token ids outside of our {self.tokenizer.vocab_size}",
                "it must be the model that is named as the policy, with the same tokenizer",
            )

        end = next((place for place, token in enumerate(ids, 1) if token in sampling.stop), None)
        # this server keeps the stop id to itself
        if end is None and choice.finish_reason == "stop" and sampling.stop:
            ids, end = [*ids, _stop_id(choice, sampling)], len(ids) + 1
            logprobs = [*logprobs[: end - 1], math.nan]

        end = end or len(ids)
        if not end:
            raise ValueError("nothing")

        finish: Literal["stop", "length"] = "stop" if ids[end - 1] in sampling.stop else "length"
        if sampling.grammar is not None and finish == "stop":
            self._check_json(ids[:end])

        return Completion(ask.prompt, tuple(ids[:end]), tuple(logprobs[:end]), finish)

    def _check_json(self, ids: Sequence[int]) -> None:
        """A server may leave `response_format` aside without a word."""
        try:
            json_files.parsed(self.tokenizer.decode(ids))
        except ValueError:
            raise Trouble(
                "the answer is no JSON, as if the server knew no response_format", again=None
            ) from None

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text.removeprefix(" "))

    def _failed(self, tally: _Tally) -> UserError:
        prompts = len({ask.number for ask, _ in tally.failures})
        reasons = Counter(reason for _, reason in tally.failures).most_common()
        said = "; ".join(f"{reason} ({count})" for reason, count in reasons[:3])
        others = f"; and {len(reasons) - 3} other reasons" if len(reasons) > 3 else ""
        first = min(ask.number for ask, _ in tally.failures)
        kept = (
            f": the {tally.done} that are finished will not be asked for again"
            if self._resumable
            else ""
        )

        return UserError(
            f"{self.url}: {len(tally.failures)} of {tally.total} completions failed, of {prompts} "
            f"prompts; the first is number {first + 1}: {said}{others}",
            f"see to the server, and run the same command again{kept}",
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
    """An engine on `server`, once it has said that it serves the model; its own limit of length is
    kept too.

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
        retries=server.retries,
        timeout=server.timeout,
        concurrency=server.concurrency,
        state=state,
        rank=rank,
        progress=progress,
    )
    models = engine.models()
    if server.model is None and len(models) != 1:
        raise UserError(
            f"{engine.url}: it serves {len(models)} models: {', '.join(models)}",
            "say which with sample.server.model",
        )

    engine.model = server.model or next(iter(models))
    if engine.model not in models:
        raise UserError(
            f"{engine.url}: it does not serve '{engine.model}'", did_you_mean(engine.model, models)
        )

    engine.context = min(context, models[engine.model] or context)
    return engine


def seed_of(seed: int, prompt: int, sample: int) -> int:
    """The seed sent for one sample, of 31 bits: there are servers that take no more."""
    return hash_number(f"{seed} {prompt} {sample}", 4) >> 1


def _stop_id(choice: Choice, sampling: Sampling) -> int:
    said = choice.stop_reason
    return said if isinstance(said, int) and said in sampling.stop else sampling.stop[0]
