"""Tokens in, text out as it becomes certain: whole characters, and never a part of what may become
a stop string.

A stop string is looked for in the text, wherever its pieces fall. The tokens themselves are
reported together with the text they begin; those of a stop string, which have none, with the end:
every token that counts is reported.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from llama2.tokenizer.tokenizer import Tokenizer


class Stops:
    """Looks for strings in a text that comes in parts. The one that is complete first ends the text
    before it begins; of several complete at once, the longest."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.found = False
        self._strings, self._held = tuple(strings), ""

    def push(self, part: str) -> str:
        """More text; what of all so far is certain by now and was not returned before."""
        if self.found or not self._strings:
            return "" if self.found else part

        text = self._held + part
        ends = [
            (start + len(string), start)
            for string in self._strings
            if (start := text.find(string)) >= 0
        ]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]

        kept = len(text) - self._unsure(text)
        self._held = text[kept:]
        return text[:kept]

    def rest(self) -> str:
        """What was held back, once nothing can follow."""
        held, self._held = self._held, ""
        return held

    def _unsure(self, text: str) -> int:
        """The length of the longest end of `text` that may be the beginning of a stop string."""
        longest = min(max(map(len, self._strings)) - 1, len(text))
        return next(
            (
                length
                for length in range(longest, 0, -1)
                if any(string.startswith(text[-length:]) for string in self._strings)
            ),
            0,
        )


@dataclass(frozen=True)
class Piece:
    """A token as it is reported: where its text begins, its log-probability, the likeliest tokens
    in its place."""

    token: int
    offset: int
    logprob: float | None
    alternatives: tuple[tuple[int, float], ...] = ()


@dataclass
class Part:
    """Text that is certain, and the tokens that begin in it."""

    text: str = ""
    pieces: list[Piece] = field(default_factory=list)

    def add(self, other: Part) -> None:
        self.text += other.text
        self.pieces += other.pieces

    def __bool__(self) -> bool:
        return bool(self.text or self.pieces)


class Decoder:
    """The text of one sample. `prompt` are ids before it, of which a continuation needs to know
    whether it begins a text, and from whose beginning offsets count; `strip` takes white space off
    both ends, as answers are shown.

    `begun` is the beginning of an answer that this goes on with: only the white space that it ends
    with is taken off the beginning, as far as it comes again.
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
        self._length = self._certain = sum(len(next(self._texts)) for _ in prompt)
        self._stops, self._strip = Stops(stops), strip
        self._begun, self._space = bool(begun.strip()), ""
        # spaces that were there already
        self._again = len(begun) - len(begun.rstrip(" ")) if self._begun else 0
        self._waiting: deque[Piece] = deque()

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: nothing will follow."""
        return self._stops.found

    def push(
        self, token: int, logprob: float | None, alternatives: tuple[tuple[int, float], ...] = ()
    ) -> Part:
        """One more token."""
        self._pending.append(token)
        self._waiting.append(Piece(token, self._length, logprob, alternatives))
        text = next(self._texts)
        self._length += len(text)
        part = self._part(self._stops.push(text))

        if self.stopped:
            self._flush(part)

        return part

    def push_text(self, tokens: Sequence[int]) -> Part:
        """More tokens of which only the text is wanted, where there are no stop strings."""
        self._pending.extend(tokens)
        text = "".join([next(self._texts) for _ in tokens])
        self._length += len(text)

        return self._part(text)

    def silent(
        self, token: int, logprob: float | None, alternatives: tuple[tuple[int, float], ...] = ()
    ) -> Piece:
        """How a token is reported that ends the text and is no part of it."""
        return Piece(token, self._length, logprob, alternatives)

    def close(self) -> Part:
        """What is left when no token will follow."""
        part = self._part(self._stops.push(next(self._texts)))
        if not self.stopped:
            part.add(self._part(self._stops.rest()))

        self._flush(part)
        return part

    def _flush(self, part: Part) -> None:
        """Report the tokens that begin no text of their own."""
        part.pieces += self._waiting
        self._waiting.clear()

    def _ids(self) -> Iterator[int]:
        while self._pending:
            yield self._pending.popleft()

    def _part(self, text: str) -> Part:
        self._certain += len(text)
        pieces = []
        while self._waiting and self._waiting[0].offset < self._certain:
            pieces.append(self._waiting.popleft())

        return Part(self._stripped(text) if self._strip else text, pieces)

    def _stripped(self, text: str) -> str:
        """White space waits until something follows it."""
        while self._again and text:
            text, self._again = (text[1:], self._again - 1) if text[0] == " " else (text, 0)

        text = self._space + text if self._begun else text.lstrip()
        kept = text.rstrip()
        self._space = text[len(kept) :] if self._begun or kept else ""
        self._begun = self._begun or bool(kept)

        return kept
