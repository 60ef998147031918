"""A server of completions as seen from here: requests that are repeated, and what the replies mean.

A request that fails for a reason that may pass is repeated after a pause that doubles, or after the
time that the server asks for (Retry-After). What would be the same for every request, such as a
wrong key, is an error at once. A server may refuse a field that OpenAI does not have; those we can
do without are then left out.
"""

from __future__ import annotations

import asyncio
import ipaddress
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from llama2 import json_files
from llama2.errors import UserError, explain_missing_extra

COMPLETIONS, MODELS = "/v1/completions", "/v1/models"
LONGEST_PAUSE = 600.0  # seconds, whatever Retry-After says
_TRY_AGAIN = {408, 425, 429}  # and all from 500 on
_NEVER = {401, 403, 404, 405}  # would be the same for every request
NEUTRAL: dict[str, Any] = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""what changes nothing; it is sent, as servers have defaults of their own"""
# not OpenAI's, and not essential
_EXTRAS = ("return_token_ids", "return_tokens_as_token_ids", "stop_token_ids")
_TEXT_ALONE = re.compile(r"prompt\W+(?:str\W+)?msg\W+Input should be a valid string")
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
    """What is read of one completion."""

    text: str = ""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    logprobs: Logprobs | None = None

    def ids(self) -> list[int] | None:
        """The token ids, sent as such or as names ("token_id:5"); None if there is text alone."""
        names = self.logprobs.tokens if self.logprobs else []
        if self.token_ids is None and names and all(name.startswith("token_id:") for name in names):
            return [int(name.removeprefix("token_id:")) for name in names]

        return self.token_ids


class Usage(BaseModel):
    """How many tokens were drawn."""

    completion_tokens: int | None = None


class Reply(BaseModel):
    """A reply, or one event of a stream."""

    choices: list[Choice]
    usage: Usage | None = None

    def choice(self) -> Choice:
        """The one that was asked for; ValueError if there is none.

        llama.cpp's list leaves out tokens inside of a character, so it counts only if it is as long
        as the answer.
        """
        if not self.choices:
            raise ValueError("no choice")

        choice, drawn = self.choices[0], self.usage.completion_tokens if self.usage else None
        listed = choice.logprobs.content if choice.logprobs else []
        ids = [token.id for token in listed if token.id is not None]

        if ids and len(ids) == drawn:
            choice.token_ids = ids
            choice.logprobs = Logprobs(token_logprobs=[token.logprob for token in listed])

        return choice


class Trouble(Exception):
    """A request that failed; `again`: the least seconds to wait before it is repeated, None if that
    is of no use."""

    def __init__(self, reason: str, again: float | None = 0.0) -> None:
        self.reason, self.again = reason, again


class Wire:
    """What all requests to the server at `url` share.

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

    def client(self) -> Any:
        """One pool of connections, to be used as an asynchronous context."""
        httpx = _httpx()
        limits = httpx.Limits(
            max_connections=self.concurrency, max_keepalive_connections=self.concurrency
        )
        try:
            host = httpx.URL(self.url).host
        except httpx.InvalidURL as error:
            raise UserError(
                f"{self.url}: this is no address of a server: {error}", "write http://HOST:PORT"
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
                "mend HTTP_PROXY, HTTPS_PROXY or ALL_PROXY, or name this server in NO_PROXY",
            ) from None

    async def patiently(self, key: str, once: Callable[[], Awaitable[T]]) -> T:
        """`once()`, repeated while it is in trouble that may pass; the last Trouble if it never
        does.

        `key` varies the pauses: requests that failed together should not come again together.
        """
        chance = random.Random(key).random
        turn = 0
        while True:
            try:
                return await once()
            except Trouble as trouble:
                if trouble.again is None or turn == self._retries:
                    raise

                pause = self._pause * 2**turn * (0.5 + chance())
                await asyncio.sleep(min(max(pause, trouble.again), LONGEST_PAUSE))

            turn += 1

    async def request(
        self, client: Any, method: str, path: str, body: dict[str, Any] | None = None
    ) -> Any:
        """The JSON of one reply. Trouble, or a UserError for what no request could get past."""
        try:
            async with asyncio.timeout(self._timeout):
                response = await client.request(method, path, json=(sent := self._sent(body)))
                while self._left_out(response, sent):
                    response = await client.request(method, path, json=(sent := self._sent(body)))
        except TimeoutError:
            raise Trouble(f"no answer within {self._timeout:g} s") from None
        except _httpx().RequestError as error:
            raise Trouble(_said(error)) from None

        if not response.is_success:
            self._refuse(response)

        try:
            return json_files.parse(response.content)
        except ValueError:
            raise Trouble("an answer that is not JSON") from None

    def events(self, body: dict[str, Any]) -> Iterator[Choice]:
        """A completion as it comes. Trouble as soon as there is any."""
        httpx, sent = _httpx(), self._sent({**body, "stream": True})
        try:
            with (
                httpx.Client(
                    base_url=self.url, headers=self._headers, timeout=self._timeout
                ) as client,
                client.stream("POST", COMPLETIONS, json=sent) as response,
            ):
                if response.is_success:
                    for line in response.iter_lines():
                        yield from _event(line)

                    return

                response.read()
                if not self._left_out(response, sent):
                    self._refuse(response)
        except httpx.RequestError as error:
            raise Trouble(_said(error)) from None

        yield from self.events(body)

    def _sent(self, body: dict[str, Any] | None) -> dict[str, Any] | None:
        return body and {
            name: value
            for name, value in body.items()
            if name not in self._refused or not _spare(name, value)
        }

    def _left_out(self, response: Any, sent: dict[str, Any] | None) -> bool:
        """Whether a request was refused for a field that we can do without. It is not sent any
        more.

        It is the first that the refusal names; another may be what the server would have us say
        instead.
        """
        wrong = response.text if response.status_code in (400, 422) else ""
        named = [
            name for name, value in (sent or {}).items() if _spare(name, value) and name in wrong
        ]
        if named:
            self._refused.add(min(named, key=wrong.index))

        return bool(named)

    def _refuse(self, response: Any) -> None:
        status = response.status_code
        reason = f"HTTP {status}: {_message(response.text)}"
        if _TEXT_ALONE.search(response.text):
            raise UserError(
                f"{self.url}: it takes prompts as text alone, where tags and text cannot be told apart",
                "sample on one that takes token ids: vLLM, llama.cpp's llama-server, 'llama2 serve'",
            )
        if status in _NEVER:
            raise UserError(
                f"{self.url}: {reason}",
                "check its address, the name of the model there, and its key",
            )
        if status in _TRY_AGAIN or status >= 500:
            raise Trouble(reason, _retry_after(response.headers.get("retry-after", "")))

        raise Trouble(reason, again=None)


def _spare(name: str, value: object) -> bool:
    """Whether we can do without a field."""
    return name in _EXTRAS or (name in NEUTRAL and value == NEUTRAL[name])


def _is_loopback(host: str) -> bool:
    """Whether a server is on this machine, where no proxy finds it."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.removesuffix(".") == "localhost"


def _httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise explain_missing_extra("httpx", "remote") from None

    return httpx


def _event(line: str) -> list[Choice]:
    """What one line of a stream brings."""
    data = line.removeprefix("data:").strip()
    if not line.startswith("data:") or data == "[DONE]":
        return []

    try:
        return Reply.model_validate_json(data).choices
    except ValidationError:
        raise Trouble(_message(data)) from None


def _retry_after(text: str) -> float:
    """Seconds, given as such or as a date."""
    try:
        return max(0.0, float(text))
    except ValueError:
        pass

    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0


def _message(text: str) -> str:
    """What a server says went wrong, in one line."""
    try:
        error = json_files.parse(text)
        error = error.get("error", error) if isinstance(error, dict) else error
        text = str(error.get("message", error)) if isinstance(error, dict) else str(error)
    except ValueError:
        pass

    return " ".join(text.split())[:200] or "without a reason"


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
