"""Conversations in, answers out: the chat template and the tokenizer around an engine (§3.3, A.7).

No system prompt is added: a safety prompt by default makes a model refuse harmless requests, so
whoever wants one writes it as the system turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from llama2.errors import UserError
from llama2.generate.engine import Completion, Generator
from llama2.generate.sampling import Sampling
from llama2.ranks import Ranks
from llama2.records import Messages
from llama2.tokenizer.template import encode_prompt
from llama2.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """The text of a completion, without its stop id and stripped, and the completion itself."""

    text: str
    completion: Completion


class Chat:
    """Answers conversations with `engine`, shared between `ranks` (this process alone unless given).
    An answer ends where the model ends answers (`Tokenizer.stops`), and at the stop ids of the
    sampling."""

    def __init__(self, engine: Generator, tokenizer: Tokenizer, ranks: Ranks | None = None) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.ranks = ranks or Ranks.alone()

    def answers(
        self, prompts: Sequence[Messages], sampling: Sampling, indices: Sequence[int] | None = None
    ) -> list[list[Answer]]:
        """`sampling.n` answers to each conversation, which ends with a user turn.

        `indices` (default 0, 1, ...) names the conversations to the random numbers, so that a part
        of a list gets the answers that the whole list would get. Under several ranks all must call
        with the same arguments; each does a share, all return everything, and the samples are those
        of one rank. UserError for a conversation that leaves no room for an answer.
        """
        sampling = self._stopping(sampling)
        ids = [encode_prompt(self.tokenizer, messages) for messages in prompts]
        # before the ranks part: an error on one alone would leave the others waiting
        self.engine.check(ids)
        mine = self.ranks.share(range(len(ids)))
        names = mine if indices is None else self.ranks.share(indices)
        completions = self.ranks.unshare(
            self.engine.generate([ids[index] for index in mine], sampling, names)
        )

        return [[Answer(self._text(each, sampling), each) for each in row] for row in completions]

    def reply_stream(self, messages: Messages, sampling: Sampling) -> Iterator[str]:
        """The first answer of `answers([messages], sampling)`, in parts, each given out once it is
        certain."""
        sampling = self._stopping(sampling)
        ids = self.engine.stream(encode_prompt(self.tokenizer, messages), sampling)
        return _stripped(
            self.tokenizer.stream(takewhile(lambda token: token not in sampling.stop, ids))
        )

    def fits(self, messages: Messages) -> bool:
        """Whether a conversation leaves room for an answer."""
        try:
            self.engine.check([encode_prompt(self.tokenizer, messages)])
        except UserError:
            return False

        return True

    def _stopping(self, sampling: Sampling) -> Sampling:
        return replace(sampling, stop=tuple(dict.fromkeys((*sampling.stop, *self.tokenizer.stops))))

    def _text(self, completion: Completion, sampling: Sampling) -> str:
        tokens = completion.tokens[:-1] if completion.finish == "stop" else completion.tokens
        return self.tokenizer.decode(tokens).strip()


def _stripped(parts: Iterable[str]) -> Iterator[str]:
    """`"".join(parts).strip()` in non-empty parts: white space waits until something follows it."""
    begun, waiting = False, ""
    for part in parts:
        text = waiting + part if begun else part.lstrip()
        kept = text.rstrip()
        waiting = text[len(kept) :]

        if kept:
            begun = True
            yield kept
