"""Read a byte-level BPE tokenizer from the metadata of a GGUF file, and write it there.

GGUF has the items, their kinds, the merges, the ids with a role, and the name of the way in which
texts are divided. A `tokenizer.json` is made of them, as the model came with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llama2.errors import UserError
from llama2.formats.binary import FETCH_AGAIN
from llama2.formats.gguf_metadata import ENDS
from llama2.formats.stored_model import GIVE_ITS_OWN, StoredModel
from llama2.model.llama import LlamaConfig
from llama2.terminal_text import show_value
from llama2.tokenizer import byte_level_json
from llama2.tokenizer.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, find_name
from llama2.tokenizer.sentencepiece_model import (
    CONTROL,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    require_fitting_size,
)
from llama2.tokenizer.stored import ByteLevelModel

KIND = "gpt2"
_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_MERGES, _PRE = "tokenizer.ggml.merges", "tokenizer.ggml.pre"
_ADDS_BOS = "tokenizer.ggml.add_bos_token"
_ROLES = {
    "bos_token": "tokenizer.ggml.bos_token_id",
    "eos_token": "tokenizer.ggml.eos_token_id",
    "unk_token": "tokenizer.ggml.unknown_token_id",
    "pad_token": "tokenizer.ggml.padding_token_id",
}
_GIVE = f"{FETCH_AGAIN}, or give a tokenizer: --tokenizer FILE"


# --- reading ---
def build_model(path: Path, metadata: Mapping[str, Any], config: LlamaConfig) -> ByteLevelModel:
    """Return the tokenizer in the metadata. UserError if it is damaged, or divides texts in an
    unknown way."""
    name = metadata.get(_PRE)
    known = PRE_TOKENIZERS.get(name) if isinstance(name, str) else None
    if known is None:
        raise UserError(
            f"{path}: its tokenizer divides texts in the way {show_value(name)} "
            f"({_PRE}), which is unknown",
            "give the tokenizer.json that came with the model: --tokenizer FILE",
        )

    try:
        return _build(path, metadata, config, known)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise UserError(f"{path}: the tokenizer in its metadata is damaged", _GIVE) from None


def _build(
    path: Path, metadata: Mapping[str, Any], config: LlamaConfig, known: PreTokenizer
) -> ByteLevelModel:
    texts, kinds = _read_items(path, metadata, config)
    roles = {role: int(metadata[key]) for role, key in _ROLES.items() if key in metadata}
    bos, eos = roles.get("bos_token"), roles.get("eos_token", config.stops[0])
    ends = tuple(int(metadata[key]) for key in ENDS if key in metadata)
    if bos is not None and kinds[bos] == NORMAL and not metadata.get(_ADDS_BOS):
        bos = None  # the id that llama.cpp falls back to

    adds_bos = bos is not None and bool(metadata.get(_ADDS_BOS, known.adds_bos))

    special = {eos, *ends} | ({bos} if bos is not None else set())
    added = [
        _make_added(token, text, special=kind != USER_DEFINED or token in special)
        for token, (text, kind) in enumerate(zip(texts, kinds))
        if kind != NORMAL or token in special
    ]
    processor = byte_level_json.make_post_processor(texts[bos or 0], bos or 0) if adds_bos else None
    values = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": known.normalizer,
        "pre_tokenizer": known.steps,
        "post_processor": processor,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": known.ignore_merges,
            "vocab": _list_vocabulary(texts, {entry["id"] for entry in added}),
            "merges": metadata.get(_MERGES),
        },
    }
    byte_level_json.check(path, values)
    model = ByteLevelModel(
        values,
        _describe_settings(texts, roles, added, adds_bos),
        {},
        bos,
        eos,
        ends=ends,
        adds_bos=adds_bos,
        controls=frozenset(entry["id"] for entry in added if entry["special"]),
        size=config.vocab_size,
    )
    byte_level_json.refuse_typed(path, model, special)
    return model


def _read_items(
    path: Path, metadata: Mapping[str, Any], config: LlamaConfig
) -> tuple[list[str], list[int]]:
    """Return the texts and kinds of the items, without the padding at their end."""
    columns = metadata[_TOKENS], metadata.get(_TYPES)
    for column in columns:
        if not isinstance(column, list) or len(column) != config.vocab_size:
            raise UserError(
                f"{path}: {_TOKENS} and .token_type do not both have {config.vocab_size} items, as "
                "the embeddings have",
                _GIVE,
            )

    texts, kinds = map(list, columns)
    while kinds and kinds[-1] == UNUSED:
        texts.pop()
        kinds.pop()

    return texts, kinds


def _make_added(token: int, text: str, special: bool) -> dict[str, Any]:
    return {
        "id": token,
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def _list_vocabulary(texts: Sequence[str], added: set[int]) -> dict[str, int]:
    """Return the items of the model, text -> id: all but the added tokens behind the last."""
    last = max(token for token in range(len(texts)) if token not in added)
    vocabulary = {text: token for token, text in enumerate(texts[: last + 1])}
    if len(vocabulary) <= last:
        raise ValueError("an item stands there twice")

    return vocabulary


def _describe_settings(
    texts: Sequence[str], roles: Mapping[str, int], added: list[dict[str, Any]], adds_bos: bool
) -> dict[str, Any]:
    """Return the tokenizer_config.json of a tokenizer."""
    special = {entry["id"] for entry in added if entry["special"]}
    decoder = {str(entry["id"]): dict(entry) for entry in added}
    for entry in decoder.values():
        del entry["id"]

    named = {role: texts[token] for role, token in roles.items() if token in special}
    return {"add_bos_token": adds_bos, "added_tokens_decoder": decoder, **named}


# --- writing ---
def describe_tokenizer(writer: Any, model: StoredModel, tokenizer: ByteLevelModel) -> None:
    """Give a `GGUFWriter` the tokenizer of a model, padded to its embeddings.

    UserError if the tokenizer has more items than the model has embeddings, and if llama.cpp has no
    name for the way in which it divides texts.
    """
    names, added = (
        byte_level_json.list_names(tokenizer.values),
        byte_level_json.list_added(tokenizer.values),
    )
    size = model.config.vocab_size
    if max(names) >= size:
        require_fitting_size(model.tokenizer, max(names) + 1, size, GIVE_ITS_OWN)

    writer.add_tokenizer_model(KIND)
    writer.add_tokenizer_pre(_require_name(model, tokenizer))
    writer.add_token_list([names.get(token, f"[PAD{token}]").encode() for token in range(size)])
    writer.add_token_types([_find_kind(token, names, added, tokenizer) for token in range(size)])
    merges = byte_level_json.list_merges(tokenizer.values["model"])
    writer.add_token_merges([" ".join(merge) for merge in merges])

    writer.add_bos_token_id(tokenizer.eos if tokenizer.bos is None else tokenizer.bos)
    for key, token in zip(ENDS, dict.fromkeys((tokenizer.eos, *model.config.stops))):
        writer.add_uint32(key, token)

    ids = {name: token for token, name in names.items()}
    padding = ids.get(byte_level_json.read_role(tokenizer, "pad_token") or "")
    writer.add_pad_token_id(tokenizer.eos if padding is None else padding)
    writer.add_add_bos_token(tokenizer.adds_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _require_name(model: StoredModel, tokenizer: ByteLevelModel) -> str:
    name = find_name(tokenizer.values)
    if name is None:
        raise UserError(
            f"{model.tokenizer}: llama.cpp has no name for the way in which this tokenizer divides "
            "texts (normalizer and pre_tokenizer), so GGUF cannot hold it",
            "export it in Hugging Face's format",
        )

    return name


def _find_kind(
    token: int,
    names: Mapping[int, str],
    added: Mapping[int, Mapping[str, Any]],
    tokenizer: ByteLevelModel,
) -> int:
    if token not in names:
        return UNUSED
    if token in tokenizer.controls:
        return CONTROL

    return USER_DEFINED if token in added else NORMAL


def describe_losses(tokenizer: ByteLevelModel) -> list[str]:
    """List, in sentences for the user, what llama.cpp does otherwise with a text."""
    notes = []
    if tokenizer.values.get("normalizer") is not None:
        notes.append(
            "the tokenizer normalises texts (NFC), which llama.cpp does not: characters written as "
            "a letter and a mark get other tokens there"
        )

    added = byte_level_json.list_added(tokenizer.values).values()
    if any(entry[flag] for entry in added for flag in ("lstrip", "rstrip", "single_word")):
        notes.append(
            "added tokens take spaces beside them, or are words alone; GGUF has no place for that"
        )

    return notes
