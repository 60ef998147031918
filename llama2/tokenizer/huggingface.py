"""The tokenizer as Hugging Face's programs read it: what lies beside `tokenizer.model`, and whether
it gives its ids.

transformers 5, vLLM and all else that is built on the library `tokenizers` take `tokenizer.json`.
Where there is none they make one of `tokenizer.model`, and the ids of runs of spaces then depend on
their version. So it is written here, and held against SentencePiece on texts that are hard to read
before anybody relies on it.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from llama2.tokenizer import merges, sentencepiece_model
from llama2.tokenizer.merges import Merge, Merger
from llama2.tokenizer.sentencepiece_model import (
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    USER_DEFINED,
    Vocabulary,
    VocabularyItem,
)

JSON, SETTINGS, SPECIAL = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_SAMPLE = 400  # items that are tried alone, and in a row
_ROWS = 60
_LONGEST = 64  # characters of an item that is tried


# ---- writing
# --------------------------------------------------------------------------------------------------------
class Special(NamedTuple):
    """The ids of the items that stand for something."""

    unknown: int
    bos: int
    eos: int


def fast(vocabulary: Vocabulary, special: Special) -> bytes:
    """The content of `tokenizer.json`."""
    items = vocabulary.items
    return json.dumps(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": token, **entry} for token, entry in _added(items).items()],
            **_pipeline(items[special.bos].text, special.bos),
            "model": _model(items, items[special.unknown].text),
        },
        ensure_ascii=False,
        separators=(",", ":"),
    ).encode()


def settings(vocabulary: Vocabulary, special: Special, template: str | None) -> dict[str, bytes]:
    """The two small files beside it, name -> content, with the chat template of a model, if it has
    one."""
    names = {
        name: vocabulary.items[token].text
        for name, token in (
            ("bos_token", special.bos),
            ("eos_token", special.eos),
            ("unk_token", special.unknown),
        )
    }
    values = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token): entry for token, entry in _added(vocabulary.items).items()
        },
        **({"chat_template": template} if template else {}),
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        **names,
    }
    return {
        SETTINGS: json.dumps(values, indent=2).encode(),
        SPECIAL: json.dumps(names, indent=2).encode(),
    }


def _added(items: Sequence[VocabularyItem]) -> dict[int, dict[str, Any]]:
    """The items that are looked for in a text before all else; padding is none of them."""
    return {
        token: _token(item)
        for token, item in enumerate(items)
        if item.kind in (UNKNOWN, CONTROL, USER_DEFINED)
        and item != sentencepiece_model.padding(token)
    }


def _token(item: VocabularyItem) -> dict[str, Any]:
    """One that users may type is not special."""
    text = item.text.replace(SPACE, " ") if item.kind == USER_DEFINED else item.text
    return {
        "content": text,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": item.kind != USER_DEFINED,
    }


def _pipeline(bos: str, token: int) -> dict[str, Any]:
    """What is done before and after the merges: a space in front, BOS before each text, one space
    less on the way back.
    """

    def template(*parts: tuple[str, int]) -> list[dict[str, Any]]:
        return [
            part
            for name, number in parts
            for part in (
                {"SpecialToken": {"id": bos, "type_id": number}},
                {"Sequence": {"id": name, "type_id": number}},
            )
        ]

    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": SPACE},
                {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": template(("A", 0)),
            "pair": template(("A", 0), ("B", 1)),
            "special_tokens": {bos: {"id": bos, "ids": [token], "tokens": [bos]}},
        },
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


def _model(items: Sequence[VocabularyItem], unknown: str) -> dict[str, Any]:
    found = merges.listed(items)
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": unknown,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": {item.text: token for token, item in enumerate(items)},
        "merges": [" ".join(merge) for merge in found] if _plain(found) else found,
    }


def _plain(found: Sequence[Merge]) -> bool:
    """Whether merges may be lines of two words, which early versions of the library want."""
    return not any(
        " " in left or " " in right or left.startswith("#version") for left, right in found
    )


# ---- verification
# ---------------------------------------------------------------------------------------------------
def unlike(vocabulary: Vocabulary, encode: Callable[[str], list[int]]) -> list[str]:
    """In sentences for the user, where transformers gives other ids; empty for a tokenizer such as
    Llama 2's."""
    notes = vocabulary.describe_losses("transformers")
    typed = [item.text for item in vocabulary.items if item.kind == USER_DEFINED]
    if typed:
        notes.append(
            f"the tokenizer has items that are looked for before all else ({_some(typed)}), and transformers "
            "puts a space behind them: texts with one get other tokens there"
        )

    if not notes and (
        found := difference(merges.merger(vocabulary.items), vocabulary.items, encode)
    ):
        notes.append(
            f"some of the tokenizer's items have equal scores, and {JSON} cannot say so: transformers gives "
            f"other ids for some texts ({found})"
        )

    return notes


