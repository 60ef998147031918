"""Read a byte-level BPE tokenizer from `tokenizer.json` and the settings beside it, and write it.

The file stays as it came, for transformers and all else that reads it. What it leaves open stands
in other files of the directory: which ids begin and end a text, which added tokens are special, and
whether a raw text begins with BOS (`add_bos_token`, else what the file's post-processor puts in
front).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any

from llama2.errors import UserError
from llama2.json_files import read_bytes
from llama2.terminal_text import show_value
from llama2.tokenizer import added_tokens
from llama2.tokenizer.added_tokens import FETCH, AddedToken
from llama2.tokenizer.chat_settings import (
    CONFIG,
    GENERATION,
    JSON,
    SETTINGS,
    SPECIAL,
    read_object,
    read_section,
    read_text,
)
from llama2.tokenizer.stored import ByteLevelModel

_KIND = "ByteLevel"
_OTHER_FAMILY = "take a model whose tokenizer is SentencePiece BPE or byte-level BPE"
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def is_byte_level(values: Mapping[str, Any]) -> bool:
    """Return whether a `tokenizer.json` is of this kind: its texts become visible bytes."""
    steps = [values.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    return f'"{_KIND}"' in json.dumps(steps)


# --- parts of a tokenizer.json ---
def list_merges(model: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the merges, which are pairs, or lines of two words in files of earlier versions."""
    return [
        tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge)
        for merge in model.get("merges") or []
    ]


