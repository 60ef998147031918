"""Read and write `tokenizer.json`, the tokenizer of transformers, vLLM and `tokenizers`.

transformers 5 writes this file alone. It has the items, their merges and their bytes, so a
SentencePiece model can be built of it again, if it was one: the scores follow from the order of the
merges. Where a directory has no such file, transformers makes one of `tokenizer.model`, and the ids
of runs of spaces then depend on its version: so it is written here.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from llama2.errors import UserError
from llama2.tokenizer import added_tokens, byte_level_json, merges, sentencepiece_model
from llama2.tokenizer.added_tokens import FETCH, AddedToken, describe_added
from llama2.tokenizer.chat_settings import read_object, read_section
from llama2.tokenizer.comparison import Encode, find_difference
from llama2.tokenizer.merges import Merge, Merger
from llama2.tokenizer.sentencepiece_model import (
    BOS_ID,
    BYTE,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNKNOWN_ID,
    Vocabulary,
    VocabularyItem,
)
from llama2.tokenizer.stored import ByteLevelModel, StoredTokenizer

_GIVE_MODEL = "give the tokenizer.model of this model (import has --tokenizer FILE)"
_OTHER_FAMILY = "take a model of the Llama 2 family"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_PREPEND = {"type": "Prepend", "prepend": SPACE}
_SPACE_ONCE = {
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": "first",
        "split": False,
    },
}
_REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}


@dataclass(frozen=True)
class TokenizerJson:
    """The parts of a `tokenizer.json` that a SentencePiece model has as well."""

    texts: Mapping[str, int]
    merges: list[Merge]
    added: Mapping[int, AddedToken]
    unknown: str
    dummy_prefix: bool

    def make_merger(self) -> Merger:
        """Return its merges, ready to encode."""
        return Merger(self.texts, self.merges)


# --- reading ---
def read(file: Path) -> TokenizerJson:
    """Read a `tokenizer.json`. UserError if it is damaged, or of another kind than Llama 2's."""
    values = read_object(file)
    model = read_section(file, values, "model")
    _refuse_other_kinds(file, values, model)

    vocabulary = read_section(file, model, "vocab")
    texts = {
        added_tokens.check_text(file, text): added_tokens.parse_id(file, token)
        for text, token in vocabulary.items()
    }
    if not texts or len(set(texts.values())) < len(texts):
        raise UserError(f"{file}: its vocabulary is empty, or an id stands there twice", FETCH)

    return TokenizerJson(
        texts,
        _read_merges(file, model, texts),
        added_tokens.list_json_tokens(file, values),
        str(model.get("unk_token") or "<unk>"),
        _has_prefix(values),
    )


def _read_merges(
    file: Path, model: Mapping[str, Any], texts: Mapping[str, int]
) -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for rank, merge in enumerate(added_tokens.read_list(file, model, "merges")):
        parts = merge.split(" ") if isinstance(merge, str) else merge
        match parts:
            case [str(left), str(right)] if {left, right, left + right} <= texts.keys():
                pairs.append((left, right))
            case _:
                raise UserError(
                    f"{file}: merge {rank + 1} is no pair of items of its vocabulary", FETCH
                )

    return pairs


