"""Read a tokenizer from the metadata of a GGUF file, and write it there."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama2.errors import UserError
from llama2.formats import gguf_bpe
from llama2.formats.binary import FETCH_AGAIN
from llama2.formats.gguf_header import Header
from llama2.formats.gguf_metadata import ENDS
from llama2.formats.stored_model import GIVE_ITS_OWN, StoredModel, require_tokenizer
from llama2.model.llama import LlamaConfig
from llama2.terminal_text import say_once, show_value
from llama2.tokenizer import sentencepiece_model
from llama2.tokenizer.sentencepiece_model import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    Vocabulary,
    VocabularyItem,
    read_model,
    require_fitting_size,
)
from llama2.tokenizer.stored import ByteLevelModel, StoredTokenizer

_MODEL = "tokenizer.ggml.model"
_TOKENS, _SCORES = "tokenizer.ggml.tokens", "tokenizer.ggml.scores"
_UNKNOWN_ID = "tokenizer.ggml.unknown_token_id"
_GIVE = f"{FETCH_AGAIN}, or give a tokenizer: --tokenizer FILE"
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_PAD_SCORE = -1000.0


# --- writing ---
def read_content(model: StoredModel) -> Vocabulary | ByteLevelModel:
    """Return the tokenizer of a checkpoint. UserError if it has none."""
    place = require_tokenizer(model, "which is a part of a GGUF file")
    content = place.read() if isinstance(place, StoredTokenizer) else read_model(place)
    if isinstance(content, ByteLevelModel):
        return content

    return sentencepiece_model.parse(content, str(place))


def describe_losses(tokenizer: Vocabulary | ByteLevelModel) -> list[str]:
    """List, in sentences for the user, what llama.cpp does otherwise with a text."""
    if isinstance(tokenizer, ByteLevelModel):
        return gguf_bpe.describe_losses(tokenizer)

    return tokenizer.describe_losses("llama.cpp")


def describe_tokenizer(
    writer: Any, model: StoredModel, tokenizer: Vocabulary | ByteLevelModel
) -> None:
    """Give a `GGUFWriter` the tokenizer of a model, padded to its embeddings.

    UserError if the tokenizer has more items than the model has embeddings.
    """
    if isinstance(tokenizer, ByteLevelModel):
        gguf_bpe.describe_tokenizer(writer, model, tokenizer)
    else:
        _describe_vocabulary(writer, model, tokenizer)


def _describe_vocabulary(writer: Any, model: StoredModel, vocabulary: Vocabulary) -> None:
    items, size = list(vocabulary.items), model.config.vocab_size
    if len(items) > size:
        require_fitting_size(model.tokenizer, len(items), size, GIVE_ITS_OWN)

    items += [
        VocabularyItem(f"[PAD{token}]", _PAD_SCORE, UNUSED) for token in range(len(items), size)
    ]
    kinds = [item.kind for item in items]
    unknown = kinds.index(UNKNOWN) if UNKNOWN in kinds else 0

    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([item.text.encode() for item in items])
    writer.add_token_scores([item.score for item in items])
    writer.add_token_types(kinds)
    if model.config.bos_token_id is not None:
        writer.add_bos_token_id(model.config.bos_token_id)

    for key, token in zip(ENDS, model.config.stops):
        writer.add_uint32(key, token)

    writer.add_unk_token_id(unknown)
    writer.add_pad_token_id(unknown)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(vocabulary.dummy_prefix)
    writer.add_bool("tokenizer.ggml.remove_extra_whitespaces", vocabulary.extra_spaces_removed)


# --- reading ---
def open_tokenizer(path: Path, header: Header, config: LlamaConfig) -> StoredTokenizer | None:
    """Return the tokenizer in the metadata, of either engine; None if there is none."""
    if _MODEL not in header.metadata:
        return None

    def read_content() -> bytes | ByteLevelModel:
        if header.metadata[_MODEL] == gguf_bpe.KIND:
            return gguf_bpe.build_model(path, header.metadata, config)

        return _build_model(path, header.metadata, config)

    return StoredTokenizer(str(path), functools.cache(read_content))


def _build_model(path: Path, metadata: Mapping[str, Any], config: LlamaConfig) -> bytes:
    kind = metadata[_MODEL]
    if kind != "llama":
        raise UserError(
            f"{path}: its tokenizer is of the kind {show_value(kind)}; only 'llama' (SentencePiece "
            f"BPE) and {gguf_bpe.KIND!r} (byte-level BPE) can be read",
            "take a model of the Llama family; if this is one, give its tokenizer.model or "
            "tokenizer.json: --tokenizer FILE",
        )

    try:
        items = _read_items(path, metadata, config)
        sentencepiece_model.check_items(items, str(path), _GIVE)
        vocabulary = Vocabulary(
            items,
            bool(metadata.get("tokenizer.ggml.add_space_prefix", True)),
            bool(metadata.get("tokenizer.ggml.remove_extra_whitespaces", False)),
        )

        # BOS 1 and EOS 2: the config has the other ends of answers
        return sentencepiece_model.build(vocabulary, unknown=int(metadata.get(_UNKNOWN_ID, 0)))
    except (AttributeError, IndexError, TypeError, ValueError):
        raise UserError(f"{path}: the tokenizer in its metadata is damaged", _GIVE) from None


def _read_items(
    path: Path, metadata: Mapping[str, Any], config: LlamaConfig
) -> list[VocabularyItem]:
    """Return the items, without scores or kinds as llama.cpp completes them."""
    size = config.vocab_size
    texts = metadata.get(_TOKENS)
    scores = metadata.get(_SCORES, [0.0] * size)
    kinds = metadata.get("tokenizer.ggml.token_type")
    if kinds is None:
        kinds = _guess_kinds(texts, metadata, config)

    for column in (texts, scores, kinds):
        if not isinstance(column, list) or len(column) != size:
            raise UserError(
                f"{path}: tokenizer.ggml.tokens, .scores and .token_type do not all have {size} "
                "items, as the embeddings have",
                _GIVE,
            )

    if _SCORES not in metadata:
        say_once(
            f"note: {path}: its tokenizer has no scores (tokenizer.ggml.scores), so texts get "
            "other tokens than the model was trained on, here and in llama.cpp, unless you give "
            "its own: --tokenizer FILE"
        )

    return [
        VocabularyItem(text, float(score), int(kind))
        for text, score, kind in zip(texts or [], scores, kinds)
    ]


def _guess_kinds(texts: Any, metadata: Mapping[str, Any], config: LlamaConfig) -> list[int]:
    """Return the kinds of items: plain, but for the special ones and the bytes."""
    if not isinstance(texts, list):
        return []

    unknown = int(metadata.get(_UNKNOWN_ID, 0))
    special = {unknown: UNKNOWN} | dict.fromkeys(config.stops, CONTROL)
    if config.bos_token_id is not None:
        special[config.bos_token_id] = CONTROL

    plain = [BYTE if _BYTE.fullmatch(text) else NORMAL for text in texts]
    return [special.get(token, kind) for token, kind in enumerate(plain)]
