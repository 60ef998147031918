"""Read from a model directory how to talk to the model: the ids that end answers, the template.

Tokenizers and models both need this, and neither imports the other. Every id that `config.json` or
`generation_config.json` names as EOS ends an answer, and so does an item that was added to the
tokenizer and is its `eos_token`: transformers generates by the second file, vLLM by the tokenizer's
EOS and the second file, and an end that only the first names was an end in training. A template is
`chat_template.jinja`, or a part of `tokenizer_config.json`, in the order of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama2 import json_files
from llama2.errors import UserError
from llama2.terminal_text import show_value

CONFIG, GENERATION = "config.json", "generation_config.json"
TEMPLATE, SETTINGS, ADDED = "chat_template.jinja", "tokenizer_config.json", "added_tokens.json"
MODEL, JSON, SPECIAL = "tokenizer.model", "tokenizer.json", "special_tokens_map.json"
_DEFAULT = "default"  # of several templates by name


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file; an empty one if there is no such file."""
    return json_files.read_object(file, "fetch the file again") if file.exists() else {}


def read_section(file: Path, values: Mapping[str, Any], key: str) -> dict[str, Any]:
    """Return the JSON object under a key; an empty one if there is none."""
    section = values.get(key) or {}
    if not isinstance(section, dict):
        raise UserError(f"{file}: {key} is {show_value(section)}", "a JSON object was expected")

    return section


def read_stop_ids(directory: Path, size: int | None = None) -> tuple[int, ...]:
    """Return the ids that end an answer, each once, in the order of the files; () if none does.

    UserError for a value that is no id, and for an id outside of a vocabulary of `size`.
    """
    ids = [
        *_read_ends(directory / CONFIG, size),
        *_read_ends(directory / GENERATION, size),
    ]
    end = _find_added_end(directory)

    # a model cannot say an id beyond its vocabulary
    if end is not None and (size is None or end < size):
        ids.append(end)

    return tuple(dict.fromkeys(ids))


def _read_ends(file: Path, size: int | None) -> list[int]:
    value = read_object(file).get("eos_token_id")
    if value is None:
        return []

    ids: list[int] = value if isinstance(value, list) else [value]
    if not ids:
        raise UserError(f"{file}: eos_token_id is []", "name an id that ends an answer")

    for token in ids:
        if type(token) is not int:
            raise UserError(
                f"{file}: eos_token_id is {show_value(value)}",
                "a whole number was expected, or a list of them",
            )
        if size is not None and not 0 <= token < size:
            raise UserError(
                f"{file}: eos_token_id is {token}",
                f"it must be an id of the vocabulary, at least 0 and below vocab_size {size}",
            )

    return ids


def _find_added_end(directory: Path) -> int | None:
    """Return the id of the tokenizer's EOS if that item was added behind those of its model."""
    settings, special = (read_object(directory / name) for name in (SETTINGS, SPECIAL))
    end = read_text(settings.get("eos_token") or special.get("eos_token"))
    if end is None:
        return None

    ids = (token for text, token in _list_added(directory, settings) if text == end)
    digits = str(next(ids, None))[:20]
    return int(digits) if digits.isascii() and digits.isdigit() else None


def _list_added(directory: Path, settings: Mapping[str, Any]) -> Iterator[tuple[str | None, Any]]:
    """Yield the text and id of each token that files add; transformers 5 has tokenizer.json alone.

    Faults are passed over: the tokenizer may be replaced by a better one.
    """
    yield from read_object(directory / ADDED).items()
    listed = settings.get("added_tokens_decoder")
    if isinstance(listed, dict):
        yield from ((read_text(entry), token) for token, entry in listed.items())

    listed = read_object(directory / JSON).get("added_tokens")
    for entry in listed if isinstance(listed, list) else []:
        if isinstance(entry, dict):
            yield read_text(entry), entry.get("id")


def read_text(entry: Any) -> str | None:
    """Return the text of a token in a JSON file: the entry itself, or its `content`."""
    text = entry.get("content") if isinstance(entry, dict) else entry
    return text if isinstance(text, str) else None


def puts_space_once(directory: Path) -> bool:
    """Return whether transformers puts a space in front of a whole text alone: without this, in
    front of each piece of it between control tokens."""
    file = directory / JSON
    if not file.exists():
        return read_object(directory / SETTINGS).get("legacy") is False

    split = read_object(file).get("pre_tokenizer")
    return isinstance(split, dict) and split.get("prepend_scheme") == "first"


def name_template(model: Path) -> str:
    """Name the file in which the chat template of a model stands: in its directory, or itself."""
    file = model / TEMPLATE
    if file.is_file() or not model.is_dir():
        return str(file if file.is_file() else model)

    return str(model / SETTINGS)


def read_chat_template(directory: Path) -> str | None:
    """Return the chat template in a directory, in Jinja; None if there is none."""
    file = directory / TEMPLATE
    if file.is_file():
        return json_files.read_bytes(file).decode("utf-8", "replace")

    file = directory / SETTINGS
    template = read_object(file).get("chat_template")
    if isinstance(template, list):  # several, each with a name
        entries = [entry for entry in template if isinstance(entry, dict)]
        named = {entry.get("name"): entry.get("template") for entry in entries}
        template = named.get(_DEFAULT, next(iter(named.values()), None))

    if template is not None and not isinstance(template, str):
        raise UserError(f"{file}: chat_template is {str(template)[:60]!r}", "a text was expected")

    return template or None
