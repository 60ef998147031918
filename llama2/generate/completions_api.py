"""OpenAI's API of completions over HTTP: requests that are repeated, and replies of many servers.

A request that fails for a reason that may pass is repeated after a pause that doubles, or after the
time that the server asks for (Retry-After). What would be the same for every request, such as a
wrong key, is an error at once. A server may refuse a field that OpenAI does not have; those that
are not needed are then left out.
"""

from __future__ import annotations

import asyncio
import ipaddress
import itertools
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from email.utils import parsedate_to_datetime
from typing import Any, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from llama2 import json_files
from llama2.errors import UserError, explain_missing_extra

COMPLETIONS, MODELS = "/v1/completions", "/v1/models"
LONGEST_PAUSE = 600.0  # seconds, whatever Retry-After says
_PASSING = {408, 425, 429}  # statuses that may pass, like all from 500 on
_LASTING = {401, 403, 404, 405}  # statuses that every request would meet
NEUTRAL: dict[str, Any] = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""values that change nothing; they are sent, as servers have defaults of their own"""
# not OpenAI's, and not essential
_EXTRAS = ("return_token_ids", "return_tokens_as_token_ids", "stop_token_ids")
_TEXT_ONLY = re.compile(r"prompt\W+(?:str\W+)?msg\W+Input should be a valid string")
T = TypeVar("T")


class Token(BaseModel):
    """A token as llama.cpp's server lists it."""

    id: int | None = None
    logprob: float | None = None


class Logprobs(BaseModel):
    """Names and log-probabilities of tokens, side by side; or llama.cpp's list of both."""

    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    content: list[Token] = []


