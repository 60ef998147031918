"""Whether two tokenizers are one: every item of their vocabularies, and what they make of texts
that are hard to read.

The texts try what has gone wrong between programs: control tokens that somebody typed, the tags of
the chat format, spaces and newlines in every place, characters that are several, that combine, that
run from right to left or that no vocabulary holds, and runs far longer than any item.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from llama2.errors import UserError
from llama2.tokenizer import sentencepiece_model
from llama2.tokenizer.sentencepiece_model import StoredTokenizer, Vocabulary
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


@dataclass(frozen=True)
class Tokenizers:
    """What two tokenizers make of the same texts."""

    items: int
    texts: int
    identical: bool
    """whether both are the same file, byte for byte"""
    difference: str | None
    """the first thing in which they differ, in words"""
    notes: tuple[str, ...] = ()


def texts(seed: int = 0) -> list[str]:
    """The fixed texts, and random ones out of hard characters."""
    fixed = [
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
    ]
    draw = random.Random(seed)
    return fixed + [
        "".join(draw.choice(draw.choice(_ALPHABETS)) for _ in range(draw.randint(1, 60)))
        for _ in range(_RANDOM)
    ]


UNWRITABLE = ("\ud800", "a\udfffb", "\ud83d and the rest")
"""halves of characters, which no UTF-8 text has: both must refuse them"""


_UNHELD: Mapping[str, tuple[str, ...]] = {
    "llama2c": ("extra_spaces_removed", "normalised"),
    "gguf": ("normalised",),
}
"""what a format does not hold of a tokenizer: its reader gives one that leaves a text as it is"""
_DONE = {
    "extra_spaces_removed": "spaces at the ends of a text and all but one inside are dropped",
    "normalised": "characters of a text are replaced by others",
}


def compare(
    a: Path | StoredTokenizer, b: Path | StoredTokenizer, formats: Collection[str] = ()
) -> Tokenizers:
    """Two SentencePiece models. UserError if one cannot be loaded.

    `formats` are those of their checkpoints: what one of them does not hold is no difference, but a
    note.
    """
    one, other = Tokenizer.load(a), Tokenizer.load(b)
    identical = one.fingerprint == other.fingerprint
    one, other, notes = _as_held(
        one, other, {name for form in formats for name in _UNHELD.get(form, ())}
    )
    found = texts()
    items = min(one.vocab_size, other.vocab_size)

    if one.vocab_size != other.vocab_size:
        notes += (
            f"the vocabularies have {one.vocab_size} and {other.vocab_size} items; those beyond are in no text",
        )

    return Tokenizers(
        items,
        len(found) + len(UNWRITABLE),
        identical,
        next(_differences(one, other, items, found), None),
        notes,
    )


def _as_held(
    one: Tokenizer, other: Tokenizer, unheld: Collection[str]
) -> tuple[Tokenizer, Tokenizer, tuple[str, ...]]:
    """Both tokenizers without what one has and a format does not hold, and what that is, in
    sentences."""
    parsed = [sentencepiece_model.parse(each.model, "tokenizer.model") for each in (one, other)]
    apart = [
        name for name in sorted(unheld) if getattr(parsed[0], name) != getattr(parsed[1], name)
    ]
    if not apart:
        return one, other, ()

    plain = [
        Tokenizer(
            sentencepiece_model.build(
                Vocabulary(
                    each.items,
                    each.dummy_prefix,
                    each.extra_spaces_removed and "extra_spaces_removed" not in apart,
                )
            )
        )
        for each in parsed
    ]
    return (
        plain[0],
        plain[1],
        tuple(
            f"{_DONE[name]} by one of the tokenizers, which one of the formats does not hold: "
            "some texts get other tokens"
            for name in apart
        ),
    )


def _differences(one: Tokenizer, other: Tokenizer, items: int, found: list[str]) -> Iterator[str]:
    for token in range(items):
        left, right = one.bytes_of(token), other.bytes_of(token)
        if left != right:
            yield f"item {token} is {_shown(left)} and {_shown(right)}"

    for text in found:
        left_ids, right_ids = one.encode(text), other.encode(text)
        if left_ids != right_ids:
            place = next(
                (
                    index
                    for index, pair in enumerate(zip(left_ids, right_ids))
                    if pair[0] != pair[1]
                ),
                min(len(left_ids), len(right_ids)),
            )
            yield (
                f"the text {_shown(text)} is {len(left_ids)} and {len(right_ids)} tokens, which part at {place}: "
                f"{left_ids[place : place + 3]} and {right_ids[place : place + 3]}"
            )
        elif one.decode(left_ids) != other.decode(left_ids):
            yield f"the tokens of {_shown(text)} are two texts"

    for text in UNWRITABLE:
        if _refuses(one, text) != _refuses(other, text):
            yield f"one of them takes {_shown(text)}, which is no text"


def _refuses(tokenizer: Tokenizer, text: str) -> bool:
    try:
        tokenizer.encode(text)
    except UserError:
        return True

    return False


def _shown(value: str | bytes) -> str:
    shown = ascii(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
