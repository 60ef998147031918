"""Encode and decode with byte-level BPE: the engine of GPT-2, Llama 3, SmolLM2 and Qwen.

A text is cut into words by a regular expression, its bytes become 256 visible characters, and
merges join them. The library `tokenizers` does that, as in transformers. Here it is given a
vocabulary in which the control tokens have names that its input cannot have, so that no text can
come out as one of them, whatever flags the file has.
"""

from __future__ import annotations

import copy
import functools
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from llama2.errors import UserError, explain_missing_extra
from llama2.hashing import hash_content
from llama2.tokenizer import byte_level_json
from llama2.tokenizer.added_tokens import FETCH
from llama2.tokenizer.codec import Codec, is_tag, refuse_halves
from llama2.tokenizer.pre_tokenizers import reduce_step
from llama2.tokenizer.sentencepiece_model import make_padding
from llama2.tokenizer.stored import ByteLevelModel

_BATCH = 64  # texts that a thread encodes at a time


class ByteLevelCodec:
    """A byte-level BPE vocabulary, loaded; `source` names it in errors."""

    is_byte_level = True
    dummy_prefix = False
    unknown: int | None = None

    def __init__(self, model: ByteLevelModel, source: str) -> None:
        self.model, self._source = model, source
        self.has_bos = model.bos is not None
        self.bos = model.eos if model.bos is None else model.bos
        self.eos, self.ends, self.adds_bos = model.eos, model.ends, model.adds_bos
        self._names = byte_level_json.list_names(model.values)
        self.vocab_size = max(max(self._names) + 1, model.size or 0)
        self.fingerprint = _hash(model.values)
        self._hide(model.controls)
        self._bytes = [self._find_bytes(token) for token in range(self.vocab_size)]

    def _hide(self, controls: frozenset[int]) -> None:
        self._hidden = controls
        self.controls = {self._names[token]: token for token in sorted(controls)}
        self._library = _build(self.model.values, self._source, controls)

    def with_template(self, template: str | None) -> ByteLevelCodec:
        """Return the same codec, in which the tags that a template writes are controls as well."""
        added = byte_level_json.list_added(self.model.values)
        tags = {
            token
            for token, entry in added.items()
            if is_tag(entry["content"]) and entry["content"] in (template or "")
        }
        controls = self.model.controls | tags
        if controls == self._hidden:
            return self

        other = copy.copy(self)
        other._hide(controls)
        return other

    def pad(self, size: int) -> ByteLevelCodec:
        """Return the same codec with items, which no text spells, up to `size`."""
        other = copy.copy(self)
        other.model = replace(self.model, size=size)
        other.vocab_size = max(self.vocab_size, size)
        other._bytes = [*self._bytes, *[b""] * (other.vocab_size - self.vocab_size)]
        return other

    def is_same(self, other: Codec) -> bool:
        """Return whether both give the same ids."""
        return self.fingerprint == other.fingerprint

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Other threads get their turn meanwhile."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str], threads: int = 1) -> list[list[int]]:
        """Encode several texts, on several threads."""
        if threads == 1 or len(texts) == 1:
            return self._encode_batch(texts)

        # the library's own threads do not survive a fork
        parts = [texts[at : at + _BATCH] for at in range(0, len(texts), _BATCH)]
        with ThreadPoolExecutor(threads) as pool:
            return [ids for part in pool.map(self._encode_batch, parts) for ids in part]

    def _encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        try:
            encodings = self._library.encode_batch_fast(list(texts), add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):
            refuse_halves(texts)
            raise

        return [encoding.ids for encoding in encodings]

    def bytes_of(self, token: int) -> bytes:
        """Return what a token adds to a text: nothing for a special one."""
        return self._bytes[token]

    def name_of(self, token: int) -> str:
        """Return the name of a token in the vocabulary; what it spells is another matter."""
        return self._names.get(token) or make_padding(token).text

    def _find_bytes(self, token: int) -> bytes:
        if token in self.model.controls or token not in self._names:
            return b""

        return spell(self._names[token])

    def dump_files(
        self, eos: int, template: str | None, space_once: bool = False
    ) -> Mapping[str, bytes]:
        """Return tokenizer.json and the settings with which other programs read it."""
        return byte_level_json.dump_files(self.model, template)

    def describe_differences(self) -> tuple[str, ...]:
        """Return (): transformers has the same engine."""
        return ()

    def describe_disagreement(self, directory: Path) -> str | None:
        """Return None: tokenizer.json is the tokenizer."""
        return None


def spell(name: str) -> bytes:
    """Return the bytes of an item: those that its characters stand for, if all stand for one."""
    alphabet = _list_alphabet()
    if all(character in alphabet for character in name):
        return bytes(alphabet[character] for character in name)

    return name.encode()


@functools.cache
def _list_alphabet() -> Mapping[str, int]:
    """Return the character that stands for each byte: itself if it is visible, else one from 256.

    As GPT-2 has it: bytes that are no visible character of Latin-1 follow each other there.
    """
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in visible]
    characters = {chr(byte): byte for byte in visible}
    return characters | {chr(256 + number): byte for number, byte in enumerate(others)}


def _import_library() -> ModuleType:
    try:
        import tokenizers
    except ImportError:
        raise explain_missing_extra("tokenizers", "bpe") from None

    # it warns of forks, and may hang behind one, where it has threads of its own
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return tokenizers


def _build(values: Mapping[str, Any], source: str, controls: frozenset[int]) -> Any:
    """Return the library's tokenizer, with names for the controls that no text can have.

    The pieces that merges join are characters of the alphabet, which has neither NUL nor digits
    behind one. As special tokens they are not looked for either (`encode_special_tokens`).
    """
    model = values["model"]
    hidden = {token: f"\0{token}" for token in controls}
    vocabulary = {hidden.get(token, text): token for text, token in model["vocab"].items()}
    merges = [
        merge
        for merge in byte_level_json.list_merges(model)
        if vocabulary.keys() >= {*merge, "".join(merge)}
    ]
    added = [
        {**entry, "content": hidden[token], "special": True} if token in hidden else entry
        for token, entry in byte_level_json.list_added(values).items()
    ]
    content = {
        **values,
        "model": {**model, "vocab": vocabulary, "merges": merges, "dropout": None},
        "added_tokens": added,
        **dict.fromkeys(("truncation", "padding", "post_processor", "decoder")),
    }
    library = _import_library()
    try:
        built = library.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library has no class of its own
        raise UserError(f"{source}: not a tokenizer, or a damaged one ({error})", FETCH) from None

    for entry in added:
        if built.token_to_id(entry["content"]) != entry["id"]:
            raise UserError(
                f"{source}: the added tokens do not follow the vocabulary (id {entry['id']})", FETCH
            )

    built.encode_special_tokens = True
    return built


def _hash(values: Mapping[str, Any]) -> str:
    """Return the hash of all in a `tokenizer.json` that decides ids."""
    model = values["model"]
    content = {
        "vocab": model["vocab"],
        "merges": byte_level_json.list_merges(model),
        "ignore_merges": bool(model.get("ignore_merges")),
        "added": byte_level_json.list_added(values),
        "normalizer": reduce_step(values.get("normalizer")),
        "pre_tokenizer": reduce_step(values.get("pre_tokenizer")),
    }
    return hash_content(json.dumps(content, sort_keys=True).encode())