class Choice(BaseModel):
    """One completion, as far as it is read."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None

    def ids(self) -> list[int] | None:
        """Return the token ids, sent as such or as names ("token_id:5"); None if there is only
        text."""
        names = self.logprobs.tokens if self.logprobs else []
        if self.token_ids is None and names and all(name.startswith("token_id:") for name in names):
            return [int(name.removeprefix("token_id:")) for name in names]

        return self.token_ids


class Usage(BaseModel):
    """The number of tokens drawn."""

    completion_tokens: int | None = None


class Reply(BaseModel):
    """A reply, or one event of a stream."""

    choices: list[Choice]
    usage: Usage | None = None

    def choice(self) -> Choice:
        """Return the one that was asked for; ValueError if there is none.

        llama.cpp's list leaves out tokens inside of a character, so it counts only if it is as long
        as the answer.
        """
        if not self.choices:
            raise ValueError("no choice")

        choice = self.choices[0]
        listed = choice.logprobs.content if choice.logprobs else []
        ids = [token.id for token in listed if token.id is not None]

        if ids and self.usage and len(ids) == self.usage.completion_tokens:
            choice.token_ids = ids
            choice.logprobs = Logprobs(token_logprobs=[token.logprob for token in listed])

        return choice


class RequestFailed(Exception):
    """A request failed for `reason`; `wait`: the least seconds before it is repeated, None if that
    is of no use."""

    def __init__(self, reason: str, wait: float | None = 0.0) -> None:
        self.reason, self.wait = reason, wait


class CompletionsClient:
    """Sends requests to the server at `url`.

    retries: how often a failed request is repeated, after `pause` seconds, twice as many, and so
    on. timeout: seconds for one request. concurrency: connections at a time.
    """

    def __init__(
        self,
        url: str,
        key: str | None,
        *,
        retries: int,
        timeout: float,
        concurrency: int,
        pause: float,
    ) -> None:
        self.url, self.concurrency = re.sub(r"/+(v1/*)?$", "", url), concurrency
        self._retries, self._timeout, self._pause = retries, timeout, pause
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._refused: set[str] = set()  # fields that this server does not know

    def connect(self) -> Any:
        """Return a pool of connections, to be used as an asynchronous context."""
        httpx = _import_httpx()
        limits = httpx.Limits(
            max_connections=self.concurrency, max_keepalive_connections=self.concurrency
        )
        try:
            host = httpx.URL(self.url).host
        except httpx.InvalidURL as error:
            raise UserError(
                f"{self.url}: this is not the address of a server: {error}",
                "write http://HOST:PORT",
            ) from None

        try:
            return httpx.AsyncClient(
                base_url=self.url,
                headers=self._headers,
                limits=limits,
                trust_env=not _is_loopback(host),
                verify=httpx.create_ssl_context(),
                timeout=httpx.Timeout(None, connect=min(30.0, self._timeout)),
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise UserError(
                f"{self.url}: the proxy that the environment names cannot be used: {error}",
                "correct HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or name this server in NO_PROXY",
            ) from None

    async def retry(self, key: str, attempt: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `attempt()`, repeated while it fails for reasons that may pass.
        Raises the last RequestFailed if it never succeeds.

        `key` varies the pauses: requests that failed together should not come again together. By
        hand, as retry libraries would need a rule of their own for Retry-After and for `key`.
        """
        jitter = random.Random(key)
        for turn in itertools.count():
            try:
                return await attempt()
            except RequestFailed as failure:
                if failure.wait is None or turn == self._retries:
                    raise

                pause = self._pause * 2**turn * jitter.uniform(0.5, 1.5)
                await asyncio.sleep(min(max(pause, failure.wait), LONGEST_PAUSE))

        raise AssertionError  # unreachable, for the type checker

    async def request(
        self, connections: Any, method: str, path: str, body: dict[str, Any] | None = None
    ) -> Any:
        """Return the JSON of one reply. RequestFailed, or a UserError for what every request would
        meet."""
        try:
            async with asyncio.timeout(self._timeout):
                accepted = False
                while not accepted:
                    sent = self._omit_refused(body)
                    response = await connections.request(method, path, json=sent)
                    accepted = self._accept(response, sent)
        except TimeoutError:
            raise RequestFailed(f"no answer within {self._timeout:g} s") from None
        except _import_httpx().RequestError as error:
            raise RequestFailed(_describe(error)) from None

        try:
            return json_files.parse(response.content)
        except ValueError:
            raise RequestFailed("an answer that is not JSON") from None

    def stream(self, body: dict[str, Any]) -> Iterator[Choice]:
        """Yield a completion as it comes. RequestFailed as soon as anything fails."""
        httpx, sent = _import_httpx(), self._omit_refused({**body, "stream": True})
        try:
            with (
                httpx.Client(
                    base_url=self.url, headers=self._headers, timeout=self._timeout
                ) as client,
                client.stream("POST", COMPLETIONS, json=sent) as response,
            ):
                if not response.is_success:
                    response.read()

                if self._accept(response, sent):
                    for line in response.iter_lines():
                        yield from _parse_event(line)

                    return
        except httpx.RequestError as error:
            raise RequestFailed(_describe(error)) from None

        yield from self.stream(body)

    def _omit_refused(self, body: dict[str, Any] | None) -> dict[str, Any] | None:
        return body and {
            name: value
            for name, value in body.items()
            if name not in self._refused or not _is_optional(name, value)
        }

    def _accept(self, response: Any, sent: dict[str, Any] | None) -> bool:
        """Return whether a request succeeded; False if it is to be sent again without a field that
        was refused. RequestFailed or UserError for any other refusal.

        The field is the first that the refusal names; another may be what the server suggests
        instead.
        """
        if response.is_success:
            return True

        text = response.text if response.status_code in (400, 422) else ""
        optional = [name for name, value in (sent or {}).items() if _is_optional(name, value)]
        named = [name for name in optional if name in text]
        if not named:
            self._refuse(response)

        self._refused.add(min(named, key=text.index))
        return False

    def _refuse(self, response: Any) -> NoReturn:
        status = response.status_code
        reason = f"HTTP {status}: {_read_message(response.text)}"
        if _TEXT_ONLY.search(response.text):
            raise UserError(
                f"{self.url}: it takes prompts only as text, where tags and text look alike",
                "use a server that takes token ids: vLLM, llama.cpp's llama-server, 'llama2 serve'",
            )

        if status in _LASTING:
            raise UserError(
                f"{self.url}: {reason}",
                "check its address, the name of the model there, and its key",
            )

        if status in _PASSING or status >= 500:
            raise RequestFailed(reason, _read_retry_after(response.headers.get("retry-after", "")))

        raise RequestFailed(reason, wait=None)


def _is_optional(name: str, value: object) -> bool:
    """Return whether a field need not be sent."""
    return name in _EXTRAS or (name in NEUTRAL and value == NEUTRAL[name])


def _is_loopback(host: str) -> bool:
    """Return whether a server is on this machine, where no proxy finds it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.removesuffix(".") == "localhost"


def _import_httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise explain_missing_extra("httpx", "remote") from None

    return httpx


def _parse_event(line: str) -> list[Choice]:
    """Return what one line of a stream brings."""
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return []

    try:
        return Reply.model_validate_json(data).choices
    except ValidationError:
        raise RequestFailed(_read_message(data)) from None


def _read_retry_after(text: str) -> float:
    """Return seconds, given as such or as a date."""
    with suppress(ValueError):
        return max(0.0, float(text))

    with suppress(ValueError, TypeError):
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())

    return 0.0


def _read_message(text: str) -> str:
    """Return what a server says went wrong, in one line."""
    with suppress(ValueError):
        error = json_files.parse(text)
        error = error.get("error", error) if isinstance(error, dict) else error
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)

    return " ".join(text.split())[:200] or "without a reason"


def _describe(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