def difference(
    merger: Merger, items: Sequence[VocabularyItem], encode: Callable[[str], list[int]]
) -> str | None:
    """The first of some texts that a list of merges makes other ids of than `encode` does, in
    words.

    Items that are looked for before all else are no matter of merges: a text with one is left out.
    """
    sought = [item.text.replace(SPACE, " ") for item in items if item.kind == USER_DEFINED]
    for text in texts(items):
        if any(item in text for item in sought):
            continue

        theirs, ours = merger.encode(text), encode(text)
        if theirs != ours:
            at = next(
                (index for index, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]),
                min(len(ours), len(theirs)),
            )
            shown = ascii(text) if len(text) <= 40 else f"{text[:40]!a}..."
            return f"{shown}: {theirs[at : at + 4]} for {ours[at : at + 4]}"

    return None


def texts(items: Sequence[VocabularyItem]) -> Iterator[str]:
    """Short texts on which tokenizers part: runs of spaces, bytes, typed control items, and items
    of the vocabulary."""
    for run in range(1, 41):
        yield " " * run
        yield f"if x:\n{' ' * run}return{' ' * run}1"

    yield from _hard()

    words = [
        item.text.replace(SPACE, " ")
        for item in items
        if item.kind == NORMAL and len(item.text) <= _LONGEST
    ]
    yield from words[:: len(words) // _SAMPLE + 1]

    draw = random.Random(0)
    parts: list[Callable[[], str]] = [
        lambda: draw.choice(words),
        lambda: draw.choice(words),
        lambda: " " * draw.randint(1, 20),
        lambda: draw.choice("-=_*#.ab\n\t") * draw.randint(1, 12),
        lambda: draw.choice("éß日本語🙂אبक\u200d\u0301"),
    ]

    for _ in range(_ROWS if words else 0):
        yield "".join(draw.choice(parts)() for _ in range(6))


@functools.cache
def _hard() -> tuple[str, ...]:
    return (
        "",
        "a",
        "The mill.  It was built in 1746.",
        "\tx\t\ty",
        "\n\n\n",
        "a\r\nb",
        "a\u00a0b\u3000c",
        "tail   ",
        "<s>",
        "</s>",
        "<unk> </s><s>",
        "<0x0A><0x41>",
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST]",
        "<|im_start|>user",
        "1234567890",
        "3.14159 -5e-3",
        "été naïve Straße İı",
        "日本語のテキスト",
        "привет, мир",
        "مرحبا بالعالم",
        "שלום",
        "नमस्ते",
        "안녕하세요",
        "😀👍🏽👩\u200d👩\u200d👧",
        "e\u0301 \u212b ﬁ",
        "\x00\x01\x7f",
        "\ufeffx\ufffd",
        "\U0010ffff\ue000",
        "def f(x):\n        return {'k': [x]}  # c",
        "a" * 20,
        "-" * 20,
        "=" * 16,
        "ab" * 8,
        "https://example.org/a?b=c&d=%20#e",
        "x" * 33,
        "…“quoted”—don't",
    )


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(ascii, names[:3])) + (", ..." if len(names) > 3 else "")
