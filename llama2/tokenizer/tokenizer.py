"""Text to token ids that are never control ids, and ids to text, whatever the engine.

Llama 2's own tokenizer is SentencePiece (§2.2); Llama 3, SmolLM2, Qwen and others have byte-level
BPE. Callers add BOS and EOS as ids, and no text spells them: "</s>" in a document or a prompt is
five characters like any others.
"""

from __future__ import annotations

import codecs
import copy
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from llama2 import atomic
from llama2.errors import UserError, explain_os_errors
from llama2.terminal_text import say_once
from llama2.tokenizer import chat_settings, sentencepiece_model, tokenizer_json
from llama2.tokenizer.byte_level import ByteLevelCodec
from llama2.tokenizer.codec import Codec
from llama2.tokenizer.directory import find_tokenizer
from llama2.tokenizer.llama2_format import CHAT_TEMPLATE, is_llama_2
from llama2.tokenizer.sentencepiece_codec import BOS, EOS, FILE, UNKNOWN, SentencePieceCodec
from llama2.tokenizer.sentencepiece_model import require_fitting_size
from llama2.tokenizer.stored import ByteLevelModel, StoredTokenizer

__all__ = ["BOS", "EOS", "FILE", "UNKNOWN", "Tokenizer"]


class Tokenizer:
    """A vocabulary of one of two engines: SentencePiece BPE or byte-level BPE.

    `content` is that of a tokenizer.model file, or what makes a byte-level tokenizer; `source`
    names it in errors.

    `bos` begins a text, or is `eos` for a tokenizer that has none (`has_bos`); `adds_bos`: programs
    put it in front of a raw text. `eos` ends what is written for training; `stops` are all ids that
    end an answer of the model to which it belongs, `eos` first. `template` is that model's chat
    template, which `save` writes beside the tokenizer; None if it has none; `template_place` names
    where it stands. `controls` are the items that no text spells, name -> id: BOS, EOS and whatever
    was added, without padding. `dummy_prefix`: a space stands in front of what `encode` takes, and
    is none of the text; `space_once`: in a chat template that is not Llama 2's, of a whole
    conversation, not of each piece between control tokens. `fingerprint` is that of all that
    decides ids.
    """

    def __init__(self, content: bytes | ByteLevelModel, source: str = FILE) -> None:
        if isinstance(content, ByteLevelModel):
            self._use(ByteLevelCodec(content, source))
            self.template: str | None = None
        else:
            self._use(SentencePieceCodec(content, source))
            self.template = CHAT_TEMPLATE

        self.template_place, self.space_once = "", False
        self.bos, self.eos = self.codec.bos, self.codec.eos
        self.stops = tuple(dict.fromkeys((self.eos, *self.codec.ends)))
        self.announced_eos = self.eos

    def _use(self, codec: Codec) -> None:
        self.codec = codec
        self.vocab_size, self.controls = codec.vocab_size, dict(codec.controls)
        self.has_bos, self.adds_bos = codec.has_bos, codec.adds_bos
        self.dummy_prefix = codec.dummy_prefix
        self.is_byte_level, self.fingerprint = codec.is_byte_level, codec.fingerprint

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
            tokenizer, file = cls(place.read(), place.place), Path(place.place)
            if tokenizer.dummy_prefix and file.name in (FILE, chat_settings.JSON):
                tokenizer.space_once = chat_settings.puts_space_once(file.parent)

            return tokenizer

        path = Path(place)
        if path.is_dir():
            return cls._load_directory(path, vocab_size)
        if path.suffix == ".json" and path.exists():
            return cls.load(tokenizer_json.open_stored(path, vocab_size))

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
        template = chat_settings.read_chat_template(path)
        return tokenizer.with_chat_template(template, ends, chat_settings.name_template(path))

    def with_chat_template(
        self, template: str | None, ends: Sequence[int] = (), place: str = ""
    ) -> Tokenizer:
        """Return the same tokenizer for a model with another chat template; `place` names it.

        Answers of the model end at one of the ids `ends`. Other programs are told that the first is
        EOS, if no text spells it; Llama 2's format and byte-level tokenizers have their own.
        """
        other = copy.copy(self)
        other.template, other.template_place = template, place
        other.announced_eos = self.eos
        other._use(self.codec.with_template(template))
        if (
            ends
            and ends[0] in self.controls.values()
            and not (self.is_byte_level or is_llama_2(template))
        ):
            other.announced_eos = ends[0]

        return other

    def pad(self, size: int) -> Tokenizer:
        """Return the same tokenizer with an item, which no text spells, for each id below `size`.

        A model may have more embeddings than its tokenizer has items.
        """
        other = copy.copy(self)
        other._use(self.codec.pad(size))
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
        if bos is not None and self.adds_bos and bos != self.bos:
            raise UserError(
                f"{place}: the model's bos_token_id is {bos}, the tokenizer's is {self.bos}",
                f"if the model was trained with this tokenizer, set bos_token_id to {self.bos}",
            )

    def is_same(self, other: Tokenizer) -> bool:
        """Return whether two tokenizers are the same file, or built of the same items."""
        return self.codec.is_same(other.codec)

    @property
    def model(self) -> bytes:
        """The content of tokenizer.model. UserError for a byte-level tokenizer, which has none."""
        return sentencepiece_model.read_model(StoredTokenizer(FILE, lambda: self.codec.model))

    @property
    def document_start(self) -> int:
        """The id that begins a document in training: BOS, or EOS where texts have no BOS.

        Models without BOS were trained on documents with EOS between them.
        """
        return self.bos if self.adds_bos else self.eos

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without BOS and EOS; never a control id, whatever it spells.

        Other threads get their turn during a long text. UserError for half of a surrogate pair.
        """
        return self.codec.encode(text)

    def encode_raw(self, text: str) -> list[int]:
        """Return the ids of a text that is no conversation: behind BOS, if the tokenizer adds it.

        These are the ids of `tokenizer(text)` in transformers, but for control ids. An empty text
        is never without an id to go on from.
        """
        start = [self.document_start] if self.adds_bos or not text else []
        return [*start, *self.encode(text)]

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Encode several texts, on several threads.

        UserError for a text with half of a surrogate pair, which is no character.
        """
        return self.codec.encode_many(texts, threads)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`; control ids are silent, bytes that are not UTF-8 are U+FFFD."""
        return "".join(self.stream(ids))

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of `ids` as it becomes certain: one part an id, and one at the end.

        A part is empty while a character lacks bytes. The parts add up to `decode(ids)`.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        start = self.dummy_prefix
        for token in ids:
            part = self.bytes_of(token)
            if start and part:
                part, start = part.removeprefix(b" "), False  # the space that encode puts in front

            yield decoder.decode(part)

        yield decoder.decode(b"", final=True)

    def bytes_of(self, token: int) -> bytes:
        """Return what a token adds to a text.

        It may be a part of a character, and is empty for a control id. (Added tokens that their
        file calls not special, such as a mark of tool calls, are shown though no text spells them.)
        """
        return self.codec.bytes_of(token)

    def name_of(self, token: int) -> str:
        """Return the name of a token in the vocabulary: "</s>" for EOS."""
        return self.codec.name_of(token)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write the files with which transformers, vLLM and this package read the tokenizer.

        A line on stderr says, once, where transformers will give other ids than `encode`.
        """
        path = Path(directory)
        others = self.template is not None and not is_llama_2(self.template)
        files = self.codec.dump_files(
            self.announced_eos, self.template, space_once=self.space_once and others
        )
        with explain_os_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            for name, content in files.items():
                atomic.write_atomic(path / name, content)

        for note in self.describe_differences():
            say_once(f"note: {note}")

    def describe_differences(self) -> tuple[str, ...]:
        """List, in sentences, where transformers gives other ids; () for one such as Llama 2's."""
        return self.codec.describe_differences()

    def describe_disagreement(self, directory: Path) -> str | None:
        """Describe where the tokenizer.json in the directory of this tokenizer.model differs.

        None if it gives the same ids, or one of the files is not there.
        """
        return self.codec.describe_disagreement(directory)
