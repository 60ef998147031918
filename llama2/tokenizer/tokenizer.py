"""SentencePiece as one small class (§2.2): text to ids that are never control ids, ids to text.

The file is Meta's `tokenizer.model`, or one trained by `train`. Callers add BOS and EOS as ids, and
no text spells them: "</s>" in a document or a prompt is five characters like any others.
"""

from __future__ import annotations

import codecs
import copy
import functools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path

import sentencepiece

from llama2 import atomic
from llama2.errors import UserError, explain_os_errors
from llama2.hashing import hash_content
from llama2.terminal_text import say_once
from llama2.tokenizer import (
    chat_settings,
    comparison,
    sentencepiece_model,
    tokenizer_json,
)
from llama2.tokenizer.directory import dump_settings, find_tokenizer
from llama2.tokenizer.sentencepiece_model import (
    BOS_ID,
    EOS_ID,
    SPACE,
    UNKNOWN_ID,
    StoredTokenizer,
    require_fitting_size,
)
from llama2.tokenizer.template import CHAT_TEMPLATE, is_llama_2

FILE = chat_settings.MODEL
UNKNOWN, BOS, EOS = UNKNOWN_ID, BOS_ID, EOS_ID
_PART = 4000
_BETWEEN_WORDS = re.compile("(?<=[!-~]) (?=[A-Za-z])")


