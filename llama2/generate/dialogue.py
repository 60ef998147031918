"""Conversations in, answers out: the chat template and the tokenizer around an engine (§3.3, A.7).

No system prompt is added: a safety prompt by default makes a model refuse harmless requests, so
whoever wants one writes it as the system turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

from llama2.generate.generator import Completion, Generator
from llama2.generate.sampling import Sampling
from llama2.ranks import Ranks
from llama2.records import Messages
from llama2.tokenizer.template import encode_begun, encode_prompt, find_ends
from llama2.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Answer:
    """The text of a completion, without its stop id and stripped, and the completion itself."""

    text: str
    completion: Completion


class Chat:
    """Answers conversations with `engine`, shared between `ranks` (this process if not given).

    An answer ends where the model ends answers (`template.find_ends`), and at the stop ids of the
    sampling.
    """

    def __init__(self, engine: Generator, tokenizer: Tokenizer, ranks: Ranks | None = None) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.ranks = ranks or Ranks.alone()
        self.ends = find_ends(tokenizer)

    def answer(
        self, prompts: Sequence[Messages], sampling: Sampling, indices: Sequence[int] | None = None
    ) -> list[list[Answer]]:
        """Return `sampling.n` answers to each conversation, which ends with a user turn; or what
        follows the beginning of an answer, if it ends with that.

        `indices` (default 0, 1, ...) names the conversations to the random numbers, so that a part
        of a list gets the answers that the whole list would get. Under several ranks all must call
        with the same arguments; each does a share, all return everything, and the samples are those
        of one rank. UserError for a conversation that leaves no room for an answer.
        """
        sampling = self._add_stops(sampling)
        ids = [_encode(self.tokenizer, messages) for messages in prompts]
        # before the ranks part: an error on one alone would leave the others waiting
        self.engine.check(ids)
        share = self.ranks.share(range(len(ids)))
        names = share if indices is None else self.ranks.share(indices)
        completions = self.ranks.unshare(
            self.engine.generate([ids[index] for index in share], sampling, names)
        )

        return [list(map(self._read, row)) for row in completions]

    def stream(self, messages: Messages, sampling: Sampling) -> Iterator[str]:
        """Yield the first answer of `answer([messages], sampling)` in parts, each once it is
        certain."""
        sampling = self._add_stops(sampling)
        ids = self.engine.stream(_encode(self.tokenizer, messages), sampling)
        text_ids = takewhile(lambda token: token not in sampling.stop, ids)
        return _strip(self.tokenizer.stream(text_ids))

    def has_room(self, messages: Messages, room: int = 8) -> bool:
        """Return whether a conversation leaves `room` tokens of the context for an answer."""
        return len(_encode(self.tokenizer, messages)) + room <= self.engine.context

    def _add_stops(self, sampling: Sampling) -> Sampling:
        return replace(sampling, stop=tuple(dict.fromkeys((*sampling.stop, *self.ends))))

    def _read(self, completion: Completion) -> Answer:
        tokens = completion.tokens[:-1] if completion.finish == "stop" else completion.tokens
        return Answer(self.tokenizer.decode(tokens).strip(), completion)


def _encode(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Return the ids of a conversation that waits for an answer, or for the rest of one."""
    is_begun = messages[-1].role == "assistant"
    return (encode_begun if is_begun else encode_prompt)(tokenizer, messages)


def _strip(parts: Iterable[str]) -> Iterator[str]:
    """Yield `"".join(parts).strip()` in non-empty parts: white space waits until text follows
    it."""
    text = ""
    begun = False
    for part in parts:
        text += part if begun else part.lstrip()
        if certain := text.rstrip():
            begun = True
            yield certain

        text = text[len(certain) :]
