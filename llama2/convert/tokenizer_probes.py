"""Compare two tokenizers: their vocabularies, and their ids of texts that are hard to read.

The texts try the known differences between programs: control tokens that somebody typed, the tags
of the chat format, spaces and newlines in every place, characters that are several, that combine,
that run from right to left or that no vocabulary holds, and runs far longer than any item.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llama2.errors import UserError
from llama2.tokenizer import sentencepiece_model
from llama2.tokenizer.comparison import find_parting
from llama2.tokenizer.stored import StoredTokenizer
from llama2.tokenizer.tokenizer import Tokenizer

_RANDOM = 200
_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz",
    " \t\n\r\u00a0\u2028\u3000",
    "0123456789.,-+",
    "<>[]/|_s▁INSTYSunk",
    "äöüßéèñçøłžő",
    "абвгдежзик",
    "אבגדהוזח",
    "ابتثجحخد",
    "的一是不了人我在有他",
    "กขคงจฉช",
    "あいうアイウ",
    "\u0301\u0308\u0323\u200d\u200b\ufe0f\u202e",
    "😀👍🏽🇩🇪❤",
    "\x00\x01\x07\x1b\x7f\ufeff\ufffd\U000e0041",
)
_FIXED = (
    "",
    " ",
    "  ",
    "   leading",
    "trailing   ",
    "in   between",
    "\n",
    "\n\n\n",
    "a\nb\r\nc\rd",
    "\ttab\t",
    "a\u00a0b",
    "<s>",
    "</s>",
    "<unk>",
    "<s> </s> <unk>",
    "<0x41>",
    "<0x0A>",
    "<pad>",
    "[PAD0]",
    "</ s>",
    "< s>",
    "<S>",
    "⁇",
    " ⁇ ",
    "▁",
    "▁▁a",
    "a▁b",
    " ▁ ",
    "<|im_start|>user",
    "<|endoftext|>",
    "[INST]",
    "[/INST]",
    "[INST] hello [/INST] answer </s><s>[INST] again [/INST]",
    "<<SYS>>\nsystem\n<</SYS>>\n\nhi",
    "0",
    "00",
    "1234567890",
    "3.14159",
    "1,000,000",
    "-5e-3",
    "٠١٢٣",
    "Ⅷ½²",
    "😀",
    "👍🏽",
    "👩\u200d👩\u200d👧\u200d👦",
    "🇩🇪",
    "❤\ufe0f",
    "a😀b",
    "e\u0301",
    "é",
    "o\u0323\u0308",
    "Z\u0351\u036b\u0343",
    "ﬁ",
    "\u212b",
    "\u00c5",
    "مرحبا بالعالم",
    "שלום עולם",
    "a\u202eb\u202cc",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "안녕하세요",
    "こんにちは世界",
    "你好，世界",
    "人人生而自由，在尊严和权利上一律平等。",
    "中文English混合123",
    "𠮷野家",
    "\U00013080",
    "\ue000",
    "\U0010ffff",
    "\x00",
    "a\x00b",
    "\x01\x02\x7f\x80\x9f",
    "\ufeffmark",
    "\ufffd",
    "\u200b",
    "\u2028\u2029",
    "a" * 5000,
    " " * 3000,
    "\n" * 1000,
    "😀" * 500,
    "word " * 2000,
    "1" * 3000,
    "的" * 1000,
    "ab" * 4097 + " c",
    "def f(x):\n    return x  # comment\n",
    "https://example.org/a?b=c&d=%20#e",
    '{"k": [1, 2]}',
    "\\n\\t\\u0041",
    "Don't stop—“quoted”…",
    "ſtraße ẞ İı",
    "A" * 16 + "a" * 17,
)
# halves of characters, which no UTF-8 text has: both must refuse them
UNWRITABLE = ("\ud800", "a\udfffb", "\ud83d and the rest")

# formats have no place for these settings: their readers give a tokenizer that keeps texts
_LOST: Mapping[str, tuple[str, ...]] = {
    "llama2c": ("extra_spaces_removed", "normalised"),
    "gguf": ("normalised",),
}
_CHANGES = {
    "extra_spaces_removed": "spaces at the ends of a text and all but one inside are dropped",
    "normalised": "characters of a text are replaced by others",
}


@dataclass(frozen=True)
class Tokenizers:
    """The result of a comparison of two tokenizers.

    `identical`: both are the same file, byte for byte. `difference` is the first one, in words.
    """

    items: int
    texts: int
    identical: bool
    difference: str | None
    notes: tuple[str, ...] = ()


def list_texts(seed: int = 0) -> list[str]:
    """Return the fixed texts, and random ones of hard characters."""
    draw = random.Random(seed)
    texts = list(_FIXED)
    for _ in range(_RANDOM):
        length = draw.randint(1, 60)
        texts.append("".join(draw.choice(draw.choice(_ALPHABETS)) for _ in range(length)))

    return texts


def compare_tokenizers(
    a: Path | StoredTokenizer, b: Path | StoredTokenizer, formats: Collection[str] = ()
) -> Tokenizers:
    """Compare two tokenizers. UserError if one cannot be loaded.

    `formats` are those of their checkpoints: settings that one has no place for are no difference,
    but a note.
    """
    x, y = Tokenizer.load(a), Tokenizer.load(b)
    identical = x.fingerprint == y.fingerprint
    lost = {name for form in formats for name in _LOST.get(form, ())}
    x, y, notes = _drop_settings(x, y, lost)
    texts, items = list_texts(), min(x.vocab_size, y.vocab_size)

    if x.vocab_size != y.vocab_size:
        notes.append(
            f"the vocabularies have {x.vocab_size} and {y.vocab_size} items; those beyond are in "
            "no text"
        )

    difference = next(_find_differences(x, y, items, texts), None)
    return Tokenizers(items, len(texts) + len(UNWRITABLE), identical, difference, tuple(notes))


def _drop_settings(
    a: Tokenizer, b: Tokenizer, lost: Collection[str]
) -> tuple[Tokenizer, Tokenizer, list[str]]:
    """Return both tokenizers without different settings that a format has no place for.

    And those settings, in sentences.
    """
    if a.is_byte_level or b.is_byte_level:
        return a, b, []

    x, y = (sentencepiece_model.parse(each.model, "tokenizer.model") for each in (a, b))
    different = [name for name in sorted(lost) if getattr(x, name) != getattr(y, name)]
    if not different:
        return a, b, []

    off: dict[str, Any] = dict.fromkeys({*different, "normalised"}, False)
    models = [sentencepiece_model.build(replace(each, **off)) for each in (x, y)]
    notes = [
        f"{_CHANGES[name]} by one of the tokenizers, which one of the formats does not hold: some "
        "texts get other tokens"
        for name in different
    ]
    return Tokenizer(models[0]), Tokenizer(models[1]), notes


def _find_differences(
    a: Tokenizer, b: Tokenizer, items: int, texts: Sequence[str]
) -> Iterator[str]:
    for token in range(items):
        x, y = a.bytes_of(token), b.bytes_of(token)
        if x != y:
            yield f"item {token} is {_show(x)} and {_show(y)}"

    for text in texts:
        ids, others = a.encode(text), b.encode(text)
        if ids != others:
            at = find_parting(ids, others)
            yield (
                f"the text {_show(text)} is {len(ids)} and {len(others)} tokens, which part at "
                f"{at}: {ids[at : at + 3]} and {others[at : at + 3]}"
            )
        elif a.decode(ids) != b.decode(ids):
            yield f"the tokens of {_show(text)} are two texts"

    for text in UNWRITABLE:
        if _refuses(a, text) != _refuses(b, text):
            yield f"one of them takes {_show(text)}, which is no text"


def _refuses(tokenizer: Tokenizer, text: str) -> bool:
    try:
        tokenizer.encode(text)
    except UserError:
        return True

    return False


def _show(value: str | bytes) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
