"""OpenAI's objects: a finished answer, the chunks of a stream, the log-probabilities of tokens."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from llama2.serve.detokenizer import TextDelta, TextToken
from llama2.serve.generation import SampleEvent
from llama2.serve.models import ChatModel
from llama2.serve.safety import SafetyVerdict
from llama2.serve.schema import ChatRequest, CompletionRequest, StreamOptions

Usage = Mapping[str, object]
DONE = b"data: [DONE]\n\n"
_STEP = 256  # bytes: an obfuscated event is as long as a multiple of this


class ResponseWriter(ABC):
    """The objects that answer one request."""

    answer_object: str
    chunk_object: str
    prefix: str

    def __init__(self, model: ChatModel, request: ChatRequest | CompletionRequest) -> None:
        self._options = request.stream_options or StreamOptions()
        self._with_logprobs = request.alternatives is not None
        self.reports_tokens = self._with_logprobs
        """the client gets each token, and not only the text"""
        self._name_by_id = bool(request.return_tokens_as_token_ids)
        self._tokenizer = model.tokenizer
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model.name,
        }

    def answer(self, samples: Sequence[SampleEvent], usage: Usage) -> dict[str, Any]:
        """Return the object of a finished call."""
        choices = []
        for index, sample in enumerate(samples):
            ending = self._ending(sample) or TextDelta()
            delta = TextDelta(sample.text.text, [*sample.text.tokens, *ending.tokens])
            choice = {**self._choice(index, delta), "finish_reason": sample.finish}
            choices.append(_add_verdict(choice, [sample.verdict]))

        answer = {**self._head, "object": self.answer_object, "choices": choices, "usage": usage}
        return _add_verdict(answer, [sample.verdict for sample in samples])

    def begin(self, count: int, usage: Usage) -> bytes:
        """Return the chunks before the text of a stream of `count` samples, if there are any."""
        return b""

    def event(self, event: SampleEvent, usage: Usage) -> bytes:
        """Return the chunk of an event, or two where its sample ends; `usage` is that so far."""
        chunks = b""
        if event.text:
            choice = {**self._delta(event.index, event.text), "finish_reason": None}
            chunks += self._chunk([choice], self._so_far(usage))

        if event.finish:
            delta = self._delta(event.index, self._ending(event))
            choice = _add_verdict({**delta, "finish_reason": event.finish}, [event.verdict])
            chunks += self._chunk([choice], self._so_far(usage), event.verdict)

        return chunks

    def end(self, usage: Usage) -> bytes:
        """Return what a stream ends with."""
        return (self._chunk([], usage) if self._options.include_usage else b"") + DONE

    def _choice(self, index: int, text: TextDelta) -> dict[str, Any]:
        """Return a finished sample, but for how it finished."""
        return self._delta(index, text)

    @abstractmethod
    def _delta(self, index: int, text: TextDelta | None) -> dict[str, Any]:
        """Return more of a sample, but for how it finished; None where there is no more text."""

    def _ending(self, event: SampleEvent) -> TextDelta | None:
        """Return the stop id that ended a sample: it was drawn, so it is reported."""
        return TextDelta("", [event.stop]) if event.stop and self.reports_tokens else None

    def _name(self, token: int) -> str | None:
        """Return the name of a token whose bytes are not it."""
        if self._name_by_id:
            return f"token_id:{token}"

        return None if self._tokenizer.bytes_of(token) else self._tokenizer.name_of(token)

    def _so_far(self, usage: Usage) -> Usage | None:
        return usage if self._options.continuous_usage_stats else None

    def _chunk(
        self,
        choices: list[dict[str, Any]],
        usage: Usage | None,
        verdict: SafetyVerdict | None = None,
    ) -> bytes:
        chunk = {**self._head, "object": self.chunk_object, "choices": choices}
        if self._options.include_usage:
            chunk["usage"] = usage

        _add_verdict(chunk, [verdict])
        if self._options.include_obfuscation:
            chunk["obfuscation"] = ""
            chunk["obfuscation"] = secrets.token_hex(_STEP)[: -len(encode_event(chunk)) % _STEP]

        return encode_event(chunk)


class ChatWriter(ResponseWriter):
    """Objects of /v1/chat/completions."""

    answer_object, chunk_object, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def begin(self, count: int, usage: Usage) -> bytes:
        """Return a chunk with the role of each sample."""
        chunks = b""
        for index in range(count):
            choice = {
                "index": index,
                "delta": {"role": "assistant", "content": ""},
                "logprobs": None,
                "finish_reason": None,
            }
            chunks += self._chunk([choice], self._so_far(usage))

        return chunks

    def _choice(self, index: int, text: TextDelta) -> dict[str, Any]:
        message = {"role": "assistant", "content": text.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(text)}

    def _delta(self, index: int, text: TextDelta | None) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": text.text} if text and text.text else {},
            "logprobs": None if text is None else self._logprobs(text),
        }

    def _logprobs(self, text: TextDelta) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None

        content = []
        for token in text.tokens:
            others = [self._token(*other) for other in token.alternatives]
            content.append({**self._token(token.token, token.logprob), "top_logprobs": others})

        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        content = self._tokenizer.bytes_of(token)
        name = self._name(token) or content.decode("utf-8", "replace")
        return {"token": name, "logprob": logprob, "bytes": list(content)}


class CompletionWriter(ResponseWriter):
    """Objects of /v1/completions."""

    answer_object, chunk_object, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: ChatModel, request: CompletionRequest) -> None:
        super().__init__(model, request)
        self._with_ids = bool(request.return_token_ids)
        self.reports_tokens = self._with_logprobs or self._with_ids

    def _delta(self, index: int, text: TextDelta | None) -> dict[str, Any]:
        delta = {
            "index": index,
            "text": "" if text is None else text.text,
            "logprobs": None if text is None else self._logprobs(text),
        }
        if self._with_ids:
            delta["token_ids"] = [token.token for token in text.tokens] if text else []

        return delta

    def _logprobs(self, text: TextDelta) -> dict[str, Any] | None:
        if not self._with_logprobs:
            return None

        logprobs: dict[str, Any] = {
            "tokens": [],
            "token_logprobs": [],
            "top_logprobs": [],
            "text_offset": [],
        }
        for token in text.tokens:
            logprobs["tokens"].append(self._unique_name(token.token))
            logprobs["token_logprobs"].append(token.logprob)
            logprobs["top_logprobs"].append(self._top_logprobs(token))
            logprobs["text_offset"].append(token.offset)

        return logprobs

    def _top_logprobs(self, token: TextToken) -> dict[str, float] | None:
        """Return the likeliest tokens by name; of several with one name the likeliest, which comes
        first."""
        if token.logprob is None:
            return None

        logprobs: dict[str, float] = {}
        for other, logprob in (*token.alternatives, (token.token, token.logprob)):
            logprobs.setdefault(self._unique_name(other), logprob)

        return logprobs

    def _unique_name(self, token: int) -> str:
        content = self._tokenizer.bytes_of(token)
        try:
            return self._name(token) or content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def encode_event(value: object) -> bytes:
    """Return one server-sent event. In ASCII: some clients take U+2028 and its like for the end of
    a line."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()


def _add_verdict(value: dict[str, Any], verdicts: Iterable[SafetyVerdict | None]) -> dict[str, Any]:
    """Add the verdict on an object, if there is one; of several the worst."""
    known = [verdict for verdict in verdicts if verdict is not None]
    if known:
        worst = min(known, key=lambda verdict: verdict.probability)
        value["llama2"] = {"safety": asdict(worst)}

    return value
