"""Find the tokenizer in a directory: `tokenizer.model` and what was added, or `tokenizer.json`."""

from __future__ import annotations

import functools
import json
from pathlib import Path

from llama2.errors import UserError
from llama2.tokenizer import added_tokens, sentencepiece_model, tokenizer_json
from llama2.tokenizer.chat_settings import JSON, MODEL, SETTINGS, SPECIAL, read_object
from llama2.tokenizer.sentencepiece_model import (
    BOS_ID,
    UNKNOWN_ID,
    Vocabulary,
)
from llama2.tokenizer.stored import StoredTokenizer


def find_tokenizer(directory: Path, vocab_size: int | None = None) -> StoredTokenizer | None:
    """Return the tokenizer in a directory: `tokenizer.model`, else `tokenizer.json`, else None.

    A `tokenizer.model` of Llama 3 is of another kind than the name says: `tokenizer.json` is taken.
    `vocab_size` is that of the model it is for, where no config.json beside it says so.
    """
    model, file = directory / MODEL, directory / JSON
    if model.exists() and not (file.exists() and sentencepiece_model.is_tiktoken(model)):
        return StoredTokenizer(str(model), functools.cache(lambda: _read_model(model, vocab_size)))

    return tokenizer_json.open_stored(file, vocab_size) if file.exists() else None


def _read_model(model: Path, vocab_size: int | None) -> bytes:
    """Return a `tokenizer.model` with the tokens that the files beside it add."""
    directory, settings, file = model.parent, model.with_name(SETTINGS), model.with_name(JSON)
    content = sentencepiece_model.read_model(model)
    if read_object(settings).get("add_prefix_space") is False:
        raise UserError(
            f"{settings}: add_prefix_space is false: no space is put in front of a text, which "
            "only models of other families were trained on",
            f"if this one was trained with {MODEL} as it is, take the key out, or import it with "
            f"--tokenizer {model}",
        )

    in_json = added_tokens.list_json_tokens(file, read_object(file))
    added = added_tokens.collect(directory, in_json)
    if not added:
        return content

    items = sentencepiece_model.parse(content, str(model)).items
    known = len(items)
    added_tokens.check_conflicts(directory, added, items)
    added = added_tokens.drop_unreachable(directory, added, known, vocab_size)

    more = [
        added[token].make_item() if token in added else sentencepiece_model.make_padding(token)
        for token in range(known, added_tokens.count_items(directory, added, known))
    ]
    return sentencepiece_model.extend(content, more)


def dump_settings(
    vocabulary: Vocabulary, eos: int, template: str | None, space_once: bool = False
) -> dict[str, bytes]:
    """Return the two small files beside a tokenizer, name -> content.

    `eos` is the id that other programs take for EOS, `template` the chat template, if there is one.
    `space_once`: a space is put in front of a whole text, not of each piece between added tokens.
    """
    items = vocabulary.items
    names = {
        "bos_token": items[BOS_ID].text,
        "eos_token": items[eos].text,
        "unk_token": items[UNKNOWN_ID].text,
    }
    added = added_tokens.describe_added(items)
    values = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(token): entry for token, entry in added.items()},
        **({"chat_template": template} if template else {}),
        "clean_up_tokenization_spaces": False,
        "legacy": not space_once,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **names,
    }
    return {
        SETTINGS: json.dumps(values, indent=2).encode(),
        SPECIAL: json.dumps(names, indent=2).encode(),
    }