def list_added(values: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the added tokens, by id, in the order of the ids."""
    entries = {int(entry["id"]): entry for entry in values.get("added_tokens") or []}
    return dict(sorted(entries.items()))


def list_names(values: Mapping[str, Any]) -> dict[int, str]:
    """Return the name of each item, by id."""
    names = {token: text for text, token in values["model"]["vocab"].items()}
    return names | {token: entry["content"] for token, entry in list_added(values).items()}


def read_role(model: ByteLevelModel, role: str) -> str | None:
    """Return the text of the token that the settings give a role, such as "pad_token"."""
    return read_text(model.settings.get(role) or model.special.get(role))


# --- reading ---
def read(file: Path, vocab_size: int | None = None) -> ByteLevelModel:
    """Read a `tokenizer.json` and the settings beside it.

    `vocab_size` is the model's; without it the config.json beside the file is asked. UserError if a
    file is damaged or of another kind, and if no id ends a text.
    """
    values = read_object(file)
    check(file, values)
    directory = file.parent
    if vocab_size is None:
        size = read_object(directory / CONFIG).get("vocab_size")
        vocab_size = size if isinstance(size, int) else None

    settings, special = (read_object(directory / name) for name in (SETTINGS, SPECIAL))
    in_json = added_tokens.list_json_tokens(file, values)
    collected = added_tokens.collect(directory, in_json)
    known = max(values["model"]["vocab"].values()) + 1
    added = collected
    if vocab_size is None or known <= vocab_size:  # others are refused, as they do not fit
        added = added_tokens.drop_unreachable(directory, collected, known, vocab_size)

    entries = _list_entries(values, settings, added)
    original = read_bytes(file) if _stays(values, entries) else None
    values = {**values, "added_tokens": entries, "padding": None, "truncation": None}
    settings = {key: value for key, value in settings.items() if key != "chat_template"}
    model = ByteLevelModel(values, settings, special, None, -1, size=vocab_size, original=original)
    return _read_roles(file, model, added)


def _list_entries(
    values: Mapping[str, Any], settings: Mapping[str, Any], added: Mapping[int, AddedToken]
) -> list[dict[str, Any]]:
    """Return the added tokens of all files, as a `tokenizer.json` lists them."""
    decoder = settings.get("added_tokens_decoder") or {}
    written = {int(token): entry for token, entry in decoder.items() if token.isdecimal()}
    known = list_added(values)

    def make_entry(token: int, entry: AddedToken) -> dict[str, Any]:
        flags = {"normalized": not entry.special} | written.get(token, {}) | known.get(token, {})
        return {
            "id": token,
            "content": entry.text,
            **{flag: flags.get(flag) is True for flag in _FLAGS},
        }

    return [make_entry(token, entry) for token, entry in sorted(added.items())]


def _stays(values: Mapping[str, Any], entries: list[dict[str, Any]]) -> bool:
    """Return whether a file may be written again as it came: with its tokens, and not cutting."""
    same = list(list_added(values)) == [entry["id"] for entry in entries]
    return same and values.get("padding") is None and values.get("truncation") is None


def _read_roles(
    file: Path, model: ByteLevelModel, added: Mapping[int, AddedToken]
) -> ByteLevelModel:
    """Return the model with its BOS, EOS and controls."""
    ids = {text: token for token, text in list_names(model.values).items()}
    bos, eos = (_find_role(f"{role}_token", file, model, ids) for role in ("bos", "eos"))
    if eos is None:
        raise UserError(
            f"{file}: no id ends a text: {SETTINGS} has no eos_token, {CONFIG} no eos_token_id",
            f"put the model's {SETTINGS} beside it",
        )

    roles = {eos} if bos is None else {bos, eos}
    refuse_typed(file, model, roles - added.keys())
    controls = roles | {token for token, entry in added.items() if entry.special}
    model = replace(model, bos=bos, eos=eos, controls=frozenset(controls))
    if bos is None:
        return model

    in_front = _puts_in_front(model.values.get("post_processor"), bos, ids)
    setting = model.settings.get("add_bos_token")
    adds = setting if isinstance(setting, bool) else in_front
    if adds == in_front:
        return replace(model, adds_bos=adds)

    # transformers 4 goes by the file, transformers 5 by the setting
    processor = make_post_processor(list_names(model.values)[bos], bos) if adds else None
    values = {**model.values, "post_processor": processor}
    return replace(model, adds_bos=adds, values=values, original=None)


def refuse_typed(file: Path, model: ByteLevelModel, roles: AbstractSet[int]) -> None:
    """UserError if BOS or EOS is an item that texts are made of."""
    made = {"".join(merge) for merge in list_merges(model.values["model"])}
    names = list_names(model.values)
    for token in sorted(roles):
        if len(names[token]) == 1 or names[token] in made:
            raise UserError(
                f"{file}: id {token}, {names[token]!a}, has a role and is an ordinary item of the "
                "vocabulary, so a user could type it",
                "take a tokenizer whose BOS and EOS are added tokens",
            )


def _find_role(role: str, file: Path, model: ByteLevelModel, ids: Mapping[str, int]) -> int | None:
    """Return the id of BOS or EOS: what the tokenizer's settings say, else what the model's do."""
    for values in (model.settings, model.special):
        if role in values:
            text = read_text(values[role])
            if text is not None and text not in ids:
                raise UserError(
                    f"{file}: {role} is {text!r}, which is no item of the tokenizer", FETCH
                )
            if text is not None or role == "bos_token":
                return None if text is None else ids[text]

    for name in (CONFIG, GENERATION):
        value = read_object(file.with_name(name)).get(f"{role}_id")
        token = value[0] if isinstance(value, list) and value else value
        if type(token) is int and token in ids.values():
            return token

    return None


def _puts_in_front(processor: Any, bos: int, ids: Mapping[str, int]) -> bool:
    """Return whether a post-processor of a `tokenizer.json` puts BOS in front of a text."""
    if not isinstance(processor, dict):
        return False
    if processor.get("type") == "Sequence":
        steps = processor.get("processors") or []
        return any(_puts_in_front(step, bos, ids) for step in steps)

    single = processor.get("single")
    first = single[0] if isinstance(single, list) and single else {}
    token = first.get("SpecialToken") if isinstance(first, dict) else None
    return isinstance(token, dict) and ids.get(str(token.get("id"))) == bos


def check(file: Path, values: Mapping[str, Any]) -> None:
    """UserError unless a file is a byte-level BPE whose ids spell what they were made of."""
    model = read_section(file, values, "model")
    kind = model.get("type", "BPE")
    if kind != "BPE":
        raise UserError(
            f"{file}: the tokenizer is a byte-level {kind} model, no BPE", _OTHER_FAMILY
        )

    for key in ("continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(key):
            raise UserError(
                f"{file}: {key} is {show_value(model[key])}, which no byte-level BPE has",
                _OTHER_FAMILY,
            )

    if not is_byte_level({**values, "decoder": None}):
        raise UserError(
            f"{file}: its decoder reads bytes, and no step before makes them of a text",
            _OTHER_FAMILY,
        )

    decoder = values.get("decoder")
    if not isinstance(decoder, dict) or decoder.get("type") != _KIND:
        raise UserError(
            f"{file}: its texts are bytes, and its decoder does not read them (decoder "
            f"{show_value(decoder and decoder.get('type'))})",
            _OTHER_FAMILY,
        )

    _check_items(file, model)


def _check_items(file: Path, model: Mapping[str, Any]) -> None:
    """UserError unless ids are numbers, each of one item, and merges join items of the model."""
    vocabulary = read_section(file, model, "vocab")
    for text, token in vocabulary.items():
        added_tokens.check_text(file, text)
        if type(token) is not int or token < 0:
            raise UserError(f"{file}: {show_value(token)} is no id of a token", FETCH)

    if not vocabulary or len(set(vocabulary.values())) < len(vocabulary):
        raise UserError(f"{file}: its vocabulary is empty, or an id stands there twice", FETCH)

    for number, merge in enumerate(added_tokens.read_list(file, model, "merges"), 1):
        match merge.split(" ") if isinstance(merge, str) else merge:
            case [str(left), str(right)] if {left, right, left + right} <= vocabulary.keys():
                continue
            case _:
                raise UserError(
                    f"{file}: merge {number} is no pair of items of its vocabulary", FETCH
                )


# --- writing ---
def dump_files(model: ByteLevelModel, template: str | None) -> dict[str, bytes]:
    """Return the files of a tokenizer, name -> content."""
    names = list_names(model.values)
    roles = {"bos_token": model.bos, "eos_token": model.eos}
    named = {role: names[token] for role, token in roles.items() if token is not None}
    settings = {
        "clean_up_tokenization_spaces": False,
        **named,
        **model.settings,
        **({"chat_template": template} if template else {}),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    special = model.special or named
    written = model.original or json.dumps(model.values, ensure_ascii=False).encode()
    return {
        JSON: written,
        SETTINGS: json.dumps(settings, indent=2, ensure_ascii=False).encode(),
        SPECIAL: json.dumps(special, indent=2, ensure_ascii=False).encode(),
    }


def make_post_processor(name: str, token: int) -> dict[str, Any]:
    """Return the part of a `tokenizer.json` that puts BOS in front of a text."""

    def place(part: str, number: int) -> list[dict[str, Any]]:
        return [
            {"SpecialToken": {"id": name, "type_id": number}},
            {"Sequence": {"id": part, "type_id": number}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": place("A", 0),
        "pair": place("A", 0) + place("B", 1),
        "special_tokens": {name: {"id": name, "ids": [token], "tokens": [name]}},
    }
