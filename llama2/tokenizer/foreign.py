"""The tokenizer in a directory that others wrote: `tokenizer.model`, `tokenizer.json`, and tokens
that were added.

transformers 5 writes `tokenizer.json` alone. It has the items, their merges and their bytes, so a
SentencePiece model can be built of it again, if it was one: the scores follow from the order of the
merges.

Tokens that were added to a model stand behind the items of its `tokenizer.model`, in files of their
own. Special ones become control items, which no text spells: they are for programs to put there.
Others are found in text, as in transformers.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from llama2 import json_files
from llama2.errors import UserError
from llama2.terminal_text import say, shown
from llama2.tokenizer import merges, sentencepiece_model
from llama2.tokenizer.chat_settings import stop_ids
from llama2.tokenizer.huggingface import JSON, SETTINGS, SPECIAL, difference
from llama2.tokenizer.merges import Merge, Merger
from llama2.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    StoredTokenizer,
    Vocabulary,
    VocabularyItem,
)

MODEL, ADDED = "tokenizer.model", "added_tokens.json"
_FETCH = "fetch the file again"
_GIVE_MODEL = "give the tokenizer.model of this model (import has --tokenizer FILE)"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "pad_token",
    "sep_token",
    "cls_token",
    "mask_token",
)
_MORE_ROLES = ("additional_special_tokens", "extra_special_tokens")
_MOST_UNNAMED = 65536  # ids between known ones; more of them are a damaged file


@dataclass(frozen=True)
class Added:
    """A token that is looked for before all else; a `special` one stands for something no text
    says."""

    text: str
    special: bool


@dataclass(frozen=True)
class Fast:
    """What `tokenizer.json` says, as far as it is what a SentencePiece model can be."""

    texts: Mapping[str, int]
    merges: list[Merge]
    added: Mapping[int, Added]
    unknown: str
    dummy_prefix: bool


# ---- which files there are
# ------------------------------------------------------------------------------------------
def find(directory: Path, size: int | None = None) -> Path | StoredTokenizer | None:
    """The tokenizer in a directory: of its `tokenizer.model` and what was added, else of
    `tokenizer.json`.

    `size` is the vocabulary of the model that it is for, where no config.json beside it says so.
    """
    model, fast = directory / MODEL, directory / JSON
    if model.exists():
        return StoredTokenizer(str(model), functools.cache(lambda: _with_added(model, size)))

    return of_json(fast, size) if fast.exists() else None


def of_json(file: Path, size: int | None = None) -> StoredTokenizer:
    """The tokenizer in a `tokenizer.json`."""
    return StoredTokenizer(str(file), functools.cache(lambda: _built(file, size)))


def _with_added(model: Path, most: int | None) -> bytes:
    content = sentencepiece_model.content(model)
    settings = model.parent / SETTINGS
    if _object(settings).get("add_prefix_space") is False:
        raise UserError(
            f"{settings}: add_prefix_space is false: no space is put in front of a text, which only models "
            "of other families were trained on",
            f"if this one was trained with {MODEL} as it is, take the "
            f"key out, or import it with --tokenizer {model}",
        )

    fast = model.parent / JSON
    added = _added(model.parent, _listed(fast, _object(fast)))
    if not added:
        return content

    items = sentencepiece_model.parse(content, str(model)).items
    for token, entry in added.items():
        if token < len(items) and items[token].text != entry.text.replace(" ", SPACE):
            raise UserError(
                f"{model.parent}: the added tokens give id {token} to {entry.text!r}, {MODEL} to "
                f"{items[token].text!r}",
                "the files are of different tokenizers: put those of this model there",
            )

    size = _size(model.parent, len(items), added, most)
    return sentencepiece_model.extended(
        content,
        [
            _item(added[token]) if token in added else sentencepiece_model.padding(token)
            for token in range(len(items), size)
        ],
    )


def _item(entry: Added) -> VocabularyItem:
    if entry.special:
        return VocabularyItem(entry.text, 0.0, CONTROL)

    return VocabularyItem(entry.text.replace(" ", SPACE), 0.0, USER_DEFINED)


def _size(place: Path, known: int, added: dict[int, Added], most: int | None) -> int:
    """How many items there are, with the added ones. Those that the model has no place for are
    dropped."""
    if most is None:
        most = _object(place / "config.json").get("vocab_size")

    if isinstance(most, int) and (
        beyond := [token for token in added if token >= max(known, most)]
    ):
        names = ", ".join(f"{added.pop(token).text!a}" for token in beyond)
        say_once(
            f"note: {place}: the added tokens {names} have ids beyond the model's vocabulary of {most}, so it can "
            "neither read nor write them: left out"
        )

    size = max([known, *(token + 1 for token in added)])
    if size > known + len(added) + _MOST_UNNAMED:
        raise UserError(
            f"{place}: an added token has id {size - 1}, and there are {known} items", _FETCH
        )

    return size


# ---- added tokens
# ---------------------------------------------------------------------------------------------------
def _added(directory: Path, inside: Mapping[int, Added]) -> dict[int, Added]:
    """The tokens that the files in a directory add; `inside` are those of its `tokenizer.json`, if
    that was read."""
    settings, special = (_object(directory / name) for name in (SETTINGS, SPECIAL))
    roles = set(_roles(special)) | set(_roles(settings))
    found = dict(inside)

    def add(file: Path, token: int, text: str, flag: bool) -> None:
        before = found.get(token)
        if before is not None and before.text != text:
            raise UserError(
                f"{file}: id {token} is {text!r} here and {before.text!r} in another file of the tokenizer",
                "the files are of different tokenizers: put those of this model there",
            )

        found[token] = Added(text, flag or (before is not None and before.special))

    file = directory / SETTINGS
    for token, entry in _mapping(file, settings, "added_tokens_decoder").items():
        add(file, _id(file, token), *_entry(file, entry))

    file = directory / ADDED
    for text, token in _object(file).items():
        add(file, _id(file, token), _text(file, text), False)

    ends = stop_ids(directory)
    return {
        token: Added(entry.text, entry.special or entry.text in roles or token in ends)
        for token, entry in sorted(found.items())
    }


def _roles(values: Mapping[str, Any]) -> Iterator[str]:
    """The texts that stand for something, such as the end of an answer."""
    entries = [values.get(role) for role in _ROLES]
    for role in _MORE_ROLES:
        more = values.get(role) or []
        entries += (
            more.values() if isinstance(more, dict) else more if isinstance(more, list) else []
        )

    for entry in entries:
        text = entry.get("content") if isinstance(entry, dict) else entry
        if isinstance(text, str) and text:
            yield text


def _id(file: Path, value: Any) -> int:
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise UserError(f"{file}: {shown(value)} is no id of a token", _FETCH)

    return number


def _entry(file: Path, entry: Any) -> tuple[str, bool]:
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("content"), str)
        or not entry["content"]
    ):
        raise UserError(f"{file}: an added token is {shown(entry)}", _FETCH)

    return _text(file, entry["content"]), entry.get("special") is True


def _text(file: Path, text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{file}: the item {text!a} holds half of a surrogate pair", _FETCH
        ) from None

    return text


# ---- tokenizer.json
# -------------------------------------------------------------------------------------------------
def read(file: Path) -> Fast:
    """What a `tokenizer.json` says. UserError if it is damaged, or of another kind than Llama
    2's."""
    values = _object(file)
    model = _mapping(file, values, "model")
    _refuse_others(file, values, model)
    texts = {
        _text(file, text): _id(file, token)
        for text, token in _mapping(file, model, "vocab").items()
    }

    if not texts or len(set(texts.values())) < len(texts):
        raise UserError(f"{file}: its vocabulary is empty, or an id stands there twice", _FETCH)

    listed = [
        tuple(merge.split(" ")) if isinstance(merge, str) else merge
        for merge in _list(file, model, "merges")
    ]
    for rank, merge in enumerate(listed):
        if not (
            isinstance(merge, tuple | list)
            and len(merge) == 2
            and all(isinstance(part, str) for part in merge)
            and {*merge, "".join(merge)} <= texts.keys()
        ):
            raise UserError(
                f"{file}: merge {rank + 1} is no pair of items of its vocabulary", _FETCH
            )

    return Fast(
        texts,
        [(left, right) for left, right in listed],
        _listed(file, values),
        str(model.get("unk_token") or "<unk>"),
        _prefix(values),
    )


