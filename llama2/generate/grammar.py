"""Grammars of JSON: the tokens that may come next, so that the text always parses and validates.

The work is done by llguidance, which walks the vocabulary with a parser; this module gives it our
vocabulary as bytes and asks it for masks. Three things are settled here. SentencePiece puts a space
in front of a first word, so a text may begin with one space, which JSON allows (byte-level
tokenizers put none). Between values there may be one space, or a new line and an indentation: a
model that loves white space must not fill its answer with it. And behind the last bracket there is
nothing but the end of an answer. Where only one text can follow, such as the name of a key, its
pieces are those that the tokenizer would choose.

Shapes: V vocabulary.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama2.errors import UserError, explain_missing_extra
from llama2.tokenizer.template import find_ends
from llama2.tokenizer.tokenizer import Tokenizer

_WHITE_SPACE = r"( |\n {0,16})?"
_OBJECT = {"type": "object"}


class JsonGrammar:
    """The tokens that may follow in one text. It remembers the text, so each sample has a copy of
    its own (`fresh`).

    `end` is the id that ends an answer. `schema` is the JSON Schema it was made of, None for any
    object.
    """

    def __init__(
        self, matcher: Any, vocab_size: int, end: int, schema: dict[str, Any] | None = None
    ) -> None:
        self._start, self._matcher = matcher, matcher.deep_copy()
        self._vocab_size, self._end = vocab_size, end
        self._ended = False
        self.schema = schema

    def fresh(self) -> JsonGrammar:
        """Return the same grammar before the first token."""
        return JsonGrammar(self._start, self._vocab_size, self._end, self.schema)

    @property
    def done(self) -> bool:
        """The text is complete: nothing but its end may follow."""
        return self._ended or bool(self._matcher.is_stopped())

    def mask(self) -> Tensor:
        """Return mask_V: True for every token that may come next, the end among them when the text
        may end here."""
        if self.done:
            mask_V = torch.zeros(self._vocab_size, dtype=torch.bool)
            mask_V[self._end] = True
            return mask_V

        packed = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        allowed_V = np.unpackbits(packed, count=self._vocab_size, bitorder="little")

        return torch.from_numpy(allowed_V).bool()

    def accept(self, token: int) -> None:
        """Add `token` to the text. ValueError for one that cannot come next."""
        if token == self._end and (self.done or self._matcher.is_accepting()):
            self._ended = True
        elif self._ended or not self._matcher.validate_tokens([token]):
            raise ValueError(f"token {token} cannot come next in this grammar")
        else:
            self._matcher.consume_token(token)
            self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            reason = _first_line(self._matcher.get_error())
            raise UserError(
                f"the schema cannot be followed any further ({reason})",
                "simplify it: patterns and limits of length cost most",
            )


def json_grammar(tokenizer: Tokenizer, schema: dict[str, Any] | None = None) -> JsonGrammar:
    """Return the grammar of JSON texts that validate against `schema` (JSON Schema), or of any JSON
    object.

    UserError names what is wrong with a schema, or which of its keys cannot be enforced while
    sampling.
    """
    # At the top, so that nothing inside of the schema can turn it off.
    document = {
        **(_OBJECT if schema is None else schema),
        "x-guidance": {"whitespace_pattern": _WHITE_SPACE},
    }
    try:
        text = json.dumps(document, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise _schema_error(str(error)) from None

    end = find_ends(tokenizer)[0]
    return JsonGrammar(_compile(tokenizer, text), tokenizer.vocab_size, end, schema)


@lru_cache(maxsize=64)
def _compile(tokenizer: Tokenizer, schema: str) -> Any:
    """Return llguidance's matcher before the first token."""
    library = _import_llguidance()
    vocabulary = _vocabulary(tokenizer)
    alone = library.LLMatcher.grammar_from_json_schema(schema)
    is_wrong, messages = library.LLMatcher.validate_grammar_with_warnings(alone, vocabulary)
    if is_wrong:
        raise _schema_error(messages[0])

    lark = library.LLMatcher.grammar_from_lark(
        f"start: lead value\nlead: / ?/\nvalue: %json {schema}"
    )
    matcher = library.LLMatcher(vocabulary, lark, log_level=0)
    if matcher.is_error():
        raise _schema_error(matcher.get_error())

    return matcher


@dataclass(frozen=True)
class _Vocabulary:
    """A vocabulary in the form that llguidance asks for; calling it encodes a text."""

    tokenizer: Tokenizer
    tokens: list[bytes]

    @property
    def eos_token_id(self) -> int:
        return find_ends(self.tokenizer)[0]

    @property
    def bos_token_id(self) -> int:
        return self.tokenizer.bos

    @property
    def special_token_ids(self) -> tuple[int, ...]:
        unknown = self.tokenizer.codec.unknown
        known = () if unknown is None else (unknown,)
        controls = self.tokenizer.controls.values()
        return tuple(dict.fromkeys((*known, self.tokenizer.bos, *self.tokenizer.stops, *controls)))

    def __call__(self, text: str) -> list[int]:
        """Return the ids of `text` inside of another text: what must come next is allowed only in
        these pieces.

        `encode` of SentencePiece would put a space in front. No item of it runs across a line, so
        the ids behind a new line are those wanted.
        """
        if not self.tokenizer.dummy_prefix and isinstance(text, str):
            return self.tokenizer.encode(text)

        # a TypeError for bytes tells llguidance that we want text
        ids = self.tokenizer.encode("\n" + text)
        return ids[len(self.tokenizer.encode("\n")) :]


@lru_cache(maxsize=8)
def _vocabulary(tokenizer: Tokenizer) -> Any:
    """Return llguidance's own form of the vocabulary, a tree of bytes."""
    library = _import_llguidance()
    vocabulary = _Vocabulary(
        tokenizer, [tokenizer.bytes_of(token) for token in range(tokenizer.vocab_size)]
    )
    return library.LLTokenizer(library.TokenizerWrapper(vocabulary))


def _import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError:
        raise explain_missing_extra("llguidance", "serve") from None

    return llguidance


def _schema_error(message: str) -> UserError:
    return UserError(
        f"the JSON schema cannot be used: {_first_line(message)}", "correct or simplify the schema"
    )


def _first_line(message: str) -> str:
    """Return a message without the library's own state, which it appends."""
    return " ".join(message.partition("<state>")[0].split())[:300]
