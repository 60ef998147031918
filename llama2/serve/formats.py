"""OpenAI's objects: a finished answer, the chunks of a stream, the log-probabilities of tokens."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from llama2.serve.generation import Event, Whole
from llama2.serve.safety import Verdict
from llama2.serve.text import Part, Piece
from llama2.tokenizer.tokenizer import Tokenizer

Usage = Mapping[str, object]
DONE = b"data: [DONE]\n\n"


class Format(ABC):
    """The objects of one call. `logprobs` tells whether tokens are reported."""

    whole: str
    chunk: str
    prefix: str

    def __init__(self, model: str, tokenizer: Tokenizer, logprobs: bool, usage: bool = False) -> None:
        self._tokenizer, self._logprobs, self._usage = tokenizer, logprobs, usage
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}

    def answer(self, wholes: Sequence[Whole], usage: Usage) -> dict[str, Any]:
        """A finished call."""
        choices = [self._reported({**self._content(index, whole), "finish_reason": whole.finish}, whole.verdict)
                   for index, whole in enumerate(wholes)]
        return self._judged({**self._head, "object": self.whole, "choices": choices, "usage": usage},
                            [whole.verdict for whole in wholes])

    @abstractmethod
    def opening(self, count: int) -> bytes:
        """What a stream of `count` samples begins with."""

    def event(self, event: Event) -> bytes:
        """News of one sample as one chunk, or as two where it ends."""
        found = b""
        if event.part:
            found += self._sent([{**self._delta(event.index, event.part), "finish_reason": None}])
        if event.finish:
            last = {**self._delta(event.index, self._ending(event.stop)), "finish_reason": event.finish}
            found += self._sent([self._reported(last, event.verdict)], event.verdict)
        return found

    def closing(self, usage: Usage) -> bytes:
        """What a stream ends with."""
        return (self._sent([], None, usage) if self._usage else b"") + DONE

    @abstractmethod
    def _content(self, index: int, whole: Whole) -> dict[str, Any]:
        """A finished sample, but for how it finished."""

    @abstractmethod
    def _delta(self, index: int, part: Part | None) -> dict[str, Any]:
        """News of a sample, but for how it finished; None where there is no more text."""

    def _ending(self, stop: Piece | None) -> Part | None:
        """What is reported with the end of a sample that ended by the id `stop`."""
        return None

    def _sent(self, choices: list[dict[str, Any]], verdict: Verdict | None = None, usage: Usage | None = None) -> bytes:
        chunk = {**self._head, "object": self.chunk, "choices": choices}
        if self._usage:
            chunk["usage"] = usage
        return sse(self._judged(chunk, [verdict]))

    @staticmethod
    def _reported(choice: dict[str, Any], verdict: Verdict | None) -> dict[str, Any]:
        return choice if verdict is None else {**choice, "llama2": verdict.report()}

    @staticmethod
    def _judged(answer: dict[str, Any], verdicts: Sequence[Verdict | None]) -> dict[str, Any]:
        """The answer, with the worst of the verdicts."""
        found = [verdict for verdict in verdicts if verdict is not None]
        if not found:
            return answer
        return {**answer, "llama2": min(found, key=lambda verdict: verdict.probability).report()}


class ChatFormat(Format):
    """/v1/chat/completions"""

    whole, chunk, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def opening(self, count: int) -> bytes:
        return b"".join(self._sent([{"index": index, "delta": {"role": "assistant", "content": ""}, "logprobs": None,
                                     "finish_reason": None}]) for index in range(count))

    def _content(self, index: int, whole: Whole) -> dict[str, Any]:
        message = {"role": "assistant", "content": whole.part.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._tokens(whole.part)}

    def _delta(self, index: int, part: Part | None) -> dict[str, Any]:
        return {"index": index, "delta": {} if part is None else {"content": part.text},
                "logprobs": None if part is None else self._tokens(part)}

    def _tokens(self, part: Part) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        return {"content": [{**self._token(piece.token, piece.logprob),
                             "top_logprobs": [self._token(*other) for other in piece.alternatives]}
                            for piece in part.pieces], "refusal": None}

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        content = self._tokenizer.bytes_of(token)
        return {"token": content.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(content)}


class TextFormat(Format):
    """/v1/completions"""

    whole, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def __init__(self, model: str, tokenizer: Tokenizer, logprobs: bool, usage: bool = False, ids: bool = False
                 ) -> None:
        super().__init__(model, tokenizer, logprobs, usage)
        self._ids = ids

    def opening(self, count: int) -> bytes:
        return b""

    def _content(self, index: int, whole: Whole) -> dict[str, Any]:
        ending = self._ending(whole.stop)
        pieces = [*whole.part.pieces, *(ending.pieces if ending else ())]
        return self._delta(index, Part(whole.part.text, pieces))

    def _ending(self, stop: Piece | None) -> Part | None:
        return Part("", [stop]) if stop and self._ids else None

    def _delta(self, index: int, part: Part | None) -> dict[str, Any]:
        ids = {"token_ids": [piece.token for piece in part.pieces] if part else []} if self._ids else {}
        return {"index": index, "text": "" if part is None else part.text,
                "logprobs": None if part is None else self._tokens(part), **ids}

    def _tokens(self, part: Part) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        pieces = part.pieces
        return {"tokens": [self._name(piece.token) for piece in pieces],
                "token_logprobs": [piece.logprob for piece in pieces],
                "top_logprobs": [self._likeliest(piece) for piece in pieces],
                "text_offset": [piece.offset for piece in pieces]}

    def _likeliest(self, piece: Piece) -> dict[str, float] | None:
        """By name; of tokens of the same name the likeliest, which comes first."""
        if piece.logprob is None:
            return None
        found: dict[str, float] = {}
        for token, logprob in (*piece.alternatives, (piece.token, piece.logprob)):
            found.setdefault(self._name(token), logprob)
        return found

    def _name(self, token: int) -> str:
        content = self._tokenizer.bytes_of(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def sse(value: object) -> bytes:
    """One server-sent event. In ASCII: some clients take U+2028 and its like for the end of a line."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()

