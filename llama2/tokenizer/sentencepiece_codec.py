"""Encode and decode with SentencePiece BPE (§2.2): the engine of Llama 2's own tokenizer.

The file is Meta's `tokenizer.model`, or one trained by `train`.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path

import sentencepiece

from llama2.errors import UserError, explain_os_errors
from llama2.hashing import hash_content
from llama2.tokenizer import (
    chat_settings,
    comparison,
    sentencepiece_model,
    tokenizer_json,
)
from llama2.tokenizer.codec import Codec, is_tag, refuse_halves
from llama2.tokenizer.directory import dump_settings
from llama2.tokenizer.sentencepiece_model import (
    BOS_ID,
    CONTROL,
    EOS_ID,
    SPACE,
    UNKNOWN_ID,
    USER_DEFINED,
)

FILE = chat_settings.MODEL
UNKNOWN, BOS, EOS = UNKNOWN_ID, BOS_ID, EOS_ID
_PART = 4000
_BETWEEN_WORDS = re.compile("(?<=[!-~]) (?=[A-Za-z])")


class SentencePieceCodec:
    """A SentencePiece BPE model with byte fallback, whose ids 0, 1, 2 are unknown, BOS and EOS.

    `model` is the content of a tokenizer.model file; `source` names it in errors.
    """

    is_byte_level = False
    bos, eos = BOS, EOS
    unknown: int | None = UNKNOWN
    ends: tuple[int, ...] = ()
    has_bos = adds_bos = dummy_prefix = True

    def __init__(self, model: bytes, source: str = FILE) -> None:
        self.model = model
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(
                f"{source}: not a SentencePiece model, or a damaged one", "copy the file again"
            ) from error

        _check(self.processor, source)
        self.vocab_size: int = self.processor.vocab_size()
        self.fingerprint = hash_content(model)
        self.controls = self._list_controls()
        self._tags: list[int] = []  # items that a template's tags made controls
        self._bytes = [self._find_bytes(token) for token in range(self.vocab_size)]

    def with_template(self, template: str | None) -> SentencePieceCodec:
        """Return the same codec, in which no text spells a tag that a template writes.

        The tags of Llama 2's format are text. Those of others may be items that are looked for.
        """
        vocabulary = _parse(self.model)
        if vocabulary.normalised:
            return self  # cannot be built again; no such model is known

        tags = [
            token
            for token, item in enumerate(vocabulary.items)
            if item.kind == USER_DEFINED and is_tag(item.text) and item.text in (template or "")
        ]
        if tags == self._tags:
            return self

        items = list(vocabulary.items)
        for token in tags:
            items[token] = replace(items[token], kind=CONTROL)

        other = SentencePieceCodec(sentencepiece_model.build(replace(vocabulary, items=items)))
        other.model, other.fingerprint, other._tags = self.model, self.fingerprint, tags
        for token in tags:  # they are shown, as by the other engine
            other._bytes[token] = items[token].text.encode()

        return other

    def pad(self, size: int) -> SentencePieceCodec:
        """Return the same codec with items, which no text spells, up to `size`."""
        return SentencePieceCodec(sentencepiece_model.pad(self.model, self.vocab_size, size))

    def is_same(self, other: Codec) -> bool:
        """Return whether both are the same file, or built of the same items."""
        if self.fingerprint == other.fingerprint:
            return True
        if not isinstance(other, SentencePieceCodec):
            return False

        ours, theirs = _parse(self.model), _parse(other.model)
        return ours == theirs and not ours.normalised  # the table of replacements may differ

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text.

        Other threads get their turn between the parts of a long text (see `_cut`).
        """
        return [token for part in _cut(text) for token in self.encode_many([part])[0]]

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Encode several texts, on several threads; long ones in parts (see `_cut`)."""
        parts = [_cut(text) for text in texts]
        flat = [part for cut in parts for part in cut]
        try:
            encoded = iter(self.processor.encode(flat, num_threads=threads))
        except (TypeError, UnicodeEncodeError):
            refuse_halves(texts)
            raise

        return [list(chain.from_iterable(islice(encoded, len(cut)))) for cut in parts]

    def bytes_of(self, token: int) -> bytes:
        """Return what a token adds to a text: nothing for a control id."""
        return self._bytes[token]

    def name_of(self, token: int) -> str:
        """Return the name of a token in the vocabulary."""
        return str(self.processor.id_to_piece(token))

    def dump_files(
        self, eos: int, template: str | None, space_once: bool = False
    ) -> Mapping[str, bytes]:
        """Return tokenizer.model and the files with which other programs read it."""
        return {
            FILE: self.model,
            chat_settings.JSON: _dump_json(self.model, space_once),
            **dump_settings(_parse(self.model), eos, template, space_once),
        }

    def describe_differences(self) -> tuple[str, ...]:
        """List, in sentences, where transformers gives other ids; () for one such as Llama 2's."""
        return _describe_differences(self.model)

    def describe_disagreement(self, directory: Path) -> str | None:
        """Describe where the tokenizer.json in the directory of this tokenizer.model differs.

        None if it gives the same ids, or one of the files is not there.
        """
        file = directory / chat_settings.JSON
        if not file.exists() or not (directory / FILE).exists():
            return None

        with explain_os_errors(file):
            content = file.read_bytes()

        if content == _dump_json(self.model):
            return None

        difference = tokenizer_json.describe_disagreement(
            file, _parse(self.model), self.processor.encode
        )
        return difference and f"{file} is not the tokenizer of the {FILE} beside it ({difference})"

    def _list_controls(self) -> dict[str, int]:
        tokens = filter(self.processor.is_control, range(self.vocab_size))
        return {
            self.name_of(token): token
            for token in tokens
            if self.name_of(token) != sentencepiece_model.make_padding(token).text
        }

    def _find_bytes(self, token: int) -> bytes:
        piece = self.name_of(token)
        if self.processor.is_control(token):
            return b""
        if self.processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # "<0x41>"
        if self.processor.is_unknown(token):
            return " \u2047 ".encode()

        return piece.replace(SPACE, " ").encode()