def _refuse_other_kinds(file: Path, values: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """UserError unless it is a BPE with bytes for unknown characters that only marks spaces."""
    kind = model.get("type")
    if kind != "BPE" or not model.get("byte_fallback"):
        without = "without bytes for unknown characters (byte_fallback)"
        fault = without if kind == "BPE" else f"a {kind} model"
        raise UserError(
            f"{file}: the tokenizer is {fault}; only those of Llama 2's kind (SentencePiece BPE) "
            "can be read",
            _OTHER_FAMILY,
        )

    normalizer, split = values.get("normalizer"), values.get("pre_tokenizer")
    if split is None:
        fits = _marks_spaces(normalizer)
    else:
        fits = normalizer is None and _keeps_texts_whole(split, model)

    if not fits:
        raise UserError(
            f"{file}: it changes or divides texts in another way than Llama 2's tokenizer "
            f"(normalizer {_name(normalizer)}, pre_tokenizer {_name(split)})",
            _GIVE_MODEL,
        )


def _marks_spaces(normalizer: Any) -> bool:
    """Return whether a normalizer marks spaces, puts one in front, and does no more."""
    steps: Any = [normalizer]
    if isinstance(normalizer, dict) and normalizer.get("type") == "Sequence":
        steps = normalizer.get("normalizers")

    if not isinstance(steps, list) or _REPLACE not in steps:
        return False

    return all(step in (_PREPEND, _REPLACE) for step in steps)


def _keeps_texts_whole(split: Any, model: Mapping[str, Any]) -> bool:
    """Return whether a pre-tokenizer marks spaces and divides no text inside an item.

    One that divides texts at spaces gives the same ids if no item has a space inside.
    """
    if not isinstance(split, dict):
        return False
    if split.get("type") != "Metaspace" or split.get("replacement") != SPACE:
        return False

    vocabulary = model.get("vocab") or ()
    return split.get("split", True) is False or not any(SPACE in text[1:] for text in vocabulary)


def _has_prefix(values: Mapping[str, Any]) -> bool:
    """Return whether a space is put in front of a text."""
    split = values.get("pre_tokenizer")
    if split is None:
        return '"Prepend"' in json.dumps(values.get("normalizer"))

    implied = "always" if split.get("add_prefix_space", True) else "never"
    return bool(split.get("prepend_scheme", implied) != "never")


def _name(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else value
    return "none" if value is None else ascii(kind)


# --- as what one of the engines takes ---
def open_stored(file: Path, vocab_size: int | None = None) -> StoredTokenizer:
    """Return the tokenizer in a `tokenizer.json`, of either engine; `vocab_size` is the model's."""

    def read_content() -> bytes | ByteLevelModel:
        if byte_level_json.is_byte_level(read_object(file)):
            return byte_level_json.read(file, vocab_size)

        return _build_model(file, vocab_size)

    return StoredTokenizer(str(file), functools.cache(read_content))


def _build_model(file: Path, vocab_size: int | None) -> bytes:
    """Return the SentencePiece model that gives the ids of a `tokenizer.json`."""
    content = read(file)
    named = {token: text for text, token in content.texts.items()}
    known = max(named) + 1
    added = added_tokens.collect(file.parent, content.added)
    added = added_tokens.drop_unreachable(file.parent, added, known, vocab_size)

    for token, entry in added.items():
        if named.get(token, entry.text) != entry.text:
            raise UserError(
                f"{file}: id {token} is {named[token]!r} in its vocabulary and {entry.text!r} "
                "among the added tokens",
                FETCH,
            )

    def make_item(token: int) -> VocabularyItem:
        padding = sentencepiece_model.make_padding(token)
        text = added[token].text if token in added else named.get(token)
        if text is None or text == padding.text:
            return padding
        if text == content.unknown:
            return VocabularyItem(text, 0.0, UNKNOWN)
        if _BYTE.fullmatch(text):
            return VocabularyItem(text, 0.0, BYTE)

        return added[token].make_item() if token in added else VocabularyItem(text, 0.0)

    size = added_tokens.count_items(file.parent, added, known)
    items = _score_items(file, [make_item(token) for token in range(size)], content)
    sentencepiece_model.check_items(items, str(file), _GIVE_MODEL)
    model = sentencepiece_model.build(Vocabulary(items, content.dummy_prefix))
    _verify_model(file, content, items, model)

    return model


def _score_items(
    file: Path, items: Sequence[VocabularyItem], content: TokenizerJson
) -> list[VocabularyItem]:
    normal = {item.text: token for token, item in enumerate(items) if item.kind == NORMAL}
    scores = merges.score_items(normal, content.merges)
    if scores is None:
        raise UserError(
            f"{file}: its merges are not those of a SentencePiece model, which joins two items "
            "wherever both make a third",
            _GIVE_MODEL,
        )

    return [VocabularyItem(item.text, scores.get(item.text, 0.0), item.kind) for item in items]


def _verify_model(
    file: Path, content: TokenizerJson, items: list[VocabularyItem], model: bytes
) -> None:
    """UserError if the model built of a file gives other ids than the file, for some texts."""
    if not content.dummy_prefix or sum(item.kind == BYTE for item in items) != 256:
        return  # refused when it is loaded, for a reason that says more

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if difference := find_difference(content.make_merger(), items, processor.encode):
        raise UserError(
            f"{file}: its merges stand in an order that SentencePiece cannot follow ({difference})",
            _GIVE_MODEL,
        )


def describe_disagreement(file: Path, vocabulary: Vocabulary, encode: Encode) -> str | None:
    """Describe where a `tokenizer.json` gives other ids than the `tokenizer.model` beside it."""
    try:
        content = read(file)
    except UserError as error:
        return error.cause.removeprefix(f"{file}: ")

    if content.dummy_prefix != vocabulary.dummy_prefix:
        return f"it puts {'a' if content.dummy_prefix else 'no'} space in front of a text"

    for token, item in enumerate(vocabulary.items):
        if item.kind in (NORMAL, BYTE) and content.texts.get(item.text) != token:
            return f"item {token}, {item.text!a}, is not item {token} there"

    return find_difference(content.make_merger(), vocabulary.items, encode)


# --- writing ---
def dump(vocabulary: Vocabulary, space_once: bool = False) -> bytes:
    """Return the content of the `tokenizer.json` of a vocabulary.

    `space_once`: a space is put in front of a whole text, not of each piece between added tokens.
    """
    items = vocabulary.items
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, **entry} for token, entry in describe_added(items).items()],
        **_make_pipeline(items[BOS_ID].text),
        **(_SPACE_ONCE if space_once else {}),
        "model": _make_model(items),
    }
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def _make_pipeline(bos: str) -> dict[str, Any]:
    """Return the steps around the merges.

    A space is put in front, BOS before each text, and decoding takes the space away.
    """
    return {
        "normalizer": {"type": "Sequence", "normalizers": [_PREPEND, _REPLACE]},
        "pre_tokenizer": None,
        "post_processor": byte_level_json.make_post_processor(bos, BOS_ID),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
    }


def _make_model(items: Sequence[VocabularyItem]) -> dict[str, Any]:
    pairs = merges.list_merges(items)
    lines = list(map(" ".join, pairs)) if _fit_lines(pairs) else pairs
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": items[UNKNOWN_ID].text,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {item.text: token for token, item in enumerate(items)},
        "merges": lines,
    }


def _fit_lines(listed: Sequence[Merge]) -> bool:
    """Return whether merges may be lines of two words, which early versions of the library want."""
    return not any(
        " " in left or " " in right or left.startswith("#version") for left, right in listed
    )