def _listed(file: Path, values: Mapping[str, Any]) -> dict[int, Added]:
    """The tokens that a `tokenizer.json` adds."""
    found: dict[int, Added] = {}
    for entry in _list(file, values, "added_tokens"):
        text, special = _entry(file, entry)
        found[_id(file, entry.get("id"))] = Added(text, special)

    return found


def _refuse_others(file: Path, values: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """UserError for what is no BPE with bytes for unknown characters and a space in front, and no
    more than that."""
    spelled = json.dumps([values.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")])
    kind = model.get("type")
    if '"ByteLevel"' in spelled:
        raise UserError(
            f"{file}: a byte-level BPE tokenizer, as Llama 3 and GPT-2 have; only those of Llama 2's kind "
            "(SentencePiece BPE) can be read",
            "take a model of the Llama 2 family",
        )

    if kind != "BPE" or not model.get("byte_fallback"):
        what = (
            f"a {kind} model"
            if kind != "BPE"
            else "without bytes for unknown characters (byte_fallback)"
        )
        raise UserError(
            f"{file}: the tokenizer is {what}; only those of Llama 2's kind (SentencePiece BPE) can be "
            "read",
            "take a model of the Llama 2 family",
        )

    normal, split = values.get("normalizer"), values.get("pre_tokenizer")
    if split is None:
        steps = (
            normal.get("normalizers")
            if isinstance(normal, dict) and normal.get("type") == "Sequence"
            else [normal]
        )
        if (
            isinstance(steps, list)
            and all(_is_space(step) for step in steps)
            and any(map(_is_replacement, steps))
        ):
            return
    elif normal is None and _is_metaspace(split, model):
        return

    raise UserError(
        f"{file}: it changes or divides texts in another way than Llama 2's tokenizer "
        f"(normalizer {_shown(normal)}, pre_tokenizer {_shown(split)})",
        _GIVE_MODEL,
    )


def _is_replacement(step: Any) -> bool:
    return (
        isinstance(step, dict)
        and step.get("type") == "Replace"
        and step.get("pattern") == {"String": " "}
        and (step.get("content") == SPACE)
    )


def _is_space(step: Any) -> bool:
    return _is_replacement(step) or step == {"type": "Prepend", "prepend": SPACE}


def _is_metaspace(split: Any, model: Mapping[str, Any]) -> bool:
    """Whether spaces are marked and texts stay whole; one that divides texts at them does as well
    if no item has two.
    """
    if (
        not isinstance(split, dict)
        or split.get("type") != "Metaspace"
        or split.get("replacement") != SPACE
    ):
        return False

    vocabulary = model.get("vocab")
    return split.get("split", True) is False or not any(
        SPACE in text[1:] for text in vocabulary or ()
    )


def _prefix(values: Mapping[str, Any]) -> bool:
    """Whether a space is put in front of a text."""
    split = values.get("pre_tokenizer")
    if split is None:
        return '"Prepend"' in json.dumps(values.get("normalizer"))

    scheme = split.get(
        "prepend_scheme", "always" if split.get("add_prefix_space", True) else "never"
    )
    return bool(scheme != "never")


def _built(file: Path, most: int | None) -> bytes:
    """The SentencePiece model that gives the ids of a `tokenizer.json`."""
    fast = read(file)
    added = _added(file.parent, fast.added)
    size = _size(file.parent, max(fast.texts.values()) + 1, added, most)
    named = {token: text for text, token in fast.texts.items()}

    for token, entry in added.items():
        if named.get(token, entry.text) != entry.text:
            raise UserError(
                f"{file}: id {token} is {named[token]!r} in its vocabulary and {entry.text!r} among the "
                "added tokens",
                _FETCH,
            )

    def item(token: int) -> VocabularyItem:
        text = added[token].text if token in added else named.get(token)
        if text is None or sentencepiece_model.padding(token).text == text:
            return sentencepiece_model.padding(token)
        if text == fast.unknown:
            return VocabularyItem(text, 0.0, UNKNOWN)
        if _BYTE.fullmatch(text):
            return VocabularyItem(text, 0.0, BYTE)

        return _item(added[token]) if token in added else VocabularyItem(text, 0.0, NORMAL)

    items = [item(token) for token in range(size)]
    normal = {piece.text: token for token, piece in enumerate(items) if piece.kind == NORMAL}
    scores = merges.scored(normal, fast.merges)

    if scores is None:
        raise UserError(
            f"{file}: its merges are not those of a SentencePiece model, which joins two items wherever "
            "both make a third",
            _GIVE_MODEL,
        )

    items = [VocabularyItem(piece.text, scores.get(piece.text, 0.0), piece.kind) for piece in items]
    sentencepiece_model.check(items, str(file), _GIVE_MODEL)
    model = sentencepiece_model.build(Vocabulary(items, fast.dummy_prefix))
    _verify(file, fast, items, model)

    return model


def _verify(file: Path, fast: Fast, items: list[VocabularyItem], model: bytes) -> None:
    """UserError if the model built of a file gives other ids than the file, for some texts."""
    if not fast.dummy_prefix or sum(item.kind == BYTE for item in items) != 256:
        return  # refused when it is loaded, by a reason that says more

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if found := difference(Merger(fast.texts, fast.merges), items, processor.encode):
        raise UserError(
            f"{file}: its merges stand in an order that SentencePiece cannot follow ({found})",
            _GIVE_MODEL,
        )


# ---- both files
# -----------------------------------------------------------------------------------------------------
def disagreement(
    directory: Path, vocabulary: Vocabulary, processor: sentencepiece.SentencePieceProcessor
) -> str | None:
    """In words, where the `tokenizer.json` in a directory gives other ids than the
    `tokenizer.model` beside it."""
    file = directory / JSON
    if not file.exists():
        return None

    try:
        fast = read(file)
    except UserError as error:
        return error.cause.removeprefix(f"{file}: ")

    if fast.dummy_prefix != vocabulary.dummy_prefix:
        return f"it puts {'a' if fast.dummy_prefix else 'no'} space in front of a text"

    for token, item in enumerate(vocabulary.items):
        if item.kind in (NORMAL, BYTE) and fast.texts.get(item.text) != token:
            return f"item {token}, {item.text!a}, is not item {token} there"

    return difference(Merger(fast.texts, fast.merges), vocabulary.items, processor.encode)


# ---- files and words
# ------------------------------------------------------------------------------------------------
@functools.cache
def say_once(line: str) -> None:
    """A line on stderr, however often it is called for."""
    say(f"llama2: {line}")


def _object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file."""
    return json_files.json_object(file, _FETCH) if file.exists() else {}


def _mapping(file: Path, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = values.get(key) or {}
    if not isinstance(value, dict):
        raise UserError(f"{file}: {key} is no JSON object", _FETCH)

    return value


def _list(file: Path, values: Mapping[str, Any], key: str) -> list[Any]:
    value = values.get(key) or []
    if not isinstance(value, list):
        raise UserError(f"{file}: {key} is no list", _FETCH)

    return value


def _shown(value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else value
    return ascii(kind) if value is not None else "none"
