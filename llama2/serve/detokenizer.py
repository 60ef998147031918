"""Tokens in, text out as it becomes certain: whole characters, and never a part of what may become
a stop string.

A stop string is looked for in the text, wherever its tokens begin and end. The tokens are reported
with the text that they begin; those of a stop string, which have none, with the end. Every token
that counts is reported.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llama2.tokenizer.tokenizer import Tokenizer

Alternatives = tuple[tuple[int, float], ...]
"""token ids and their log-probabilities, the likeliest first"""


class StopScanner:
    """Looks for strings in a text that comes in parts. The one that is complete first ends the text
    before it begins; of several complete at once, the longest."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.found = False
        self._strings, self._held = tuple(strings), ""

    def push(self, part: str) -> str:
        """Take more text; return all that is certain by now and was not returned before."""
        if self.found:
            return ""
        if not self._strings:
            return part

        text = self._held + part
        spans = [(text.find(string) + len(string), text.find(string)) for string in self._strings]
        complete = [span for span in spans if span[1] >= 0]
        if complete:
            # the string that ends first, and of those that end there the longest
            start = min(complete)[1]
            self.found, self._held = True, ""
            return text[:start]

        certain = len(text) - self._uncertain(text)
        self._held = text[certain:]
        return text[:certain]

    def rest(self) -> str:
        """Return what was held back, once nothing can follow."""
        held, self._held = self._held, ""
        return held

    def _uncertain(self, text: str) -> int:
        """Return the length of the longest end of `text` that a stop string may begin with."""
        longest = max(map(len, self._strings)) - 1
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(string.startswith(end) for string in self._strings):
                return length

        return 0


@dataclass(frozen=True)
class TextToken:
    """A token of a text: where it begins in characters, its log-probability, and the likeliest
    tokens in its place."""

    token: int
    offset: int
    logprob: float | None
    alternatives: Alternatives = ()


@dataclass
class TextDelta:
    """Text that is certain, and the tokens that begin in it."""

    text: str = ""
    tokens: list[TextToken] = field(default_factory=list)

    def add(self, other: TextDelta) -> None:
        """Append what follows."""
        self.text += other.text
        self.tokens += other.tokens

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens)


class Detokenizer:
    """The text of one sample.

    `prompt` are the ids before it: a continuation keeps the space in front of its first word, and
    offsets count from the beginning of the prompt. `strip` removes white space at both ends, as
    answers are shown. `begun` is the beginning of an answer that this goes on with: white space at
    the beginning then stays, except for the spaces that `begun` ended with.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Sequence[str] = (),
        prompt: Sequence[int] = (),
        strip: bool = False,
        begun: str = "",
    ) -> None:
        self._pending: deque[int] = deque(prompt)
        self._texts = tokenizer.stream(self._ids())
        self._length = sum(len(next(self._texts)) for _ in prompt)
        self._certain = self._length
        self._waiting: deque[TextToken] = deque()
        self._stops = StopScanner(stops)

        self._strip = strip
        self._has_text = bool(begun.strip())
        self._held_space = ""
        self._repeated_spaces = len(begun) - len(begun.rstrip(" ")) if self._has_text else 0

    @property
    def stopped(self) -> bool:
        """Return whether a stop string was found: nothing will follow."""
        return self._stops.found

    def push(self, token: int, logprob: float | None, alternatives: Alternatives = ()) -> TextDelta:
        """Take one more token; return what it makes certain."""
        self._pending.append(token)
        self._waiting.append(self.end(token, logprob, alternatives))
        text = next(self._texts)
        self._length += len(text)
        delta = self._delta(self._stops.push(text))

        if self.stopped:
            self._flush(delta)

        return delta

    def push_text(self, tokens: Sequence[int]) -> TextDelta:
        """Take more tokens of which only the text is wanted, where there are no stop strings."""
        self._pending.extend(tokens)
        text = "".join([next(self._texts) for _ in tokens])
        self._length += len(text)

        return self._delta(text)

    def end(self, token: int, logprob: float | None, alternatives: Alternatives = ()) -> TextToken:
        """Return a token that stands at the end of the text so far, without adding its text."""
        return TextToken(token, self._length, logprob, alternatives)

    def close(self) -> TextDelta:
        """Return the rest, when no token will follow."""
        delta = self._delta(self._stops.push(next(self._texts)))
        if not self.stopped:
            delta.add(self._delta(self._stops.rest()))

        self._flush(delta)
        return delta

    def _flush(self, delta: TextDelta) -> None:
        """Report the tokens that begin no text of their own."""
        delta.tokens += self._waiting
        self._waiting.clear()

    def _ids(self) -> Iterator[int]:
        while self._pending:
            yield self._pending.popleft()

    def _delta(self, text: str) -> TextDelta:
        self._certain += len(text)
        tokens = []
        while self._waiting and self._waiting[0].offset < self._certain:
            tokens.append(self._waiting.popleft())

        return TextDelta(self._stripped(text) if self._strip else text, tokens)

    def _stripped(self, text: str) -> str:
        """Return text without white space at the ends of the answer: white space waits until
        something follows it."""
        while self._repeated_spaces and text:
            if text[0] != " ":
                self._repeated_spaces = 0
                break

            text = text[1:]
            self._repeated_spaces -= 1

        text = self._held_space + text if self._has_text else text.lstrip()
        visible = text.rstrip()
        self._has_text = self._has_text or bool(visible)
        self._held_space = text[len(visible) :] if self._has_text else ""

        return visible
