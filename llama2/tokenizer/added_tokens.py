"""Collect the tokens that were added to a tokenizer, from the files in its directory.

They stand behind the items of the SentencePiece model. Special ones become control items, which no
text spells: programs put them there. Others are found in text, as in transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama2.errors import UserError
from llama2.terminal_text import say_once, show_value
from llama2.tokenizer import sentencepiece_model
from llama2.tokenizer.chat_settings import (
    ADDED,
    CONFIG,
    SETTINGS,
    SPECIAL,
    read_object,
    read_section,
    read_stop_ids,
    read_text,
)
from llama2.tokenizer.sentencepiece_model import (
    CONTROL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    VocabularyItem,
)

FETCH = "fetch the file again"
_OTHER_TOKENIZER = "the files are of different tokenizers: put those of this model there"
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
class AddedToken:
    """A token that is looked for before all else; no text spells a `special` one."""

    text: str
    special: bool

    def make_item(self) -> VocabularyItem:
        """Return the item of a SentencePiece model that stands for this token."""
        if self.special:
            return VocabularyItem(self.text, 0.0, CONTROL)

        return VocabularyItem(self.text.replace(" ", SPACE), 0.0, USER_DEFINED)


# --- reading ---
def collect(directory: Path, in_json: Mapping[int, AddedToken]) -> dict[int, AddedToken]:
    """Return the tokens that the files in a directory add, by id; `in_json` are tokenizer.json's.

    UserError if two files give an id to different tokens.
    """
    settings, special = (read_object(directory / name) for name in (SETTINGS, SPECIAL))
    roles = {*_list_roles(settings), *_list_roles(special)}
    tokens = dict(in_json)

    def add(file: Path, key: Any, text: str, is_special: bool) -> None:
        token = parse_id(file, key)
        known = tokens.get(token, AddedToken(text, False))
        if known.text != text:
            raise UserError(
                f"{file}: id {token} is {text!r} here and {known.text!r} in another file of the "
                "tokenizer",
                _OTHER_TOKENIZER,
            )

        tokens[token] = AddedToken(text, is_special or known.special)

    file = directory / SETTINGS
    for key, value in read_section(file, settings, "added_tokens_decoder").items():
        entry = _parse_entry(file, value)
        add(file, key, entry.text, entry.special)

    file = directory / ADDED
    for text, key in read_object(file).items():
        add(file, key, check_text(file, text), False)

    ends = read_stop_ids(directory)
    return {
        token: AddedToken(entry.text, entry.special or entry.text in roles or token in ends)
        for token, entry in sorted(tokens.items())
    }


def list_json_tokens(file: Path, values: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Return the tokens that a `tokenizer.json` adds, by id."""
    entries = [(_parse_entry(file, each), each) for each in read_list(file, values, "added_tokens")]
    return {parse_id(file, values.get("id")): entry for entry, values in entries}


def drop_unreachable(
    directory: Path, tokens: Mapping[int, AddedToken], known: int, vocab_size: int | None
) -> dict[int, AddedToken]:
    """Return the tokens without those beyond the model's vocabulary, and say which those are.

    `known` is the number of the tokenizer's own items, `vocab_size` the model's vocabulary; without
    it the config.json in the directory is asked.
    """
    if vocab_size is None:
        vocab_size = read_object(directory / CONFIG).get("vocab_size")

    if not isinstance(vocab_size, int):
        return dict(tokens)

    limit = max(known, vocab_size)
    beyond = [ascii(entry.text) for token, entry in tokens.items() if token >= limit]
    if beyond:
        say_once(
            f"note: {directory}: the added tokens {', '.join(beyond)} have ids beyond the model's "
            f"vocabulary of {vocab_size}, so it can neither read nor write them: left out"
        )

    return {token: entry for token, entry in tokens.items() if token < limit}


def count_items(directory: Path, tokens: Mapping[int, AddedToken], known: int) -> int:
    """Return the number of items of a tokenizer that has `known` items, with the added tokens."""
    size = max([known, *(token + 1 for token in tokens)])
    if size > known + len(tokens) + _MOST_UNNAMED:
        raise UserError(
            f"{directory}: an added token has id {size - 1}, and there are {known} items", FETCH
        )

    return size


def check_conflicts(
    directory: Path, tokens: Mapping[int, AddedToken], items: Sequence[VocabularyItem]
) -> None:
    """UserError if an added token has the id of another item of the model."""
    for token, entry in tokens.items():
        if token < len(items) and items[token].text != entry.text.replace(" ", SPACE):
            raise UserError(
                f"{directory}: the added tokens give id {token} to {entry.text!r}, tokenizer.model "
                f"to {items[token].text!r}",
                _OTHER_TOKENIZER,
            )


def _list_roles(values: Mapping[str, Any]) -> set[str]:
    """Return the texts that have a role, such as the end of an answer."""
    entries = [values.get(role) for role in _ROLES]
    for role in _MORE_ROLES:
        more = values.get(role)
        if isinstance(more, dict):
            more = list(more.values())

        entries += more if isinstance(more, list) else []

    return {text for text in map(read_text, entries) if text}


def _parse_entry(file: Path, entry: Any) -> AddedToken:
    text = read_text(entry)
    if not isinstance(entry, dict) or not text:
        raise UserError(f"{file}: an added token is {show_value(entry)}", FETCH)

    return AddedToken(check_text(file, text), entry.get("special") is True)


def parse_id(file: Path, value: Any) -> int:
    """Return the id of a token: a whole number, or its digits as text."""
    number = int(value) if isinstance(value, str) and value.isdecimal() else value
    if type(number) is not int or number < 0:
        raise UserError(f"{file}: {show_value(value)} is no id of a token", FETCH)

    return number


def check_text(file: Path, text: str) -> str:
    """Return the text of an item. UserError for half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(
            f"{file}: the item {text!a} holds half of a surrogate pair", FETCH
        ) from None

    return text


def read_list(file: Path, values: Mapping[str, Any], key: str) -> list[Any]:
    """Return the JSON list under a key; an empty one if there is none."""
    value = values.get(key) or []
    if not isinstance(value, list):
        raise UserError(f"{file}: {key} is no list", FETCH)

    return value


# --- writing ---
def describe_added(items: Sequence[VocabularyItem]) -> dict[int, dict[str, Any]]:
    """Return the items that are looked for before all else, as Hugging Face's files list them.

    Padding is not among them. An item that users may type is not special.
    """
    return {
        token: {
            "content": item.text.replace(SPACE, " ") if item.kind == USER_DEFINED else item.text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": item.kind != USER_DEFINED,
        }
        for token, item in enumerate(items)
        if item.kind in (UNKNOWN, CONTROL, USER_DEFINED)
        and item != sentencepiece_model.make_padding(token)
    }
