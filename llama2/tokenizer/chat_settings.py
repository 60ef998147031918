"""What a model directory says, beside its weights, of how the model is talked to: ids that end
answers, chat template.

Tokenizers and models both ask, and neither knows the other. Every id that `config.json` or
`generation_config.json` names as EOS ends an answer, and so does an item that was added to the
tokenizer and is its `eos_token`: transformers generates by the second file, vLLM by the tokenizer's
EOS and the second file, and an end that only the first names was an end in training. A template is
`chat_template.jinja`, or what `tokenizer_config.json` holds, in the order of transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama2 import json_files
from llama2.errors import UserError
from llama2.terminal_text import shown

CONFIG, GENERATION = "config.json", "generation_config.json"
TEMPLATE, SETTINGS, ADDED = "chat_template.jinja", "tokenizer_config.json", "added_tokens.json"
FAST, SPECIAL = "tokenizer.json", "special_tokens_map.json"
_DEFAULT = "default"  # of several templates by name


def stop_ids(directory: Path, size: int | None = None) -> tuple[int, ...]:
    """The ids that end an answer, each once, in the order in which the files name them; () if none
    does.

    UserError for what is no id, and for an id outside of a vocabulary of `size`.
    """
    found: list[int] = []
    for file in (directory / CONFIG, directory / GENERATION):
        listed = json_files.json_object(file).get("eos_token_id") if file.is_file() else None
        ids = listed if isinstance(listed, list) else [] if listed is None else [listed]
        if not ids and listed is not None:
            raise UserError(f"{file}: eos_token_id is []", "name an id that ends an answer")

        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int):
                raise UserError(
                    f"{file}: eos_token_id is {shown(listed)}",
                    "a whole number was expected, or a list of them",
                )
            if size is not None and not 0 <= token < size:
                raise UserError(
                    f"{file}: eos_token_id is {token}",
                    f"it must be an id of the vocabulary, at least 0 and below vocab_size {size}",
                )

            found.append(token)

    named = _added_end(directory)
    # beyond the vocabulary no model can say it
    if named is not None and (size is None or named < size):
        found.append(named)

    return tuple(dict.fromkeys(found))


def _added_end(directory: Path) -> int | None:
    """The id of the tokenizer's EOS, if that is an item added behind those of its model."""
    settings, special = (_object(directory / name) for name in (SETTINGS, SPECIAL))
    end = settings.get("eos_token") or special.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end

    if not isinstance(end, str):
        return None

    listed = settings.get("added_tokens_decoder")
    told = {
        text: token
        for token, item in (listed.items() if isinstance(listed, dict) else ())
        if isinstance(text := _content(item), str)
    } | _object(directory / ADDED)
    found = told[end] if end in told else _fast_id(directory, end)

    if isinstance(found, str) and found.isascii() and found.isdigit():
        return int(found[:20])

    return found if isinstance(found, int) and not isinstance(found, bool) and found >= 0 else None


def _fast_id(directory: Path, text: str) -> Any:
    """The id of a token that `tokenizer.json` adds: transformers 5 writes it there alone."""
    listed = _object(directory / FAST).get("added_tokens")
    entries = listed if isinstance(listed, list) else []
    return next((entry.get("id") for entry in entries if _content(entry) == text), None)


def _content(entry: Any) -> Any:
    return entry.get("content") if isinstance(entry, dict) else None


def _object(file: Path) -> dict[str, Any]:
    return json_files.json_object(file) if file.is_file() else {}


def chat_template(directory: Path) -> str | None:
    """The chat template in a directory, in Jinja; None if there is none."""
    file = directory / TEMPLATE
    if file.is_file():
        return json_files.content(file).decode("utf-8", "replace")

    file = directory / SETTINGS
    found = json_files.json_object(file).get("chat_template") if file.is_file() else None
    if isinstance(found, list):  # several, each with a name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get(_DEFAULT, next(iter(named.values()), None))

    if found is not None and not isinstance(found, str):
        raise UserError(f"{file}: chat_template is {str(found)[:60]!r}", "a text was expected")

    return found or None
