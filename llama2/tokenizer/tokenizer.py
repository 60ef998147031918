"""SentencePiece behind one small class (§2.2): text to ids that are never control ids, and ids to
text.

The file is Meta's `tokenizer.model`, or one trained by `train`. BOS and EOS are added by callers as
ids and by nobody as text: "</s>" in a document or a prompt is five characters like any others.
"""

from __future__ import annotations

import codecs
import copy
import functools
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from llama2 import atomic
from llama2.errors import UserError, explain_os_errors
from llama2.tokenizer import chat_settings, foreign, huggingface, sentencepiece_model
from llama2.tokenizer.foreign import say_once
from llama2.tokenizer.sentencepiece_model import SPACE, StoredTokenizer
from llama2.tokenizer.template import CHAT_TEMPLATE, is_llama_2

FILE = foreign.MODEL
UNKNOWN, BOS, EOS = 0, 1, 2
SPECIAL = huggingface.Special(UNKNOWN, BOS, EOS)
_PART = 4000
_BETWEEN_WORDS = re.compile("(?<=[!-~]) (?=[A-Za-z])")


class Tokenizer:
    """A SentencePiece BPE model with byte fallback, whose ids 0, 1, 2 are unknown, BOS and EOS.

    `model` is the content of a tokenizer.model file; `source` names it in errors. `eos` ends what
    is written for training; `stops` are all ids that end an answer of the model to which it
    belongs, `eos` first. `template` is that model's chat template, which `save` writes beside the
    tokenizer; None: it has none.
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
        self.told_eos = EOS
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._bytes = [self._bytes_of(piece) for piece in range(self.vocab_size)]
        self.controls = self._controls()
        """items that no text spells, name -> id: BOS, EOS, and whatever else was added; padding is
        not among them"""

    @classmethod
    def load(
        cls, place: str | os.PathLike[str] | StoredTokenizer, size: int | None = None
    ) -> Tokenizer:
        """From a tokenizer.model or tokenizer.json, or from the directory that holds one (a
        checkpoint is such a directory), or from inside another file.

        Of a directory that holds both, tokenizer.model is taken; if the other gives other ids, it
        is said on stderr. With it come the ends of answers and the chat template that the directory
        names. `size` is the vocabulary of the model that it is for: added tokens beyond it are left
        out, aloud.
        """
        if isinstance(place, StoredTokenizer):
            return cls(place.make(), place.place)

        path = Path(place)
        if not path.is_dir():
            held = foreign.of_json(path, size) if path.suffix == ".json" and path.exists() else path
            return cls(sentencepiece_model.content(held), str(held))

        found = foreign.find(path, size)
        if found is None:
            raise UserError(
                f"{path / FILE}: no such file or directory, and no {huggingface.JSON} either",
                "check the path",
            )

        tokenizer = cls(sentencepiece_model.content(found), str(found))
        if said := tokenizer.disagreement(path):
            say_once(
                f"{said}; {FILE} is used here, and transformers uses the other: remove the one that is wrong"
            )

        ends = [
            token for token in chat_settings.stop_ids(path) if 0 <= token < tokenizer.vocab_size
        ]
        tokenizer.stops = tuple(dict.fromkeys((*tokenizer.stops, *ends)))
        return tokenizer.speaking(chat_settings.chat_template(path), ends)

    def speaking(self, template: str | None, ends: Sequence[int] = ()) -> Tokenizer:
        """The same tokenizer, beside a model with another chat template, whose answers end at one
        of the ids `ends`.

        The first of them is what other programs are told is EOS, if no text spells it; Llama 2's
        format has its own.
        """
        other = copy.copy(self)
        other.template = template
        first = (
            ()
            if is_llama_2(template)
            else (token for token in ends[:1] if token in self.controls.values())
        )
        other.told_eos = next(iter(first), EOS)

        return other

    def check(self, place: str | os.PathLike[str], vocab_size: int, bos: int) -> None:
        """UserError unless it is the tokenizer of a model with so many embeddings, which begins
        texts with `bos`."""
        if self.vocab_size != vocab_size:
            padded = ", or import the model, which pads it" if self.vocab_size < vocab_size else ""
            raise UserError(
                f"{place}: the tokenizer has {self.vocab_size} pieces, the model {vocab_size}",
                f"put the tokenizer there with which the model was trained{padded}",
            )

        self.check_bos(place, bos)

    def check_bos(self, place: str | os.PathLike[str], bos: int) -> None:
        """UserError unless the id that begins a text is the one that its model names."""
        if bos != self.bos:
            raise UserError(
                f"{place}: the model's bos_token_id is {bos}, the tokenizer's is {self.bos}",
                f"if the model was trained with this tokenizer, set bos_token_id to {self.bos}",
            )

    @property
    def pad(self) -> int:
        """The id that fills padded places. The vocabulary has no padding item; no mask ever lets
        this one be seen."""
        return UNKNOWN

    def same(self, other: Tokenizer) -> bool:
        """Whether it is the other one: the same file, or one that was built again from the same
        items."""
        if self.fingerprint == other.fingerprint:
            return True

        ours, theirs = (_vocabulary(one.model) for one in (self, other))
        return ours == theirs and not ours.normalised  # the table of replacements may be another

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without BOS and EOS. Never a control id, whatever the text spells.

        Other threads get their turn between the parts of a long text (see `_cut`).
        """
        return [token for part in _cut(text) for token in self.encode_many([part])[0]]

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """`encode` of each text, on several threads. Long texts go in parts, with the same ids (see
        `_cut`).

        UserError for a text with half of a surrogate pair, which is no character.
        """
        parts = [_cut(text) for text in texts]
        try:
            encoded = iter(
                self._processor.encode([part for cut in parts for part in cut], num_threads=threads)
            )
        except (TypeError, UnicodeEncodeError):
            _refuse_halves(texts)
            raise

        return [
            [token for _ in cut for token in next(encoded)] if len(cut) > 1 else next(encoded)
            for cut in parts
        ]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`. Control ids are silent, and bytes that are not UTF-8 become U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """The text of `ids` as it becomes certain: one part an id, empty while a character lacks
        bytes.

        The parts add up to `decode(ids)`, so a chat may print them as they come.
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
        """What a token adds to a text: part of a character, if it is a byte item; nothing for a
        control id."""
        return self._bytes[token]

    def name_of(self, token: int) -> str:
        """What the vocabulary calls a token: "</s>" for EOS."""
        name: str = self._processor.id_to_piece(token)
        return name

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write tokenizer.model and the files with which transformers, vLLM and llama.cpp read it.

        Where transformers will give other ids than `encode`, for some texts, it is said on stderr,
        once.
        """
        directory = Path(directory)
        files = {
            huggingface.JSON: _fast(self.model),
            **huggingface.settings(
                _vocabulary(self.model), SPECIAL._replace(eos=self.told_eos), self.template
            ),
        }
        with explain_os_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
            _replace(directory / FILE, self.model)
            for name, content in files.items():
                _replace(directory / name, content)

        for note in self.unlike_transformers():
            say_once(f"note: {note}")

    def unlike_transformers(self) -> tuple[str, ...]:
        """In sentences, where transformers gives other ids; empty for a tokenizer such as Llama
        2's."""
        return _unlike(self.model)

    def disagreement(self, directory: Path) -> str | None:
        """In words, where the tokenizer.json in the directory of this tokenizer.model gives other
        ids; else None."""
        file = directory / huggingface.JSON
        if not file.exists() or not (directory / FILE).exists():
            return None

        with explain_os_errors(file):
            content = file.read_bytes()

        if content == _fast(self.model):
            return None

        found = foreign.disagreement(directory, _vocabulary(self.model), self._processor)
        return f"{file} is not the tokenizer of the {FILE} beside it ({found})" if found else None

    def _controls(self) -> dict[str, int]:
        names = {
            token: self._processor.id_to_piece(token)
            for token in range(self.vocab_size)
            if self._processor.is_control(token)
        }
        return {
            name: token
            for token, name in names.items()
            if name != sentencepiece_model.padding(token).text
        }

    def _bytes_of(self, token: int) -> bytes:
        piece: str = self._processor.id_to_piece(token)
        if self._processor.is_control(token):
            return b""
        if self._processor.is_byte(token):
            return bytes([int(piece[3:5], 16)])  # "<0x41>"
        if self._processor.is_unknown(token):
            return " \u2047 ".encode()

        return piece.replace(SPACE, " ").encode()


@functools.lru_cache(maxsize=4)
def _vocabulary(model: bytes) -> sentencepiece_model.Vocabulary:
    return sentencepiece_model.parse(model, FILE)


@functools.lru_cache(maxsize=4)
def _fast(model: bytes) -> bytes:
    return huggingface.fast(_vocabulary(model), SPECIAL)


@functools.lru_cache(maxsize=4)
def _unlike(model: bytes) -> tuple[str, ...]:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    return tuple(huggingface.unlike(_vocabulary(model), processor.encode))


def _refuse_halves(texts: Sequence[str]) -> None:
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the text {text[:40]!r} holds half of a surrogate pair at character {error.start + 1}",
                "leave it out, or write U+FFFD in its place",
            ) from None


def _cut(text: str) -> list[str]:
    """A text in parts of about 4,000 characters whose ids, one after another, are those of the
    text.

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
    """Refuse models on which the guarantees of `encode` and of the chat template would not hold."""
    cure = "use Llama 2's tokenizer.model or one made by 'llama2 tokenizer' (import has --tokenizer FILE)"
    found = (processor.unk_id(), processor.bos_id(), processor.eos_id())
    if found != (UNKNOWN, BOS, EOS):
        raise UserError(
            f"{source}: unknown, BOS and EOS have ids {found}, expected {(UNKNOWN, BOS, EOS)}", cure
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
                f"{source}: the item {piece!r} runs across a space, so answers cannot be told from prompts",
                cure,
            )
        if not float(processor.get_score(token)).is_integer():
            raise UserError(
                f"{source}: not a BPE model (item {piece!r} has a probability for a merge rank)",
                cure,
            )


def _replace(path: Path, content: bytes) -> None:
    atomic.write_atomic(path, content)
