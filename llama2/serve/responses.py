"""OpenAI's objects: a finished answer, the chunks of a stream, the log-probabilities of tokens."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama2.serve.detokenizer import Part, Piece
from llama2.serve.generation import Event, Whole
from llama2.serve.safety import Verdict
from llama2.tokenizer.tokenizer import Tokenizer

Usage = Mapping[str, object]
DONE = b"data: [DONE]\n\n"
_STEP = 256  # bytes: an obfuscated event is as long as a multiple of this


@dataclass(frozen=True)
class Wanted:
    """What a client wants to hear of besides the text."""

    logprobs: bool = False
    """tokens, one by one"""
    ids: bool = False
    """their ids"""
    named_by_id: bool = False
    """tokens are named by their ids"""
    usage: bool = False
    """how many tokens there were, at the end of a stream"""
    always_usage: bool = False
    """and with each of its events"""
    obfuscation: bool = False
    """its events are filled up to like lengths"""

    @property
    def tokens(self) -> bool:
        return self.logprobs or self.ids


class Format(ABC):
    """The objects of one call."""

    whole: str
    chunk: str
    prefix: str

    def __init__(self, model: str, tokenizer: Tokenizer, wanted: Wanted) -> None:
        self._tokenizer, self._wanted = tokenizer, wanted
        self._head = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": model,
        }

    def answer(self, wholes: Sequence[Whole], usage: Usage) -> dict[str, Any]:
        """A finished call."""
        choices = [
            self._reported(
                {**self._content(index, whole), "finish_reason": whole.finish}, whole.verdict
            )
            for index, whole in enumerate(wholes)
        ]
        return self._judged(
            {**self._head, "object": self.whole, "choices": choices, "usage": usage},
            [whole.verdict for whole in wholes],
        )

    @abstractmethod
    def opening(self, count: int, usage: Usage) -> bytes:
        """What a stream of `count` samples begins with."""

    def event(self, event: Event, usage: Usage) -> bytes:
        """News of one sample as one chunk, or as two where it ends; `usage` is that so far."""
        found, so_far = b"", usage if self._wanted.always_usage else None
        if event.part:
            found += self._sent(
                [{**self._delta(event.index, event.part), "finish_reason": None}], None, so_far
            )

        if event.finish:
            last = {
                **self._delta(event.index, self._ending(event.stop)),
                "finish_reason": event.finish,
            }
            found += self._sent([self._reported(last, event.verdict)], event.verdict, so_far)

        return found

    def closing(self, usage: Usage) -> bytes:
        """What a stream ends with."""
        return (self._sent([], None, usage) if self._wanted.usage else b"") + DONE

    @abstractmethod
    def _content(self, index: int, whole: Whole) -> dict[str, Any]:
        """A finished sample, but for how it finished."""

    @abstractmethod
    def _delta(self, index: int, part: Part | None) -> dict[str, Any]:
        """News of a sample, but for how it finished; None where there is no more text."""

    def _ending(self, stop: Piece | None) -> Part | None:
        """What is reported with the end of a sample that ended by the id `stop`: it was drawn and
        counts."""
        return Part("", [stop]) if stop and self._wanted.tokens else None

    def _whole(self, whole: Whole) -> Part:
        """All of a finished sample."""
        ending = self._ending(whole.stop)
        return Part(whole.part.text, [*whole.part.pieces, *(ending.pieces if ending else ())])

    def _name(self, token: int) -> str | None:
        """What a token is called where its bytes do not say it."""
        if self._wanted.named_by_id:
            return f"token_id:{token}"

        return None if self._tokenizer.bytes_of(token) else self._tokenizer.name_of(token)

    def _sent(
        self,
        choices: list[dict[str, Any]],
        verdict: Verdict | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        chunk = {**self._head, "object": self.chunk, "choices": choices}
        if self._wanted.usage:
            chunk["usage"] = usage

        chunk = self._judged(chunk, [verdict])
        if self._wanted.obfuscation:
            chunk["obfuscation"] = ""
            chunk["obfuscation"] = secrets.token_hex(_STEP)[: -len(sse(chunk)) % _STEP]

        return sse(chunk)

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

    def opening(self, count: int, usage: Usage) -> bytes:
        so_far = usage if self._wanted.always_usage else None
        return b"".join(
            self._sent(
                [
                    {
                        "index": index,
                        "delta": {"role": "assistant", "content": ""},
                        "logprobs": None,
                        "finish_reason": None,
                    }
                ],
                None,
                so_far,
            )
            for index in range(count)
        )

    def _content(self, index: int, whole: Whole) -> dict[str, Any]:
        part = self._whole(whole)
        message = {"role": "assistant", "content": part.text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._tokens(part)}

    def _delta(self, index: int, part: Part | None) -> dict[str, Any]:
        return {
            "index": index,
            "delta": {"content": part.text} if part and part.text else {},
            "logprobs": None if part is None else self._tokens(part),
        }

    def _tokens(self, part: Part) -> dict[str, Any] | None:
        if not self._wanted.logprobs:
            return None

        return {
            "content": [
                {
                    **self._token(piece.token, piece.logprob),
                    "top_logprobs": [self._token(*other) for other in piece.alternatives],
                }
                for piece in part.pieces
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        content = self._tokenizer.bytes_of(token)
        name = self._name(token) or content.decode("utf-8", "replace")
        return {"token": name, "logprob": logprob, "bytes": list(content)}


class TextFormat(Format):
    """/v1/completions"""

    whole, chunk, prefix = "text_completion", "text_completion", "cmpl"

    def opening(self, count: int, usage: Usage) -> bytes:
        return b""

    def _content(self, index: int, whole: Whole) -> dict[str, Any]:
        return self._delta(index, self._whole(whole))

    def _delta(self, index: int, part: Part | None) -> dict[str, Any]:
        ids = (
            {"token_ids": [piece.token for piece in part.pieces] if part else []}
            if self._wanted.ids
            else {}
        )
        return {
            "index": index,
            "text": "" if part is None else part.text,
            "logprobs": None if part is None else self._tokens(part),
            **ids,
        }

    def _tokens(self, part: Part) -> dict[str, Any] | None:
        if not self._wanted.logprobs:
            return None

        pieces = part.pieces
        return {
            "tokens": [self._called(piece.token) for piece in pieces],
            "token_logprobs": [piece.logprob for piece in pieces],
            "top_logprobs": [self._likeliest(piece) for piece in pieces],
            "text_offset": [piece.offset for piece in pieces],
        }

    def _likeliest(self, piece: Piece) -> dict[str, float] | None:
        """By name; of tokens of the same name the likeliest, which comes first."""
        if piece.logprob is None:
            return None

        found: dict[str, float] = {}
        for token, logprob in (*piece.alternatives, (piece.token, piece.logprob)):
            found.setdefault(self._called(token), logprob)

        return found

    def _called(self, token: int) -> str:
        content = self._tokenizer.bytes_of(token)
        try:
            return self._name(token) or content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


def sse(value: object) -> bytes:
    """One server-sent event. In ASCII: some clients take U+2028 and its like for the end of a
    line."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n".encode()