class Tokenizer:
    """A SentencePiece BPE model with byte fallback, whose ids 0, 1, 2 are unknown, BOS and EOS.

    `model` is the content of a tokenizer.model file; `source` names it in errors. `eos` ends what
    is written for training; `stops` are all ids that end an answer of the model to which it
    belongs, `eos` first. `template` is that model's chat template, which `save` writes beside the
    tokenizer; None if it has none. `controls` are the items that no text spells, name -> id: BOS,
    EOS and whatever was added, without padding.
    """

    def __init__(self, model: bytes, source: str = FILE) -> None:
        self.model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(
                f"{source}: not a SentencePiece model, or a damaged one", "copy the file again"
            ) from error

        _check(self._processor, source)
        self.vocab_size: int = self._processor.vocab_size()
        self.bos, self.eos = BOS, EOS
        self.stops: tuple[int, ...] = (EOS,)
        self.template: str | None = CHAT_TEMPLATE
        self.announced_eos = EOS
        self.fingerprint = hash_content(model)
        self._bytes = [self._find_bytes(token) for token in range(self.vocab_size)]
        self.controls = self._list_controls()

    @classmethod
    def load(
        cls, place: str | os.PathLike[str] | StoredTokenizer, vocab_size: int | None = None
    ) -> Tokenizer:
        """Load a tokenizer.model or tokenizer.json, a directory that holds one, or a stored one.

        Of a directory that holds both, tokenizer.model is taken; if the other gives other ids, a
        line on stderr says so. The ends of answers and the chat template come from the directory
        as well. `vocab_size` is the model's: added tokens beyond it are left out, with a line on
        stderr. UserError for a place without a tokenizer, and one that cannot be used.
        """
        if isinstance(place, StoredTokenizer):
            return cls(place.read(), place.place)

        path = Path(place)
        if path.is_dir():
            return cls._load_directory(path, vocab_size)
        if path.suffix == ".json" and path.exists():
            return cls.load(tokenizer_json.open_as_model(path, vocab_size))

        return cls(sentencepiece_model.read_model(path), str(path))

    @classmethod
    def _load_directory(cls, path: Path, vocab_size: int | None) -> Tokenizer:
        stored = find_tokenizer(path, vocab_size)
        if stored is None:
            raise UserError(
                f"{path / FILE}: no such file or directory, and no {chat_settings.JSON} either",
                "check the path",
            )

        tokenizer = cls.load(stored)
        if disagreement := tokenizer.describe_disagreement(path):
            say_once(
                f"{disagreement}; {FILE} is used here, and transformers uses the other: remove the "
                "one that is wrong"
            )

        stops = chat_settings.read_stop_ids(path)
        ends = [token for token in stops if 0 <= token < tokenizer.vocab_size]
        tokenizer.stops = tuple(dict.fromkeys((*tokenizer.stops, *ends)))
        return tokenizer.with_chat_template(chat_settings.read_chat_template(path), ends)

    def with_chat_template(self, template: str | None, ends: Sequence[int] = ()) -> Tokenizer:
        """Return the same tokenizer for a model with another chat template.

        Answers of the model end at one of the ids `ends`. Other programs are told that the first is
        EOS, if no text spells it; Llama 2's format has its own.
        """
        other = copy.copy(self)
        other.template = template
        other.announced_eos = EOS
        if ends and ends[0] in self.controls.values() and not is_llama_2(template):
            other.announced_eos = ends[0]

        return other

    def require_fit(self, place: str | os.PathLike[str], vocab_size: int, bos: int | None) -> None:
        """UserError unless it has an item for each embedding of a model, and its id of BOS."""
        cure = "put the tokenizer there with which the model was trained"
        if self.vocab_size < vocab_size:
            cure += ", or import the model, which pads it"

        require_fitting_size(place, self.vocab_size, vocab_size, cure)
        self.require_bos(place, bos)

    def require_bos(self, place: str | os.PathLike[str], bos: int | None) -> None:
        """UserError unless the id that begins a text is the one that its model names, if it names
        one."""
        if bos is not None and bos != self.bos:
            raise UserError(
                f"{place}: the model's bos_token_id is {bos}, the tokenizer's is {self.bos}",
                f"if the model was trained with this tokenizer, set bos_token_id to {self.bos}",
            )

    def is_same(self, other: Tokenizer) -> bool:
        """Return whether two tokenizers are the same file, or built of the same items."""
        if self.fingerprint == other.fingerprint:
            return True

        ours, theirs = _parse(self.model), _parse(other.model)
        return ours == theirs and not ours.normalised  # the table of replacements may differ

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS and EOS; never a control id, whatever it spells.

        Other threads get their turn between the parts of a long text (see `_cut`).
        """
        return [token for part in _cut(text) for token in self.encode_many([part])[0]]

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Encode several texts, on several threads; long ones in parts (see `_cut`).

        UserError for a text with half of a surrogate pair, which is no character.
        """
        parts = [_cut(text) for text in texts]
        flat = [part for cut in parts for part in cut]
        try:
            encoded = iter(self._processor.encode(flat, num_threads=threads))
        except (TypeError, UnicodeEncodeError):
            _refuse_halves(texts)
            raise

        return [list(chain.from_iterable(islice(encoded, len(cut)))) for cut in parts]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; control ids are silent, bytes that are not UTF-8 are U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of `ids` as it becomes certain: one part an id, and one at the end.

        A part is empty while a character lacks bytes. The parts add up to `decode(ids)`.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        start = True
        for token in ids:
            part = self._bytes[token]
            if start and part:
                part, start = part.removeprefix(b" "), False  # the space that encode puts in front

            yield decoder.decode(part)

        yield decoder.decode(b"", final=True)

    def bytes_of(self, token: int) -> bytes:
        """Return what a token adds to a text.

        It may be a part of a character, for a byte item, and is empty for a control id.
        """
        return self._bytes[token]

    def name_of(self, token: int) -> str:
        """Return the name of a token in the vocabulary: "</s>" for EOS."""
        return str(self._processor.id_to_piece(token))

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.model and the files with which transformers, vLLM and llama.cpp read it.

        A line on stderr says, once, where transformers will give other ids than `encode`.
        """
        path = Path(directory)
        files = {
            FILE: self.model,
            chat_settings.JSON: _dump_json(self.model),
            **dump_settings(_parse(self.model), self.announced_eos, self.template),
        }
        with explain_os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                atomic.write_atomic(path / name, content)

        for note in self.describe_differences():
            say_once(f"note: {note}")

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
            file, _parse(self.model), self._processor.encode
        )
        return difference and f"{file} is not the tokenizer of the {FILE} beside it ({difference})"

    def _list_controls(self) -> dict[str, int]:
        tokens = filter(self._processor.is_control, range(self.vocab_size))
        return {
            self.name_of(token): token
            for token in tokens
            if self.name_of(token) != sentencepiece_model.make_padding(token).text
        }

    def _find_bytes(self, token: int) -> bytes:
        piece = self.name_of(token)
        if self._processor.is_control(token):
            return b""
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # "<0x41>"
        if self._processor.is_unknown(token):
            return " \u2047 ".encode()

        return piece.replace(SPACE, " ").encode()


@functools.lru_cache(maxsize=4)
def _parse(model: bytes) -> sentencepiece_model.Vocabulary:
    return sentencepiece_model.parse(model, FILE)


@functools.lru_cache(maxsize=4)
def _dump_json(model: bytes) -> bytes:
    return tokenizer_json.dump(_parse(model))


@functools.lru_cache(maxsize=4)
def _describe_differences(model: bytes) -> tuple[str, ...]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return tuple(comparison.describe_differences(_parse(model), processor.encode))


def _refuse_halves(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text {text[:40]!r} holds half of a surrogate pair at character "
                f"{error.start + 1}",
                "leave it out, or write U+FFFD in its place",
            ) from None


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