@functools.lru_cache(maxsize=4)
def _parse(model: bytes) -> sentencepiece_model.Vocabulary:
    return sentencepiece_model.parse(model, FILE)


@functools.lru_cache(maxsize=4)
def _dump_json(model: bytes, space_once: bool = False) -> bytes:
    return tokenizer_json.dump(_parse(model), space_once)


@functools.lru_cache(maxsize=4)
def _describe_differences(model: bytes) -> tuple[str, ...]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return tuple(comparison.describe_differences(_parse(model), processor.encode))


def _cut(text: str) -> list[str]:
    """Cut a text into parts of about 4,000 characters whose ids, joined, are those of the text.

    SentencePiece takes three times as long for a book in one piece. A cut takes one space between
    two words away, and the space that SentencePiece puts in front of each part is that space again;
    as no item runs across a space (`_check`), no merge is lost.
    """
    parts: list[str] = []
    start = 0
    while len(text) - start > 2 * _PART and (space := _BETWEEN_WORDS.search(text, start + _PART)):
        parts.append(text[start : space.start()])
        start = space.end()

    return [*parts, text[start:]]


def _check(processor: sentencepiece.SentencePieceProcessor, source: str) -> None:
    """UserError for a model that breaks what `encode` and the chat template rely on."""
    cure = (
        "use Llama 2's tokenizer.model or one made by 'llama2 tokenizer' (import has --tokenizer "
        "FILE)"
    )
    ids = (processor.unk_id(), processor.bos_id(), processor.eos_id())
    if ids != (UNKNOWN, BOS, EOS):
        raise UserError(
            f"{source}: unknown, BOS and EOS have ids {ids}, expected {(UNKNOWN, BOS, EOS)}", cure
        )
    if not processor.is_control(BOS) or not processor.is_control(EOS):
        raise UserError(
            f"{source}: BOS and EOS are ordinary vocabulary items, so a user could type them", cure
        )

    size = processor.vocab_size()
    if sum(processor.is_byte(token) for token in range(size)) != 256:
        raise UserError(f"{source}: no byte fallback, so unknown characters would be lost", cure)
    if not processor.encode("a", out_type=str)[0].startswith(SPACE):
        raise UserError(f"{source}: it puts no space in front of a text (add_dummy_prefix)", cure)

    for token in range(size):
        if processor.is_control(token) or processor.is_byte(token) or processor.is_unknown(token):
            continue

        piece = processor.id_to_piece(token)
        if SPACE in piece.lstrip(SPACE):
            raise UserError(
                f"{source}: the item {piece!r} runs across a space, so answers cannot be told "
                "from prompts",
                cure,
            )
        if not float(processor.get_score(token)).is_integer():
            raise UserError(
                f"{source}: not a BPE model (item {piece!r} has a probability for a merge rank)",
                cure,
            )
